"""Money: estimates, and a budget that is never passed."""

import json
from pathlib import Path

import pytest

from align_core.errors import ConfigError, DataError
from align_core.types import ChatReply, ChatRequest
from align_eval.cost import Budget, Price, estimate, price_of


def _request(text: str = "x" * 290, max_tokens: int = 1000) -> ChatRequest:
    """About 102 tokens at most: (290 + 16) bytes / 3."""
    return ChatRequest(messages=({"role": "user", "content": text},), max_tokens=max_tokens, temperature=0.0)


def _reply(prompt: int | None, completion: int | None, lost: int = 0) -> ChatReply:
    return ChatReply(
        text="y",
        finish_reason="stop",
        model="m",
        prompt_tokens=prompt,
        completion_tokens=completion,
        lost_attempts=lost,
    )


def test_estimate_by_hand() -> None:
    """Two requests of 290 bytes: 145 prompt tokens; 170 of 1000 completion tokens each, 340; at 30 and 60 dollars a
    million: 0.00435 + 0.0204. At most: 2 x (102 x 30 + 1000 x 60) / 1e6 = 0.12612."""
    found = estimate([_request(), _request()], completion_tokens=170, price=Price(30.0, 60.0))
    assert found[:3] == (2, 145, 340)
    assert found.dollars == pytest.approx(0.02475)
    assert found.most == pytest.approx(0.12612)
    assert estimate([_request()], completion_tokens=170, price=None).dollars is None


def test_published_size_of_a_round_costs_what_was_published() -> None:
    """140,000 prompt and 26,000 completion tokens of gpt-4: 4.20 + 1.56 = 5.76, the "about 5 dollars" of users."""
    price = price_of("gpt-4")
    assert price is not None
    assert (140_000 * price.prompt + 26_000 * price.completion) / 1e6 == pytest.approx(5.76)


def test_budget_reserves_the_worst_and_books_the_real() -> None:
    """A request can cost (102 x 10 + 1000 x 100) / 1e6 = 0.10102, a reply costs (50 x 10 + 200 x 100) / 1e6 = 0.0205"""
    budget = Budget(price=Price(10.0, 100.0), limit=0.25)
    assert budget.reserve(_request())
    assert budget.reserve(_request())
    assert not budget.reserve(_request())
    assert (budget.refused, budget.reserved) == (1, pytest.approx(0.20204))
    budget.settle(_request(), _reply(50, 200))
    budget.settle(_request(), _reply(50, 200, lost=1))  # a lost attempt counts as the worst
    assert budget.reserved == pytest.approx(0.0)
    assert budget.spent == pytest.approx(2 * 0.0205 + 0.10102)
    assert budget.reserve(_request())
    budget.settle(_request(), None, lost_attempts=2)
    assert budget.spent == pytest.approx(2 * 0.0205 + 3 * 0.10102)


def test_tokens_that_the_service_does_not_count_are_booked_at_the_worst() -> None:
    budget = Budget(price=Price(10.0, 100.0))
    assert budget.reserve(_request())
    budget.settle(_request(), _reply(None, None))
    assert budget.spent == pytest.approx(0.10102)


def test_budget_needs_a_price_and_a_sense() -> None:
    with pytest.raises(ConfigError, match="needs the judge's price"):
        Budget(price=None, limit=1.0)
    with pytest.raises(ConfigError, match=r"greater than 0 dollars, got -1"):
        Budget(price=Price(1, 1), limit=-1.0)


def test_prices_come_from_the_file_then_from_the_list(tmp_path: Path) -> None:
    file = tmp_path / "prices.json"
    file.write_text(json.dumps({"mine": {"prompt": 1, "completion": 2}}))
    assert price_of("mine", file) == (1.0, 2.0)
    assert price_of("gpt-4", file) == (30.0, 60.0)
    assert price_of("mine") is None
    with pytest.raises(DataError, match="no price of 'other', only of 'mine'"):
        price_of("other", file)
    for text in ("{", "[]", '{"m": 3}', '{"m": {"prompt": 1}}'):
        file.write_text(text)
        with pytest.raises(DataError, match="no price table"):
            price_of("m", file)
    with pytest.raises(DataError, match="cannot be read"):
        price_of("m", tmp_path / "none.json")
