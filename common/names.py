"""Names of files, folders and labels that come from outside: which are plain, hidden, first."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path

LONGEST_NAME = 255  # characters, as file systems allow
# Unicode's control characters, surrogates (which are half of a character), and line breaks.
CONTROL = ("Cc", "Cs", "Zl", "Zp")
DIRECTION_MARKS = set(
    "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
)  # they reorder what is shown
SYSTEM_FILES = {"__MACOSX", "Thumbs.db", "desktop.ini"}


def is_label(text: object) -> bool:
    """Whether a value is a text of one line that can be shown: a class, an attribute, a name."""
    if not isinstance(text, str) or not 1 <= len(text) <= LONGEST_NAME:
        return False
    return not any(unicodedata.category(c) in CONTROL or c in DIRECTION_MARKS for c in text)


def is_folder_name(text: object) -> bool:
    """Whether a value is the name of one folder: never a path, and not hidden."""
    if not isinstance(text, str) or not is_label(text):
        return False
    return not text.startswith(".") and not any(c in text for c in "/\\:")


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name belongs to a system, not to the data.

    Such are .DS_Store, and the ._00.png that macOS writes beside 00.png.
    """
    return name.startswith(".") or name in SYSTEM_FILES


def natural_order(path: Path) -> tuple[list[list[str | int]], Path]:
    """A key that sorts 2.png before 10.png."""
    parts: list[list[str | int]] = []
    for part in path.parts:
        words = re.split("([0-9]+)", part)  # every second one is a number
        parts.append([int(word) if k % 2 else word for k, word in enumerate(words)])
    return parts, path
