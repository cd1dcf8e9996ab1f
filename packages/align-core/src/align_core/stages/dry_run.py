"""What a stage would do, from its settings, its data and the model's config.json; nothing is started or written.

The data is opened and encoded by the stage's own function, so that what the stage would refuse is refused here.
"""

from collections.abc import Callable, Iterator
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
from align_core.data.examples import Cut
from align_core.data.files import DataFiles
from align_core.data.tally import Tally
from align_core.doctor import cuda_gpus
from align_core.memory import ModelMemory, engine_memory, models_memory
from align_core.model_shape import ModelShape, read_model_shape
from align_core.stages.directory import check_same, inputs_of, look
from align_core.stages.dpo import open_dpo
from align_core.stages.gpu_plan import gpu_lines, roles
from align_core.stages.kto import open_kto
from align_core.stages.offline import OfflineData
from align_core.stages.online import all_data, reward_files
from align_core.stages.prepare import Demonstrations, open_demonstrations
from align_core.stages.reward import open_reward
from align_core.stages.rollout import Prompts
from align_core.stages.sft import open_sft
from align_core.types import Head

Line = tuple[str, str]
"""A name and what is planned under it."""

_OPEN: dict[type[StageConfig], Callable[[Any], OfflineData[Any, Any]]] = {
    SftConfig: open_sft,
    RewardConfig: open_reward,
    DpoConfig: open_dpo,
    KtoConfig: open_kto,
}

_LOSES: dict[Cut, str] = {
    "exchanges": "their oldest exchanges",
    "prompt": "the beginning of the prompt's content",
    "answer": "the end of an answer",
}


Opened = Prompts | OfflineData[Any, Any]
"""What a stage opens; both have `records`, `held_out` and the tallies of them."""


def plan_lines(config: StageConfig) -> list[Line]:
    """The plan of a stage, checked as the stage itself would check it.

    Raises:
        AlignError: what the stage would say before it starts a process.
    """
    data, demonstrations = _opened(config)
    shape = read_model_shape(config.model)
    device = "GPU" if _on_gpus(config) else "process"
    return [
        *_run_lines(config),
        *_model_lines(config, shape, device),
        *(_engine_lines(config, shape, device) if isinstance(config, PolicyConfig) else ()),
        *_data_lines(config, data, demonstrations),
        *([("warning", config.sampling_bias)] if isinstance(config, PolicyConfig) and config.sampling_bias else []),
        *_memory_lines(config, device),
        *_file_lines(config, shape),
    ]


def _opened(config: StageConfig) -> tuple[Opened, Demonstrations | None]:
    """The data and the demonstrations, once all that the stage looks at before it writes has been looked at."""
    if not isinstance(config, PolicyConfig):
        data = _OPEN[type(config)](config)
        check_same(look(config.out), config, inputs_of(config, data.data, ()))
        return data, None
    prompts = Prompts(config)
    demonstrations = open_demonstrations(config, prompts.tokenizer)
    inputs = inputs_of(config, all_data(prompts, demonstrations), reward_files(config))
    check_same(look(config.out), config, inputs)
    return prompts, demonstrations


def _run_lines(config: StageConfig) -> Iterator[Line]:
    found = look(config.out)
    if found.finished:
        yield "run", f"{config.out} holds this run, finished: nothing would be done"
    elif found.begun:
        yield "run", f"{config.out} holds this run: it continues from step {max(found.steps):,} of {config.steps:,}"


def _on_gpus(config: StageConfig) -> bool:
    """Whether it is known that models are on GPUs; of a cluster that is to be joined it is not."""
    if config.cluster.described:
        return True
    return config.training.device != "cpu" and config.cluster.address is None and cuda_gpus() > 0


def _model_lines(config: StageConfig, shape: ModelShape, device: str) -> Iterator[Line]:
    parallel = config.parallel
    yield (
        "model",
        f"{config.model}: {shape.parameters(head=_head(config)) / 1e6:,.1f} M parameters, {shape.layers} layers"
        + (f" of {shape.experts} experts, {shape.experts_per_token} a token" if shape.experts > 1 else ""),
    )
    where = "in this process" if config.cluster.in_process else f"Ray ({config.cluster.address or 'private'})"
    yield (
        "placement",
        f"{where}: {_ranks(parallel.world_size)} = tensor {parallel.tensor} x pipeline {parallel.pipeline} x "
        f"context {parallel.context} x data {parallel.data}"
        + (f" (experts over {parallel.expert})" if parallel.expert > 1 else "")
        + f", one {device} each; {config.training.dtype}",
    )


def _ranks(number: int) -> str:
    return f"{number} rank" if number == 1 else f"{number} ranks"


def _engine_lines(config: PolicyConfig, shape: ModelShape, device: str) -> Iterator[Line]:
    engine, memory = config.engine, engine_memory(shape, config.engine)
    where = "beside the models" if config.cluster.placement == "colocated" else f"each {device} for itself"
    yield (
        "engine",
        f"{engine.name}: {_ranks(engine.tensor * engine.replicas)} = tensor {engine.tensor} x replicas "
        f"{engine.replicas}, {where}; {engine.dtype}; a {device} holds {_size(memory.weights)} of weights and "
        f"{_size(memory.sequence)} for each sequence of {engine.context:,} tokens",
    )


def _data_lines(config: StageConfig, data: Opened, demonstrations: Demonstrations | None) -> Iterator[Line]:
    words, records = _words(config.data), data.records
    yield "data", f"{', '.join(words)}: {len(records):,} records"
    drawn = config.steps * config.batch_size
    epochs = [drawn * share / size for size, share in records.shares()]
    if len(words) > 1:
        for word, (size, share), each in zip(words, records.shares(), epochs):
            yield f"data {word}", f"{size:,} records, {share:.1%} of the batches: {each:.2f} epochs"
    yield "data as tokens", _tally_text(data.tally)
    if demonstrations is not None:
        yield "sft_data as tokens", _tally_text(demonstrations.tally)
    once = f": {epochs[0]:.2f} epochs" if len(words) == 1 else ""
    yield "steps", f"{config.steps:,} of {config.batch_size:,} records{once}"
    copies = config.parallel.data
    yield (
        "batches",
        f"{config.batch_size:,} records a step"
        + (f", shared by {copies} copies of the model" if copies > 1 else "")
        + f"; at most {config.max_length:,} tokens a sequence, packed into micro-batches of "
        f"{config.training.micro_batch_tokens:,} tokens",
    )
    yield from _evaluation_lines(config, data)


def _evaluation_lines(config: StageConfig, data: Opened) -> Iterator[Line]:
    if isinstance(config, (OfflineConfig, PolicyConfig)) and config.eval_data and data.held_out and data.held_out_tally:
        shown = ", ".join(_words(config.eval_data))
        yield "evaluation", f"{shown}: {len(data.held_out):,} records every {config.eval_every:,} steps"
        yield "evaluation as tokens", _tally_text(data.held_out_tally)
    if isinstance(config, PolicyConfig) and config.evaluations:
        yield "evaluations", f"{config.evaluations} every {config.eval_every:,} steps"


def _words(files: DataFiles) -> list[str]:
    return [str(files)] if isinstance(files, Path) else files


def _tally_text(found: Tally) -> str:
    """Counts of what was encoded, whether that is all, and what did not fit; no stage leaves out a record."""
    part = f"{found.records:,} records"
    if found.records < found.whole:
        part = f"the first {found.records:,} of {found.whole:,} records (the stage encodes the others in their steps)"
    learnt = f", {found.learnt:,} of them learnt" if found.learnt else ""
    cut = "nothing is cut"
    if found.records_cut:
        lost = ", ".join(f"{found.cut[what]:,} {text}" for what, text in _LOSES.items() if found.cut.get(what))
        cut = f"{found.records_cut:,} records are too long and lose a part, none is dropped: {lost}"
    return (
        f"{part}: {found.sequences:,} sequences of {found.tokens:,} tokens{learnt}; a sequence has "
        f"{found.tokens / found.sequences:,.1f}, at most {found.longest:,}; {cut}"
    )


def _memory_lines(config: StageConfig, device: str) -> Iterator[Line]:
    models = [(role.name, role.memory(config)) for role in roles(config)]
    for name, memory in models:
        yield f"memory per {device}, {name}", _memory_text(memory)
    yield (
        f"memory per {device}, models in all",
        f"about {_size(models_memory([memory for _, memory in models]))}, and the runtime",
    )
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
