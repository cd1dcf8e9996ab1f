"""Puts off torch.compile for the functions that megatron-core decorates with it when it is imported.

Decorating brings torch's whole compiler into the process, a third of the time that a rank takes to start, and training
here calls hardly one of those functions. So each is compiled when it is first called. Knows nothing of megatron-core.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch


@contextlib.contextmanager
def deferred_compile() -> Iterator[None]:
    """Within it, and for whoever keeps the decorator found there, torch.compile waits for the first call."""
    compile_now = torch.compile
    torch.compile = functools.partial(_deferred, compile_now)
    try:
        yield
    finally:
        torch.compile = compile_now


def _deferred(compile_now: Callable[..., Any], function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """`compile_now(function, **options)`, or its decorator, at the first call of what is returned."""
    if function is None:
        return functools.partial(_deferred, compile_now, **options)
    compiled: list[Callable[..., Any]] = []

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # a function that is compiled calls this one, and takes it in
            return function(*args, **kwargs)
        if not compiled:
            compiled.append(compile_now(function, **options))
        return compiled[0](*args, **kwargs)

    return call
