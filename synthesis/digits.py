"""Synthetic digits for the three domains, 28x28.

mnistm  scikit-learn's optical handwritten digits (UCI, 1,797 of 8x8) brought to 28x28 with random affine and elastic
        variation (Simard et al. 2003), then the MNIST-M recipe of Ganin et al. 2016 (https://arxiv.org/abs/1505.07818):
        |patch − digit| with a random patch of a photograph.
usps    other digits of the same collection, rendered as USPS is: 16x16 grey, the digit filling the frame.
svhn    house numbers from the TrueType fonts matplotlib ships, after the SynthDigits recipe of the same paper: varied
        colour, position, orientation, background and blur, with neighbours cut by the border.

Needs neither torch nor the network. Image k depends on (seed, domain, split, k) only.
"""

from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from scipy import ndimage

DOMAINS = ("mnistm", "svhn", "usps")
SPLITS = ("train", "val")
SIZE = 28
BASE_SHARES = {("mnistm", "train"): 0.52, ("mnistm", "val"): 0.13, ("usps", "train"): 0.27, ("usps", "val"): 0.08}
FONTS = (  # of matplotlib's, those whose digits are plain figures
    *(f"DejaVuSans{style}.ttf" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSansMono{style}.ttf" for style in ("", "-Bold", "-Oblique")),
    *(f"DejaVuSerif{style}.ttf" for style in ("", "-Bold", "-Italic")),
    *(f"STIXGeneral{style}.ttf" for style in ("", "Bol", "BolIta")),
    *("cmb10.ttf", "cmr10.ttf", "cmss10.ttf", "cmtt10.ttf"),
)


def image_rng(seed: int, domain: str, split: str, *key: int) -> np.random.Generator:
    """The generator of one image (or of one block of ten labels)."""
    return np.random.default_rng([seed, DOMAINS.index(domain), SPLITS.index(split), *key])


def label_of(seed: int, domain: str, split: str, k: int) -> int:
    """The label of image k: every ten images in a row hold every digit once, in random order."""
    return int(image_rng(seed, domain, split, k // 10, 0).permutation(10)[k % 10])


def split_base(labels: np.ndarray, seed: int) -> dict[tuple[str, str], np.ndarray]:
    """Deal the base digits out to (domain, split), class by class, so that none stands in two of them.

    labels: (n,) ints 0–9. Returns indices into it; together they are a permutation of all n.
    """
    rng = np.random.default_rng(seed)
    parts: dict[tuple[str, str], list[np.ndarray]] = {key: [] for key in BASE_SHARES}
    cuts = np.cumsum(list(BASE_SHARES.values()))[:-1]
    for digit in range(10):
        members = rng.permutation(np.flatnonzero(labels == digit))
        for key, share in zip(parts, np.split(members, np.rint(cuts * len(members)).astype(int)), strict=True):
            parts[key].append(share)
    return {key: np.concatenate(shares) for key, shares in parts.items()}


@cache
def base_digits() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's optical digits: float32 (1797, 8, 8) in 0–1, and their labels (1797,)."""
    from sklearn.datasets import load_digits  # slow to import: only where it is needed

    data = load_digits()
    return (data.images / 16).astype(np.float32), data.target


@cache
def base_pool(seed: int, domain: str, split: str) -> list[np.ndarray]:
    """For every digit, the indices of the base digits that (domain, split) may use."""
    labels = base_digits()[1]
    indices = split_base(labels, seed)[domain, split]
    return [indices[labels[indices] == digit] for digit in range(10)]


@cache
def photographs() -> tuple[np.ndarray, ...]:
    """scikit-learn's two photographs at three scales each, uint8 (height, width, 3)."""
    from sklearn.datasets import load_sample_images

    images = [Image.fromarray(image) for image in load_sample_images().images]
    scales = (1.0, 0.7, 0.45)
    return tuple(
        np.asarray(image.resize((round(image.width * s), round(image.height * s)), Image.Resampling.LANCZOS))
        for image in images
        for s in scales
    )


# ----------------------------------------------------------------------------------------------------- handwriting


def smooth_field(rng: np.random.Generator, cells: int, size: int) -> np.ndarray:
    """(size, size) float32 noise in about -1…1, interpolated from a grid of cells x cells."""
    grid = Image.fromarray(rng.uniform(-1, 1, (cells, cells)).astype(np.float32))
    return np.asarray(grid.resize((size, size), Image.Resampling.BICUBIC))


def handwrite(base: np.ndarray, rng: np.random.Generator, size: int = SIZE, height: float = 20) -> np.ndarray:
    """An 8x8 digit in 0–1 as float32 (size, size) pen strokes in 0–1, about `height` pixels tall, as MNIST's are.

    A cubic spline through the 8x8 cells is read at coordinates moved by a random affine and a smooth random field,
    and its grey ramp is made steep, so that strokes are crisp and their width varies with the threshold.
    """
    turn, shear = rng.normal(0, 0.1), rng.normal(0.05, 0.18)
    zoom_y, zoom_x = rng.uniform(0.88, 1.08), rng.uniform(0.8, 1.08)
    cos, sin = np.cos(turn), np.sin(turn)
    cells = (
        8
        / height
        * np.array([[cos / zoom_y, -sin / zoom_y], [(sin + shear * cos) / zoom_x, (cos - shear * sin) / zoom_x]])
    )
    rows, columns = np.mgrid[:size, :size] - (size - 1) / 2 - rng.uniform(-1, 1, (2, 1, 1))
    elastic = 0.38 * np.stack([smooth_field(rng, 4, size), smooth_field(rng, 4, size)])  # in cells
    where = np.einsum("ij,jhw->ihw", cells, np.stack([rows, columns])) + elastic + 3.5 + 2
    value = ndimage.map_coordinates(np.pad(base, 2), where, order=3, mode="constant")
    surroundings = ndimage.gaussian_filter(value, height / 7)  # a faint stroke is kept, a blot is thinned
    threshold = rng.uniform(0.16, 0.27) + rng.uniform(0.7, 0.85) * surroundings
    steepness = rng.uniform(3.5, 5.5)
    return np.clip((value - threshold) * steepness + 0.5, 0, 1).astype(np.float32)


def random_patch(photos: tuple[np.ndarray, ...] | list[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """A random SIZE x SIZE crop, uint8 (28, 28, 3), of one of the photographs (each at least that large)."""
    photo = photos[rng.integers(len(photos))]
    top, left = (rng.integers(0, extent - SIZE + 1) for extent in photo.shape[:2])
    return photo[top : top + SIZE, left : left + SIZE]


def mnistm_blend(digit: np.ndarray, patch: np.ndarray) -> np.ndarray:
    """The MNIST-M recipe, |patch − digit| in every channel: uint8 (28, 28) and (28, 28, 3) → uint8 (28, 28, 3).

    The digit is to be 0 or 255: the published set's strokes have hard edges, any ink of MNIST's counting as full ink.
    """
    return np.abs(patch.astype(np.int16) - digit.astype(np.int16)[..., None]).astype(np.uint8)


def draw_mnistm(base: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    digit = np.where(handwrite(base, rng) > 0.25, np.uint8(255), np.uint8(0))
    patch = random_patch(photographs(), rng)
    return mnistm_blend(digit, patch[:, ::-1] if rng.random() < 0.5 else patch)


def draw_usps(base: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Written large, cut at its bounding box, fitted into 16x16, softened, and resized to 28x28: uint8 (28, 28)."""
    ink = handwrite(base, rng, size=44, height=34)
    rows, columns = (np.flatnonzero((ink > 0.3).any(axis)) for axis in (1, 0))
    ink = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    aspect = ink.shape[1] / ink.shape[0]
    width = int(np.clip(round(16 * aspect * (rng.uniform(0.95, 1.35) if aspect > 0.5 else 0.85)), 3, 16))
    digit = Image.fromarray(np.uint8(255 * ink)).resize((width, 16), Image.Resampling.BOX)
    frame = Image.new("L", (16, 16))
    frame.paste(digit, ((16 - width) // 2, 0))
    frame = frame.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 0.6)))
    bright = np.asarray(frame, np.float32) * rng.uniform(1.0, 1.25)
    return np.asarray(Image.fromarray(np.uint8(np.clip(bright, 0, 255))).resize((SIZE, SIZE), Image.Resampling.BICUBIC))


# --------------------------------------------------------------------------------------------------- house numbers


@cache
def font(name: str, size: int) -> ImageFont.FreeTypeFont:
    import matplotlib  # for the place of its fonts only

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name, size)


def number_mask(label: int, rng: np.random.Generator) -> Image.Image:
    """A house number with `label` in the middle, as a greyscale mask at twice the size, (56, 56)."""
    size = 2 * SIZE
    face = font(FONTS[rng.integers(len(FONTS))], int(rng.integers(40, 66)))
    left, right = ("".join(str(d) for d in rng.integers(0, 10, rng.integers(0, 3))) for _ in range(2))
    digit = str(label)
    spacing = rng.uniform(-2, 6)
    mask = Image.new("L", (3 * size, 3 * size))
    draw = ImageDraw.Draw(mask)
    weight = int(rng.random() < 0.35)  # a bolder stroke
    middle, width = 1.5 * size, face.getlength(digit)
    draw.text((middle, middle), digit, 255, face, anchor="mm", stroke_width=weight)
    draw.text((middle - width / 2 - spacing, middle), left, 255, face, anchor="rm", stroke_width=weight)
    draw.text((middle + width / 2 + spacing, middle), right, 255, face, anchor="lm", stroke_width=weight)
    turn, shear = rng.normal(0, 0.1), rng.normal(0, 0.12)
    zoom_x, zoom_y = rng.uniform(0.85, 1.35), rng.uniform(0.9, 1.15)
    shift_x, shift_y = rng.uniform(-5, 5, 2)
    a, b = np.cos(turn) * zoom_x, (np.sin(turn) + shear) * zoom_x
    d, e = -np.sin(turn) * zoom_y, np.cos(turn) * zoom_y
    centre_x, centre_y = size / 2 + shift_x, size / 2 + shift_y
    matrix = (a, b, middle - a * centre_x - b * centre_y, d, e, middle - d * centre_x - e * centre_y)
    return mask.transform((size, size), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)


def two_colours(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Background and digit colour in 0–1, often of the same hue, at least 0.15 apart in mean brightness."""
    while True:
        ground, ink = (rng.uniform(0.05, 0.95) + rng.uniform(0, 0.3) * rng.uniform(-1, 1, 3) for _ in range(2))
        if abs(ground.mean() - ink.mean()) > 0.15 + 0.25 * rng.random():
            return np.clip(ground, 0, 1).astype(np.float32), np.clip(ink, 0, 1).astype(np.float32)


def draw_svhn(label: int, rng: np.random.Generator) -> np.ndarray:
    """One house number, uint8 (28, 28, 3)."""
    size = 2 * SIZE
    ground, ink = two_colours(rng)
    mask = np.asarray(number_mask(label, rng), np.float32)[..., None] / 255
    wall = 1 + rng.uniform(0, 0.35) * smooth_field(rng, 3, size) + rng.uniform(0, 0.12) * smooth_field(rng, 20, size)
    picture = ground * wall[..., None]
    if rng.random() < 0.25:  # the edge of the plate, or a door frame
        row, column = np.mgrid[:size, :size] - size / 2
        angle, reach = rng.integers(4) * np.pi / 2 + rng.normal(0, 0.1), rng.uniform(18, 27)
        beyond = row * np.sin(angle) + column * np.cos(angle) > reach
        picture[beyond] = rng.uniform(0, 0.9) + rng.uniform(-0.1, 0.1, 3)
    if rng.random() < 0.3:  # a shadow beside raised figures
        offset = tuple(rng.integers(-4, 5, 2))
        picture = picture * (1 - rng.uniform(0.2, 0.6) * np.roll(mask, offset, (0, 1)))
    shine = 1 + rng.uniform(0, 0.25) * smooth_field(rng, 3, size)
    picture = picture + mask * (ink * shine[..., None] - picture)
    image = Image.fromarray(np.uint8(255 * np.clip(picture, 0, 1)))
    image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 3.2) * rng.uniform(0.4, 1)))
    small = np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BOX), np.float32)
    noisy = small + rng.normal(0, rng.uniform(0.5, 6), small.shape)
    return np.uint8(np.clip(np.rint(noisy), 0, 255))


def draw_digit(seed: int, domain: str, split: str, k: int) -> tuple[np.ndarray, int]:
    """Image k of a split and its label: uint8 (28, 28, 3), for usps (28, 28)."""
    rng, label = image_rng(seed, domain, split, k), label_of(seed, domain, split, k)
    if domain == "svhn":
        return draw_svhn(label, rng), label
    base = base_digits()[0][rng.choice(base_pool(seed, domain, split)[label])]
    return (draw_mnistm if domain == "mnistm" else draw_usps)(base, rng), label
