"""run_all.py: what runs, what is skipped, what stops it; the real steps of each profile.

Most tests run a project of two-line scripts with a profiles.toml of its own. The steps of the real
profiles.toml are then checked with a stand-in that makes the files a step leaves. The smoke profile
runs for real at the end, in this process, where nothing has to be imported again.
"""

import importlib
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import tyro

import common.cli
import p2_ddpm_train
import run_all
from common.checkpoints import load_net
from common.cli import run_cli
from common.faces import FACE_NETS
from common.files import ROOT
from metrics.features import EFFICIENTNET, random_features

needs_posix = pytest.mark.skipif(os.name != "posix", reason="signals and shells of POSIX")
PROFILES = ("quick", "scratch", "full", "smoke")
VARIABLES = ("PROFILE", "ONLY", "JOBS", "CLASSIFIER", "OMP_NUM_THREADS", "PYTHONUNBUFFERED")

STEPS = """
parts = ["letters", "numbers"]

[problems]
q1 = ["numbers"]
q2 = ["letters"]

[profiles.small]
jobs = 1
data = "my data"

[profiles.large]
jobs = 2
data = "my data"

[[steps]]
name = "draw"
part = "data"
script = "make.py"
arguments = "draw {data}/clip_zeroshot {options}"
makes = "{data}"
leaves = ["{data}/clip_zeroshot"]
draws_data = true

[[steps]]
name = "one"
part = "numbers"
script = "make.py"
arguments = "one {makes} --from {data} {options}"
makes = "{output}/one"
needs = ["{data}/clip_zeroshot"]
options.small = "--width 8"
options.large = "--width 64"

[[steps]]
name = "two"
part = "numbers"
script = "make.py"
arguments = "two {makes} {source}"
makes = "{output}/two"
seconds.large = 70

[[steps]]
name = "luxury"
part = "numbers"
script = "make.py"
arguments = "luxury {makes}"
makes = "{output}/luxury"
profiles = ["large"]
optional = "a luxury"

[[steps]]
name = "three"
part = "numbers"
script = "make.py"
arguments = "three {makes}"
makes = "{output}/three"
seconds.large = 20

[[steps]]
name = "a"
part = "letters"
script = "make.py"
arguments = "a {makes}"
makes = "{output}/a"

[[steps]]
name = "b"
part = "letters"
script = "make.py"
arguments = "b {makes} {classifier}"
makes = "{output}/b"
needs = ["{classifier}"]
remove_outdated = true

[[steps]]
name = "report"
part = "report"
script = "make.py"
arguments = "report {makes}"
makes = "{output}/report"
always = true

[[alternatives.source]]
needs = ["{data}/given"]
words = "--given {data}/given"

[[alternatives.source]]
needs = ["{output}/one"]
words = "--own {output}/one"
"""
# Notes its arguments and threads, makes a folder; fails if a file named after the step says so.
MAKE = """import os, pathlib, sys
name, made, *words = sys.argv[1:]
threads = os.environ.get("OMP_NUM_THREADS", "-")
with open("calls", "a") as calls:
    calls.write("\\x1f".join([name, *words, "threads " + threads]) + "\\n")
print("making", name)
failure = pathlib.Path(name + ".fails")
if failure.exists():
    sys.exit(int(failure.read_text()))
pathlib.Path(made).mkdir(parents=True, exist_ok=True)
"""
# Starts a worker; both wait for a signal and note it, the script after it has "saved".
WAIT = """import os, pathlib, signal, subprocess, sys, time
name, made = sys.argv[1:3]
pathlib.Path(made).mkdir(parents=True, exist_ok=True)
if pathlib.Path("fast").exists():
    sys.exit(0)
def stop(number, frame):
    worker.wait()
    time.sleep(0.05)
    pathlib.Path(name + ".saved").write_text(str(number))
    print("saved", name, flush=True)
    sys.exit(128 + number)
WORKER = '''import pathlib, signal, sys
def note(number, frame):
    pathlib.Path(sys.argv[1]).write_text(str(number))
    sys.exit()
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, note)
pathlib.Path(sys.argv[1] + ".ready").touch()
signal.pause()
'''
worker = subprocess.Popen([sys.executable, "-c", WORKER, name + ".worker"])
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, stop)
while not pathlib.Path(name + ".worker.ready").exists():
    time.sleep(0.01)
pathlib.Path(name + ".started").touch()
while True:
    time.sleep(0.05)
"""


@dataclass
class Ended:
    """How a run ended, and the calls of its scripts: the words of each."""

    status: int
    out: str
    err: str
    calls: list[list[str]]

    @property
    def steps(self) -> list[str]:
        """The names of the steps that ran (in the stand-in project)."""
        return [call[0] for call in self.calls]

    def table(self) -> dict[str, str]:
        """Step → result, as the summary at the end has it."""
        rows = self.out.partition("seconds  result\n")[2].splitlines()
        matches = [re.fullmatch(r"(\S+) +\d+  (.+)", row) for row in rows]
        return {match[1]: match[2] for match in matches if match}


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    """Nothing that run_all.py reads is set in the environment."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A folder with a profiles.toml and scripts of two lines, which run_all.py takes as its own."""
    folder = tmp_path / "the project"
    folder.mkdir()
    (folder / "profiles.toml").write_text(STEPS)
    (folder / "make.py").write_text(MAKE)
    (folder / "wait.py").write_text(WAIT)
    monkeypatch.setattr(run_all, "ROOT", folder)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def run(monkeypatch, capfd) -> Callable[..., Ended]:
    """`run(*arguments, **environment)` runs run_all.py in this process."""

    def run(*arguments: str, **environment: str) -> Ended:
        calls = Path("calls")
        calls.unlink(missing_ok=True)
        capfd.readouterr()
        status = 0
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["run_all.py", *arguments])
            for name, value in environment.items():
                patch.setenv(name, value)
            try:
                run_cli(run_all.RunAll, run_all.main)
            except SystemExit as end:
                status = end.code
        lines = calls.read_text().splitlines() if calls.exists() else []
        captured = capfd.readouterr()
        return Ended(status, captured.out, captured.err, [line.split("\x1f") for line in lines])

    return run


# The stand-in project


def test_a_run_goes_from_data_to_the_report_and_skips_what_is_done(project, run):
    ended = run("some data", "out put")
    assert (ended.status, ended.err) == (0, "")
    assert ended.steps == ["draw", "a", "one", "two", "three", "report"]
    own = f"{project}/out put/one"
    assert ended.calls[3] == ["two", "--own", own, "threads -"]  # a path with a space is one word
    notes = {path.stem: path.read_text() for path in (project / "out put/steps").iterdir()}
    assert set(notes) == {"draw", "a", "one", "two", "three"}  # the report is made each time
    command, seconds = notes["one"].splitlines()
    assert seconds.isdecimal()
    expected = ["python", "make.py", "one", own, "--from", f"{project}/some data", "--width", "8"]
    assert shlex.split(command) == expected  # it can be pasted
    assert f"+ {command}\n" in ended.out
    assert f"= one: {seconds} s: {own}\n" in ended.out
    assert set(ended.table().values()) == {"done"}

    again = run("some data", "out put")
    assert (again.status, again.steps) == (0, ["report"])
    assert f"= one: done already: {own}\n" in again.out
    assert again.out.count(": done already: ") == 4  # the data is there: not a step any more
    results = dict.fromkeys(("a", "one", "two", "three"), "already done")
    assert again.table() == results | {"report": "done"}


def test_what_follows_a_step_runs_again_with_it(project, run):
    """Also if its command is the same; other parts stay as they are."""
    run()
    (project / "output/two").rmdir()
    assert run().steps == ["two", "three", "report"]
    (project / "output/steps/one.txt").unlink()  # not finished
    assert run().steps == ["one", "two", "three", "report"]


def test_other_arguments_are_another_step(project, run):
    run("--only", "numbers")
    ended = run("--only", "numbers", "--profile", "large")
    assert ended.steps == ["one", "two", "luxury", "three", "report"]
    assert ended.calls[0][-3:-1] == ["--width", "64"]


def test_new_data_are_followed_by_everything(project, run):
    first = run().steps
    shutil.rmtree(project / "my data")
    failed = run("--only", "q1", "--profile", "small")
    assert failed.steps == ["draw", "one", "two", "three", "report"]
    shutil.rmtree(project / "my data")
    (project / "a.fails").write_text("3")
    assert run().steps == [*first[:-1]]
    (project / "a.fails").unlink()
    assert run().steps == ["a", "report"]  # the rest followed already


def test_half_drawn_data_are_drawn_to_the_end(project, run):
    """made.json of a drawn domain without the part that is drawn last; other data stay."""
    made = project / "my data/digits/mnistm/made.json"
    made.parent.mkdir(parents=True)
    made.write_text('{"made_by": "download --public"}')
    assert "draw" not in run("--only", "q2").steps
    made.write_text('{"made_by": "synthetic"}')
    assert "draw" in run("--only", "q2").steps


def test_needs_alternatives_and_what_is_left_behind(project, run):
    (project / "my data/clip_zeroshot").mkdir(parents=True)
    (project / "my data/given").mkdir()
    assert run("--only", "q1").calls[1][1:3] == ["--given", f"{project}/my data/given"]
    (project / "other/face").mkdir(parents=True)  # without what step one needs, and its result
    assert run("other", "out2").steps == ["a", "three", "report"]

    (project / "net.pth").touch()
    ended = run(CLASSIFIER="net.pth")
    assert ["b", f"{project}/net.pth", "threads -"] in ended.calls
    assert run("--classifier", "net.pth").steps == ["report"]  # the same file
    run()
    assert (project / "output/b").exists()
    (project / "output/a").rmdir()  # the result of b is not about the new a
    run()
    assert not (project / "output/b").exists()
    assert not (project / "output/steps/b.txt").exists()


def test_from_step_runs_it_and_what_follows_again(project, run):
    run()
    assert run("--from-step", "two").steps == ["two", "three", "report"]
    assert run("--from", "three").steps == ["three", "report"]
    ended = run("--from", "four")
    assert ended.status == 2
    assert ended.err == "error: --from four: no such step; a, b, one, two, three\n"
    assert run("--from-step=one", "--only", "letters").err.startswith("error: --from-step one: ")


def test_a_dry_run_prints_the_commands_and_runs_nothing(project, run):
    ended = run("--dry-run", "--profile", "large")
    assert (ended.status, ended.err, ended.calls) == (0, "", [])
    assert sorted(path.name for path in project.iterdir()) == [
        "make.py",
        "profiles.toml",
        "wait.py",
    ]
    printed = ended.out.splitlines()
    for command in printed:  # they are commands of a shell, in an order that works
        subprocess.run(command.replace("python", sys.executable, 1), shell=True, check=True)
    by_hand = Path("calls").read_text()
    shutil.rmtree(project / "my data")
    shutil.rmtree(project / "output")
    ended = run("--jobs", "1", "--profile", "large")
    assert ended.calls == [line.split("\x1f") for line in by_hand.splitlines()]
    (project / "output/two").rmdir()
    *printed, estimate = run("--dry-run", "--profile", "large").out.splitlines()
    assert estimate == "# about 2 min"
    assert [line.split()[2] for line in printed] == ["two", "luxury", "three", "report"]
    assert not (project / "output/two").exists()


def test_the_page_is_written_while_the_steps_run(project, run, monkeypatch):
    monkeypatch.setattr(run_all, "PAGE_SECONDS", -1)
    ended = run("--only", "numbers")
    assert ended.status == 0
    assert ended.steps[-1] == "report"
    assert ended.steps.count("report") > 1


def test_what_is_done_takes_no_time_in_a_dry_run(project, run):
    run("--profile", "large", "--jobs", "1")
    *_, estimate = run("--profile", "large", "--dry-run").out.splitlines()
    assert estimate == "# about 0 min"


@pytest.mark.parametrize("profile", ["quick", "scratch", "full"])
def test_a_dry_run_estimates_the_minutes_of_the_real_steps(real, profile):
    *_, estimate = real("--dry-run", "--profile", profile).out.splitlines()
    minutes = re.fullmatch("# about ([0-9,]+) min", estimate)
    assert minutes is not None
    assert int(minutes[1].replace(",", "")) > 3


def test_a_failed_step_stops_its_part_and_is_where_the_next_run_begins(project, run):
    (project / "two.fails").write_text("3")
    ended = run("--only", "numbers")
    assert ended.status == 3  # the step's, if one part ran
    assert ended.err.startswith(
        "error: the step two failed; run again to continue: python make.py two "
    )
    assert ended.steps == ["draw", "one", "two"]
    assert ended.table() == {"draw": "done", "one": "done", "two": "failed"}

    ended = run("--jobs", "1")
    assert ended.status == 1
    assert ended.steps == ["a", "two"]  # the other part goes on; no report of half a run
    assert ended.err.endswith("error: a part was not finished (above); run again to continue\n")
    (project / "two.fails").unlink()
    assert run().steps == ["two", "three", "report"]

    (project / "draw.fails").write_text("4")
    shutil.rmtree(project / "my data")
    ended = run()
    assert (ended.status, ended.steps) == (4, ["draw"])
    (project / "draw.fails").unlink()
    (project / "report.fails").write_text("5")
    assert run().status == 5


def test_an_optional_step_may_fail(project, run):
    (project / "luxury.fails").write_text("3")
    ended = run("--only", "q1", "--profile", "large")
    assert ended.status == 0
    assert ended.steps == ["draw", "one", "two", "luxury", "three", "report"]
    assert "left out: a luxury\n" in ended.out
    assert ended.table()["luxury"] == "left out"
    # It is tried again, and nothing follows from it.
    assert run("--only", "q1", "--profile", "large").steps == ["luxury", "report"]
    (project / "luxury.fails").write_text("130")  # ended by a signal: no failure of its own
    ended = run("--only", "q1", "--profile", "large")
    assert (ended.status, ended.steps) == (130, ["luxury"])


@pytest.mark.parametrize("jobs", ["1", "2"])
@pytest.mark.parametrize(
    ("only", "steps"),
    [("q1", {"one", "two", "three"}), ("q2", {"a"}), ("letters q1", {"a", "one", "two", "three"})],
)
def test_only_some_problems(project, run, only, steps, jobs):
    ended = run(ONLY=only, JOBS=jobs)
    assert set(ended.steps) == steps | {"draw", "report"}
    assert set(run("out", "--only", *only.split(), "--jobs", jobs, ONLY="q3").steps) == set(
        ended.steps
    )


def test_parts_side_by_side_make_what_one_after_the_other_makes(project, run):
    def words(ended: Ended) -> list[list[str]]:
        return sorted(call[:-1] for call in ended.calls)

    one_by_one = run(JOBS="1")
    assert {call[-1] for call in one_by_one.calls} == {"threads -"}
    shutil.rmtree(project / "my data")
    shutil.rmtree(project / "output")
    (project / "one.fails").write_text("3")
    failed = run(JOBS="2")
    assert failed.status == 1
    assert failed.err == "error: a part was not finished (above); run again to continue\n"
    lines = failed.out.splitlines()
    assert any(
        line.startswith("numbers | error: the step one failed; run again to continue: python make")
        for line in lines
    )
    assert "numbers | making one" in lines
    assert any(line.startswith("letters | = a: ") for line in lines)  # the other one goes on
    (project / "one.fails").unlink()
    ended = run(JOBS="2")
    assert (ended.status, ended.err) == (0, "")
    assert ended.steps == ["one", "two", "three", "report"]
    shutil.rmtree(project / "my data")
    shutil.rmtree(project / "output")
    ended = run(JOBS="2")
    assert words(ended) == words(one_by_one)
    assert (ended.steps[0], ended.steps[-1]) == ("draw", "report")
    share = max(1, run_all.cores() // 2)
    assert {call[-1] for call in ended.calls[1:-1]} == {f"threads {share}"}
    assert ended.calls[0][-1] == "threads -"  # alone, so on all cores
    shutil.rmtree(project / "output")
    ended = run(JOBS="2", OMP_NUM_THREADS="7")
    assert {call[-1] for call in ended.calls} == {"threads 7"}


@pytest.mark.parametrize(
    ("arguments", "environment", "typed"),
    [
        ([], {"PROFILE": "slow"}, "PROFILE=slow"),
        (["--profile", "slow"], {"PROFILE": "small"}, "--profile slow"),
        ([], {"ONLY": "q1 q4"}, "ONLY=q1 q4"),
        (["--only", "q1", "q4"], {}, "--only q1 q4"),
        ([], {"JOBS": "0"}, "JOBS=0"),
        ([], {"JOBS": "two"}, "JOBS=two"),
        (["--jobs", "0"], {"JOBS": "1"}, "--jobs 0"),
        (["--jobs", "two"], {}, "--jobs"),
        ([], {"CLASSIFIER": "x"}, "CLASSIFIER=x"),
        (["--classifier", "x"], {}, "--classifier x"),
        (["a", "b", "c"], {}, "Unrecognized options"),
    ],
)
def test_mistakes_are_one_line_before_any_work(project, run, arguments, environment, typed):
    ended = run(*arguments, **environment)
    assert (ended.status, ended.out, ended.calls) == (2, "", [])
    assert ended.err.startswith(f"error: {typed}: ")
    assert ended.err.count("\n") == 1
    assert not (project / "output").exists()


BAD_PROFILES = [
    ("jobs = 1", "jobs = 0", "profile 'small': jobs cannot be '0'"),
    ("jobs = 1", "jobs = true", "profile 'small': jobs cannot be 'True'"),
    ("jobs = 1", "", "profile 'small': has no jobs"),
    ("jobs = 1", "jobs = [", "is not toml (Invalid value"),
    ("jobs = 1", "jobs = " + "[" * 5_000, "is not toml (nested too deeply)"),
    ("jobs = 1", "jobs = 1\njobs = 1", "is not toml (Cannot overwrite a value"),
    ('["letters", "numbers"]', "3", "parts cannot be '3'"),
    ('q1 = ["numbers"]', 'q1 = ["evil"]', "problem 'q1': has a part that is not in parts"),
    ('name = "draw"', 'name = "../draw"', "step 1, ../draw: its name is not the name of a file"),
    ('name = "draw"', "name = 7", "step 1: name cannot be '7'"),
    ('name = "draw"', 'title = "draw"', "step 1: has no name"),
    ("draws_data = true", 'draws_data = "yes"', "step 1: draws_data cannot be 'yes'"),
    ("draws_data = true", "evil = true", "step 1: has 'evil', which is not known here"),
    ('makes = "{data}"', 'makes = "{evil}"', "step 1, draw: has {evil}, which stands for nothing"),
    ('makes = "{data}"', 'makes = "{data.x}"', "has {data.x}, which stands for nothing"),
    ('makes = "{data}"', 'makes = "{data"', "step 1, draw: has a brace alone in '{data'"),
    ("draw {data}/clip", "draw '{data}/clip", "is no command (No closing quotation)"),
    ('part = "numbers"', 'part = "numberz"', "step 2, one: its part 'numberz' is not in parts"),
    ('profiles = ["large"]', 'profiles = ["huge"]', "profiles: there is no profile 'huge'"),
    ("options.small", "options.smal", "step 2, one: options: there is no profile 'smal'"),
    ("seconds.large = 70", 'seconds.large = "long"', "seconds cannot be"),
    ('name = "two"', 'name = "one"', "a second step one of the profile small"),
]


@pytest.mark.parametrize(("old", "new", "words"), BAD_PROFILES)
def test_a_damaged_profiles_toml_is_one_line_before_any_work(project, run, old, new, words):
    assert old in STEPS
    (project / "profiles.toml").write_text(STEPS.replace(old, new, 1))
    ended = run("data", "out")
    assert ended.status == 2
    assert ended.err.startswith(f"error: {project / 'profiles.toml'}: ")
    assert words in ended.err
    assert ended.err.count("\n") == 1
    assert not ended.calls
    assert not (project / "out").exists()


def test_flags_win_and_empty_variables_are_not_set(project, run):
    ended = run(
        "--profile", "small", "--jobs", "1", PROFILE="slow", JOBS="two", ONLY="", CLASSIFIER=""
    )
    assert ended.status == 0
    assert ended.steps == ["draw", "a", "one", "two", "three", "report"]


# Signals

DRIVER = """import pathlib, sys
sys.path.insert(0, sys.argv.pop(1))
import run_all
run_all.ROOT = pathlib.Path.cwd()
run_all.run_cli(run_all.RunAll, run_all.main)
"""


@needs_posix
@pytest.mark.parametrize("jobs", ["1", "2"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_the_running_steps_and_their_workers(project, run, number, jobs):
    """It is sent to run_all.py alone, which passes it on, waits for what is saved, and ends."""
    steps = (project / "profiles.toml").read_text().replace("make.py", "wait.py")
    first, rest = steps.split('name = "one"')  # the data is drawn at once
    steps = first.replace("wait.py", "make.py") + 'name = "one"' + rest
    (project / "profiles.toml").write_text(steps)
    running = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(ROOT), "--jobs", jobs],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    started = {"a.started"} if jobs == "1" else {"a.started", "one.started"}
    while {path.name for path in project.glob("*.started")} != started:
        assert running.poll() is None
        time.sleep(0.02)
    running.send_signal(number)
    out, err = running.communicate(timeout=60)
    assert running.returncode == 128 + number
    assert err == "stopped; run again to continue\n"
    names = sorted(name.removesuffix(".started") for name in started)
    for name in names:
        assert (project / f"{name}.saved").read_text() == str(int(number))
        assert (project / f"{name}.worker").read_text() == str(int(number))  # its whole group
        prefix = {"a": "letters | ", "one": "numbers | "}[name] if jobs == "2" else ""
        assert f"{prefix}saved {name}" in out.splitlines()
        assert not (project / f"output/steps/{name}.txt").exists()
    results = Ended(0, out, err, []).table()
    assert results == {"draw": "done"} | dict.fromkeys(names, "stopped")

    (project / "fast").touch()
    ended = run("--jobs", jobs)
    assert ended.status == 0
    expected = ["a", "one", "two", "three", "report"]  # what was stopped, and all after it
    assert [name for name, result in ended.table().items() if result == "done"] == expected


def test_a_silent_step_is_named_each_minute(monkeypatch, capsys):
    clock = SimpleNamespace(now=1_000.0)
    monkeypatch.setattr(run_all.time, "monotonic", lambda: clock.now)
    monkeypatch.setattr(run_all, "last_said", {})
    steps = run_all.RunningSteps()
    with steps.noted("faces-train", "faces | "), steps.noted("digits-train", "digits | "):
        for clock.now in (1_030.0, 1_059.0):
            steps.show()
        run_all.say("epoch 1", "digits | ")
        for clock.now in (1_065.0, 1_100.0, 1_118.0, 1_130.0, 1_150.0):
            steps.show()
    clock.now = 2_000.0
    steps.show()
    steps.hide()
    assert capsys.readouterr().out.splitlines() == [
        "digits | epoch 1",
        "faces | … faces-train: 01:05 so far",
        "faces | … faces-train: 02:10 so far",
        "digits | … digits-train: 02:10 so far",
    ]


def test_a_terminal_has_one_line_that_is_rewritten(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    steps = run_all.RunningSteps()
    steps.show()
    with steps.noted("faces-train", "faces | "), steps.noted("digits-train", "digits | "):
        steps.show()
        steps.show()  # within the same second
        run_all.say("epoch 1", "digits | ")
    steps.hide()
    assert capsys.readouterr().out.split(run_all.CLEAR_LINE) == [
        "",
        "faces-train 00:00, digits-train 00:00",
        "digits | epoch 1\n",
        "",
    ]


@needs_posix
def test_a_step_that_a_signal_ends_has_failed(project, run):
    """Not this program was asked to stop: the other part goes on."""
    (project / "make.py").write_text(
        MAKE + "import signal\nif name == 'one':\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    ended = run("--jobs", "1")
    assert ended.status == 1
    assert ended.table() == {"draw": "done", "a": "done", "one": "failed"}
    assert run("--only", "q1").status == 128 + signal.SIGKILL


@needs_posix
def test_run_all_sh_sets_up_and_hands_over(tmp_path):
    """From any folder, whose relative paths it keeps."""
    folder = tmp_path / "the project"
    bin_folder = folder / ".venv/bin"
    bin_folder.mkdir(parents=True)
    for name in ("run_all.sh", "setup.sh", "requirements.txt"):
        shutil.copy(ROOT / name, folder)
    python = bin_folder / "python"
    python.write_text('#!/bin/sh\n[ "$1" = -c ] && exit 0\npwd\nprintf "%s\\n" "$@"\nexit 7\n')
    python.chmod(0o755)
    with (folder / "requirements.txt").open() as requirements:
        checksum = subprocess.check_output(["cksum"], stdin=requirements)
    (folder / ".venv/requirements.hash").write_bytes(checksum)
    features = re.search(r"(?m)^features=(.*)$", (ROOT / "setup.sh").read_text())
    assert features
    (folder / ".venv/features.tried").write_text(features[1])
    command = ["bash", "the project/run_all.sh", "my data", "--only", "p1"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (7, "")
    here, script, *arguments = ended.stdout.splitlines()
    assert Path(here).samefile(tmp_path)
    assert tmp_path / script == folder / "run_all.py"
    assert arguments == ["my data", "--only", "p1"]


def test_it_starts_without_torch():
    command = "import run_all, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", command], cwd=ROOT, check=False).returncode == 0


# The real profiles.toml


# The file in the output directory of a command that run_all.py looks for.
LEFT = {
    ("p2_autoencoder.py", "train"): "model.safetensors",
    ("p2_score.py", "train"): "model.safetensors",
    ("p2_ddim.py", "eta-grid"): "eta_grid.png",
    ("p2_ddim.py", "interpolate"): "slerp.png",
    ("p3_dann.py", "table"): "table.png",
    ("p3_textual_inversion.py", "train-model"): "model.safetensors",
    ("p3_textual_inversion.py", "train"): "words.safetensors",
}


def leave_files(script: str, *arguments: str) -> None:
    """Make the files of a step that run_all.py looks for."""

    def after(flag: str) -> Path:
        return Path(arguments[arguments.index(flag) + 1])

    for flag in ("--output-dir", "--plots-dir"):
        if flag in arguments:
            after(flag).mkdir(parents=True, exist_ok=True)
    if "--grid" in arguments:
        after("--grid").touch()
    match [script, *arguments[:1]]:
        case ["prepare_data.py", "synthetic"]:
            for part in (
                "digits/mnistm",
                "digits/svhn",
                "digits/usps",
                "face/train",
                "face/val",
                "face/noise",
                "clip_zeroshot/train",
                "objects/clipart",
                "objects/shaded",
                "captioned/train",
                "textual_inversion",
            ):
                (after("--data-dir") / part).mkdir(parents=True)
            (after("--data-dir") / "textual_inversion/input.json").touch()
            (after("--data-dir") / "face/list_attr_celeba.txt").touch()
        case ["p2_ddpm_train.py", *_]:
            (after("--output-dir") / "model.safetensors").touch()
        case ["p3_textual_inversion.py", "generate"]:
            Path(arguments[2]).mkdir(parents=True, exist_ok=True)
        case [_, command] if (script, command) in LEFT:
            (after("--output-dir") / LEFT[script, command]).touch()


@pytest.fixture
def real(tmp_path, monkeypatch, run) -> Callable[..., Ended]:
    """Like `run`, with the real profiles.toml and a stand-in for the scripts.

    With fail="WORDS" the commands that contain these words fail, with `status`.
    """
    monkeypatch.chdir(tmp_path)

    def run_real(*arguments: str, fail: str = "", status: int = 3, **environment: str) -> Ended:
        calls = []

        def stand_in(_: object, command: list[str], prefix: str, environment: object) -> int:
            calls.append(list(command))
            if fail and fail in " ".join(command):
                return status
            leave_files(*command)
            return 0

        monkeypatch.setattr(run_all.Processes, "run", stand_in)
        ended = run(*arguments, **{"JOBS": "1"} | environment)
        ended.calls = calls
        return ended

    return run_real


def commands_of(calls: list[list[str]]) -> list[str]:
    """Script and sub-command of each call."""
    found = []
    for script, *arguments in calls:
        has_command = bool(arguments) and arguments[0][0].isalpha()
        found.append(f"{script} {arguments[0]}" if has_command else script)
    return found


def make_folders(folder: Path, *parts: str) -> None:
    for part in parts:
        (folder / part).mkdir(parents=True, exist_ok=True)


def test_the_quick_profile_shows_the_released_networks_first(real, tmp_path):
    ended = real("my data", "out put")
    assert (ended.status, ended.err) == (0, "")
    commands = commands_of(ended.calls)
    assert commands[0] == "prepare_data.py synthetic"
    assert "prepare_data.py check" not in commands  # the data was just drawn
    assert ended.calls[-1] == ["report.py", f"{tmp_path}/out put"]
    for first, then in (
        ("p1_dcgan.py sample", "p1_dcgan.py train"),
        ("p1_wgangp.py sample", "p1_wgangp.py train"),
        ("p2_ddpm_infer.py", "p2_ddpm_train.py"),
        ("p2_score.py sample", "p2_score.py train"),
        ("p2_guided.py grid", "p2_guided.py train"),
        ("p3_dann.py embed", "p3_dann.py table"),
        ("experiments/inversion.py", "p3_textual_inversion.py train"),
    ):
        assert commands.index(first) < commands.index(then)
    for call in ended.calls:
        is_training = call[0] == "p2_ddpm_train.py" or "train" in call
        if "checkpoints/" in str(call) and not is_training:
            folder = call[call.index("--output-dir") + 1]
            assert folder.startswith(f"{tmp_path}/out put/released/")
    for command in ("evaluate.py kid", "evaluate.py train-classifier", "p2_score.py table"):
        assert command not in commands  # too slow for it


def test_the_scratch_profile_from_data_to_the_report(real, tmp_path):
    ended = real("my data", "out put", PROFILE="scratch")
    assert (ended.status, ended.err) == (0, "")
    assert not any(
        call[0].startswith(("p1", "p2")) and "checkpoints/" in str(call) for call in ended.calls
    )
    commands = commands_of(ended.calls)
    assert commands[0] == "prepare_data.py synthetic"
    assert "prepare_data.py check" not in commands  # the data was just drawn
    assert ended.calls[-1] == ["report.py", f"{tmp_path}/out put"]
    for command in (
        "p1_dcgan.py train",
        "p1_wgangp.py sample",
        "evaluate.py faces",
        "p2_ddim.py generate",
        "p2_score.py train",
        "p2_score.py sample",
        "p2_score.py table",
        "p2_guided.py train",
        "p2_guided.py train-classifier",
        "evaluate.py train-attributes",
        "p2_guided.py grid",
        "experiments/guidance.py",
        "p3_dann_resnet.py table",
        "p3_textual_inversion.py train",
        "p3_textual_inversion.py generate",
        "evaluate.py inversion",
        "experiments/inversion.py",
    ):
        assert command in commands
    for command in ("p2_ddpm_infer.py", "evaluate.py digits", "p3_dann.py embed"):
        assert commands.count(command) == 2
    assert commands.count("p2_ddpm_train.py") == 3
    notes = list((tmp_path / "out put/steps").iterdir())
    # The report leaves no note; the check of data that was just drawn has one without a call.
    assert len(notes) == len(ended.calls)
    again = real("my data", "out put", PROFILE="scratch")
    assert [call[0] for call in again.calls] == ["report.py"]
    assert again.out.count(": done already: ") == len(notes) - 1


def test_what_follows_a_real_step(real, tmp_path):
    """A network that is trained again is sampled and scored again; other problems stay."""
    real(PROFILE="scratch")
    shutil.rmtree(tmp_path / "output/p2/digits")
    commands = commands_of(real(PROFILE="scratch").calls)
    assert commands[:2] == ["p2_ddpm_train.py", "p2_ddpm_infer.py"]
    both = ["evaluate.py train-classifier", "evaluate.py digits"]  # returns at once if finished
    assert commands[2:-1] == both * 2
    (tmp_path / "output/p1/first32_wgangp.png").unlink()
    assert commands_of(real(PROFILE="scratch").calls) == [
        "p1_wgangp.py sample",
        "evaluate.py faces",
        "evaluate.py fid",
        "evaluate.py kid",
        "report.py",
    ]


def test_data_without_some_parts(real, tmp_path):
    """2024's has no USPS; with faces alone nothing is drawn beside them."""
    make_folders(tmp_path / "data of 2024", "digits/mnistm", "digits/svhn")
    ended = real("data of 2024")
    assert ended.status == 0
    (table,) = (call for call in ended.calls if call[:2] == ["p3_dann.py", "table"])
    assert table[table.index("--targets") + 1 : table.index("--nets")] == ["svhn"]
    assert not any("usps" in word for call in ended.calls for word in call)
    make_folders(tmp_path / "faces", "face/train")
    scripts = {call[0] for call in real("faces", "out").calls}
    assert scripts == {
        "prepare_data.py",
        "p1_dcgan.py",
        "p1_wgangp.py",
        "evaluate.py",
        "p2_ddpm_train.py",
        "p2_ddpm_infer.py",
        "p2_ddim.py",
        "p2_score.py",
        "report.py",
    }
    make_folders(tmp_path / "imported", "digits/mnist")  # which takes no part in these problems
    assert commands_of(real("imported", "out4").calls)[0] == "prepare_data.py synthetic"
    make_folders(tmp_path / "course", "clip_zeroshot/val")  # the published weights, which may fail
    ended = real("course", "out3", fail="p3_clip_zeroshot.py")
    assert (ended.status, len(ended.calls)) == (0, 3)
    assert "left out: zero-shot classification\n" in ended.out


def test_the_course_network_and_its_images_are_scored(real, tmp_path):
    data = tmp_path / "hw2_data/face"
    make_folders(data, "noise", "GT")
    assert "ddim" not in str(real("--only", "p2").calls)
    (data / "UNet.pt").touch()
    calls = real("--only", "p2").calls
    assert commands_of(calls)[-2] == "evaluate.py mse"
    assert calls[-2][2:4] == [f"{tmp_path}/output/p2/ddim/generated", f"{data}/GT"]
    (generate,) = (call for call in calls if call[:2] == ["p2_ddim.py", "generate"])
    assert generate[2:] == [  # with the defaults, which are made for this network
        "--noise-dir",
        f"{data}/noise",
        "--checkpoint",
        f"{data}/UNet.pt",
        "--output-dir",
        f"{tmp_path}/output/p2/ddim/generated",
    ]


def test_faces_without_noises_get_some(real, tmp_path):
    make_folders(tmp_path / "faces", "face/train")
    calls = real("faces", "out", "--only", "ddim", PROFILE="scratch").calls
    assert [call[1] for call in calls if call[0] == "prepare_data.py"] == ["check", "noises"]
    (generate,) = (call for call in calls if call[:2] == ["p2_ddim.py", "generate"])
    assert generate[2:] == [  # the network says itself how it is sampled
        "--noise-dir",
        f"{tmp_path}/out/p2/noises",
        "--checkpoint",
        f"{tmp_path}/out/p2/faces/model.safetensors",
        "--output-dir",
        f"{tmp_path}/out/p2/ddim/generated",
    ]


def test_a_failed_real_step(real):
    ended = real("--only", "digits", fail="p2_ddpm_infer.py", PROFILE="scratch")
    assert ended.status == 3
    assert ended.err.startswith(
        "error: the step digits-sample failed; run again to continue: python p2_ddpm_infer"
    )
    assert ended.calls[-1][0] == "p2_ddpm_infer.py"
    again = real("--only", "digits", PROFILE="scratch")
    assert commands_of(again.calls)[0] == "p2_ddpm_infer.py"


def test_the_quick_results_do_not_stand_for_the_smoke_profile(real):
    real("data", "out", "--only", "p1")
    commands = commands_of(real("data", "out", "--only", "p1", PROFILE="smoke").calls)
    assert {"p1_dcgan.py train", "p1_wgangp.py train"} <= set(commands)
    printed = real("--dry-run", "--profile", "smoke").out.splitlines()
    drawing = f"prepare_data.py synthetic --data-dir {Path.cwd()}/hw2_data/smoke --mnistm 200 60"
    assert printed[0].startswith(f"python {drawing}")  # a folder of its own


@pytest.mark.parametrize(
    ("only", "scripts"),
    [
        ("p1", {"p1_dcgan", "p1_wgangp"}),
        ("p2", {"p2_ddpm_train", "p2_ddpm_infer", "p2_ddim", "p2_score", "p2_guided"}),
        ("face-diffusion", {"p2_ddpm_train", "p2_ddpm_infer", "p2_score", "p2_guided"}),
        ("p3", {"p3_dann", "p3_dann_resnet", "p3_clip_zeroshot", "p3_textual_inversion"}),
        ("dann ddim", {"p3_dann", "p3_dann_resnet", "p2_ddpm_train", "p2_ddim"}),
    ],
)
def test_only_some_real_problems(real, only, scripts):
    calls = real(ONLY=only, PROFILE="scratch").calls
    methods = {Path(call[0]).stem for call in calls if call[0].startswith(("p1", "p2", "p3"))}
    assert methods == scripts


def test_full_leaves_out_the_fid_without_its_weights(real):
    options = ("--profile", "full", "--only", "p1")
    ended = real(*options, fail="dcgan-fid", status=3)
    assert ended.status == 0
    assert "left out: FID of dcgan" in ended.out
    assert ended.calls[-1][0] == "report.py"
    assert len(real(*options).calls) == 2  # that step again, and the report
    ended = real(*options, "--from", "wgangp-random", fail="wgangp-fid", status=130)
    assert ended.status == 130
    assert "left out" not in ended.out
    assert ended.calls[-1][0] == "evaluate.py"


def test_kid_is_left_out_without_its_package(real):
    ended = real("--only", "p1", fail="evaluate.py kid", status=2, PROFILE="scratch")
    assert ended.status == 0
    assert "left out: KID of dcgan\n" in ended.out
    assert "left out: KID of wgangp\n" in ended.out
    again = real("--only", "p1", PROFILE="scratch")
    assert len(again.calls) == 3  # those two again, and the report


def test_faces_by_diffusion_are_in_latents_if_there_is_an_autoencoder(real, tmp_path):
    """Of full's own training; without its package in pixels."""
    options = ("--profile", "full", "--only", "face-diffusion")
    file = f"{tmp_path}/output/p2/autoencoder/model.safetensors"
    for words in face_trainings(real(*options)):
        assert words[words.index("--autoencoder") + 1] == file
    ended = real("hw2_data", "out", *options, fail="p2_autoencoder.py")
    assert "left out: the autoencoder, so that diffusion is in pixels\n" in ended.out
    assert "--autoencoder" not in str(face_trainings(ended))


def test_quick_continues_from_released_weights_if_they_are_there(real, tmp_path, monkeypatch):
    options = ("--only", "face-diffusion")
    monkeypatch.setattr(run_all, "ROOT", copy_of_profiles(tmp_path / "project"))
    without = real(*options)
    assert "--init" not in str(face_trainings(without))
    assert init_of_guided(without) == f"{tmp_path}/output/p2/face-ddpm/model.safetensors"
    make_folders(tmp_path, "project/checkpoints")
    for name in ("ddpm", "score", "guided"):
        (tmp_path / f"project/checkpoints/{name}_faces.safetensors").touch()
    ended = real(*options)
    assert init_of_guided(ended) == "checkpoints/guided_faces.safetensors"
    ddpm, score = face_trainings(ended)
    for name, words in (("ddpm", ddpm), ("score", score)):
        file = f"checkpoints/{name}_faces.safetensors"
        assert words[words.index("--init") + 1] == file
        assert words[words.index("--autoencoder") + 1] == file


def test_the_options_of_quick_are_those_of_the_released_weights(real, monkeypatch):
    """--init refuses another architecture, which only a run with data would show."""
    trainings = face_trainings(real("--only", "face-diffusion"))
    monkeypatch.chdir(ROOT)
    for name, (script, *arguments) in zip(("ddpm", "score"), trainings, strict=True):
        file = ROOT / f"checkpoints/{name}_faces.safetensors"
        if not file.exists():
            continue
        module = importlib.import_module(Path(script).stem)
        options = arguments if name == "ddpm" else arguments[1:]
        args = tyro.cli(module.Train, args=options)
        found, _ = load_net(file, FACE_NETS)
        if name == "ddpm":
            net = module.make_net(args, (3, args.size, args.size), 0)
            module.load_init(args, net, module.make_schedule(args))
        else:
            net = module.make_net(args)
            module.load_init(args, net)
        assert net.config == found.config


def init_of_guided(ended: Ended) -> str:
    """The weights from which the network for faces by attribute starts."""
    (words,) = [call for call in ended.calls if call[:2] == ["p2_guided.py", "train"]]
    return words[words.index("--init") + 1]


def face_trainings(ended: Ended) -> list[list[str]]:
    """The commands that train DDPM and the score-based model of faces, in a run that succeeded."""
    assert ended.status == 0
    ddpm = [call for call in ended.calls if call[0] == "p2_ddpm_train.py"]
    score = [call for call in ended.calls if call[:2] == ["p2_score.py", "train"]]
    assert (len(ddpm), len(score)) == (1, 1)
    return ddpm + score


def copy_of_profiles(folder: Path) -> Path:
    """A folder with nothing but the real profiles.toml."""
    folder.mkdir()
    shutil.copy(ROOT / "profiles.toml", folder)
    return folder


def test_the_courses_classifier_is_used_too(real, tmp_path):
    (tmp_path / "my").mkdir()
    (tmp_path / "my/Classifier.pth").touch()
    calls = real("--only", "p2", CLASSIFIER="my/Classifier.pth", PROFILE="scratch").calls
    scored = [call for call in calls if call[:2] == ["evaluate.py", "digits"]]
    assert len(scored) == 3
    assert f"{tmp_path}/my/Classifier.pth" in scored[2]
    course = tmp_path / "output/p2/score/course"
    real("--only", "p2", PROFILE="scratch")
    assert course.exists()
    shutil.rmtree(tmp_path / "output/p2/digits")  # its result is not about other digits
    real("--only", "p2", PROFILE="scratch")
    assert not course.exists()


@pytest.mark.parametrize("profile", PROFILES)
def test_every_command_is_understood(real, monkeypatch, profile):
    """The scripts' own command lines read the arguments of each profile."""
    calls = real(PROFILE=profile).calls
    Path("Classifier.pth").touch()
    calls += real(PROFILE=profile, ONLY="digits", CLASSIFIER="Classifier.pth").calls
    read = []
    monkeypatch.setattr(
        common.cli,
        "run_cli",
        lambda commands, main, shared=(): read.append(common.cli.parse(commands)),
    )
    for script, *arguments in calls:
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert len(read) == len(calls) > 20
    trainings = [args for args in read if hasattr(args, "shares")]
    batches = [p2_ddpm_train.images_of_a_step(args, 1) for args in trainings]
    faces = [1] if profile == "quick" else [1, 1]
    assert sorted(len(batch) for batch in batches) == [*faces, 2]
    assert [sum(batch) for batch in batches] == [args.batch_size for args in trainings]


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("data", ["none", "faces", "course"])
def test_a_dry_run_prints_what_a_run_then_does(real, tmp_path, profile, data):
    if data == "faces":
        make_folders(tmp_path / "data", "face/train", "face/val")
    if data == "course":
        make_folders(tmp_path / "data", "face/noise", "face/GT", "face/train", "clip_zeroshot/val")
        (tmp_path / "data/face/UNet.pt").touch()
    printed = real("data", "--dry-run", "--profile", profile).out
    assert not (tmp_path / "output").exists()
    commands = [["python", *call] for call in real("data", "--profile", profile).calls]
    *lines, estimate = printed.splitlines()
    assert [shlex.split(line) for line in lines] == commands
    assert re.fullmatch("# about [0-9,]+ min", estimate)


@pytest.mark.timeout(1200)
def test_the_smoke_profile_makes_the_report(real, tmp_path, monkeypatch):
    """Every step for real, one after the other, in this process."""
    calls = real("real/data", "real/out", PROFILE="smoke").calls
    shutil.rmtree(tmp_path / "real")
    monkeypatch.chdir(ROOT)  # where run_all.py runs its steps
    monkeypatch.setattr(os, "fsync", lambda file: None)  # of thousands of files: most of the time
    # The trained EfficientNet takes a minute, and is tested elsewhere.
    stand_in = random_features()._replace(name=EFFICIENTNET)
    monkeypatch.setattr("metrics.features.efficientnet_features", lambda device: stand_in)
    for script, *arguments in calls:
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        runpy.run_path(str(ROOT / script), run_name="__main__")
    page = (tmp_path / "real/out/report.html").read_text()
    assert "Not run: " not in page
    assert page.count('<img src="data:image/') == 82  # with the curves of text-to-image
    assert "Synthetic data." in page
