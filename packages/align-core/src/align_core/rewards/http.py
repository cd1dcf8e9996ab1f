"""Reward by a server: POST {"prompts", "completions", "columns"} as JSON, a list of scores comes back."""

import json
import os
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence

from align_core.config import ScoringConfig
from align_core.contracts import RewardFunction
from align_core.errors import ConfigError, DataError
from align_core.rewards.answers import read_scores
from align_core.types import Score

_SHOWN = 500  # characters of a server's refusal
_MOST = 64 << 20  # bytes read of an answer


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """The token is for `scoring.url` alone, and a redirected POST would arrive as a GET without its body."""

    def redirect_request(self, *_: object) -> None:
        """None: the redirect is an error."""


_OPENER = urllib.request.build_opener(_NoRedirect)


class HttpReward:
    """Asks `scoring.url`."""

    def __init__(self, scoring: ScoringConfig) -> None:
        """Raises ConfigError without an address or without the token that it asks for."""
        check_address("http", scoring)
        self._scoring = scoring

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], columns: Mapping[str, Sequence[object]]
    ) -> Sequence[Score]:
        """See `RewardFunction`; DataError where the server fails or answers in another form."""
        if not completions:
            return []
        body = {"prompts": list(prompts), "completions": list(completions), "columns": dict(columns)}
        answer = post(self._scoring.url, body, self._scoring)
        try:
            return read_scores(answer, count=len(completions))
        except ValueError as error:
            raise DataError(f"{self._scoring.url}: {error}") from error


def check_address(name: str, scoring: ScoringConfig) -> None:
    """Raises ConfigError unless `scoring` holds an http address, and its token where one is named."""
    if not scoring.url.startswith(("http://", "https://")):
        raise ConfigError(f"reward {name!r} needs an address; set scoring.url to http(s)://..., got {scoring.url!r}")
    if scoring.key_variable and not os.environ.get(scoring.key_variable):
        raise ConfigError(f"scoring.key_variable names {scoring.key_variable!r}, which the environment does not hold")


def post(url: str, body: Mapping[str, object], scoring: ScoringConfig) -> object:
    """The JSON that `url` answers with; DataError that says why there is none, never with the token."""
    headers = {"Content-Type": "application/json"}
    if scoring.key_variable:
        headers["Authorization"] = f"Bearer {os.environ[scoring.key_variable]}"
    request = urllib.request.Request(url, data=json.dumps(body).encode(), headers=headers)
    try:
        with _OPENER.open(request, timeout=scoring.timeout) as response:
            return json.loads(response.read(_MOST))
    except urllib.error.HTTPError as error:
        with error:
            reason = error.read(_SHOWN).decode(errors="replace")
        if target := error.headers.get("Location"):
            reason = f"it points to {target!r}; redirects are not followed, so set scoring.url to the final address"
        raise DataError(f"{url} refused with status {error.code}: {reason}") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{url} gave no scores: {error}") from error


_conforms: type[RewardFunction] = HttpReward
