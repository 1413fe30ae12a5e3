"""One page of everything that `run_all.sh` left in its output directory, and its tables as markdown, csv and LaTeX.

    python report.py output          # writes output/report.html and output/report/*.{md,csv,tex}

The page holds its images and needs no other file; its order and prose are in reporting/report.html.j2. Every figure is
read from the output directory, but for the course's bars and what course reports reached, which stand below.
"""

from __future__ import annotations

import itertools
import operator
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import jinja2
import numpy as np
import torch
from tyro.conf import Positional

from common.figures import save_csv
from common.run import ROOT, atomic_write, command_line, make_output_dir
from models.gan import GENERATORS, Critic, Discriminator
from reporting.output import COURSE, SYNTHETIC, Output, Row, Table

# How a figure must stand to the course's lower and higher bar (hand-outs, graders' scripts), the year of the hand-out,
# and the best that public course reports of 2022 to 2024 tell.
BARS = {
    "fid": ("≤", (30, 27), "2022", "22.97"),
    "faces": ("≥", (85, 90), "2022", "92.2 (with FID 25.66)"),
    "mnistm": ("≥", (90, 95), "2023; in 2022 80 / 88", "99.5 to 100"),
    "digits": ("≥", (90, 95), "2024", "99.5 to 100"),
    "mse": ("<", (20,), "2023, 2024", "1.27"),
    "svhn": ("≥", (40, 42), "2022, 2023", "64.5 (epoch chosen by target labels)"),
    "usps": ("≥", (76, 78), "2022, 2023", "90.4 (epoch chosen by target labels)"),
    "clip": ("", (), "", "56.64 (OpenAI's ViT-B-32, the course's 50 classes)"),
    "": ("", (), "", ""),
}
IMAGES = {"fid": 1_000, "faces": 1_000, "mnistm": 500, "digits": 500, "mse": 10}  # that a verdict needs at least
COMPARISONS = {"≤": operator.le, "<": operator.lt, "≥": operator.ge}
METHODS = {"dcgan": "DCGAN", "wgangp": "WGAN-GP"}
NAMES = {"mnistm": "MNIST-M", "svhn": "SVHN", "usps": "USPS"}
HEADER = ["figure", "ours", "to compare with", "reports' best", "course's bars", "verdict"]


@dataclass
class Report:
    """Write OUTPUT_DIR/report.html and OUTPUT_DIR/report/."""

    output_dir: Positional[Path]  # What run_all.sh wrote: p1/, p2/, p3/ and steps/, or some of them.


def number(value: float | None, before: str = "", after: str = "") -> str:
    """A figure with two decimals between two texts; nothing if there is none."""
    return "" if value is None else f"{before}{value:,.2f}{after}"


def compare(
    name: str,
    value: float | None,
    beside: str,
    bar: str,
    origin: str,
    why: str = "",
    judge: str = "",
    spread: str = "",
    images: int | None = None,
) -> Row:
    """A row under HEADER. `why` a figure is absent.

    No bar is passed on other data than the course's, before another judge than the graders', or by too few images.
    """
    sign, levels, note, best = BARS[bar]
    bars = f"{' / '.join(f'{sign} {level:g}' for level in levels)} ({note})" if levels else ""
    if value is None:
        verdict = f"not measured: {why or 'not run'}"
    else:
        passed = sum(COMPARISONS[sign](value, level) for level in levels)
        verdict = "fail" if not passed else "pass" if passed == len(levels) else f"pass {passed} of {len(levels)}"
        if not levels or judge:
            verdict = "no bar" if not levels else "none"
        elif images is not None and images < IMAGES[bar]:
            verdict = f"none: {images:,} images, {IMAGES[bar]:,} are needed"
        verdict = origin if origin == SYNTHETIC or (levels and origin != COURSE) else verdict
        verdict += f"; {judge}" if judge else ""
    return [name, number(value, after=spread), beside, best, bars, verdict]


def p1_tables(output: Output) -> dict[str, Table]:
    """GANs: FID and face rate of both methods; the settings in which they differ."""
    rows, arguments = [HEADER], {method: output.arguments(f"p1/{method}") for method in METHODS}
    for method, name in METHODS.items():
        results = [output.json(path) for path in sorted(output.folder.glob(f"p1/score/{method}-*/result.json"))]
        scores = {result.get("metric"): result for result in results}
        fid, other = scores.get("FID", {}), scores.get("random-feature Fréchet distance", {})
        why = "PROFILE=full runs it, by the weights of its Inception net" if other else ""
        random = f"random-feature distance (not FID), {name}"
        for score, label, bar in ((fid, f"FID, {name}", "fid"), (other, random, "")):
            beside, origin = number(score.get("floor"), "other real images "), output.origin_of(score, "real")
            images = (score.get("images") or {}).get("generated")
            rows.append(compare(label, score.get("distance"), beside, bar, origin, why, images=images))
        faces = scores.get("exactly one face", {})
        beside = number((faces.get("real") or {}).get("one_face_percent"), "real images ")
        label, origin = f"exactly one face, {name}, %", output.origin_of(faces, "real")
        found = faces.get("one_face_percent")
        rows.append(compare(label, found, beside, "faces", origin, images=faces.get("images")))
    differing = []
    if all(arguments.values()):
        keys = sorted({**arguments["dcgan"], **arguments["wgangp"]}.keys() - {"output_dir"})
        cells = ([key, *(str(told.get(key, "no such option")) for told in arguments.values())] for key in keys)
        differing = [["option", *METHODS.values()], *(row for row in cells if row[1] != row[2])]
    differing = ("Settings in which the two runs differ", differing)
    return {"p1_gan": ("Generated faces", rows), "p1_differences": differing}


def architectures(output: Output) -> list[tuple[str, str]]:
    """The nets of both GANs as PyTorch prints them, each under its name and number of parameters."""
    printed = []
    for method, name in METHODS.items():
        if told := output.arguments(f"p1/{method}"):
            options = {key: told[key] for key in ("width", "norm", "spectral") if key in told}
            generator, judge = GENERATORS[told.get("net", "generator")], Discriminator if method == "dcgan" else Critic
            with torch.device("meta"):  # takes no memory for the weights
                nets = generator(width=told["width"]), judge(**options)
            counts = [sum(parameter.numel() for parameter in net.parameters()) for net in nets]
            told = [f"{type(net).__name__} of {name}: {n:,} parameters" for net, n in zip(nets, counts, strict=True)]
            printed += zip(told, map(str, nets), strict=True)
    return printed


def p2_tables(output: Output) -> dict[str, Table]:
    """DDPM: what the judges say of each domain's digits. DDIM: the graders' error, if their images are there."""
    rows, told = [HEADER], output.arguments("p2/digits")
    domains = told.get("domains", ["mnistm", "svhn"])
    scores = [output.json(f"p2/score/{domain}/result.json") for domain in domains]
    course = output.json("p2/score/course/result.json")  # of the MNIST-M digits, by the course's classifier
    if course and "mnistm" in domains:
        scores[domains.index("mnistm")] = course
    judges = ["" if score.get("net") == "DigitClassifier" else "independent judge" for score in scores]
    for domain, score, judge in zip(domains, scores, judges, strict=True):
        name, origin = NAMES.get(domain, domain), output.origin(told.get("data_dir"), f"digits/{domain}/data")
        beside = number(score.get("real_accuracy"), "real images ")
        bar = "mnistm" if domain == "mnistm" else ""
        found, images = score.get("accuracy"), score.get("images")
        rows.append(compare(f"accuracy, {name}, %", found, beside, bar, origin, judge=judge, images=images))
        beside = number(score.get("real_diversity_sd"), "sets of real images 100 ± ")
        share = score.get("diversity_percent_of_real")
        rows.append(compare(f"diversity, {name}, % of real images'", share, beside, "", origin))
    if len(domains) > 1:
        found = [score.get("accuracy") for score in scores]
        mean = None if None in found else sum(found) / len(found)
        origin = output.origin(told.get("data_dir"), *(f"digits/{domain}/data" for domain in domains))
        images = min(score.get("images", 0) for score in scores)
        label = "mean accuracy of the domains, %"
        rows.append(compare(label, mean, "", "digits", origin, judge=max(judges), images=images))
    tables = {"p2_ddpm": ("Generated digits before their judges", rows)}
    paths = sorted(output.folder.glob("p2/score/*/result.json"))
    score = next((found for path in paths if (found := output.json(path)).get("score") == "mse"), {})
    why, origin = "needs the course's UNet.pt and face/GT", output.origin_of(score, "truth")
    label, images = "mean squared error to the given images, 0 to 255", len(score.get("images", ()))
    row = compare(label, score.get("mse"), "", "mse", origin, why, images=images)
    return tables | {"p2_ddim": ("Faces from the given noises", [HEADER, row])}


def p3_tables(output: Output) -> dict[str, Table]:
    """DANN: mean accuracy of all seeds on each target, beside training on source and on target only. CLIP: accuracy."""
    rows, found, data_dir = [HEADER], defaultdict(list), None
    for path in sorted(output.folder.glob("p3/*-seed*/config.json")):  # those of p3_dann.py table
        told = output.json(path).get("arguments", {})
        if "method" in told:
            data_dir = told.get("data_dir")
            for domain, accuracy in output.json(path.with_name("result.json")).get("accuracy", {}).items():
                found[told.get("net"), domain, told["method"]].append(accuracy)
    for net, target in itertools.product(sorted({net for net, *_ in found}) or ["deep"], ("svhn", "usps")):
        values = {method: found[net, target, method] for method in ("source", "dann", "target")}
        means = {method: float(np.mean(some)) if some else None for method, some in values.items()}
        spread = f" ± {np.std(values['dann'], ddof=1):.2f}" if values["dann"][1:] else ""
        beside = [number(means["source"], "source only "), number(means["target"], "trained on target ")]
        origin = output.origin(data_dir, "digits/mnistm/data", f"digits/{target}/data")
        label = f"DANN, MNIST-M → {NAMES[target]}, {net} net, runs: {len(values['dann'])}, %"
        rows.append(compare(label, means["dann"], "; ".join(filter(None, beside)), target, origin, spread=spread))
    told = output.table("p3/table.csv", "Trained on source, adapted, trained on target, beside three course reports")
    tables = {"p3_dann": ("Domain adaptation", rows), "p3_dann_methods": told}
    result = output.json("p3/clip/result.json")
    origin = output.origin(result.get("arguments", {}).get("data_dir"), "clip_zeroshot/val")
    low, high = result.get("interval", (None, None))
    beside = number(result.get("chance"), "chance ") + number(low, "; 95 % interval ") + number(high, " to ")
    label = f"accuracy, {result.get('model', 'CLIP')}, prompts: {result.get('templates', 'course')}, %"
    row = compare(label, result.get("accuracy"), beside, "clip", origin)
    told = output.table("p3/clip/table.csv", "Zero-shot classification by all sets of prompts")
    return tables | {"p3_clip": ("Zero-shot classification", [HEADER, row]), "p3_clip_prompts": told}


def record_tables(output: Output) -> dict[str, Table]:
    """What was run: commands with their seconds, runs with seed and hardware, versions, data."""
    notes = sorted((output.folder / "steps").glob("*.txt"), key=lambda path: path.stat().st_mtime_ns)
    steps = [[path.stem, *[*path.read_text().splitlines(), "", ""][:2]] for path in notes]
    runs, versions = [["run", "seed", "hardware", "commit", "seconds"]], defaultdict(set)
    files = (f"{level}/{name}.json" for level in ("*/*", "*/*/*") for name in ("config", "result"))
    for path in sorted(path for pattern in files for path in output.folder.glob(pattern)):
        told = output.json(path)
        if hardware := told.get("hardware"):
            seconds = told.get("seconds", output.json(path.with_name("result.json")).get("seconds"))
            machine = "{device} ({name}), {precision}, processes: {processes}, threads: {threads}".format(**hardware)
            seed, commit = str(told.get("arguments", {}).get("seed", "")), str(told.get("git_commit"))[:10]
            name, took = str(path.parent.relative_to(output.folder)), number(seconds) or "unfinished"
            runs.append([name, seed, machine, commit, took])
            for package, version in told.get("versions", {}).items():
                versions[package].add(version)
    data = [[part, origin, str(made or ""), folder] for (folder, part), (origin, made) in output.origins.items()]
    versions = [["package", "version"], *([package, " / ".join(sorted(some))] for package, some in versions.items())]
    tables = {"steps": ("Commands, in order", [["step", "command", "seconds of the last sitting"], *steps])}
    tables |= {"runs": ("Runs and scores", runs), "versions": ("Versions", versions)}
    return tables | {"data": ("Data", [["part", "origin", "made.json", "folder"], *data])}


def main(args: Report) -> Path:
    """Write the page and the tables; returns the path of the page."""
    output = Output(args.output_dir)
    tables = p1_tables(output) | p2_tables(output) | p3_tables(output) | record_tables(output)
    figures = [row for _, rows in tables.values() if rows[:1] == [HEADER] for row in rows]
    output.missing += [["textual inversion", "not a part of this yet"]]
    output.missing += [[r[0], r[-1].split(": ", 1)[1]] for r in figures if r[-1].startswith("not measured")]
    loader, styles = jinja2.FileSystemLoader(ROOT / "reporting"), {"trim_blocks": True, "lstrip_blocks": True}
    styles |= {"undefined": jinja2.StrictUndefined, "autoescape": lambda name: name.endswith(".html.j2")}
    templates = jinja2.Environment(loader=loader, keep_trailing_newline=True, **styles)
    options = {"output": output, "tables": tables, "architectures": architectures(output)}
    text = templates.get_template("report.html.j2").render(**options)
    tables["missing"] = ("Not measured or left out", [["part", "why"], *output.missing])
    page, folder = output.folder / "report.html", make_output_dir(output.folder / "report", "OUTPUT_DIR")
    atomic_write(page, text)
    for name, (title, rows) in tables.items():
        if rows:
            save_csv(rows, folder / f"{name}.csv")
            for suffix in ("md", "tex"):
                text = templates.get_template(f"table.{suffix}.j2").render(name=name, title=title, rows=rows)
                atomic_write(folder / f"{name}.{suffix}", text)
    print(f"{page} ({page.stat().st_size / 1e6:.1f} MB), tables in {folder}")
    return page


if __name__ == "__main__":
    command_line(Report, main)
