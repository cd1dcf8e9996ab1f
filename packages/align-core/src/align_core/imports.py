"""Imports of large packages without the garbage collector, which goes through all that they make again and again."""

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Within it nothing is searched for garbage: a quarter of the time that importing Megatron-core or vLLM takes.

    An import makes a million objects that stay until the process ends.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
