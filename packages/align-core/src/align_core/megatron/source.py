"""Opens a checkpoint directory for a trainer and checks that the model can be what is asked of it, before any process
group, device or large tensor exists.
"""

from align_convert.config import ModelConfig
from align_convert.source import Source, load_any
from align_core.config import TrainerConfig
from align_core.errors import ConfigError
from align_core.layouts import check_experts, translated_errors
from align_core.megatron.model import layout_of


def open_model(config: TrainerConfig) -> tuple[Source, ModelConfig]:
    """The weights of `config.model`, and the description of the model that is to be made of them.

    Raises:
        CheckpointError: the directory is missing, damaged or of no known format.
        ConfigError: an unsupported architecture, or a reward model asked for as a language model.
        LayoutError: the model cannot be cut that way.
    """
    with translated_errors():
        source = load_any(config.model)
        stored = source.config
        if stored.head == "score" and config.head == "lm":
            raise ConfigError(f"{str(config.model)!r} holds a reward model; load it with head 'score'")
        wanted = stored.with_head(config.head)
        layout_of(config.parallel).check(wanted)
    _check_supported(wanted, config)
    return source, wanted


def _check_supported(model: ModelConfig, config: TrainerConfig) -> None:
    """Refuse what the converter knows and training does not."""
    check_experts(config.model, model, config.parallel)
    if model.num_experts is not None and config.lora.rank:
        raise ConfigError(
            f"{str(config.model)!r} is a mixture of experts, and adapters are for dense models; set lora.rank to 0, or "
            "choose a dense model"
        )
    window = model.hf.get("sliding_window")
    if (
        model.hf.get("use_sliding_window", model.family == "mistral")
        and isinstance(window, int)
        and window < model.max_positions
    ):
        raise ConfigError(
            f"{str(config.model)!r} attends to the last {window} tokens only (sliding_window in config.json), which "
            f"training does not do; set it to null, and max_position_embeddings ({model.max_positions}) to at most "
            f"{window}: shorter sequences are the same with and without the window"
        )
