"""Evaluation while training: when it is due, what it found last, and the best model so far."""

import json
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from align_core.atomic import write_json
from align_core.config import OfflineConfig
from align_core.stages.world import Model

logger = logging.getLogger(__name__)

Measure = Callable[[], Mapping[str, float]]
"""Measures the model as it is now on the held-out data; names begin with `eval_`."""


class Evaluation:
    """Before the first step, every `eval_every` steps, and after the last; always of the weights before a step."""

    def __init__(self, config: OfflineConfig, model: Model, measure: Measure | None) -> None:
        """Args: `measure`: None without held-out data."""
        self._config, self._model, self._measure = config, model, measure

    def before(self, step: int) -> Mapping[str, float]:
        """The metrics to log with `step`: none unless an evaluation is due."""
        if self._measure is None or step % self._config.eval_every:
            return {}
        return self._run(step)

    def at_end(self) -> Mapping[str, float]:
        """The metrics of the finished model."""
        return {} if self._measure is None else self._run(self._config.steps)

    def _run(self, step: int) -> Mapping[str, float]:
        assert self._measure is not None
        metrics = dict(self._measure())
        logger.info("evaluation after %d steps  %s", step, "  ".join(f"{k} {v:.4g}" for k, v in metrics.items()))
        if self._config.keep_best:
            self._keep_best(step, metrics)
        return metrics

    def _keep_best(self, step: int, metrics: Mapping[str, float]) -> None:
        """Exports the model where its accuracy is higher, or without one its loss lower, than at every step before."""
        name = "eval_accuracy" if "eval_accuracy" in metrics else "eval_loss"
        if not math.isfinite(metrics[name]):
            logger.warning("%s after %d steps is %s: that model is not kept as the best", name, step, metrics[name])
            return
        sign = 1.0 if name == "eval_accuracy" else -1.0
        record = self._config.out / "best" / "best.json"
        best: dict[str, Any] = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
        # A run that was killed after it wrote a best one comes to the same step again, and finds the same value.
        if best and best["step"] < step and sign * metrics[name] <= sign * best[name]:
            return
        if best and best["step"] > step:
            return
        self._model.export(self._config.out / "best")
        write_json(record, {"step": step, name: metrics[name]})


def mean_over(parts: Iterable[tuple[Mapping[str, float], int]], *, prefix: str = "eval_") -> dict[str, float]:
    """Means of metrics over batches, weighted by what each batch's were divided by; their names get the prefix."""
    totals: dict[str, float] = {}
    weights = 0
    for metrics, weight in parts:
        weights += weight
        for name, value in metrics.items():
            totals[name] = totals.get(name, 0.0) + weight * value
    return {f"{prefix}{name}": total / weights for name, total in totals.items()} if weights else {}
