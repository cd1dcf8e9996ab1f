"""Contracts, configuration, stages and the `align` command. Importing it needs neither torch, ray, vllm nor megatron."""

__version__ = "0.1.0"
