"""Convert Llama-family checkpoints between Hugging Face and Megatron-core layouts.

The weight plan (`rank_plan`) needs no torch; names that do are imported when first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from align_convert.config import ModelConfig
from align_convert.errors import ConfigError, ConvertError, FormatError, LayoutError, PlanError
from align_convert.layout import Layout, Rank
from align_convert.plan import Index, Padding, Piece, Shard, rank_plan

if TYPE_CHECKING:
    from align_convert.carried import write_description
    from align_convert.fill import fill_shard, shard_slices
    from align_convert.formats.hf_reader import HfReader
    from align_convert.formats.hf_writer import HfWriter, write_hf
    from align_convert.formats.megatron_reader import MegatronReader
    from align_convert.formats.megatron_writer import finish_megatron, write_megatron_rank
    from align_convert.source import Source, load_any

_WITH_TORCH = {
    "HfReader": "formats.hf_reader",
    "HfWriter": "formats.hf_writer",
    "MegatronReader": "formats.megatron_reader",
    "Source": "source",
    "fill_shard": "fill",
    "finish_megatron": "formats.megatron_writer",
    "load_any": "source",
    "shard_slices": "fill",
    "write_description": "carried",
    "write_hf": "formats.hf_writer",
    "write_megatron_rank": "formats.megatron_writer",
}

__all__ = [
    "ConfigError",
    "ConvertError",
    "FormatError",
    "HfReader",
    "HfWriter",
    "Index",
    "Layout",
    "LayoutError",
    "MegatronReader",
    "ModelConfig",
    "Padding",
    "Piece",
    "PlanError",
    "Rank",
    "Shard",
    "Source",
    "fill_shard",
    "finish_megatron",
    "load_any",
    "rank_plan",
    "shard_slices",
    "write_description",
    "write_hf",
    "write_megatron_rank",
]


def __getattr__(name: str) -> object:
    """Import the module behind a name that needs torch."""
    if name not in _WITH_TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WITH_TORCH[name]}"), name)
