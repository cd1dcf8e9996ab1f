"""Starts a private Ray on this machine, or joins a cluster.

A private Ray asks for a token that only its own processes know, has no dashboard, and never calls out.
"""

import atexit
import os
import secrets
import tempfile
from pathlib import Path

import ray

from align_core.config import ClusterConfig

# Ray 2.60 asks the cloud's metadata address who it runs on, whatever its usage switch says; when the HOME of the
# process that starts it holds this file, it believes that it knows and does not ask.
_SILENCER = "ray_bootstrap_config.yaml"

_homes: list[tempfile.TemporaryDirectory[str]] = []


def start(config: ClusterConfig) -> None:
    """Connects this process to Ray; does nothing when it is connected already."""
    if ray.is_initialized():
        return
    if config.address:
        ray.init(address=config.address, log_to_driver=False)
        return
    home = tempfile.TemporaryDirectory(prefix="align-ray-")
    (Path(home.name) / _SILENCER).touch()
    token = Path(home.name) / "auth_token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32), encoding="ascii")
    _homes.append(home)  # lives as long as the daemons, which read the token
    atexit.register(stop)
    before = dict(os.environ)
    os.environ.update(
        HOME=home.name,
        RAY_AUTH_TOKEN_PATH=str(token),
        RAY_USAGE_STATS_ENABLED="0",
        RAY_worker_niceness="0",
    )
    try:
        ray.init(address="local", include_dashboard=False, log_to_driver=False, configure_logging=False)
    finally:
        os.environ.clear()
        os.environ.update(before)


def stop() -> None:
    """Disconnects; a private Ray ends with it."""
    ray.shutdown()
    while _homes:
        _homes.pop().cleanup()
