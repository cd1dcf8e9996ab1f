"""How completions are scored."""

from dataclasses import dataclass
from typing import Literal

from align_core.config.checks import positive
from align_core.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ScoringConfig:
    """How completions are scored: processes, limits, what a failure does, and the settings of the built-in rewards."""

    workers: int = 1
    """Processes that run reward functions apart from the run; 0 calls them in the driver, without a time limit."""
    timeout: float = 30.0
    """Longest time for one call, seconds; a call that hits it is repeated completion by completion, each with it. For
    `http` and `judge` the longest time for one request; a judge is sent several at a time."""
    patience: float = 30.0
    """Longest time for which `http` and `judge` go on asking a server that is away or overloaded (a refused or broken
    connection, status 408, 425, 429, 502 and above), seconds; waits double, or are as long as the server says."""
    chunk: int = 64
    """Completions handed to a process in one call."""
    retries: int = 1
    """Times that a failed scoring is tried again before it counts as a failure."""
    on_failure: Literal["stop", "drop"] = "stop"
    """A completion that cannot be scored ends the run with the reason, or is left out of the update and counted. Where
    more than half of a step's completions (and more than 8) hit the time limit, `drop` ends the run too."""
    clip: float = 100.0
    """Scores of a reward model are held within +-clip; the tutorial's cliprange_reward."""
    pattern: str = ""
    """Regular expression that the whole reply must match, for the reward `format`."""
    command: tuple[str, ...] = ()
    """Program and arguments for the reward `command`: JSON on its standard input, scores as JSON on its output."""
    url: str = ""
    """Address for the rewards `http` and `judge` (of the latter an OpenAI-compatible server, up to `/v1`)."""
    model: str = ""
    """Model that the server of `judge` is asked for."""
    rubric: str = "Rate the assistant's reply to the user from 1 (worst) to 10 (best). End with [[rating]]."
    """What `judge` tells the judging model to do; the last [[number]] of its answer is the score."""
    rating_min: float = 1.0
    """Lowest rating that the rubric allows; a lower one is a failed scoring."""
    rating_max: float = 10.0
    """Highest rating that the rubric allows; a higher one is a failed scoring."""
    key_variable: str = ""
    """Environment variable with the bearer token for `url`; the token itself is never written or logged."""
    overlong_buffer: int = 32
    """Tokens before sampling.max_tokens over which the reward `overlong` falls from 0 to -1 (DAPO's soft penalty)."""

    def __post_init__(self) -> None:
        positive(self, "timeout", "patience", "chunk", "clip", "overlong_buffer")
        if not self.rating_min < self.rating_max:
            raise ConfigError(f"rating_min {self.rating_min:g} must be below rating_max {self.rating_max:g}")
        for name in ("workers", "retries"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be negative, got {getattr(self, name)}")
