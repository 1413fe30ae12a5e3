"""The run directory of a training: its files, exact resume, metrics, and how a signal stops it.

A run directory contains config.json (arguments, versions, git commit, hardware), metrics.jsonl,
log.txt, figures/, samples/, last.pt (all that a bitwise resume needs), model.safetensors (all that
inference needs) and result.json (written last: the run is finished). Trackers write into it too.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from common.checkpoints import save_net
from common.cli import UserError
from common.files import ROOT, atomic_write, make_output_dir
from common.json_files import FileError, parse_json, read_object
from common.trackers import Trackers

if TYPE_CHECKING:
    from accelerate import Accelerator

PACKAGES = ("torch", "torchvision", "accelerate", "numpy", "pillow", "scikit-learn")
# Options that may differ when a run is continued, because no result depends on them.
FREE_ARGUMENTS = {"output_dir", "num_workers", "log_with"}


class Run:
    """One run directory. The same command again continues it; a finished run has `result` set.

    Nothing is written before `load_state`, so a mistake that is found while the data is read leaves
    no half-made directory. Raises UserError if `args.output_dir` cannot be written, holds a run
    with other arguments, or if the batch cannot be shared among the processes.
    """

    def __init__(self, args: Any, accelerator: Accelerator, save_minutes: float = 5.0) -> None:
        """`args` is a script's dataclass with `output_dir` and `batch_size`.

        last.pt is written at least every `save_minutes`.
        """
        check_batch_size(args.batch_size, accelerator.num_processes)
        self.accelerator = accelerator
        self.is_main = accelerator.is_main_process
        self.dir: Path = make_output_dir(args.output_dir)
        self.config_file = self.dir / "config.json"
        self.arguments = as_json(dataclasses.asdict(args))
        self._refuse_other_arguments(args)
        self.result: dict[str, Any] | None = self._read_result()
        self._start_clocks(save_minutes)
        self.stop_signal: int | None = None  # the signal that this process received
        self.stopping = False  # all processes agreed to stop
        self.sums: dict[str, Tensor] = {}  # of this epoch's losses so far
        self.rows: list[dict[str, Any]] = []  # those in metrics.jsonl
        self.trackers: Trackers | None = None  # those of --log-with, in the first process
        self.latest: dict[str, Tensor] = {}  # the last step's losses, for the progress bar
        accelerator.wait_for_everyone()  # all have looked before the first one writes

    def _start_clocks(self, save_minutes: float) -> None:
        self.save_minutes = save_minutes
        self.started = time.monotonic()
        self.last_save = self.started
        self.seconds_before = 0.0  # what earlier sittings of this run took

    def _refuse_other_arguments(self, args: Any) -> None:
        """Raise UserError if the directory holds another run, or checkpoints without a run."""
        if not self.config_file.exists():
            if any(self.dir.glob("*.pt")) or any(self.dir.glob("*.safetensors")):
                raise UserError(
                    f"--output-dir {self.dir}: contains checkpoints but no config.json, "
                    "so it is not a run of this script"
                )
            return
        # An option that is newer than the run had its default value then.
        defaults = {}
        for field in dataclasses.fields(args):
            if field.default is not dataclasses.MISSING:
                defaults[field.name] = field.default
        before = as_json(defaults) | self._read_arguments()
        changes = []
        for name in sorted((self.arguments.keys() | before.keys()) - FREE_ARGUMENTS):
            old, new = before.get(name), self.arguments.get(name)
            if new != old:
                changes.append(f"--{name.replace('_', '-')} was {old}, is {new}")
        if changes:
            raise UserError(
                f"--output-dir {self.dir}: holds a run with other arguments ({', '.join(changes)})"
            )

    def _read_arguments(self) -> dict[str, Any]:
        """The arguments in config.json."""
        arguments = self._read(self.config_file).get("arguments")
        if not isinstance(arguments, dict):
            raise self._damaged(self.config_file)
        return arguments

    def _read_result(self) -> dict[str, Any] | None:
        file = self.dir / "result.json"
        if not file.exists():
            return None
        result = self._read(file)
        self.print(f"{self.dir}: already finished (choose another --output-dir for another run)")
        return result

    def _read(self, path: Path) -> dict[str, Any]:
        """The dictionary in a file of this run."""
        if not path.is_file():  # a pipe would be waited for
            raise self._damaged(path)
        try:
            if path.suffix == ".pt":
                content = torch.load(path, map_location="cpu", weights_only=True)
            else:
                content = read_object(path)
        except Exception:  # our own writing leaves no half files: something else damaged this one
            raise self._damaged(path) from None
        if not isinstance(content, dict):
            raise self._damaged(path)
        return content

    def _damaged(self, path: Path) -> UserError:
        return UserError(f"{path}: damaged; remove {self.dir} to start again")

    # Exact resume

    def load_state(self, parts: dict[str, Any]) -> int:
        """Load last.pt into `parts` (networks, optimizers); returns the number of steps done.

        Also writes metrics.jsonl again with the rows that last.pt has, and config.json for a new
        run, and starts the trackers.
        """
        path = self.dir / "last.pt"
        state: dict[str, Any] = {"step": 0, "seconds": 0.0, "sums": {}, "rows": []}
        if path.exists():
            state = self._read(path)
            try:
                for name, part in parts.items():
                    restore(part, state.pop(name))
                state.setdefault("sums", {})
                if "rows" not in state:  # an older version wrote it
                    state["rows"] = self._read_rows()
                check_progress(state)
            except BAD_STATE as error:
                reason = " ".join(str(error).split())[:120]
                raise UserError(
                    f"{path}: damaged, or written by another version of this script ({reason}); "
                    f"remove {self.dir} to start again"
                ) from None
            self.log(f"continuing {self.dir} after step {state['step']:,}")
        self.seconds_before = state["seconds"]
        device = self.accelerator.device
        self.sums = {key: value.to(device) for key, value in state["sums"].items()}
        self.rows = [row for row in state["rows"] if row["step"] <= state["step"]]
        if self.is_main:
            if not self.config_file.exists():
                config = {"arguments": self.arguments, **environment(self.accelerator)}
                atomic_write(self.config_file, json.dumps(config, indent=1) + "\n")
            lines = "".join(json.dumps(row) + "\n" for row in self.rows)
            atomic_write(self.dir / "metrics.jsonl", lines)
            if self.accelerator.log_with:
                self.trackers = Trackers(self.accelerator, self.dir, self.arguments)
                self.trackers.update(self.rows)
        return state["step"]

    def save_state(self, step: int, parts: dict[str, Any]) -> None:
        """Write last.pt with the states of `parts`, so that `load_state` continues bit for bit.

        It contains tensors, numbers and containers only, which weights_only=True can read. Raises
        UserError for weights that are not finite; last.pt then stays as it was.
        """
        if self.is_main:
            self.check_weights(step, parts)
            state: dict[str, Any] = {name: part.state_dict() for name, part in parts.items()}
            state |= {"step": step, "seconds": self.seconds()}
            state |= {"sums": self.sums, "rows": self.rows}
            atomic_write(self.dir / "last.pt", lambda path: torch.save(state, path))
        self.last_save = time.monotonic()

    def check_weights(self, step: int, parts: dict[str, Any]) -> None:
        """Raise UserError if a network among `parts` has weights that are not finite."""
        for part in parts.values():
            if isinstance(part, nn.Module) and not has_finite_weights(part):
                raise UserError(
                    f"{self.dir}: the weights of step {step:,} are not finite; "
                    "a smaller --lr may help"
                )

    def save_due(self) -> bool:
        """True if a signal asked to stop or the last save is `save_minutes` old.

        Call it once in every step. With several processes all act on what one of them knows, so
        that none waits for one that has left.
        """
        too_old = time.monotonic() - self.last_save > 60 * self.save_minutes
        flags = torch.tensor([self.stop_signal is not None, too_old], dtype=torch.float32)
        if self.accelerator.num_processes > 1:
            flags = self.accelerator.reduce(flags.to(self.accelerator.device), "sum")
        self.stopping = bool(flags[0] > 0)
        return self.stopping or bool(flags[1] > 0)

    def seconds(self) -> float:
        """Seconds spent on this run, earlier sittings included."""
        return self.seconds_before + time.monotonic() - self.started

    # Metrics

    def add_losses(self, step: int, values: dict[str, Tensor]) -> None:
        """Add the losses of a step (scalars on the device) to the sums of the epoch.

        Raises UserError for a loss that is not finite; last.pt then stays as it was. On a GPU only
        every 50th step is checked, because a check makes the CPU wait for the GPU.
        """
        if self.sums and self.sums.keys() != values.keys():
            raise UserError(
                f"{self.dir / 'last.pt'}: has the losses {', '.join(self.sums)}, but this run has "
                f"{', '.join(values)}; remove {self.dir} to start again"
            )
        on_cpu = self.accelerator.device.type == "cpu"
        if on_cpu or step % 50 == 0:
            stacked = torch.stack([value.detach().float() for value in values.values()])
            if not stacked.isfinite().all():
                found = ", ".join(f"{name} {value.item():.4g}" for name, value in values.items())
                raise UserError(
                    f"{self.dir}: the losses of step {step + 1:,} are not finite ({found}); "
                    "a smaller --lr may help"
                )
        self.latest = {name: value.detach().float() for name, value in values.items()}
        for name, value in self.latest.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def epoch_means(self, steps: int) -> dict[str, float]:
        """Means of the losses added in an epoch of `steps` steps; the sums start again at zero."""
        means = {name: value.item() / steps for name, value in self.sums.items()}
        self.sums = {}
        return means

    def log_metrics(self, row: dict[str, Any]) -> None:
        """Append one row, which has a "step", to metrics.jsonl.

        JSON has no NaN and no infinity: null takes their place, and log.txt says so.
        """
        if not self.is_main:
            return
        lost = [name for name, value in row.items() if is_not_finite(value)]
        if lost:
            self.log(f"step {row['step']:,}: {', '.join(lost)} not finite, null in metrics.jsonl")
        line = json.dumps(row | dict.fromkeys(lost))
        self.rows.append(json.loads(line))
        self._append("metrics.jsonl", line)
        if self.trackers is not None:
            self.trackers.update(self.rows)

    def log_row(self, row: dict[str, Any]) -> None:
        """Log a row of metrics in words, without its "step" and without values that are None."""
        words = [
            f"{key.replace('_', ' ')} {value:.4g}"
            for key, value in row.items()
            if key != "step" and value is not None
        ]
        self.log(", ".join(words))

    def history(self) -> list[dict[str, Any]]:
        """The rows of metrics so far, with the same names in each.

        They are those of this process and of last.pt, so that what happened to metrics.jsonl in
        between does no harm. Raises UserError if there is none, or if they do not fit one another.
        """
        if not self.rows or any(row.keys() != self.rows[-1].keys() for row in self.rows):
            raise UserError(
                f"{self.dir}: its rows of metrics are missing or have different names; another "
                "version of this script may have begun it"
            )
        return [dict(row) for row in self.rows]

    def _read_rows(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl. Lines that are no rows are left out, and doubled ones."""
        file = self.dir / "metrics.jsonl"
        if not file.is_file():
            return []
        rows: list[dict[str, Any]] = []
        left_out = 0
        for line in file.read_bytes().splitlines():
            row = row_of(line)
            if row is None or row in rows[-1:]:
                left_out += 1
            else:
                rows.append(row)
        if left_out:
            self.print(f"{file}: {left_out} lines are no rows of this run and are left out")
        return rows

    def print(self, text: str) -> None:
        """Print from the main process, above the progress bar if there is one."""
        if self.is_main:
            tqdm.write(text)

    def log(self, text: str) -> None:
        """Print a line and append it to log.txt with the time."""
        self.print(text)
        if self.is_main:
            self._append("log.txt", f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}")

    def _append(self, name: str, line: str) -> None:
        """Append a line to a file of this run. Raises UserError if something else is there."""
        path = self.dir / name
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise UserError(f"{path}: is not a file; remove it")
        with path.open("a", encoding="utf-8") as file:
            file.write(f"{line}\n")

    # Results

    def save_model(self, net: nn.Module, config: dict[str, Any]) -> None:
        """Write model.safetensors: the weights, with `config` (what builds the network) in it."""
        if self.is_main:
            save_net(self.dir / "model.safetensors", net, config)

    def finish(self, result: dict[str, Any]) -> dict[str, Any]:
        """Write result.json, after which the run counts as finished; returns its content."""
        self.result = result | {"seconds": round(self.seconds(), 1)}
        if self.is_main:
            atomic_write(self.dir / "result.json", json.dumps(self.result, indent=1) + "\n")
        return self.result

    # The loop

    def steps(self, first: int, last: int, images_per_step: int) -> Iterator[int]:
        """Yield the steps first … last - 1, with a bar on a terminal and plain lines elsewhere.

        SIGINT, SIGTERM and SIGHUP let the step under way finish. The script saves when `save_due()`
        says so, and this loop then ends the program with status 128 + signal.
        """
        handlers = {}
        for number in stop_signals():
            handlers[number] = signal.signal(number, self._ask_to_stop)
        try:
            yield from self._watched_steps(first, last, images_per_step)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            if self.trackers is not None:
                self.trackers.finish()

    def _watched_steps(self, first: int, last: int, images_per_step: int) -> Iterator[int]:
        if first > last:
            raise UserError(
                f"{self.dir / 'last.pt'}: has {first:,} steps, but the run has {last:,}; "
                f"remove {self.dir} to start again"
            )
        start = time.monotonic()
        next_report = 10.0  # seconds; the first line comes early, then one each minute
        bar = tqdm(
            range(first, last),
            initial=first,
            total=last,
            unit="image",
            unit_scale=images_per_step,
            disable=None if self.is_main else True,  # None: shown on a terminal only
        )
        for step in bar:
            yield step
            if not bar.disable and step % 20 == 0:
                bar.set_postfix({key: f"{value.item():.3g}" for key, value in self.latest.items()})
            if self.stopping:
                self.log(f"stopped after step {step + 1:,}; the same command continues")
                sys.exit(128 + (self.stop_signal or signal.SIGTERM))
            spent = time.monotonic() - start
            if spent > next_report:
                next_report = spent + 60
                rate = (step + 1 - first) / spent
                left = tqdm.format_interval((last - step - 1) / rate)
                self.log(
                    f"step {step + 1:,}/{last:,}, {rate * images_per_step:,.0f} images/s, "
                    f"about {left} left"
                )

    def _ask_to_stop(self, number: int, frame: Any) -> None:
        if self.stop_signal is not None:  # asked a second time: stop at once
            raise KeyboardInterrupt
        self.stop_signal = number


# What a state raises that does not belong to the part that it is loaded into.
BAD_STATE = (KeyError, ValueError, RuntimeError, TypeError, AttributeError, IndexError)


def restore(part: Any, state: Any) -> None:
    """Load the state of a network or an optimizer. Raises one of BAD_STATE if it does not fit.

    PyTorch does not check an optimizer's tensors, and a step with tensors of other shapes can read
    memory that is not theirs.
    """
    if isinstance(part, nn.Module):
        part.load_state_dict(state)
        if not has_finite_weights(part):
            raise ValueError("a weight is not finite")
        return
    before = [
        {name: type(value) for name, value in group.items()}
        for group in getattr(part, "param_groups", [])
    ]
    part.load_state_dict(state)
    for group, types in zip(getattr(part, "param_groups", []), before, strict=True):
        if {name: type(value) for name, value in group.items()} != types:
            raise ValueError("the optimizer has other settings")
        for parameter in group["params"]:
            for name, value in part.state.get(parameter, {}).items():
                check_optimizer_value(name, value, parameter)


def check_optimizer_value(name: str, value: Any, parameter: Tensor) -> None:
    """Raise ValueError unless an optimizer's value fits its parameter: one number, or its shape."""
    if value is None and name == "momentum_buffer":  # of SGD without momentum
        return
    if not isinstance(value, Tensor):
        raise ValueError(f"the optimizer's {name} is no tensor")
    fits = value.ndim == 0 or value.shape == parameter.shape
    if not fits or not value.is_floating_point() or not value.isfinite().all():
        raise ValueError(f"the optimizer's {name} does not fit its parameter")


def check_progress(state: dict[str, Any]) -> None:
    """Raise ValueError unless step, seconds, sums and rows can be those of a run."""
    step = state["step"]
    seconds = state["seconds"]
    sums = state["sums"]
    rows = state["rows"]
    if type(step) is not int or step < 0:
        raise ValueError(f"the step is {str(step)[:40]}")
    if type(seconds) is not float or not 0 <= seconds < math.inf:
        raise ValueError(f"the seconds are {str(seconds)[:40]}")
    for name, value in sums.items():
        if not isinstance(value, Tensor) or value.ndim or not value.isfinite():
            raise ValueError(f"the sum of {name} is not a number")
    if not isinstance(rows, list) or not all(is_row(row) for row in rows):
        raise ValueError("the rows of metrics are no rows")


def row_of(line: bytes) -> dict[str, Any] | None:
    """The row of metrics in a line; None if it holds none, because it was half written."""
    try:
        row = parse_json(line.decode())
    except (FileError, UnicodeDecodeError):
        return None
    return row if is_row(row) else None


def is_row(row: Any) -> bool:
    """Whether a value is a row of metrics: an object of names and numbers, with a "step"."""
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        return False
    for name, value in row.items():
        is_number = type(value) in (int, float) and not is_not_finite(value)
        if not isinstance(name, str) or not (is_number or value is None):
            return False
    return True


def is_not_finite(value: Any) -> bool:
    """Whether a value is NaN or infinite, for which JSON has no word."""
    return isinstance(value, float) and not math.isfinite(value)


def stop_signals() -> list[int]:
    """The signals that ask a training to stop; SIGHUP is left alone where nohup ignores it."""
    numbers: list[int] = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    return numbers


def check_batch_size(batch_size: int, processes: int) -> None:
    """Raise UserError unless every process gets the same number of images, at least two."""
    if batch_size % processes or batch_size < 2 * processes:
        if processes == 1:
            raise UserError(f"--batch-size {batch_size}: must be at least 2")
        raise UserError(
            f"--batch-size {batch_size}: must be a multiple of the {processes} processes "
            "and at least twice their number"
        )


def has_finite_weights(net: nn.Module) -> bool:
    """Whether all numbers in a network's state are finite."""
    return all(bool(value.isfinite().all()) for value in net.state_dict().values())


def as_json(values: dict[str, Any]) -> dict[str, Any]:
    """The values as json keeps them: paths become strings, tuples lists."""
    return json.loads(json.dumps(values, default=str))


def environment(accelerator: Accelerator) -> dict[str, Any]:
    """Command, package versions, git commit and hardware, for config.json and result.json."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        versions[package] = importlib.metadata.version(package)
    if accelerator.device.type == "cuda":
        name = torch.cuda.get_device_name()
    else:
        name = platform.processor() or platform.machine()
    hardware = {
        "device": accelerator.device.type,
        "name": name,
        "precision": accelerator.mixed_precision.replace("no", "fp32"),
        "processes": accelerator.num_processes,
        "threads": torch.get_num_threads(),
    }
    return {
        "command": " ".join(sys.argv),
        "versions": versions,
        "git_commit": git_commit(),
        "hardware": hardware,
    }


def git_commit() -> str | None:
    """The commit of this repository; None if there is no git or no repository."""
    command = ["git", "rev-parse", "HEAD"]
    try:
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:  # no git here
        return None
    return found.stdout.strip() or None
