"""Whether a model can be cut as a parallel layout says: align_convert's rules, asked before anything is started.

Needs neither torch nor the weights. Errors of align_convert leave here as those of align_core.
"""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from align_convert.config import ModelConfig
from align_convert.errors import ConfigError as ConvertConfigError
from align_convert.errors import ConvertError
from align_convert.errors import LayoutError as ConvertLayoutError
from align_convert.layout import Layout
from align_core.config import ParallelConfig
from align_core.errors import CheckpointError, ConfigError, LayoutError
from align_core.model_shape import read_model_config
from align_core.types import Head

# Each rank's share of the vocabulary is a multiple of this: matrices of odd width miss the fast kernels of GPUs.
_VOCAB_DIVISOR = 64


def layout_of(parallel: ParallelConfig) -> Layout:
    """The layout in align_convert's words."""
    return Layout(
        tp=parallel.tensor,
        pp=parallel.pipeline,
        vp=parallel.virtual,
        ep=parallel.expert,
        vocab_divisor=_VOCAB_DIVISOR,
    )


def check_layout(directory: Path, parallel: ParallelConfig, *, head: Head, lora_rank: int = 0) -> None:
    """`wanted_model` of what `directory`/config.json describes.

    Raises:
        CheckpointError: it, or the directory, is missing or damaged; and what `wanted_model` raises.
    """
    raw = read_model_config(directory)
    with translated_errors():
        stored = ModelConfig.from_hf(raw)
    wanted_model(stored, directory, parallel, head=head, lora_rank=lora_rank)


def check_tensor(raw: Mapping[str, Any], tensor: int) -> None:
    """Raises LayoutError unless the language model of config.json `raw` can be cut over so many ranks."""
    with translated_errors():
        layout_of(ParallelConfig(tensor=tensor)).check(ModelConfig.from_hf(dict(raw)))


def wanted_model(
    stored: ModelConfig, directory: Path, parallel: ParallelConfig, *, head: Head, lora_rank: int
) -> ModelConfig:
    """The model that is to be made of the one stored in `directory`, which can be cut as `parallel` says.

    Raises:
        ConfigError: a reward model asked for as a language model, or what the converter knows and training does not.
        LayoutError: the model cannot be cut that way; names the sizes that would do.
    """
    if stored.head == "score" and head == "lm":
        raise ConfigError(f"{str(directory)!r} holds a reward model; load it with head 'score'")
    with translated_errors():
        wanted = stored.with_head(head)
        layout_of(parallel).check(wanted)
    _check_experts(directory, wanted, parallel, lora_rank)
    _check_window(directory, wanted)
    return wanted


def _check_experts(directory: Path, model: ModelConfig, parallel: ParallelConfig, lora_rank: int) -> None:
    """Raises ConfigError for what the layers of a mixture of experts cannot do."""
    if model.num_experts is None:
        return
    what = f"{str(directory)!r} is a mixture of {model.num_experts} experts"
    if parallel.tensor > 1 and not parallel.sequence:
        raise ConfigError(
            f"{what}, whose router needs each token on one rank; with parallel.tensor {parallel.tensor} set "
            "parallel.sequence to true"
        )
    if lora_rank:
        raise ConfigError(f"{what}, and adapters are for dense models; set lora.rank to 0, or choose a dense model")
    if model.experts_per_token == 1 and model.renormalizes_experts:
        raise ConfigError(f"{what}, of which a token gets 1 with weight 1: nothing would teach the router")


def _check_window(directory: Path, model: ModelConfig) -> None:
    """Raises ConfigError if tokens attend to fewer than all before them."""
    window = model.hf.get("sliding_window")
    if (
        model.hf.get("use_sliding_window", model.family == "mistral")
        and isinstance(window, int)
        and window < model.max_positions
    ):
        raise ConfigError(
            f"{str(directory)!r} attends to the last {window} tokens only (sliding_window in config.json), which "
            f"training does not do; set it to null, and max_position_embeddings ({model.max_positions}) to at most "
            f"{window}: shorter sequences are the same with and without the window"
        )


@contextlib.contextmanager
def translated_errors() -> Iterator[None]:
    """Within it, errors of align_convert become the ones that users of align_core know."""
    try:
        yield
    except ConvertLayoutError as error:
        raise LayoutError(str(error)) from error
    except ConvertConfigError as error:
        raise ConfigError(str(error)) from error
    except ConvertError as error:
        raise CheckpointError(str(error)) from error
