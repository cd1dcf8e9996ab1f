"""Checks of a stage's settings against its model directory, before a process starts or a file is written."""

from importlib.util import find_spec

from align_core import registry
from align_core.config import PolicyConfig, ResponsesConfig, ScoreConfig, StageConfig
from align_core.contracts import SupportsCheck
from align_core.doctor import cuda_gpus
from align_core.errors import CheckpointError, ConfigError
from align_core.model_shape import read_model_shape
from align_core.rewards.sources import BUILT_IN, check_name, parse_rewards, resolve
from align_core.stages.gpu_plan import roles
from align_core.text import Tokenizer, load_tokenizer, resolve_template, warn_of_other_turn_end
from align_core.trackers import check_trackers
from align_core.types import Head


def open_tokenizer(config: StageConfig | ResponsesConfig) -> Tokenizer:
    """The tokenizer of `config.model`, once it, every other model, the engine and the rewards have been looked at.

    Raises:
        CheckpointError: no model or tokenizer is there, or they do not belong together.
        ConfigError: sequences longer than the model has positions, a template that there is not, or what
            `check_devices`, `check_models`, `check_trackers`, `check_engine` and `check_rewards` refuse; so with
            LayoutError and MissingDependencyError.
    """
    model = config.model
    tokenizer = load_tokenizer(model)
    template = resolve_template(tokenizer, config.template)
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
    check_devices(config)
    check_models(config)
    if isinstance(config, StageConfig):
        if template == "chat":
            warn_of_other_turn_end(tokenizer)
        check_trackers(config.trackers)
    if isinstance(config, PolicyConfig):
        check_engine(config)
        check_rewards(config, tokenizer)
    return tokenizer


def check_devices(config: StageConfig | ResponsesConfig) -> None:
    """Raises ConfigError for CUDA on this machine, which has none; another cluster's GPUs are not seen from here."""
    wanted = {"training.device": config.training.device}
    if isinstance(config, PolicyConfig):
        wanted["engine.device"] = config.engine.device
    names = [name for name, device in wanted.items() if device == "cuda"]
    if names and not config.cluster.described and config.cluster.address is None and not cuda_gpus():
        raise ConfigError(
            f"{' and '.join(names)} 'cuda' needs a GPU, and torch finds none here; use 'cpu' or 'auto', or with "
            "--dry-run say by cluster.described for which cluster to plan"
        )


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


def check_engine(config: PolicyConfig) -> None:
    """The engine is installed and can serve the model, as far as it says so beforehand.

    Raises:
        ConfigError: an unknown engine, or settings that it refuses; so with LayoutError.
    """
    engine = registry.load("align.engines", config.engine.name)
    if isinstance(engine, SupportsCheck):
        engine.check(config.model, config.engine)


def check_rewards(config: PolicyConfig, tokenizer: Tokenizer) -> None:
    """Every reward can be found and has its settings; runs no code of the user's.

    Raises:
        ConfigError: an unknown reward, one that lacks a setting, or a reward model with another tokenizer.
    """
    for name in reward_names(config):
        check_name(name)
        if name in BUILT_IN:
            resolve(name, config.scoring)
        elif name == "overlong" and config.scoring.overlong_buffer > config.sampling.max_tokens:
            raise ConfigError(
                f"scoring.overlong_buffer {config.scoring.overlong_buffer} is longer than sampling.max_tokens "
                f"{config.sampling.max_tokens}; lower it"
            )
        elif name == "model" and config.reward_model:
            _check_vocabulary(config, load_tokenizer(config.reward_model), tokenizer)


def reward_names(config: PolicyConfig) -> list[str]:
    """The rewards of training and of its evaluations, each once."""
    parts = [part for text in (config.reward, config.eval_reward) if text for part in parse_rewards(text)]
    return list(dict.fromkeys(part.name for part in parts))


def _check_vocabulary(config: PolicyConfig, of_reward_model: Tokenizer, of_policy: Tokenizer) -> None:
    if not of_reward_model.same_vocabulary(of_policy):
        raise ConfigError(
            f"the reward model {str(config.reward_model)!r} numbers its tokens otherwise than {str(config.model)!r}; "
            "a reward model must share the policy's tokenizer"
        )
