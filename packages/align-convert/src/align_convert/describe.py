"""What a checkpoint directory holds, as plain data: for `align-convert inspect`, on screen or as JSON."""

from dataclasses import asdict
from math import prod
from typing import TypedDict

import torch

from align_convert.dtypes import dtype_name
from align_convert.formats.dist_reader import DistReader
from align_convert.formats.megatron_reader import MegatronReader
from align_convert.source import Source


class TensorDescription(TypedDict):
    """One Hugging Face tensor."""

    name: str
    shape: list[int]
    dtype: str
    bytes: int


class Description(TypedDict):
    """One directory, in types that JSON knows."""

    directory: str
    format: str
    layout: dict[str, object]
    """Empty for Hugging Face directories."""
    args: dict[str, str]
    """Megatron's args as text; empty for Hugging Face directories."""
    model: dict[str, object]
    parameters: int
    bytes: int
    tensors: list[TensorDescription]


def describe(source: Source) -> Description:
    """Format, layout, model settings and tensors of a source, in the model's order; tensors unknown to it come last."""
    stored = source.tensors()
    in_order = [name for name in source.config.tensors() if name in stored]
    tensors = [_tensor(name, *stored[name]) for name in [*in_order, *(name for name in stored if name not in in_order)]]
    model = {key: value for key, value in asdict(source.config).items() if key != "hf"}
    return Description(
        directory=str(source.root),
        format=source.format_name,
        layout=_layout(source) if isinstance(source, MegatronReader | DistReader) else {},
        args=_args(source) if isinstance(source, MegatronReader | DistReader) else {},
        model=model,
        parameters=sum(prod(tensor["shape"]) for tensor in tensors),
        bytes=sum(tensor["bytes"] for tensor in tensors),
        tensors=tensors,
    )


def weight_bytes(source: Source) -> int:
    """Bytes of all Hugging Face tensors as stored."""
    return sum(prod(shape) * dtype.itemsize for shape, dtype in source.tensors().values())


def _tensor(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> TensorDescription:
    return TensorDescription(name=name, shape=list(shape), dtype=dtype_name(dtype), bytes=prod(shape) * dtype.itemsize)


def _args(source: MegatronReader | DistReader) -> dict[str, str]:
    plain = (bool, int, float, str, list, torch.dtype)
    return {key: str(value) for key, value in sorted(vars(source.args).items()) if isinstance(value, plain)}


def _layout(source: MegatronReader | DistReader) -> dict[str, object]:
    padded = source.layout.padded_vocab(source.config.vocab_size)
    return asdict(source.layout) | {"padded_vocab": padded, "iteration": source.location.iteration}
