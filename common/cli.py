"""Command lines: options are read into a dataclass, checked there, and mistakes end in one line.

A script has one dataclass for each of its commands. tyro reads the options into it; the dataclass
checks its own fields in `__post_init__` with the functions at the end of this file.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from common.names import is_folder_name
from common.processes import is_first_process, work_alone

# Messages of Python and tyro about a value of the wrong type, and what is said in their place.
PLAIN_WORDS = (
    (
        r"no type matching .* could be instantiated from \['(.*?)'\]\.\s+Got errors.*",
        r"'\1' is not a valid value",
    ),
    (r"invalid literal for int\(\) with base 10: ('.*?')", r"\1 is not a whole number"),
    (r"could not convert string to float: ('.*?')", r"\1 is not a number"),
)
LARGEST_COUNT = 10**9
LONGEST_MESSAGE = 1_000  # characters
SECONDS_FOR_THE_FIRST = 3.0  # process of torchrun, to report a mistake before the others do
LARGEST_SEED = 2**32 - 1  # scikit-learn takes no larger one


class UserError(Exception):
    """A mistake of the user's, reported as one line that names the flag or the file."""

    def __init__(self, message: str) -> None:
        """The message may quote a file: what cannot be printed is escaped, and its end cut off."""
        super().__init__(printable(message)[:LONGEST_MESSAGE])


def printable(text: str) -> str:
    r"""The text with \n, \x00 or \ud800 for characters that would break a line or a terminal."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in text
    )


_said: set[str] = set()  # what `note_once` has said


def note_once(text: str, kind: str | None = None) -> None:
    """Print a note, but of each `kind` only the first one.

    It goes to stdout, so that a mistake after it is still a single line on stderr.
    """
    kind = kind or text
    if kind not in _said and is_first_process():
        _said.add(kind)
        print(f"note: {printable(text)}")


class IncompleteError(UserError):
    """The work is done but for what the message names."""


def run_cli(commands: Any, main: Callable[[Any], Any], shared: Any = ()) -> None:
    """Read the command line into `commands` and call `main` with the result.

    `commands` is a dataclass, or a union of dataclasses, which become sub-commands. `shared` are
    those whose work the processes of torchrun share; the first process runs any other one alone.

    A mistake is printed to stderr as one line. Exit status: 0, 1 for work that is partly done, 2
    after a mistake, 130 after Ctrl-C.
    """
    from common.locks import command_locks

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # one in cp1252 or ASCII has no λ
            stream.reconfigure(errors="backslashreplace")
    try:
        refuse_empty_values(sys.argv[1:])
        args = parse(commands)
        if not isinstance(args, shared):
            work_alone()
        with command_locks():
            main(args)
    except BrokenPipeError:  # the reader of the output, such as head, has stopped reading
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (UserError, OSError) as error:  # an OSError (a full disk, for example) names its file
        if not is_first_process():
            # The first process reports a mistake of all; meanwhile torchrun ends the others.
            time.sleep(SECONDS_FOR_THE_FIRST)
        print(f"error: {printable(str(error))[:LONGEST_MESSAGE]}", file=sys.stderr)
        sys.exit(1 if isinstance(error, IncompleteError) else 2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    leave_process_group()


def parse(commands: Any) -> Any:
    """Read sys.argv with tyro. Raises UserError for what tyro refuses."""
    import tyro

    messages = io.StringIO()
    try:
        with contextlib.redirect_stderr(messages):
            return tyro.cli(commands, description=sys.modules["__main__"].__doc__)
    except SystemExit as end:
        if end.code == 2:
            raise UserError(one_line(messages.getvalue())) from None
        raise  # --help


def one_line(box: str) -> str:
    """Turn the box in which tyro draws an error into one line, without the help texts inside it."""
    kept = []
    for line in box.splitlines()[1:-1]:
        text = line.strip("│").rstrip()
        is_rule = bool(text) and set(text) <= set(" ─-")  # - where the output has no UTF-8
        if is_rule and kept:  # after the rule come hints on how to get help
            break
        if is_rule:
            continue
        is_help_text = text.startswith(" " * 9)
        if not is_help_text:
            kept.append(text.strip())
    sentence = " ".join(kept) or " ".join(box.split())
    sentence = sentence.removeprefix("Error parsing ")
    for pattern, words in PLAIN_WORDS:
        sentence = re.sub(pattern, words, sentence)
    return sentence


def refuse_empty_values(words: Sequence[str]) -> None:
    """Raise UserError for an argument that is the empty string, which a path would read as "."."""
    flag = "the first argument"
    for word in words:
        if word == "":
            raise UserError(f"{flag}: the value is empty")
        flag = word if word.startswith("-") else f"the argument after {word}"


def leave_process_group() -> None:
    """After distributed training, end the process here.

    DistributedDataParallel keeps the threads of its backend Gloo alive. If one of them is still
    busy while the interpreter shuts down, the process aborts although all its work is done.
    """
    torch = sys.modules.get("torch")
    if torch is None or not torch.distributed.is_initialized():
        return
    torch.distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


# Checks of option values. `flag` is what the user typed; None stands for "not given" and passes.


def at_least(flag: str, value: int | None, low: int) -> None:
    """Raise UserError unless low ≤ value ≤ 10⁹."""
    if value is not None and not low <= value <= LARGEST_COUNT:
        raise UserError(f"{flag} {value}: must be at least {low} and at most {LARGEST_COUNT:,}")


def in_range(flag: str, value: float | None, low: float, high: float) -> None:
    """Raise UserError unless low ≤ value ≤ high; NaN is in no range."""
    if value is not None and not low <= value <= high:
        raise UserError(f"{flag} {value}: must be between {low:g} and {high:g}")


def above(flag: str, value: float | None, low: float, high: float) -> None:
    """Raise UserError unless low < value ≤ high; NaN is in no range."""
    if value is not None and not low < value <= high:
        raise UserError(f"{flag} {value}: must be above {low:g} and at most {high:g}")


def below(flag: str, value: float | None, low: float, high: float) -> None:
    """Raise UserError unless low ≤ value < high; NaN is in no range."""
    if value is not None and not low <= value < high:
        raise UserError(f"{flag} {value}: must be at least {low:g} and below {high:g}")


def is_seed(flag: str, value: int) -> None:
    """Raise UserError unless the value can seed every generator that is used here."""
    if not 0 <= value <= LARGEST_SEED:
        raise UserError(f"{flag} {value}: must be between 0 and {LARGEST_SEED:,}")


def is_domain(flag: str, *names: str | None) -> None:
    """Raise UserError unless each name can be that of one folder of digits."""
    for name in names:
        if name is not None and not is_folder_name(name):
            raise UserError(f"{flag} {name}: must be the name of a folder in digits/, not a path")


def two_domains(source: str, targets: Sequence[str], flag: str = "--target") -> None:
    """Raise UserError for domains that are no names, and for a target that is the source."""
    is_domain("--source", source)
    is_domain(flag, *targets)
    if source in targets:
        raise UserError(f"{flag} {source}: is the source too; there is nothing to adapt to")


def each_once(flag: str, values: Sequence[Any], at_least_one: bool = True) -> None:
    """Raise UserError for a list that is empty (unless allowed) or names something twice."""
    if at_least_one and not values:
        raise UserError(f"{flag}: needs at least one value")
    if len(set(values)) < len(values):
        raise UserError(f"{flag} {' '.join(map(str, values))}: names something twice")


def all_finite(flag: str, values: Sequence[float]) -> None:
    """Raise UserError if one of the values is NaN or infinite."""
    for value in values:
        if not math.isfinite(value):
            raise UserError(f"{flag} {value}: must be a finite number")
