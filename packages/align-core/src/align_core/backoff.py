"""How long to wait before a service that failed is asked again. Knows nothing of requests."""

import email.utils
import random
import time

_JITTER = random.Random()  # of its own, so that waiting takes no numbers from a run's


def backoff(attempt: int, *, first: float, longest: float) -> float:
    """Seconds to wait after the failure of `attempt` (1, 2, ...).

    Doubling from `first` to `longest`, with jitter, so that requests which failed together do not return together.
    """
    return min(longest, first * float(2 ** (attempt - 1))) * _JITTER.uniform(0.5, 1.0)


def retry_after(value: str | None) -> float | None:
    """Seconds of a Retry-After header, which holds seconds or a date; None when it is absent or unreadable."""
    if not value:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None
