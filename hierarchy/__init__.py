"""Hierarchies of classes and superclasses, and the folder layouts of data sets."""

from hierarchy.hierarchy import Hierarchy

__all__ = ["Hierarchy"]
