"""benchmarks/digit_samplers.py: its rows, what it continues and what it refuses."""

import csv
import dataclasses
import sys

import pytest
import torch

from common.run import ROOT, UserError
from models.context_unet import ContextUnet
from models.digit_classifier import DigitResNet
from tests.conftest import save_net

sys.path.insert(0, str(ROOT / "benchmarks"))
import digit_samplers


@pytest.fixture
def table(data_dir, tmp_path) -> digit_samplers.Table:
    torch.manual_seed(0)
    schedule = {"steps": 6, "kind": "cosine"}
    net = save_net(ContextUnet(3, 8, 10), tmp_path / "net.safetensors", domains=["mnistm"], schedule=schedule)
    judge = save_net(DigitResNet(width=8), tmp_path / "judge.safetensors")
    options = {"data_dir": data_dir, "domains": ("mnistm",), "classifiers": (judge,), "device": "cpu"}
    options |= {"samplers": ("ddim-3", "ddpm"), "guidances": (0.0,), "per_class": 2, "ddpm_per_class": 1}
    return digit_samplers.Table(checkpoint=net, output_dir=tmp_path / "table", precision="fp32", **options)


def test_rows_are_measured_once_and_further_ones_added(table, monkeypatch):
    digit_samplers.main(table)
    rows = digit_samplers.main(dataclasses.replace(table, guidances=(0.0, 2.0)))
    found = [(row["sampler"], row["steps"], row["guidance"], row["per_class"], row["evaluations"]) for row in rows]
    expected = [("ddim", 3, 1.0, 2, 6), ("ddpm", 6, 1.0, 1, 12), ("dpm-solver++", 6, 0.0, 2, 6)]
    assert found == [*expected, ("dpm-solver++", 6, 2.0, 2, 12)]
    assert all(0 <= row["domains"]["mnistm"]["accuracy"] <= 100 and row["seconds"] > 0 for row in rows)
    with (table.output_dir / "table.csv").open() as file:
        cells = list(csv.reader(file))
    assert [row[0] for row in cells[1:]] == ["ddpm", "ddim", "dpm-solver++", "dpm-solver++", "real images"]
    monkeypatch.setattr(digit_samplers, "measure", None)  # nothing is measured again
    assert digit_samplers.main(table) == rows


def test_another_table_and_rows_that_cannot_be_are_refused(table):
    digit_samplers.main(dataclasses.replace(table, samplers=()))
    for changed, told in (
        ({"seed": 1}, r"holds a table of something else \(seed was 0, is 1\)"),
        ({"samplers": ("euler-3",)}, "--samplers euler-3: SAMPLER or SAMPLER-STEPS"),
        ({"samplers": ("ddim-7",)}, "--steps 7: must be 1 to 6"),
        ({"domains": ("usps",)}, "--domains usps: .* knows mnistm"),
        ({"classifiers": ()}, "--classifiers: one for each of --domains"),
    ):
        with pytest.raises(UserError, match=told):
            digit_samplers.main(dataclasses.replace(table, **changed))
