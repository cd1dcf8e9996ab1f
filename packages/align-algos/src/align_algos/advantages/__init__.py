"""Advantages from rewards and values, one idea a file, without gradient."""

from align_algos.advantages.gae import GaeOutput, gae
from align_algos.advantages.groups import STD_EPS, group_normalised, leave_one_out, mixed_groups
from align_algos.advantages.returns import returns_to_go
from align_algos.advantages.whitening import whiten
from align_algos.statistics import Moments, merge_moments, moments

__all__ = [
    "STD_EPS",
    "GaeOutput",
    "Moments",
    "gae",
    "group_normalised",
    "leave_one_out",
    "merge_moments",
    "mixed_groups",
    "moments",
    "returns_to_go",
    "whiten",
]
