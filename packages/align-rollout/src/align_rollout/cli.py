"""The `align-rollout` command, also mounted as `align rollout`: arguments, errors, exit status; `jobs` works."""

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import cast, get_args

from rich.console import Console

from align_core import registry
from align_core.config import Device, Dtype, EngineConfig, SamplingConfig
from align_core.contracts import RolloutEngine
from align_core.errors import AlignError, ConfigError
from align_core.text import TemplateName, load_tokenizer
from align_rollout.jobs import complete, encode, read_records, write_records

_ENGINE = EngineConfig()
_SAMPLING = SamplingConfig(temperature=0)  # a command should answer alike twice, unless asked to sample


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns 0 done, 2 refused, 130 interrupted."""
    try:
        arguments = _parser().parse_args(argv)
    except SystemExit as stop:  # argparse has printed the help or the reason
        return stop.code if isinstance(stop.code, int) else 2
    try:
        _generate(arguments)
    except (AlignError, OSError) as error:
        sys.stderr.write(f"align-rollout: error: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("align-rollout: interrupted; nothing is written\n")
        return 130
    return 0


def _generate(arguments: argparse.Namespace) -> None:
    config = EngineConfig(
        name=arguments.engine,
        tensor=arguments.tensor,
        dtype=arguments.dtype,
        device=arguments.device,
        context=arguments.context,
        max_sequences=arguments.max_sequences,
        memory_fraction=arguments.memory_fraction,
        kv_cache_mib=arguments.kv_cache_mib,
    )
    sampling = SamplingConfig(
        n=arguments.n,
        max_tokens=arguments.max_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        seed=arguments.seed,
    )
    room = config.context - sampling.max_tokens
    if room < 1:
        raise ConfigError(
            f"--max-tokens {sampling.max_tokens} leaves no room for a prompt in --context {config.context}; lower it"
        )
    if arguments.out.exists() and not arguments.overwrite:
        raise ConfigError(f"{str(arguments.out)!r} exists; give another name, or --overwrite")
    factory = registry.load("align.engines", config.name)
    records = read_records(arguments.prompts)
    tokenizer = load_tokenizer(arguments.model)
    prompts = encode(records, tokenizer, template=arguments.template, max_tokens=room)
    start = cast("Callable[[Path, EngineConfig], RolloutEngine]", getattr(factory, "from_model"))  # noqa: B009
    engine = start(arguments.model, config)
    try:
        console = Console(stderr=True)
        completions = complete(engine, prompts, sampling, at_once=4 * config.max_sequences, console=console)
    finally:
        engine.close()
    write_records(arguments.out, records, completions, tokenizer)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="align-rollout", description="Generate with a language model.")
    parser.add_argument("--version", action="version", version=f"align-rollout {metadata.version('align-rollout')}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    command = commands.add_parser(
        "generate",
        help="complete the prompts of a file",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Completes each line of PROMPTS, {'prompt': ...} or {'messages': [...]}, and writes one line a "
        "completion to OUT: the prompt's line with response, sample, finish_reason and response_tokens.",
    )
    command.add_argument("prompts", metavar="PROMPTS", type=Path, help="JSON-lines file")
    command.add_argument("out", metavar="OUT", type=Path, help="JSON-lines file to write")
    command.add_argument("--model", type=Path, required=True, metavar="DIR", help="Hugging Face directory")
    command.add_argument("--template", default="auto", choices=get_args(TemplateName), help="how prompts are written")
    command.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    _add_sampling(command.add_argument_group("sampling"))
    _add_engine(command.add_argument_group("engine"))
    return parser


def _add_sampling(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--n", type=int, default=_SAMPLING.n, help="completions a prompt")
    group.add_argument("--max-tokens", type=int, default=_SAMPLING.max_tokens, help="most new tokens")
    group.add_argument("--temperature", type=float, default=_SAMPLING.temperature, help="0 is greedy")
    group.add_argument("--top-p", type=float, default=_SAMPLING.top_p, help="nucleus size")
    group.add_argument("--seed", type=int, default=_SAMPLING.seed, help="of the sampling")


def _add_engine(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--engine", default=_ENGINE.name, metavar="NAME", help="name in the group align.engines")
    group.add_argument("--tensor", type=int, default=_ENGINE.tensor, help="ways each weight matrix is cut")
    group.add_argument("--dtype", default=_ENGINE.dtype, choices=get_args(Dtype), help="precision")
    group.add_argument("--device", default=_ENGINE.device, choices=get_args(Device), help="where it runs")
    group.add_argument("--context", type=int, default=_ENGINE.context, help="longest prompt plus completion, tokens")
    group.add_argument("--max-sequences", type=int, default=_ENGINE.max_sequences, help="most sequences at once")
    group.add_argument(
        "--memory-fraction", type=float, default=_ENGINE.memory_fraction, help="share of the GPU's memory"
    )
    group.add_argument("--kv-cache-mib", type=int, default=_ENGINE.kv_cache_mib, help="KV cache on CPU, MiB")
