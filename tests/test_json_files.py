"""common/json_files.py, and those who read with it: one line for what is no text or no json."""

import json
import os
import socket
from pathlib import Path

import pytest

import evaluate
import run_all
from common.attributes import read_attributes
from common.cache import read_cached
from common.captions import read_metadata
from common.cli import UserError
from common.figures import read_grids
from common.json_files import FileError, depth_of, object_of, parse_json, read_json, read_object
from common.metadata import MetadataError, read_config
from common.profiles import read_profiles
from experiments.digit_samplers import read_rows
from experiments.face_rows import read_seconds
from inversion.concepts import read_concepts
from metrics.attributes import read_asked
from preparation.layout import is_finished
from tests.conftest import noise, save_images

NOT_JSON = {
    "[" * 100_000: "is not json (nested too deeply)",
    '{"a":' * 100_000: "is not json (nested too deeply)",
    "[" * 21 + "]" * 21: "is not json (nested too deeply)",
    '{"a": 1, "a": 1}': "has a key twice",
    '{"a": NaN}': "has the number NaN",
    '{"a": -1e999}': "has the number -1e999",
    '{"a": ' + "9" * 5_000 + "}": "is not json (Exceeds the limit",
    r'{"a": "\ud800"}': "is not json (half of a character)",
    r'{"\udfff": 1}': "is not json (half of a character)",
    "": "is not json (Expecting value",
    '{"a": ': "is not json (Expecting value",
}


@pytest.mark.parametrize("text", NOT_JSON, ids=lambda text: text[:12])
def test_what_is_no_json_is_said_in_one_phrase(tmp_path, text):
    file = tmp_path / "a.json"
    file.write_text(text)
    with pytest.raises(UserError) as found:
        read_json(file)
    assert str(found.value).startswith(f"{file}: {NOT_JSON[text]}")
    assert len(str(found.value)) < 300


def test_json_is_read_as_it_is(tmp_path):
    content = {"é": ["😀", 1, -2.5, True, None, {}], "": {"a": [[]]}}
    file = tmp_path / "a.json"
    for text in (json.dumps(content), json.dumps(content, ensure_ascii=False)):
        file.write_text(text, encoding="utf-8-sig")
        assert read_object(file) == content
    assert depth_of(content) == 4
    assert depth_of(3) == 1
    assert parse_json(r'"\ud800"', half_characters=True) == "\ud800"
    file.write_text("[1]")
    assert read_json(file) == [1]
    with pytest.raises(UserError, match="is not a json object"):
        read_object(file)


def put(path: Path, kind: str) -> None:
    """Something that is no text in a file's place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "socket":
            folder = Path.cwd()
            os.chdir(path.parent)  # a socket's path must be short
            socket.socket(socket.AF_UNIX).bind(path.name)
            os.chdir(folder)
        case "folder":
            path.mkdir()
        case "device":
            path.symlink_to("/dev/zero")
        case "bytes":
            path.write_bytes(b"\xff\xfe{\0}\0")


KINDS = ("pipe", "socket", "folder", "device", "bytes")
READERS = {
    "object": object_of,
    "config": read_config,
    "concepts": read_concepts,
    "asked": lambda file: read_asked(file, file.parent, [], ["Bald"], str(file)),
    "captions": lambda file: read_metadata(file.parent),
    "attributes": read_attributes,
    "rows": lambda file: read_rows(file, {}),
    "seconds": read_seconds,
    "score": lambda file: evaluate.claim_result(file.parent, "mse"),
    "part": lambda file: is_finished(file.parent.parent, file.parent.name, {}),
    "data": lambda file: run_all.data_is_missing(file.parent.parent.parent),
    "profiles": read_profiles,
    "grids": lambda file: read_grids(file.parent),
}
NAMES = {
    "score": "result.json",
    "captions": "metadata.jsonl",
    "part": "made.json",
    "data": "made.json",
    "grids": "epoch_0001.png",
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reader", READERS)
def test_no_reader_waits_for_what_is_no_file(tmp_path, monkeypatch, reader, kind):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "digits" / "mnistm" / NAMES.get(reader, "a.json")
    put(file, kind)
    with pytest.raises((UserError, FileError, MetadataError)) as found:
        READERS[reader](file)
    assert "\n" not in str(found.value)


def test_a_cache_that_is_a_pipe_is_not_used(tmp_path):
    os.mkfifo(tmp_path / "cache")
    assert read_cached(tmp_path / "cache", "key", (1,), "uint8") is None


def test_an_image_name_that_is_too_long_is_one_line(tmp_path):
    save_images(tmp_path, noise(1, 8))
    file = tmp_path / "asked.json"
    for name in ("x" * 100_000, "../000.png", "asked.json", "\0"):
        file.write_text(json.dumps({name: {"Bald": 1}}))
        with pytest.raises(UserError, match="asks something of") as found:
            read_asked(file, tmp_path, [tmp_path / "000.png"], ["Bald"], str(file))
        assert len(str(found.value)) < 500
