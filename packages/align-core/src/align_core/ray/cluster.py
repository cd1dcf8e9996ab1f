"""Starts a private Ray on this machine, or joins a cluster; says what nodes it has.

A private Ray asks for a token that only its own processes know, has no dashboard, and never calls out.
"""

import atexit
import functools
import gc
import logging
import os
import secrets
import socket
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group

from align_core.config import ClusterConfig
from align_core.errors import ConfigError
from align_core.placement import Node
from align_core.ray.lines import folder_of_sockets

# Ray 2.60 asks the cloud's metadata address who it runs on, whatever its usage switch says; when the HOME of the
# process that starts it holds this file, it believes that it knows and does not ask.
_SILENCER = "ray_bootstrap_config.yaml"
_SESSION_BYTES = 72  # of the path that a private Ray's longest socket has in the folder for temporary files
_TOKEN_SETUP = "ray._private.authentication.authentication_token_setup"
_RESERVE_TIMEOUT_S = 60.0
_ANSWER_TIMEOUT_S = 5.0

_homes: list[tempfile.TemporaryDirectory[str]] = []


def start(config: ClusterConfig) -> None:
    """Connects this process to Ray; does nothing when it is connected already.

    Raises:
        ConfigError: no cluster answers at `config.address`.
    """
    if ray.is_initialized():
        return
    if config.address:
        _join(config.address)
        return
    home = tempfile.TemporaryDirectory(prefix="align-ray-")
    token = Path(home.name) / "auth_token"
    token.touch(mode=0o600)
    token.write_text(private_token(), encoding="ascii")
    _homes.append(home)  # lives as long as the daemons, which read the token
    atexit.register(stop)
    with _unsaid(_TOKEN_SETUP):  # it says that there is a token, which users of a private Ray need not know
        _init(Path(home.name), token, address="local", include_dashboard=False)


def stop() -> None:
    """Disconnects; a private Ray ends with it."""
    # Ray numbers actors alike in each cluster: a handle collected later would end one of the next cluster's.
    gc.collect()
    ray.shutdown()
    while _homes:
        _homes.pop().cleanup()


@functools.cache
def private_token() -> str:
    """The token of each private Ray of this process: Ray reads one once and keeps it until the process ends."""
    return secrets.token_hex(32)


def nodes() -> list[tuple[str, Node]]:
    """The living nodes, each with Ray's id for it, this one first and the others in a fixed order."""
    here = ray.get_runtime_context().get_node_id()
    alive = [node for node in ray.nodes() if node["Alive"]]
    alive.sort(key=lambda node: (node["NodeID"] != here, node["NodeManagerAddress"], node["NodeID"]))
    return [(str(node["NodeID"]), _node(node["Resources"])) for node in alive]


def reserve(found: Sequence[Node]) -> Any:
    """A placement group that holds all GPUs of the nodes, so that no other program of the cluster gets them.

    Raises:
        ConfigError: another program has them.
    """
    group = placement_group([{"GPU": node.gpus} for node in found if node.gpus], strategy="PACK")
    if not group.wait(_RESERVE_TIMEOUT_S):
        free = ray.available_resources().get("GPU", 0)
        remove_placement_group(group)
        raise ConfigError(
            f"the cluster did not give its {sum(node.gpus for node in found)} GPUs within {_RESERVE_TIMEOUT_S:.0f} s "
            f"({free:g} are free); end the other program there, or use another cluster"
        )
    return group


def _join(address: str) -> None:
    host, _, port = address.rpartition(":")
    if host and port.isdigit():  # Ray itself would try for minutes
        try:
            socket.create_connection((host, int(port)), timeout=_ANSWER_TIMEOUT_S).close()
        except OSError as error:
            raise _no_cluster(address, error) from error
    home = tempfile.TemporaryDirectory(prefix="align-ray-")
    _homes.append(home)
    atexit.register(stop)
    try:
        _init(
            Path(home.name),
            Path(os.environ.get("RAY_AUTH_TOKEN_PATH", Path.home() / ".ray" / "auth_token")),
            address=address,
        )
    except ConnectionError as error:
        raise _no_cluster(address, error) from error


def _no_cluster(address: str, error: Exception) -> ConfigError:
    return ConfigError(f"no Ray cluster answers at {address!r} ({error}); start one with: ray start --head")


def _init(home: Path, token: Path, **arguments: Any) -> None:
    """`ray.init` with the silencer in the home that it looks at, and the file that holds the cluster's token."""
    (home / _SILENCER).touch()
    before = dict(os.environ)
    if token.exists() and "RAY_AUTH_TOKEN" not in before:
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(token)
    os.environ.update(HOME=str(home), RAY_USAGE_STATS_ENABLED="0", RAY_worker_niceness="0")
    if (folder := folder_of_sockets(behind=_SESSION_BYTES)) != tempfile.gettempdir():
        os.environ.setdefault("RAY_TMPDIR", folder)
    try:
        ray.init(log_to_driver=False, configure_logging=False, **arguments)
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def _unsaid(logger: str) -> Iterator[None]:
    """Within it the logger's warnings are not shown."""
    found = logging.getLogger(logger)
    before = found.level
    found.setLevel(logging.ERROR)
    try:
        yield
    finally:
        found.setLevel(before)


def _node(resources: dict[str, float]) -> Node:
    return Node(gpus=int(resources.get("GPU", 0)), cpus=max(1, int(resources.get("CPU", 1))))
