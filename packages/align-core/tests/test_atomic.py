"""Directories and files appear whole or not at all, and nothing of the user's is overwritten."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from align_core import atomic
from align_core.atomic import is_mount_point, new_directory, replace_directory, write_json, write_text
from align_core.errors import DataError


def test_directory_appears_only_when_the_block_has_ended(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with new_directory(out) as staging:
        (staging / "a").write_text("1")
        assert not out.exists()
    assert (out / "a").read_text() == "1"
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_directory_is_as_readable_as_one_made_by_hand(tmp_path: Path) -> None:
    with new_directory(tmp_path / "out"):
        pass
    (tmp_path / "hand").mkdir()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "hand").stat().st_mode


def test_failed_block_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyError), new_directory(tmp_path / "out") as staging:
        (staging / "a").write_text("1")
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_directory_that_holds_something_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("1")
    with pytest.raises(DataError, match=r"out' exists already; remove it or choose"), new_directory(tmp_path / "out"):
        pytest.fail("the block must not run")
    assert (tmp_path / "out" / "mine").read_text() == "1"


def test_file_in_place_of_the_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(DataError, match="exists already"), new_directory(tmp_path / "out"):
        pytest.fail("the block must not run")


def test_empty_directory_is_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with new_directory(tmp_path / "out") as staging:
        (staging / "a").write_text("1")
    assert (tmp_path / "out" / "a").exists()


def test_replaced_directory_holds_the_new_files_only(tmp_path: Path) -> None:
    for name, file in (("old", "a"), ("new", "b")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).touch()
    replace_directory(tmp_path / "new", tmp_path / "old")
    assert [path.name for path in tmp_path.rglob("*")] == ["old", "b"]


def test_text_replaces_the_file_whole_and_leaves_no_other(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file"
    write_text(path, "a longer text")
    write_text(path, "caf\u00e9")
    assert path.read_text(encoding="utf-8") == "caf\u00e9"
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]


def test_json_keeps_the_order_of_keys(tmp_path: Path) -> None:
    write_json(tmp_path / "file", {"b": 1, "a": [None, 0.5]})
    assert list(json.loads((tmp_path / "file").read_text())) == ["b", "a"]


def test_value_that_json_cannot_hold_leaves_the_old_file(tmp_path: Path) -> None:
    write_json(tmp_path / "file", 1)
    with pytest.raises(TypeError):
        write_json(tmp_path / "file", object())
    assert (tmp_path / "file").read_text() == "1\n"


def test_link_stays_and_its_target_is_filled(tmp_path: Path) -> None:
    (tmp_path / "disk" / "target").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "target")
    with new_directory(tmp_path / "link") as staging:
        (staging / "a").touch()
    assert (tmp_path / "link").is_symlink()
    assert [path.name for path in (tmp_path / "disk").rglob("*")] == ["target", "a"]


def test_directory_of_the_same_disk_that_is_mounted_is_a_mount_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As /proc/self/mountinfo writes it, with a space in its name; without that file nothing is known."""
    (tmp_path / "my out" / "below").mkdir(parents=True)
    line = f"63 43 254:0 /a {tmp_path}/my\\040out rw,relatime - ext4 /dev/vda rw\n"
    (tmp_path / "mountinfo").write_text(line)
    monkeypatch.setattr(atomic, "_MOUNTS", tmp_path / "mountinfo")
    (tmp_path / "link").symlink_to(tmp_path / "my out")
    found = [is_mount_point(tmp_path / name) for name in ("my out", "link", "my out/below", "none")]
    assert found == [True, True, False, False]
    monkeypatch.setattr(atomic, "_MOUNTS", tmp_path / "none")
    assert not is_mount_point(tmp_path / "my out")


def test_writing_to_a_mounted_directory_is_refused_before_any_work(tmp_path: Path) -> None:
    """Where this user may mount something of its own; renaming to such a directory fails (EBUSY)."""
    for name in ("disk", "out"):
        (tmp_path / name).mkdir()
    code = (
        "import pathlib, sys\n"
        "from align_core.atomic import new_directory\n"
        "out = pathlib.Path(sys.argv[1])\n"
        "with new_directory(out): sys.exit('the block must not run')\n"
    )
    words = ["unshare", "-rm", "sh", "-c", 'mount --bind "$1" "$2" || exit 77; exec "$3" -c "$4" "$2"', "sh"]
    try:
        done = subprocess.run(
            [*words, str(tmp_path / "disk"), str(tmp_path / "out"), sys.executable, code],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
    except FileNotFoundError:
        pytest.skip("there is no unshare here")
    if done.returncode == 77 or done.stderr.startswith("unshare"):
        pytest.skip(f"nothing can be mounted here: {done.stderr.strip()}")
    assert "is a mount point, which cannot be replaced" in done.stderr
    assert list((tmp_path / "disk").iterdir()) == []
