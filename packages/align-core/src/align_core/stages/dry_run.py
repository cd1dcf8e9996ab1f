"""What a stage would do, from its settings, its data and the model's config.json; nothing is started or written."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from align_core.config import (
    DpoConfig,
    KtoConfig,
    OfflineConfig,
    PolicyConfig,
    RewardConfig,
    SftConfig,
    StageConfig,
)
from align_core.data.dataset import Dataset
from align_core.data.files import DataFiles
from align_core.data.records import read_marked, read_preferences, read_ranked, read_sft
from align_core.memory import ModelMemory, models_memory
from align_core.model_shape import ModelShape, read_model_shape
from align_core.stages.gpu_plan import gpu_lines, roles
from align_core.stages.preflight import open_tokenizer
from align_core.stages.prepare import open_demonstrations
from align_core.stages.rollout import Prompts
from align_core.types import Head

Line = tuple[str, str]
"""A name and what is planned under it."""

_READERS: dict[type[StageConfig], Callable[[DataFiles], Dataset[Any]]] = {
    SftConfig: read_sft,
    RewardConfig: read_ranked,
    DpoConfig: read_preferences,
    KtoConfig: read_marked,
}


def plan_lines(config: StageConfig) -> list[Line]:
    """The plan of a stage, checked as the stage itself would check it.

    Raises:
        AlignError: what the stage would say before it starts a process.
    """
    records = _checked_records(config)
    shape = read_model_shape(config.model)
    return [
        *_model_lines(config, shape),
        *_data_lines(config, records),
        *([("warning", config.sampling_bias)] if isinstance(config, PolicyConfig) and config.sampling_bias else []),
        *_memory_lines(config),
        *_file_lines(config, shape),
    ]


def _checked_records(config: StageConfig) -> Dataset[Any]:
    """The records to train on, once all that the stage looks at before it writes has been looked at."""
    if isinstance(config, PolicyConfig):
        prompts = Prompts(config)
        open_demonstrations(config, prompts.tokenizer)
        return prompts.records
    open_tokenizer(config)
    records = _READERS[type(config)](config.data)
    records.order(batch_size=config.batch_size, seed=config.seed)
    return records


def _model_lines(config: StageConfig, shape: ModelShape) -> Iterator[Line]:
    parallel = config.parallel
    yield (
        "model",
        f"{config.model}: {shape.parameters(head=_head(config)) / 1e6:,.1f} M parameters, {shape.layers} layers"
        + (f" of {shape.experts} experts, {shape.experts_per_token} a token" if shape.experts > 1 else ""),
    )
    where = "in this process" if config.cluster.in_process else f"Ray ({config.cluster.address or 'private'})"
    yield (
        "placement",
        f"{where}: {parallel.world_size} ranks = tensor {parallel.tensor} x pipeline {parallel.pipeline} x "
        f"context {parallel.context} x data {parallel.data}"
        + (f" (experts over {parallel.expert})" if parallel.expert > 1 else "")
        + f", one GPU each; {config.training.dtype}",
    )


def _data_lines(config: StageConfig, records: Dataset[Any]) -> Iterator[Line]:
    yield "data", f"{_shown(config.data)}: {len(records):,} records"
    epochs = config.steps * config.batch_size / len(records)
    yield "steps", f"{config.steps:,} of {config.batch_size:,} records: {epochs:.2f} epochs"
    per_rank = config.batch_size / config.parallel.data
    yield (
        "batches",
        f"{per_rank:g} records a rank and step, at most {config.max_length:,} tokens a sequence, packed into "
        f"micro-batches of {config.training.micro_batch_tokens:,} tokens",
    )
    if isinstance(config, OfflineConfig) and config.eval_data:
        held_out = _READERS[type(config)](config.eval_data)
        yield "evaluation", f"{_shown(config.eval_data)}: {len(held_out):,} records every {config.eval_every:,} steps"


def _memory_lines(config: StageConfig) -> Iterator[Line]:
    models = [(role.name, role.memory(config)) for role in roles(config)]
    for name, memory in models:
        yield f"memory per GPU, {name}", _memory_text(memory)
    yield "memory per GPU, in all", f"about {_size(models_memory([memory for _, memory in models]))}, and the runtime"
    if config.cluster.described:
        yield from gpu_lines(config)


def _file_lines(config: StageConfig, shape: ModelShape) -> Iterator[Line]:
    weights = shape.parameters(head=_head(config))
    item = 2 if config.training.dtype == "bfloat16" else 4
    checkpoint = weights * (item + 8 + (4 if item == 2 else 0))
    models = 1 + (config.export == "hf") + (isinstance(config, OfflineConfig) and config.keep_best)
    yield (
        "bytes written",
        f"{config.out}: {models} x {_size(weights * item)} of models; while training "
        f"{config.keep_last} + 1 checkpoints of {_size(checkpoint)}",
    )


def _memory_text(memory: ModelMemory) -> str:
    parts = ("weights", "gradients", "optimizer", "activations", "logits")
    shown = [f"{name} {_size(getattr(memory, name))}" for name in parts if getattr(memory, name)]
    return f"about {_size(memory.total)}: " + ", ".join(shown)


def _size(number: int) -> str:
    """Bytes in the larger unit that shows something."""
    return f"{number / 2**30:.2f} GiB" if number >= 2**28 else f"{number / 2**20:.1f} MiB"


def _head(config: StageConfig) -> Head:
    return "score" if isinstance(config, RewardConfig) else "lm"


def _shown(data: Path | Sequence[str]) -> str:
    return str(data) if isinstance(data, Path) else ", ".join(data)
