"""The weight plan: which rectangle of which Hugging Face tensor is which rectangle of a Megatron rank's tensor.

The one place where layout rules become indices; the converter, loading and saving in training, and live weight sync
all read the same rectangles, in either direction. Knows nothing about files, and imports no torch.

Index legend: an index is one (start, stop) pair a dimension.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from align_convert.config import ModelConfig
from align_convert.layout import Layout, Rank, experts_of, layers_of
from align_convert.rules import Interleave, Place, Rule, Split, When

Index = tuple[tuple[int, int], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """Two rectangles of equal shape: `hf_index` of the HF tensor is `shard_index` of the rank's tensor."""

    hf_name: str
    hf_index: Index
    shard_index: Index
    primary: bool
    """True on exactly one rank for every HF element: of replicas tp 0, ep 0, of tied weights the embedding."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Padding:
    """Rows of a vocabulary tensor beyond the real vocabulary; filled by repeating the last real row.

    Source: NVIDIA's converter (core_v0.17.0) repeats that row.
    """

    rows: tuple[int, int]
    """(start, stop) in the rank's tensor."""
    hf_name: str
    hf_row: int
    """The last real row."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """One tensor of one rank: its local name and shape, and the pieces that cover it."""

    name: str
    """megatron-core name of the local (non Transformer Engine) spec, layer index counted within the chunk."""
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    padding: Padding | None = None


class _Where(NamedTuple):
    """The numbers of a layer and an expert in the two names."""

    in_hf: Mapping[str, int]
    """Counted over the model."""
    in_megatron: Mapping[str, int]
    """Counted within the pipeline chunk and the expert-parallel rank."""


_NOWHERE = _Where({}, {})


def rank_plan(config: ModelConfig, layout: Layout, rank: Rank) -> tuple[Shard, ...]:
    """All tensors of one rank, in Megatron's order.

    Raises:
        LayoutError: the model cannot be cut this way, or there is no such rank.
    """
    layout.check(config)
    rank.check(layout)
    rules = [rule for rule in config.table.rules if config.holds(rule.when)]
    shards: list[Shard] = []
    if rank.is_first():
        shards += [_shard(rule, config, layout, rank) for rule in rules if rule.place is Place.FIRST]
    for local, layer in enumerate(layers_of(config.num_layers, layout, rank)):
        for rule in (rule for rule in rules if rule.place is Place.LAYER):
            shards += _layer_shards(rule, config, layout, rank, local_layer=local, layer=layer)
    if rank.is_last(layout):
        at_end = (rule for rule in rules if rule.place is Place.LAST)
        shards += [_shard(rule, config, layout, rank) for rule in at_end if layout.pp > 1 or rule.when is not When.TIED]
    return tuple(shards)


def _layer_shards(
    rule: Rule, config: ModelConfig, layout: Layout, rank: Rank, *, local_layer: int, layer: int
) -> Iterator[Shard]:
    """A layer's tensor, or one for each expert on this expert-parallel rank."""
    if not rule.per_expert:
        yield _shard(rule, config, layout, rank, _Where({"layer": layer}, {"layer": local_layer}))
        return
    for local, expert in enumerate(experts_of(config.num_experts or 0, layout, rank)):
        here = {"layer": local_layer, "expert": local}
        yield _shard(rule, config, layout, rank, _Where({"layer": layer, "expert": expert}, here))


def _shard(rule: Rule, config: ModelConfig, layout: Layout, rank: Rank, where: _Where = _NOWHERE) -> Shard:
    """Cut one Megatron tensor for one rank."""
    shapes = {s.name.format(**where.in_hf): tuple(config.size(dim) for dim in s.dims) for s in rule.sources}
    replica = (rule.split is Split.NONE and rank.tp > 0) or (rank.ep > 0 and not rule.per_expert)
    primary = rule.when is not When.TIED and not replica
    name = rule.megatron.format(**where.in_megatron)
    if rule.split is Split.ROWS:
        vocab = rule.sources[0].dims[0] == "vocab"
        rounds = {Interleave.WHOLE: 1, Interleave.KV_GROUPS: config.num_kv_heads, Interleave.TENSOR_PARALLEL: layout.tp}
        rows = layout.padded_vocab(config.vocab_size) if vocab else sum(shape[0] for shape in shapes.values())
        return _row_shard(
            name, shapes, rows=rows, rounds=rounds[rule.interleave], tp=(rank.tp, layout.tp), primary=primary
        )
    ((hf_name, shape),) = shapes.items()
    hf_index = [(0, size) for size in shape]
    if rule.split is Split.COLUMNS:
        columns = shape[1] // layout.tp
        hf_index[1] = (rank.tp * columns, (rank.tp + 1) * columns)
    shard_shape = tuple(stop - start for start, stop in hf_index)
    shard_index = tuple((0, size) for size in shard_shape)
    piece = Piece(hf_name=hf_name, hf_index=tuple(hf_index), shard_index=shard_index, primary=primary)
    return Shard(name=name, shape=shard_shape, pieces=(piece,))


def _row_shard(
    name: str, shapes: dict[str, tuple[int, ...]], *, rows: int, rounds: int, tp: tuple[int, int], primary: bool
) -> Shard:
    """The `tp[0]`-th of `tp[1]` equal chunks of `rows` rows, in which the sources alternate `rounds` times."""
    chunk = rows // tp[1]
    first, last = tp[0] * chunk, (tp[0] + 1) * chunk
    tail = next(iter(shapes.values()))[1:]
    rest = tuple((0, size) for size in tail)
    pieces = []
    covered = 0
    for hf_name, hf_start, start, stop in _blocks(shapes, rounds):
        low, high = max(start, first), min(stop, last)
        covered = stop
        if low < high:
            hf_rows = (hf_start + low - start, hf_start + high - start)
            shard_rows = (low - first, high - first)
            pieces.append(
                Piece(hf_name=hf_name, hf_index=(hf_rows, *rest), shard_index=(shard_rows, *rest), primary=primary)
            )
    padding = None
    if covered < last:
        padded = (max(covered - first, 0), chunk)
        padding = Padding(rows=padded, hf_name=next(iter(shapes)), hf_row=covered - 1)
    return Shard(name=name, shape=(chunk, *tail), pieces=tuple(pieces), padding=padding)


def _blocks(shapes: dict[str, tuple[int, ...]], rounds: int) -> Iterator[tuple[str, int, int, int]]:
    """(HF name, its first row, start and stop in the full Megatron tensor) of each run of rows, in order."""
    start = 0
    for turn in range(rounds):
        for hf_name, shape in shapes.items():
            rows = shape[0] // rounds
            yield hf_name, turn * rows, start, start + rows
            start += rows
