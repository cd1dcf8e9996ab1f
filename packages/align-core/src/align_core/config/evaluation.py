"""How trained models are judged: the judging service, and what an evaluation needs to know."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from align_core.config.checks import positive
from align_core.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """A model behind an OpenAI-compatible service, or another judge of `align.judges`; how hard it may be asked."""

    name: str = "openai"
    """Name in the entry-point group `align.judges`."""
    model: str = "gpt-4"
    """The service's name of the model; MT-Bench's published figures come from gpt-4."""
    base_url: str = "https://api.openai.com/v1"
    """Address of the service, up to and with its version."""
    key_variable: str = "OPENAI_API_KEY"
    """Environment variable that holds the key; the key itself is never a setting."""
    concurrency: int = 16
    """Most requests under way at once."""
    requests_per_minute: int = 0
    """0 is no limit."""
    tokens_per_minute: int = 0
    """Prompt and largest reply together; 0 is no limit."""
    timeout: float = 300.0
    """Seconds without a byte from the service until a request counts as lost; long verdicts take minutes."""
    attempts: int = 8
    """Times a request is sent before it counts as unanswered; refusals (400, 401, 403, 404 ...) are not sent again."""
    token_limit_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """How the service calls the limit; models that think want max_completion_tokens."""
    extra: str = ""
    """JSON object that goes into every request's body, for what a service offers beyond the protocol."""

    def __post_init__(self) -> None:
        positive(self, "concurrency", "timeout", "attempts")
        for name in ("requests_per_minute", "tokens_per_minute"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be negative, got {getattr(self, name)}; 0 is no limit")
        if not self.base_url.startswith(("http://", "https://")):
            raise ConfigError(f"base_url must begin with http:// or https://, got {self.base_url!r}")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What an evaluation of `align.evaluations` needs to know."""

    data: Path
    """Its tasks or questions."""
    out: Path
    """Directory for per-item results."""
    template: str = "auto"
    """Prompt template, as in training."""
    context: int = 2048
    """Longest prompt plus completion that the engine takes, tokens."""
    max_tokens: int = 512
    """Most new tokens an answer."""
    limit: int | None = None
    """Only the first so many tasks."""

    def __post_init__(self) -> None:
        positive(self, "context", "max_tokens")
