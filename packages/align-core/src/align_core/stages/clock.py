"""Seconds by phase of a step."""

import time


class Clock:
    """Laps, as metrics `seconds_NAME`."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self.restart()

    def restart(self) -> None:
        """The next lap begins now."""
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """The lap that ends now was `name`; a name that comes again adds up."""
        key = f"seconds_{name}"
        self.laps[key] = self.laps.get(key, 0.0) + time.perf_counter() - self._last
        self.restart()
