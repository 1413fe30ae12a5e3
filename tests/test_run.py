"""common/run.py: the run directory continues exactly, and names what is wrong with it."""

import dataclasses
import importlib.metadata
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

from common.checkpoints import load_net
from common.cli import UserError
from common.device import make_accelerator
from common.run import Run
from models.network import Network


@dataclass
class Args:
    output_dir: Path
    lr: float = 0.1
    batch_size: int = 2
    epochs: int = 1
    num_workers: int = 0


def open_run(args: Args) -> Run:
    return Run(args, make_accelerator("cpu", "fp32"))


def make_optimizer(lr: float) -> torch.optim.SGD:
    return torch.optim.SGD([torch.zeros(1)], lr=lr)


def begin_run(folder: Path) -> None:
    """A run that is saved after step 2 and stopped after step 3."""
    run = open_run(Args(folder))
    parts = {"part": make_optimizer(lr=0.5)}
    assert run.load_state(parts) == 0
    for step in (1, 2, 3):
        run.log_metrics({"step": step})
    run.add_losses(1, {"loss": torch.tensor(2.0)})
    run.save_state(2, parts)


def test_config_json_has_the_arguments_and_the_environment(tmp_path):
    begin_run(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["arguments"] == {
        "output_dir": str(tmp_path),
        "lr": 0.1,
        "batch_size": 2,
        "epochs": 1,
        "num_workers": 0,
    }
    assert config["versions"]["torch"] == importlib.metadata.version("torch")
    assert config["hardware"]["precision"] == "fp32"


def test_a_run_continues_from_its_last_saved_step(tmp_path):
    begin_run(tmp_path)
    run = open_run(Args(tmp_path, num_workers=4))  # no result depends on the workers
    optimizer = make_optimizer(lr=0.1)
    assert run.load_state({"part": optimizer}) == 2
    assert optimizer.param_groups[0]["lr"] == 0.5
    run.add_losses(2, {"loss": torch.tensor(3.0)})
    assert run.epoch_means(2) == {"loss": 2.5}  # of the 2.0 before and the 3.0 after the stop
    assert run.epoch_means(2) == {}
    # The row of step 3, which was not saved, is dropped: that step is done again.
    assert run.history() == [{"step": 1}, {"step": 2}]
    run.finish({"accuracy": 1.0})
    assert open_run(Args(tmp_path)).result["accuracy"] == 1.0


def test_an_option_that_is_newer_than_the_run_had_its_default_value(tmp_path):
    begin_run(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    del config["arguments"]["lr"]
    file.write_text(json.dumps(config))
    assert open_run(Args(tmp_path)).load_state({"part": make_optimizer(lr=0.1)}) == 2
    with pytest.raises(UserError, match=r"--lr was 0.1, is 0.2"):
        open_run(dataclasses.replace(Args(tmp_path), lr=0.2))


def test_a_damaged_run_directory_is_named(tmp_path):
    run = open_run(Args(tmp_path))
    run.load_state({})
    run.log_metrics({"step": 1})
    run.save_state(1, {})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    assert run.history() == [{"step": 1}]  # without the half line

    state = tmp_path / "last.pt"
    state.write_bytes(state.read_bytes()[:50])
    with pytest.raises(UserError, match=r"last.pt: damaged; remove"):
        run.load_state({})
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json: damaged; remove"):
        open_run(Args(tmp_path))


class Net(nn.Sequential, Network):
    def __init__(self, width: int = 3) -> None:
        super().__init__(nn.Linear(2, width), nn.BatchNorm1d(width))


def test_the_saved_model_carries_its_configuration(tmp_path):
    saved = Net(5)
    written = {"net": "x", "arguments": {"width": 5}, "seed": 3}
    open_run(Args(tmp_path)).save_model(saved, written)
    loaded, config = load_net(tmp_path / "model.safetensors", {"x": Net})
    assert config == written
    for key, value in saved.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)


def test_a_batch_that_is_too_small_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(UserError, match="--batch-size 0: must be"):
        open_run(Args(tmp_path / "run", batch_size=0))
    assert not (tmp_path / "run").exists()
