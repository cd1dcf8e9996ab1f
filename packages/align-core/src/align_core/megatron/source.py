"""Opens a checkpoint directory for a trainer, before any process group, device or large tensor exists."""

from align_convert.config import ModelConfig
from align_convert.source import Source, load_any
from align_core.config import TrainerConfig
from align_core.layouts import translated_errors, wanted_model


def open_model(config: TrainerConfig) -> tuple[Source, ModelConfig]:
    """The weights of `config.model`, and the description of the model that is to be made of them.

    Raises:
        CheckpointError: the directory is missing, damaged or of no known format.
        ConfigError: an unsupported architecture, or a reward model asked for as a language model.
        LayoutError: the model cannot be cut that way.
    """
    with translated_errors():
        source = load_any(config.model)
    return source, wanted_model(
        source.config, config.model, config.parallel, head=config.head, lora_rank=config.lora.rank
    )
