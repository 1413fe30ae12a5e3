"""run_all.sh: its steps in every profile, what is skipped, what stops it; the smoke profile from no data to the report.

A stand-in for Python notes what the script calls and leaves the files that the script looks for, so that a whole run
takes a second. The smoke profile's calls are then done in this process, where nothing has to be imported again.
"""

import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tyro

import p2_ddpm_train
from common.run import ROOT

STAND_IN = r"""#!/usr/bin/env bash
[ "$1" = -c ] && exit 0
(IFS=$'\x1f'; printf '%s\n' "$*") >>calls
[[ -n "$FAIL" && "$*" == *"$FAIL"* ]] && exit "${STATUS:-3}"
all=("$@")
option() { # NAME: sets `value` to what follows it
    local k
    for k in "${!all[@]}"; do [ "${all[k]}" = "$1" ] && value=${all[k + 1]} && return; done
}
option --output-dir && mkdir -p "$value"
option --figures-dir && mkdir -p "$value"
case "$1 $2" in
"prepare_data.py synthetic") option --data-dir && mkdir -p "$value"/{digits/{mnistm,svhn,usps},face/{train,val,noise}} \
    "$value/clip_zeroshot/train" ;;
"p2_ddpm_train.py "*) touch "$value/model.safetensors" ;;
"p1_"*" sample") option --grid && touch "$value" ;;
"p2_ddim.py eta-grid") touch "$value/eta_grid.png" ;;
"p2_ddim.py interpolate") touch "$value/slerp.png" ;;
"p3_dann.py table") touch "$value/table.png" ;;
esac
exit 0
"""
PROFILES = ("quick", "full", "smoke")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with run_all.sh, an environment that is not stale, and the stand-in as its Python."""
    folder = tmp_path / "the project"
    folder.mkdir()
    for name in ("run_all.sh", "setup.sh", "requirements.txt"):
        shutil.copy(ROOT / name, folder)
    python = folder / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(STAND_IN)
    python.chmod(0o755)
    requirements = (folder / "requirements.txt").open()
    checksum = subprocess.run(["cksum"], stdin=requirements, capture_output=True, text=True, check=True).stdout
    (folder / ".venv" / "requirements.hash").write_text(checksum)
    monkeypatch.chdir(folder)
    for name in ("PROFILE", "ONLY", "PYTHON", "CLASSIFIER", "OMP_NUM_THREADS", "RUN_ALL_PART"):
        monkeypatch.delenv(name, raising=False)
    return folder


def run_all(*arguments: str, **environment: str) -> tuple[subprocess.CompletedProcess, list[list[str]]]:
    """What bash says of run_all.sh, and the calls that it made."""
    calls = Path("calls")
    calls.unlink(missing_ok=True)
    ended = subprocess.run(
        ["bash", "run_all.sh", *arguments],
        env=os.environ | {"FAIL": "", "JOBS": "1"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return ended, [line.split("\x1f") for line in calls.read_text().splitlines()] if calls.exists() else []


def steps_of(calls: list[list[str]]) -> list[str]:
    """Script and sub-command of each call."""
    return [" ".join(call[: 2 if call[1:] and call[1][0].isalpha() else 1]) for call in calls]


def test_a_run_goes_from_data_to_the_report_and_skips_what_is_done(project):
    ended, calls = run_all("my data", "out put")
    assert (ended.returncode, ended.stderr) == (0, "")
    steps = steps_of(calls)
    assert steps[:2] == ["prepare_data.py synthetic", "prepare_data.py check"]
    assert calls[-1] == ["report.py", f"{project}/out put"]
    for step in (
        "p1_dcgan.py train",
        "p1_wgangp.py sample",
        "score.py faces",
        "p2_ddpm_infer.py",
        "p2_ddim.py generate",
    ):
        assert step in steps
    assert steps.count("p2_ddpm_train.py") == steps.count("score.py digits") == steps.count("p3_dann.py embed") == 2
    notes = {path.stem: path.read_text().splitlines() for path in (project / "out put" / "steps").iterdir()}
    assert len(notes) == len(calls) - 1  # the report is made anew each time
    assert notes["dcgan"][0].startswith("python p1_dcgan.py train")
    assert r"/my\ data" in notes["dcgan"][0]  # can be pasted
    assert notes["dcgan"][1].isdigit()

    again, calls = run_all("my data", "out put")
    assert again.returncode == 0
    assert [call[0] for call in calls] == ["report.py"]
    assert again.stdout.count(": done already: ") == len(notes) - 1  # the data is there: no step any more


def test_what_follows_a_step_is_done_again_with_it(project):
    """A net trained anew is sampled and scored anew, though those commands are the same; other problems stay."""
    run_all()
    shutil.rmtree(project / "output" / "p2" / "digits")
    steps = steps_of(run_all()[1])
    assert steps[:2] == ["p2_ddpm_train.py", "p2_ddpm_infer.py"]
    assert steps[2:-1] == ["score.py train-classifier", "score.py digits"] * 2  # which returns at once if finished
    (project / "output" / "p1" / "first32_wgangp.png").unlink()
    assert steps_of(run_all()[1]) == ["p1_wgangp.py sample", "score.py faces", "score.py fid", "report.py"]


def test_data_without_some_parts(project):
    """2024's has no USPS; with faces alone nothing is drawn beside them."""
    for part in ("mnistm", "svhn"):
        (project / "data of 2024" / "digits" / part).mkdir(parents=True)
    ended, calls = run_all("data of 2024")
    assert ended.returncode == 0
    (table,) = (call for call in calls if call[:2] == ["p3_dann.py", "table"])
    assert table[table.index("--targets") + 1 : table.index("--nets")] == ["svhn"]
    assert not any("usps" in word for call in calls for word in call)
    (project / "faces" / "face" / "train").mkdir(parents=True)
    scripts = {call[0] for call in run_all("faces", "out")[1]}
    assert scripts == {
        "prepare_data.py",
        "p1_dcgan.py",
        "p1_wgangp.py",
        "score.py",
        "p2_ddpm_train.py",
        "p2_ddim.py",
        "report.py",
    }


def test_the_course_net_and_its_images_are_scored(project):
    for part in ("noise", "GT"):
        (project / "hw2_data" / "face" / part).mkdir(parents=True)
    (project / "hw2_data" / "face" / "UNet.pt").touch()
    calls = run_all(ONLY="p2")[1]
    assert steps_of(calls)[-2] == "score.py mse"
    assert calls[-2][2:4] == [f"{project}/output/p2/ddim/generated", f"{project}/hw2_data/face/GT"]


def test_a_failed_step_stops_the_run_with_its_name_and_is_where_the_next_begins(project):
    ended, calls = run_all(FAIL="p2_ddpm_infer.py")
    assert ended.returncode == 3
    assert ended.stderr.startswith("error: the step digits-sample failed; run again to continue: python p2_ddpm_infer")
    assert calls[-1][0] == "p2_ddpm_infer.py"
    assert steps_of(run_all()[1])[0] == "p2_ddpm_infer.py"


def test_other_arguments_are_another_step(project):
    """The quick profile's results do not stand for the smoke profile's."""
    run_all(ONLY="p1")
    steps = steps_of(run_all(ONLY="p1", PROFILE="smoke")[1])
    assert {"p1_dcgan.py train", "p1_wgangp.py train"} <= set(steps)


@pytest.mark.parametrize(
    ("only", "scripts"),
    [
        ("p1", {"p1_dcgan", "p1_wgangp"}),
        ("p2", {"p2_ddpm_train", "p2_ddpm_infer", "p2_ddim"}),
        ("p3", {"p3_dann", "p3_clip_zeroshot"}),
        ("dann ddim", {"p3_dann", "p2_ddpm_train", "p2_ddim"}),
    ],
)
@pytest.mark.parametrize("jobs", ["1", "2"])
def test_only_some_problems(project, only, scripts, jobs):
    calls = run_all(ONLY=only, JOBS=jobs)[1]
    assert {Path(call[0]).stem for call in calls if call[0][0] == "p"} - {"prepare_data"} == scripts


def test_mistakes_are_one_line_before_any_work(project):
    for environment in ({"PROFILE": "slow"}, {"ONLY": "p1 p4"}, {"JOBS": "0"}, {"JOBS": "two"}, {"CLASSIFIER": "x"}):
        ((name, value),) = environment.items()
        ended, calls = run_all(**environment)
        assert (ended.returncode, ended.stderr.count("\n"), calls) == (2, 1, [])
        assert ended.stderr.startswith(f"error: {name}={value}: ")


@pytest.mark.parametrize("profile", PROFILES)
def test_every_command_is_understood(project, monkeypatch, profile):
    """The scripts' own command lines read the arguments of each profile."""
    calls = run_all(PROFILE=profile)[1]
    read = []
    monkeypatch.setattr("common.run.command_line", lambda commands, main: read.append(tyro.cli(commands)))
    for script, *arguments in calls:
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert len(read) == len(calls) > 20
    trainings = [args for args in read if hasattr(args, "shares")]
    batches = [p2_ddpm_train.images_of_a_step(args, 1) for args in trainings]
    assert [len(batch) for batch in batches] == [2, 1]
    assert [sum(batch) for batch in batches] == [args.batch_size for args in trainings]


def test_problems_at_a_time_make_what_one_after_the_other_makes(project):
    one_by_one = run_all("data", "out")[1]
    shutil.rmtree(project / "data")
    shutil.rmtree(project / "out")
    failed, _ = run_all("data", "out", JOBS="2", FAIL="p2_ddpm_infer.py")
    assert (failed.returncode, failed.stderr) == (
        1,
        "error: a part was not finished (above); run again to continue\n",
    )
    assert "digits | error: the step digits-sample failed; run again to continue: python p2_ddpm_infer" in failed.stdout
    assert "clip | = clip: " in failed.stdout  # the others go on
    ended, calls = run_all("data", "out", JOBS="2")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert steps_of(calls)[0] == "p2_ddpm_infer.py"
    assert not any(call[0].startswith(("p1_", "p3_", "prepare_data.py")) for call in calls[:-1])
    shutil.rmtree(project / "data")
    shutil.rmtree(project / "out")
    ended, calls = run_all("data", "out", JOBS="2")
    assert sorted(calls) == sorted(one_by_one)
    assert calls[0][:2] == ["prepare_data.py", "synthetic"]
    assert calls[-1][0] == "report.py"
    for jobs in ("1", "2"):
        shutil.rmtree(project / "data")  # made again: everything follows it, after a failure too
        first = run_all("data", "out", JOBS=jobs, FAIL="train")[1]
        both = first + run_all("data", "out", JOBS=jobs)[1]
        assert {tuple(call) for call in both} == {tuple(call) for call in one_by_one}


def test_after_ctrl_c_all_parts_are_waited_for(project):
    """Ctrl-C goes to every process of the terminal; what the parts then say and save is not cut off."""
    (project / ".venv/bin/python").write_text(
        '#!/usr/bin/env bash\n[ "$1" = -c ] && exit 0\ncase $1 in prepare_data.py) exit 0 ;; esac\n'
        'trap "sleep 1; echo stopped; exit 130" INT\necho "$1" >>begun\nwhile :; do sleep 0.05; done\n'
    )
    for part in ("digits/mnistm", "digits/svhn", "face/train", "clip_zeroshot"):
        (project / "hw2_data" / part).mkdir(parents=True)
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    running = subprocess.Popen(
        ["bash", "run_all.sh"], env=os.environ | {"JOBS": "2"}, start_new_session=True, **streams
    )
    begun = project / "begun"
    while not (begun.exists() and len(begun.read_text().splitlines()) == 2):
        assert running.poll() is None
        time.sleep(0.05)
    os.killpg(running.pid, signal.SIGINT)
    told = running.communicate(timeout=60)[0]
    assert running.returncode != 0
    assert {"digits | stopped", "faces | stopped"} <= set(told.splitlines())
    assert sorted(begun.read_text().splitlines()) == ["p1_dcgan.py", "p2_ddpm_train.py"]


def test_an_interrupted_step_ends_the_run_even_where_a_failed_one_is_left_out(project):
    for status, ends in ((3, 0), (130, 130)):
        ended, calls = run_all(PROFILE="full", FAIL="dcgan-fid", STATUS=str(status))
        assert ended.returncode == ends
        assert ("left out: FID of dcgan" in ended.stdout) == (status == 3)
        assert ("report.py" in steps_of(calls)) == (status == 3)


def test_the_courses_classifier_judges_too(project):
    (project / "my").mkdir()
    (project / "my/Classifier.pth").touch()
    calls = run_all(ONLY="p2", CLASSIFIER="my/Classifier.pth")[1]
    judged = [call for call in calls if call[:2] == ["score.py", "digits"]]
    assert len(judged) == 3
    assert f"{project}/my/Classifier.pth" in judged[2]
    course = project / "output/p2/score/course"
    run_all(ONLY="p2")
    assert course.exists()
    shutil.rmtree(project / "output/p2/digits")  # its verdict is not one of other digits
    run_all(ONLY="p2")
    assert not course.exists()


def test_the_smoke_profile_makes_the_report(project, tmp_path, monkeypatch):
    """Every step for real, one after the other, in this process."""
    calls = run_all("real/data", "real/out", PROFILE="smoke")[1]
    shutil.rmtree(project / "real")
    monkeypatch.setattr(os, "fsync", lambda file: None)  # of thousands of files: most of the time
    for script, *arguments in calls:
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        runpy.run_path(str(ROOT / script), run_name="__main__")
    page = (project / "real/out/report.html").read_text()
    assert "Not run: " not in page
    assert page.count('<img src="data:image/') == 42
    assert "Synthetic data." in page
