"""JSON that others have written: strict, and each fault of it is one phrase."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

DEEPEST = 20  # levels of lists and objects inside one another


class JsonError(ValueError):
    """A text that is no strict JSON. The message is a phrase such as "has a key twice"."""


def read_json(path: Path) -> Any:
    """The content of a JSON file in UTF-8, with or without a byte order mark.

    Raises JsonError for a text that is no strict JSON, and OSError for a file that cannot be read.
    """
    if not path.is_file():  # a pipe would be waited for
        raise FileNotFoundError(f"{path}: no such file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise JsonError("is not in UTF-8") from None
    return parse_json(text)


def parse_json(text: str) -> Any:
    """Read a text as JSON.

    Raises JsonError for what is damaged, nested too deeply, or has a key twice, a number that is
    not finite, or half a character (a lone surrogate).
    """
    try:
        content = json.loads(
            text, object_pairs_hook=without_repeats, parse_float=finite, parse_constant=finite
        )
        json.dumps(content, ensure_ascii=False).encode()
    except JsonError:
        raise
    except UnicodeEncodeError:
        raise JsonError("has half a character") from None
    except RecursionError:
        raise JsonError("is not json (nested too deeply)") from None
    except ValueError as error:
        raise JsonError(f"is not json ({str(error)[:100]})") from None
    if depth_of(content) > DEEPEST:
        raise JsonError("is not json (nested too deeply)")
    return content


def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON. Raises JsonError for a key that it has twice."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise JsonError(f"has the key {ascii(name)[:60]} twice")
        found[name] = value
    return found


def finite(text: str) -> float:
    """A number of JSON. Raises JsonError for NaN, Infinity, and 1e999, which is infinite."""
    value = float(text)
    if not math.isfinite(value):
        raise JsonError(f"has the number {text[:20]}")
    return value


def depth_of(content: Any) -> int:
    """How many levels of lists and objects are inside one another."""
    depth = 0
    level = [content]
    while level := [value for value in level if isinstance(value, dict | list)]:
        depth += 1
        inner: list[Any] = []
        for value in level:
            inner += value.values() if isinstance(value, dict) else value
        level = inner
    return depth
