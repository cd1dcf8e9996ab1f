"""Runs a function on every rank of a layout, each a real process that meets the others over gloo, without ports.

The processes are forked from a server that has imported megatron-core once: starting a rank takes a fraction of a
second instead of ten.
"""

import importlib.util
import multiprocessing
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from align_core.config import ParallelConfig

_FORKED = multiprocessing.get_context("forkserver")
_FORKED.set_forkserver_preload(["align_core.megatron", "align_core.megatron.trainer"])
_FRESH = multiprocessing.get_context("spawn")  # CUDA does not survive a fork


def run_ranks(
    body: Callable[..., Any],
    parallel: ParallelConfig,
    *arguments: Any,
    device: Literal["cpu", "cuda"] = "cpu",
    timeout_s: float = 120.0,
) -> list[Any]:
    """`body(context, *arguments)` on each rank; what each returned, in order of the ranks. On CUDA a GPU a rank.

    Raises:
        AssertionError: with the trace of the first rank that failed, or if they took too long.
    """
    source = (body.__code__.co_filename, body.__name__)
    with TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(parallel.world_size):
            start = _FORKED if device == "cpu" else _FRESH
            receiver, sender = start.Pipe(duplex=False)
            meeting = f"file://{folder}/store"
            place = {"parallel": parallel, "rank": rank, "rendezvous": meeting, "device": device, "local_device": rank}
            process = start.Process(target=_rank, args=(sender, source, place, arguments), daemon=True)
            process.start()
            sender.close()
            pipes.append(receiver)
            processes.append(process)
        try:
            return _collect(pipes, timeout_s)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _collect(pipes: list[Connection], timeout_s: float) -> list[Any]:
    results: dict[int, Any] = {}
    deadline = time.monotonic() + timeout_s
    while len(results) < len(pipes):
        open_pipes = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
        ready = wait(open_pipes, timeout=max(0.0, deadline - time.monotonic()))
        assert ready, f"{len(open_pipes)} of {len(pipes)} ranks are not done after {timeout_s:g} s"
        for pipe in ready:
            rank = pipes.index(pipe)
            try:
                succeeded, value = pipe.recv()
            except EOFError:
                raise AssertionError(f"rank {rank} died without a word") from None
            assert succeeded, f"rank {rank} failed:\n{value}"
            results[rank] = value
    return [results[rank] for rank in range(len(pipes))]


def _rank(sender: Connection, source: tuple[str, str], place: dict[str, Any], arguments: Any) -> None:
    try:
        from align_core.megatron import close_rank, init_rank

        context = init_rank(**place, timeout_s=60)
        result = _load(*source)(context, *arguments)
        close_rank()
    except BaseException:
        sender.send((False, traceback.format_exc()))
        raise
    sender.send((True, result))


def _load(file: str, name: str) -> Callable[..., Any]:
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    body: Callable[..., Any] = getattr(module, name)
    return body
