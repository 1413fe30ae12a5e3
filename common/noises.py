"""Files of noise, from which p2_ddim.py samples: one tensor each, as torch.save writes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.archives import refuse_compressed
from common.checkpoints import problem_of
from common.names import is_hidden, natural_order


def find_noises(folder: Path) -> list[Path]:
    """The *.pt files of a folder, in natural order, without hidden ones."""
    paths = [path for path in folder.glob("*.pt") if not is_hidden(path.name)]
    return sorted(paths, key=natural_order)


def load_noise(path: Path) -> Any:
    """What a file contains; no code of it is run. A damaged or hostile file can raise anything."""
    if not path.is_file():  # a pipe would be waited for
        raise ValueError("no such file")
    refuse_compressed(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def problem_of_noise(noise: Any) -> str:
    """Why a file's content is no noise, whatever its shape, as a phrase; empty if it is one."""
    if not isinstance(noise, Tensor):
        return f"contains a {type(noise).__name__}, not a tensor"
    problem = problem_of(noise)
    if not problem and not noise.is_floating_point():
        problem = f"has the type {noise.dtype}; a noise has floating-point numbers"
    return problem
