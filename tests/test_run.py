"""common/run.py: seeds, whole files, checkpoints in every wrapping, the run directory."""

import copy
import dataclasses
import importlib.metadata
import json
import os
import pickle
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch
from torch import nn

from common import figures
from common.run import (
    Run,
    UserError,
    atomic_write,
    derive_seed,
    generator,
    load_net,
    load_weights,
    make_accelerator,
    make_output_dir,
    update_ema,
    warmup_cosine,
)


@dataclass
class Args:
    output_dir: Path
    lr: float = 0.1
    batch_size: int = 2
    epochs: int = 1
    num_workers: int = 0


class Net(nn.Sequential):
    def __init__(self, width: int = 3) -> None:
        super().__init__(nn.Linear(2, width), nn.BatchNorm1d(width))


def test_seeds_depend_on_the_whole_key_alone():
    assert derive_seed(0, "a", 1) == derive_seed(0, "a", 1)
    keys = [(0, "a", 1), (0, "a", 2), (1, "a", 1), (0, "b", 1), (0, "a1")]
    assert len({derive_seed(*key) for key in keys}) == len(keys)
    draws = [torch.rand(3, generator=generator(0, "x", k)).tolist() for k in (1, 2, 1)]
    assert draws[0] == draws[2] != draws[1]


def test_ema_averages_parameters_and_copies_buffers():
    torch.manual_seed(0)
    trained = Net()
    ema = copy.deepcopy(trained)
    expected = [p.detach().clone() for p in trained.parameters()]
    for step in range(20):
        trained(torch.randn(8, 2))  # moves the batch statistics
        with torch.no_grad():
            for p in trained.parameters():
                p.add_(torch.randn_like(p))
        update_ema(ema, trained, 0.9, step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = [decay * e + (1 - decay) * p.detach() for e, p in zip(expected, trained.parameters(), strict=True)]
    for mean, value in zip(ema.parameters(), expected, strict=True):
        torch.testing.assert_close(mean.detach(), value)
    for mean, value in zip(ema.buffers(), trained.buffers(), strict=True):
        assert torch.equal(mean, value)


def test_warmup_cosine():
    values = [warmup_cosine(p, 0.2) for p in (0.0, 0.1, 0.2, 0.6, 1.0)]
    assert values == pytest.approx([0.0, 0.5, 1.0, 0.5, 0.0], abs=1e-12)


def test_atomic_write_leaves_the_old_file_when_writing_fails(tmp_path):
    file = tmp_path / "x.txt"
    atomic_write(file, "old")

    def fail(path: Path) -> None:
        path.write_text("half")
        raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011 (its own)
        atomic_write(file, fail)
    assert [path.name for path in tmp_path.iterdir()] == ["x.txt"]
    assert file.read_text() == "old"


def test_an_unwritable_output_directory_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--output-dir .*file/run: cannot be written"):
        make_output_dir(tmp_path / "file" / "run")


@pytest.mark.parametrize(
    "wrap",
    [
        lambda w: w,
        lambda w: {"state_dict": w, "epoch": 3},
        lambda w: {"model": w},
        lambda w: {f"module.{k}": v for k, v in w.items()},
        lambda w: {"model": {f"_orig_mod.{k}": v for k, v in w.items()}},
        lambda w: {f"nn_model.{k}": v for k, v in w.items()} | {"sqrtab": torch.ones(3)},
    ],
)
def test_published_wrappings_load(tmp_path, wrap):
    weights = Net().state_dict()
    torch.save(wrap(weights), tmp_path / "x.pth")
    loaded, config = load_weights(tmp_path / "x.pth")
    assert config == {}
    assert loaded.keys() == weights.keys()
    other, _ = load_net(tmp_path / "x.pth", {"net": Net})
    assert not other.training
    assert all(torch.equal(other.state_dict()[key], weights[key]) for key in weights)


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("hostile-code-ran",)


def test_bad_checkpoints_are_named_and_run_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(Net().state_dict(), "good.pth")
    Path("truncated.pth").write_bytes(Path("good.pth").read_bytes()[:500])
    Path("hostile.pth").write_bytes(pickle.dumps(Hostile(), protocol=2))
    torch.save({"hostile": Hostile()}, "hostile2.pth")
    Path("empty.pth").touch()
    for number, garbage in enumerate((b"hello world\n", b"h\x05.", b"\x80\x02K", b"j\x01")):
        Path(f"garbage{number}.pth").write_bytes(garbage)
    torch.save({0: torch.ones(1)}, "number.pth")
    Path("bad.safetensors").write_bytes(b"12345678")
    torch.save([1, 2], "list.pth")
    for name in (
        "truncated.pth",
        "hostile.pth",
        "hostile2.pth",
        "empty.pth",
        "bad.safetensors",
        "list.pth",
        "no.pth",
        "number.pth",
        *map(str, Path().glob("garbage*")),
    ):
        with pytest.raises(UserError, match=rf"^--checkpoint {name}: [^\n]+$"):
            load_weights(Path(name))
    assert not Path("hostile-code-ran").exists()


def test_a_checkpoint_of_another_net_is_named(tmp_path):
    good = Net().state_dict()
    for weights, told in (
        (Net(4).state_dict(), r"'0.weight' is \[4, 2\], expected \[3, 2\]"),
        ({k: v for k, v in good.items() if k != "0.bias"}, r"'0.bias' is missing, expected \[3\]"),
        (good | {"extra": torch.ones(1)}, r"'extra' is \[1\], expected no such key"),
    ):
        torch.save(weights, tmp_path / "x.pth")
        with pytest.raises(UserError, match=rf"--checkpoint .*x.pth: is not this Net \({told}\)"):
            load_net(tmp_path / "x.pth", {"net": Net})


def test_run_directory_continues_and_refuses_other_arguments(tmp_path):
    accelerator = make_accelerator("cpu", "fp32")
    run = Run(Args(tmp_path / "run"), accelerator)
    part = torch.optim.SGD([torch.zeros(1)], lr=0.5)
    assert run.load_state({"part": part}) == 0
    for step in (1, 2, 3):
        run.metrics({"step": step})
    run.add(1, {"loss": torch.tensor(2.0)})
    run.save_state(2, {"part": part})
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["arguments"] == {
        "output_dir": str(tmp_path / "run"),
        "lr": 0.1,
        "batch_size": 2,
        "epochs": 1,
        "num_workers": 0,
    }
    assert config["versions"]["torch"] == importlib.metadata.version("torch")
    assert config["hardware"]["precision"] == "fp32"

    del config["arguments"]["lr"]  # as if the option were newer than the run: its default is what it did
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    again = Run(Args(tmp_path / "run", num_workers=4), accelerator)  # workers change nothing
    fresh = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    assert again.load_state({"part": fresh}) == 2
    assert fresh.param_groups[0]["lr"] == 0.5
    again.add(2, {"loss": torch.tensor(3.0)})
    assert again.means(2) == {"loss": 2.5}
    assert again.means(2) == {}
    assert again.history() == [{"step": 1}, {"step": 2}]  # what came after the saved state is written again
    with pytest.raises(UserError, match=r"--lr was 0.1, is 0.2"):
        Run(dataclasses.replace(Args(tmp_path / "run"), lr=0.2), accelerator)

    again.finish({"accuracy": 1.0})
    assert Run(Args(tmp_path / "run"), accelerator).result["accuracy"] == 1.0


def test_a_damaged_run_directory_is_named(tmp_path):
    run = Run(Args(tmp_path), make_accelerator("cpu", "fp32"))
    run.load_state({})
    run.metrics({"step": 1})
    run.save_state(1, {})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    assert run.history() == [{"step": 1}]
    (tmp_path / "last.pt").write_bytes((tmp_path / "last.pt").read_bytes()[:50])
    with pytest.raises(UserError, match=r"last.pt: damaged; remove"):
        run.load_state({})
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json: damaged; remove"):
        Run(Args(tmp_path), make_accelerator("cpu", "fp32"))


def test_model_file_carries_its_configuration(tmp_path):
    run = Run(Args(tmp_path), make_accelerator("cpu", "fp32"))
    saved = Net(5)
    run.save_model(saved, {"net": "x", "arguments": {"width": 5}, "seed": 3})
    loaded, config = load_net(tmp_path / "model.safetensors", {"y": nn.Linear, "x": Net})
    assert config == {"net": "x", "arguments": {"width": 5}, "seed": 3}
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in saved.state_dict().items())
    with pytest.raises(UserError, match="is a net 'x', expected y or z"):
        load_net(tmp_path / "model.safetensors", {"y": nn.Linear, "z": nn.Linear})


def test_batches_and_epochs_that_cannot_be_are_named(tmp_path):
    accelerator = make_accelerator("cpu", "fp32")
    for options, told in (
        ({"batch_size": 0}, "--batch-size 0: must be"),
        ({"epochs": 0}, "--epochs 0: must be at least 1"),
    ):
        with pytest.raises(UserError, match=told):
            Run(Args(tmp_path / "run", **options), accelerator)
    assert not (tmp_path / "run").exists()


def test_a_missing_device_is_named():
    missing = "mps" if not torch.backends.mps.is_available() else "cuda"
    with pytest.raises(UserError, match=rf"--device {missing}: not available here"):
        make_accelerator(missing)


def test_curves_of_one_epoch_are_seen(tmp_path, monkeypatch):
    """A line through one point is invisible: it gets a marker; two points get none."""
    drawn = []
    monkeypatch.setattr(figures, "save_figure", lambda figure, path: drawn.append(figure.axes[0].lines[0]))
    for epochs in (1, 2):
        rows = [{"epoch": epoch, "loss": 0.5} for epoch in range(epochs)]
        figures.save_curves(rows, {"loss": ["loss"]}, tmp_path / "curves.png")
    assert [line.get_marker() for line in drawn] == ["o", "None"]
    plt.close("all")
