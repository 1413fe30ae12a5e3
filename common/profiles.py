"""profiles.toml, which has the steps of run_all.py: read, and checked before any of it runs."""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.cli import UserError
from common.json_files import read_text
from common.names import is_folder_name


@dataclass(frozen=True)
class Step:
    """A step of profiles.toml, which explains the fields."""

    name: str
    part: str
    script: str
    arguments: str
    makes: str
    needs: Sequence[str] = ()
    unless: Sequence[str] = ()
    options: dict[str, str] = field(default_factory=dict)  # profile → what {options} stands for
    profiles: Sequence[str] = ()
    optional: str = ""
    seconds: dict[str, int] = field(default_factory=dict)
    leaves: Sequence[str] = ()
    draws_data: bool = False
    checks_data: bool = False
    remove_outdated: bool = False
    always: bool = False


# Kinds of values


def is_text(value: Any) -> bool:
    """Whether a value is a text."""
    return isinstance(value, str) and "\0" not in value


def is_texts(value: Any) -> bool:
    """Whether a value is a list of texts."""
    return isinstance(value, list) and all(is_text(text) for text in value)


def is_table_of(value: Any, check: Callable[[Any], bool]) -> bool:
    """Whether a value is a table of values that pass a check."""
    return isinstance(value, dict) and all(check(item) for item in value.values())


def is_flag(value: Any) -> bool:
    """Whether a value is true or false."""
    return isinstance(value, bool)


def is_count(value: Any) -> bool:
    """Whether a value is a whole number from 1."""
    return type(value) is int and 1 <= value <= 1_000


def is_seconds(value: Any) -> bool:
    """Whether a value is a whole number of seconds, at most a month."""
    return type(value) is int and 0 <= value <= 2_678_400


# What the tables of profiles.toml may have.
TABLES = {
    "parts": is_texts,
    "problems": lambda value: is_table_of(value, is_texts),
    "profiles": lambda value: isinstance(value, dict) and value != {},
    "steps": lambda value: isinstance(value, list),
    "alternatives": lambda value: is_table_of(value, lambda item: isinstance(item, list)),
}
STEP_FIELDS = {
    **dict.fromkeys(("name", "part", "script", "arguments", "makes", "optional"), is_text),
    **dict.fromkeys(("needs", "unless", "profiles", "leaves"), is_texts),
    **dict.fromkeys(("draws_data", "checks_data", "remove_outdated", "always"), is_flag),
    "options": lambda value: is_table_of(value, is_text),
    "seconds": lambda value: is_table_of(value, is_seconds),
}
PATHS = ("data", "output", "classifier")
BRACES = re.compile(r"\{([^{}]*)\}")


# Reading


def read_profiles(path: Path) -> dict[str, Any]:
    """The tables of profiles.toml, checked. Raises UserError that names the file and the place."""
    try:
        content = tomllib.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise UserError(f"{path}: is not toml ({reason})") from None
    check_table(content, TABLES, list(TABLES), str(path))
    parts = content["parts"]
    for name, settings in content["profiles"].items():
        where = f"{path}: profile {name!r}"
        check_table(settings, {"jobs": is_count, "data": is_text}, ["jobs", "data"], where)
    for name, some in content["problems"].items():
        if not set(some) <= set(parts):
            raise UserError(f"{path}: problem {name!r}: has a part that is not in parts")
    for name, entries in content["alternatives"].items():
        for entry in entries:
            check_alternative(entry, f"{path}: alternative {name!r}")
    seen = set()
    for number, step in enumerate(content["steps"], 1):
        where = f"{path}: step {number}"
        check_step(step, content, where)
        for profile in step.get("profiles", content["profiles"]):
            if "unless" not in step and (step["name"], profile) in seen:
                raise UserError(f"{where}: a second step {step['name']} of the profile {profile}")
            seen.add((step["name"], profile))
    return content


def check_alternative(entry: Any, where: str) -> None:
    """Raise UserError for an alternative that run_all.py cannot use."""
    checks = {"needs": is_texts, "unless": is_texts, "words": is_text}
    check_table(entry, checks, ["words"], where)
    check_braces([entry["words"]], PATHS, where)
    check_braces([*entry.get("needs", ()), *entry.get("unless", ())], PATHS, where)


def check_step(step: Any, content: dict[str, Any], where: str) -> None:
    """Raise UserError for a step that run_all.py cannot run."""
    check_table(step, STEP_FIELDS, ["name", "part", "script", "arguments", "makes"], where)
    where += f", {step['name']}"
    if not is_folder_name(step["name"]):  # its note has this name
        raise UserError(f"{where}: its name is not the name of a file")
    if step["part"] not in {*content["parts"], "data", "report"}:
        raise UserError(f"{where}: its part {step['part'][:60]!r} is not in parts")
    for field_name in ("profiles", "options", "seconds"):
        for profile in step.get(field_name, ()):
            if profile not in content["profiles"]:
                raise UserError(f"{where}: {field_name}: there is no profile {profile[:60]!r}")
    paths = [step["makes"]]
    for field_name in ("needs", "unless", "leaves"):
        paths += step.get(field_name, [])
    check_braces(paths, PATHS, where)
    known = {*PATHS, "makes", "options", *content["alternatives"]}
    check_braces([step["arguments"], *step.get("options", {}).values()], known, where)


def check_table(
    table: Any, checks: Mapping[str, Callable[[Any], bool]], required: Sequence[str], where: str
) -> None:
    """Raise UserError unless a table has all of `required`, and no other value than `checks`."""
    if not isinstance(table, dict):
        raise UserError(f"{where}: is not a table")
    for name in required:
        if name not in table:
            raise UserError(f"{where}: has no {name}")
    for name, value in table.items():
        if name not in checks:
            raise UserError(f"{where}: has {name[:60]!r}, which is not known here")
        if not checks[name](value):
            raise UserError(f"{where}: {name} cannot be {str(value)[:60]!r}")


def check_braces(texts: Sequence[str], known: Collection[str], where: str) -> None:
    """Raise UserError for a name in braces that stands for nothing, and for a quote left open."""
    for text in texts:
        for name in BRACES.findall(text):
            if name not in known:
                raise UserError(f"{where}: has {{{name[:60]}}}, which stands for nothing")
        if set(BRACES.sub("", text)) & set("{}"):
            raise UserError(f"{where}: has a brace alone in {text[:60]!r}")
        try:
            shlex.split(text)
        except ValueError as error:
            raise UserError(f"{where}: {text[:60]!r} is no command ({error})") from None
