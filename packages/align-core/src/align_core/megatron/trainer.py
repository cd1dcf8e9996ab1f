"""`MegatronTrainer`: one rank of a model that is scored, updated, saved and exported.

Every rank is called alike, with the same whole batch, and returns the same result; what it computes of it is its own
part. Alone (world size 1) it is a complete `Trainer`. Knows nothing about stages, engines and Ray.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from align_core.config import LossConfig, TrainerConfig
from align_core.errors import ConfigError
from align_core.megatron.agreement import Agreement
from align_core.megatron.background import Background
from align_core.megatron.batch_share import BatchShare
from align_core.megatron.checkpoint import begin_checkpoint, load_checkpoint
from align_core.megatron.experts import routing_metrics, start_routing
from align_core.megatron.losses import prepare_loss
from align_core.megatron.offload import Shelf
from align_core.megatron.optimizer import Optimization, check_schedule
from align_core.megatron.parallel import RankContext
from align_core.megatron.passes import (
    Read,
    forward,
    forward_backward,
    forward_losses,
    read_logprobs,
    read_scores,
    read_values,
)
from align_core.megatron.prepared import Output
from align_core.megatron.rank_model import RankModel
from align_core.megatron.throughput import StepClock
from align_core.types import Batch


class MegatronTrainer(RankModel):
    """One rank of a Llama, trained or frozen."""

    def __init__(self, config: TrainerConfig, context: RankContext | None = None) -> None:
        """Arguments and errors are those of `RankModel`, and ConfigError for a schedule that is none."""
        if config.trainable:
            check_schedule(config.optimizer, steps=config.steps)
        self._saving = Background()
        self._state_shelf, self._gradient_shelf = Shelf(), Shelf(keep=False)
        self._optimization: Optimization | None = None
        super().__init__(config, context)
        self._share = BatchShare(self.model_config, self.context, budget=config.training.micro_batch_tokens)
        self._saving_group = dist.new_group(backend="gloo") if config.training.async_save and config.trainable else None
        if config.trainable:
            try:
                self._optimization = Optimization(
                    self._chunks, config.optimizer, steps=config.steps, dtype=config.training.dtype
                )
            except BaseException:
                self.close()
                raise

    def logprobs(self, batch: Batch) -> NDArray[np.float32]:
        """float32 [N], log-prob of each token given those before it in its sequence; 0 for the first of a sequence.

        Raises:
            ConfigError: the model has a score head.
            DataError: a sequence or token that the model does not know.
            AlignError: a value that is not finite; on every rank, whichever found it.
        """
        self._need_head("lm", "log-probs")
        return self._per_token(batch, "logprobs", "log-probs")

    def values(self, batch: Batch) -> NDArray[np.float32]:
        """float32 [N], the scalar before each token is chosen, 0 for the first of a sequence; raises as `logprobs`, for
        the other head."""
        self._need_head("score", "values")
        return self._per_token(batch, "values", "values")

    def scores(self, batch: Batch) -> NDArray[np.float32]:
        """float32 [B], the scalar at the last token of each sequence; raises as `values`, but not for one that is not
        finite: it is in the result, since it concerns its own sequence alone."""
        self._need_head("score", "scores")
        self._weights_shelf.bring_back()
        micros = self._share.micros(batch, unit="sequence")
        return self._share.sequences(batch, micros, forward(self._chunks, micros, read_scores))

    def step(self, batch: Batch, loss: LossConfig) -> Mapping[str, float]:
        """One optimizer update on the whole batch, however it is cut.

        Returns:
            `loss`, `grad_norm`, `lr`, `tokens` (of the batch), the loss's own metrics, what `StepClock` measured, and
            `skipped`: 1 if loss or gradient was not finite, so that the weights were left as they were.
        Raises:
            ConfigError: the model is frozen, or has the wrong head for the loss.
            DataError: the batch does not fit the loss or the model.
            AlignError: more than `optimizer.max_skipped` steps in a row were skipped; the loss refuses a value of the
                batch, or failed on another rank.
        """
        clock = StepClock(self.context.device)
        optimization = self._trained()
        self.reload()
        prepared = prepare_loss(loss, batch, head=self.config.head)
        micros = self._share.micros(prepared.batch, unit=prepared.unit)
        agreement = Agreement(f"step {optimization.steps_done}: {type(loss).__name__}", self.context)
        read = self._read(prepared.reads, agreement, for_loss=True)
        optimization.zero_grad()
        start_routing(self._chunks, len(batch.tokens))
        clock.lap("prepare")
        parts = forward_backward(optimization.chunks, micros, read, prepared.compute, agreement)
        metrics = self._share.summed(parts, agreement) | routing_metrics(self._chunks, self.model_config)
        clock.lap("forward_backward")
        update = optimization.step(metrics["loss"])
        self._forget_exported()
        clock.lap("optimizer")
        rates = clock.rates(
            self.model_config,
            batch.lengths,
            ranks=self.context.parallel.world_size,
            frozen=self.config.lora.rank > 0,
        )
        return {
            **metrics,
            "grad_norm": update.grad_norm,
            "skipped": float(update.skipped),
            "lr": update.lr,
            "tokens": float(len(batch.tokens)),
            **rates,
        }

    def evaluate(self, batch: Batch, loss: LossConfig) -> Mapping[str, float]:
        """`loss` and the loss's own metrics of the whole batch, without an update; a frozen model can do it too.

        Raises:
            ConfigError: the model has the wrong head for the loss.
            DataError: the batch does not fit the loss or the model.
            AlignError: the loss refuses a value, of the model too, or failed on another rank.
        """
        self._weights_shelf.bring_back()
        prepared = prepare_loss(loss, batch, head=self.config.head)
        micros = self._share.micros(prepared.batch, unit=prepared.unit)
        agreement = Agreement(f"evaluation: {type(loss).__name__}", self.context)
        read = self._read(prepared.reads, agreement, for_loss=True)
        parts = forward_losses(self._chunks, micros, read, prepared.compute, agreement)
        return self._share.summed(parts, agreement)

    def save(self, path: Path, state: Mapping[str, str]) -> None:
        """Write all that is needed to continue, atomically; every rank calls it.

        With `training.async_save` it returns when everything is copied, and after the save before; see `finish_saving`.
        """
        self.reload()
        self._saving.wait()
        write = begin_checkpoint(
            Path(path),
            chunks=self._chunks,
            optimization=self._trained(),
            config=self.model_config,
            lora_rank=self.config.lora.rank,
            context=self.context,
            state=state,
            group=self._saving_group,
        )
        if self._saving_group is None:
            write()
        else:
            self._saving.start(write)

    def finish_saving(self) -> None:
        """Return when what `save` began is complete on disk; raises the error in which it ended."""
        self._saving.wait()

    def load(self, path: Path) -> Mapping[str, str]:
        """Continue from `save`, on any parallel layout; returns the `state` saved with it; every rank calls it."""
        self._saving.wait()
        self.reload()
        self._forget_exported()
        return load_checkpoint(
            Path(path),
            chunks=self._chunks,
            optimization=self._trained(),
            config=self.model_config,
            lora_rank=self.config.lora.rank,
            context=self.context,
        )

    def offload(self, weights: bool = True) -> None:
        """Free the GPU of gradients and optimizer state, and of the weights too unless `weights` is False."""
        if self._optimization is not None:
            self._gradient_shelf.put_away(self._optimization.gradient_tensors())
            self._state_shelf.put_away(self._optimization.state_tensors())
        self._forget_exported()
        if weights:
            self._weights_shelf.put_away(weight for chunk in self._chunks for weight in chunk.parameters())
        if self.context.device.type == "cuda":
            torch.cuda.empty_cache()  # what stays in torch's cache is lost to other processes

    def reload(self) -> None:
        """Bring everything back; what is there already stays."""
        for shelf in (self._weights_shelf, self._state_shelf, self._gradient_shelf):
            shelf.bring_back()

    def export(self, path: Path) -> None:
        """As `RankModel.export`, once what is being saved is complete."""
        self._saving.wait()
        super().export(path)

    def close(self) -> None:
        """Give up the model and, if it was made here, the process group; calling it again does nothing."""
        if self._open:
            self._saving.wait()
        self._optimization = None
        super().close()

    def _per_token(self, batch: Batch, output: Output, what: str) -> NDArray[np.float32]:
        """float32 [N], the model's `output` at each token, called `what` in errors."""
        self._weights_shelf.bring_back()
        micros = self._share.micros(batch, unit="sequence")
        agreement = Agreement(what, self.context)
        found = forward(self._chunks, micros, self._read(output, agreement))
        return self._share.tokens(batch, micros, found, agreement)

    def _read(self, output: Output, agreement: Agreement, *, for_loss: bool = False) -> Read:
        if output == "logprobs":
            return read_logprobs(self._chunks[-1], self.model_config.vocab_size, agreement, for_loss=for_loss)
        return read_scores if output == "scores" else read_values

    def _trained(self) -> Optimization:
        if self._optimization is None:
            raise ConfigError("this model is frozen: it has no optimizer to step, save or load; make it trainable")
        return self._optimization

    def _need_head(self, head: str, what: str) -> None:
        if self.model_config.head != head:
            raise ConfigError(f"{what} need a model with head {head!r}; this one has {self.model_config.head!r}")
