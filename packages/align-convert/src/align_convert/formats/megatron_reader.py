"""Read a Megatron directory of the `torch` format: by rank as it is, or by Hugging Face name through the plan.

Files are mapped, not read, and only when a tensor in them is asked for; nothing in them is executed.
"""

import re
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from align_convert.config import Head, ModelConfig
from align_convert.dtypes import SAFETENSORS_NAMES
from align_convert.errors import FormatError, PlanError
from align_convert.fill import slices
from align_convert.formats.megatron_args import check_args_match, config_from_args, layout_from_args
from align_convert.formats.megatron_files import Location, locate, model_keys, rank_file, rank_folders
from align_convert.formats.pickles import load_pickle
from align_convert.layout import Layout, Rank
from align_convert.plan import Index, Piece, Shard, rank_plan

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")

# Transformer Engine fuses the norms into the following linear layer; same tensors, other names.
_TRANSFORMER_ENGINE_NAMES = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


@dataclass(slots=True)
class _Tensor:
    """One Hugging Face tensor as it lies in the checkpoint: `holds` are (rank, shard name, piece)."""

    primary: list[tuple[Rank, str, Piece]] = field(default_factory=list)
    replicas: list[tuple[Rank, str, Piece]] = field(default_factory=list)


class MegatronReader:
    """The tensors of one Megatron directory."""

    def __init__(self, directory: str | Path) -> None:
        """Find the iteration, its layout and its config.

        Raises:
            FormatError: files are missing, damaged, unsafe, or contradict each other.
            ConfigError: the model is not one that can be described.
        """
        self.directory = Path(directory)
        self.location: Location = locate(self.directory)
        self.root = self.location.root
        self._files: dict[Rank, dict[str, object]] = {}
        self._chunks: dict[Rank, dict[str, torch.Tensor]] = {}
        args = self._first_args()
        described = (self.root / "config.json").is_file()
        if described:
            self.config = ModelConfig.from_hf(self.root)
            check_args_match(args, self.config)
            self.layout = layout_from_args(args, vocab_size=self.config.vocab_size)
            self._check_folders()
            self.layout = self._with_chunks(self.layout)
        else:
            # The head is known from the last stage's tensors, the layout from args; the vocabulary only pads.
            self.layout = layout_from_args(args, vocab_size=1)
            self._check_folders()
            self.config = config_from_args(args, head=self._find_head(), dtype=self._find_dtype())
            self.layout = self._with_chunks(layout_from_args(args, vocab_size=self.config.vocab_size))
        self.layout.check(self.config)
        self._shapes = self.config.tensors()
        self._index = self._build_index()

    def read(self, rank: Rank) -> dict[str, torch.Tensor]:
        """All tensors of one rank under their local-spec names, mapped from the file."""
        rank.check(self.layout)
        return dict(self._chunk(rank))

    def tensors(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and type of every Hugging Face tensor that can be read from here."""
        return {name: (shape, self._dtype_of(name)) for name, shape in self._shapes.items()}

    def read_hf(self, name: str, index: Index | None = None) -> torch.Tensor:
        """The values of a Hugging Face tensor, or of a rectangle of it, gathered from the ranks that hold them."""
        shape = self._shapes.get(name)
        if shape is None:
            raise FormatError(f"{str(self.directory)!r} has no tensor {name!r}")
        index = index if index is not None else tuple((0, size) for size in shape)
        if len(index) != len(shape) or any(not 0 <= a <= b <= n for (a, b), n in zip(index, shape)):
            raise PlanError(f"index {index} does not fit tensor {name!r} of shape {shape}")
        result = torch.empty([stop - start for start, stop in index], dtype=self._dtype_of(name))
        for rank, shard_name, piece in self._index[name].primary:
            overlap = _overlap(piece, index)
            if overlap is not None:
                from_shard, into_result = overlap
                result[slices(into_result)] = self._tensor(rank, shard_name)[slices(from_shard)]
        return result

    def check(self) -> None:
        """Refuse ranks whose tensors are not those of the plan, and replicated tensors that differ between ranks.

        Raises:
            PlanError: naming the tensor and the rank.
        """
        for rank in self.layout.ranks():
            self._check_rank(rank)
        for name, held in self._index.items():
            for rank, shard_name, piece in held.replicas:
                copy = self._tensor(rank, shard_name)[slices(piece.shard_index)]
                if not torch.equal(copy, self.read_hf(name, piece.hf_index)):
                    raise PlanError(f"{shard_name!r} on {rank} should be a copy of {name!r} but differs from it")

    def _check_rank(self, rank: Rank) -> None:
        plan = {shard.name: shard for shard in rank_plan(self.config, self.layout, rank)}
        found = self._chunk(rank)
        for name in [*plan, *found]:
            if name not in found:
                raise PlanError(f"tensor {name!r} is missing on {rank} of {str(self.directory)!r}")
            if name not in plan:
                file = f"align_convert/families/{self.config.family}.py"
                raise PlanError(f"tensor {name!r} on {rank} has no rule (add one in {file})")
            if tuple(found[name].shape) != plan[name].shape:
                raise PlanError(
                    f"tensor {name!r} on {rank} has shape {tuple(found[name].shape)}; the plan says {plan[name].shape}"
                )

    def _chunk(self, rank: Rank) -> dict[str, torch.Tensor]:
        if rank not in self._chunks:
            self._chunks[rank] = self._open_chunk(rank)
        return self._chunks[rank]

    def _open_chunk(self, rank: Rank) -> dict[str, torch.Tensor]:
        file = self._file(replace(rank, vp=0))
        key = model_keys(self.layout)[rank.vp]
        model = file.get(key)
        path = str(rank_file(self.location.folder, self.layout, rank))
        if not isinstance(model, Mapping):
            raise FormatError(f"{path!r} has no {key!r}; it holds {', '.join(sorted(map(repr, file)))}")
        if "language_model" in model:
            raise FormatError(
                f"{path!r} has legacy Megatron names, which cannot be read yet; save it with mcore models"
            )
        return {_local_name(name): value for name, value in model.items() if isinstance(value, torch.Tensor)}

    def _tensor(self, rank: Rank, shard_name: str) -> torch.Tensor:
        tensors = self._chunk(rank)
        if shard_name not in tensors:
            raise PlanError(f"tensor {shard_name!r} is missing on {rank} of {str(self.directory)!r}")
        return tensors[shard_name]

    def _file(self, rank: Rank) -> dict[str, object]:
        if rank not in self._files:
            self._files[rank] = load_pickle(rank_file(self.location.folder, self.layout, rank))
        return self._files[rank]

    def _with_chunks(self, layout: Layout) -> Layout:
        """The layout with the layers of each chunk counted where they lie, if they are not the same everywhere."""
        counts = []
        for vp in range(layout.vp):
            for pp in range(layout.pp):
                names = self._chunk(Rank(pp=pp, vp=vp))
                counts.append(len({match[1] for name in names if (match := _LAYER.match(name))}))
        return layout if len(set(counts)) == 1 else replace(layout, chunk_layers=tuple(counts))

    def _first_args(self) -> Namespace:
        """The args of the first rank's file, whose folder name does not yet need the layout."""
        first = rank_folders(self.location.folder)[0]
        loaded = load_pickle(self.location.folder / first / "model_optim_rng.pt")
        args = loaded.get("args")
        if not isinstance(args, Namespace):
            raise FormatError(f"{str(self.location.folder / first)!r} holds no 'args' Namespace")
        return args

    def _check_folders(self) -> None:
        """The rank folders must be exactly those of the layout in args."""
        found = set(rank_folders(self.location.folder))
        wanted = {rank_file(self.location.folder, self.layout, rank).parent.name for rank in self.layout.files()}
        odd = [*sorted(wanted - found), *sorted(found - wanted)]
        if odd:
            what = "is missing" if odd[0] in wanted else "is unexpected"
            raise FormatError(
                f"{str(self.location.folder / odd[0])!r} {what}: "
                f"args say tensor parallel {self.layout.tp} x pipeline parallel {self.layout.pp} "
                f"x expert parallel {self.layout.ep}"
            )

    def _find_head(self) -> Head:
        """A head of one row is a score head."""
        last = Rank(pp=self.layout.pp - 1, vp=self.layout.vp - 1)
        weight = self._chunk(last).get("output_layer.weight")
        return "score" if weight is not None and weight.shape[0] == 1 else "lm"

    def _find_dtype(self) -> torch.dtype:
        return self._tensor(Rank(), "embedding.word_embeddings.weight").dtype

    def _dtype_of(self, name: str) -> torch.dtype:
        rank, shard_name, _ = self._index[name].primary[0]
        dtype = self._tensor(rank, shard_name).dtype
        if dtype not in SAFETENSORS_NAMES:
            raise FormatError(f"tensor {shard_name!r} on {rank} is {dtype}; weights are float32, float16 or bfloat16")
        return dtype

    def _build_index(self) -> dict[str, _Tensor]:
        index = {name: _Tensor() for name in self._shapes}
        for rank in self.layout.ranks():
            for shard in rank_plan(self.config, self.layout, rank):
                _enter(index, rank, shard)
        return index


def _enter(index: dict[str, _Tensor], rank: Rank, shard: Shard) -> None:
    for piece in shard.pieces:
        held = index[piece.hf_name]
        (held.primary if piece.primary else held.replicas).append((rank, shard.name, piece))


def _overlap(piece: Piece, index: Index) -> tuple[Index, Index] | None:
    """Where the piece meets `index`: (rectangle of the rank's tensor, rectangle of the result), or None."""
    from_shard, into_result = [], []
    for (hf_start, hf_stop), (shard_start, _), (start, stop) in zip(piece.hf_index, piece.shard_index, index):
        low, high = max(hf_start, start), min(hf_stop, stop)
        if low >= high:
            return None
        from_shard.append((shard_start + low - hf_start, shard_start + high - hf_start))
        into_result.append((low - start, high - start))
    return tuple(from_shard), tuple(into_result)


def _local_name(name: str) -> str:
    for theirs, ours in _TRANSFORMER_ENGINE_NAMES.items():
        if name.endswith("." + theirs):
            return name.removesuffix(theirs) + ours
    return name
