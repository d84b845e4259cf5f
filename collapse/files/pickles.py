"""Pickles as data: a reader of its own for the pickle protocols 0 to 5, which never imports, calls or builds a class.

A pickle is a program. This machine knows only data: numbers, text, bytes, lists, tuples and dicts, and the few names
that `known` gives it, each bound to a function of the caller. Every other class or function becomes a `Stub`, which
keeps its name and the state that the file gives it. Sets and frozensets become lists.
"""

import gc
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import IO, Any

from collapse import InputError
from collapse.files import limits


class Stub:
    """An inert stand-in for a class, a function or an instance that a file names.

    Attributes:
        name: "module.name".
        state: what the file sets on an instance, by attribute or by item.
        mapping: whether items were set, as on a subclass of dict.
    """

    __slots__ = ("mapping", "name", "state")

    def __init__(self, name: str) -> None:
        self.name, self.mapping = name, False
        self.state: dict[Any, Any] = {}


class Leaf:
    """A name of `known` on the stack: a function that is only called by the opcodes that call."""

    __slots__ = ("act", "name")

    def __init__(self, name: str, act: Callable[..., Any]) -> None:
        self.name, self.act = name, act


def unpickle(
    file: IO[bytes],
    size: int,
    known: Mapping[str, Callable[..., Any]],
    values: Mapping[str, Any],
    foreign: set[str],
    persistent: Callable[[Any], Any] | None = None,
) -> Any:
    """What one pickle holds; `file` is left behind its last byte.

    Args:
        file: positioned at the pickle's first byte.
        size: bytes of the file; no string in the pickle may be longer.
        known: functions by "module.name"; each gets the arguments that the file gives. What they return may have
            `setstate`, which then gets its state.
        values: what "module.name" stands for where it is not called, such as a dtype.
        foreign: gets every other "module.name" in the file.
        persistent: gets each persistent id and returns what it stands for; None refuses them.

    Raises:
        InputError: damaged, over `limits.OPCODES` steps, or an opcode that data has no use for.
    """
    machine = _Machine(file, size, known, values, foreign, persistent)
    try:
        with uncollected():
            return machine.run()
    except (IndexError, KeyError, TypeError, ValueError, AttributeError, struct.error, OverflowError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError("a damaged pickle") from error


@contextmanager
def uncollected() -> Iterator[None]:
    """Without looking for garbage: where many objects are made and none is, that takes most of the time."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


class _Machine:
    """The stack, the marks below it, the memo, and a method for each opcode."""

    def __init__(
        self, file: IO[bytes], size: int, known: Any, values: Mapping[str, Any], foreign: set[str], persistent: Any
    ) -> None:
        self.file, self.size, self.foreign = file, size, foreign
        self.persistent, self.values = persistent, values
        self.known = {**self.containers(), **known}
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.copies = size

    def containers(self) -> dict[str, Callable[..., Any]]:
        """Python's own containers by name, each as data; its types of numbers and text are never called for."""
        makers: dict[str, Callable[..., Any]] = {
            "collections.OrderedDict": self.mapping,
            "collections.Counter": self.mapping,
            "collections.defaultdict": lambda *_: {},
            "_codecs.encode": self.encode,
        }
        for module in ("builtins", "__builtin__"):
            makers |= {f"{module}.{kind}": lambda *_: Stub("number") for kind in ("int", "float", "str", "bool")}
            makers |= {f"{module}.{kind}": self.sequence for kind in ("list", "tuple", "set", "frozenset")}
            makers |= {f"{module}.{kind}": self.octets for kind in ("bytes", "bytearray")}
            makers |= {f"{module}.dict": self.mapping, f"{module}.complex": lambda *_: Stub("complex")}
        return makers

    def run(self) -> Any:
        """Follow opcodes until STOP; the value on top."""
        read, table = self.file.read, _TABLE
        for _ in range(limits.OPCODES):
            code = read(1)
            act = table.get(code)
            if act is not None:
                act(self)
            elif code == b".":
                return self.stack.pop()
            else:
                raise InputError("a truncated pickle" if not code else f"a pickle with the opcode {code!r}; refused")
        raise InputError(f"a pickle of over {limits.OPCODES} steps; refused")

    def copy(self, count: int) -> None:
        """Count what is copied: each part once, so that a few bytes cannot ask for the same again and again."""
        self.copies -= count
        if self.copies < 0:
            raise InputError("a pickle that copies the same parts again and again; refused")

    def mapping(self, items: Any = ()) -> dict[Any, Any]:
        """A dict of another dict, or of a list of pairs."""
        made: dict[Any, Any] = {}
        pairs = list(items.items()) if isinstance(items, dict) else items
        self.copy(len(pairs))
        for pair in pairs:
            if len(pair) != 2:
                raise InputError("a damaged pickle: a dict of no pairs")
            self.set_items(made, list(pair))
        return made

    def sequence(self, items: Any = ()) -> Any:
        """The list or tuple that a container is made of."""
        return items if isinstance(items, (list, tuple)) else []

    def octets(self, value: Any = b"", encoding: str = "latin1") -> bytes:
        """The bytes that bytes or a bytearray are made of."""
        return value if isinstance(value, bytes) else self.encode(value, encoding)

    def encode(self, text: str, encoding: str = "latin1") -> bytes:
        """Bytes as protocol 2 has them: text whose characters are the bytes."""
        if encoding not in ("latin1", "latin-1"):
            raise InputError("a pickle that encodes text otherwise than as bytes; refused")
        self.copy(len(text))
        return text.encode("latin-1")

    def take(self, size: int) -> bytes:
        """The next `size` bytes."""
        if size < 0 or size > self.size:
            raise InputError(f"a pickle that declares {size} bytes in a file of {self.size}; refused")
        data = self.file.read(size)
        if len(data) != size:
            raise InputError("a truncated pickle")
        return data

    def number(self, form: struct.Struct) -> Any:
        """The next packed number."""
        return form.unpack(self.take(form.size))[0]

    def unsigned(self, size: int) -> int:
        """The next number of `size` bytes, lowest first; at the end of the file, what is there of it."""
        return int.from_bytes(self.file.read(size), "little")

    def line(self) -> bytes:
        """The rest of a line, as the text opcodes have it."""
        text = self.file.readline(1 << 16)
        if not text.endswith(b"\n"):
            raise InputError("a truncated pickle")
        return text[:-1]

    def above_mark(self) -> list[Any]:
        """What lies above the last mark."""
        items, self.stack = self.stack, self.marks.pop()
        return items

    def integer(self, text: bytes) -> int:
        """A decimal number, of as many digits as a number may have bytes."""
        text = text.strip().removesuffix(b"L")
        if len(text) > 2 * limits.INTEGER:
            raise InputError(f"a pickle with a number of {len(text)} digits; refused")
        return int(text)

    def long(self, size: int) -> int:
        """A two's complement number of `size` bytes."""
        if size > limits.INTEGER:
            raise InputError(f"a pickle with a number of {size} bytes; refused")
        return int.from_bytes(self.take(size), "little", signed=True)

    def named(self, module: Any, name: Any) -> Any:
        """What stands for a class or function."""
        if not (isinstance(module, str) and isinstance(name, str)):
            raise InputError("a pickle in which a name is no text; refused")
        full = f"{module}.{name}"
        if full in self.values:
            return self.values[full]
        if full in self.known:
            return Leaf(full, self.known[full])
        self.foreign.add(full)
        return Stub(full)

    def call(self, target: Any, arguments: Any) -> Any:
        """What a call of `target` gives; a stub gives a new stub of its name, or of that of a class it rebuilds."""
        if isinstance(target, Leaf):
            return target.act(*arguments)
        if not isinstance(target, Stub):
            raise InputError(f"a pickle that calls {type(target).__name__}; refused")
        first = arguments[0] if isinstance(arguments, tuple) and arguments else None
        return Stub(first.name if target.name in _REBUILDERS and isinstance(first, Stub) else target.name)

    def set_items(self, target: Any, items: list[Any]) -> None:
        """Set key, value, key, value, ... on a dict, or on a stub of a class like one."""
        if isinstance(target, Stub):
            target.mapping, target = True, target.state
        if not isinstance(target, dict) or len(items) % 2:
            raise InputError("a pickle that sets items on what has none; refused")
        for index in range(0, len(items), 2):
            target[self.key(items[index])] = items[index + 1]

    def key(self, key: Any) -> Any:
        """A key of a dict, as it is where its hash is cheap and safe; a stub in place of all others."""
        if isinstance(key, tuple):
            return key if len(key) <= 16 and all(_plain(part) for part in key) else Stub("key")
        return key if _plain(key) or isinstance(key, Stub) else Stub("key")

    def add_items(self, target: Any, items: list[Any]) -> None:
        """Append to a list; what a stub of a class like one gets is left out."""
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, Stub):
            raise InputError("a pickle that appends to what is no list; refused")

    def build(self, state: Any) -> None:
        """Give a stub its state: a dict, or a dict and the slots. What others get (metadata of torch) is left out."""
        target = self.stack[-1]
        if hasattr(target, "setstate"):
            target.setstate(state)
        if not isinstance(target, Stub):
            return
        for part in state if isinstance(state, tuple) else (state,):
            if isinstance(part, dict):
                self.copy(len(part))
                target.state.update((name, value) for name, value in part.items() if isinstance(name, str))

    def persist(self, key: Any) -> Any:
        """What a persistent id stands for."""
        if self.persistent is None:
            raise InputError("a pickle that refers to data outside of it; refused")
        return self.persistent(key)


def _plain(key: Any) -> bool:
    """Whether a key is text, bytes, None, a truth value, a float, or an integer whose hash is itself."""
    return key is None or isinstance(key, (str, bytes, bool, float)) or (isinstance(key, int) and abs(key) < 1 << 60)


_REBUILDERS = ("copy_reg._reconstructor", "copyreg._reconstructor", "copyreg.__newobj__", "copyreg.__newobj_ex__")
_I4, _F8 = struct.Struct("<i"), struct.Struct(">d")


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogatepass")


def _text2(data: bytes) -> str | bytes:
    """Text of Python 2, which is bytes too: text if it is ASCII."""
    return data.decode() if data.isascii() else data


def _quoted(line: bytes) -> str | bytes:
    from codecs import escape_decode

    if len(line) < 2 or line[:1] != line[-1:] or line[:1] not in (b"'", b'"'):
        raise InputError("a damaged pickle: text without quotes")
    return _text2(escape_decode(line[1:-1])[0])


def _protocol(m: _Machine) -> None:
    if (version := m.take(1)[0]) > 5:
        raise InputError(f"a pickle of protocol {version}; up to 5 is read")


def _int(m: _Machine) -> None:
    line = m.line()
    m.stack.append({b"00": False, b"01": True}[line] if line in (b"00", b"01") else m.integer(line))


def _push(value: Callable[[_Machine], Any]) -> Callable[[_Machine], None]:
    def act(m: _Machine) -> None:
        made = value(m)  # may exchange the stack
        m.stack.append(made)

    return act


def _mark(m: _Machine) -> None:
    m.marks.append(m.stack)
    m.stack = []


def _last(count: int) -> Callable[[_Machine], None]:
    def act(m: _Machine) -> None:
        items = tuple(m.stack[-count:])
        if len(items) != count:
            raise InputError("a damaged pickle")
        m.stack[-count:] = [items]

    return act


def _dict(m: _Machine) -> None:
    items, made = m.above_mark(), dict[Any, Any]()
    m.set_items(made, items)
    m.stack.append(made)


def _set_item(m: _Machine) -> None:
    value, key = m.stack.pop(), m.stack.pop()
    m.set_items(m.stack[-1], [key, value])


def _set_items(m: _Machine) -> None:
    items = m.above_mark()
    m.set_items(m.stack[-1], items)


def _append(m: _Machine) -> None:
    item = m.stack.pop()
    m.add_items(m.stack[-1], [item])


def _appends(m: _Machine) -> None:
    items = m.above_mark()
    m.add_items(m.stack[-1], items)


def _reduce(m: _Machine) -> None:
    arguments, target = m.stack.pop(), m.stack.pop()
    m.stack.append(m.call(target, arguments))


def _newobj_ex(m: _Machine) -> None:
    _, arguments, target = m.stack.pop(), m.stack.pop(), m.stack.pop()
    m.stack.append(m.call(target, arguments))


def _inst(m: _Machine) -> None:
    module, name = _text(m.line()), _text(m.line())
    m.stack.append(m.call(m.named(module, name), tuple(m.above_mark())))


def _obj(m: _Machine) -> None:
    target, *arguments = m.above_mark()
    m.stack.append(m.call(target, tuple(arguments)))


def _stack_global(m: _Machine) -> None:
    name, module = m.stack.pop(), m.stack.pop()
    m.stack.append(m.named(module, name))


def _put(place: Callable[[_Machine], int]) -> Callable[[_Machine], None]:
    def act(m: _Machine) -> None:
        m.memo[place(m)] = m.stack[-1]

    return act


def _memoize(m: _Machine) -> None:
    m.memo[len(m.memo)] = m.stack[-1]


_TABLE: dict[bytes, Callable[[_Machine], Any]] = {
    b"\x80": _protocol,
    b"\x95": lambda m: m.take(8),  # a frame, which only helps to read in pieces
    b"(": _mark,
    b"0": lambda m: m.stack.pop() if m.stack else m.above_mark(),
    b"1": lambda m: m.above_mark(),
    b"2": lambda m: m.stack.append(m.stack[-1]),
    b"F": _push(lambda m: float(m.line()[:400])),
    b"G": _push(lambda m: m.number(_F8)),
    b"I": _int,
    b"J": _push(lambda m: m.number(_I4)),
    b"K": lambda m: m.stack.append(m.unsigned(1)),
    b"M": lambda m: m.stack.append(m.unsigned(2)),
    b"L": _push(lambda m: m.integer(m.line())),
    b"\x8a": _push(lambda m: m.long(m.unsigned(1))),
    b"\x8b": _push(lambda m: m.long(m.unsigned(4))),
    b"N": lambda m: m.stack.append(None),
    b"\x88": lambda m: m.stack.append(True),
    b"\x89": lambda m: m.stack.append(False),
    b"S": _push(lambda m: _quoted(m.line())),
    b"T": _push(lambda m: _text2(m.take(m.unsigned(4)))),
    b"U": _push(lambda m: _text2(m.take(m.unsigned(1)))),
    b"V": _push(lambda m: m.line().decode("raw-unicode-escape")),
    b"X": _push(lambda m: _text(m.take(m.unsigned(4)))),
    b"\x8c": _push(lambda m: _text(m.take(m.unsigned(1)))),
    b"\x8d": _push(lambda m: _text(m.take(m.unsigned(8)))),
    b"B": _push(lambda m: m.take(m.unsigned(4))),
    b"C": _push(lambda m: m.take(m.unsigned(1))),
    b"\x8e": _push(lambda m: m.take(m.unsigned(8))),
    b"\x96": _push(lambda m: m.take(m.unsigned(8))),
    b"]": lambda m: m.stack.append([]),
    b"}": lambda m: m.stack.append({}),
    b")": lambda m: m.stack.append(()),
    b"\x8f": lambda m: m.stack.append([]),
    b"l": _push(lambda m: m.above_mark()),
    b"t": _push(lambda m: tuple(m.above_mark())),
    b"\x91": _push(lambda m: m.above_mark()),
    b"d": _dict,
    b"\x85": _last(1),
    b"\x86": _last(2),
    b"\x87": _last(3),
    b"a": _append,
    b"e": _appends,
    b"\x90": _appends,
    b"s": _set_item,
    b"u": _set_items,
    b"b": lambda m: m.build(m.stack.pop()),
    b"c": _push(lambda m: m.named(_text(m.line()), _text(m.line()))),
    b"\x93": _stack_global,
    b"R": _reduce,
    b"\x81": _reduce,
    b"\x92": _newobj_ex,
    b"i": _inst,
    b"o": _obj,
    b"Q": _push(lambda m: m.persist(m.stack.pop())),
    b"P": _push(lambda m: m.persist(_text(m.line()))),
    b"p": _put(lambda m: m.integer(m.line())),
    b"q": _put(lambda m: m.unsigned(1)),
    b"r": _put(lambda m: m.unsigned(4)),
    b"\x94": _memoize,
    b"g": _push(lambda m: m.memo[m.integer(m.line())]),
    b"h": _push(lambda m: m.memo[m.unsigned(1)]),
    b"j": _push(lambda m: m.memo[m.unsigned(4)]),
}
