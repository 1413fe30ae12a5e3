"""Zip files that others have made: all of their table of contents is checked before any writing."""

from __future__ import annotations

import copy
import shutil
import stat
import unicodedata
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from common.cli import UserError
from common.names import LONGEST_NAME, is_hidden, is_label
from common.progress import show_progress

# Limits. The course's archives stay far below them.
MOST_ENTRIES = 2_000_000
MOST_BYTES = 20 * 10**9  # all files together, unpacked
MOST_TIMES = 200  # how many times its packed size a file may have
SMALL = 2**20  # bytes; smaller files may be packed to any size
LONGEST_PATH = 1_000  # characters

# Of other methods zipfile unpacks a whole block at once, however much memory it takes.
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
LOCAL_HEADER = 30  # bytes in front of a file's name and content
BLOCK = 4096  # bytes; a small file fills one on most disks
ENCRYPTED = 0x1  # a bit of an entry's flags

# What zipfile raises for a damaged archive.
ZIP_ERRORS = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    RuntimeError,
    ValueError,  # the name of an entry, for example
)


def extract(archive: Path, folder: Path) -> None:
    """Extract a zip file to `folder`, which is made, without system files such as __MACOSX.

    Raises UserError for an archive that is damaged, that is refused (`check_entries` says why), or
    that needs more space than is free. Raises OSError for what the disk refuses. After an error
    some of the files may be in `folder`.
    """
    try:
        with zipfile.ZipFile(archive) as file:
            entries = check_entries(archive, file)
            check_space(archive, entries, folder.parent)
            folder.mkdir()
            for entry in show_progress(entries, len(entries), f"unpacking {archive.name}"):
                extract_entry(archive, file, entry, folder)
    except ZIP_ERRORS as error:
        raise UserError(f"{archive}: not a whole zip file, or unreadable ({error})") from None


def check_entries(archive: Path, file: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    """The entries of a zip file that are to be extracted. No content is read.

    Raises UserError for names that are not plain paths below a folder, links, devices, encrypted
    or overlapping entries, two entries with one name, and sizes that are too large or not possible.
    """
    everything = file.infolist()
    if len(everything) > MOST_ENTRIES:
        raise UserError(
            f"{archive}: refused, because it has {len(everything):,} entries; "
            f"at most {MOST_ENTRIES:,} are allowed"
        )
    for entry in everything:
        refuse(archive, entry, fault_of_name(entry.orig_filename))
    refuse_overlaps(archive, everything, file.start_dir)

    entries = [entry for entry in everything if not is_system_file(entry)]
    for entry in entries:
        refuse(archive, entry, fault_of_kind(entry) or fault_of_size(entry))
    refuse_same_names(archive, entries)
    total = sum(entry.file_size for entry in entries)
    if total > MOST_BYTES:
        raise UserError(
            f"{archive}: refused, because it holds {total / 1e9:,.1f} GB unpacked; "
            f"at most {MOST_BYTES / 1e9:,.1f} GB are allowed"
        )
    return entries


def refuse(archive: Path, entry: zipfile.ZipInfo, fault: str | None) -> None:
    """Raise UserError if there is a fault."""
    if fault is not None:
        name = entry.orig_filename
        shown = name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}…"
        raise UserError(f"{archive}: refused, because its entry {shown!r} {fault}")


def is_system_file(entry: zipfile.ZipInfo) -> bool:
    """Whether an entry, or a folder that it is in, belongs to a system and not to the data."""
    return any(is_hidden(part) for part in PurePosixPath(entry.filename).parts)


def fault_of_name(name: str) -> str | None:
    """Why a name cannot be extracted as it is, or None. `name` is as it stands in the archive."""
    parts = name.removesuffix("/").split("/")
    if name.startswith("/") or ".." in parts or any(c in name for c in "\\:"):
        return "points out of the folder, or could on another system"
    if "." in parts or len(name) > LONGEST_PATH or not all(is_label(part) for part in parts):
        return "has a name that no file should have"
    return None


def fault_of_kind(entry: zipfile.ZipInfo) -> str | None:
    """Why an entry is not a plain file or folder that can be read, or None."""
    kind = stat.S_IFMT(entry.external_attr >> 16)  # 0 where the system that packed it has no kinds
    plain = stat.S_IFDIR if entry.is_dir() else stat.S_IFREG
    if kind not in (0, plain):
        return "is neither a plain file nor a plain folder"
    if entry.flag_bits & ENCRYPTED:
        return "is encrypted"
    if entry.compress_type not in METHODS:
        return "is packed with a method other than deflate"
    return None


def fault_of_size(entry: zipfile.ZipInfo) -> str | None:
    """Why the sizes of an entry cannot be right, or None."""
    packed = entry.compress_size
    unpacked = entry.file_size
    if entry.compress_type == zipfile.ZIP_STORED and packed != unpacked:
        return "is not packed and yet has two sizes"
    if unpacked > SMALL and unpacked > MOST_TIMES * packed:
        return f"would grow from {packed:,} to {unpacked:,} bytes"
    return None


def refuse_overlaps(archive: Path, entries: Sequence[zipfile.ZipInfo], end: int) -> None:
    """Raise UserError if two entries use the same bytes, or one those from `end` on.

    One small stretch of a file could otherwise be unpacked under many names.
    """
    for entry in sorted(entries, key=lambda entry: entry.header_offset, reverse=True):
        length = LOCAL_HEADER + len(entry.orig_filename) + entry.compress_size  # or more
        if entry.header_offset < 0 or entry.header_offset + length > end:
            refuse(archive, entry, "overlaps another part of the archive")
        end = entry.header_offset


def refuse_same_names(archive: Path, entries: Sequence[zipfile.ZipInfo]) -> None:
    """Raise UserError if two paths are the same on a disk that ignores case and Unicode forms."""
    spellings: dict[str, str] = {}  # every file and folder; a folder's ends with a slash
    listed = set()
    for entry in entries:
        path = PurePosixPath(entry.filename)
        names = [entry.filename]
        names += [f"{folder}/" for folder in path.parents[:-1]]
        for name in names:
            if spellings.setdefault(folded(name), name) != name:
                refuse(archive, entry, "is there twice, perhaps in another spelling")
        if folded(entry.filename) in listed:
            refuse(archive, entry, "is there twice, perhaps in another spelling")
        listed.add(folded(entry.filename))


def folded(name: str) -> str:
    """One text for all paths that some disk takes for the same."""
    decomposed = unicodedata.normalize("NFD", name.removesuffix("/"))
    return unicodedata.normalize("NFD", decomposed.casefold())


def check_space(archive: Path, entries: Sequence[zipfile.ZipInfo], folder: Path) -> None:
    """Raise UserError if the disk of `folder` has not enough room."""
    blocks = sum(-(-entry.file_size // BLOCK) for entry in entries)
    needed = blocks * BLOCK
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{archive}: needs {needed / 1e6:,.1f} MB in {folder}, where {free / 1e6:,.1f} MB "
            "are free"
        )


def extract_entry(
    archive: Path, file: zipfile.ZipFile, entry: zipfile.ZipInfo, folder: Path
) -> None:
    """Write one file or folder.

    Raises UserError if its content is not what the table of contents says, OSError if the disk
    refuses it. No more than a byte beyond the size in the table is written.
    """
    target = folder / entry.filename
    if entry.is_dir():
        target.mkdir(parents=True, exist_ok=True)
        return
    # zipfile stops at the size in the table. One byte more is asked for, so that more is noticed.
    longer = copy.copy(entry)
    longer.file_size += 1
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with file.open(longer) as source, target.open("xb") as out:
            shutil.copyfileobj(source, out)
            written = out.tell()
        if written != entry.file_size:
            raise zipfile.BadZipFile("its size is another one")
    except ZIP_ERRORS:
        raise UserError(
            f"{archive}: its entry {entry.filename!r} is broken; fetch the archive again"
        ) from None
