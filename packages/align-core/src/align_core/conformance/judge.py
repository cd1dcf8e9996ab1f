"""Checks of a judge: several questions at once, each with its own reply, never an error in place of one."""

import asyncio

from align_core.conformance.expectations import expect
from align_core.contracts import Judge
from align_core.types import ChatReply, ChatRequest

_QUESTIONS = ("What is good about the answer 'Paris'?", "Rate the answer 'London' from 1 to 10.", "Say one word.")


async def check_judge(judge: Judge, *, max_tokens: int = 64) -> None:
    """Asks side by side, checks the replies, and closes the judge, twice."""
    requests = [
        ChatRequest(messages=({"role": "user", "content": text},), max_tokens=max_tokens, temperature=0.0)
        for text in _QUESTIONS
    ]
    try:
        replies = await asyncio.gather(*(judge.reply(request) for request in requests))
    finally:
        await judge.close()
    await judge.close()
    for reply in replies:
        expect(isinstance(reply, ChatReply), f"a reply is a {type(reply).__name__}, not an align_core.types.ChatReply")
        expect(bool(reply.text.strip()), "a reply is empty; a judge asks again, or raises")
        expect(reply.finish_reason in ("stop", "length"), f"finish_reason is {reply.finish_reason!r}")
        expect(bool(reply.model), "a reply does not name its model")
        expect(reply.lost_attempts >= 0, f"lost_attempts is {reply.lost_attempts}")
        counted = reply.completion_tokens
        expect(counted is None or 0 <= counted <= max_tokens, f"{counted} tokens for a limit of {max_tokens}")
