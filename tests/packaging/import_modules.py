"""Imports every module of an installed package that needs no extra, and checks what must not have come along with it.

    python -I import_modules.py align_core --optional align_core.ray --absent torch

Runs in the clean environment of one wheel: standard library only, and isolated (-I), so that nothing of the source
tree can stand in for what the wheel lacks.
"""

import argparse
import importlib
import importlib.util
import pkgutil
import sys
import traceback
from collections.abc import Iterator, Sequence


def modules(package: str, *, optional: Sequence[str]) -> Iterator[str]:
    """The names of `package` and all modules below it, without those in or below `optional`."""
    if package in optional:
        return
    yield package
    spec = importlib.util.find_spec(package)
    for info in pkgutil.iter_modules(spec.submodule_search_locations if spec else None, f"{package}."):
        if info.ispkg:
            yield from modules(info.name, optional=optional)
        elif info.name not in optional:
            yield info.name


def present(names: Sequence[str]) -> list[str]:
    """Those of `names` that can be found, without importing them (except the parents of dotted ones)."""
    return [name for name in names if _findable(name)]


def _findable(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def failures(names: Sequence[str]) -> dict[str, str]:
    """Name and traceback of each module that does not import."""
    failed: dict[str, str] = {}
    for name in names:
        try:
            importlib.import_module(name)
        except Exception:  # the subject under test may raise anything; all of it is reported
            failed[name] = traceback.format_exc()
    return failed


def main() -> int:
    """Prints what was imported; the exit status is 1 when something failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("package")
    parser.add_argument("--optional", action="append", default=[], help="module (and all below it) that needs an extra")
    parser.add_argument("--absent", action="append", default=[], help="import that must not be installed")
    arguments = parser.parse_args()
    if unwanted := present(arguments.absent):
        print(f"{arguments.package}'s wheel brought along {', '.join(unwanted)}, which it must not need")
        return 1
    names = list(modules(arguments.package, optional=arguments.optional))
    failed = failures(names)
    for name, trace in failed.items():
        print(f"{name} does not import without an extra:\n{trace}")
    print(f"{len(names) - len(failed)} of {len(names)} modules of {arguments.package} imported alone")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
