"""The rows of metrics.jsonl in TensorBoard, Weights & Biases or MLflow too, through Accelerate.

metrics.jsonl stays the truth. trackers.json says which step each tracker has reached, so that a run
that continues gives it each row once, and a tracker that is added later gets the rows before it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from common.cli import UserError
from common.files import atomic_write
from common.json_files import read_object

if TYPE_CHECKING:
    from accelerate import Accelerator

Tracker = Literal["tensorboard", "wandb", "mlflow"]

PROJECT = "dlcv-hw2"  # of wandb, the experiment of MLflow, and TensorBoard's folder in the run


def refuse_missing_packages(names: Sequence[Tracker]) -> None:
    """Raise UserError for a tracker whose package is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"--log-with {name}: is not installed; pip install {name}")


class Trackers:
    """The trackers that `make_accelerator` was asked for, started for one run."""

    def __init__(self, accelerator: Accelerator, folder: Path, arguments: dict[str, Any]) -> None:
        """`arguments` are the run's, which a tracker is given when it first sees the run.

        Raises UserError if a tracker cannot start.
        """
        self.accelerator = accelerator
        self.file = folder / "trackers.json"
        self.known = read_object(self.file) if self.file.exists() else {}
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
        except Exception as error:  # of the tracker's own kind, of which there are many
            reason = " ".join(str(error).split())
            raise UserError(f"--log-with {' '.join(names)}: cannot start ({reason})") from None

    def update(self, rows: Sequence[dict[str, Any]]) -> None:
        """Give each tracker the rows that it does not have yet, at their steps."""
        for tracker in self.accelerator.trackers:
            known = self.known[tracker.name]
            for row in rows:
                if row["step"] > known["step"]:
                    values = {name: value for name, value in row.items() if value is not None}
                    del values["step"]
                    tracker.log(values, step=row["step"])
                    known["step"] = row["step"]
        atomic_write(self.file, json.dumps(self.known, indent=1) + "\n")

    def finish(self) -> None:
        """Let the trackers write what they still have."""
        for tracker in self.accelerator.trackers:
            tracker.finish()
        self.accelerator.trackers = []


def plain(arguments: dict[str, Any]) -> dict[str, int | float | str]:
    """The arguments as trackers take them: numbers, and all else as text."""
    return {
        name: value if isinstance(value, int | float) else str(value)
        for name, value in arguments.items()
    }


def keep_files_in(folder: Path, names: Sequence[str]) -> None:
    """Let wandb and MLflow write into the run alone, and report nothing about their own use.

    Their own variables, if they are set, have the last word.
    """
    if "wandb" in names:
        for kind in ("CACHE", "CONFIG", "DATA"):
            os.environ.setdefault(f"WANDB_{kind}_DIR", str(folder / "wandb"))
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    if "mlflow" in names:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        import mlflow  # pyright: ignore[reportMissingImports]

        if "MLFLOW_TRACKING_URI" not in os.environ:
            mlflow.set_tracking_uri(f"sqlite:///{folder / 'mlflow.db'}")
