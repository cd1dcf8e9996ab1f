"""The package as a whole: light to import, everything public named, errors that travel."""

import importlib.resources
import inspect
import pickle
import re
import subprocess
import sys

import pytest

import align_algos
from align_algos import InputError, NonFiniteError


def test_public_names_exist_and_are_sorted() -> None:
    assert all(hasattr(align_algos, name) for name in align_algos.__all__)
    assert sorted(align_algos.__all__) == align_algos.__all__


def test_import_pulls_in_nothing_but_torch() -> None:
    """Modules that torch alone does not load must be ours: no sibling package, no third party."""
    program = (
        "import sys, torch; before = set(sys.modules); import align_algos; "
        "print({name.split('.')[0] for name in set(sys.modules) - before})"
    )
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "{'align_algos'}"


def test_errors_survive_a_trip_between_processes() -> None:
    for kind in (InputError, NonFiniteError):
        error = pickle.loads(pickle.dumps(kind("logprobs_N holds nan")))  # noqa: S301
        assert type(error) is kind and isinstance(error, ValueError) and str(error) == "logprobs_N holds nan"


def test_every_reference_to_a_paper_leads_to_its_section_and_every_loss_file_has_one() -> None:
    """The anchors are those that a Markdown heading gets: lower case, spaces to hyphens, no other punctuation."""
    package = importlib.resources.files("align_algos")
    papers = package.joinpath("PAPERS.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## (.*)$", papers, flags=re.MULTILINE)
    anchors = {re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    shared = {"__init__.py", "output.py", "registry.py", "pairs.py"}  # no algorithm of their own
    for folder in ("", "losses", "advantages"):
        for path in package.joinpath(folder).iterdir():
            if not path.name.endswith(".py"):
                continue
            used = set(re.findall(r"PAPERS\.md#([a-z0-9-]+)", path.read_text(encoding="utf-8")))
            assert used <= anchors, f"{path.name} refers to {sorted(used - anchors)}"
            if folder == "losses" and path.name not in shared:
                assert f"losses/{path.name}" in papers, f"{path.name} has no section in PAPERS.md"


def documented(function: object) -> set[str]:
    """The arguments on which its docstring, or one to which that sends the reader for them, has a line of its own."""
    text = inspect.getdoc(function) or ""
    names = {name for line in re.findall(r"^    ([\w, ]+):", text, flags=re.MULTILINE) for name in line.split(", ")}
    for sentence in re.findall(r"^ *(?:Args|Others)\b[^.]*as in `[\w.]+`", text, flags=re.MULTILINE):
        names |= documented(getattr(align_algos, sentence.rstrip("`").rpartition("`")[2].rpartition(".")[2]))
    return names


PUBLIC_FUNCTIONS = [name for name in align_algos.__all__ if inspect.isfunction(getattr(align_algos, name))]


@pytest.mark.parametrize("name", PUBLIC_FUNCTIONS)
def test_every_tensor_of_a_public_function_is_described(name: str) -> None:
    """Its name says a shape (`mask_N`), its line in the docstring the dtype and what it means."""
    function = getattr(align_algos, name)
    tensors = {parameter for parameter in inspect.signature(function).parameters if re.search("_[A-Z]+$", parameter)}
    tensors |= {"offsets"} & inspect.signature(function).parameters.keys()
    assert tensors <= documented(function), f"{name} says nothing on {sorted(tensors - documented(function))}"


@pytest.mark.parametrize("name", [name for name in PUBLIC_FUNCTIONS if name.endswith("_loss")])
def test_every_loss_has_a_source(name: str) -> None:
    assert name in ("get_loss", "register_loss") or "\nSource: " in (inspect.getdoc(getattr(align_algos, name)) or "")


def test_import_takes_little_longer_than_torch_alone() -> None:
    """Measured in the child, after torch.

    The bound of 1.5 s is far above what it takes (0.05 s on two EPYC cores), so that only something heavy that comes
    along can break it.
    """
    program = "import time, torch; start = time.perf_counter(); import align_algos; print(time.perf_counter() - start)"
    seconds = []
    for _ in range(3):
        output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
        seconds.append(float(output))
    assert min(seconds) < 1.5
