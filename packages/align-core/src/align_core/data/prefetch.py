"""Prepares the next step's batch in a thread while the current step trains: tokenizers release the interpreter lock."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

Prepared = TypeVar("Prepared")


@contextmanager
def prefetched(prepare: Callable[[int], Prepared], *, steps: int) -> Iterator[Callable[[int], Prepared]]:
    """A function that returns `prepare(step)`, computed ahead when steps are asked for in turn.

    An error of `prepare` is raised by the call that asks for its step.
    """
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="align-data") as pool:
        ahead: dict[int, Future[Prepared]] = {}

        def get(step: int) -> Prepared:
            future = ahead.pop(step, None) or pool.submit(prepare, step)
            result = future.result()
            if step + 1 < steps:
                ahead[step + 1] = pool.submit(prepare, step + 1)
            return result

        yield get
