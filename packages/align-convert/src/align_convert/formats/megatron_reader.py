"""Read a Megatron directory of the `torch` format: by rank as it is, or by Hugging Face name through the plan.

The pickles are walked without executing anything; tensors are read only when asked for.
"""

import re
from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from align_convert.arrays import Array, Held, cut, held_by
from align_convert.config import Head, ModelConfig
from align_convert.dtypes import SAFETENSORS_NAMES
from align_convert.errors import FormatError, PlanError
from align_convert.formats.megatron_args import check_args_match, config_from_args, layout_from_args
from align_convert.formats.megatron_files import RANK_FILE, Location, locate, model_keys, rank_file, rank_folders
from align_convert.formats.megatron_names import flat_names
from align_convert.formats.pickles import StoredTensor, load_pickle
from align_convert.layout import Layout, Rank
from align_convert.plan import Shard, rank_plan
from align_convert.stored import StoredSource

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
_COMPARED = 1 << 20  # elements of a replica compared at once
_IGNORED = re.compile(r".*\.inv_freq|.*\.rotary_pos_emb\..*")  # computed from the config


class MegatronReader(StoredSource):
    """The tensors of one Megatron directory."""

    format_name = "megatron torch"

    def __init__(self, directory: str | Path) -> None:
        """Find the iteration, its layout and its config.

        Raises:
            FormatError: files are missing, damaged, unsafe, or contradict each other.
            ConfigError: the model is not one that can be described.
        """
        self.directory = Path(directory)
        self.location: Location = locate(self.directory)
        self._files: dict[Rank, dict[str, object]] = {}
        self._chunks: dict[Rank, dict[str, StoredTensor]] = {}
        self.args = args = self._first_args()
        described = (self.location.root / "config.json").is_file()
        # Without one, the head is known from the last stage's tensors, the layout from args; the vocabulary only pads.
        config = ModelConfig.from_hf(self.location.root) if described else None
        self.layout = layout_from_args(args, vocab_size=config.vocab_size if config else 1)
        self._check_folders()
        if config is None:
            config = config_from_args(args, head=self._find_head(), dtype=self._find_dtype())
            self.layout = layout_from_args(args, vocab_size=config.vocab_size)
        check_args_match(args, config)
        super().__init__(self.location.root, config)
        self.layout = self._with_chunks(self.layout)
        self.layout.check(config)
        self._shapes = config.tensors()
        self._held, self._replicas = self._build_index()

    def read(self, rank: Rank) -> dict[str, torch.Tensor]:
        """Copies of all tensors of one rank under their local-spec names."""
        rank.check(self.layout)
        result = {}
        for name, stored in self._chunk(rank).items():
            array = self._array(name, stored, rank)
            whole = Held((0, array.rows), (0, array.columns), array, 0, 0)
            result[name] = self._maps.read(whole).reshape(stored.shape)
        return result

    def check(self) -> None:
        """Refuse ranks whose tensors are not those of the plan, and replicated tensors that differ between ranks.

        Raises:
            PlanError: naming the tensor and the rank.
        """
        for rank in self.layout.ranks():
            self._check_rank(rank)
        super().check()
        for name, rank, shard_name, held in self._replicas:
            if not self._is_copy(name, held):
                raise PlanError(f"{shard_name!r} on {rank} should be a copy of {name!r} but differs from it")

    def _is_copy(self, name: str, held: Held) -> bool:
        width = held.columns[1] - held.columns[0]
        step = max(1, _COMPARED // width)
        for start in range(*held.rows, step):
            part = cut(held, (start, min(start + step, held.rows[1])))
            assert part is not None
            index = (part.rows, part.columns) if len(self._shapes[name]) == 2 else (part.rows,)
            if not torch.equal(self._maps.read(part).reshape(-1), self.read_hf(name, index).reshape(-1)):
                return False
        return True

    def _check_rank(self, rank: Rank) -> None:
        plan = {shard.name: shard for shard in rank_plan(self.config, self.layout, rank)}
        found = self._chunk(rank)
        for name in [*plan, *found]:
            if name not in found:
                raise PlanError(f"tensor {name!r} is missing on {rank} of {str(self.directory)!r}")
            if name not in plan:
                file = f"align_convert/families/{self.config.family}.py"
                raise PlanError(f"tensor {name!r} on {rank} has no rule (add one in {file})")
            if found[name].shape != plan[name].shape:
                raise PlanError(
                    f"tensor {name!r} on {rank} has shape {found[name].shape}; the plan says {plan[name].shape}"
                )

    def _chunk(self, rank: Rank) -> dict[str, StoredTensor]:
        if rank not in self._chunks:
            self._chunks[rank] = self._open_chunk(rank)
        return self._chunks[rank]

    def _open_chunk(self, rank: Rank) -> dict[str, StoredTensor]:
        file = self._file(replace(rank, vp=0))
        key = model_keys(self.layout)[rank.vp]
        model = file.get(key)
        path = str(rank_file(self.location.folder, self.layout, rank))
        if not isinstance(model, Mapping):
            raise FormatError(f"{path!r} has no {key!r}; it holds {', '.join(sorted(map(repr, file)))}")
        named = flat_names(model, StoredTensor)
        return {name: value for name, value in named.items() if not _IGNORED.fullmatch(name)}

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
        first = self.location.folder / rank_folders(self.location.folder)[0]
        args = load_pickle(first / RANK_FILE).get("args")
        if not isinstance(args, Namespace):
            raise FormatError(f"{str(first)!r} holds no 'args' Namespace")
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
        last = self._chunk(Rank(pp=self.layout.pp - 1, vp=self.layout.vp - 1))
        if any(name.startswith("pooler_head.") for name in last):
            return "pooler"
        weight = last.get("output_layer.weight")
        return "score" if weight is not None and weight.shape[0] == 1 else "lm"

    def _find_dtype(self) -> torch.dtype:
        first = self._chunk(Rank())
        name = "embedding.word_embeddings.weight"
        if name not in first:
            raise PlanError(f"tensor {name!r} is missing on {Rank()} of {str(self.directory)!r}")
        return self._array(name, first[name], Rank()).dtype

    def _array(self, name: str, stored: StoredTensor, rank: Rank) -> Array:
        if stored.dtype not in SAFETENSORS_NAMES:
            raise FormatError(f"tensor {name!r} on {rank} is {stored.dtype}; weights are float32, float16 or bfloat16")
        return stored.array(name)

    def _build_index(self) -> "tuple[dict[str, list[Held]], list[tuple[str, Rank, str, Held]]]":
        """(where each tensor's elements lie, once each; their copies: HF name, rank, its tensor, place)."""
        held: dict[str, list[Held]] = {name: [] for name in self._shapes}
        replicas = []
        for rank, shard, array in self._stored_shards():
            for piece in shard.pieces:
                place = held_by(piece, array)
                if piece.primary:
                    held[piece.hf_name].append(place)
                else:
                    replicas.append((piece.hf_name, rank, shard.name, place))
        return held, replicas

    def _stored_shards(self) -> Iterator[tuple[Rank, Shard, Array]]:
        """The shards of the plan that are there in their planned shape; `check` names the others."""
        for rank in self.layout.ranks():
            found = self._chunk(rank)
            for shard in rank_plan(self.config, self.layout, rank):
                stored = found.get(shard.name)
                if stored is not None and stored.shape == shard.shape:
                    yield rank, shard, self._array(shard.name, stored, rank)
