"""experiments/faces_by_timesteps.py: a tiny table, and that nothing is done twice."""

import csv
import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.cli import UserError
from experiments import face_rows, faces_by_timesteps
from experiments.faces_by_timesteps import Net, Table, nets_of, rows_of
from metrics.features import random_features


@pytest.fixture
def table(tmp_path: Path) -> Table:
    """A table of one T on a few 16x16 "faces" of noise."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        folder = tmp_path / "data" / "face" / split
        folder.mkdir(parents=True)
        for number in range(4):
            pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
    return Table(
        output_dir=tmp_path / "table",
        data_dir=tmp_path / "data",
        timesteps=(2,),
        gans=(),
        images=4,
        epochs=1,
        keep_every=1,
        count=3,
        size=16,
        width=32,
        blocks=1,
        patch=2,
        batch_size=4,
        device="cpu",
        precision="fp32",
    )


def test_every_rule_is_trained_and_sampled_once(table, monkeypatch):
    embedding = random_features()  # in place of EfficientNet, which may not be installed
    monkeypatch.setattr(faces_by_timesteps.evaluate, "open_embedding", lambda *_: embedding)
    rows = faces_by_timesteps.main(table)
    kinds = ("ancestral, β", "ancestral, β̃", "DDIM, η = 0")
    expected = [["2", rule, kind, "2", "3"] for rule in ("as given", "respaced") for kind in kinds]
    assert [row[:5] for row in rows] == [*expected, ["", "", "real images", "", "3"]]
    assert all(float(cell) >= 0 for row in rows[:-1] for cell in row[6:])

    with (table.output_dir / "curve.csv").open() as file:
        header, *lines = csv.reader(file)
    assert header == ["epoch", "as_given_2", "respaced_2", "real_images"]
    assert [line[0] for line in lines] == ["1"]
    assert all(float(cell) > 0 for line in lines for cell in line[1:])
    for name in ("table.csv", "table.md", "table.png", "samples.png", "curve.png"):
        assert (table.output_dir / name).is_file()

    monkeypatch.setattr(faces_by_timesteps.p2_ddpm_infer, "main", None)  # nothing is made again
    monkeypatch.setattr(faces_by_timesteps.evaluate, "main", None)  # or measured
    monkeypatch.setattr(face_rows, "save_labelled", lambda *_: None)
    assert faces_by_timesteps.main(table) == rows
    with pytest.raises(UserError, match=r"holds a table of something else \(seed was 0, is 1\)"):
        faces_by_timesteps.main(dataclasses.replace(table, seed=1))


def test_a_thousand_steps_are_trained_once_and_sampled_in_fewer(tmp_path):
    table = Table(output_dir=tmp_path)
    nets = nets_of(table)
    assert [net.name for net in nets] == [
        *("as_given_10", "respaced_10", "as_given_100", "respaced_100"),
        "respaced_1000",
    ]
    assert nets[-1].rules == "as given = respaced"
    assert [row.steps for row in rows_of(table, nets[-1])] == [1000] * 3 + [10] * 3 + [100] * 3
    assert len({row.name for net in nets for row in rows_of(table, net)}) == 4 * 3 + 9


def test_a_cpu_makes_fewer_images_in_many_steps(tmp_path):
    table = Table(output_dir=tmp_path, count=9, count_above=4, device="cpu")
    assert [face_rows.count_of(table, calls) for calls in (10, 100, 101)] == [9, 9, 4]
    assert face_rows.count_of(dataclasses.replace(table, device="cuda"), 101) == 9


def test_options_are_those_of_a_training(tmp_path):
    table = Table(output_dir=tmp_path, images=1_000, epochs=10, size=32, width=96)
    options = faces_by_timesteps.training(table, Net("as-given", 10))
    assert (options.timesteps, options.rule, options.size) == (10, "as-given", 32)
    assert options.epochs * options.images_per_epoch == 1_000
    with pytest.raises(UserError, match="--width 40"):
        Table(output_dir=tmp_path, width=40)
