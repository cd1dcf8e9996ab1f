"""A run that is killed anywhere and started again gives what an undisturbed run gives, for every stage."""

import dataclasses
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from align_core.config import ClusterConfig, KlConfig, ScheduleConfig, StageConfig
from align_core.errors import DataError, Stopped
from align_core.stages.dpo import run_dpo
from align_core.stages.grpo import run_grpo
from align_core.stages.kto import run_kto
from align_core.stages.online_dpo import run_online_dpo
from align_core.stages.reward import run_reward
from align_core.stages.rlhf import run_rlhf
from align_core.stages.run import read_metrics
from align_core.stages.sft import run_sft

STAGES: dict[str, Callable[..., None]] = {
    "sft": run_sft,
    "reward": run_reward,
    "dpo": run_dpo,
    "kto": run_kto,
    "grpo": run_grpo,
    "online-dpo": run_online_dpo,
    "rlhf": run_rlhf,
}
OFFLINE = ["sft", "reward", "dpo", "kto"]
pytestmark = pytest.mark.usefixtures("length")


def metrics(out: Path) -> list[dict[str, float]]:
    """All that a rerun must repeat: no clock times."""
    return [
        {name: value for name, value in line.items() if name != "time" and "second" not in name}
        for line in read_metrics(out)
    ]


def result(out: Path) -> dict[str, Any]:
    found = json.loads((out / "result.json").read_text())
    return {**found, "last_step": metrics(out)[-1]}


@pytest.mark.parametrize("stage", STAGES)
def test_crash_at_any_operation_changes_nothing(
    stage: str, make_config: Callable[..., StageConfig], fake_world: Callable[..., Any]
) -> None:
    changes: dict[str, Any] = {}
    if stage in (*OFFLINE, "grpo"):
        changes = {"eval_data": make_config(stage).data, "eval_every": 3}
    if stage in OFFLINE:
        changes["keep_best"] = True
    if stage == "rlhf":  # so that a coefficient that is forgotten shows
        changes["kl"] = KlConfig(coef=0.5, adaptive=True, target=0.01, horizon=12)
    undisturbed = make_config(stage, out="undisturbed", **changes)
    world = fake_world()
    STAGES[stage](undisturbed, world)
    expected = metrics(undisturbed.out)
    assert [line["step"] for line in expected] == list(range(6))
    assert expected[0]["loss"] != expected[-1]["loss"]
    assert {"step", "save", "export"} <= set(world.operations)
    last_save = max(i for i, name in enumerate(world.operations) if name == "save")
    assert last_save < world.operations.index("export", last_save)
    best = undisturbed.out / "best" / "best.json"
    for crash_at, operation in enumerate(world.operations):
        config = make_config(stage, out=f"crash{crash_at}", **changes)
        with pytest.raises(Exception, match=f"^{operation}$"):
            STAGES[stage](config, fake_world(crash_at=crash_at))
        again = fake_world()
        STAGES[stage](config, again)
        assert len(again.operations) <= len(world.operations)
        if crash_at > last_save:
            assert "step" not in again.operations, "what follows the last step repeats no step"
        assert metrics(config.out) == expected, f"after a crash in operation {crash_at}, {operation}"
        assert result(config.out) == result(undisturbed.out)
        wanted = np.load(undisturbed.out / "model" / "arrays.npz")
        with wanted, np.load(config.out / "model" / "arrays.npz") as found:
            assert all(np.array_equal(found[name], wanted[name]) for name in wanted.files)
        if stage in OFFLINE:
            assert (config.out / "best" / "best.json").read_bytes() == best.read_bytes()


@pytest.mark.parametrize("stage", STAGES)
def test_finished_run_is_not_repeated(
    stage: str, make_config: Callable[..., StageConfig], fake_world: Callable[..., Any]
) -> None:
    config = make_config(stage)
    STAGES[stage](config, fake_world())
    assert not (config.out / "checkpoints").exists()
    world = fake_world()
    STAGES[stage](config, world)
    assert world.trainers == []


@pytest.mark.parametrize("stage", STAGES)
def test_saving_more_often_changes_nothing(
    stage: str, make_config: Callable[..., StageConfig], fake_world: Callable[..., Any]
) -> None:
    rare, often = make_config(stage, out="rare", save_every=100), make_config(stage, out="often", save_every=1)
    for config in (rare, often):
        STAGES[stage](config, fake_world())
    assert metrics(rare.out) == metrics(often.out)


@pytest.mark.parametrize("stage", STAGES)
def test_missing_data_and_missing_model_are_found_before_anything_starts(
    stage: str, tmp_path: Path, make_config: Callable[..., StageConfig], fake_world: Callable[..., Any]
) -> None:
    for changes, message in (
        ({"data": tmp_path / "nowhere"}, "data file '.*nowhere' does not exist"),
        ({"model": tmp_path / "nowhere"}, "model directory '.*nowhere' does not exist"),
        ({"template": "chatt"}, "unknown prompt template 'chatt'"),
        ({"batch_size": 12}, "10 records are fewer than a batch of 12"),
    ):
        world = fake_world()
        with pytest.raises(Exception, match=message):
            STAGES[stage](make_config(stage, **changes), world)
        assert world.operations == []


@pytest.mark.parametrize("stage", OFFLINE)
@pytest.mark.parametrize("setting", ["data", "eval_data"])
def test_changed_data_is_noticed_when_continuing(
    stage: str, setting: str, make_config: Callable[..., StageConfig], fake_world: Callable[..., Any], tmp_path: Path
) -> None:
    data, held_out = make_config(stage).data, tmp_path / "held_out.jsonl"
    assert isinstance(data, Path)
    held_out.write_bytes(data.read_bytes())
    config = make_config(stage, eval_data=held_out)
    with pytest.raises(Exception, match=r"^save$"):  # the second save: the checkpoint of step 2 is there
        STAGES[stage](config, fake_world(crash_at=_second(stage, config, fake_world, "save")))
    changed = data if setting == "data" else held_out
    rows = changed.read_text(encoding="utf-8").splitlines(keepends=True)
    changed.write_text("".join([*rows, rows[0]]), encoding="utf-8")
    again = fake_world()
    with pytest.raises(DataError, match=rf"^{setting} of the run in .* has changed: .*records was 10, is 11"):
        STAGES[stage](config, again)
    assert again.operations == []
    changed.write_text("".join(rows), encoding="utf-8")
    STAGES[stage](config, again)
    assert [line["step"] for line in metrics(config.out)] == list(range(6))


def _second(stage: str, config: StageConfig, fake_world: Callable[..., Any], operation: str) -> int:
    """Where the second `operation` comes in an undisturbed run."""
    world = fake_world()
    STAGES[stage](dataclasses.replace(config, out=config.out.with_name("whole")), world)
    return [i for i, name in enumerate(world.operations) if name == operation][1]


def test_changed_data_before_the_first_checkpoint_starts_anew(
    make_config: Callable[..., StageConfig], fake_world: Callable[..., Any]
) -> None:
    """The reference of DPO is stored before the first step; it must not be that of the old file."""
    config = make_config("dpo")
    with pytest.raises(Exception, match=r"^step$"):
        run_dpo(config, fake_world(crash_at=2))
    assert isinstance(config.data, Path)
    config.data.write_text(
        "".join(json.dumps({"prompt": f"{n}", "chosen": "1", "rejected": f"{n}"}) + "\n" for n in range(12))
    )
    world = fake_world()
    run_dpo(config, world)
    untrained = fake_world().trainer(world.trainers[0].config)
    for batch in world.trainers[0].seen:
        np.testing.assert_array_equal(batch.token_column("reference_logprobs"), untrained.logprobs(batch))


@pytest.mark.parametrize("crash_after", [7, 12, 17])
def test_one_step_off_continues_with_the_completions_that_waited(
    crash_after: int, make_config: Callable[..., StageConfig], fake_world: Callable[..., Any]
) -> None:
    """The step after a checkpoint trains on what older weights sampled before it; they are in the checkpoint."""
    changes = {"schedule": ScheduleConfig(kind="one_step_off"), "cluster": ClusterConfig(placement="disaggregated")}
    whole = make_config("grpo", out="whole", **changes)
    run_grpo(whole, fake_world())
    config = make_config("grpo", out="crashed", **changes)
    with pytest.raises(Exception, match=r"^(logprobs|step|save|generate|export)$"):
        run_grpo(config, fake_world(crash_at=crash_after))
    run_grpo(config, fake_world())
    assert metrics(config.out) == metrics(whole.out)
    assert [line["staleness"] for line in metrics(whole.out)] == [0, 1, 1, 1, 1, 1]
    assert "canary_mean" in metrics(whole.out)[0] and "canary_mean" not in metrics(whole.out)[1]


@pytest.fixture
def sigterm_at(fake_world: Callable[..., Any]) -> Callable[[str, int], Any]:
    """A world in which SIGTERM comes during the operation of this name and number, from 1."""

    def make(name: str, number: int) -> Any:
        world = fake_world()
        tick = world.tick

        def tick_and_stop(operation: str) -> None:
            tick(operation)
            if operation == name and world.operations.count(name) == number:
                os.kill(os.getpid(), signal.SIGTERM)

        world.tick = tick_and_stop
        return world

    return make


@pytest.mark.parametrize("step", [3, 6])
def test_sigterm_ends_the_step_saves_and_stops(
    step: int,
    make_config: Callable[..., StageConfig],
    fake_world: Callable[..., Any],
    sigterm_at: Callable[[str, int], Any],
) -> None:
    whole, config = make_config("grpo", out="whole"), make_config("grpo", out="stopped", save_every=100)
    run_grpo(make_config("grpo", out="whole", save_every=100), fake_world())
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped, match=f"stopped after step {step} of 6, which is saved"):
        run_grpo(config, sigterm_at("step", step))
    assert signal.getsignal(signal.SIGTERM) is before
    assert [path.name for path in (config.out / "checkpoints").iterdir()] == [f"step_{step}"]
    again = fake_world()
    run_grpo(config, again)
    assert again.operations.count("step") == 6 - step
    assert metrics(config.out) == metrics(whole.out)


@pytest.mark.parametrize("stage", ["sft", "rlhf"])
def test_sigterm_after_the_last_step_lets_the_run_finish(
    stage: str, make_config: Callable[..., StageConfig], sigterm_at: Callable[[str, int], Any]
) -> None:
    config, before = make_config(stage), signal.getsignal(signal.SIGTERM)
    STAGES[stage](config, sigterm_at("export", 1))
    assert signal.getsignal(signal.SIGTERM) is before
    assert result(config.out)["steps"] == 6
    assert not (config.out / "checkpoints").exists()
