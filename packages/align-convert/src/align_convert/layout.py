"""Parallel layouts: how many ways a Megatron checkpoint is cut, which rank holds which layers, how far vocab is padded.

Knows nothing about tensor names; `plan.py` joins layouts with the family tables.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from align_convert.config import ModelConfig
from align_convert.errors import LayoutError

_SIZES = ("tp", "pp", "vp", "ep", "vocab_divisor")


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Sizes of the parallel groups that change what a rank holds."""

    tp: int = 1
    """Tensor-parallel size; experts are cut by it too (Megatron's default expert tensor parallel size)."""
    pp: int = 1
    """Pipeline-parallel size: stages."""
    vp: int = 1
    """Virtual pipeline size: chunks a stage holds, interleaved over the stages."""
    ep: int = 1
    """Expert-parallel size: ranks over which the experts of a layer are spread."""
    vocab_divisor: int = 128
    """Megatron's make_vocab_size_divisible_by: the padded vocabulary is a multiple of this times `tp`."""
    chunk_layers: tuple[int, ...] | None = None
    """Layers of each of the pp x vp chunks in the order of computation, where they differ; None cuts evenly."""

    def __post_init__(self) -> None:
        for name in _SIZES:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise LayoutError(f"{name} is {value!r}; it must be a positive integer")
        if self.chunk_layers is not None:
            self._check_chunks(self.chunk_layers)

    def _check_chunks(self, chunks: tuple[int, ...]) -> None:
        if len(chunks) != self.pp * self.vp:
            raise LayoutError(
                f"chunk_layers has {len(chunks)} numbers; "
                f"{self.pp} stages x {self.vp} virtual chunks need {self.pp * self.vp}"
            )
        if any(not isinstance(count, int) or isinstance(count, bool) or count < 0 for count in chunks):
            raise LayoutError(f"chunk_layers is {chunks}; each number must be a whole number of layers, 0 or more")

    def padded_vocab(self, vocab_size: int) -> int:
        """Rows of Megatron's embedding over all tensor-parallel ranks."""
        multiple = self.vocab_divisor * self.tp
        return math.ceil(vocab_size / multiple) * multiple

    def layers_by_chunk(self, num_layers: int) -> tuple[int, ...]:
        """Layers of each chunk in the order of computation."""
        chunks = self.pp * self.vp
        return self.chunk_layers if self.chunk_layers is not None else (num_layers // chunks,) * chunks

    def check(self, config: ModelConfig) -> None:
        """Refuse a layout that `config` cannot be cut into.

        Raises:
            LayoutError: with the sizes that would do.
        """
        problem = _tensor_parallel_problem(config, self.tp)
        if problem:
            sizes = [tp for tp in range(1, config.num_heads + 1) if not _tensor_parallel_problem(config, tp)]
            raise LayoutError(f"tensor parallel size {self.tp} {problem}; use {_either(sizes)}")
        self._check_experts(config.num_experts)
        if self.vp > 1 and self.pp == 1:
            raise LayoutError(
                f"virtual pipeline size {self.vp} needs a pipeline of at least 2 stages; use pp >= 2 or vp 1"
            )
        if self.chunk_layers is None:
            self._check_even(config.num_layers)
        elif sum(self.chunk_layers) != config.num_layers:
            raise LayoutError(
                f"the chunks hold {' + '.join(map(str, self.chunk_layers))} = {sum(self.chunk_layers)} layers; "
                f"the model has {config.num_layers}"
            )

    def _check_even(self, num_layers: int) -> None:
        if num_layers % self.pp:
            sizes = [pp for pp in range(1, num_layers + 1) if num_layers % pp == 0]
            raise LayoutError(
                f"pipeline parallel size {self.pp} does not divide {num_layers} layers; "
                f"use {_either(sizes)}, or say how many layers each stage holds"
            )
        per_stage = num_layers // self.pp
        if per_stage % self.vp:
            sizes = [vp for vp in range(1, per_stage + 1) if per_stage % vp == 0]
            raise LayoutError(
                f"virtual pipeline size {self.vp} does not divide {per_stage} layers a stage; use {_either(sizes)}"
            )

    def _check_experts(self, num_experts: int | None) -> None:
        if self.ep == 1:
            return
        if num_experts is None:
            raise LayoutError(f"expert parallel size {self.ep} needs a mixture of experts; this model is dense: use 1")
        if num_experts % self.ep:
            sizes = [ep for ep in range(1, num_experts + 1) if num_experts % ep == 0]
            raise LayoutError(
                f"expert parallel size {self.ep} does not divide {num_experts} experts; use {_either(sizes)}"
            )

    def ranks(self) -> "list[Rank]":
        """Every rank, the last of (pp, ep, tp, vp) varying fastest: the order of a full copy."""
        return [
            Rank(tp=tp, pp=pp, vp=vp, ep=ep)
            for pp in range(self.pp)
            for ep in range(self.ep)
            for tp in range(self.tp)
            for vp in range(self.vp)
        ]

    def files(self) -> "list[Rank]":
        """The ranks that have a file of their own, as that of their first chunk: a file holds all chunks of a stage."""
        return [rank for rank in self.ranks() if rank.vp == 0]


@dataclass(frozen=True, kw_only=True, slots=True)
class Rank:
    """One tensor- and expert-parallel rank of one pipeline chunk."""

    tp: int = 0
    pp: int = 0
    vp: int = 0
    ep: int = 0

    def __str__(self) -> str:
        """`rank tp=1, pp=0`: the sizes that most layouts have, and the others where they are not 0."""
        extra = "".join(f", {name}={getattr(self, name)}" for name in ("vp", "ep") if getattr(self, name))
        return f"rank tp={self.tp}, pp={self.pp}{extra}"

    def check(self, layout: Layout) -> None:
        """Refuse a rank outside `layout`."""
        for name in ("tp", "pp", "vp", "ep"):
            value, size = getattr(self, name), getattr(layout, name)
            if not 0 <= value < size:
                raise LayoutError(
                    f"rank {name}={value} is outside the layout; with {name} size {size} use 0 to {size - 1}"
                )

    def is_first(self) -> bool:
        """Whether this is the chunk with the embedding."""
        return self.pp == 0 and self.vp == 0

    def is_last(self, layout: Layout) -> bool:
        """Whether this is the chunk with the head."""
        return self.pp == layout.pp - 1 and self.vp == layout.vp - 1


def stages(
    num_layers: int, *, pp: int, vp: int = 1, first: int | None = None, last: int | None = None
) -> tuple[int, ...]:
    """`chunk_layers` of a pipeline whose first or last stage holds another number of layers than the rest.

    Megatron's --decoder-first-pipeline-num-layers and --decoder-last-pipeline-num-layers; with virtual chunks each
    stage's layers are cut evenly over them.
    Source: megatron-core 0.16.1, transformer_layer.get_transformer_layer_offset.

    Raises:
        LayoutError: the rest cannot be spread evenly.
    """
    ends = [count for count in (first, last) if count is not None]
    middle, rest = pp - len(ends), num_layers - sum(ends)
    if pp < 2 or middle < 0 or rest < 0 or (rest % middle if middle else rest):
        raise LayoutError(
            f"{num_layers} layers less {' and '.join(map(str, ends)) or 'none'} at the ends "
            f"cannot be spread evenly over the {max(middle, 0)} other of {pp} stages"
        )
    counts = [rest // middle if middle else 0] * pp
    if first is not None:
        counts[0] = first
    if last is not None:
        counts[-1] = last
    odd = [count for count in counts if count % vp]
    if odd:
        raise LayoutError(f"virtual pipeline size {vp} does not divide the {odd[0]} layers of a stage")
    return tuple(count // vp for count in counts) * vp


def layers_of(num_layers: int, layout: Layout, rank: Rank) -> range:
    """Global indices of the layers in one chunk: `vp` rounds over the stages.

    Source: megatron-core 0.16.1, checked with 8 layers, pp=2, vp=2: stage 0 {0,1},{4,5}; stage 1 {2,3},{6,7}.
    """
    counts = layout.layers_by_chunk(num_layers)
    chunk = rank.vp * layout.pp + rank.pp
    start = sum(counts[:chunk])
    return range(start, start + counts[chunk])


def experts_of(num_experts: int, layout: Layout, rank: Rank) -> range:
    """Global indices of the experts on one expert-parallel rank: contiguous and even."""
    size = num_experts // layout.ep
    return range(rank.ep * size, (rank.ep + 1) * size)


def _tensor_parallel_problem(config: ModelConfig, tp: int) -> str | None:
    """Why `tp` is impossible, or None. KV groups fewer than `tp` are cut inside a group (megatron-core >= 0.16)."""
    groups = config.num_kv_heads
    if config.num_heads % tp:
        return f"does not divide {config.num_heads} attention heads"
    if groups % tp and tp % groups:
        return f"neither divides nor is a multiple of {groups} KV groups"
    if 2 * groups * config.head_dim % tp:
        return f"does not divide the {2 * groups * config.head_dim} key and value rows"
    width = config.ffn_size if config.expert_ffn_size is None else config.expert_ffn_size
    if width % tp:
        return f"does not divide the MLP width {width}"
    return None


def _either(sizes: Sequence[int]) -> str:
    """`1, 2 or 4`; 1 always works, so the list is never empty."""
    words = [str(size) for size in sizes]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
