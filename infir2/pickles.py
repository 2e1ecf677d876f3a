"""Reading a pickle as a description: nothing that it names is looked up, called or changed.

`pickle.load` runs what a pickle names. An allow-list of classes is not enough: the opcode BUILD
sets the attributes of any admitted object or class. Here an object is only a `Record` of what the
pickle says about it, and the caller builds what it needs from validated values.

The opcodes are those that Python writes in protocols 2 to 5 for plain values and objects. Any other
opcode is refused, and so is any name that the caller does not expect, because such a file was made
to attack a reader.
"""

import pickletools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from infir2.errors import first_line

MAX_BYTES = 2**28
MAX_OPCODES = 2**23  # about 250,000 pieces of tensors; bounds memory to about 1 GB
MAX_INTEGER_BITS = 256
# Python hashes an integer modulo 2**61 - 1; larger keys could be chosen to collide.
MAX_INTEGER_KEY = 2**60
_GETATTR = "builtins.getattr"  # how Python 3.11.0 to 3.11.3 write a member of an enum


@dataclass(eq=False, slots=True)
class Record:
    """What a pickle says about an object.

    Example: `Record("torch.Size", args=((2, 3),))`.

    Attributes:
        name: module and name of the class or function; "" for a persistent id.
        args: what it is called with; None for the class or function itself.
        state: what sets its attributes, a dict for most classes.
    """

    name: str
    args: tuple[Any, ...] | None = None
    state: Any = None


def read_pickle(data: bytes, is_expected: Callable[[str], bool] = lambda name: False) -> Any:
    """The value that a pickle describes, of None, bool, int, float, str, bytes and containers.

    Sets are returned as lists. The items of objects other than `collections.OrderedDict` are
    dropped. The result may contain itself.

    Args:
        data: the pickle; bytes after its end are ignored.
        is_expected: whether the file may refer to a name such as "torch.Size".

    Raises:
        ValueError: it is damaged, too large, or asks for something unexpected. The text continues
            a sentence: "asks for 'os.system', which no such file needs".
    """
    if len(data) > MAX_BYTES:
        raise ValueError(f"has more than {MAX_BYTES:,} bytes")
    machine = _Machine(is_expected)
    try:
        for number, (name, argument) in enumerate(_operations(data)):
            if number >= MAX_OPCODES:
                raise ValueError(f"has more than {MAX_OPCODES:,} operations")
            machine.run(name, argument)
        return machine.stack.pop()
    except (IndexError, KeyError) as error:
        raise ValueError("has operations that do not fit together") from error


def _operations(data: bytes) -> Iterator[tuple[str, Any]]:
    """Yield (name, argument) of each operation; no length in it allocates more than `data`."""
    try:
        for opcode, argument, _ in pickletools.genops(data):
            yield opcode.name, argument
    except ValueError as error:
        raise ValueError(f"is not a readable pickle ({first_line(error)})") from error


def is_record(value: object, name: str) -> bool:
    """Whether `value` is an object of the class, or a result of the function, called `name`."""
    return isinstance(value, Record) and value.name == name and value.args is not None


def _member(args: tuple[Any, ...]) -> tuple[Record, tuple[Any, ...]]:
    """(class, (name,)) of a member of an enum, which is not looked up."""
    match args:
        case (Record(args=None) as owner, str(name)) if owner.name != _GETATTR:
            return owner, (name,)
    raise ValueError("asks for an attribute of something that is no class")


class _OrderedDict(dict[Any, Any]):
    """A `collections.OrderedDict`; its attributes, such as torch's `_metadata`, are dropped."""


class _Machine:
    """The stack, the marks and the memo of pickle's virtual machine."""

    def __init__(self, is_expected: Callable[[str], bool]) -> None:
        self._is_expected = is_expected
        self._below_marks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        self.stack: list[Any] = []

    def run(self, name: str, argument: Any) -> None:
        if name not in _OPERATIONS:
            raise ValueError(f"uses the operation {name}, which no such file needs")
        _OPERATIONS[name](self, argument)

    def skip(self, _: Any) -> None:
        """PROTO and FRAME say nothing that is needed, and `read_pickle` ends after STOP."""

    def push(self, value: Any) -> None:
        if isinstance(value, int) and value.bit_length() > MAX_INTEGER_BITS:
            raise ValueError(f"has an integer of {value.bit_length():,} bits")
        self.stack.append(value)

    def push_true(self, _: None) -> None:
        self.stack.append(True)

    def push_false(self, _: None) -> None:
        self.stack.append(False)

    def push_list(self, _: None) -> None:
        self.stack.append([])

    def push_dict(self, _: None) -> None:
        self.stack.append({})

    def push_tuple(self, _: None) -> None:
        self.stack.append(())

    def mark(self, _: None) -> None:
        self._below_marks.append(self.stack)
        self.stack = []

    def _pop_to_mark(self) -> list[Any]:
        items, self.stack = self.stack, self._below_marks.pop()
        return items

    def _pop(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise IndexError
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def put(self, index: int | None) -> None:
        self._memo[len(self._memo) if index is None else index] = self.stack[-1]

    def get(self, index: int) -> None:
        self.stack.append(self._memo[index])

    def marked_tuple(self, _: None) -> None:
        items = self._pop_to_mark()
        self.stack.append(tuple(items))

    def tuple1(self, _: None) -> None:
        self.stack.append(tuple(self._pop(1)))

    def tuple2(self, _: None) -> None:
        self.stack.append(tuple(self._pop(2)))

    def tuple3(self, _: None) -> None:
        self.stack.append(tuple(self._pop(3)))

    def append(self, _: None) -> None:
        self._extend(self._pop(1))

    def append_all(self, _: None) -> None:
        self._extend(self._pop_to_mark())

    def _extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, Record):
            raise ValueError("appends to something that is no list")

    def set_item(self, _: None) -> None:
        self._update(self._pop(2))

    def set_items(self, _: None) -> None:
        self._update(self._pop_to_mark())

    def _update(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, dict):
            for key, value in zip(items[::2], items[1::2], strict=True):
                target[_checked_key(key)] = value
        elif not isinstance(target, Record):
            raise ValueError("sets items of something that is no dictionary")

    def named(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self._push_name(module, name)

    def named_on_stack(self, _: None) -> None:
        self._push_name(*self._pop(2))

    def _push_name(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("has a name that is not text")
        full_name = f"{module}.{name}"
        if not self._is_expected(full_name) and full_name != _GETATTR:
            raise ValueError(f"asks for {full_name[:200]!r}, which no such file needs")
        self.stack.append(Record(full_name))

    def call(self, _: None) -> None:
        function, args = self._pop(2)
        if not isinstance(function, Record) or function.args is not None:
            raise ValueError("calls something that is no class or function")
        if not isinstance(args, tuple):
            raise ValueError("calls with something that is no tuple")
        if function.name == _GETATTR:
            function, args = _member(args)
        if function.name == "collections.OrderedDict":
            self.stack.append(_OrderedDict())
        else:
            self.stack.append(Record(function.name, args))

    def build(self, _: None) -> None:
        target, state = self._pop(2)
        if isinstance(target, Record) and target.args is not None:
            target.state = state
        elif not isinstance(target, _OrderedDict):
            raise ValueError("sets attributes of something that is no object")
        self.stack.append(target)

    def persistent_id(self, _: None) -> None:
        self.stack.append(Record("", tuple(self._pop(1))))


def _checked_key(key: Any) -> Any:
    """`key` if it hashes fast and without recursion, which a nested tuple may not."""
    for part in key if isinstance(key, tuple) else (key,):
        if isinstance(part, list | dict | tuple | bytearray):
            raise ValueError("has a key that is neither a number nor text")
        if isinstance(part, int) and abs(part) >= MAX_INTEGER_KEY:
            raise ValueError("has too large an integer as a key")
    return key


_VALUES = (
    *("NONE", "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"),
    *("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("SHORT_BINBYTES", "BINBYTES", "BINBYTES8"),
)
_OPERATIONS: dict[str, Callable[[_Machine, Any], None]] = {
    **dict.fromkeys(_VALUES, _Machine.push),
    **dict.fromkeys(("PROTO", "FRAME", "STOP"), _Machine.skip),
    "NEWTRUE": _Machine.push_true,
    "NEWFALSE": _Machine.push_false,
    "EMPTY_LIST": _Machine.push_list,
    "EMPTY_SET": _Machine.push_list,
    "EMPTY_DICT": _Machine.push_dict,
    "EMPTY_TUPLE": _Machine.push_tuple,
    "MARK": _Machine.mark,
    "MEMOIZE": _Machine.put,
    "BINPUT": _Machine.put,
    "LONG_BINPUT": _Machine.put,
    "BINGET": _Machine.get,
    "LONG_BINGET": _Machine.get,
    "TUPLE": _Machine.marked_tuple,
    "TUPLE1": _Machine.tuple1,
    "TUPLE2": _Machine.tuple2,
    "TUPLE3": _Machine.tuple3,
    "FROZENSET": _Machine.marked_tuple,
    "APPEND": _Machine.append,
    "APPENDS": _Machine.append_all,
    "ADDITEMS": _Machine.append_all,
    "SETITEM": _Machine.set_item,
    "SETITEMS": _Machine.set_items,
    "GLOBAL": _Machine.named,
    "STACK_GLOBAL": _Machine.named_on_stack,
    "REDUCE": _Machine.call,
    "NEWOBJ": _Machine.call,
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.persistent_id,
}
