"""Floating-point operations of a training step, and what share of the device's peak it reaches (MFU).

Counts the model's own matrix products once forward and twice backward; recomputed activations are work without merit
and do not count.

Source: Chowdhery et al. 2022, arXiv:2204.02311, appendix B, except that attention counts half its square, because it is
causal.
"""

import time

import numpy as np
import torch
from numpy.typing import NDArray

from align_convert.config import ModelConfig
from align_convert.rules import Place

# Dense bfloat16 FLOP/s without sparsity, from the makers' data sheets, by a part of torch's device name.
_PEAKS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "H800": 989e12, "A100": 312e12, "A800": 312e12}


class StepClock:
    """The time of one step by phase, on the device's own clock tick: each lap waits for the device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._laps: dict[str, float] = {}
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self._started = self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        """Ends a phase."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        self._laps[phase] = now - self._last
        self._last = now

    def rates(self, config: ModelConfig, lengths_B: NDArray[np.int64], *, ranks: int, frozen: bool) -> dict[str, float]:
        """`seconds`, `seconds_<phase>`, `tokens_per_s`; on CUDA `memory_gib` (peak of this rank) and `mfu`."""
        seconds = self._last - self._started
        found = {"seconds": seconds, **{f"seconds_{phase}": lap for phase, lap in self._laps.items()}}
        found["tokens_per_s"] = float(lengths_B.sum()) / seconds
        if self._device.type == "cuda":
            found["memory_gib"] = torch.cuda.max_memory_allocated(self._device) / 2**30
            peak = peak_flops(torch.cuda.get_device_name(self._device))
            if peak is not None:
                found["mfu"] = training_flops(config, lengths_B, frozen=frozen) / (seconds * ranks * peak)
        return found


def peak_flops(device_name: str) -> float | None:
    """Peak bfloat16 FLOP/s of a device; None for one that the table does not know."""
    return next((peak for part, peak in _PEAKS.items() if part in device_name), None)


def training_flops(config: ModelConfig, lengths_B: NDArray[np.int64], *, frozen: bool = False) -> float:
    """Of one forward and backward pass over sequences of these lengths, over all ranks.

    Args:
        frozen: only adapters learn, so the matrices have no gradient of their own, a third of the products.
    """
    tokens, squares = float(lengths_B.sum()), float((lengths_B.astype(np.float64) ** 2).sum())
    attention = config.num_layers * config.num_heads * config.head_dim * squares
    return (4.0 if frozen else 6.0) * matrix_parameters(config) * tokens + 6.0 * attention


def matrix_parameters(config: ModelConfig) -> int:
    """Parameters that each token is multiplied by: all but the embedding, which is looked up, the norms, and experts
    that it does not choose."""
    rules = [rule for rule in config.table.rules if config.holds(rule.when) and rule.place is not Place.FIRST]
    total = 0
    for rule in rules:
        times = config.num_layers if rule.place is Place.LAYER else 1
        if rule.per_expert:
            times *= config.experts_per_token or 0
        for source in rule.sources:
            if len(source.dims) == 2:
                total += times * config.size(source.dims[0]) * config.size(source.dims[1])
    return total
