"""Lets a model answer the questions, through a live engine or a service; each turn goes to its sheet as it comes.

The second turn is asked with the model's own first one before it. A request that failed is never an answer. Knows
nothing of files, or of how engines start.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from align_core.config import SamplingConfig
from align_core.contracts import Judge, RolloutEngine
from align_core.errors import ConfigError, WorkerError
from align_core.text import Tokenizer, render_prompt
from align_core.types import ChatRequest, Prompt
from align_eval.digest import digest
from align_eval.drive import Job, drive
from align_eval.errors import UnansweredError
from align_eval.mt_bench.questions import Question
from align_eval.mt_bench.sheet import AnswerSheet, Conversation

_NEXT_TURN = "\n\nHuman:"  # a model of the Human/Assistant template that does not stop goes on with the user's turn
_PROBE = ({"role": "user", "content": "u1"}, {"role": "assistant", "content": "a1"}, {"role": "user", "content": "u2"})
_NO_LIMIT = 10**9


def template_hash(tokenizer: Tokenizer, template: str) -> str:
    """Of the token ids that the template makes of a two-turn conversation: what the model really reads."""
    return digest(render_prompt(tokenizer, _PROBE, template=template, max_tokens=_NO_LIMIT).tolist())


def answer_with_engine(
    engine: RolloutEngine,
    tokenizer: Tokenizer,
    sheet: AnswerSheet,
    *,
    context: int,
    at_once: int = 40,
    progress: Callable[[int], None] = lambda turns: None,
) -> None:
    """Answers what the sheet lacks: all first turns, then all second ones, at most `at_once` a call of the engine.

    Args:
        context: longest prompt plus answer that the engine takes, tokens; a longer prompt loses the beginning of its
            oldest turn, and the record says how many tokens.

    Raises:
        ConfigError: max_tokens leaves no room for a prompt.
        WorkerError: the engine gave up an answer.
    """
    room = context - sheet.settings.max_tokens
    if room < 1:
        raise ConfigError(
            f"max_tokens {sheet.settings.max_tokens} leaves no room for a prompt in a context of {context} tokens; "
            "lower max_tokens or raise context"
        )
    for turn in range(1, sheet.turns + 1):
        by_temperature: dict[float, list[Question]] = {}
        for question in sheet.missing(turn):
            by_temperature.setdefault(sheet.settings.temperature_of(question), []).append(question)
        for temperature, group in by_temperature.items():
            for first in range(0, len(group), at_once):
                part = group[first : first + at_once]
                _generate(engine, tokenizer, sheet, part, turn=turn, temperature=temperature, room=room)
                progress(len(part))


def _generate(
    engine: RolloutEngine,
    tokenizer: Tokenizer,
    sheet: AnswerSheet,
    questions: Sequence[Question],
    *,
    turn: int,
    temperature: float,
    room: int,
) -> None:
    """One call of the engine: this turn of these questions."""
    settings = sheet.settings
    rendered = [_render(tokenizer, sheet.conversation(q), template=settings.template, room=room) for q in questions]
    stop = (_NEXT_TURN,) if settings.template == "human-assistant" else ()
    sampling = SamplingConfig(max_tokens=settings.max_tokens, temperature=temperature, seed=settings.seed, stop=stop)
    ids = [question.id * sheet.turns + turn for question in questions]  # they seed the sampling
    prompts = [Prompt(id=number, tokens=tokens) for number, (tokens, _) in zip(ids, rendered)]
    completions = engine.generate(prompts, sampling)
    for question, (tokens, cut), completion in zip(questions, rendered, completions, strict=True):
        if completion.finish_reason == "abort":
            raise WorkerError(f"the engine gave up turn {turn} of question {question.id}; run again to continue")
        text = tokenizer.decode(completion.tokens)
        sheet.put(
            question,
            text.partition(_NEXT_TURN)[0] if stop else text,
            finish_reason=completion.finish_reason,
            prompt_tokens=len(tokens),
            prompt_cut=cut,
            completion_tokens=len(completion.tokens),
        )


def _render(
    tokenizer: Tokenizer, conversation: Conversation, *, template: str, room: int
) -> tuple[NDArray[np.int32], int]:
    """int32 [L], the prompt, and how many tokens it lost to fit."""
    whole = render_prompt(tokenizer, conversation, template=template, max_tokens=_NO_LIMIT)
    if len(whole) <= room:
        return whole, 0
    cut = render_prompt(tokenizer, conversation, template=template, max_tokens=room)
    return cut, len(whole) - len(cut)


async def answer_with_service(
    service: Judge, sheet: AnswerSheet, *, at_once: int, progress: Callable[[int], None] = lambda turns: None
) -> list[UnansweredError]:
    """Answers what the sheet lacks, each question's turns in order; returns the errors of what stayed unanswered.

    Raises:
        RefusedError: the service refused; what is in the sheet stays.
    """

    def job(question: Question) -> Job:
        async def run() -> None:
            for _ in range(len(sheet.records(question)), len(question.turns)):
                reply = await service.reply(
                    ChatRequest(
                        messages=sheet.conversation(question),
                        max_tokens=sheet.settings.max_tokens,
                        temperature=sheet.settings.temperature_of(question),
                        seed=sheet.settings.seed,
                    )
                )
                sheet.put(
                    question,
                    reply.text,
                    finish_reason=reply.finish_reason,
                    prompt_tokens=reply.prompt_tokens,
                    completion_tokens=reply.completion_tokens,
                    served_model=reply.model,
                )
                progress(1)

        return run

    return await drive([job(question) for question in sheet.questions], at_once=at_once)
