"""Pickles read without running anything.

A pickle is a program for a small stack machine. Python's own machine imports every class and
function that the program names and calls them, so that a hostile file can run any code. The machine
here (`InertUnpickler`) has the same stack, but it imports nothing. It makes plain data, and what a
short list of known functions makes. In the place of everything else it puts a `Stub`.

The opcodes and what they do are described in Python's module `pickletools`.
"""

from __future__ import annotations

import pickle
import pickletools
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from typing import Any

# Limits. Real checkpoints stay far below them; a hostile one can fill neither time nor memory.
MOST_STEPS = 2_000_000
MOST_TUPLE_KEYS = 10_000
MOST_BITS_OF_A_KEY = 60  # larger numbers can have equal hashes, which makes a dictionary slow
STEPS_OF_A_CALL = 10
CHARACTERS_OF_A_STEP = 16

# Opcodes whose argument is the value itself.
LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING"),
    *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}


class PickleError(ValueError):
    """A pickle that is damaged, or that no honest program writes. The message is one phrase."""


class Stub:
    """Stands for a class, a function or an object that is not made.

    `name` is the full name of the class or function. `state` is what the pickle would have stored
    in the object: its attributes, as a rule. Items of an unknown kind of list or dictionary are
    dropped.
    """

    __slots__ = ("name", "state")

    def __init__(self, name: str) -> None:
        self.name = name
        self.state: Any = None

    def __repr__(self) -> str:
        return f"Stub({self.name!r})"


class InertUnpickler:
    """A machine that reads one pickle.

    `functions` maps names to functions that may be called; they must check their arguments.
    `values` maps names to what stands for them. `load_persistent` gets the references that the
    pickle makes to data outside it.
    """

    def __init__(
        self,
        functions: Mapping[str, Callable[..., Any]],
        values: Mapping[str, Any],
        load_persistent: Callable[[Any], Any],
    ) -> None:
        self.functions = functions
        self.values = values
        self.load_persistent = load_persistent
        self.unknown: set[str] = set()  # names of classes and functions that became stubs
        self.stack: list[Any] = []
        self.outer: list[list[Any]] = []  # the stacks below each mark
        self.memo: dict[int, Any] = {}
        self.steps = 0
        self.tuple_keys = 0

    def load(self, data: bytes) -> Any:
        """Run the program and return what it leaves on the stack.

        Raises ValueError for a pickle that is cut short, and PickleError, LookupError, TypeError
        or RecursionError for one that makes no sense.
        """
        for opcode, argument, position in pickletools.genops(data):
            self.spend(1)
            if opcode.name in LITERALS:
                self.push(argument)
            elif opcode.name in CONSTANTS:
                self.push(CONSTANTS[opcode.name])
            elif opcode.name in OPERATIONS:
                OPERATIONS[opcode.name](self, argument)
            elif opcode.name == "FRAME":
                rest = len(data) - (position or 0)
                if int(argument or 0) > rest:
                    raise PickleError("its pickle is cut short")
            elif opcode.name != "STOP":
                raise PickleError(f"its pickle uses {opcode.name}, which no checkpoint needs")
        return self.pop()

    # Limits

    def spend(self, steps: int) -> None:
        """Count steps; too many are a PickleError."""
        self.steps += steps
        if self.steps > MOST_STEPS:
            raise PickleError(f"its pickle takes more than {MOST_STEPS:,} steps")

    def check_key(self, key: Any) -> None:
        """Raise PickleError for a key of a dictionary, or an element of a set, that is not plain.

        Python hashes a tuple by hashing all that is in it. A tuple nested a million times would
        overflow the stack of the C code that does this.
        """
        if isinstance(key, tuple | frozenset):
            self.spend(len(key))
            self.tuple_keys += 1
            if self.tuple_keys > MOST_TUPLE_KEYS:
                raise PickleError(f"its pickle has more than {MOST_TUPLE_KEYS:,} tuples as keys")
            for part in key:
                self.check_key(part)
        elif isinstance(key, int):
            if key.bit_length() > MOST_BITS_OF_A_KEY:
                raise PickleError("its pickle has a very large number as a key")
        elif not isinstance(key, str | bytes | float | None) and not has_identity_hash(key):
            raise PickleError(f"its pickle has a {type(key).__name__} as a key")

    # The stack. The method for the opcode NAME is called _op_name.

    def push(self, value: Any) -> None:
        """Put a value on the stack."""
        self.stack.append(value)

    def pop(self) -> Any:
        """Take the topmost value from the stack."""
        if not self.stack:
            raise PickleError("its pickle takes more from the stack than is there")
        return self.stack.pop()

    def top(self) -> Any:
        """The topmost value, which stays on the stack."""
        value = self.pop()
        self.push(value)
        return value

    def pop_several(self, count: int) -> list[Any]:
        """Take some values, in the order in which they were put on the stack."""
        values = [self.pop() for _ in range(count)]
        values.reverse()
        return values

    def pop_to_mark(self) -> list[Any]:
        """Take all values above the last mark, and the mark."""
        if not self.outer:
            raise PickleError("its pickle goes back to a mark that is not there")
        values = self.stack
        self.stack = self.outer.pop()
        return values

    def _op_mark(self, _: None) -> None:
        self.outer.append(self.stack)
        self.stack = []

    def _op_pop(self, _: None) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.pop_to_mark()

    def _op_pop_mark(self, _: None) -> None:
        self.pop_to_mark()

    def _op_dup(self, _: None) -> None:
        self.push(self.top())

    def _op_proto(self, version: int) -> None:
        if version > pickle.HIGHEST_PROTOCOL:
            raise PickleError(f"its pickle has the unknown protocol {version}")

    # The memo, where a pickle keeps what it uses again

    def _op_put(self, index: int) -> None:
        self.memo[index] = self.top()

    _op_binput = _op_put
    _op_long_binput = _op_put

    def _op_memoize(self, _: None) -> None:
        self.memo[len(self.memo)] = self.top()

    def _op_get(self, index: int) -> None:
        if index not in self.memo:
            raise PickleError("its pickle uses a value that it has not made")
        self.push(self.memo[index])

    _op_binget = _op_get
    _op_long_binget = _op_get

    # Containers

    def _op_empty_list(self, _: None) -> None:
        self.push([])

    def _op_list(self, _: None) -> None:
        self.push(self.pop_to_mark())

    def _op_append(self, _: None) -> None:
        self.extend([self.pop()])

    def _op_appends(self, _: None) -> None:
        self.extend(self.pop_to_mark())

    def extend(self, items: list[Any]) -> None:
        """Add items to the list on top of the stack."""
        target = self.top()
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, Stub):
            raise PickleError("its pickle appends to something that is not a list")

    def _op_empty_tuple(self, _: None) -> None:
        self.push(())

    def _op_tuple1(self, _: None) -> None:
        self.push(tuple(self.pop_several(1)))

    def _op_tuple2(self, _: None) -> None:
        self.push(tuple(self.pop_several(2)))

    def _op_tuple3(self, _: None) -> None:
        self.push(tuple(self.pop_several(3)))

    def _op_tuple(self, _: None) -> None:
        self.push(tuple(self.pop_to_mark()))

    def _op_empty_dict(self, _: None) -> None:
        self.push({})

    def _op_dict(self, _: None) -> None:
        items = self.pop_to_mark()
        self.push({})
        self.set_items(items)

    def _op_setitem(self, _: None) -> None:
        self.set_items(self.pop_several(2))

    def _op_setitems(self, _: None) -> None:
        self.set_items(self.pop_to_mark())

    def set_items(self, items: list[Any]) -> None:
        """Add keys and values, which alternate, to the dictionary on top of the stack."""
        target = self.top()
        if isinstance(target, Stub):
            return
        if not isinstance(target, dict):
            raise PickleError("its pickle sets items of something that is not a dictionary")
        for key, value in zip(items[0::2], items[1::2], strict=True):
            self.check_key(key)
            target[key] = value

    def _op_empty_set(self, _: None) -> None:
        self.push(set())

    def _op_additems(self, _: None) -> None:
        items = self.pop_to_mark()
        target = self.top()
        if isinstance(target, set):
            target |= make_set(self, items)
        elif not isinstance(target, Stub):
            raise PickleError("its pickle adds to something that is not a set")

    def _op_frozenset(self, _: None) -> None:
        self.push(make_frozenset(self, self.pop_to_mark()))

    # Classes, functions and objects

    def find(self, name: str) -> Any:
        """What stands for the class or function of this name."""
        if name.startswith("__builtin__."):  # Python 2, and protocol 2
            name = name.replace("__builtin__", "builtins", 1)
        if name in self.values:
            return self.values[name]
        if name not in self.functions and name not in PLAIN_FUNCTIONS:
            self.unknown.add(name)
        return Stub(name)

    def call(self, function: Any, arguments: Any) -> Any:
        """Call a known function. Any other is not called: a stub stands for what it returns."""
        if not isinstance(function, Stub) or not isinstance(arguments, tuple):
            raise PickleError("its pickle calls something that is not a function")
        self.spend(steps_of_call(arguments))
        if function.name in self.functions:
            return self.functions[function.name](*arguments)
        if function.name in PLAIN_FUNCTIONS:
            return PLAIN_FUNCTIONS[function.name](self, *arguments)
        return Stub(function.name)

    def _op_global(self, names: str) -> None:
        module_and_name = names.replace(" ", ".", 1)
        self.push(self.find(module_and_name))

    def _op_stack_global(self, _: None) -> None:
        module, name = self.pop_several(2)
        if not isinstance(module, str) or not isinstance(name, str):
            raise PickleError("its pickle names a class with something that is not text")
        self.push(self.find(f"{module}.{name}"))

    def _op_reduce(self, _: None) -> None:
        function, arguments = self.pop_several(2)
        self.push(self.call(function, arguments))

    _op_newobj = _op_reduce

    def _op_newobj_ex(self, _: None) -> None:
        function, arguments, _keywords = self.pop_several(3)
        self.push(self.call(function, arguments))

    def _op_inst(self, names: str) -> None:
        arguments = tuple(self.pop_to_mark())
        function = self.find(names.replace(" ", ".", 1))
        self.push(self.call(function, arguments))

    def _op_obj(self, _: None) -> None:
        function, *arguments = self.pop_to_mark()
        self.push(self.call(function, tuple(arguments)))

    def _op_build(self, _: None) -> None:
        state = self.pop()
        target = self.top()
        if isinstance(target, Stub):
            target.state = state

    def _op_binpersid(self, _: None) -> None:
        self.push(self.load_persistent(self.pop()))


OPERATIONS: dict[str, Callable[[InertUnpickler, Any], None]] = {
    name.removeprefix("_op_").upper(): method
    for name, method in vars(InertUnpickler).items()
    if name.startswith("_op_")
}


def has_identity_hash(value: Any) -> bool:
    """Whether a value is hashed by what it is, not by what is in it: a stub, for example."""
    return type(value).__hash__ is object.__hash__


def steps_of_call(arguments: tuple[Any, ...]) -> int:
    """How many steps a call costs. A short program could otherwise copy a long value many times."""
    steps = STEPS_OF_A_CALL
    for argument in arguments:
        if isinstance(argument, str | bytes):
            steps += len(argument) // CHARACTERS_OF_A_STEP
        elif isinstance(argument, list | tuple | dict | set | frozenset):
            steps += len(argument)
    return steps


# Plain values for which a pickle calls a function, most of them in the protocol 2 of torch.save.


def make_set(machine: InertUnpickler, items: Collection[Any] = ()) -> set[Any]:
    """A set of plain elements."""
    for item in items:
        machine.check_key(item)
    return set(items)


def make_frozenset(machine: InertUnpickler, items: Collection[Any] = ()) -> frozenset[Any]:
    """A frozen set of plain elements."""
    return frozenset(make_set(machine, items))


def make_ordered_dict(
    machine: InertUnpickler, pairs: Collection[Any] = ()
) -> OrderedDict[Any, Any]:
    """An ordered dictionary of (key, value) pairs. Its attributes are not kept."""
    made = OrderedDict()
    for key, value in pairs:
        machine.check_key(key)
        made[key] = value
    return made


def make_empty_bytes(_: InertUnpickler) -> bytes:
    """The value of bytes()."""
    return b""


def make_bytes(_: InertUnpickler, text: str, encoding: str) -> bytes:
    """Bytes, which are written as the characters of the same numbers."""
    if encoding not in ("latin1", "latin-1"):
        raise PickleError("its pickle has bytes in an unusual encoding")
    return text.encode("latin1")


def make_complex(_: InertUnpickler, real: float, imaginary: float) -> complex:
    """A complex number."""
    return complex(real, imaginary)


PLAIN_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "builtins.bytes": make_empty_bytes,
    "builtins.complex": make_complex,
    "builtins.frozenset": make_frozenset,
    "builtins.set": make_set,
    "_codecs.encode": make_bytes,
    "collections.OrderedDict": make_ordered_dict,
}
