"""A file or directory is there whole or not at all."""

import shutil
from pathlib import Path

import pytest

from align_convert import FormatError
from align_convert.atomic import check_destination, check_space, new_directory, new_file


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


def test_link_stays_and_its_target_is_replaced(tmp_path: Path) -> None:
    disk, link = tmp_path / "disk", tmp_path / "link"
    (disk / "target").mkdir(parents=True)
    link.symlink_to(disk / "target")
    for content in ("1", "2"):
        with new_directory(link) as temporary:
            assert temporary.parent == disk
            (temporary / content).touch()
    assert link.is_symlink()
    assert [p.name for p in link.iterdir()] == ["2"]
    assert [p.name for p in disk.iterdir()] == ["target"]


def test_space_is_that_of_the_disk_a_dangling_link_points_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "new" / "out")
    measured: list[Path] = []
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: (measured.append(path), usage)[1])
    check_space(tmp_path / "link", 1)
    assert measured == [(tmp_path / "disk").resolve()]


def test_mount_point_is_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/")
    for path in (Path("/"), tmp_path / "link"):
        with pytest.raises(FormatError, match="is a mount point, which cannot be replaced; give a folder below it"):
            check_destination(path, overwrite=True)
