"""Lets megatron-core run where there is no CUDA: on CPU with gloo. Does nothing unless `install` is called.

Megatron-core has no switch for this; about forty places ask for the current CUDA device, make tensors on "cuda",
synchronise it, or read its random state. Inside those modules, and only there, the *name* `torch` is bound to a
stand-in in which these few things mean the CPU; torch itself stays as it is. Two more things look at type names
("torch.cuda.FloatTensor"): their string constants are replaced. Knows nothing about models and trainers.

The list of modules was found by tracing version 0.16.1. Another version may have moved such a place to another file,
where it would fail far from its cause, so `install` refuses versions that the parity tests were not run with.
"""

import contextlib
import functools
import importlib
import types
from collections.abc import Callable, Iterator
from typing import Any

import megatron.core
import torch

from align_core.errors import AlignError

TESTED_VERSIONS = ("0.16.1",)

_MODULES = (
    "dist_checkpointing.strategies.torch",
    "distributed.distributed_data_parallel",
    "distributed.param_and_grad_buffer",
    "models.common.embeddings.rotary_pos_embedding",
    "models.common.language_module.language_module",
    "optimizer.clip_grads",
    "optimizer.distrib_optimizer",
    "optimizer.optimizer",
    "parallel_state",
    "pipeline_parallel.p2p_communication",
    "pipeline_parallel.schedules",
    "tensor_parallel.layers",
    "tensor_parallel.mappings",
    "tensor_parallel.random",
    "tensor_parallel.utils",
    "transformer.moe.moe_utils",
    "transformer.moe.router",
    "transformer.moe.token_dispatcher",
    "utils",
)
_FACTORIES = ("arange", "empty", "empty_like", "full", "ones", "tensor", "zeros", "zeros_like")
_TYPE_NAMES = {
    "torch.cuda.FloatTensor": "torch.FloatTensor",
    "torch.cuda.HalfTensor": "torch.HalfTensor",
    "torch.cuda.BFloat16Tensor": "torch.BFloat16Tensor",
}


class _StandIn(types.ModuleType):
    """A module whose attributes are those of `real`, except for the ones given."""

    def __init__(self, real: types.ModuleType, replacements: dict[str, object]) -> None:
        super().__init__(real.__name__)
        self.__dict__.update(replacements, _real=real)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


def installed() -> bool:
    """Whether this process runs megatron-core on CPU."""
    return isinstance(_module("utils").torch, _StandIn)


def install() -> None:
    """Bind megatron-core to the CPU in this process, for good; calling it again does nothing.

    Raises:
        AlignError: the installed megatron-core is not one of `TESTED_VERSIONS`.
    """
    if installed():
        return
    version = megatron.core.__version__
    if version not in TESTED_VERSIONS:
        raise AlignError(
            f"megatron-core {version} has not been tested on CPU; "
            f"run: pip install 'megatron-core=={TESTED_VERSIONS[-1]}'"
        )
    stand_in = _cpu_torch()
    for name in _MODULES:
        module = _module(name)
        if module.torch is not torch:
            raise AlignError(
                f"megatron.core.{name} no longer imports torch as a whole; its CPU path must be traced anew"
            )
        module.torch = stand_in
    _module("transformer.moe.token_dispatcher").maybe_move_tensor_to_cpu = _counts_on_host
    random = _module("tensor_parallel.random")
    random._get_cuda_rng_state = _get_rng_state
    random._set_cuda_rng_state = _set_rng_state
    _rename_types(_module("optimizer.clip_grads").clip_grad_by_total_norm_fp32)
    distributed = _module("optimizer.distrib_optimizer").DistributedOptimizer
    _rename_types(distributed.__init__)
    _rename_types(distributed._build_model_and_main_param_groups.__func__)


@contextlib.contextmanager
def tensors_stay() -> Iterator[None]:
    """Within it `Tensor.cuda()` returns the tensor, if `install` was called; GPTModel calls it on tied embeddings."""
    if not installed():
        yield
        return
    original = torch.Tensor.cuda
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.Tensor.cuda = original  # type: ignore[method-assign]


def _module(name: str) -> Any:
    return importlib.import_module(f"megatron.core.{name}")


class _Stream:
    """Work on the CPU is done in its order, so there is nothing to wait for; its own event too."""

    def wait_stream(self, _: object) -> None:
        """Nothing to wait for."""

    def record_event(self) -> "_Stream":
        """An event that has happened."""
        return self

    def synchronize(self) -> None:
        """It has happened."""


def _cpu_torch() -> _StandIn:
    """torch, in which the few CUDA calls of megatron-core mean the CPU."""
    stream = _Stream()
    cuda = _StandIn(
        torch.cuda,
        {
            "current_device": lambda: torch.device("cpu"),
            "synchronize": _nothing,
            "empty_cache": _nothing,
            "get_rng_state": _get_rng_state,
            "set_rng_state": _set_rng_state,
            "manual_seed": torch.manual_seed,
            "Stream": _Stream,
            "current_stream": lambda: stream,
            "stream": lambda _: contextlib.nullcontext(),
        },
    )
    factories = {name: _on_cpu(getattr(torch, name)) for name in _FACTORIES}
    distributed = _StandIn(torch.distributed, {"all_gather": _all_gather})
    return _StandIn(torch, {"cuda": cuda, "distributed": distributed, **factories})


def _all_gather(outputs: list[torch.Tensor], own: torch.Tensor, group: Any = None, async_op: bool = False) -> Any:
    """As NCCL does it, also of parts with different numbers of rows, which gloo refuses; it sends such to each rank."""
    sizes = [len(output) for output in outputs]
    if len(set(sizes)) == 1:
        return torch.distributed.all_gather(outputs, own, group=group, async_op=async_op)
    found = own.new_empty(sum(sizes), *own.shape[1:])
    everyone = own.repeat(len(sizes), *(1 for _ in own.shape[1:]))
    torch.distributed.all_to_all_single(found, everyone, sizes, [len(own)] * len(sizes), group=group)
    for output, part in zip(outputs, torch.split(found, sizes), strict=True):
        output.copy_(part)
    return None


def _counts_on_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """megatron-core's `maybe_move_tensor_to_cpu`, which leaves alone what is there already, also as to its type."""
    del record_stream
    return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        return factory(*args, **kwargs)

    return make


def _nothing(*_: object) -> None:
    pass


def _get_rng_state(*_: object, **__: object) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(new_state: torch.Tensor, *_: object, **__: object) -> None:
    torch.set_rng_state(new_state)


def _rename_types(function: types.FunctionType) -> None:
    """Make comparisons with the names of CUDA tensor types compare with those of CPU tensors."""
    constants = function.__code__.co_consts
    function.__code__ = function.__code__.replace(co_consts=tuple(_renamed(constant) for constant in constants))


def _renamed(constant: object) -> object:
    if isinstance(constant, tuple):
        return tuple(_renamed(item) for item in constant)
    return _TYPE_NAMES.get(constant, constant) if isinstance(constant, str) else constant
