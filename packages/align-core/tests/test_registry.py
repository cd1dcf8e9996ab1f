"""Names found through entry points, and what an unknown name is told."""

import pytest

from align_core import registry
from align_core.errors import ConfigError


class Point:
    """The part of an entry point that the registry uses."""

    def __init__(self, name: str, value: object) -> None:
        self.name = name
        self._value = value

    def load(self) -> object:
        return self._value


@pytest.fixture
def points(monkeypatch: pytest.MonkeyPatch) -> None:
    offered = {"align.rewards": [Point("length", len), Point("double", 2), Point("double", 2)]}
    monkeypatch.setattr(registry, "entry_points", lambda group: offered.get(group, []))


@pytest.mark.usefixtures("points")
def test_registered_names_are_sorted_and_load() -> None:
    assert registry.names("align.rewards") == ["double", "length"]
    assert registry.load("align.rewards", "length") is len


@pytest.mark.usefixtures("points")
def test_unknown_name_gets_the_nearest_the_choices_and_how_to_add_one() -> None:
    message = (
        r"unknown reward 'lenght'; did you mean 'length'\? choose 'double' or 'length' "
        r"\(a package adds one through the entry-point group 'align.rewards'\)"
    )
    with pytest.raises(ConfigError, match=message):
        registry.load("align.rewards", "lenght")


@pytest.mark.usefixtures("points")
@pytest.mark.parametrize(
    ("group", "name", "message"),
    [
        ("align.engines", "vllm", "rollout engine 'vllm' is part of align-rollout, .* pip install align-rollout"),
        ("align.rewards", "math", "reward 'math' is part of align-eval, .* pip install align-eval"),
        ("align.commands", "convert", "command 'convert' is part of align-convert, .* pip install align-convert"),
    ],
)
def test_name_of_a_package_that_is_not_installed_gets_the_pip_line(
    group: registry.Group, name: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        registry.load(group, name)


@pytest.mark.usefixtures("points")
def test_empty_group_says_so() -> None:
    with pytest.raises(ConfigError, match="unknown recipe 'tiny'; choose none"):
        registry.load("align.recipes", "tiny")


def test_recipes_of_this_package_are_installed() -> None:
    assert {"tiny", "smollm2"} <= set(registry.names("align.recipes"))
    assert {"sft", "reward", "grpo", "dpo", "kto"} <= set(registry.load("align.recipes", "tiny"))  # type: ignore[call-overload]
