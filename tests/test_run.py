"""common/run.py: seeds, whole files, checkpoints in every wrapping, the run directory."""

import dataclasses
import importlib.metadata
import json
import os
import pickle
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

from common.run import (
    Run,
    UserError,
    atomic_write,
    derive_seed,
    generator,
    load_into,
    load_weights,
    make_accelerator,
    make_ema,
    make_output_dir,
    warmup_cosine,
)


@dataclass
class Args:
    output_dir: Path
    lr: float = 0.1
    num_workers: int = 0


def net(width: int = 3) -> nn.Module:
    return nn.Sequential(nn.Linear(2, width), nn.BatchNorm1d(width))


def test_seeds_depend_on_the_whole_key_alone():
    assert derive_seed(0, "a", 1) == derive_seed(0, "a", 1)
    keys = [(0, "a", 1), (0, "a", 2), (1, "a", 1), (0, "b", 1), (0, "a1")]
    assert len({derive_seed(*key) for key in keys}) == len(keys)
    draws = [torch.rand(3, generator=generator(0, "x", k)).tolist() for k in (1, 2, 1)]
    assert draws[0] == draws[2] != draws[1]


def test_ema_averages_parameters_and_copies_buffers():
    torch.manual_seed(0)
    trained = net()
    ema = make_ema(trained, decay=0.9)
    expected = [p.detach().clone() for p in trained.parameters()]
    for step in range(20):
        trained(torch.randn(8, 2))  # moves the batch statistics
        with torch.no_grad():
            for p in trained.parameters():
                p.add_(torch.randn_like(p))
        ema.update_parameters(trained)
        decay = 0.0 if step == 0 else min(0.9, (1 + step) / (10 + step))  # the first update copies
        expected = [decay * e + (1 - decay) * p.detach() for e, p in zip(expected, trained.parameters(), strict=True)]
    for mean, value in zip(ema.module.parameters(), expected, strict=True):
        torch.testing.assert_close(mean.detach(), value)
    for mean, value in zip(ema.module.buffers(), trained.buffers(), strict=True):
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
    weights = net().state_dict()
    torch.save(wrap(weights), tmp_path / "x.pth")
    loaded, config = load_weights(tmp_path / "x.pth")
    assert config == {}
    assert loaded.keys() == weights.keys()
    other = net()
    load_into(other, loaded, tmp_path / "x.pth")
    assert all(torch.equal(other.state_dict()[key], weights[key]) for key in weights)


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("hostile-code-ran",)


def test_bad_checkpoints_are_named_and_run_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(net().state_dict(), "good.pth")
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


def test_a_checkpoint_of_another_net_is_named():
    good = net().state_dict()
    for weights, told in (
        (net(4).state_dict(), r"'0.weight' is \[4, 2\], expected \[3, 2\]"),
        ({k: v for k, v in good.items() if k != "0.bias"}, "it has no '0.bias'"),
        (good | {"extra": torch.ones(1)}, "it has 'extra'"),
    ):
        with pytest.raises(UserError, match=rf"--checkpoint x.pth: .*{told}"):
            load_into(net(), weights, Path("x.pth"))


def test_run_directory_continues_and_refuses_other_arguments(tmp_path):
    accelerator = make_accelerator("cpu", "fp32")
    run = Run(Args(tmp_path / "run"), accelerator)
    assert run.load_state() is None
    for step in (1, 2, 3):
        run.metrics({"step": step})
    run.save_state(2, weights=torch.arange(3))
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["arguments"] == {"output_dir": str(tmp_path / "run"), "lr": 0.1, "num_workers": 0}
    assert config["versions"]["torch"] == importlib.metadata.version("torch")
    assert config["hardware"]["precision"] == "fp32"

    again = Run(Args(tmp_path / "run", num_workers=4), accelerator)  # workers change nothing
    state = again.load_state()
    assert (state["step"], state["weights"].tolist()) == (2, [0, 1, 2])
    assert again.history() == [{"step": 1}, {"step": 2}]  # what came after the saved state is written again
    with pytest.raises(UserError, match=r"--lr was 0.1, is 0.2"):
        Run(dataclasses.replace(Args(tmp_path / "run"), lr=0.2), accelerator)

    again.finish({"accuracy": 1.0})
    assert Run(Args(tmp_path / "run"), accelerator).result["accuracy"] == 1.0


def test_a_damaged_run_directory_is_named(tmp_path):
    run = Run(Args(tmp_path), make_accelerator("cpu", "fp32"))
    run.load_state()
    run.metrics({"step": 1})
    run.save_state(1)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    assert run.history() == [{"step": 1}]
    (tmp_path / "last.pt").write_bytes((tmp_path / "last.pt").read_bytes()[:50])
    with pytest.raises(UserError, match=r"last.pt: damaged; remove"):
        run.load_state()
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json: damaged; remove"):
        Run(Args(tmp_path), make_accelerator("cpu", "fp32"))


def test_model_file_carries_its_configuration(tmp_path):
    run = Run(Args(tmp_path), make_accelerator("cpu", "fp32"))
    saved = net()
    run.save_model(saved, {"net": "x", "widths": [1, 2]})
    weights, config = load_weights(tmp_path / "model.safetensors")
    assert config == {"net": "x", "widths": [1, 2]}
    assert all(torch.equal(weights[key], value) for key, value in saved.state_dict().items())


def test_a_missing_device_is_named():
    missing = "mps" if not torch.backends.mps.is_available() else "cuda"
    with pytest.raises(UserError, match=rf"--device {missing}: not available here"):
        make_accelerator(missing)
