"""Where students come from: layers of the teacher, or the teacher's architecture in smaller, with random weights."""

from tersor.distill.students.family import Member, family, scaled
from tersor.distill.students.shallow import Student, every_kth

__all__ = ["Member", "Student", "every_kth", "family", "scaled"]
