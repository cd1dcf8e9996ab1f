"""Learning curves as inline SVG: the metrics of each stage, one small panel a metric."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from align_core.errors import missing_dependency
from align_core.stages.run import read_metrics

_WINDOW = 9  # steps of the running mean that is drawn over the raw values


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """One metric over the steps of one stage."""

    stage: str
    metric: str
    label: str
    better: str
    """`higher` or `lower`."""
    values: tuple[float, ...]

    @property
    def first(self) -> float:
        """Mean over the first tenth of the steps (at least one)."""
        return float(np.mean(self.values[: self._tenth]))

    @property
    def last(self) -> float:
        """Mean over the last tenth of the steps (at least one)."""
        return float(np.mean(self.values[-self._tenth :]))

    @property
    def improved(self) -> bool:
        """Whether the last tenth is better than the first."""
        return self.last > self.first if self.better == "higher" else self.last < self.first

    @property
    def _tenth(self) -> int:
        return max(1, len(self.values) // 10)


# What shows that a stage learns; the first line of each is its reward.
_SHOWN: Sequence[tuple[str, str, str, str]] = (
    ("sft", "loss", "SFT: loss on demonstrations", "lower"),
    ("reward", "accuracy", "Reward model: pairs ranked rightly", "higher"),
    ("reward", "loss", "Reward model: loss", "lower"),
    ("grpo", "reward", "GRPO, verifiable reward: mean reward", "higher"),
    ("grpo_reward_model", "reward", "GRPO, reward model: mean reward", "higher"),
    ("dpo", "margin", "DPO: implicit reward, chosen minus rejected", "higher"),
    ("dpo", "accuracy", "DPO: pairs ranked rightly", "higher"),
)


def read_curves(out: Path) -> list[Curve]:
    """The shown metrics of every stage under OUT that has them."""
    curves = []
    for stage, metric, label, better in _SHOWN:
        values = tuple(line[metric] for line in read_metrics(out / stage) if metric in line)
        if values:
            curves.append(Curve(stage=stage, metric=metric, label=label, better=better, values=values))
    return curves


def draw(curves: Sequence[Curve]) -> str:
    """All curves as one SVG element; empty where there are none.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_svg import FigureCanvasSVG  # noqa: PLC0415
        from matplotlib.figure import Figure  # noqa: PLC0415
    except ImportError as error:
        raise missing_dependency("matplotlib", "align-core[tutorial]", needed_for="the report") from error
    if not curves:
        return ""
    columns = 3
    rows = -(-len(curves) // columns)
    figure = Figure(figsize=(4.2 * columns, 2.8 * rows), layout="constrained")
    for place, curve in enumerate(curves, start=1):
        axes = figure.add_subplot(rows, columns, place)
        steps = np.arange(1, len(curve.values) + 1)
        axes.plot(steps, curve.values, color="#9db8d9", linewidth=0.9)
        axes.plot(steps, _running_mean(np.asarray(curve.values)), color="#1f4e8c", linewidth=1.8)
        axes.set_title(curve.label, fontsize=9)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
    FigureCanvasSVG(figure)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :]


def _running_mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """float64 [steps], centred means of `_WINDOW` values; the ends are repeated to fill the window."""
    window = min(_WINDOW, len(values))
    padded = np.pad(values, (window // 2, window - 1 - window // 2), mode="edge")
    return np.convolve(padded, np.full(window, 1.0 / window), mode="valid").astype(np.float64)
