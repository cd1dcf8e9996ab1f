"""A process's end of a transfer that repeats: joined when first needed, and anew when the others have changed."""

from collections.abc import Mapping

from torch import Tensor

from align_core.errors import SyncError
from align_core.transfer.links import Link, Route, routes
from align_core.transfer.rendezvous import close_meeting
from align_core.transfer.seats import Seat


class LinkEnd:
    """A process's end of the links that it sits down to, one after another."""

    def __init__(self) -> None:
        self._seat: Seat | None = None
        self._plan: list[Route] = []
        self._link: Link | None = None

    def sit(self, seat: Seat) -> None:
        """Leaves the seat of before and takes this one; waits for nobody.

        Raises:
            LayoutError: names a weight of which an element has no sender.
        """
        self.close()
        self._plan = routes(seat.held, seat.wanted)
        self._seat = seat

    def join(self) -> None:
        """Meets the others, unless that is done; `send` and `receive` do so themselves.

        Raises:
            SyncError: one of them did not come.
        """
        self._joined()

    def send(self, tensors: Mapping[str, Tensor]) -> None:
        """Gives the receivers their parts of `tensors`; see `Link.send`."""
        self._joined().send(tensors, self._plan)

    def receive(self, tensors: Mapping[str, Tensor]) -> None:
        """Fills this rank's parts of `tensors`; see `Link.receive`."""
        self._joined().receive(tensors, self._plan)

    def close(self) -> None:
        """Leaves; the first rank takes the meeting place with it."""
        if self._link is not None:
            self._link.close()
        if self._seat is not None and self._seat.rank == 0:
            close_meeting(self._seat.meeting.place)
        self._seat = self._link = None

    def _joined(self) -> Link:
        if self._seat is None:
            raise SyncError("this process has no seat in a weight transfer; it is given one first")
        if self._link is None:
            self._link = Link(self._seat.meeting, self._seat.rank)
        return self._link
