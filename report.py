"""One page of everything that `run_all.sh` wrote, and its tables as markdown, csv and LaTeX.

    python report.py output          # writes output/report.html and output/report/*.{md,csv,tex}

The page contains its images and needs no other file. Its order and its text are in
reporting/report.html.j2. Every number is read from the output directory, except the course's bars
and what course reports reached (reporting/verdicts.py).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from common.cli import IncompleteError, UserError, run_cli
from common.figures import save_csv
from common.files import ROOT, atomic_write, make_output_dir
from reporting.architectures import gan_networks, network_of
from reporting.output import Output, Table
from reporting.tables import all_tables, clean, clean_rows
from reporting.verdicts import HEADER

# Such as -0.05, +3 %, 1,000.5 and -1.20 ± 0.30; and a dash alone.
PLAIN_NUMBER = re.compile(r"[-+]?[0-9][0-9,]*([.][0-9]+)?(e[-+]?[0-9]+)?( ?%)?( ± [0-9.,]+)?|-")


@dataclass
class Report:
    """Write OUTPUT_DIR/report.html and OUTPUT_DIR/report/."""

    output_dir: Annotated[Positional[Path], arg(metavar="OUTPUT_DIR")]
    """What run_all.sh wrote: p1/, p2/, p3/ and steps/, or some of them."""


def main(args: Report) -> Path:
    """Write the page and the tables; returns the path of the page.

    Raises IncompleteError, after both are written, if something that was found is broken.
    """
    output = Output(args.output_dir)
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
