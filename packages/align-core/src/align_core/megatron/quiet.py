"""Keeps megatron-core's warnings to itself: of its old habits, of Transformer Engine, of Apex, of layers not its own.

Warnings of other code, ours included, pass. Knows nothing else, and imports nothing heavy.
"""

import contextlib
import logging
import threading
import warnings
from collections.abc import Iterator


class _Quiet:
    """Python's warning filters belong to all threads: the first to enter sets them, the last to leave restores them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._restore = contextlib.ExitStack()

    def enter(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._restore.enter_context(warnings.catch_warnings())
                self._restore.enter_context(_quiet_log())
                _ignore()
            self._inside += 1

    def leave(self) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._restore.close()


_QUIET = _Quiet()


@contextlib.contextmanager
def quiet_megatron() -> Iterator[None]:
    """Within it, warnings raised for megatron-core's code are dropped, and those that it logs."""
    _QUIET.enter()
    try:
        yield
    finally:
        _QUIET.leave()


@contextlib.contextmanager
def _quiet_log() -> Iterator[None]:
    log = logging.getLogger("megatron")
    before = log.level
    log.setLevel(max(logging.ERROR, before))
    try:
        yield
    finally:
        log.setLevel(before)


def _ignore() -> None:
    warnings.filterwarnings("ignore", module=r"megatron\.")
    # Its calls of collectives and of torch's sharded tensors by names that torch 2.13 deprecates.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.")
    warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"torch\.")
