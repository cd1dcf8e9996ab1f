"""A copy that is killed goes on to the same bytes, and no reader ever takes half of one for a whole."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from align_convert import FormatError, Layout, ModelConfig, load_any
from align_convert.cli import main
from align_convert.copy import plan_to_megatron, run, to_megatron
from align_convert.manifest import JOURNAL, MANIFEST, first_damage, read_manifest
from align_convert.transfer import MIN_MEMORY, Settings

Make = Callable[..., ModelConfig]
MakeHf = Callable[..., Path]
LAYOUT = Layout(tp=2, pp=2)


def _files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def _stop_after(tiles: int) -> Callable[[int], None]:
    """A progress function that interrupts the copy after some tiles, as Ctrl-C does."""
    count = [0]

    def progress(_: int) -> None:
        count[0] += 1
        if count[0] > tiles:
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize("tiles", [0, 1, 17, 70])
def test_interrupted_copy_goes_on_to_the_same_bytes(
    make_config: Make, make_hf: MakeHf, tmp_path: Path, tiles: int
) -> None:
    source = load_any(make_hf(make_config()))
    to_megatron(source, tmp_path / "whole", layout=LAYOUT)
    plan = plan_to_megatron(source, tmp_path / "out", layout=LAYOUT)
    with pytest.raises(KeyboardInterrupt):
        run(plan, progress=_stop_after(tiles))
    assert not (tmp_path / "out").exists()
    redone: list[int] = []
    run(plan, resume=True, progress=redone.append)
    assert _files(tmp_path / "out") == _files(tmp_path / "whole")
    assert sum(redone) == plan.total_bytes
    assert not list(tmp_path.glob(".out*"))


def test_bytes_that_the_disk_lost_are_written_again(make_config: Make, make_hf: MakeHf, tmp_path: Path) -> None:
    """The journal names a tile whose checksum no longer holds, and ends in half a line, as after a power failure."""
    source = load_any(make_hf(make_config()))
    to_megatron(source, tmp_path / "whole", layout=LAYOUT)
    plan = plan_to_megatron(source, tmp_path / "out", layout=LAYOUT)
    with pytest.raises(KeyboardInterrupt):
        run(plan, progress=_stop_after(60))
    partial = tmp_path / ".out.partial"
    for path in partial.rglob("*.pt"):
        size = path.stat().st_size
        path.write_bytes(b"\0" * size)
    with (partial / JOURNAL).open("ab") as journal:
        journal.write(b'[7,[["iter_0000001/mp')
    (partial / ".config.json.partial-0badf00d").write_text("left over")
    run(plan, resume=True)
    assert _files(tmp_path / "out") == _files(tmp_path / "whole")


def test_unfinished_copy_of_something_else_is_not_continued(make_config: Make, make_hf: MakeHf, tmp_path: Path) -> None:
    source = load_any(make_hf(make_config()))
    with pytest.raises(KeyboardInterrupt):
        run(plan_to_megatron(source, tmp_path / "out", layout=LAYOUT), progress=_stop_after(3))
    partial = tmp_path / ".out.partial"
    (partial / "config.json").write_text("{}")
    before = _files(partial)
    other = plan_to_megatron(source, tmp_path / "out", layout=Layout(tp=4))
    with pytest.raises(FormatError, match=r"of another source, layout or type, .* to go on, or without --resume"):
        run(other, resume=True)
    assert _files(partial) == before
    run(other)
    assert first_damage(tmp_path / "out") is None


def test_damaged_journal_is_refused_and_nothing_removed(make_config: Make, make_hf: MakeHf, tmp_path: Path) -> None:
    plan = plan_to_megatron(load_any(make_hf(make_config())), tmp_path / "out", layout=LAYOUT)
    with pytest.raises(KeyboardInterrupt):
        run(plan, progress=_stop_after(3))
    journal = tmp_path / ".out.partial" / JOURNAL
    journal.write_bytes(journal.read_bytes() + b"nonsense\n")
    before = _files(journal.parent)
    with pytest.raises(FormatError, match=r"is damaged: .* run without --resume to begin anew"):
        run(plan, resume=True)
    assert _files(journal.parent) == before


@pytest.mark.slow
def test_killed_process_leaves_nothing_that_looks_whole(make_config: Make, make_hf: MakeHf, tmp_path: Path) -> None:
    """SIGKILL in the middle of the tiles: after some of them, a reader of the progress takes its time."""
    source = make_hf(make_config())
    to_megatron(load_any(source), tmp_path / "whole", layout=LAYOUT)
    code = (
        "import sys, time; from pathlib import Path; from align_convert import Layout, load_any;"
        "from align_convert.copy import to_megatron; journal = Path(sys.argv[3]);"
        "read = lambda _: time.sleep(300 * (journal.is_file() and journal.read_bytes().count(b'\\n') >= 5));"
        "to_megatron(load_any(sys.argv[1]), sys.argv[2], layout=Layout(tp=2, pp=2), progress=read)"
    )
    journal = tmp_path / ".out.partial" / JOURNAL
    process = subprocess.Popen([sys.executable, "-c", code, str(source), str(tmp_path / "out"), str(journal)])
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and (not journal.is_file() or journal.read_bytes().count(b"\n") < 5):
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    with pytest.raises(FormatError):
        load_any(tmp_path / ".out.partial")
    options = ["--tp", "2", "--pp", "2", "--resume"]
    assert main(["to-megatron", str(source), str(tmp_path / "out"), *options]) == 0
    assert _files(tmp_path / "out") == _files(tmp_path / "whole")


def test_manifest_covers_every_byte_and_finds_a_changed_one(
    make_config: Make, make_hf: MakeHf, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "out"
    to_megatron(load_any(make_hf(make_config())), root, layout=Layout(tp=2))
    sizes = {name: size for name, (size, _) in read_manifest(root).items()}
    assert sizes == {name: len(data) for name, data in _files(root).items() if name != MANIFEST}
    assert main(["verify", str(root)]) == 0
    path = root / "iter_0000001" / "mp_rank_01" / "model_optim_rng.pt"
    data = bytearray(path.read_bytes())
    data[5000] ^= 1
    path.write_bytes(data)
    assert main(["verify", str(root)]) == 1
    assert "mp_rank_01/model_optim_rng.pt' is not as it was written, somewhere in bytes" in capsys.readouterr().out
    path.write_bytes(data[:-1])
    assert "it was written with" in str(first_damage(root))
    path.unlink()
    assert str(first_damage(root)).endswith("is missing")


def test_small_memory_one_thread_and_buffered_files_give_the_same_bytes(
    make_config: Make, make_hf: MakeHf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = load_any(make_hf(make_config(), dtype=torch.bfloat16))
    to_megatron(source, tmp_path / "a", layout=LAYOUT, dtype=torch.float32)
    monkeypatch.setattr("align_convert.transfer._TILE", 1000)  # tiles of a few rows
    settings = Settings(memory=MIN_MEMORY, threads=1, mode="buffered")
    to_megatron(source, tmp_path / "b", layout=LAYOUT, dtype=torch.float32, settings=settings)
    files_a, files_b = _files(tmp_path / "a"), _files(tmp_path / "b")
    files_a.pop(MANIFEST), files_b.pop(MANIFEST)
    assert files_a == files_b
