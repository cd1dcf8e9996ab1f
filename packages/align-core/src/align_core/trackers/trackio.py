"""Trackio, which keeps its data on this machine unless told otherwise. Needs `trackio`."""

from collections.abc import Mapping
from typing import Any

import trackio

from align_core.trackers import RunInfo, Tracker


class Trackio:
    """A run of the project `align`, continued under the same name."""

    def __init__(self, info: RunInfo) -> None:
        self._run: Any = trackio.init(
            project="align", name=f"{info.name}-{info.id[:8]}", config=dict(info.settings), resume="allow"
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """See `Tracker`."""
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        """See `Tracker`."""
        self._run.finish()


_conforms: type[Tracker] = Trackio
