"""`RankModel`: one rank's part of a model, from its checkpoint to whoever needs its weights.

Built and filled from a checkpoint directory, exported as one, fetched by engines, written into files, moved off the
device and back. Knows nothing about batches, losses and optimizers.
"""

from pathlib import Path

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from align_convert.formats.megatron_writer import finish_megatron, write_megatron_rank
from align_convert.layout import Rank
from align_core.config import TrainerConfig
from align_core.contracts import WeightSource
from align_core.errors import DataError, LayoutError
from align_core.layouts import layout_of, translated_errors
from align_core.megatron.checkpoint import shared_directory
from align_core.megatron.lora import ExportedChunk, start_adapters
from align_core.megatron.model import build_model, load_weights, plan_of
from align_core.megatron.offload import Shelf
from align_core.megatron.parallel import RankContext, close_rank, init_rank
from align_core.megatron.source import open_model
from align_core.megatron.spec import DTYPES
from align_core.megatron.transformer_engine import fused_layers, uses_transformer_engine
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
from align_core.types import ParamMeta


class RankModel:
    """One rank of a model; what is trained of it, if anything, is the subclass's business."""

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
        fused = fused_layers() if uses_transformer_engine(config, self.model_config) else None
        self.config = config
        self._owns_context = context is None
        self.context = context or init_rank(parallel=config.parallel, device=config.training.device, seed=config.seed)
        self._open = True
        self._live: RankWeights | None = None
        self._weights_shelf = Shelf()
        try:
            self._chunks = build_model(self.model_config, self.context, config.training, config.lora, fused)
            with translated_errors():
                load_weights(self._chunks, self.model_config, self.context, source)
            if config.lora.rank:
                start_adapters(self._chunks, self.context, seed=config.seed)
            self._exported = [ExportedChunk(chunk) for chunk in self._chunks]
            if not config.trainable:
                for chunk in self._chunks:
                    chunk.requires_grad_(False)
        except BaseException:
            self.close()
            raise

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

    def export(self, path: Path) -> None:
        """Write a Megatron checkpoint directory, config and tokenizer beside it, atomically; every rank calls it."""
        self._weights_shelf.bring_back()
        layout = layout_of(self.config.parallel)
        dtype = DTYPES[self.config.training.dtype]
        with shared_directory(Path(path), self.context) as partial:
            if self.context.is_first_copy:
                write_megatron_rank(
                    partial,
                    config=self.model_config,
                    layout=layout,
                    rank=Rank(tp=self.context.tensor, pp=self.context.pipeline, ep=self.context.expert),
                    chunks=[dict(chunk.named_parameters()) for chunk in self._exported],
                    dtype=dtype,
                )
            dist.barrier()
            if self.context.rank == 0:
                finish_megatron(
                    partial, config=self.model_config, layout=layout, dtype=dtype, carry_from=self.config.model
                )

    def close(self) -> None:
        """Give up the model and, if it was made here, the process group; calling it again does nothing."""
        if not self._open:
            return
        self._open = False
        if self._live is not None:
            self._live.close()
            self._live = None
        self.__dict__.pop("_chunks", None)
        self.__dict__.pop("_exported", None)
        if self._owns_context:
            close_rank()

    def _forget_exported(self) -> None:
        for chunk in self._exported:
            chunk.forget()

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
