"""Contradicting settings are refused where they are made, and every field is documented."""

import ast
import dataclasses
import importlib
import inspect
import math
import typing
from pathlib import Path
from pkgutil import iter_modules

import pytest

from align_core import config
from align_core.config import (
    ClusterConfig,
    DpoConfig,
    DpoLoss,
    EngineConfig,
    GrpoConfig,
    GrpoLoss,
    KtoConfig,
    OptimizerConfig,
    ParallelConfig,
    RewardConfig,
    SamplingConfig,
    SftConfig,
    StageConfig,
    TrainerConfig,
    TrainingConfig,
)
from align_core.errors import ConfigError
from align_core.settings import known_keys

PLACES = {"model": Path("m"), "data": Path("d"), "out": Path("o")}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ParallelConfig(tensor=0), "tensor must be greater than 0, got 0"),
        (lambda: ParallelConfig(sequence=True), "sequence parallelism needs tensor > 1; set parallel.tensor"),
        (lambda: OptimizerConfig(lr=0.0), "lr must be greater than 0"),
        (lambda: OptimizerConfig(lr=math.nan), "lr must be greater than 0, got nan"),
        (lambda: OptimizerConfig(beta1=1.5), "beta1 must lie between 0.0 and 1.0, got 1.5"),
        (lambda: OptimizerConfig(clip_grad=-1.0), "clip_grad must not be negative, got -1.0"),
        (lambda: TrainingConfig(micro_batch_tokens=0), "micro_batch_tokens must be greater than 0"),
        (
            lambda: TrainingConfig(recompute="full", recompute_modules=("mlp",)),
            "recompute_modules mlp have no use with recompute 'full'; set recompute to 'selective'",
        ),
        (
            lambda: TrainingConfig(recompute="selective", recompute_modules=()),
            "recompute 'selective' needs recompute_modules; name some",
        ),
        (lambda: SamplingConfig(top_p=0.0), "top_p must lie between"),
        (lambda: SamplingConfig(temperature=-1.0), "temperature must not be negative"),
        (lambda: SamplingConfig(temperature=0.0, n=4), "gives 4 equal completions; set n to 1 or temperature above 0"),
        (lambda: EngineConfig(memory_fraction=1.0), "memory_fraction must lie between 0.01 and 0.99"),
        (lambda: EngineConfig(kv_cache_mib=-1), "kv_cache_mib must be positive, or 0"),
        (lambda: DpoLoss(beta=0.0), "beta must be greater than 0"),
        (lambda: DpoLoss(label_smoothing=0.6), "label_smoothing must lie between 0.0 and 0.5"),
        (lambda: GrpoLoss(kl_coef=-0.1), "kl_coef must not be negative"),
        (lambda: SftConfig(**PLACES, steps=0), "steps must be greater than 0"),
        (
            lambda: SftConfig(**PLACES, steps=5, optimizer=OptimizerConfig(warmup_steps=5)),
            "warmup_steps 5 leaves none of the 5 steps at full learning rate; use at most 4",
        ),
        (
            lambda: SftConfig(
                **PLACES, cluster=ClusterConfig(in_process=True), parallel=ParallelConfig(tensor=2, pipeline=2)
            ),
            "in_process runs one rank, but parallel asks for 4; leave it off to use Ray",
        ),
        (
            lambda: GrpoConfig(
                **PLACES, cluster=ClusterConfig(in_process=True), reward_model_parallel=ParallelConfig(data=2)
            ),
            "in_process runs one rank, but reward_model_parallel asks for 2",
        ),
        (lambda: GrpoConfig(**PLACES, reward="model"), "reward 'model' needs .* give --reward_model DIR"),
        (lambda: GrpoConfig(**PLACES, reward_model=Path("r")), "reward is 'math'; give --reward model to use it"),
        (lambda: GrpoConfig(**PLACES, sampling=SamplingConfig(n=1)), "set sampling.n to 2 or more"),
        (
            lambda: GrpoConfig(**PLACES, batch_size=64, updates_per_rollout=3),
            "updates_per_rollout 3 does not divide batch_size 64 prompts",
        ),
        (lambda: GrpoConfig(**PLACES, canary_threshold=0.0), "canary_threshold must be greater than 0"),
    ],
)
def test_contradiction_is_refused_with_values_and_remedy(make: typing.Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_defaults_are_valid_and_grpo_samples_eight() -> None:
    for kind in (SftConfig, RewardConfig, DpoConfig, GrpoConfig):
        kind(**PLACES)
    assert GrpoConfig(**PLACES).sampling.n == 8


def test_world_size_is_the_product_of_the_three() -> None:
    assert ParallelConfig(tensor=2, pipeline=3, data=5).world_size == 30


def test_trainer_of_a_stage_takes_the_stages_settings() -> None:
    stage = GrpoConfig(**PLACES, steps=10, seed=3, parallel=ParallelConfig(tensor=2), updates_per_rollout=2)
    policy = TrainerConfig.of_stage(stage, updates_per_step=2)
    assert (policy.model, policy.head, policy.trainable) == (Path("m"), "lm", True)
    assert (policy.steps, policy.seed, policy.parallel.tensor) == (20, 3, 2)
    reward = TrainerConfig.of_stage(
        stage, model=Path("r"), head="score", trainable=False, parallel=ParallelConfig(data=2)
    )
    assert (reward.model, reward.head, reward.trainable) == (Path("r"), "score", False)
    assert (reward.parallel.tensor, reward.parallel.data) == (1, 2)


def test_settings_stay_few() -> None:
    """DESIGN.md bounds the leaves at about 150, in all stages together."""
    leaves = {
        (kind.__name__, key)
        for kind in (SftConfig, RewardConfig, DpoConfig, KtoConfig, GrpoConfig)
        for key in known_keys(kind)
    }
    assert len({key for _, key in leaves}) < 150


def test_every_field_has_a_docstring_below_it() -> None:
    sources = [
        inspect.getsource(importlib.import_module(f"{config.__name__}.{each.name}"))
        for each in iter_modules(config.__path__)
    ]
    bare = [
        f"{node.name}.{ast.unparse(line.target)}"
        for source in sources
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef)
        for line, below in zip(node.body, [*node.body[1:], None])
        if isinstance(line, ast.AnnAssign)
        and not (isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant))
    ]
    assert bare == []


@pytest.mark.parametrize("kind", [StageConfig, TrainerConfig, EngineConfig, SamplingConfig])
def test_configs_are_frozen(kind: type) -> None:
    made = kind(**{name: value for name, value in PLACES.items() if name in {f.name for f in dataclasses.fields(kind)}})
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(made, dataclasses.fields(kind)[0].name, 1)
