"""The process behind `equivalence`: reads pairs as JSON lines, writes verdicts. Started with -m, never imported.

Only LaTeX is parsed (by a grammar); math-verify's parser of bare expressions, which evaluates Python, stays off.
"""

import json
import logging
import resource
import sys

_MEMORY_BYTES = 4 * 2**30  # of address space; a power tower would otherwise take the machine's


def main() -> None:
    """Answers until its input ends."""
    from math_verify import LatexExtractionConfig, parse, verify  # noqa: PLC0415, the optional dependency

    logging.disable(logging.CRITICAL)  # it warns that its own timeouts are off, which is why this process exists
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))

    def value(text: str) -> list[object]:
        wrapped = f"$\\boxed{{{text}}}$"
        return list(parse(wrapped, [LatexExtractionConfig()], parsing_timeout=None))

    value("\\frac{1}{2}")  # the first parse takes up to a second
    _say("ready")
    for line in sys.stdin:
        pair = json.loads(line)
        note = ""
        try:
            gold, answer = value(pair["gold"]), value(pair["answer"])
            equal = bool(gold and answer) and bool(verify(gold, answer, timeout_seconds=None))
            if not gold:
                note = "math-verify cannot read the gold answer"
        except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
            equal, note = False, f"{type(error).__name__} in math-verify"
        _say(json.dumps({"equal": equal, "note": note}))


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
