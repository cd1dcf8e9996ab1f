"""A small world for the stages: a bigram policy that really learns, its engine, and a crash wherever a test wants one.

The policy is logits(next | last) = bigram.weight[last] + bias, the model of `align_rollout.fake.FakeEngine`; the score
of a sequence is the sum of `score.weight` over its tokens. Both learn by plain gradient descent, with gradients written
out below, so a stage that passes wrong columns, groups or order gives other numbers.
Shape letters: B sequences, N flat tokens, V vocabulary.
"""

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from align_core import registry
from align_core.atomic import new_directory, replace_directory
from align_core.config import (
    DpoConfig,
    DpoLoss,
    EngineConfig,
    GrpoConfig,
    GrpoLoss,
    KtoConfig,
    KtoLoss,
    LossConfig,
    OnlineDpoConfig,
    OnlineDpoLoss,
    OptimizerConfig,
    PolicyConfig,
    PpoLoss,
    RewardConfig,
    RewardLoss,
    RlhfConfig,
    SamplingConfig,
    ScoringConfig,
    SftConfig,
    SftLoss,
    StageConfig,
    TrainerConfig,
    ValueLoss,
)
from align_core.contracts import WeightSource
from align_core.stages.run import Run
from align_core.stages.world import Model, World
from align_core.types import Batch, Completion, Prompt, Score, WeightTensor
from align_rollout.fake import ArrayWeights, FakeEngine

VOCAB, EOS = 320, 2  # of the tiny tokenizer
Array = NDArray[np.float32]
_KTO_SHARES = {"desirable": 0.5, "desirable_reward": 0.2, "undesirable_reward": 0.1}  # sums over all responses


class Crash(Exception):
    """What a test lets happen; no AlignError, as a killed process is none."""


class FakeTrainer:
    """A `Model` in numpy."""

    def __init__(self, config: TrainerConfig, world: "FakeWorld") -> None:
        rng = np.random.default_rng(7)
        self.config = config
        self.seen: list[Batch] = []
        self.measured: list[Batch] = []
        self._world = world
        self.steps_done = 0
        self.weight: dict[str, Array] = {
            "bigram.weight": 0.1 * rng.standard_normal((VOCAB, VOCAB), np.float32),
            "bias": 0.1 * rng.standard_normal(VOCAB, np.float32),
        }
        self.score = np.zeros(VOCAB, np.float32)
        self.value = np.zeros(VOCAB, np.float32)

    def logprobs(self, batch: Batch) -> Array:
        self._world.tick("logprobs")
        return self._logprobs(batch)[0]

    def scores(self, batch: Batch) -> Array:
        self._world.tick("scores")
        return np.add.reduceat(self.score[batch.tokens], batch.offsets[:-1])

    def values(self, batch: Batch) -> Array:
        self._world.tick("values")
        return _values(self.value, batch)

    def step(self, batch: Batch, loss: LossConfig) -> Mapping[str, float]:
        assert self.config.trainable
        self._world.tick("step")
        self.seen.append(batch)
        lr = self.config.optimizer.lr * (1 - self.steps_done / self.config.steps)
        if isinstance(loss, RewardLoss):
            value = _reward_step(self, batch, lr)
        elif isinstance(loss, ValueLoss):
            value = _value_step(self, batch, lr)
        else:
            value = self._policy_step(batch, loss, lr)
        self.steps_done += 1
        shares = _KTO_SHARES if isinstance(loss, KtoLoss) else {}
        return {"loss": value, "grad_norm": 1.0, "lr": lr, **shares}

    def evaluate(self, batch: Batch, loss: LossConfig) -> Mapping[str, float]:
        self._world.tick("evaluate")
        self.measured.append(batch)
        value = _slope(batch, self._logprobs(batch)[0].astype(np.float64), loss)[0]
        return {"loss": value, **({} if not isinstance(loss, KtoLoss) else _KTO_SHARES)}

    def weights(self) -> WeightSource:
        source = ArrayWeights({name: array.copy() for name, array in self.weight.items()})
        return _Damaged(source) if self._world.damages_weights else source

    def save(self, path: Path, state: Mapping[str, str]) -> None:
        self._world.tick("save")
        with new_directory(path) as staging:
            np.savez(staging / "arrays.npz", **self.weight, score=self.score, value=self.value)  # type: ignore[arg-type]
            (staging / "state.json").write_text(json.dumps({"steps_done": self.steps_done, "state": dict(state)}))

    def load(self, path: Path) -> Mapping[str, str]:
        with np.load(path / "arrays.npz") as file:
            self.weight = {name: file[name] for name in self.weight}
            self.score, self.value = file["score"], file["value"]
        saved = json.loads((path / "state.json").read_text())
        self.steps_done = saved["steps_done"]
        return dict(saved["state"])

    def export(self, path: Path) -> None:
        self._world.tick("export")
        temporary = path.with_name(".export")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        np.savez(temporary / "arrays.npz", **self.weight, score=self.score, value=self.value)  # type: ignore[arg-type]
        replace_directory(temporary, path)

    def _logprobs(self, batch: Batch) -> tuple[Array, NDArray[np.float64], NDArray[np.int64]]:
        """log p of each token (0 for firsts), the softmax [N, V] at each, and the token before each (-1 for firsts)."""
        before = np.concatenate([[-1], batch.tokens[:-1]]).astype(np.int64)
        before[batch.offsets[:-1]] = -1
        logits = (self.weight["bigram.weight"][before] + self.weight["bias"]).astype(np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        p = np.exp(logits)
        p /= p.sum(axis=1, keepdims=True)
        logprobs = np.log(p[np.arange(len(p)), batch.tokens])
        return np.where(before < 0, 0, logprobs).astype(np.float32), p, before

    def _policy_step(self, batch: Batch, loss: LossConfig, lr: float) -> float:
        logprobs, p, before = self._logprobs(batch)
        value, slope = _slope(batch, logprobs.astype(np.float64), loss)
        used = np.flatnonzero(batch.mask & (before >= 0))
        gradient = -p[used]
        gradient[np.arange(len(used)), batch.tokens[used]] += 1
        gradient *= slope[used, None]
        np.subtract.at(self.weight["bigram.weight"], before[used], (lr * gradient).astype(np.float32))
        self.weight["bias"] -= (lr * gradient.sum(axis=0)).astype(np.float32)
        return value


def _slope(batch: Batch, logprobs: NDArray[np.float64], loss: LossConfig) -> tuple[float, NDArray[np.float64]]:
    """The loss and its derivative by each token's log-prob."""
    mask = batch.mask
    if isinstance(loss, SftLoss):
        return float(-logprobs[mask].mean()), -np.ones_like(logprobs) / mask.sum()
    if isinstance(loss, DpoLoss):
        ratio = np.where(mask, logprobs - batch.token_column("reference_logprobs").astype(np.float64), 0)
        sums = np.add.reduceat(ratio, batch.offsets[:-1])
        margin = loss.beta * (sums[0::2] - sums[1::2])
        pull = -loss.beta / (1 + np.exp(margin)) / len(margin)
        return float(np.log1p(np.exp(-margin)).mean()), np.repeat(np.stack([pull, -pull], 1).ravel(), batch.lengths)
    if isinstance(loss, PpoLoss):
        advantage = batch.token_column("advantages").astype(np.float64)
        ratio = np.exp(logprobs - batch.token_column("old_logprobs").astype(np.float64))
        return float((-advantage * ratio)[mask].mean()), -advantage * ratio / mask.sum()
    if isinstance(loss, OnlineDpoLoss):
        return _preference_slope(batch, logprobs, loss)
    if isinstance(loss, KtoLoss):
        ratio = np.where(mask, logprobs - batch.token_column("reference_logprobs").astype(np.float64), 0)
        sign = np.where(batch.sequence_column("desirable"), 1.0, -1.0)
        kl = batch.sequence_column("kl").astype(np.float64)
        value = 1 / (1 + np.exp(sign * loss.beta * (np.add.reduceat(ratio, batch.offsets[:-1]) - kl)))
        pull = -sign * loss.beta * value * (1 - value) / len(value)
        return float(value.mean()), np.repeat(pull, batch.lengths)
    assert isinstance(loss, GrpoLoss)
    reward = batch.sequence_column("reward").astype(np.float64)
    _, group = np.unique(batch.sequence_column("group"), return_inverse=True)
    mean = np.bincount(group, reward) / np.bincount(group)
    advantage = np.repeat(reward - mean[group], batch.lengths)
    ratio = np.exp(logprobs - batch.token_column("old_logprobs").astype(np.float64))
    slope = -advantage * ratio
    if loss.kl_coef:
        slope += loss.kl_coef * (1 - np.exp(batch.token_column("reference_logprobs").astype(np.float64) - logprobs))
    return float((-advantage * ratio)[mask].mean()), slope / mask.sum()


def _preference_slope(
    batch: Batch, logprobs: NDArray[np.float64], loss: OnlineDpoLoss
) -> tuple[float, NDArray[np.float64]]:
    """DPO on the means of log-ratios over all pairs of a group with different rewards."""
    mask, starts = batch.mask, batch.offsets[:-1]
    ratio = np.where(mask, logprobs - batch.token_column("reference_logprobs").astype(np.float64), 0)
    counts = np.add.reduceat(mask.astype(np.float64), starts)
    means = np.add.reduceat(ratio, starts) / counts
    reward, group = batch.sequence_column("reward"), batch.sequence_column("group")
    better = np.argwhere(np.equal.outer(group, group) & np.greater.outer(reward, reward))
    slope, total = np.zeros(len(batch)), 0.0
    for i, j in better:
        margin = loss.beta * (means[i] - means[j])
        pull = -loss.beta / (1 + np.exp(margin)) / len(better)
        slope[i] += pull
        slope[j] -= pull
        total += float(np.log1p(np.exp(-margin))) / len(better)
    return total, np.repeat(slope / counts, batch.lengths)


def _reward_step(model: FakeTrainer, batch: Batch, lr: float) -> float:
    """Bradley-Terry over all ordered pairs of a group."""
    scores = np.add.reduceat(model.score[batch.tokens].astype(np.float64), batch.offsets[:-1])
    label, group = (batch.sequence_column(name) for name in ("label", "group"))
    pairs = [
        (i, j) for i in range(len(batch)) for j in range(len(batch)) if group[i] == group[j] and label[i] > label[j]
    ]
    slope = np.zeros(len(batch))
    for i, j in pairs:
        pull = 1 / (1 + np.exp(scores[i] - scores[j])) / len(pairs)
        slope[i] -= pull
        slope[j] += pull
    np.subtract.at(model.score, batch.tokens, (lr * np.repeat(slope, batch.lengths)).astype(np.float32))
    return float(np.mean([np.log1p(np.exp(scores[j] - scores[i])) for i, j in pairs]))


def _values(value: Array, batch: Batch) -> Array:
    """The value before each token is that of the token before it; 0 for the first of a sequence."""
    shifted = np.concatenate([np.zeros(1, np.float32), value[batch.tokens[:-1]]])
    shifted[batch.offsets[:-1]] = 0
    return shifted


def _value_step(model: FakeTrainer, batch: Batch, lr: float) -> float:
    """Half the squared error to `returns` over the mask."""
    error = np.where(batch.mask, _values(model.value, batch) - batch.token_column("returns").astype(np.float64), 0)
    count = batch.mask.sum()
    np.subtract.at(model.value, batch.tokens[:-1], (lr * error[1:] / count).astype(np.float32))
    return float(0.5 * (error**2).sum() / count)


class _Damaged:
    """A source whose last weight has a checksum that does not fit."""

    def __init__(self, source: ArrayWeights) -> None:
        self.metadata = source.metadata
        self._source = source

    def iterate(self) -> Iterator[WeightTensor]:
        *first, last = self._source.iterate()
        yield from [*first, dataclasses.replace(last, checksum=last.checksum ^ 1)]


class WatchedEngine(FakeEngine):
    """The fake engine, which remembers what it was asked and may be made to lie."""

    def watch(self, world: "FakeWorld") -> "WatchedEngine":
        self._world = world
        self.asked: list[tuple[list[Prompt], SamplingConfig]] = []
        self.answered: list[list[Completion]] = []
        return self

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingConfig) -> list[Completion]:
        self._world.tick("generate")
        self.asked.append((list(prompts), sampling))
        self.answered.append([self._world.lie(c) for c in super().generate(prompts, sampling)])
        return self.answered[-1]


class FakeWorld:
    """A `World` of fakes; the operation number `crash_at` (from 0) of all its trainers and engines raises Crash."""

    def __init__(
        self,
        *,
        crash_at: int | None = None,
        damages_weights: bool = False,
        lie: Callable[[Completion], Completion] = lambda completion: completion,
    ) -> None:
        self.damages_weights, self.lie = damages_weights, lie
        self.trainers: list[FakeTrainer] = []
        self.engines: list[WatchedEngine] = []
        self.operations: list[str] = []
        self.closed = False
        self._crash_at = crash_at

    def trainer(self, config: TrainerConfig) -> Model:
        self.trainers.append(FakeTrainer(config, self))
        return self.trainers[-1]

    def engine(self, model: Path, config: EngineConfig) -> WatchedEngine:
        weights = FakeTrainer(TrainerConfig(model=model), self).weight
        self.engines.append(WatchedEngine(weights=weights, eos_ids=[EOS], context=config.context).watch(self))
        return self.engines[-1]

    def close(self) -> None:
        self.closed = True

    def tick(self, operation: str) -> None:
        self.operations.append(operation)
        if len(self.operations) - 1 == self._crash_at:
            raise Crash(operation)


_conforms: type[World] = FakeWorld


class Length:
    """Rewards long answers; cannot score one that contains `forbidden`."""

    forbidden: str | None = None

    def __init__(self) -> None:
        self.calls: list[tuple[list[str], list[str], dict[str, list[object]]]] = []
        Length.last = self

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], columns: Mapping[str, Sequence[object]]
    ) -> list[Score]:
        self.calls.append((list(prompts), list(completions), {name: list(values) for name, values in columns.items()}))
        return [
            Score(value=float(len(text)))
            if self.forbidden is None or self.forbidden not in text
            else Score(value=None, error="a forbidden text")
            for text in completions
        ]

    last: "Length"


class _Point:
    name = "length"

    def load(self) -> object:
        return Length


@pytest.fixture
def length(monkeypatch: pytest.MonkeyPatch) -> type[Length]:
    """Registers the reward `length`, the only one there is; engines and the like are those that are installed."""
    others = registry.entry_points
    monkeypatch.setattr(
        registry, "entry_points", lambda group: [_Point()] if group == "align.rewards" else others(group=group)
    )
    return Length


@pytest.fixture(autouse=True)
def no_pages(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of these tests draw no report, which would take longer than all else, unless the test is about it."""
    if "draws_pages" not in request.keywords:
        monkeypatch.setattr(Run, "_write_page", lambda self: None)


@pytest.fixture
def fake_world() -> type[FakeWorld]:
    return FakeWorld


ROWS = {
    "sft": [{"prompt": f"What is {n}?", "response": str(n * n)} for n in range(10)],
    "reward": [{"prompt": f"{n}", "response": ["7", "1", "5 5"], "score": [1, 0, 0.5]} for n in range(10)],
    "dpo": [{"prompt": f"{n}", "chosen": str(n), "rejected": "99"} for n in range(10)],
    "kto": [{"prompt": f"{n}", "response": f"{n % 3}", "label": n % 3 == 0} for n in range(10)],
    "grpo": [{"prompt": f"What is {n}?", "answer": str(n)} for n in range(10)],
}
ROWS["rlhf"] = ROWS["online-dpo"] = ROWS["grpo"]
KINDS = {
    "sft": SftConfig,
    "reward": RewardConfig,
    "dpo": DpoConfig,
    "kto": KtoConfig,
    "grpo": GrpoConfig,
    "online-dpo": OnlineDpoConfig,
    "rlhf": RlhfConfig,
}


@pytest.fixture
def make_config(tmp_path: Path, tiny_model: Path) -> Callable[..., StageConfig]:
    """A small run of a stage: 6 steps of 4 records of 10, a checkpoint every 2; in a directory `out`."""

    def make(stage: str, *, out: str = "out", **changes: object) -> StageConfig:
        data = tmp_path / f"{stage}.jsonl"
        if not data.exists():
            data.write_text("".join(json.dumps(row) + "\n" for row in ROWS[stage]), encoding="utf-8")
        settings: dict[str, object] = {
            "model": tiny_model,
            "data": data,
            "out": tmp_path / out,
            "steps": 6,
            "batch_size": 4,
            "max_length": 64,
            "save_every": 2,
            "seed": 3,
            "optimizer": OptimizerConfig(lr=1.0, schedule="linear"),
        }
        if issubclass(KINDS[stage], PolicyConfig):
            settings |= {
                "reward": "length",
                "scoring": ScoringConfig(workers=0),
                "sampling": SamplingConfig(n=3, max_tokens=5),
                "engine": EngineConfig(name="fake", context=64),
            }
        if stage == "rlhf":
            settings["value_optimizer"] = OptimizerConfig(lr=1.0, schedule="linear")
        return KINDS[stage](**{**settings, **changes})  # type: ignore[arg-type]

    return make
