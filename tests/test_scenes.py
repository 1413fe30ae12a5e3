"""Scores of textual inversion, the classifier of drawn scenes, and a CLIP of their captions."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import evaluate
from common.cli import UserError
from evaluate import Inversion
from inversion.concepts import read_concepts, save_words
from metrics import scenes as metrics_scenes
from metrics.inversion import PromptScore, best_five, score_concepts, summary
from metrics.scenes import (
    TRAITS,
    TrainScenes,
    accuracies,
    hits,
    labels_of,
    load_scene_classifier,
    load_scenes,
    see,
    train_scenes,
)
from models.scene_classifier import SceneClassifier
from preparation.synthetic import scenes
from tests.conftest import noise, save_images, save_net
from zeroshot.loading import load_clip, rows_of_tokens
from zeroshot.pretrain import Pretrain, pretrain


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A data folder with captioned/train and captioned/val."""
    root = tmp_path_factory.mktemp("scenes") / "hw2_data"
    for split, count in (("train", 24), ("val", 8)):
        folder = root / "captioned" / split
        folder.mkdir(parents=True)
        lines = []
        for k in range(count):
            image, text, scene = scenes.draw_captioned(0, split, k)
            Image.fromarray(image).save(folder / f"{k}.png")
            lines.append(json.dumps({"file_name": f"{k}.png", "text": text, **scene.traits()}))
        (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture(scope="module")
def clip_file(data, tmp_path_factory) -> Path:
    """A CLIP trained for one epoch on the captions."""
    folder = tmp_path_factory.mktemp("clip") / "run"
    pretrain(Pretrain(output_dir=folder, data_dir=data, captioned=True, epochs=1, batch_size=8))
    return folder / "model.safetensors"


# The grader's rule


def test_the_best_five_by_hand():
    """The sums stand below the numbers."""
    image = np.array([60.0, 70.0, 80.0, 50.0, 75.0, 40.0, 90.0])
    text = np.array([30.0, 25.0, 20.0, 31.0, 22.0, 36.0, 10.0])
    #      sums   135    132.5  130    127.5  130    130    115
    # The best five leave out the fourth (127.5) and the last (115).
    assert best_five(image, text) == (
        pytest.approx((60 + 70 + 80 + 75 + 40) / 5),
        pytest.approx((30 + 25 + 20 + 22 + 36) / 5),
    )


def test_both_scores_must_reach_the_baseline():
    def score(image: float, text: float) -> PromptScore:
        return PromptScore("0", "a dog", image, text, 0.0, 0.0, (79.0, 34.0))

    assert score(79.0, 34.0).passes
    assert not score(78.9, 40.0).passes
    assert not score(90.0, 33.9).passes
    without = PromptScore("0", "a dog", 1.0, 2.0, 0.0, 0.0, None)
    assert without.passes is None
    found = summary([score(80.0, 35.0), score(80.0, 30.0), without])
    assert (found["passed"], found["with_baseline"], found["prompts"]) == (1, 2, 3)


@pytest.fixture
def drawn(tmp_path) -> Path:
    """OUT and INPUT.json beside the concepts' images."""
    content = scenes.input_json()
    content["0"]["baseline"] = [[-100, -100], [100, 100]]
    (tmp_path / "input").mkdir()
    (tmp_path / "input" / "input.json").write_text(json.dumps(content))
    for seed, name in enumerate(content):
        save_images(tmp_path / "input" / name, noise(2, 64, seed))
        for prompt in range(2):
            save_images(tmp_path / "out" / name / str(prompt), noise(5, 64, 10 * seed + prompt))
    return tmp_path


def test_scores_of_images_equal_to_the_source_are_a_hundred(drawn, clip_file):
    clip = load_clip("ViT-B-32", "openai", clip_file)
    concepts = read_concepts(drawn / "input" / "input.json")
    save_images(drawn / "one" / "0", noise(1, 64))
    save_images(drawn / "one" / "1", noise(1, 64))
    for concept in concepts:
        for prompt in range(2):
            folder = drawn / "copies" / concept.name / str(prompt)
            save_images(folder, np.concatenate([noise(1, 64)] * 3))
    scores = score_concepts(drawn / "copies", concepts, drawn / "one", clip, 3)
    assert [score.image for score in scores] == pytest.approx([100.0] * 4, abs=1e-3)
    # The text is the prompt in known words; all copies have the same score.
    picture = clip.preprocess(Image.fromarray(noise(1, 64)[0]))[None]
    image = F.normalize(clip.net.encode_image(picture), dim=1)
    prompts = [*concepts[0].plain_prompts, *concepts[1].plain_prompts]
    for score, prompt in zip(scores, prompts, strict=True):
        text = F.normalize(clip.net.encode_text(clip.tokenizer([prompt])), dim=1)
        assert score.text == pytest.approx(100 * (image * text).sum().item(), abs=1e-3)


def test_evaluate_inversion(drawn, clip_file, capsys):
    args = Inversion(
        images=drawn / "out",
        input_json=drawn / "input" / "input.json",
        clip=clip_file,
        count=5,
        output_dir=drawn / "scores",
        device="cpu",
    )
    result = evaluate.main(args)
    assert (result["passed"], result["with_baseline"]) == (1, 2)
    assert "1 of 2 prompts with a baseline pass" in capsys.readouterr().out
    assert (drawn / "scores" / "table.md").exists()
    assert json.loads((drawn / "scores" / "result.json").read_text())["prompts"] == 4


def test_a_folder_that_the_grader_would_not_take(drawn, clip_file, error_of):
    given = (drawn / "out", drawn / "input" / "input.json", "--clip", clip_file)
    error = error_of(evaluate.Command, evaluate.main, "inversion", *given, "--count", 6)
    assert "0/0: holds 5 images; the grader wants exactly 6" in error
    (drawn / "out" / "1" / "1" / "grid.GIF").write_bytes(b"GIF")
    error = error_of(evaluate.Command, evaluate.main, "inversion", *given, "--count", 5)
    assert "1/1: holds 6 images; the grader wants exactly 5" in error
    content = scenes.input_json()
    del content["0"]["prompt_4_clip_eval"]
    (drawn / "input" / "input.json").write_text(json.dumps(content))
    error = error_of(evaluate.Command, evaluate.main, "inversion", *given, "--count", 5)
    assert "needs its prompts in known words" in error


# CLIP of captions


def test_tokens_are_counted_from_one():
    vocabulary = [320, 736, 49406, 49407]
    tokens = torch.tensor([[49406, 320, 5, 736, 49407, 0]])
    assert rows_of_tokens(tokens, vocabulary).tolist() == [[3, 1, 0, 2, 4, 0]]
    assert rows_of_tokens(tokens, vocabulary).argmax(1).item() == 4  # the end of the text


def test_a_clip_of_captions_is_small_and_knows_only_their_words(clip_file):
    assert clip_file.stat().st_size < 12e6
    clip = load_clip("ViT-B-32", "openai", clip_file)
    tokens = clip.tokenizer(["a red car", "a zebra car"])
    assert tokens.max() < 100
    assert (tokens[0, 1:4] > 0).all()
    assert tokens[1, 2] == 0
    assert clip.net.encode_text(tokens).shape == (2, 128)


# The classifier


def test_labels_leave_out_what_a_scene_does_not_have():
    apple = {"file_name": "0.png", **scenes.Scene("apple", "red").traits()}
    creature = {"file_name": "1.png", **scenes.THE_CREATURE.traits()}
    printed = {
        "file_name": "2.png",
        **scenes.Scene("car", "red", **scenes.THE_PRINT).traits(),
    }
    labels = labels_of([apple, creature, printed])
    assert set(labels) == set(TRAITS)
    assert labels["ears"].tolist()[0] == -1
    assert TRAITS["ears"][labels["ears"][1]] == "pointed"
    assert labels["colour"].tolist()[2] == -1
    assert TRAITS["colour"][labels["colour"][0]] == "red"
    assert labels["dark_hue"].tolist() == [-1, -1, 6]
    assert labels["light_hue"].tolist() == [-1, -1, 1]
    with pytest.raises(UserError, match=r"0\.png has no known subject"):
        labels_of([{"file_name": "0.png", "text": "a cat"}])


def test_the_classifier_learns_continues_and_sees(data, tmp_path, stop_in_step_1):
    def args(name: str, **more) -> TrainScenes:
        options = {"epochs": 2, "batch_size": 12, "device": "cpu", **more}
        return TrainScenes(output_dir=tmp_path / name, data_dir=data, **options)

    whole = evaluate.main(args("whole"))
    assert set(whole["accuracy"]) <= set(TRAITS)
    stop_in_step_1(train_scenes, args("stopped"))
    train_scenes(args("stopped"))
    file = tmp_path / "whole" / "model.safetensors"
    assert file.read_bytes() == (tmp_path / "stopped" / "model.safetensors").read_bytes()
    net = load_scene_classifier(file)
    pixels, labels = load_scenes(data / "captioned" / "val", None)
    seen = see(net, pixels, torch.device("cpu"))
    assert seen["subject"].shape == (8,)
    found = accuracies(seen, labels)
    right = hits(seen, "subject", "apple") == (seen["subject"] == 0)
    assert right.all()
    assert all(0 <= percent <= 100 for percent in found.values())


def test_a_classifier_of_other_traits_is_refused(tmp_path):
    file = save_net(SceneClassifier({"subject": 3}, width=4), tmp_path / "net.safetensors")
    with pytest.raises(UserError, match="has other traits"):
        load_scene_classifier(file)


def test_softening_changes_half_of_the_images():
    images = torch.rand(200, 3, 8, 8)
    changed = metrics_scenes.less_sharp(images, torch.Generator().manual_seed(0))
    noise_alone = (changed - images).flatten(1).std(1) < 0.1
    assert 60 < noise_alone.sum() < 140


def test_words_of_the_wrong_width_are_refused(tmp_path, data, clip_file):
    from experiments.inversion import Compare, main
    from tests.test_textual_inversion import tiny_model

    model = save_net(tiny_model(), tmp_path / "model.safetensors")
    save_words(tmp_path / "words.safetensors", {"<new1>": torch.ones(1, 8)})
    with pytest.raises(UserError, match="has no <new1> of this model"):
        main(
            Compare(
                words=tmp_path / "words.safetensors",
                clip=clip_file,
                classifier=clip_file,
                output_dir=tmp_path / "out",
                model=model,
                device="cpu",
            )
        )
