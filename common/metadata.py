"""What a network's file says of itself, checked before any of it is used.

The metadata of a .safetensors file has the configuration of its network as json. Its values become
names of folders, labels, sizes and numbers, and anyone can write such a file. `check_config`
compares them with the tables at the end of this file: one of all values that a configuration may
have, and one of the constructor's arguments of each network.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn, get_args

import safetensors

from common.cli import LARGEST_SEED
from common.json_files import FileError, parse_json
from common.names import is_folder_name, is_label
from diffusion.noise_levels import NoiseLevels, Parametrization
from diffusion.samplers import Clamp
from diffusion.schedule import AnyKind, Prediction, Rule, Schedule, Spacing
from models.adaptation import BackboneName, Place

LONGEST_CONFIG = 16 * 2**20  # characters; the longest lists hundreds of thousands of images
MOST_IMAGES = 1_000_000  # that a network was trained on
MOST_TOKENS = 49_408  # of CLIP
FACES = ("ddim_unet", "latent_unet")  # networks that say the size of their images
LEAST_SIGNAL = 1e-60  # ᾱ_T; below it, float32 cannot hold x_T / √ᾱ_T

# A check of one value: `check(value, "sampling", "clamp")` raises MetadataError, or does nothing.
Check = Callable[[Any, str, str], None]


class MetadataError(ValueError):
    """A configuration that no network of ours has. The message is one phrase about the file."""


# Reading


def read_config(path: Path) -> dict[str, Any]:
    """The configuration in the metadata of a .safetensors file; empty if it has none.

    Its values are not checked (`check_config` does that). Raises MetadataError for a file or a
    configuration that is damaged.
    """
    if not path.is_file():  # a pipe would be waited for
        raise MetadataError("no such file")
    try:
        with safetensors.safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
    except (safetensors.SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise MetadataError(f"not a whole safetensors file ({reason})") from None
    return parse_config(metadata.get("config", "{}"))


def parse_config(text: str) -> dict[str, Any]:
    """Read a configuration as strict json. Raises MetadataError for anything else."""
    if len(text) > LONGEST_CONFIG:
        raise MetadataError(f"its configuration is longer than {LONGEST_CONFIG:,} characters")
    try:
        config = parse_json(text)
    except FileError as error:
        raise MetadataError(f"its configuration {error}") from None
    if not isinstance(config, dict):
        raise MetadataError("its configuration is not a json object")
    return config


# Kinds of checks


def refuse(value: Any, place: str, name: str, expected: str) -> NoReturn:
    """Raise MetadataError about a value."""
    raise MetadataError(f"its {place} has {name} {ascii(value)[:60]}, {expected}")


def whole(low: int, high: int) -> Check:
    """A whole number from `low` to `high`."""

    def check(value: Any, place: str, name: str) -> None:
        if type(value) is not int or not low <= value <= high:
            refuse(value, place, name, f"expected a whole number from {low:,} to {high:,}")

    return check


def number(low: float, high: float) -> Check:
    """A number from `low` to `high`."""

    def check(value: Any, place: str, name: str) -> None:
        if type(value) not in (int, float) or not low <= value <= high:
            refuse(value, place, name, f"expected a number from {low:g} to {high:g}")

    return check


def one_of(*known: str) -> Check:
    """One of some words."""

    def check(value: Any, place: str, name: str) -> None:
        if not isinstance(value, str) or value not in known:
            refuse(value, place, name, f"but only {', '.join(known)} are known here")

    return check


def fits(accepts: Callable[[Any], bool], what: str) -> Check:
    """A value that a function accepts."""

    def check(value: Any, place: str, name: str) -> None:
        if not accepts(value):
            refuse(value, place, name, f"expected {what}")

    return check


def either(first: Check, second: Check) -> Check:
    """A value that passes one of two checks; the second one's words are shown."""

    def check(value: Any, place: str, name: str) -> None:
        try:
            first(value, place, name)
        except MetadataError:
            second(value, place, name)

    return check


def listing(each: Check, most: int, least: int = 1, unique: bool = False) -> Check:
    """A list of `least` to `most` values, `unique` if none may be there twice."""

    def check(value: Any, place: str, name: str) -> None:
        if not isinstance(value, list) or not least <= len(value) <= most:
            refuse(value, place, name, f"expected a list of {least:,} to {most:,} values")
        for item in value:
            each(item, place, name)
        if unique and len(set(value)) < len(value):
            refuse(value, place, name, "which has something twice")

    return check


def table(value_check: Check, most: int = 1_000) -> Check:
    """An object from labels to values."""

    def check(value: Any, place: str, name: str) -> None:
        if not isinstance(value, dict) or not 1 <= len(value) <= most:
            refuse(value, place, name, f"expected an object of 1 to {most:,} values")
        for key, item in value.items():
            label(key, place, name)
            value_check(item, name, key)

    return check


def record(
    checks: Mapping[str, Check], required: tuple[str, ...] = (), words: str | None = None
) -> Check:
    """An object with known keys; `words` is what it is called in a message."""

    def check(value: Any, place: str, name: str) -> None:
        if not isinstance(value, dict):
            refuse(value, place, name, "expected an object")
        inside = words or name
        for key in required:
            if key not in value:
                raise MetadataError(f"its {inside} has no {key}")
        for key, item in value.items():
            if key not in checks:
                raise MetadataError(f"its {inside} has {ascii(key)[:60]}, which is not known here")
            checks[key](item, inside, key)

    return check


def nothing(value: Any, place: str, name: str) -> None:
    """The value null."""
    if value is not None:
        refuse(value, place, name, "expected null")


label = fits(is_label, "a text of one line")
folder = fits(is_folder_name, "the name of a folder")
yes_or_no = fits(lambda value: isinstance(value, bool), "true or false")
digest = fits(
    lambda value: isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None,
    "a sha256",
)
timm_name = fits(
    lambda value: isinstance(value, str) and re.fullmatch(r"\w+(\.\w+)?", value, re.A) is not None,
    "the name of an architecture of timm",
)


# The whole configuration


def check_config(config: dict[str, Any]) -> None:
    """Raise MetadataError unless all that is ever read of a configuration is as it should be.

    Values that no script knows are left alone.
    """
    if not config:  # weights that others publish
        return
    net: Any = config.get("net")
    label(net, "configuration", "net")
    for name, value in config.items():
        if name in FIELDS:
            FIELDS[name](value, "configuration", name)
    check_arguments(net, config.get("arguments", {}))
    check_schedule(net, config)
    check_noise_levels(config)
    check_counts(net, config)


def check_arguments(net: str, arguments: Any) -> None:
    """Raise MetadataError for arguments that the constructor of the network does not have."""
    if net in ARGUMENTS:
        ARGUMENTS[net](arguments, "configuration", "arguments")
        return
    # Of networks that are not in the table, all arguments are sizes.
    if not isinstance(arguments, dict):
        refuse(arguments, "configuration", "arguments", "expected an object")
    for name, value in arguments.items():
        WIDTH(value, "network", name)


def check_schedule(net: str, config: dict[str, Any]) -> None:
    """Raise MetadataError for a noise schedule that cannot be meant."""
    fixed = "has no noise schedule of 1,000 steps"  # as a text-to-image model always has
    if "schedule" not in config:
        return
    try:
        SCHEDULE(config["schedule"], "configuration", "schedule")
        schedule = Schedule.from_config(config["schedule"])
    except ValueError as error:
        reason = f"its noise schedule is not usable ({error})"
        raise MetadataError(fixed if net == "text_to_image" else reason) from None
    if schedule.alpha_bar[-1] < LEAST_SIGNAL:
        raise MetadataError("its noise schedule is not usable (too many steps for such β)")
    if net == "text_to_image" and schedule.T != 1_000:
        raise MetadataError(fixed)


def check_noise_levels(config: dict[str, Any]) -> None:
    """Raise MetadataError for noise levels that cannot be meant."""
    if "noise_levels" not in config:
        return
    try:
        NoiseLevels(**config["noise_levels"])
    except ValueError as error:
        raise MetadataError(f"its noise levels are not usable ({error})") from None


def check_counts(net: str, config: dict[str, Any]) -> None:
    """Raise MetadataError where a list of names does not fit the size of the network."""
    arguments = config.get("arguments", {})
    unet = arguments.get("unet", arguments) if net == "latent_unet" else arguments
    classes = unet.get("n_classes", 0)
    if classes and "domains" in config and 10 * len(config["domains"]) != classes:
        raise MetadataError(f"it has {classes} classes, but {len(config['domains'])} domains")
    side = arguments.get("autoencoder", arguments).get("size") if net in FACES else None
    if side is not None and config.get("size", side) != side:
        raise MetadataError(f"it is for images of {side} pixels, but says {config['size']}")
    names = config.get("attributes")
    counted = unet.get("n_attributes", 10 if net == "noisy_classifier" else 0)
    if names is not None and len(names) != counted:
        raise MetadataError(f"it has {counted} attributes, but the names of {len(names)}")
    if net == "adaptation":
        check_classes(config)
    if "measured" in config:
        check_measured(config["measured"], arguments.get("attributes"))


def check_classes(config: dict[str, Any]) -> None:
    """Raise MetadataError if a network for adaptation does not fit its classes and domains."""
    classes = config.get("arguments", {}).get("classes", 10)
    names = config.get("class_names")
    if names is not None and len(names) != classes:
        raise MetadataError(f"it has {classes} classes, but the names of {len(names)}")
    if config.get("photographs") is False:  # then its domains are folders of the data folder
        for name in ("source", "target"):
            folder(config.get(name), "configuration", name)


def check_measured(measured: dict[str, Any], attributes: list[str] | None) -> None:
    """Raise MetadataError for accuracies on real faces that do not fit one another."""
    rows = measured["attributes"]
    if attributes is not None and list(rows) != attributes:
        raise MetadataError("it was measured with other attributes than it has")
    if not set(measured["not_measurable"]) <= set(rows):
        raise MetadataError("it was measured with other attributes than it has")
    if measured["balanced_accuracy"] is not None and measured["interval"] is None:
        raise MetadataError("its measured accuracy has no interval")
    for name, row in rows.items():
        if row["balanced"] is not None and row["interval"] is None:
            raise MetadataError(f"its measured accuracy of {name} has no interval")
        if row["measurable"] and not row["balanced"]:
            raise MetadataError(f"its measured accuracy of {name} is missing or 0")


# What a configuration may say. Real networks stay far below the limits.

SIZE = whole(1, 1_024)  # pixels
WIDTH = whole(1, 65_536)
COUNT = whole(0, 10_000)  # of classes or attributes
TEN = whole(10, 10)  # digits
CHANNELS = whole(1, 1_024)
PERCENT = number(0, 100)
STEPS = whole(2, 1_000_000)
LEVELS = listing(whole(1, 64), most=8)
INTERVAL = either(nothing, listing(PERCENT, least=2, most=2))
RATE = either(nothing, PERCENT)
COUNTED = whole(0, MOST_IMAGES)

SCHEDULE = record(
    {
        "steps": STEPS,
        "kind": one_of(*get_args(AnyKind)),
        "beta_start": number(0, 1),
        "beta_end": number(0, 1),
        "rule": one_of(*get_args(Rule)),
        "as_given": yes_or_no,  # of older files
        "prediction": one_of(*get_args(Prediction)),
        "counted_to": whole(1, 1_000_000),
    }
)
MEASURED_ROW = record(
    {
        "positives": COUNTED,
        "negatives": COUNTED,
        "positive_rate": RATE,
        "negative_rate": RATE,
        "balanced": RATE,
        "interval": INTERVAL,
        "measurable": yes_or_no,
    },
    required=(
        *("positives", "negatives", "positive_rate", "negative_rate"),
        *("balanced", "interval", "measurable"),
    ),
)
MEASURED = {
    "balanced_accuracy": RATE,
    "interval": INTERVAL,
    "images": COUNTED,
    "not_measurable": listing(label, most=10_000, least=0, unique=True),
    "attributes": table(MEASURED_ROW),
}
FIELDS = {
    "seed": whole(0, LARGEST_SEED),
    "size": SIZE,
    "domains": listing(folder, most=1_000, unique=True),
    "sampling": record(
        {
            "spacing": one_of(*get_args(Spacing)),
            "save_range": one_of("minmax", "fixed"),
            "clamp": one_of(*get_args(Clamp)),
        }
    ),
    "noise_levels": record(
        {
            "sigma_min": number(0, 1e6),
            "sigma_max": number(0, 1e6),
            "sigma_data": number(0, 1e6),
            "parametrization": one_of(*get_args(Parametrization)),
        },
        required=("sigma_min", "sigma_max", "sigma_data"),
        words="noise_levels",
    ),
    "init": digest,
    "decoder": digest,
    # Faces by attribute
    "attributes": listing(label, most=10_000, unique=True),
    "shares": table(PERCENT),
    "weights": table(number(0, 1e6)),
    "states": label,
    "trained_on": listing(label, most=MOST_IMAGES, least=0),
    "start": fits(lambda value: isinstance(value, str) and len(value) <= 1_000, "a short text"),
    "face_size": SIZE,
    "measured": record(MEASURED, required=tuple(MEASURED)),
    # Adaptation and other classifiers
    "source": label,
    "target": label,
    "domain": folder,
    "method": label,
    "photographs": yes_or_no,
    "class_names": listing(label, most=10_000, unique=True),
    # CLIP
    "preprocess": record(
        {
            "mean": listing(number(-10, 10), least=3, most=3),
            "std": listing(number(0.001, 10), least=3, most=3),
            "interpolation": one_of("bicubic", "bilinear", "random"),
            "resize_mode": one_of("shortest", "longest", "squash"),
        }
    ),
    "vocabulary": listing(whole(0, MOST_TOKENS - 1), most=MOST_TOKENS, unique=True),
}

# Arguments of the constructors, by the names of the networks


def arguments_of(checks: Mapping[str, Check]) -> Check:
    """The check of a constructor's arguments. Which of them must be there, it knows itself."""
    return record(checks, words="network")


DDIM_UNET = arguments_of(
    {
        "in_channels": CHANNELS,
        "size": SIZE,
        "width": WIDTH,
        "multipliers": LEVELS,
        "attention": listing(whole(0, 1_024), most=16, least=0),
        "blocks": whole(1, 100),
        "dropout": number(0, 1),
        "n_classes": COUNT,
        "patch": SIZE,
        "n_attributes": COUNT,
    }
)
AUTOENCODER = arguments_of(
    {
        "in_channels": CHANNELS,
        "size": SIZE,
        "latent_channels": CHANNELS,
        "encoder_width": WIDTH,
        "decoder_width": WIDTH,
    }
)
GENERATOR = arguments_of({"latent": WIDTH, "width": WIDTH})
CLIP_VISION = arguments_of(
    {
        "image_size": SIZE,
        "timm_model_name": timm_name,
        "timm_pool": one_of("avg", "token", "map", "abs_attn", "rot_attn", ""),
        "timm_proj": one_of("linear", "mlp", "none", ""),
        "width": WIDTH,
        "head_width": WIDTH,
        "patch_size": SIZE,
        "mlp_ratio": number(0.1, 16),
        "layers": either(whole(1, 100), listing(whole(1, 100), least=4, most=4)),
    }
)
CLIP_TEXT = arguments_of(
    {
        "context_length": whole(1, 1_024),
        "vocab_size": whole(1, MOST_TOKENS),
        "width": WIDTH,
        "heads": whole(1, 256),
        "layers": whole(1, 100),
    }
)
ARGUMENTS = {
    "ddim_unet": DDIM_UNET,
    "autoencoder": AUTOENCODER,
    "latent_unet": arguments_of({"unet": DDIM_UNET, "autoencoder": AUTOENCODER}),
    "noisy_classifier": arguments_of(
        {"unet": DDIM_UNET, "n_attributes": COUNT, "dropout": number(0, 1)}
    ),
    "attribute_classifier": arguments_of(
        {"attributes": listing(label, most=10_000, unique=True), "input_size": SIZE}
    ),
    "context_unet": arguments_of(
        {
            "in_channels": CHANNELS,
            "n_feat": WIDTH,
            "n_classes": COUNT,
            "flipped_one_hot": yes_or_no,
        }
    ),
    "attention_unet": arguments_of({"in_channels": CHANNELS, "width": WIDTH, "n_classes": COUNT}),
    "generator": GENERATOR,
    "projection": GENERATOR,
    "cnn": arguments_of({"classes": TEN}),
    "deep": arguments_of(
        {"classes": TEN, "width": WIDTH, "hidden": whole(0, 65_536), "grey": yes_or_no}
    ),
    "adaptation": arguments_of(
        {
            "backbone": one_of(*get_args(BackboneName)),
            "classes": COUNT,
            "place": one_of(*get_args(Place)),
            "size": whole(1, 4_096),
            "width": WIDTH,
            "frozen": whole(0, 10),
            "dense": WIDTH,
            "hidden": whole(0, 65_536),
        }
    ),
    "digit_classifier": arguments_of({}),
    "digit_resnet": arguments_of({"classes": TEN, "width": WIDTH}),
    "scene_classifier": arguments_of({"traits": table(whole(1, 1_000)), "width": WIDTH}),
    "text_to_image": arguments_of(
        {
            "vocabulary": FIELDS["vocabulary"],
            "size": SIZE,
            "patch": whole(1, 64),
            "width": WIDTH,
            "multipliers": LEVELS,
            "attention_levels": listing(whole(0, 8), most=8, least=0),
            "blocks": whole(1, 16),
            "heads": whole(1, 256),
            "text_width": WIDTH,
            "text_layers": whole(1, 100),
            "length": whole(1, 1_024),
        }
    ),
    "clip": arguments_of({"embed_dim": WIDTH, "vision_cfg": CLIP_VISION, "text_cfg": CLIP_TEXT}),
}
