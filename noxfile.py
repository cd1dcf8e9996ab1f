"""The development sessions: tests, lint, typecheck, imports (and the wheels it checks) and the tutorial.

    pip install nox && nox -s tests
    pip install nox && nox -s tutorial

Needs Python 3.11 and pip, nothing else. Sessions that need the whole CPU set share one environment, which the session
`environment` builds once in .nox/environment and again only when a pin or a package's metadata changes. How it is
installed and under which variables everything runs is written in tests/environment.py.
"""

import os
import sys
import tomllib
from pathlib import Path

import nox
from nox.command import CommandFailed

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tests"))
import environment as env  # noqa: E402, the directory of tests is not a package

nox.needs_version = ">=2025.2.9"
nox.options.sessions = ["lint", "typecheck", "imports", "tests"]
nox.options.default_venv_backend = "virtualenv"

WHEELS = ROOT / ".nox" / "wheels"
RELEASES = tomllib.loads((ROOT / "releases.toml").read_text())
VARIABLES = env.variables(ROOT / ".nox" / "home")


@nox.session(reuse_venv=True, default=False)
def environment(session: nox.Session) -> None:
    """Build the environment with the whole CPU set, shared by the other sessions."""
    if sys.version_info[:2] != (3, 11):
        session.error(
            f"constraints/cpu.txt is pinned for Python 3.11, but nox runs on {sys.version.split()[0]}; "
            "run: python3.11 -m pip install nox && python3.11 -m nox -s tests"
        )
    stamp = Path(session.virtualenv.location) / "align-fingerprint"
    if stamp.exists() and stamp.read_text() == env.fingerprint():
        session.log("%s is up to date", session.virtualenv.location)
        return
    first, second = env.torch_steps()
    try:
        session.install(*first)
    except CommandFailed:
        session.warn(f"no wheel of {env.torch_pin()} where pip looks; trying PyTorch's CPU index")
        session.install(*second)
    for step in env.package_steps():
        session.install(*step)
    _refuse_forbidden(session)
    stamp.write_text(env.fingerprint())


def _refuse_forbidden(session: nox.Session) -> None:
    code = "import importlib.util, sys; print(*filter(importlib.util.find_spec, sys.argv[1:]))"
    found = session.run("python", "-c", code, *env.FORBIDDEN, silent=True)
    if found and found.strip():
        session.error(f"{found.strip()} must not be installed beside a CPU torch; see tests/environment.py")


def _run(session: nox.Session, command: str, *arguments: str) -> None:
    """Runs a command of the shared environment."""
    binaries = ROOT / ".nox" / "environment" / "bin"
    path = f"{binaries}{os.pathsep}{os.environ['PATH']}"
    session.run(str(binaries / command), *arguments, env={**VARIABLES, "PATH": path}, external=True)


@nox.session(requires=["environment"], venv_backend="none")
def tests(session: nox.Session) -> None:
    """Run each package's tests and the whole-system tests, each in a process of its own; arguments go to one pytest."""
    for part in [session.posargs] if session.posargs else [[f"packages/{name}"] for name in RELEASES] + [["tests"]]:
        _run(session, "python", "-m", "pytest", *part)


@nox.session(reuse_venv=True)
def lint(session: nox.Session) -> None:
    """Check style and formatting with ruff."""
    session.install("-c", str(env.CPU_SET), "ruff")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session(requires=["environment"], venv_backend="none")
def typecheck(session: nox.Session) -> None:
    """Run mypy --strict on the five packages."""
    packages = [argument for release in RELEASES.values() for argument in ("-p", release["import"])]
    _run(session, "python", "-m", "mypy", "--strict", *packages)
    _run(session, "python", "-m", "mypy", "--strict", "tests/environment.py", "tests/packaging/import_modules.py")


@nox.session(requires=["environment"], venv_backend="none")
def imports(session: nox.Session) -> None:
    """Check the import directions, then build each wheel and import it alone (session `wheel`)."""
    _run(session, "lint-imports", "--no-cache")
    WHEELS.mkdir(parents=True, exist_ok=True)
    for old in WHEELS.glob("*.whl"):
        old.unlink()
    for name in RELEASES:
        _run(
            session,
            "python",
            *("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"),
            *("--wheel-dir", str(WHEELS), str(ROOT / "packages" / name)),
        )
    for name in RELEASES:
        session.notify(f"wheel(dist={name!r})")


@nox.session(default=False)
@nox.parametrize("dist", list(RELEASES))
def wheel(session: nox.Session, dist: str) -> None:
    """Install one wheel with its hard dependencies in a clean environment and import its modules."""
    release = RELEASES[dist]
    wheels = [_built(session, name) for name in (dist, *release["siblings"])]
    session.install("-c", str(env.CPU_SET), *wheels)
    script = ROOT / "tests" / "packaging" / "import_modules.py"
    optional = [f"--optional={module}" for module in release["optional"]]
    absent = [f"--absent={module}" for module in release["absent"]]
    session.run("python", "-I", str(script), release["import"], *optional, *absent, env=VARIABLES)


def _built(session: nox.Session, name: str) -> str:
    found = sorted(WHEELS.glob(f"{name.replace('-', '_')}-*.whl"))
    if len(found) != 1:
        session.error(f"expected one wheel of {name} in {WHEELS}, found {len(found)}; run: nox -s imports")
    return str(found[0])


@nox.session(requires=["environment"], venv_backend="none", default=False)
def tutorial(session: nox.Session) -> None:
    """Walk the whole tutorial with the tiny model; arguments go to `align tutorial` and win over the defaults."""
    arguments = list(session.posargs)
    model = _option(arguments, "--model", default="tiny")
    out = _option(arguments, "--out", default=f"runs/tutorial-{model}")
    _run(session, "align", "tutorial", "--model", model, "--out", out, *arguments)
    report = Path(out).resolve() / "report.html"
    if not report.exists():
        session.error(f"the tutorial ended without writing {report}")
    session.log("the report is at %s", report)


def _option(arguments: list[str], name: str, *, default: str) -> str:
    """Takes `name VALUE` or `name=VALUE` out of `arguments`; its value, or the default."""
    value = default
    for index in range(len(arguments) - 1, -1, -1):
        if arguments[index] == name and index + 1 < len(arguments):
            value = arguments[index + 1]
            del arguments[index : index + 2]
        elif arguments[index].startswith(f"{name}="):
            value = arguments.pop(index).partition("=")[2]
    return value
