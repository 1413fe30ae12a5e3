"""The rows of metrics.jsonl in TensorBoard, Weights & Biases or MLflow too, through Accelerate.

metrics.jsonl stays the truth. trackers.json says which step each tracker has reached, so that a run
that continues gives it each row once, and a tracker that is added later gets the rows before it.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tqdm import tqdm

from common.cli import UserError, printable
from common.files import atomic_write
from common.json_files import read_object
from common.packages import refuse_missing

if TYPE_CHECKING:
    from accelerate import Accelerator

Tracker = Literal["tensorboard", "wandb", "mlflow"]

# The project in wandb, the experiment in MLflow, and TensorBoard's folder in the run.
PROJECT = "dlcv-hw2"
# Where wandb and MLflow write, unless the user says it.
VARIABLES = ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR", "MLFLOW_TRACKING_URI")
# Read once: later the variables may also be those of an earlier run in this process.
SET_BY_USER = frozenset(name for name in VARIABLES if name in os.environ)


def refuse_missing_packages(names: Sequence[Tracker]) -> None:
    """Raise UserError for a tracker whose package is not installed."""
    for name in names:
        refuse_missing(name, f"--log-with {name}: is not installed; pip install {name}")


class Trackers:
    """The trackers that `make_accelerator` was asked for, started for one run."""

    def __init__(self, accelerator: Accelerator, folder: Path, arguments: dict[str, Any]) -> None:
        """`arguments` are the run's, which a tracker is given when it first sees the run.

        Raises UserError if a tracker cannot start, or if trackers.json is damaged.
        """
        self.accelerator = accelerator
        self.file = folder / "trackers.json"
        self.known = read_known(self.file) if self.file.exists() else {}
        wandb_id = self.known.get("wandb", {}).get("id") or secrets.token_hex(4)
        options = {
            "wandb": {
                "dir": str(folder),
                "name": folder.name,
                "id": wandb_id,
                "resume": "allow",
            },
            "mlflow": {
                "logging_dir": (folder / "mlflow").absolute().as_uri(),
                "run_id": self.known.get("mlflow", {}).get("id"),
                "run_name": folder.name,
            },
        }
        names = [str(name) for name in accelerator.log_with]
        try:
            keep_files_in(folder.absolute(), names)
            accelerator.init_trackers(PROJECT, None, options)
            for tracker in accelerator.trackers:
                if tracker.name not in self.known:
                    tracker.store_init_configuration(plain(arguments))
                    self.known[tracker.name] = {"step": -1}
                if tracker.name == "wandb":
                    self.known["wandb"]["id"] = wandb_id
                elif tracker.name == "mlflow":
                    self.known["mlflow"]["id"] = tracker.tracker.info.run_id
        # Each tracker raises errors of its own kinds.
        except Exception as error:
            reason = reason_of(error)
            raise UserError(f"--log-with {' '.join(names)}: cannot start ({reason})") from None

    def update(self, rows: Sequence[dict[str, Any]]) -> None:
        """Give each tracker the rows that it does not have yet, at their steps.

        A tracker that fails gets no more rows in this process. The next start sends them.
        """
        for tracker in list(self.accelerator.trackers):
            known = self.known[tracker.name]
            for row in rows:
                if row["step"] <= known["step"]:
                    continue
                values = {name: value for name, value in row.items() if value is not None}
                del values["step"]
                try:
                    tracker.log(values, step=row["step"])
                except Exception as error:
                    self._drop(tracker, error)
                    break
                known["step"] = row["step"]
        atomic_write(self.file, json.dumps(self.known, indent=1) + "\n")

    def _drop(self, tracker: Any, error: Exception) -> None:
        """Say that a tracker failed, and go on without it."""
        self.accelerator.trackers.remove(tracker)
        tqdm.write(
            f"warning: --log-with {tracker.name}: failed ({reason_of(error)}); the training goes "
            "on without it, and a start that continues the run sends it the missing rows"
        )
        # MLflow starts no second run in a process before the first one has ended.
        with contextlib.suppress(Exception):
            tracker.finish()

    def finish(self) -> None:
        """Let the trackers write what they still have."""
        for tracker in self.accelerator.trackers:
            try:
                tracker.finish()
            except Exception as error:
                tqdm.write(f"warning: --log-with {tracker.name}: failed ({reason_of(error)})")
        self.accelerator.trackers = []


def read_known(file: Path) -> dict[str, Any]:
    """What trackers.json says of each tracker. Raises UserError for anything else."""
    known = read_object(file)
    for name, entry in known.items():
        if not isinstance(entry, dict):
            fits = False
        else:
            step = entry.get("step")
            is_step = isinstance(step, int) and not isinstance(step, bool)
            fits = is_step and isinstance(entry.get("id", ""), str)
        if not fits:
            raise UserError(f"{file}: damaged at {name}; remove it to send all rows again")
    return known


def reason_of(error: Exception) -> str:
    """The message of an error in one line, and its kind if it has no message."""
    return printable(" ".join(str(error).split())) or type(error).__name__


def plain(arguments: dict[str, Any]) -> dict[str, int | float | str]:
    """The arguments as trackers take them: numbers, and all else as text."""
    return {
        name: value if isinstance(value, int | float) else str(value)
        for name, value in arguments.items()
    }


def keep_files_in(folder: Path, names: Sequence[str]) -> None:
    """Let wandb and MLflow write into this run alone, and report nothing about their own use.

    Their own variables, if the user set them, have the last word.
    """
    if "wandb" in names:
        for kind in ("CACHE", "CONFIG", "DATA"):
            if f"WANDB_{kind}_DIR" not in SET_BY_USER:
                os.environ[f"WANDB_{kind}_DIR"] = str(folder / "wandb")
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    if "mlflow" in names:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        import mlflow  # pyright: ignore[reportMissingImports]

        if "MLFLOW_TRACKING_URI" not in SET_BY_USER:
            mlflow.set_tracking_uri(f"sqlite:///{folder / 'mlflow.db'}")
