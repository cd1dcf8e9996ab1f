"""A short name for a value, for keys that must change when the value does."""

import hashlib
import json


def digest(value: object) -> str:
    """16 hexadecimal digits that change with the value, which is anything that JSON can hold."""
    return hashlib.sha256(json.dumps(value, ensure_ascii=False).encode()).hexdigest()[:16]
