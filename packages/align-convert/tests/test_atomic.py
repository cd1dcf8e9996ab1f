"""A file or directory is there whole or not at all."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from align_convert import FormatError, atomic
from align_convert.atomic import check_destination, check_space, is_mount_point, new_directory, new_file


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


def test_copying_to_a_mounted_directory_is_refused_before_any_work(tmp_path: Path) -> None:
    """Where this user may mount something of its own; renaming to such a directory fails (EBUSY)."""
    for name in ("disk", "out"):
        (tmp_path / name).mkdir()
    code = (
        "import pathlib, sys\n"
        "from align_convert.atomic import check_destination\n"
        "out = pathlib.Path(sys.argv[1])\n"
        "check_destination(out, overwrite=True)\n"
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
