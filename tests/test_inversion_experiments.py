"""experiments/text_to_image.py and experiments/inversion.py, with tiny networks."""

import csv
import json
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image

from diffusion.schedule import Schedule
from experiments import inversion, text_to_image
from inversion.concepts import save_words
from inversion.tokens import END, START, Tokenizer
from metrics.scenes import TRAITS
from models.scene_classifier import SceneClassifier
from models.text_to_image import TextToImage
from preparation.synthetic import scenes
from tests.conftest import save_net
from zeroshot.pretrain import Pretrain, make_config

WIDTH = 32  # of the tiny model's words


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A tiny text-to-image model of 64x64 images that knows the words of all scenes."""
    torch.manual_seed(0)
    known = {START, END}
    for k in range(300):
        _, words, _ = scenes.captioned_scene(0, "train", k)
        known.update(Tokenizer(24).encode(words))
    net = TextToImage(
        sorted(known),
        patch=16,
        width=32,
        multipliers=(1, 1),
        attention_levels=(1,),
        heads=2,
        text_width=WIDTH,
        text_layers=1,
    )
    schedule = Schedule(kind="cosine", prediction="x0").to_config()
    return save_net(net, tmp_path / "model.safetensors", schedule=schedule)


@pytest.fixture
def classifier(tmp_path: Path) -> Path:
    torch.manual_seed(1)
    sizes = {trait: len(values) for trait, values in TRAITS.items()}
    return save_net(SceneClassifier(sizes, width=8), tmp_path / "classifier.safetensors")


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    torch.manual_seed(2)
    config = make_config(Pretrain(output_dir=tmp_path), None)
    config["arguments"]["text_cfg"]["width"] = 32
    net = open_clip.CLIP(**config["arguments"])
    net.config = config
    return save_net(net, tmp_path / "clip.safetensors")


@pytest.fixture
def words(tmp_path: Path) -> Path:
    """Both words, and three snapshots of the first one, as `train` leaves them."""
    torch.manual_seed(3)
    file = tmp_path / "words" / "words.safetensors"
    (file.parent / "0").mkdir(parents=True)
    save_words(file, {"<new1>": torch.randn(1, WIDTH), "<new2>": torch.randn(2, WIDTH)})
    snapshots = {f"step_{step:06d}": torch.randn(1, WIDTH) for step in (0, 100, 200)}
    save_words(file.parent / "0" / "snapshots.safetensors", snapshots)
    return file


def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def test_words_are_compared_with_known_words_and_drawings(model, words, clip, classifier, tmp_path):
    out = tmp_path / "out"
    options = {"count": 5, "steps": 2, "model": model, "device": "cpu"}
    inversion.main(
        inversion.Compare(words=words, clip=clip, classifier=classifier, output_dir=out, **options)
    )
    with (out / "table.csv").open() as file:
        table = list(csv.reader(file))
    rows = [(name, row) for name in ("creature", "print") for row in inversion.ROWS]
    assert [tuple(line[:2]) for line in table[1:]] == rows
    result = json.loads((out / "result.json").read_text())
    for (name, row), line in zip(rows, table[1:], strict=True):
        scores = result[f"{name}, {row}"]
        assert line[2:4] == [f"{scores['image']:.1f}", f"{scores['text']:.1f}"]
        traits = inversion.CREATURE_TRAITS if name == "creature" else inversion.PRINT_TRAITS
        assert set(scores["traits"]) == set(traits)
        assert len(list((out / row / name / "1").glob("*.png"))) == 5
    # The creature has snapshots: three rows of two prompts with two images each.
    assert size_of(out / "progress_creature.png")[1] > size_of(out / "together.png")[1]
    assert not (out / "progress_print.png").exists()


def test_the_way_from_the_floor_to_the_ceiling():
    results = {
        "creature, known word": {"image": 60.0, "text": 25.0},
        "creature, learned": {"image": 75.0, "text": 24.5},
        "creature, drawn": {"image": 80.0, "text": 30.0},
    }
    found = inversion.way_covered(results, "creature")
    assert found == {"way_from_floor_to_ceiling": 0.75, "text_score_change": -0.5}


def test_drawings_of_the_concepts_show_what_the_prompts_ask_for(tmp_path):
    args = inversion.Compare(
        words=tmp_path, clip=tmp_path, classifier=tmp_path, output_dir=tmp_path, count=5
    )
    for concept in (0, 1):
        for prompt in (0, 1):
            first = inversion.drawn(concept, prompt, args)
            assert first.shape == (5, 3, 64, 64)
            assert torch.equal(first, inversion.drawn(concept, prompt, args))
    prints = inversion.drawn(1, 0, args).permute(0, 2, 3, 1).reshape(-1, 3).unique(dim=0).float()
    # All colours of a print lie on the line from its ink to its paper.
    centred = prints - prints.mean(0)
    assert torch.linalg.matrix_rank(centred, atol=0.05 * centred.norm()) == 1


def test_prompts_are_classified_by_what_they_ask_for(model, classifier, tmp_path):
    out = tmp_path / "out"
    text_to_image.main(
        text_to_image.Measure(
            classifier=classifier,
            output_dir=out,
            model=model,
            guidances=(1.0, 2.0),
            count=1,
            steps=1,
            device="cpu",
        )
    )
    result = json.loads((out / "result.json").read_text())
    assert result["images"] == len(text_to_image.all_prompts())
    for guidance in ("guidance 1", "guidance 2"):
        assert set(result[guidance]) == {
            *("subject", "colour", "ground", "ground_colour", "style"),
            *("body", "ears", "coat", "eyes"),
        }
        assert all(0 <= percent <= 100 for percent in result[guidance].values())
    assert size_of(out / "guidance_2.png")[0] > 64 * len(scenes.COLOUR_NAMES)


def test_shares_count_only_the_prompts_that_name_a_trait(monkeypatch):
    prompts = [
        text_to_image.Prompt("a red car", {"subject": "car", "colour": "red"}),
        text_to_image.Prompt("a car in the style of pixel art", {"subject": "car"}),
        text_to_image.Prompt("a blue fish", {"subject": "fish", "colour": "blue"}),
    ]
    numbers = {trait: list(TRAITS[trait]).index for trait in ("subject", "colour")}
    seen = {
        "subject": torch.tensor([numbers["subject"](name) for name in ("car", "key", "fish")]),
        "colour": torch.tensor([numbers["colour"](name) for name in ("red", "red", "red")]),
    }
    monkeypatch.setattr(text_to_image, "see", lambda *_: seen)
    found = text_to_image.shares_right(prompts, torch.zeros(3, 3, 64, 64), None, None)
    assert found == {"subject": pytest.approx(200 / 3), "colour": 50.0}
