"""Weights from a trainer's memory straight into an engine's: what both ends must agree on, in one place.

`rectangles` (pure) says who holds which part of which weight and compares checksums, `checksums` computes them on the
device, `memory` lets a process on the same GPU read tensors where they are. The trainer's end is in
`align_core.megatron`, the engine's in `align_rollout`; neither knows the other.
"""
