"""Command-line options that several commands share, and the progress bar. Knows nothing of what the commands do."""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import get_args

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from align_core.config import Device, Dtype, EngineConfig, JudgeConfig

_ENGINE = EngineConfig()
_SERVICE = JudgeConfig()


def add_engine_options(parser: argparse.ArgumentParser, *, context: int = _ENGINE.context) -> None:
    """The options that `engine_config` reads."""
    add = parser.add_argument_group("engine").add_argument
    add("--engine", default=_ENGINE.name, help="name in the entry-point group align.engines (default vllm)")
    add("--dtype", choices=get_args(Dtype), default=_ENGINE.dtype, help="precision in the engine (default float32)")
    add("--device", choices=get_args(Device), default="auto", help="auto, the default, takes CUDA where there is one")
    add("--context", type=int, default=context, help=f"longest prompt plus answer, tokens (default {context})")
    add("--tensor", type=int, default=1, help="ways the engine cuts the model (default 1)")
    add(
        *("--kv-cache-mib", "--kv_cache_mib"),
        type=int,
        default=_ENGINE.kv_cache_mib,
        help="size of the KV cache, MiB (default 0: by memory on a GPU, 256 on CPU)",
    )
    add(
        *("--enforce-eager", "--enforce_eager"),
        action="store_true",
        help="no CUDA graphs: the engine starts sooner and answers slower",
    )


def engine_config(arguments: argparse.Namespace) -> EngineConfig:
    """The engine that the options describe."""
    return EngineConfig(
        name=arguments.engine,
        tensor=arguments.tensor,
        dtype=arguments.dtype,
        context=arguments.context,
        device=arguments.device,
        kv_cache_mib=arguments.kv_cache_mib,
        enforce_eager=arguments.enforce_eager,
        sleep=False,  # nothing else wants the memory meanwhile
    )


def add_service_options(parser: argparse.ArgumentParser, *, url: str | None) -> None:
    """The options that `service_config` reads; `url` is the default address."""
    add = parser.add_argument_group("service").add_argument
    add(
        "--url",
        default=url,
        help="address of an OpenAI-compatible service, with its /v1" + (f" ({url})" if url else ""),
    )
    add(
        "--key-variable",
        default=_SERVICE.key_variable,
        help=f"environment variable that holds the key (default {_SERVICE.key_variable})",
    )
    add("--concurrency", type=int, default=_SERVICE.concurrency, help="most requests under way (default 16)")
    add("--rpm", type=int, default=0, help="most requests a minute (default: no limit)")
    add("--tpm", type=int, default=0, help="most tokens a minute, prompts and longest replies (default: no limit)")
    add("--timeout", type=float, default=_SERVICE.timeout, help="seconds until a request counts as lost (default 300)")
    add("--attempts", type=int, default=_SERVICE.attempts, help="times a request is sent if it fails (default 8)")
    add(
        "--completion-limit",
        action="store_true",
        help="send max_completion_tokens instead of max_tokens, as models that think want it",
    )
    add(
        "--extra", default="", metavar="JSON", help="object that goes into every request, for the service's own options"
    )
    add("--service", default=_SERVICE.name, help="name in the entry-point group align.judges (default openai)")


def service_config(arguments: argparse.Namespace, *, model: str) -> JudgeConfig:
    """The service that the options describe."""
    return JudgeConfig(
        name=arguments.service,
        model=model,
        base_url=arguments.url,
        key_variable=arguments.key_variable,
        concurrency=arguments.concurrency,
        requests_per_minute=arguments.rpm,
        tokens_per_minute=arguments.tpm,
        timeout=arguments.timeout,
        attempts=arguments.attempts,
        token_limit_field="max_completion_tokens" if arguments.completion_limit else "max_tokens",
        extra=arguments.extra,
    )


@contextmanager
def progress_bar(name: str, *, total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
    """A bar on the error stream; gives the function that advances it."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        shown = bar.add_task(name, total=total, completed=done)
        yield lambda count: bar.advance(shown, count)


def say(text: str) -> None:
    """A line for the user, on the error stream, so that a command's own output stays clean."""
    Console(stderr=True).print(text, markup=False, highlight=False, soft_wrap=True)
