"""Two output directories side by side: their numbers, options and figures."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from reporting.output import RELEASED_TITLE, Output, Row, Table
from reporting.tables import all_tables, clean, clean_rows
from reporting.verdicts import HEADER

# Such as -0.05, +3 %, 1,000.5, 1e-05, and -1.20 ± 0.30, of which the first number counts.
NUMBER = re.compile(
    r"(?P<value>[-+]?[0-9][0-9,]*([.](?P<decimals>[0-9]+))?(e[-+]?[0-9]{1,3})?)( ?%)?( ± [0-9.,]+)?"
)
# Tables without results.
NOT_COMPARED = (
    "released",
    "p1_differences",
    "p2_face_settings",
    "steps",
    "runs",
    "versions",
    "data",
)
MOST_OPTIONS = 2_000  # rows of options that differ
# The figures that are set side by side, with what they show.
FIGURES = {
    "p1/first32_dcgan.png": "Faces by DCGAN",
    "p1/first32_wgangp.png": "Faces by WGAN-GP",
    "p1/dcgan/figures/curves.png": "Training of DCGAN",
    "p1/wgangp/figures/curves.png": "Training of WGAN-GP",
    "p2/figures/mnistm_grid.png": "MNIST-M digits by DDPM",
    "p2/figures/svhn_grid.png": "SVHN digits by DDPM",
    "p2/digits/figures/curves.png": "Training of the digits' DDPM",
    "p2/ddim/eta_grid.png": "Faces with DDIM by eta",
    "p2/figures/face-ddpm/faces_x0.png": "Faces with DDPM at ten steps",
    "p2/figures/score-based/denoised.png": "Faces with the score-based model at ten noise levels",
    "p2/figures/guided/attributes.png": "Faces by attribute",
    "p3/figures/svhn/tsne_domain.png": "t-SNE by domain, MNIST-M → SVHN",
    "p3/figures/usps/tsne_domain.png": "t-SNE by domain, MNIST-M → USPS",
    "p3/clip/cases.png": "Zero-shot classification",
    "p3/inversion/together.png": "Two learned words in one prompt",
}


class Pair(NamedTuple):
    """A figure of both directories, each as `Output.image` has it, or None."""

    what: str
    first: dict[str, Any] | None
    second: dict[str, Any] | None


def compare(first: Output, second: Output) -> tuple[dict[str, Table], list[Pair]]:
    """The tables of the comparison by their names, and the figures that either directory has."""
    ours = all_tables(first)
    theirs = all_tables(second)
    tables = {}
    for name, table in ours.items():
        if name not in NOT_COMPARED:
            title = (table.title or theirs[name].title).removesuffix(RELEASED_TITLE)
            rows = compared_rows(table, theirs[name])
            tables[name] = Table(title, clean_rows(rows) if len(rows) > 1 else [])
    options = clean_rows(compared_options(first, second))
    tables["options"] = Table("Options that differ", options if len(options) > 1 else [])
    figures = []
    for name, what in FIGURES.items():
        if first.has(name) or second.has(name):
            found = [
                output.image(name, what, "plot") if output.has(name) else None
                for output in (first, second)
            ]
            figures.append(Pair(what, *found))
    return tables, figures


def compared_rows(first: Table, second: Table) -> list[Row]:
    """A row for each number that either table has: its name, both values, and the difference."""
    ours = numbers_of(first)
    theirs = numbers_of(second)
    rows = [["measure", named("first", first), named("second", second), "second − first"]]
    for name in [*ours, *(name for name in theirs if name not in ours)]:
        one = ours.get(name, "")
        other = theirs.get(name, "")
        rows.append([name, one, other, difference(one, other)])
    return rows


def named(side: str, table: Table) -> str:
    """The name of a side's column, which says so if its numbers are a released network's."""
    return f"{side} (released network)" if table.title.endswith(RELEASED_TITLE) else side


def numbers_of(table: Table) -> dict[str, str]:
    """The cells that are a number, by row and column; of the report's tables only ours."""
    if not table.rows:
        return {}
    header = table.rows[0]
    cells = {}
    for row in table.rows[1:]:
        for column, cell in zip(header[1:], row[1:], strict=True):
            if header == HEADER and column != "ours":
                continue
            if value_of(cell) is not None:
                name = row[0] if header == HEADER else f"{row[0]}: {column}"
                while name in cells:  # rows may have the same first cell
                    name += " (again)"
                cells[name] = cell
    return cells


def value_of(cell: str) -> float | None:
    """The number in a cell; None if there is more than one, or something else."""
    found = NUMBER.fullmatch(cell)
    return float(found["value"].replace(",", "")) if found else None


def difference(one: str, other: str) -> str:
    """The second number minus the first, with as many decimals as the more precise one."""
    a = value_of(one)
    b = value_of(other)
    if a is None or b is None:
        return ""
    if a == b:
        return "0"
    decimals = max(decimals_of(one), decimals_of(other))
    text = f"{b - a:+,.{decimals}f}"
    return text if value_of(text) else f"{b - a:+.2g}"


def decimals_of(cell: str) -> int:
    """How many decimals the number in a cell has, at most 6."""
    found = NUMBER.fullmatch(cell)
    return min(6, len(found["decimals"] or "")) if found else 0


def compared_options(first: Output, second: Output) -> list[Row]:
    """The options that differ between runs of the same name."""
    rows = [["run: option", "first", "second"]]
    names = {}  # in their order, each once
    for output in (first, second):
        for level in ("p[123]/*", "p[123]/*/*"):
            for path in sorted(output.folder.glob(f"{level}/config.json")):
                names[str(path.parent.relative_to(output.folder))] = None
    for name in names:
        ours = first.arguments(name)
        theirs = second.arguments(name)
        if not ours or not theirs:
            continue
        for option in [*ours, *(option for option in theirs if option not in ours)]:
            one = ours.get(option, "not there")
            other = theirs.get(option, "not there")
            if one != other and option not in ("output_dir", "data_dir"):
                rows.append([f"{name}: {option}", clean(one), clean(other)])
    return rows[: MOST_OPTIONS + 1]
