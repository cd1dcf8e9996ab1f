"""A rank that is killed with SIGKILL at a random moment, saving included: what is left continues bit for bit."""

import os
import random
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from megatron_llama import ragged_batch
from megatron_world import run_ranks

from align_core.config import OptimizerConfig, ParallelConfig, SftLoss, TrainerConfig, TrainingConfig
from align_core.megatron import MegatronTrainer, RankContext

pytestmark = pytest.mark.slow

STEPS = 12
TWO = ParallelConfig(tensor=2)
OTHER = {"pp2": ParallelConfig(pipeline=2), "dp2": ParallelConfig(data=2)}


@pytest.fixture(scope="module")
def whole(llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of a run that nobody disturbs."""
    return run_ranks(_train, TWO, llama(), tmp_path_factory.mktemp("whole"), None)[0]


@pytest.mark.parametrize(("seed", "layout"), [(0, "pp2"), (1, "dp2")])
def test_a_run_continues_after_a_rank_was_killed(
    llama: Callable[..., Path], tmp_path: Path, whole: list[float], seed: int, layout: str
) -> None:
    with pytest.raises(AssertionError, match=r"died without a word|failed"):
        run_ranks(_train, TWO, llama(), tmp_path, seed)
    newest = max(int(path.name.removeprefix("step_")) for path in tmp_path.glob("step_*"))
    assert 2 <= newest < STEPS
    assert run_ranks(_continue, TWO, llama(), tmp_path / f"step_{newest}")[0] == whole[newest:]
    elsewhere = run_ranks(_continue, OTHER[layout], llama(), tmp_path / f"step_{newest}")[0]
    assert elsewhere == pytest.approx(whole[newest:], abs=1e-4)


def _trainer(context: RankContext, directory: Path) -> MegatronTrainer:
    config = TrainerConfig(
        model=directory,
        parallel=context.parallel,
        steps=STEPS,
        optimizer=OptimizerConfig(lr=2e-3, eps=1e-5, weight_decay=0.1, warmup_steps=2),
        training=TrainingConfig(micro_batch_tokens=48, device="cpu"),
    )
    return MegatronTrainer(config, context)


def _train(context: RankContext, directory: Path, folder: Path, seed: int | None) -> list[float]:
    """Saves after every step; with a seed, one rank dies some time after its third step or a later one."""
    trainer = _trainer(context, directory)
    draw = random.Random(seed)
    victim, step_of_death, delay_s = draw.randrange(2), draw.randrange(3, STEPS - 3), draw.uniform(0.0, 0.15)
    losses = []
    for step in range(STEPS):
        if seed is not None and step == step_of_death and context.rank == victim:
            threading.Timer(delay_s, os.kill, (os.getpid(), signal.SIGKILL)).start()
        if seed is not None and step == STEPS - 1 and context.rank == victim:
            signal.pause()  # where steps are so fast that death has not come yet
        losses.append(trainer.step(ragged_batch(seed=step), SftLoss())["loss"])
        trainer.save(folder / f"step_{step + 1}", {"step": str(step + 1)})
    return losses


def _continue(context: RankContext, directory: Path, path: Path) -> list[float]:
    trainer = _trainer(context, directory)
    first = int(trainer.load(path)["step"])
    return [trainer.step(ragged_batch(seed=step), SftLoss())["loss"] for step in range(first, STEPS)]
