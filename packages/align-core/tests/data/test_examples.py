"""Records as tokens: the response is what is learnt, and what is too long is cut where it hurts least."""

from pathlib import Path

import numpy as np
import pytest

from align_core.data.examples import Example, batch_of, encode_example, encode_ranked, encode_sft
from align_core.data.records import RankedRecord, SftRecord
from align_core.errors import DataError
from align_core.text import Tokenizer, encode_response, load_tokenizer, render_prompt


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Tokenizer:
    return load_tokenizer(tiny_model)


def example(tokenizer: Tokenizer, prompt: str, response: str, max_length: int) -> Example:
    return encode_example(tokenizer, prompt, response, template="auto", max_length=max_length)


def learnt(tokenizer: Tokenizer, made: Example) -> str:
    return tokenizer.decode(made.tokens[made.mask])


def test_mask_is_true_on_the_response_and_its_end_only(tokenizer: Tokenizer) -> None:
    made = example(tokenizer, "What is 27 + 58?", "85", 64)
    prompt = render_prompt(tokenizer, "What is 27 + 58?", max_tokens=64)
    response = encode_response(tokenizer, "85")
    assert made.tokens.tolist() == [*prompt, *response]
    assert made.mask.tolist() == [False] * len(prompt) + [True] * len(response)
    assert made.tokens[-1] == tokenizer.eos_id


def test_chat_turns_before_the_response_are_not_learnt(chat_model: Path) -> None:
    tokenizer = load_tokenizer(chat_model)
    turns = [
        {"role": "user", "content": "12?"},
        {"role": "assistant", "content": "34"},
        {"role": "user", "content": "so?"},
    ]
    made = encode_example(tokenizer, turns, "It is", template="auto", max_length=64)
    assert tokenizer.decode(made.tokens[made.mask]) == "It is"
    assert "34" in tokenizer.decode(made.tokens[~made.mask])


def test_long_prompt_gives_way_to_the_response(tokenizer: Tokenizer) -> None:
    made = example(tokenizer, "1 + " * 60 + "1?", "85", 40)
    assert len(made.tokens) <= 40
    assert learnt(tokenizer, made) == tokenizer.decode(encode_response(tokenizer, "85"))
    assert tokenizer.decode(made.tokens[~made.mask]).endswith("+ 1?\n\nAssistant:")


def test_long_response_is_cut_at_the_right_and_gets_no_invented_end(tokenizer: Tokenizer) -> None:
    made = example(tokenizer, "What is 27 + 58?", "12345678" * 10, 40)
    prompt = render_prompt(tokenizer, "What is 27 + 58?", max_tokens=64)
    assert len(made.tokens) == 40
    assert made.tokens[: len(prompt)].tolist() == prompt.tolist()
    assert tokenizer.eos_id not in made.tokens
    assert ("12345678" * 10).startswith(tokenizer.decode(made.tokens[made.mask]).strip())


def test_both_too_long_share_the_room_in_halves(tokenizer: Tokenizer) -> None:
    made = example(tokenizer, "1 + " * 60 + "1?", "12345678" * 10, 40)
    assert int(made.mask.sum()) == 20
    assert 17 <= int((~made.mask).sum()) <= 20


def test_room_too_small_for_the_template_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="raise max_length"):
        example(tokenizer, "1", "2", 6)
    with pytest.raises(DataError, match="raise max_length"):
        example(tokenizer, "1", "2", 1)


def test_batch_of_examples_carries_their_masks(tokenizer: Tokenizer) -> None:
    records = [SftRecord(prompt="1", response="2"), SftRecord(prompt="12 + 3", response="15")]
    examples = [encode_sft(tokenizer, record, template="auto", max_length=64) for record in records]
    batch = batch_of(examples)
    assert batch.lengths.tolist() == [len(made.tokens) for made in examples]
    assert np.array_equal(batch.mask, np.concatenate([made.mask for made in examples]))


def test_ranked_examples_keep_the_order_of_the_responses(tokenizer: Tokenizer) -> None:
    record = RankedRecord(prompt="1 + 1", responses=["2", "3", "11"], scores=[1.0, 0.0, 0.5])
    group = encode_ranked(tokenizer, record, template="auto", max_length=64)
    assert [learnt(tokenizer, made).strip() for made in group] == ["2", "3", "11"]
