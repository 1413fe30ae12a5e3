"""tools/release.py: what it stores, what its card says, and the weights that are released here."""

import hashlib
import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from common.checkpoints import load_net
from common.cli import UserError
from common.files import ROOT
from inversion.concepts import read_words
from models.attribute_classifier import AttributeClassifier
from models.autoencoder import Autoencoder
from models.dann import DannDeep
from models.gan import GENERATORS, Generator
from models.latent_unet import LatentUnet
from models.noisy_classifier import NoisyClassifier
from tests.conftest import save_net
from tools import release
from tools.release import Release

CLASSIFIERS = ("noisy_classifier", "attribute_classifier")


def make_run(folder: Path, net: torch.nn.Module, **config: object) -> Path:
    """A finished run of p1_dcgan.py, as it lies on another machine, and the data that it names."""
    data_dir = folder.parent / "secret place" / "data"
    (data_dir / "face").mkdir(parents=True)
    save_net(net, folder / "model.safetensors", **config)
    arguments = {
        "data_dir": str(data_dir),
        "batch_size": 64,
        "seed": 7,
        "output_dir": "/secret/runs/dcgan",
    }
    hardware = {
        "device": "cuda",
        "name": "Some GPU",
        "precision": "bf16",
        "processes": 2,
        "threads": 4,
    }
    flags = "--data-dir /secret/data --output-dir=/secret/runs/dcgan --seed 7"
    about = {
        "arguments": arguments,
        "command": f"/secret/p1_dcgan.py train {flags}",
        "versions": {"torch": "2.0"},
        "git_commit": "abc",
        "hardware": hardware,
    }
    (folder / "config.json").write_text(json.dumps(about))
    rows = [{"step": 10, "epoch": 1}, {"step": 2000, "epoch": 20}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = {"epoch": 20, "d_loss": 1.5, "seconds": 5400.0}
    (folder / "result.json").write_text(json.dumps(result))
    return folder


@pytest.fixture
def net() -> Generator:
    """A generator with weights that float16 cannot hold."""
    torch.manual_seed(0)
    net = Generator(4, 4)
    with torch.no_grad():
        net.main[0].weight *= 1e-7 / 0.02  # all of it is near or below float16's smallest number
        net.main[3].weight.view(-1)[0] = 1e5  # is above its largest number
        net.main[6].weight.view(-1)[0] = 1e-9  # one small number does not matter
        net.main[1].running_var.fill_(1 / 3)
    return net


@pytest.fixture
def released(net, tmp_path) -> Path:
    """faces.safetensors beside its card, with the results of full and of half precision.

    The same run is also released to the folder `again`.
    """
    run = make_run(tmp_path / "run", net, method="dcgan", seed=7)
    results = []
    for label, distance in (("full", 16.884), ("half", 16.889)):
        score = {
            "score": "fid",
            "metric": "FID",
            "distance": distance,
            "floor": None,
            "images": {"generated": 9},
            "command": "/secret/evaluate.py fid /secret/faces --features inception",
        }
        file = tmp_path / f"{label}.json"
        file.write_text(json.dumps(score))
        results.append(f"{label}={file}")
    options = {"results": tuple(results), "note": ("A run with the seed 7.",)}
    for folder in ("released", "again"):
        release.main(Release(run, "faces", output_dir=tmp_path / folder, **options))
    return tmp_path / "released" / "faces.safetensors"


def test_the_same_run_gives_the_same_bytes_again(released, tmp_path):
    for file in (released, released.with_suffix(".md")):
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


def test_parameters_are_halved_where_float16_can_hold_them(net, released):
    stored = safetensors.torch.load_file(released)
    parameters = dict(net.named_parameters())
    too_wide = {"main.0.weight", "main.3.weight"}
    for key, value in net.state_dict().items():
        if key in parameters and key not in too_wide:
            assert stored[key].dtype == torch.float16
            assert torch.equal(stored[key], value.half())
        else:
            assert stored[key].dtype == value.dtype
            assert torch.equal(stored[key], value)


def test_what_is_released_loads_in_float32(net, released):
    stored = safetensors.torch.load_file(released)
    loaded, config = load_net(released, GENERATORS)
    assert config == net.config | {"method": "dcgan", "seed": 7}
    for key, parameter in loaded.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, stored[key].float())


def test_the_card_says_what_was_done_and_no_folder_of_that_machine(released):
    card = released.with_suffix(".md").read_text()
    for text in (
        hashlib.sha256(released.read_bytes()).hexdigest(),
        f"{released.stat().st_size:,} bytes",
        "11 tensors in float16 (1 of their numbers, below 3e-8, became 0); unchanged: 12 buffers",
        "2 too wide for float16",
        "CelebA: non-commercial research",
        "`python p1_dcgan.py train --data-dir data --output-dir=dcgan --seed 7`, commit abc",
        "seed 7, epochs 20, steps 2,000 of 64 images",
        "1.50 hours on device: cuda, name: Some GPU",
        "| full | FID | distance 16.88 | 9 | `python evaluate.py fid faces --features inception` |",
        "| half | FID | distance 16.89 | 9 | `python evaluate.py fid faces --features inception` |",
        "A run with the seed 7.",
    ):
        assert text in card
    assert card.startswith("---\ndatasets:\n- celeba\n")  # the header for the Hub
    assert "secret" not in card


def test_a_network_for_adaptation_is_released_without_its_domain_classifier(tmp_path):
    torch.manual_seed(0)
    net = DannDeep(width=8).eval()
    run = make_run(tmp_path / "run", net, source="mnistm", target="usps", method="dann")
    for part in ("digits/mnistm", "digits/usps"):
        (tmp_path / "secret place" / "data" / part).mkdir(parents=True)
    release.main(Release(run, "dann", output_dir=tmp_path / "out"))
    loaded, config = release.load(tmp_path / "out" / "dann.safetensors")
    assert config["arguments"] == {"classes": 10, "width": 8, "hidden": 0}
    assert loaded.domain_classifier is None
    assert not any("domain" in key for key in loaded.state_dict())
    images = torch.randn(4, 3, 28, 28)
    torch.testing.assert_close(loaded(images), net(images), rtol=0.02, atol=0.02)
    assert "without the domain classifier" in (tmp_path / "out" / "dann.md").read_text()


# Networks for latents

SMALL = {"size": 16, "latent_channels": 2, "encoder_width": 16, "decoder_width": 16}
UNET = {"in_channels": 2, "size": 4, "width": 32, "multipliers": (1,), "attention": (), "blocks": 1}


@pytest.fixture
def latent_net() -> LatentUnet:
    torch.manual_seed(0)
    return LatentUnet(UNET, Autoencoder(**SMALL).config["arguments"])


def with_another_decoder(net: LatentUnet) -> Autoencoder:
    """The autoencoder of the network after `p2_autoencoder.py train --decoder-only`."""
    other = Autoencoder(**net.autoencoder.config["arguments"])
    other.load_state_dict(net.autoencoder.state_dict())
    with torch.no_grad():
        for parameter in other.decoder.parameters():
            parameter += 0.25
    return other


def test_a_network_for_latents_is_released_with_a_better_decoder(latent_net, tmp_path):
    levels = {"sigma_min": 0.02, "sigma_max": 53.07, "sigma_data": 1.0, "parametrization": "edm"}
    run = make_run(tmp_path / "run", latent_net, noise_levels=levels, seed=7)
    other = with_another_decoder(latent_net)
    decoder = save_net(other, tmp_path / "autoencoder.safetensors")
    out = tmp_path / "out"
    release.main(Release(run, "plain", output_dir=out))
    release.main(Release(run, "better", decoder=decoder, output_dir=out))
    release.main(Release(run, "again", decoder=decoder, output_dir=out))
    assert (out / "better.safetensors").read_bytes() == (out / "again.safetensors").read_bytes()

    digest = hashlib.sha256(decoder.read_bytes()).hexdigest()
    net, config = load_net(out / "better.safetensors", release.NETS)
    plain, plain_config = load_net(out / "plain.safetensors", release.NETS)
    assert config == plain_config | {"decoder": digest}
    for name, value in net.state_dict().items():
        expected = plain.state_dict()[name]
        if name.startswith("autoencoder.decoder."):
            expected = other.state_dict()[name.removeprefix("autoencoder.")].half().float()
        assert torch.equal(value, expected), name
    card = (out / "better.md").read_text()
    assert f"| decoder | that of an autoencoder's file of sha256 `{digest}`" in card
    assert "| noise levels | σ from 53.07 to 0.02, data's deviation 1; edm |" in card
    assert "| decoder |" not in (out / "plain.md").read_text()


def test_a_decoder_for_other_latents_is_refused(latent_net, tmp_path):
    run = make_run(tmp_path / "run", latent_net)
    out = tmp_path / "out"
    other = with_another_decoder(latent_net)
    with torch.no_grad():
        other.encoder[1].bias += 1
    file = save_net(other, tmp_path / "other.safetensors")
    message = r"--decoder \S+: has another encoder than RUN_DIR's \(encoder\.1\.bias\)"
    with pytest.raises(UserError, match=message):
        release.main(Release(run, "faces", decoder=file, output_dir=out))
    other = with_another_decoder(latent_net)
    other.standard.running_mean += 1
    file = save_net(other, tmp_path / "mean.safetensors")
    with pytest.raises(UserError, match="has another encoder"):
        release.main(Release(run, "faces", decoder=file, output_dir=out))
    wide = save_net(Autoencoder(**SMALL | {"decoder_width": 32}), tmp_path / "wide.safetensors")
    with pytest.raises(UserError, match="is an autoencoder of other sizes than RUN_DIR's"):
        release.main(Release(run, "faces", decoder=wide, output_dir=out))
    gan = make_run(tmp_path / "of a gan" / "run", Generator(4, 2))
    with pytest.raises(UserError, match="is for a network in latents"):
        release.main(Release(gan, "faces", decoder=file, output_dir=out))
    assert not out.exists()


def test_an_autoencoder_and_a_ddpm_in_latents_have_a_card(latent_net, tmp_path):
    out = tmp_path / "out"
    run = make_run(tmp_path / "autoencoder" / "run", latent_net.autoencoder, seed=7)
    release.main(Release(run, "autoencoder", output_dir=out))
    assert "| noise levels |" not in (out / "autoencoder.md").read_text()
    schedule = {"steps": 1000, "kind": "linear", "rule": "respaced", "prediction": "v"}
    sampling = {"spacing": "trailing", "clamp": "none"}
    config = {"domains": ["faces"], "schedule": schedule, "sampling": sampling}
    run = make_run(tmp_path / "ddpm" / "run", latent_net, **config)
    release.main(Release(run, "ddpm", output_dir=out))
    card = (out / "ddpm.md").read_text()
    assert "| noise levels | 1,000 steps, linear (respaced); predicts v |" in card
    assert "| sampling | spacing trailing, clamp none |" in card
    assert "| data | CelebA: train split |" in card


# Networks that know attributes


def test_the_cards_of_classifiers_say_how_rare_and_how_well_seen_attributes_are(tmp_path):
    out = tmp_path / "out"
    guide = NoisyClassifier(UNET, n_attributes=2)
    config = {
        "attributes": ["Bald", "Smiling"],
        "shares": {"Bald": 2.45, "Smiling": 48.0},
        "weights": {"Bald": 10.0, "Smiling": 1.08},
        "trained_on": ["000002", "000001", "000003"],
    }
    run = make_run(tmp_path / "guide" / "run", guide, **config)
    result = {"loss": 0.5, "accuracy_t0": 81.25, "seconds": 60.0}
    (run / "result.json").write_text(json.dumps(result))
    release.main(Release(run, "guide", output_dir=out))
    card = (out / "guide.md").read_text()
    for line in (
        "| data | CelebA: train split |",
        "| learned from | 3 faces, listed in the file: 000001 … 000003 |",
        "| attributes | Bald 2.5 % of the faces (weight 10.00), Smiling 48.0 % of the faces (",
        "| full, by the run itself |  | accuracy t0 81.25 |",
    ):
        assert line in card
    assert "000002" not in card
    assert load_net(out / "guide.safetensors", release.NETS)[1]["trained_on"] == [
        "000002",
        "000001",
        "000003",
    ]

    evaluator = AttributeClassifier(["Bald", "Smiling"], 32)
    counts = {"positives": 10, "negatives": 90, "positive_rate": 90.0, "negative_rate": 90.0}
    bald = {"balanced": 90.0, "interval": [86.0, 94.0], "measurable": True}
    smiling = {"balanced": None, "interval": None, "measurable": False}
    measured = {
        "balanced_accuracy": 90.0,
        "interval": [86.0, 94.0],
        "images": 100,
        "not_measurable": ["Smiling"],
        "attributes": {"Bald": counts | bald, "Smiling": counts | smiling},
    }
    config = {"measured": measured, "trained_on": ["000004"], "face_size": 64}
    run = make_run(tmp_path / "evaluator" / "run", evaluator, **config)
    result = {"balanced_accuracy": 90.0, "images": 1025, "seconds": 60.0}
    (run / "result.json").write_text(json.dumps(result))
    release.main(Release(run, "evaluator", output_dir=out))
    card = (out / "evaluator.md").read_text()
    for line in (
        "| data | CelebA: train and val split |",
        "| balanced accuracy of each | Bald 90.0 % (86.0 to 94.0) |",
        "| full, by the run itself |  | balanced accuracy 90.00 | 1025 | its own |",
    ):
        assert line in card


def test_the_released_classifiers_share_no_face_and_no_weight():
    """The one that guides and the one that measures."""
    files = [ROOT / "checkpoints" / f"{name}.safetensors" for name in CLASSIFIERS]
    (guide, guide_config), (evaluator, config) = (load_net(file, release.NETS) for file in files)
    assert guide_config["attributes"] == evaluator.attributes
    assert len(guide_config["trained_on"]) == 5_000
    assert len(config["trained_on"]) == 3_000
    assert not set(guide_config["trained_on"]) & set(config["trained_on"])
    of_evaluator = [value for value in evaluator.parameters() if value.std() > 0]
    for value in guide.parameters():
        same = [other for other in of_evaluator if other.shape == value.shape]
        assert not any(torch.equal(value, other) for other in same)


# The data


def test_the_card_names_the_data_and_its_terms(tmp_path):
    """Drawn data is not under the terms of what it imitates; DANN has seen two domains."""
    for domain in ("mnistm", "usps"):
        (tmp_path / "digits" / domain).mkdir(parents=True)
    (tmp_path / "digits" / "usps" / "made.json").write_text('{"made_by": "synthetic"}')
    about = {"source": "mnistm", "target": "usps", "method": "dann"}
    assert release.describe_data(about, tmp_path) == {
        "data": "MNIST-M, USPS-like images: train split",
        "terms of the data": (
            "MNIST-M: digits of MNIST on photographs of BSDS500 (non-commercial research); "
            "USPS-like images: drawn by prepare_data.py synthetic"
        ),
    }
    resnet = {"source": "mnistm", "target": "usps", "net": "adaptation"}
    assert release.describe_data(resnet, tmp_path) == release.describe_data(about, tmp_path)
    with pytest.raises(UserError, match="RUN_DIR: was trained on photographs"):
        release.describe_data(resnet | {"photographs": True}, tmp_path)
    source_only = release.describe_data(about | {"method": "source"}, tmp_path)
    assert "USPS" not in str(source_only)
    with pytest.raises(UserError, match="digits/svhn: no such folder; --data-dir"):
        release.describe_data({"domains": ["mnistm", "svhn"]}, tmp_path)


# Mistakes


def test_mistakes_are_named_and_nothing_is_written(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run", Generator(4, 2))
    out = tmp_path / "out"
    with pytest.raises(UserError, match="--results half: must be LABEL=FILE"):
        release.main(Release(run, "faces", results=("half",), output_dir=out))
    monkeypatch.setattr(release, "MOST_BYTES", 1_000)
    with pytest.raises(UserError, match="bytes in half precision, over 1,000"):
        release.main(Release(run, "faces", output_dir=out))
    (run / "result.json").unlink()
    with pytest.raises(OSError, match=r"result\.json"):
        release.main(Release(run, "faces", output_dir=out))
    assert not out.exists()


# Rows of results


def test_a_row_for_a_run_of_dann():
    result = {
        "accuracy": {"svhn": 82.871, "mnistm": 99.0},
        "oracle_best_accuracy": {"svhn": 90.0},
        "seconds": 3.0,
    }
    numbers = "accuracy svhn 82.87, accuracy mnistm 99.00"
    assert release.result_row("full", result) == f"| full |  | {numbers} |  | its own |"


def test_a_row_for_a_rate_of_faces():
    result = {
        "metric": "exactly one face",
        "one_face_percent": 96.2,
        "real": {"one_face_percent": 95.31},
    }
    numbers = "one face percent 96.20, real one face percent 95.31"
    expected = f"| x | exactly one face | {numbers} |  | its own |"
    assert release.result_row("x", result) == expected


def test_a_row_for_a_kernel_distance():
    result = {
        "metric": "EfficientNet KID × 1,000",
        "features": "efficientnet-lite0-57934424",
        "distance": 24.601,
        "subset_mean": 24.7,
        "subset_sd": 0.9,
        "floor": None,
        "subsets": 100,
        "subset_size": 1000,
        "images": {"generated": 2000, "real": 2025},
    }
    numbers = "distance 24.60, subset mean 24.70, subset sd 0.90"
    measured = "EfficientNet KID × 1,000, efficientnet-lite0-57934424"
    assert release.result_row("x", result) == f"| x | {measured} | {numbers} | 2000 | its own |"


def test_a_row_for_digits():
    result = {
        "metric": "accuracy",
        "net": "DigitResNet",
        "accuracy": 99.5,
        "digits": [{"accuracy": 1.0}],
        "real_accuracy": None,
        "diversity_percent_of_real": 81.04,
        "images": 1000,
    }
    numbers = "accuracy 99.50, diversity percent of real 81.04"
    expected = f"| half | accuracy, DigitResNet | {numbers} | 1000 | its own |"
    assert release.result_row("half", result) == expected


def test_no_row_without_a_result():
    assert release.result_row("x", {"epoch": 3, "d_loss": 1.0}) == ""


def test_commands_lose_the_folders_of_another_machine():
    command = (
        "evaluate.py fid /a/b/faces /d/data/face/val --weights /w/classifier/net.pt "
        "--data-dir=/d/data x/y"
    )
    short = "evaluate.py fid faces data/face/val --weights classifier/net.pt --data-dir=data x/y"
    assert release.strip_folders(command) == short


# What is released here


def test_the_released_weights_load_and_are_those_of_their_cards():
    files = sorted((ROOT / "checkpoints").glob("*.safetensors"))
    expected = {
        *CLASSIFIERS,
        "clip_scenes",
        "scene_classifier",
        "text_to_image",
        "text_to_image_words",
        "dann_resnet_mnist",
        "dann_svhn",
        "dann_usps",
        "dcgan_faces",
        "ddim_faces",
        "ddpm_digits",
        "ddpm_faces",
        "guided_faces",
        "score_faces",
        "wgangp_faces",
    }
    assert {file.stem for file in files} >= expected
    for file in files:
        if file.stem.endswith("_words"):
            weights = read_words(file).values()
        else:
            weights = release.load(file)[0].parameters()
        assert all(weight.isfinite().all() for weight in weights)
        content = file.read_bytes()
        assert len(content) <= release.MOST_BYTES
        card = file.with_suffix(".md").read_text()
        digest = hashlib.sha256(content).hexdigest()
        assert f"{len(content):,} bytes, sha256 `{digest}`" in card
    assert sum(file.stat().st_size for file in files) <= 100e6
