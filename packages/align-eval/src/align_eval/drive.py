"""Runs many requests side by side: collects what stayed unanswered, stops everything at the first refusal.

Knows nothing of what is asked.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable

from align_eval.errors import UnansweredError

Job = Callable[[], Awaitable[None]]


async def drive(jobs: Iterable[Job], *, at_once: int) -> list[UnansweredError]:
    """Runs all jobs, at most `at_once` of them at a time.

    The errors of jobs that raised UnansweredError are returned; any other error ends all jobs and is raised.
    """
    unanswered: list[UnansweredError] = []
    slots = asyncio.Semaphore(at_once)

    async def run(job: Job) -> None:
        async with slots:
            try:
                await job()
            except UnansweredError as error:
                unanswered.append(error)

    tasks = [asyncio.ensure_future(run(job)) for job in jobs]
    try:
        await asyncio.gather(*tasks)
    finally:  # after success there is nothing to cancel
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return unanswered
