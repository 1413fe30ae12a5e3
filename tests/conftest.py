"""Fixtures and helpers that several test files use."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: the networks are tiny

import numpy as np
import pytest
import torch
from PIL import Image

from common import checkpoints, cli
from common.cli import run_cli
from common.run import Run

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test is like a command of its own, which has not said any note yet."""
    monkeypatch.setattr(cli, "_said", set())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start the test that takes minutes first, so that no process waits for it at the end."""
    items.sort(key=lambda item: item.get_closest_marker("timeout") is None)


def save_net(net: torch.nn.Module, path: Path, **config: object) -> Path:
    """Write a checkpoint as the scripts write them; returns its path."""
    checkpoints.save_net(path, net, net.config | config)
    return path


def save_images(folder: Path, images: np.ndarray) -> Path:
    """Write uint8 images (n, height, width, 3) as 000.png, 001.png, and so on."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{number:03d}.png")
    return folder


def noise(count: int, size: int = 28, seed: int = 0) -> np.ndarray:
    """Random images, uint8 (count, size, size, 3)."""
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def write_domain(folder: Path, counts: dict[str, int], grey: bool = False, seed: int = 0) -> None:
    """Write random 28x28 images, with a csv for each split.

    The brightness of an image's top left corner is 25 times its label.
    """
    rng = np.random.default_rng(seed)
    shape = (28, 28) if grey else (28, 28, 3)
    (folder / "data").mkdir(parents=True)
    index = 0
    for split, count in counts.items():
        rows = ["image_name,label"]
        for _ in range(count):
            label = index % 10
            name = f"{index:05d}.png"
            pixels = rng.integers(0, 256, shape, dtype=np.uint8)
            pixels[:14, :14] = label * 25
            Image.fromarray(pixels).save(folder / "data" / name)
            rows.append(f"{name},{label}")
            index += 1
        (folder / f"{split}.csv").write_text("\n".join(rows) + "\n")


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """hw2_data with three small digit domains."""
    for seed, domain in enumerate(("mnistm", "svhn", "usps")):
        folder = tmp_path / "hw2_data" / "digits" / domain
        write_domain(folder, {"train": 60, "val": 30}, grey=domain == "usps", seed=seed)
    return tmp_path / "hw2_data"


@pytest.fixture
def error_of(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., str]:
    """`error_of(commands, main, *words)` runs a command line in this process.

    It must end with status 2 and exactly one line on stderr, which is returned.
    """

    def run(commands: Any, main: Callable[[Any], Any], *words: object) -> str:
        monkeypatch.setattr(sys, "argv", ["script.py", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            run_cli(commands, main)
        error = capsys.readouterr().err
        assert ended.value.code == 2
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        return error

    return run


@pytest.fixture
def stop_in_step_1(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable, Any], None]:
    """`stop_in_step_1(train, args)` trains as if SIGTERM came within step 1, the second one.

    The signal must end the program.
    """

    def steps(self: Run, first: int, last: int, images_per_step: int) -> Iterator[int]:
        for step in range(first, last):
            self.stop_signal = signal.SIGTERM if step == 1 else None
            yield step
            if self.stopping:
                sys.exit(128 + signal.SIGTERM)

    def stop(train: Callable, args: Any) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(Run, "steps", steps)
            with pytest.raises(SystemExit):
                train(args)

    return stop
