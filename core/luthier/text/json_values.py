"""Values in JSON, refused with the place of what is wrong."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from luthier.errors import DataError


def parse_json(text: str, origin: str) -> Any:
    """Return the value that `text` is in JSON.

    Raises:
        DataError: It is not JSON; the message says where in `origin`.
    """
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise DataError(f"{origin}: not JSON: {error.msg} at {line}column {error.colno}") from error
    # Brackets a thousand deep, or a number of ten thousand digits.
    except (RecursionError, ValueError) as error:
        raise DataError(f"{origin}: not JSON that can be read: {error}") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key '{twice}' comes twice")
    return mapping
