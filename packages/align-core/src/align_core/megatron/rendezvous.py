"""Where the ranks of one model find each other, on one node or on several; the store is torch's.

A meeting is `file://PATH` for ranks of one node, which needs no open port, or `tcp://HOST:PORT`.
"""

from torch.distributed import FileStore, Store, TCPStore  # type: ignore[attr-defined]

_opened: list[TCPStore] = []  # lives as long as the process that the others connect to


def open_port(host: str) -> str:
    """Called in rank 0's process, whose node has the address `host`: a meeting for ranks on several nodes."""
    store = TCPStore(host, 0, is_master=True, wait_for_workers=False)
    _opened.append(store)
    return f"tcp://{host}:{store.port}"


def join_meeting(meeting: str, *, ranks: int) -> Store:
    """The store, in any rank's process."""
    kind, _, place = meeting.partition("://")
    if kind == "file":
        return FileStore(place, ranks)
    host, _, port = place.rpartition(":")
    return TCPStore(host, int(port), is_master=False)
