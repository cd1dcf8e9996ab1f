"""Contracts, configuration, stages and the `align` command. Importing it needs no torch, ray, vllm or megatron."""

__version__ = "0.1.0"
