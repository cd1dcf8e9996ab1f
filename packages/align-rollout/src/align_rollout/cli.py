"""The `align-rollout` command, also mounted as `align rollout`: arguments, errors, exit status; `jobs` works."""

import argparse
import dataclasses
import hashlib
import json
import os
import secrets
import signal
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import cast, get_args

from rich.console import Console

from align_core import registry
from align_core.config import Device, Dtype, EngineConfig, SamplingConfig
from align_core.contracts import RolloutEngine, SupportsAsyncGenerate
from align_core.errors import AlignError, ConfigError
from align_core.fingerprint import fingerprint
from align_core.text import TemplateName, load_tokenizer
from align_rollout.bench import Load, measure, measure_beside_plain
from align_rollout.checkpoint import read_model
from align_rollout.jobs import Journal, complete, encode, read_records, write_records
from align_rollout.server import TOKEN_VARIABLE, make_server

_ENGINE = EngineConfig()
_SAMPLING = SamplingConfig(temperature=0)  # a command should answer alike twice, unless asked to sample


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns 0 done, 2 refused, 130 interrupted."""
    try:
        arguments = _parser().parse_args(argv)
    except SystemExit as stop:  # argparse has printed the help or the reason
        return stop.code if isinstance(stop.code, int) else 2
    try:
        arguments.run(arguments)
    except (AlignError, OSError) as error:
        sys.stderr.write(f"align-rollout: error: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("align-rollout: interrupted; the same command continues a 'generate'\n")
        return 130
    return 0


def _generate(arguments: argparse.Namespace) -> None:
    config, sampling = _engine_config(arguments), _sampling_config(arguments)
    room = config.context - sampling.max_tokens
    if room < 1:
        raise ConfigError(
            f"--max-tokens {sampling.max_tokens} leaves no room for a prompt in --context {config.context}; lower it"
        )
    if arguments.out.exists() and not arguments.overwrite:
        raise ConfigError(f"{str(arguments.out)!r} exists; give another name, or --overwrite")
    start = _starter(config)
    records = read_records(arguments.prompts)
    tokenizer = load_tokenizer(arguments.model)
    prompts = encode(records, tokenizer, template=arguments.template, max_tokens=room)
    settings = {
        "model": fingerprint(arguments.model),
        "engine": [config.name, config.dtype, config.context],
        "prompts": hashlib.sha256(arguments.prompts.read_bytes()).hexdigest(),
        "template": arguments.template,
        "sampling": dataclasses.asdict(sampling),
    }
    journal = Journal(arguments.out, settings)
    try:
        engine = start(arguments.model, config)
        try:
            console = Console(stderr=True)
            at_once = 4 * config.max_sequences
            completions = complete(engine, prompts, sampling, journal, at_once=at_once, console=console)
        finally:
            engine.close()
    finally:
        journal.close()
    write_records(arguments.out, records, completions, tokenizer)
    journal.remove()


def _serve(arguments: argparse.Namespace) -> None:
    for wish in (signal.SIGINT, signal.SIGTERM):  # SIGINT is ignored from birth where a shell starts us in background
        signal.signal(wish, signal.default_int_handler)
    config = _engine_config(arguments)
    start = _starter(config)
    token = os.environ.get(TOKEN_VARIABLE) or secrets.token_urlsafe(24)
    tokenizer = load_tokenizer(arguments.model)
    engine = start(arguments.model, config)
    try:
        if not isinstance(engine, SupportsAsyncGenerate):
            raise ConfigError(f"the engine {config.name!r} does not sample in the background, which a server needs")
        server = make_server(engine, tokenizer, config=config, host=arguments.host, port=arguments.port, token=token)
        shown = "" if TOKEN_VARIABLE in os.environ else f" with the token {token}"
        sys.stderr.write(f"align-rollout: serving on http://{arguments.host}:{server.server_address[1]}{shown}\n")
        server.serve_forever()
    finally:
        engine.close()


def _bench(arguments: argparse.Namespace) -> None:
    config = _engine_config(arguments)
    sampling = SamplingConfig(max_tokens=arguments.max_tokens, seed=arguments.seed)
    if arguments.prompt_tokens + arguments.max_tokens > config.context:
        raise ConfigError(
            f"--prompt-tokens {arguments.prompt_tokens} and --max-tokens {arguments.max_tokens} do not fit in "
            f"--context {config.context}; raise it, or lower one of them"
        )
    load = Load(
        prompts=arguments.prompts,
        prompt_tokens=arguments.prompt_tokens,
        vocab_size=read_model(arguments.model).vocab_size,
        seed=arguments.seed,
    )
    started = time.perf_counter()
    engine = _starter(config)(arguments.model, config)
    ready = time.perf_counter() - started
    try:
        if arguments.plain_pairs:
            found = measure_beside_plain(engine, load, sampling, pairs=arguments.plain_pairs)
        else:
            found = measure(engine, load, sampling)
    finally:
        engine.close()
    head = {"engine": config.name, "model": str(arguments.model), "dtype": config.dtype, "seconds_to_start": ready}
    sys.stdout.write(json.dumps({**head, **found}) + "\n")


def _starter(config: EngineConfig) -> Callable[[Path, EngineConfig], RolloutEngine]:
    factory = registry.load("align.engines", config.name)
    return cast("Callable[[Path, EngineConfig], RolloutEngine]", getattr(factory, "from_model"))  # noqa: B009


def _engine_config(arguments: argparse.Namespace) -> EngineConfig:
    return EngineConfig(
        name=arguments.engine,
        tensor=arguments.tensor,
        dtype=arguments.dtype,
        device=arguments.device,
        context=arguments.context,
        max_sequences=arguments.max_sequences,
        memory_fraction=arguments.memory_fraction,
        kv_cache_mib=arguments.kv_cache_mib,
        enforce_eager=arguments.enforce_eager,
    )


def _sampling_config(arguments: argparse.Namespace) -> SamplingConfig:
    return SamplingConfig(
        n=arguments.n,
        max_tokens=arguments.max_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        seed=arguments.seed,
        stop=tuple(arguments.stop),
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="align-rollout", description="Generate with a language model.")
    parser.add_argument("--version", action="version", version=f"align-rollout {metadata.version('align-rollout')}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_generate(commands)
    serve = _add_command(
        commands,
        "serve",
        _serve,
        "an OpenAI-compatible server",
        "Serves completions, chat completions and weight updates. Every request needs the token in the environment "
        f"variable {TOKEN_VARIABLE}, or the one printed at the start, as 'Authorization: Bearer TOKEN'.",
    )
    serve.add_argument("--host", default="127.0.0.1", help="address to bind to; others than this machine's see it")
    serve.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    bench = _add_command(
        commands, "bench", _bench, "tokens a second", "Generates from random prompts; prints a line of JSON."
    )
    bench.add_argument("--prompts", type=int, default=512, help="how many")
    bench.add_argument("--prompt-tokens", type=int, default=128, help="length of each")
    bench.add_argument("--max-tokens", type=int, default=256, help="most new tokens")
    bench.add_argument("--seed", type=int, default=0, help="of prompts and sampling")
    bench.add_argument(
        "--plain-pairs",
        type=int,
        default=0,
        metavar="N",
        help="compare with vllm's own LLM.generate in N pairs of runs",
    )
    return parser


def _add_generate(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = _add_command(
        commands,
        "generate",
        _generate,
        "complete the prompts of a file",
        "Completes each line of PROMPTS, {'prompt': ...} or {'messages': [...]}, and writes one line a "
        "completion to OUT: the prompt's line with response, sample, finish_reason and response_tokens. Interrupted, "
        "the same command continues where it stopped.",
    )
    command.add_argument("prompts", metavar="PROMPTS", type=Path, help="JSON-lines file")
    command.add_argument("out", metavar="OUT", type=Path, help="JSON-lines file to write")
    command.add_argument("--template", default="auto", choices=get_args(TemplateName), help="how prompts are written")
    command.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    _add_sampling(command.add_argument_group("sampling"))


def _add_command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    run: Callable[[argparse.Namespace], None],
    summary: str,
    description: str,
) -> argparse.ArgumentParser:
    command = commands.add_parser(
        name, help=summary, formatter_class=argparse.ArgumentDefaultsHelpFormatter, description=description
    )
    command.set_defaults(run=run)
    command.add_argument(
        "--model", type=Path, required=True, default=argparse.SUPPRESS, metavar="DIR", help="Hugging Face directory"
    )
    _add_engine(command.add_argument_group("engine"))
    return command


def _add_sampling(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--n", type=int, default=_SAMPLING.n, help="completions a prompt")
    group.add_argument("--max-tokens", type=int, default=_SAMPLING.max_tokens, help="most new tokens")
    group.add_argument("--temperature", type=float, default=_SAMPLING.temperature, help="0 is greedy")
    group.add_argument("--top-p", type=float, default=_SAMPLING.top_p, help="nucleus size")
    group.add_argument("--seed", type=int, default=_SAMPLING.seed, help="of the sampling")
    group.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends a completion; repeatable")


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
    group.add_argument("--kv-cache-mib", type=int, default=_ENGINE.kv_cache_mib, help="KV cache (0: by the device)")
    group.add_argument("--enforce-eager", action="store_true", help="no CUDA graphs: starts sooner, generates slower")
