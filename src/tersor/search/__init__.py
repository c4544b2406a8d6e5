"""The planner: cost and damage tables, the program that chooses, trials, and the advisor."""

from tersor.search.settings import Search
from tersor.search.space import Group, Space, Weight

__all__ = ["Group", "Search", "Space", "Weight"]
