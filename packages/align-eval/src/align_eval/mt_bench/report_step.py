"""`align-eval mt-bench report`: from judgment files to report.md, report.json and report.html."""

import argparse
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from align_core.errors import ConfigError, DataError, choices
from align_eval.json_lines import read_rows
from align_eval.mt_bench.fastchat import Answer, PairRow, SingleRow, read_answers, read_pairs, read_single
from align_eval.mt_bench.folder import Folder, Kind
from align_eval.mt_bench.outcomes import (
    Match,
    Rating,
    read_matches,
    read_ratings,
    strict_matches,
    strict_ratings,
)
from align_eval.mt_bench.page import write_page
from align_eval.mt_bench.pairs import fastchat_win_rates
from align_eval.mt_bench.questions import load_bench
from align_eval.mt_bench.report import Report, as_json, as_markdown, build_report, cell_text, fastchat_columns
from align_eval.mt_bench.single import fastchat_means
from align_eval.options import say
from align_eval.results import write_json, write_text


def run(arguments: argparse.Namespace) -> int:
    """Writes the three files and prints the table."""
    folder = Folder(arguments.out)
    if arguments.compatible:
        _print_compatible(*_rows(folder, arguments))
        return 0
    limit = arguments.limit
    judging: dict[str, Mapping[str, object]] = {}
    if arguments.judgments:
        judge, singles, pairs = _published(arguments.judgments, arguments.judge)
        ratings, matches = strict_ratings(singles), strict_matches(pairs)
        judging["files"] = {"judgments": ", ".join(map(str, arguments.judgments))}
    else:
        judge = _judge(folder, arguments.judge)
        ratings, matches, judging = _own(folder, judge)
        limits = {summary.get("limit") for summary in judging.values()}
        limit = next(iter(limits)) if len(limits) == 1 else None
    references = _references(judging, arguments.references)
    bench = load_bench(arguments.data, references=references, limit=limit if isinstance(limit, int) else None)
    models = {rating.model for rating in ratings} | {m for match in matches for m in (match.model_1, match.model_2)}
    report = build_report(
        bench,
        judge=judge,
        ratings=ratings,
        matches=matches,
        judging=judging,
        answering=_answering(folder, models),
    )
    write_json(arguments.out / "report.json", as_json(report))
    write_text(arguments.out / "report.md", as_markdown(report))
    answers = _answers(folder, models)
    write_page(arguments.out / "report.html", report, bench, ratings=ratings, matches=matches, answers=answers)
    _print(report)
    say(f"the report is at {arguments.out / 'report.html'}")
    return 0


def _rows(folder: Folder, arguments: argparse.Namespace) -> tuple[list[SingleRow], list[PairRow]]:
    if arguments.judgments:
        return _published(arguments.judgments, arguments.judge)[1:]
    judge = _judge(folder, arguments.judge)
    paths = {kind: folder.fastchat_judgments(judge, kind) for kind in _KINDS}
    singles = read_single([paths["single"]]) if paths["single"].is_file() else []
    return singles, read_pairs([paths["pair"]]) if paths["pair"].is_file() else []


_KINDS: tuple[Kind, ...] = ("single", "pair")


def _published(files: Sequence[Path], judge: str | None) -> tuple[str, list[SingleRow], list[PairRow]]:
    """The judge and its rows of FastChat's files; a file's first line says of which kind it is."""
    of_kind: dict[Kind, list[Path]] = {"single": [], "pair": []}
    for path in files:
        first = next(read_rows(path), None)
        if first is None:
            raise DataError(f"{str(path)!r} holds no judgments")
        of_kind["pair" if "model_1" in first[2] else "single"].append(path)
    singles, pairs = read_single(of_kind["single"]), read_pairs(of_kind["pair"])
    judge = _chosen({row.judge[0] for row in singles} | {row.judge[0] for row in pairs}, judge)
    return judge, [row for row in singles if row.judge[0] == judge], [row for row in pairs if row.judge[0] == judge]


def _judge(folder: Folder, name: str | None) -> str:
    there = folder.judges()
    if not there:
        raise DataError(f"{str(folder.root)!r} holds no judgments; run `align-eval mt-bench judge` first")
    if name is None:
        return _chosen(there, None)
    _chosen(there, folder.judge_summary(name, "single").stem.rpartition("_")[0])
    return name


def _chosen(there: Collection[str], name: str | None) -> str:
    """The judge that is named, or the only one: the scores of several make no common table."""
    if name is None and len(there) > 1:
        raise ConfigError(f"several judges have judged here; choose with --judge: {choices(there)}")
    if name is not None and name not in there:
        raise DataError(f"there are no judgments of {name!r}; there are those of {choices(there)}")
    return name or next(iter(there))


def _own(folder: Folder, judge: str) -> tuple[list[Rating], list[Match], dict[str, Mapping[str, object]]]:
    judging: dict[str, Mapping[str, object]] = {}
    for kind in _KINDS:
        path = folder.judge_summary(judge, kind)
        if path.is_file():
            judging[kind] = json.loads(path.read_text(encoding="utf-8"))
    ratings = read_ratings(folder.judgments(judge, "single")) if "single" in judging else []
    return ratings, read_matches(folder.judgments(judge, "pair")) if "pair" in judging else [], judging


def _references(judging: Mapping[str, Mapping[str, object]], default: str) -> str:
    used = [str(summary["references"]) for summary in judging.values() if "references" in summary]
    return used[0] if used else default


def _answers(folder: Folder, models: set[str]) -> dict[str, Mapping[int, Answer]]:
    paths = {model: folder.answers(model) for model in models}
    return {model: read_answers(path) for model, path in paths.items() if path.is_file()}


def _answering(folder: Folder, models: set[str]) -> dict[str, Mapping[str, object]]:
    paths = {model: folder.answer_summary(model) for model in sorted(models)}
    return {model: json.loads(path.read_text(encoding="utf-8")) for model, path in paths.items() if path.is_file()}


def _print(report: Report) -> None:
    console = Console()
    for warning in report.warnings:
        say(f"warning: {warning}")
    if report.models:
        table = Table(
            "category", *(model.model for model in report.models), title=f"MT-Bench, judged by {report.judge}"
        )
        for category in report.categories:
            table.add_row(category, *(cell_text(model.categories[category]) for model in report.models))
        table.add_section()
        table.add_row("Avg", *(cell_text(model.micro) for model in report.models))
        console.print(table)
    for rate in report.win_rates:
        console.print(f"{rate.model}: {rate.wins} wins, {rate.losses} losses, {rate.ties} ties", markup=False)


def _print_compatible(singles: Sequence[SingleRow], pairs: Sequence[PairRow]) -> None:
    """FastChat's show_result: one table a turn and one over all, and win rates."""
    console = Console()
    means = fastchat_means(singles)
    for name in fastchat_columns(means):
        table = Table("model", "score", title=name)
        scored = {model: by_name[name] for model, by_name in means.items() if name in by_name}
        for model, score in sorted(scored.items(), key=lambda item: -item[1]):
            table.add_row(model, f"{score:.6f}")
        console.print(table)
    if pairs:
        table = Table("model", "win", "loss", "tie", "win_rate", "loss_rate", "win_rate_adjusted")
        for rate in fastchat_win_rates(pairs):
            rates = (rate.win_rate, rate.loss_rate, rate.win_rate_adjusted)
            table.add_row(rate.model, *map(str, (rate.wins, rate.losses, rate.ties)), *(f"{r:.6f}" for r in rates))
        console.print(table)
