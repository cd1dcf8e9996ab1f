"""JSON that users bring, as objects whose texts can be tokenized and written again."""

import json
import re

from align_core.errors import DataError

_ESCAPED_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")  # the only way to one: decoding UTF-8 refuses it as it is


def parse_json(text: bytes) -> object:
    """The value that UTF-8 `text` holds.

    Raises:
        DataError: no UTF-8, no JSON, nested too deeply, or with half of a surrogate pair, which is no character.
    """
    try:
        value: object = json.loads(text.decode("utf-8"))
        if _ESCAPED_SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise DataError(f"{half!a} is half of a surrogate pair and no character; remove it") from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(str(error)) from error
    return value
