"""A direct line from the driver to each worker on its own node: a local socket that carries messages of bytes.

Ray starts, watches and ends the processes. But a call of an actor costs it most of a millisecond at both ends together,
and a step of eight ranks makes dozens of calls; the same message through a socket costs a twentieth.
The socket lies in a directory that only this user may enter, and each worker says a secret that came to it through Ray.
Knows nothing of what the messages mean.
"""

import contextlib
import hmac
import secrets
import shutil
import socket
import struct
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

_LENGTH = struct.Struct("<Q")
_SMALL = 1 << 16  # bytes up to which copying a message behind its length is cheaper than a second system call
_PATIENCE_S = 0.5  # how long a wait for a caller lasts before the caller's process is looked after
_PATH_BYTES = 107  # of a local socket, at most
_ANSWER_TIMEOUT_S = 120.0  # between the accepted task and the call; a busy machine takes seconds


class Line:
    """One end of a line."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection

    def fileno(self) -> int:
        """For `select`."""
        return self._socket.fileno()

    def send(self, message: bytes) -> None:
        """Raises OSError when the other end is gone."""
        length = _LENGTH.pack(len(message))
        if len(message) <= _SMALL:
            self._socket.sendall(length + message)
        else:
            self._socket.sendall(length)
            self._socket.sendall(message)

    def receive(self) -> bytearray | None:
        """The next message; None when the other end is gone."""
        try:
            length = self._exactly(_LENGTH.size)
            return None if length is None else self._exactly(_LENGTH.unpack(length)[0])
        except OSError:
            return None

    def hang_up(self) -> None:
        """A thread that waits for a message, at either end, hears that there will be none; the descriptor stays."""
        with contextlib.suppress(OSError):  # the other end has hung up already
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Hangs up and gives the descriptor back, which no thread may wait on then."""
        self.hang_up()
        self._socket.close()

    def _exactly(self, count: int) -> bytearray | None:
        message = bytearray(count)
        view, got = memoryview(message), 0
        while got < count:
            received = self._socket.recv_into(view[got:])
            if received == 0:
                return None
            got += received
        return message


class Exchange:
    """Where workers call in; for the time of that only."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="align-lines-", dir=folder_of_sockets(behind=40)))  # mode 0700
        self.address = str(self._folder / "socket")
        self.secret = secrets.token_hex(16)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(self.address)
        self._listener.listen(128)
        self._listener.settimeout(_PATIENCE_S)

    def accept(self, count: int, check: Callable[[], None]) -> list[Line]:
        """The lines of `count` callers, in the order of their numbers; `check` raises when one will never call."""
        lines: dict[int, Line] = {}
        deadline = time.monotonic() + _ANSWER_TIMEOUT_S
        while len(lines) < count:
            try:
                connection, _ = self._listener.accept()
            except TimeoutError:
                check()
                if time.monotonic() > deadline:
                    raise
                continue
            line = Line(connection)
            number, _, secret = bytes(line.receive() or b"").decode("ascii", "replace").partition(" ")
            if hmac.compare_digest(secret, self.secret) and number.isdigit():
                lines[int(number)] = line
            else:
                line.close()
        return [lines[number] for number in range(count)]

    def close(self) -> None:
        """No one can call in any more; lines that are open stay."""
        self._listener.close()
        shutil.rmtree(self._folder, ignore_errors=True)


def folder_of_sockets(*, behind: int) -> str:
    """The folder for temporary files, or /tmp where a socket, with `behind` bytes of path in there, finds no room."""
    usual = tempfile.gettempdir()
    return usual if len(usual.encode()) + behind <= _PATH_BYTES else "/tmp"


def dial(address: str, secret: str, number: int) -> Line:
    """The worker's end; `number` says which worker calls."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.connect(address)
    line = Line(connection)
    line.send(f"{number} {secret}".encode("ascii"))
    return line
