"""The road's commands fit together: each reads what an earlier one writes, and a user could type any of them."""

import dataclasses
from itertools import pairwise
from pathlib import Path

import pytest

from align_core import settings
from align_core.config import (
    DpoConfig,
    GrpoConfig,
    OnlineDpoConfig,
    PolicyConfig,
    RewardConfig,
    RlhfConfig,
    SftConfig,
    StageConfig,
)
from align_core.tutorial.road import TRAINED, Road, steps_of
from align_core.tutorial.walk import Step

OUT = Path("runs/walk")
STAGES: dict[str, type[StageConfig]] = {
    "sft": SftConfig,
    "reward": RewardConfig,
    "rlhf": RlhfConfig,
    "online-dpo": OnlineDpoConfig,
    "grpo": GrpoConfig,
    "dpo": DpoConfig,
}


def road(**changes: object) -> Road:
    made = Road(
        recipe="tiny",
        out=OUT,
        seed=5,
        tensor=2,
        steps=None,
        limit=None,
        max_tokens=8,
        context=64,
        dtype="float32",
        make_model=("align", "make-model", "tiny", "--out", str(OUT / "hf" / "start")),
        make_data=("align", "data", "prepare", "additions", "--out", str(OUT / "data")),
        reward_data="ratings",
    )
    return dataclasses.replace(made, **changes)


def by_name(steps: list[Step]) -> dict[str, Step]:
    assert len({step.name for step in steps}) == len(steps)
    return {step.name: step for step in steps}


def stage_settings(step: Step) -> StageConfig:
    program, stage, *words = step.argv
    assert program == "align"
    return settings.parse(STAGES[stage], words, stage=stage)


def test_every_input_was_written_by_an_earlier_step() -> None:
    """The data directory as a whole is the data step's; a model directory is the stage's."""
    made: list[Path] = []
    for step in steps_of(road()):
        inputs = [Path(word) for word in step.argv if word.startswith(str(OUT))]
        output = step.done.parent
        for path in inputs:
            assert path == output or any(m == path or m in path.parents for m in made), f"{step.name} reads {path}"
        made.append(output)


def test_stage_commands_parse_and_carry_the_roads_choices() -> None:
    steps = by_name(steps_of(road()))
    for name in (*TRAINED, "reward"):
        config = stage_settings(steps[name])
        assert (config.out, config.seed, config.parallel.tensor) == (OUT / name, 5, 2)
        assert steps[name].done == config.out / "result.json"
    for name in ("rlhf", "online_dpo", "grpo_reward_model"):
        policy = stage_settings(steps[name])
        assert isinstance(policy, PolicyConfig)
        assert (policy.reward, policy.reward_model) == ("model", OUT / "reward" / "model")
        assert (policy.eval_reward, policy.eval_data) == ("math", OUT / "data" / "test.jsonl")
    reward = stage_settings(steps["reward"])
    assert isinstance(reward, RewardConfig)
    assert (reward.data, reward.eval_data) == (OUT / "data" / "ratings.jsonl", OUT / "data" / "test_preferences.jsonl")
    assert {stage_settings(steps[name]).model for name in TRAINED[1:]} == {OUT / "sft" / "model"}


@pytest.mark.parametrize("steps", [1, 8, 100])
def test_shortened_road_shortens_every_stage_and_its_warm_up(steps: int) -> None:
    made = by_name(steps_of(road(steps=steps, dtype="bfloat16")))
    for name in (*TRAINED, "reward"):
        config = stage_settings(made[name])
        assert (config.steps, config.optimizer.warmup_steps) == (steps, steps // 10)
        assert config.training.dtype == "bfloat16"
        if isinstance(config, PolicyConfig):
            assert config.engine.dtype == "bfloat16"


def test_every_trained_model_is_converted_and_evaluated_beside_the_start() -> None:
    steps = by_name(steps_of(road(limit=40)))
    words = steps["accuracy"].argv
    models = [word for flag, word in pairwise(words) if flag == "--model"]
    assert models == [str(OUT / "hf" / name) for name in ("start", *TRAINED)]
    assert words[words.index("--limit") + 1] == "40"
    assert "--limit" not in by_name(steps_of(road()))["accuracy"].argv
    for name in TRAINED:
        assert steps[f"to-hf-{name}"].argv[-2:] == (str(OUT / name / "model"), str(OUT / "hf" / name))
