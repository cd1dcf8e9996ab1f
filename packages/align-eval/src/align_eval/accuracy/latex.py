r"""Grades answers in LaTeX, in the style of MATH: the last \boxed{...} as text, as a number, or by math-verify.

Knows nothing of models or files. Text is compared after a normalisation that only rewrites spelling (`\dfrac` for
`\frac`, `\frac12`, spaces, units in \text, a full stop), so strings that compare equal mean the same. math-verify, if a
pool of it is given, is asked about the rest: `x^2+2x+1` and `(x+1)^2`.

Source of the format: Hendrycks et al. 2021, arXiv:2103.03874; gold answers are the boxed part of `solution`.
"""

import re
from collections.abc import Mapping, Sequence

from align_core.contracts import RewardFunction
from align_core.errors import DataError, choices
from align_core.types import Score
from align_eval.accuracy.equivalence import EquivalencePool
from align_eval.accuracy.math import whole_number
from align_eval.accuracy.verdict import Verdict

_BOXED = re.compile(r"\\(?:boxed|fbox)\s*(\{|(?=\S))")
_ANSWER_IS = re.compile(r"answer\s*(?:is|:|=)\s*:?\s*([^\n]+)", re.IGNORECASE)
_SPELLINGS = (
    (re.compile(r"\\[dtc]frac"), r"\\frac"),
    (re.compile(r"\\(?:left|right|bigl?|bigr?|Bigl?|Bigr?)(?![a-zA-Z])"), ""),
    (re.compile(r"\\[,!;: ]|~|\\q?quad"), ""),
    (re.compile(r"\^\{?\\circ\}?|\\%|%|\\\$|\$"), ""),
    (re.compile(r"(?<=[0-9)}])\s*\\(?:text|mbox|mathrm)\s*\{[^{}0-9]*\}(?:\s*\^\s*\{?[23]\}?)?\s*\Z"), ""),  # a unit
    (re.compile(r"\\(?:text|textbf|mbox|mathrm|mathbf|textit)\s*\{([^{}]*)\}"), r"\1"),
    (re.compile(r"\\frac\s*([0-9])\s*([0-9])"), r"\\frac{\1}{\2}"),
    (re.compile(r"\\frac\s*([0-9])\s*(?=\{)"), r"\\frac{\1}"),
    (re.compile(r"\\frac(\{[^{}]*\})\s*([0-9])"), r"\\frac\1{\2}"),
    (re.compile(r"\\sqrt\s*([0-9a-zA-Z])"), r"\\sqrt{\1}"),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"(?<![0-9])\.(?=[0-9])"), "0."),
    (re.compile(r"\s+"), ""),
)
_NAME = re.compile(r"\A(?:[a-zA-Z][a-zA-Z0-9']?)?=")


def gold_of(answer: object) -> str | None:
    r"""The gold answer of a record: the last \boxed of a solution, or a short answer as it stands; None if unusable."""
    if isinstance(answer, bool) or not isinstance(answer, int | float | str):
        return None
    text = str(answer)
    boxed = last_boxed(text)
    found = text if boxed is None and "\n" not in text.strip() else boxed
    return found.strip() or None if found is not None else None


def last_boxed(text: str) -> str | None:
    r"""What the last \boxed{...} of `text` holds; None when there is none, or its brace never closes."""
    marks = list(_BOXED.finditer(text))
    if not marks:
        return None
    start = marks[-1].end()
    if not marks[-1].group(1):  # "\boxed 7"
        return re.match(r"\S*?(?=[$.\s]|\Z)", text[start:]).group()  # type: ignore[union-attr]
    depth = 1
    for position in range(start, len(text)):
        escaped = position > 0 and text[position - 1] == "\\"
        depth += 0 if escaped else {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[start:position]
    return None


def normalise(text: str) -> str:
    r"""One spelling of a LaTeX answer: `\dfrac12 \text{ cm}` becomes `\frac{1}{2}`, `x = 5.` becomes `5`."""
    text = text.strip().strip("$").strip().rstrip(".")
    for pattern, replacement in _SPELLINGS:
        text = pattern.sub(replacement, text)
    return _NAME.sub("", text)


def extract(completion: str) -> tuple[str, str]:
    r"""The answer and where it was found: the last \boxed, else what follows the last "answer is", else nothing."""
    boxed = last_boxed(completion)
    if boxed is not None:
        return boxed.strip(), "boxed"
    phrases = _ANSWER_IS.findall(completion)
    if phrases:
        words = re.sub(r"\.\s.*\Z|\.\Z", "", phrases[-1].strip())
        return words.strip().strip("*").strip(), "answer is"
    return "", "none"


def equal(answer: str, gold: str) -> bool:
    """Whether the two are the same text after normalisation, or both are numbers, and the same one."""
    left, right = normalise(answer), normalise(gold)
    if left == right:
        return True
    number = whole_number(right)
    return number is not None and whole_number(left) == number


def grade(completions: Sequence[str], golds: Sequence[str], *, pool: EquivalencePool | None = None) -> list[Verdict]:
    r"""One verdict a completion; strict ones want \boxed. `pool` decides what spelling and numbers leave open."""
    found = [extract(completion) for completion in completions]
    same = [bool(answer) and equal(answer, gold) for (answer, _), gold in zip(found, golds, strict=True)]
    notes = [""] * len(found)
    open_ones = [i for i, (answer, _) in enumerate(found) if answer and not same[i]] if pool else []
    if pool and open_ones:
        for i, verdict in zip(open_ones, pool.compare([(golds[i], found[i][0]) for i in open_ones])):
            same[i], notes[i] = verdict
    return [
        Verdict(strict=right and method == "boxed", flexible=right, extracted=answer, method=method, note=note)
        for right, (answer, method), note in zip(same, found, notes)
    ]


class MathVerifyReward:
    r"""1.0 for a completion whose LaTeX answer means what the column `answer` says (`align.rewards`: `math-verify`).

    Needs `align-eval[math]`. `answer` is a short answer or a solution with \boxed, as in MATH.
    """

    def __init__(self, *, workers: int = 2, seconds: float = 10.0) -> None:
        self._pool = EquivalencePool(workers=workers, seconds=seconds)

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], columns: Mapping[str, Sequence[object]]
    ) -> list[Score]:
        """One score a completion; a record without a usable gold answer scores None and says why.

        Raises:
            DataError: the data has no column `answer`.
        """
        if "answer" not in columns:
            raise DataError(f"reward 'math-verify' needs the column 'answer'; the data has {choices(columns)}")
        golds = [gold_of(answer) for answer in columns["answer"]]
        usable = [i for i, gold in enumerate(golds) if gold is not None]
        scores = [
            Score(value=None, error=f"the gold answer {str(answer)[:80]!r} is no short answer and has no \\boxed")
            for answer in columns["answer"]
        ]
        verdicts = grade([completions[i] for i in usable], [golds[i] or "" for i in usable], pool=self._pool)
        for i, verdict in zip(usable, verdicts):
            scores[i] = Score(value=float(verdict.flexible), extracted=verdict.extracted)
        return scores


_conforms: type[RewardFunction] = MathVerifyReward
