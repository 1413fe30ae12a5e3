"""Zero-shot classification: templates, ensembles, weights of every source, evidence, pretraining, errors."""

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
from common.run import UserError, make_accelerator
from p3_clip_zeroshot import TEMPLATES, Pretrain, Zeroshot
from zeroshot.evidence import judge
from zeroshot.loading import find_labelled, load_clip

NAMES = ["apple", "traffic_light", "key"]
SMALL = {  # OpenAI's heads are 64 wide
    "embed_dim": 32,
    "vision_cfg": {"layers": 1, "width": 64, "patch_size": 8, "image_size": 16},
    "text_cfg": {"context_length": 16, "width": 64, "heads": 1, "layers": 2},
}


@pytest.fixture
def clip_dir(tmp_path: Path) -> Path:
    """The course's layout: 8 images a class in train, 4 in val, told apart by their colour."""
    folder = tmp_path / "hw2_data" / "clip_zeroshot"
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 4)):
        (folder / split).mkdir(parents=True)
        for label in range(len(NAMES)):
            for k in range(count):
                pixels = rng.integers(0, 60, (20, 24, 3), dtype=np.uint8)
                pixels[..., label] += 150
                Image.fromarray(pixels).save(folder / split / f"{label}_{k}.png")
    (folder / "id2label.json").write_text(json.dumps({str(k): name for k, name in enumerate(NAMES)}))
    return tmp_path / "hw2_data"


def small_clip(seed: int = 0, **options: Any) -> open_clip.CLIP:
    torch.manual_seed(seed)
    net = open_clip.CLIP(**SMALL, **options).eval()
    with torch.no_grad():
        net.token_embedding.weight *= 50  # so that texts differ, in length too
    return net


def save_ours(net: open_clip.CLIP, path: Path) -> Path:
    config = {"net": "clip", "arguments": SMALL, "preprocess": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    metadata = {"config": json.dumps(config)}
    safetensors.torch.save_file(net.state_dict(), path, metadata)
    return path


@pytest.fixture
def arguments(clip_dir: Path, tmp_path: Path) -> Zeroshot:
    checkpoint = save_ours(small_clip(), tmp_path / "small.safetensors")
    options = {"output_dir": tmp_path / "out" / "clip", "device": "cpu", "precision": "fp32", "batch_size": 5}
    return Zeroshot(data_dir=clip_dir, checkpoint=checkpoint, **options)


def test_templates() -> None:
    assert {name: len(set(templates)) for name, templates in TEMPLATES.items()} == {
        "course": 1,
        "article": 1,
        "cifar18": 18,
        "imagenet80": 80,
    }
    assert script.prompts_of("traffic_light", TEMPLATES["course"], "spaces") == ["A photo of traffic light."]
    assert script.prompts_of("traffic_light", TEMPLATES["course"], "underscores") == ["A photo of traffic_light."]
    assert script.prompts_of("apple", TEMPLATES["article"], "spaces") == ["A photo of an apple."]
    assert script.prompts_of("key", TEMPLATES["article"], "spaces") == ["A photo of a key."]
    assert {"a photo of a key.", "a bad photo of the key.", "a photo of the small key."} <= set(
        script.prompts_of("key", TEMPLATES["cifar18"], "spaces")
    )
    assert "a tattoo of a key." in script.prompts_of("key", TEMPLATES["imagenet80"], "spaces")


def test_classifier_is_open_clips(arguments: Zeroshot) -> None:
    """To 1e-6, sums of float32 in another order; without the first normalisation it would not be."""
    clip, accelerator = load_clip("ViT-B-32", "openai", arguments.checkpoint), make_accelerator("cpu", "fp32")
    names = [name.replace("_", " ") for name in NAMES]
    templates = TEMPLATES["cifar18"]
    expected = open_clip.build_zero_shot_classifier(clip.net, clip.tokenizer, names, templates).T
    texts = [template.format(name) for name in names for template in templates]
    features = script.encode_texts(clip, texts, accelerator, arguments)
    ours = script.classifier(NAMES, templates, "spaces", features)
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=0)
    with torch.no_grad():
        raw = clip.net.encode_text(clip.tokenizer(texts)).view(3, 18, -1)
    assert raw.norm(dim=-1).std() > 0.01
    wrong = torch.nn.functional.normalize(raw.mean(1), dim=-1)
    assert (wrong - expected).abs().max() > 1e-4
    found = find_labelled(arguments.data_dir, "val")
    images = script.encode_images(clip, found.paths, accelerator, arguments)
    with torch.no_grad():
        alone = [clip.net.encode_image(clip.preprocess(Image.open(p).convert("RGB"))[None], True) for p in found.paths]
        logits = clip.net.logit_scale.exp() * torch.cat(alone) @ expected.T
        torch.testing.assert_close(clip.net.logit_scale.exp() * images @ ours.T, logits, atol=1e-4, rtol=0)


def test_texts_are_encoded_once(arguments: Zeroshot, monkeypatch: pytest.MonkeyPatch) -> None:
    clip, accelerator = load_clip("ViT-B-32", "openai", arguments.checkpoint), make_accelerator("cpu", "fp32")
    first = script.encode_texts(clip, ["a", "b"], accelerator, arguments)
    quick = clip._replace(net=small_clip(0, quick_gelu=True))  # the same weights
    assert not torch.equal(script.encode_texts(quick, ["a", "b"], accelerator, arguments)["a"], first["a"])
    other = clip._replace(net=small_clip(1))
    assert not torch.equal(script.encode_texts(other, ["a", "b"], accelerator, arguments)["a"], first["a"])
    monkeypatch.setattr(type(clip.net), "encode_text", None)  # what is kept needs no net
    again = script.encode_texts(clip, ["a", "b"], accelerator, arguments)
    assert all(torch.equal(first[text], again[text]) for text in first)


def openai_file(net: open_clip.CLIP, path: Path, archive: bool) -> Path:
    """As OpenAI's files are: half precision, three numbers beside the weights, a TorchScript archive or a pickle."""
    numbers = {"input_resolution": 16, "context_length": 16, "vocab_size": 49408}
    weights = {k: v.half() for k, v in net.state_dict().items()} | {k: torch.tensor(v) for k, v in numbers.items()}
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
    images, tokens = torch.randn(2, 3, 16, 16), clip.tokenizer(["a photo", "of a key"])
    with torch.no_grad():
        torch.testing.assert_close(clip.net.encode_image(images), net.encode_image(images), atol=1e-6, rtol=0)
        torch.testing.assert_close(clip.net.encode_text(tokens), net.encode_text(tokens), atol=1e-6, rtol=0)
        assert (other.encode_text(tokens) - net.encode_text(tokens)).abs().max() > 1e-3  # GELU would be seen
    assert clip.preprocess(Image.new("RGB", (40, 20))).shape == (3, 16, 16)


def test_named_weights_get_the_activation_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def create(model: str, pretrained: str | None = None, force_quick_gelu: bool = False, **_: Any) -> tuple:
        asked[pretrained] = force_quick_gelu
        return small_clip(), None, None

    monkeypatch.setattr(open_clip, "create_model_and_transforms", create)
    for tag in ("openai", "laion2b_s34b_b79k"):
        assert load_clip("ViT-B-32", tag, None).name == f"ViT-B-32, {tag}"
    assert asked == {"openai": True, "laion2b_s34b_b79k": False}


def test_a_state_file_of_open_clips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = small_clip()
    torch.save({"state_dict": {f"module.{k}": v for k, v in net.state_dict().items()}, "epoch": 3}, tmp_path / "e.pt")

    def create(model: str, pretrained: None, force_quick_gelu: bool, **_: Any) -> tuple:
        return small_clip(1, quick_gelu=force_quick_gelu), None, None

    monkeypatch.setattr(open_clip, "create_model_and_transforms", create)
    clip = load_clip("ViT-B-32", "openai", tmp_path / "e.pt")
    assert torch.equal(clip.net.visual.proj, net.visual.proj)
    assert "QuickGELU" in repr(clip.net)  # --pretrained openai tells so


def test_judge() -> None:
    scores = torch.eye(10)[torch.arange(40) % 10] + 0.1 * torch.linspace(1, 0, 10)  # always right ...
    labels = torch.arange(40) % 10
    labels[:8] = 9  # ... but for eight, none of which is predicted as 9
    told = judge(scores, labels)
    assert told["accuracy"] == 100 * 32 / 40
    p, n, z = 32 / 40, 40, 1.959964
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 100 / (1 + z * z / n)
    assert told["interval"] == pytest.approx([scale * (middle - half), scale * (middle + half)], abs=1e-4)
    assert told["top5"] == 80  # class 9 has the least of the others' scores


def test_zeroshot_writes_its_evidence(arguments: Zeroshot) -> None:
    result = script.main(dataclasses.replace(arguments, templates="cifar18", prompt=None))
    out = arguments.output_dir
    assert json.loads((out / "result.json").read_text())["accuracy"] == result["accuracy"]
    with (out / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["image_name"] for row in rows] == [f"{label}_{k}.png" for label in range(3) for k in range(4)]
    assert sum(row["label"] == row["predicted"] for row in rows) == sum(row["right"] == "1" for row in rows)
    assert result["accuracy"] == pytest.approx(100 * sum(row["right"] == "1" for row in rows) / 12)
    assert all(row["name1"] == row["predicted"] and float(row["p1"]) >= float(row["p2"]) for row in rows)
    assert all(sum(float(row[f"p{k}"]) for k in (1, 2, 3)) == pytest.approx(1, abs=2e-4) for row in rows)
    with (out / "per_class.csv").open() as file:
        classes = list(csv.DictReader(file))
    assert [(row["class"], row["images"]) for row in classes] == [(name, "4") for name in NAMES]
    with (out / "table.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["accuracy, %"] for row in table[:2]] == ["56.64", "not measured"]
    ours = {(row["prompts"], row["names"]): float(row["accuracy, %"]) for row in table[2:]}
    assert set(ours) == {(kind, way) for kind in TEMPLATES for way in ("spaces", "underscores")}
    assert ours["cifar18", "spaces"] == pytest.approx(result["accuracy"], abs=0.005)
    for name in ("cases.png", "confusion.png", "similarity.png", "table.png"):
        with Image.open(out / name) as image:
            assert min(image.size) > 100
            assert np.asarray(image.convert("L")).std() > 1


def test_a_prompt_of_ones_own(arguments: Zeroshot) -> None:
    result = script.main(dataclasses.replace(arguments, prompt="{} seen from afar", names="underscores"))
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
    rows = [math.log(1 + math.exp(-2)), math.log(1 + math.exp(-1)), math.log(2)]  # -log softmax over the captions
    first = math.log(math.e**2 + 1 + math.e) - (2 + 1) / 2  # over the images; two positives share the weight
    second = math.log(1 + 2 * math.e) - 1
    expected = (np.mean(rows) + np.mean([first, second])) / 2
    assert script.contrastive_loss(logits, same).item() == pytest.approx(expected, abs=1e-6)


@pytest.fixture
def pretraining(clip_dir: Path, tmp_path: Path) -> Pretrain:
    options = {"epochs": 2, "batch_size": 6, "image_size": 32, "device": "cpu", "precision": "fp32"}
    return Pretrain(data_dir=clip_dir, output_dir=tmp_path / "runs" / "whole", **options)


def test_pretraining_resumes_bit_for_bit_and_serves_zeroshot(
    pretraining: Pretrain, arguments: Zeroshot, stop_in_step_1: Callable
) -> None:
    result = script.main(pretraining)
    assert result["epoch"] == 2
    broken = dataclasses.replace(pretraining, output_dir=pretraining.output_dir.parent / "broken")
    stop_in_step_1(script.pretrain, broken)
    script.main(broken)
    first, second = (safetensors.torch.load_file(run.output_dir / "model.safetensors") for run in (pretraining, broken))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    checkpoint = pretraining.output_dir / "model.safetensors"
    assert script.main(dataclasses.replace(arguments, checkpoint=checkpoint))["images"] == 12


def test_pretraining_learns(pretraining: Pretrain, arguments: Zeroshot) -> None:
    script.main(dataclasses.replace(pretraining, epochs=12, augment=(), lr=2e-3))
    checkpoint = pretraining.output_dir / "model.safetensors"
    assert script.main(dataclasses.replace(arguments, checkpoint=checkpoint))["accuracy"] == 100  # chance 33


def test_pretraining_refuses(pretraining: Pretrain) -> None:
    for flag, changes in {"--vision": {"vision": "resnet17"}, "--image-size": {"image_size": 16}}.items():
        with pytest.raises(UserError, match=flag):
            script.main(dataclasses.replace(pretraining, **changes))
        assert not pretraining.output_dir.exists()


def refuse(*_: Any, **__: Any) -> None:
    raise OSError("no route to the hub\nmore")


def test_mistakes(arguments: Zeroshot, clip_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def told(**changes: Any) -> str:
        with pytest.raises(UserError) as caught:
            script.main(dataclasses.replace(arguments, **changes))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    val, ids = clip_dir / "clip_zeroshot" / "val", clip_dir / "clip_zeroshot" / "id2label.json"
    assert "--data-dir" in told(data_dir=tmp_path / "none")
    (tmp_path / "empty").mkdir()
    assert "--data-dir" in told(data_dir=tmp_path / "empty")
    assert "--split" in told(split="vall")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    assert "holds a training run" in told(output_dir=tmp_path / "run")
    assert "--prompt" in told(prompt="a photo")
    assert "--prompt" in told(prompt="a {broken")
    assert "--model" in told(model="ViT-B-33")
    assert "--pretrained" in told(pretrained="opnai", checkpoint=None)
    with monkeypatch.context() as patch:
        patch.setattr(open_clip, "create_model_and_transforms", refuse)
        assert "no route to the hub more); fetch" in told(checkpoint=None)
    (tmp_path / "noise.pt").write_bytes(b"nothing")
    assert "noise.pt" in told(checkpoint=tmp_path / "noise.pt")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pt")
    assert "other.pt" in told(checkpoint=tmp_path / "other.pt")
    assert "--checkpoint" in told(checkpoint=tmp_path / "none.pt")
    (val / "1_9.png").write_bytes((val / "1_0.png").read_bytes()[:50])
    assert "1_9.png" in told()
    (val / "1_9.png").rename(val / "7_9.png")
    assert "7_9.png: its class id '7'" in told()
    ids.write_text("{")
    assert "id2label.json" in told()
    for path in val.iterdir():
        path.unlink()
    ids.write_text('{"0": "apple"}')
    assert "no PNG or JPEG image" in told()
    assert not arguments.output_dir.exists() or not any(arguments.output_dir.iterdir())


def test_zeroshot_is_the_command_if_none_is_named(tmp_path: Path) -> None:
    command = [sys.executable, script.__file__, "--data-dir", str(tmp_path / "none")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, f"error: --data-dir {tmp_path / 'none'}: no such folder\n")
