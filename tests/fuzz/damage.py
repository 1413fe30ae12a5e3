"""Ways to damage a file. Each takes the file's content or path and a random generator."""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import struct
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

# Values that no honest file has in the place of another one.
HOSTILE: list[Any] = [
    None,
    True,
    -1,
    0,
    10**7,
    10**30,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "../../outside",
    "/tmp/outside",
    "a\nb",
    "\x00",
    "\ud800",
    "<script>alert(1)</script>",
    "=1+1",
    "x" * 20_000,
    [],
    {},
    [[]],
    {"a": {}},
    [1, "2", None],
]


def damage(path: Path, rng: random.Random) -> str:
    """Damage a file in one way; returns the name of the way."""
    ways: list[Callable[[Path, random.Random], None]] = [*OF_BYTES, *OF_FILES]
    special = OF_SUFFIX.get(path.suffix, [])
    # Half of the damages know the format, so that they get past its first check.
    way = rng.choice(special if special and rng.random() < 0.6 else ways)
    way(path, rng)
    return way.__name__


# Bytes


def flip_bits(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 1, 3, 20))):
        if content:
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(bytes(content))


def cut(path: Path, rng: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: rng.randrange(len(content) + 1)])


def insert(path: Path, rng: random.Random) -> None:
    content = path.read_bytes()
    place = rng.randrange(len(content) + 1)
    new = rng.choice((rng.randbytes(rng.randrange(1, 200)), b"\0" * 50, b"\n\n", b"\r", b'"'))
    path.write_bytes(content[:place] + new + content[place:])


def remove_piece(path: Path, rng: random.Random) -> None:
    content = path.read_bytes()
    place = rng.randrange(len(content) + 1)
    path.write_bytes(content[:place] + content[place + rng.randrange(1, 100) :])


def double_piece(path: Path, rng: random.Random) -> None:
    content = path.read_bytes()
    place = rng.randrange(len(content) + 1)
    end = place + rng.randrange(1, 300)
    path.write_bytes(content[:end] + content[place:end] * rng.choice((1, 1, 5)) + content[end:])


def fill_piece(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    place = rng.randrange(len(content) + 1)
    end = min(len(content), place + rng.randrange(1, 64))
    content[place:end] = bytes([rng.choice((0, 255, 32))]) * (end - place)
    path.write_bytes(bytes(content))


def write_other_content(path: Path, rng: random.Random) -> None:
    others = (
        b"",
        b"\n",
        b"<html>404</html>",
        b"PK\x05\x06" + b"\0" * 18,
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n",
        b"\x89PNG\r\n\x1a\n",
        b"[" * 50_000,
        b'{"a":' * 50_000,
        b"\xff\xfe{\0}\0",
        b"\xef\xbb\xbf{}",
        struct.pack("<Q", 2**62) + b"{}",
        rng.randbytes(300),
    )
    path.write_bytes(rng.choice(others))


OF_BYTES = [
    *(flip_bits, cut, insert, remove_piece),
    *(double_piece, fill_piece, write_other_content),
]

# What is in the file's place


def remove_file(path: Path, rng: random.Random) -> None:
    path.unlink()


def make_a_folder(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.mkdir()


def make_a_pipe(path: Path, rng: random.Random) -> None:
    path.unlink()
    os.mkfifo(path)


def make_a_dangling_link(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def make_a_loop(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.symlink_to(path.name)


OF_FILES = [remove_file, make_a_folder, make_a_pipe, make_a_dangling_link, make_a_loop]

# Text


def change_json(path: Path, rng: random.Random) -> None:
    """Put a hostile value in a random place of a JSON file, or of one line of it."""
    text = path.read_text()
    if path.suffix == ".jsonl":
        lines = text.splitlines()
        row = rng.randrange(len(lines))
        lines[row] = as_text(changed(json.loads(lines[row]), rng), rng)
        write_text(path, "\n".join(lines) + "\n")
    else:
        write_text(path, as_text(changed(json.loads(text), rng), rng))


def as_text(content: Any, rng: random.Random) -> str:
    text = json.dumps(content, ensure_ascii=rng.random() < 0.5)
    if rng.random() < 0.1 and text.startswith("{") and len(text) > 2:
        name = json.dumps(next(iter(content)))
        text = f"{{{name}: 1, {text[1:]}"  # a key that is there twice
    return text


def write_text(path: Path, text: str) -> None:
    path.write_bytes(text.encode("utf-8", errors="surrogatepass"))


def changed(content: Any, rng: random.Random) -> Any:
    """The content with a hostile value in one place, or without that place."""
    if isinstance(content, dict) and content and rng.random() < 0.9:
        key = rng.choice(list(content))
        copy = dict(content)
        action = rng.random()
        if action < 0.1:
            del copy[key]
        elif action < 0.2:
            copy[rng.choice(("", "unknown", "../x", "\ud800", "0"))] = copy.pop(key)
        else:
            copy[key] = changed(content[key], rng)
        return copy
    if isinstance(content, list) and content and rng.random() < 0.8:
        copy = list(content)
        place = rng.randrange(len(copy))
        action = rng.random()
        if action < 0.1:
            del copy[place]
        elif action < 0.2:
            copy *= rng.choice((2, 50))
        else:
            copy[place] = changed(content[place], rng)
        return copy
    return rng.choice(HOSTILE)


def change_toml(path: Path, rng: random.Random) -> None:
    """Put a hostile value in a random place of a TOML file."""
    content = changed(tomllib.loads(path.read_text()), rng)
    if isinstance(content, dict):
        lines = [f"{json.dumps(key)} = {as_toml(value)}\n" for key, value in content.items()]
        write_text(path, "".join(lines))
    else:
        write_text(path, as_toml(content))


def as_toml(value: Any) -> str:
    """A value in TOML, which has no null."""
    if isinstance(value, dict):
        parts = [f"{json.dumps(key)} = {as_toml(item)}" for key, item in value.items()]
        return "{" + ", ".join(parts) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(as_toml(item) for item in value) + "]"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return json.dumps("" if value is None else value)


def change_cells(path: Path, rng: random.Random) -> None:
    """Change lines or cells of a table in text."""
    lines = path.read_text().split("\n")
    row = rng.randrange(len(lines))
    separator = "," if path.suffix == ".csv" else " "
    cells = lines[row].split(separator)
    value = rng.choice((*HOSTILE, "7.0", "-3", "99", '"', '"a,b"', "a;b", "é", "._0.png"))
    action = rng.randrange(8)
    if action == 0:
        lines.insert(row, lines[row])
    elif action == 1:
        del lines[row]
    elif action == 2:
        cells.append(str(value))
        lines[row] = separator.join(cells)
    elif action == 3:
        lines = [line.replace(",", ";") for line in lines]
    elif action == 4:
        lines = [line + "\r" for line in lines]
    else:
        cells[rng.randrange(len(cells))] = str(value)
        lines[row] = separator.join(cells)
    write_text(path, ("\ufeff" if action == 5 else "") + "\n".join(lines))


# Weights


def change_metadata(path: Path, rng: random.Random) -> None:
    """Put a hostile value in the configuration that a .safetensors file carries."""
    content = path.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    about = header.get("__metadata__", {})
    if "config" in about and rng.random() < 0.9:
        about["config"] = as_text(changed(json.loads(about["config"]), rng), rng)
    else:
        header = changed(header, rng)
    with contextlib.suppress(UnicodeEncodeError):
        new = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(new)) + new + content[8 + size :])


def change_tensors(path: Path, rng: random.Random) -> None:
    """Change one value of a pickled dictionary of tensors, at any depth."""
    write_pickle(path, changed_tensors(torch.load(path, weights_only=True), rng))


def change_member(path: Path, rng: random.Random) -> None:
    """Change bytes of one member of a zip file, so that its checksum is right."""
    with zipfile.ZipFile(path) as file:
        members = {info.filename: file.read(info) for info in file.infolist()}
    name = rng.choice([name for name in members if rng.random() < 0.3 or name.endswith(".pkl")])
    path.write_bytes(members[name])
    rng.choice(OF_BYTES)(path, rng)
    members[name] = path.read_bytes()
    with zipfile.ZipFile(path, "w") as file:
        for member, content in members.items():
            file.writestr(member, content)


def changed_tensors(content: Any, rng: random.Random) -> Any:
    if isinstance(content, dict) and content and rng.random() < 0.95:
        key = rng.choice(list(content))
        copy = dict(content)
        action = rng.random()
        if action < 0.1:
            del copy[key]
        elif action < 0.2:
            copy[rng.choice((7, "other", ("a", 1), "module.x"))] = copy.pop(key)
        else:
            copy[key] = changed_tensors(content[key], rng)
        return copy
    if isinstance(content, torch.Tensor):
        return rng.choice(odd_tensors(content, rng))
    return rng.choice(HOSTILE[:18])


def odd_tensors(value: torch.Tensor, rng: random.Random) -> list[Any]:
    """Tensors that cannot be meant in the place of this one."""
    return [
        torch.full_like(value, float("nan")) if value.is_floating_point() else value.float(),
        torch.full_like(value, float("inf")) if value.is_floating_point() else value.double(),
        value.to(torch.complex64),
        value.bool(),
        value.to(torch.float64),
        value.to(torch.float16),
        value.flatten(),
        value[None],
        torch.zeros(0),
        torch.zeros(3, 1).expand(3, 1_000_000),
        torch.zeros(5).to_sparse(),
        torch.empty(4, 4, device="meta"),
        torch.quantize_per_tensor(torch.zeros(4), 0.1, 0, torch.quint8),
        value.numel(),
        "a tensor",
    ]


def write_pickle(path: Path, content: Any) -> None:
    torch.save(content, path)


def change_arrays(path: Path, rng: random.Random) -> None:
    """Change one array of a .npz file."""
    with np.load(path) as file:
        arrays = {name: file[name] for name in file}
    name = rng.choice(list(arrays))
    value = arrays[name]
    arrays[name] = rng.choice(
        [
            np.array(None, dtype=object),
            np.zeros(0),
            value.astype(object),
            value[..., None],
            np.array("text"),
            np.full(value.shape, -1.0) if value.dtype.kind == "f" else np.array(-5),
            np.full(value.shape, np.nan),
            np.array(1j),
        ]
    )
    np.savez(path, **arrays)


OF_SUFFIX: dict[str, list[Callable[[Path, random.Random], None]]] = {
    ".json": [change_json],
    ".jsonl": [change_json],
    ".toml": [change_toml],
    ".csv": [change_cells],
    ".txt": [change_cells],
    ".safetensors": [change_metadata],
    ".pt": [change_tensors, change_tensors, change_member],
    ".pth": [change_tensors, change_member],
    ".ckpt": [change_tensors, change_member],
    ".jit": [change_member],
    ".npz": [change_arrays],
}
