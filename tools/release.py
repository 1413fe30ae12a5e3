r"""Cut a release from a finished run: checkpoints/NAME.safetensors in half precision, and its card.

    python tools/release.py runs/p1/dcgan dcgan_faces \
        --results full=full/result.json half=half/result.json

The same run gives the same bytes, and `load_net` loads them into float32. For results of the half
precision: release, evaluate what was released, and release again. A network for latents has its
autoencoder in the file; --decoder puts a decoder in it that was trained further since
(p2_autoencoder.py train --decoder-only).
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import safetensors.torch
import torch
from torch import Tensor, nn
from tyro.conf import Positional, arg

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common.checkpoints import load_net, load_weights
from common.cli import UserError, run_cli
from common.files import ROOT, atomic_write
from diffusion.schedule import Schedule
from models.adaptation import AdaptationNet
from models.autoencoder import Autoencoder
from models.dann import DannDeep
from models.latent_unet import LatentUnet
from models.nets import NETS
from tools.hub import with_header
from zeroshot.loading import load_clip

CAPTIONED = ("text_to_image", "scene_classifier", "clip")  # networks that learn from captions
MOST_BYTES = 16_000_000
# By domain: its folder in the data folder, its name, and its terms.
DATA = {
    "mnistm": (
        "digits/mnistm",
        "MNIST-M",
        "digits of MNIST on photographs of BSDS500 (non-commercial research)",
    ),
    "svhn": ("digits/svhn", "SVHN", "non-commercial research"),
    "usps": ("digits/usps", "USPS", "public"),
    "mnist": ("digits/mnist", "MNIST", "CC BY-SA 3.0"),
    "faces": ("face", "CelebA", "non-commercial research"),
    "captioned": ("captioned", "captioned images", "not known here"),
}
# The domains that a network for domain adaptation has seen, as the roles in its configuration.
SEEN = {
    "source": ["source"],
    "target": ["target"],
    "dann": ["source", "target"],
    "adaptation": ["source", "target"],
    "digit_resnet": ["domain"],
}
# The keys of a result.json that a card shows.
RESULTS = (
    r"distance|floor|(floor_)?subset_(mean|sd)|(real )?one_face_percent|"
    r"(real_)?accuracy( \w+)?|diversity_percent_of_real|mse|accuracy_t\d|"
    r"(real_)?balanced_(accuracy|hit_rate)|percent_of_real|oracle_best_accuracy_target|"
    r"guidance \d+ \w+"
)
# Parts of a configuration that the card shows in lines of their own.
APART = ("trained_on", "measured", "shares", "weights")


@dataclass
class Release:
    """Write NAME.safetensors and NAME.md."""

    run_dir: Annotated[Positional[Path], arg(metavar="RUN_DIR")]
    """A finished run, with config.json, metrics.jsonl, result.json and model.safetensors."""
    name: Annotated[Positional[str], arg(metavar="NAME")]
    """Name of the release."""
    results: tuple[str, ...] = ()
    """LABEL=FILE each: a result.json of evaluate.py, and what it evaluated (full, half, …)."""
    note: tuple[str, ...] = ()
    """Paragraphs for the card."""
    data_dir: Path | None = None
    """The data folder of the run, if it is not where the run read it."""
    decoder: Path | None = None
    """model.safetensors of p2_autoencoder.py, whose decoder replaces that of the network."""
    output_dir: Path = ROOT / "checkpoints"
    """Folder to write to."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", self.name):
            raise UserError(f"NAME {self.name!r}: must consist of letters, digits, _ and -")


def load(path: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The network of a run, and its configuration. A CLIP is open_clip's class, not ours."""
    _, about = load_weights(path, "RUN_DIR")
    if about.get("net") == "clip":
        return load_clip("ViT-B-32", "openai", path, "RUN_DIR").net, about
    return load_net(path, NETS, "RUN_DIR")


def without_domain_classifier(
    net: nn.Module, about: dict[str, Any]
) -> tuple[nn.Module, dict[str, Any]]:
    """The network and its configuration without a domain classifier, which only training needs."""
    if not isinstance(net, AdaptationNet | DannDeep):
        return net, about
    about = about | {"arguments": about["arguments"] | {"hidden": 0}}
    smaller = type(net)(**about["arguments"])
    weights = net.state_dict()
    smaller.load_state_dict({key: weights[key] for key in smaller.state_dict()})
    return smaller.eval(), about


def halve(net: nn.Module) -> tuple[dict[str, Tensor], str]:
    """The weights with parameters in float16, and a line that says how they are stored.

    Buffers stay as they are. A parameter stays in float32 if a number overflows, or if so many
    underflow that the norm of the error exceeds 2 ** -11 of the tensor's, the most that rounding
    alone can cause. Single numbers below 3e-8 among larger ones become 0.
    """
    buffers = dict(net.named_buffers()).keys() & net.state_dict().keys()  # those that are stored
    stored = {}
    zeros = 0
    halves = 0
    for key, value in net.state_dict().items():
        stored[key] = value
        if key in buffers:
            continue
        half = value.half()
        error = (half.double() - value).norm()
        if error <= 2**-11 * value.double().norm():  # false for inf and nan
            stored[key] = half
            halves += 1
            zeros += int(((half == 0) & (value != 0)).sum())
    too_wide = len(stored) - len(buffers) - halves
    line = (
        f"{halves} tensors in float16 ({zeros:,} of their numbers, below 3e-8, became 0); "
        f"unchanged: {len(buffers)} buffers, {too_wide} too wide for float16"
    )
    return stored, line


def replace_decoder(net: nn.Module, path: Path) -> str:
    """Put the decoder of an autoencoder's file into a network for latents; returns its hash.

    The hash is the sha256 of the file. Raises UserError for a network without latents, and for an
    autoencoder of other sizes or with another encoder, whose latents would be others.
    """
    if not isinstance(net, LatentUnet):
        raise UserError(f"--decoder {path}: is for a network in latents, which RUN_DIR's is not")
    other, _ = load_net(path, {"autoencoder": Autoencoder}, "--decoder")
    ours = net.autoencoder.state_dict()
    theirs = other.state_dict()
    if other.config != net.autoencoder.config:
        raise UserError(f"--decoder {path}: is an autoencoder of other sizes than RUN_DIR's")
    for name, value in ours.items():
        if not name.startswith("decoder.") and not torch.equal(value, theirs[name]):
            raise UserError(f"--decoder {path}: has another encoder than RUN_DIR's ({name})")
    net.autoencoder.decoder.load_state_dict(other.decoder.state_dict())
    return hashlib.sha256(path.read_bytes()).hexdigest()


def describe_sampling(about: dict[str, Any]) -> dict[str, str]:
    """The card's lines about a diffusion model: its noise levels, its samplers' defaults."""
    facts = {}
    if "schedule" in about:
        schedule = Schedule.from_config(about["schedule"])
        kind = f"linear ({schedule.rule})" if schedule.kind == "linear" else schedule.kind
        facts["noise levels"] = f"{schedule.T:,} steps, {kind}; predicts {schedule.prediction}"
    levels = about.get("noise_levels")
    if levels:
        facts["noise levels"] = (
            f"σ from {levels['sigma_max']:.4g} to {levels['sigma_min']:.4g}, "
            f"data's deviation {levels['sigma_data']:.3g}; {levels['parametrization']}"
        )
    sampling = about.get("sampling")
    if sampling:
        facts["sampling"] = ", ".join(f"{name} {value}" for name, value in sampling.items())
    return facts


def describe_attributes(about: dict[str, Any]) -> dict[str, str]:
    """The card's lines about attributes: how rare, how weighted, how well a classifier sees them.

    The names of the faces that a classifier has learned from are in the file itself.
    """
    facts = {}
    if "trained_on" in about:
        names = sorted(about["trained_on"])
        facts["learned from"] = (
            f"{len(names):,} faces, listed in the file: {names[0]} … {names[-1]}"
        )
    if "shares" in about:
        facts["attributes"] = ", ".join(
            f"{name} {share:.1f} % of the faces (weight {about['weights'][name]:.2f})"
            for name, share in about["shares"].items()
        )
    if "measured" in about:
        facts["balanced accuracy of each"] = "; ".join(
            f"{name} {row['balanced']:.1f} % ({row['interval'][0]:.1f} to {row['interval'][1]:.1f})"
            for name, row in about["measured"]["attributes"].items()
            if row["balanced"] is not None
        )
    return facts


def describe_data(about: dict[str, Any], folder: Path) -> dict[str, str]:
    """What a network with this configuration was trained on, and the terms of that data.

    The data must be in `folder`; UserError otherwise.
    """
    domains = about.get("domains")
    if not domains:
        if about.get("photographs"):
            raise UserError("RUN_DIR: was trained on photographs, whose terms are not known here")
        roles = SEEN.get(about.get("method") or about.get("net", ""), [])
        default = "captioned" if about.get("net") in CAPTIONED else "faces"
        domains = [about[role] for role in roles] or [default]
    terms = {}
    for domain in domains:
        part, name, term = DATA.get(domain, (f"digits/{domain}", domain, "not known here"))
        if not (folder / part).is_dir():
            raise UserError(
                f"{folder / part}: no such folder; --data-dir says where the data is now"
            )
        if any('"synthetic"' in made.read_text() for made in (folder / part).glob("made.json")):
            name = f"drawn {name}" if domain == "captioned" else f"{name}-like images"
            term = "drawn by prepare_data.py synthetic"
        terms[name] = f"{name}: {term}"
    # Only the classifier that measures has learned from some of val, too.
    split = "train and val" if "measured" in about else "train"
    return {
        "data": f"{', '.join(terms)}: {split} split",
        "terms of the data": "; ".join(terms.values()),
    }


def result_row(label: str, result: dict[str, Any]) -> str:
    """The card's line for a result.json of evaluate.py or of a run; empty if it has no number."""
    values = dict(result)
    for key, part in result.items():
        if isinstance(part, dict):
            for name, value in part.items():
                values[f"{key} {name}"] = value
    numbers = []
    for name, value in values.items():
        if re.fullmatch(RESULTS, name) and isinstance(value, int | float):
            numbers.append(f"{name.replace('_', ' ')} {value:.2f}")
    if not numbers:
        return ""
    measured = ", ".join(result[key] for key in ("metric", "features", "net") if key in result)
    images = result.get("images", "")
    if isinstance(images, dict):  # of a distance: one number for each side
        images = images.get("generated")
    command = "its own"
    if "command" in result:
        command = f"`python {strip_folders(result['command'])}`"
    return f"| {label} | {measured} | {', '.join(numbers)} | {images} | {command} |"


def strip_folders(command: str) -> str:
    """A command without the absolute folders of another machine; a file keeps its own folder.

    /home/me/data/face/val becomes data/face/val, /tmp/run/model.safetensors run/model.safetensors.
    """

    def shorten(match: re.Match[str]) -> str:
        path = Path(match[0])
        kept = 1
        if path.parent.name in ("face", "digits"):
            kept = 3
        elif path.suffix not in ("", ".py"):
            kept = 2
        return "/".join(path.parts[1:][-kept:])

    return re.sub(r"(?:^|(?<=[ =]))/[^ ]+", shorten, command)


def read_results(args: Release, own: dict[str, Any]) -> list[str]:
    """The card's lines of results: the run's own, then those of --results.

    Raises UserError for a file without results.
    """
    own = {name: value for name, value in own.items() if name != "distance"}  # a critic's estimate
    rows = [result_row("full, by the run itself", own)]
    for text in args.results:
        label, _, file = text.partition("=")
        row = ""
        if file:
            row = result_row(label, json.loads(Path(file).read_text()))
        if not row:
            raise UserError(
                f"--results {text}: must be LABEL=FILE, where FILE is a result.json of evaluate.py"
            )
        rows.append(row)
    return [row for row in rows if row]


def main(args: Release) -> None:
    """Check everything, then write the weights, then the card."""
    config = json.loads((args.run_dir / "config.json").read_text())
    result = json.loads((args.run_dir / "result.json").read_text())
    history = (args.run_dir / "metrics.jsonl").read_text().splitlines()
    last = json.loads(history[-1])
    whole, about = load(args.run_dir / "model.safetensors")
    net, about = without_domain_classifier(whole, about)
    left_out = "" if net is whole else "; without the domain classifier"
    decoder = replace_decoder(net, args.decoder) if args.decoder else ""
    if decoder:
        about = about | {"decoder": decoder}
    stored, how_stored = halve(net)
    content = safetensors.torch.save(stored, {"config": json.dumps(about)})
    if len(content) > MOST_BYTES:
        raise UserError(
            f"RUN_DIR {args.run_dir}: {len(content):,} bytes in half precision, over {MOST_BYTES:,}"
        )
    given = config["arguments"]
    card = describe_data(about, args.data_dir or Path(given["data_dir"]))
    rows = read_results(args, result)

    numbers = sum(value.numel() for value in stored.values())
    digest = hashlib.sha256(content).hexdigest()
    versions = f"commit {config['git_commit']}, torch {config['versions']['torch']}"
    hardware = json.dumps(config["hardware"])[1:-1].replace('"', "")
    card["file"] = f"`{args.name}.safetensors`, {len(content):,} bytes, sha256 `{digest}`"
    shown = {name: value for name, value in about.items() if name not in APART}
    card["network"] = f"`{json.dumps(shown)}`, {numbers:,} numbers"
    card |= describe_attributes(about)
    card["stored"] = how_stored + left_out
    card["command"] = f"`python {strip_folders(config['command'])}`, {versions}"
    card["run"] = (
        f"seed {given['seed']}, epochs {last['epoch']}, "
        f"steps {last['step']:,} of {given['batch_size']} images"
    )
    if "init" in about:
        card["initialised from"] = f"the weights of sha256 `{about['init']}`"
    if decoder:
        card["decoder"] = f"that of an autoencoder's file of sha256 `{decoder}`, not RUN_DIR's"
    card |= describe_sampling(about)
    card["hardware"] = f"{result['seconds'] / 3600:.2f} hours on {hardware}"

    weights_file = args.output_dir / f"{args.name}.safetensors"
    atomic_write(weights_file, content)
    atomic_write(args.output_dir / f"{args.name}.md", card_text(args, card, rows))
    print(f"{weights_file} and its card: {len(content):,} bytes; {how_stored}")


def card_text(args: Release, card: dict[str, str], rows: list[str]) -> str:
    """The card as markdown: a header for the Hub, the notes, a table of facts, one of results."""
    lines = [f"# {args.name}\n"]
    lines += [f"{paragraph}\n" for paragraph in args.note]
    lines += ["| | |", "| --- | --- |"]
    lines += [f"| {name} | {value} |" for name, value in card.items()]
    if rows:
        lines += [
            "",
            "| weights | measured | results | images | command |",
            "| --- | --- | --- | --- | --- |",
            *rows,
        ]
    return with_header("\n".join(lines) + "\n")


if __name__ == "__main__":
    run_cli(Release, main)
