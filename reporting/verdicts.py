"""A row of the report's tables: our number beside the course's bars, with a verdict."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

from reporting.output import COURSE, SYNTHETIC, Row

HEADER = ["measure", "ours", "to compare with", "reports' best", "course's bars", "verdict"]
COMPARISONS = {"≤": operator.le, "<": operator.lt, "≥": operator.ge}


@dataclass(frozen=True)
class Bar:
    """The course's bars for one measure, and the best that public course reports reached."""

    sign: str = ""
    """How a number must compare with the levels: ≤, < or ≥."""
    levels: tuple[float, ...] = ()
    """The lower and the higher bar, from hand-outs and graders' scripts."""
    year: str = ""
    """The year of the hand-out."""
    best: str = ""
    """The best number in public course reports of 2022 to 2024."""
    images: int = 0
    """The number of images that a verdict needs at least."""

    def __str__(self) -> str:
        if not self.levels:
            return ""
        levels = " / ".join(f"{self.sign} {level:g}" for level in self.levels)
        return f"{levels} ({self.year})"


NO_BAR = Bar()
BARS = {
    "fid": Bar("≤", (30, 27), "2022", "22.97", images=1_000),
    "faces": Bar("≥", (85, 90), "2022", "92.2 (with FID 25.66)", images=1_000),
    "mnistm": Bar("≥", (90, 95), "2023; in 2022 80 / 88", "99.5 to 100", images=500),
    "digits": Bar("≥", (90, 95), "2024", "99.5 to 100", images=500),
    "mse": Bar("<", (20,), "2023, 2024", "1.27", images=10),
    "svhn": Bar("≥", (40, 42), "2022, 2023", "64.5 (epoch chosen by target labels)"),
    "usps": Bar("≥", (76, 78), "2022, 2023", "90.4 (epoch chosen by target labels)"),
    "clip": Bar(best="56.64 (OpenAI's ViT-B-32, the course's 50 classes)"),
}


@dataclass(kw_only=True)
class Measure:
    """One number of ours, and what its verdict depends on."""

    name: str
    """What was measured."""
    value: float | None
    """The number; None if it was not measured."""
    origin: str
    """Where the data came from, as `Output.origin` says."""
    bar: Bar = NO_BAR
    """The course's bars for it."""
    beside: str = ""
    """What it compares with."""
    spread: str = ""
    """Its standard deviation in words, printed after it."""
    why: str = "not run"
    """The reason if it was not measured."""
    classifier: str = ""
    """The classifier that measured it, if it is not the graders'."""
    images: int | None = None
    """How many images were measured."""

    def __post_init__(self) -> None:
        refuse_other(self.value)
        refuse_other(self.images)

    def row(self) -> Row:
        """The row under HEADER."""
        value = number(self.value, after=self.spread)
        return [self.name, value, self.beside, self.bar.best, str(self.bar), self.verdict()]

    def verdict(self) -> str:
        """Pass or fail, or why there is no such verdict.

        No bar is passed on other data than the course's, before another classifier than the
        graders', or with too few images.
        """
        if self.value is None:
            return f"not measured: {self.why}"
        verdict = self.origin
        if self.origin == COURSE or (not self.bar.levels and self.origin != SYNTHETIC):
            verdict = self.verdict_on_course_data(self.value)
        return f"{verdict}; {self.classifier}" if self.classifier else verdict

    def verdict_on_course_data(self, value: float) -> str:
        """The verdict if the data is the course's."""
        levels = self.bar.levels
        if not levels:
            return "no bar"
        if self.classifier:
            return "none"
        if self.images is not None and self.images < self.bar.images:
            return f"none: {self.images:,} images, {self.bar.images:,} are needed"
        compare = COMPARISONS[self.bar.sign]
        passed = sum(compare(value, level) for level in levels)
        if passed == 0:
            return "fail"
        if passed == len(levels):
            return "pass"
        return f"pass {passed} of {len(levels)}"


def number(value: float | None, before: str = "", after: str = "") -> str:
    """A number with two decimals between two texts; empty if there is none."""
    refuse_other(value)
    if value is None:
        return ""
    return f"{before}{value:,.2f}{after}"


def refuse_other(value: Any) -> None:
    """Raise TypeError for a value of a file that is no number; true and false are none either."""
    if value is not None and type(value) not in (int, float):
        raise TypeError(f"{value!r} is not a number")
