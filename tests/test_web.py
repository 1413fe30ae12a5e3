"""web/: the page's files fit each other, and in Chromium its pictures are those of Python.

The pictures need Chromium, and what `bash web/build.sh` makes.
"""

import functools
import html.parser
import http.server
import json
import os
import queue
import re
import shutil
import subprocess
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import p2_ddpm_infer
import p2_guided
from common.checkpoints import load_net
from common.data import normalise, to_uint8
from common.files import ROOT
from common.gan import Sample, sample
from common.rng import ImageNoise
from models.nets import NETS
from p2_ddim import slerp

WEB = ROOT / "web"
DIST = WEB / "dist"
CHECKPOINTS = ROOT / "checkpoints"
PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",  # nothing else can be reached
)
SECONDS = 240  # for all that the browser does
LEVELS = 2  # of 256, by which a pixel may differ from Python's


# Without a browser


class Elements(html.parser.HTMLParser):
    """All elements of a page: (tag, attributes, the tags around it)."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str], tuple[str, ...]]] = []
        self.around: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {name: value or "" for name, value in attrs}
        self.found.append((tag, attributes, tuple(self.around)))
        if tag not in ("meta", "link", "input", "br"):
            self.around.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.around.pop() == tag


PAGE = Elements((WEB / "index.html").read_text())
SCRIPTS = sorted((WEB / "js").glob("*.js"))
IDS = [attributes["id"] for _, attributes, _ in PAGE.found if "id" in attributes]


def test_every_control_has_a_label_and_every_picture_words():
    assert len(set(IDS)) == len(IDS)
    for tag, attributes, around in PAGE.found:
        if tag in ("input", "select"):
            assert "label" in around, attributes
        if tag == "canvas":
            assert attributes["aria-label"], attributes
        for reference in ("aria-labelledby", "aria-describedby"):
            if reference in attributes:
                assert attributes[reference] in IDS
    live = [
        attributes["id"] for _, attributes, _ in PAGE.found if attributes.get("role") == "status"
    ]
    assert len(live) == 5


def test_the_scripts_find_their_elements_and_each_other():
    for script in SCRIPTS:
        text = script.read_text()
        for name in re.findall(r'byId\("([\w-]+)"\)', text):
            assert name in IDS, f"{script.name}: {name}"
        for name in re.findall(r'from "\./([\w.]+)"', text):
            assert (script.parent / name).is_file(), f"{script.name}: {name}"
        assert len(text.splitlines()) <= 220, script.name


def test_nothing_is_read_from_elsewhere():
    """Only links, which a visitor follows, lead to other addresses."""
    for tag, attributes, _ in PAGE.found:
        if tag != "a":
            assert "://" not in " ".join(attributes.values()), attributes
    for file in (*SCRIPTS, WEB / "style.css"):
        assert "://" not in file.read_text(), file
    lock = (WEB / "package-lock.json").read_text()
    assert '"integrity"' in lock
    assert "://" not in re.sub(r'"(url|funding)": "[^"]*"', "", lock)


def test_the_page_is_published_if_its_networks_change_and_only_tested(tmp_path):
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "pages.yml").read_text())
    paths = workflow[True]["push"]["paths"]  # YAML 1.1 reads the key "on" as true
    script = (ROOT / "tools" / "export.py").read_text()
    for package in re.findall(r"^from (common|diffusion|models)\.", script, flags=re.MULTILINE):
        assert f"{package}/**" in paths
    assert "tools/export.py" in paths
    (test,) = [step for step in workflow["jobs"]["build"]["steps"] if "test_web" in str(step)]
    env = {**os.environ, "RUNNER_TEMP": str(tmp_path)}
    for line, status in (("12 passed in 3 s", 0), ("SKIPPED [1] tests/test_web.py", 1)):
        command = re.sub(r"^.*-m pytest.*?\|", f"echo '{line}' |", test["run"], flags=re.MULTILINE)
        assert "echo" in command
        assert (
            subprocess.run(["bash", "-c", command], capture_output=True, env=env).returncode
            == status
        )


def luminance(colour: str) -> float:
    """The relative luminance of #rrggbb (WCAG 2)."""
    linear = []
    for start in (1, 3, 5):
        share = int(colour[start : start + 2], 16) / 255
        linear.append(share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4)
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, two: str) -> float:
    high, low = sorted((luminance(one), luminance(two)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_text_has_contrast_in_both_palettes():
    palettes = re.findall(r":root \{(.*?)\}", (WEB / "style.css").read_text(), flags=re.DOTALL)
    assert len(palettes) == 2
    for palette in palettes:
        colours = dict(re.findall(r"--([\w-]+): (#\w{6})", palette))
        for text in ("ink", "soft", "accent"):
            for ground in ("paper", "panel"):
                assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
        assert contrast(colours["on-accent"], colours["accent"]) >= 4.5
        assert contrast(colours["line"], colours["paper"]) >= 3  # the borders of controls


# With a browser


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves the page of this folder, the built networks, and the script that drives the page."""

    reports: queue.Queue

    def translate_path(self, path: str) -> str:
        name = path.partition("?")[0].lstrip("/")
        if name == "selftest.html":
            return str(ROOT / "tests" / name)
        folder = DIST if name.startswith(("ort/", "nets/")) else WEB
        return str(folder / name)

    def do_POST(self) -> None:
        length = int(self.headers["Content-Length"])
        self.reports.put(json.loads(self.rfile.read(length)))
        self.send_response(204)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What tests/selftest.html saw in Chromium."""
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if program is None:
        pytest.skip("no Chromium")
    if not (DIST / "nets" / "guided_faces.json").is_file():
        pytest.skip("no web/dist: bash web/build.sh makes it")
    reports: queue.Queue = queue.Queue()
    handler = type("WithQueue", (Handler,), {"reports": reports})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    folder = tmp_path_factory.mktemp("browser")
    address = f"http://127.0.0.1:{server.server_port}/selftest.html"
    with (folder / "log").open("wb") as log:
        browser = subprocess.Popen(
            [program, *FLAGS, f"--user-data-dir={folder}", address], stdout=log, stderr=log
        )
        try:
            found = reports.get(timeout=SECONDS)
        except queue.Empty:
            pytest.fail(f"no answer from {program}: {(folder / 'log').read_text()[-2000:]}")
        finally:
            browser.terminate()
            browser.wait()
            server.shutdown()
            server.server_close()
    assert "error" not in found, found["error"]
    return found


def picture(values: list[int]) -> np.ndarray:
    """What a canvas holds: uint8 (size, size, 3)."""
    rgba = np.array(values, dtype=np.uint8).reshape(-1, 4)
    assert (rgba[:, 3] == 255).all()
    size = round(len(rgba) ** 0.5)
    return rgba[:, :3].reshape(size, size, 3)


def difference(values: list[int], expected: Path | torch.Tensor) -> int:
    """The largest difference of a canvas from a file, or from an image (3, size, size) of uint8."""
    if isinstance(expected, Path):
        pixels = np.asarray(Image.open(expected).convert("RGB"))
    else:
        pixels = expected.permute(1, 2, 0).numpy()
    assert pixels.std() > 10  # it shows something
    return int(np.abs(picture(values).astype(int) - pixels.astype(int)).max())


@functools.cache
def network(name: str) -> Any:
    return load_net(CHECKPOINTS / f"{name}.safetensors", NETS)[0]


@pytest.mark.timeout(SECONDS + 60)
def test_the_page_fits_a_phone(report):
    """A frame of 360 pixels, with all that the sections show in it."""
    assert report["width"] <= 360


@pytest.mark.parametrize("name", ["wgangp_faces", "dcgan_faces"])
def test_faces_are_the_files_that_sample_writes(name, report, tmp_path):
    checkpoint = CHECKPOINTS / f"{name}.safetensors"
    sample(Sample(checkpoint=checkpoint, output_dir=tmp_path / "faces", num_images=16))
    for number, values in enumerate(report["grids"][name]):
        assert difference(values, tmp_path / "faces" / f"{number:04d}.png") <= LEVELS


@torch.inference_mode()
def test_a_face_between_two_is_that_of_slerp(report):
    noises = ImageNoise(0, [3, 8], (100,))()
    latent = slerp(noises[0], noises[1], 0.5)
    expected = to_uint8(network("wgangp_faces")(latent[None]))[0]
    assert difference(report["way"], expected) <= LEVELS


def test_faces_beyond_those_of_python_are_others(report):
    face = picture(report["beyond"])
    others = [picture(values) for values in report["grids"]["dcgan_faces"]]
    assert face.std() > 10
    assert all(np.abs(face.astype(int) - other).mean() > 10 for other in others)


@pytest.mark.parametrize(
    ("domain", "guidance", "interval"), [("mnistm", 8.0, (0.0, 0.5)), ("svhn", 8.0, (0.0, 0.3))]
)
def test_digits_are_the_files_that_infer_writes(domain, guidance, interval, report, tmp_path):
    args = p2_ddpm_infer.Generate(
        checkpoint=CHECKPOINTS / "ddpm_digits.safetensors",
        output_dir=tmp_path / "digits",
        domains=(domain,),
        per_class=1,
        guidance=guidance,
        interval=interval,
        device="cpu",
        precision="fp32",
    )
    p2_ddpm_infer.main(args)
    assert difference(report["digits"][domain], tmp_path / "digits" / "4_001.png") <= LEVELS
    assert len(report["film"]) == 13
    assert (report["film"][0], report["film"][-1]) == ("t = 1000", "t = 0")


@torch.inference_mode()
def test_the_classifiers_say_what_python_says(report):
    drawing = torch.from_numpy(picture(report["drawing"])).permute(2, 0, 1)
    small = normalise(drawing).view(1, 3, 28, 10, 28, 10).mean((3, 5))  # means of 10x10 squares
    for name, found in report["drawn"].items():
        expected = network(name)(small).softmax(1)[0]
        assert (torch.tensor(found) - expected).abs().max() < 1e-3, name
        assert expected.argmax() == 4, name


def test_the_keyboard_draws_and_its_pen_is_not_read(report):
    drawn = picture(report["keyboard"])
    assert (drawn == 255).all(2).sum() > 22 * 14  # a stroke of one step, in white
    assert (drawn == (224, 33, 138)).all(2).sum() > 50  # the pen
    assert sum(report["stroke"]) == pytest.approx(1, abs=1e-3)
    assert report["again"] == report["stroke"]


def test_clear_empties_the_tables(report):
    assert report["cleared"] == [0] * 20


def test_a_face_by_attribute_is_the_file_that_sample_writes(report, tmp_path):
    args = p2_guided.Sample(
        checkpoint=CHECKPOINTS / "guided_faces.safetensors",
        output_dir=tmp_path / "faces",
        attributes=("Smiling=1", "Male=-1"),
        num_images=1,
        guidance="free",
        scale=(4.0,),
        sampler="ddim",
        steps=25,
        device="cpu",
        precision="fp32",
    )
    p2_guided.main(args)
    assert difference(report["attributes"], tmp_path / "faces" / "0000.png") <= LEVELS
