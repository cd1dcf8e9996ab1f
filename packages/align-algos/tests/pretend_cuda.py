"""Tensors in the host's memory that pretend to be on a CUDA device, and refuse to meet others as those on one do.

Values and gradients are computed as ever, so that every line of a function runs; only devices are checked. Torch's own
fake tensors have no values, and cannot be differentiated on a device that the build does not know. Not a test file.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

CUDA = torch.device("cuda", 0)
_aten = torch.ops.aten
_ACROSS = {_aten._to_copy.default, _aten.copy_.default}
_INDEXED = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default, _aten._index_put_impl_.default}
"""A tensor on a device may be indexed by one in the host's memory."""
_JOINED = {_aten.cat.default, _aten.stack.default}
"""Elsewhere a single number in the host's memory may join; here it may not."""


class OnCuda(Tensor):
    """A tensor that pretends, around the one that it is."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "OnCuda":
        made: OnCuda = Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype
        )
        made.held = held
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnCuda({self.held})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: object, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        _check_together(func, given)
        pretending = {id(x.held): x for x in given if isinstance(x, OnCuda)}  # what is written to is returned
        found = func(*tree_map(_held, args), **tree_map(_held, kwargs or {}))
        return tree_map(lambda x: pretending.get(id(x), on_cuda(x)) if isinstance(x, Tensor) else x, found)


class PretendCuda(TorchFunctionMode):
    """Within it, devices are asked for and answered as if there were CUDA."""

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        if args and isinstance(args[0], OnCuda):
            if func == Tensor.device.__get__:
                return CUDA
            if func == Tensor.numpy:
                raise TypeError("can't convert a CUDA tensor to numpy; use Tensor.cpu() first")
            if func in (Tensor.tolist, Tensor.cpu):
                return func(args[0].held)
        wanted = next((x for x in (*args, *options.values()) if _is_device(x)), None)
        if wanted is None or func is torch.device:
            return func(*args, **options)
        moved = tree_map(_held, args) if func == Tensor.to else args
        found = func(*map(_without, moved), **{key: _without(value) for key, value in options.items()})
        return on_cuda(found) if torch.device(wanted).type == "cuda" else _held(found)


def on_cuda(x: Tensor) -> OnCuda:
    """The tensor, pretending."""
    return x if isinstance(x, OnCuda) else OnCuda(x)


def _check_together(func: Any, given: Sequence[Tensor]) -> None:
    if func in _ACROSS:
        return
    for x in given[:1] if func in _INDEXED else given:
        if not isinstance(x, OnCuda) and (x.dim() > 0 or func in _JOINED):
            raise RuntimeError(f"{func} got a tensor of shape {list(x.shape)} on cpu, and others on cuda")


def _held(x: object) -> object:
    return x.held if isinstance(x, OnCuda) else x


def _is_device(x: object) -> bool:
    return isinstance(x, torch.device) or (isinstance(x, str) and x.partition(":")[0] in ("cpu", "cuda"))


def _without(x: object) -> object:
    return torch.device("cpu") if _is_device(x) else x
