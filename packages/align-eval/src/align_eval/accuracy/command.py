"""`align-eval accuracy`: the options, and from options to files and a table."""

import argparse
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import get_args

from rich.console import Console
from rich.table import Table

from align_core.config import EngineConfig, SamplingConfig
from align_core.text import TemplateName
from align_eval.accuracy.completions import KEY_FIELDS
from align_eval.accuracy.run import Accuracy, evaluate_model
from align_eval.accuracy.tasks import read_tasks
from align_eval.accuracy.verifiers import make_verifier
from align_eval.models import check_directories, engine_class, hugging_face, model_names
from align_eval.options import add_engine_options, engine_config, progress_bar
from align_eval.results import write_json, write_json_lines
from align_eval.store import Store


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds `accuracy` to the commands of align-eval."""
    accuracy = commands.add_parser("accuracy", help="share of held-out tasks answered rightly, with its interval")
    add = accuracy.add_argument
    add("--model", action="append", required=True, metavar="[NAME=]DIR", help="Hugging Face directory; repeatable")
    add("--data", type=Path, required=True, metavar="FILE", help="JSON lines, GSM8K's and MATH's too")
    add("--out", type=Path, required=True, metavar="DIR", help="gets accuracy.json and NAME.jsonl for each model")
    add("--limit", type=int, help="only the first LIMIT tasks")
    add("--max-tokens", "--max_tokens", type=int, default=512, help="most new tokens an answer (default 512)")
    add("--template", choices=get_args(TemplateName), default="auto", help="prompt template (default auto)")
    add("--temperature", type=float, default=0.0, help="0, the default, is greedy")
    add("--top-p", type=float, default=1.0, help="nucleus size (default 1)")
    add("--samples", type=int, default=1, help="completions a task; several give mean@k and pass@k (default 1)")
    add(
        "--verifier",
        default="gsm8k",
        help="gsm8k (numbers, the default), math (LaTeX), math-verify (LaTeX, with the extra [math]) or reward:NAME",
    )
    add("--suffix", default="", help=r"words after each question, for example how to answer; \n is a new line")
    add("--seed", type=int, default=0, help="of sampling; greedy ignores it")
    add_engine_options(accuracy)
    accuracy.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Evaluates every model; completions that are there already are graded again, not made again."""
    models = model_names(arguments.model)
    engine = engine_config(arguments)
    sampling = SamplingConfig(
        n=arguments.samples,
        max_tokens=arguments.max_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        seed=arguments.seed,
    )
    # All that can be wrong without a model is found before the first one is loaded.
    engine_class(engine.name)
    check_directories(models)
    verifier = make_verifier(arguments.verifier)
    suffix = arguments.suffix.replace("\\n", "\n")  # shells do not make it easy to type one
    tasks = read_tasks(arguments.data, verifier, limit=arguments.limit, suffix=suffix)
    results: dict[str, Accuracy] = {}
    for name, path in models.items():
        directory = hugging_face(path, work=arguments.out / "store" / "converted")
        with (
            Store(arguments.out / "store" / f"{name}.jsonl", KEY_FIELDS) as store,
            progress_bar(name, total=len(tasks)) as advance,
        ):
            evaluation = evaluate_model(
                directory,
                tasks,
                engine=engine,
                sampling=sampling,
                template=arguments.template,
                verifier=verifier,
                store=store,
                progress=advance,
            )
        write_json_lines(arguments.out / f"{name}.jsonl", (asdict(item) for item in evaluation.items))
        results[name] = evaluation.accuracy
    settings = _settings(arguments, sampling, engine)
    written = {name: {"model": str(models[name]), **asdict(found), **settings} for name, found in results.items()}
    write_json(arguments.out / "accuracy.json", written)  # once, so that its presence says that all is done
    _print(results)
    return 0


def _settings(arguments: argparse.Namespace, sampling: SamplingConfig, engine: EngineConfig) -> dict[str, object]:
    """What a reader of accuracy.json needs to make the same again."""
    return {
        "data": str(arguments.data),
        "verifier": arguments.verifier,
        "suffix": arguments.suffix,
        "template": arguments.template,
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "seed": sampling.seed,
        "engine": engine.name,
        "dtype": engine.dtype,
    }


def _print(results: Mapping[str, Accuracy]) -> None:
    console = Console()
    console.print(_table(results))
    if any(result.pass_at for result in results.values()):
        console.print(_pass_table(results))


def _table(results: Mapping[str, Accuracy]) -> Table:
    samples = max(result.samples for result in results.values())
    table = Table(title="accuracy")
    table.add_column("model")
    first = "accuracy" if samples == 1 else f"mean@{samples}"
    for heading in ("n", "correct", first, "95 % interval", "strict", "no answer", "cut off"):
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


def _pass_table(results: Mapping[str, Accuracy]) -> Table:
    """One row for each k; the interval behind the share."""
    table = Table("k", *results, title="pass@k")
    for k in sorted({k for result in results.values() for k in result.pass_at}):
        shares = [result.pass_at.get(k) for result in results.values()]
        cells = ["-" if s is None else f"{s.value:.1%} ({s.low:.1%} - {s.high:.1%})" for s in shares]
        table.add_row(str(k), *cells)
    return table
