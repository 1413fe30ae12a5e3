r"""Make a folder of a released network that huggingface_hub.upload_folder takes.

    python tools/hub.py wgangp_faces --output-dir hub/wgangp_faces \
        --figure docs/faces_wgangp.png

README.md is the network's card with a header that the Hub reads: licence, data, metrics, task.
Beside it lie model.safetensors, its configuration (config.json) and an example. Nothing is
uploaded. The header comes from the card alone. tools/release.py writes it too, and --update-card
puts it on top of an older card.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common.cli import UserError, run_cli
from common.data import decode_image
from common.files import ROOT, atomic_write, make_output_dir
from common.json_files import FileError, parse_json, read_text
from common.metadata import MetadataError, read_config

HEADER = re.compile(r"---\n.*?\n---\n\n", re.DOTALL)  # at the start of a card
NON_COMMERCIAL = "non-commercial"  # in the terms of data
DRAWN = "drawn by prepare_data.py synthetic"
# Where the terms of a data set are, by its name on a card. MNIST-M combines two.
TERMS = {
    "CelebA": "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html",
    "SVHN": "http://ufldl.stanford.edu/housenumbers/",
    "MNIST-M": "https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/bsds/",
    "MNIST": "http://yann.lecun.com/exdb/mnist/",
    "USPS": "https://www.csie.ntu.edu.tw/~cjlin/libsvmtools/datasets/multiclass.html#usps",
}
# Words for the Hub's search, by the network's name in its configuration.
TAGS = {
    "generator": ["gan"],
    "projection": ["gan"],
    "cnn": ["domain-adaptation"],
    "deep": ["domain-adaptation"],
    "adaptation": ["domain-adaptation"],
    "context_unet": ["diffusion"],
    "attention_unet": ["diffusion"],
    "ddim_unet": ["diffusion"],
    "latent_unet": ["diffusion", "latent-diffusion"],
    "text_to_image": ["diffusion"],
    "noisy_classifier": ["classifier-guidance"],
}
# The Hub's name of the task. Networks that make images by class or attribute have none there.
TASKS = {
    "generator": "unconditional-image-generation",
    "projection": "unconditional-image-generation",
    "context_unet": "unconditional-image-generation",
    "attention_unet": "unconditional-image-generation",
    "ddim_unet": "unconditional-image-generation",
    "latent_unet": "unconditional-image-generation",
    "text_to_image": "text-to-image",
    "cnn": "image-classification",
    "deep": "image-classification",
    "adaptation": "image-classification",
    "digit_classifier": "image-classification",
    "digit_resnet": "image-classification",
    "attribute_classifier": "image-classification",
    "scene_classifier": "image-classification",
    "clip": "zero-shot-image-classification",
}
# Words in a card's table of results, and what the header calls the metric.
METRICS = {
    "accuracy": "accuracy",
    "Fréchet distance": "frechet-distance",
    "KID": "kernel-distance",
    "exactly one face": "face-rate",
    "hit rate": "hit-rate",
}


@dataclass
class Folder:
    """Make a folder of the released network NAME."""

    name: Annotated[Positional[str], arg(metavar="NAME")]
    """Name of the release: NAME.safetensors and its card NAME.md are read."""
    output_dir: Path
    """Folder to write to, with nothing else in it."""
    figure: Path | None = None
    """An example of what the network makes, which the card shows: a PNG file."""
    checkpoints: Path = ROOT / "checkpoints"
    """Folder of the releases."""
    update_card: bool = False
    """Also write the header on top of the card in --checkpoints."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", self.name):
            raise UserError(f"NAME {self.name!r}: must consist of letters, digits, _ and -")
        if self.figure is not None and self.figure.suffix != ".png":
            raise UserError(f"--figure {self.figure}: must end in .png")


def with_header(card: str) -> str:
    """A card with a header for the Hub on top; one that it has is replaced.

    Raises FileError if the card's configuration is damaged.
    """
    from huggingface_hub import ModelCardData

    text = HEADER.sub("", card, count=1) if card.startswith("---\n") else card
    header = ModelCardData(**facts_of(text)).to_yaml()
    return f"---\n{header}\n---\n\n{text}"


def facts_of(card: str) -> dict[str, Any]:
    """What the header says, read from the tables of a card."""
    rows = dict(re.findall(r"^\| ([\w ]+) \| (.*) \|$", card, flags=re.MULTILINE))
    terms = rows.get("terms of the data", "")
    config = config_on(rows)
    net = config.get("net", "")
    tags = ["pytorch", *TAGS.get(net, [])]
    tags += [config["method"]] if "method" in config else []
    facts: dict[str, Any] = {**licence_of(terms), "library_name": "pytorch"}

    arguments = config.get("arguments", {})
    arguments = arguments.get("unet", arguments)
    if arguments.get("n_classes"):
        tags.append("class-conditional")
    elif arguments.get("n_attributes") and net != "noisy_classifier":
        tags.append("attribute-conditional")
    elif net in TASKS:
        facts["pipeline_tag"] = TASKS[net]
    if "content" in rows:  # learned words, which have no configuration
        tags.append("textual-inversion")
    facts["tags"] = tags

    sets = [name.lower() for name in names_of(terms)]
    if sets:
        facts["datasets"] = sets
    results = re.findall(r"^\| (?:half|full)\b.*$", card, flags=re.MULTILINE)
    metrics = [name for words, name in METRICS.items() if any(words in row for row in results)]
    if metrics:
        facts["metrics"] = metrics
    return facts


def config_on(rows: dict[str, str]) -> dict[str, Any]:
    """The network's configuration on a card; empty for a card without one. Raises FileError."""
    found = re.match(r"`(\{.*\})`", rows.get("network", ""))
    config: dict[str, Any] = parse_json(found[1]) if found else {}
    arguments = config.get("arguments", {})
    if not isinstance(arguments, dict) or not isinstance(arguments.get("unet", {}), dict):
        raise FileError("has arguments that are no object")
    for key in ("net", "method"):
        if not isinstance(config.get(key, ""), str):
            raise FileError(f"has a {key} that is no text")
    return config


def names_of(terms: str) -> list[str]:
    """The real data sets in a card's line of terms: "CelebA: non-commercial research; …"."""
    names = []
    for part in terms.split("; "):
        name = part.partition(": ")[0]
        if DRAWN not in part and name:
            names.append(name)
    return names


def licence_of(terms: str) -> dict[str, str]:
    """The licence of weights: MIT if all data was drawn here, else the terms of their data.

    It is unknown if that is so of the terms of a data set.
    """
    names = names_of(terms)
    if not terms or any(name not in TERMS for name in names):
        return {"license": "unknown"}
    if not names:
        return {"license": "mit"}
    strict = [part.partition(": ")[0] for part in terms.split("; ") if NON_COMMERCIAL in part]
    name = "non-commercial-research" if strict else "terms-of-the-data"
    return {
        "license": "other",
        "license_name": name,
        "license_link": TERMS[(strict or names)[0]],
    }


def with_figure(card: str) -> str:
    """A card with example.png below its title."""
    return re.sub(r"^(# .*\n)", r"\1\n![Examples](example.png)\n", card, count=1, flags=re.M)


def main(args: Folder) -> None:
    """Read everything, then write the folder, then the card."""
    weights = args.checkpoints / f"{args.name}.safetensors"
    card_file = args.checkpoints / f"{args.name}.md"
    for file in (weights, card_file, *([args.figure] if args.figure else [])):
        if not file.is_file():
            raise UserError(f"{file}: no such file")
    try:
        config = read_config(weights)
    except MetadataError as error:
        raise UserError(f"{weights}: {error}") from None
    text = read_text(card_file)
    try:
        card = with_header(text)
    except FileError as error:
        raise UserError(
            f"{card_file}: the configuration in its row of the network {error}"
        ) from None

    contents: dict[str, bytes | str] = {"model.safetensors": weights.read_bytes()}
    if config:
        contents["config.json"] = json.dumps(config, indent=2) + "\n"
    contents["README.md"] = card
    if args.figure is not None:
        decode_image(args.figure)  # raises UserError for a broken one
        contents["example.png"] = args.figure.read_bytes()
        contents["README.md"] = with_figure(card)
    make_output_dir(args.output_dir)
    strays = {path.name for path in args.output_dir.iterdir()} - set(contents)
    if strays:  # upload_folder would take them too
        raise UserError(f"--output-dir {args.output_dir}: contains {min(strays)}; remove it first")
    for name, content in contents.items():
        atomic_write(args.output_dir / name, content)
    if args.update_card:
        atomic_write(card_file, card)
    print(f"{', '.join(contents)}: {args.output_dir}")


if __name__ == "__main__":
    run_cli(Folder, main)
