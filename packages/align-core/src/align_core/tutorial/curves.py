"""Learning curves as inline SVG: the metrics of each stage, one small panel a metric."""

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from align_core.errors import missing_dependency
from align_core.stages.run import read_metrics

_WINDOW = 9  # values of the running mean that is drawn over the raw ones, where there are many


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """One metric over the steps of one stage."""

    stage: str
    metric: str
    label: str
    better: str
    """`higher` or `lower`."""
    steps: tuple[int, ...]
    """Updates done before each value was taken."""
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


# What shows that a stage learns. The samples' own reward says little under a reward model, whose scores differ more
# between questions than between answers: there the reward on one fixed set of held-out questions counts.
_SHOWN: Sequence[tuple[str, str, str, str]] = (
    ("sft", "loss", "SFT: loss on demonstrations", "lower"),
    ("reward", "accuracy", "Reward model: pairs ranked rightly", "higher"),
    ("reward", "loss", "Reward model: loss", "lower"),
    ("rlhf", "eval_reward", "RLHF (PPO): held-out, greedy", "higher"),
    ("online_dpo", "eval_reward", "Online DPO: held-out, greedy", "higher"),
    ("grpo", "reward", "GRPO, verifiable reward: samples", "higher"),
    ("grpo", "eval_reward", "GRPO, verifiable reward: held-out, greedy", "higher"),
    ("grpo_reward_model", "eval_reward", "GRPO, reward model: held-out, greedy", "higher"),
    ("dpo", "margin", "DPO: implicit reward, chosen minus rejected", "higher"),
    ("dpo", "accuracy", "DPO: pairs ranked rightly", "higher"),
)


def read_curves(out: Path) -> list[Curve]:
    """The shown metrics of every stage under OUT that has them."""
    found = (curve_of(out / stage, metric, label, better=better) for stage, metric, label, better in _SHOWN)
    return [curve for curve in found if curve is not None]


def curve_of(out: Path, metric: str, label: str, *, better: str = "higher") -> Curve | None:
    """One metric of the stage whose directory is `out`; None where it was never logged."""
    points = _points(out, metric)
    if not points:
        return None
    steps, values = zip(*points)
    return Curve(stage=out.name, metric=metric, label=label, better=better, steps=steps, values=values)


def _points(stage: Path, metric: str) -> list[tuple[int, float]]:
    """(step, value) of a metric; an evaluation of the finished model stands in result.json."""
    points = [(int(line["step"]), line[metric]) for line in read_metrics(stage) if metric in line]
    result = stage / "result.json"
    if result.exists():
        finished = json.loads(result.read_text(encoding="utf-8"))
        if finished.get(metric) is not None:
            points.append((int(finished["steps"]), float(finished[metric])))
    return points


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
        axes.plot(curve.steps, curve.values, color="#9db8d9", linewidth=0.9)
        axes.plot(curve.steps, _running_mean(np.asarray(curve.values)), color="#1f4e8c", linewidth=1.8)
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
    window = _WINDOW if len(values) > 2 * _WINDOW else 1
    padded = np.pad(values, (window // 2, window - 1 - window // 2), mode="edge")
    return np.convolve(padded, np.full(window, 1.0 / window), mode="valid").astype(np.float64)
