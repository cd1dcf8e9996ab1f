"""Advantages from rewards and values, one idea a file, without gradient."""

from align_algos.advantages.gae import GaeOutput, gae
from align_algos.advantages.groups import group_normalised, leave_one_out
from align_algos.advantages.whitening import Moments, moments, whiten

__all__ = ["GaeOutput", "Moments", "gae", "group_normalised", "leave_one_out", "moments", "whiten"]
