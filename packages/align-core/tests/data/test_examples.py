"""Records as tokens: the response is what is learnt, and what is too long is cut where it hurts least."""

from pathlib import Path

import numpy as np
import pytest

from align_core.data.examples import Example, batch_of, encode_example, encode_pair, encode_ranked, encode_sft
from align_core.data.records import PreferenceRecord, RankedRecord, SftRecord
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


CHAT = [
    {"role": "system", "content": "Add."},
    {"role": "user", "content": "12?"},
    {"role": "assistant", "content": "34"},
    {"role": "user", "content": "so?"},
]


def spans(tokenizer: Tokenizer, made: Example, *, learnt: bool) -> list[str]:
    """The text of each run of tokens that is, or is not, learnt; special tokens included."""
    edges = np.flatnonzero(np.diff(made.mask.astype(int))) + 1
    parts = zip(np.split(made.tokens, edges), np.split(made.mask, edges))
    return [str(tokenizer._backend.decode(ids.tolist())) for ids, mask in parts if mask[0] == learnt]


def test_every_turn_of_the_assistant_is_learnt_with_its_end(chat_model: Path) -> None:
    tokenizer = load_tokenizer(chat_model)
    made = encode_sft(tokenizer, SftRecord(prompt=CHAT, response="It is"), template="chat", max_length=200)
    assert spans(tokenizer, made, learnt=True) == ["34<|im_end|>", "It is<|im_end|>"]
    assert spans(tokenizer, made, learnt=False) == [
        "<|im_start|>system\nAdd.<|im_end|>\n<|im_start|>user\n12?<|im_end|>\n<|im_start|>assistant\n",
        "\n<|im_start|>user\nso?<|im_end|>\n<|im_start|>assistant\n",
    ]


def test_each_turn_is_written_as_it_would_be_sampled(chat_model: Path) -> None:
    """The tokens before each answer are those of the prompt that generation would see."""
    tokenizer = load_tokenizer(chat_model)
    made = encode_sft(tokenizer, SftRecord(prompt=CHAT, response="It is"), template="chat", max_length=200)
    starts = np.flatnonzero(np.diff(made.mask.astype(int)) == 1) + 1
    for start, turns in zip(starts, (CHAT[:2], CHAT)):
        assert made.tokens[:start].tolist() == render_prompt(tokenizer, turns, max_tokens=200).tolist()


def test_last_turn_alone_where_asked(chat_model: Path) -> None:
    tokenizer = load_tokenizer(chat_model)
    record = SftRecord(prompt=CHAT, response="It is")
    made = encode_sft(tokenizer, record, template="chat", max_length=200, turns="last")
    assert spans(tokenizer, made, learnt=True) == ["It is<|im_end|>"]
    whole = encode_sft(tokenizer, record, template="chat", max_length=200)
    assert made.tokens.tolist() == whole.tokens.tolist()


def test_dialogue_in_the_plain_template_is_learnt_by_turns(tokenizer: Tokenizer) -> None:
    record = SftRecord(prompt=CHAT[1:], response="It is")
    made = encode_sft(tokenizer, record, template="human-assistant", max_length=200)
    assert [text.strip() for text in spans(tokenizer, made, learnt=True)] == ["34", "It is</s>"]
    assert tokenizer.decode(made.tokens) == "\n\nHuman: 12?\n\nAssistant: 34\n\nHuman: so?\n\nAssistant: It is"


def test_long_chat_loses_its_oldest_exchanges(chat_model: Path) -> None:
    """Three exchanges of which two fit: the system's turn stays."""
    tokenizer = load_tokenizer(chat_model)
    turns = [CHAT[0], *([CHAT[1], CHAT[2]] * 2), CHAT[3]]
    record = SftRecord(prompt=turns, response="It is")
    fits = len(encode_sft(tokenizer, SftRecord(prompt=CHAT, response="It is"), template="chat", max_length=200).tokens)
    made = encode_sft(tokenizer, record, template="chat", max_length=fits)
    assert len(made.tokens) == fits
    assert spans(tokenizer, made, learnt=True) == ["34<|im_end|>", "It is<|im_end|>"]
    alone = encode_sft(tokenizer, record, template="chat", max_length=fits - 1)
    assert spans(tokenizer, alone, learnt=True) == ["It is<|im_end|>"]
    assert "system\nAdd." in spans(tokenizer, alone, learnt=False)[0]


def test_template_that_rewrites_earlier_turns_is_refused_by_name(chat_model: Path) -> None:
    """A template that drops all assistant's turns but the last, as those of thinking models do with thoughts."""
    tokenizer = load_tokenizer(chat_model)
    tokenizer._backend.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' or loop.last %}{{ m.content }}|{% endif %}{% endfor %}"
    )
    record = SftRecord(prompt=CHAT[1:], response="It is")
    with pytest.raises(DataError, match=r"rewrites earlier turns of a chat.*set loss.turns to last"):
        encode_sft(tokenizer, record, template="chat", max_length=200)
    assert encode_sft(tokenizer, record, template="chat", max_length=200, turns="last").mask.any()


def test_pair_shares_its_prompt(tokenizer: Tokenizer) -> None:
    chosen, rejected = encode_pair(
        tokenizer, PreferenceRecord(prompt="1 + 1", chosen="2", rejected="3"), template="auto", max_length=64
    )
    assert (learnt(tokenizer, chosen).strip(), learnt(tokenizer, rejected).strip()) == ("2", "3")
    assert chosen.tokens[~chosen.mask].tolist() == rejected.tokens[~rejected.mask].tolist()


def test_responses_of_one_record_see_the_same_cut_prompt(tokenizer: Tokenizer) -> None:
    """The longest response decides: a shorter one beside more of the prompt would differ in more than the response."""
    prompt, responses = "1 + " * 60 + "1?", ["85", "12345678", "12345678" * 10]
    pair = PreferenceRecord(prompt=prompt, chosen=responses[0], rejected=responses[1])
    ranked = RankedRecord(prompt=prompt, responses=responses, scores=[2.0, 1.0, 0.0])
    for group, longest in (
        (encode_pair(tokenizer, pair, template="auto", max_length=40), responses[1]),
        (encode_ranked(tokenizer, ranked, template="auto", max_length=40), responses[2]),
    ):
        alone = example(tokenizer, prompt, longest, 40)
        for made in group:
            assert made.tokens[~made.mask].tolist() == alone.tokens[~alone.mask].tolist()
        assert max(len(made.tokens) for made in group) == len(alone.tokens) <= 40
