"""common/figures.py: plots."""

from common import figures


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
