"""Plan a `torch_dist` checkpoint to the byte, without megatron-core.

Each tensor of each layer is an item of its own: a small torch archive within a .distcp file, listed in .metadata.
Source: the format of torch.distributed.checkpoint (FileSystemReader) and megatron-core 0.16.1's dist_checkpointing.
"""

import io
import json
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path

import torch

from align_convert.arrays import Held, Padding, dense, held_by
from align_convert.atomic import TRACKER, new_file
from align_convert.carried import write_description
from align_convert.config import ModelConfig
from align_convert.formats.dist_names import BACKEND, COMMON, METADATA, Item, Stacked, stacked
from align_convert.formats.megatron_args import args_from_config
from align_convert.formats.megatron_files import iteration_folder
from align_convert.formats.torch_zip import Stub, plan_archive
from align_convert.layout import Layout, Rank
from align_convert.output import Output, OutputFile
from align_convert.plan import rank_plan

_ITERATION = 1
_FILE_BYTES = 4_000_000_000  # of one .distcp file, about
_PAGE = 4096


@dataclass(slots=True)
class _Files:
    """The .distcp files as they fill up."""

    files: list[OutputFile] = field(default_factory=list)
    literals: list[tuple[int, bytes]] = field(default_factory=list)
    size: int = 0

    @property
    def name(self) -> str:
        """Of the file being filled."""
        return f"__0_{len(self.files)}.distcp"

    def add(self, size: int, literals: tuple[tuple[int, bytes], ...]) -> tuple[str, int]:
        """Append an item; returns its file and offset."""
        if self.size and self.size + size > _FILE_BYTES:
            self.close()
        start = -(-self.size // _PAGE) * _PAGE
        if start > self.size:
            self.literals.append((self.size, bytes(start - self.size)))
        self.literals += [(start + offset, data) for offset, data in literals]
        self.size = start + size
        return self.name, start

    def close(self) -> None:
        """Finish the file being filled."""
        path = iteration_folder(Path(), _ITERATION) / self.name
        self.files.append(OutputFile(path=path, size=self.size, literals=tuple(self.literals)))
        self.literals, self.size = [], 0


def plan_dist(config: ModelConfig, layout: Layout, *, dtype: torch.dtype, carry_from: Path | None) -> Output:
    """Plan the directory; of `layout` only the padding of the vocabulary shows in it."""
    whole = Layout(vocab_divisor=layout.vocab_divisor * layout.tp)
    targets: dict[str, list[Held]] = {name: [] for name in config.tensors()}
    paddings: list[Padding] = []
    files, items = _Files(), []
    for shard in rank_plan(config, whole, Rank()):
        place = stacked(shard.name, config)
        archive, _ = plan_archive(Stub((*[1] * len(place.at), *shard.shape), dtype))
        name, start = files.add(archive.size, archive.literals)
        items.append(Item(place, shard.shape, name, start, archive.size))
        path = iteration_folder(Path(), _ITERATION) / name
        array = dense(path, start + archive.offsets[0], shard.shape, dtype)
        for piece in shard.pieces:
            targets[piece.hf_name].append(held_by(piece, array))
        if shard.padding is not None:
            paddings.append(Padding(shard.padding.hf_name, shard.padding.hf_row, array, shard.padding.rows))
    empty = _empty_object()
    name, start = files.add(len(empty), ((0, empty),))
    none = Item(Stacked("", (), ()), (), name, start, len(empty))
    files.close()

    def finish(root: Path) -> None:
        from align_convert.formats.dist_metadata import metadata  # noqa: PLC0415 # imports half of torch.distributed

        _write_small(root, config, whole, dtype=dtype, metadata=metadata(items, none, dtype), carry_from=carry_from)

    return Output(files=tuple(files.files), targets=targets, paddings=tuple(paddings), dtype=dtype, finish=finish)


def _empty_object() -> bytes:
    """What megatron-core saves for a module without extra state."""
    buffer = io.BytesIO()
    torch.save([None], buffer)
    return buffer.getvalue()


def _write_small(
    root: Path, config: ModelConfig, layout: Layout, *, dtype: torch.dtype, metadata: bytes, carry_from: Path | None
) -> None:
    folder = iteration_folder(root, _ITERATION)
    args = args_from_config(config, layout, dtype=dtype, iteration=_ITERATION)
    common: dict[str, object] = {
        "args": Namespace(**{**vars(args), "ckpt_format": "torch_dist"}),
        "checkpoint_version": 3.0,
        "iteration": _ITERATION,
        "num_floating_point_operations_so_far": 0,
        "content_metadata": {"distrib_optim_sharding_type": "fully_reshardable"},
    }
    backend = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    with new_file(folder / COMMON) as file:
        torch.save(common, file)
    with new_file(folder / METADATA) as file:
        file.write(metadata)
    with new_file(folder / BACKEND) as file:
        file.write(json.dumps({**backend, "common_backend": "torch", "common_backend_version": 1}).encode("ascii"))
    write_description(root, config, dtype=dtype, carry_from=carry_from)
    with new_file(root / TRACKER) as file:
        file.write(str(_ITERATION).encode("ascii"))
