"""Lines between processes of a node: whole messages, the caller's number, strangers, and ends that hang up."""

import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from align_core.ray.lines import Exchange, Line, dial


@pytest.fixture
def exchange() -> Iterator[Exchange]:
    exchange = Exchange()
    yield exchange
    exchange.close()


def never() -> None:
    """Nothing to check."""


def test_callers_get_the_place_of_their_number_and_any_message_arrives_whole(exchange: Exchange) -> None:
    ends: dict[int, Line] = {}
    for number in (2, 0, 1):  # a connection waits in the queue until it is accepted
        ends[number] = dial(exchange.address, exchange.secret, number)
    lines = exchange.accept(3, never)
    for size in (0, 1, 1 << 16, (1 << 16) + 1, 5_000_000):
        message = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
        for number, line in enumerate(lines):
            sender = threading.Thread(target=line.send, args=[message + bytes([number])])
            sender.start()
            assert ends[number].receive() == message + bytes([number])
            sender.join()
    for line in [*lines, *ends.values()]:
        line.close()


def test_a_stranger_is_turned_away(exchange: Exchange) -> None:
    stranger = dial(exchange.address, "guess", 0)
    silent = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    silent.connect(exchange.address)
    silent.close()
    friend = dial(exchange.address, exchange.secret, 0)
    (line,) = exchange.accept(1, never)
    friend.send(b"hello")
    assert line.receive() == b"hello"
    assert stranger.receive() is None
    for end in (line, friend, stranger):
        end.close()


def test_only_this_user_may_enter_and_nothing_stays(exchange: Exchange) -> None:
    folder = Path(exchange.address).parent
    assert folder.stat().st_mode & 0o777 == 0o700
    exchange.close()
    assert not folder.exists()


def test_a_long_path_for_temporary_files_does_no_harm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / ("x" * 90)).mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / ("x" * 90)))
    exchange = Exchange()
    dial(exchange.address, exchange.secret, 0).close()
    exchange.close()


def test_a_caller_that_will_never_call_is_looked_after(exchange: Exchange) -> None:
    def check() -> None:
        raise KeyError("dead")

    with pytest.raises(KeyError, match="dead"):
        exchange.accept(1, check)


def test_who_waits_for_a_message_hears_that_the_line_is_closed(exchange: Exchange) -> None:
    end = dial(exchange.address, exchange.secret, 0)
    (line,) = exchange.accept(1, never)
    found: list[object] = []
    threads = [threading.Thread(target=lambda each=each: found.append(each.receive())) for each in (line, end)]
    for thread in threads:
        thread.start()
    time.sleep(0.1)
    line.close()
    for thread in threads:
        thread.join(60)
    assert found == [None, None]
    end.close()
