"""The package as a whole: light to import, everything public named, errors that travel."""

import pickle
import subprocess
import sys

import align_algos
from align_algos import InputError


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
    error = pickle.loads(pickle.dumps(InputError("logprobs_N holds nan")))  # noqa: S301
    assert isinstance(error, ValueError) and str(error) == "logprobs_N holds nan"
