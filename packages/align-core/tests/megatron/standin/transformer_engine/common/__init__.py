"""Only what is derived from at import."""

from transformer_engine.common import recipe

__all__ = ["recipe"]
