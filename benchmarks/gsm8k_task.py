"""GSM8K as this folder's GRPO benchmarks ask it: one prompt with worked examples, two gradings, for every trainer.

As a module of rewards it is given to `align grpo` by name: `--reward "math=1,benchmarks/gsm8k_task.py:strict=0.5"`.
"""

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from align_core.types import Score
from align_eval.accuracy.math import MathReward, grade, parse_gold

STRICT_WEIGHT = 0.5
INSTRUCTION = (
    "{question}\nReason step by step, then end with a last line of the form '#### N', where N is the final number."
)
# Without worked examples Qwen2.5-Coder-0.5B boxes its answers and never samples the form; an example of the last line
# alone it copies instead of reasoning.
EXAMPLES = (
    (
        "Mia earns $12 an hour and works 5 hours on each of 4 days. She spends 25% of what she earns on a bicycle. "
        "How much money does she keep?",
        "First find how many hours Mia works by multiplying the days by the hours of a day: "
        "4 days * 5 hours/day = 20 hours\n"
        "Then multiply the hours by what she earns in an hour to find what she earns in all: "
        "20 hours * $12/hour = $240\n"
        "Then multiply that by 25% to find the price of the bicycle: $240 * 25% = $60\n"
        "Then subtract the price of the bicycle from what she earned to find what she keeps: $240 - $60 = $180\n"
        "#### 180",
    ),
    (
        "A bakery fills 6 trays with 24 rolls each. A third of the rolls are sold before noon, and the rest are packed "
        "in bags of 8 rolls. How many bags does the bakery fill?",
        "First find the total number of rolls by multiplying the trays by the rolls on a tray: "
        "6 trays * 24 rolls/tray = 144 rolls\n"
        "Then divide that number by 3 to find how many rolls are sold before noon: 144 rolls / 3 = 48 rolls\n"
        "Then subtract the rolls that are sold from the total to find how many are left: "
        "144 rolls - 48 rolls = 96 rolls\n"
        "Then divide the rolls that are left by the rolls in a bag to find the number of bags: "
        "96 rolls / 8 rolls/bag = 12 bags\n"
        "#### 12",
    ),
)


def prompt(question: str) -> list[dict[str, str]]:
    """The turns before the answer: two worked examples, then the question."""
    turns = []
    for example, answer in EXAMPLES:
        turns += [
            {"role": "user", "content": INSTRUCTION.format(question=example)},
            {"role": "assistant", "content": answer},
        ]
    return [*turns, {"role": "user", "content": INSTRUCTION.format(question=question)}]


def read(path: Path, *, limit: int | None = None, seed: int | None = None) -> list[dict[str, Any]]:
    """Records {"prompt", "answer"} of an original GSM8K file, shuffled where a seed is given."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if seed is not None:
        random.Random(seed).shuffle(rows)
    return [{"prompt": prompt(row["question"]), "answer": row["answer"]} for row in rows[:limit]]


def write(records: Sequence[Mapping[str, Any]], path: Path) -> Path:
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
