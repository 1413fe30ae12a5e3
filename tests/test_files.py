"""common/files.py: files are written whole or not at all; output directories are checked first."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.cli import UserError
from common.files import ROOT, atomic_write, make_output_dir


def test_atomic_write_leaves_the_old_file_when_writing_fails(tmp_path):
    file = tmp_path / "x.txt"
    atomic_write(file, "old")

    def fail(path: Path) -> None:
        path.write_text("half")
        raise ValueError("stopped half way")

    with pytest.raises(ValueError, match="half way"):
        atomic_write(file, fail)
    assert [path.name for path in tmp_path.iterdir()] == ["x.txt"]
    assert file.read_text() == "old"


def test_text_that_cannot_be_encoded_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"x\.csv: cannot be written \(its text has half of a"):
        atomic_write(tmp_path / "x.csv", "name\ud800")
    assert not list(tmp_path.iterdir())


def test_an_unwritable_output_directory_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--output-dir .*file/run: cannot be written"):
        make_output_dir(tmp_path / "file" / "run")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux")
def test_a_full_disk_is_one_line_with_what_is_free(tmp_path):
    def write(path: Path) -> None:
        with Path("/dev/full").open("w") as file:
            file.write("x" * 100_000)

    message = r"x\.txt: cannot be written \(No space left on device; [\d,.]+ MB are free\)"
    with pytest.raises(UserError, match=message):
        atomic_write(tmp_path / "x.txt", write)
    assert not list(tmp_path.iterdir())


def test_what_killed_processes_left_is_removed(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for name in (f".{ended.pid}-last.pt", f".{os.getpid()}-last.pt", ".hidden", "1-a.png"):
        (tmp_path / name).touch()
    make_output_dir(tmp_path)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {f".{os.getpid()}-last.pt", ".hidden", "1-a.png"}


# Two commands at once

COMMAND = """
import sys
from dataclasses import dataclass
from pathlib import Path
import common.locks
from common.cli import run_cli
from common.files import make_output_dir

common.locks.PATIENCE = 0.3

@dataclass
class Write:
    output_dir: Path

def main(args):
    make_output_dir(args.output_dir)
    make_output_dir(args.output_dir)  # it may come back to its own folder
    print("has it", flush=True)
    sys.stdin.read()

run_cli(Write, main)
"""


def start(folder: Path) -> subprocess.Popen[str]:
    """A command that writes to the folder until its input ends."""
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", COMMAND, "--output-dir", str(folder)]
    return subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


@pytest.mark.skipif(os.name != "posix", reason="Windows has no such locks")
def test_a_second_command_is_told_who_writes_there(tmp_path):
    first = start(tmp_path)
    assert first.stdout is not None
    assert first.stdout.readline() == "has it\n"
    _, message = (second := start(tmp_path)).communicate("")
    assert second.returncode == 2
    assert message.startswith(f"error: --output-dir {tmp_path}: another command writes there (")
    assert message.count("\n") == 1
    if Path("/proc/locks").exists():
        assert f"process {first.pid}: {sys.executable}" in message
    first.communicate("")
    third = start(tmp_path)
    assert third.communicate("")[0] == "has it\n"
    assert not list(tmp_path.iterdir())  # the lock is no file


@pytest.mark.skipif(os.name != "posix", reason="Windows has no such locks")
def test_the_lock_goes_with_a_process_that_is_killed(tmp_path):
    first = start(tmp_path)
    assert first.stdout is not None
    assert first.stdout.readline() == "has it\n"
    first.kill()
    assert start(tmp_path).communicate("")[0] == "has it\n"
    first.communicate()
