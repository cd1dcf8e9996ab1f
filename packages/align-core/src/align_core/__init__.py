"""Contracts, configuration, stages and the `align` command for aligning language models."""
