"""`align-eval mt-bench judge`: from options to judgment files."""

import argparse
import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib import metadata
from typing import Any

from align_core.config import JudgeConfig
from align_core.errors import ConfigError, DataError, choices
from align_eval.cost import Budget, Price, estimate, price_of
from align_eval.errors import BudgetError
from align_eval.judges import make_judge
from align_eval.mt_bench.fastchat import Answer, read_answers, write_pairs, write_single
from align_eval.mt_bench.folder import Folder, Kind
from align_eval.mt_bench.grading import Grading, check_answers, model_pairs, pair_gradings, single_gradings
from align_eval.mt_bench.judging import KEY_FIELDS, JudgeSettings, Tally, judge_all, key_of, request_of
from align_eval.mt_bench.outcomes import matches_of, ratings_of, write_outcomes
from align_eval.mt_bench.questions import Bench, load_bench
from align_eval.options import progress_bar, say, service_config
from align_eval.results import write_json
from align_eval.store import Key, Record, Store, read_store

INCOMPLETE = 1  # exit status: more verdicts are missing than --max-failures allows
_USUAL_VERDICT = 170  # tokens; published runs of 160 verdicts took 24,000 to 28,000


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything to be judged, and how."""

    judge: str
    """The judge's name in files."""
    service: JudgeConfig
    settings: JudgeSettings
    bench: Bench
    gradings: tuple[Grading, ...]
    pairs: tuple[tuple[str, str], ...]
    """(model_1, model_2); empty in single grading."""
    price: Price | None
    options: Mapping[str, object]
    """What the report repeats: references, limit, samples."""

    @property
    def kind(self) -> Kind:
        """Single grading or pairs."""
        return "pair" if self.pairs else "single"

    def records(self, found: Mapping[Key, Record] | Store) -> dict[Grading, Record]:
        """The records of those gradings that have one."""
        records = {grading: found.get(key_of(grading, self.judge, self.settings)) for grading in self.gradings}
        return {grading: record for grading, record in records.items() if record is not None}


def run(arguments: argparse.Namespace) -> int:
    """Judges all that is not judged yet, and writes what is there, however the judging ended."""
    folder = Folder(arguments.out)
    plan = _plan(arguments, folder)
    for warning in plan.bench.warnings():
        say(f"warning: {warning}")
    if arguments.dry_run:
        _tell_cost(plan, folder)
        return 0
    budget = Budget(price=plan.price, limit=arguments.budget)
    make_judge(plan.service)  # a missing key is found before anything is written
    with Store(folder.judgment_store(plan.judge), KEY_FIELDS) as store:
        try:
            tally = asyncio.run(_judge(plan, store, budget))
        finally:
            _export(plan, folder, store, budget)
        return _status(plan, tally, store, budget, max_failures=arguments.max_failures)


async def _judge(plan: Plan, store: Store, budget: Budget) -> Tally:
    judge = make_judge(plan.service)
    try:
        with progress_bar(plan.judge, total=len(plan.gradings), done=len(plan.records(store))) as advance:
            return await judge_all(
                judge,
                plan.judge,
                plan.gradings,
                store,
                settings=plan.settings,
                budget=budget,
                at_once=2 * plan.service.concurrency,
                progress=lambda: advance(1),
            )
    finally:
        await judge.close()


def _plan(arguments: argparse.Namespace, folder: Folder) -> Plan:
    if arguments.samples < 1 or arguments.reasks < 0 or arguments.max_tokens < 1:
        raise ConfigError(
            f"samples and max-tokens must be at least 1 and reasks at least 0, got {arguments.samples}, "
            f"{arguments.max_tokens} and {arguments.reasks}"
        )
    if (arguments.mode == "pairwise-baseline") != (arguments.baseline is not None):
        raise ConfigError("--baseline NAME goes with --mode pairwise-baseline, and only with it")
    bench = load_bench(arguments.data, references=arguments.references, limit=arguments.limit)
    answers = _answers(folder, arguments.model, baseline=arguments.baseline)
    check_answers(bench, answers)
    pairs: tuple[tuple[str, str], ...] = ()
    if arguments.mode == "single":
        gradings = single_gradings(bench, answers, samples=arguments.samples)
    else:
        pairs = tuple(model_pairs(list(answers), baseline=arguments.baseline))
        gradings = pair_gradings(bench, answers, baseline=arguments.baseline, samples=arguments.samples)
    name, equals, served = arguments.judge.partition("=")
    model = served if equals else name
    return Plan(
        judge=name,
        service=service_config(arguments, model=model),
        settings=JudgeSettings(
            max_tokens=arguments.max_tokens,
            temperature=arguments.temperature,
            reasks=arguments.reasks,
            compatible=arguments.compatible,
            seed=arguments.seed,
            extra=arguments.extra,
        ),
        bench=bench,
        gradings=tuple(gradings),
        pairs=pairs,
        price=price_of(model, arguments.prices),
        options={
            "references": arguments.references,
            "limit": arguments.limit,
            "samples": arguments.samples,
            "models": list(answers),
            "baseline": arguments.baseline,
        },
    )


def _answers(folder: Folder, wanted: Sequence[str] | None, *, baseline: str | None) -> dict[str, Mapping[int, Answer]]:
    """The answers of the models that are wanted (and of the baseline), or of all there are."""
    there = {path.stem: path for path in folder.answered_models()}
    names = list(there) if wanted is None else [*wanted, *([baseline] if baseline else [])]
    for name in names:
        if name not in there:
            raise DataError(f"there are no answers of {name!r}; there are those of {choices(there)}")
    return {name: read_answers(there[name]) for name in dict.fromkeys(names)}


def _tell_cost(plan: Plan, folder: Folder) -> None:
    done = plan.records(read_store(folder.judgment_store(plan.judge), KEY_FIELDS))
    requests = [request_of(grading, plan.settings) for grading in plan.gradings if grading not in done]
    cost = estimate(requests, completion_tokens=_USUAL_VERDICT, price=plan.price)
    say(
        f"{cost.calls} calls of {plan.service.model} ({len(done)} of {len(plan.gradings)} judgments are there), about "
        f"{cost.prompt_tokens:,} prompt and {cost.completion_tokens:,} completion tokens"
    )
    if cost.dollars is None or cost.most is None:
        say(f"no price of {plan.service.model!r} is known; give one with --prices FILE")
        return
    say(f"about ${cost.dollars:.2f}, at most ${cost.most:.2f} if every verdict were as long as --max-tokens allows")
    say("unreadable verdicts are asked for again, which comes on top; --budget USD sets a limit")


def _export(plan: Plan, folder: Folder, store: Store, budget: Budget) -> None:
    """Writes FastChat's file, the one with all samples, and how they were made."""
    records = plan.records(store)
    gradings = plan.gradings
    if plan.kind == "single":
        ratings = ratings_of(gradings, records)
        write_single(folder.fastchat_judgments(plan.judge, "single"), [rating.row() for rating in ratings])
        write_outcomes(folder.judgments(plan.judge, "single"), ratings)
    else:
        matches = matches_of(gradings, records, plan.pairs)
        write_pairs(folder.fastchat_judgments(plan.judge, "pair"), [match.row() for match in matches])
        write_outcomes(folder.judgments(plan.judge, "pair"), matches)
    write_json(folder.judge_summary(plan.judge, plan.kind), _summary(plan, list(records.values()), budget))


def _summary(plan: Plan, records: Sequence[Mapping[str, Any]], budget: Budget) -> dict[str, object]:
    stamps = [record["tstamp"] for record in records]
    days = [datetime.fromtimestamp(stamp, timezone.utc).strftime("%Y-%m-%d %H:%M UTC") for stamp in stamps]
    return {
        "judge": plan.judge,
        "service": {**asdict(plan.service), "key_variable": None},
        "settings": asdict(plan.settings),
        **plan.options,
        "answered_as": sorted({str(record["judge_model"]) for record in records}),
        "judgments": len(plan.gradings),
        "made": len(records),
        "with_verdict": sum(record["verdict"] is not None for record in records),
        "no_verdict": sum(record["failure"] == "no verdict" for record in records),
        "cut_off": sum(record["failure"] == "cut off" for record in records),
        "asked_again": sum(len(record["replies"]) > 1 for record in records),
        "prompt_tokens": sum(record["prompt_tokens"] or 0 for record in records),
        "completion_tokens": sum(record["completion_tokens"] or 0 for record in records),
        "dollars_of_last_run": round(budget.spent, 4) if budget.price else None,
        "first": min(days, default=None),
        "last": max(days, default=None),
        "align_eval": metadata.version("align-eval"),
    }


def _status(plan: Plan, tally: Tally, store: Store, budget: Budget, *, max_failures: float) -> int:
    """Says how it went; the exit status."""
    failed = sum(record["failure"] is not None for record in plan.records(store).values())
    say(
        f"{tally.stored} of {tally.planned} judgments are there, {tally.asked} made now; {failed} of them have no "
        f"readable verdict" + (f"; ${budget.spent:.2f} spent" if budget.price else "")
    )
    if budget.refused:
        raise BudgetError(
            f"the budget of ${budget.limit:.2f} does not allow the next request (${budget.spent:.2f} are spent); "
            f"{tally.planned - tally.stored} judgments are missing; raise --budget and run again to continue"
        )
    if tally.unanswered:
        say(f"{len(tally.unanswered)} stayed unanswered, for example: {tally.unanswered[0]}. Run again to continue.")
    missing = tally.planned - tally.stored + failed
    return INCOMPLETE if missing > max_failures * tally.planned else 0
