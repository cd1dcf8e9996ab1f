"""NaN and other errors on one rank or on all: a step is skipped, or all ranks end alike, in seconds; none waits."""

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron_llama import ragged_batch, without_rates
from megatron_world import run_ranks
from torch import Tensor

from align_algos.errors import InputError
from align_core.config import (
    GrpoLoss,
    LossConfig,
    OptimizerConfig,
    ParallelConfig,
    SftLoss,
    TrainerConfig,
    TrainingConfig,
    ValueLoss,
)
from align_core.megatron import MegatronTrainer, RankContext, losses, passes
from align_core.types import Batch, Head

SCORE = {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
LAYOUTS = {
    "tp2": ParallelConfig(tensor=2),
    "pp2": ParallelConfig(pipeline=2),
    "dp2": ParallelConfig(data=2),
    "cp2": ParallelConfig(context=2),
}
EXPERTS = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": None,
}
LARGER: dict[str, tuple[ParallelConfig, dict[str, object], list[tuple[int, ...]]]] = {
    "ep2": (ParallelConfig(data=2, expert=2), EXPERTS, [(1,), (0, 1)]),
    "pp2-virtual2": (ParallelConfig(pipeline=2, virtual=2), {"num_hidden_layers": 4}, [(0,), (1,)]),
    "tp2-cp2-sp": (ParallelConfig(tensor=2, context=2, sequence=True), {}, [(1,), (2,)]),
}
# Far below the 60 s after which a collective call of these ranks would give up.
SECONDS = 10.0
REFUSAL = "targets_N has shape [3]; expected [4], one per row"
LOSSES: dict[Head, LossConfig] = {"lm": SftLoss(), "score": ValueLoss()}

every_layout = pytest.mark.parametrize("layout", LAYOUTS)


@every_layout
@pytest.mark.parametrize(
    ("head", "victims"),
    [("lm", [(0,), (1,), (0, 1)]), ("score", [(1,)])],
    ids=["log-probs", "values"],
)
def test_a_model_that_gives_nan_skips_the_step_and_stops_what_needs_its_numbers(
    llama: Callable[..., Path], layout: str, head: Head, victims: list[tuple[int, ...]]
) -> None:
    """On one rank, then on the other, then on both. Of scores, tensor-parallel ranks compute each all."""
    directory = llama(**SCORE) if head == "score" else llama()
    run_ranks(_meet_nan, LAYOUTS[layout], directory, head, victims)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LARGER)
def test_larger_worlds_and_experts_skip_such_a_step_too(llama: Callable[..., Path], layout: str) -> None:
    parallel, settings, victims = LARGER[layout]
    run_ranks(_meet_nan, parallel, llama(**settings), "lm", victims)


@pytest.fixture(scope="module")
def told(llama: Callable[..., Path]) -> Callable[[str], list[dict[str, str]]]:
    """What each rank of a layout says of errors that are not the model's, by what it was doing; run once."""
    made: dict[str, list[dict[str, str]]] = {}

    def run(layout: str) -> list[dict[str, str]]:
        if layout not in made:
            made[layout] = run_ranks(_meet_errors, LAYOUTS[layout], llama())
        return made[layout]

    return run


@every_layout
def test_an_error_that_is_no_nan_is_raised_by_every_rank(
    told: Callable[[str], list[dict[str, str]]], layout: str
) -> None:
    """The head refuses its input on rank 1, and on rank 0 too where that is its tensor-parallel one."""
    one, other = told(layout)
    rank = "rank 0 and 1 more" if layout == "tp2" else "rank 1"
    for name, what in (("step", "step 0: SftLoss"), ("evaluate", "evaluation: SftLoss"), ("logprobs", "log-probs")):
        text = f"AlignError: {what} cannot be computed: {REFUSAL} (on {rank})"
        assert one[f"refusal, {name}"] == other[f"refusal, {name}"] == text


@every_layout
def test_a_column_that_is_not_finite_is_told_to_every_rank(
    told: Callable[[str], list[dict[str, str]]], layout: str
) -> None:
    """Also while the model gives NaN: such a step is not one to skip."""
    one, other = told(layout)
    for name in ("column", "column and model"):
        assert one[name] == other[name]
        assert "AlignError: step 0: GrpoLoss cannot be computed: old_logprobs_N holds nan at position" in one[name]
        assert "(on rank" in one[name]


@every_layout
def test_a_loss_that_fails_on_one_rank_ends_the_step_on_all(
    told: Callable[[str], list[dict[str, str]]], layout: str
) -> None:
    """The rank that it happened on has the error itself, with its traceback; the others are told."""
    other, own = told(layout)
    for name, what in (("step", "step 0"), ("evaluate", "evaluation")):
        assert own[f"failure, {name}"] == "IndexError: of another package"
        assert other[f"failure, {name}"] == (
            f"AlignError: {what}: SftLoss cannot be computed: IndexError: of another package (on rank 1)"
        )


def _meet_nan(context: RankContext, directory: Path, head: Head, victims: list[tuple[int, ...]]) -> None:
    trainer, undisturbed = (_trainer(context, directory, head) for _ in range(2))
    loss = LOSSES[head]
    metrics = trainer.step(_batch(0), loss)
    undisturbed.step(_batch(0), loss)
    for number, (ranks, where) in enumerate(itertools.product(victims, (_first_layer, _head))):
        before = _state(trainer)
        with _nan(where(trainer), context.rank in ranks):
            step = trainer.step(_batch(9), loss)
            assert step["skipped"] == 1.0
            assert step.keys() == metrics.keys()
            assert np.isnan(step["grad_norm"])
            _check_forward_only(trainer, loss, head)
        assert _same(_state(trainer), before)
        after = trainer.step(_batch(1 + number), loss)
        assert after["skipped"] == 0.0
        assert without_rates(after) == without_rates(undisturbed.step(_batch(1 + number), loss))
        assert not _same(_state(trainer), before)


def _check_forward_only(trainer: MegatronTrainer, loss: LossConfig, head: Head) -> None:
    place = "cannot be computed: the model gives nan at token "
    text = _error(lambda: trainer.evaluate(_batch(0), loss))
    assert f"AlignError: evaluation: {type(loss).__name__} {place}" in text
    what, call = ("log-probs", trainer.logprobs) if head == "lm" else ("values", trainer.values)
    text = _error(lambda: call(_batch(0)))
    assert f"AlignError: {what} {place}" in text
    assert "(on rank " in text
    if head == "score":
        assert len(trainer.scores(_batch(0))) == len(_batch(0))


def _meet_errors(context: RankContext, directory: Path) -> dict[str, str]:
    trainer = _trainer(context, directory, "lm")
    before, expected = _state(trainer), trainer.logprobs(_batch(0))
    found: dict[str, str] = {}

    refused = context.rank == 1 or context.parallel.tensor == 2
    with _broken(passes, "fused_logprobs", InputError(REFUSAL), refused):
        found["refusal, step"] = _error(lambda: trainer.step(_batch(1), SftLoss()))
        found["refusal, evaluate"] = _error(lambda: trainer.evaluate(_batch(1), SftLoss()))
        found["refusal, logprobs"] = _error(lambda: trainer.logprobs(_batch(1)))

    with _broken(losses, "sft_loss", IndexError("of another package"), context.rank == 1):
        found["failure, step"] = _error(lambda: trainer.step(_batch(1), SftLoss()))
        found["failure, evaluate"] = _error(lambda: trainer.evaluate(_batch(1), SftLoss()))

    old = expected.copy()
    old[np.flatnonzero(_batch(0).mask)[0]] = np.nan
    batch = _batch(0).with_columns(tokens={"old_logprobs": old, "advantages": np.ones_like(old)})
    found["column"] = _error(lambda: trainer.step(batch, GrpoLoss()))
    with _nan(_head(trainer), hit=True):
        found["column and model"] = _error(lambda: trainer.step(batch, GrpoLoss()))

    assert _same(_state(trainer), before)
    np.testing.assert_array_equal(trainer.logprobs(_batch(0)), expected)
    assert trainer.step(_batch(0), SftLoss())["skipped"] == 0.0
    return found


def _trainer(context: RankContext, directory: Path, head: Head) -> MegatronTrainer:
    return MegatronTrainer(
        TrainerConfig(
            model=directory,
            head=head,
            parallel=context.parallel,
            steps=20,
            optimizer=OptimizerConfig(lr=2e-3, schedule="constant"),
            training=TrainingConfig(micro_batch_tokens=48, device="cpu"),
        ),
        context,
    )


def _batch(seed: int) -> Batch:
    batch = ragged_batch(seed=seed)
    column = np.random.default_rng(seed).standard_normal(len(batch.tokens)).astype(np.float32)
    return batch.with_columns(tokens={"old_values": column, "returns": column[::-1].copy()})


def _state(trainer: MegatronTrainer) -> list[Tensor]:
    """Weights and all that the optimizer keeps."""
    assert trainer._optimization is not None
    kept = [weight for chunk in trainer._chunks for weight in chunk.parameters()]
    kept += trainer._optimization.state_tensors()
    return [tensor.detach().clone() for tensor in kept]


def _same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other))


def _error(call: Callable[[], Any]) -> str:
    """The error in which the call ends, soon."""
    start = time.monotonic()
    with pytest.raises(Exception) as caught:
        call()
    assert time.monotonic() - start < SECONDS
    return f"{caught.type.__name__}: {caught.value}"


def _first_layer(trainer: MegatronTrainer) -> torch.nn.Module:
    layer: torch.nn.Module = trainer._chunks[0].decoder.layers[0]
    return layer


def _head(trainer: MegatronTrainer) -> torch.nn.Module:
    """Or the last layer, in a stage without a head."""
    last = trainer._chunks[-1]
    head: torch.nn.Module = last.output_layer if last.post_process else last.decoder.layers[-1]
    return head


@contextlib.contextmanager
def _nan(module: torch.nn.Module, hit: bool) -> Iterator[None]:
    """The later half of this rank's tokens come out of the module as NaN."""

    def plant(_: torch.nn.Module, __: object, output: Any) -> Any:
        first, *others = output
        mark = torch.zeros_like(first)
        mark[first.shape[0] // 2 :] = torch.nan
        return (first + mark, *others)

    handle = module.register_forward_hook(plant) if hit else None
    yield
    if handle is not None:
        handle.remove()


@contextlib.contextmanager
def _broken(module: Any, name: str, error: Exception, hit: bool) -> Iterator[None]:
    """A function of the module raises the error."""

    def fail(*_: object, **__: object) -> None:
        raise error

    function = getattr(module, name)
    if hit:
        setattr(module, name, fail)
    yield
    setattr(module, name, function)
