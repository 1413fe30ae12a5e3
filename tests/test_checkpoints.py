"""common/checkpoints.py: our own files, and those that others publish, in every usual wrapping."""

import os
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

from common.checkpoints import load_net, load_weights, save_net
from common.cli import UserError
from models.network import Network


class Net(nn.Sequential, Network):
    def __init__(self, width: int = 3) -> None:
        super().__init__(nn.Linear(2, width), nn.BatchNorm1d(width))


def with_prefix(prefix: str, weights: dict) -> dict:
    return {f"{prefix}{key}": value for key, value in weights.items()}


def assert_same_weights(net: nn.Module, weights: dict) -> None:
    for key, value in weights.items():
        assert torch.equal(net.state_dict()[key], value)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda weights: weights,
        lambda weights: {"state_dict": weights, "epoch": 3},
        lambda weights: {"model": weights},
        lambda weights: with_prefix("module.", weights),
        lambda weights: {"model": with_prefix("_orig_mod.", weights)},
        lambda weights: with_prefix("nn_model.", weights) | {"sqrtab": torch.ones(3)},
    ],
)
def test_published_files_load_in_every_wrapping(tmp_path, wrap):
    file = tmp_path / "x.pth"
    weights = Net().state_dict()
    torch.save(wrap(weights), file)
    loaded, config = load_weights(file)
    assert config == {}
    assert loaded.keys() == weights.keys()
    net, _ = load_net(file, {"net": Net})
    assert not net.training
    assert_same_weights(net, weights)


class Hostile:
    """An object whose pickle makes a directory when it is loaded without care."""

    def __reduce__(self):
        return os.mkdir, ("hostile-code-ran",)


def write_bad_files() -> None:
    """Write files that are no checkpoints into the current folder."""
    torch.save(Net().state_dict(), "good.pth")
    whole = Path("good.pth").read_bytes()
    Path("truncated.pth").write_bytes(whole[:500])
    Path("hostile.pth").write_bytes(pickle.dumps(Hostile(), protocol=2))
    torch.save({"hostile": Hostile()}, "hostile2.pth")
    Path("empty.pth").touch()
    for number, garbage in enumerate((b"hello world\n", b"h\x05.", b"\x80\x02K", b"j\x01")):
        Path(f"garbage{number}.pth").write_bytes(garbage)
    torch.save({0: torch.ones(1)}, "number.pth")
    Path("bad.safetensors").write_bytes(b"12345678")
    torch.save([1, 2], "list.pth")
    Path("good.pth").unlink()


def test_bad_checkpoints_are_named_and_run_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_bad_files()
    names = sorted(path.name for path in tmp_path.iterdir())
    assert len(names) == 11
    for name in [*names, "no.pth"]:
        with pytest.raises(UserError, match=rf"^--checkpoint {name}: [^\n]+$"):
            load_weights(Path(name))
    assert not Path("hostile-code-ran").exists()


def test_a_checkpoint_of_another_network_is_named_with_the_first_misfit(tmp_path):
    file = tmp_path / "x.pth"
    good = Net().state_dict()
    wider = Net(4).state_dict()
    without_bias = {key: value for key, value in good.items() if key != "0.bias"}
    with_extra = good | {"extra": torch.ones(1)}
    for weights, misfit in (
        (wider, r"'0.weight' is \[4, 2\], expected \[3, 2\]"),
        (without_bias, r"'0.bias' is missing, expected \[3\]"),
        (with_extra, r"'extra' is \[1\], expected no such key"),
    ):
        torch.save(weights, file)
        with pytest.raises(UserError, match=rf"--checkpoint .*x.pth: is not this Net \({misfit}\)"):
            load_net(file, {"net": Net})


def test_our_files_carry_their_configuration(tmp_path):
    file = tmp_path / "model.safetensors"
    saved = Net(5)
    written = {"net": "x", "arguments": {"width": 5}, "seed": 3}
    save_net(file, saved, written)
    net, config = load_net(file, {"y": nn.Linear, "x": Net})
    assert config == written
    assert_same_weights(net, saved.state_dict())
    with pytest.raises(UserError, match="contains the network 'x', expected y or z"):
        load_net(file, {"y": nn.Linear, "z": nn.Linear})
