"""A file or directory is there whole or not at all."""

from pathlib import Path

import pytest

from align_convert.atomic import new_directory, new_file


def test_file_appears_only_when_complete(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file"
    with new_file(path) as file:
        file.write(b"whole")
        assert not path.exists()
    assert path.read_bytes() == b"whole"
    assert [p.name for p in path.parent.iterdir()] == ["file"]


def test_failing_file_leaves_the_old_one(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(RuntimeError, match="stop"), new_file(tmp_path / "file") as file:
        file.write(b"new")
        raise RuntimeError("stop")
    assert (tmp_path / "file").read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_directory_appears_only_when_complete_and_replaces_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "out"
    for content in (b"1", b"2"):
        with new_directory(path) as temporary:
            (temporary / content.decode()).write_bytes(content)
            assert not (path / content.decode()).exists()
    assert [p.name for p in path.iterdir()] == ["2"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    (tmp_path / "ordinary").mkdir()
    assert path.stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def test_failing_directory_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.mkdir()
    (path / "old").write_bytes(b"")
    with pytest.raises(RuntimeError, match="stop"), new_directory(path) as temporary:
        (temporary / "new").write_bytes(b"")
        raise RuntimeError("stop")
    assert [p.name for p in path.iterdir()] == ["old"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
