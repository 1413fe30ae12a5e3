"""README and docs: every command in them is understood, every file and link in them exists."""

import importlib.util
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import common.cli
from common.files import ROOT

PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "hw2_data" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
# Commands of other programs, which are not run or parsed here.
OTHER_PROGRAMS = {"source", "uv", "ln", "pre-commit", "pip"}


def commands_of(page: Path) -> list[str]:
    """The commands in the bash blocks of a page, without comments, continued lines joined."""
    commands = []
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(), flags=re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            command = line.split("  #")[0].strip()
            if command and not command.startswith("#"):
                commands.append(command)
    return commands


def words_of(command: str) -> list[str]:
    """The words of a command, without variables before it and without torchrun."""
    words = shlex.split(command)
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    if words[0] == "torchrun":
        assert "--nproc_per_node" in words
        script = next(number for number, word in enumerate(words) if word.endswith(".py"))
        words = ["python", *words[script:]]
    return words


def all_commands() -> list[tuple[str, str]]:
    """(page, command) for each command of each page, once."""
    found = {}
    for page in PAGES:
        for command in commands_of(page):
            found.setdefault(command, page.name)
    return [(page, command) for command, page in found.items()]


def parse_only(script: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> object:
    """What a script's own command line makes of the arguments; its main is not run."""
    parsed = []
    monkeypatch.setattr(
        common.cli,
        "run_cli",
        lambda commands, main, shared=(): parsed.append(common.cli.parse(commands)),
    )
    monkeypatch.setattr(sys, "argv", [script.name, *arguments])
    runpy.run_path(str(script), run_name="__main__")
    return parsed[0]


@pytest.mark.parametrize(("page", "command"), all_commands())
def test_every_command_is_understood(page, command, monkeypatch):
    words = words_of(command)
    program, *arguments = words
    if program in OTHER_PROGRAMS:
        return
    assert program in ("python", "bash"), f"{page}: {command}"
    if arguments[0] == "-c":
        compile(arguments[1], page, "exec")
        return
    if arguments[0] == "-m":
        assert importlib.util.find_spec(arguments[1]), f"{page}: {command}"
        return
    script = ROOT / arguments[0]
    assert script.is_file(), f"{page}: {command}"
    if script.suffix == ".py":
        parse_only(script, arguments[1:], monkeypatch)
    elif script.name == "run_all.sh":
        parse_only(ROOT / "run_all.py", arguments[1:], monkeypatch)
    for word in arguments:
        if word.startswith("checkpoints/"):
            assert (ROOT / word).is_file(), f"{page}: {command}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_and_picture_exists(page):
    for target in re.findall(r"\]\(([^)#\s]+)\)", page.read_text()):
        if not target.startswith("https://"):
            assert (page.parent / target).exists(), target


def test_the_slurm_script_is_whole_and_its_command_is_understood(monkeypatch):
    file = ROOT / "docs" / "slurm.sh"
    subprocess.run(["bash", "-n", file], check=True)
    (command,) = re.findall(r"^srun (torchrun .*)", file.read_text().replace("\\\n", " "), re.M)
    script, *arguments = words_of(command)[1:]
    assert parse_only(ROOT / script, arguments, monkeypatch)


def test_every_file_that_is_named_exists():
    """Names in backticks that look like a file of the repository."""
    pattern = r"`([a-z_]+/[\w./]+|[a-z0-9_]+\.(?:py|sh|toml|md))`"
    # Names that stand for others, and what commands make.
    made = (
        "checkpoints/NAME",
        "face/",
        "hw2_data/",
        "models/method",
        "output/",
        "pN_",
        "runs/",
        "tests/test_method",
        "web/dist",
    )
    for page in PAGES:
        for name in re.findall(pattern, page.read_text()):
            if name.startswith(made) or re.fullmatch(r"hw2_[123]\.sh", name):
                continue
            assert (ROOT / name).exists(), f"{page.name}: {name}"


def test_readme_fits_two_screens():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 130
    assert len(text.split()) <= 1_100


def test_the_short_commands_of_readme_run(tmp_path, monkeypatch):
    """Faces from noises with the released network: both commands as README has them."""
    commands = commands_of(ROOT / "README.md")
    chosen = [c for c in commands if "prepare_data.py noises" in c or "p2_ddim.py generate" in c]
    assert len(chosen) == 2
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    for command in chosen:
        _, script, *arguments = words_of(command)
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert len(list((tmp_path / "ddim").glob("*.png"))) == 10
