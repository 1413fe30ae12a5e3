"""Text and json files that anyone may have written or damaged: read strictly, or refused.

Json here is what all programs read alike: no NaN, no key twice, no half characters, few levels.
A pipe and a device are no files: the one would be waited for, the other never ends.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from common.cli import UserError

DEEPEST = 20  # levels of lists and objects inside one another


class FileError(ValueError):
    """A file that cannot be read. The message is one phrase about it."""


def read_text(path: Path) -> str:
    """The text of a file in UTF-8. Raises UserError that names the file."""
    try:
        return text_of(path)
    except FileError as error:
        raise UserError(f"{path}: {error}") from None


def read_json(path: Path) -> Any:
    """The content of a json file, of any type. Raises UserError that names the file."""
    try:
        return parse_json(text_of(path))
    except FileError as error:
        raise UserError(f"{path}: {error}") from None


def read_object(path: Path) -> dict[str, Any]:
    """The object in a json file. Raises UserError that names the file."""
    try:
        return object_of(path)
    except FileError as error:
        raise UserError(f"{path}: {error}") from None


# The same with FileError, for those who say more than the path


def text_of(path: Path) -> str:
    """The text of a file in UTF-8, with or without a byte order mark. Raises FileError."""
    if not path.exists():
        raise FileError("no such file")
    if not path.is_file():
        raise FileError("is not a file")
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise FileError(f"cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise FileError("is not in UTF-8") from None


def object_of(path: Path, half_characters: bool = False) -> dict[str, Any]:
    """The object in a json file. Raises FileError."""
    content = parse_json(text_of(path), half_characters)
    if not isinstance(content, dict):
        raise FileError("is not a json object")
    return content


def parse_json(text: str, half_characters: bool = False) -> Any:
    r"""The content of a json text. Raises FileError for what no script of ours writes.

    With `half_characters`, texts may have surrogates, such as \ud800, which cannot be encoded.
    """
    try:
        content = json.loads(
            text,
            object_pairs_hook=without_repeats,
            parse_float=finite,
            parse_constant=finite,
        )
        if "\\u" in text and not half_characters:
            json.dumps(content, ensure_ascii=False).encode()
    except FileError:
        raise
    except RecursionError:
        raise FileError("is not json (nested too deeply)") from None
    except UnicodeEncodeError:
        raise FileError("is not json (half of a character)") from None
    except ValueError as error:
        raise FileError(f"is not json ({str(error)[:100]})") from None
    if depth_of(content) > DEEPEST:
        raise FileError("is not json (nested too deeply)")
    return content


def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of json. Raises FileError for a key that it has twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise FileError("has a key twice")
    return found


def finite(text: str) -> float:
    """A number of json. Raises FileError for NaN, Infinity, and 1e999, which is infinite."""
    value = float(text)
    if not math.isfinite(value):
        raise FileError(f"has the number {text[:20]}")
    return value


def depth_of(content: Any) -> int:
    """How many levels of lists and objects are inside one another."""
    depth = 0
    level = [content]
    while level:
        inner: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                inner += value.values()
            elif isinstance(value, list):
                inner += value
        depth += 1
        level = [value for value in inner if isinstance(value, dict | list)]
    return depth
