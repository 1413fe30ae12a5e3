"""docs/tour.ipynb: it is docs/tour.py with its pictures, its commands are understood, it runs.

Running all of it needs the extra `notebook` of pyproject.toml, and takes a minute or two.
"""

import ast
import base64
import importlib.util
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import types
import venv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.cli import UserError
from common.files import ROOT
from tests.test_docs import parse_only
from tools import tour

NOTEBOOK = json.loads(tour.NOTEBOOK.read_text())
PACKAGES = ("jupytext", "nbclient", "ipykernel")
missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
needs_notebook = pytest.mark.skipif(
    bool(missing), reason=f"the extra `notebook` is not installed: {', '.join(missing)}"
)
needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="git is not there")
needs_links = pytest.mark.skipif(os.name != "posix", reason="Windows needs rights for links")


def source_cells() -> list[tuple[str, str]]:
    """(kind, text) of each cell of docs/tour.py."""
    cells = []
    for part in re.split(r"^# %%", tour.SOURCE.read_text(), flags=re.MULTILINE)[1:]:
        title, _, text = part.partition("\n")
        text = text.strip("\n")
        if title == " [markdown]":
            cells.append(("markdown", re.sub("^# ?", "", text, flags=re.MULTILINE)))
        else:
            assert title == ""
            cells.append(("code", text))
    return cells


def code_of(number: int) -> str:
    """The text of a cell of code, counted without those of markdown."""
    return [text for kind, text in source_cells() if kind == "code"][number]


def pictures_of(notebook: dict) -> list[np.ndarray]:
    """The pictures in the outputs of a notebook, which has no other outputs."""
    pictures = []
    for cell in notebook["cells"]:
        for output in cell.get("outputs", []):
            assert output["output_type"] == "display_data"
            data = base64.b64decode(output["data"]["image/png"])
            pictures.append(np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    return pictures


def commands() -> list[str]:
    """The commands of all cells: what `run` is given."""
    found = []
    for node in ast.walk(ast.parse(tour.SOURCE.read_text())):
        match node:
            case ast.Call(func=ast.Name(id="run"), args=[ast.Constant(value=str(command))]):
                found.append(command)
    return found


# The notebook that is in the repository


def test_the_notebook_has_the_cells_of_its_source():
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in NOTEBOOK["cells"]]
    assert cells == source_cells(), "run `python tools/tour.py` again"


def test_the_notebook_shows_a_picture_in_each_section():
    has_picture = {}
    section = ""
    for cell in NOTEBOOK["cells"]:
        title = re.match(r"## (\d\. .+)", "".join(cell["source"]))
        if cell["cell_type"] == "markdown" and title is not None:
            section = title[1]
            has_picture[section] = False
        elif cell.get("outputs"):
            has_picture[section] = True
    assert [section[0] for section in has_picture] == list("123456")
    assert all(has_picture.values()), has_picture
    for picture in pictures_of(NOTEBOOK):
        assert picture.std() > 20  # of 255 levels: no empty picture


def test_the_notebook_is_small_and_says_nothing_of_the_machine():
    text = tour.NOTEBOOK.read_text()
    assert len(text) <= 1_500_000
    assert NOTEBOOK["metadata"] == tour.METADATA
    for number, cell in enumerate(NOTEBOOK["cells"]):
        assert cell["id"] == f"cell-{number}"
        assert cell["metadata"] == {}
        for output in cell.get("outputs", []):
            assert output["metadata"].keys() <= {"image/png"}
            assert output["data"]["text/plain"] == ["<IPython.core.display.Image object>"]
            output["data"]["image/png"] = ""
    assert not re.search(r"/(home|root|tmp|work|Users|content)\b", json.dumps(NOTEBOOK))


@pytest.mark.parametrize("command", commands(), ids=lambda command: command.split()[0])
def test_each_command_of_the_notebook_is_understood(command, monkeypatch):
    script, *arguments = shlex.split(command)
    parse_only(ROOT / script, arguments, monkeypatch)
    for word in arguments:
        if word.startswith("checkpoints/"):
            assert (ROOT / word).is_file(), command


# The first cells


def run_first_cell(python: Path | str, folder: Path, repository: str, **environment: str):
    """Run the first cell as a program in a folder; it prints the folder that it ends in."""
    code = code_of(0)
    assert 'REPOSITORY = ""' in code
    code = code.replace('REPOSITORY = ""', f"REPOSITORY = {repository!r}")
    return subprocess.run(
        [str(python), "-c", f"{code}\nprint(Path.cwd())"],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("place", [".", "docs"])
def test_in_the_repository_the_first_cell_only_goes_to_its_root(place):
    ended = run_first_cell(sys.executable, ROOT / place, "no such repository")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.strip() == str(ROOT)


STAND_IN_FOR_PIP = """
import os, sys
with open(os.environ["LOG"], "a") as file:
    print(*sys.argv[1:], file=file)
"""


@needs_git
def test_elsewhere_the_first_cell_clones_and_installs_once(tmp_path):
    """In a Python without packages; in the place of pip is a module that notes its arguments."""
    original = tmp_path / "original"
    (original / "docs").mkdir(parents=True)
    for name in ("profiles.toml", "pyproject.toml", "docs/tour.py"):
        shutil.copy(ROOT / name, original / name)
    bare = tmp_path / "bare.git"
    who = ["-c", "user.name=somebody", "-c", "user.email=somebody@example.com"]
    for words in (
        ["init", "--quiet", str(original)],
        ["-C", str(original), "add", "."],
        ["-C", str(original), *who, "commit", "--quiet", "--message", "All files"],
        ["clone", "--quiet", "--bare", str(original), str(bare)],
    ):
        subprocess.run(["git", *words], check=True)

    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
    (tmp_path / "modules/pip").mkdir(parents=True)
    (tmp_path / "modules/pip/__main__.py").write_text(STAND_IN_FOR_PIP)
    colab = tmp_path / "colab"
    colab.mkdir()
    log = tmp_path / "log"
    settings = {"PYTHONPATH": str(tmp_path / "modules"), "LOG": str(log)}

    ended = run_first_cell(python, colab, "", **settings)
    assert ended.returncode == 1
    assert "REPOSITORY: write the address of the repository" in ended.stderr
    assert not list(colab.iterdir())
    assert not log.exists()

    ended = run_first_cell(python, colab, bare.as_uri(), **settings)
    assert (ended.returncode, ended.stderr) == (0, "")
    clone = colab / "course"
    assert ended.stdout.strip() == str(clone)
    assert (clone / "docs/tour.py").read_text() == tour.SOURCE.read_text()
    assert log.read_text().splitlines() == [f"install --quiet {clone}"]

    ended = run_first_cell(python, clone, bare.as_uri(), **settings)  # the cell once more
    assert (ended.returncode, ended.stdout.strip()) == (0, str(clone))
    assert len(log.read_text().splitlines()) == 1


def test_a_command_that_fails_stops_the_notebook_with_its_message(monkeypatch):
    shown = types.ModuleType("IPython.display")
    vars(shown).update(Image=None, display=None)
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", shown)
    monkeypatch.chdir(ROOT)
    cells = {}
    exec(code_of(0) + "\n" + code_of(1), cells)
    with pytest.raises(RuntimeError, match=r"^error: --count 0: "):
        cells["run"]("prepare_data.py noises --output-dir nowhere --count 0")


# All of it


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A folder with links to all that the commands read; what they write stays in it."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in ROOT.iterdir():
        if not path.name.startswith((".", "output")):
            (folder / path.name).symlink_to(path)
    return folder


@needs_notebook
@needs_links
@pytest.mark.timeout(900)
def test_all_cells_run_and_show_the_pictures_of_the_notebook(copy):
    notebook = tour.read_source()
    tour.execute(notebook, copy)
    tour.strip(notebook)
    assert notebook.metadata == tour.METADATA
    assert {path.name for path in (copy / "output-tour").iterdir()} >= {"faces", "data", "words"}
    pictures = pictures_of(notebook)
    expected = pictures_of(NOTEBOOK)
    assert [picture.shape for picture in pictures] == [picture.shape for picture in expected]
    for picture, other in zip(pictures, expected, strict=True):
        # bf16 and other processors change single pixels, of t-SNE's plots the place of the points.
        assert np.abs(picture.astype(float) - other).mean() < 16


@needs_notebook
def test_a_cell_that_fails_is_reported(tmp_path):
    import nbformat

    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("raise OSError('full')")])
    with pytest.raises(UserError, match="a cell failed: OSError: full"):
        tour.execute(notebook, tmp_path)


@pytest.mark.skipif(not missing, reason="the extra `notebook` is installed")
def test_without_the_packages_the_tool_says_what_is_missing():
    with pytest.raises(UserError, match=r"pip install '\.\[notebook\]'"):
        tour.execute(None, ROOT)


def test_the_tool_writes_notebooks_only():
    with pytest.raises(UserError, match=r"--output tour\.py: is no \.ipynb file"):
        tour.Tour(output=Path("tour.py"))
