"""Prompts keep their closing tag when they are cut, and prompt plus response decode to the text that was meant."""

import copy
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from align_core.errors import CheckpointError, ConfigError, DataError
from align_core.text import (
    Tokenizer,
    _tokenizer_class,
    as_text,
    encode_conversation,
    encode_response,
    load_tokenizer,
    render_prompt,
    resolve_template,
    warn_of_other_turn_end,
)


@pytest.fixture(scope="module")
def tiny(tiny_model: Path) -> Tokenizer:
    return load_tokenizer(tiny_model)


@pytest.fixture(scope="module")
def chat(chat_model: Path) -> Tokenizer:
    return load_tokenizer(chat_model)


@pytest.mark.parametrize("name", ["tiny_model", "chat_model"])
def test_a_plain_tokenizer_is_loaded_as_autotokenizer_would(name: str, request: pytest.FixtureRequest) -> None:
    from transformers import AutoTokenizer

    directory: Path = request.getfixturevalue(name)
    mine, theirs = load_tokenizer(directory)._backend, AutoTokenizer.from_pretrained(directory)
    assert type(mine) is type(theirs)
    assert repr(mine) == repr(theirs)
    assert mine.chat_template == theirs.chat_template
    for text in ("What is 27 + 58?", " 85</s>", "\n\nHuman: \u00e9 \u65e5  <|im_end|>\n", ""):
        for special in (True, False):
            ids = theirs.encode(text, add_special_tokens=special)
            assert mine.encode(text, add_special_tokens=special) == ids
            assert mine.decode(ids, skip_special_tokens=special) == theirs.decode(ids, skip_special_tokens=special)


def test_a_plain_tokenizer_needs_no_torch(tiny_model: Path) -> None:
    """Importing torch takes seconds, which every command would wait."""
    code = (
        "import sys; from pathlib import Path; from align_core.text import load_tokenizer\n"
        "load_tokenizer(Path(sys.argv[1])); print('torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(tiny_model)]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout.split() == ["False"]


@pytest.mark.parametrize(
    ("file", "changed"),
    [
        ("tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer"}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["a.B", None]}}),
        ("config.json", {"model_type": "qwen2"}),
    ],
)
def test_any_other_tokenizer_is_autotokenizers_to_choose(
    tiny_model: Path, tmp_path: Path, file: str, changed: dict[str, object]
) -> None:
    directory = tmp_path / "model"
    shutil.copytree(tiny_model, directory)
    settings = json.loads((directory / file).read_text())
    (directory / file).write_text(json.dumps({**settings, **changed}))
    assert _tokenizer_class(tiny_model).__name__ == "TokenizersBackend"
    assert _tokenizer_class(directory).__name__ == "AutoTokenizer"


def with_specials(tokenizer: Tokenizer, ids: np.ndarray) -> str:
    return tokenizer._backend.decode(ids.tolist(), skip_special_tokens=False)


def test_prompt_and_response_in_the_default_template_are_the_encoding_of_the_whole_text(tiny: Tokenizer) -> None:
    whole = "\n\nHuman: What is 27 + 58?\n\nAssistant: 85"
    prompt = render_prompt(tiny, "What is 27 + 58?", max_tokens=64)
    response = encode_response(tiny, " 85")
    assert prompt[0] == 1  # the tokenizer's own <s>
    assert response[-1] == tiny.eos_id == 2
    assert [*prompt, *response[:-1]] == tiny.encode_prompt(whole)
    assert tiny.decode(np.concatenate([prompt, response])) == whole


@pytest.mark.parametrize("response", ["85", " 85", "85 ", " 85\n"])
def test_spaces_around_a_response_do_not_change_what_is_learnt(tiny: Tokenizer, response: str) -> None:
    assert encode_response(tiny, response).tolist() == encode_response(tiny, "85").tolist()


@pytest.mark.parametrize("name", ["tiny", "chat"])
def test_continuation_restores_any_text_behind_any_other(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(name)
    rng = random.Random(0)
    parts = ["Human", "Assistant:", " ", "  ", "\n", "\n\n", "\t", "0", "7", "+", "?", "\u00e9", "\u65e5"]
    for _ in range(300):
        before = "What" + "".join(rng.choices(parts, k=rng.randrange(6)))
        after = "".join(rng.choices(parts, k=rng.randrange(8)))
        ids = [*tokenizer.encode_prompt(before), *tokenizer.encode_continuation(after)]
        assert tokenizer.decode(ids) == before + after


def test_continuation_behind_merged_line_ends_has_no_line_end_too_many(chat: Tokenizer) -> None:
    """Here "\\n\\n" is one token, so the tokens of "\\n" are no prefix of those of "\\n" + "\\nso"."""
    assert chat.encode("\n\n") != 2 * chat.encode("\n")
    assert chat.decode(chat.encode_continuation("\nso")) == "\nso"


@pytest.mark.parametrize("room", [40, 25, 13, 12])
def test_long_prompt_loses_the_left_of_its_content_and_keeps_the_template(tiny: Tokenizer, room: int) -> None:
    content = " ".join(f"{n} +" for n in range(10, 60)) + " 5?"
    text = tiny.decode(render_prompt(tiny, content, max_tokens=room))
    start, end = "\n\nHuman: ", "\n\nAssistant:"
    assert text.startswith(start)
    assert text.endswith(end)
    kept = text[len(start) : -len(end)]
    assert kept
    assert content.endswith(kept)
    assert room - 3 <= len(render_prompt(tiny, content, max_tokens=room)) <= room


def test_prompt_that_fits_exactly_is_left_whole(tiny: Tokenizer) -> None:
    whole = render_prompt(tiny, "What is 27 + 58?", max_tokens=64)
    assert render_prompt(tiny, "What is 27 + 58?", max_tokens=len(whole)).tolist() == whole.tolist()
    assert len(render_prompt(tiny, "What is 27 + 58?", max_tokens=len(whole) - 1)) <= len(whole) - 1


def test_dialogue_that_brings_its_own_closing_tag_keeps_it_once(tiny: Tokenizer) -> None:
    dialogue = "\n\nHuman: What is 1 + 1?\n\nAssistant: 2\n\nHuman: What is 27 + 58?\n\nAssistant:"
    assert tiny.decode(render_prompt(tiny, dialogue, max_tokens=128)) == dialogue
    cut = tiny.decode(render_prompt(tiny, dialogue, max_tokens=16))
    assert dialogue.endswith(cut)
    assert cut.endswith("58?\n\nAssistant:")


def test_long_chat_loses_its_oldest_words_and_keeps_system_and_closing_tag(chat: Tokenizer) -> None:
    messages = [
        {"role": "system", "content": "so I think"},
        {"role": "user", "content": "What is 1? " * 20},
        {"role": "assistant", "content": "It is 1"},
        {"role": "user", "content": "What is 12 + 34?"},
    ]
    text = with_specials(chat, render_prompt(chat, messages, max_tokens=90))
    assert text.startswith("<|im_start|>system\nso I think<|im_end|>\n<|im_start|>user\n")
    assert text.endswith("It is 1<|im_end|>\n<|im_start|>user\nWhat is 12 + 34?<|im_end|>\n<|im_start|>assistant\n")
    assert text.count("What is 1?") < 20
    assert len(render_prompt(chat, messages, max_tokens=90)) <= 90


def test_chat_response_ends_as_the_template_ends_a_turn(chat: Tokenizer) -> None:
    prompt, response = render_prompt(chat, "What is 12?", max_tokens=64), encode_response(chat, "It is\n\n12")
    assert with_specials(chat, np.concatenate([prompt, response])) == (
        "<|im_start|>user\nWhat is 12?<|im_end|>\n<|im_start|>assistant\nIt is\n\n12<|im_end|>"
    )


@pytest.mark.parametrize("name", ["tiny", "chat"])
def test_template_that_cannot_fit_is_refused(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(name)
    bare = len(render_prompt(tokenizer, "", max_tokens=64))
    assert len(render_prompt(tokenizer, "1", max_tokens=bare)) == bare
    with pytest.raises(DataError, match=r"template alone is 1 tokens longer than allowed; raise max_length"):
        render_prompt(tokenizer, "1", max_tokens=bare - 1)


def test_cut_inside_a_character_leaves_no_half_of_it(tiny: Tokenizer) -> None:
    """Each of these characters is three byte tokens: room for four leaves the last one whole and a third of another."""
    bare = len(render_prompt(tiny, "", max_tokens=64))
    text = tiny.decode(render_prompt(tiny, "\u65e5\u672c\u8a9e", max_tokens=bare + 4))
    assert text == "\n\nHuman: \u8a9e\n\nAssistant:"


def test_plain_template_is_the_bare_text_and_several_turns_alternate(tiny: Tokenizer) -> None:
    assert tiny.decode(render_prompt(tiny, "27 + 58", template="plain", max_tokens=64)) == "27 + 58"
    turns = [
        {"role": "system", "content": "so"},
        {"role": "user", "content": "1 + 1"},
        {"role": "assistant", "content": " 2 "},
        {"role": "user", "content": "2 + 2"},
    ]
    expected = "so\n\nHuman: 1 + 1\n\nAssistant: 2\n\nHuman: 2 + 2\n\nAssistant:"
    assert tiny.decode(render_prompt(tiny, turns, max_tokens=128)) == expected


def test_prompt_as_text_is_the_words_alone_or_every_turn_with_its_role() -> None:
    asked = [{"role": "user", "content": "1 + 1?\n"}]
    assert as_text("1 + 1?\n") == as_text(asked) == "1 + 1?\n"
    turns = [{"role": "system", "content": "Be brief."}, *asked, {"role": "assistant", "content": "2"}, *asked]
    assert as_text(turns) == "system: Be brief.\n\nuser: 1 + 1?\n\n\nassistant: 2\n\nuser: 1 + 1?\n"


def test_auto_takes_the_chat_template_where_there_is_one(tiny: Tokenizer, chat: Tokenizer) -> None:
    assert resolve_template(tiny, "auto") == "human-assistant"
    assert resolve_template(chat, "auto") == "chat"
    assert resolve_template(chat, "plain") == "plain"


def test_unknown_template_and_absent_chat_template_are_refused(tiny: Tokenizer) -> None:
    with pytest.raises(ConfigError, match=r"unknown prompt template 'chatt'; did you mean 'chat'\? choose 'auto', "):
        render_prompt(tiny, "1", template="chatt", max_tokens=64)
    with pytest.raises(ConfigError, match=r"has no chat template; choose another template"):
        encode_response(tiny, "1", template="chat")


def test_turns_that_the_chat_template_refuses_are_a_data_error(chat: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"does not take turns of \['assistant'\]: an assistant cannot begin"):
        render_prompt(chat, [{"role": "assistant", "content": "1"}], max_tokens=64)


def test_vocabularies_are_told_apart(tiny: Tokenizer, chat: Tokenizer, tiny_model: Path) -> None:
    assert tiny.same_vocabulary(load_tokenizer(tiny_model))
    assert not tiny.same_vocabulary(chat)


def test_missing_or_broken_tokenizers_are_named(tmp_path: Path, tiny_model: Path) -> None:
    with pytest.raises(CheckpointError, match=r"'.*nowhere' does not exist"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"holds no tokenizer \(tokenizer.json or tokenizer.model\)"):
        load_tokenizer(tmp_path)
    shutil.copy(tiny_model / "tokenizer.json", tmp_path)
    with pytest.raises(CheckpointError, match="has no end-of-sequence token; set it in its config"):
        load_tokenizer(tmp_path)


def with_template(tokenizer: Tokenizer, template: str, *, eos: str = "<|im_end|>") -> Tokenizer:
    """A copy with another chat template and end-of-sequence token."""
    backend = copy.deepcopy(tokenizer._backend)
    backend.chat_template, backend.eos_token = template, eos
    return Tokenizer(backend, tokenizer.directory)


def test_template_that_ends_turns_with_another_token_is_told_with_the_remedy(
    chat: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    """ChatML over a base model's tokenizer: turns end in <|im_end|>, sequences in the base model's own token."""
    chatml = chat._backend.chat_template
    warn_of_other_turn_end(with_template(chat, chatml, eos="<|im_start|>"))
    (message,) = caplog.messages
    assert "closes an assistant's turn with '<|im_end|>', at which engines do not stop, and" in message
    assert "add the id of '<|im_end|>' to eos_token_id in generation_config.json" in message
    caplog.clear()
    warn_of_other_turn_end(with_template(chat, "{% for m in messages %}{{ m.content }} so,{% endfor %}"))
    (message,) = caplog.messages
    assert "turn with 'so,', at which" in message
    assert message.endswith("have the template write the latter")


@pytest.fixture
def two_ends(chat_model: Path, tmp_path: Path) -> Tokenizer:
    """As Llama 3 has it: turns end in a token of their own, texts in another, and engines stop at both."""
    shutil.copytree(chat_model, tmp_path / "two")
    ends = [load_tokenizer(chat_model)._backend.convert_tokens_to_ids(text) for text in ("<|im_start|>", "<|im_end|>")]
    (tmp_path / "two" / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    raw = json.loads((tmp_path / "two" / "tokenizer_config.json").read_text())
    raw |= {"eos_token": "<|im_start|>", "pad_token": "<|im_end|>"}
    (tmp_path / "two" / "tokenizer_config.json").write_text(json.dumps(raw))
    return load_tokenizer(tmp_path / "two")


def test_answers_end_in_the_templates_own_token_where_engines_stop_at_it(
    two_ends: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    """The last answer as the earlier ones; what the template writes between turns is not learnt."""
    assert two_ends.eos_text == "<|im_start|>"
    assert with_specials(two_ends, encode_response(two_ends, "It is", template="chat")) == "It is<|im_end|>"
    assert encode_response(two_ends, "It is", template="plain")[-1] == two_ends.eos_id
    turns = [{"role": role, "content": text} for role, text in (("user", "12?"), ("assistant", "34"))]
    tokens, mask = encode_conversation(two_ends, [*turns, *turns], template="chat")
    assert with_specials(two_ends, tokens[mask]) == "34<|im_end|>34<|im_end|>"
    warn_of_other_turn_end(two_ends)
    assert not caplog.messages
    assert two_ends.padding_id is None  # its padding token ends a turn


def test_answers_end_in_the_end_of_sequence_token_where_engines_would_not_stop_otherwise(two_ends: Tokenizer) -> None:
    (two_ends.directory / "generation_config.json").unlink()
    assert with_specials(two_ends, encode_response(two_ends, "It is", template="chat")) == "It is<|im_start|>"


@pytest.mark.parametrize(
    "template",
    [
        None,
        "{% for m in messages %}{{ m.content }}{{ eos_token }}\n{% endfor %}",
        "{% for m in messages %}{{ m.content }}\n{% endfor %}",
        "{{ raise_exception('a tool must be given') }}",
    ],
)
def test_template_that_ends_turns_rightly_or_not_at_all_is_not_complained_of(
    template: str | None, chat: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    warn_of_other_turn_end(with_template(chat, template or chat._backend.chat_template))
    assert not caplog.messages
