"""tools/hub.py: headers that huggingface_hub reads, and folders that it takes."""

import json
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import ModelCardData
from PIL import Image

from common.checkpoints import load_net
from common.cli import UserError
from common.files import ROOT
from models.gan import GENERATORS
from tests.conftest import noise
from tools import hub
from tools.hub import Folder

CARDS = sorted((ROOT / "checkpoints").glob("*.md"))
NON_COMMERCIAL = ("CelebA", "SVHN", "MNIST-M")


@pytest.mark.parametrize("file", CARDS, ids=lambda file: file.stem)
def test_a_released_card_has_a_header_that_the_hub_reads(file):
    card = ModelCard.load(file)
    assert isinstance(card.data, ModelCardData)
    facts = card.data.to_dict()
    assert facts["library_name"] == "pytorch"
    assert "pytorch" in facts["tags"]
    assert card.text.strip().startswith(f"# {file.stem}\n")
    assert file.read_text() == hub.with_header(file.read_text())  # nobody changed it by hand

    (terms,) = [row for row in card.text.splitlines() if row.startswith("| terms of the data |")]
    if any(name in terms for name in NON_COMMERCIAL):
        assert facts["license"] == "other"
        assert facts["license_name"] == "non-commercial-research"
        assert facts["license_link"].startswith("http")
    for name in (*NON_COMMERCIAL, "USPS"):
        assert (f"{name}: " in terms) == (name.lower() in facts.get("datasets", [])), name


@pytest.mark.parametrize(
    ("terms", "licence"),
    [
        ("drawn captioned images: drawn by prepare_data.py synthetic", {"license": "mit"}),
        ("drawn by prepare_data.py synthetic", {"license": "mit"}),
        ("lions: not known here", {"license": "unknown"}),
        ("CelebA: non-commercial research; lions: not known here", {"license": "unknown"}),
        ("", {"license": "unknown"}),
        (
            "USPS: public; SVHN: non-commercial research",
            {
                "license": "other",
                "license_name": "non-commercial-research",
                "license_link": hub.TERMS["SVHN"],
            },
        ),
        (
            "USPS: public; MNIST: CC BY-SA 3.0",
            {
                "license": "other",
                "license_name": "terms-of-the-data",
                "license_link": hub.TERMS["USPS"],
            },
        ),
    ],
)
def test_the_licence_follows_from_the_data(terms, licence):
    assert hub.licence_of(terms) == licence


@pytest.mark.parametrize(
    ("config", "tags", "task"),
    [
        ({"net": "generator", "method": "wgangp"}, ["gan", "wgangp"], True),
        ({"net": "ddim_unet", "arguments": {"n_classes": 0}}, ["diffusion"], True),
        (
            {"net": "ddim_unet", "arguments": {"n_classes": 20}},
            ["diffusion", "class-conditional"],
            False,
        ),
        (
            {"net": "latent_unet", "arguments": {"unet": {"n_attributes": 10}}},
            ["diffusion", "latent-diffusion", "attribute-conditional"],
            False,
        ),
    ],
)
def test_tags_and_task_follow_from_the_configuration(config, tags, task):
    card = f"# net\n\n| network | `{json.dumps(config)}`, 3 numbers |\n"
    facts = hub.facts_of(card)
    assert facts["tags"] == ["pytorch", *tags]
    expected = "unconditional-image-generation" if task else None
    assert facts.get("pipeline_tag") == expected


def test_a_header_is_replaced_and_a_rule_in_the_text_is_not():
    card = "# net\n\nSome words.\n\n---\n\nMore.\n"
    once = hub.with_header(card)
    assert once.endswith(card)
    assert yaml.safe_load(once.split("---\n")[1])["license"] == "unknown"
    assert hub.with_header(once) == once


@pytest.fixture
def releases(tmp_path: Path) -> Path:
    """A copy of one release, whose card has no header."""
    folder = tmp_path / "releases"
    folder.mkdir()
    for suffix in (".safetensors", ".md"):
        content = (ROOT / "checkpoints" / f"wgangp_faces{suffix}").read_bytes()
        (folder / f"wgangp_faces{suffix}").write_bytes(content)
    card = folder / "wgangp_faces.md"
    card.write_text(hub.HEADER.sub("", card.read_text(), count=1))
    return folder


def test_a_folder_has_what_upload_folder_takes(releases, tmp_path):
    figure = tmp_path / "figure.png"
    Image.fromarray(noise(1)[0]).save(figure)
    out = tmp_path / "out"
    args = Folder("wgangp_faces", output_dir=out, figure=figure, checkpoints=releases)
    before = (releases / "wgangp_faces.md").read_text()
    hub.main(args)
    names = {"README.md", "config.json", "example.png", "model.safetensors"}
    assert {path.name for path in out.iterdir()} == names
    card = ModelCard.load(out / "README.md")
    assert card.data.to_dict()["pipeline_tag"] == "unconditional-image-generation"
    assert card.text.strip().startswith("# wgangp_faces\n\n![Examples](example.png)\n")
    assert (out / "example.png").read_bytes() == figure.read_bytes()
    net, config = load_net(out / "model.safetensors", GENERATORS)
    assert json.loads((out / "config.json").read_text()) == config
    assert net.latent == 100
    assert (releases / "wgangp_faces.md").read_text() == before

    args.update_card = True
    hub.main(args)
    assert (releases / "wgangp_faces.md").read_text() == hub.with_header(before)


def test_learned_words_have_no_configuration(tmp_path):
    hub.main(Folder("text_to_image_words", output_dir=tmp_path / "out"))
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"README.md", "model.safetensors"}


def test_what_is_missing_or_broken_is_named(releases, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"nothing\.safetensors: no such file"):
        hub.main(Folder("nothing", output_dir=out, checkpoints=releases))
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"PNG")
    with pytest.raises(UserError, match=r"broken\.png: not a whole image"):
        hub.main(Folder("wgangp_faces", output_dir=out, figure=broken, checkpoints=releases))
    with pytest.raises(UserError, match=r"--figure x\.jpg: must end in \.png"):
        Folder("wgangp_faces", output_dir=out, figure=Path("x.jpg"))
    assert not out.exists()


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ('`{"net"', '`{net"', "is not json"),
        ('"arguments": {', '"arguments": 3, "others": {', "has arguments that are no object"),
        ('`{"net": "generator"', '`{"net": ["generator"]', "has a net that is no text"),
    ],
)
def test_a_card_edited_by_hand_is_one_line(before, after, message, releases, tmp_path):
    card = releases / "wgangp_faces.md"
    text = card.read_text(encoding="utf-8")
    assert before in text
    card.write_text(text.replace(before, after), encoding="utf-8")
    args = Folder("wgangp_faces", output_dir=tmp_path / "out", checkpoints=releases)
    with pytest.raises(UserError, match=rf"wgangp_faces\.md: the configuration .* {message}"):
        hub.main(args)
    card.write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"wgangp_faces\.md: is not in UTF-8"):
        hub.main(args)
    assert not args.output_dir.exists()
