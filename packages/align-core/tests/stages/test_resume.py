"""A run that is killed anywhere and started again gives what an undisturbed run gives, for every stage."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from align_core.config import KlConfig, StageConfig
from align_core.stages.dpo import run_dpo
from align_core.stages.grpo import run_grpo
from align_core.stages.online_dpo import run_online_dpo
from align_core.stages.reward import run_reward
from align_core.stages.rlhf import run_rlhf
from align_core.stages.run import read_metrics
from align_core.stages.sft import run_sft

STAGES: dict[str, Callable[..., None]] = {
    "sft": run_sft,
    "reward": run_reward,
    "dpo": run_dpo,
    "grpo": run_grpo,
    "online-dpo": run_online_dpo,
    "rlhf": run_rlhf,
}
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
    if stage == "grpo":
        changes = {"eval_data": make_config("grpo").data, "eval_every": 3}
    if stage == "rlhf":  # so that a coefficient that is forgotten shows
        changes["kl"] = KlConfig(coef=0.5, adaptive=True, target=0.01, horizon=12)
    undisturbed = make_config(stage, out="undisturbed", **changes)
    world = fake_world()
    STAGES[stage](undisturbed, world)
    expected = metrics(undisturbed.out)
    assert [line["step"] for line in expected] == list(range(6))
    assert expected[0]["loss"] != expected[-1]["loss"]
    assert {"step", "save", "export"} <= set(world.operations)
    for crash_at, operation in enumerate(world.operations):
        config = make_config(stage, out=f"crash{crash_at}", **changes)
        with pytest.raises(Exception, match=f"^{operation}$"):
            STAGES[stage](config, fake_world(crash_at=crash_at))
        again = fake_world()
        STAGES[stage](config, again)
        assert len(again.operations) <= len(world.operations)
        assert metrics(config.out) == expected, f"after a crash in operation {crash_at}, {operation}"
        assert result(config.out) == result(undisturbed.out)
        wanted = np.load(undisturbed.out / "model" / "arrays.npz")
        with wanted, np.load(config.out / "model" / "arrays.npz") as found:
            assert all(np.array_equal(found[name], wanted[name]) for name in wanted.files)


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
