"""Compares align-eval's files and compatible figures with FastChat's own code, on files full of traps.

    pip install --no-deps --target fschat fschat==0.2.36
    python benchmarks/mt_bench_fastchat.py --fastchat fschat --out DIR

Writes random judgments in FastChat's format (unreadable ones, repeated runs, errors), lets FastChat's show_result.py
print its tables, and compares every number with align-eval's compatible ones; writes answers and judgments with
align-eval and loads them with FastChat's loaders; compares the two rating parsers on traps. Exit status 1 if anything
differs.
"""

import argparse
import ast
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from align_eval.mt_bench.fastchat import Answer, read_pairs, read_single, write_answers, write_pairs, write_single
from align_eval.mt_bench.pairs import fastchat_win_rates
from align_eval.mt_bench.single import fastchat_means
from align_eval.mt_bench.verdicts import compatible_rating

_TEXTS = ["Rating: [[{}]]", "[[{}.5]]", "$ERROR$", "", "[[rating: 3]]", "[[10/10]]", "as in [1]. Rating: 8", "[[11]]"]
_TRAPS = [
    "[[8.5]]",
    "[[ 8 ]]",
    "Rating: 8",
    "a[0] is ok ... Rating 9",
    "[[5]] then final [[9]]",
    "[[0]]",
    "[[7]",
    "[[]]",
]


def main() -> int:
    """Runs the three comparisons and writes fastchat.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fastchat", type=Path, required=True, help="folder into which fschat was installed")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    sys.path.insert(0, str(arguments.fastchat))
    found = {
        "parser": _compare_parsers(),
        "single": _compare_single(arguments.fastchat, arguments.out),
        "pair": _compare_pairs(arguments.fastchat, arguments.out),
        "loaders": _compare_loaders(arguments.out),
    }
    (arguments.out / "fastchat.json").write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))
    return int(any(part["different"] for part in found.values()))


def _compare_parsers() -> dict[str, Any]:
    """FastChat's patterns with its own reading of what they match."""
    from fastchat.llm_judge.common import one_score_pattern, one_score_pattern_backup  # noqa: PLC0415

    different = []
    texts = [*_TRAPS, *(text.format(7) for text in _TEXTS)]
    for text in texts:
        match = re.search(one_score_pattern, text) or re.search(one_score_pattern_backup, text)
        theirs = ast.literal_eval(match.groups()[0]) if match else -1
        ours = compatible_rating(text)
        if theirs != (-1 if ours is None else ours):
            different.append([text, theirs, ours])
    return {"compared": len(texts), "different": different}


def _compare_single(fastchat: Path, out: Path) -> dict[str, Any]:
    draw = random.Random(7)
    rows = []
    for model in ("a", "b", "c"):
        for run in range(2 if model == "b" else 1):
            for question in range(81, 161):
                for turn in (1, 2):
                    text = draw.choice(_TEXTS).format(draw.randint(1, 9))
                    score = compatible_rating(text)
                    rows.append(
                        {
                            "question_id": question,
                            "model": model,
                            "judge": ["gpt-4", "single-v1"],
                            "user_prompt": "p",
                            "judgment": text,
                            "score": -1 if score is None else score,
                            "turn": turn,
                            "tstamp": float(run),
                        }
                    )
    path = out / "gpt-4_single.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    printed = _show_result(fastchat, "single", path)
    means = fastchat_means(read_single([path]))
    ours = {f"{model} {name}": f"{value:.6f}" for model, by_name in means.items() for name, value in by_name.items()}
    different = [name for name, value in ours.items() if value not in printed]
    return {"rows": len(rows), "compared": len(ours), "different": different}


def _compare_pairs(fastchat: Path, out: Path) -> dict[str, Any]:
    draw = random.Random(8)
    winners = ["model_1", "model_1", "model_2", "tie", "error"]
    rows = []
    for model_1, model_2 in (("a", "b"), ("a", "c"), ("b", "c")):
        for question in range(81, 161):
            for turn in (1, 2):
                names = {"model_1": model_1, "model_2": model_2}
                games = {f"g{game}_winner": draw.choice(winners) for game in (1, 2)}
                texts = {f"g{game}_{part}": "x" for game in (1, 2) for part in ("user_prompt", "judgment")}
                rest = {"judge": ["gpt-4", "pair-v2"], "turn": turn, "tstamp": 0.0}
                rows.append({"question_id": question, **names, **games, **texts, **rest})
    path = out / "gpt-4_pair.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    printed = _show_result(fastchat, "pairwise-all", path)
    different, compared = [], 0
    for rate in fastchat_win_rates(read_pairs([path])):
        numbers = [rate.win_rate, rate.loss_rate, rate.win_rate_adjusted]
        shown = [str(rate.wins), str(rate.losses), str(rate.ties), *(f"{number:.6f}" for number in numbers)]
        compared += len(shown)
        line = next(line.split() for line in printed.splitlines() if line.split()[:1] == [rate.model])
        if [_padded(value) for value in line[1:]] != [_padded(value) for value in shown]:
            different.append([rate.model, line, shown])
    return {"rows": len(rows), "compared": compared, "different": different}


def _padded(value: str) -> str:
    """pandas leaves zeros at the end away when a whole column has them."""
    return f"{float(value):.6f}"


def _compare_loaders(out: Path) -> dict[str, Any]:
    """What align-eval writes, FastChat reads: answers, and both kinds of judgments."""
    from fastchat.llm_judge import common  # noqa: PLC0415

    (out / "model_answer").mkdir(exist_ok=True)
    answers = [Answer(question_id=q, model="m", turns=("one", "two \u00e9"), tstamp=1.0) for q in range(81, 161)]
    write_answers(out / "model_answer" / "m.jsonl", answers)
    write_single(out / "written_single.jsonl", read_single([out / "gpt-4_single.jsonl"]))
    write_pairs(out / "written_pair.jsonl", read_pairs([out / "gpt-4_pair.jsonl"]))
    loaded = common.load_model_answers(str(out / "model_answer"))
    single = common.load_single_model_judgments(str(out / "written_single.jsonl"))
    pairs = common.load_pairwise_model_judgments(str(out / "written_pair.jsonl"))
    different: list[Any] = [q for q in range(81, 161) if loaded["m"][q]["choices"][0]["turns"] != ["one", "two \u00e9"]]
    counts = {
        "answers": len(loaded["m"]),
        "single": sum(map(len, single.values())),
        "pair": sum(map(len, pairs.values())),
    }
    if counts != {"answers": 80, "single": 240, "pair": 240}:  # questions x models, questions x pairs
        different.append(counts)
    return {**counts, "different": different}


def _show_result(fastchat: Path, mode: str, path: Path) -> str:
    script = fastchat / "fastchat" / "llm_judge" / "show_result.py"
    command = [sys.executable, str(script), "--mode", mode, "--input-file", str(path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"})
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
