"""common/figures.py: plots."""

import numpy as np
import pytest
import torch
from torchvision.utils import make_grid

from common import figures


def test_without_pictures_there_is_no_animation(tmp_path):
    figures.save_gif(figures.read_grids(tmp_path), tmp_path / "a.gif")
    assert not list(tmp_path.iterdir())


def test_the_curve_of_a_single_epoch_has_a_marker(tmp_path, monkeypatch):
    """A line through one point is invisible, so it needs a marker; two points need none."""
    lines = []
    monkeypatch.setattr(
        figures, "save_figure", lambda figure, path: lines.append(figure.axes[0].lines[0])
    )
    for epochs in (1, 2):
        rows = [{"epoch": epoch, "loss": 0.5} for epoch in range(epochs)]
        figures.save_curves(rows, {"loss": ["loss"]}, tmp_path / "curves.png")
    assert [line.get_marker() for line in lines] == ["o", "None"]
    figures.pyplot().close("all")


def test_the_same_figure_gives_the_same_bytes(tmp_path, monkeypatch):
    found = []
    for date in ("0", "1000000000"):
        monkeypatch.setenv("SOURCE_DATE_EPOCH", date)  # what matplotlib takes for the time
        figure, axis = figures.pyplot().subplots()
        axis.plot([1, 2, 3])
        figures.save_figure(figure, tmp_path / date, formats=("png", "pdf"))
        found.append([(tmp_path / f"{date}.{suffix}").read_bytes() for suffix in ("png", "pdf")])
    assert found[0] == found[1]


@pytest.mark.parametrize(("count", "columns"), [(7, 3), (2, 8), (6, 6)])
def test_a_grid_is_that_of_torchvision(count, columns):
    pixels = torch.randint(256, (count, 3, 5, 4), dtype=torch.uint8)
    theirs = make_grid(pixels, nrow=columns, pad_value=255)
    ours = torch.from_numpy(np.array(figures.grid_of(pixels, columns))).permute(2, 0, 1)
    assert torch.equal(ours, theirs)


def test_a_grid_of_one_image_has_a_border_too():
    assert figures.grid_of(torch.zeros(1, 3, 5, 4, dtype=torch.uint8), 8).size == (4 + 4, 5 + 4)
