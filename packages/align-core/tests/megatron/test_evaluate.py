"""Evaluation is a step's loss without the step, and the same on every layout; so are all preference losses."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from megatron_llama import LENGTHS, ragged_batch
from megatron_world import run_ranks

from align_core.config import (
    DpoLoss,
    KtoLoss,
    LossConfig,
    OptimizerConfig,
    ParallelConfig,
    RewardLoss,
    SftLoss,
    TrainerConfig,
    TrainingConfig,
)
from align_core.errors import AlignError, ConfigError
from align_core.megatron import MegatronTrainer, RankContext
from align_core.types import Batch

SCORE = {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
LOSSES: dict[str, LossConfig] = {
    "sft": SftLoss(),
    "sigmoid": DpoLoss(beta=0.5, label_smoothing=0.1),
    "mean": DpoLoss(beta=2.0, length_normalised=True),
    "ipo": DpoLoss(form="ipo", beta=0.5),
    "hinge": DpoLoss(form="hinge", beta=0.5),
    "robust": DpoLoss(form="robust", beta=0.5, label_smoothing=0.2),
    "simpo": DpoLoss(form="simpo", beta=2.0),
    "orpo": DpoLoss(form="orpo", beta=0.5),
    "kto": KtoLoss(beta=0.5, undesirable_weight=1.5),
}
Numbers = dict[str, dict[str, float]]


def batch() -> Batch:
    """Eight sequences as four pairs, with a reference that differs from the model."""
    made = ragged_batch(lengths=tuple(max(length, 4) for length in LENGTHS))
    rng = np.random.default_rng(1)
    return made.with_columns(
        tokens={"reference_logprobs": (-6.0 + rng.standard_normal(len(made.tokens))).astype(np.float32)},
        sequences={
            "desirable": np.arange(len(made)) % 3 == 0,
            "kl": np.full(len(made), 1.25, np.float32),
            "group": np.repeat(np.arange(4), 2),
            "label": np.tile([1.0, 0.0], 4),
        },
    )


def numbers(directory: Path, context: RankContext | None, parallel: ParallelConfig, tokens: int) -> Numbers:
    """What a step says of each loss, and what evaluation says before it and after it."""
    found: Numbers = {}
    for name, loss in LOSSES.items():
        trainer = MegatronTrainer(
            TrainerConfig(
                model=directory,
                steps=2,
                parallel=parallel,
                optimizer=OptimizerConfig(lr=2e-3, schedule="constant"),
                training=TrainingConfig(device="cpu", micro_batch_tokens=tokens),
            ),
            context,
        )
        for moment in ("before", "again"):
            found[f"{name} {moment}"] = dict(trainer.evaluate(batch(), loss))
        found[f"{name} step"] = dict(trainer.step(batch(), loss))
        found[f"{name} after"] = dict(trainer.evaluate(batch(), loss))
        trainer.close()
    return found


def numbers_of_rank(context: RankContext, directory: Path, tokens: int) -> Numbers:
    return numbers(directory, context, context.parallel, tokens)


@pytest.fixture(scope="module")
def alone(llama: Callable[..., Path]) -> Numbers:
    return numbers(llama(), None, ParallelConfig(), 4096)


@pytest.mark.parametrize("name", LOSSES)
def test_evaluation_is_what_the_step_reports_and_changes_nothing(name: str, alone: Numbers) -> None:
    before = alone[f"{name} before"]
    assert alone[f"{name} again"] == before
    for metric, value in before.items():
        assert alone[f"{name} step"][metric] == pytest.approx(value, abs=2e-6), metric
    assert alone[f"{name} after"]["loss"] < before["loss"] - 1e-3


@pytest.mark.parametrize(
    ("parallel", "tokens"),
    [
        (ParallelConfig(data=2), 64),
        (ParallelConfig(tensor=2), 4096),
        (ParallelConfig(pipeline=2), 64),
    ],
    ids=["dp2", "tp2", "pp2"],
)
def test_every_loss_is_the_same_on_every_layout(
    llama: Callable[..., Path], alone: Numbers, parallel: ParallelConfig, tokens: int
) -> None:
    found = run_ranks(numbers_of_rank, parallel, llama(), tokens)[-1]
    for name, metrics in alone.items():
        for metric in ("loss", "accuracy", "margin", "desirable_reward", "grad_norm"):
            if metric in metrics:
                assert found[name][metric] == pytest.approx(metrics[metric], rel=1e-4, abs=1e-5), (name, metric)


def test_every_loss_skips_a_step_in_which_the_model_gives_nan(llama: Callable[..., Path], alone: Numbers) -> None:
    """With the metrics of any other step, as NaN; evaluation says where."""
    optimizer = OptimizerConfig(max_skipped=len(LOSSES))
    settings = TrainingConfig(device="cpu", micro_batch_tokens=64)
    trainer = MegatronTrainer(TrainerConfig(model=llama(), steps=20, optimizer=optimizer, training=settings))
    (norm,) = (weight for name, weight in trainer._chunks[0].named_parameters() if "final_layernorm" in name)
    norm.data[0] = np.nan
    for name, loss in LOSSES.items():
        found = trainer.step(batch(), loss)
        assert found["skipped"] == 1.0, name
        assert found.keys() == alone[f"{name} step"].keys()
        assert all(np.isnan(found[metric]) for metric in alone[f"{name} before"]), name
        with pytest.raises(AlignError, match="cannot be computed: the model gives nan at token "):
            trainer.evaluate(batch(), loss)
    trainer.close()


def test_frozen_models_evaluate_and_wrong_heads_are_refused(llama: Callable[..., Path]) -> None:
    settings = TrainingConfig(device="cpu")
    trainer = MegatronTrainer(TrainerConfig(model=llama(), trainable=False, training=settings))
    assert trainer.evaluate(batch(), SftLoss())["loss"] > 0
    with pytest.raises(ConfigError, match="RewardLoss needs a model with head 'score'"):
        trainer.evaluate(batch(), RewardLoss())
    trainer.close()


def test_reward_loss_takes_its_margin_and_its_centring(llama: Callable[..., Path]) -> None:
    """By hand from the scores: mean of -log sigmoid(difference - 0.3) + 0.1 (sum)^2."""
    settings = TrainingConfig(device="cpu")
    trainer = MegatronTrainer(TrainerConfig(model=llama(**SCORE), head="score", trainable=False, training=settings))
    scores = trainer.scores(batch()).astype(np.float64)
    better, worse = scores[0::2], scores[1::2]
    wanted = np.mean(np.logaddexp(0, -(better - worse - 0.3)) + 0.1 * (better + worse) ** 2)
    found = trainer.evaluate(batch(), RewardLoss(margin_scale=0.3, centre_coef=0.1))["loss"]
    assert found == pytest.approx(wanted, abs=1e-6)
    trainer.close()
