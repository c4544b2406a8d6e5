"""Which entries of which parameters must go together; see `graph/README.md`."""

from tersor.graph.coupling.couple import Coupling, Run, couple, runs_of
from tersor.graph.coupling.family import Family, Frozen, Kind, Place

__all__ = ["Coupling", "Family", "Frozen", "Kind", "Place", "Run", "couple", "runs_of"]
