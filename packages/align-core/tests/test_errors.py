"""The words of the errors, and that each error survives pickling."""

import pickle

import pytest

from align_core import errors
from align_core.errors import AlignError, MissingDependencyError, choices, missing_dependency, unknown_name


@pytest.mark.parametrize(
    ("names", "text"),
    [([], "none"), (["a"], "'a'"), (["b", "a"], "'a' or 'b'"), (["c", "a", "b"], "'a', 'b' or 'c'")],
)
def test_choices_are_sorted_and_quoted(names: list[str], text: str) -> None:
    assert choices(names) == text


def test_unknown_name_hints_at_the_nearest_and_lists_all() -> None:
    text = unknown_name("colour", "gren", ["red", "green"], remedy="mix another")
    assert text == "unknown colour 'gren'; did you mean 'green'? choose 'green' or 'red' (mix another)"


def test_unknown_name_without_a_near_one_gives_no_hint() -> None:
    assert unknown_name("colour", "xyz", iter(["red"])) == "unknown colour 'xyz'; choose 'red'"


def test_missing_dependency_carries_the_line_that_installs_it() -> None:
    error = missing_dependency("ray", "align-core[ray]", needed_for="a cluster")
    assert isinstance(error, MissingDependencyError)
    assert str(error) == "a cluster needs ray, which is not installed; run: pip install 'align-core[ray]'"


@pytest.mark.parametrize(
    "kind", [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, AlignError)]
)
def test_errors_survive_the_trip_from_a_worker(kind: type[AlignError]) -> None:
    error = pickle.loads(pickle.dumps(kind("what went wrong")))  # noqa: S301, made right here
    assert type(error) is kind
    assert str(error) == "what went wrong"
