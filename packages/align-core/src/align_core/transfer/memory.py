"""A process's tensors as another process on the same GPU (or one linked to it) can reach them: CUDA IPC handles.

The tensors stay where they are; whoever opens the handles reads the very same memory. Nothing is pickled but the
handles' numbers, between processes of one run.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor

from align_core.errors import ConfigError

_DEVICE = 6  # place of the device's index among the arguments of rebuild_cuda_tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Handle:
    """One tensor of another process."""

    device: str
    """UUID of its GPU; the same GPU has other numbers in processes that see other GPUs."""
    arguments: tuple[Any, ...]


def export_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Handle | Tensor]:
    """A handle for each tensor on a GPU, whose values are complete on return; tensors on the CPU go as they are.

    Each handle is good for opening once. While it is open elsewhere, the memory stays taken even if it is freed here.
    """
    if any(tensor.is_cuda for tensor in tensors.values()):
        torch.cuda.synchronize()
    return {name: _handle(tensor.detach()) if tensor.is_cuda else tensor.detach() for name, tensor in tensors.items()}


def open_tensors(handles: Mapping[str, object]) -> Mapping[str, Tensor]:
    """The tensors behind `handles`, open for as long as they are held; tensors of this process come back as they are.

    Raises:
        ConfigError: a tensor is on a GPU that this process does not see.
    """
    local = {_uuid(index): index for index in range(torch.cuda.device_count())}
    return {name: _open(handle, local) if isinstance(handle, Handle) else handle for name, handle in handles.items()}  # type: ignore[misc]


def _handle(tensor: Tensor) -> Handle:
    _, arguments = reduce_tensor(tensor)  # type: ignore[no-untyped-call]
    return Handle(device=_uuid(tensor.device.index), arguments=arguments)


def _open(handle: Handle, local: Mapping[str, int]) -> Tensor:
    if handle.device not in local:
        raise ConfigError(
            f"a weight lies on the GPU {handle.device}, which this process does not see; place trainer and engine on "
            "the same GPUs, or send the weights over NCCL"
        )
    arguments = list(handle.arguments)
    arguments[_DEVICE] = local[handle.device]
    tensor: Tensor = rebuild_cuda_tensor(*arguments)  # type: ignore[no-untyped-call]
    return tensor


def visible_devices() -> frozenset[str]:
    """UUIDs of the GPUs that this process sees."""
    return frozenset(_uuid(index) for index in range(torch.cuda.device_count()))


def device_of(tensor: Tensor) -> str:
    """UUID of the tensor's GPU."""
    return _uuid(tensor.device.index)


def _uuid(device: int) -> str:
    return str(torch.cuda.get_device_properties(device).uuid)
