"""common/cli.py: every mistake on a command line ends in one line and exit status 2."""

import io
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from common.cli import (
    UserError,
    above,
    all_finite,
    at_least,
    below,
    each_once,
    in_range,
    is_domain,
    is_seed,
    note_once,
    run_cli,
    two_domains,
)


@dataclass(kw_only=True)
class Options:
    output_dir: Path
    """Folder."""
    steps: int = 5
    """Number of steps."""
    rate: float = 0.1
    """Learning rate."""
    limit: int | None = None
    """Largest number."""


def do_nothing(args: Options) -> None:
    pass


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--output-dir", ""], "--output-dir: the value is empty"),
        ([""], "the first argument: the value is empty"),
        (["x", ""], "the argument after x: the value is empty"),
        (["--output-dir", "x", "--steps", "many"], "--steps: 'many' is not a whole number"),
        (["--output-dir", "x", "--rate", "fast"], "--rate: 'fast' is not a number"),
        (["--output-dir", "x", "--limit", "no"], "--limit: 'no' is not a valid value"),
        (["--output-dir", "x", "--stepz", "3"], "--stepz"),
        ([], "--output-dir"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_argument(error_of, words, expected):
    assert expected in error_of(Options, do_nothing, *words)


def test_an_error_of_the_system_is_one_line_and_not_long(error_of, tmp_path):
    def open_it(_: object) -> None:
        (tmp_path / ("x" * 5_000) / "a\nb").open()

    @dataclass
    class Nothing:
        """Do nothing."""

    error = error_of(Nothing, open_it)
    assert "File name too long" in error
    assert len(error) < 1_100


def test_a_full_disk_is_one_line_that_names_the_file(error_of):
    def write(args: Options) -> None:
        raise OSError(28, "No space left on device", "x/last.pt")

    error = error_of(Options, write, "--output-dir", "x")
    assert error == "error: [Errno 28] No space left on device: 'x/last.pt'\n"


def test_ctrl_c_ends_with_status_130(monkeypatch, capsys):
    def interrupted(args: Options) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sys.argv", ["script.py", "--output-dir", "x"])
    with pytest.raises(SystemExit) as ended:
        run_cli(Options, interrupted)
    assert ended.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"


NAN = float("nan")
INFINITE = float("inf")


@pytest.mark.parametrize(
    ("check", "arguments", "good", "bad"),
    [
        (at_least, (2,), (2, 10**9, None), (1, -1, 10**9 + 1)),
        (in_range, (0, 1), (0, 0.5, 1, None), (-0.1, 1.1, NAN, INFINITE, -INFINITE, 1e300)),
        (above, (0, 1), (0.1, 1, None), (0, -1, 1.1, NAN, INFINITE, -INFINITE, 1e300)),
        (below, (0, 1), (0, 0.9, None), (1, -0.1, NAN, INFINITE, -INFINITE, 1e300)),
        (is_seed, (), (0, 2**32 - 1), (-1, 2**32, 2**64)),
        (each_once, (), (["a"], ["a", "b"]), ([], ["a", "a"])),
        (is_domain, (), ("svhn", "my-digits_2", None), ("", "a/b", "..", "svhn/../svhn", "a\n")),
        (all_finite, (), ([], [0.0, -1.0]), ([0.0, NAN], [INFINITE], [-INFINITE])),
    ],
)
def test_checks_pass_good_values_and_name_the_flag_of_bad_ones(check, arguments, good, bad):
    for value in good:
        check("--flag", value, *arguments)
    for value in bad:
        with pytest.raises(UserError, match=r"^--flag"):
            check("--flag", value, *arguments)


def test_a_message_is_one_line_whatever_it_quotes():
    message = "net.pt: knows 'a\nb', \x1b[2J, \ud800, \udcff, but β and 数 stay; " + "x" * 5_000
    shown = str(UserError(message))
    assert shown.startswith(
        r"net.pt: knows 'a\nb', \x1b[2J, \ud800, \udcff, but β and 数 stay; xxx"
    )
    assert len(shown) == 1_000
    shown.encode()


def test_a_domain_is_not_adapted_to_itself():
    two_domains("mnistm", ["svhn", "usps"])
    with pytest.raises(UserError, match="--targets svhn: is the source too"):
        two_domains("svhn", ["usps", "svhn"], "--targets")
    with pytest.raises(UserError, match=r"--target svhn/\.\./svhn: must be the name of a folder"):
        two_domains("mnistm", ["svhn/../svhn"])


def test_help_and_tables_are_printed_where_the_output_has_no_greek(monkeypatch):
    @dataclass
    class Options:
        weight: float = 1.0
        """Weight λ of the loss."""

    raw = io.BytesIO()
    with io.TextIOWrapper(raw, encoding="ascii") as output:
        monkeypatch.setattr(sys, "stdout", output)
        monkeypatch.setattr(sys, "argv", ["script.py", "--help"])
        with pytest.raises(SystemExit) as end:
            run_cli(Options, print)
        assert end.value.code == 0
        output.flush()
        assert rb"Weight \u03bb of the loss" in raw.getvalue()


def test_a_note_of_a_kind_is_said_once(capsys):
    for number in range(3):
        note_once(f"image {number} is odd\n", kind="odd in test_cli")
    assert capsys.readouterr().out == "note: image 0 is odd\\n\n"
