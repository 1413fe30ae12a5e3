"""The names of our modules, and what importing them does."""

import ast
import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.files import ROOT

# Packages that take long to import. They are imported inside the functions that need them, so that
# --help and mistakes on the command line answer soon.
HEAVY = {
    *("accelerate", "diffusers", "dlib", "matplotlib", "open_clip", "pytorch_fid"),
    *("scipy.stats", "sklearn", "timm", "torchvision"),
}
SCRIPTS = sorted(file.stem for file in ROOT.glob("*.py"))


def packages() -> list[Path]:
    """Every folder of Python modules, with those inside it."""
    folders = set()
    for file in ROOT.glob("*/**/*.py"):
        folder = file.relative_to(ROOT).parent
        is_ours = not folder.parts[0].startswith(".")  # as .venv does
        if is_ours and folder.name != "docs":  # tour.py is a notebook
            folders.add(folder)
    return sorted(folders)


def other_scripts() -> list[str]:
    """The modules of experiments/, benchmarks/ and tools/."""
    names = []
    for folder in ("experiments", "benchmarks", "tools"):
        modules = [file.stem for file in sorted((ROOT / folder).glob("[!_]*.py"))]
        names += [f"{folder}.{module}" for module in modules]
    return names


def test_no_module_has_the_name_of_an_installed_one():
    top_level = {folder.parts[0] for folder in packages()}
    ours = {*SCRIPTS, *top_level}
    assert {"common", "models", "p1_dcgan", "tests"} <= ours
    assert not ours & sys.stdlib_module_names
    installed = importlib.metadata.packages_distributions()
    assert not {name: installed[name] for name in ours & installed.keys()}


@pytest.mark.parametrize("folder", packages(), ids=str)
def test_every_package_says_in_one_line_what_it_is(folder):
    file = ROOT / folder / "__init__.py"
    tree = ast.parse(file.read_text())
    docstring = ast.get_docstring(tree)
    assert docstring, file
    assert "\n" not in docstring
    assert len(tree.body) == 1  # and it has nothing else


# Imports modules one after the other and stops at the first one that imports a heavy package.
IMPORT_ALL = """
import importlib
import sys

heavy = sys.argv[1].split()
for name in sys.argv[2:]:
    importlib.import_module(name)
    for package in heavy:
        if package in sys.modules:
            sys.exit(f"importing {name} imports {package}")
"""


def import_all(names: list[str], heavy: set[str], folder: Path) -> None:
    """Import modules in a new Python in an empty folder. Nothing may be printed or written."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, " ".join(sorted(heavy)), *names],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    assert done.returncode == 0
    assert done.stdout == ""
    assert not list(folder.iterdir())


def test_importing_a_script_does_nothing_and_imports_no_heavy_package(tmp_path):
    import_all(SCRIPTS, HEAVY, tmp_path)


def test_importing_an_experiment_benchmark_or_tool_does_nothing(tmp_path):
    import_all(other_scripts(), set(), tmp_path)


# Loads a released network of each family that starts from normal random weights.
LOAD_ALL = """
import sys
from pathlib import Path

from common.checkpoints import load_net
from models.nets import NETS

for file in sys.argv[1:]:
    load_net(Path(file), NETS)
sys.exit(any(name in sys.modules for name in ("torch._dynamo", "sympy")))
"""


def test_loading_a_network_does_not_wait_for_torchs_compiler():
    """Importing it takes two to three seconds."""
    names = ("dann_svhn", "dann_resnet_mnist", "dcgan_faces", "ddpm_faces", "text_to_image")
    files = [str(ROOT / f"checkpoints/{name}.safetensors") for name in names]
    done = subprocess.run([sys.executable, "-c", LOAD_ALL, *files], cwd=ROOT, check=False)
    assert done.returncode == 0, "torch's compiler was imported, or a network did not load"
