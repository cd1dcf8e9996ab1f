"""What megatron-core decorates with torch.compile is compiled at its first call, once, with the options given."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from align_core.megatron.deferred import deferred_compile


class Compiler:
    """Stands where torch.compile would."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def __call__(self, function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        self.calls.append((function.__name__, options))
        return lambda *args, **kwargs: ("compiled", function(*args, **kwargs))


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Compiler:
    compiler = Compiler()
    monkeypatch.setattr(torch, "compile", compiler)
    return compiler


def test_the_first_call_compiles_and_later_ones_use_it(compiler: Compiler) -> None:
    with deferred_compile():
        decorator = torch.compile

        @torch.compile
        def plain(a: int, *, b: int) -> int:
            """Adds."""
            return a + b

        @torch.compile(fullgraph=True)
        def with_options(a: int) -> int:
            return a

    assert compiler.calls == []
    assert plain.__doc__ == "Adds."
    assert plain(1, b=2) == plain(1, b=2) == ("compiled", 3)
    assert compiler.calls == [("plain", {})]
    assert with_options(4) == ("compiled", 4)
    assert compiler.calls[1:] == [("with_options", {"fullgraph": True})]
    late = decorator(lambda a: a)  # megatron-core keeps the decorator, and imports some of its modules later
    assert len(compiler.calls) == 2
    assert late(5) == ("compiled", 5)


def test_torch_has_its_own_again_afterwards(compiler: Compiler) -> None:
    with pytest.raises(KeyError), deferred_compile():
        raise KeyError
    assert torch.compile is compiler


def test_within_a_function_that_is_compiled_it_is_taken_in() -> None:
    with deferred_compile():

        @torch.compile
        def inner(x: torch.Tensor) -> torch.Tensor:
            return x * 2

        @torch.compile(backend="eager", fullgraph=True)  # fullgraph: a break of the graph would raise
        def outer(x: torch.Tensor) -> torch.Tensor:
            return inner(x) + 1

    assert outer(torch.ones(2)).tolist() == [3.0, 3.0]


def test_a_rank_starts_without_the_compiler() -> None:
    code = "import align_core.megatron, sys; print(*(m in sys.modules for m in sys.argv[1:]))"
    modules = ["megatron.core.transformer", "torch._inductor.compile_fx"]
    found = subprocess.run([sys.executable, "-c", code, *modules], check=True, capture_output=True, text=True)
    assert found.stdout.split() == ["True", "False"]
