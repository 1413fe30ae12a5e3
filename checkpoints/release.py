"""Cut a release from a finished run: checkpoints/NAME.safetensors in half precision and its card, NAME.md.

    python checkpoints/release.py runs/p1/dcgan dcgan_faces --figures full=full/result.json half=half/result.json

Same run, same bytes; `load_net` loads them into float32. Figures of half precision: release, score, release again.
"""

import hashlib
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from tyro.conf import Positional

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common.run import UserError, atomic_write, command_line, load_net
from models import dann, gan
from p2_ddpm_infer import NETS as U_NETS

NETS = gan.GENERATORS | dann.NETS | U_NETS
MOST_BYTES = 16_000_000
DATA = {  # by domain: folder in the data folder, name, terms
    "mnistm": ("digits/mnistm", "MNIST-M", "digits of MNIST on photographs of BSDS500 (non-commercial research)"),
    "svhn": ("digits/svhn", "SVHN", "non-commercial research"),
    "usps": ("digits/usps", "USPS", "public"),
    "faces": ("face", "CelebA", "non-commercial research"),
}
FIGURES = r"distance|floor|(real )?one_face_percent|(real_)?accuracy( \w+)?|diversity_percent_of_real|mse"


@dataclass
class Release:
    """Write NAME.safetensors and NAME.md."""

    run_dir: Positional[Path]  # A finished run: config.json, metrics.jsonl, result.json, model.safetensors.
    name: Positional[str]  # Of the release.
    figures: tuple[str, ...] = ()  # LABEL=FILE each: a result.json of score.py, and whose it is (full, half, …).
    note: tuple[str, ...] = ()  # Lines for the card.
    data_dir: Path | None = None  # Where the run's data lies now, if not where the run read it.
    output_dir: Path = Path(__file__).resolve().parent  # Where to write.


def halve(net: torch.nn.Module) -> tuple[dict[str, torch.Tensor], str]:
    """Parameters in float16, buffers as they are, and a line that says how many are stored how.

    A tensor stays in float32 if a number overflows, or if so many underflow that the error's norm exceeds 2 ** -11 of
    the tensor's, the most that rounding alone can make. Single numbers below 3e-8 among larger ones become 0.
    """
    buffers, stored, zeros = dict(net.named_buffers()), {}, 0
    for key, value in net.state_dict().items():
        half = value.half() if key not in buffers else value
        fits = (half.double() - value).norm() <= 2**-11 * value.double().norm()  # false for inf and nan
        stored[key] = half if fits else value
        zeros += int(((stored[key] == 0) & (value != 0)).sum())
    halves = sum(value.dtype == torch.half for value in stored.values())
    line = f"{halves} tensors in float16 ({zeros:,} of their numbers, below 3e-8, became 0); unchanged: {len(buffers)} "
    return stored, f"{line}buffers, {len(stored) - len(buffers) - halves} too wide for float16"


def describe_data(about: dict, folder: Path) -> dict[str, str]:
    """What the net of this description was trained on, and the terms of that data, which must lie in `folder`."""
    used, terms = {"source": ["source"], "target": ["target"], "dann": ["source", "target"]}, {}
    for domain in about.get("domains") or [about[role] for role in used.get(about.get("method"), [])] or ["faces"]:
        part, name, term = DATA.get(domain, (f"digits/{domain}", domain, "not known here"))
        if not (folder / part).is_dir():
            raise UserError(f"{folder / part}: no such folder; --data-dir says where the run's data lies now")
        if any('"synthetic"' in made.read_text() for made in (folder / part).glob("made.json")):
            name, term = f"{name}-like images", "drawn by prepare_data.py synthetic"
        terms[name] = f"{name}: {term}"
    return {"data": f"{', '.join(terms)}: train split", "terms of the data": "; ".join(terms.values())}


def figure_row(label: str, result: dict) -> str:
    """A card's line of the figures in a result.json, of score.py or of a run; empty if there are none."""
    nested = {f"{key} {name}": v for key, part in result.items() if isinstance(part, dict) for name, v in part.items()}
    found = {name: value for name, value in (result | nested).items() if re.fullmatch(FIGURES, name)}
    told = [f"{name.replace('_', ' ')} {value:.2f}" for name, value in found.items() if isinstance(value, int | float)]
    by = ", ".join(result[key] for key in ("metric", "features", "net") if key in result)
    images = result.get("images", "")  # a number, or one for each side of a distance
    images = images.get("generated") if isinstance(images, dict) else images
    command = f"`python {strip_folders(result['command'])}`" if "command" in result else "its own"
    return f"| {label} | {by} | {', '.join(told)} | {images} | {command} |" if told else ""


def strip_folders(command: str) -> str:
    """A command without the absolute folders of another machine, which help nobody; a file keeps its own folder."""

    def shorten(match: re.Match) -> str:
        path = Path(match[0])
        inner = 2 if path.parent.name in ("face", "digits") else path.suffix not in ("", ".py")
        return "/".join(path.parts[1:][-1 - inner :])  # data/face/val, run/model.safetensors, script.py

    return re.sub(r"(?:^|(?<=[ =]))/[^ ]+", shorten, command)


def main(args: Release) -> None:
    """Check everything, then write the weights, then the card."""
    files = [(args.run_dir / name).read_text() for name in ("config.json", "result.json", "metrics.jsonl")]
    config, result, last = (json.loads(text) for text in (*files[:2], files[2].splitlines()[-1]))
    net, about = load_net(args.run_dir / "model.safetensors", NETS, "RUN_DIR")
    stored, line = halve(net)
    content = safetensors.torch.save(stored, {"config": json.dumps(about)})
    if len(content) > MOST_BYTES:
        raise UserError(f"RUN_DIR {args.run_dir}: {len(content):,} bytes in half precision, over {MOST_BYTES:,}")
    given = config["arguments"]
    data = describe_data(about, args.data_dir or Path(given["data_dir"]))
    own = {name: value for name, value in result.items() if name != "distance"}  # a critic's estimate is another one
    rows = [figure_row("full, by the run itself", own)]
    for label, _, file in (figure.partition("=") for figure in args.figures):
        rows.append(figure_row(label, json.loads(Path(file).read_text()) if file else {}))
        if not rows[-1]:
            raise UserError(f"--figures {label}={file}: must be LABEL=FILE, the file a result.json of score.py")
    versions = f"commit {config['git_commit']}, torch {config['versions']['torch']}"
    card = data | {
        "file": f"`{args.name}.safetensors`, {len(content):,} bytes, sha256 `{hashlib.sha256(content).hexdigest()}`",
        "net": f"`{json.dumps(about)}`, {sum(w.numel() for w in stored.values()):,} numbers",
        "stored": line,
        "command": f"`python {strip_folders(config['command'])}`, {versions}",
        "run": f"seed {given['seed']}, epochs {last['epoch']}, steps {last['step']:,} of {given['batch_size']} images",
        **({"begun with": f"the weights of sha256 `{about['init']}`"} if "init" in about else {}),
        "hardware": f"{result['seconds'] / 3600:.2f} hours on {json.dumps(config['hardware'])[1:-1]}".replace('"', ""),
    }
    lines = [f"# {args.name}\n", *(f"{text}\n" for text in args.note), "| | |", "| --- | --- |"]
    lines += [f"| {name} | {value} |" for name, value in card.items()]
    if any(rows):
        header = ["", "| weights | judged by | figures | images | command |", "| --- | --- | --- | --- | --- |"]
        lines += header + [row for row in rows if row]
    atomic_write(args.output_dir / f"{args.name}.safetensors", content)
    atomic_write(args.output_dir / f"{args.name}.md", "\n".join(lines) + "\n")
    print(f"{args.output_dir / args.name}.safetensors and .md: {len(content):,} bytes; {line}")


if __name__ == "__main__":
    command_line(Release, main)
