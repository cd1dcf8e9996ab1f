"""Keeps requests below a rate: so many units a minute, evenly spaced after a first burst. Knows nothing of requests."""

import asyncio
import time
from collections.abc import Awaitable, Callable

_BURST_SECONDS = 1.0  # of the rate may go at once; services count over a minute, so this is far from their limits


class RateLimit:
    """A meter: each `acquire` waits until its units fit.

    Every unit takes 60 / `per_minute` seconds of a virtual clock, which may run ahead of the real one by the burst
    (the leaky bucket as a meter). Waiting callers are served in the order in which they came.
    """

    def __init__(
        self,
        per_minute: float,
        *,
        now: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """`per_minute` 0 is no limit."""
        self._seconds_per_unit = 60.0 / per_minute if per_minute else 0.0
        self._now = now
        self._sleep = sleep
        self._virtual = now()

    async def acquire(self, units: float = 1.0) -> None:
        """Waits until `units` more are within the rate."""
        if not self._seconds_per_unit:
            return
        start = max(self._virtual, self._now())
        self._virtual = start + units * self._seconds_per_unit
        wait = start - self._now() - _BURST_SECONDS
        if wait > 0:
            await self._sleep(wait)
