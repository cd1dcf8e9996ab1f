"""The rate limit on a clock of its own, and many requests run side by side."""

import asyncio

import pytest

from align_core.errors import ConfigError
from align_eval.drive import drive
from align_eval.errors import RefusedError, UnansweredError
from align_eval.rates import RateLimit


def test_rate_is_even_after_a_burst() -> None:
    """120 a minute is 2 a second: with a burst of one second, requests 0, 1, 2 go at once, then one each 0.5 s."""
    clock = 100.0
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        nonlocal clock
        waits.append(seconds)
        clock += seconds

    async def ask() -> list[float]:
        limit = RateLimit(120, now=lambda: clock, sleep=sleep)
        times = []
        for _ in range(6):
            await limit.acquire()
            times.append(clock - 100.0)
        return times

    assert asyncio.run(ask()) == pytest.approx([0.0, 0.0, 0.0, 0.5, 1.0, 1.5])
    assert waits == pytest.approx([0.5, 0.5, 0.5])


def test_no_limit_never_waits() -> None:
    async def never(seconds: float) -> None:
        raise AssertionError

    async def ask() -> None:
        limit = RateLimit(0, sleep=never)
        for _ in range(1000):
            await limit.acquire(10**9)

    asyncio.run(ask())


def test_drive_collects_the_unanswered_and_keeps_to_its_limit() -> None:
    running = most = done = 0

    async def job(index: int) -> None:
        nonlocal running, most, done
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.001)
        running -= 1
        if index % 5 == 0:
            raise UnansweredError(f"number {index}", 1)
        done += 1

    errors = asyncio.run(drive([lambda i=i: job(i) for i in range(20)], at_once=4))  # type: ignore[misc]
    assert sorted(map(str, errors)) == ["number 0", "number 10", "number 15", "number 5"]
    assert (done, most) == (16, 4)


@pytest.mark.parametrize("error", [RefusedError("no"), ConfigError("bad"), ValueError("bug")])
def test_drive_stops_everything_at_any_other_error(error: Exception) -> None:
    ended: list[str] = []

    async def fails() -> None:
        await asyncio.sleep(0.01)
        raise error

    async def waits() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append("cancelled")

    with pytest.raises(type(error)):
        asyncio.run(drive([fails, waits, waits], at_once=3))
    assert ended == ["cancelled"] * 2
