"""The tensors of PyTorch's zip archives (.pt, .pth, .ckpt), read without running anything.

`torch.save` and `torch.jit.save` write a zip file whose members are stored without compression:

    PREFIX/data.pkl     a pickle of everything but the numbers
    PREFIX/data/KEY     the numbers of one storage, which tensors refer to by KEY
    PREFIX/code/...     TorchScript only: the source text of the modules' classes
    PREFIX/byteorder    "little" or "big"; old files do not have it

The pickle is read by `common.pickles`, so that a hostile file runs no code. The numbers are not
read: the tensors lie in a memory map of the file, whose pages the operating system loads when they
are used. Writing to such a tensor changes its own memory, never the file.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.pickles import InertUnpickler, PickleError, Stub

# Limits. Real files stay far below them.
LARGEST_PICKLE = 64 * 2**20  # bytes
LARGEST_CODE = 64 * 2**20  # bytes of TorchScript's source text
MOST_DIMENSIONS = 64
MOST_REPEATED = 2**24  # elements of an expanded tensor, which has more of them than its storage
MOST_ATTRIBUTES = 100_000  # of all modules of a TorchScript archive
LONGEST_NAME = 1000  # characters of a tensor's dotted name

# What stands for a class of storage is the type of its elements.
STORAGE_DTYPES = {
    "BFloat16Storage": torch.bfloat16,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "ShortStorage": torch.int16,
    "storage.UntypedStorage": torch.uint8,
}
LEGACY_START = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19"  # torch.save before PyTorch 1.6
LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a zip member: signature, lengths of name and extra

# The start of a module's class in TorchScript's source text.
MODULE_CLASS = re.compile(
    r"^class (?P<name>\w+)\(Module\):\n"
    r"  __parameters__ = \[(?P<parameters>.*)\]\n"
    r"(?:  __buffers__ = \[(?P<buffers>.*)\]\n)?",
    re.MULTILINE,
)


class ArchiveError(ValueError):
    """A file that is not a whole PyTorch archive. The message is one line that names the file."""


def read_archive(path: Path) -> Any:
    """What an archive contains, without running any of it.

    Tensors and plain data (dict, OrderedDict, list, tuple, set, text, numbers, bytes, torch.Size,
    torch.dtype) are themselves; a Parameter is its tensor. Any other object, class or function is
    a `common.pickles.Stub`. Raises ArchiveError.
    """
    with errors_that_name(path):
        return Archive(path).read()


def unknown_globals(path: Path) -> list[str]:
    """The classes and functions that an archive names and that are stubs, sorted.

    Raises ArchiveError.
    """
    with errors_that_name(path):
        archive = Archive(path)
        archive.read()
        return sorted(archive.unknown)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of an archive by name; no tensors if it has no dictionary of them.

    They are those under the key "state_dict" if there is one, else those of the dictionary itself.
    A TorchScript archive has the names that torch.jit.load(path).state_dict() gives. Raises
    ArchiveError.
    """
    with errors_that_name(path):
        archive = Archive(path)
        content = archive.read()
        if isinstance(content, Stub):
            return module_tensors(content, archive.module_classes())
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict):
        return {}
    return {
        name: value
        for name, value in content.items()
        if isinstance(name, str) and isinstance(value, Tensor)
    }


def is_torchscript(path: Path) -> bool:
    """Whether a file is an archive of torch.jit.save."""
    try:
        with zipfile.ZipFile(path) as file:
            names = file.namelist()
    except Exception:  # a damaged file can raise anything
        return False
    return any(re.fullmatch("[^/]+/constants[.]pkl", name) for name in names)


def refuse_compressed(path: Path) -> None:
    """Raise ArchiveError for a zip file whose members are compressed, or larger than the file.

    A small file could otherwise fill all memory. `torch.save` never compresses.
    """
    if not zipfile.is_zipfile(path):
        return
    with errors_that_name(path), zipfile.ZipFile(path) as file:
        members_by_name(file, path.stat().st_size)
        for info in file.infolist():
            if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
                raise ArchiveError(f"{info.filename!r} is compressed; write it with torch.save")


@contextlib.contextmanager
def errors_that_name(path: Path) -> Iterator[None]:
    """Turn every error into an ArchiveError that names the file."""
    try:
        yield
    except OSError as error:
        raise ArchiveError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (ArchiveError, PickleError) as error:
        reason = one_line(str(error))
        raise ArchiveError(f"{path}: not a whole PyTorch archive ({reason})") from None
    except Exception as error:  # a damaged or hostile file can raise anything
        reason = one_line(f"{type(error).__name__}: {error}")
        raise ArchiveError(f"{path}: not a whole PyTorch archive ({reason})") from None


def one_line(text: str) -> str:
    """Text without line breaks, and not too much of it."""
    return " ".join(text.split())[:200]


@dataclass(frozen=True)
class Storage:
    """A storage as the pickle refers to it: its bytes, and the type of its elements."""

    data: torch.UntypedStorage
    dtype: torch.dtype


class Archive:
    """A PyTorch archive in a memory map."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            refuse_other_formats(file.read(len(LEGACY_START)))
            with zipfile.ZipFile(file) as archive:
                self.members = members_by_name(archive, path.stat().st_size)
                self.code = read_code(archive)
            # Copy on write: what is written to the map stays in memory.
            self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self.prefix = prefix_of(self.members)
        self.bytes = torch.frombuffer(self.map, dtype=torch.uint8).untyped_storage()
        self.storages: dict[str, torch.UntypedStorage] = {}
        self.unknown: set[str] = set()

    def read(self) -> Any:
        """Read the pickle."""
        self.check_byte_order()
        start, end = self.find("data.pkl")
        if end - start > LARGEST_PICKLE:
            raise ArchiveError(f"its pickle is larger than {LARGEST_PICKLE:,} bytes")
        functions = REBUILDERS | {
            "torch.Size": torch_size,
            "torch._tensor._rebuild_from_type_v2": rebuild_from_type,
        }
        values = {f"torch.{name}": dtype for name, dtype in STORAGE_DTYPES.items()}
        values |= {str(value): value for value in vars(torch).values() if is_dtype(value)}
        unpickler = InertUnpickler(functions, values, self.load_storage)
        content = unpickler.load(self.map[start:end])
        self.unknown = unpickler.unknown
        return content

    def check_byte_order(self) -> None:
        """Raise ArchiveError for numbers whose first byte is the most significant one."""
        if f"{self.prefix}/byteorder" not in self.members:
            return
        start, end = self.find("byteorder")
        if end - start > 10 or self.map[start:end] != b"little":
            raise ArchiveError("its byte order is not little-endian")

    def find(self, name: str) -> tuple[int, int]:
        """Where a member's content starts and ends in the file; it is checked by its checksum."""
        info = self.members.get(f"{self.prefix}/{name}")
        if info is None:
            raise ArchiveError(f"{name!r} is missing")
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise ArchiveError(f"{name!r} is compressed; write the file with torch.save")
        if not 0 <= info.header_offset < len(self.map):
            raise ArchiveError(f"{name!r} is cut short")
        signature, name_length, extra_length = LOCAL_HEADER.unpack_from(
            self.map, info.header_offset
        )
        start = info.header_offset + LOCAL_HEADER.size + name_length + extra_length
        end = start + info.file_size
        if signature != b"PK\x03\x04" or end > len(self.map):
            raise ArchiveError(f"{name!r} is cut short")
        with memoryview(self.map) as view, view[start:end] as content:
            checksum = zlib.crc32(content)
        if info.CRC not in (0, checksum):  # torch can be told to write 0 instead
            raise ArchiveError(f"{name!r} is damaged: its checksum is wrong")
        return start, end

    def load_storage(self, reference: Any) -> Storage:
        """The storage that the pickle refers to, with the type of its elements."""
        match reference:
            case ("storage", torch.dtype() as dtype, str(key), str(), int(count)):
                pass
            case _:
                raise ArchiveError("its pickle refers to something that is not a storage")
        if key not in self.storages:
            self.storages[key] = self.map_storage(key)
        storage = self.storages[key]
        if not 0 <= count <= storage.nbytes() // dtype.itemsize:
            raise ArchiveError(f"'data/{key}' is shorter than its pickle says")
        return Storage(storage, dtype)

    def map_storage(self, key: str) -> torch.UntypedStorage:
        """The bytes of a member, as a storage in the memory map."""
        start, end = self.find(f"data/{key}")
        storage = self.bytes[start:end]
        if start % 16 != 0:  # torch aligns its members; numbers elsewhere must be moved
            storage = storage.clone()
        return storage

    def module_classes(self) -> dict[str, set[str]]:
        """The names of the parameters and buffers of each class of TorchScript's modules.

        Other attributes that are tensors do not belong to the state of a module.
        """
        classes = {}
        for file_name, text in self.code.items():
            # PREFIX/code/__torch__/torch/nn.py has the classes of __torch__.torch.nn.
            _, _, inner_name = file_name.partition("/code/")
            package = inner_name.removesuffix(".py").replace("/", ".")
            for found in MODULE_CLASS.finditer(text):
                names = found["parameters"] + (found["buffers"] or "")
                classes[f"{package}.{found['name']}"] = set(re.findall(r'"([^"]*)"', names))
        return classes


# The zip file


def refuse_other_formats(start: bytes) -> None:
    """Raise ArchiveError for a file whose first bytes are not those of a zip file."""
    if start == LEGACY_START:
        raise ArchiveError(
            "it is in the format of PyTorch before 1.6; load it and save it again with torch.save"
        )
    if not start.startswith(b"PK"):
        raise ArchiveError("it is not a zip file")


def members_by_name(archive: zipfile.ZipFile, size: int) -> dict[str, zipfile.ZipInfo]:
    """The members of a zip file. Two of one name, or in one place, are an ArchiveError."""
    members = {}
    total = 0
    for info in archive.infolist():
        if info.filename in members:
            raise ArchiveError(f"{info.filename!r} is there twice")
        members[info.filename] = info
        total += info.compress_size
    if total > size:
        raise ArchiveError("it has more content than bytes: it is cut short, or members overlap")
    return members


def prefix_of(members: dict[str, zipfile.ZipInfo]) -> str:
    """The folder that all members of the archive are in."""
    prefixes = [name.split("/")[0] for name in members if re.fullmatch("[^/]+/data[.]pkl", name)]
    if len(prefixes) != 1:
        raise ArchiveError("it does not have one data.pkl")
    return prefixes[0]


def read_code(archive: zipfile.ZipFile) -> dict[str, str]:
    """The source text in a TorchScript archive, by the names of its files. It is never run."""
    code = {}
    left = LARGEST_CODE
    for info in archive.infolist():
        if not re.fullmatch("[^/]+/code/.+[.]py", info.filename):
            continue
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ArchiveError(f"{info.filename!r} is compressed in an unusual way")
        with archive.open(info) as file:
            text = file.read(left + 1)
        left -= len(text)
        if left < 0:
            raise ArchiveError(f"its source text is longer than {LARGEST_CODE:,} bytes")
        code[info.filename] = text.decode()
    return code


# Functions that the pickle may call. They check what they are given.


def torch_size(numbers: tuple[int, ...]) -> torch.Size:
    """The shape of a tensor."""
    return torch.Size(numbers)


def rebuild_parameter(tensor: Tensor, *_: Any) -> Tensor:
    """The tensor of a Parameter."""
    if not isinstance(tensor, Tensor):
        raise ArchiveError("a parameter is not a tensor")
    return tensor


def rebuild_tensor_v2(
    storage: Storage,
    offset: int,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    _requires_grad: bool,
    _hooks: Any,
    metadata: Any = None,
) -> Tensor:
    """A tensor whose elements have the type of the storage's."""
    return view(storage, storage.dtype, offset, size, stride, metadata)


def rebuild_tensor_v3(
    storage: Storage,
    offset: int,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    _requires_grad: bool,
    _hooks: Any,
    dtype: torch.dtype,
    metadata: Any = None,
) -> Tensor:
    """A tensor of a type for which torch has no class of storage."""
    return view(storage, dtype, offset, size, stride, metadata)


REBUILDERS = {
    "torch._utils._rebuild_parameter": rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": rebuild_parameter,
    "torch._utils._rebuild_tensor_v2": rebuild_tensor_v2,
    "torch._utils._rebuild_tensor_v3": rebuild_tensor_v3,
}


def rebuild_from_type(function: Stub, _class: Any, arguments: tuple[Any, ...], _: Any) -> Tensor:
    """The tensor of an object of a class derived from Tensor, or of one with attributes."""
    if not isinstance(function, Stub) or function.name not in REBUILDERS:
        raise ArchiveError("a tensor is described in an unknown way")
    return REBUILDERS[function.name](*arguments)


def view(
    storage: Storage,
    dtype: torch.dtype,
    offset: int,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    metadata: Any,
) -> Tensor:
    """A tensor that lies in a storage. Raises ArchiveError if it would reach beyond it."""
    are_tuples = isinstance(size, tuple) and isinstance(stride, tuple)
    if not isinstance(storage, Storage) or not is_dtype(dtype) or not are_tuples:
        raise ArchiveError("a tensor is described in an unknown way")
    if len(size) != len(stride) or len(size) > MOST_DIMENSIONS:
        raise ArchiveError("a tensor's shape and strides make no sense")
    for number in (offset, *size, *stride):
        if type(number) is not int or not 0 <= number < 2**62:
            raise ArchiveError("a tensor's shape and strides make no sense")

    available = storage.data.nbytes() // dtype.itemsize
    count = math.prod(size)
    end = offset
    if count > 0:
        end += 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if end > available:
        raise ArchiveError("a tensor reaches beyond its storage")
    if count > max(available, MOST_REPEATED):
        raise ArchiveError("a tensor repeats the elements of its storage too often")
    tensor = torch.empty(0, dtype=dtype).set_(storage.data, offset, size, stride)
    return with_metadata(tensor, metadata)


def with_metadata(tensor: Tensor, metadata: Any) -> Tensor:
    """The tensor itself, or its conjugate if only that is stored."""
    if not metadata:
        return tensor
    if metadata != {"conj": True}:
        raise ArchiveError("a tensor is stored in an unknown way")
    return tensor.conj()


def is_dtype(value: Any) -> bool:
    """Whether a value is the type of a tensor's elements."""
    return isinstance(value, torch.dtype)


# TorchScript


def module_tensors(module: Stub, classes: dict[str, set[str]]) -> dict[str, Tensor]:
    """The parameters and buffers of a module and the modules in it, by their dotted names."""
    tensors = {}
    todo = [("", module)]
    attributes = 0
    while todo:
        prefix, module = todo.pop()
        if module.name not in classes or not isinstance(module.state, dict):
            continue
        attributes += len(module.state)
        if attributes > MOST_ATTRIBUTES:  # a module inside itself, for example
            raise ArchiveError(f"its modules have more than {MOST_ATTRIBUTES:,} attributes")
        children = []
        for key, value in module.state.items():
            name = f"{prefix}{key}"
            if len(name) > LONGEST_NAME:
                raise ArchiveError("its modules are nested too deeply")
            if isinstance(value, Tensor) and key in classes[module.name]:
                tensors[name] = value
            elif isinstance(value, Stub):
                children.append((f"{name}.", value))
        todo += reversed(children)  # so that the first one is next
    return tensors
