"""Where processes that are to form a group find each other, on one node or on several; the store is torch's.

A meeting is `file://PATH` for processes of one node, which needs no open port, or `tcp://HOST:PORT`.
"""

import shutil
import socket
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the first to start opens a meeting before it imports torch, so that the others need not wait for it
    from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]

_opened: dict[str, "TCPStore"] = {}  # lives as long as the process that the others connect to, or until it is closed
# A FileStore that is freed while another process removes its file waits for it, for minutes.
_joined: list["Store"] = []
_FILE = "file://"
_ANSWER_TIMEOUT_S = 10.0


def open_meeting(host: str = "") -> str:
    """Called in the process of the first: a meeting for processes of this node.

    Args:
        host: this node's address, where some of them are on other nodes.
    """
    if not host:
        return f"{_FILE}{tempfile.mkdtemp(prefix='align-ranks-')}/store"
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # noqa: PLC0415

    store = TCPStore(host, 0, is_master=True, wait_for_workers=False)
    meeting = f"tcp://{host}:{store.port}"
    _opened[meeting] = store
    return meeting


def join_meeting(meeting: str, *, ranks: int, timeout: timedelta = timedelta(minutes=5)) -> "Store":
    """The store, in any process; `timeout` is the longest wait for what another one is to put there."""
    from torch.distributed import FileStore, TCPStore  # type: ignore[attr-defined]  # noqa: PLC0415

    kind, _, place = meeting.partition("://")
    if kind == "file":
        store: Store = FileStore(place, ranks)
        _joined.append(store)
    else:
        host, _, port = place.rpartition(":")
        store = TCPStore(host, int(port), is_master=False, timeout=timeout)
    store.set_timeout(timeout)
    return store


def own_address(meeting: str) -> str:
    """The address under which this process can be reached by those of the meeting; never more than it takes."""
    kind, _, place = meeting.partition("://")
    if kind == "file":
        return "127.0.0.1"
    host, _, port = place.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=_ANSWER_TIMEOUT_S) as way:
        return str(way.getsockname()[0])


def close_meeting(meeting: str) -> None:
    """Frees what `open_meeting` made, in the process that called it or, for a file, in any of its node."""
    _opened.pop(meeting, None)
    if meeting.startswith(_FILE):
        shutil.rmtree(Path(meeting.removeprefix(_FILE)).parent, ignore_errors=True)
