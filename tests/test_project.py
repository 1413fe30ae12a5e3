"""The project's files: requirements, versions, the workflow; setup.sh with a stand-in Python."""

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from common.files import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WANTED = [
    Requirement(text)
    for text in [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]
]

# The package of EfficientNet's weights, in the version that setup.sh installs.
FEATURES = re.search(r"^features=(\S+)$", (ROOT / "setup.sh").read_text(), re.MULTILINE)[1]


def pins_of(file: str) -> dict[str, set[str]]:
    """Package → the versions that a requirements file pins, one or one for each Python."""
    pins = {}
    for line in (ROOT / file).read_text().splitlines():
        text = line.partition("#")[0].strip().removesuffix("\\").strip()
        if text and not text.startswith("--hash"):
            requirement = Requirement(text)
            (version,) = requirement.specifier
            assert version.operator == "=="
            pins.setdefault(canonicalize_name(requirement.name), set()).add(version.version)
    return pins


def test_requirements_pin_what_pyproject_asks_for():
    pins = pins_of("requirements.txt")
    wanted = {canonicalize_name(requirement.name): requirement for requirement in WANTED}
    assert pins.keys() == wanted.keys()
    for name, requirement in wanted.items():
        (version,) = pins[name]
        assert requirement.specifier.contains(version), name
    lines = (ROOT / "requirements.txt").read_text()
    for requirement in WANTED:
        for extra in requirement.extras:
            assert f"{requirement.name}[{extra}]==" in lines


def test_the_lock_has_these_pins_with_hashes_and_names_no_index():
    text = (ROOT / "requirements.lock").read_text()
    locked = pins_of("requirements.lock")
    for name, versions in pins_of("requirements.txt").items():
        assert locked[name] == versions, f"{name}: make requirements.lock again (its first lines)"
    packages = re.split(r"^(?=\w)", text, flags=re.MULTILINE)[1:]
    assert len(packages) >= len(locked)
    for package in packages:
        assert "--hash=sha256:" in package
    assert not re.search(r"https?:|--(extra-)?index|--find-links|file:", text)


def test_the_version_is_the_same_everywhere():
    version = PROJECT["version"]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    changelog = (ROOT / "CHANGELOG.md").read_text()
    latest = re.search(r"^## (\d\S*) - (\S+)$", changelog, flags=re.MULTILINE)
    assert latest is not None
    assert latest[1] == version
    assert f'date-released: "{latest[2]}"' in (ROOT / "CITATION.cff").read_text()


@pytest.mark.parametrize("name", ["ci.yml", "pages.yml"])
def test_the_files_of_the_workflows_exist(name):
    workflow = (ROOT / ".github/workflows" / name).read_text()
    named = re.findall(r"\b(?:\w+/)?\w+\.(?:py|sh|txt)\b", workflow)
    assert len(named) > 5
    for name in named:
        assert (ROOT / name).is_file(), name


# setup.sh

# Python's venv makes a copy of it; its pip notes the arguments. It fails the first $FAILURES times,
# and for the package $REFUSED.
STAND_IN = r"""#!/usr/bin/env bash
case "$1 $2" in
"-c "*) exit 0 ;;
"--version "*) echo "Python 3.12.0" ;;
"-m venv")
    shift 2; [ "$1" = --clear ] && shift
    rm -rf "$1"; mkdir -p "$1/bin"; cp "$0" "$1/bin/python" ;;
"-m pip")
    shift 2; echo "$*" >>"$LOG"
    [[ "$*" != *"$REFUSED"* ]] && [ "$(wc -l <"$LOG")" -gt "$FAILURES" ] ;;
esac
"""
needs_bash = pytest.mark.skipif(os.name != "posix", reason="a shell of POSIX")


@pytest.fixture
def setup(tmp_path):
    """`setup(failures, **environment)`: what setup.sh prints, its status, and pip's arguments."""
    folder = tmp_path / "the project"
    folder.mkdir()
    for name in ("setup.sh", "requirements.txt", "requirements.lock"):
        shutil.copy(ROOT / name, folder)
    python = tmp_path / "python"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    tools = tmp_path / "tools"
    tools.mkdir()
    log = tmp_path / "log"

    def run(failures: int = 0, **environment: str) -> tuple[subprocess.CompletedProcess, list[str]]:
        log.unlink(missing_ok=True)
        settings = {"LOG": str(log), "FAILURES": str(failures), "PYTHON": str(python)}
        settings["REFUSED"] = "nothing"
        ended = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", 'source "the project/setup.sh"; command -v python'],
            cwd=tmp_path,
            env={"PATH": f"{tools}:/usr/bin:/bin"} | settings | environment,
            capture_output=True,
            text=True,
            check=False,
        )
        return ended, log.read_text().splitlines() if log.exists() else []

    return run


def hash_of(tmp_path: Path) -> bool:
    return (tmp_path / "the project/.venv/requirements.hash").exists()


@needs_bash
def test_setup_installs_once(setup, tmp_path):
    ended, calls = setup()
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.splitlines()[-1] == f"{tmp_path}/the project/.venv/bin/python"
    packages, features = calls
    assert packages.endswith(f"-r {tmp_path}/the project/requirements.txt")
    assert features.endswith(f" {FEATURES}")
    assert hash_of(tmp_path)
    again, calls = setup()
    assert (again.returncode, calls) == (0, [])
    with (tmp_path / "the project/requirements.txt").open("a") as file:
        file.write("# newer\n")
    assert len(setup()[1]) == 2


@needs_bash
def test_setup_tries_twice_and_a_failed_one_does_not_count(setup, tmp_path):
    ended, calls = setup(failures=1)
    assert ended.returncode == 0
    assert len(calls) == 3
    shutil.rmtree(tmp_path / "the project/.venv")
    ended, calls = setup(failures=2)
    assert (ended.returncode, len(calls)) == (2, 2)
    assert ended.stderr.startswith("error: the packages of requirements.txt could not be installed")
    assert not hash_of(tmp_path)
    assert len(setup()[1]) == 2  # so the next one installs


@needs_bash
def test_setup_goes_on_without_the_weights_of_efficientnet(setup, tmp_path):
    ended, calls = setup(REFUSED="efficientnet")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert len(calls) == 3
    line = f"left out: {FEATURES} could not be installed, so evaluate.py kid needs"
    assert line in ended.stdout
    assert hash_of(tmp_path)


def test_setup_installs_the_weights_that_pyproject_asks_for():
    (wanted,) = map(Requirement, PROJECT["optional-dependencies"]["features"])
    pinned = Requirement(FEATURES)
    assert pinned.name == wanted.name
    (version,) = pinned.specifier
    assert wanted.specifier.contains(version.version)


@needs_bash
def test_setup_with_the_cpu_wheels(setup, tmp_path):
    ended, (torch, rest, _) = setup(TORCH="cpu")
    assert ended.returncode == 0
    pins = pins_of("requirements.txt")
    for name in ("torch", "torchvision"):
        assert f"{name}=={next(iter(pins[name]))}" in torch.split()
    assert "--index-url" in torch.split()
    assert "requirements.txt" in rest
    shutil.rmtree(tmp_path / "the project/.venv")
    ended, _ = setup(failures=9, TORCH="cpu")
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: TORCH=cpu: no wheels of torch and torchvision")
    assert ended.stderr.count("\n") == 1
    assert not hash_of(tmp_path)
    ended, calls = setup(TORCH="gpu")
    assert (ended.returncode, calls) == (2, [])
    assert ended.stderr.startswith("error: TORCH=gpu: ")


@needs_bash
def test_setup_takes_uv_if_it_is_there(setup, tmp_path):
    """And pip if uv fails, or for the CPU wheels, which the lock does not have."""
    uv = tmp_path / "tools/uv"
    uv.write_text('#!/bin/sh\necho "uv $* in $VIRTUAL_ENV" >>"$LOG"\nexit "${UV_FAILS:-0}"\n')
    uv.chmod(0o755)
    _, calls = setup()
    folder = f"{tmp_path}/the project"
    assert calls[0] == f"uv pip sync --quiet {folder}/requirements.lock in {folder}/.venv"
    assert calls[1].endswith(f" {FEATURES}")
    assert hash_of(tmp_path)
    shutil.rmtree(f"{folder}/.venv")
    assert [call.split()[0] for call in setup(UV_FAILS="1")[1]] == ["uv", "install", "install"]
    shutil.rmtree(f"{folder}/.venv")
    assert [call.split()[0] for call in setup(TORCH="cpu")[1]] == ["install"] * 3


@needs_bash
def test_setup_without_a_python_says_which_is_needed(setup, tmp_path):
    (tmp_path / "python").write_text("#!/bin/sh\nexit 1\n")
    for name in ("python3", "python", "python3.11", "python3.12", "python3.13", "python3.14"):
        shutil.copy(tmp_path / "python", tmp_path / "tools" / name)
    ended, calls = setup()
    assert (ended.returncode, calls) == (2, [])
    assert ended.stderr.startswith("error: Python 3.11 to 3.14 with venv is needed")
