"""Edits of pickles, opcode by opcode: a stream of them, as torch's legacy files are, stays a stream."""

import io
import pickletools
import struct
from random import Random

# Integers that lengths, sizes and counts go wrong at.
INTEGERS = (0, 1, 2, 7, 127, 128, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**62, 2**63 - 1,
            2**63, 2**64 - 1)  # fmt: skip

# Names whose call, look-up or change does something, and those that readers know.
NAMES = (
    "os system", "posix system", "builtins eval", "builtins exec", "builtins getattr", "builtins setattr",
    "builtins __import__", "builtins open", "builtins str", "builtins set", "builtins frozenset", "builtins complex",
    "builtins bytearray", "builtins dict", "builtins list", "builtins tuple", "builtins int", "builtins slice",
    "builtins range", "__builtin__ long", "subprocess Popen", "collections Counter", "collections OrderedDict",
    "collections defaultdict", "collections deque", "collections namedtuple", "copyreg _reconstructor",
    "copy_reg _reconstructor", "copyreg add_extension", "functools partial", "functools reduce", "operator attrgetter",
    "operator methodcaller", "itertools repeat", "_codecs encode", "codecs decode", "pickle loads", "marshal loads",
    "types CodeType", "types FunctionType", "importlib import_module", "ctypes CDLL", "ctypes string_at",
    "numpy load", "numpy dtype", "numpy ndarray", "numpy.core.multiarray _reconstruct", "numpy._core.multiarray scalar",
    "numpy.core.multiarray scalar", "numpy.core.numeric _frombuffer", "argparse Namespace", "pathlib PosixPath",
    "torch load", "torch save", "torch device", "torch Size", "torch float32", "torch bfloat16", "torch int64",
    "torch from_file", "torch FloatStorage", "torch LongStorage", "torch.storage UntypedStorage",
    "torch.storage TypedStorage", "torch.storage _load_from_bytes", "torch._utils _rebuild_tensor",
    "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_tensor_v3", "torch._utils _rebuild_parameter",
    "torch._utils _rebuild_parameter_with_state", "torch._utils _rebuild_sparse_tensor",
    "torch._utils _rebuild_qtensor", "torch._utils _rebuild_meta_tensor_no_storage",
    "torch._utils _rebuild_wrapper_subclass", "torch._utils _rebuild_device_tensor_from_numpy",
    "torch._tensor _rebuild_from_type_v2", "torch.nn.modules.linear Linear", "torch.nn.parameter Parameter",
    "torch.jit._pickle build_tensorlist", "torch.jit._pickle restore_type_tag", "torch.jit._pickle build_intlist",
    "torch.hub load", "torch.distributed.checkpoint.metadata Metadata", "torch.serialization _get_layout",
    "collapse.files.containers Stub", "__main__ anything", "__torch__.Net Net",
)  # fmt: skip
STRINGS = (
    "", "../a", "/etc/passwd", "a\nb", "\0", "é", "\U0001f600", "a" * 300, "0", "1", "-1", "cpu", "cuda:0", "meta",
    "storage", "module", "__class__", "__dict__", "__setstate__", "__reduce__", "requires_grad", "_modules", "data",
    "state_dict", "weight", "optim",
)  # fmt: skip


def _string(text: str) -> bytes:
    data = text.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


def _integer(value: int) -> bytes:
    data = value.to_bytes((value.bit_length() + 8) // 8, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def _global(rng: Random) -> bytes:
    module, name = rng.choice(NAMES).split()
    if rng.random() < 0.3:
        return _string(module) + _string(name) + b"\x93"
    return b"c" + module.encode() + b"\n" + name.encode() + b"\n"


def _value(rng: Random) -> bytes:
    """One value on the stack."""
    kind = rng.randrange(12)
    if kind == 0:
        return _integer(rng.choice((-1, 1)) * rng.choice(INTEGERS))
    if kind == 1:
        return _string(rng.choice(STRINGS))
    if kind == 2:
        return _global(rng)
    if kind == 3:
        return b"G" + struct.pack(">d", rng.choice((0.0, -1.5, 1e308, float("nan"), float("inf"))))
    if kind == 4:
        return _deep(rng)
    if kind == 5:
        return b"C" + bytes([5]) + b"bytes"
    return rng.choice((b"N", b"\x88", b"\x89", b")", b"]", b"}", b"\x8f"))


def _deep(rng: Random) -> bytes:
    """Containers in containers: a chain, or one whose parts are shared, which has no end for who walks it."""
    depth = rng.choice((5, 40, 200, 5000))
    if rng.random() < 0.6:
        return b")" + b"2\x86" * min(depth, 200)
    return rng.choice((b"]" * depth + b"a" * (depth - 1), b"(" * depth + b"N" + b"t" * depth))


def _call(rng: Random) -> bytes:
    """Something that a careless reader would run."""
    what = _string(rng.choice(("touch executed", "1+1", "executed")))
    module, name = rng.choice(NAMES).encode().split()
    return rng.choice((
        _global(rng) + what + b"\x85R",
        _global(rng) + b")R",
        _global(rng) + b")\x81",
        _global(rng) + what + b"\x85}\x92",
        b"(S'executed'\ni" + module + b"\n" + name + b"\n",
        b"(" + _global(rng) + what + b"o",
        _global(rng) + _string("a") + b"\x86R" + _value(rng) + b"b",
        b"\x82" + bytes([rng.randrange(256)]) + b")R",
        b"\x83" + struct.pack("<H", rng.randrange(65536)),
        b"\x84" + struct.pack("<i", rng.choice((1, -1, 2**31 - 1))),
    ))  # fmt: skip


def _persistent(rng: Random) -> bytes:
    """A persistent id, of a storage or of another kind."""
    kind = rng.choice(("storage", "storage", "module", "opened_file", "", "a\nb"))
    parts = [_string(kind), _global(rng), _string(rng.choice(STRINGS)), _string(rng.choice(STRINGS)),
             _integer(rng.choice(INTEGERS))]  # fmt: skip
    if rng.random() < 0.3:
        parts.insert(rng.randrange(6), _value(rng))
    if rng.random() < 0.2:
        del parts[rng.randrange(len(parts)) :]
    return rng.choice((b"(" + b"".join(parts) + b"tQ", b"(" + b"".join(parts) + b"lQ", b"P" + kind.encode() + b"\n"))


def _huge(rng: Random) -> bytes:
    """Few bytes that ask for many."""
    size = rng.choice(INTEGERS)
    return rng.choice((
        b"Nr" + struct.pack("<I", size & 0xFFFFFFFF),
        b"p%d\n" % size,
        b"X" + struct.pack("<I", size & 0xFFFFFFFF),
        b"\x8d" + struct.pack("<Q", size),
        b"\x8e" + struct.pack("<Q", size),
        b"\x96" + struct.pack("<Q", size),
        b"\x95" + struct.pack("<Q", size),
        b"\x8b" + struct.pack("<i", rng.choice((-1, 2**31 - 1, 10**6))),
        b"I" + b"9" * rng.choice((10, 5000, 200_000)) + b"\n",
        b"L" + b"9" * 5000 + b"L\n",
        b"\x8a\xff" + bytes([255] * 255),
        b"B" + struct.pack("<I", size & 0xFFFFFFFF),
    ))  # fmt: skip


def _keys(rng: Random) -> bytes:
    """A dict or set with an odd key: its hash is looked for, or its text."""
    return rng.choice((
        b"}" + _deep(rng) + b"Ns", b"}" + _value(rng) + _value(rng) + b"s",
        b"\x8f(" + _deep(rng) + b"\x90", b"(" + _deep(rng) + b"\x91", b"cbuiltins\nstr\n" + _deep(rng) + b"\x85R",
        b"cbuiltins\nset\n" + _deep(rng) + b"\x85R", b"ctorch\nSize\n" + _deep(rng) + b"\x85R",
    ))  # fmt: skip


def _build(rng: Random) -> bytes:
    """A state for whatever is on the stack: items, or attributes set by name."""
    name = _string(rng.choice(("__class__", "__defaults__", "__dict__", "update", "a", "_modules", "requires_grad")))
    return rng.choice((b"}" + name + _value(rng) + b"sb", b"N}" + name + _value(rng) + b"s\x86b", _value(rng) + b"b"))


ACTS = (b"0", b"2", b"1", b"(", b"a", b"e", b"s", b"u", b"b", b"R", b"\x81", b"\x92", b"o", b"t", b"l", b"d", b"\x85",
        b"\x86", b"\x87", b"\x90", b"\x91", b"\x94", b"q\0", b"h\0", b"j\xff\xff\xff\x7f", b"Q", b".", b"\x93", b"\x97",
        b"\x98", b"\x80\x05", b"\x80\xff", b"q\xff", b"h\xff")  # fmt: skip
MAKERS = (_value, _deep, _call, _call, _persistent, _persistent, _huge, _keys, _build, _global,
          lambda rng: rng.choice(ACTS))  # fmt: skip


def parse(data: bytes) -> list[list[bytes]]:
    """The opcodes of each pickle at the beginning of `data`, and the rest as a last list."""
    found, place = [], 0
    while place < len(data) and data[place : place + 1] == b"\x80":
        file = io.BytesIO(data[place:])
        try:
            starts = [position for _, _, position in pickletools.genops(file)]
        except Exception:  # a pickle that was edited before
            break
        ends = [*starts[1:], file.tell()]
        found.append([data[place + a : place + b] for a, b in zip(starts, ends, strict=True)])
        place += file.tell()
    return [*found, [data[place:]]]


def _change(op: bytes, rng: Random) -> bytes:
    """Another argument, of the same kind where that is easy."""
    code = op[:1]
    if code in b"KMJ\x8a" and rng.random() < 0.7:
        return _integer(rng.choice((-1, 1)) * rng.choice(INTEGERS))
    if code in b"X\x8c" and rng.random() < 0.7:
        return _string(rng.choice((*STRINGS, "a" * rng.randrange(300))))
    if code in b"c\x93" and rng.random() < 0.7:
        return _global(rng) if code == b"c" else b"00" + _global(rng)
    if len(op) == 1:
        return rng.choice(ACTS)
    place = rng.randrange(1, len(op))
    return op[:place] + bytes([rng.randrange(256)]) + op[place + 1 :]


def edit(data: bytes, rng: Random) -> tuple[bytes, str]:
    """The pickle with one to three of its opcodes changed, and what was done."""
    stream = parse(data)
    done = []
    for _ in range(rng.choice((1, 1, 2, 3))):
        ops = rng.choice(stream[:-1] or stream)
        place = rng.randrange(len(ops)) if ops else 0
        kind = rng.randrange(6)
        if kind == 0 and ops:
            del ops[place]
            done.append(f"opcode {place} left out")
        elif kind == 1 and ops:
            ops.insert(rng.randrange(len(ops)), ops[place])
            done.append(f"opcode {place} twice")
        elif kind == 2 and ops:
            ops[place] = _change(ops[place], rng)
            done.append(f"opcode {place} changed")
        elif kind == 3 and ops:
            ops[place] = rng.choice(MAKERS)(rng)
            done.append(f"opcode {place} replaced")
        else:
            made = rng.choice(MAKERS)
            ops.insert(place, made(rng))
            done.append(f"{made.__name__.strip('_<>')} before opcode {place}")
    return b"".join(op for ops in stream for op in ops), "pickle: " + ", ".join(done)


def whole(rng: Random) -> bytes:
    """A pickle of nothing but oddities."""
    return b"\x80\x02" + b"".join(rng.choice(MAKERS)(rng) for _ in range(rng.randrange(1, 5))) + b"."
