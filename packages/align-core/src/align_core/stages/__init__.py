"""The algorithms, one file each, readable top to bottom: ordinary Python against the contracts, no torch, no Ray."""
