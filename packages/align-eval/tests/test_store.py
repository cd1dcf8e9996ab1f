"""The store: what a crash leaves is whole lines, and a key occurs once."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from align_core.errors import ConfigError, DataError
from align_eval.store import Store, read_store

FIELDS = ("id", "turn")


def test_records_are_found_again(tmp_path: Path) -> None:
    path = tmp_path / "a" / "store.jsonl"
    with Store(path, FIELDS) as store:
        store.append({"id": 1, "turn": 2, "text": "caf\u00e9\n\u2028"})
        assert (1, 2) in store
    with Store(path, FIELDS) as store:
        assert store.get((1, 2)) == {"id": 1, "turn": 2, "text": "caf\u00e9\n\u2028"}
        assert store.get((1, 1)) is None
        assert len(store) == 1
    assert read_store(path, FIELDS)[1, 2]["text"] == "caf\u00e9\n\u2028"
    assert read_store(tmp_path / "none", FIELDS) == {}


def test_second_record_of_a_key_is_refused(tmp_path: Path) -> None:
    with Store(tmp_path / "s", FIELDS) as store:
        store.append({"id": 1, "turn": 2})
        with pytest.raises(DataError, match="already holds a record of id 1, turn 2"):
            store.append({"id": 1, "turn": 2, "more": True})
        with pytest.raises(DataError, match="no 'turn'"):
            store.append({"id": 1})
    assert len((tmp_path / "s").read_text().splitlines()) == 1


@pytest.mark.parametrize("torn", [b'{"id": 2, "tu', b'{"id": 2, "turn": 1}', b"\xff"])
def test_half_a_line_is_cut_off(tmp_path: Path, torn: bytes) -> None:
    """Even a whole object without its newline is torn: the next one would be glued to it."""
    path = tmp_path / "s"
    path.write_bytes(b'{"id": 1, "turn": 1}\n' + torn)
    assert list(read_store(path, FIELDS)) == [(1, 1)]
    with Store(path, FIELDS) as store:
        assert [record["id"] for record in store] == [1]
        store.append({"id": 3, "turn": 1})
    assert path.read_bytes() == b'{"id": 1, "turn": 1}\n{"id": 3, "turn": 1}\n'


@pytest.mark.parametrize("line", [b"junk", b'{"id": 1}', b'{"id": 0, "turn": 1}', b"[]"])
def test_bad_line_in_the_middle_is_named_and_left(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "s"
    content = b'{"id": 0, "turn": 1}\n' + line + b'\n{"id": 5, "turn": 1}\n'
    path.write_bytes(content)
    with pytest.raises(DataError, match="line 2"):
        Store(path, FIELDS)
    assert path.read_bytes() == content


def test_one_process_writes_at_a_time(tmp_path: Path) -> None:
    with Store(tmp_path / "s", FIELDS), pytest.raises(ConfigError, match="in use by another process"):
        Store(tmp_path / "s", FIELDS)
    Store(tmp_path / "s", FIELDS).close()


def test_what_was_appended_survives_a_kill(tmp_path: Path) -> None:
    """The child prints each number after append has returned; every printed number must be in the file."""
    path = tmp_path / "s"
    code = (
        "import sys\nfrom pathlib import Path\nfrom align_eval.store import Store\n"
        "store = Store(Path(sys.argv[1]), ('id', 'turn'))\n"
        "for i in range(10**6):\n"
        "    store.append({'id': i, 'turn': 1, 'text': 'x' * 3000})\n    print(i, flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) == 20:
            break
    os.kill(process.pid, signal.SIGKILL)
    printed = 20
    for line in process.stdout:
        printed = int(line)
    process.wait()
    process.stdout.close()
    with Store(path, FIELDS) as store:  # the kernel has freed the lock
        assert len(store) >= printed + 1
    assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == list(range(len(store)))
