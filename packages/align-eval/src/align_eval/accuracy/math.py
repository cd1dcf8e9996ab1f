r"""Grades answers that are numbers, in the style of GSM8K: finds the answer in the text, compares it as a number.

Knows nothing of models, files or batches. Where the answer is looked for, first hit decides:
    hash         the last `#### N` (GSM8K's own mark; the only place in strict grading)
    boxed        the last \boxed{N}
    answer is    the last `answer is N` or `answer: N`
    last number  the last number of the text
A marked answer names one number or it is wrong: `#### 10^3`, `\boxed{3, 5}` and `answer: 1:30` are not 10, 3 and 1,
because a policy trained on this reward finds every generous reading.

Source of the mark and of the gold format: Cobbe et al. 2021, arXiv:2110.14168.
"""

import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Literal, NamedTuple

from align_core.contracts import RewardFunction
from align_core.errors import DataError, choices
from align_core.types import Score
from align_eval.accuracy.verdict import Verdict

Method = Literal["hash", "boxed", "answer is", "last number", "none"]

_MAX_DIGITS = 100  # of a number; longer ones are noise, and int() raises beyond 4300 digits
_DIGITS = r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
# No sign after a digit: "10-3" ends in 3, not in -3.
_NUMBER = re.compile(rf"(?<![\w.])-?{_DIGITS}(?:/[0-9]+)?")
# What may follow a number that begins an answer: the end, or words (a unit, a remark) that do not go on calculating.
_CLOSES = re.compile(
    r"[.!?,;]*\s*(?:\Z|(?!(?:to|or|and|x|times|plus|minus|over)\s*-?[.0-9]|[a-z]+[0-9])[a-z(\"'])", re.IGNORECASE
)
_WORD = r"[^\W\d_]+(?:['/.-][^\W\d_]+)*[\"':]*"
# One number among plain words, none of which touches it: `7x`, `5\pi` and `[3,` are other values than 7, 5 and 3.
_AMONG_WORDS = re.compile(
    rf"\s*(?:{_WORD}[.,;?]*\s+)*[€£]?([+-]?{_DIGITS}(?:/[0-9]+)?)(?:[.,;:?]*\s+{_WORD})*[\s.,;:?]*"
)
_SPACED_SIGN = re.compile(r"\A\s*-\s+(?=[.0-9])")
_HEADING = re.compile(r"[.):]\s*[a-z]", re.IGNORECASE)  # "#### 1. First step"
_HASH = re.compile(r"####+[ \t]*([^\n#]*)")
_BOXED = re.compile(r"\\boxed\s*\{")
_ANSWER_IS = re.compile(r"answer\s*(?:is|:|=)\s*:?[ \t]*([^\n]*?)(?=\.\s|\.?\s*(?:\n|\Z))", re.IGNORECASE)
_DRESSING = (
    (re.compile("[\u2212\u2013]"), "-"),  # the minus sign and the en dash
    (re.compile(r"\*\*|__|\\[,!]|\\(?:left|right)\b"), ""),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\(?:text|textbf|mathrm|mathbf|mbox)\s*\{([^{}]*)\}"), r" \1 "),
    # Not beside a digit: 2\frac{1}{2} is not 21/2.
    (re.compile(r"(?<![0-9])\\[dt]?frac\s*\{\s*(-?[0-9]+)\s*\}\s*\{\s*([0-9]+)\s*\}(?![0-9])"), r"\1/\2"),
    (re.compile(r"-\s*\\?\$\s*(?=[0-9.])"), "-"),
    (re.compile(r"\\?[$%]|\\[()\[\]; ]|\^\{?\\circ\}?|~"), " "),
)


class Extraction(NamedTuple):
    """What was read out of a text, and where."""

    number: Fraction | None
    """The answer's value; None when the text names none."""
    text: str
    """The words that were read as the answer."""
    method: Method
    """Which rule found them."""


def parse_number(text: str) -> Fraction | None:
    r"""The one number that `text` names, exactly; None if it names none or several, or calculates.

    `$`, `%`, commas between thousands, words such as units and a closing period are ignored; of an equation the right
    side counts: `x = \$1,200.50` is 2401/2; `3, 5`, `10^3`, `\sqrt{16}` and `x >= 3` are nothing.
    """
    left, _, right = _undress(text).rpartition("=")
    found = _AMONG_WORDS.fullmatch(_SPACED_SIGN.sub("-", right))
    return None if found is None or left.endswith(("<", ">", "!")) else _value(found.group(1))


def whole_number(text: str) -> Fraction | None:
    r"""The number that `text` is, and not only names; a fraction of two whole ones counts, as a/b or \frac{a}{b}."""
    number = _NUMBER.fullmatch(_undress(text).strip())
    return None if number is None else _value(number.group())


def extract(text: str, *, strict: bool = False) -> Extraction:
    """The answer that `text` gives, by the rules above; `strict` looks at `#### N` only."""
    clean = _undress(text)
    for found in (_hash(clean), None if strict else _boxed(text), None if strict else _answer_is(clean)):
        if found is not None:
            return found
    if not strict and (numbers := _NUMBER.findall(clean)):
        return Extraction(_value(numbers[-1]), numbers[-1], "last number")
    return Extraction(None, "", "none")


def parse_gold(answer: object) -> Fraction | None:
    """The right answer of a record: a number, a text that names one, or a full solution ending in `#### N`."""
    if isinstance(answer, bool) or not isinstance(answer, int | float | str):
        return None
    text = str(answer)
    return extract(text, strict=True).number if "####" in text else parse_number(text)


def grade(completion: str, gold: Fraction) -> Verdict:
    """Whether `completion` gives the answer `gold`, and what was read out of it. Equality is exact: 0.33 is not 1/3.

    Both gradings look at `#### N` first, so one reading serves both: strict grading counts it only if found there.
    """
    found = extract(completion)
    right = found.number == gold
    return Verdict(strict=right and found.method == "hash", flexible=right, extracted=found.text, method=found.method)


class MathReward:
    """1.0 for a completion whose answer equals the record's column `answer`, else 0.0 (`align.rewards`: `math`)."""

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], columns: Mapping[str, Sequence[object]]
    ) -> list[Score]:
        """One score a completion; a record without a usable gold answer scores None and says why.

        Raises:
            DataError: the data has no column `answer`, or the lists differ in length.
        """
        if "answer" not in columns:
            raise DataError(f"reward 'math' needs the column 'answer'; the data has {choices(columns)}")
        answers = columns["answer"]
        if not len(prompts) == len(completions) == len(answers):
            raise DataError(
                f"reward 'math' got {len(prompts)} prompts, {len(completions)} completions and {len(answers)} answers; "
                "they must be equally many"
            )
        return [_score(completion, answer) for completion, answer in zip(completions, answers)]


def _score(completion: str, answer: object) -> Score:
    gold = parse_gold(answer)
    if gold is None:
        return Score(value=None, error=f"the gold answer {str(answer)[:80]!r} names no number")
    verdict = grade(completion, gold)
    return Score(value=float(verdict.flexible), extracted=verdict.extracted)


def _undress(text: str) -> str:
    """`text` without LaTeX, Markdown, currency and percent signs around its numbers."""
    for pattern, replacement in _DRESSING:
        text = pattern.sub(replacement, text)
    return text


def _value(number: str) -> Fraction | None:
    """The value of what `_NUMBER` matched; None for a zero denominator or absurd length."""
    if len(number) > _MAX_DIGITS:
        return None
    numerator, _, denominator = number.replace(",", "").partition("/")
    divisor = Fraction(denominator or 1)
    return Fraction(numerator) / divisor if divisor else None


def _leading(text: str) -> tuple[Fraction | None, str] | None:
    """Value and words of an answer that begins with a number; None when it does not begin with one.

    The value is None when what follows makes the number part of something else (arithmetic, a list, a time).
    """
    if _NUMBER.match(text) is None:
        return None
    right = _SPACED_SIGN.sub("-", text.rpartition("=")[2].strip())
    match = _NUMBER.match(right)
    if match is None or not _CLOSES.match(right, match.end()):
        return None, text.strip()
    return _value(match.group()), match.group()


def _hash(clean: str) -> Extraction | None:
    for found in reversed(_HASH.findall(clean)):
        content = _SPACED_SIGN.sub("-", found)
        number = _NUMBER.match(content)
        if number is None or _HEADING.match(content, number.end()):
            continue
        value, words = _leading(content) or (None, "")
        return Extraction(value, words, "hash")
    return None


def _boxed(text: str) -> Extraction | None:
    marks = list(_BOXED.finditer(text))
    if not marks:
        return None
    content = _braced(text, marks[-1].end())
    if not any(character.isdigit() for character in content):
        return None
    return Extraction(parse_number(content), content.strip(), "boxed")


def _braced(text: str, start: int) -> str:
    """The text from `start` to the brace that closes the one before it (or to the end)."""
    depth = 1
    for position in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[start:position]
    return text[start:]


def _answer_is(clean: str) -> Extraction | None:
    phrases = _ANSWER_IS.findall(clean)
    if not phrases:
        return None
    if found := _leading(_SPACED_SIGN.sub("-", phrases[-1])):
        return Extraction(*found, "answer is")
    number = parse_number(phrases[-1])
    return None if number is None else Extraction(number, phrases[-1].strip(), "answer is")


_conforms: type[RewardFunction] = MathReward
