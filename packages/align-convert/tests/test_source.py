"""`load_any` knows a directory by what is in it."""

from pathlib import Path

import pytest

from align_convert import FormatError, load_any


def test_directory_of_no_known_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="is neither a Hugging Face directory"):
        load_any(tmp_path)
    with pytest.raises(FormatError, match="is not a directory"):
        load_any(tmp_path / "nowhere")
