"""An AdamW that must not be taken: its state is laid out in another way than torch's."""

from typing import Any


class FusedAdam:
    """Refuses to be made."""

    def __init__(self, *_: Any, **__: Any) -> None:
        raise AssertionError("Transformer Engine's AdamW was taken")


class FusedSGD(FusedAdam):
    """Likewise."""


def multi_tensor_applier(*_: Any, **__: Any) -> None:
    """Not for CPU."""
    raise AssertionError("a CUDA kernel was called")


multi_tensor_l2norm = multi_tensor_scale = multi_tensor_applier
