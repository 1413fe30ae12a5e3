"""common/run.py: the run directory continues exactly, and names what is wrong with it."""

import dataclasses
import importlib.metadata
import json
import os
import signal
import threading
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
    (tmp_path / "metrics.jsonl").write_text('{"step": 2, "lo')
    assert run.history() == [{"step": 1}]  # those in last.pt

    state = tmp_path / "last.pt"
    state.write_bytes(state.read_bytes()[:50])
    with pytest.raises(UserError, match=r"last.pt: damaged; remove"):
        run.load_state({})
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json: damaged; remove"):
        open_run(Args(tmp_path))


def save_a_state(folder: Path) -> tuple[nn.Module, torch.optim.Adam]:
    """A run that is saved after two steps of Adam."""
    net, adam = net_and_adam()
    for _ in range(2):
        adam.zero_grad()
        net(torch.ones(2, 3)).sum().backward()
        adam.step()
    run = open_run(Args(folder))
    parts = {"net": net, "adam": adam}
    run.load_state({})
    run.save_state(2, parts)
    return net, adam


def net_and_adam() -> tuple[nn.Module, torch.optim.Adam]:
    torch.manual_seed(0)
    net = nn.Linear(3, 4)
    return net, torch.optim.Adam(net.parameters())


def test_a_state_is_loaded_as_it_was_saved(tmp_path):
    net, adam = save_a_state(tmp_path)
    loaded, loaded_adam = net_and_adam()
    assert open_run(Args(tmp_path)).load_state({"net": loaded, "adam": loaded_adam}) == 2
    assert torch.equal(loaded.weight, net.weight)
    average = loaded_adam.state[loaded.weight]["exp_avg"]
    assert torch.equal(average, adam.state[net.weight]["exp_avg"])


def changed(state: dict, *keys: object, value: object) -> None:
    """Put a value at a place in nested dictionaries."""
    for key in keys[:-1]:
        state = state[key]
    state[keys[-1]] = value


def continue_run(folder: Path, parts: dict, steps: int = 10) -> None:
    """The rest of the steps."""
    run = open_run(Args(folder))
    first = run.load_state(parts)
    for step in run.steps(first, steps, images_per_step=2):
        if run.save_due():
            run.save_state(step + 1, parts)


FIRST = ("adam", "state", 0)


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("step",), -1),
        (("step",), "2"),
        (("step",), 10**30),
        (("step",), True),
        (("seconds",), float("nan")),
        (("seconds",), None),
        (("rows",), None),
        (("rows",), [1]),
        (("rows",), [{"loss": 1.0}]),
        (("rows",), [{"step": 1, "loss": "small"}]),
        (("rows",), [{"step": 1, "loss": float("nan")}]),
        (("sums",), [1, 2]),
        (("sums",), {"loss": torch.ones(3)}),
        (("sums",), {"loss": torch.tensor(float("inf"))}),
        (("net",), []),
        (("net",), {}),
        (("net", "weight"), torch.zeros(4, 2)),
        (("net", "weight"), torch.full((4, 3), float("nan"))),
        (("net", "weight"), "weights"),
        (("adam",), {}),
        (("adam",), 7),
        ((*FIRST, "exp_avg"), torch.zeros(1000)),
        ((*FIRST, "exp_avg"), torch.zeros(3)),
        ((*FIRST, "exp_avg_sq"), "fast"),
        ((*FIRST, "exp_avg_sq"), None),
        ((*FIRST, "exp_avg_sq"), torch.full((4, 3), float("inf"))),
        ((*FIRST, "step"), torch.zeros(4, 4)),
        (("adam", "param_groups", 0, "betas"), "fast"),
        (("adam", "param_groups", 0, "lr"), None),
        (("adam", "param_groups"), []),
    ],
)
def test_a_state_that_cannot_be_is_one_line(tmp_path, keys, value):
    save_a_state(tmp_path)
    file = tmp_path / "last.pt"
    state = torch.load(file)
    changed(state, *keys, value=value)
    torch.save(state, file)
    net, adam = net_and_adam()
    with pytest.raises(UserError, match=r"last.pt: (damaged|has \d)") as found:
        continue_run(tmp_path, {"net": net, "adam": adam})
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("name", ["config.json", "result.json"])
@pytest.mark.parametrize("content", ["[]", "null", '"run"', "[" * 100_000, '{"arguments": []}', ""])
def test_files_of_a_run_that_hold_something_else_are_named(tmp_path, name, content):
    begin_run(tmp_path)
    (tmp_path / name).write_text(content)
    if name == "result.json" and content.startswith("{"):
        assert open_run(Args(tmp_path)).result == {"arguments": []}
        return
    with pytest.raises(UserError, match=rf"{name}: damaged; remove"):
        open_run(Args(tmp_path))


def save_without_rows(folder: Path) -> None:
    """Make last.pt one of an older version, which had the rows in metrics.jsonl alone."""
    state = torch.load(folder / "last.pt")
    del state["rows"]
    torch.save(state, folder / "last.pt")


@pytest.mark.parametrize("content", [None, b"", b"\xff\n[1]\n", b'{"step": 1, "loss": 9}\n'])
def test_what_happens_to_metrics_jsonl_does_no_harm(tmp_path, content):
    begin_run(tmp_path)
    file = tmp_path / "metrics.jsonl"
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    run = open_run(Args(tmp_path))
    assert run.load_state({"part": make_optimizer(lr=0.1)}) == 2
    assert run.history() == [{"step": 1}, {"step": 2}]
    assert file.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_rows_that_do_not_fit_one_another_are_one_line(tmp_path):
    run = open_run(Args(tmp_path))
    with pytest.raises(UserError, match="its rows of metrics are missing or have different names"):
        run.history()  # no row
    run.load_state({})
    run.log_metrics({"step": 1, "loss": 1.0})
    run.log_metrics({"step": 2})
    with pytest.raises(UserError, match="its rows of metrics are missing or have different names"):
        run.history()


def test_the_losses_of_another_run_are_one_line(tmp_path):
    run = open_run(Args(tmp_path))
    run.load_state({})
    run.sums = {"evil": torch.tensor(1.0)}
    with pytest.raises(UserError, match=r"last\.pt: has the losses evil, but this run has loss;"):
        run.add_losses(0, {"loss": torch.tensor(1.0)})


@pytest.mark.parametrize("name", ["log.txt", "metrics.jsonl", "last.pt", "config.json"])
def test_a_pipe_in_a_run_directory_is_not_waited_for(tmp_path, name):
    begin_run(tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    if name == "metrics.jsonl":  # it is written again, in the place of the pipe
        open_run(Args(tmp_path)).load_state({"part": make_optimizer(lr=0.1)})
        return
    with pytest.raises(UserError, match=rf"{name}: (damaged|is not a file); remove"):
        open_run(Args(tmp_path)).load_state({"part": make_optimizer(lr=0.1)})


def test_lines_that_are_no_rows_of_metrics_are_left_out_and_said(tmp_path, capsys):
    begin_run(tmp_path)
    save_without_rows(tmp_path)
    file = tmp_path / "metrics.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    broken = [b"[1, 2]\n", b"\xff\xfe\n", b'{"step": "2"}\n', b'{"loss": 1}\n', b'{"step": 3, "lo']
    file.write_bytes(b"".join([lines[0], lines[0], *lines[1:], *broken]))
    run = open_run(Args(tmp_path))
    run.load_state({"part": make_optimizer(lr=0.1)})
    assert (
        "metrics.jsonl: 6 lines are no rows of this run and are left out" in capsys.readouterr().out
    )
    assert file.read_text() == '{"step": 1}\n{"step": 2}\n'
    assert run.history() == [{"step": 1}, {"step": 2}]
    assert "left out" not in capsys.readouterr().out


def test_json_has_null_for_numbers_that_are_not_finite(tmp_path):
    run = open_run(Args(tmp_path))
    run.load_state({})
    run.log_metrics({"step": 7, "accuracy": float("nan"), "loss": 0.5, "norm": float("inf")})
    assert json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail) == {
        "step": 7,
        "accuracy": None,
        "loss": 0.5,
        "norm": None,
    }
    log = (tmp_path / "log.txt").read_text()
    assert "step 7: accuracy, norm not finite, null in metrics.jsonl" in log


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_lets_the_step_end_and_saves(tmp_path, name):
    number = getattr(signal, name)
    before = signal.signal(number, signal.SIG_DFL)  # nohup ignores SIGHUP
    threading.Timer(0.3, os.kill, (os.getpid(), number)).start()
    parts = {"part": make_optimizer(lr=0.5)}
    with pytest.raises(SystemExit) as end:
        continue_run(tmp_path, parts, steps=10**9)
    signal.signal(number, before)
    assert end.value.code == 128 + number
    last_line = (tmp_path / "log.txt").read_text().splitlines()[-1]
    done = open_run(Args(tmp_path)).load_state(parts)
    assert f"stopped after step {done:,}; the same command continues" in last_line


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
