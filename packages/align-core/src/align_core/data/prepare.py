"""`align data prepare`: the stages' files from public originals that the user has downloaded."""

import argparse
import gzip
import json
import logging
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from io import BufferedReader
from pathlib import Path

from align_core.atomic import new_directory
from align_core.data.json_text import parse_json
from align_core.data.marks import marked_rows
from align_core.data.sharegpt import read_sharegpt, sharegpt_files
from align_core.errors import DataError
from align_core.tutorial.additions import write_additions

logger = logging.getLogger(__name__)

Row = dict[str, str]

_TAG = "\n\nAssistant:"
_CALCULATION = re.compile(r"<<[^<>]*>>")  # GSM8K's calculator notes, which people do not write
_FINAL = re.compile(r"####\s*-?\d[\d,]*\s*\Z")


def main(words: Sequence[str]) -> int:
    """`align data prepare {additions,gsm8k,hh,sharegpt} [--source FILE] --out DIR`."""
    parser = argparse.ArgumentParser(prog="align data", description=__doc__)
    parser.add_argument("action", choices=["prepare"])
    parser.add_argument("dataset", choices=["additions", *sorted([*_DATASETS, _SHAREGPT])])
    parser.add_argument("--source", type=Path, help="the original file (JSON lines, .gz is fine); none for additions")
    parser.add_argument("--out", type=Path, required=True, help="directory to write; must be new or empty")
    parser.add_argument("--held_out", type=int, default=200, help="records kept for testing (default 200)")
    parser.add_argument("--seed", type=int, default=0, help="which records are held out (default 0)")
    options = parser.parse_args(list(words))
    if options.dataset == "additions":
        write_additions(options.out, seed=options.seed, num_test=options.held_out)
        return 0
    if options.source is None:
        raise DataError(f"{options.dataset} is prepared from its original file; give --source FILE")
    prepare(options.dataset, options.source, options.out, held_out=options.held_out, seed=options.seed)
    return 0


def prepare(dataset: str, source: Path, out: Path, *, held_out: int, seed: int) -> None:
    """Writes OUT/{sft,preferences,prompts,test,...}.jsonl, whatever the data set has, all or nothing.

    Raises:
        DataError: the source is missing, a record is not what the data set has, too few are there to hold some out, or
            `out` is taken.
    """
    rows = read_sharegpt(source) if dataset == _SHAREGPT and source.is_file() else list(_read(source))
    if not 0 < held_out < len(rows):
        raise DataError(f"{source} has {len(rows)} records; held_out must lie between 1 and one less, got {held_out}")
    rng = random.Random(seed)
    rng.shuffle(rows)
    if dataset == _SHAREGPT:
        files: Mapping[str, Iterable[Mapping[str, object]]] = with_marks(
            sharegpt_files(rows[held_out:], rows[:held_out])
        )
    else:
        files = with_marks(_DATASETS[dataset](rows[held_out:], rows[:held_out], rng))
    with new_directory(out) as directory:
        for name, records in files.items():
            text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
            (directory / f"{name}.jsonl").write_text(text, encoding="utf-8")


def with_marks(files: Mapping[str, Iterable[Mapping[str, object]]]) -> dict[str, Iterable[Mapping[str, object]]]:
    """The files, and for each one of pairs the same responses one by one, marked as wanted or not."""
    names = {"preferences": "marked", "test_preferences": "test_marked"}
    marked = {names[name]: marked_rows(rows) for name, rows in files.items() if name in names}
    return {**files, **marked}


def _gsm8k(train: Sequence[Row], test: Sequence[Row], rng: random.Random) -> Mapping[str, Iterable[Row]]:
    """Questions with worked solutions; preferences set a right solution against one with a spoilt result."""
    for row in (*train, *test):
        _check_gsm8k(row)
    return {
        "sft": [{"prompt": r["question"], "response": _CALCULATION.sub("", r["answer"])} for r in train],
        "preferences": [_spoilt_pair(r, rng) for r in train],
        "prompts": [{"prompt": r["question"], "answer": r["answer"]} for r in train],
        "test": [{"prompt": r["question"], "answer": r["answer"]} for r in test],
        "test_preferences": [_spoilt_pair(r, rng) for r in test],
    }


def _hh(train: Sequence[Row], test: Sequence[Row], rng: random.Random) -> Mapping[str, Iterable[Row]]:
    """Dialogues in the Human/Assistant template; the last assistant's turn is the response."""
    del rng  # nothing is drawn here
    train_pairs, test_pairs = _dialogue_pairs(train), _dialogue_pairs(test)
    return {
        "sft": [{"prompt": r["prompt"], "response": r["chosen"]} for r in train_pairs],
        "preferences": train_pairs,
        "prompts": [{"prompt": r["prompt"]} for r in train_pairs],
        "test": [{"prompt": r["prompt"]} for r in test_pairs],
        "test_preferences": test_pairs,
    }


def _check_gsm8k(row: Row) -> None:
    if "question" not in row or not _FINAL.search(row.get("answer", "")):
        raise DataError(f"not a GSM8K record: {row!r}; expected 'question' and an 'answer' that ends in '#### NUMBER'")


def _spoilt_pair(row: Row, rng: random.Random) -> Row:
    """A solution, and the same with another result: up to a quarter off, at least one."""
    solution = _CALCULATION.sub("", row["answer"])
    steps, _, number = solution.rpartition("####")
    result = int(number.replace(",", ""))
    wrong = result + rng.choice((-1, 1)) * rng.randint(1, max(2, abs(result) // 4))
    return {"prompt": row["question"], "chosen": solution, "rejected": f"{steps}#### {wrong}"}


def _dialogue_pairs(rows: Sequence[Row]) -> list[Row]:
    """Pairs of answers; records with an empty answer or answers to two prompts are left out and counted in the log."""
    pairs, empty, apart = [], 0, 0
    for row in rows:
        prompt, tag, chosen = row.get("chosen", "").rpartition(_TAG)
        prompt_of_rejected, tag_of_rejected, rejected = row.get("rejected", "").rpartition(_TAG)
        if not tag or not tag_of_rejected:
            raise DataError(f"not an HH record: {row!r}; expected dialogues 'chosen' and 'rejected' with {_TAG!r}")
        if not chosen.strip() or not rejected.strip():
            empty += 1
        elif prompt != prompt_of_rejected:
            apart += 1
        else:
            pairs.append({"prompt": prompt + tag, "chosen": chosen, "rejected": rejected})
    for number, why in ((empty, "in which an answer is empty"), (apart, "whose answers follow different prompts")):
        if number:
            logger.warning("left out %d of %d records, %s", number, len(rows), why)
    return pairs


def _read(source: Path) -> Iterator[Row]:
    if not source.is_file():
        raise DataError(f"source file {str(source)!r} does not exist")
    with _open(source) as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = parse_json(line)
            except DataError as error:
                raise DataError(f"{source}, line {number}: {error}") from error
            if not isinstance(row, dict) or not all(isinstance(value, str) for value in row.values()):
                raise DataError(f"{source}, line {number}: expected an object of texts")
            yield row


def _open(source: Path) -> gzip.GzipFile | BufferedReader:
    return gzip.open(source, "rb") if source.suffix == ".gz" else source.open("rb")


_SHAREGPT = "sharegpt"
_DATASETS: Mapping[str, Callable[[Sequence[Row], Sequence[Row], random.Random], Mapping[str, Iterable[Row]]]] = {
    "gsm8k": _gsm8k,
    "hh": _hh,
}
