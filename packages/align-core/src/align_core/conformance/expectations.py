"""How a check says no: the error, and the few forms of expectation that all checks share."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from align_core.errors import AlignError
from align_core.types import Prompt


class ConformanceError(AssertionError):
    """An implementation breaks its contract; says what was expected and what came."""


def expect(condition: bool, text: str) -> None:
    """Raises ConformanceError with `text` unless `condition` holds."""
    if not condition:
        raise ConformanceError(text)


@contextmanager
def refused(error: type[AlignError], name: str, what: str) -> Iterator[None]:
    """Expects `error` with `name` in its text."""
    try:
        yield
    except error as refusal:
        expect(name in str(refusal), f"the refusal of {what} does not name {name!r}: {refusal}")
        return
    raise ConformanceError(f"{what} was accepted; {error.__name__} was expected")


def draw_prompts(vocab_size: int, *, lengths: Sequence[int]) -> list[Prompt]:
    """Prompts of these lengths with descending ids; equal lengths give equal tokens, told apart by their ids alone."""
    top = 10 * len(lengths)
    drawn = {length: np.random.default_rng(length).integers(0, vocab_size, size=length) for length in lengths}
    return [Prompt(id=top - i, tokens=drawn[length].astype(np.int32)) for i, length in enumerate(lengths)]


def largest_difference(left: NDArray[np.float32], right: NDArray[np.float32]) -> float:
    """Largest |left - right|; 0 for empty arrays."""
    return float(np.max(np.abs(left - right), initial=0.0))


def expect_close(left: NDArray[np.float32], right: NDArray[np.float32], tolerance: float, text: str) -> None:
    """Raises ConformanceError, starting with `text`, if any element differs by more than `tolerance`."""
    distance = largest_difference(left, right)
    expect(distance <= tolerance, f"{text}: largest difference {distance:.3g} nats, allowed {tolerance:g}")
