"""Are two directories the same model, to the last bit? Compared as Hugging Face tensors, whatever they are stored as.

Zero tolerance: NaN equals NaN of the same bits, and 0.0 differs from -0.0. The settings that change what the weights
compute (rope, norm epsilon, head ...) are compared as well.
"""

from collections.abc import Callable
from dataclasses import fields

import torch

from align_convert.dtypes import dtype_name
from align_convert.source import Source


def _ignore(_: int) -> None:
    """No progress to show."""


def first_difference(a: Source, b: Source, *, progress: Callable[[int], None] = _ignore) -> str | None:
    """What differs first between two sources, as a sentence, or None.

    Args:
        progress: called with the number of bytes just compared.
    Raises:
        ConvertError: one of them is not whole.
    """
    a.check()
    b.check()
    return _names(a, b) or _kinds(a, b) or _settings(a, b) or _values(a, b, progress)


def _names(a: Source, b: Source) -> str | None:
    in_a, in_b = a.config.tensors(), b.config.tensors()
    for name in [*in_a, *in_b]:
        if name not in in_a or name not in in_b:
            return f"tensor {name!r} is only in {str((a if name in in_a else b).root)!r}"
    return None


def _kinds(a: Source, b: Source) -> str | None:
    in_a, in_b = a.tensors(), b.tensors()
    for name in a.config.tensors():
        if in_a[name] != in_b[name]:
            kinds = [f"{dtype_name(dtype)} {list(shape)}" for shape, dtype in (in_a[name], in_b[name])]
            return f"tensor {name!r} is {kinds[0]} in {str(a.root)!r} and {kinds[1]} in {str(b.root)!r}"
    return None


def _settings(a: Source, b: Source) -> str | None:
    for field in fields(a.config):
        if field.name == "hf":  # raw spelling, of no consequence for the weights
            continue
        value_a, value_b = getattr(a.config, field.name), getattr(b.config, field.name)
        if value_a != value_b:
            return f"setting {field.name!r} is {value_a!r} in {str(a.root)!r} and {value_b!r} in {str(b.root)!r}"
    return None


def _values(a: Source, b: Source, progress: Callable[[int], None]) -> str | None:
    for name in a.config.tensors():
        value_a, value_b = a.read_hf(name), b.read_hf(name)
        bits_a, bits_b = _bits(value_a), _bits(value_b)
        if not torch.equal(bits_a, bits_b):
            different = bits_a != bits_b
            where = tuple(torch.nonzero(different)[0].tolist())
            return (
                f"tensor {name!r} differs in {int(different.sum())} of {value_a.numel()} elements, first at {where}: "
                f"{value_a[where].item()!r} in {str(a.root)!r} and {value_b[where].item()!r} in {str(b.root)!r}"
            )
        progress(value_a.numel() * value_a.itemsize)
    return None


def _bits(value: torch.Tensor) -> torch.Tensor:
    """The same memory as integers of the same width."""
    return value.contiguous().view(torch.int32 if value.itemsize == 4 else torch.int16)
