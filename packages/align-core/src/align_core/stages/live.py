"""One screen about a running stage, redrawn in place: progress, the figures that matter, where the time goes, a reply.

Shown where the error output is a terminal; log lines then appear above it. Elsewhere there is the log alone.
"""

import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

# What a person looks at first, in this order; a stage shows those that it has.
_FIGURES = (
    *("reward", "reward_std", "eval_reward", "loss", "kl", "kl_coef", "entropy", "clip_fraction", "approx_kl"),
    *("accuracy", "margin", "value_loss", "value_explained", "grad_norm", "lr", "length", "truncated"),
    *("failed_scores", "tied_groups", "canary_mean", "mismatch_kl", "tokens_per_second", "tokens_per_s"),
)
_BLOCKS = "\u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"
_HISTORY = 40  # values of a sparkline
_REPLY = 300  # characters of the sample


class Screen:
    """What is shown; `update` after each step."""

    def __init__(self, name: str, *, total: int, completed: int) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        )
        self._task: TaskID = self._progress.add_task(name, total=total, completed=completed)
        self._metrics: dict[str, float] = {}
        self._history: dict[str, list[float]] = {}
        self._sample: Mapping[str, object] | None = None

    def update(self, metrics: Mapping[str, float]) -> None:
        """Takes one step's figures; one that is not measured at every step keeps its last value."""
        self._metrics |= metrics
        for name, value in metrics.items():
            self._history.setdefault(name, []).append(value)

    def show_sample(self, rows: Sequence[Mapping[str, object]]) -> None:
        """Shows the first of some samples."""
        self._sample = rows[0] if rows else None

    def advance(self, completed: int) -> None:
        """So many steps are done."""
        self._progress.update(self._task, completed=completed)

    def __rich__(self) -> RenderableType:
        parts: list[RenderableType] = [self._progress]
        if self._metrics:
            parts.append(Group(self._figures(), self._phases()))
        if self._sample is not None:
            reply = str(self._sample.get("reply", "")).strip()[:_REPLY]
            title = f"reward {self._sample.get('reward')}, read: {self._sample.get('extracted') or 'nothing'}"
            parts.append(Panel(Text(reply), title=Text(title), title_align="left"))
        return Group(*parts)

    def _figures(self) -> Table:
        table = Table.grid(padding=(0, 2))
        shown = [name for name in _FIGURES if name in self._metrics]
        for left, right in zip(shown[0::2], [*shown[1::2], ""]):
            table.add_row(*self._cells(left), *(self._cells(right) if right else ()))
        return table

    def _cells(self, name: str) -> tuple[str, str, str]:
        return name, f"{self._metrics[name]:.4g}", sparkline(self._history[name][-_HISTORY:])

    def _phases(self) -> Text:
        """Seconds of the last step by phase, as one bar in words."""
        phases = {
            name.removeprefix("seconds_"): value
            for name, value in self._metrics.items()
            if name.startswith("seconds_") and value >= 0.001
        }
        return Text("  ".join(f"{name} {value:.2f} s" for name, value in phases.items()), style="dim")


def sparkline(values: Sequence[float]) -> str:
    """The values as a line of blocks, from the lowest to the highest of them."""
    low, high = min(values, default=0.0), max(values, default=0.0)
    if not high > low:
        return _BLOCKS[0] * len(values)
    return "".join(_BLOCKS[round((value - low) / (high - low) * (len(_BLOCKS) - 1))] for value in values)


@contextmanager
def shown(screen: Screen) -> Iterator[None]:
    """Within it the screen is on the terminal, if there is one, and the log above it."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    handlers = [h for h in logging.getLogger().handlers if getattr(h, "stream", None) is sys.stderr]
    streams = [handler for handler in handlers if isinstance(handler, logging.StreamHandler)]
    before = sys.stderr
    with Live(screen, console=console, transient=True, refresh_per_second=4):
        for handler in streams:
            handler.setStream(sys.stderr)  # which the live display has replaced, so that it draws around what is said
        try:
            yield
        finally:
            for handler in streams:
                handler.setStream(before)
