"""When a stage evaluates, what it averages, and which model it keeps as the best."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from align_core.config import OfflineConfig
from align_core.errors import ConfigError
from align_core.stages.held_out import Evaluation, mean_over
from align_core.stages.run import read_metrics
from align_core.stages.sft import run_sft


class Exporter:
    """Writes how often it was asked."""

    def __init__(self) -> None:
        self.exports = 0

    def export(self, path: Path) -> None:
        self.exports += 1
        path.mkdir(parents=True, exist_ok=True)
        (path / "weights").write_text(str(self.exports))


def evaluate(config: OfflineConfig, name: str, values: list[float]) -> tuple[Exporter, dict[str, float]]:
    """One value an evaluation, at steps 0, 2, 4 ... and the end; returns the model and best.json."""
    model, left = Exporter(), list(values)
    evaluation = Evaluation(config, model, lambda: {name: left.pop(0)})  # type: ignore[arg-type]
    for step in range(config.steps):
        evaluation.before(step)
    evaluation.at_end()
    assert not left
    return model, json.loads((config.out / "best" / "best.json").read_text())


def test_means_are_weighted_by_counts() -> None:
    """(1 x 2 + 4 x 1) / 3 = 2."""
    assert mean_over([({"loss": 1.0}, 2), ({"loss": 4.0}, 1)]) == {"eval_loss": 2.0}
    assert mean_over([]) == {}


def test_evaluations_are_due_before_the_first_step_regularly_and_at_the_end(
    make_config: Callable[..., Any], fake_world: Callable[..., Any]
) -> None:
    config = make_config("sft", eval_data=make_config("sft").data, eval_every=4)
    world = fake_world()
    run_sft(config, world)
    assert [line["step"] for line in read_metrics(config.out) if "eval_loss" in line] == [0, 4]
    assert world.operations.count("evaluate") == 3
    losses = [line["eval_loss"] for line in read_metrics(config.out) if "eval_loss" in line]
    assert losses[1] < losses[0]
    assert json.loads((config.out / "result.json").read_text())["eval_loss"] < losses[1]


def test_without_held_out_data_nothing_is_measured(
    make_config: Callable[..., Any], fake_world: Callable[..., Any]
) -> None:
    world = fake_world()
    run_sft(make_config("sft"), world)
    assert "evaluate" not in world.operations
    with pytest.raises(ConfigError, match="keep_best needs held-out data"):
        make_config("sft", keep_best=True)


@pytest.mark.parametrize(
    ("name", "values", "best"),
    [
        ("eval_loss", [3.0, 2.0, 2.5, 2.0], {"step": 2, "eval_loss": 2.0}),
        ("eval_accuracy", [0.5, 0.4, 0.7, 0.6], {"step": 4, "eval_accuracy": 0.7}),
        ("eval_accuracy", [0.5, 0.4, 0.5, 0.8], {"step": 6, "eval_accuracy": 0.8}),
    ],
)
def test_best_is_the_first_of_the_highest_accuracy_or_the_lowest_loss(
    make_config: Callable[..., Any], name: str, values: list[float], best: dict[str, float]
) -> None:
    config = make_config("sft", eval_data=make_config("sft").data, eval_every=2, keep_best=True)
    model, found = evaluate(config, name, values)
    assert found == best
    assert (config.out / "best" / "weights").read_text() == str(model.exports)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["eval_loss", "eval_accuracy"])
def test_model_whose_metric_is_no_number_is_never_the_best(
    make_config: Callable[..., Any], name: str, wrong: float, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing is better or worse than NaN: kept once, it would give its place to whatever came next."""
    config = make_config("sft", eval_data=make_config("sft").data, eval_every=2, keep_best=True)
    model, found = evaluate(config, name, [wrong, 2.0, wrong, 2.0])
    assert (found, model.exports) == ({"step": 2, name: 2.0}, 1)
    assert f"{name} after 4 steps is {wrong}: that model is not kept as the best" in caplog.text


def test_keep_last_keeps_so_many_checkpoints(make_config: Callable[..., Any], fake_world: Callable[..., Any]) -> None:
    config = make_config("sft", keep_last=2, save_every=1)
    with pytest.raises(Exception, match=r"^step$"):
        run_sft(config, fake_world(crash_at=2 * 4))  # step and save, four times; the fifth step fails
    assert sorted(path.name for path in (config.out / "checkpoints").iterdir()) == ["step_3", "step_4"]
