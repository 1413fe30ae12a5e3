"""The graders' rule for faces: dlib's frontal HOG detector must find exactly one."""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common.cli import UserError
from common.data import decode_image, list_images
from common.processes import gather_shares, my_share
from common.progress import show_progress

if TYPE_CHECKING:
    from accelerate import Accelerator

# One more thread for so many images: a detector looks through 300 of 64x64 pixels, or fewer larger
# ones, in the time that another one takes to be made.
IMAGES_A_THREAD = 100
FREE: queue.SimpleQueue[Any] = queue.SimpleQueue()  # detectors that no thread uses now


@contextlib.contextmanager
def face_detector() -> Iterator[Any]:
    """Dlib's frontal HOG detector, for one thread at a time.

    It releases Python's global lock while it looks. It takes nearly a second to be made, so it is
    kept for the next use.
    """
    try:
        detector = FREE.get_nowait()
    except queue.Empty:
        import dlib

        detector = dlib.get_frontal_face_detector()
    try:
        yield detector
    finally:
        FREE.put(detector)


def count_faces(path: Path) -> int | None:
    """The number of faces in an image that is upsampled once; None for an unreadable file."""
    try:
        image = decode_image(path).transpose(1, 2, 0)  # → (height, width, 3)
    except UserError:
        return None
    with face_detector() as detector:
        return len(detector(np.ascontiguousarray(image), 1))


def face_rate(folder: Path, workers: int, accelerator: Accelerator | None = None) -> dict[str, Any]:
    """How many images of a folder (and its sub-folders) show no, one and several faces.

    "one_face_percent" is the rate of images with exactly one. Unreadable files are listed and are
    not part of it. At most `workers` threads look at the images. The processes of `accelerator`
    share them, and each gets all results. Raises UserError if no file can be read.
    """
    paths = list_images(folder, recursive=True)
    mine = my_share(paths, accelerator)
    threads = min(workers, 1 + len(mine) // IMAGES_A_THREAD)
    with ThreadPoolExecutor(threads) as pool:
        counts = pool.map(count_faces, mine)
        found = list(show_progress(counts, len(mine), f"{folder}, images"))
    found = gather_shares(found, accelerator)
    readable = [count for count in found if count is not None]
    unreadable = [str(path) for path, count in zip(paths, found, strict=True) if count is None]
    if not readable:
        raise UserError(f"{folder}: none of its {len(paths):,} images can be read")
    none = readable.count(0)
    one = readable.count(1)
    return {
        "one_face_percent": 100 * one / len(readable),
        "images": len(readable),
        "none": none,
        "one": one,
        "several": len(readable) - none - one,
        "unreadable": unreadable,
    }
