"""The check of a wheel must see what is missing and what came along."""

import sys
from importlib import util
from pathlib import Path
from types import ModuleType

import pytest


def _load() -> ModuleType:
    spec = util.spec_from_file_location("import_modules", Path(__file__).parent / "import_modules.py")
    assert spec is not None
    assert spec.loader is not None
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


import_modules = _load()


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """`wheelhouse` with a healthy module, one that needs an absent package, and the same below `extra`."""
    root = tmp_path / "wheelhouse"
    (root / "extra").mkdir(parents=True)
    (root / "__init__.py").write_text("")
    (root / "healthy.py").write_text("import json\n")
    (root / "needy.py").write_text("import package_that_nobody_has\n")
    (root / "extra" / "__init__.py").write_text("import package_that_nobody_has\n")
    (root / "extra" / "inner.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name.partition(".")[0] == "wheelhouse"]:
        monkeypatch.delitem(sys.modules, name)
    return "wheelhouse"


def test_optional_modules_and_all_below_are_left_out(package: str) -> None:
    found = list(import_modules.modules(package, optional=["wheelhouse.extra"]))
    assert found == ["wheelhouse", "wheelhouse.healthy", "wheelhouse.needy"]
    assert "wheelhouse.extra.inner" in import_modules.modules(package, optional=[])


def test_module_that_does_not_import_is_reported(package: str) -> None:
    failed = import_modules.failures(["wheelhouse.healthy", "wheelhouse.needy"])
    assert list(failed) == ["wheelhouse.needy"]
    assert "package_that_nobody_has" in failed["wheelhouse.needy"]


def test_installed_packages_are_found_without_importing_them() -> None:
    assert import_modules.present(["json", "package_that_nobody_has", "package_that_nobody_has.part"]) == ["json"]


def test_exit_status_tells(package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["x", package, "--optional=wheelhouse.extra", "--optional=wheelhouse.needy"])
    assert import_modules.main() == 0
    assert "2 of 2 modules" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["x", package, "--optional=wheelhouse.extra"])
    assert import_modules.main() == 1
    assert "wheelhouse.needy does not import" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["x", package, "--absent=json"])
    assert import_modules.main() == 1
    assert "brought along json" in capsys.readouterr().out
