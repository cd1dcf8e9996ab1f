"""Reads the keys of services from the environment, the only place where they are. Knows nothing of the services."""

import os

from align_core.errors import ConfigError


def read_key(variable: str) -> str:
    """The key in an environment variable, without the space and line end that copying adds; empty if there is none.

    Raises:
        ConfigError: what is there cannot stand in a header, whose own error would show it.
    """
    key = os.environ.get(variable, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(
            f"the environment variable {variable} holds characters that are not printable ASCII, so it is no key; copy "
            "the key again"
        )
    return key
