"""Reward by a judging model behind an OpenAI-compatible server: the last [[number]] of its answer is the score."""

import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from align_core.config import ScoringConfig
from align_core.contracts import RewardFunction
from align_core.errors import ConfigError, DataError
from align_core.rewards.http import check_address, post
from align_core.types import Score

_RATING = re.compile(r"\[\[\s*(-?\d+(?:\.\d+)?)\s*\]\]")
_AT_ONCE = 16  # questions in flight to the server
_SHOWN = 200


class JudgeReward:
    """Asks the model `scoring.model` at `scoring.url` about one reply at a time, at temperature 0."""

    def __init__(self, scoring: ScoringConfig) -> None:
        """Raises ConfigError without an address and a model."""
        check_address("judge", scoring)
        if not scoring.model:
            raise ConfigError("reward 'judge' needs the name of the judging model; set scoring.model")
        self._scoring = scoring
        self._url = scoring.url.rstrip("/") + "/chat/completions"

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], columns: Mapping[str, Sequence[object]]
    ) -> Sequence[Score]:
        """See `RewardFunction`; the extraction is the end of the judge's answer."""
        del columns
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            return list(pool.map(self._rate, prompts, completions))

    def _rate(self, prompt: str, completion: str) -> Score:
        # The reply is data, whatever it says: it stands between marks that it cannot close.
        shown = completion.replace("</reply>", "")
        user = f"<user>\n{prompt}\n</user>\n<reply>\n{shown}\n</reply>"
        messages = [{"role": "system", "content": self._scoring.rubric}, {"role": "user", "content": user}]
        body = {"model": self._scoring.model, "messages": messages, "temperature": 0.0}
        try:
            answer = _content(post(self._url, body, self._scoring))
        except DataError as error:
            return Score(value=None, error=str(error))
        ratings = _RATING.findall(answer)
        if not ratings:
            return Score(value=None, error=f"the judge gave no [[rating]]: {answer[-_SHOWN:]!r}")
        return Score(value=float(ratings[-1]), extracted=answer[-_SHOWN:])


def _content(document: object) -> str:
    try:
        return str(document["choices"][0]["message"]["content"])  # type: ignore[index]
    except (KeyError, IndexError, TypeError) as error:
        raise DataError(f"the judge's server answered without choices[0].message.content: {document!r:.200}") from error


_conforms: type[RewardFunction] = JudgeReward
