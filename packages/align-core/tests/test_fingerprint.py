"""The name of what a model directory holds."""

from pathlib import Path

from align_core.fingerprint import fingerprint


def test_fingerprint_changes_with_content_and_not_with_the_place(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_bytes(bytes(3_000_000))
    first = fingerprint(tmp_path / "a")
    assert fingerprint(tmp_path / "b") == first
    (tmp_path / "b" / "notes.md").write_text("x")
    assert fingerprint(tmp_path / "b") == first
    changed = bytearray(3_000_000)
    changed[-1] = 1
    (tmp_path / "b" / "model.safetensors").write_bytes(changed)
    assert fingerprint(tmp_path / "b") != first
    (tmp_path / "a" / "config.json").write_text('{"a": 1}')
    assert fingerprint(tmp_path / "a") != first
