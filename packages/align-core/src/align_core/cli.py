"""The `align` command: the stages, the tutorial, data preparation, and the commands that other packages bring."""

import importlib
import logging
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import cast

from rich.console import Console
from rich.table import Table

from align_core import __version__, registry
from align_core.config import (
    DpoConfig,
    GrpoConfig,
    KtoConfig,
    LogprobsConfig,
    OnlineDpoConfig,
    PolicyConfig,
    ResponsesConfig,
    RewardConfig,
    RlhfConfig,
    ScoreConfig,
    SftConfig,
    StageConfig,
)
from align_core.contracts import Command
from align_core.errors import AlignError, ConfigError, Stopped, WorkerError, missing_dependency, unknown_name
from align_core.stages.world import World

Config = StageConfig | ResponsesConfig

_HELP = {
    "sft": "supervised fine-tuning on prompts and responses",
    "reward": "reward model from ranked responses",
    "dpo": "preference optimisation without sampling",
    "kto": "learning from responses that are marked as wanted or not",
    "rlhf": "PPO with a reward model and a value model",
    "online-dpo": "preferences between the policy's own answers",
    "grpo": "policy optimisation within groups of answers",
    "score": "a reward model's scores of the responses in a file",
    "logprobs": "a model's log-probs of the responses in a file",
    "data": "write the stages' files from public data sets",
    "make-model": "write the models that need no download",
    "report": "the curves, times and samples of one run as a page",
    "tutorial": "the whole road on a model made on the spot, ending in a report",
    "doctor": "what this machine can run, and why not",
}

_INSTALLED_HELP = {  # of the commands that our other packages bring where they are installed
    "convert": "Hugging Face checkpoints to Megatron's and back (align-convert)",
    "eval": "MT-Bench, and accuracy on questions with answers (align-eval)",
    "rollout": "answers of a model, a server for it, its speed (align-rollout)",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `align WORDS`; returns the status: 0 fine, 2 an error the user can act on, 130 interrupted, 143 stopped."""
    words = list(sys.argv[1:] if argv is None else argv)
    console = Console(stderr=True)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        return _run(words)
    except SystemExit as leaving:  # an argument parser has printed its help, or what was wrong
        return leaving.code if isinstance(leaving.code, int) else 2
    except Stopped as stopped:
        console.print(f"align: {stopped}; run the same command again to continue", markup=False, soft_wrap=True)
        return 143
    except AlignError as error:
        console.print(f"align: error: {error}", style="red", markup=False, soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        console.print("align: interrupted; run the same command again to continue", markup=False)
        return 130


def _run(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        _print_help()
        return 0
    if words[0] == "--version":
        Console().print(f"align-core {__version__}", markup=False)
        return 0
    name, rest = words[0], words[1:]
    if name in _COMMANDS:
        return _COMMANDS[name](rest)
    others = registry.names("align.commands")
    if name not in others and not registry.package_of("align.commands", name):
        raise ConfigError(unknown_name("command", name, [*_COMMANDS, *others]))
    return cast("Command", registry.load("align.commands", name))(rest)


def _stage(name: str) -> Callable[[list[str]], int]:
    def run(words: list[str]) -> int:
        from align_core import settings  # noqa: PLC0415  (the argument parser is slow to import)

        config_type, module, function, product = _STAGES[name]
        dry = not settings.DRY_RUN.isdisjoint(words)
        if dry and not issubclass(config_type, StageConfig):
            raise ConfigError(f"align {name} trains nothing; --dry-run is for the stages that train")
        config = settings.parse(config_type, words, stage=name)
        if dry and isinstance(config, StageConfig):
            return _print_plan(name, config)
        stage: Callable[[Config, World], None] = getattr(importlib.import_module(module), function)
        world = _world(config)
        try:
            stage(config, world)
        except WorkerError as error:
            again = shlex.join(["align", name, *words])
            raise WorkerError(f"{error}\nto continue from the last checkpoint, run: {again}") from error
        finally:
            world.close()
        Console(stderr=True).print(f"done: {config.out / product}", markup=False, soft_wrap=True)
        return 0

    return run


def _print_plan(name: str, config: StageConfig) -> int:
    from align_core.stages.dry_run import plan_lines  # noqa: PLC0415

    plan = plan_lines(config)
    console = Console()
    console.print(f"align {name} would do this (nothing is started or written):", markup=False)
    for key, value in plan:
        console.print(f"  {key}: {value}", markup=False, highlight=False, soft_wrap=True)
    return 0


def _world(config: Config) -> World:
    if config.cluster.in_process:
        from align_core.stages.local import LocalWorld  # noqa: PLC0415

        return LocalWorld()
    try:
        from align_core.ray.world import RayWorld  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise missing_dependency(
            str(error.name), "align-core[ray]", needed_for="running over several processes"
        ) from error
    return RayWorld(config.cluster, expected=config.engine if isinstance(config, PolicyConfig) else None)


def _tutorial(words: list[str]) -> int:
    from align_core.tutorial.command import main as tutorial  # noqa: PLC0415

    return tutorial(words)


def _report(words: list[str]) -> int:
    from align_core.stages.page import main as report  # noqa: PLC0415

    return report(words)


def _data(words: list[str]) -> int:
    from align_core.data.prepare import main as prepare  # noqa: PLC0415

    return prepare(words)


def _make_model(words: list[str]) -> int:
    from align_core.tutorial.make_model import main as make_model  # noqa: PLC0415

    return make_model(words)


def _doctor(words: list[str]) -> int:
    from align_core.doctor import main as doctor  # noqa: PLC0415

    return doctor(words)


_STAGES: dict[str, tuple[type[Config], str, str, str]] = {
    "sft": (SftConfig, "align_core.stages.sft", "run_sft", "model"),
    "reward": (RewardConfig, "align_core.stages.reward", "run_reward", "model"),
    "dpo": (DpoConfig, "align_core.stages.dpo", "run_dpo", "model"),
    "kto": (KtoConfig, "align_core.stages.kto", "run_kto", "model"),
    "rlhf": (RlhfConfig, "align_core.stages.rlhf", "run_rlhf", "model"),
    "online-dpo": (OnlineDpoConfig, "align_core.stages.online_dpo", "run_online_dpo", "model"),
    "grpo": (GrpoConfig, "align_core.stages.grpo", "run_grpo", "model"),
    "score": (ScoreConfig, "align_core.stages.score", "run_score", ""),
    "logprobs": (LogprobsConfig, "align_core.stages.logprobs", "run_logprobs", ""),
}
"""Settings, module and function, and where in OUT the result is."""

_COMMANDS: dict[str, Callable[[list[str]], int]] = {
    **{name: _stage(name) for name in _STAGES},
    "data": _data,
    "make-model": _make_model,
    "report": _report,
    "tutorial": _tutorial,
    "doctor": _doctor,
}


def _print_help() -> None:
    table = Table.grid(padding=(0, 2))
    for name, text in _HELP.items():
        table.add_row(name, text)
    for name in registry.names("align.commands"):
        table.add_row(name, _INSTALLED_HELP.get(name, "from an installed package; see its --help"))
    console = Console()
    console.print("usage: align COMMAND [options]      align COMMAND --help for its options\n", markup=False)
    console.print(table)
