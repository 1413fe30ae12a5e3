"""p2_guided.py: training with attributes, the classifier of noisy images, and what is asked."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import p2_ddpm_infer
import p2_guided
from common.asked import RealRows, read_request, values_of
from common.attributes import positive_weights
from common.checkpoints import load_net, load_weights
from common.cli import UserError
from common.data import load_folder
from common.faces import FaceStates, digest_of_states, load_face_model, make_face_net
from diffusion.schedule import Schedule
from experiments import face_rows, guidance
from guided import classifier as guided_classifier
from guided.classifier import TrainClassifier, train_classifier
from guided.network import (
    Train,
    drop_some,
    repeat_rare,
    train,
    weights_of_values,
    with_attributes,
)
from models.attribute_classifier import AttributeClassifier
from models.autoencoder import Autoencoder
from models.latent_unet import LatentUnet
from models.noisy_classifier import NoisyClassifier
from p2_guided import Grid, Sample, load_model, make_request
from preparation.layout import write_attributes
from tests.conftest import noise, save_images, save_net
from tests.two_processes import run_with_two_processes

NAMES = ("Bald", "Smiling")
CPU = {"device": "cpu", "precision": "fp32"}


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """Seven "faces" of noise with two attributes; none has both."""
    face = tmp_path / "data" / "face"
    save_images(face / "train", noise(7, size=16))
    rows = []
    for number in range(7):
        values = (1, -1) if number % 3 == 0 else (-1, 1 if number % 2 else -1)
        rows.append((f"{number:03d}.jpg", values))
    write_attributes(face, NAMES, rows)
    return tmp_path / "data"


def face_net(path: Path, latents: bool = True) -> Path:
    """A DDPM of 16x16 faces whose output is not zero, as p2_ddpm_train.py saves it."""
    torch.manual_seed(0)
    autoencoder = None
    if latents:
        small = Autoencoder(size=16, latent_channels=2, encoder_width=4, decoder_width=8)
        autoencoder = save_net(small, path.parent / "autoencoder.safetensors")
    net = make_face_net(16, 32, 1, autoencoder=autoencoder)
    nn.init.normal_(net.get_parameter("unet.out.2.weight" if latents else "out.2.weight"), std=0.1)
    return save_net(
        net,
        path,
        domains=["faces"],
        size=16,
        schedule=Schedule(1000, prediction="v").to_config(),
        sampling={"spacing": "trailing", "clamp": "none" if latents else "static"},
    )


@pytest.fixture
def unconditional(tmp_path: Path) -> Path:
    """A DDPM of faces in latents without attributes."""
    return face_net(tmp_path / "ddpm.safetensors")


def small(data_dir: Path, init: Path, name: str, **options) -> Train:
    """A training of two epochs of two steps on tiny images."""
    defaults = {
        "data_dir": data_dir,
        "init": init,
        "output_dir": data_dir.parent / name,
        "attributes": NAMES,
        "epochs": 2,
        "images_per_epoch": 8,
        "batch_size": 4,
        "grid_every": 1,
        "grid_columns": 3,
    }
    return Train(**CPU | defaults | options)


def small_classifier(data_dir: Path, checkpoint: Path, name: str, **options) -> TrainClassifier:
    """A training of two epochs of two steps on tiny images."""
    defaults = {
        "data_dir": data_dir,
        "checkpoint": checkpoint,
        "output_dir": data_dir.parent / name,
        "attributes": NAMES,
        "epochs": 2,
        "images_per_epoch": 8,
        "batch_size": 4,
    }
    return TrainClassifier(**CPU | defaults | options)


@pytest.fixture
def conditional(unconditional: Path, tmp_path: Path) -> Path:
    """A network with two attributes that change its answer."""
    net, config = load_net(unconditional, {"latent_unet": LatentUnet}, "--init")
    wider = with_attributes(net, 2)
    for parameter in wider.unet.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)  # what starts from zeros hides the attributes
    kept = {name: config[name] for name in ("domains", "size", "schedule", "sampling")}
    return save_net(wider, tmp_path / "guided.safetensors", attributes=list(NAMES), **kept)


@pytest.fixture
def classifier(unconditional: Path, tmp_path: Path) -> Path:
    """A classifier of the same noisy latents, not trained."""
    torch.manual_seed(1)
    start = load_face_model(unconditional, "--checkpoint")
    net = NoisyClassifier(start.net.get_submodule("unet").config["arguments"], n_attributes=2)
    return save_net(
        net,
        tmp_path / "classifier.safetensors",
        attributes=list(NAMES),
        schedule=start.schedule.to_config(),
        states=digest_of_states(start.net),
    )


def read_images(folder: Path) -> dict[str, bytes]:
    """The bytes of the images of a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.png"))}


def sampling(checkpoint: Path, output_dir: Path, **options) -> Sample:
    """Three images in four steps."""
    defaults = {"num_images": 3, "steps": 4, "data_dir": output_dir.parent / "data"}
    return Sample(checkpoint=checkpoint, output_dir=output_dir, **CPU | defaults | options)


# Training


def test_training_resumes_bit_for_bit(data_dir, unconditional, stop_in_step_1):
    whole = small(data_dir, unconditional, "whole")
    broken = small(data_dir, unconditional, "broken")
    train(whole)
    stop_in_step_1(train, broken)
    train(broken)
    one, config = load_weights(whole.output_dir / "model.safetensors")
    other, _ = load_weights(broken.output_dir / "model.safetensors")
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name
    assert config["attributes"] == list(NAMES)
    assert one["unet.attributes.last.weight"].any()  # it starts from zeros
    grid = Image.open(whole.output_dir / "samples/epoch_0002.png")
    assert grid.size == (3 * 18 + 2, 2 * 18 + 2)
    shares = (whole.output_dir / "log.txt").read_text()
    assert "Bald 42.9 % (weight 1.08), Smiling 28.6 % (weight 1.32)" in shares
    # A trained network can be trained further, with the same attributes.
    more = small(data_dir, whole.output_dir / "model.safetensors", "more", epochs=1)
    train(more)
    with pytest.raises(UserError, match="has learned Bald Smiling"):
        train(dataclasses.replace(more, attributes=("Bald",), output_dir=data_dir.parent / "x"))


def test_the_classifier_resumes_bit_for_bit_and_leaves_the_last_images_alone(
    data_dir, unconditional, stop_in_step_1, monkeypatch
):
    seen = []

    class Spy(FaceStates):
        def draw(self, rows, rng):
            seen.append(rows)
            return super().draw(rows, rng)

    monkeypatch.setattr(guided_classifier, "FaceStates", Spy)
    whole = small_classifier(data_dir, unconditional, "whole")
    broken = small_classifier(data_dir, unconditional, "broken")
    train_classifier(whole)
    of_training = torch.cat([rows for rows in seen if len(rows) == 4])
    assert of_training.unique().tolist() == [0, 1, 2, 3, 4]  # of 7
    stop_in_step_1(train_classifier, broken)
    train_classifier(broken)
    one, config = load_weights(whole.output_dir / "model.safetensors")
    other, _ = load_weights(broken.output_dir / "model.safetensors")
    for name, value in one.items():
        assert torch.equal(value, other[name]), name
    assert config["trained_on"] == ["000", "001", "002", "003", "004"]
    result = json.loads((whole.output_dir / "result.json").read_text())
    assert all(0 <= result[f"accuracy_t{number}"] <= 100 for number in range(4))
    measured = [rows for rows in seen if len(rows) != 4]
    assert all(sorted(rows.tolist()) == [5, 6] for rows in measured)
    seen.clear()
    few = small_classifier(data_dir, unconditional, "few", measured_images=1)
    train_classifier(few)
    measured = [rows for rows in seen if len(rows) != 4]
    assert [len(rows) for rows in measured] == 8 * [1]  # four quarters after each of two epochs


def test_a_classifier_learns_what_a_bright_image_is(tmp_path, monkeypatch):
    """Two brightnesses, one attribute: with little noise it is seen, with the most it is not."""
    face = tmp_path / "data" / "face"
    pixels = np.full((70, 16, 16, 3), 40, dtype=np.uint8)
    pixels[::2] = 215
    save_images(face / "train", pixels)
    rows = [(f"{number:03d}.png", [1 if number % 2 == 0 else -1]) for number in range(70)]
    write_attributes(face, ["Bright"], rows)
    args = small_classifier(
        tmp_path / "data",
        face_net(tmp_path / "ddpm.safetensors", latents=False),
        "classifier",
        attributes=("Bright",),
        images_per_epoch=960,
        batch_size=32,
        ema_decay=0.9,
    )
    result = train_classifier(args)
    assert result["accuracy_t0"] > 95
    assert result["accuracy_t0"] >= result["accuracy_t3"]


def test_rare_values_are_drawn_more_often():
    labels = -torch.ones(100, 3)
    labels[:2, 0] = 1  # 2 of 100: five times
    labels[:50, 1] = 1
    labels[8:, 2] = 1  # the rarer value is -1, of 8 of 100: 2.5 times
    weights = weights_of_values(labels, largest=5)
    assert weights.tolist() == pytest.approx([5, 1, 2.5])
    assert weights_of_values(labels, largest=3).tolist() == pytest.approx([3, 1, 2.5])
    counts = torch.bincount(repeat_rare(labels, weights))
    assert counts.tolist() == [20] * 2 + [10] * 6 + [4] * 92


def test_attributes_become_unknown_each_alone_and_all_together():
    labels = torch.ones(20_000, 2)
    rng = torch.Generator().manual_seed(0)
    known = drop_some(labels, 0.3, 0.1, rng)
    assert known.mean().item() == pytest.approx(0.7 * 0.9, abs=0.01)
    nothing = (known == 0).all(1).float().mean().item()
    assert nothing == pytest.approx(0.1 + 0.9 * 0.3**2, abs=0.01)
    assert torch.equal(drop_some(-labels, 0, 0, rng), -labels)


def test_the_rarer_value_weighs_more_in_the_classifiers_loss():
    labels = -torch.ones(10, 3)
    labels[:5, 0] = 1
    labels[:2, 1] = 1
    labels[1:, 2] = 1
    assert positive_weights(labels, 10).tolist() == pytest.approx([1, 4, 1 / 9])
    assert positive_weights(labels, 3).tolist() == pytest.approx([1, 3, 1 / 3])


# What is asked


def test_words_become_a_request():
    smiling, male = read_request(["Smiling=1:3", "Male=-1"])
    assert smiling == ("Smiling", 1, 3.0)
    assert male == ("Male", -1, None)
    assert (smiling.words, male.words) == ("Smiling=1:3", "Male=-1")
    assert values_of([smiling, male], ["Male", "Bald", "Smiling"]).tolist() == [-1, 0, 1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["Smiling"], "--attributes Smiling: must be NAME=1 or NAME=-1"),
        (["Smiling=0"], "--attributes Smiling=0: must be"),
        (["=1"], "--attributes =1: must be"),
        (["Smiling=1:x"], "'x' is not a weight"),
        (["Smiling=1:-2"], "--attributes Smiling=1:-2: the weight must be between"),
        (["Smiling=1", "Smiling=-1"], "names something twice"),
    ],
)
def test_other_words_are_refused(words, message):
    with pytest.raises(UserError, match=message):
        read_request(words)


def test_real_rows_have_what_is_asked():
    values = torch.tensor([[1, -1], [-1, 1], [-1, -1], [1, -1]], dtype=torch.int8)
    real = RealRows(["Bald", "Smiling"], values)
    bald = read_request(["Bald=1"])
    assert real.matching(bald).tolist() == [0, 3]
    assert real.sentence(read_request(["Bald=1", "Smiling=1"])) == (
        "Bald=1 Smiling=1: 0 of 4 training images"
    )
    drawn = real.draw(read_request(["Smiling=-1"]), ["Smiling", "Bald"], 0, range(50))
    assert drawn[:, 0].unique().tolist() == [-1]
    assert sorted(drawn[:, 1].unique().tolist()) == [-1, 1]
    again = real.draw(read_request(["Smiling=-1"]), ["Smiling", "Bald"], 0, [7, 3])
    assert torch.equal(again, drawn[[7, 3]])
    with pytest.raises(UserError, match="--others real: Bald=1 Smiling=1: 0 of 4"):
        real.draw(read_request(["Bald=1", "Smiling=1"]), ["Bald"], 0, [0])


def request(conditional: Path, classifier: Path, words: list[str], **options) -> Any:
    """The request for two images."""
    if options.get("guidance") in ("classifier", "both"):
        options["classifier"] = classifier
    args = sampling(conditional, conditional.parent / "out", attributes=tuple(words), **options)
    model = load_model(args)
    real = p2_guided.check_request(model, read_request(words), args)
    return make_request(model, read_request(words), range(2), args, real)


def test_what_each_kind_of_guidance_asks(data_dir, conditional, classifier):
    def ask(words: list[str], **options) -> Any:
        return request(conditional, classifier, words, **options)

    one = [[0.0, 1.0]] * 2
    plain = ask(["Smiling=1"])
    assert (plain.known.tolist(), plain.terms, plain.for_classifier) == (one, None, None)
    absent = ask(["Smiling=1"], others="absent")
    assert absent.known.tolist() == [[-1.0, 1.0]] * 2
    real = ask(["Smiling=1"], others="real")
    assert real.known.tolist() == [[-1.0, 1.0]] * 2  # nobody here is bald and smiles

    free = ask(["Smiling=1"], guidance="free", scale=(4.0,))
    assert (free.terms.tolist(), free.weights.tolist()) == ([one], [4])
    composed = ask(["Smiling=1", "Bald=-1:2"], guidance="free", scale=(4.0,))
    assert composed.terms[:, 0].tolist() == [[0, 1], [-1, 0]]
    assert composed.weights.tolist() == [4, 2]

    by_classifier = ask(["Bald=-1:2", "Smiling=1"], guidance="classifier", scale=(5.0,))
    assert by_classifier.known is None
    assert by_classifier.for_classifier.tolist() == [[-2.0, 5.0]] * 2
    both = ask(["Bald=-1:2", "Smiling=1"], guidance="both", scale=(4.0, 5.0))
    assert both.weights.tolist() == [2, 4]
    assert both.for_classifier.tolist() == [[-5.0, 5.0]] * 2


# Sampling


@pytest.mark.parametrize("guidance", ["free", "classifier", "both"])
def test_without_strength_guidance_changes_no_bit(
    guidance, data_dir, conditional, classifier, tmp_path
):
    p2_guided.sample(sampling(conditional, tmp_path / "plain"))
    options: dict[str, Any] = {"attributes": ("Smiling=1",), "guidance": guidance}
    if guidance != "free":
        options["classifier"] = classifier
    nothing = (0.0, 0.0) if guidance == "both" else (0.0,)
    p2_guided.sample(sampling(conditional, tmp_path / "zero", scale=nothing, **options))
    p2_guided.sample(sampling(conditional, tmp_path / "guided", **options))
    plain = read_images(tmp_path / "plain")
    assert len(plain) == 3
    assert read_images(tmp_path / "zero") == plain
    assert read_images(tmp_path / "guided") != plain
    # Nor is there guidance in an interval without steps; the network still hears what is asked.
    never = (0.0, 0.0)
    p2_guided.sample(sampling(conditional, tmp_path / "never", interval=never, **options))
    if guidance == "classifier":
        assert read_images(tmp_path / "never") == plain


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_a_network_without_attributes_is_sampled_as_p2_ddpm_infer_does(
    data_dir, unconditional, classifier, tmp_path, sampler
):
    p2_guided.sample(sampling(unconditional, tmp_path / "plain", sampler=sampler))
    p2_ddpm_infer.main(
        p2_ddpm_infer.Generate(
            checkpoint=unconditional,
            output_dir=tmp_path / "infer",
            num_images=3,
            sampler=sampler,
            steps=4,
            **CPU,
        )
    )
    assert read_images(tmp_path / "plain") == read_images(tmp_path / "infer")
    options = {"attributes": ("Bald=1",), "guidance": "classifier", "classifier": classifier}
    options |= {"scale": (50.0,), "sampler": sampler}
    p2_guided.sample(sampling(unconditional, tmp_path / "bald", **options))
    assert read_images(tmp_path / "plain") != read_images(tmp_path / "bald")
    asked = json.loads((tmp_path / "bald" / "asked.json").read_text())
    assert asked == {f"{number:04d}.png": {"Bald": 1} for number in range(3)}


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_an_image_depends_on_seed_and_number_alone(
    sampler, data_dir, conditional, classifier, tmp_path
):
    options = {
        "attributes": ("Smiling=-1",),
        "guidance": "both",
        "others": "real",
        "classifier": classifier,
        "sampler": sampler,
    }
    p2_guided.sample(sampling(conditional, tmp_path / "one", num_images=5, **options))
    p2_guided.sample(sampling(conditional, tmp_path / "two", batch_size=2, **options))
    one = read_images(tmp_path / "one")
    two = read_images(tmp_path / "two")
    assert (len(one), len(two)) == (5, 3)
    pixels = [load_folder(tmp_path / name, (16, 16)).pixels.int() for name in ("one", "two")]
    assert (pixels[0][:3] - pixels[1]).abs().max() <= 1


def test_two_processes_write_the_images_of_one(data_dir, conditional, classifier, tmp_path):
    options = {
        "attributes": ("Smiling=1",),
        "guidance": "both",
        "classifier": classifier,
        "batch_size": 2,
    }
    p2_guided.sample(sampling(conditional, tmp_path / "one", **options))
    words = [
        *("sample", "--checkpoint", conditional, "--output-dir", tmp_path / "two"),
        *("--attributes", "Smiling=1", "--guidance", "both", "--classifier", classifier),
        *("--batch-size", 2, "--num-images", 3, "--steps", 4, "--data-dir", data_dir),
        *("--device", "cpu", "--precision", "fp32"),
    ]
    printed = run_with_two_processes("p2_guided.py", *words)
    assert "Smiling=1: 2 of 7 training images" in printed
    assert read_images(tmp_path / "one") == read_images(tmp_path / "two")


def test_grids_have_a_row_for_each_attribute_and_the_same_noises(
    data_dir, conditional, tmp_path, monkeypatch
):
    drawn = {}

    def keep(pixels, path, rows, columns, title):
        drawn[path.name] = (pixels, rows, columns, title)

    monkeypatch.setattr(p2_guided, "save_labelled", keep)
    args = Grid(
        checkpoint=conditional,
        output_dir=tmp_path / "grid",
        guidance="free",
        scales=(0.0, 2.0),
        steps=2,
        data_dir=data_dir,
        **CPU,
    )
    p2_guided.grid(args)
    pixels, rows, columns, title = drawn["attributes.png"]
    assert rows == ["Bald=1", "Smiling=1"]
    assert len(pixels) == 20
    assert columns[0] == "noise 0"
    assert title.startswith("guidance: free 4; the others: unknown; ddpm, 2 steps")
    first_three = torch.cat([pixels[:3], pixels[10:13]])
    pixels = drawn["scales.png"][0]
    rows = drawn["scales.png"][1]
    assert rows == ["Bald=1, scale 0", "Bald=1, scale 2"]
    p2_guided.sample(sampling(conditional, tmp_path / "plain", num_images=10, steps=2))
    plain = load_folder(tmp_path / "plain", (16, 16)).pixels
    assert (pixels[:10].int() - plain.int()).abs().max() <= 1
    assert not torch.equal(pixels[:10], pixels[10:])

    p2_guided.grid(dataclasses.replace(args, columns=3))
    pixels = drawn["attributes.png"][0]
    columns = drawn["attributes.png"][2]
    assert columns == ["noise 0", "noise 1", "noise 2"]
    assert (pixels.int() - first_three.int()).abs().max() <= 1


def test_bad_input_is_named(data_dir, unconditional, conditional, classifier, tmp_path, error_of):
    def error(*words: object) -> str:
        commands = Train | TrainClassifier | Sample | Grid
        return error_of(commands, p2_guided.main, *words)

    out = ["--output-dir", tmp_path / "x", "--data-dir", data_dir]
    sample = ["sample", "--checkpoint", conditional, *out]
    assert "knows only Bald Smiling" in error(*sample, "--attributes", "Hat=1")
    plain = ["sample", "--checkpoint", unconditional, *out, "--attributes", "Bald=1"]
    assert "has no attributes; take --guidance classifier" in error(*plain)
    assert "--guidance both: needs --classifier" in error(*sample, "--guidance", "both")
    assert "--scale 1 2: --guidance free takes 1" in error(
        *sample, "--guidance", "free", "--scale", 1, 2
    )
    assert "a weight needs guidance" in error(*sample, "--attributes", "Bald=1:2")
    assert "needs --guidance classifier or both" in error(*sample, "--classifier", classifier)
    assert "--steps 2000: the network was trained with 1,000" in error(*sample, "--steps", 2000)

    assert "--guidance free: needs --attributes" in error(*sample, "--guidance", "free")
    grid = ["grid", "--checkpoint", unconditional, *out]
    assert "has no attributes; take --guidance classifier" in error(*grid)

    both = ["--attributes", "Bald=1", "--guidance", "both", "--classifier"]
    other = face_net(tmp_path / "pixels.safetensors", latents=False)
    of_pixels = small_classifier(data_dir, other, "pixels", attributes=NAMES, epochs=1)
    train_classifier(of_pixels)
    wrong = of_pixels.output_dir / "model.safetensors"
    assert f"--classifier {wrong}: was trained on the states of another" in error(
        *sample, *both, wrong
    )
    net, config = load_net(classifier, {"noisy_classifier": NoisyClassifier})
    config["schedule"] = Schedule(100).to_config()
    kept = {name: config[name] for name in ("attributes", "states", "schedule")}
    short = save_net(net, tmp_path / "short.safetensors", **kept)
    assert "has another noise schedule" in error(*sample, *both, short)
    assert "contains the network" in error(*sample, *both, conditional)

    new = ["train", "--init", unconditional, "--output-dir", tmp_path / "new"]
    assert "has no attribute 'Hat'" in error(*new, "--data-dir", data_dir, "--attributes", "Hat")
    (data_dir / "face" / "list_attr_celeba.txt").unlink()
    assert "there is no such file of attributes" in error(*new, "--data-dir", data_dir)
    bare = save_net(make_face_net(16, 32, 1, 4), tmp_path / "bare.safetensors")
    assert f"--init {bare}: has no noise schedule" in error(
        "train", "--init", bare, "--output-dir", tmp_path / "new"
    )


# The table


def test_a_table_of_guidance_is_filled_once(
    data_dir, conditional, unconditional, classifier, tmp_path, monkeypatch
):
    save_images(data_dir / "face" / "val", noise(4, size=16, seed=1))
    rates = {"balanced": 80.0}
    found = {
        "balanced_hit_rate": 75.0,
        "percent_of_real": 90.0,
        "attributes": dict.fromkeys(NAMES, rates),
        "diversity": {"all": {"percent_of_real": 60.0}},
    }
    seen = []

    def score(args, names, folder):
        own = guidance.own_hit_rate(args, names, folder / "asked")
        asked = json.loads((folder / "asked" / "asked.json").read_text())
        files = {path.name for path in (folder / "asked").glob("*.png")}
        assert asked.keys() == files
        seen.append((folder.name, len(files)))
        return found | {"own": own}

    monkeypatch.setattr(guidance, "score", score)
    evaluator = AttributeClassifier(list(NAMES), 32), {}
    monkeypatch.setattr(guidance, "load_evaluator", lambda *_: evaluator)
    scores = face_rows.Scores(kid=10.0, distance=5.0, fid=None, one_face=90.0)
    monkeypatch.setattr(face_rows, "measure", lambda *_: scores)
    table = guidance.Table(
        checkpoint=conditional,
        unconditional=unconditional,
        classifier=classifier,
        evaluator=classifier,
        output_dir=tmp_path / "table",
        data_dir=data_dir,
        free_scales=(2.0,),
        classifier_scales=(5.0,),
        count=1,
        pooled=3,
        steps=2,
        **CPU,
    )
    rows = guidance.main(table)
    assert [row[1:3] for row in rows] == [
        ["nothing asked", ""],
        ["none", "unknown"],
        ["none", "real"],
        ["none", "absent"],
        ["free 2", "unknown"],
        ["free 2", "absent"],
        ["classifier 5", "unknown"],
        ["both 2 5", "unknown"],
        ["", ""],
    ]
    assert [count for _, count in seen] == [2] + [4] * 7
    assert {row[0] for row in rows[1:6]} == {"with attributes"}
    assert rows[6][0] == "unconditional"
    assert rows[0][6] == "50.0"  # the guiding classifier's own opinion of what was not asked
    assert (tmp_path / "table" / "trade_off.png").is_file()
    monkeypatch.setattr(p2_guided, "sample_faces", None)  # nothing is made again
    assert guidance.main(table) == rows
