"""The directory of a run: where it continues, what its files hold, and which settings may change meanwhile."""

import dataclasses
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from align_core.config import (
    EngineConfig,
    OptimizerConfig,
    ParallelConfig,
    SamplingConfig,
    ScoringConfig,
    StageConfig,
    TrainingConfig,
)
from align_core.errors import CheckpointError, ConfigError, DataError
from align_core.stages.run import Run, read_metrics


class Model:
    """Remembers what it was told; its checkpoint is the file `state`."""

    def __init__(self) -> None:
        self.loaded: str | None = None

    def save(self, path: Path, state: Mapping[str, str]) -> None:
        path.mkdir(parents=True)
        (path / "state").write_text(json.dumps(state))

    def load(self, path: Path) -> Mapping[str, str]:
        self.loaded = path.name
        return json.loads((path / "state").read_text())

    def export(self, path: Path) -> None:
        path.mkdir()


def walk(config: StageConfig, *, until: int | None = None) -> Model:
    """Runs the steps, logging twice the step's number; stops as if killed in step `until`."""
    run, model = Run(config), Model()
    for step in run.steps(model):
        run.log(step, {"value": 2.0 * step})
        if step == until:
            return model
    run.finish(model, {"records": 10}, evaluate=dict)
    return model


def checkpoints(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").iterdir())


def test_finished_run_leaves_settings_metrics_model_and_result(make_config: Callable[..., Any]) -> None:
    config = make_config("sft")
    walk(config)
    assert sorted(path.name for path in config.out.iterdir()) == [
        "config.yaml",
        "data.json",
        "metrics.jsonl",
        "model",
        "result.json",
        "tensorboard",
    ]
    result = json.loads((config.out / "result.json").read_text())
    assert (result["steps"], result["records"], result["last_step"]["value"]) == (6, 10, 10.0)
    assert [line["value"] for line in read_metrics(config.out)] == [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]
    assert yaml.safe_load((config.out / "config.yaml").read_text())["optimizer"]["lr"] == config.optimizer.lr
    assert Run(config).finished


def test_only_the_newest_checkpoint_is_kept(make_config: Callable[..., Any]) -> None:
    config = make_config("sft")
    walk(config, until=3)
    assert checkpoints(config.out) == ["step_2"]
    walk(config, until=5)
    assert checkpoints(config.out) == ["step_4"]


def test_continues_from_the_newest_checkpoint_and_drops_later_metrics(make_config: Callable[..., Any]) -> None:
    """Killed in step 3: checkpoint after 2 steps, metrics of 4; the next run repeats steps 2 and 3."""
    config = make_config("sft")
    walk(config, until=3)
    assert [line["step"] for line in read_metrics(config.out)] == [0, 1, 2, 3]
    model = walk(config, until=2)
    assert model.loaded == "step_2"
    assert [line["step"] for line in read_metrics(config.out)] == [0, 1, 2]


def test_newest_is_by_number_and_other_names_do_not_count(make_config: Callable[..., Any]) -> None:
    config = make_config("sft", steps=12)
    Run(config)
    for name in ("step_9", "step_10", "step_11.partial", ".step_11", "step_x"):
        Model().save(config.out / "checkpoints" / name, {"step": name.removeprefix("step_")})
    assert walk(config, until=10).loaded == "step_10"


def test_checkpoint_of_another_step_is_refused(make_config: Callable[..., Any]) -> None:
    config = make_config("sft")
    walk(config, until=3)
    (config.out / "checkpoints" / "step_2").rename(config.out / "checkpoints" / "step_4")
    with pytest.raises(CheckpointError, match=r"step_4' says that it is of step 2; remove it"):
        walk(config)


def test_line_cut_off_by_a_crash_is_left_out(make_config: Callable[..., Any]) -> None:
    config = make_config("sft")
    walk(config, until=1)
    with (config.out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "val')
    assert [line["step"] for line in read_metrics(config.out)] == [0, 1]
    assert read_metrics(config.out / "nowhere") == []


def test_precision_and_balance_loss_are_those_that_the_run_began_with(make_config: Callable[..., Any]) -> None:
    """A bfloat16 checkpoint holds float32 main weights, which a float32 run would lose."""
    walk(make_config("sft", training=TrainingConfig(dtype="bfloat16")), until=3)
    changed = make_config("sft", training=TrainingConfig(dtype="float32", balance_coef=0.01))
    complaint = r"\(training.balance_coef was 0.0, is 0.01; training.dtype was 'bfloat16', is 'float32'\); repeat"
    with pytest.raises(ConfigError, match=complaint):
        walk(changed)


@pytest.mark.parametrize("until", [3, None])
def test_other_settings_are_refused_by_name_in_a_run_that_saved_or_ended(
    make_config: Callable[..., Any], until: int | None
) -> None:
    walk(make_config("sft"), until=until)
    changed = make_config("sft", seed=4, optimizer=OptimizerConfig(lr=0.5, schedule="linear"))
    with pytest.raises(ConfigError, match=r"other settings \(optimizer.lr was 1.0, is 0.5; seed was 3, is 4\); repeat"):
        Run(changed)


def forget(config: StageConfig, *names: str) -> None:
    """Leaves settings out of the run's record, as an older version would have."""
    path = config.out / "config.yaml"
    settings = yaml.safe_load(path.read_text())
    for name in names:
        *above, last = name.split(".")
        place = settings
        for key in above:
            place = place[key]
        del place[last]
    path.write_text(yaml.safe_dump(settings))


def test_settings_newer_than_the_run_are_at_their_defaults(
    make_config: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config("grpo")
    walk(config, until=3)
    forget(config, "evaluations", "sampling.top_p", "correction")
    with caplog.at_level(logging.INFO):
        assert walk(config).loaded == "step_2"
    assert f"newer than the run in {config.out}: correction, evaluations, sampling.top_p" in caplog.text
    assert "correction" in yaml.safe_load((config.out / "config.yaml").read_text())


def test_a_newer_setting_away_from_its_default_and_one_that_is_gone_are_refused(
    make_config: Callable[..., Any],
) -> None:
    config = make_config("grpo", sampling=SamplingConfig(n=3, max_tokens=5, top_p=0.5))
    walk(config, until=3)
    forget(config, "sampling.top_p")
    path = config.out / "config.yaml"
    path.write_text(path.read_text() + "penalty: 2\n")
    with pytest.raises(
        ConfigError, match=r"\(penalty was 2, is no setting any more; sampling.top_p was no setting yet, is 0.5\)"
    ):
        Run(config)


def test_run_that_saved_nothing_may_start_again_with_other_settings(make_config: Callable[..., Any]) -> None:
    walk(make_config("sft"), until=0)
    changed = make_config("sft", seed=4)
    walk(changed, until=0)
    assert yaml.safe_load((changed.out / "config.yaml").read_text())["seed"] == 4
    assert [line["step"] for line in read_metrics(changed.out)] == [0]


@pytest.mark.parametrize(
    "free",
    [
        {"save_every": 5},
        {"parallel": ParallelConfig(tensor=2)},
        {"reward_model_parallel": ParallelConfig(data=2)},
        {"training": TrainingConfig(recompute="full", micro_batch_tokens=7)},
        {"engine": EngineConfig(name="other", context=64, dtype="bfloat16", kv_cache_mib=9, memory_fraction=0.9)},
        {"canary_threshold": 0.5},
        {"scoring": ScoringConfig(workers=0, on_failure="drop", url="http://localhost:9/v1", key_variable="KEY")},
    ],
    ids=lambda free: next(iter(free)),
)
def test_speed_place_and_tolerance_may_change(make_config: Callable[..., Any], free: dict[str, Any]) -> None:
    walk(make_config("grpo"), until=3)
    assert walk(make_config("grpo", **free)).loaded == "step_2"


@pytest.mark.parametrize(
    ("bound", "message"),
    [
        ({"engine": EngineConfig(name="fake", context=60)}, "engine.context was 64, is 60"),
        ({"sampling": SamplingConfig(n=4, max_tokens=5)}, "sampling.n was 3, is 4"),
        ({"batch_size": 2}, "batch_size was 4, is 2"),
        ({"scoring": ScoringConfig(workers=0, model="other")}, "scoring.model was '', is 'other'"),
    ],
)
def test_what_is_computed_may_not_change(make_config: Callable[..., Any], bound: dict[str, Any], message: str) -> None:
    walk(make_config("grpo"), until=3)
    with pytest.raises(ConfigError, match=message):
        Run(make_config("grpo", **bound))


def test_directory_may_be_moved(make_config: Callable[..., Any]) -> None:
    config = make_config("sft")
    walk(config, until=3)
    moved = dataclasses.replace(config, out=config.out.with_name("moved"))
    config.out.rename(moved.out)
    assert walk(moved).loaded == "step_2"


def test_each_step_is_one_line_of_the_log(make_config: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        walk(make_config("sft", steps=2))
    assert [record.getMessage() for record in caplog.records] == ["step 1/2  value 0", "step 2/2  value 2"]


@pytest.mark.parametrize(("until", "saved"), [(0, False), (3, True)])
def test_another_model_under_the_same_path_is_noticed(
    make_config: Callable[..., Any], tmp_path: Path, until: int, saved: bool
) -> None:
    """Same names and sizes, other weights: a run that saved is refused; what one that did not computed is dropped."""
    model = tmp_path / "retrained"
    model.mkdir()
    (model / "model.safetensors").write_bytes(bytes(5 << 20))
    config = make_config("sft", model=model)
    walk(config, until=until)
    reference = config.out / "checkpoints" / "reference_data.f32"
    reference.parent.mkdir(exist_ok=True)
    reference.touch()
    (model / "model.safetensors").write_bytes(b"1" * (5 << 20))
    if saved:
        with pytest.raises(DataError, match=r"holds another model than when the run in .* began .setting model."):
            Run(config)
    else:
        Run(config)
    assert reference.exists() is saved
