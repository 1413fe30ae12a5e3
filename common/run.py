"""What every command shares: command line, device, seeds, atomic files, checkpoints, the run directory, exact resume.

A run directory holds config.json (arguments, versions, git commit, hardware), metrics.jsonl, log.txt, figures/,
samples/, last.pt (all that a bitwise resume needs), model.safetensors (all that inference needs) and result.json.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import safetensors
import safetensors.torch
import torch
import tyro
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from tqdm import tqdm

Device = Literal["auto", "cpu", "cuda", "mps"]
Precision = Literal["auto", "fp32", "bf16"]
ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "torchvision", "accelerate", "numpy", "pillow", "scikit-learn")
FREE_ARGUMENTS = {"output_dir", "num_workers"}  # may differ when a run is continued: they change no figure
RANGES = (  # of options that several training scripts have
    (("epochs", "images_per_epoch", "width", "grid_every"), lambda value: value >= 1, "at least 1"),
    (("weight_decay", "augmentation"), lambda value: 0 <= value < math.inf, "0 or above"),
    (("lr", "clip"), lambda value: 0 < value < math.inf, "above 0"),
    (("ema_decay", "beta1", "beta2", "label_smoothing"), lambda value: 0 <= value < 1, "in [0, 1)"),
)
WRAPPERS = ("state_dict", "model_state_dict", "model")  # keys under which published checkpoints keep their weights
PREFIXES = ("module.", "_orig_mod.", "nn_model.")  # DataParallel and DDP, torch.compile, the public DDPM script


class UserError(Exception):
    """A mistake of the caller's: told in one line that names the file or flag, exit status 2."""


def command_line(commands: Any, main: Callable[[Any], Any]) -> None:
    """Read `commands` (a dataclass; a union of them for sub-commands) from the command line, call main with it."""
    try:
        main(tyro.cli(commands, description=sys.modules["__main__"].__doc__))
    except (UserError, OSError) as error:  # an OSError is a full disk or the like, and names its file
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    if torch.distributed.is_initialized():
        # DistributedDataParallel keeps Gloo's threads alive; one of them may still be busy while the interpreter is
        # taken down, and its call into Python then aborts a process that has done all of its work.
        torch.distributed.destroy_process_group()
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(0)


def make_accelerator(device: Device = "auto", precision: Precision = "auto") -> Accelerator:
    """Accelerate's device, precision and data parallelism; the same script runs alone and under torchrun.

    "auto" precision is bf16 where the hardware multiplies bf16 matrices (CUDA since Ampere, CPUs with AVX512-BF16),
    else fp32.
    """
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    here = [name for name, available in here.items() if available]
    if device not in ("auto", *here):
        raise UserError(f"--device {device}: not available here (available: {', '.join(here)})")
    device = here[0] if device == "auto" else device
    if precision == "auto":
        features = getattr(torch.cpu, "get_capabilities", dict)()  # newer than torch 2.11
        fast = torch.cuda.get_device_capability() >= (8, 0) if device == "cuda" else features.get("avx512_bf16", False)
        precision = "bf16" if fast and device != "mps" else "fp32"
    # One program may train in bf16 and predict in fp32; Accelerate would keep the settings of the first.
    AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
    return Accelerator(cpu=device == "cpu", mixed_precision="bf16" if precision == "bf16" else "no")


def derive_seed(*key: int | str) -> int:
    """A 63-bit seed that depends on the key alone, e.g. derive_seed(args.seed, "step", 17, rank)."""
    digest = hashlib.sha256(json.dumps(key).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(*key: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh generator seeded by `derive_seed(*key)`.

    Every draw names its key (seed, purpose, step): a resumed run draws the same numbers without any saved state.
    """
    return torch.Generator(device).manual_seed(derive_seed(*key))


class ImageNoise:
    """Noise of images number k: first the start x_T, then that of each step; it depends on (seed, k) alone."""

    def __init__(self, seed: int, numbers: Sequence[int], shape: Sequence[int], device: Any = "cpu") -> None:
        self.generators = [generator(seed, "image", number) for number in numbers]
        self.shape, self.device = tuple(shape), device

    def __call__(self) -> torch.Tensor:
        """The next standard normal (images, *shape)."""
        return torch.stack([torch.randn(self.shape, generator=g) for g in self.generators]).to(self.device)


def warmup_cosine(progress: float, warm_up: float) -> float:
    """Learning-rate factor at `progress` in [0, 1]: linear up to 1 at `warm_up`, then half a cosine down to 0."""
    if progress < warm_up:
        return progress / warm_up
    return 0.5 + 0.5 * math.cos(math.pi * (progress - warm_up) / (1 - warm_up))


@torch.no_grad()
def update_ema(ema: torch.nn.Module, net: torch.nn.Module, decay: float, step: int) -> None:
    """Move the averaged net towards `net` after step 0, 1, …: decay warmed up as min(decay, (1 + step) / (10 + step)).

    Parameters are averaged, buffers (BatchNorm's statistics) copied.
    """
    torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - min(decay, (1 + step) / (10 + step)))
    for ours, theirs in zip(ema.buffers(), net.buffers(), strict=True):
        ours.copy_(theirs)


def atomic_write(path: Path, write: bytes | str | Callable[[Path], Any]) -> None:
    """Write `path` whole or not at all: to a temporary name, flushed to disk, then renamed.

    `write` is the content, or a function that writes it to the path it is given (which keeps the suffix).
    """
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            if callable(write):
                write(temporary)
            else:
                temporary.write_bytes(write.encode() if isinstance(write, str) else write)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:  # torch's and safetensors' full disk
        raise UserError(f"{path}: cannot be written ({getattr(error, 'strerror', error)})") from None


def make_output_dir(folder: Path, flag: str = "--output-dir", only: Collection[str] | None = None) -> Path:
    """Create `folder` and make sure that files can be written in it, before any work is done.

    Graders read everything in a folder of images: what is not among the names `only` is a UserError, unless hidden.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"{flag} {folder}: cannot be written ({error.strerror})") from None
    found = [path.name for path in folder.iterdir() if not path.name.startswith(".")]
    if only is not None and (strays := sorted(set(found) - set(only))):
        raise UserError(f"{flag} {folder}: holds {strays[0]}, which graders would read too; remove it first")
    return folder


def load_weights(path: Path, flag: str = "--checkpoint") -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Weights and configuration of a checkpoint: ours (.safetensors) or a published pickle in any usual wrapping.

    Pickles are read with weights_only=True, so that a hostile file cannot run code. Raises UserError naming the file.
    """
    if not path.is_file():
        raise UserError(f"{flag} {path}: no such file")
    if path.suffix == ".safetensors":
        try:
            with safetensors.safe_open(path, "pt") as file:
                config = json.loads((file.metadata() or {}).get("config", "{}"))
            return safetensors.torch.load_file(path), config
        except (safetensors.SafetensorError, json.JSONDecodeError) as error:
            raise UserError(f"{flag} {path}: not a whole safetensors file ({error})") from None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # what a damaged or hostile pickle raises is anybody's guess
        raise UserError(f"{flag} {path}: not a whole file of PyTorch weights (only tensors are loaded)") from None
    for key in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    content = content if isinstance(content, dict) else {}
    weights = {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, torch.Tensor)}
    if not weights:
        raise UserError(f"{flag} {path}: holds no dictionary of weights")
    while prefix := next((p for p in PREFIXES if any(key.startswith(p) for key in weights)), None):
        weights = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    return weights, {}


def load_net(
    path: Path, nets: dict[str, type[torch.nn.Module]], flag: str = "--checkpoint"
) -> tuple[torch.nn.Module, dict[str, Any]]:
    """The net of a checkpoint, in eval mode, and the configuration in its metadata.

    `nets` maps the names of the metadata to classes; a published file, which names none, is the first of them.
    Loading is strict: a checkpoint of another net is a UserError that names the first key in the way.
    """
    weights, config = load_weights(path, flag)
    name = config.get("net", next(iter(nets)))
    if name not in nets:
        raise UserError(f"{flag} {path}: is a net '{name}', expected {' or '.join(nets)}")
    read = getattr(nets[name], "arguments_of", lambda weights: {})  # a published file's, by its shapes
    try:
        net = nets[name](**config.get("arguments") or read(weights))
    except (KeyError, TypeError):
        raise UserError(f"{flag} {path}: is not a {nets[name].__name__}") from None
    shapes = ({key: list(value.shape) for key, value in state.items()} for state in (net.state_dict(), weights))
    expected, found = shapes
    for key in {**expected, **found}:
        if found.get(key) != expected.get(key):
            told = f"'{key}' is {found.get(key, 'missing')}, expected {expected.get(key, 'no such key')}"
            raise UserError(f"{flag} {path}: is not this {nets[name].__name__} ({told})")
    net.load_state_dict(weights)
    return net.eval(), config


class Run:
    """One run directory. The same command again continues it; a finished run has `result` set.

    Nothing is written before `load_state`, so that a mistake found while the data is read leaves no half-made run.
    Raises UserError if `args.output_dir` cannot be written or holds a run with other arguments.
    """

    def __init__(self, args: Any, accelerator: Accelerator, save_minutes: float = 5.0) -> None:
        batch, processes = args.batch_size, accelerator.num_processes
        if batch % processes or batch < 2 * processes:
            raise UserError(f"--batch-size {batch}: must be a multiple of the {processes} processes, at least twice it")
        for names, fits, what in RANGES:
            for name in names:
                value = getattr(args, name, None)  # None stands for a recipe's
                if value is not None and not fits(value):
                    raise UserError(f"--{name.replace('_', '-')} {value}: must be {what}")
        self.dir: Path = make_output_dir(args.output_dir)
        self.accelerator, self.save_minutes = accelerator, save_minutes
        self.is_main = accelerator.is_main_process
        self.stop_signal: int | None = None  # that this process received
        self.stopping = False  # that all processes agreed on
        self.last_save = self.started = time.monotonic()
        self.seconds_before = 0.0  # training time of the earlier sittings
        self.sums: dict[str, torch.Tensor] = {}  # of the epoch's losses so far
        self.latest: dict[str, torch.Tensor] = {}  # the last step's, for the bar
        self.arguments = json.loads(json.dumps(dataclasses.asdict(args), default=str))
        self.config_file, result_file = self.dir / "config.json", self.dir / "result.json"
        if self.config_file.exists():
            given = ((field.name, field.default) for field in dataclasses.fields(args))
            defaults = {name: default for name, default in given if default is not dataclasses.MISSING}
            before = json.loads(json.dumps(defaults, default=str))  # of options newer than the run
            before |= self._read(self.config_file)["arguments"]
            names = sorted((self.arguments.keys() | before.keys()) - FREE_ARGUMENTS)
            changed = [name for name in names if self.arguments.get(name) != before.get(name)]
            if changed:
                told = [f"--{n.replace('_', '-')} was {before.get(n)}, is {self.arguments.get(n)}" for n in changed]
                raise UserError(f"--output-dir {self.dir}: holds a run with other arguments ({', '.join(told)})")
        elif any(self.dir.glob("*.pt")) or any(self.dir.glob("*.safetensors")):
            raise UserError(f"--output-dir {self.dir}: holds checkpoints of something else (no config.json)")
        self.result: dict[str, Any] | None = self._read(result_file) if result_file.exists() else None
        if self.result is not None:
            self.print(f"{self.dir}: already finished, nothing to do (another --output-dir starts another run)")
        accelerator.wait_for_everyone()  # all have looked before the first one writes

    def _read(self, path: Path) -> dict[str, Any]:
        try:
            if path.suffix == ".pt":
                return torch.load(path, map_location="cpu", weights_only=True)
            return json.loads(path.read_text())
        except Exception:  # nothing of ours writes half a file: something else damaged it
            raise UserError(f"{path}: damaged; remove {self.dir} to start again") from None

    def print(self, text: str) -> None:
        """Print from the main process, beside a progress bar if there is one."""
        if self.is_main:
            tqdm.write(text)

    def log(self, text: str) -> None:
        """Print a line and keep it in log.txt."""
        self.print(text)
        if self.is_main:
            with (self.dir / "log.txt").open("a") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def metrics(self, row: dict[str, Any]) -> None:
        """Append one row (with its "step") to metrics.jsonl."""
        if self.is_main:
            with (self.dir / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")

    def history(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl."""
        file = self.dir / "metrics.jsonl"
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]  # a half last line was not finished

    def seconds(self) -> float:
        """Seconds spent on this run, earlier sittings included."""
        return self.seconds_before + time.monotonic() - self.started

    def load_state(self, parts: dict[str, Any]) -> int:
        """Begin: load last.pt into `parts` (nets, optimizers); returns the number of steps done.

        Rows of metrics.jsonl after that step are dropped.
        """
        path, state, rows = self.dir / "last.pt", {"step": 0, "seconds": 0.0}, []
        if path.exists():
            state = self._read(path)
            try:
                for name, part in parts.items():
                    part.load_state_dict(state.pop(name))
            except (KeyError, ValueError, RuntimeError):
                raise UserError(f"{path}: of another version of this script; remove {self.dir}") from None
            rows = [row for row in self.history() if row["step"] <= state["step"]]
            self.log(f"continuing {self.dir} after step {state['step']:,}")
        self.seconds_before = state["seconds"]
        self.sums = {key: value.to(self.accelerator.device) for key, value in state.get("sums", {}).items()}
        if self.is_main:
            for left_over in (*self.dir.glob(".*-last.pt"), *self.dir.glob(".*-model.safetensors")):
                left_over.unlink()  # of a process killed while it wrote
            if not self.config_file.exists():
                config = {"arguments": self.arguments, **environment(self.accelerator)}
                atomic_write(self.config_file, json.dumps(config, indent=1) + "\n")
            atomic_write(self.dir / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        return state["step"]

    def save_state(self, step: int, parts: dict[str, Any]) -> None:
        """Write last.pt: tensors, numbers and containers of them only, so that weights_only=True reads it.

        Weights that are not finite end the program instead: last.pt is then as it was saved before.
        """
        if self.is_main:
            state = {name: part.state_dict() for name, part in parts.items()}
            nets = [part for part in parts.values() if isinstance(part, torch.nn.Module)]
            if not all(value.isfinite().all() for net in nets for value in net.state_dict().values()):
                raise UserError(f"{self.dir}: the weights of step {step:,} are not finite; a smaller --lr may help")
            state |= {"step": step, "seconds": self.seconds(), "sums": self.sums}
            atomic_write(self.dir / "last.pt", lambda path: torch.save(state, path))
        self.last_save = time.monotonic()

    def save_due(self) -> bool:
        """True when a signal asked to stop, or the last save is `save_minutes` old. To be called once every step.

        With several processes, what one knows all act on, so that none waits for one that has left.
        """
        due = time.monotonic() - self.last_save > 60 * self.save_minutes
        flags = torch.tensor([self.stop_signal is not None, due], dtype=torch.float32)
        if self.accelerator.num_processes > 1:
            flags = self.accelerator.reduce(flags.to(self.accelerator.device), "sum")
        self.stopping = bool(flags[0] > 0)
        return self.stopping or bool(flags[1] > 0)

    def add(self, step: int, values: dict[str, torch.Tensor]) -> None:
        """Add a step's losses (scalars on the device) to the epoch's sums; one that is no number ends the program.

        last.pt is then as it was saved before. On a GPU every 50th step is looked at, for a look makes the CPU wait.
        """
        seen = self.accelerator.device.type == "cpu" or step % 50 == 0
        if seen and not torch.stack([value.detach().float() for value in values.values()]).isfinite().all():
            told = ", ".join(f"{name} {value.item():.4g}" for name, value in values.items())
            raise UserError(f"{self.dir}: step {step + 1:,} is not finite ({told}); a smaller --lr may help")
        self.latest = {name: value.detach().float() for name, value in values.items()}
        self.sums = {name: self.sums.get(name, 0.0) + value for name, value in self.latest.items()}

    def means(self, steps: int) -> dict[str, float]:
        """Means of what was added in an epoch of so many steps; the sums begin anew."""
        sums, self.sums = self.sums, {}
        return {name: value.item() / steps for name, value in sums.items()}

    def save_model(self, net: torch.nn.Module, config: dict[str, Any]) -> None:
        """Write model.safetensors: the weights, with `config` (what builds the net) as json in its metadata."""
        if self.is_main:
            weights = {key: value.detach().cpu().contiguous() for key, value in net.state_dict().items()}
            metadata = {"config": json.dumps(config)}
            atomic_write(
                self.dir / "model.safetensors", lambda path: safetensors.torch.save_file(weights, path, metadata)
            )

    def finish(self, result: dict[str, Any]) -> dict[str, Any]:
        """Write result.json: the run is done."""
        self.result = result | {"seconds": round(self.seconds(), 1)}
        if self.is_main:
            atomic_write(self.dir / "result.json", json.dumps(self.result, indent=1) + "\n")
        return self.result

    def steps(self, first: int, last: int, images_per_step: int) -> Iterator[int]:
        """Yield first … last - 1 with a bar on a terminal, plain lines elsewhere, and the time it will take said early.

        SIGINT and SIGTERM let the step under way finish: save when `save_due()` says so, and the loop ends the program.
        """
        handlers = {number: signal.signal(number, self._ask_to_stop) for number in (signal.SIGINT, signal.SIGTERM)}
        start, told = time.monotonic(), 0.0
        try:
            hidden = None if self.is_main else True  # None: shown on a terminal only
            images = {"unit": "image", "unit_scale": images_per_step}
            bar = tqdm(range(first, last), initial=first, total=last, disable=hidden, **images)
            for step in bar:
                yield step
                if not bar.disable and step % 20 == 0:
                    bar.set_postfix({name: f"{value.item():.3g}" for name, value in self.latest.items()})
                if self.stopping:
                    self.log(f"stopped after step {step + 1:,}; the same command continues")
                    sys.exit(128 + (self.stop_signal or signal.SIGTERM))
                spent = time.monotonic() - start
                if spent - told > (60 if told else 10):
                    told, rate = spent, (step + 1 - first) / spent
                    left = tqdm.format_interval((last - step - 1) / rate)
                    self.log(f"step {step + 1:,}/{last:,}, {rate * images_per_step:,.0f} images/s, about {left} left")
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _ask_to_stop(self, number: int, frame: Any) -> None:
        if self.stop_signal is not None:  # asked twice: stop at once
            raise KeyboardInterrupt
        self.stop_signal = number


def environment(accelerator: Accelerator) -> dict[str, Any]:
    """Package versions, git commit and hardware, for config.json."""
    try:
        command = ["git", "rev-parse", "HEAD"]
        commit = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip() or None
    except OSError:  # no git here
        commit = None
    on_cuda = accelerator.device.type == "cuda"
    hardware = {
        "device": accelerator.device.type,
        "name": torch.cuda.get_device_name() if on_cuda else platform.processor() or platform.machine(),
        "precision": accelerator.mixed_precision.replace("no", "fp32"),
        "processes": accelerator.num_processes,
        "threads": torch.get_num_threads(),
    }
    versions = {"python": platform.python_version(), **{p: importlib.metadata.version(p) for p in PACKAGES}}
    return {"command": " ".join(sys.argv), "versions": versions, "git_commit": commit, "hardware": hardware}
