"""Checks of a stage's settings against its model directory, before a process starts or a file is written."""

from pathlib import Path

from align_core.errors import CheckpointError, ConfigError
from align_core.model_shape import read_model_shape
from align_core.text import Tokenizer, load_tokenizer, resolve_template


def open_tokenizer(model: Path, *, template: str, max_length: int) -> Tokenizer:
    """The tokenizer of `model`, which the model knows all tokens of.

    Raises:
        CheckpointError: no model or tokenizer is there, or they do not belong together.
        ConfigError: sequences longer than the model has positions, or a template that there is not.
    """
    tokenizer = load_tokenizer(model)
    resolve_template(tokenizer, template)
    shape = read_model_shape(model)
    if tokenizer.vocab_size > shape.vocab:
        raise CheckpointError(
            f"the tokenizer in {str(model)!r} has {tokenizer.vocab_size} tokens, the model only {shape.vocab}; "
            "use the tokenizer that belongs to the model"
        )
    if max_length > shape.max_positions:
        raise ConfigError(
            f"max_length {max_length} is beyond the {shape.max_positions} positions of the model in {str(model)!r}; "
            f"set it to at most {shape.max_positions}"
        )
    return tokenizer
