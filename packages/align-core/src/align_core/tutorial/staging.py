"""Moved: see `align_core.atomic.new_directory`."""

from align_core.atomic import new_directory

__all__ = ["new_directory"]
