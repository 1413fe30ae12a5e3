"""One page of everything that `run_all.sh` wrote, and its tables as markdown, csv and LaTeX.

    python report.py output          # writes output/report.html and output/report/*.{md,csv,tex}
    python report.py output other    # writes other/comparison.html: both side by side

The page contains its images and needs no other file. Its order and its text are in
reporting/report.html.j2. Every number is read from the output directory, except the course's bars
and what course reports reached (reporting/verdicts.py).
"""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from tyro.conf import Positional, arg

from common.cli import IncompleteError, UserError, run_cli
from common.figures import save_csv
from common.files import ROOT, atomic_write, make_output_dir
from reporting.architectures import gan_networks, network_of
from reporting.comparison import compare
from reporting.output import Output, Table
from reporting.tables import all_tables, clean, clean_rows
from reporting.verdicts import HEADER

# Such as -0.05, +3 %, 1,000.5 and -1.20 ± 0.30; and a dash alone.
PLAIN_NUMBER = re.compile(r"[-+]?[0-9][0-9,]*([.][0-9]+)?(e[-+]?[0-9]+)?( ?%)?( ± [0-9.,]+)?|-")


@dataclass
class Report:
    """Write OUTPUT_DIR/report.html and OUTPUT_DIR/report/, or compare two directories."""

    output_dir: Annotated[Positional[Path], arg(metavar="OUTPUT_DIR")]
    """What run_all.sh wrote: p1/, p2/, p3/ and steps/, or some of them."""
    other_dir: Annotated[Positional[Path | None], arg(metavar="OTHER_DIR")] = None
    """Another such directory: OTHER_DIR/comparison.html sets both side by side."""


class Script(NamedTuple):
    """The script of a page, and its hash, without which browsers do not run it."""

    text: str
    hash: str


def main(args: Report) -> Path:
    """Write one page; returns its path."""
    if args.other_dir is None:
        return write_report(args.output_dir)
    return write_comparison(args.output_dir, args.other_dir)


def write_report(output_dir: Path) -> Path:
    """Write the page and the tables; returns the path of the page.

    Raises IncompleteError, after both are written, if something that was found is broken.
    """
    output = Output(output_dir)
    if (output.folder / "report").is_symlink():  # it would lead elsewhere
        raise UserError(f"{output.folder / 'report'}: is a link; remove it first")
    tables = all_tables(output)
    output.missing += not_measured(tables)
    templates = load_templates()
    text = templates.get_template("report.html.j2").render(
        output=output,
        tables=tables,
        gan_networks=gan_networks(output),
        network_of=partial(network_of, output),
        script=load_script(),
    )
    # Rendering the page has added the images that are missing.
    missing = clean_rows([["part", "why"], *output.missing])
    tables["missing"] = Table("Not measured or left out", missing)

    folder = make_output_dir(output.folder / "report", "OUTPUT_DIR")
    page = output.folder / "report.html"
    atomic_write(page, text.encode("utf-8", "replace"))
    for name, table in tables.items():
        if table.rows:
            write_table(name, table, folder, templates)
    print(f"{page} ({page.stat().st_size / 1e6:.1f} MB), tables in {folder}")
    if output.broken:
        raise IncompleteError(f"left out of {page}: {'; '.join(map(clean, output.broken))}")
    return page


def write_comparison(first_dir: Path, second_dir: Path) -> Path:
    """Write SECOND_DIR/comparison.html; returns its path. Raises as `write_report`."""
    first = Output(first_dir)
    second = Output(second_dir)
    if first.folder.resolve() == second.folder.resolve():
        raise UserError(
            f"OTHER_DIR {second_dir}: is the same directory; there is nothing to compare"
        )
    tables, figures = compare(first, second)
    text = (
        load_templates()
        .get_template("comparison.html.j2")
        .render(
            first=clean(first_dir),
            second=clean(second_dir),
            tables=tables,
            figures=figures,
            script=load_script(),
        )
    )
    page = make_output_dir(second.folder, "OTHER_DIR", alone=False) / "comparison.html"
    atomic_write(page, text.encode("utf-8", "replace"))
    print(f"{page} ({page.stat().st_size / 1e6:.1f} MB)")
    broken = first.broken + second.broken
    if broken:
        raise IncompleteError(f"left out of {page}: {'; '.join(map(clean, broken))}")
    return page


def load_script() -> Script:
    """The script of both pages. The pages allow it alone, by its hash."""
    text = (ROOT / "reporting" / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return Script(text, f"sha256-{digest}")


def not_measured(tables: dict[str, Table]) -> list[list[str]]:
    """The measures without a number, each with its reason."""
    missing = []
    for table in tables.values():
        if table.rows[:1] != [HEADER]:
            continue
        for name, *_, verdict in table.rows[1:]:
            if verdict.startswith("not measured: "):
                missing.append([name, verdict.removeprefix("not measured: ")])
    return missing


def load_templates() -> Any:
    """The jinja2 environment of reporting/; the page's values are escaped."""
    import jinja2

    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(ROOT / "reporting"),
        undefined=jinja2.StrictUndefined,
        autoescape=lambda name: name is not None and name.endswith(".html.j2"),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def write_table(name: str, table: Table, folder: Path, templates: Any) -> None:
    """Write a table as csv, markdown and LaTeX."""
    rows = [[defused(cell) for cell in row] for row in table.rows]
    save_csv(rows, folder / f"{name}.csv")
    for suffix in ("md", "tex"):
        template = templates.get_template(f"table.{suffix}.j2")
        text = template.render(name=name, title=table.title, rows=table.rows)
        atomic_write(folder / f"{name}.{suffix}", text)


def defused(cell: str) -> str:
    """A cell that no spreadsheet takes for a formula; plain numbers stay as they are."""
    if cell.lstrip()[:1] in ("=", "+", "-", "@") and not PLAIN_NUMBER.fullmatch(cell):
        return f"'{cell}"
    return cell


if __name__ == "__main__":
    run_cli(Report, main)
