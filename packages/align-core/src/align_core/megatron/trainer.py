"""`MegatronTrainer`: one rank of a model that is scored, updated, saved and exported.

Every rank is called alike, with the same whole batch, and returns the same result; what it computes of it is its own
part. Alone (world size 1) it is a complete `Trainer`. Knows nothing about stages, engines and Ray.
"""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from align_algos.errors import InputError
from align_convert.formats.megatron_writer import finish_megatron, write_megatron_rank
from align_convert.layout import Rank
from align_core.config import LossConfig, TrainerConfig
from align_core.contracts import WeightSource
from align_core.errors import AlignError, ConfigError, DataError, LayoutError
from align_core.megatron.background import Background
from align_core.megatron.batch_share import BatchShare
from align_core.megatron.checkpoint import begin_checkpoint, load_checkpoint, shared_directory
from align_core.megatron.lora import ExportedChunk, start_adapters
from align_core.megatron.losses import prepare_loss
from align_core.megatron.model import build_model, layout_of, load_weights, plan_of
from align_core.megatron.offload import Shelf
from align_core.megatron.optimizer import Optimization, check_schedule
from align_core.megatron.parallel import RankContext, close_rank, init_rank
from align_core.megatron.passes import Read, forward, forward_backward, read_logprobs, read_scores, read_values
from align_core.megatron.prepared import Output
from align_core.megatron.source import open_model, translated_errors
from align_core.megatron.spec import DTYPES
from align_core.megatron.throughput import StepClock
from align_core.megatron.weights import (
    HeldWeights,
    LiveWeights,
    RankWeights,
    total_bytes,
    weight_metas,
    write_pieces,
)
from align_core.transfer.memory import Handle
from align_core.transfer.rectangles import Part, Rows
from align_core.transfer.seats import Seat
from align_core.types import Batch, ParamMeta


class MegatronTrainer:
    """One rank of a Llama, trained or frozen."""

    def __init__(self, config: TrainerConfig, context: RankContext | None = None) -> None:
        """Load `config.model`, cut for this rank.

        Args:
            context: this process's place, from `init_rank`; without it the process becomes a world of its own.

        Raises:
            CheckpointError: the directory is missing, damaged or another architecture's.
            LayoutError: the model cannot be cut that way.
            ConfigError: settings contradict each other or the model.
        """
        source, self.model_config = open_model(config)
        if config.trainable:
            check_schedule(config.optimizer, steps=config.steps)
        self.config = config
        self._owns_context = context is None
        self.context = context or init_rank(parallel=config.parallel, device=config.training.device, seed=config.seed)
        self._share = BatchShare(self.model_config, self.context, budget=config.training.micro_batch_tokens)
        self._open = True
        self._live: RankWeights | None = None
        self._saving = Background()
        self._saving_group = dist.new_group(backend="gloo") if config.training.async_save and config.trainable else None
        self._weights_shelf, self._state_shelf, self._gradient_shelf = Shelf(), Shelf(), Shelf(keep=False)
        dtype = config.training.dtype
        try:
            self._chunks = build_model(self.model_config, self.context, config.training, config.lora)
            with translated_errors():
                load_weights(self._chunks, self.model_config, self.context, source)
            if config.lora.rank:
                start_adapters(self._chunks, self.context, seed=config.seed)
            self._exported = [ExportedChunk(chunk) for chunk in self._chunks]
            self._optimization: Optimization | None = None
            if config.trainable:
                self._optimization = Optimization(self._chunks, config.optimizer, steps=config.steps, dtype=dtype)
            else:
                for chunk in self._chunks:
                    chunk.requires_grad_(False)
        except BaseException:
            self.close()
            raise

    def logprobs(self, batch: Batch) -> NDArray[np.float32]:
        """float32 [N], log-prob of each token given those before it in its sequence; 0 for the first of a sequence.

        Raises:
            ConfigError: the model has a score head.
            DataError: a sequence or token that the model does not know.
        """
        self._need_head("lm", "log-probs")
        return self._per_token(batch, self._read("logprobs"), "log-probs")

    def values(self, batch: Batch) -> NDArray[np.float32]:
        """float32 [N], the scalar before each token is chosen, 0 for the first of a sequence; raises as `scores`."""
        self._need_head("score", "values")
        return self._per_token(batch, read_values, "values")

    def scores(self, batch: Batch) -> NDArray[np.float32]:
        """float32 [B], the scalar at the last token of each sequence; raises as `logprobs`, for the other head."""
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
            AlignError: more than `optimizer.max_skipped` steps in a row were skipped.
        """
        clock = StepClock(self.context.device)
        optimization = self._trained()
        self.reload()
        prepared = prepare_loss(loss, batch, head=self.config.head)
        micros = self._share.micros(prepared.batch, unit=prepared.unit)
        read = self._read(prepared.reads, targets_only=True)
        number = optimization.steps_done
        optimization.zero_grad()
        clock.lap("prepare")
        with _explained(f"step {number}: {type(loss).__name__}"):
            parts = forward_backward(optimization.chunks, micros, read, prepared.compute)
        metrics = self._share.summed(parts)
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
        """
        self._weights_shelf.bring_back()
        prepared = prepare_loss(loss, batch, head=self.config.head)
        micros = self._share.micros(prepared.batch, unit=prepared.unit)
        parts = []
        with _explained(f"evaluation: {type(loss).__name__}"), torch.no_grad():
            for micro, values in zip(
                micros, forward(self._chunks, micros, self._read(prepared.reads, targets_only=True))
            ):
                if len(micro.indices):
                    value, metrics = prepared.compute(values, micro)
                    parts.append({"loss": value, **metrics})
        return self._share.summed(parts)

    def weights(self) -> WeightSource:
        """The current weights, live, where a GPU holds them, else a copy of them; for a world of one rank.

        Raises:
            LayoutError: there are more ranks, each with its own part; let each call `write_weights`.
        """
        if self.context.parallel.world_size > 1:
            raise LayoutError(
                f"this is one of {self.context.parallel.world_size} ranks and holds a part of the weights; "
                "call write_weights on every rank"
            )
        metas = self.weights_layout()

        def held() -> HeldWeights:
            buffer = np.empty(total_bytes(metas), np.uint8)
            return HeldWeights(metas, buffer, self._write(metas, buffer))

        return LiveWeights(self.live_weights(), metas, held) if self.weights_on_gpu() else held()

    def live_weights(self) -> RankWeights:
        """This rank's weights where they are."""
        self._weights_shelf.bring_back()
        if self._live is None:
            plans = plan_of(self.model_config, self.context)
            self._live = RankWeights(self._exported, plans if self.context.is_first_copy else [], self.weights_layout())
        return self._live

    def weights_on_gpu(self) -> bool:
        """Whether this rank's weights are on a GPU, so that an engine there can fetch them."""
        return self.context.device.type == "cuda"

    def weight_parts(self) -> list[Part]:
        """What this rank sends of which weight, for an engine that fetches it."""
        return self.live_weights().parts()

    def weight_devices(self) -> frozenset[str]:
        """UUIDs of the GPUs that hold this rank's weights."""
        return self.live_weights().devices()

    def weight_handles(self) -> dict[str, Handle | Tensor]:
        """This rank's tensors, for an engine in another process on the same GPU."""
        return self.live_weights().handles()

    def weight_checksums(self, rows: Rows) -> dict[str, int]:
        """The checksums of what `weight_parts` lists, computed where it is."""
        return self.live_weights().checksums(rows)

    def weights_layout(self) -> list[ParamMeta]:
        """Every weight of the whole model; in a weights file they lie end to end in this order."""
        return weight_metas(self.model_config, self.config.training.dtype)

    def write_weights(self, file: Path, *, sent: bool = False) -> dict[str, int]:
        """Copy the pieces that this rank owns into their places in `file`, which must have its full size already.

        Every rank calls it, for the same file. Returns this rank's share of the weights' checksums: those of all ranks,
        added up modulo 2^64, are `align_core.types.checksum` of each weight.
        """
        metas = self.weights_layout()
        size = file.stat().st_size
        if size != total_bytes(metas):
            raise DataError(f"weights file {str(file)!r} has {size} bytes; the model needs {total_bytes(metas)}")
        return self._write(metas, np.memmap(file, dtype=np.uint8, mode="r+", shape=(size,)), sent=sent)

    def send_weights(self, seat: Seat | None, rows: Rows | None) -> dict[str, int]:
        """See `RankWeights.send`; every rank calls it."""
        return self.live_weights().send(seat, rows)

    def keep_weights(self) -> None:
        """See `RankWeights.keep`."""
        self.live_weights().keep()

    def write_sent_weights(self, file: Path) -> dict[str, int]:
        """`write_weights`, of the weights as `send_weights` last sent them."""
        return self.write_weights(file, sent=True)

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

    def export(self, path: Path) -> None:
        """Write a Megatron checkpoint directory, config and tokenizer beside it, atomically; every rank calls it."""
        self._saving.wait()
        self._weights_shelf.bring_back()
        layout = layout_of(self.config.parallel)
        dtype = DTYPES[self.config.training.dtype]
        with shared_directory(Path(path), self.context) as partial:
            if self.context.is_first_copy:
                write_megatron_rank(
                    partial,
                    config=self.model_config,
                    layout=layout,
                    rank=Rank(tp=self.context.tensor, pp=self.context.pipeline),
                    chunks=[dict(chunk.named_parameters()) for chunk in self._exported],
                    dtype=dtype,
                )
            dist.barrier()
            if self.context.rank == 0:
                finish_megatron(
                    partial, config=self.model_config, layout=layout, dtype=dtype, carry_from=self.config.model
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

    def close(self) -> None:
        """Give up the model and, if it was made here, the process group; calling it again does nothing."""
        if not self._open:
            return
        self._saving.wait()
        self._open = False
        if self._live is not None:
            self._live.close()
            self._live = None
        self.__dict__.pop("_chunks", None)
        self.__dict__.pop("_exported", None)
        self.__dict__.pop("_optimization", None)
        if self._owns_context:
            close_rank()

    def _per_token(self, batch: Batch, read: Read, what: str) -> NDArray[np.float32]:
        """float32 [N], what `read` finds at each token."""
        self._weights_shelf.bring_back()
        micros = self._share.micros(batch, unit="sequence")
        with _explained(what):
            found = forward(self._chunks, micros, read)
        return self._share.tokens(batch, micros, found)

    def _read(self, output: Output, *, targets_only: bool = False) -> Read:
        if output == "logprobs":
            return read_logprobs(self._chunks[-1], self.model_config.vocab_size, targets_only=targets_only)
        return read_scores if output == "scores" else read_values

    def _forget_exported(self) -> None:
        for chunk in self._exported:
            chunk.forget()

    def _trained(self) -> Optimization:
        if self._optimization is None:
            raise ConfigError("this model is frozen: it has no optimizer to step, save or load; make it trainable")
        return self._optimization

    def _need_head(self, head: str, what: str) -> None:
        if self.model_config.head != head:
            raise ConfigError(f"{what} need a model with head {head!r}; this one has {self.model_config.head!r}")

    def _write(self, metas: list[ParamMeta], buffer: NDArray[np.uint8], *, sent: bool = False) -> dict[str, int]:
        self._weights_shelf.bring_back()
        if not self.context.is_first_copy:
            return {}
        sums: dict[str, int] = {}
        plans = plan_of(self.model_config, self.context)
        for number, (chunk, shards) in enumerate(zip(self._exported, plans, strict=True)):
            tensors = dict(chunk.named_parameters()) | (self.live_weights().as_sent(number) if sent else {})
            for name, value in write_pieces(tensors, shards, metas, buffer).items():
                sums[name] = (sums.get(name, 0) + value) % 2**64
        return sums


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    """Values that a formula refuses, as the error that a user reads."""
    try:
        yield
    except InputError as error:
        raise AlignError(f"{what} cannot be computed: {error}") from error
