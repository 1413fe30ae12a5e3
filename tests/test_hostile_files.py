"""Files that others send: none runs code, writes elsewhere, fills memory or ends in a traceback."""

import json
import re
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor, nn

import p2_ddim
import p2_ddpm_infer
import p3_dann
import p3_dann_resnet
from common.checkpoints import load_net, load_weights, refuse_damaged, save_net, tensors_under
from common.class_folders import find_domain
from common.cli import UserError
from common.data import decode_image, list_images
from common.metadata import ARGUMENTS, MetadataError, check_config, parse_config
from common.names import is_folder_name, is_hidden, is_label
from common.noises import find_noises
from metrics import digits
from models.context_unet import ContextUnet
from models.dann import DannDeep
from models.ddim_unet import DdimUnet
from preparation.inspection import Report, inspect_noises, look_at
from tests.conftest import noise, save_images
from tools import release
from zeroshot.loading import label_by_folder, load_clip

DIGITS = {"context_unet": ContextUnet}
SCHEDULE = {"steps": 6, "kind": "cosine"}
GOOD = {
    "net": "context_unet",
    "arguments": {"in_channels": 3, "n_feat": 8, "n_classes": 20},
    "domains": ["mnistm", "svhn"],
    "schedule": SCHEDULE,
    "size": 28,
    "seed": 0,
}


def write_net(path: Path, net: nn.Module, config: Any) -> Path:
    """A network's file whose metadata is `config`, or a text that is no json of ours."""
    text = config if isinstance(config, str) else json.dumps(config)
    weights = {key: value.contiguous() for key, value in net.state_dict().items()}
    safetensors.torch.save_file(weights, path, {"config": text})
    return path


def digits_net() -> ContextUnet:
    return ContextUnet(3, 8, 20)


# Configurations


def deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


BAD_CONFIGS = {
    "a path": (
        {"domains": ["../../evil", "/tmp/x"]},
        "has domains '../../evil', expected the name",
    ),
    "an absolute path": ({"domains": ["mnistm", "/tmp/x"]}, "has domains '/tmp/x'"),
    "a path inside": ({"domains": ["mnistm", "svhn/../svhn"]}, "'svhn/../svhn', expected"),
    "the folder above": ({"domains": ["mnistm", ".."]}, "expected the name of a folder"),
    "backslashes": ({"domains": ["mnistm", "..\\evil"]}, "expected the name of a folder"),
    "a drive": ({"domains": ["mnistm", "C:evil"]}, "expected the name of a folder"),
    "nothing": ({"domains": ["mnistm", ""]}, "expected the name of a folder"),
    "two lines": ({"domains": ["mnistm", "a\nerror: b"]}, "expected the name of a folder"),
    "turned text": ({"domains": ["mnistm", "a\u202eb"]}, "expected the name of a folder"),
    "no text": ({"domains": ["mnistm", 7]}, "expected the name of a folder"),
    "a domain twice": ({"domains": ["svhn", "svhn"]}, "which has something twice"),
    "no list": ({"domains": "mnistm"}, "expected a list of 1 to 1,000 values"),
    "too few": ({"domains": ["mnistm"]}, "it has 20 classes, but 1 domains"),
    "an object": ({"domains": {"mnistm": 1}}, "expected a list"),
    "a size": ({"size": 10**7}, "has size 10000000, expected a whole number from 1 to 1,024"),
    "a fraction": ({"size": 28.0}, "has size 28.0, expected a whole number"),
    "a seed": ({"seed": -1}, "has seed -1, expected a whole number"),
    "true": ({"seed": True}, "has seed True, expected a whole number"),
    "arguments": ({"arguments": [1]}, "has arguments [1], expected an object"),
    "a width": ({"arguments": {"n_feat": 10**7}}, "its network has n_feat 10000000"),
    "a text as width": ({"arguments": {"n_feat": "8"}}, "its network has n_feat '8'"),
    "an argument": ({"arguments": {"__class__": 1}}, "has '__class__', which is not known here"),
    "a schedule": ({"schedule": [1]}, "its noise schedule is not usable"),
    "steps": ({"schedule": {"steps": 10**7}}, "has steps 10000000, expected a whole number"),
    "a step": ({"schedule": {"steps": 1}}, "expected a whole number from 2"),
    "a kind": ({"schedule": {"kind": "evil"}}, "has kind 'evil', but only linear, cosine"),
    "no β": ({"schedule": {"kind": "linear", "beta_start": 0}}, "must lie between 0 and 1"),
    "no signal": (
        {"schedule": {"kind": "linear", "steps": 10**6, "rule": "as-given"}},
        "too many steps",
    ),
    "respaced": ({"schedule": {"steps": 2000, "rule": "respaced"}}, "at most 1,000 steps"),
    "an option": ({"schedule": {"steps": 6, "evil": 1}}, "has 'evil', which is not known here"),
    "sampling": ({"sampling": {"clamp": ["none"]}}, "its sampling has clamp ['none'], but only"),
    "levels": ({"noise_levels": {"sigma_min": 1}}, "its noise_levels has no sigma_max"),
    "no net": ({"net": None}, "has net None, expected a text of one line"),
    "a list as net": ({"net": ["context_unet"]}, "has net ['context_unet']"),
    "attributes": ({"attributes": ["Bald"]}, "it has 0 attributes, but the names of 1"),
}


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_a_hostile_configuration_is_one_line(tmp_path, monkeypatch, error_of, name):
    monkeypatch.chdir(tmp_path)
    changes, words = BAD_CONFIGS[name]
    write_net(Path("x.safetensors"), digits_net(), GOOD | changes)
    error = error_of(
        p2_ddpm_infer.Generate,
        p2_ddpm_infer.main,
        *("--checkpoint", "x.safetensors", "--output-dir", "inner/out", "--device", "cpu"),
    )
    assert error.startswith("error: --checkpoint x.safetensors: ")
    assert words in error
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_the_same_configuration_without_the_change_works(tmp_path):
    file = write_net(tmp_path / "x.safetensors", digits_net(), GOOD)
    out = tmp_path / "out"
    args = p2_ddpm_infer.Generate(checkpoint=file, output_dir=out, per_class=1, device="cpu")
    p2_ddpm_infer.main(args)
    assert sorted(path.name for path in out.iterdir()) == ["mnistm", "svhn"]
    assert len(list(out.rglob("*.png"))) == 20


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 100_000, "nested too deeply"),
        (json.dumps(GOOD | {"more": deep(25)}), "nested too deeply"),
        ('{"net": "context_unet", "net": "cnn"}', "has a key twice"),
        ('{"schedule": {"steps": 6, "steps": 7}}', "has a key twice"),
        ('{"size": NaN}', "has the number NaN"),
        ('{"shares": {"a": -Infinity}}', "has the number -Infinity"),
        ('{"anything": 1e999}', "has the number 1e999"),
        ('{"size": ' + "9" * 5_000 + "}", "is not json"),
        ("[]", "is not a json object"),
        ("null", "is not a json object"),
        ("", "is not json"),
        ('{"net": ', "is not json"),
        ('{"more": "' + "a" * 2**24 + '"}', "is longer than"),
    ],
)
def test_json_that_no_script_writes_is_refused(text, words):
    with pytest.raises(MetadataError, match=words):
        parse_config(text)


def test_every_network_has_a_table_of_its_arguments():
    known = {*release.NETS, *digits.NETS, *p3_dann_resnet.NETS, "clip"}
    assert known == ARGUMENTS.keys()


@pytest.mark.parametrize("name", sorted(ARGUMENTS))
def test_every_network_refuses_what_its_constructor_does_not_take(name):
    for arguments in ({"evil": 1}, {"width": -1}, {"width": float("nan")}, "text", [], 3):
        with pytest.raises(MetadataError):
            check_config({"net": name, "arguments": arguments})


def test_names_of_folders_and_labels():
    for name in ("mnistm", "Real World", "Tasse à café", "می‌خواهم", "a" * 255):
        assert is_folder_name(name)
        assert is_label(name)
    for name in ("", ".", "..", ".hidden", "a/b", "/a", "a\\b", "C:"):
        assert not is_folder_name(name)
    for name in ("a\0", "a\n", "a\u2066", "a" * 256):
        assert not is_folder_name(name)
    assert is_label("1/2: a\\b")
    for value in ("", "a\x1b[0m", "\ud800", "a\u2028b", None, 3, ["a"]):
        assert not is_label(value)
    for name in (".DS_Store", "._00.pt", "__MACOSX", "Thumbs.db", "desktop.ini"):
        assert is_hidden(name)
    assert not is_hidden("00.pt")


def test_other_fields_that_scripts_read_are_checked():
    adaptation = {
        "net": "adaptation",
        "arguments": {"classes": 2},
        "source": "usps",
        "target": "mnist",
        "photographs": False,
        "class_names": ["a", "b"],
    }
    measured = {
        "balanced_accuracy": 90.0,
        "interval": [80.0, 95.0],
        "images": 10,
        "not_measurable": [],
        "attributes": {
            "Bald": {
                "positives": 5,
                "negatives": 5,
                "positive_rate": 90.0,
                "negative_rate": 90.0,
                "balanced": 90.0,
                "interval": [80.0, 95.0],
                "measurable": True,
            }
        },
    }
    faces = {
        "net": "attribute_classifier",
        "arguments": {"attributes": ["Bald"]},
        "face_size": 64,
        "trained_on": ["000001"],
        "measured": measured,
    }
    check_config(adaptation)
    check_config(faces)
    row = measured["attributes"]["Bald"]
    for good, change in (
        (adaptation, {"class_names": ["a"]}),
        (adaptation, {"class_names": ["a", "a"]}),
        (adaptation, {"class_names": [["a"], "b"]}),
        (adaptation, {"photographs": "no"}),
        (adaptation, {"source": "../usps"}),
        (adaptation, {"target": None}),
        (faces, {"face_size": 10**7}),
        (faces, {"trained_on": [1]}),
        (faces, {"measured": {}}),
        (faces, {"measured": measured | {"interval": None}}),
        (faces, {"measured": measured | {"interval": [1.0]}}),
        (faces, {"measured": measured | {"not_measurable": ["Male"]}}),
        (faces, {"measured": measured | {"attributes": {"Male": row}}}),
        (faces, {"measured": measured | {"attributes": {"Bald": row | {"balanced": 0}}}}),
        (faces, {"measured": measured | {"attributes": {"Bald": row | {"interval": None}}}}),
        (faces, {"measured": measured | {"attributes": {"Bald": row | {"positives": "5"}}}}),
    ):
        with pytest.raises(MetadataError):
            check_config(good | change)


def test_sizes_and_counts_must_agree():
    unet = {"size": 16, "in_channels": 4}
    latents = {"net": "latent_unet", "arguments": {"unet": unet, "autoencoder": {"size": 64}}}
    pixels = {"net": "ddim_unet", "arguments": {"size": 64, "n_attributes": 2}}
    for good, field, value in (
        (latents, "size", 64),
        (pixels, "size", 64),
        (pixels, "attributes", ["Bald", "Male"]),
    ):
        check_config(good | {field: value})
        other = 2 * value if field == "size" else ["Bald"]
        with pytest.raises(MetadataError, match=r"it is for images of 64|it has 2 attributes"):
            check_config(good | {field: other})
    for name in ("cnn", "deep", "digit_resnet"):
        check_config({"net": name, "arguments": {"classes": 10}})
        with pytest.raises(MetadataError, match="its network has classes 20"):
            check_config({"net": name, "arguments": {"classes": 20}})


def test_a_network_without_what_a_command_needs_is_one_line(tmp_path, monkeypatch, error_of):
    monkeypatch.chdir(tmp_path)
    net = p3_dann_resnet.AdaptationNet("resnet18", size=16, width=8, dense=8, hidden=8)
    torch.save(net.state_dict(), "x.pth")
    save_net(Path("x.safetensors"), net, net.config)
    Path("images").mkdir()
    words = ("--image-dir", "images", "--output-csv", "x.csv", "--device", "cpu")
    command = p3_dann_resnet.Predict, p3_dann_resnet.predict
    error = error_of(*command, *words, "--checkpoint", "x.safetensors")
    assert "--checkpoint x.safetensors: its configuration has no source" in error
    error = error_of(*command, *words, "--checkpoint", "x.pth")
    assert "--checkpoint x.pth: its configuration has no source" in error

    deep_net = DannDeep(width=2)
    save_net(Path("y.safetensors"), deep_net, deep_net.config | {"source": "a", "method": "magic"})
    words = ("--target", "b", "--checkpoint", "y.safetensors", "--output-dir", "out")
    error = error_of(p3_dann.Embed, p3_dann.embed, *words, "--device", "cpu")
    assert "y.safetensors: does not say its two domains" in error


def test_a_network_that_its_file_cannot_hold_takes_no_memory(tmp_path, monkeypatch):
    huge = {"in_channels": 3, "n_feat": 65_536, "n_classes": 10_000}  # 10¹² numbers
    changes = {"arguments": huge, "domains": [f"d{number}" for number in range(1_000)]}
    file = write_net(tmp_path / "x.safetensors", digits_net(), GOOD | changes)
    made = []
    monkeypatch.setattr(ContextUnet, "load_state_dict", lambda *_: made.append(1))
    with pytest.raises(UserError, match=r"is not this ContextUnet \('init_conv"):
        load_net(file, DIGITS)
    assert not made
    with torch.device("meta"):
        count = sum(weight.numel() for weight in ContextUnet(**huge).parameters())
    assert count > 10**12  # more than any memory


def test_images_of_no_usable_size_are_refused(tmp_path):
    net = DdimUnet(size=16, width=32, multipliers=(1, 2), attention=(8,), blocks=1)
    config = net.config | {"arguments": net.config["arguments"] | {"size": 17}}
    file = write_net(tmp_path / "x.safetensors", net, config)
    with pytest.raises(UserError, match="is not a DdimUnet"):
        load_net(file, {"ddim_unet": DdimUnet})


# Weights


def broken(weight: Tensor, kind: str) -> Tensor:
    """A weight of the same shape that is of no use."""
    weight = weight.detach().clone()
    if kind == "nan":
        weight.view(-1)[3] = float("nan")
    if kind == "inf":
        weight.view(-1)[3] = -float("inf")
    return {
        "too large": weight.double() * 0 + 1e300,
        "complex": weight.to(torch.complex64),
        "sparse": weight.to_sparse(),
        "quantized": torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8),
        "meta": weight.to("meta"),
        "expanded": torch.ones(1).expand(weight.shape),
        "integers": weight.long(),
        "booleans": weight.bool(),
    }.get(kind, weight)


INTEGERS = "(KEY is [8, 3, 3, 3] of integers, expected [8, 3, 3, 3])"
BROKEN = {
    "nan": "KEY has numbers that are not finite",
    "inf": "KEY has numbers that are not finite",
    "too large": "KEY has numbers that are not finite",
    "complex": "KEY has complex numbers",
    "sparse": "KEY is sparse or quantized",
    "quantized": "KEY is sparse or quantized",
    "meta": "KEY has no numbers",
    "expanded": "KEY repeats the same numbers in memory",
    "integers": INTEGERS,
    "booleans": INTEGERS,
}


@pytest.mark.parametrize("kind", BROKEN)
def test_weights_of_no_use_are_refused_with_their_key(tmp_path, kind):
    net = digits_net()
    weights = net.state_dict()
    weights["init_conv.conv1.0.weight"] = broken(weights["init_conv.conv1.0.weight"], kind)
    words = BROKEN[kind].replace("KEY", "'init_conv.conv1.0.weight'")
    path = tmp_path / "x.pth"
    torch.save(weights, path)
    with pytest.raises(UserError, match=rf"^--checkpoint {path}: .*{re.escape(words)}"):
        load_net(path, DIGITS)
    if kind in ("nan", "inf", "too large", "integers"):  # others are not in such files
        path = tmp_path / "x.safetensors"
        safetensors.torch.save_file(weights, path, {"config": json.dumps(net.config)})
        with pytest.raises(UserError, match=rf"^--checkpoint {path}: .*{re.escape(words)}"):
            load_net(path, DIGITS)


def test_counts_must_be_whole_numbers(tmp_path):
    net = digits_net()
    path = tmp_path / "x.pth"
    torch.save(
        net.state_dict() | {"init_conv.conv1.1.num_batches_tracked": torch.tensor(1.5)}, path
    )
    with pytest.raises(UserError, match=r"num_batches_tracked' is \[\], expected \[\] of integers"):
        load_net(path, DIGITS)


def test_weights_in_half_precision_load(tmp_path):
    net = digits_net()
    path = tmp_path / "x.pth"
    half = {k: v.half() if v.is_floating_point() else v for k, v in net.state_dict().items()}
    torch.save(half, path)
    loaded, _ = load_net(path, DIGITS)
    assert torch.equal(
        loaded.init_conv.conv1[0].weight, net.init_conv.conv1[0].weight.half().float()
    )


def test_an_expanded_giant_takes_no_memory(tmp_path):
    """A file of some hundred bytes that says that it has 10¹² numbers."""
    path = tmp_path / "x.pth"
    giant = torch.ones(1).expand(10**6, 10**6)
    torch.save({"init_conv.conv1.0.weight": giant}, path)
    assert path.stat().st_size < 5_000
    with pytest.raises(UserError, match=r"is not this ContextUnet"):
        load_net(path, DIGITS)
    with pytest.raises(UserError, match="repeats the same numbers"):
        refuse_damaged("x", {"a": giant})


def test_a_compressed_file_is_refused(tmp_path):
    """Ten kilobytes that would become ten megabytes."""
    good = tmp_path / "good.pth"
    torch.save({"a": torch.zeros(2_500_000)}, good)
    bomb = tmp_path / "bomb.pth"
    with (
        zipfile.ZipFile(good) as source,
        zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for info in source.infolist():
            target.writestr(info.filename, source.read(info))
    assert bomb.stat().st_size < 50_000
    assert load_weights(good)[0]["a"].shape == (2_500_000,)
    with pytest.raises(UserError, match="not a whole file of PyTorch weights"):
        load_weights(bomb)


# Wrappings


WRAPPINGS = {
    "ema": lambda weights: {"ema": weights},
    "net": lambda weights: {"net": weights, "epoch": 3},
    "params": lambda weights: {"params": weights},
    "ddpm_state_dict": lambda weights: {"ddpm_state_dict": weights, "loss": 0.5},
    "two": lambda weights: {"model": {"state_dict": weights}},
    "four": lambda weights: {"net": {"params": {"model": {"state_dict": weights}}}},
    "settings of an average": lambda weights: {"ema": {"decay": 0.99}, "model": weights},
}


@pytest.mark.parametrize("name", WRAPPINGS)
def test_weights_load_from_every_usual_wrapping(tmp_path, capsys, name):
    net = digits_net()
    path = tmp_path / "x.pth"
    torch.save(WRAPPINGS[name](net.state_dict()), path)
    loaded, _ = load_net(path, DIGITS)
    assert torch.equal(loaded.init_conv.conv1[0].weight, net.init_conv.conv1[0].weight)
    assert capsys.readouterr().out == ""


def test_averaged_weights_are_taken_and_said_so(tmp_path, capsys):
    model, ema = digits_net(), digits_net()
    path = tmp_path / "x.pth"
    torch.save({"model": model.state_dict(), "ema": ema.state_dict()}, path)
    loaded, _ = load_net(path, DIGITS)
    assert torch.equal(loaded.init_conv.conv1[0].weight, ema.init_conv.conv1[0].weight)
    words = (
        f"{path}: has weights under 'model' and their average under 'ema'; takes 'ema' "
        "(x.pth::model takes the others)\n"
    )
    assert capsys.readouterr().out == words
    loaded, _ = load_net(tmp_path / "x.pth::model", DIGITS)
    assert torch.equal(loaded.init_conv.conv1[0].weight, model.init_conv.conv1[0].weight)
    for key in ("net", ""):
        with pytest.raises(UserError, match=rf"x.pth: has no weights under '{key}'"):
            load_net(tmp_path / f"x.pth::{key}", DIGITS)
    safe = tmp_path / "x.safetensors"
    save_net(safe, model, model.config)
    with pytest.raises(UserError, match=r"x.safetensors::net: a .safetensors file has no keys"):
        load_net(safe.with_name("x.safetensors::net"), DIGITS)
    assert capsys.readouterr().out == ""
    torch.save({"state_dict": model.state_dict(), "ema": {"net": ema.state_dict()}}, path)
    loaded, _ = load_net(path, DIGITS)
    assert torch.equal(loaded.init_conv.conv1[0].weight, ema.init_conv.conv1[0].weight)
    assert "has weights under 'state_dict'" in capsys.readouterr().out


def test_a_dictionary_of_parameters_is_no_network(tmp_path):
    parameters = torch.nn.ParameterDict({"a": torch.ones(2)})
    for content in (parameters, {"string_to_param": parameters}):
        torch.save(content, tmp_path / "x.pth")
        with pytest.raises(UserError, match=r"x\.pth"):
            load_net(tmp_path / "x.pth", DIGITS)


def test_a_wrapping_inside_itself_ends(tmp_path):
    path = tmp_path / "x.pth"
    content: dict = {}
    content["model"] = content
    torch.save(content, path)
    with pytest.raises(UserError, match="holds no dictionary of weights"):
        load_weights(path)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_are_removed_in_safetensors_too(tmp_path, prefix):
    net = digits_net()
    weights = {f"{prefix}{key}": value for key, value in net.state_dict().items()}
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file(weights, path, {"config": json.dumps(net.config)})
    loaded, _ = load_net(path, DIGITS)
    assert torch.equal(loaded.init_conv.conv1[0].weight, net.init_conv.conv1[0].weight)


@pytest.mark.parametrize("wrap", [lambda net: net, lambda net: {"model": net, "epoch": 3}])
def test_a_whole_module_is_named_as_such(tmp_path, wrap):
    path = tmp_path / "x.pth"
    torch.save(wrap(nn.Linear(2, 2)), path)
    for load in (load_weights, tensors_under):
        with pytest.raises(UserError) as refused:
            load(path)
        message = str(refused.value)
        assert "but a whole module, 'torch.nn.modules.linear.Linear'" in message
        assert "torch.save(module.state_dict(), FILE)" in message
        assert "\n" not in message


# Noises


def save_noise(folder: Path, name: str, noise: Any) -> None:
    folder.mkdir(exist_ok=True)
    torch.save(noise, folder / name)


NOISE = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
BAD_NOISES = {
    "nan": (NOISE / 0 * 0, "has numbers that are not finite"),
    "inf": (NOISE * 1e300, "has numbers that are not finite"),
    "integers": (NOISE.long(), "has the type torch.int64; a noise has floating-point numbers"),
    "complex": (NOISE.to(torch.complex64), "has complex numbers"),
    "sparse": (NOISE.to_sparse(), "is sparse or quantized"),
    "expanded": (torch.ones(1).expand(1, 3, 10**5, 10**5), "repeats the same numbers"),
    "a batch": (NOISE.expand(2, 3, 16, 16).clone(), "has shape [2, 3, 16, 16]"),
    "one channel": (NOISE[:, :1].clone(), "expected 1 x 3 x 16 x 16"),
    "one pixel": (NOISE[0, 0, 0, 0].clone(), "has shape []"),
    "a list": ([NOISE], "contains a list, not a tensor"),
    "a module": (nn.Linear(1, 1), "not a whole file of one tensor"),
}


@pytest.mark.parametrize("kind", BAD_NOISES)
def test_a_noise_of_no_use_is_named(tmp_path, kind):
    noise, words = BAD_NOISES[kind]
    save_noise(tmp_path / "noise", "00.pt", noise)
    with pytest.raises(UserError, match=rf"^{tmp_path}/noise/00.pt: [^\n]*{re.escape(words)}"):
        p2_ddim.read_noises(tmp_path / "noise")


def test_the_check_of_a_folder_names_bad_noises(tmp_path):
    for kind in ("nan", "integers", "complex", "expanded", "a list"):
        save_noise(tmp_path / "noise", f"{kind}.pt", BAD_NOISES[kind][0])
    report = Report()
    inspect_noises(find_noises(tmp_path / "noise"), report)
    assert len(report.problems) == 5
    for kind in ("nan", "integers", "complex", "expanded", "a list"):
        (problem,) = [text for text in report.problems if f"/{kind}.pt: " in text]
        assert BAD_NOISES[kind][1] in problem


def test_hidden_files_are_ignored_everywhere(tmp_path):
    for number in range(2):
        save_noise(tmp_path / "noise", f"{number:02d}.pt", NOISE)
        (tmp_path / "noise" / f"._{number:02d}.pt").write_bytes(b"Mac OS X")
    names, _ = p2_ddim.read_noises(tmp_path / "noise")
    assert names == ["00", "01"]

    for name in ("a", "b", "__MACOSX", ".hidden"):
        images = save_images(tmp_path / "domain" / name, noise(2, 8))
        (images / "._000.png").write_bytes(b"Mac OS X")
        (images / "Thumbs.db").write_bytes(b"Windows")
    assert find_domain(tmp_path / "domain", "--x").classes == ["a", "b"]
    assert label_by_folder(tmp_path / "domain", tmp_path).names == ["a", "b"]
    found = list_images(tmp_path / "domain", recursive=True)
    assert [path.name for path in found] == ["000.png", "001.png"] * 2


# Images


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_an_image_file_never_runs_another_program(tmp_path, monkeypatch, suffix):
    """Pillow opens EPS whatever its name is, and runs Ghostscript to draw it."""
    file = tmp_path / f"0.{suffix}"
    file.write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(code) run showpage\n%%EOF\n"
    )
    monkeypatch.setattr(subprocess, "check_call", lambda *_, **__: pytest.fail("ran a program"))
    with Image.open(file) as image:
        assert image.format == "EPS"  # the file is as hostile as it is meant to be
    with pytest.raises(UserError, match=rf"{file}: not a whole image"):
        decode_image(file)
    assert look_at(file) is None


# CLIP

CLIP = {
    "embed_dim": 32,
    "vision_cfg": {"layers": 1, "width": 64, "patch_size": 8, "image_size": 16},
    "text_cfg": {"context_length": 16, "width": 64, "heads": 1, "layers": 2},
}
HALF = {"mean": [0.5] * 3, "std": [0.5] * 3}


@pytest.mark.parametrize(
    ("vision", "changes", "words"),
    [
        (
            {"timm_model_name": "hf-hub:evil/net"},
            {},
            "expected the name of an architecture of timm",
        ),
        ({"timm_model_name": "local-dir:/tmp/x"}, {}, "expected the name of an architecture"),
        ({"timm_model_pretrained": True}, {}, "'timm_model_pretrained', which is not known here"),
        ({"image_size": 10**7}, {}, "its network has image_size 10000000"),
        ({"width": 65_536, "layers": 100}, {}, "is not a CLIP of the architecture ViT-B-32"),
        ({}, {"preprocess": {"mean": ["a"] * 3}}, "its preprocess has mean 'a'"),
        ({}, {"preprocess": None}, "has preprocess None, expected an object"),
        ({}, {"vocabulary": [1, 1]}, "which has something twice"),
    ],
)
def test_a_hostile_clip_is_one_line_without_memory_or_download(tmp_path, vision, changes, words):
    config = {"net": "clip", "arguments": CLIP | {"vision_cfg": CLIP["vision_cfg"] | vision}}
    config |= {"preprocess": HALF} | changes
    file = write_net(tmp_path / "x.safetensors", nn.Linear(2, 2), config)
    with pytest.raises(UserError, match=rf"^--checkpoint {file}: [^\n]*{re.escape(words)}"):
        load_clip("ViT-B-32", "openai", file)


def test_a_clip_with_nan_is_refused(tmp_path):
    net = nn.Linear(2, 2)
    nn.init.constant_(net.bias, float("nan"))
    file = write_net(tmp_path / "x.safetensors", net, {})
    with pytest.raises(UserError, match="'bias' has numbers that are not finite"):
        load_clip("ViT-B-32", "openai", file)
