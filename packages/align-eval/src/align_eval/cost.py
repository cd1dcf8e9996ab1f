"""What requests cost, before and while they are sent. Money is US dollars, prices are per million tokens.

Knows nothing of what is asked. Token counts before a request are estimates; after it they are the service's.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from align_core.errors import ConfigError, DataError, choices
from align_core.types import ChatReply, ChatRequest
from align_eval.judges import estimate_tokens

_MILLION = 1e6


class Price(NamedTuple):
    """US dollars per million tokens."""

    prompt: float
    completion: float


PRICES: Mapping[str, Price] = {
    "gpt-4": Price(30.0, 60.0),
    "gpt-4-turbo": Price(10.0, 30.0),
    "gpt-4o": Price(2.5, 10.0),
}
"""List prices of late 2024, for a first idea; a file given with --prices goes before them."""


class Estimate(NamedTuple):
    """What requests will cost, before they are sent."""

    calls: int
    prompt_tokens: int
    completion_tokens: int
    """Expected ones."""
    dollars: float | None
    """Expected; None without a price."""
    most: float | None
    """If every prompt were as long as its bytes allow and every reply as long as its limit. Re-asks come on top."""


@dataclass(kw_only=True)
class Budget:
    """Lets requests through as long as the worst that they can cost is within the limit."""

    price: Price | None
    limit: float | None = None
    """US dollars; None is no limit."""
    spent: float = 0.0
    """By replies so far."""
    reserved: float = 0.0
    """By requests under way, at their worst."""
    refused: int = 0
    """Requests that were not let through."""

    def __post_init__(self) -> None:
        if self.limit is not None and self.price is None:
            raise ConfigError("a budget needs the judge's price; give it with --prices FILE, or leave --budget out")
        if self.limit is not None and not self.limit > 0:
            raise ConfigError(f"a budget must be greater than 0 dollars, got {self.limit}")

    def reserve(self, request: ChatRequest) -> bool:
        """Whether the request may be sent; if so, its worst cost is set aside until `settle`."""
        worst = self.worst(request)
        if self.limit is not None and self.spent + self.reserved + worst > self.limit:
            self.refused += 1
            return False
        self.reserved += worst
        return True

    def settle(self, request: ChatRequest, reply: ChatReply | None, *, lost_attempts: int = 0) -> None:
        """Books what the request cost: the service's count where it gives one, and the worst for lost attempts."""
        worst = self.worst(request)
        self.reserved -= worst
        if self.price is None:
            return
        lost = lost_attempts if reply is None else reply.lost_attempts
        self.spent += lost * worst
        if reply is not None:
            prompt = estimate_tokens(request) if reply.prompt_tokens is None else reply.prompt_tokens
            completion = request.max_tokens if reply.completion_tokens is None else reply.completion_tokens
            self.spent += (prompt * self.price.prompt + completion * self.price.completion) / _MILLION

    def worst(self, request: ChatRequest) -> float:
        """The most that one attempt can cost, US dollars; 0 without a price."""
        if self.price is None:
            return 0.0
        return (estimate_tokens(request) * self.price.prompt + request.max_tokens * self.price.completion) / _MILLION


def estimate(requests: Sequence[ChatRequest], *, completion_tokens: int, price: Price | None) -> Estimate:
    """What `requests` will cost if a reply has `completion_tokens` on average. English has about 4 bytes a token."""
    prompt = sum(len(message["content"].encode()) for request in requests for message in request.messages) // 4
    completion = sum(min(completion_tokens, request.max_tokens) for request in requests)
    if price is None:
        return Estimate(len(requests), prompt, completion, None, None)
    budget = Budget(price=price)
    dollars = (prompt * price.prompt + completion * price.completion) / _MILLION
    return Estimate(len(requests), prompt, completion, dollars, sum(budget.worst(request) for request in requests))


def price_of(model: str, file: Path | None = None) -> Price | None:
    """The price of a model: from the file (JSON, {model: {"prompt", "completion"}}), else from the list, else None.

    Raises:
        DataError: the file is not such a table.
    """
    if file is None:
        return PRICES.get(model)
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
        prices = {str(name): Price(float(p["prompt"]), float(p["completion"])) for name, p in table.items()}
    except OSError as error:
        raise DataError(f"the price file {str(file)!r} cannot be read: {error}") from error
    except (AttributeError, TypeError, LookupError, ValueError) as error:
        expected = '{"model": {"prompt": X, "completion": Y}}'
        raise DataError(f"{str(file)!r} is no price table {expected}: {error}") from error
    if model not in prices and model not in PRICES:
        raise DataError(f"{str(file)!r} has no price of {model!r}, only of {choices(prices)}")
    return prices.get(model, PRICES.get(model))
