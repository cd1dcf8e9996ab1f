"""SIGTERM as a request: the run ends when its step, or its finish, is done and saved, not in the middle."""

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

logger = logging.getLogger(__name__)


@contextmanager
def stop_request() -> Iterator[threading.Event]:
    """An event that the first SIGTERM sets while the block lasts; a second one ends the process at once.

    Outside the main thread, where Python handles no signals, it is never set.
    """
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def request(number: int, frame: FrameType | None) -> None:
        event.set()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        logger.info("SIGTERM: what is under way is finished and saved, then the run stops; a second one stops it now")

    before = signal.signal(signal.SIGTERM, request)
    try:
        yield event
    finally:
        signal.signal(signal.SIGTERM, before)
