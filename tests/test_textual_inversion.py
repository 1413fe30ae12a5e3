"""Textual inversion: tokens, INPUT.json, learning a word, drawing prompts, and both models."""

import hashlib
import json
import pickle
import re
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import nn

import p3_textual_inversion as script
from common.captions import read_captioned
from common.cli import UserError
from common.data import decode_image
from common.rng import make_rng
from diffusion.schedule import Schedule
from inversion import models as inversion_models
from inversion import train_model as training
from inversion.concepts import read_concepts, read_words, save_words
from inversion.models import Loaded, embed_prompts, encode_prompts, load_model
from inversion.sampling import Sampling, guided_output, sample
from inversion.tokens import END, START, VOCABULARY, Tokenizer
from models.stable_diffusion.model import PREFIXES, StableDiffusion
from models.stable_diffusion.text_encoder import TextEncoder
from models.stable_diffusion.unet import Unet, attend
from models.stable_diffusion.vae import LATENT_SCALE, Vae
from models.text_to_image import TextToImage
from p3_textual_inversion import Generate, Train, TrainModel, generate, train, train_model
from preparation.synthetic import scenes
from tests.conftest import noise, save_images, save_net
from tools import rehearse_sd

WORDS = "a an picture drawing of on in the style car house creature background plain sketch"
INPUT = {
    "0": {
        "src_image": "creature",
        "token_name": "<new1>",
        "prompt": ["A <new1> on a plain background.", "A picture of a <new1>."],
        "prompt_4_clip_eval": ["A creature on a plain background.", "A picture of a creature."],
        "baseline": [[79, 34], [74, 35.5]],
    },
    "1": {
        "src_image": "David Revoy",
        "token_name": "<new2>",
        "prompt": ["A car in the style of <new2>."],
    },
}


def tiny_model() -> TextToImage:
    """A small model that knows WORDS, with weights that are not zero anywhere."""
    torch.manual_seed(0)
    vocabulary = sorted({START, END, *Tokenizer(24).encode(WORDS + " .")})
    net = TextToImage(
        vocabulary,
        size=16,
        patch=4,
        width=32,
        multipliers=(1, 1),
        heads=2,
        text_width=32,
        text_layers=1,
    )
    return disturbed(net)


def disturbed(net: nn.Module) -> nn.Module:
    """The network with noise on all weights, so that none of its branches gives zeros."""
    with torch.no_grad():
        for value in net.parameters():
            value.add_(0.05 * torch.randn_like(value))
    return net


@pytest.fixture
def small_model(tmp_path: Path) -> Path:
    schedule = Schedule(kind="cosine", prediction="x0").to_config()
    return save_net(tiny_model(), tmp_path / "model.safetensors", schedule=schedule)


@pytest.fixture
def input_json(tmp_path: Path) -> Path:
    """INPUT.json beside the folders of two concepts with three images each."""
    for seed, name in enumerate(INPUT):
        save_images(tmp_path / "concepts" / name, noise(3, 20, seed))
    file = tmp_path / "concepts" / "input.json"
    file.write_text(json.dumps(INPUT))
    return file


@pytest.fixture
def learn(small_model, input_json, tmp_path):
    """Learns both words in three steps; returns the folder of the run."""

    def run(name: str = "words", **options) -> Path:
        folder = tmp_path / "runs" / name
        defaults = {"steps": 3, "snapshot_every": 2, "init": ("creature", "sketch")}
        args = {**defaults, "input_json": input_json, "model": small_model, **options}
        train(Train(output_dir=folder, device="cpu", **args))
        return folder

    return run


def digest(net: nn.Module) -> str:
    """A hash of all weights."""
    content = hashlib.sha256()
    for value in net.state_dict().values():
        content.update(value.numpy().tobytes())
    return content.hexdigest()


# Tokens


@pytest.mark.parametrize(
    "text",
    [
        "A photo of a dog.",
        "The streets of Paris in the style of David Revoy, at 5:30!",
        "naïve café — 你好",
        "  two   spaces &amp; an entity ",
    ],
)
def test_token_ids_are_those_of_clip(text):
    from open_clip.tokenizer import SimpleTokenizer

    theirs = SimpleTokenizer(context_length=77)([text])[0].tolist()
    ours = Tokenizer(77)([text])[0].tolist()
    length = theirs.index(END) + 1
    assert ours[:length] == theirs[:length]
    assert ours[length:] == [END] * (77 - length)  # not with 0, as open_clip fills


def test_golden_token_ids():
    assert Tokenizer(8)(["A red car"]).tolist() == [[START, 320, 736, 1615, END, END, END, END]]


def test_a_learned_word_is_one_token_wherever_it_stands():
    tokenizer = Tokenizer(77, {"<new1>": 1, "<new12>": 2})
    assert tokenizer.encode("<new1>") == [VOCABULARY]
    assert tokenizer.encode("<new12>") == [VOCABULARY + 1, VOCABULARY + 2]
    dog = Tokenizer(77).encode("dog")
    assert tokenizer.encode("A <new1>dog, <new12>.") == [
        *Tokenizer(77).encode("a"),
        VOCABULARY,
        *dog,
        *Tokenizer(77).encode(","),
        VOCABULARY + 1,
        VOCABULARY + 2,
        *Tokenizer(77).encode("."),
    ]


def test_a_learned_word_of_letters_is_no_part_of_other_words():
    tokenizer = Tokenizer(77, {"cat": 1})
    assert tokenizer.encode("cat, category.")[0] == VOCABULARY
    assert tokenizer.encode("cat, category.")[1:] == Tokenizer(77).encode(", category.")


def test_a_long_prompt_loses_its_end():
    tokenizer = Tokenizer(5)
    ids = tokenizer(["a red car on a plain background"])[0].tolist()
    assert ids == [START, *tokenizer.encode("a red car"), END]
    assert tokenizer.is_too_long("a red car on a plain background")
    assert not tokenizer.is_too_long("a red car")


# Embeddings


def test_learned_rows_take_their_places_and_nothing_else_moves():
    net = tiny_model()
    rows = torch.randn(3, 32)
    tokenizer = Tokenizer(24, {"<a>": 1, "<b>": 2})
    ids = tokenizer(["a <b> car", "a <a> house"])
    found = embed_prompts(net, ids, rows)
    plain = embed_prompts(net, Tokenizer(24)(["a car car car", "a car house"]), None)
    assert torch.equal(found[0, 2:4], rows[1:])
    assert torch.equal(found[1, 2], rows[0])
    assert torch.equal(found[0, 4], plain[0, 4])
    assert torch.equal(found[1, 3:], plain[1, 3:])


def test_gradients_reach_the_new_rows_only():
    net = tiny_model().requires_grad_(False)
    rows = torch.randn(2, 32, requires_grad=True)
    ids = Tokenizer(24, {"<a>": 1, "<b>": 1})(["a <a> car"])
    x = torch.randn(1, *net.shape)
    net.predict(
        x, torch.tensor([5]), net.encode_text(embed_prompts(net, ids, rows))
    ).sum().backward()
    assert rows.grad[0].abs().sum() > 0
    assert rows.grad[1].abs().sum() == 0  # the word is not in the prompt
    assert all(value.grad is None for value in net.parameters())


def test_words_unknown_to_the_small_model_share_one_row():
    net = tiny_model()
    ids = torch.tensor([Tokenizer(24).encode("car zebra tiger")])
    assert net.unknown(ids).tolist() == [[False, True, True]]
    embeddings = net.embed(ids)
    assert torch.equal(embeddings[0, 1], embeddings[0, 2])
    assert not torch.equal(embeddings[0, 0], embeddings[0, 1])


# INPUT.json


def test_input_json_is_read(input_json):
    first, second = read_concepts(input_json)
    assert (first.name, first.word, first.kind) == ("0", "<new1>", "object")
    assert first.baselines == ((79.0, 34.0), (74.0, 35.5))
    assert second.kind == "style"
    assert second.plain_prompts == ()
    assert second.baselines == ()


def test_the_drawn_input_json_is_read(tmp_path):
    file = tmp_path / "input.json"
    file.write_text(json.dumps(scenes.input_json()))
    creature, style = read_concepts(file)
    assert (creature.kind, style.kind) == ("object", "style")
    assert creature.plain_prompts[0] == "A creature on a plain blue background."
    assert style.plain_prompts[0] == "A car."


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"token_name": None}, "token_name is not a text"),
        ({"token_name": "two words"}, "must be one word"),
        ({"token_name": "../x"}, "must be one word"),
        ({"prompt": "A <new1>."}, "prompt is not a list of texts"),
        ({"prompt": []}, "prompt is not a list of texts"),
        ({"prompt": ["A <new1>.", 5]}, "prompt has an entry that is not a text: 5"),
        ({"prompt": ["A dog.", "A <new1>."]}, "'A dog.' does not have the word <new1>"),
        ({"prompt_4_clip_eval": ["A dog."]}, "not as many entries as prompt"),
        ({"baseline": [[1, 2]]}, "one pair of scores for each prompt"),
        ({"baseline": [[1, 2], [3]]}, "not [image, text]: [3]"),
        ({"baseline": [[1, 2], [True, 3]]}, "not [image, text]"),
        ({"baseline": [[1, 2], [1e300, 3]]}, "not [image, text]"),
        ({"baseline": [[1, 2], [10**400, 3]]}, "not [image, text]"),
        ({"prompt": ["A <new1>.", "A <new1>." + "x" * 1_000]}, "more than 1,000 characters"),
        ({"src_image": 3}, "src_image is not a text"),
    ],
)
def test_a_malformed_concept_is_one_line(tmp_path, change, words):
    file = tmp_path / "input.json"
    file.write_text(json.dumps({"0": INPUT["0"] | change}))
    with pytest.raises(UserError) as error:
        read_concepts(file)
    assert str(file) in str(error.value)
    assert "'0'" in str(error.value)
    assert words in str(error.value)


@pytest.mark.parametrize("key", ["token_name", "prompt"])
def test_a_missing_key_is_named(tmp_path, key):
    file = tmp_path / "input.json"
    entry = {name: value for name, value in INPUT["0"].items() if name != key}
    file.write_text(json.dumps({"0": entry}))
    with pytest.raises(UserError, match=f"has no {key}"):
        read_concepts(file)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\xff\xfe\x00", "UTF-8"),
        (b"", "not json"),
        (b"[1]", "not of the form"),
        (b"{}", "not of the form"),
        (b'{"0": 5}', "not an object"),
        (b'{"0": {}, "0": {}}', "twice"),
        (b'{"../0": {}}', "may only have letters"),
        (b"[" * 100_000, "not json"),
        (b'{"0": {"baseline": [[NaN, 3]]}}', "has the number NaN"),
        (b'{"0": {"token_name": "\\ud800"}}', "half of a character"),
    ],
)
def test_a_malformed_file_is_one_line(tmp_path, content, words):
    file = tmp_path / "input.json"
    file.write_bytes(content)
    with pytest.raises(UserError, match=words):
        read_concepts(file)
    with pytest.raises(UserError, match="no such file"):
        read_concepts(tmp_path / "none.json")


def test_a_placeholder_of_no_concept_is_named(tmp_path):
    file = tmp_path / "input.json"
    prompts = ["A <new1> in the style of <new3>.", "A <new1>."]
    file.write_text(json.dumps({"0": INPUT["0"] | {"prompt": prompts}}))
    with pytest.raises(UserError, match=r"<new3> in the prompt .* is the token_name of no concept"):
        read_concepts(file)


def test_two_concepts_cannot_share_a_word(tmp_path):
    file = tmp_path / "input.json"
    file.write_text(json.dumps({"0": INPUT["0"], "1": INPUT["0"]}))
    with pytest.raises(UserError, match="two concepts have the token_name <new1>"):
        read_concepts(file)


# Files of learned words


def test_words_are_written_as_diffusers_and_others_read_them(tmp_path):
    file = tmp_path / "words.safetensors"
    save_words(file, {"<new1>": torch.ones(2, 8)})
    found = safetensors.torch.load_file(file)
    assert found["<new1>"].shape == (2, 8)
    assert torch.equal(read_words(file)["<new1>"], torch.ones(2, 8))


def test_words_of_other_programs_are_read(tmp_path):
    diffusers = tmp_path / "learned_embeds.bin"
    torch.save({"<cat>": torch.ones(8)}, diffusers)
    assert read_words(diffusers)["<cat>"].shape == (1, 8)
    web = tmp_path / "my-cat.safetensors"
    safetensors.torch.save_file({"emb_params": torch.ones(3, 8)}, web)
    assert read_words(web)["<my-cat>"].shape == (3, 8)
    pickled = tmp_path / "old cat.pt"
    torch.save({"string_to_param": {"*": torch.ones(2, 8)}, "name": "old", "step": 5}, pickled)
    assert read_words(pickled)["<old-cat>"].shape == (2, 8)
    parameters = nn.ParameterDict({"*": nn.Parameter(torch.ones(2, 8))})
    torch.save({"string_to_token": {"*": 265}, "string_to_param": parameters}, pickled)
    assert torch.equal(read_words(pickled)["<old-cat>"], torch.ones(2, 8))


def test_trained_parameters_are_read_as_plain_numbers(tmp_path):
    file = tmp_path / "words.pt"
    torch.save({"<new1>": nn.Parameter(torch.ones(2, 8))}, file)
    assert not read_words(file)["<new1>"].requires_grad


@pytest.mark.parametrize(
    "value",
    [torch.ones(2, 8, dtype=torch.complex64), torch.ones(2, 8).to_sparse(), torch.ones(8).int()],
)
def test_only_plain_numbers_are_embeddings(tmp_path, value):
    file = tmp_path / "words.pt"
    torch.save({"<new1>": value}, file)
    with pytest.raises(UserError, match="is not the embedding of a word"):
        read_words(file)


def test_a_file_of_something_else_is_refused(tmp_path):
    file = tmp_path / "words.safetensors"
    safetensors.torch.save_file({"conv.weight": torch.ones(2, 2, 3, 3)}, file)
    with pytest.raises(UserError, match="is not the embedding of a word"):
        read_words(file)
    safetensors.torch.save_file({"<a>": torch.tensor([1.0, float("nan")])}, file)
    with pytest.raises(UserError, match="not finite"):
        read_words(file)


# Learning


def test_only_the_new_words_are_learned(learn, small_model):
    before = small_model.read_bytes()
    folder = learn()
    assert small_model.read_bytes() == before
    words = read_words(folder / "words.safetensors")
    assert list(words) == ["<new1>", "<new2>"]
    loaded = load_model(small_model, "cpu", "auto")
    for word, init in (("<new1>", "creature"), ("<new2>", "sketch")):
        start = loaded.net.embed(torch.tensor([Tokenizer(24).encode(init)]))[0]
        assert not torch.equal(words[word], start)
        # Adam's first steps have about the length of the learning rate in every number.
        assert (words[word] - start).abs().max() < 3 * 5e-3 + 0.01
        torch.testing.assert_close(words[word].norm(), start.norm())


def test_the_loaded_model_stays_as_it_was(learn, small_model, monkeypatch):
    loaded = load_model(small_model, "cpu", "auto")
    before = digest(loaded.net)
    monkeypatch.setattr(script, "load_model", lambda *_: loaded)
    learn()
    assert digest(loaded.net) == before


def test_a_changed_table_is_noticed(learn, monkeypatch):
    digests = iter("abcdef")
    monkeypatch.setattr(script, "digest_of_table", lambda _: next(digests))
    with pytest.raises(AssertionError, match="other words"):
        learn()


def test_too_little_memory_for_training_is_one_line(learn, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(script, "learn", fail)
    with pytest.raises(UserError, match="--batch-size 4: too little memory"):
        learn()


def test_the_norm_may_be_left_free(learn):
    kept = read_words(learn() / "words.safetensors")["<new1>"]
    free = read_words(learn("free", norm="free") / "words.safetensors")["<new1>"]
    assert free.norm() != kept.norm()


def test_a_run_continues_bit_for_bit(learn, stop_in_step_1, small_model, input_json, tmp_path):
    whole = learn("whole", steps=4)
    args = Train(
        input_json=input_json,
        model=small_model,
        init=("creature", "sketch"),
        steps=4,
        snapshot_every=2,
        output_dir=tmp_path / "runs" / "stopped",
        device="cpu",
    )
    stop_in_step_1(train, args)
    assert not (args.output_dir / "words.safetensors").exists()
    train(args)
    for name in ("words.safetensors", "0/snapshots.safetensors", "1/word.safetensors"):
        assert (whole / name).read_bytes() == (args.output_dir / name).read_bytes()
    train(args)  # finished: reads the words again
    assert (whole / "words.safetensors").read_bytes() == (
        args.output_dir / "words.safetensors"
    ).read_bytes()


def test_another_input_json_does_not_continue_the_run(learn, input_json):
    folder = learn()
    changed = json.loads(input_json.read_text())
    changed["0"]["prompt"] = ["A car in the style of <new1>."] * 2
    input_json.write_text(json.dumps(changed))
    with pytest.raises(UserError, match=r"--kind was \['object'\], is \['style'\]"):
        learn()
    input_json.write_text(json.dumps(INPUT).replace("<new1>", "<dog>"))
    with pytest.raises(UserError, match="holds other words"):
        learn()
    (folder / "words.safetensors").unlink()
    with pytest.raises(UserError, match="--token was <new1>, is <dog>"):
        learn()


def test_snapshots_start_from_the_known_word(learn, small_model):
    folder = learn(steps=4)
    snapshots = safetensors.torch.load_file(folder / "0" / "snapshots.safetensors")
    assert sorted(snapshots) == ["step_000000", "step_000002", "step_000004"]
    loaded = load_model(small_model, "cpu", "auto")
    start = loaded.net.embed(torch.tensor([Tokenizer(24).encode("creature")]))[0]
    assert torch.equal(snapshots["step_000000"], start)
    assert torch.equal(snapshots["step_000004"], read_words(folder / "words.safetensors")["<new1>"])


def test_one_word_of_a_folder_of_images(small_model, tmp_path):
    folder = save_images(tmp_path / "photos", noise(2, 24))
    args = Train(
        images=folder,
        token="<cat>",
        init=("creature",),
        vectors=2,
        steps=2,
        model=small_model,
        output_dir=tmp_path / "run",
        device="cpu",
    )
    train(args)
    assert read_words(tmp_path / "run" / "words.safetensors")["<cat>"].shape == (2, 32)


def test_each_image_is_encoded_once_and_its_mirror_image_too(small_model, tmp_path):
    loaded = load_model(small_model, "cpu", "auto")
    folder = save_images(tmp_path / "photos", noise(2, 16))
    latents = script.encode_folder(folder, loaded, flip=True)
    images = loaded.net.decode(latents.mean)
    assert len(images) == 4
    assert torch.equal(images[2:], images[:2].flip(3))
    assert len(script.encode_folder(folder, loaded, flip=False).mean) == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--init", "creature"), "--init creature: needs one value for each of <new1>, <new2>"),
        (("--init", "creature", "zebra"), "--init zebra: the small model was not trained on"),
        (("--init", "a creature", "sketch"), "--init a creature: is 2 tokens long"),
        (("--kind", "object"), "--kind object: needs one value"),
        (("--images", "nowhere"), "nowhere/0: no such folder"),
        (("--model", "nothing.ckpt"), "nothing.ckpt: no such file; Stable Diffusion's is"),
        (("--token", "two words"), "--token 'two words': must be one word"),
    ],
)
def test_mistakes_in_training_are_one_line(
    error_of, small_model, input_json, tmp_path, options, words
):
    commands = Train | Generate | TrainModel
    given = ("--model", small_model, "--output-dir", tmp_path / "run", *options)
    error = error_of(commands, script.main, "train", input_json, *given)
    assert words in error
    assert not (tmp_path / "run").exists()


def test_words_to_start_from_are_guessed(input_json, small_model, tmp_path, error_of):
    loaded = load_model(small_model, "cpu", "auto")
    concepts = read_concepts(input_json)
    assert script.guessed_inits(concepts, loaded) == ["creature", "sketch"]
    given = ("--images", tmp_path / "concepts" / "0", "--model", small_model)
    error = error_of(Train | Generate, script.main, "train", *given, "--output-dir", tmp_path / "x")
    assert "--init: needed for <new1>" in error


def test_training_needs_images(error_of, tmp_path):
    error = error_of(Train | Generate, script.main, "train", "--output-dir", tmp_path)
    assert "give INPUT.json, or --images" in error


# Drawing


@pytest.fixture
def draw(small_model, input_json, tmp_path):
    """Draws the images of INPUT.json with random words; returns OUT."""
    words = tmp_path / "some.safetensors"
    torch.manual_seed(1)
    save_words(words, {"<new1>": torch.randn(1, 32), "<new2>": torch.randn(2, 32)})

    def run(name: str = "out", **options) -> Path:
        args = {"count": 2, "steps": 2, "device": "cpu", "embeddings": (words,), **options}
        generate(
            Generate(input_json=input_json, output_dir=tmp_path / name, model=small_model, **args)
        )
        return tmp_path / name

    return run


def test_25_images_of_each_prompt_with_the_graders_names(draw):
    out = draw(count=25, steps=1)
    folders = {"0/0": 25, "0/1": 25, "1/0": 25}
    for folder, count in folders.items():
        concept, prompt = folder.split("/")
        names = {f"source{concept}_prompt{prompt}_{k}.png" for k in range(count)}
        assert {path.name for path in (out / folder).iterdir()} == names
    assert {path.name for path in out.iterdir()} == {"0", "1", "generated.json"}
    assert Generate(input_json=Path("x"), output_dir=Path("y")).count == 25


def test_missing_images_are_drawn_again(draw, capsys):
    out = draw()
    lost = out / "0" / "1" / "source0_prompt1_1.png"
    kept = out / "0" / "1" / "source0_prompt1_0.png"
    before, time = lost.read_bytes(), kept.stat().st_mtime_ns
    lost.unlink()
    draw()
    assert lost.read_bytes() == before
    assert kept.stat().st_mtime_ns == time
    capsys.readouterr()
    draw()
    assert "already finished" in capsys.readouterr().out


def test_an_image_depends_on_the_seed_and_its_number_alone(draw):
    together = draw("together", count=3, batch_size=3)
    alone = draw("alone", count=3, batch_size=1)
    other = draw("other", count=3, seed=1)
    name = "0/0/source0_prompt0_2.png"
    difference = decode_image(together / name).astype(int) - decode_image(alone / name)
    assert abs(difference).max() <= 1
    assert (decode_image(together / name) != decode_image(other / name)).any()


def test_a_batch_that_is_too_large_is_halved(draw, monkeypatch):
    """And one image that is too large is one line."""
    sizes = []

    def fail_above_one(net, schedule, states, *rest):
        sizes.append(len(states))
        if len(states) > 1:
            raise torch.OutOfMemoryError
        return sample(net, schedule, states, *rest)

    expected = draw("whole", count=3)
    monkeypatch.setattr(script, "sample", fail_above_one)
    out = draw("halved", count=3, batch_size=3)
    assert sizes[:4] == [3, 1, 1, 1]
    name = "0/0/source0_prompt0_2.png"
    difference = decode_image(out / name).astype(int) - decode_image(expected / name)
    assert abs(difference).max() <= 1

    def fail(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(script, "sample", fail)
    with pytest.raises(UserError, match="too little memory for one image"):
        draw("none", batch_size=1)


def test_other_settings_need_another_folder(draw):
    draw()
    with pytest.raises(UserError, match="holds images of other settings"):
        draw(steps=3)


def test_a_stray_file_is_refused_before_anything_is_drawn(draw, tmp_path):
    stray = tmp_path / "out" / "1" / "0" / "grid.png"
    stray.parent.mkdir(parents=True)
    stray.write_bytes(b"")
    with pytest.raises(UserError, match=r"grid\.png, which graders would read too"):
        draw()
    assert not (tmp_path / "out" / "0" / "0" / "source0_prompt0_0.png").exists()


def test_images_of_unknown_settings_are_refused(draw):
    out = draw()
    (out / "generated.json").unlink()
    with pytest.raises(UserError, match="holds images of unknown settings"):
        draw(steps=3)


def test_what_a_killed_run_left_is_removed(draw):
    out = draw()
    leftover = out / "0" / "0" / ".123-source0_prompt0_1.png"
    leftover.write_bytes(b"half an image")
    draw()
    assert not leftover.exists()


def test_both_words_in_one_prompt(small_model, input_json, tmp_path):
    content = {"0": INPUT["0"] | {"prompt": ["A <new1> in the style of <new2>.", "A <new1>."]}}
    content["1"] = INPUT["1"]
    input_json.write_text(json.dumps(content))
    pictures = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        words = {"<new1>": torch.ones(1, 32), "<new2>": torch.randn(1, 32)}
        save_words(tmp_path / f"{seed}.safetensors", words)
        out = tmp_path / f"out{seed}"
        args = {"count": 1, "steps": 2, "device": "cpu", "model": small_model}
        embeddings = (tmp_path / f"{seed}.safetensors",)
        generate(Generate(input_json=input_json, output_dir=out, embeddings=embeddings, **args))
        pictures.append(out)
    first, second = pictures
    both = "0/0/source0_prompt0_0.png"
    one = "0/1/source0_prompt1_0.png"
    assert (decode_image(first / both) != decode_image(second / both)).any()
    assert (decode_image(first / one) == decode_image(second / one)).all()


def test_words_are_looked_for_beside_the_model(small_model, input_json, tmp_path):
    args = Generate(
        input_json=input_json, output_dir=tmp_path / "out", model=small_model, count=1, steps=1
    )
    words = {"<new1>": torch.ones(1, 32), "<new2>": torch.ones(1, 32)}
    save_words(tmp_path / "text_to_image_words.safetensors", words)
    generate(args)
    assert (tmp_path / "out" / "1" / "0" / "source1_prompt0_0.png").exists()


def test_an_unknown_word_says_how_to_train_it(error_of, small_model, input_json, tmp_path):
    words = tmp_path / "words.safetensors"
    save_words(words, {"<new1>": torch.ones(1, 32)})
    given = (input_json, tmp_path / "out", small_model, "--embeddings", words)
    error = error_of(Train | Generate, script.main, "generate", *given)
    assert "no embedding of <new2> is known" in error
    assert f"p3_textual_inversion.py train {input_json}" in error
    save_words(words, {"<new1>": torch.ones(1, 768), "<new2>": torch.ones(1, 768)})
    error = error_of(Train | Generate, script.main, "generate", *given)
    assert "<new1> has 768 numbers, but the model's words have 32" in error


def test_a_long_prompt_is_cut_with_a_warning(draw, input_json, capsys):
    content = {"0": INPUT["0"], "1": INPUT["1"]}
    content["1"] = INPUT["1"] | {"prompt": ["A car in the style of <new2> " + "and a house " * 9]}
    input_json.write_text(json.dumps(content))
    draw()
    assert "warning: the end of 'A car in the style" in capsys.readouterr().out


# Sampling


def test_guidance_goes_from_the_empty_prompt_to_the_prompt():
    net = tiny_model()
    schedule = Schedule(kind="cosine", prediction="eps")
    x = torch.randn(2, *net.shape)
    states = torch.randn(2, 24, 32)
    empty = torch.randn(1, 24, 32).expand(2, -1, -1)
    both = torch.cat([states, empty])
    t = torch.full((2,), 499.0)
    with_prompt, without = net.predict(x, t, states), net.predict(x, t, empty)
    for scale in (0.0, 1.0, 7.5):
        found = guided_output(net, schedule, x, 500, both, scale)
        torch.testing.assert_close(
            found, without + scale * (with_prompt - without), atol=1e-4, rtol=1e-4
        )


def tiny_stable_diffusion() -> StableDiffusion:
    torch.manual_seed(0)
    net = StableDiffusion(
        Unet(
            width=32, multipliers=(1, 1), blocks=1, attention_levels=(0,), heads=2, context_width=32
        ),
        Vae(width=32, multipliers=(1, 1), blocks=1),
        TextEncoder(width=32, layers=1, heads=2),
        image_size=16,
    )
    return disturbed(net).eval()


@pytest.mark.parametrize("solver", ["dpm", "ddim"])
def test_fifty_steps_agree_with_diffusers(solver):
    import diffusers

    net = tiny_stable_diffusion()
    schedule = Schedule(kind="scaled-linear", beta_start=0.00085, beta_end=0.012)
    beta = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    kinds = {"dpm": diffusers.DPMSolverMultistepScheduler, "ddim": diffusers.DDIMScheduler}
    extra = {"dpm": {"algorithm_type": "dpmsolver++"}, "ddim": {"clip_sample": False}}[solver]
    theirs = kinds[solver](
        num_train_timesteps=1000,
        timestep_spacing="trailing",
        **beta,
        **extra,
        **({"set_alpha_to_one": True} if solver == "ddim" else {"final_sigmas_type": "zero"}),
    )
    betas = schedule.betas[1:]
    torch.testing.assert_close(betas, theirs.betas, rtol=1e-5, atol=1e-9)

    torch.manual_seed(0)
    states, empty = torch.randn(2, 77, 32), torch.randn(1, 77, 32)
    ours = sample(net, schedule, states, empty, 5, [0, 3], Sampling(50, 7.5, solver))
    theirs.set_timesteps(50)
    from common.rng import ImageNoise

    x = ImageNoise(5, [0, 3], net.shape)()
    with torch.inference_mode():
        for t in theirs.timesteps:
            time = torch.full((2,), int(t))
            with_prompt = net.predict(x, time, states)
            without = net.predict(x, time, empty.expand(2, -1, -1))
            x = theirs.step(without + 7.5 * (with_prompt - without), t, x).prev_sample
        expected = net.decode(x)
    relative = (ours - expected).abs().max() / expected.abs().max()
    assert relative < 1e-3


# Stable Diffusion's file


def write_stable_diffusion(net: StableDiffusion, path: Path, **more: torch.Tensor) -> Path:
    """The networks in a file as Stable Diffusion's, with all that is to be ignored."""
    weights = {}
    for name, prefix in PREFIXES.items():
        for key, value in getattr(net, name).state_dict().items():
            weights[prefix + key] = value.contiguous()
    weights["betas"] = torch.ones(1000)
    weights["posterior_mean_coef1"] = torch.ones(1000)
    weights["model_ema.decay"] = torch.tensor(0.9999)
    weights["model_ema.diffusion_modelout0weight"] = torch.ones(3)
    ids = torch.arange(77)[None]
    weights["cond_stage_model.transformer.text_model.embeddings.position_ids"] = ids
    weights |= more
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(weights, path)
    else:
        torch.save({"state_dict": weights, "global_step": 470_000}, path)
    return path


@pytest.fixture
def tiny_networks(monkeypatch):
    """Stable Diffusion with tiny networks, for the code that loads it too."""
    monkeypatch.setattr(inversion_models, "StableDiffusion", tiny_stable_diffusion)
    return tiny_stable_diffusion()


@pytest.mark.parametrize("name", ["sd.ckpt", "sd.safetensors"])
def test_stable_diffusion_loads_as_it_is_published(tiny_networks, tmp_path, name):
    file = write_stable_diffusion(tiny_networks, tmp_path / name)
    loaded = load_model(file, "cpu", "fp32")
    assert loaded.which == "stable-diffusion"
    assert digest(loaded.net) == digest(tiny_networks)
    assert loaded.schedule.alpha_bar[1000] == pytest.approx(0.0046599, rel=1e-4)


def test_a_file_with_objects_of_another_library(tiny_networks, tmp_path, monkeypatch):
    """The rehearsal's file is as the published one: torch alone refuses it."""
    monkeypatch.setattr(rehearse_sd, "StableDiffusion", tiny_stable_diffusion)
    file = tmp_path / "sd-v1-4.ckpt"
    rehearse_sd.write_random_file(file)
    for name in [name for name in sys.modules if name.startswith("pytorch_lightning")]:
        del sys.modules[name]
    with pytest.raises(pickle.UnpicklingError, match="pytorch_lightning"):
        torch.load(file, weights_only=True)
    assert load_model(file, "cpu", "fp32").which == "stable-diffusion"


def test_a_key_that_is_missing_or_unknown_is_named(tiny_networks, tmp_path):
    file = write_stable_diffusion(tiny_networks, tmp_path / "sd.ckpt", **{"lora.up": torch.ones(1)})
    with pytest.raises(UserError, match=r"unexpected key 'lora.up'"):
        load_model(file, "cpu", "fp32")
    more = {"first_stage_model.quant_conv.bias": torch.ones(3)}
    file = write_stable_diffusion(tiny_networks, tmp_path / "sd.ckpt", **more)
    with pytest.raises(UserError, match=r"vae: 'quant_conv.bias' is \[3\], expected \[8\]"):
        load_model(file, "cpu", "fp32")


def test_latents_are_scaled():
    net = tiny_stable_diffusion()
    images = torch.randn(1, 3, 16, 16)
    mean, deviation = net.encode(images)
    raw, log_variance = net.vae.encode(images)
    torch.testing.assert_close(mean, 0.18215 * raw)
    torch.testing.assert_close(deviation, 0.18215 * log_variance.mul(0.5).exp())
    torch.testing.assert_close(net.decode(mean), net.vae.decode(raw))
    assert LATENT_SCALE == 0.18215


def test_words_are_learned_and_drawn_with_stable_diffusion(tiny_networks, input_json, tmp_path):
    file = write_stable_diffusion(tiny_networks, tmp_path / "sd.ckpt")
    out = tmp_path / "run"
    common = {"input_json": input_json, "model": file, "device": "cpu"}
    train(Train(output_dir=out, steps=2, init=("dog", "painting"), **common))
    words = out / "words.safetensors"
    assert read_words(words)["<new2>"].shape == (1, 32)
    images = tmp_path / "images"
    generate(Generate(output_dir=images, embeddings=(words,), count=1, steps=2, **common))
    with Image.open(images / "0" / "0" / "source0_prompt0_0.png") as image:
        assert image.size == (16, 16)


def test_the_states_are_those_of_the_whole_length(tiny_networks):
    loaded = Loaded(tiny_networks, Schedule(), "stable-diffusion", torch.device("cpu"))
    states = encode_prompts(loaded, Tokenizer(77), ["a dog", ""], None)
    assert states.shape == (2, 77, 32)


@pytest.mark.parametrize(
    "config",
    [
        [1],
        None,
        {"net": "text_to_image", "arguments": {"vocabulary": [99_999]}},
        {"net": "text_to_image", "arguments": {"vocabulary": ["a"]}},
        {"net": "text_to_image", "arguments": {"vocabulary": [1], "patch": 0}},
        {"net": "text_to_image", "arguments": {"vocabulary": [1], "length": -1}},
        {"net": "text_to_image", "arguments": {"vocabulary": [1], "width": 33, "heads": 3}},
    ],
)
def test_hostile_metadata_of_a_model_is_one_line(tmp_path, config):
    file = tmp_path / "model.safetensors"
    metadata = {"config": json.dumps(config)}
    safetensors.torch.save_file({"x": torch.ones(1)}, file, metadata)
    with pytest.raises(UserError, match=r"model\.safetensors"):
        load_model(file, "cpu", "fp32")


@pytest.mark.parametrize(
    "schedule", [[1], {"steps": 10}, {"steps": "a"}, {"kind": "foo"}, {"beta_end": 5}, {"x": 1}]
)
def test_a_schedule_that_cannot_be_meant_is_one_line(tmp_path, schedule):
    file = save_net(tiny_model(), tmp_path / "model.safetensors", schedule=schedule)
    with pytest.raises(UserError, match="has no noise schedule of 1,000 steps"):
        load_model(file, "cpu", "fp32")


# The small model and its captions


@pytest.fixture
def captioned(tmp_path: Path) -> Path:
    """A data folder with six captioned scenes."""
    folder = tmp_path / "data" / "captioned" / "train"
    folder.mkdir(parents=True)
    lines = []
    for k in range(6):
        image, text, scene = scenes.draw_captioned(0, "train", k)
        Image.fromarray(image).save(folder / f"{k}.png")
        lines.append(json.dumps({"file_name": f"{k}.png", "text": text, **scene.traits()}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path / "data"


def tiny_training(data_dir: Path, output_dir: Path, **more) -> TrainModel:
    sizes = {"size": 32, "width": 32, "text_width": 32, "text_layers": 1, "batch_size": 4}
    return TrainModel(
        data_dir=data_dir,
        output_dir=output_dir,
        epochs=1,
        images_per_epoch=12,
        device="cpu",
        **{**sizes, **more},
    )


def test_the_small_model_trains_and_continues_bit_for_bit(
    captioned, tmp_path, stop_in_step_1, monkeypatch
):
    monkeypatch.setattr(training, "SHOWN", 2)
    train_model(tiny_training(captioned, tmp_path / "runs" / "whole"))
    args = tiny_training(captioned, tmp_path / "runs" / "stopped")
    stop_in_step_1(train_model, args)
    train_model(args)
    file = tmp_path / "runs" / "whole" / "model.safetensors"
    assert file.read_bytes() == (args.output_dir / "model.safetensors").read_bytes()
    loaded = load_model(file, "cpu", "auto")
    assert loaded.which == "small"
    with Image.open(args.output_dir / "samples" / "0001.png") as grid:
        assert grid.width > 2 * 32
    train_model(tiny_training(captioned, tmp_path / "runs" / "more", init=file))
    with pytest.raises(UserError, match=r"--size 48: --init .* has 32"):
        train_model(tiny_training(captioned, tmp_path / "runs" / "other", init=file, size=48))


def test_every_parameter_of_the_small_model_learns():
    net = tiny_model()
    x = torch.randn(2, *net.shape)
    ids = Tokenizer(24)(["a car", "a zebra"])
    net(x, torch.tensor([5, 900]), ids=ids).square().mean().backward()
    still = [name for name, value in net.named_parameters() if value.grad is None]
    assert still == []


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("", "has no line"),
        ("{", "line 1: not of the form"),
        ('{"file_name": "0.png"}', "line 1: not of the form"),
        ('{"file_name": "0.png", "text": 3}', "line 1: file_name and text must be strings"),
        ('{"file_name": "../0.png", "text": "a"}', "is not the name of a file in the folder"),
        ('{"file_name": "9.png", "text": "a"}', "names 9.png, which is not there"),
    ],
)
def test_a_malformed_caption_is_one_line(captioned, line, words):
    folder = captioned / "captioned" / "train"
    (folder / "metadata.jsonl").write_text(line)
    with pytest.raises(UserError, match=words):
        read_captioned(folder, 64, None)


def test_captions_are_true_of_their_scenes():
    for k in range(300):
        scene, text, _ = scenes.captioned_scene(0, "train", k)
        for colour in scenes.COLOUR_NAMES:
            if colour in re.findall(r"\w+", text):
                assert colour in (scene.colour, scene.ground_colour)
                assert scene.style != "print"
        for style in scenes.NAMED_STYLES:
            if f"in the style of {style}" in text:
                assert scene.style == style
        assert "print" not in text
        if scene.subject == scenes.CREATURE:
            assert len(traits_in(text)) <= 1


def test_the_mix_of_captions_names_traits_more_often():
    def shares(mix: scenes.Mix) -> tuple[float, float]:
        """The share of creatures, and the share of these whose caption names a trait."""
        drawn = [scenes.captioned_scene(0, "train", k, mix)[:2] for k in range(400)]
        creatures = [text for scene, text in drawn if scene.subject == scenes.CREATURE]
        named = [text for text in creatures if traits_in(text)]
        assert all(len(traits_in(text)) == 1 for text in named)
        return len(creatures) / len(drawn), len(named) / len(creatures)

    assert shares(scenes.USUAL) == (pytest.approx(0.3, abs=0.07), pytest.approx(0.41, abs=0.1))
    many = scenes.Mix(creatures=0.8, trait_weight=20)
    # Of 100 captions, 10 say "a drawing", and a plain coat is not counted here.
    assert shares(many) == (pytest.approx(0.8, abs=0.06), pytest.approx(0.8, abs=0.06))
    assert shares(scenes.Mix(trait_weight=0))[1] == 0


def traits_in(text: str) -> list[str]:
    """The traits of a creature that a caption names."""
    subject = text.split(" on ")[0]
    shapes = [f"{body} creature" for body in scenes.BODIES]
    words = [*shapes, "ears", "horns", "spotted", "striped", "eye"]
    return [word for word in words if word in subject]


def test_a_concept_is_one_creature_in_several_places():
    drawings = [scenes.draw_concept(0, 0, k) for k in range(5)]
    for _, scene in drawings:
        assert scene.ears == "pointed"
        assert scene.eyes == 1
    assert len({image.tobytes() for image, _ in drawings}) == 5
    styles = [scenes.draw_concept(0, 1, k)[1] for k in range(5)]
    assert {scene.style for scene in styles} == {"print"}
    assert len({scene.subject for scene in styles}) == 5
    assert len({(scene.dark_hue, scene.light_hue) for scene in styles}) == 1


# The loss and the attention


@pytest.mark.parametrize("power", [0.0, 2.0])
def test_steps_are_drawn_with_a_power_of_t(power):
    steps = inversion_models.random_steps(1000, 50_000, power, make_rng(0, "steps"))
    assert steps.dtype == torch.int64
    assert steps.min() >= 1
    assert steps.max() == 1000
    # The share of steps up to s is (s / T) ** (1 + power).
    for s in (250, 500, 900):
        share = (steps <= s).float().mean().item()
        assert share == pytest.approx((s / 1000) ** (1 + power), abs=0.01)


def test_steps_of_the_power_0_are_drawn_as_everywhere_else():
    steps = inversion_models.random_steps(1000, 8, 0.0, make_rng(0, "steps"))
    expected = torch.randint(1, 1001, (8,), generator=make_rng(0, "steps"))
    assert torch.equal(steps, expected)


def test_the_error_of_the_image_counts_as_that_of_v_up_to_a_factor_of_five():
    torch.manual_seed(0)
    x0, eps, output = (torch.randn(3, 2, 4, 4) for _ in range(3))
    t = torch.tensor([5, 500, 950])
    image = Schedule(kind="cosine", prediction="x0")
    velocity = Schedule(kind="cosine", prediction="v")
    x = image.q_sample(x0, t, eps)
    signal, sigma = image.coefficients(t)
    v = (signal * x - output) / sigma  # of the same image
    errors = (v - velocity.target(x0, t, eps)).square().flatten(1).mean(1)
    found = inversion_models.image_errors(image, output, x0, t, eps)
    torch.testing.assert_close(found[1:], errors[1:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[0], 5 * (output[0] - x0[0]).square().mean())
    noise_schedule = Schedule(kind="cosine", prediction="eps")
    plain = inversion_models.image_errors(noise_schedule, output, x0, t, eps)
    torch.testing.assert_close(plain, (output - eps).square().flatten(1).mean(1))


def test_attention_is_computed_in_float32_on_a_cpu():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, 5, 8).bfloat16() for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        found = attend(q, k, v)
    scores = q.float() @ k.float().transpose(-1, -2) / 8**0.5
    expected = (scores.softmax(-1) @ v.float()).bfloat16()
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=0.01, atol=0.01)
