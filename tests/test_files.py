"""common/files.py: files are written whole or not at all; output directories are checked first."""

from pathlib import Path

import pytest

from common.cli import UserError
from common.files import atomic_write, make_output_dir


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


def test_an_unwritable_output_directory_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--output-dir .*file/run: cannot be written"):
        make_output_dir(tmp_path / "file" / "run")
