"""Mutants of files and folders: one thing wrong, at the level at which a format is written, or at that of bytes."""

import ast
import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import fuzz_pickles as pickles
import fuzz_pictures as pictures
import fuzz_zips as zips
from fuzz_pickles import INTEGERS

Files = Mapping[str, bytes | str]  # bytes; or, of what is no file: "dir", "fifo", "link TARGET"
WORDS = (
    "", "\n", "a\nb", "../x", "/etc/passwd", "\0", "é", "\ud800", "a" * 5000, "pickle", "numcodecs.pickle",
    "vlen-utf8", "json2", "object", "|O", "<f8", ">f2", "float64", "bicubic", "lanczos", "NaN", "1e999",
    "collapse.spectrum/1", "collapse.spectra/1", "collapse.run/2", "0.5", "model.safetensors", "bytes",
    "sharding_indexed", "crc32c", "blosc", "c/0/0", "regular", "default", "v2", "auto",
)  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """A place with one thing wrong: its files, which of them (or none) is opened, and what was done.

    `noise` says that bytes were changed and no checksum was mended: where there are checksums, the answer is the
    same or there is none.
    """

    entry: str
    files: Files
    what: str
    noise: bool = False


def read_folder(folder: Path) -> dict[str, bytes]:
    """The files below a folder, by their paths in it."""
    return {os.path.relpath(path, folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def write_folder(files: Files, folder: Path) -> None:
    """A folder of exactly these files."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, content in files.items():
        place(folder / name, content)


def place(path: Path, content: bytes | str | None) -> None:
    """Put a file, or what is no file, where something else may lie; None: nothing."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "dir":
        path.mkdir()
    elif content == "fifo":
        os.mkfifo(path)
    elif content:
        path.symlink_to(content.removeprefix("link "))


def mutate(entry: str, files: Files, rng: Random) -> Mutant:
    """A mutant of a seed."""
    names = sorted(files)
    name = rng.choice(names)
    if len(names) > 1 and rng.random() < 0.08:
        return Mutant(entry, *_tree_edit(dict(files), name, rng))
    noise = rng.random() < 0.35
    content = files[name]
    assert isinstance(content, bytes)
    data, what = (byte_edit if noise else inner)(content, name, rng)
    return Mutant(entry, {**files, name: data}, f"{name}: {what}", noise)


def _tree_edit(files: dict, name: str, rng: Random) -> tuple[Files, str]:
    """A file that is lost, empty, something else, or called otherwise."""
    content = files.pop(name)
    what = rng.choice(
        ("lost", "empty", "dir", "fifo", "link /etc/passwd", f"link {os.path.basename(name)}", "renamed", "twice")
    )
    if what == "empty":
        files[name] = b""
    elif what in ("renamed", "twice"):
        odd = rng.choice(("a\nb", "\udcff", "ü", "x" * 250, " ", ".hidden", "-rf", "%s"))
        folder, end = os.path.split(name)[0], os.path.splitext(name)[1]
        files[os.path.join(folder, odd[: 255 - len(end)] + end)] = content
        files |= {name: content} if what == "twice" else {}
    elif what != "lost":
        files[name] = what
    return files, f"{name}: {what}"


def byte_edit(data: bytes, name: str, rng: Random) -> tuple[bytes, str]:
    """Flips, cuts, insertions, numbers that lengths go wrong at; blind to the format."""
    if not data:
        return b"\0", "one byte"
    # Half of the edits fall into the first or last kilobyte, where headers and directories are.
    near = min(len(data), 1024)
    spot = rng.choice((rng.randrange(len(data)), rng.randrange(near), len(data) - 1 - rng.randrange(near)))
    kind = rng.randrange(7)
    changed = bytearray(data)
    if kind <= 1:
        for _ in range(rng.choice((1, 1, 1, 2, 8))):
            changed[spot] ^= 1 << rng.randrange(8)
            spot = min(len(data) - 1, spot + rng.randrange(9))
        return bytes(changed), f"bits flipped before byte {spot}"
    if kind == 2:
        changed[spot] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        return bytes(changed), f"byte {spot} set"
    if kind == 3:
        width, order = rng.choice((1, 2, 4, 8)), rng.choice(("little", "big"))
        value = (rng.choice((-1, 1)) * rng.choice(INTEGERS)) & (1 << 8 * width) - 1
        changed[spot : spot + width] = value.to_bytes(width, order)  # type: ignore[arg-type]
        return bytes(changed[: len(data)]), f"{value} in {width} bytes at {spot}"
    if kind == 4:
        return bytes(changed[:spot]), f"cut at {spot}"
    if kind == 5:
        length = rng.choice((1, 4, 64, 512))
        return data[:spot] + data[spot + length :], f"{length} bytes from {spot} left out"
    more = rng.choice((rng.randbytes(rng.choice((1, 4, 64))), data[spot : spot + 512], bytes(512), b"a" * 100_000))
    return data[:spot] + more + data[spot:], f"{len(more)} bytes put in at {spot}"


def inner(data: bytes, name: str, rng: Random) -> tuple[bytes, str]:
    """An edit of the kind of file that it is; now and then of bytes, or a file of another kind."""
    chance = rng.random()
    if chance < 0.04:
        disguise = rng.choice((*pictures.DISGUISES, pickles.whole(rng)))
        return disguise, f"another kind of file {disguise[:8]!r}"
    for matches, edit in KINDS:
        if chance < 0.9 and matches(data, name):
            return edit(data, rng)
    return byte_edit(data, name, rng)


def _zip(data: bytes, rng: Random) -> tuple[bytes, str]:
    """An archive, or one with a digest behind it as resume.pt has."""
    tail = data[-32:]
    sealed = hashlib.sha256(data[:-32]).digest() == tail
    changed, note = zips.edit(data[:-32] if sealed else data, rng, inner, INTEGERS)
    if not sealed:
        return changed, note
    return changed + (hashlib.sha256(changed).digest() if rng.random() < 0.8 else tail), f"{note}, sealed"


def _numbers(rng: Random) -> Any:
    return rng.choice((0, 1, -1, 2, 3, 1.5, -0.0, 1e-310, 1e308, float("nan"), float("inf"), 10**400, True, None,
                       rng.choice((-1, 1)) * rng.choice(INTEGERS)))  # fmt: skip


def _value(rng: Random) -> Any:
    """A JSON value of any type."""
    deep: Any = 1
    for _ in range(rng.choice((3, 60, 800))):
        deep = rng.choice(([deep], {"a": deep}))
    many = [_numbers(rng)] * rng.choice((1, 2, 3, 2000))
    values = (_numbers(rng), _numbers(rng), rng.choice(WORDS), [], {}, many, {"a": 1}, deep, [[_numbers(rng)] * 2] * 3)
    return rng.choice(values)


def _node_edit(tree: Any, rng: Random) -> str:
    """Change one value somewhere in a tree of JSON."""
    path, node = [], tree
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            return "nothing"
        key = rng.choice(keys)
        path.append(key)
        if not isinstance(node[key], (dict, list)) or not node[key] or rng.random() < 0.2:
            break
        node = node[key]
    kind = rng.randrange(6)
    if kind == 0:
        del node[key]
        return f"{path[:4]} left out"
    if kind == 1 and isinstance(node, dict):
        node[rng.choice(WORDS)] = node.pop(key) if rng.random() < 0.5 else _value(rng)
        return f"{path[:4]} called otherwise"
    if kind == 2 and isinstance(node[key], (int, float)):
        node[key] = rng.choice((-node[key], node[key] + 1, str(node[key]), [node[key]], _numbers(rng)))
    elif kind == 3 and isinstance(node[key], str) and node[key]:
        spot = rng.randrange(len(node[key]))
        node[key] = node[key][:spot] + rng.choice(WORDS) + node[key][spot + 1 :]
    else:
        node[key] = _value(rng)
    return f"{path[:4]} is {node[key]!r:.40}"


NO_JSON = (
    '"schema": 1,', "9" * 5000, "[" * 100_000, '{"a":' * 50_000, "NaN", "-Infinity", ",", "//\n", "\ufeff", "\0",
    '"\\ud800"', "1e999", "'a'", "0x10", "true", '"n": -1, "n": 2,',
)  # fmt: skip


def json_edit(data: bytes, rng: Random) -> tuple[bytes, str]:
    """Another value, name, type or depth; or text that is no JSON, or only nearly."""
    kind = rng.randrange(12)
    try:
        tree = json.loads(data)
    except ValueError:
        return byte_edit(data, "", rng)
    if kind < 9 and isinstance(tree, (dict, list)):
        notes = [_node_edit(tree, rng) for _ in range(rng.choice((1, 1, 2, 4)))]
        text = json.dumps(tree, ensure_ascii=rng.random() < 0.8)
        return text.encode("utf-8", "surrogatepass"), "json: " + ", ".join(notes)
    text = data.decode()
    spots = [i for i, c in enumerate(text) if c in "{[,:0123456789"]
    spot = rng.choice(spots or [0]) + (kind % 2)
    odd = rng.choice(NO_JSON)
    changed = text[:spot] + odd + text[spot:]
    coding = rng.choice(("utf-8", "utf-8", "utf-8", "utf-16", "latin-1"))
    return changed.encode(coding, "replace"), f"json: {odd[:12]!r} in {coding}"


def lines_edit(data: bytes, rng: Random) -> tuple[bytes, str]:
    """A log of one JSON object a line: one of them changed."""
    lines = data.splitlines()
    spot = rng.randrange(len(lines))
    lines[spot], note = json_edit(lines[spot], rng)
    return b"\n".join(lines) + b"\n", f"line {spot}: {note}"


def safetensors_edit(data: bytes, rng: Random) -> tuple[bytes, str]:
    """The header's JSON changed, its length mended four times in five."""
    length = struct.unpack_from("<Q", data)[0]
    header, note = json_edit(data[8 : 8 + length], rng)
    stated = rng.choice(INTEGERS) & (2**64 - 1) if rng.random() < 0.2 else len(header)
    return struct.pack("<Q", stated) + header + data[8 + length :], note


SHAPES = (
    "()", "(5,)", "(5, 0)", "(0, 5)", "(0,)", "(-1, 5)", "(12, -5)", "(5, 12)", "(60,)", "(3, 4, 5)", "(12, 5, 1)",
    "(1, 60)", "(60, 1)", "(2147483648, 5)", "(4294967296, 4294967296)", "(9223372036854775808, 1)",
    "(100000000000000000000, 1)", "(0, 9223372036854775807)", "(12.0, 5)", "(True, 5)", "('a', 5)", "12", "None",
    "[12, 5]", "(12, 100000)", f"({'1, ' * 70})", f"({'9' * 5000}, 1)", "(12, (5,))",
)  # fmt: skip
DTYPES = (
    "'<f8'", "'>f8'", "'<f4'", "'<f2'", "'|O'", "'|b1'", "'<U5'", "'|S8'", "'|S0'", "'|V8'", "'|V0'", "'<c16'",
    "'<M8[s]'", "'<m8'", "'<i8'", "'|u1'", "'<f16'", "'<f3'", "''", "'x'", "None", "8", "[('a', '<f8')]",
    "[('a', '<f4'), ('b', '|O')]", "('<f8', (2,))", "'<f8,<f8'", "{'names': ['a'], 'formats': ['O']}",
    "'(1000000000,)f8'", "[]", "'\\x00'",
)  # fmt: skip
HEADERS = (
    "__import__('os').system('touch executed')", "(" * 5000, "{}", "[]", "1", "{'descr': ", "{**{}}", "a", "\0", "",
    "{'descr': '<f8', 'fortran_order': False, 'shape': (12, 5), 'more': 1}", "{'shape': (12, 5)}", "f''",
    "{'descr': '<f8', 'fortran_order': 2, 'shape': (12, 5)}",
    "{'descr': '<f8', 'fortran_order': None, 'shape': (12, 5)}", "-" * 9000 + "1", "{" + "'a': 1, " * 20_000 + "}",
    "9" * 5000,
)  # fmt: skip


def npy_edit(data: bytes, rng: Random) -> tuple[bytes, str]:
    """Another shape, dtype, order or version; the length of the header is mended four times in five."""
    wide = data[6] > 1
    start = 12 if wide else 10
    length = struct.unpack_from("<I" if wide else "<H", data, 8)[0]
    header, rest, major = data[start : start + length].decode("latin-1"), data[start + length :], data[6]
    about = {key: repr(value) for key, value in ast.literal_eval(header).items()} if header[:1] == "{" else {}
    kind = rng.randrange(8)
    note = ""
    if kind < 3:
        about["shape"] = note = rng.choice(SHAPES)
    elif kind < 5:
        about["descr"] = note = rng.choice(DTYPES)
    elif kind == 5:
        about["fortran_order"] = "True"
        about["shape"] = note = rng.choice(SHAPES)
    header = "{" + ", ".join(f"'{key}': {value}" for key, value in about.items()) + "}"
    if kind == 6:
        header = note = rng.choice(HEADERS)
    if kind == 7:
        major = rng.choice((0, 1, 2, 3, 4, 255))
        note = f"version {major}"
    content = (header + " " * (-len(header) % 16) + rng.choice(("\n", "\n", "", "\0"))).encode("latin-1", "replace")
    stated = rng.choice((*INTEGERS, len(content))) if rng.random() < 0.2 else len(content)
    size = struct.pack("<I", stated & 0xFFFFFFFF) if major > 1 else struct.pack("<H", stated & 0xFFFF)
    return data[:6] + bytes([major, 0]) + size + content + rest, f"npy: {note[:40]}"


TAR_SIZES = (
    b"\x80" + b"\0" * 7 + struct.pack(">L", 2**31), b"\xff" * 12, b"\xff" * 8 + struct.pack(">l", -512),
    b"\x80" + b"\xff" * 11, b"-0000000001\0", b" " * 12,
)  # fmt: skip
TAR_WORDS = (
    b"size=99999999999", b"size=-1", b"path=../x.png", b"GNU.sparse.major=1", b"GNU.sparse.realsize=9999999999",
    b"GNU.sparse.map=0,99999999999", b"hdrcharset=BINARY", b"mtime=nan", b"a=" + b"b" * 2000,
)  # fmt: skip


def tar_edit(data: bytes, rng: Random) -> tuple[bytes, str]:
    """A field of a header with its checksum mended, a header of another kind put in, or what a member holds."""
    places, spot = [], 0
    while data[spot : spot + 100].strip(b"\0"):
        places.append(spot)
        spot += 512 + -(-int(data[spot + 124 : spot + 135] or b"0", 8) // 512) * 512
    at = rng.choice(places)
    size = int(data[at + 124 : at + 135], 8)
    block, body = bytearray(data[at : at + 512]), data[at + 512 : at + 512 + size]
    rest, kind = data[at + 512 + -(-size // 512) * 512 :], rng.randrange(6)
    note = "content"
    if kind <= 1:
        body, note = inner(body, bytes(block[:100]).strip(b"\0").decode("latin-1"), rng)
        block[124:136] = b"%011o\0" % len(body)
    elif kind == 2:
        block[124:136] = rng.choice((b"%011o\0" % (rng.choice(INTEGERS) & 8**11 - 1), *TAR_SIZES))
        note = f"size {bytes(block[124:136])!r}"
    elif kind == 3:
        block[156:157] = rng.choice((*b"01234567LKxgSVMDNA\0 ",)).to_bytes(1, "little")
        if block[156:157] == b"S":
            block[386:410] = b"%011o\0%011o\0" % (0, rng.choice((512, 8**11 - 1)))
            block[483:495] = b"%011o\0" % rng.choice((4 << 30, 8**11 - 1))
        note = f"type {bytes(block[156:157])!r}"
    elif kind == 4:
        name = rng.choice((b"../up.png", b"/abs.cls", b"a\nb.png", b"\xff.png", b"", b"a.json", b"a.png", b"x" * 100))
        block[0:100], note = name.ljust(100, b"\0"), f"name {name[:20]!r}"
    more = _member(rng) if kind == 5 else b""
    block[148:156] = b"%06o\0 " % (sum(block[:148]) + 256 + sum(block[156:])) if rng.random() < 0.9 else b"0000000\0"
    body += bytes(-len(body) % 512)
    return data[:at] + more + bytes(block) + body + rest, f"tar: {note}{' a member more' * bool(more)}"


def _member(rng: Random) -> bytes:
    """A member before the others that says something of the next: a long name, attributes, a sparse map."""
    kind = rng.choice(b"LKxg")
    line = b" " + rng.choice(TAR_WORDS) + b"\n"
    content = rng.choice(
        (b"%d" % (len(line) + 2) + line, b"99999999999" + line, b"0" + line, b"n" * 70_000, b"a.png\0")
    )
    header = bytearray(512)
    header[:7], header[100:108], header[124:136] = b"./@Long", b"0000644\0", b"%011o\0" % len(content)
    header[156], header[257:265] = kind, b"ustar  \0"
    header[148:156] = b"%06o\0 " % (sum(header) + 256)
    return bytes(header) + content + bytes(-len(content) % 512)


NAMES = (
    b"../../../etc/passwd", b"/dev/zero", b"/etc/passwd.png", b"a\0b.png", b"\xff.png", b"x" * 5000 + b".png", b".png",
    b" 0.png ", b"0.png\x0b1.png", b"0.png\xe2\x80\xa81.png", b"list.txt", b"", b"\xef\xbb\xbf0.png", b"0.PNG",
)  # fmt: skip


def text_edit(data: bytes, rng: Random) -> tuple[bytes, str]:
    """A list of names: one of them changed."""
    lines = data.splitlines()
    odd = rng.choice(NAMES)
    lines[rng.randrange(len(lines))] = odd
    return rng.choice((b"\n", b"\n", b"\r", b"\0", b"\n\n")).join(lines), f"list: {odd[:20]!r}"


FIELDS = (
    "", "nan", "inf", "-1e999", "1e400", "1_0", "0x10", "١", "a", '"', '""', '"a\nb"', "9" * 400, "1,5", "\0", "é",
    "\ud800", "True", "a" * 70_000,
)  # fmt: skip


def table_edit(data: bytes, rng: Random) -> tuple[bytes, str]:
    """A table of text: a field, a line or the ends of the lines changed."""
    comma = "\t" if b"\t" in data.partition(b"\n")[0] else ","
    lines = data.decode("utf-8-sig").splitlines()
    at, odd, kind = rng.randrange(len(lines)), rng.choice(FIELDS), rng.randrange(6)
    if kind <= 2:
        fields = lines[at].split(comma)
        fields[rng.randrange(len(fields))] = odd
        lines[at] = comma.join(fields)
    elif kind == 3:
        lines[at] = odd
    elif kind == 4:
        lines[at] += comma + odd
    else:
        del lines[at]
    end = rng.choice(("\n", "\n", "\n", "\r\n", "\r", "\0\n", "\n\n"))
    coding = rng.choice(("utf-8", "utf-8", "utf-8", "utf-8-sig", "utf-16", "latin-1"))
    errors = "surrogatepass" if coding.startswith("utf") else "replace"
    return (end.join(lines) + end).encode(coding, errors), f"line {at}: {odd[:20]!r} in {coding}"


def _begins(*magic: bytes) -> Callable[[bytes, str], bool]:
    return lambda data, name: data.startswith(magic)


KINDS: tuple[tuple[Callable[[bytes, str], bool], Callable[[bytes, Random], tuple[bytes, str]]], ...] = (
    (_begins(b"PK\3\4"), _zip),
    (_begins(b"\x93NUMPY"), npy_edit),
    (_begins(b"\x80\2", b"\x80\3", b"\x80\4", b"\x80\5"), pickles.edit),
    (_begins(b"\x89PNG"), pictures.png),
    (_begins(b"\xff\xd8"), pictures.jpeg),
    (_begins(b"II*\0", b"MM\0*"), pictures.tiff),
    (_begins(b"GIF8", b"RIFF", b"BM", b"P5", b"P6"), pictures.header),
    (lambda data, name: data[8:9] == b"{", safetensors_edit),
    (lambda data, name: data[257:262] == b"ustar", tar_edit),
    (lambda data, name: name.endswith((".csv", ".tsv")), table_edit),
    (lambda data, name: name.endswith(".jsonl"), lines_edit),
    (lambda data, name: data[:1] in (b"{", b"["), json_edit),
    (lambda data, name: name.endswith(".txt"), text_edit),
)
