"""The graders' face rule: dlib's frontal HOG detector, upsampled once, must find exactly one face."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import dlib
import numpy as np

from common.data import decode_image, list_images
from common.progress import watch
from common.run import UserError

LOCAL = threading.local()  # each thread's own face detector


def count_faces(path: Path) -> int | None:
    """Faces that dlib's frontal HOG detector finds in an image upsampled once; None if the file is unreadable."""
    if not hasattr(LOCAL, "detector"):
        LOCAL.detector = dlib.get_frontal_face_detector()  # it releases the GIL while it looks, and serves one thread
    try:
        image = decode_image(path).transpose(1, 2, 0)  # (channels, height, width) → (height, width, channels)
    except UserError:
        return None
    return len(LOCAL.detector(np.ascontiguousarray(image), 1))


def face_rate(folder: Path, workers: int) -> dict[str, Any]:
    """Images of `folder` with no, one and several faces, the rate of one in %, the unreadable files (no part of it)."""
    paths = list_images(folder, recursive=True)
    with ThreadPoolExecutor(workers) as pool:
        found = list(watch(pool.map(count_faces, paths), len(paths), f"{folder}, images"))
    unreadable = [str(path) for path, number in zip(paths, found, strict=True) if number is None]
    readable = [number for number in found if number is not None]
    if not readable:
        raise UserError(f"{folder}: none of its {len(paths):,} images can be read")
    none, one = readable.count(0), readable.count(1)
    counts = {"images": len(readable), "none": none, "one": one, "several": len(readable) - none - one}
    return {"one_face_percent": 100 * one / len(readable), **counts, "unreadable": unreadable}
