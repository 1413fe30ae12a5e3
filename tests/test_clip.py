"""Zero-shot classification: templates, ensembles, weights, evidence, pretraining, errors."""

import csv
import dataclasses
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import safetensors.torch
import torch
from PIL import Image

import p3_clip_zeroshot as script
from common.cli import UserError
from common.device import make_accelerator
from p3_clip_zeroshot import Pretrain, Zeroshot
from zeroshot.evidence import measure
from zeroshot.loading import Clip, find_labelled, load_clip
from zeroshot.pretrain import contrastive_loss, pretrain
from zeroshot.prompts import prompts_of, template_sets

NAMES = ["apple", "traffic_light", "key"]
# The smallest network of the right form: OpenAI's heads are 64 wide.
SMALL = {
    "embed_dim": 32,
    "vision_cfg": {"layers": 1, "width": 64, "patch_size": 8, "image_size": 16},
    "text_cfg": {"context_length": 16, "width": 64, "heads": 1, "layers": 2},
}


@pytest.fixture
def clip_dir(tmp_path: Path) -> Path:
    """The course's layout: 8 images of each class in train, 4 in val; the colour is the class."""
    folder = tmp_path / "hw2_data" / "clip_zeroshot"
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 4)):
        (folder / split).mkdir(parents=True)
        for label in range(len(NAMES)):
            for k in range(count):
                pixels = rng.integers(0, 60, (20, 24, 3), dtype=np.uint8)
                pixels[..., label] += 150
                Image.fromarray(pixels).save(folder / split / f"{label}_{k}.png")
    names = {str(k): name for k, name in enumerate(NAMES)}
    (folder / "id2label.json").write_text(json.dumps(names))
    return tmp_path / "hw2_data"


def small_clip(seed: int = 0, **options: Any) -> open_clip.CLIP:
    torch.manual_seed(seed)
    net = open_clip.CLIP(**SMALL, **options).eval()
    with torch.no_grad():
        net.token_embedding.weight *= 50  # so that texts differ, in length too
    return net


def save_ours(net: open_clip.CLIP, path: Path) -> Path:
    config = {
        "net": "clip",
        "arguments": SMALL,
        "preprocess": {"mean": [0.5] * 3, "std": [0.5] * 3},
    }
    metadata = {"config": json.dumps(config)}
    safetensors.torch.save_file(net.state_dict(), path, metadata)
    return path


@pytest.fixture
def arguments(clip_dir: Path, tmp_path: Path) -> Zeroshot:
    checkpoint = save_ours(small_clip(), tmp_path / "small.safetensors")
    return Zeroshot(
        data_dir=clip_dir,
        checkpoint=checkpoint,
        output_dir=tmp_path / "out" / "clip",
        device="cpu",
        precision="fp32",
        batch_size=5,
    )


@pytest.fixture
def clip(arguments: Zeroshot) -> Clip:
    """The small CLIP, loaded from its file."""
    return load_clip("ViT-B-32", "openai", arguments.checkpoint)


def test_numbers_of_templates() -> None:
    sets = template_sets()
    numbers = {name: len(set(templates)) for name, templates in sets.items()}
    assert numbers == {"course": 1, "article": 1, "cifar18": 18, "imagenet80": 80}


def test_names_in_templates() -> None:
    sets = template_sets()
    assert prompts_of("traffic_light", sets["course"], "spaces") == ["A photo of traffic light."]
    assert prompts_of("traffic_light", sets["course"], "underscores") == [
        "A photo of traffic_light."
    ]
    assert prompts_of("apple", sets["article"], "spaces") == ["A photo of an apple."]
    assert prompts_of("key", sets["article"], "spaces") == ["A photo of a key."]
    cifar = prompts_of("key", sets["cifar18"], "spaces")
    assert "a photo of a key." in cifar
    assert "a bad photo of the key." in cifar
    assert "a photo of the small key." in cifar
    assert "a tattoo of a key." in prompts_of("key", sets["imagenet80"], "spaces")


def test_class_vectors_are_open_clips(arguments: Zeroshot, clip: Clip) -> None:
    """To 1e-6, for sums of float32 in another order.

    Without the first normalisation the difference would be larger than that.
    """
    accelerator = make_accelerator("cpu", "fp32")
    names = [name.replace("_", " ") for name in NAMES]
    templates = template_sets()["cifar18"]
    expected = open_clip.build_zero_shot_classifier(clip.net, clip.tokenizer, names, templates).T
    texts = [template.format(name) for name in names for template in templates]
    features = script.encode_texts(clip, texts, accelerator, arguments)
    ours = script.class_vectors(NAMES, templates, "spaces", features)
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=0)
    with torch.no_grad():
        raw = clip.net.encode_text(clip.tokenizer(texts)).view(3, 18, -1)
    assert raw.norm(dim=-1).std() > 0.01
    wrong = torch.nn.functional.normalize(raw.mean(1), dim=-1)
    assert (wrong - expected).abs().max() > 1e-4


def test_logits_of_images_are_open_clips(arguments: Zeroshot, clip: Clip) -> None:
    """Images are encoded in batches here, and one at a time there."""
    accelerator = make_accelerator("cpu", "fp32")
    templates = template_sets()["cifar18"]
    vectors = open_clip.build_zero_shot_classifier(clip.net, clip.tokenizer, NAMES, templates).T
    paths = find_labelled(arguments.data_dir, "val").paths
    images = script.encode_images(clip, paths, accelerator, arguments)
    alone = []
    with torch.no_grad():
        for path in paths:
            image = clip.preprocess(Image.open(path).convert("RGB"))
            alone.append(clip.net.encode_image(image[None], normalize=True))
        scale = clip.net.logit_scale.exp()
        expected = scale * torch.cat(alone) @ vectors.T
        torch.testing.assert_close(scale * images @ vectors.T, expected, atol=1e-4, rtol=0)


def test_texts_are_encoded_once(
    arguments: Zeroshot, clip: Clip, monkeypatch: pytest.MonkeyPatch
) -> None:
    accelerator = make_accelerator("cpu", "fp32")

    def encode(net: torch.nn.Module) -> dict[str, torch.Tensor]:
        return script.encode_texts(clip._replace(net=net), ["a", "b"], accelerator, arguments)

    first = encode(clip.net)
    with_quick_gelu = small_clip(0, quick_gelu=True)  # the same weights
    assert not torch.equal(encode(with_quick_gelu)["a"], first["a"])
    assert not torch.equal(encode(small_clip(1))["a"], first["a"])
    monkeypatch.setattr(type(clip.net), "encode_text", None)  # what is cached needs no network
    again = encode(clip.net)
    assert all(torch.equal(first[text], again[text]) for text in first)


def openai_file(net: open_clip.CLIP, path: Path, archive: bool) -> Path:
    """A file like OpenAI's: half precision, three numbers beside the weights.

    It is a TorchScript archive, or a pickle.
    """
    weights = {key: value.half() for key, value in net.state_dict().items()}
    weights["input_resolution"] = torch.tensor(16)
    weights["context_length"] = torch.tensor(16)
    weights["vocab_size"] = torch.tensor(49408)
    if not archive:
        torch.save(weights, path)
        return path
    holder = torch.nn.Module()
    for key, value in weights.items():
        *parents, name = key.split(".")
        place = holder
        for parent in parents:
            if not hasattr(place, parent):
                place.add_module(parent, torch.nn.Module())
            place = getattr(place, parent)
        place.register_buffer(name, value)
    torch.jit.script(holder).save(path)
    return path


@pytest.mark.parametrize("archive", [False, True])
def test_openai_weights_get_quickgelu(tmp_path: Path, archive: bool) -> None:
    net = small_clip(quick_gelu=True)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(parameter.half())  # so that the file loses nothing
    clip = load_clip("ViT-B-32", "openai", openai_file(net, tmp_path / "ViT-B-32.pt", archive))
    other = open_clip.CLIP(**SMALL).eval()
    other.load_state_dict(net.state_dict())
    images = torch.randn(2, 3, 16, 16)
    tokens = clip.tokenizer(["a photo", "of a key"])
    with torch.no_grad():
        expected = net.encode_image(images)
        torch.testing.assert_close(clip.net.encode_image(images), expected, atol=1e-6, rtol=0)
        expected = net.encode_text(tokens)
        torch.testing.assert_close(clip.net.encode_text(tokens), expected, atol=1e-6, rtol=0)
        with_gelu = other.encode_text(tokens)
        assert (with_gelu - expected).abs().max() > 1e-3  # so GELU would be seen
    assert clip.preprocess(Image.new("RGB", (40, 20))).shape == (3, 16, 16)


def test_named_weights_get_the_activation_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def create(
        model: str, pretrained: str | None = None, force_quick_gelu: bool = False, **_: Any
    ) -> tuple:
        asked[pretrained] = force_quick_gelu
        return small_clip(), None, None

    monkeypatch.setattr(open_clip, "create_model_and_transforms", create)
    for tag in ("openai", "laion2b_s34b_b79k"):
        assert load_clip("ViT-B-32", tag, None).name == f"ViT-B-32, {tag}"
    assert asked == {"openai": True, "laion2b_s34b_b79k": False}


def test_a_state_file_of_open_clips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = small_clip()
    weights = {f"module.{key}": value for key, value in net.state_dict().items()}
    torch.save({"state_dict": weights, "epoch": 3}, tmp_path / "e.pt")

    def create(model: str, pretrained: None, force_quick_gelu: bool, **_: Any) -> tuple:
        return small_clip(1, quick_gelu=force_quick_gelu), None, None

    monkeypatch.setattr(open_clip, "create_model_and_transforms", create)
    clip = load_clip("ViT-B-32", "openai", tmp_path / "e.pt")
    assert torch.equal(clip.net.visual.proj, net.visual.proj)
    assert "QuickGELU" in repr(clip.net)  # because of --pretrained openai


def test_accuracy_its_interval_and_top_5() -> None:
    labels = torch.arange(40) % 10
    scores = torch.eye(10)[labels] + 0.1 * torch.linspace(1, 0, 10)  # always correct …
    labels[:8] = 9  # … except for eight, none of which is predicted as 9
    measured = measure(scores, labels)
    assert measured["accuracy"] == 100 * 32 / 40
    # Wilson's interval.
    p = 32 / 40
    n = 40
    z = 1.959964
    middle = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 100 / (1 + z * z / n)
    expected = [scale * (middle - half), scale * (middle + half)]
    assert measured["interval"] == pytest.approx(expected, abs=1e-4)
    assert measured["top5"] == 80  # class 9 has the smallest of the other scores


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a csv by its header."""
    with path.open() as file:
        return list(csv.DictReader(file))


def test_zeroshot_writes_its_evidence(arguments: Zeroshot) -> None:
    result = script.main(dataclasses.replace(arguments, templates="cifar18", prompt=None))
    out = arguments.output_dir
    assert json.loads((out / "result.json").read_text())["accuracy"] == result["accuracy"]

    rows = read_csv(out / "predictions.csv")
    names = [f"{label}_{k}.png" for label in range(3) for k in range(4)]
    assert [row["image_name"] for row in rows] == names
    correct = sum(row["right"] == "1" for row in rows)
    assert sum(row["label"] == row["predicted"] for row in rows) == correct
    assert result["accuracy"] == pytest.approx(100 * correct / 12)
    for row in rows:
        assert row["name1"] == row["predicted"]
        assert float(row["p1"]) >= float(row["p2"])
        total = sum(float(row[f"p{k}"]) for k in (1, 2, 3))
        assert total == pytest.approx(1, abs=2e-4)

    classes = read_csv(out / "per_class.csv")
    assert [(row["class"], row["images"]) for row in classes] == [(name, "4") for name in NAMES]
    table = read_csv(out / "table.csv")
    assert [row["accuracy, %"] for row in table[:2]] == ["56.64", "not measured"]
    ours = {(row["prompts"], row["names"]): float(row["accuracy, %"]) for row in table[2:]}
    ways = ("spaces", "underscores")
    assert set(ours) == {(kind, way) for kind in template_sets() for way in ways}
    assert ours["cifar18", "spaces"] == pytest.approx(result["accuracy"], abs=0.005)
    for name in ("cases.png", "confusion.png", "similarity.png", "table.png"):
        with Image.open(out / name) as image:
            assert min(image.size) > 100
            assert np.asarray(image.convert("L")).std() > 1


def test_a_prompt_of_ones_own(arguments: Zeroshot) -> None:
    changed = dataclasses.replace(arguments, prompt="{} seen from afar", names="underscores")
    result = script.main(changed)
    assert (result["templates"], result["names"]) == ("prompt", "underscores")
    assert "| prompt | underscores |" in (arguments.output_dir / "table.md").read_text()


def test_a_folder_for_each_class(tmp_path: Path) -> None:
    for name in ("cat", "ant"):
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "data" / name / "0.jpg")
    Image.new("RGB", (8, 8)).save(tmp_path / "data" / "cat" / "1.png")
    found = find_labelled(tmp_path / "data", "val")
    assert found.names == ["ant", "cat"]
    assert found.labels.tolist() == [0, 1, 1]
    assert [path.name for path in found.paths] == ["0.jpg", "0.jpg", "1.png"]


def test_contrastive_loss() -> None:
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    same = torch.tensor([[True, False], [False, True], [True, False]])
    # Each image over the captions: -log softmax of its own.
    of_images = [math.log(1 + math.exp(-2)), math.log(1 + math.exp(-1)), math.log(2)]
    # Each caption over the images; the two positive images of the first share the weight.
    first = math.log(math.e**2 + 1 + math.e) - (2 + 1) / 2
    second = math.log(1 + 2 * math.e) - 1
    expected = (np.mean(of_images) + np.mean([first, second])) / 2
    assert contrastive_loss(logits, same).item() == pytest.approx(expected, abs=1e-6)


@pytest.fixture
def pretraining(clip_dir: Path, tmp_path: Path) -> Pretrain:
    return Pretrain(
        data_dir=clip_dir,
        output_dir=tmp_path / "runs" / "whole",
        epochs=2,
        batch_size=6,
        image_size=32,
        device="cpu",
        precision="fp32",
    )


def test_pretraining_resumes_bit_for_bit_and_serves_zeroshot(
    pretraining: Pretrain, arguments: Zeroshot, stop_in_step_1: Callable
) -> None:
    result = script.main(pretraining)
    assert result["epoch"] == 2
    other_dir = pretraining.output_dir.parent / "stopped"
    stopped = dataclasses.replace(pretraining, output_dir=other_dir)
    stop_in_step_1(pretrain, stopped)
    script.main(stopped)
    checkpoint = pretraining.output_dir / "model.safetensors"
    first = safetensors.torch.load_file(checkpoint)
    second = safetensors.torch.load_file(other_dir / "model.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    result = script.main(dataclasses.replace(arguments, checkpoint=checkpoint))
    assert result["images"] == 12


def test_pretraining_learns(pretraining: Pretrain, arguments: Zeroshot) -> None:
    script.main(dataclasses.replace(pretraining, epochs=12, augment=(), lr=2e-3))
    checkpoint = pretraining.output_dir / "model.safetensors"
    result = script.main(dataclasses.replace(arguments, checkpoint=checkpoint))
    assert result["accuracy"] == 100  # chance is 33


@pytest.mark.parametrize(
    ("flag", "change"),
    [("--vision", {"vision": "resnet17"}), ("--image-size", {"image_size": 16})],
)
def test_pretraining_refuses(pretraining: Pretrain, flag: str, change: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=flag):
        script.main(dataclasses.replace(pretraining, **change))
    assert not pretraining.output_dir.exists()


@pytest.fixture
def mistake(arguments: Zeroshot) -> Callable[..., str]:
    """`mistake(**changes)` is the error of a run with these arguments; nothing may be written."""

    def run(**changes: Any) -> str:
        with pytest.raises(UserError) as caught:
            script.main(dataclasses.replace(arguments, **changes))
        assert "\n" not in str(caught.value)
        out = arguments.output_dir
        assert not out.exists() or not any(out.iterdir())
        return str(caught.value)

    return run


def test_mistakes_in_options(mistake: Callable[..., str], tmp_path: Path) -> None:
    assert "--data-dir" in mistake(data_dir=tmp_path / "none")
    (tmp_path / "empty").mkdir()
    assert "--data-dir" in mistake(data_dir=tmp_path / "empty")
    assert "--split" in mistake(split="vall")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    assert "holds a training run" in mistake(output_dir=tmp_path / "run")
    assert "--prompt" in mistake(prompt="a photo")
    assert "--prompt" in mistake(prompt="a {broken")
    assert "--model" in mistake(model="ViT-B-33")
    assert "--pretrained" in mistake(pretrained="opnai", checkpoint=None)


def test_missing_and_broken_weights(
    mistake: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("no route to the hub\nmore")

    with monkeypatch.context() as patch:
        patch.setattr(open_clip, "create_model_and_transforms", refuse)
        assert "no route to the hub more); download" in mistake(checkpoint=None)
    (tmp_path / "noise.pt").write_bytes(b"nothing")
    assert "noise.pt" in mistake(checkpoint=tmp_path / "noise.pt")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pt")
    assert "other.pt" in mistake(checkpoint=tmp_path / "other.pt")
    assert "--checkpoint" in mistake(checkpoint=tmp_path / "none.pt")


def test_broken_data(mistake: Callable[..., str], clip_dir: Path) -> None:
    val = clip_dir / "clip_zeroshot" / "val"
    ids = clip_dir / "clip_zeroshot" / "id2label.json"
    (val / "1_9.png").write_bytes((val / "1_0.png").read_bytes()[:50])
    assert "1_9.png" in mistake()
    (val / "1_9.png").rename(val / "7_9.png")
    assert "7_9.png: its class id '7'" in mistake()
    ids.write_text("{")
    assert "id2label.json" in mistake()
    for path in val.iterdir():
        path.unlink()
    ids.write_text('{"0": "apple"}')
    assert "no PNG or JPEG image" in mistake()


def test_zeroshot_is_the_command_if_none_is_named(tmp_path: Path) -> None:
    command = [sys.executable, script.__file__, "--data-dir", str(tmp_path / "none")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == f"error: --data-dir {tmp_path / 'none'}: no such folder\n"
