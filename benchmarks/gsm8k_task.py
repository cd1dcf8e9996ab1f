"""GSM8K as this folder's GRPO benchmarks ask it: one prompt and two gradings, the same for every trainer.

As a module of rewards it is given to `align grpo` by name: `--reward "math=1,benchmarks/gsm8k_task.py:strict=0.5"`.
"""

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

from align_core.types import Score
from align_eval.accuracy.math import MathReward, grade, parse_gold

STRICT_WEIGHT = 0.5
# An example of the form in the prompt made this model copy the example; the words alone let it reason.
INSTRUCTION = (
    "{question}\nReason step by step, then end with a last line of the form '#### N', where N is the final number."
)


def prompt(question: str) -> str:
    """The user's words for a question."""
    return INSTRUCTION.format(question=question)


def read(path: Path, *, limit: int | None = None, seed: int | None = None) -> list[dict[str, str]]:
    """Records {"prompt", "answer"} of an original GSM8K file, shuffled where a seed is given."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if seed is not None:
        random.Random(seed).shuffle(rows)
    return [{"prompt": prompt(row["question"]), "answer": row["answer"]} for row in rows[:limit]]


def write(records: Sequence[Mapping[str, str]], path: Path) -> Path:
    """The records as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def strict(
    prompts: Sequence[str], completions: Sequence[str], columns: Mapping[str, Sequence[object]]
) -> list[Score | None]:
    """1 where the answer stands in `#### N` and is right."""
    del prompts
    golds = [parse_gold(answer) for answer in columns["answer"]]
    return [
        None if gold is None else Score(value=float(grade(text, gold).strict)) for text, gold in zip(completions, golds)
    ]


def total(prompts: Sequence[str], completions: Sequence[str], answers: Sequence[object]) -> list[float]:
    """The reward of training as plain numbers, for trainers other than ours."""
    columns = {"answer": list(answers)}
    flexible = MathReward()(prompts, completions, columns)
    return [
        float(one.value or 0.0) + STRICT_WEIGHT * float(two.value or 0.0 if two else 0.0)
        for one, two in zip(flexible, strict(prompts, completions, columns))
    ]
