"""Evaluations in the middle of training, on the live engine of a stage (`align.evaluations`): plain functions.

They measure the weights that the engine holds and change nothing in it. Details go to `config.out`, in files named by
the step. The functions behind them (`accuracy.run.evaluate`, `mt_bench.answering.answer_with_engine`) are the same that
the command line uses.
"""

from collections.abc import Mapping
from dataclasses import asdict

from align_core.config import EvaluationConfig, SamplingConfig
from align_core.contracts import Evaluation, RolloutEngine
from align_core.text import Tokenizer, resolve_template
from align_eval.accuracy.run import evaluate
from align_eval.accuracy.tasks import read_tasks
from align_eval.accuracy.verifiers import make_verifier
from align_eval.mt_bench.answering import answer_with_engine, template_hash
from align_eval.mt_bench.fastchat import write_answers
from align_eval.mt_bench.folder import Folder
from align_eval.mt_bench.questions import load_bench
from align_eval.mt_bench.sheet import KEY_FIELDS, AnswerSettings, AnswerSheet
from align_eval.results import write_json, write_json_lines
from align_eval.store import Store


def accuracy(
    engine: RolloutEngine, tokenizer: Tokenizer, config: EvaluationConfig, *, step: int
) -> Mapping[str, float]:
    """Greedy accuracy on the tasks in `config.data`, whose answers are numbers; `accuracy` is the mean of the reward
    `math` over the same completions."""
    tasks = read_tasks(config.data, limit=config.limit)
    sampling = SamplingConfig(n=1, max_tokens=config.max_tokens, temperature=0.0)
    evaluation = evaluate(
        engine,
        tokenizer,
        tasks,
        sampling=sampling,
        context=config.context,
        template=config.template,
        verifier=make_verifier("gsm8k"),
    )
    write_json_lines(config.out / f"accuracy_step_{step}.jsonl", (asdict(item) for item in evaluation.items))
    found = evaluation.accuracy
    return {
        "accuracy": found.accuracy,
        "accuracy_low": found.low,
        "accuracy_high": found.high,
        "accuracy_strict": found.strict_accuracy,
        "accuracy_unanswered": found.unanswered / found.n,
        "accuracy_truncated": found.truncated / found.n,
    }


def mt_bench_answers(
    engine: RolloutEngine, tokenizer: Tokenizer, config: EvaluationConfig, *, step: int
) -> Mapping[str, float]:
    """Answers to MT-Bench's questions (from the folder `config.data`), as those of a model `step_N`, in `config.out`.

    `align-eval mt-bench judge --out OUT` grades them later, without holding up the training.
    """
    bench = load_bench(config.data, limit=config.limit)
    folder, model = Folder(config.out), f"step_{step}"
    template = resolve_template(tokenizer, config.template)
    settings = AnswerSettings(
        source=f"training step {step}",
        template=template,
        template_hash=template_hash(tokenizer, template),
        max_tokens=config.max_tokens,
    )
    with Store(folder.answer_store(model), KEY_FIELDS) as store:
        sheet = AnswerSheet(model, bench.questions, settings, store)
        answer_with_engine(engine, tokenizer, sheet, context=config.context)
        write_answers(folder.answers(model), sheet.answers())
        summary = sheet.summary()
        write_json(folder.answer_summary(model), summary)
        records = [record for question in bench.questions for record in sheet.records(question)]
    tokens = [int(str(record["completion_tokens"])) for record in records]
    return {
        "mt_bench_tokens": sum(tokens) / len(tokens),
        "mt_bench_truncated": sum(record["finish_reason"] == "length" for record in records) / len(records),
        "mt_bench_empty": sum(not record["text"] for record in records) / len(records),
    }


_conforms: tuple[Evaluation, ...] = (accuracy, mt_bench_answers)
