"""Waiting before a service is asked again."""

from datetime import datetime, timedelta, timezone
from email.utils import format_datetime

from align_core.backoff import backoff, retry_after


def test_waits_double_up_to_the_longest_with_jitter() -> None:
    for attempt, full in [(1, 0.5), (2, 1.0), (3, 2.0), (9, 8.0)]:
        waits = [backoff(attempt, first=0.5, longest=8.0) for _ in range(100)]
        assert full / 2 <= min(waits) < max(waits) <= full


def test_retry_after_holds_seconds_or_a_date() -> None:
    date = format_datetime(datetime.now(timezone.utc) + timedelta(seconds=90), usegmt=True)
    assert 85 < (retry_after(date) or 0) <= 90
    assert retry_after("12") == 12
    assert retry_after("-3") == 0
    assert retry_after("soon") is None
    assert retry_after(None) is None
