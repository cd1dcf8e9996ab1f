"""Weights & Biases. Needs `wandb`, which finds its own key (WANDB_API_KEY, login file); WANDB_MODE=offline works."""

from collections.abc import Mapping
from typing import Any

import wandb

from align_core.trackers import RunInfo, Tracker


class Wandb:
    """A run of the project `align`, continued under the same id."""

    def __init__(self, info: RunInfo) -> None:
        info.out.mkdir(parents=True, exist_ok=True)
        self._run: Any = wandb.init(
            project="align",
            id=info.id,
            name=info.name,
            dir=str(info.out),
            config=dict(info.settings),
            resume="allow",
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """See `Tracker`."""
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        """See `Tracker`."""
        self._run.finish()


_conforms: type[Tracker] = Wandb
