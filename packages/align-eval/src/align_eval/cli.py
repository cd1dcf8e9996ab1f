"""The command `align-eval`, also mounted as `align eval`: reads arguments, runs, writes files and a table.

Knows nothing of grading or generation. Errors that a user can act on are printed without a traceback; status 2.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import get_args

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from align_core.config import Device, Dtype, EngineConfig, SamplingConfig
from align_core.contracts import Command
from align_core.errors import AlignError, ConfigError, DataError
from align_core.text import TemplateName
from align_eval.accuracy.run import Accuracy, engine_class, evaluate_model
from align_eval.accuracy.tasks import Task, read_tasks
from align_eval.results import write_json, write_json_lines

USER_ERROR = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `align-eval` with the arguments after the command's name; returns the exit status."""
    try:
        arguments = _parser().parse_args(argv)
    except SystemExit as leaving:  # argparse has printed the reason, or the help
        return leaving.code if isinstance(leaving.code, int) else USER_ERROR
    try:
        _accuracy(arguments)
    except AlignError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201, this is the command line
        return USER_ERROR
    return 0


def model_names(models: Sequence[str]) -> dict[str, Path]:
    """A short name for each model: NAME of `NAME=DIR`, else as many trailing folders of DIR as tell them apart.

    `runs/sft/hf runs/dpo/hf` become `sft-hf` and `dpo-hf`.
    """
    named: dict[str, Path] = {}
    unnamed: list[Path] = []
    for model in models:
        name, equals, directory = model.partition("=")
        if equals and not Path(model).exists():
            if not name or not directory or "/" in name:
                raise ConfigError(f"expected --model DIR or --model NAME=DIR, got {model!r}")
            _add(named, name, Path(directory))
        else:
            unnamed.append(Path(model))
    parts = [path.resolve().parts[1:] or ("root",) for path in unnamed]
    depth = 1
    while len({part[-depth:] for part in parts}) < len(parts) and depth < max(map(len, parts)):
        depth += 1
    for path, part in zip(unnamed, parts):
        _add(named, "-".join(part[-depth:]), path)
    return named


def _add(named: dict[str, Path], name: str, path: Path) -> None:
    if name in named:
        raise ConfigError(f"two models are called {name!r}: {str(named[name])!r} and {str(path)!r}; use NAME=DIR")
    named[name] = path


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="align-eval", description="Evaluate models.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{accuracy}")
    accuracy = commands.add_parser("accuracy", help="share of held-out tasks answered rightly, with its interval")
    add = accuracy.add_argument
    add("--model", action="append", required=True, metavar="[NAME=]DIR", help="Hugging Face directory; repeatable")
    add("--data", type=Path, required=True, metavar="FILE", help='JSON lines of {"prompt", "answer"}')
    add("--out", type=Path, required=True, metavar="DIR", help="gets accuracy.json and NAME.jsonl for each model")
    add("--limit", type=int, help="only the first LIMIT tasks")
    add("--max_tokens", type=int, default=512, help="most new tokens an answer (default 512)")
    add("--template", choices=get_args(TemplateName), default="auto", help="prompt template (default auto)")
    add("--temperature", type=float, default=0.0, help="0, the default, is greedy")
    add("--seed", type=int, default=0, help="of sampling; greedy ignores it")
    add("--engine", default="vllm", help="name in the entry-point group align.engines (default vllm)")
    add("--dtype", choices=get_args(Dtype), default="float32", help="precision in the engine (default float32)")
    add(
        "--device",
        choices=get_args(Device),
        default="auto",
        help="auto, the default, takes CUDA where there is a device",
    )
    add("--context", type=int, default=2048, help="longest prompt plus answer, tokens (default 2048)")
    add("--tensor", type=int, default=1, help="ways the engine cuts the model (default 1)")
    return parser


def _accuracy(arguments: argparse.Namespace) -> None:
    models = model_names(arguments.model)
    engine = EngineConfig(
        name=arguments.engine,
        tensor=arguments.tensor,
        dtype=arguments.dtype,
        context=arguments.context,
        device=arguments.device,
    )
    sampling = SamplingConfig(
        n=1, max_tokens=arguments.max_tokens, temperature=arguments.temperature, seed=arguments.seed
    )
    # All that can be wrong without a model is found before the first one is loaded.
    engine_class(engine.name)
    for path in models.values():
        if not path.is_dir():
            raise DataError(f"model directory {str(path)!r} does not exist")
    tasks = read_tasks(arguments.data, limit=arguments.limit)
    results: dict[str, Accuracy] = {}
    written: dict[str, object] = {}
    settings = {
        "data": str(arguments.data),
        "template": arguments.template,
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "seed": sampling.seed,
        "engine": engine.name,
        "dtype": engine.dtype,
    }
    for name, path in models.items():
        results[name] = _one(name, path, tasks, engine=engine, sampling=sampling, arguments=arguments)
        written[name] = {"model": str(path), **asdict(results[name]), **settings}
    write_json(arguments.out / "accuracy.json", written)  # once, so that its presence says that all is done
    Console().print(_table(results))


def _one(
    name: str,
    path: Path,
    tasks: Sequence[Task],
    *,
    engine: EngineConfig,
    sampling: SamplingConfig,
    arguments: argparse.Namespace,
) -> Accuracy:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        shown = bar.add_task(name, total=len(tasks))
        evaluation = evaluate_model(
            path,
            tasks,
            engine=engine,
            sampling=sampling,
            template=arguments.template,
            progress=lambda done: bar.advance(shown, done),
        )
    write_json_lines(arguments.out / f"{name}.jsonl", (asdict(item) for item in evaluation.items))
    return evaluation.accuracy


def _table(results: Mapping[str, Accuracy]) -> Table:
    table = Table(title="accuracy")
    table.add_column("model")
    for heading in ("n", "correct", "accuracy", "95 % interval", "strict", "no answer", "cut off"):
        table.add_column(heading, justify="right")
    for name, result in results.items():
        table.add_row(
            name,
            str(result.n),
            str(result.correct),
            f"{result.accuracy:.1%}",
            f"{result.low:.1%} - {result.high:.1%}",
            f"{result.strict_accuracy:.1%}",
            str(result.unanswered),
            str(result.truncated),
        )
    return table


_conforms: Command = main
