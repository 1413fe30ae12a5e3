"""common/trackers.py: each tracker gets each row of metrics once, at its step."""

import importlib.util
import json
import os
import sys
import types
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker

from common import trackers
from common.cli import UserError
from common.device import make_accelerator
from common.run import Run
from common.trackers import PROJECT, Tracker
from tests.test_options import COMMANDS


@dataclass
class Args:
    output_dir: Path
    batch_size: int = 2
    log_with: tuple[Tracker, ...] = ()


class Fake(GeneralTracker):
    """Keeps what it is given, in place of a package."""

    name = "fake"
    requires_logging_directory = False

    def __init__(self, broken: bool = False, fails_at: int = -1) -> None:
        super().__init__()
        self.fails_at = fails_at  # a step, or 0 for the end
        self.broken = broken
        self.events: list[Any] = []

    @property
    def tracker(self) -> list[Any]:
        return self.events

    def start(self) -> None:
        if self.broken:
            raise ConnectionError("nobody answers\nat all")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.events.append(values)

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        if step == self.fails_at:
            raise OSError(28, "No space left\non device")
        self.events.append((step, values))

    def finish(self) -> None:
        self.events.append("finished")
        if self.fails_at == 0:
            raise ConnectionError


def open_run(folder: Path, *trackers: Any, **options: Any) -> Run:
    make_accelerator("cpu", "fp32")  # as every script does; it resets Accelerate's state
    return Run(Args(folder, **options), Accelerator(cpu=True, log_with=list(trackers) or None))


def test_each_row_is_logged_once_although_the_run_was_killed(tmp_path):
    tracker = Fake()
    run = open_run(tmp_path, tracker)
    run.load_state({})
    for step in run.steps(0, 3, 2):
        run.log_metrics({"step": step + 1, "loss": 1.0 / (step + 1), "lost": float("nan")})
        if step == 1:
            run.save_state(2, {})
    arguments = {"output_dir": str(tmp_path), "batch_size": 2, "log_with": "[]"}
    rows = [(1, {"loss": 1.0}), (2, {"loss": 0.5}), (3, {"loss": 1 / 3})]
    assert tracker.events == [arguments, *rows, "finished"]
    assert json.loads((tmp_path / "trackers.json").read_text()) == {"fake": {"step": 3}}

    # Step 3 was not saved, and is done again.
    tracker = Fake()
    run = open_run(tmp_path, tracker)
    assert run.load_state({}) == 2
    for step in run.steps(2, 4, 2):
        run.log_metrics({"step": step + 1, "loss": 0.0})
    assert tracker.events == [(4, {"loss": 0.0}), "finished"]
    assert [row["step"] for row in run.rows[-2:]] == [3, 4]


def test_a_tracker_may_come_later_and_gets_the_rows_before_it(tmp_path):
    run = open_run(tmp_path)
    run.load_state({})
    run.log_metrics({"step": 1, "loss": 2.0})
    run.save_state(1, {})
    assert not (tmp_path / "trackers.json").exists()
    tracker = Fake()
    run = open_run(tmp_path, tracker, log_with=("tensorboard",))  # not another run
    run.load_state({})
    assert tracker.events[1:] == [(1, {"loss": 2.0})]


def test_a_tracker_that_cannot_start_is_one_line(tmp_path):
    run = open_run(tmp_path, Fake(broken=True))
    with pytest.raises(UserError, match=r"--log-with .*: cannot start \(nobody answers at all\)"):
        run.load_state({})


def test_a_tracker_that_fails_is_dropped_and_gets_the_rows_later(tmp_path, capsys):
    tracker = Fake(fails_at=2)
    run = open_run(tmp_path, tracker)
    run.load_state({})
    for step in run.steps(0, 4, 2):
        run.log_metrics({"step": step + 1, "loss": 0.5})
        run.save_state(step + 1, {})
    assert tracker.events[1:] == [(1, {"loss": 0.5}), "finished"]
    lines = capsys.readouterr().out.splitlines()
    (warning,) = [line for line in lines if line.startswith("warning")]
    assert "--log-with fake: failed ([Errno 28] No space left on device)" in warning
    assert len(run.rows) == 4
    tracker = Fake()
    open_run(tmp_path, tracker).load_state({})
    assert tracker.events == [(step, {"loss": 0.5}) for step in (2, 3, 4)]


def test_a_tracker_that_cannot_finish_hides_no_error(tmp_path, capsys):
    run = open_run(tmp_path, Fake(fails_at=0))
    run.load_state({})
    steps: Any = run.steps(0, 1, 2)
    next(steps)
    with pytest.raises(ZeroDivisionError):
        steps.throw(ZeroDivisionError())
    assert "--log-with fake: failed (ConnectionError)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "content",
    [
        '{"wandb": 3}',
        '{"tensorboard": {}}',
        '{"fake": {"step": "3"}}',
        '{"mlflow": {"step": 1, "id": 2}}',
    ],
)
def test_a_damaged_trackers_json_is_one_line(content, tmp_path):
    (tmp_path / "trackers.json").write_text(content)
    run = open_run(tmp_path, Fake())
    with pytest.raises(
        UserError, match=r"trackers\.json: damaged at (wandb|tensorboard|fake|mlflow)"
    ):
        run.load_state({})


def test_two_runs_of_one_process_have_their_own_files(tmp_path, monkeypatch):
    """The variables that the first run sets are not taken for the user's."""
    for name in trackers.VARIABLES:
        monkeypatch.setenv(name, "of a run before")
    monkeypatch.setattr(trackers, "SET_BY_USER", frozenset({"WANDB_CACHE_DIR"}))
    mlflow = types.ModuleType("mlflow")
    # MLflow's own function sets the variable, too.
    vars(mlflow)["set_tracking_uri"] = lambda uri: os.environ.update(MLFLOW_TRACKING_URI=uri)
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    for name in ("WANDB_ERROR_REPORTING", "MLFLOW_DISABLE_TELEMETRY"):
        monkeypatch.setenv(name, "true")
    for folder in (tmp_path / "first", tmp_path / "second"):
        trackers.keep_files_in(folder, ["wandb", "mlflow"])
        assert os.environ["MLFLOW_TRACKING_URI"] == f"sqlite:///{folder / 'mlflow.db'}"
        assert os.environ["WANDB_CONFIG_DIR"] == str(folder / "wandb")
        assert os.environ["WANDB_DATA_DIR"] == str(folder / "wandb")
        assert os.environ["WANDB_CACHE_DIR"] == "of a run before"


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_a_missing_package_is_named_with_its_command(monkeypatch, name):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"--log-with {name}: .*; pip install {name}"):
        make_accelerator("cpu", "fp32", [name])


def test_every_training_has_the_option():
    trainings = {name for name in COMMANDS if name.rpartition(".")[2].startswith(("Train", "Pret"))}
    assert len(trainings) >= 14
    for name in trainings:
        assert "log_with" in {field.name for field in fields(COMMANDS[name])}, name


def test_tensorboard_reads_the_rows_of_two_sittings(tmp_path):
    reason = "TensorBoard is not installed (the extra trackers)"
    reader = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason=reason
    )
    for first in (0, 2):
        accelerator = make_accelerator("cpu", "fp32", ["tensorboard"], tmp_path)
        run = Run(Args(tmp_path), accelerator)
        assert run.load_state({}) == first
        for step in run.steps(first, first + 2, 2):
            run.log_metrics({"step": step + 1, "loss": torch.tensor(0.5**step).item()})
            run.save_state(step + 1, {})
    found = reader.EventAccumulator(str(tmp_path / PROJECT))
    found.Reload()
    rows = [(event.step, event.value) for event in found.Scalars("loss")]
    assert rows == [(1, 1.0), (2, 0.5), (3, 0.25), (4, 0.125)]
