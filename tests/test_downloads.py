"""Archives and files from the network: hostile, damaged and half ones are refused, in one line."""

import contextlib
import gzip
import hashlib
import http.server
import json
import os
import shutil
import stat
import struct
import threading
import zipfile
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import prepare_data
from common.cli import UserError
from preparation import archive, downloads, mnist, public, zip_files
from prepare_data import Check, Download, Import

GOOD = "digits/usps/readme.txt"
Change = Callable[[zipfile.ZipInfo], None]


def make_zip(path: Path, *names: str, change: Change | None = None, content: bytes = b"x") -> Path:
    """Write a zip file with GOOD and then `names` in it.

    `change` gets the last entry before the table of contents is written, which may thus say
    something else than the file.
    """
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name in (GOOD, *names):
            info = zipfile.ZipInfo(name)
            info.filename = name  # with what ZipInfo cuts off
            info.compress_type = zipfile.ZIP_DEFLATED
            file.writestr(info, b"" if name.endswith("/") else content)
        if change is not None:
            change(file.filelist[-1])
    return path


def refusal(file: Path, data_dir: Path) -> str:
    """The one line with which an archive is refused; nothing is left of it."""
    with pytest.raises(UserError) as error:
        prepare_data.main(Download(year=2022, data_dir=data_dir, archive=file))
    message = str(error.value)
    assert message.startswith(f"{file}: ")
    assert "\n" not in message
    assert not list(data_dir.iterdir())
    assert {path.name for path in data_dir.parent.iterdir()} <= {file.name, data_dir.name}
    return message


@pytest.fixture
def never_written(monkeypatch):
    """Fail if a test comes so far that an entry is extracted."""

    def fail(*_):
        raise AssertionError

    monkeypatch.setattr(zip_files, "extract_entry", fail)


@pytest.mark.usefixtures("never_written")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/etc/x", "points out of the folder"),
        ("//x", "points out of the folder"),
        ("C:/x", "points out of the folder"),
        ("C:x", "points out of the folder"),
        ("../x", "points out of the folder"),
        ("digits/../../x", "points out of the folder"),
        ("digits/..", "points out of the folder"),
        ("__MACOSX/../../x", "points out of the folder"),
        ("..\\x", "points out of the folder"),
        ("digits\\x", "points out of the folder"),
        ("digits/./x", "a name that no file should have"),
        ("digits//x", "a name that no file should have"),
        ("digits/a\nb", "a name that no file should have"),
        ("digits/a\0.png", "a name that no file should have"),
        ("digits/a\x1b[2J", "a name that no file should have"),
        ("digits/\u202egnp.exe", "a name that no file should have"),
        ("digits/" + "n" * 256, "a name that no file should have"),
        ("d/" * 501 + "n", "a name that no file should have"),
    ],
)
def test_names_that_are_no_plain_paths_are_refused(tmp_path, name, message):
    text = refusal(make_zip(tmp_path / "a.zip", name), tmp_path / "out")
    assert "refused, because its entry" in text
    assert message in text


@pytest.mark.usefixtures("never_written")
@pytest.mark.parametrize(
    "names",
    [
        ("digits/a", "digits/a"),
        ("digits/a", "Digits/A"),
        ("digits/caf\u00e9", "digits/cafe\u0301"),
        ("digits/stra\u00dfe", "digits/STRASSE"),
        ("digits/a/", "digits/a/"),
        ("digits/a/x", "digits/A/y"),
        ("digits/a", "digits/a/b"),
        ("digits/a/b", "digits/a"),
        ("digits/a/b", "digits/A"),
        ("digits/a/", "digits/a"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_one_name_for_two_entries_is_refused(tmp_path, names):
    text = refusal(make_zip(tmp_path / "a.zip", *names), tmp_path / "out")
    assert f"entry {names[-1]!r} is there twice" in text


def set_kind(kind: int) -> Change:
    """Say in the table of contents that an entry is of a kind (stat.S_IFLNK, ...)."""

    def change(info: zipfile.ZipInfo) -> None:
        info.external_attr = (kind | 0o644) << 16

    return change


def set_fields(**fields: int) -> Change:
    """Change fields of an entry in the table of contents."""

    def change(info: zipfile.ZipInfo) -> None:
        for name, value in fields.items():
            setattr(info, name, value)

    return change


@pytest.mark.usefixtures("never_written")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_kind(stat.S_IFLNK), "is neither a plain file nor a plain folder"),
        (set_kind(stat.S_IFIFO), "is neither a plain file nor a plain folder"),
        (set_kind(stat.S_IFCHR), "is neither a plain file nor a plain folder"),
        (set_kind(stat.S_IFBLK), "is neither a plain file nor a plain folder"),
        (set_kind(stat.S_IFSOCK), "is neither a plain file nor a plain folder"),
        (set_kind(stat.S_IFDIR), "is neither a plain file nor a plain folder"),
        (set_fields(flag_bits=0x1), "is encrypted"),
        (set_fields(compress_type=zipfile.ZIP_BZIP2), "is packed with a method other than deflate"),
        (set_fields(compress_type=99), "is packed with a method other than deflate"),
        (set_fields(compress_type=zipfile.ZIP_STORED), "is not packed and yet has two sizes"),
        (set_fields(file_size=2**30), "would grow from 3 to 1,073,741,824 bytes"),
        (set_fields(header_offset=0), "overlaps another part of the archive"),
        (set_fields(header_offset=2**62), "overlaps another part of the archive"),
        (set_fields(compress_size=2**40), "overlaps another part of the archive"),
    ],
)
def test_links_devices_and_impossible_entries_are_refused(tmp_path, change, message):
    text = refusal(make_zip(tmp_path / "a.zip", "digits/x", change=change), tmp_path / "out")
    assert f"its entry 'digits/x' {message}" in text or "overlaps" in message
    assert message in text


@pytest.mark.usefixtures("never_written")
def test_a_zip_bomb_is_refused(tmp_path):
    """A real one: 50 MB of zeros, which deflate packs a thousandfold."""
    file = make_zip(tmp_path / "a.zip", "digits/x", content=bytes(50 * 10**6))
    assert file.stat().st_size < 10**6 / 4
    assert "would grow from" in refusal(file, tmp_path / "out")


@pytest.mark.usefixtures("never_written")
def test_too_many_entries_and_too_many_bytes_are_refused(tmp_path, monkeypatch):
    file = make_zip(tmp_path / "a.zip", "digits/x", "digits/y")
    monkeypatch.setattr(zip_files, "MOST_ENTRIES", 2)
    assert "refused, because it has 3 entries; at most 2 are" in refusal(file, tmp_path / "out")
    monkeypatch.undo()
    monkeypatch.setattr(zip_files, "MOST_BYTES", 2)
    assert "refused, because it holds 0.0 GB unpacked" in refusal(file, tmp_path / "out")


@pytest.mark.usefixtures("never_written")
def test_a_disk_without_room_is_named_before_the_start(tmp_path, monkeypatch):
    """Each small file takes a block."""
    file = make_zip(tmp_path / "a.zip", "digits/x", "digits/y")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 3 * 4096 - 1))
    assert refusal(file, tmp_path / "out") == (
        f"{file}: needs 0.0 MB in {tmp_path / 'out'}, where 0.0 MB are free"
    )


@pytest.mark.parametrize("size", [0, 1, 99, 101, 150_000])
def test_a_size_that_is_not_the_contents_is_noticed_while_reading(tmp_path, size):
    """Also where the checksum fits the part that would be read."""
    content = np.random.default_rng(0).bytes(100) * 3_000

    def lie(info: zipfile.ZipInfo) -> None:
        info.file_size = size
        info.CRC = zipfile.crc32(content[:size])

    file = make_zip(tmp_path / "a.zip", "digits/x", change=lie, content=content)
    assert "its entry 'digits/x' is broken; fetch the archive again" in refusal(
        file, tmp_path / "out"
    )

    def lie_more(info: zipfile.ZipInfo) -> None:
        info.file_size = len(content) + 1

    file = make_zip(tmp_path / "a.zip", "digits/x", change=lie_more, content=content)
    assert "its entry 'digits/x' is broken" in refusal(file, tmp_path / "out")


def test_system_files_are_left_out(tmp_path):
    """Even those whose kind would be refused elsewhere."""
    names = ("__MACOSX/digits/._a", "digits/.DS_Store", "digits/._a", "digits/a", ".git/x")
    file = make_zip(
        tmp_path / "a.zip", *names, "__MACOSX/link", change=set_kind(stat.S_IFLNK), content=b"y"
    )
    out = tmp_path / "out"
    prepare_data.main(Download(year=2022, data_dir=out, archive=file))
    found = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert found == {GOOD, "digits/a", archive.RECORD}


def test_folders_may_be_listed_or_not(tmp_path):
    file = make_zip(tmp_path / "a.zip", "digits/", "digits/empty/", "digits/b/c/d.txt", "digits/b/")
    out = tmp_path / "out"
    prepare_data.main(Download(year=2022, data_dir=out, archive=file))
    assert (out / "digits" / "empty").is_dir()
    assert (out / "digits" / "b" / "c" / "d.txt").read_bytes() == b"x"


def test_damaged_bytes_give_one_line(tmp_path):
    """Whichever byte is changed, and wherever the file ends."""
    whole = make_zip(tmp_path / "whole.zip", "digits/x").read_bytes()
    damaged = [whole[:length] for length in range(0, len(whole), 3)]
    for position, byte in enumerate(whole):
        start, end = whole[:position], whole[position + 1 :]
        damaged += [start + bytes([value]) + end for value in (0xFF, byte ^ 1)]
    file = tmp_path / "a.zip"
    out = tmp_path / "out"
    refused = 0
    for content in damaged:
        file.write_bytes(content)
        out.mkdir()
        message = try_to_unpack(file, out)
        if message is not None:
            refused += 1
            assert message.startswith(f"{file}: ")
            assert not list(out.iterdir())
        shutil.rmtree(out)
    assert refused > len(damaged) / 2


def try_to_unpack(file: Path, out: Path) -> str | None:
    """What is wrong with an archive; None if it could be unpacked."""
    try:
        archive.unpack(file, out)
    except UserError as error:
        return str(error)
    return None


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
@pytest.mark.parametrize("place", ["write", "move"])
def test_an_interrupted_unpacking_leaves_nothing(tmp_path, monkeypatch, error, place):
    file = make_zip(tmp_path / "a.zip", "digits/x", "face/y", "notes.txt")
    out = tmp_path / "out"
    if place == "write":
        copy = shutil.copyfileobj

        def fail_at_second(source, target):
            copy(source, target)
            if "digits" in target.name and target.name.endswith("x"):
                raise error

        monkeypatch.setattr(shutil, "copyfileobj", fail_at_second)
    else:
        rename = Path.rename

        def fail_at_notes(self, target):
            if self.name == "notes.txt":
                raise error
            return rename(self, target)

        monkeypatch.setattr(Path, "rename", fail_at_notes)
    with pytest.raises((UserError, KeyboardInterrupt)) as caught:
        prepare_data.main(Download(year=2022, data_dir=out, archive=file))
    if isinstance(error, OSError):
        assert f"{file}: cannot be unpacked into {out} (No space left on device; " in str(
            caught.value
        )
    assert not list(out.iterdir())


def test_what_is_no_file_is_one_line(tmp_path):
    """A pipe would be read for ever."""
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("nowhere", "folder", "pipe"):
        file = tmp_path / name
        options = Download(year=2022, data_dir=tmp_path / "out", archive=file)
        with pytest.raises(UserError) as error:
            prepare_data.main(options)
        assert str(error.value) == f"{file}: no such file"


# What is recorded of an archive


def download(year: int, file: Path, out: Path) -> None:
    """Unpack into `out` once more, without the digits that are there."""
    shutil.rmtree(out / "digits", ignore_errors=True)
    prepare_data.main(Download(year=year, data_dir=out, archive=file))


def test_hash_and_size_are_printed_and_recorded(tmp_path, capsys):
    first = make_zip(tmp_path / "a.zip", "digits/x")
    second = make_zip(tmp_path / "b.zip", "digits/y")
    out = tmp_path / "out"
    hashes = [hashlib.sha256(file.read_bytes()).hexdigest() for file in (first, second)]
    sizes = [file.stat().st_size for file in (first, second)]

    for _ in range(2):  # the same archive again is fine
        download(2022, first, out)
        printed = capsys.readouterr()
        assert f"archive of 2022: sha256 {hashes[0]} and {sizes[0]:,} bytes\n" in printed.out
        assert printed.err == ""
    download(2023, second, out)  # another year's is no matter
    assert capsys.readouterr().err == ""
    assert json.loads((out / archive.RECORD).read_text()) == {
        "2022": {"sha256": hashes[0], "size": sizes[0]},
        "2023": {"sha256": hashes[1], "size": sizes[1]},
    }

    download(2022, second, out)
    printed = capsys.readouterr()
    assert printed.err == (
        f"warning: {second}: has sha256 {hashes[1]} and {sizes[1]:,} bytes, but the archive of "
        f"2022 that was unpacked here before had sha256 {hashes[0]} and {sizes[0]:,} bytes\n"
    )
    assert json.loads((out / archive.RECORD).read_text())["2022"]["sha256"] == hashes[1]


def test_a_refused_archive_is_not_recorded(tmp_path):
    out = tmp_path / "out"
    download(2022, make_zip(tmp_path / "a.zip", "digits/x"), out)
    before = (out / archive.RECORD).read_bytes()
    with pytest.raises(UserError, match="points out"):
        download(2022, make_zip(tmp_path / "b.zip", "../x"), out)
    assert (out / archive.RECORD).read_bytes() == before


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"2022": "abc"}',
        b'{"2022": {"sha256": "abc", "size": 1}}',
        b'{"2022": {"sha256": 5, "size": 1}}',
        b'{"2022": {"sha256": "' + b"a" * 64 + b'", "size": "1"}}',
        b'{"2022": {"sha256": "' + b"a" * 64 + b'"}}',
    ],
)
def test_a_damaged_record_is_one_line(tmp_path, monkeypatch, content):
    """And it is noticed before a long download."""
    import gdown

    monkeypatch.setattr(gdown, "download", lambda **_: pytest.fail("downloaded"))
    record = tmp_path / archive.RECORD
    record.write_bytes(content)
    file = make_zip(tmp_path / "a.zip", "digits/x")
    for given in (file, None):
        with pytest.raises(UserError) as error:
            prepare_data.main(Download(year=2022, data_dir=tmp_path, archive=given))
        assert str(error.value).startswith(f"{record}: ")
    assert not (tmp_path / "digits").exists()


# Downloads that end too early


class Server(http.server.ThreadingHTTPServer):
    """A server of one file, which may break off and may be unable to continue."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = np.random.default_rng(0).bytes(3_000_000)
        self.stop_after: int | None = None  # bytes, after which it closes the connection
        self.can_continue = True
        self.asked: list[tuple[str, str | None]] = []  # path and range of each request
        self.url = f"http://127.0.0.1:{self.server_port}/"


class Handler(http.server.BaseHTTPRequestHandler):
    """Sends the whole file, or the rest that a Range header asks for."""

    server: Server

    def do_GET(self) -> None:
        server = self.server
        wanted = self.headers["Range"]
        server.asked.append((self.path, wanted))
        start = 0
        if wanted is not None and server.can_continue:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
        rest = server.content[start:]
        self.send_response(206 if start else 200)
        if start:
            end = len(server.content)
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{end}")
        self.send_header("ETag", f'"{hashlib.sha256(server.content).hexdigest()}"')
        self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        with contextlib.suppress(OSError):  # the other side has seen enough of a first answer
            self.wfile.write(rest[: server.stop_after])

    def log_message(self, *_) -> None:
        """Say nothing."""


@pytest.fixture
def server(monkeypatch):
    """A running server, at which every file of torchvision's lies."""
    from torchvision import datasets

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Server() as running:
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        digest = hashlib.md5(running.content).hexdigest()
        for dataset in (datasets.USPS, datasets.SVHN):
            files = {
                split: [running.url + name, name, digest]
                for split, (_, name, _) in dataset.split_list.items()
            }
            monkeypatch.setattr(dataset, "split_list", files)
        monkeypatch.setattr(datasets.MNIST, "mirrors", [running.url])
        monkeypatch.setattr(
            datasets.MNIST, "resources", [(name, digest) for name, _ in datasets.MNIST.resources]
        )
        yield running
        running.shutdown()


def digest_of(server: Server) -> str:
    """The MD5 of the file that a server has."""
    return hashlib.md5(server.content).hexdigest()


def test_a_download_continues_inside_the_file(tmp_path, server):
    """Twice cut off; each time only the rest is asked for."""
    target = tmp_path / "raw" / "a.mat"
    url = server.url + "a.mat"
    server.stop_after = 1_200_000
    sizes = []
    for _ in range(2):
        with pytest.raises(downloads.DownloadError, match="Download is incomplete"):
            downloads.fetch(target, digest_of(server), url)
        assert not target.exists()
        sizes.append(downloads.arrived(target))
    assert 0 < sizes[0] < sizes[1] < len(server.content)
    server.stop_after = None
    downloads.fetch(target, digest_of(server), url)
    assert target.read_bytes() == server.content
    assert list(target.parent.iterdir()) == [target]
    ranges = [wanted for _, wanted in server.asked if wanted is not None]
    assert ranges == [f"bytes={size}-" for size in sizes]
    count = len(server.asked)
    downloads.fetch(target, digest_of(server), url)  # it is there
    assert len(server.asked) == count


def test_ctrl_c_keeps_what_has_arrived(tmp_path, server, monkeypatch):
    import tqdm  # gdown's bar

    def stop(self, count):
        raise KeyboardInterrupt

    target = tmp_path / "a.mat"
    monkeypatch.setattr(tqdm.tqdm, "update", stop)
    with pytest.raises(KeyboardInterrupt):
        downloads.fetch(target, digest_of(server), server.url)
    monkeypatch.undo()
    assert downloads.arrived(target) > 0
    downloads.fetch(target, digest_of(server), server.url)
    assert target.read_bytes() == server.content


def test_a_server_that_cannot_continue_sends_all_of_it(tmp_path, server):
    target = tmp_path / "a.mat"
    server.stop_after = 1_200_000
    with pytest.raises(downloads.DownloadError):
        downloads.fetch(target, digest_of(server), server.url)
    server.stop_after = None
    server.can_continue = False
    downloads.fetch(target, digest_of(server), server.url)
    assert target.read_bytes() == server.content
    assert list(tmp_path.iterdir()) == [target]


def test_a_temporary_failure_keeps_what_has_arrived(tmp_path, server, monkeypatch):
    """The server hangs up at once; and Google Drive says that too many have asked."""
    import gdown

    target = tmp_path / "a.mat"
    part = tmp_path / "a.matabcdefgh.part"
    part.write_bytes(server.content[:2_000])
    server.stop_after = 0
    with pytest.raises(downloads.DownloadError):
        downloads.fetch(target, digest_of(server), server.url)
    assert downloads.arrived(target) == 2_000

    def refuse(*_, **__):
        raise gdown.exceptions.FileURLRetrievalError("too many users")

    monkeypatch.setattr(gdown, "download", refuse)
    with pytest.raises(downloads.DownloadError, match="too many users"):
        downloads.fetch(target, digest_of(server), server.url)
    assert part.read_bytes() == server.content[:2_000]


def test_of_two_parts_the_longer_one_is_continued(tmp_path, server):
    """Two runs that were killed may leave two, which gdown refuses."""
    target = tmp_path / "a.mat"
    (tmp_path / "a.matabcdefgh.part").write_bytes(server.content[:1_000])
    (tmp_path / "a.mat12345678.part").write_bytes(server.content[:2_000])
    (tmp_path / "a.mat.part").write_bytes(b"another program's")
    downloads.fetch(target, digest_of(server), server.url)
    assert target.read_bytes() == server.content
    assert server.asked[-1][1] == "bytes=2000-"
    assert {path.name for path in tmp_path.iterdir()} == {"a.mat", "a.mat.part"}


def test_another_file_than_the_published_one_is_not_kept(tmp_path, server):
    """A page that asks to log in, for example, or a file that changed between two runs."""
    target = tmp_path / "a.mat"
    (tmp_path / "a.matabcdefgh.part").write_bytes(bytes(1_000))
    with pytest.raises(downloads.DownloadError, match="sent another file than the published one"):
        downloads.fetch(target, digest_of(server), server.url)
    assert not list(tmp_path.iterdir())
    target.write_bytes(b"<html>")
    with pytest.raises(UserError) as error:
        downloads.fetch(target, digest_of(server), server.url)
    assert (
        str(error.value) == f"{target}: not the file of {server.url}, or not all of it; remove it"
    )
    assert target.read_bytes() == b"<html>"


@pytest.mark.parametrize(
    ("domain", "folder", "failure"),
    [
        ("mnistm", "MNIST/raw", UserError),
        ("usps", "usps", UserError),
        ("svhn", "svhn", ValueError),  # of scipy; no file with the published MD5 gives it
    ],
)
def test_public_data_sets_are_continued(tmp_path, server, domain, folder, failure):
    """Their files are not images here, so reading them fails after the first or the last one."""
    (tmp_path / "photos").mkdir()
    public.save_image(np.zeros((40, 40, 3), np.uint8), tmp_path / "photos" / "0.png")
    out, raw = tmp_path / "out", tmp_path / "raw"
    options = Download(
        public=True,
        data_dir=out,
        raw_dir=raw,
        parts=(f"digits/{domain}",),
        textures=tmp_path / "photos",
    )
    server.stop_after = 2_000_000
    with pytest.raises(UserError) as error:
        prepare_data.main(options)
    assert f"{domain}: the download failed (Download is incomplete: received " in str(error.value)
    assert "the same command continues it, or put " in str(error.value)
    assert "\n" not in str(error.value)
    [part] = (raw / folder).iterdir()
    assert part.name.endswith(".part")
    size = part.stat().st_size
    assert 0 < size < len(server.content)
    assert not list(out.iterdir())

    server.stop_after = None
    server.asked.clear()
    with pytest.raises(failure):
        prepare_data.main(options)
    assert server.asked[1][1] == f"bytes={size}-"
    names = {path.name for path in (raw / folder).iterdir()}
    assert names == {path.strip("/") for path, _ in server.asked}
    assert not list(out.iterdir())


def test_another_mirror_is_asked(tmp_path, server, capsys):
    gone = "http://127.0.0.1:9/a.gz"  # where nothing listens
    target = tmp_path / "a.gz"
    public.fetch_from_any(target, digest_of(server), [gone, server.url + "a.gz"])
    assert target.read_bytes() == server.content
    printed = capsys.readouterr().err
    assert f"warning: {gone}: " in printed
    assert "; trying another server\n" in printed
    target.unlink()
    with pytest.raises(downloads.DownloadError, match="refused"):
        public.fetch_from_any(target, digest_of(server), [gone, gone])


def test_celebas_files_are_fetched_but_not_a_zip_that_is_unpacked(tmp_path, monkeypatch):
    """Google Drive cannot be asked here; what would be asked for is seen."""
    from torchvision import datasets

    asked = []

    def fetch(target, md5, url):
        asked.append((target.name, url))

    def stop(*_, **__):
        raise RuntimeError("stopped")

    monkeypatch.setattr(public, "fetch", fetch)
    monkeypatch.setattr(datasets.CelebA, "__init__", stop)
    for _ in range(2):
        with pytest.raises(UserError, match=r"face: the download failed \(stopped\)"):
            public.load_celeba(tmp_path, 0)
        (tmp_path / "celeba" / "img_align_celeba").mkdir(parents=True, exist_ok=True)
    all_of_it = [name for _, _, name in datasets.CelebA.file_list]
    assert [name for name, _ in asked] == [*all_of_it, *all_of_it[1:]]
    assert all_of_it[0] == "img_align_celeba.zip"
    first = datasets.CelebA.file_list[0][0]
    assert asked[0][1] == f"https://drive.google.com/uc?id={first}"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("File not found")])
def test_half_of_celebas_images_are_removed(tmp_path, monkeypatch, error):
    """Torchvision would take them for all of them. The archive stays."""
    from torchvision import datasets

    half = tmp_path / "raw" / "celeba" / "img_align_celeba" / "000001.jpg"
    whole = tmp_path / "raw" / "celeba" / "img_align_celeba.zip"

    def fail(*_, **__):
        half.parent.mkdir(parents=True, exist_ok=True)
        half.write_bytes(b"half")
        raise error

    whole.parent.mkdir(parents=True)
    whole.touch()
    monkeypatch.setattr(public, "fetch", lambda *_: None)
    monkeypatch.setattr(datasets.CelebA, "__init__", fail)
    with pytest.raises((UserError, KeyboardInterrupt)):
        prepare_data.main(
            Download(
                public=True, data_dir=tmp_path / "out", raw_dir=tmp_path / "raw", parts=("face",)
            )
        )
    assert not half.parent.exists()
    assert whole.exists()
    assert not list((tmp_path / "out").iterdir())


def test_an_archive_is_continued_unpacked_recorded_and_removed(
    tmp_path, server, monkeypatch, capsys
):
    """The course's archive, from a server of our own instead of Google Drive."""
    import gdown

    content = np.random.default_rng(0).bytes(2_000_000)
    whole = make_zip(tmp_path / "whole.zip", "digits/x", content=content)
    server.content = whole.read_bytes()
    server.stop_after = 1_200_000
    download = gdown.download

    def from_our_server(url, *arguments, **options):
        assert url == f"https://drive.google.com/uc?id={archive.DRIVE_IDS[2024]}"
        return download(server.url, *arguments, **options)

    monkeypatch.setattr(gdown, "download", from_our_server)
    out = tmp_path / "out"
    with pytest.raises(UserError) as error:
        prepare_data.main(Download(year=2024, data_dir=out))
    message = str(error.value)
    assert message.startswith("--year 2024: the download failed (Download is incomplete: received ")
    assert "the same command continues it, or fetch https://drive.google.com/" in message
    assert message.endswith("with a browser and give it as --archive FILE.zip")
    [part] = out.iterdir()
    size = part.stat().st_size
    assert 0 < size < len(server.content)

    server.stop_after = None
    prepare_data.main(Download(year=2024, data_dir=out))
    assert server.asked[-1][1] == f"bytes={size}-"
    assert hashlib.sha256(whole.read_bytes()).hexdigest() in capsys.readouterr().out
    assert (out / "digits" / "x").read_bytes() == content
    assert {path.name for path in out.iterdir()} == {"digits", archive.RECORD}


def test_an_archive_that_cannot_be_unpacked_is_kept_and_fetched_again(tmp_path, monkeypatch):
    import gdown

    sent = [b"<html>", make_zip(tmp_path / "whole.zip", "digits/x").read_bytes()]

    def arrive(url, output, **_):
        Path(output).write_bytes(sent.pop(0))
        return output

    monkeypatch.setattr(gdown, "download", arrive)
    out = tmp_path / "out"
    with pytest.raises(UserError) as error:
        prepare_data.main(Download(year=2024, data_dir=out))
    kept = out / ".partial-2024.zip"
    assert str(error.value).endswith(f"; the download is kept: --archive {kept}")
    assert kept.read_bytes() == b"<html>"
    prepare_data.main(Download(year=2024, data_dir=out))
    assert {path.name for path in out.iterdir()} == {"digits", archive.RECORD}


def test_a_file_of_usps_that_is_something_else_is_named(tmp_path):
    from torchvision import datasets

    file = tmp_path / "usps" / "usps.bz2"
    file.parent.mkdir()
    file.write_bytes(b"<html>")
    with pytest.raises(UserError) as error:
        public.load_digits("usps", tmp_path)
    url = datasets.USPS.split_list["train"][0]
    assert str(error.value) == f"{file}: not the file of {url}, or not all of it; remove it"


# MNIST's files

IMAGES = "train-images-idx3-ubyte"
LABELS = "train-labels-idx1-ubyte"


@pytest.fixture
def idx_files(tmp_path, monkeypatch) -> Path:
    """A small MNIST of 30 and 20 images, as packed files where torchvision has them."""
    monkeypatch.setattr(mnist, "COUNTS", {"train": 30, "t10k": 20})
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for split, count in mnist.COUNTS.items():
        images = struct.pack(">4I", 2051, count, 28, 28) + bytes([count]) * count * 784
        labels = struct.pack(">2I", 2049, count) + bytes(k % 10 for k in range(count))
        (folder / f"{split}-images-idx3-ubyte.gz").write_bytes(gzip.compress(images))
        (folder / f"{split}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels))
    return folder


def import_error(folder: Path) -> str:
    """The one line with which `import` refuses a folder."""
    out = folder.parent / "out"
    with pytest.raises(UserError) as error:
        prepare_data.main(Import("digits", folder, out))
    assert not out.exists()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_gzip_bombs_are_not_unpacked(idx_files, monkeypatch):
    """A header as it should be, and then 30 MB, of which no more than a byte too many is read."""
    read = []
    original = gzip.GzipFile.read

    def count(self, size=-1):
        content = original(self, size)
        read.append(len(content))
        return content

    monkeypatch.setattr(gzip.GzipFile, "read", count)
    packed = idx_files / f"{LABELS}.gz"
    packed.write_bytes(gzip.compress(struct.pack(">2I", 2049, 30) + bytes(30 * 10**6)))
    assert import_error(idx_files) == f"{packed}: holds more than 30 bytes after its header"
    assert sum(read) == (16 + 30 * 784) + (8 + 30 + 1)
    members = gzip.compress(bytes(10**6)) * 20
    packed.write_bytes(members)
    assert f"{packed}: starts with 0, 0 instead of 2049, 30" in import_error(idx_files)


def test_trailing_bytes_and_huge_counts_are_refused(idx_files):
    packed = idx_files / f"{IMAGES}.gz"
    plain = idx_files / IMAGES
    whole = gzip.decompress(packed.read_bytes())
    plain.write_bytes(whole + b"x")
    assert import_error(idx_files) == f"{plain}: holds more than 23,520 bytes after its header"
    plain.write_bytes(struct.pack(">4I", 2051, 2**32 - 1, 2**32 - 1, 2**32 - 1) + bytes(9))
    assert f"{plain}: starts with 2051, 4294967295, 4294967295" in import_error(idx_files)
    plain.unlink()
    content = packed.read_bytes()
    for damaged in (
        content[:-1],  # the checksum is cut
        content[:-20],
        content[:5],
        content + b"garbage",
        content[:-8] + b"\0\0\0\0" + content[-4:],
    ):
        packed.write_bytes(damaged)
        assert import_error(idx_files) == f"{packed}: not a whole gzip file"


def test_a_label_beyond_nine_is_named_with_its_file(idx_files):
    packed = idx_files / f"{LABELS}.gz"
    packed.write_bytes(gzip.compress(struct.pack(">2I", 2049, 30) + bytes([11] * 30)))
    assert import_error(idx_files) == f"{packed}: has the label 11"


def test_public_reads_mnists_files_packed_by_others(idx_files, tmp_path):
    """Without torchvision, whose checksums they do not have; and it refuses what `import` does."""
    images, labels = public.load_digits("mnistm", tmp_path)
    assert (images.shape, images.dtype, labels.dtype) == ((50, 28, 28), np.uint8, np.int64)
    assert images[:, 0, 0].tolist() == [30] * 30 + [20] * 20
    assert labels.tolist() == [k % 10 for k in range(30)] + [k % 10 for k in range(20)]
    packed = idx_files / f"{LABELS}.gz"
    packed.write_bytes(packed.read_bytes()[:-9])
    with pytest.raises(UserError) as error:
        public.load_digits("mnistm", tmp_path)
    assert str(error.value) == f"{packed}: not a whole gzip file"


def test_check_does_not_mind_the_record(idx_files, tmp_path, capsys):
    out = tmp_path / "out"
    prepare_data.main(Import("digits", idx_files, out))
    (out / archive.RECORD).write_text("{}")
    capsys.readouterr()
    prepare_data.main(Check(out))
    assert "all fine" in capsys.readouterr().out
