"""`align-eval accuracy`: the options, and from options to files and a table."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import get_args

from rich.console import Console
from rich.table import Table

from align_core.config import EngineConfig, SamplingConfig
from align_core.text import TemplateName
from align_eval.accuracy.run import Accuracy, evaluate_model
from align_eval.accuracy.tasks import Task, read_tasks
from align_eval.models import check_directories, engine_class, model_names
from align_eval.options import add_engine_options, engine_config, progress_bar
from align_eval.results import write_json, write_json_lines


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds `accuracy` to the commands of align-eval."""
    accuracy = commands.add_parser("accuracy", help="share of held-out tasks answered rightly, with its interval")
    add = accuracy.add_argument
    add("--model", action="append", required=True, metavar="[NAME=]DIR", help="Hugging Face directory; repeatable")
    add("--data", type=Path, required=True, metavar="FILE", help='JSON lines of {"prompt", "answer"}')
    add("--out", type=Path, required=True, metavar="DIR", help="gets accuracy.json and NAME.jsonl for each model")
    add("--limit", type=int, help="only the first LIMIT tasks")
    add("--max-tokens", "--max_tokens", type=int, default=512, help="most new tokens an answer (default 512)")
    add("--template", choices=get_args(TemplateName), default="auto", help="prompt template (default auto)")
    add("--temperature", type=float, default=0.0, help="0, the default, is greedy")
    add("--seed", type=int, default=0, help="of sampling; greedy ignores it")
    add_engine_options(accuracy)
    accuracy.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    models = model_names(arguments.model)
    engine = engine_config(arguments)
    sampling = SamplingConfig(
        n=1, max_tokens=arguments.max_tokens, temperature=arguments.temperature, seed=arguments.seed
    )
    # All that can be wrong without a model is found before the first one is loaded.
    engine_class(engine.name)
    check_directories(models)
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
    return 0


def _one(
    name: str,
    path: Path,
    tasks: Sequence[Task],
    *,
    engine: EngineConfig,
    sampling: SamplingConfig,
    arguments: argparse.Namespace,
) -> Accuracy:
    with progress_bar(name, total=len(tasks)) as advance:
        evaluation = evaluate_model(
            path,
            tasks,
            engine=engine,
            sampling=sampling,
            template=arguments.template,
            progress=advance,
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
