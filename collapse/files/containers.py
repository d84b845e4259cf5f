"""Files of tensors from anybody, read without running anything they hold.

A file is recognised by its bytes, never by its suffix.  Its pickles are read as data (pickles.py): only the names of
tensors and plain containers mean something.  Every other name is reported and stands for nothing, so that a file with
argparse.Namespace, functions or whole modules inside still gives its tensors.
"""

import io
import json
import math
import re
import struct
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from collapse import InputError
from collapse.files import limits
from collapse.files.descriptor import Descriptor, opened
from collapse.files.pickles import Stub, unpickle
from collapse.files.zips import STORED, Zip

if TYPE_CHECKING:
    import torch

# The dtype of a storage by its class's name, as pickles have it, and by safetensors' word.
STORAGES = {
    "Float": "float32",
    "Half": "float16",
    "BFloat16": "bfloat16",
    "Double": "float64",
    "Long": "int64",
    "Int": "int32",
    "Short": "int16",
    "Char": "int8",
    "Byte": "uint8",
    "Bool": "bool",
    "ComplexFloat": "complex64",
    "ComplexDouble": "complex128",
}
SAFETENSORS = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
}

# What other files begin with, and what to do about it.
MAGIC = {
    b"\x89HDF\r\n\x1a\n": "an HDF5 file",
    b"version https://git-lfs": "a Git LFS pointer; fetch the real file (git lfs pull)",
    b"<!DOCTYPE": "an HTML page, perhaps a failed download",
    b"<html": "an HTML page, perhaps a failed download",
    b"\x93NUMPY": "a numpy array, not a checkpoint",
    b"\xff\xd8\xff": "a JPEG image",
    b"\x89PNG": "a PNG image",
    b"\x1f\x8b": "a gzip archive; unpack it first",
    b"GGUF": "a GGUF file",
}
LEGACY_MAGIC, LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # torch.serialization's


@dataclass
class Contents:
    """What a file held: nested mappings and lists with tensors as leaves, and how it was read."""

    container: str
    tree: Any
    sha256: str
    foreign: list[str] = field(default_factory=list)
    metadata: dict[str, str] = field(default_factory=dict)
    configs: dict[str, Any] = field(default_factory=dict)  # the JSON files beside the tensors, by name


def read(path: Path) -> Contents:
    """Read a torch file (zip or legacy pickle) or a safetensors file; tensors on the CPU.

    Raises InputError: no such file, another kind of file (said which), damaged, or more than a pickle of data.
    """
    with opened(path) as source:
        return read_from(source)


def read_from(source: Descriptor) -> Contents:
    """What `read` gives, of an open file or a window of one, whose digest is that of the window.

    Raises InputError: as `read`.
    """
    container, tree, foreign, metadata = parts_of(source)
    return Contents(container, tree, source.sha256(), sorted(foreign), metadata)


def parts_of(source: Descriptor) -> tuple[str, Any, set[str], dict[str, str]]:
    """(container, tree, foreign names, metadata) of an open file. Raises InputError as `read` does."""
    head = source.read(0, min(32, source.size))
    try:
        if head.startswith(b"PK\x03\x04"):
            return *_read_zip(source), {}
        if head[8:9] == b"{":  # before the pickle: the length of a header may begin with any byte
            tree, metadata = _read_safetensors(source, *struct.unpack("<Q", head[:8]))
            return "safetensors", tree, set(), metadata
        if head[:1] == b"\x80":
            return "torch legacy pickle", *_read_legacy(source), {}
        seen = next((name for magic, name in MAGIC.items() if head.startswith(magic)), f"bytes {head[:8]!r}")
        raise InputError(f"is not a checkpoint (begins as {seen}); expected a torch or safetensors file")
    except (InputError, MemoryError, RuntimeError) as error:  # RuntimeError: torch, of sizes that no tensor has
        raise _refusal(source.path, error) from error


def _refusal(path: Path, error: Exception) -> InputError:
    """The error in one line that begins with the file."""
    text = "not enough memory for its tensors" if isinstance(error, MemoryError) else first_line(error)
    return InputError(text if text.startswith(str(path)) else f"{path}: {text}")


def first_line(error: Exception) -> str:
    """An error in one short line."""
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__


class Storage:
    """The numbers of a file that tensors are views of: `numel` of a dtype, read when the first tensor wants them.

    Raises InputError: its size is no number that a file can hold.
    """

    def __init__(self, dtype: "torch.dtype", numel: int, fill: Callable[[memoryview], None] | None) -> None:
        if not isinstance(numel, int) or isinstance(numel, bool) or numel < 0:
            what = numel if isinstance(numel, int) else f"a {type(numel).__name__} of"
            raise InputError(f"a storage of {what} numbers; refused")
        self.dtype, self.numel, self.fill = dtype, numel, fill
        self.size = numel * dtype.itemsize
        self.base: torch.Tensor | None = None

    def buffer(self) -> memoryview:
        """Its bytes, to be written to."""
        import torch

        self.base = torch.empty(self.size, dtype=torch.uint8)
        return _memory(self.base)

    def tensor(self, dtype: "torch.dtype | None" = None) -> "torch.Tensor":
        """All its numbers, (n,), as the storage's dtype or another.

        Raises InputError: they are not in the file, or damaged.
        """
        if self.base is None:
            buffer = self.buffer()
            if self.fill is not None and self.size:
                self.fill(buffer)
        assert self.base is not None
        return self.base.view(dtype or self.dtype)


def _memory(data: "torch.Tensor") -> memoryview:
    """The bytes of a uint8 tensor, to be written to."""
    return memoryview(data.numpy())  # type: ignore[arg-type]


def _rebuild(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any, dtype: Any = None) -> "torch.Tensor":
    """The view of a storage that torch._utils._rebuild_tensor and its successors describe."""
    if not isinstance(storage, Storage):
        raise InputError("a tensor without numbers of its own; refused")
    if not all(isinstance(part, (tuple, list)) for part in (size, stride)) or max(len(size), len(stride)) > 64:
        raise InputError("a tensor whose shape or strides are no short list of numbers; refused")
    numbers = (offset, *size, *stride)
    if any(type(n) is not int for n in numbers):  # not shown: a list may hold another one twice, and so on
        raise InputError("a tensor whose shape or strides are no short list of numbers; refused")
    if len(size) != len(stride) or any(not 0 <= n < 1 << 62 for n in numbers):
        raise InputError(f"a tensor of shape {str(tuple(size))[:80]} with impossible strides; refused")
    if math.prod(size) >= 1 << 62:
        raise InputError(f"a tensor of {math.prod(size)} numbers; refused")
    base = storage.tensor(dtype)
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    if (0 in size and offset > base.numel()) or (0 not in size and last >= base.numel()):
        raise InputError(f"a tensor of shape {tuple(size)} is larger than what the file stores for it; refused")
    return base.as_strided(tuple(size), tuple(stride), offset)


def _rebuild_v3(
    storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *rest: Any
) -> Any:
    import torch

    if not isinstance(dtype, torch.dtype):
        raise InputError("a tensor of an unknown dtype; refused")
    return _rebuild(storage, offset, size, stride, dtype=dtype)


def _names() -> tuple[dict[str, Callable[..., Any]], dict[str, Any]]:
    """(functions, values) that the pickles of torch may name: tensors, their storages, sizes, devices and dtypes."""
    import torch

    functions: dict[str, Callable[..., Any]] = {
        "torch._utils._rebuild_tensor": _rebuild,
        "torch._utils._rebuild_tensor_v2": _rebuild,
        "torch._utils._rebuild_tensor_v3": _rebuild_v3,
        "torch._utils._rebuild_parameter": lambda data, *_: data,
        "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
        "torch.Size": lambda size=(): tuple(size) if isinstance(size, (list, tuple)) else (),
        "torch.device": lambda *parts: ":".join(str(p) for p in parts if isinstance(p, (str, int))),
    }
    values: dict[str, Any] = {f"torch.{name}": v for name, v in vars(torch).items() if isinstance(v, torch.dtype)}
    values |= {f"torch.{name}Storage": getattr(torch, dtype) for name, dtype in STORAGES.items()}
    values |= dict.fromkeys(("torch.storage.UntypedStorage", "torch.UntypedStorage"), torch.uint8)
    return functions, values


def _read_zip(source: Descriptor) -> tuple[str, Any, set[str]]:
    """(container, tree, foreign names) of a torch or TorchScript archive. The code in a script is not even unpacked."""
    archive = Zip(source)
    pickles = [name for name in archive.records if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        what = f"with {len(pickles)} data.pkl" if pickles else "without data.pkl"
        raise InputError(f"is a zip archive {what}, not a torch checkpoint")
    folder = pickles[0].removesuffix("data.pkl")
    script = f"{folder}constants.pkl" in archive.records
    read = re.compile(re.escape(folder) + r"(data\.pkl|byteorder|data/\d+)")
    for name, record in archive.records.items():
        if record.method != STORED and (not script or read.fullmatch(name)):
            raise InputError(f"holds compressed records, which torch never writes ({name!r}); refused")
        if not script and not read.fullmatch(name):
            archive.read(record, limits.PICKLE)  # what is not used is verified too
    order = archive.records.get(f"{folder}byteorder")
    if order is not None and archive.read(order, 16) != sys.byteorder.encode():
        raise InputError("was written on a machine of another byte order; save it again on one like this")
    storages: dict[str, Storage] = {}
    data, foreign = archive.read(archive.records[pickles[0]], limits.PICKLE), set[str]()
    container = "TorchScript archive" if script else "torch zip"
    try:
        tree = unpickle(io.BytesIO(data), len(data), *_names(), foreign, partial(_record, archive, folder, storages))
    except InputError as error:
        raise InputError(f"cannot be read as a {container}: {error}") from error
    return container, tree, foreign


def _record(archive: Zip, folder: str, storages: dict[str, Storage], key: Any) -> Storage:
    """The storage that a persistent id ("storage", dtype, name, device, numel) stands for."""
    dtype, name, numel = _storage_id(key)
    if not name.isdecimal():
        raise InputError(f"a storage called {name[:40]!r}, expected a number; refused")
    if name not in storages:
        record = archive.records.get(f"{folder}data/{name}")
        made = Storage(dtype, numel, partial(archive.into, record=record) if record else None)
        if (record.size if record else 0) != made.size:
            size = record.size if record else 0
            raise InputError(f"storage {name} has {size} bytes where {made.size} are declared; fetch the file again")
        storages[name] = made
    return _as(storages[name], dtype, numel)


def _as(storage: Storage, dtype: "torch.dtype", numel: int) -> Storage:
    """The same numbers; a file that gives them two types or two lengths is refused."""
    if storage.dtype != dtype or storage.numel != numel:
        raise InputError("one storage under two types or lengths; refused")
    return storage


def _storage_id(key: Any) -> tuple["torch.dtype", str, int]:
    import torch

    if not isinstance(key, tuple) or len(key) < 5 or key[0] != "storage":
        kind = str(key[0])[:40] if isinstance(key, tuple) and key and isinstance(key[0], str) else type(key).__name__
        raise InputError(f"pickles a {kind!r} with its source code, not only tensors; save its state_dict() instead")
    _, dtype, name, _, numel = key[:5]
    if isinstance(dtype, Stub) and re.fullmatch(r"torch\.QU?Int\d+(x\d)?Storage", dtype.name):
        raise InputError(f"holds a quantised tensor ({dtype.name}); dequantise it first, and save again")
    if not isinstance(dtype, torch.dtype) or not isinstance(name, (str, int)) or type(numel) is not int:
        raise InputError("a storage of an unknown kind; refused")
    return dtype, str(name), numel


class _Raw(io.RawIOBase):
    """A descriptor as a stream, for the pickles of a legacy file, which do not say where they end."""

    def __init__(self, source: Descriptor) -> None:
        self.source, self.place = source, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self.place = (0, self.place, self.source.size)[whence] + offset
        return self.place

    def readinto(self, target: Any) -> int:
        size = min(len(target), self.source.size - self.place)
        self.source.into(memoryview(target)[:size], self.place)
        self.place += size
        return size


def _read_legacy(source: Descriptor) -> tuple[Any, set[str]]:
    """(tree, foreign names): a magic number, a protocol, the machine, the tree, and the storages one after another."""
    file = io.BufferedReader(_Raw(source), 1 << 16)
    foreign, storages = set[str](), dict[str, Storage]()
    names = _names()

    def following(persistent: Callable[[Any], Any] | None = None) -> Any:
        return unpickle(file, source.size, *names, foreign, persistent)

    if following() != LEGACY_MAGIC:
        raise InputError("is a pickle, not a torch checkpoint; refused")
    if following() != LEGACY_PROTOCOL:
        raise InputError("is of an unknown protocol of torch; refused")
    machine = following()
    if not isinstance(machine, dict) or machine.get("little_endian", True) is not (sys.byteorder == "little"):
        raise InputError("was written on a machine of another byte order; save it again on one like this")
    tree = following(partial(_legacy_storage, [source.size], storages))
    keys = following()
    if not isinstance(keys, list) or sorted(map(_name, keys)) != sorted(storages):
        raise InputError("its list of storages is not that of its tensors; fetch the file again")
    place = file.tell()
    for key in keys:
        storage = storages[_name(key)]
        if struct.unpack("<q", source.read(place, 8))[0] != storage.numel:
            raise InputError(f"storage {_name(key)[:40]} has another size than declared; fetch the file again")
        source.into(_memory(storage.tensor(_bytes())), place + 8)
        place += 8 + storage.size
    return tree, foreign


def _bytes() -> "torch.dtype":
    import torch

    return torch.uint8


def _name(key: Any) -> str:
    if not isinstance(key, (str, int)):
        raise InputError("a storage without a name; refused")
    return str(key)


def _legacy_storage(left: list[int], storages: dict[str, Storage], key: Any) -> Storage:
    """The storage of a persistent id; its numbers, which come later in the file, must fit the bytes that are `left`."""
    dtype, name, numel = _storage_id(key)
    if name not in storages:
        storages[name] = Storage(dtype, numel, None)
        left[0] -= storages[name].size
        if left[0] < 0:
            raise InputError("declares larger storages than the file is; truncated or damaged")
    storage, view = _as(storages[name], dtype, numel), key[5] if len(key) > 5 else None
    if view is None:
        return storage
    _, offset, count = view
    part = Storage(dtype, count, None)
    if type(offset) is not int or not 0 <= offset <= offset + count <= numel:
        raise InputError("a view that leaves its storage; refused")
    width = storage.size // max(1, numel)
    part.base = storage.tensor(_bytes())[offset * width : (offset + count) * width]
    return part


def _read_safetensors(source: Descriptor, header: int) -> tuple[dict[str, Any], dict[str, str]]:
    """(tensors, metadata). Every byte behind the header belongs to one tensor, as safetensors writes it."""
    import torch

    if header > min(limits.HEADER, source.size - 8):
        raise InputError(f"a safetensors header of {header} bytes in a file of {source.size}: truncated or damaged")
    entries = _header(source.read(8, header))
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise InputError("a damaged safetensors file (metadata is text by name)")
    if len(entries) > limits.TENSORS:
        raise InputError(f"{len(entries)} tensors; at most {limits.TENSORS} are read")
    places = {name: _place(name, entry) for name, entry in entries.items()}
    end = 0
    for name, (_, _, start, stop) in sorted(places.items(), key=lambda item: item[1][2:]):
        if start != end:
            raise InputError(f"a damaged safetensors file (a hole or an overlap before {name[:80]!r})")
        end = stop
    if 8 + header + end != source.size:
        raise InputError(f"a damaged safetensors file: {source.size} bytes where {8 + header + end} are declared")
    tree: dict[str, Any] = {}
    for name, (dtype, shape, start, stop) in places.items():
        raw = torch.empty(stop - start, dtype=torch.uint8)
        source.into(_memory(raw), 8 + header + start)
        tree[name] = raw.view(dtype).view(shape)
    return tree, metadata


def _header(data: bytes) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(made := dict(pairs)) != len(pairs):
            raise ValueError("a name twice")
        return made

    try:
        entries = json.loads(data.decode(), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise InputError(f"a damaged safetensors file ({first_line(error)})") from error
    if not isinstance(entries, dict):
        raise InputError("a damaged safetensors file (its header is no object)")
    return entries


def _place(name: str, entry: Any) -> tuple["torch.dtype", tuple[int, ...], int, int]:
    """(dtype, shape, first byte, last byte) of a tensor."""
    import torch

    try:
        kind, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        numbers = (*shape, start, stop)
        usable = len(shape) <= 64 and all(type(n) is int and 0 <= n < 1 << 62 for n in numbers)
        dtype = getattr(torch, SAFETENSORS[kind]) if kind in SAFETENSORS else None
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"a damaged safetensors file (entry {name[:80]!r})") from error
    if dtype is None:
        raise InputError(f"tensor {name[:80]!r} is of dtype {str(kind)[:20]!r}, which is not read")
    if not usable or math.prod(shape) * torch.empty(0, dtype=dtype).element_size() != stop - start:
        raise InputError(f"a damaged safetensors file (tensor {name[:80]!r} has not the bytes of its shape)")
    return dtype, shape, start, stop


def require_own_numbers(what: str, tensor: "torch.Tensor") -> None:
    """Raise InputError for a tensor, of any shape, that repeats its numbers: a few bytes may claim any size."""
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise InputError(f"{what} {tuple(tensor.shape)} is larger than what the file stores for it")


def state_of(value: Any) -> Mapping[str, Any] | None:
    """The tensors and parts that a pickled module, or a dict of a class of its own, keeps; None for anything else.

    A module of torch has _parameters, _buffers and _modules; one of TorchScript has them as plain attributes.
    """
    if not isinstance(value, Stub):
        return None
    state = value.state
    if isinstance(state.get("_modules"), Mapping) and isinstance(state.get("_parameters"), Mapping):
        left_out = state.get("_non_persistent_buffers_set", ())
        buffers = state.get("_buffers")
        parts = {**state["_parameters"], **(buffers if isinstance(buffers, Mapping) else {}), **state["_modules"]}
        return {n: part for n, part in parts.items() if not isinstance(left_out, (list, tuple)) or n not in left_out}
    return state if value.mapping or value.name.startswith("__torch__.") else None
