"""One piece of work at a time beside training, in a thread; its error is raised to whoever waits for it.

Knows nothing about what the work is.
"""

import threading
from collections.abc import Callable


class Background:
    """Runs work in a thread; a second piece begins when the first has ended."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Begin, after the piece before; raises the error in which that one ended."""
        self.wait()

        def run() -> None:
            try:
                work()
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=run, name="align-background", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Return when nothing is under way; raises the error in which the last piece ended, once."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error
