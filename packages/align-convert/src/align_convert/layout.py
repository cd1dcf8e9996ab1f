"""Parallel layouts: how many ways a Megatron checkpoint is cut, which rank holds which layers, how far vocab is padded.

Knows nothing about tensor names; `plan.py` joins layouts with the family tables.
"""

import math
from dataclasses import dataclass, fields

from align_convert.config import ModelConfig
from align_convert.errors import LayoutError


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Sizes of the parallel groups that change what a rank holds."""

    tp: int = 1
    """Tensor-parallel size."""
    pp: int = 1
    """Pipeline-parallel size: stages."""
    vp: int = 1
    """Virtual pipeline size: chunks a stage holds, interleaved over the stages."""
    vocab_divisor: int = 128
    """Megatron's make_vocab_size_divisible_by: the padded vocabulary is a multiple of this times `tp`."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise LayoutError(f"{field.name} is {value!r}; it must be a positive integer")

    def padded_vocab(self, vocab_size: int) -> int:
        """Rows of Megatron's embedding over all tensor-parallel ranks."""
        multiple = self.vocab_divisor * self.tp
        return math.ceil(vocab_size / multiple) * multiple

    def check(self, config: ModelConfig) -> None:
        """Refuse a layout that `config` cannot be cut into.

        Raises:
            LayoutError: with the sizes that would do.
        """
        problem = _tensor_parallel_problem(config, self.tp)
        if problem:
            sizes = [tp for tp in range(1, config.num_heads + 1) if not _tensor_parallel_problem(config, tp)]
            raise LayoutError(f"tensor parallel size {self.tp} {problem}; use {_either(sizes)}")
        if config.num_layers % self.pp:
            sizes = [pp for pp in range(1, config.num_layers + 1) if config.num_layers % pp == 0]
            raise LayoutError(
                f"pipeline parallel size {self.pp} does not divide {config.num_layers} layers; use {_either(sizes)}"
            )
        if self.vp > 1 and self.pp == 1:
            raise LayoutError(
                f"virtual pipeline size {self.vp} needs a pipeline of at least 2 stages; use pp >= 2 or vp 1"
            )
        per_stage = config.num_layers // self.pp
        if per_stage % self.vp:
            sizes = [vp for vp in range(1, per_stage + 1) if per_stage % vp == 0]
            raise LayoutError(
                f"virtual pipeline size {self.vp} does not divide {per_stage} layers a stage; use {_either(sizes)}"
            )

    def ranks(self) -> "list[Rank]":
        """Every rank, the last of (pp, tp, vp) varying fastest: the order of a full copy."""
        return [Rank(tp=tp, pp=pp, vp=vp) for pp in range(self.pp) for tp in range(self.tp) for vp in range(self.vp)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Rank:
    """One tensor-parallel rank of one pipeline chunk."""

    tp: int = 0
    pp: int = 0
    vp: int = 0

    def check(self, layout: Layout) -> None:
        """Refuse a rank outside `layout`."""
        for name in ("tp", "pp", "vp"):
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


def layers_of(num_layers: int, layout: Layout, rank: Rank) -> range:
    """Global indices of the layers in one chunk: `vp` rounds over the stages, L/(pp*vp) layers at a time.

    Source: megatron-core 0.16.1, checked with 8 layers, pp=2, vp=2: stage 0 {0,1},{4,5}; stage 1 {2,3},{6,7}.
    """
    size = num_layers // (layout.pp * layout.vp)
    start = (rank.vp * layout.pp + rank.pp) * size
    return range(start, start + size)


def _tensor_parallel_problem(config: ModelConfig, tp: int) -> str | None:
    """Why `tp` is impossible, or None. KV groups fewer than `tp` are cut inside a group (megatron-core >= 0.16)."""
    groups = config.num_kv_heads
    if config.num_heads % tp:
        return f"does not divide {config.num_heads} attention heads"
    if groups % tp and tp % groups:
        return f"neither divides nor is a multiple of {groups} KV groups"
    if 2 * groups * config.head_dim % tp:
        return f"does not divide the {2 * groups * config.head_dim} key and value rows"
    if config.ffn_size % tp:
        return f"does not divide the MLP width {config.ffn_size}"
    return None


def _either(sizes: list[int]) -> str:
    """`1, 2 or 4`; 1 always works, so the list is never empty."""
    words = [str(size) for size in sizes]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
