"""Which superclass a class has, what both are called, and how data sets lie on the disk."""

from hierarchy.hierarchy import Hierarchy

__all__ = ["Hierarchy"]
