"""Text to tokens and back: tokenizers and prompt templates. The one place that decides how a prompt is written.

Needs `transformers` when a tokenizer is loaded, not when this module is imported.
"""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from align_core.errors import CheckpointError, ConfigError, DataError, missing_dependency, unknown_name
from align_core.model_shape import check_directory
from align_core.stop_ids import read_eos_ids

logger = logging.getLogger(__name__)

TemplateName = Literal["auto", "human-assistant", "chat", "plain"]
Messages = Sequence[Mapping[str, str]]

_ROLES = {"user": "Human", "assistant": "Assistant"}
_CLOSING_TAG = "\n\nAssistant:"
_PLAIN_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")  # before and since transformers 5


class TurnEnd(NamedTuple):
    """What an answer is closed by."""

    id: int
    text: str


class Tokenizer:
    """A Hugging Face tokenizer, narrowed to what alignment needs."""

    def __init__(self, backend: Any, directory: Path) -> None:
        self._backend = backend
        self.directory = directory
        if backend.eos_token_id is None:
            raise CheckpointError(f"the tokenizer in {directory} has no end-of-sequence token; set it in its config")
        self.eos_id: int = int(backend.eos_token_id)
        self.eos_text = str(backend.eos_token)
        self.vocab_size: int = len(backend)
        self.has_chat_template: bool = bool(getattr(backend, "chat_template", None))

    @property
    def padding_id(self) -> int | None:
        """A token that may stand behind a sequence's end without being taken for it; None if there is none."""
        candidates = (self._backend.pad_token_id, self._backend.unk_token_id, self._backend.bos_token_id)
        ends = (self.eos_id, self.chat_turn_end.id)
        return next((int(token) for token in candidates if token is not None and token not in ends), None)

    def same_vocabulary(self, other: "Tokenizer") -> bool:
        """Whether a token id means the same to both."""
        return bool(self._backend.get_vocab() == other._backend.get_vocab())

    def encode(self, text: str) -> list[int]:
        """Token ids of `text` alone, without special tokens."""
        return list(self._backend.encode(text, add_special_tokens=False))

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of the beginning of a sequence: with the tokenizer's own begin-of-sequence token, if it has one."""
        ids = list(self._backend.encode(text, add_special_tokens=True))
        return ids[:-1] if ids and ids[-1] == self.eos_id else ids

    def encode_continuation(self, text: str) -> list[int]:
        """Token ids of `text` as it follows other text (no dummy space in front, as SentencePiece would add)."""
        anchor = self.encode("\n")
        ids = self.encode("\n" + text)
        return ids[len(anchor) :] if ids[: len(anchor)] == anchor else self.encode(text)

    def decode(self, ids: Sequence[int] | NDArray[np.int32]) -> str:
        """Text of token ids, special tokens left out."""
        return str(self._backend.decode([int(i) for i in ids], skip_special_tokens=True))

    def added_token(self, text: str) -> str | None:
        """The longest special or added token that `text` begins with."""
        found = [token for token in self._backend.get_added_vocab() if token and text.startswith(token)]
        return max(found, key=len, default=None)

    @cached_property
    def turn_closing(self) -> str:
        """What the chat template writes after an answer; empty if nothing, or if it takes no question with its answer.

        White space at its end, which some templates write between turns, is not part of it.
        """
        if not self.has_chat_template:
            return ""
        turns = [{"role": "user", "content": "Question"}, {"role": "assistant", "content": "Answer"}]
        try:
            return self.apply_chat_template(turns, is_open=False).rpartition("Answer")[2].rstrip()
        except DataError:
            return ""

    @cached_property
    def chat_turn_end(self) -> TurnEnd:
        """The token that closes an answer in the chat template.

        It is the template's own where engines stop at it, else the end-of-sequence token.
        """
        token = self.added_token(self.turn_closing)
        if token is not None and self.eos_text not in self.turn_closing:
            number = int(self._backend.convert_tokens_to_ids(token))
            if number in read_eos_ids(self.directory):
                return TurnEnd(number, token)
        return TurnEnd(self.eos_id, self.eos_text)

    def turn_end(self, template: str) -> TurnEnd:
        """The token that closes an answer in a template, whose name is definite."""
        return self.chat_turn_end if template == "chat" else TurnEnd(self.eos_id, self.eos_text)

    def apply_chat_template(self, messages: Messages, *, is_open: bool = True) -> str:
        """The conversation in the tokenizer's own template.

        Args:
            is_open: end where the assistant's answer begins; else the last message is complete.

        Raises:
            DataError: the template does not take these messages, for example two turns of one role in a row.
        """
        try:
            from jinja2 import TemplateError  # noqa: PLC0415  (optional, as transformers is)
        except ImportError as error:
            raise missing_dependency("jinja2", "align-core[megatron]", needed_for="a chat template") from error
        try:
            rendered = self._backend.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, add_generation_prompt=is_open
            )
        except TemplateError as error:
            roles = [message["role"] for message in messages]
            raise DataError(f"the chat template in {self.directory} does not take turns of {roles}: {error}") from error
        return str(rendered)


def load_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer of a model directory, Hugging Face's or Megatron's; nothing is downloaded.

    Raises:
        CheckpointError: the directory has no tokenizer files, or they do not load.
    """
    check_directory(directory)
    if not any((directory / name).exists() for name in ("tokenizer.json", "tokenizer.model")):
        raise CheckpointError(f"{str(directory)!r} holds no tokenizer (tokenizer.json or tokenizer.model)")
    try:
        tokenizer_class = _tokenizer_class(directory)
    except ImportError as error:
        raise missing_dependency("transformers", "transformers>=5", needed_for="loading a tokenizer") from error
    try:
        backend = tokenizer_class.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"the tokenizer in {str(directory)!r} does not load: {error}") from error
    return Tokenizer(backend, directory)


def _tokenizer_class(directory: Path) -> Any:
    """What of transformers loads it: AutoTokenizer, or at once the class that AutoTokenizer would choose.

    AutoTokenizer imports torch and the code of models, two to three seconds of every command. For a Llama whose
    tokenizer_config.json names the plain class, as Llama 3's does, it chooses that class.
    """
    if (
        (directory / "tokenizer.json").exists()
        and _setting(directory / "tokenizer_config.json", "tokenizer_class") in _PLAIN_CLASSES
        and _setting(directory / "tokenizer_config.json", "auto_map") is None
        and _setting(directory / "config.json", "model_type") == "llama"
    ):
        from transformers import PreTrainedTokenizerFast  # noqa: PLC0415  (optional, and slow to import)

        return PreTrainedTokenizerFast
    from transformers import AutoTokenizer  # noqa: PLC0415

    return AutoTokenizer


def _setting(path: Path, key: str) -> Any:
    """The value of a JSON file's key; None if it is not there, or the file is no such file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found.get(key) if isinstance(found, dict) else None


def resolve_template(tokenizer: Tokenizer, template: str) -> str:
    """`auto` made definite; raises ConfigError for an unknown name or a chat template that the tokenizer lacks."""
    if template not in get_args(TemplateName):
        raise ConfigError(unknown_name("prompt template", template, get_args(TemplateName)))
    if template == "auto":
        return "chat" if tokenizer.has_chat_template else "human-assistant"
    if template == "chat" and not tokenizer.has_chat_template:
        raise ConfigError(f"the tokenizer in {tokenizer.directory} has no chat template; choose another template")
    return template


def warn_of_other_turn_end(tokenizer: Tokenizer) -> None:
    """Warns where the chat template closes an answer with something at which engines do not stop.

    The last answer of a conversation is then learnt with the end-of-sequence token, earlier ones as the template writes
    them. Nothing is said of a template that writes nothing after an answer.
    """
    closing = tokenizer.turn_closing
    if not closing or tokenizer.chat_turn_end.text in closing:
        return
    token = tokenizer.added_token(closing)
    remedy = (
        f"add the id of {token!r} to eos_token_id in generation_config.json: engines then stop at it, and it is learnt"
        if token
        else "have the template write the latter"
    )
    logger.warning(
        "the chat template in %s closes an assistant's turn with %r, at which engines do not stop, and the tokenizer's "
        "end-of-sequence token is %r: a conversation would be learnt with two different ends of a turn; %s",
        *(tokenizer.directory, token or closing.strip(), tokenizer.eos_text, remedy),
    )


class RenderedPrompt(NamedTuple):
    """A prompt in its template."""

    tokens: NDArray[np.int32]
    """int32 [L]."""
    is_cut: bool
    """Whether content was left out to make it fit."""


def render_prompt(
    tokenizer: Tokenizer, content: str | Messages, *, template: str = "auto", max_tokens: int
) -> NDArray[np.int32]:
    """The tokens of `fit_prompt`."""
    return fit_prompt(tokenizer, content, template=template, max_tokens=max_tokens).tokens


def fit_prompt(
    tokenizer: Tokenizer, content: str | Messages, *, template: str = "auto", max_tokens: int
) -> RenderedPrompt:
    """Token ids of a prompt in its template, cut at the left of its content until it fits.

    Args:
        content: the user's words, or chat messages {"role", "content"}. Words that already end in the
            Human/Assistant template's closing tag are taken as they are.
        max_tokens: most tokens of the result; the template's opening and closing stay whole.

    Raises:
        DataError: even without content the template does not fit into `max_tokens`.
    """
    name = resolve_template(tokenizer, template)
    messages = [{"role": "user", "content": content}] if isinstance(content, str) else [dict(m) for m in content]
    is_cut = False
    while True:
        ids = _encode_messages(tokenizer, messages, name)
        excess = len(ids) - max_tokens
        if excess <= 0:
            return RenderedPrompt(np.asarray(ids, dtype=np.int32), is_cut)
        messages, is_cut = _cut_left(tokenizer, messages, excess), True


def as_text(content: str | Messages) -> str:
    """A prompt for readers that are no policy: the user's words alone as they are, several turns with their roles."""
    if isinstance(content, str):
        return content
    if len(content) == 1 and content[0]["role"] == "user":
        return content[0]["content"]
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in content)


def encode_response(tokenizer: Tokenizer, response: str, *, template: str = "auto") -> NDArray[np.int32]:
    """Token ids of an assistant's answer after a rendered prompt, closed by the template's `Tokenizer.turn_end`."""
    name = resolve_template(tokenizer, template)
    text = " " + response.strip() if name == "human-assistant" else response
    return np.asarray([*tokenizer.encode_continuation(text), tokenizer.turn_end(name).id], dtype=np.int32)


def encode_conversation(
    tokenizer: Tokenizer, messages: Messages, *, template: str = "auto"
) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """Token ids of a whole conversation that ends in the assistant's turn, and a mask on what the assistant says.

    Every answer is written as it would be sampled: after the prompt that `render_prompt` gives for the turns before it.
    `Tokenizer.turn_end` is a target where the template puts it after an answer, and always after the last.

    Raises:
        DataError: the template writes earlier turns differently once there are later ones, so that no sequence holds
            what the model sees at every turn.
    """
    name = resolve_template(tokenizer, template)
    pieces: list[tuple[list[int], bool]] = []
    written = ""
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = _text_of(tokenizer, messages[:index], name)
        if not prompt.startswith(written):
            raise DataError(
                f"the prompt template {name!r} rewrites earlier turns of a chat, so they cannot be learnt together; "
                "set loss.turns to last"
            )
        new = prompt[len(written) :]
        pieces.append((tokenizer.encode_continuation(new) if written else _encode_text(tokenizer, new, name), False))
        if index == len(messages) - 1:
            answer = encode_response(tokenizer, message["content"], template=name).tolist()
        else:
            text = _answer_text(tokenizer, messages[: index + 1], prompt, name)
            answer = tokenizer.encode_continuation(text)
            written = prompt + text
        pieces.append((answer, True))
    tokens = np.concatenate([np.asarray(ids, dtype=np.int32) for ids, _ in pieces])
    return tokens, np.repeat([learnt for _, learnt in pieces], [len(ids) for ids, _ in pieces])


def _answer_text(tokenizer: Tokenizer, messages: Messages, prompt: str, template: str) -> str:
    """How the template writes the last of `messages`, an assistant's turn, up to its `Tokenizer.turn_end`."""
    if template == "human-assistant":
        return " " + messages[-1]["content"].strip()
    if template == "plain":
        return messages[-1]["content"]
    whole = tokenizer.apply_chat_template(messages, is_open=False)
    if not whole.startswith(prompt):
        raise DataError("the chat template writes an open turn differently from a finished one; set loss.turns to last")
    text = whole[len(prompt) :]
    closing = tokenizer.turn_end(template).text
    end = text.rfind(closing)
    return text if end < 0 else text[: end + len(closing)]


def _text_of(tokenizer: Tokenizer, messages: Messages, template: str) -> str:
    if template == "chat":
        return tokenizer.apply_chat_template(messages)
    if template == "plain":
        return "".join(message["content"] for message in messages)
    return _human_assistant(messages)


def _encode_text(tokenizer: Tokenizer, text: str, template: str) -> list[int]:
    """The beginning of a sequence; a chat template writes its own begin-of-sequence token."""
    return tokenizer.encode(text) if template == "chat" else tokenizer.encode_prompt(text)


def _encode_messages(tokenizer: Tokenizer, messages: Messages, template: str) -> list[int]:
    return _encode_text(tokenizer, _text_of(tokenizer, messages, template), template)


def _human_assistant(messages: Messages) -> str:
    if len(messages) == 1 and messages[0]["content"].rstrip().endswith(_CLOSING_TAG.strip()):
        return messages[0]["content"].rstrip()
    turns = (f"\n\n{_ROLES[m['role']]}: {m['content'].strip()}" for m in messages if m["role"] in _ROLES)
    system = "".join(m["content"] for m in messages if m["role"] == "system")
    return system + "".join(turns) + _CLOSING_TAG


def _cut_left(tokenizer: Tokenizer, messages: list[dict[str, str]], excess: int) -> list[dict[str, str]]:
    """Drops about `excess` tokens from the oldest words that may be cut: never the system's, never the closing tag."""
    for index, message in enumerate(messages):
        if message["role"] == "system":
            continue
        content, tag = _split_tag(message["content"])
        if not content:
            continue
        ids = tokenizer.encode_continuation(content)
        shorter = _from_whole_character(tokenizer, ids[excess:])
        if len(shorter) >= len(content):  # decoding gave nothing shorter: cut characters so that the loop ends
            shorter = content[1:]
        return [*messages[:index], {**message, "content": shorter + tag}, *messages[index + 1 :]]
    raise DataError(f"the prompt template alone is {excess} tokens longer than allowed; raise max_length")


def _from_whole_character(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The text of `ids` without the rest of a character that was cut: spelt in bytes, one takes up to four tokens."""
    for first in range(4):
        text = tokenizer.decode(ids[first:])
        if not text.startswith("\ufffd"):
            return text
    return text.lstrip("\ufffd")


def _split_tag(content: str) -> tuple[str, str]:
    match = re.search(r"\s*Assistant:\s*\Z", content)
    return (content[: match.start()], content[match.start() :]) if match else (content, "")
