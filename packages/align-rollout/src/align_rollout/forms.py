"""Requests and answers in OpenAI's form: JSON in, our records out, and back. Knows no engine and no sockets."""

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from align_core.config import SamplingConfig
from align_core.errors import DataError
from align_core.text import Tokenizer
from align_core.types import Completion, FinishReason, Piece

_UNFINISHED = "\ufffd"  # what a tokenizer makes of a character of which bytes are still to come


def limit_of(body: Mapping[str, Any]) -> int:
    """Most new tokens that a request allows; 0 if it does not say."""
    return int(body.get("max_completion_tokens") or body.get("max_tokens") or 0)


def sampling_of(body: Mapping[str, Any]) -> SamplingConfig:
    """How a request is to be sampled; what it does not say is as OpenAI has it."""
    stop = body.get("stop") or ()
    return SamplingConfig(
        n=int(body.get("n") or 1),
        max_tokens=limit_of(body) or 16,
        temperature=_number(body, "temperature", 1.0),
        top_p=_number(body, "top_p", 1.0),
        seed=int(body.get("seed") or 0),
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        stop_tokens=tuple(body.get("stop_token_ids") or ()),
    )


def contents_of(body: Mapping[str, Any], *, chat: bool) -> list[object]:
    """The prompts of a request: texts, lists of token ids, or one conversation."""
    if chat:
        messages = body["messages"]
        if not isinstance(messages, list) or not all(
            isinstance(m, dict) and {"role", "content"} <= m.keys() for m in messages
        ):
            raise DataError("messages is a list of {'role': ..., 'content': ...}")
        return [[{**message, "content": _text(message["content"])} for message in messages]]
    prompt = body["prompt"]
    several = isinstance(prompt, list) and (not prompt or not isinstance(prompt[0], int))
    return list(prompt) if several else [prompt]


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What all of one answer has in common."""

    model: str
    chat: bool
    identity: str = field(default_factory=lambda: f"cmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, choices: Sequence[Mapping[str, Any]], *, asked: int) -> dict[str, Any]:
        """The answer that comes in one; `asked` is the prompts' number of tokens."""
        new = sum(len(choice["token_ids"]) for choice in choices)
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self._head(kind), "choices": list(choices), "usage": _usage(asked, new)}

    def choice(self, completion: Completion, tokenizer: Tokenizer, *, index: int) -> dict[str, Any]:
        """One completion of it."""
        text = tokenizer.decode(completion.tokens)
        said = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        return {
            "index": index,
            **said,
            "finish_reason": completion.finish_reason,
            "token_ids": completion.tokens.tolist(),
            "logprobs": {"token_logprobs": completion.logprobs.tolist()},
            "weight_version": completion.version,
        }

    def opening(self, *, index: int) -> dict[str, Any]:
        """A chat's first event of each choice says who speaks."""
        return self._event(
            {"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None, "logprobs": None}
        )

    def event(self, piece: Piece, text: str, *, index: int) -> dict[str, Any]:
        """The next tokens of a choice, or its end."""
        said = {"delta": {"content": text} if text else {}} if self.chat else {"text": text}
        return self._event(
            {
                "index": index,
                **said,
                "finish_reason": piece.finish_reason,
                "token_ids": list(piece.tokens),
                "logprobs": {"token_logprobs": list(piece.logprobs)},
                "weight_version": piece.version,
            }
        )

    def usage_event(self, *, asked: int, new: int) -> dict[str, Any]:
        """The last event where the client wants to know the usage."""
        return {**self._event(), "usage": _usage(asked, new)}

    def _event(self, *choices: Mapping[str, Any]) -> dict[str, Any]:
        return {**self._head("chat.completion.chunk" if self.chat else "text_completion"), "choices": list(choices)}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.identity, "object": kind, "created": self.created, "model": self.model}


class GrowingText:
    """The text of token ids that come one after another, in pieces that never end within a character."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._from = self._said = 0
        """What is before `_said` is said; what is from `_from` on is decoded again, for what stands between tokens."""

    def add(self, tokens: Sequence[int], *, finish_reason: FinishReason | None) -> str:
        """What can be said now; all of it when the completion has ended."""
        self._tokens.extend(tokens)
        before = self._tokenizer.decode(self._tokens[self._from : self._said])
        text = self._tokenizer.decode(self._tokens[self._from :])
        if finish_reason is None and (len(text) <= len(before) or text.endswith(_UNFINISHED)):
            return ""
        self._from, self._said = self._said, len(self._tokens)
        return text[len(before) :]


def error(message: str) -> dict[str, Any]:
    """A refusal."""
    return {"error": {"message": message, "type": "invalid_request_error"}}


def _text(content: object) -> str:
    """A message's content, which may come in parts."""
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    texts = [part.get("text") for part in parts if isinstance(part, dict) and part.get("type") == "text"]
    found = [text for text in texts if isinstance(text, str)]
    if len(found) < len(parts):
        raise DataError("a message's content is a text, or a list of {'type': 'text', 'text': ...}")
    return "".join(found)


def _number(body: Mapping[str, Any], key: str, default: float) -> float:
    value = body.get(key)
    return default if value is None else float(value)


def _usage(asked: int, new: int) -> dict[str, int]:
    return {"prompt_tokens": asked, "completion_tokens": new, "total_tokens": asked + new}
