"""common/archives.py and common/pickles.py: the tensors of archives, and that nothing is run."""

import argparse
import contextlib
import functools
import io
import math
import pickle
import random
import struct
import sys
import types
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from common.archives import (
    ArchiveError,
    is_torchscript,
    read_archive,
    read_tensors,
    unknown_globals,
)
from common.checkpoints import load_weights, tensors_under
from common.cli import UserError
from common.pickles import Stub

pytestmark = [
    pytest.mark.filterwarnings("ignore:Detected pickle protocol"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]
DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16),
    *(torch.bool, torch.complex64, torch.complex128),
]


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same type, shape and bytes; torch.equal lacks some types."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(bytes_of(one), bytes_of(other))


def bytes_of(tensor: Tensor) -> Tensor:
    return tensor.detach().resolve_conj().contiguous().flatten().view(torch.uint8)


def save(content: Any, path: Path) -> Path:
    torch.save(content, path)
    return path


# What runs while a file is read. Python calls an audit hook for every import, file and process.

WATCHED = {"compile", "exec", "import", "open", "os.mkdir", "os.system", "subprocess.Popen"}
watching = False
seen: list[str] = []


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    if watching and event in WATCHED:
        seen.append(f"{event} {arguments[0]}")


sys.addaudithook(watch)


@contextlib.contextmanager
def nothing_but_reading(path: Path) -> Iterator[None]:
    """Fail if anything happens inside but that `path` is opened."""
    global watching
    seen.clear()
    watching = True
    try:
        yield
    finally:
        watching = False
    assert set(seen) <= {f"open {path}"}, seen


def problem(path: Path) -> str:
    """The error of reading a file, without its name. It is one line, and nothing was run."""
    with nothing_but_reading(path), pytest.raises(ArchiveError) as caught:
        read_archive(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert "\n" not in text
    assert len(text) < len(str(path)) + 300
    return text.removeprefix(f"{path}: ")


# Good archives


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_of_every_type_are_read(tmp_path: Path, dtype: torch.dtype) -> None:
    values = torch.tensor([[0.0, 1.0, 2.0], [3.0, 4.0, 100.0]]).to(dtype)
    content = {"all": values, "empty": values[:0], "number": values[1, 1]}
    path = save(content, tmp_path / "x.pt")
    read = read_archive(path)
    assert read.keys() == content.keys()
    for name, value in content.items():
        assert same(read[name], value)
    assert unknown_globals(path) == []


def test_views_and_parameters_are_read_and_share_their_storage(tmp_path: Path) -> None:
    base = torch.arange(24.0).view(4, 6)
    parameter = nn.Parameter(base + 1)
    parameter.note = "an attribute"
    with_attribute = torch.ones(3)
    with_attribute.note = "an attribute"
    content = {
        "base": base,
        "transposed": base.T,
        "part": base[1:3, ::2],
        "expanded": torch.ones(1).expand(5),
        "parameter": parameter,
        "frozen": nn.Parameter(torch.arange(3), requires_grad=False),
        "number": nn.Parameter(torch.tensor(4.6)),
        "with_attribute": with_attribute,
        "conjugate": torch.tensor([1 + 2j]).conj(),
    }
    read = read_archive(save(content, tmp_path / "x.pt"))
    for name, value in content.items():
        assert same(read[name], value), name
        assert read[name].stride() == value.stride()
        assert not read[name].requires_grad
    read["base"][1, 2] = -1
    assert read["transposed"][2, 1] == -1
    assert read["part"][0, 1] == -1
    assert read["base"].untyped_storage().nbytes() == 24 * 4


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_data_is_itself(tmp_path: Path, protocol: int) -> None:
    shared = [1, 2]
    content = {
        "numbers": [0, 1, -1, 255, 65536, -(2**31), 2**40, 10**30, 0.5, math.inf, 1 - 2j],
        "nothing": [None, True, False],
        "text": ["", "a\nb", "é 中 🙂", "x" * 300],
        "bytes": [b"", b"abc\xff", bytes(300)],
        "sets": [set(), {1, "a"}, frozenset(), frozenset({2})],
        "tuples": [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)],
        "ordered": OrderedDict(b=1, a=OrderedDict()),
        "keys": {1: 1, "1": 2, None: 3, 2.5: 4, (1, "a"): 5, (0, (1, 2)): 6, b"x": 7},
        "shared": [shared, shared],
        "size": torch.Size([2, 3]),
        "dtype": torch.bfloat16,
    }
    torch.save(content, tmp_path / "x.pt", pickle_protocol=protocol)
    read = read_archive(tmp_path / "x.pt")
    assert read == content
    assert type(read["ordered"]) is OrderedDict
    assert type(read["size"]) is torch.Size
    assert read["shared"][0] is read["shared"][1]


def test_a_container_may_hold_itself(tmp_path: Path) -> None:
    loop: list[Any] = [torch.ones(1)]
    loop.append(loop)
    read = read_archive(save(loop, tmp_path / "x.pt"))
    assert read[1] is read


@pytest.fixture
def lightning() -> Iterator[types.ModuleType]:
    """A module like Lightning's, which is there while files are written."""
    module = types.ModuleType("made_up_lightning")

    class ModelCheckpoint:
        def __init__(self) -> None:
            self.best = torch.ones(2)

        def __call__(self) -> None:
            raise AssertionError("an object of the file was called")

    class Attributes(dict):
        pass

    for kind in (ModelCheckpoint, Attributes):
        kind.__module__ = module.__name__
        kind.__qualname__ = kind.__name__
        setattr(module, kind.__name__, kind)
    sys.modules[module.__name__] = module
    yield module
    sys.modules.pop(module.__name__, None)


def lightning_checkpoint(module: types.ModuleType) -> dict[str, Any]:
    callback = module.ModelCheckpoint()
    return {
        "state_dict": nn.Linear(2, 3).state_dict(),
        "callbacks": {module.ModelCheckpoint: {"best": np.float64(0.5), "one": callback}},
        "hyper_parameters": module.Attributes(lr=1e-3),
        "arguments": argparse.Namespace(lr=1),
        "optimizer": functools.partial(print, 1),
        "path": Path("x"),
        "array": np.arange(3),
        "all": [callback, callback],
        "kind": nn.Linear,
        "epoch": 3,
    }


@pytest.mark.parametrize("protocol", [2, 4])
def test_other_objects_are_stubs(
    tmp_path: Path, lightning: types.ModuleType, protocol: int
) -> None:
    path = tmp_path / "x.ckpt"
    content = lightning_checkpoint(lightning)
    torch.save(content, path, pickle_protocol=protocol)
    del sys.modules[lightning.__name__]
    read_archive(path)  # once before, so that Python has imported all that it needs
    with nothing_but_reading(path):
        read = read_archive(path)
        unknown = unknown_globals(path)
    assert read["epoch"] == 3
    (callback,) = read["callbacks"]
    assert callback.name == "made_up_lightning.ModelCheckpoint"
    assert same(read["all"][0].state["best"], torch.ones(2))
    assert read["all"][0] is read["all"][1]
    for key in ("hyper_parameters", "arguments", "optimizer", "path", "array", "kind"):
        assert isinstance(read[key], Stub), key
    assert repr(read["arguments"]) == "Stub('argparse.Namespace')"
    names = {"made_up_lightning.ModelCheckpoint", "argparse.Namespace", "functools.partial"}
    assert names <= set(unknown)
    assert "torch.nn.modules.linear.Linear" in unknown
    assert "collections.OrderedDict" not in unknown
    assert unknown == sorted(unknown)

    # torch.load refuses the file; its weights load all the same.
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)
    for weights in (load_weights(path)[0], tensors_under(path), read_tensors(path)):
        assert weights.keys() == content["state_dict"].keys()
        for name, value in content["state_dict"].items():
            assert same(weights[name], value)


def test_the_tensors_are_in_a_memory_map_of_the_file(tmp_path: Path) -> None:
    """There is one copy, which is the file's; and the file cannot be changed through it."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("only Linux says which files are in memory")
    values = torch.arange(2**20)
    path = save({"state_dict": {"a": values, "b": values + 1}}, tmp_path / "x.pt")
    before = path.read_bytes()
    safe = tmp_path / "x.safetensors"
    safetensors.torch.save_file({"a": values, "b": values + 1}, safe)
    for file in (path, safe):
        tensors = tensors_under(file)
        places = [
            [int(address, 16) for address in line.split()[0].split("-")]
            for line in maps.read_text().splitlines()
            if line.endswith(f" {file}")
        ]
        for tensor in tensors.values():
            start = tensor.data_ptr()
            end = start + tensor.nbytes
            assert any(low <= start and end <= high for low, high in places)
        tensors["a"].zero_()
        assert not tensors["a"].any()
        assert same(tensors["b"], values + 1)
    del tensors
    assert path.read_bytes() == before
    assert same(tensors_under(safe)["a"], values)


def test_tensors_outlive_the_archive_and_the_file(tmp_path: Path) -> None:
    path = save([torch.arange(1000)], tmp_path / "x.pt")
    tensor = read_archive(path)[0]
    path.unlink()
    assert same(tensor, torch.arange(1000))


def test_files_without_checksums_or_alignment_load(tmp_path: Path) -> None:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        path = save({"a": torch.arange(5.0)}, tmp_path / "x.pt")
    finally:
        torch.serialization.set_crc32_options(before)
    assert same(read_archive(path)["a"], torch.arange(5.0))

    data = tensor_pickle()
    for k in range(8):
        path = write_archive(tmp_path / f"{k * 'x'}.pt", data, prefix=f"p{k * 'x'}")
        assert read_archive(path).tolist() == [1, 2, 3, 4]


# TorchScript


def same_as_jit(path: Path) -> dict[str, Tensor]:
    """The tensors that we read, after comparing them with those of torch.jit.load."""
    expected = torch.jit.load(path).state_dict()
    read = read_tensors(path)
    assert list(read) == list(expected)
    for name, value in expected.items():
        assert same(read[name], value), name
    return read


class Nested(nn.Module):
    """A network with everything that is, and is not, in a state_dict."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 3).half()
        self.tied = self.first
        self.norm = nn.BatchNorm2d(1)
        self.without_bias = nn.Conv2d(1, 1, 2, bias=False)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(2, 2), nn.ReLU()), nn.LSTM(2, 2)])
        self.register_buffer("kept", torch.arange(3))
        self.register_buffer("not_kept", torch.eye(2).T, persistent=False)
        self.attribute = torch.ones(2)
        self.list = [torch.ones(1)]
        self.dict = {"a": torch.ones(1)}
        self.numbers = [1, 2]

    def forward(self, x: Tensor) -> Tensor:
        x = self.without_bias(self.norm(x)) + self.attribute.sum() + self.numbers[0]
        return x + self.list[0] + self.dict["a"]


def test_torchscript_archives_have_the_names_of_their_state_dict(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.jit.script(Nested()).save(path)
    read = same_as_jit(path)
    assert {"tied.weight", "blocks.0.0.bias", "blocks.1.weight_ih_l0", "not_kept"} <= set(read)
    assert "attribute" not in read
    assert is_torchscript(path)
    assert not is_torchscript(save({}, tmp_path / "y.pt"))

    traced = torch.jit.trace(Nested(), torch.randn(1, 1, 4, 4), check_trace=False)
    torch.jit.save(traced, path)
    same_as_jit(path)
    weights, config = load_weights(path)
    assert weights.keys() == tensors_under(path).keys()
    assert config == {}


class WritesWhenLoaded(nn.Module):
    """A module whose archive makes torch.jit.load write a file."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    @torch.jit.export
    def __getstate__(self) -> tuple[Tensor, bool]:
        return (self.weight, self.training)

    @torch.jit.export
    def __setstate__(self, state: tuple[Tensor, bool]) -> None:
        torch.save(state[0], "code-ran")
        self.weight = state[0]
        self.training = state[1]

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class HasWeightsToo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.good = nn.Linear(2, 2)
        self.hostile = WritesWhenLoaded()

    def forward(self, x: Tensor) -> Tensor:
        return self.hostile(self.good(x))


def test_a_torchscript_archive_runs_no_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "hostile.pt"
    torch.jit.script(HasWeightsToo()).save(path)
    with contextlib.suppress(RuntimeError):
        torch.jit.load(path)
    written = tmp_path / "code-ran"
    assert written.exists()  # the file is as hostile as it is meant to be
    written.unlink()

    with nothing_but_reading(path):
        read_archive(path)
    assert set(load_weights(path)[0]) == {"good.weight", "good.bias"}
    assert set(tensors_under(path)) == {"good.weight", "good.bias"}
    torch.jit.script(WritesWhenLoaded()).save(path)
    with pytest.raises(UserError, match="holds no dictionary of weights"):
        load_weights(path)
    assert list(tmp_path.iterdir()) == [path]


def test_torchscript_modules_without_end_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A module that is inside itself, modules that double at every level, endless source text."""
    monkeypatch.setattr("common.archives.MOST_ATTRIBUTES", 2000)
    monkeypatch.setattr("common.archives.LARGEST_CODE", 1000)
    code = {"code/__torch__.py": b"class M(Module):\n  __parameters__ = []\n  __buffers__ = []\n"}
    loop = b"c__torch__\nM\n)\x81q\x00}X\x01\x00\x00\x00mh\x00sb."
    path = write_archive(tmp_path / "x.pt", loop, more=code)
    with pytest.raises(ArchiveError, match="nested too deeply"):
        read_tensors(path)

    twice = b"c__torch__\nM\nq\x00)\x81q\x01"
    for _ in range(60):  # the object so far, in memo 1, becomes two attributes of the next one
        twice += b"h\x00)\x81}(X\x01\x00\x00\x00ah\x01X\x01\x00\x00\x00bh\x01ubq\x01"
    path = write_archive(tmp_path / "x.pt", twice + b".", more=code)
    with pytest.raises(ArchiveError, match="attributes"):
        read_tensors(path)

    bomb = {"code/__torch__.py": bytes(1001)}
    path = write_archive(tmp_path / "x.pt", loop, more=bomb, compression=zipfile.ZIP_DEFLATED)
    assert "source text" in problem(path)


# Hostile pickles


class Calls:
    """An object whose pickle calls a function."""

    def __init__(self, function: Any, *arguments: Any, state: Any = None) -> None:
        self.parts = (function, arguments, state)


class Named:
    """Pickled as a class or function, which need not be there: `Named("posix", "system")`."""

    def __init__(self, module: str, name: str) -> None:
        self.parts = (module, name)


class Pickler(pickle._Pickler):
    """Writes `Named`, and functions as themselves."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def save_named(self, named: Named) -> None:
        module, name = named.parts
        self.write(b"c" + module.encode() + b"\n" + name.encode() + b"\n")

    dispatch[Named] = save_named

    def save_call(self, call: Calls) -> None:
        function, arguments, state = call.parts
        self.save(function)
        self.save(arguments)
        self.write(pickle.REDUCE)
        if state is not None:
            self.save(state)
            self.write(pickle.BUILD)

    dispatch[Calls] = save_call


def pickled(content: Any, protocol: int = 2) -> bytes:
    out = io.BytesIO()
    Pickler(out, protocol).dump(content)
    return out.getvalue()


def write_archive(
    path: Path,
    data: bytes,
    storages: dict[str, bytes] | None = None,
    more: dict[str, bytes] | None = None,
    prefix: str = "archive",
    compression: int = zipfile.ZIP_STORED,
) -> Path:
    """Write an archive with this pickle. Its storage "0" has the four float32 1, 2, 3, 4."""
    if storages is None:
        storages = {"0": np.arange(1, 5, dtype=np.float32).tobytes()}
    members = {"data.pkl": data, "byteorder": b"little", "version": b"3", **(more or {})}
    members |= {f"data/{key}": value for key, value in storages.items()}
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, value in members.items():
            file.writestr(f"{prefix}/{name}", value)
    return path


class Reference:
    """Pickled as a reference to a storage."""

    def __init__(self, *parts: Any) -> None:
        self.parts = parts


def save_reference(pickler: Pickler, reference: Reference) -> None:
    pickler.save(reference.parts)
    pickler.write(pickle.BINPERSID)


Pickler.dispatch[Reference] = save_reference
FLOATS = Named("torch", "FloatStorage")
STORAGE = Reference("storage", FLOATS, "0", "cpu", 4)


def tensor(
    offset: Any = 0, size: Any = (4,), stride: Any = (1,), storage: Any = STORAGE, *more: Any
) -> Calls:
    function = Named("torch._utils", "_rebuild_tensor_v2")
    return Calls(function, storage, offset, size, stride, False, OrderedDict(), *more)


def tensor_pickle(*arguments: Any, **options: Any) -> bytes:
    return pickled(tensor(*arguments, **options))


COMMAND = "touch code-ran"
HOSTILE = {
    "os.system": Calls(Named("os", "system"), COMMAND),
    "posix.system": Calls(Named("posix", "system"), COMMAND),
    "subprocess.Popen": Calls(Named("subprocess", "Popen"), ("touch", "code-ran")),
    "builtins.eval": Calls(Named("builtins", "eval"), "open('code-ran', 'w')"),
    "builtins.exec": Calls(Named("__builtin__", "exec"), "open('code-ran', 'w')"),
    "builtins.open": Calls(Named("builtins", "open"), "code-ran", "w"),
    "builtins.getattr": Calls(Calls(Named("builtins", "getattr"), Named("os", "x"), "system"), "x"),
    "builtins.__import__": Calls(Named("builtins", "__import__"), "made_up_hostile"),
    "importlib.import_module": Calls(Named("importlib", "import_module"), "made_up_hostile"),
    "made_up_hostile.run": Calls(Named("made_up_hostile", "run")),
    "operator.attrgetter": Calls(Calls(Named("operator", "attrgetter"), "system"), Named("os", "")),
    "functools.partial": Calls(Calls(Named("functools", "partial"), Named("os", "system")), "x"),
    "builtins.map": Calls(Named("builtins", "list"), Calls(Named("builtins", "map"), 1, [COMMAND])),
    "torch.load": Calls(Named("torch", "load"), "other.pt", "cpu", None, False),
    "torch.jit.load": Calls(Named("torch.jit", "load"), "other.pt"),
    "torch.hub.load": Calls(Named("torch.hub", "load"), "someone/something", "net"),
    "torch.storage._load_from_bytes": Calls(Named("torch.storage", "_load_from_bytes"), b"x"),
    "numpy.load": Calls(Named("numpy", "load"), "other.npy", None, True),
    "numpy.core.multiarray.scalar": Calls(Named("numpy.core.multiarray", "scalar"), 1, b"x"),
    "builtins.type": Calls(Named("builtins", "type"), "X", (Named("os", "system"),), {"a": 1}),
    "copy_reg._reconstructor": Calls(Named("copy_reg", "_reconstructor"), Named("a", "B"), 1, None),
    "pickle.loads": Calls(Named("pickle", "loads"), b"cos\nsystem\n."),
    "builtins.bytearray": Calls(Named("builtins", "bytearray"), 10**15),
    "torch._utils._rebuild_qtensor": Calls(Named("torch._utils", "_rebuild_qtensor"), 1, 2),
    "torch.nn.modules.linear.Linear": Calls(Named("torch.nn.modules.linear", "Linear"), 10**9, 1),
    "torch.zeros": Calls(Named("torch", "zeros"), 10**15, state={"a": 1}),
}
# torch.load calls these with any arguments, which fails; it does not read protocol 4.
FAIL_IN_TORCH = {"builtins.bytearray", "torch._utils._rebuild_qtensor"}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("protocol", [2, 4])
def test_nothing_that_a_pickle_calls_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, protocol: int
) -> None:
    monkeypatch.chdir(tmp_path)
    module = "open('code-ran', 'w').close()\n\ndef run(): pass\n"
    Path("made_up_hostile.py").write_text(module)
    monkeypatch.syspath_prepend(tmp_path)
    content = {"state_dict": {"a": tensor()}, "hostile": [HOSTILE[name]], HOSTILE[name]: 1}
    path = write_archive(tmp_path / "x.pt", pickled(content, protocol))
    with nothing_but_reading(path):
        read = read_archive(path)
        assert name in unknown_globals(path)
    assert isinstance(read["hostile"][0], Stub)
    assert tensors_under(path)["a"].tolist() == [1, 2, 3, 4]
    if name in FAIL_IN_TORCH and protocol == 2:
        with pytest.raises(UserError):
            load_weights(path)
    else:
        assert load_weights(path)[0]["a"].tolist() == [1, 2, 3, 4]
    assert not Path("code-ran").exists()
    assert "made_up_hostile" not in sys.modules


def test_stubs_take_all_that_a_pickle_does_to_them(tmp_path: Path) -> None:
    stub = b"cos\nsystem\n"
    data = b"".join(
        [
            b"\x80\x02]q\x00(",
            stub + b"(K\x01K\x02e",  # append
            stub + b"(K\x01K\x02u",  # set items
            stub + b"K\x01K\x02s",
            stub + b"(K\x01\x90",  # add to a set
            stub + b"Nb",  # states of any kind
            stub + b"h\x00b",
            stub + b"]b",
            stub + b")R)R)R",  # call what was returned
            stub + b")\x81",
            stub + b")}\x92",  # with keywords
            b"(K\x01ios\nsystem\n",  # instances as Python 2 wrote them
            b"(" + stub + b"K\x01o",
            b"}" + stub + b"K\x01s",  # a key
            b"(" + stub + b"\x91",  # an element
            b"e.",
        ]
    )
    path = write_archive(tmp_path / "x.pt", data)
    assert len(read_archive(path)) == 14
    assert unknown_globals(path) == ["os.system"]


# Pickles that make no sense, and those that would take all time or memory.

TEXT = b"X\x01\x00\x00\x00a"
BAD_PICKLES = {
    "empty": b"",
    "no end": b"\x80\x02}",
    "unknown opcode": b"\x80\x02\xff.",
    "unknown protocol": b"\x80\x06N.",
    "nothing on the stack": b".",
    "pop of nothing": b"0.",
    "no mark": b"t.",
    "two marks": b"(.",
    "nothing under the tuple": b"N\x86.",
    "unknown memo": b"h\x05.",
    "negative memo": b"g-1\n.",
    "extension": b"\x82\x01.",
    "extension 4": b"\x84\x01\x00\x00\x00.",
    "buffer": b"\x97.",
    "read-only buffer": b"N\x98.",
    "huge frame": b"\x80\x04\x95" + bytes(5) + b"\x01\x00\x00N.",
    "huge text": b"\x8d" + b"\xff" * 7 + b"\x7fabc.",
    "huge bytes": b"\x8e" + bytes(6) + b"\x7f\x00abc.",
    "huge bytearray": b"\x96" + bytes(6) + b"\x7f\x00abc.",
    "huge integer": b"\x8b\xff\xff\xff\x7fabc.",
    "negative length": b"\x8b\xff\xff\xff\xffabc.",
    "many digits": b"L" + b"9" * 10_000 + b"L\n.",
    "not a number": b"Fabc\n.",
    "bad text": b"X\x02\x00\x00\x00\xff\xfe.",
    "class named by numbers": b"K\x01K\x02\x93.",
    "class named by lists": b"]]\x93.",
    "class without a name": b"cos\n",
    "call of a number": b"K\x01)R.",
    "call of text": TEXT + b")R.",
    "call without a tuple": b"cos\nsystem\n]R.",
    "call of a type": b"ctorch\nfloat32\n)R.",
    "instance of nothing": b"(o.",
    "append to a number": b"K\x01K\x02a.",
    "append to a dictionary": b"}(K\x01e.",
    "items of a list": b"](K\x01K\x02u.",
    "odd number of items": b"}(K\x01u.",
    "add to a list": b"](K\x01\x90.",
    "list as a key": b"}]K\x01s.",
    "dictionary as a key": b"}}K\x01s.",
    "set as a key": b"}\x8fK\x01s.",
    "complex number as a key": pickled({Calls(Named("builtins", "complex"), 1.0, 2.0): 1}),
    "large number as a key": pickled({2**61: 1}),
    "list in a tuple as a key": b"}]\x85K\x01s.",
    "list in a set": b"(]\x91.",
    "tensor as a key": pickled({tensor(): 1}),
    "persistent number": b"K\x01Q.",
    "persistent text": b"Pabc\n.",
    "persistent nothing": b"NQ.",
    "persistent stub": b"cos\nsystem\nQ.",
    "persistent tuple of the wrong length": pickled(Reference("storage", FLOATS, "0", "cpu")),
    "persistent module": pickled(Reference("module", FLOATS, "0", "cpu", 4)),
    "storage of no type": pickled(Reference("storage", Named("os", "system"), "0", "cpu", 4)),
    "storage of text": pickled(Reference("storage", "FloatStorage", "0", "cpu", 4)),
    "storage with a number for a key": pickled(Reference("storage", FLOATS, 0, "cpu", 4)),
    "storage that is not there": pickled(Reference("storage", FLOATS, "1", "cpu", 4)),
    "storage elsewhere": pickled(Reference("storage", FLOATS, "../byteorder", "cpu", 1)),
    "storage of another file": pickled(Reference("storage", FLOATS, "/etc/passwd", "cpu", 1)),
    "storage of the wrong length": pickled(Reference("storage", FLOATS, "0", "cpu", 5)),
    "storage of negative length": pickled(Reference("storage", FLOATS, "0", "cpu", -1)),
    "storage of huge length": pickled(Reference("storage", FLOATS, "0", "cpu", 2**80)),
    "offset out of range": tensor_pickle(offset=1),
    "offset out of range of nothing": tensor_pickle(offset=5, size=(0,)),
    "negative offset": tensor_pickle(offset=-1),
    "offset of text": tensor_pickle(offset="0"),
    "size out of range": tensor_pickle(size=(5,)),
    "negative size": tensor_pickle(size=(-4,)),
    "huge size": tensor_pickle(size=(2**62,)),
    "huge product": tensor_pickle(size=(2**40, 2**40), stride=(0, 0)),
    "huge expansion": tensor_pickle(size=(2**25,), stride=(0,)),
    "size of numbers with a point": tensor_pickle(size=(4.0,)),
    "size of booleans": tensor_pickle(size=(True,)),
    "size that is a list": tensor_pickle(size=[4]),
    "size that is missing": tensor_pickle(size=None),
    "too many dimensions": tensor_pickle(size=(1,) * 65, stride=(1,) * 65),
    "stride out of range": tensor_pickle(size=(2,), stride=(4,)),
    "negative stride": tensor_pickle(size=(2,), offset=3, stride=(-1,)),
    "huge stride": tensor_pickle(size=(2,), stride=(2**70,)),
    "fewer strides than sizes": tensor_pickle(size=(2, 2)),
    "tensor without a storage": tensor_pickle(storage=None),
    "tensor of a stub": tensor_pickle(storage=Calls(Named("os", "system"), "x")),
    "tensor of a tensor": tensor_pickle(storage=tensor()),
    "unknown metadata": tensor_pickle(0, (4,), (1,), STORAGE, {"neg": True}),
    "conjugate of metadata": tensor_pickle(0, (4,), (1,), STORAGE, Named("os", "system")),
    "too many arguments": tensor_pickle(0, (4,), (1,), STORAGE, None, 1),
    "too few arguments": pickled(Calls(Named("torch._utils", "_rebuild_tensor_v2"), STORAGE)),
    "tensor of no type": pickled(
        Calls(Named("torch._utils", "_rebuild_tensor_v3"), STORAGE, 0, (4,), (1,), False, 0, "x")
    ),
    "tensor of a wider type": pickled(
        Calls(
            *(Named("torch._utils", "_rebuild_tensor_v3"), STORAGE, 0, (4,), (1,), False, 0),
            Named("torch", "float64"),
        )
    ),
    "parameter of nothing": pickled(Calls(Named("torch._utils", "_rebuild_parameter"), 1, 1, 1)),
    "tensor by any function": pickled(
        Calls(Named("torch._tensor", "_rebuild_from_type_v2"), Named("os", "system"), 1, ("x",), 1)
    ),
    "tensor by itself": pickled(
        Calls(
            *(Named("torch._tensor", "_rebuild_from_type_v2"),),
            *(Named("torch._tensor", "_rebuild_from_type_v2"), 1, (1, 1, 1, 1), 1),
        )
    ),
    "size of text": pickled(Calls(Named("torch", "Size"), ("a",))),
    "set of a number": pickled(Calls(Named("builtins", "set"), 10**15)),
    "bytes of a number": pickled(Calls(Named("builtins", "bytes"), 10**15)),
    "bytes in another encoding": pickled(Calls(Named("_codecs", "encode"), "a", "rot13")),
    "bytes of no text": pickled(Calls(Named("_codecs", "encode"), 1, "latin1")),
    "bytes that are no bytes": pickled(Calls(Named("_codecs", "encode"), "中", "latin1")),
    "complex of text": pickled(Calls(Named("builtins", "complex"), "1", "2")),
    "ordered pairs of one": pickled(Calls(Named("collections", "OrderedDict"), [(1,)])),
    "ordered pairs with bad keys": pickled(Calls(Named("collections", "OrderedDict"), [([], 1)])),
}


@pytest.mark.parametrize("name", BAD_PICKLES)
def test_a_pickle_without_sense_is_one_line(tmp_path: Path, name: str) -> None:
    path = write_archive(tmp_path / "x.pt", BAD_PICKLES[name])
    reason = problem(path)
    assert reason.startswith("not a whole PyTorch archive (")
    for read in (load_weights, tensors_under):
        with pytest.raises(UserError, match=rf"^--checkpoint {path}: [^\n]+$"):
            read(path)


CALL = b"h\x00h\x01R"  # of the function in memo 0 with the arguments in memo 1
EXHAUSTING = {
    "many steps": b"N" + b"\x85" * 100_000 + b".",
    "deep tuple as a key": b"}N" + b"\x85" * 50_000 + b"K\x01s.",
    "tuple that doubles as a key": b"}N\x85" + b"q\x00h\x00\x86" * 60 + b"K\x01s.",
    "tuple that doubles as text": (
        b"c_codecs\nencode\nX\x00\x00\x00\x00N\x85" + b"q\x00h\x00\x86" * 60 + b"\x86R."
    ),
    "wide tuple as many keys": b"}(" + b"N" * 30_000 + b"tq\x00" + b"K\x01sh\x00" * 100 + b".",
    "many tuples as keys": pickled({(k,): None for k in range(10_001)}),
    "many copies of long text": (
        b"c_codecs\nencode\nq\x00"
        + pickled(("a" * 2**20, "latin1"))[2:-1]  # without its first and its last opcode
        + (b"q\x01" + CALL * 100 + b".")
    ),
    "many copies of a long list": (
        b"cbuiltins\nset\nq\x00](" + b"N" * 30_000 + b"e\x85q\x01" + CALL * 100 + b"."
    ),
}


@pytest.mark.parametrize("name", EXHAUSTING)
def test_a_pickle_cannot_take_all_time_or_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("common.pickles.MOST_STEPS", 100_000)
    problem(write_archive(tmp_path / "x.pt", EXHAUSTING[name]))


def test_deep_nesting_is_no_problem(tmp_path: Path) -> None:
    depth = 30_000
    tuples = b"N" + b"\x85" * depth + b"."
    lists = b"]" * depth + b"a" * (depth - 1) + b"."
    stubs = b"cos\nsystem\nq\x00" + b"h\x00)\x81" * depth + b"b" * depth + b"."
    for data, kind in ((tuples, tuple), (lists, list), (stubs, Stub)):
        path = write_archive(tmp_path / "x.pt", data)
        assert isinstance(read_archive(path), kind)


# Files that are no archives


def refused(path: Path, words: str) -> None:
    """Check that a file is refused by every function with a line that has these words."""
    assert words in problem(path)
    assert not is_torchscript(path)
    with pytest.raises(ArchiveError, match=str(path)):
        unknown_globals(path)
    with pytest.raises(UserError, match=rf"^--model {path}: [^\n]+$"):
        tensors_under(path, "--model")
    with pytest.raises(UserError, match=rf"^--checkpoint {path}: [^\n]+$"):
        load_weights(path)


def test_files_of_other_formats_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    for content in (b"", b"P", b"nothing", b"\x80\x02}q\x00.", bytes(1000)):
        path.write_bytes(content)
        refused(path, "not a zip file")
    for content in (b"PK", b"PK\x03\x04", b"PK\x05\x06" + bytes(18), b"PK" + bytes(1000)):
        path.write_bytes(content)
        refused(path, "")
    torch.save({"a": torch.ones(1)}, path, _use_new_zipfile_serialization=False)
    assert "save it again" in problem(path)
    assert same(load_weights(path)[0]["a"], torch.ones(1))  # torch.load knows the format

    path.unlink()
    path.mkdir()
    with pytest.raises(ArchiveError, match="cannot be read"):
        read_archive(path)
    for missing in (path, tmp_path / "none.pt"):
        with pytest.raises(UserError, match="no such file"):
            tensors_under(missing)


def test_files_without_tensors_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    for content in (1, [torch.ones(1)], {"a": 1}, {1: torch.ones(1)}, nn.Linear(1, 1)):
        save(content, path)
        with pytest.raises(UserError, match=rf"{path}: holds no dictionary of tensors"):
            tensors_under(path)
    safe = tmp_path / "x.safetensors"
    safe.write_bytes(b"12345678")
    with pytest.raises(UserError, match=str(safe)):
        tensors_under(safe)


def test_unusual_zip_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.pt"
    good = tensor_pickle()
    write_archive(path, good, compression=zipfile.ZIP_DEFLATED)
    refused(path, "is compressed")
    write_archive(path, good, more={"../data.pkl": good})
    assert read_archive(path).tolist() == [1, 2, 3, 4]
    write_archive(path, good, prefix="a/b")
    refused(path, "data.pkl")
    write_archive(path, good, storages={})
    refused(path, "'data/0' is missing")
    for order in (b"big", b"", b"little" * 100):
        write_archive(path, good, more={"byteorder": order})
        refused(path, "byte order")

    for name, words in (("archive/data/0", "twice"), ("other/data.pkl", "one data.pkl")):
        write_archive(path, good)
        with zipfile.ZipFile(path, "a") as file, warnings.catch_warnings(action="ignore"):
            file.writestr(name, bytes(16))
        refused(path, words)

    write_archive(path, good)
    monkeypatch.setattr("common.archives.LARGEST_PICKLE", len(good) - 1)
    assert "is larger than" in problem(path)
    assert list(tmp_path.iterdir()) == [path]


def test_members_that_overlap_or_lie_outside_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    write_archive(path, tensor_pickle(), storages={"0": bytes(16), "1": bytes(5000)})
    whole = path.read_bytes()
    # The directory's entry for data/0 starts 46 bytes before its name's second occurrence.
    entry = whole.rindex(b"archive/data/0") - 46
    for place, size in ((20, 5000), (20, 2**31), (42, 5000), (42, 2**31), (42, len(whole) - 8)):
        changed = bytearray(whole)
        struct.pack_into("<I", changed, entry + place, size)
        if place == 20:  # the size is there twice: as it is in the file, and uncompressed
            struct.pack_into("<I", changed, entry + 24, size)
        path.write_bytes(changed)
        refused(path, "")


def test_damage_is_found(tmp_path: Path) -> None:
    """300 files with a changed byte, or cut short, are read as they were or are refused."""
    path = tmp_path / "x.pt"
    content = {"state_dict": nn.Linear(3, 4).state_dict(), "numbers": [1, 2.5, "three"]}
    whole = save(content, path).read_bytes()
    expected = read_tensors(path)
    rng = random.Random(0)
    for k in range(300):
        damaged = bytearray(whole)
        place = rng.randrange(len(whole))
        if k % 3 == 0:
            del damaged[place:]
        else:
            damaged[place] ^= rng.randrange(1, 256)
        path.write_bytes(damaged)
        with contextlib.suppress(ArchiveError):
            read = read_tensors(path)
            assert read.keys() == expected.keys()
            for name, value in read.items():
                assert same(value, expected[name])


def test_any_pickle_is_read_or_refused(tmp_path: Path) -> None:
    """300 damaged pickles in archives whose checksums are right."""
    path = save({"state_dict": nn.Linear(3, 4).state_dict(), "a": {1}}, tmp_path / "good.pt")
    with zipfile.ZipFile(path) as file:
        whole = file.read("good/data.pkl")
    rng = random.Random(1)
    refusals = 0
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(rng.randrange(1, 4)):
            damaged[rng.randrange(len(whole))] = rng.randrange(256)
        storages = {str(k): bytes(48) for k in range(2)}
        write_archive(tmp_path / "x.pt", bytes(damaged), storages)
        try:
            read_archive(tmp_path / "x.pt")
        except ArchiveError:
            refusals += 1
    assert 100 < refusals < 300
