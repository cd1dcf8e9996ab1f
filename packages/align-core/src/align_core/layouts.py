"""Whether a model can be cut as a parallel layout says: align_convert's rules, asked before anything is started.

Needs neither torch nor the weights. Errors of align_convert leave here as those of align_core.
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from align_convert.config import ModelConfig
from align_convert.errors import ConfigError as ConvertConfigError
from align_convert.errors import ConvertError
from align_convert.errors import LayoutError as ConvertLayoutError
from align_convert.layout import Layout
from align_core.config import ParallelConfig
from align_core.errors import CheckpointError, ConfigError, LayoutError
from align_core.types import Head


def check_layout(directory: Path, parallel: ParallelConfig, *, head: Head) -> None:
    """Look at `directory`/config.json.

    Raises:
        CheckpointError: it is missing or damaged.
        ConfigError: an architecture that is not supported, or a reward model asked for as a language model.
        LayoutError: the model cannot be cut that way; names the sizes that would do.
    """
    path = directory / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"model directory {str(directory)!r} has no config.json") from None
    except ValueError as error:
        raise CheckpointError(f"{str(path)!r} is damaged: {error}") from error
    with translated_errors():
        model = ModelConfig.from_hf(raw)
        if model.head == "score" and head == "lm":
            raise ConfigError(f"{str(directory)!r} holds a reward model; load it with head 'score'")
        layout = Layout(tp=parallel.tensor, pp=parallel.pipeline, vp=parallel.virtual, ep=parallel.expert)
        layout.check(model.with_head(head))
    check_experts(directory, model, parallel)


def check_experts(directory: Path, model: ModelConfig, parallel: ParallelConfig) -> None:
    """Raises ConfigError for what the layers of a mixture of experts cannot do."""
    if model.num_experts is None:
        return
    what = f"{str(directory)!r} is a mixture of {model.num_experts} experts"
    if parallel.tensor > 1 and not parallel.sequence:
        raise ConfigError(
            f"{what}, whose router needs each token on one rank; with parallel.tensor {parallel.tensor} set "
            "parallel.sequence to true"
        )
    if model.experts_per_token == 1 and model.renormalizes_experts:
        raise ConfigError(f"{what}, of which a token gets 1 with weight 1: nothing would teach the router")


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
