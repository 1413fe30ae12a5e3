"""Training images of the face models: any folder, and latents where a network works in them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from common.attributes import attributes_of
from common.checkpoints import digest_of, load_net
from common.cli import UserError
from common.data import SUFFIXES, Fit, Images, list_images, load_folder, normalise
from common.names import is_hidden
from common.progress import show_progress
from diffusion.schedule import Schedule
from models.autoencoder import Autoencoder
from models.ddim_unet import DdimUnet
from models.latent_unet import LatentUnet

FaceNet = DdimUnet | LatentUnet
FACE_NETS = {"ddim_unet": DdimUnet, "latent_unet": LatentUnet}  # by their names in checkpoints
AT_A_TIME = 100  # images to encode


def make_face_net(
    size: int,
    width: int,
    blocks: int,
    patch: int = 1,
    dropout: float = 0.0,
    autoencoder: Path | None = None,
) -> FaceNet:
    """A U-Net for faces of `size` pixels, or for the latents of the `autoencoder` in a file.

    Raises UserError if the patches or the latents do not fit the size.
    """
    if autoencoder is None:
        return make_pixel_net(size, width, blocks, patch, dropout)
    found = load_autoencoder(autoencoder)
    arguments = found.config["arguments"]
    if arguments["size"] != size:
        raise UserError(
            f"--autoencoder {autoencoder}: is for {arguments['size']}x{arguments['size']} images, "
            f"not {size}x{size}"
        )
    channels, side, _ = found.latent_shape
    unet = {
        "in_channels": channels,
        "size": side,
        "width": width,
        "multipliers": (1, 2, 2),
        "attention": (side // 2, side // 4),
        "blocks": blocks,
        "dropout": dropout,
        "patch": patch,
    }
    if side % (4 * patch):
        raise UserError(f"--patch {patch}: 4 times that must divide {side}, the latents' side")
    net = LatentUnet(unet, arguments)
    net.autoencoder.load_state_dict(found.state_dict())
    return net


def load_autoencoder(path: Path, flag: str = "--autoencoder") -> Autoencoder:
    """The autoencoder in a file of its own, or the one in the file of a network for its latents.

    Raises UserError for another file.
    """
    kinds = {"autoencoder": Autoencoder, "latent_unet": LatentUnet}
    found, _ = load_net(path, kinds, flag)
    return found.autoencoder if isinstance(found, LatentUnet) else found


def refuse_other_autoencoder(net: FaceNet, found: FaceNet, path: Path) -> None:
    """Raise UserError if the weights of --init are for the latents of another autoencoder."""
    if isinstance(net, LatentUnet) and isinstance(found, LatentUnet):
        other = found.autoencoder.state_dict()
        for name, value in net.autoencoder.state_dict().items():
            if not torch.equal(value.cpu(), other[name]):
                raise UserError(f"--init {path}: has another autoencoder than --autoencoder")


def digest_of_states(net: FaceNet) -> str:
    """What a diffusion's clean states are: pixels, or the latents of the encoder with this hash.

    The decoder does not count. Weights are compared in half precision, in which they are released.
    """
    if not isinstance(net, LatentUnet):
        return f"pixels {net.image_size}x{net.image_size}"
    digest = hashlib.sha256()
    for part in (net.autoencoder.encoder, net.autoencoder.standard):
        for value in part.state_dict().values():
            digest.update(value.cpu().half().numpy().tobytes())
    return f"latents {digest.hexdigest()}"


def make_pixel_net(
    size: int,
    width: int,
    blocks: int,
    patch: int,
    dropout: float,
    channels: int = 3,
    n_classes: int = 0,
) -> DdimUnet:
    """A DdimUnet of at most four levels; its last, where the size becomes odd, has attention."""
    if size % patch:
        raise UserError(f"--patch {patch}: must divide {size}, the size of the images")
    sizes = [size // patch]
    while len(sizes) < 4 and sizes[-1] % 2 == 0:
        sizes.append(sizes[-1] // 2)
    return DdimUnet(
        channels,
        size,
        width,
        multipliers=(1, 2, 2, 4)[: len(sizes)],
        attention=sizes[-1:],
        blocks=blocks,
        dropout=dropout,
        n_classes=n_classes,
        patch=patch,
    )


def face_folder(data_dir: Path) -> Path:
    """The folder of training images: face/train of a data folder, or else `data_dir` itself.

    Raises UserError if there are neither.
    """
    folder = data_dir / "face" / "train"
    if folder.is_dir():
        return folder
    names = [path.name for path in data_dir.glob("*") if not is_hidden(path.name)]
    if not any(Path(name).suffix.lower() in SUFFIXES for name in names):
        raise UserError(f"--data-dir {data_dir}: has neither a folder face/train nor images")
    return data_dir


def load_faces(
    data_dir: Path, size: int, cache_dir: Path | None = None, fit: Fit = "crop"
) -> Tensor:
    """The training images, resized to uint8 (n, 3, size, size).

    Raises UserError for a folder with fewer than two images.
    """
    folder = face_folder(data_dir)
    count = len(list_images(folder))
    if count < 2:
        raise UserError(f"--data-dir {data_dir}: has {count} image, but training needs at least 2")
    return load_folder(folder, (size, size), cache_dir, fit).pixels


class FaceModel(NamedTuple):
    """A diffusion model of faces, as p2_ddpm_train.py and p2_guided.py save it."""

    net: FaceNet
    schedule: Schedule
    size: int
    names: list[str]  # of its attributes, if it has any
    sampling: dict[str, Any]  # how it is sampled: spacing, clamp and save_range
    digest: str


def load_face_model(path: Path, flag: str) -> FaceModel:
    """Read a diffusion model of faces. Raises UserError for other files."""
    net, config = load_net(path, FACE_NETS, flag)
    if "schedule" not in config:
        raise UserError(f"{flag} {path}: has no noise schedule; give a model of p2_ddpm_train.py")
    if config.get("domains") != ["faces"]:
        raise UserError(f"{flag} {path}: is a model of digits, not of faces")
    clamp = "none" if isinstance(net, LatentUnet) else "static"
    usual = {"spacing": "trailing", "save_range": "fixed", "clamp": clamp}
    return FaceModel(
        net=net,
        schedule=Schedule.from_config(config["schedule"]),
        size=config.get("size", net.image_size),
        names=config.get("attributes", []),
        sampling=usual | config.get("sampling", {}),
        digest=digest_of(path),
    )


def load_labelled(
    data_dir: Path, size: int, names: Sequence[str], output_dir: Path
) -> tuple[Images, Tensor]:
    """The training images, resized, and their attributes, int8 (n, names), 1 or -1.

    Raises UserError if face/train of a data folder or its file of attributes lacks something.
    """
    table = attributes_of(data_dir)
    table.of([], names)  # unknown names are refused before a minute of reading images
    folder = data_dir / "face" / "train"
    images = load_folder(folder, (size, size), output_dir.parent / "cache")
    return images, table.of(images.names, names)


class FaceStates:
    """The clean states x_0 of a diffusion over images: normalised pixels, or latents.

    Latents are encoded once, before the training. In a run that draws fewer images than there are
    to encode, they are encoded when they are drawn.
    """

    def __init__(self, net: FaceNet, pixels: Tensor, flip: bool, draws: int) -> None:
        """`pixels` are uint8 (n, 3, height, width), on `net`'s device.

        `flip` mirrors with probability one half. `draws` is how many images the run draws in all.
        """
        self.pixels = pixels
        self.flip = flip
        self.count = len(pixels)
        self.encoder = net if isinstance(net, LatentUnet) else None
        self.latents: Tensor | None = None  # (1 or 2 for mirrored ones, n, channels, height, width)
        versions = 2 if flip else 1
        if self.encoder is not None and draws >= versions * self.count:
            latents = [self._encode_all(pixels)]
            if flip:
                latents.append(self._encode_all(pixels.flip(3)))
            self.latents = torch.stack(latents)
            self.pixels = pixels.new_empty(0)  # needed no more; it still says the device

    def draw(self, rows: Tensor, rng: torch.Generator) -> Tensor:
        """x_0 of some rows (batch,): float32 (batch, channels, height, width)."""
        if self.latents is None:
            images = normalise(self.pixels[rows])
            return self._encode(mirror_some(images, rng) if self.flip else images)
        version = torch.zeros_like(rows)  # 0, or 1 for a mirrored image
        if self.flip:
            version = (torch.rand(len(rows), generator=rng, device=rows.device) < 0.5).long()
        return self.latents[version, rows]

    def sample(self, count: int, rng: torch.Generator) -> Tensor:
        """At most `count` different clean states at random, not mirrored, float32."""
        rows = torch.randperm(self.count, generator=rng)[:count].to(self.pixels.device)
        if self.latents is not None:
            return self.latents[0, rows]
        return self._encode_all(self.pixels[rows])

    def _encode_all(self, pixels: Tensor) -> Tensor:
        """The states of many images uint8 (n, 3, height, width), some at a time."""
        batches: Iterable[Tensor] = pixels.split(AT_A_TIME)
        if self.encoder is not None:
            batches = show_progress(batches, len(batches), "encoding, batches")
        return torch.cat([self._encode(normalise(some)) for some in batches])

    @torch.no_grad()
    def _encode(self, images: Tensor) -> Tensor:
        """The states of images (batch, 3, height, width) in [-1, 1]."""
        return images if self.encoder is None else self.encoder.encode(images)


def mirror_some(images: Tensor, rng: torch.Generator) -> Tensor:
    """Mirror each image (batch, channels, height, width) with probability one half."""
    mirrored = torch.rand(len(images), generator=rng, device=images.device) < 0.5
    return torch.where(mirrored.view(-1, 1, 1, 1), images.flip(3), images)


def face_names(count: int) -> list[str]:
    """File names 0000.png, 0001.png, … of `count` generated images."""
    digits = max(4, len(str(count - 1)))
    return [f"{number:0{digits}}.png" for number in range(count)]
