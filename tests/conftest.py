"""Fixtures: a tiny course layout."""

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: the tests' nets are tiny

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from common.run import Run

torch.set_num_threads(1)


def save_net(net: torch.nn.Module, path: Path, **config: object) -> Path:
    """A checkpoint as the scripts write them."""
    path.parent.mkdir(exist_ok=True)
    weights = {key: value.contiguous() for key, value in net.state_dict().items()}
    safetensors.torch.save_file(weights, path, {"config": json.dumps(net.config | config)})
    return path


def write_domain(folder: Path, counts: dict[str, int], grey: bool = False, seed: int = 0) -> None:
    """Random 28x28 images whose top left corner tells the label, with a csv for each split."""
    rng = np.random.default_rng(seed)
    (folder / "data").mkdir(parents=True)
    index = 0
    for split, count in counts.items():
        rows = ["image_name,label"]
        for _ in range(count):
            label, name = index % 10, f"{index:05d}.png"
            pixels = rng.integers(0, 256, (28, 28) if grey else (28, 28, 3), dtype=np.uint8)
            pixels[:14, :14] = label * 25
            Image.fromarray(pixels).save(folder / "data" / name)
            rows.append(f"{name},{label}")
            index += 1
        (folder / f"{split}.csv").write_text("\n".join(rows) + "\n")


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """hw2_data with three small digit domains."""
    for seed, domain in enumerate(("mnistm", "svhn", "usps")):
        counts = {"train": 60, "val": 30}
        write_domain(tmp_path / "hw2_data" / "digits" / domain, counts, grey=domain == "usps", seed=seed)
    return tmp_path / "hw2_data"


@pytest.fixture
def stop_in_step_1(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable, Any], None]:
    """`stop_in_step_1(train, args)` trains as if SIGTERM came within step 1, the second; it must end the program."""

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
