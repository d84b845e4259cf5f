"""Files of tensors from anybody, read without running anything they hold.

A file is recognised by its bytes, never by its suffix.  Pickles are read by an unpickler that knows only the parts of
a tensor; every other name becomes an inert stub, whose name is reported, so that a file with argparse.Namespace,
functions or whole modules inside still gives its tensors, and nothing of it is imported or called.
"""

import hashlib
import io
import pickle
import re
import struct
import types
import warnings
import zipfile
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any

from collapse import InputError
from collapse.files import limits

# The dtype of a storage by its class's name (torch.load looks at the class before this package's unpickler does).
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


@dataclass
class Contents:
    """What a file held: nested mappings and lists with tensors as leaves, and how it was read."""

    container: str
    tree: Any
    sha256: str
    foreign: list[str] = field(default_factory=list)
    metadata: dict[str, str] = field(default_factory=dict)
    configs: dict[str, Any] = field(default_factory=dict)  # the JSON files beside the tensors, by name


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file: IO[bytes]) -> str:
    digest = hashlib.sha256()  # Python 3.10 has no hashlib.file_digest
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def require_file(path: Path) -> None:
    """Raise InputError unless `path` is a readable, regular, non-empty file."""
    try:
        if path.is_dir():
            raise InputError(f"{path}: is a folder, not a file")
        if not path.exists():
            raise InputError(f"{path}: no such file")
        if not path.is_file():
            raise InputError(f"{path}: is not a regular file")
        if path.stat().st_size == 0:
            raise InputError(f"{path}: is empty")
        path.open("rb").close()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error


def read(path: Path) -> Contents:
    """Read a torch file (zip or legacy pickle) or a safetensors file; tensors on the CPU.

    Raises InputError: no such file, another kind of file (said which), damaged, or more than a pickle of data.
    """
    require_file(path)
    with open(path, "rb") as file:
        head = file.read(32)
    if head.startswith(b"PK\x03\x04"):
        return _read_torch(path, "torch zip")
    if head[8:9] == b"{":  # before the pickle: the length of a header may begin with any byte
        return _read_safetensors(path, *struct.unpack("<Q", head[:8]))
    if head[:1] == b"\x80":
        return _read_torch(path, "torch legacy pickle")
    seen = next((name for magic, name in MAGIC.items() if head.startswith(magic)), f"bytes {head[:8]!r}")
    raise InputError(f"{path}: is not a checkpoint (begins as {seen}); expected a torch or safetensors file")


def _read_safetensors(path: Path, header: int) -> Contents:
    from safetensors import SafetensorError, safe_open

    size = path.stat().st_size
    if header > min(limits.HEADER, size - 8):
        raise InputError(f"{path}: a safetensors header of {header} bytes in a file of {size}: truncated or damaged")
    try:
        with safe_open(path, framework="pt") as file:
            tree = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            return Contents("safetensors", tree, sha256(path), metadata=file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: a damaged safetensors file ({error})") from error


class Stub:
    """Stands for any foreign class or function: takes everything, does nothing, keeps its state."""

    name = "?"
    dump_patches = False  # torch asks a pickled module's class for it

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __call__(self, *args: Any, **kwargs: Any) -> "Stub":
        return self

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update({key: value for key, value in state.items() if isinstance(key, str)})

    def __setitem__(self, key: Any, value: Any) -> None: ...

    def append(self, item: Any) -> None:
        """Nothing."""

    def extend(self, items: Any) -> None:
        """Nothing."""

    add = append


def _tensor_parts() -> dict[tuple[str, str], Any]:
    """The only names that an unpickled file gets: tensors, their storages and plain containers."""
    import torch

    parts: dict[tuple[str, str], Any] = {
        ("collections", "OrderedDict"): OrderedDict,
        ("collections", "defaultdict"): defaultdict,
        ("collections", "Counter"): Counter,
        ("torch", "Size"): torch.Size,
        ("torch", "device"): torch.device,
    }
    for rebuild in (torch._utils._rebuild_tensor, torch._utils._rebuild_tensor_v2, torch._utils._rebuild_parameter):
        # Wrapped, since a pickle may set attributes on whatever it is given.
        parts["torch._utils", rebuild.__name__] = partial(rebuild)
    for builtin in (dict, list, set, tuple, int, float, str, bool, complex):
        parts |= {(module, builtin.__name__): builtin for module in ("builtins", "__builtin__")}
    for name, value in vars(torch).items():
        if isinstance(value, torch.dtype):
            parts["torch", name] = value
    parts |= {("torch", f"{name}Storage"): getattr(torch, dtype) for name, dtype in STORAGES.items()}
    return parts


def stub_pickle(foreign: set[str]) -> types.ModuleType:
    """A pickle module for torch.load whose unpickler adds each foreign name to `foreign` and returns a stub for it."""
    parts = _tensor_parts()

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if (module, name) in parts:
                return parts[module, name]
            foreign.add(f"{module}.{name}")
            return type("Stub", (Stub,), {"name": f"{module}.{name}"})

    def load(file: IO[bytes], **options: Any) -> Any:
        return Unpickler(file, **options).load()

    stub = types.ModuleType("stub_pickle")
    stub.Unpickler, stub.load, stub.UnpicklingError = Unpickler, load, pickle.UnpicklingError  # type: ignore[attr-defined]
    return stub


def _check_zip(path: Path) -> bool:
    """Refuse what would swell or is damaged; True if it is a TorchScript archive.

    The code in such an archive may be compressed, since it is never read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            names = [record.filename for record in records]
            if not any(name.endswith("/data.pkl") for name in names):
                raise InputError(f"{path}: is a zip archive without data.pkl, not a torch checkpoint")
            script = any(name.endswith("/constants.pkl") for name in names)
            read = [r for r in records if not script or re.search(r"/data\.pkl$|/data/\d+$", r.filename)]
            if any(record.compress_type != zipfile.ZIP_STORED for record in read):
                raise InputError(f"{path}: holds compressed records, which torch never writes; refused")
            if sum(record.file_size for record in read) > path.stat().st_size:
                raise InputError(f"{path}: declares more bytes than it has; refused")
            if not script and (bad := archive.testzip()):  # those of a script are verified as they are read
                raise InputError(f"{path}: record {bad} is damaged (checksum); fetch the file again")
            return script
    except (zipfile.BadZipFile, EOFError, OSError, struct.error) as error:
        raise InputError(f"{path}: truncated or damaged ({error}); fetch the file again") from error


def _read_torch(path: Path, container: str) -> Contents:
    if container == "torch zip" and _check_zip(path):
        return _read_script(path)
    # A legacy file comes from memory: torch would unpack one on disk that is also a tar archive.
    with open(path, "rb") if container == "torch zip" else io.BytesIO(path.read_bytes()) as file:
        tree, foreign = unpickle(file, f"{path}: cannot be read as a {container}")
    return Contents(container, tree, sha256(path), foreign)


def unpickle(file: IO[bytes], problem: str) -> tuple[Any, list[str]]:
    """(what a torch file holds, the foreign names in it). Raises InputError, beginning with `problem`."""
    import torch

    foreign: set[str] = set()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # False because torch takes a pickle_module only then; ours knows the parts of tensors and nothing else,
            # and gives an inert stub where torch's own would refuse the file for one foreign name.
            tree = torch.load(file, map_location="cpu", weights_only=False, pickle_module=stub_pickle(foreign))
    except Exception as error:  # an untrusted pickle can fail in any way, and each is the file's fault
        raise InputError(f"{problem}: {first_line(error)}") from error
    return tree, sorted(foreign)


def first_line(error: Exception) -> str:
    """An error of somebody else's in one short line."""
    text = str(error).strip()
    return text.splitlines()[0][:160] if text else type(error).__name__


def _read_script(path: Path) -> Contents:
    """The tensors of a TorchScript archive. torch.jit.load and torch.load would run its code; its pickle is data."""
    foreign: set[str] = set()
    try:
        with zipfile.ZipFile(path) as archive:
            folder = next(n for n in archive.namelist() if n.endswith("/data.pkl")).removesuffix("data.pkl")
            unpickler = stub_pickle(foreign).Unpickler(io.BytesIO(archive.read(f"{folder}data.pkl")))
            storages: dict[str, Any] = {}
            unpickler.persistent_load = lambda key: _storage(key, archive, folder, storages)
            tree = unpickler.load()
    except Exception as error:  # an untrusted pickle can fail in any way, and each is the file's fault
        raise InputError(f"{path}: cannot be read as a TorchScript archive: {first_line(error)}") from error
    return Contents("TorchScript archive", tree, sha256(path), sorted(foreign))


def _storage(key: tuple[Any, ...], archive: zipfile.ZipFile, folder: str, known: dict[str, Any]) -> Any:
    import torch

    kind, dtype, name = key[0], key[1], str(key[2])
    if kind != "storage" or not isinstance(dtype, torch.dtype):
        raise InputError(f"an unknown kind of storage {kind!r}")
    if name not in known:
        data = bytearray(archive.read(f"{folder}data/{name}"))
        known[name] = torch.frombuffer(data, dtype=torch.uint8).untyped_storage() if data else torch.UntypedStorage(0)
    return torch.storage.TypedStorage(wrap_storage=known[name], dtype=dtype, _internal=True)


def state_of(value: Any) -> Mapping[str, Any] | None:
    """The tensors and parts that a pickled module keeps, or None for any other foreign object.

    A module of torch has _parameters, _buffers and _modules; one of TorchScript has them as plain attributes.
    """
    if not isinstance(value, Stub):
        return None
    state = vars(value)
    if isinstance(state.get("_modules"), Mapping) and isinstance(state.get("_parameters"), Mapping):
        parts = {**state["_parameters"], **state.get("_buffers", {}), **state["_modules"]}
        return {name: part for name, part in parts.items() if name not in state.get("_non_persistent_buffers_set", ())}
    return state if type(value).name.startswith("__torch__.") else None
