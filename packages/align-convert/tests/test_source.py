"""`load_any` knows a directory by what is in it."""

from pathlib import Path

import pytest

from align_convert import FormatError, load_any


def test_directory_of_no_known_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="is neither a Hugging Face directory"):
        load_any(tmp_path)
    with pytest.raises(FormatError, match="is not a directory"):
        load_any(tmp_path / "nowhere")


def test_torch_dist_is_named_as_such(tmp_path: Path) -> None:
    (tmp_path / "iter_0000001").mkdir()
    (tmp_path / "iter_0000001" / "__0_0.distcp").write_bytes(b"")
    with pytest.raises(FormatError, match="is a torch_dist checkpoint, which cannot be read yet"):
        load_any(tmp_path)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("1")
    with pytest.raises(FormatError, match="is a torch_dist checkpoint, which cannot be read yet"):
        load_any(tmp_path)
