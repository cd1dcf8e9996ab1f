"""Reward by a server: POST {"prompts", "completions", "columns"} as JSON, a list of scores comes back.

A server that is away or overloaded is waited for; what it refuses is not asked again.
"""

import contextlib
import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence

from align_core.backoff import backoff, retry_after
from align_core.config import ScoringConfig
from align_core.contracts import RewardFunction
from align_core.errors import ConfigError, DataError
from align_core.keys import read_key
from align_core.rewards.answers import NoAnswer, read_scores
from align_core.types import Score

_SHOWN = 500  # characters of a server's refusal
_MOST = 64 << 20  # bytes read of an answer
_MOST_OF_REFUSAL = 64 << 10
_PASSING = frozenset({408, 425, 429})  # and those above 501; a 500 may be about what was asked
_FIRST_WAIT = 0.5  # seconds
_LONGEST_WAIT = 10.0


class Away(DataError):
    """A server cannot be reached, or says that it is overloaded, for longer than `scoring.patience`."""


class _Passing(Exception):
    """A failure of one request that may pass; `wait`: seconds that the server asks for."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


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
        try:
            answer = post(self._scoring.url, body, self._scoring)
        except Away as error:  # whichever completions it is asked about
            return [Score(value=None, error=str(error))] * len(completions)
        try:
            return read_scores(answer, count=len(completions))
        except ValueError as error:
            raise DataError(f"{self._scoring.url}: {error}") from error


def check_address(name: str, scoring: ScoringConfig) -> None:
    """Raises ConfigError unless `scoring` holds an http address, and its token where one is named."""
    if not scoring.url.startswith(("http://", "https://")):
        raise ConfigError(f"reward {name!r} needs an address; set scoring.url to http(s)://..., got {scoring.url!r}")
    if scoring.key_variable and not read_key(scoring.key_variable):
        raise ConfigError(f"scoring.key_variable names {scoring.key_variable!r}, which the environment does not hold")


def post(url: str, body: Mapping[str, object], scoring: ScoringConfig) -> object:
    """The JSON that `url` answers with; each request may take `scoring.timeout`.

    Raises:
        Away: there was no server for `scoring.patience`.
        NoAnswer: a request took too long.
        DataError: the server refuses, or answers with something else. No message holds the token.
    """
    headers = {"Content-Type": "application/json"}
    if scoring.key_variable:
        headers["Authorization"] = f"Bearer {read_key(scoring.key_variable)}"
    request = urllib.request.Request(url, data=json.dumps(body).encode(), headers=headers)
    deadline, attempt = time.monotonic() + scoring.patience, 0
    while True:
        attempt += 1
        try:
            return _ask(request, scoring.timeout)
        except _Passing as failure:
            wait = backoff(attempt, first=_FIRST_WAIT, longest=_LONGEST_WAIT) if failure.wait is None else failure.wait
            if time.monotonic() + wait > deadline:
                tried = f"asked {attempt} times within scoring.patience, {scoring.patience:g} s"
                raise Away(f"{url} {failure} ({tried})") from failure
            time.sleep(wait)


def longest_post(scoring: ScoringConfig) -> float:
    """Seconds that `post` takes at most: the last request may begin when the patience is at its end."""
    return scoring.patience + scoring.timeout


def _ask(request: urllib.request.Request, timeout: float) -> object:
    url = request.full_url
    try:
        with _OPENER.open(request, timeout=timeout) as response:
            return json.loads(response.read(_MOST))
    except urllib.error.HTTPError as error:
        with error:
            raise _refusal(request, error) from error
    except (OSError, http.client.HTTPException) as error:
        cause = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(cause, TimeoutError):
            raise NoAnswer(f"{url} gave no scores within {timeout:g} s") from error
        raise _Passing(f"gave no scores: {cause}") from error
    except ValueError as error:
        raise DataError(f"{url} gave no scores: {error}") from error


def _refusal(request: urllib.request.Request, error: urllib.error.HTTPError) -> Exception:
    token = request.get_header("Authorization", "").removeprefix("Bearer ")
    reason = ""
    with contextlib.suppress(OSError, http.client.HTTPException):  # the status tells enough
        reason = error.read(_MOST_OF_REFUSAL).decode(errors="replace")
    reason = (reason.replace(token, "***") if token else reason)[:_SHOWN]  # some servers repeat it
    if target := error.headers.get("Location"):
        reason = f"it points to {target!r}; redirects are not followed, so set scoring.url to the final address"
    said = f"refused with status {error.code}: {reason}"
    if error.code in _PASSING or error.code > http.HTTPStatus.NOT_IMPLEMENTED:
        return _Passing(said, retry_after(error.headers.get("Retry-After")))
    return DataError(f"{request.full_url} {said}")


_conforms: type[RewardFunction] = HttpReward
