"""Zero-shot classification: prompts, weights of every source, evidence, pretraining, mistakes."""

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
from torch import Tensor
from torch.nn import functional as F

import p3_clip_zeroshot
from common.checkpoints import tensors_under
from common.cli import UserError
from common.device import make_accelerator
from p3_clip_zeroshot import Zeroshot, class_vectors, encode_images, encode_texts
from zeroshot.evidence import measure
from zeroshot.loading import Clip, find_labelled, load_clip
from zeroshot.pretrain import Pretrain, contrastive_loss, pretrain
from zeroshot.prompts import prompts_of, template_sets

NAMES = ["apple", "traffic_light", "key"]
SMALL = {  # OpenAI's attention heads are 64 wide
    "embed_dim": 32,
    "vision_cfg": {"layers": 1, "width": 64, "patch_size": 8, "image_size": 16},
    "text_cfg": {"context_length": 16, "width": 64, "heads": 1, "layers": 2},
}


@pytest.fixture
def clip_dir(tmp_path: Path) -> Path:
    """The course's layout: 8 images a class in train and 4 in val, of a colour for each class."""
    folder = tmp_path / "hw2_data" / "clip_zeroshot"
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 4)):
        (folder / split).mkdir(parents=True)
        for label in range(len(NAMES)):
            for k in range(count):
                pixels = rng.integers(0, 60, (20, 24, 3), dtype=np.uint8)
                pixels[..., label] += 150
                Image.fromarray(pixels).save(folder / split / f"{label}_{k}.png")
    ids = {str(label): name for label, name in enumerate(NAMES)}
    (folder / "id2label.json").write_text(json.dumps(ids))
    return tmp_path / "hw2_data"


def small_clip(seed: int = 0, **options: Any) -> open_clip.CLIP:
    torch.manual_seed(seed)
    net = open_clip.CLIP(**SMALL, **options).eval()
    with torch.no_grad():
        net.token_embedding.weight *= 50  # so that texts differ, in length too
    return net


@pytest.fixture
def arguments(clip_dir: Path, tmp_path: Path) -> Zeroshot:
    """Arguments that classify with a small CLIP, from a file as `pretrain` writes it."""
    checkpoint = tmp_path / "small.safetensors"
    half = {"mean": [0.5] * 3, "std": [0.5] * 3}
    config = json.dumps({"net": "clip", "arguments": SMALL, "preprocess": half})
    safetensors.torch.save_file(small_clip().state_dict(), checkpoint, {"config": config})
    return Zeroshot(
        data_dir=clip_dir,
        checkpoint=checkpoint,
        output_dir=tmp_path / "out" / "clip",
        batch_size=5,
        device="cpu",
        precision="fp32",
    )


def load(arguments: Zeroshot) -> Clip:
    return load_clip("ViT-B-32", "openai", arguments.checkpoint)


def read_csv(file: Path) -> list[dict[str, str]]:
    with file.open() as content:
        return list(csv.DictReader(content))


# Prompts


def test_there_are_four_sets_of_templates() -> None:
    sizes = {name: len(set(templates)) for name, templates in template_sets().items()}
    assert sizes == {"course": 1, "article": 1, "cifar18": 18, "imagenet80": 80}


def test_names_are_filled_into_the_templates() -> None:
    sets = template_sets()
    course = sets["course"]
    assert prompts_of("traffic_light", course, "spaces") == ["A photo of traffic light."]
    assert prompts_of("traffic_light", course, "underscores") == ["A photo of traffic_light."]
    assert prompts_of("apple", sets["article"], "spaces") == ["A photo of an apple."]
    assert prompts_of("key", sets["article"], "spaces") == ["A photo of a key."]
    cifar = prompts_of("key", sets["cifar18"], "spaces")
    for prompt in ("a photo of a key.", "a bad photo of the key.", "a photo of the small key."):
        assert prompt in cifar
    assert "a tattoo of a key." in prompts_of("key", sets["imagenet80"], "spaces")


# The method. Sums of float32 in another order agree to 1e-6.


def test_class_vectors_are_those_of_open_clip(arguments: Zeroshot) -> None:
    clip = load(arguments)
    accelerator = make_accelerator("cpu", "fp32")
    templates = template_sets()["cifar18"]
    texts = []
    for name in NAMES:
        texts += prompts_of(name, templates, "spaces")
    features = encode_texts(clip, texts, accelerator, arguments)
    ours = class_vectors(NAMES, templates, "spaces", features)

    names = [name.replace("_", " ") for name in NAMES]
    theirs = open_clip.build_zero_shot_classifier(clip.net, clip.tokenizer, names, templates).T
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)

    # The test would see it if the vectors of the prompts were not normalised before their mean.
    with torch.no_grad():
        raw = clip.net.encode_text(clip.tokenizer(texts)).view(3, 18, -1)
    assert raw.norm(dim=-1).std() > 0.01
    wrong = F.normalize(raw.mean(1), dim=-1)
    assert (wrong - theirs).abs().max() > 1e-4


def test_image_vectors_are_those_of_open_clip(arguments: Zeroshot) -> None:
    clip = load(arguments)
    paths = find_labelled(arguments.data_dir, "val").paths
    ours = encode_images(clip, paths, make_accelerator("cpu", "fp32"), arguments)
    theirs = []
    for path in paths:
        image = clip.preprocess(Image.open(path).convert("RGB"))
        with torch.no_grad():
            theirs.append(clip.net.encode_image(image[None], normalize=True))
    torch.testing.assert_close(ours, torch.cat(theirs), atol=1e-6, rtol=0)


def test_texts_are_encoded_once_for_each_network(
    arguments: Zeroshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = load(arguments)
    accelerator = make_accelerator("cpu", "fp32")

    def encode(net: open_clip.CLIP) -> dict[str, Tensor]:
        return encode_texts(clip._replace(net=net), ["a", "b"], accelerator, arguments)

    first = encode(clip.net)
    same_weights_other_activation = encode(small_clip(quick_gelu=True))
    assert not torch.equal(same_weights_other_activation["a"], first["a"])
    other_weights = encode(small_clip(seed=1))
    assert not torch.equal(other_weights["a"], first["a"])
    monkeypatch.setattr(type(clip.net), "encode_text", None)  # what is cached needs no network
    cached = encode(clip.net)
    for text, vector in first.items():
        assert torch.equal(cached[text], vector)


# Weights of every source


def openai_file(net: open_clip.CLIP, path: Path, archive: bool) -> Path:
    """Write a file like OpenAI's: half precision, and three numbers beside the weights.

    It is a TorchScript archive or a pickle.
    """
    weights = {key: value.half() for key, value in net.state_dict().items()}
    numbers = {"input_resolution": 16, "context_length": 16, "vocab_size": 49408}
    for key, number in numbers.items():
        weights[key] = torch.tensor(number)
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
    assert clip.preprocess(Image.new("RGB", (40, 20))).shape == (3, 16, 16)

    with_gelu = open_clip.CLIP(**SMALL).eval()
    with_gelu.load_state_dict(net.state_dict())
    images = torch.randn(2, 3, 16, 16)
    tokens = clip.tokenizer(["a photo", "of a key"])
    with torch.no_grad():
        expected_image = net.encode_image(images)
        expected_text = net.encode_text(tokens)
        torch.testing.assert_close(clip.net.encode_image(images), expected_image, atol=1e-6, rtol=0)
        torch.testing.assert_close(clip.net.encode_text(tokens), expected_text, atol=1e-6, rtol=0)
        # The test would see it if GELU were used.
        assert (with_gelu.encode_text(tokens) - expected_text).abs().max() > 1e-3


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning")
def test_the_names_in_a_torchscript_clip_are_those_of_its_state_dict(tmp_path: Path) -> None:
    torch.jit.script(small_clip()).save(tmp_path / "clip.pt")
    expected = torch.jit.load(tmp_path / "clip.pt").state_dict()
    weights = tensors_under(tmp_path / "clip.pt")
    assert list(weights) == list(expected)
    for key, value in expected.items():
        assert torch.equal(weights[key], value)


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


def test_a_training_checkpoint_of_open_clip_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gets QuickGELU because of --pretrained openai."""
    net = small_clip()
    weights = {f"module.{key}": value for key, value in net.state_dict().items()}
    torch.save({"state_dict": weights, "epoch": 3}, tmp_path / "e.pt")

    def create(model: str, pretrained: None, force_quick_gelu: bool, **_: Any) -> tuple:
        return small_clip(1, quick_gelu=force_quick_gelu), None, None

    monkeypatch.setattr(open_clip, "create_model_and_transforms", create)
    clip = load_clip("ViT-B-32", "openai", tmp_path / "e.pt")
    assert torch.equal(clip.net.visual.proj, net.visual.proj)
    assert "QuickGELU" in repr(clip.net)


def test_images_in_a_folder_for_each_class_are_found(tmp_path: Path) -> None:
    for name in ("cat", "ant"):
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "data" / name / "0.jpg")
    Image.new("RGB", (8, 8)).save(tmp_path / "data" / "cat" / "1.png")
    found = find_labelled(tmp_path / "data", "val")
    assert found.names == ["ant", "cat"]
    assert found.labels.tolist() == [0, 1, 1]
    assert [path.name for path in found.paths] == ["0.jpg", "0.jpg", "1.png"]


# Results


def test_accuracy_its_interval_and_top_5_accuracy() -> None:
    """40 predictions, of which eight are wrong; their class 9 is not even among the best five."""
    predicted = torch.arange(40) % 10
    scores = torch.eye(10)[predicted] + 0.1 * torch.linspace(1, 0, 10)
    labels = predicted.clone()
    labels[:8] = 9
    measured = measure(scores, labels)
    assert measured["accuracy"] == 100 * 32 / 40
    assert measured["top5"] == 80

    # Wilson's interval.
    p = 32 / 40
    n = 40
    z = 1.959964  # 95 %
    middle = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 100 / (1 + z * z / n)
    expected = [scale * (middle - half), scale * (middle + half)]
    assert measured["interval"] == pytest.approx(expected, abs=1e-4)


def test_zeroshot_writes_its_evidence(arguments: Zeroshot) -> None:
    args = dataclasses.replace(arguments, templates="cifar18", prompt=None)
    result = p3_clip_zeroshot.main(args)
    out = args.output_dir
    assert json.loads((out / "result.json").read_text())["accuracy"] == result["accuracy"]

    rows = read_csv(out / "predictions.csv")
    names = [f"{label}_{k}.png" for label in range(3) for k in range(4)]
    assert [row["image_name"] for row in rows] == names
    right = 0
    for row in rows:
        is_right = row["label"] == row["predicted"]
        assert row["right"] == str(int(is_right))
        right += is_right
        assert row["name1"] == row["predicted"]
        assert float(row["p1"]) >= float(row["p2"])
        total = sum(float(row[f"p{rank}"]) for rank in (1, 2, 3))
        assert total == pytest.approx(1, abs=2e-4)
    assert result["accuracy"] == pytest.approx(100 * right / 12)

    classes = read_csv(out / "per_class.csv")
    assert [(row["class"], row["images"]) for row in classes] == [(name, "4") for name in NAMES]

    for name in ("cases.png", "confusion.png", "similarity.png", "table.png"):
        with Image.open(out / name) as image:
            assert min(image.size) > 100
            assert np.asarray(image.convert("L")).std() > 1


def test_the_table_has_every_set_of_prompts_in_both_spellings(arguments: Zeroshot) -> None:
    args = dataclasses.replace(arguments, templates="cifar18")
    result = p3_clip_zeroshot.main(args)
    table = read_csv(args.output_dir / "table.csv")
    assert [row["accuracy, %"] for row in table[:2]] == ["56.64", "not measured"]
    ours = {(row["prompts"], row["names"]): float(row["accuracy, %"]) for row in table[2:]}
    expected = {(name, way) for name in template_sets() for way in ("spaces", "underscores")}
    assert set(ours) == expected
    assert ours["cifar18", "spaces"] == pytest.approx(result["accuracy"], abs=0.005)


def test_a_prompt_of_ones_own(arguments: Zeroshot) -> None:
    args = dataclasses.replace(arguments, prompt="{} seen from afar", names="underscores")
    result = p3_clip_zeroshot.main(args)
    assert result["templates"] == "prompt"
    assert result["names"] == "underscores"
    assert "| prompt | underscores |" in (args.output_dir / "table.md").read_text()


# Pretraining


def test_contrastive_loss_shares_the_weight_among_images_of_one_caption() -> None:
    """Three images and two captions; the first and the third image have the first caption."""
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    same = torch.tensor([[True, False], [False, True], [True, False]])
    # -log softmax over the captions, for each image.
    images = [math.log(1 + math.exp(-2)), math.log(1 + math.exp(-1)), math.log(2)]
    # -log softmax over the images, for each caption.
    first = math.log(math.e**2 + 1 + math.e) - (2 + 1) / 2
    second = math.log(1 + 2 * math.e) - 1
    expected = (np.mean(images) + np.mean([first, second])) / 2
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
    result = p3_clip_zeroshot.main(pretraining)
    assert result["epoch"] == 2
    cut = dataclasses.replace(pretraining, output_dir=pretraining.output_dir.parent / "cut")
    stop_in_step_1(pretrain, cut)
    p3_clip_zeroshot.main(cut)
    checkpoint = pretraining.output_dir / "model.safetensors"
    weights = safetensors.torch.load_file(checkpoint)
    others = safetensors.torch.load_file(cut.output_dir / "model.safetensors")
    assert weights.keys() == others.keys()
    for key, value in weights.items():
        assert torch.equal(value, others[key])
    args = dataclasses.replace(arguments, checkpoint=checkpoint)
    assert p3_clip_zeroshot.main(args)["images"] == 12


def test_pretraining_learns(pretraining: Pretrain, arguments: Zeroshot) -> None:
    p3_clip_zeroshot.main(dataclasses.replace(pretraining, epochs=12, augment=(), lr=2e-3))
    checkpoint = pretraining.output_dir / "model.safetensors"
    args = dataclasses.replace(arguments, checkpoint=checkpoint)
    assert p3_clip_zeroshot.main(args)["accuracy"] == 100  # chance is 33


def test_pretraining_refuses_an_unknown_network_and_small_images(pretraining: Pretrain) -> None:
    with pytest.raises(UserError, match="--vision"):
        p3_clip_zeroshot.main(dataclasses.replace(pretraining, vision="resnet17"))
    with pytest.raises(UserError, match="--image-size"):
        dataclasses.replace(pretraining, image_size=16)
    assert not pretraining.output_dir.exists()


# Mistakes


@pytest.fixture
def mistake(arguments: Zeroshot) -> Callable[..., str]:
    """`mistake(**changes)` classifies with these arguments; returns the error, which is one line.

    Nothing may have been written.
    """

    def mistake(**changes: Any) -> str:
        with pytest.raises(UserError) as caught:
            p3_clip_zeroshot.main(dataclasses.replace(arguments, **changes))
        assert "\n" not in str(caught.value)
        folder = arguments.output_dir
        assert not folder.exists() or not any(folder.iterdir())
        return str(caught.value)

    return mistake


def test_bad_options_are_named(mistake: Callable[..., str], tmp_path: Path) -> None:
    assert "--data-dir" in mistake(data_dir=tmp_path / "none")
    (tmp_path / "empty").mkdir()
    assert "--data-dir" in mistake(data_dir=tmp_path / "empty")
    assert "--split" in mistake(split="vall")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    assert "holds a training run" in mistake(output_dir=tmp_path / "run")
    assert "--prompt" in mistake(prompt="a photo")
    assert "--prompt" in mistake(prompt="a {broken")
    assert "--model ViT-B-33: open_clip has no model" in mistake(model="ViT-B/33")
    assert "--pretrained" in mistake(pretrained="opnai", checkpoint=None)


def test_bad_checkpoints_are_named(mistake: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "noise.pt").write_bytes(b"nothing")
    assert "noise.pt" in mistake(checkpoint=tmp_path / "noise.pt")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pt")
    assert "other.pt" in mistake(checkpoint=tmp_path / "other.pt")
    assert "--checkpoint" in mistake(checkpoint=tmp_path / "none.pt")


def test_a_failed_download_says_what_to_do(
    mistake: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("no route to the hub\nmore")

    monkeypatch.setattr(open_clip, "create_model_and_transforms", refuse)
    assert "no route to the hub more); download them elsewhere" in mistake(checkpoint=None)


def test_bad_data_is_named(mistake: Callable[..., str], clip_dir: Path) -> None:
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
    assert "contains no image" in mistake()


@pytest.mark.parametrize(
    "text",
    [
        '{"0": "apple", "0": "pear", "1": "car"}',
        '{"0": NaN, "1": "car"}',
        '{"0": "\\ud800", "1": "car"}',
        '{"0": "a\\nb", "1": "car"}',
        '{"0": 5, "1": "car"}',
        '{"zero": "apple"}',
        '["apple", "car"]',
        "[" * 100_000,
        "null",
    ],
)
def test_a_bad_id2label_is_one_line(mistake, clip_dir: Path, text: str) -> None:
    ids = clip_dir / "clip_zeroshot" / "id2label.json"
    ids.write_text(text)
    assert mistake().startswith(f"{ids}: ")


def test_id2label_may_have_a_byte_order_mark(clip_dir: Path) -> None:
    ids = clip_dir / "clip_zeroshot" / "id2label.json"
    before = find_labelled(clip_dir, "val")
    ids.write_text(ids.read_text(), encoding="utf-8-sig")
    assert find_labelled(clip_dir, "val").names == before.names


def test_zeroshot_is_the_command_if_none_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "none"
    command = [sys.executable, p3_clip_zeroshot.__file__, "--data-dir", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == f"error: --data-dir {folder}: no such folder\n"
