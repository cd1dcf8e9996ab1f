"""Checks of a stage's settings against its model directory, before a process starts or a file is written."""

from importlib.util import find_spec

from align_core.config import ResponsesConfig, ScoreConfig, StageConfig
from align_core.errors import CheckpointError, ConfigError
from align_core.model_shape import read_model_shape
from align_core.stages.gpu_plan import roles
from align_core.text import Tokenizer, load_tokenizer, resolve_template
from align_core.types import Head


def open_tokenizer(config: StageConfig | ResponsesConfig) -> Tokenizer:
    """The tokenizer of `config.model`, once it and every other model of the command have been looked at.

    Raises:
        CheckpointError: no model or tokenizer is there, or they do not belong together.
        ConfigError: sequences longer than the model has positions, a template that there is not, or what
            `check_models` refuses; so with LayoutError.
    """
    model = config.model
    tokenizer = load_tokenizer(model)
    resolve_template(tokenizer, config.template)
    shape = read_model_shape(model)
    if tokenizer.vocab_size > shape.vocab:
        raise CheckpointError(
            f"the tokenizer in {str(model)!r} has {tokenizer.vocab_size} tokens, the model only {shape.vocab}; "
            "use the tokenizer that belongs to the model"
        )
    if config.max_length > shape.max_positions:
        raise ConfigError(
            f"max_length {config.max_length} is beyond the {shape.max_positions} positions of the model in "
            f"{str(model)!r}; set it to at most {shape.max_positions}"
        )
    check_models(config)
    return tokenizer


def check_models(config: StageConfig | ResponsesConfig) -> None:
    """Every model that the command loads can be cut as asked, before a process is started for one.

    Raises:
        CheckpointError: a model directory is missing or damaged.
        ConfigError: an architecture that is not supported, or a reward model where a language model is needed.
        LayoutError: sizes that the model cannot be cut into.
    """
    if find_spec("align_convert") is None:
        return  # whoever makes the trainer says what is to be installed
    from align_core.layouts import check_layout  # noqa: PLC0415  (its package is optional)

    if isinstance(config, ResponsesConfig):
        head: Head = "score" if isinstance(config, ScoreConfig) else "lm"
        check_layout(config.model, config.parallel, head=head)
        return
    for role in roles(config):
        check_layout(role.path, role.parallel, head=role.head, lora_rank=config.lora.rank if role.trainable else 0)
