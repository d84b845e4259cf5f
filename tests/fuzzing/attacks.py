"""Files that try to run code, to write or read other files, or to take the machine: what readers must be proof against.

`ATTACKS` has a function for each kind; it yields variants: (name, target of fuzz_targets.py, `Mutant`).
Code that runs would make a file called `executed` where the reader works.
"""

import io
import json
import pickle
import struct
import tarfile
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import fuzz_pictures
import fuzz_seeds
import numpy as np
from fuzz_mutants import Files, Mutant, read_folder
from fuzz_pickles import _string as text

Attack = tuple[str, str, Mutant]
ATTACKS: list[Callable[[], Iterator[Attack]]] = []
SHELL = "touch executed"


def attack(write: Callable[[], Iterator[Attack]]) -> Callable[[], Iterator[Attack]]:
    """Register the function below."""
    ATTACKS.append(write)
    return write


class Runs:
    """Pickles to a call that makes the file `executed`."""

    def __reduce__(self) -> tuple:
        return exec, ("open('executed', 'w').close()",)


def one(name: str, content: bytes) -> Mutant:
    return Mutant(name, {name: content}, "")


def zipped(records: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, data in records.items():
            archive.writestr(name, data)
    return file.getvalue()


def saved(tree: object, **how: object) -> bytes:
    import torch

    file = io.BytesIO()
    torch.save(tree, file, **how)
    return file.getvalue()


def script() -> bytes:
    """A TorchScript archive."""
    import torch

    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(torch.nn.Linear(64, 1)), file)
    return file.getvalue()


def saved_array(array: object) -> bytes:
    file = io.BytesIO()
    # numpy writes objects as a pickle only when told to; the readers must refuse what comes of it.
    np.save(file, np.array(array, object), allow_pickle=True)
    return file.getvalue()


def in_zip(program: bytes) -> bytes:
    return zipped({"a/data.pkl": b"\x80\x02" + program + b".", "a/version": b"3\n", "a/data/0": bytes(16)})


def legacy(program: bytes) -> bytes:
    head = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
    return b"".join(pickle.dumps(part, 2) for part in head) + b"\x80\x02" + program + b"." + pickle.dumps([], 2)


NESTED = b"K\1" + b"2\x86" * 60
BUILDS = b"ccollections\n%s\nN}" + text("update") + b"Ns\x86b"
PROGRAMS = {
    "reduce": b"cos\nsystem\n" + text(SHELL) + b"\x85R",
    "stack global": text("os") + text("system") + b"\x93" + text(SHELL) + b"\x85R",
    "inst": b"(S'" + SHELL.encode() + b"'\nios\nsystem\n",
    "obj": b"(cos\nsystem\n" + text(SHELL) + b"o",
    "newobj": b"csubprocess\nPopen\n" + text(SHELL) + b"\x85\x81",
    "newobj ex": b"csubprocess\nPopen\n" + text(SHELL) + b"\x85}\x92",
    "nested getattr": b"cbuiltins\ngetattr\ncos\nsystem\n" + text("__call__") + b"\x86R" + text(SHELL) + b"\x85R",
    "dotted name": text("os") + text("path.os.system") + b"\x93" + text(SHELL) + b"\x85R",
    "torch.load": b"ctorch\nload\n" + text("executed") + b"\x85R",
    "from_file": b"ctorch\nfrom_file\n(" + text("executed") + b"\x88K\x09tR",
    "load from bytes": b"ctorch.storage\n_load_from_bytes\nC\x05bytes\x85R",
    "numpy reconstruct": b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\0\x85C\1btR"
    + b"(K\1K\1\x85cnumpy\ndtype\n" + text("O8") + b"\x89\x88\x87R\x89]tb",
    "Counter's update": BUILDS % b"Counter",
    "OrderedDict's update": BUILDS % b"OrderedDict",
    "defaultdict's update": BUILDS % b"defaultdict",
    "rebuild's defaults": b"ctorch._utils\n_rebuild_tensor_v2\nN}" + text("__defaults__") + b"Ns\x86b",
    "module with source": b"(" + text("module") + b"ctorch.nn\nLinear\n" + text("executed") + text("import os") + b"tQ",
    "opened file": b"(" + text("opened_file") + text("executed") + b"tQ",
    "text id": b"Pexecuted\n",
    "extension": b"\x82\1",
    "memo index": b"Nr" + struct.pack("<I", 2**32 - 1),
    "memo text": b"Np4294967295\n",
    "long string": b"X" + struct.pack("<I", 2**32 - 1),
    "long bytes": b"\x8e" + struct.pack("<Q", 1 << 40),
    "long bytearray": b"\x96" + struct.pack("<Q", 1 << 40),
    "long integer": b"\x8b" + struct.pack("<i", 2**31 - 1),
    "decimal integer": b"L" + b"9" * 1_000_000 + b"L\n",
    "shared tuples as a key": b"}" + NESTED + b"Ns",
    "shared tuples in a set": b"\x8f(" + NESTED + b"\x90",
    "shared tuples frozen": b"(" + NESTED + b"\x91",
    "shared tuples as text": b"cbuiltins\nstr\n" + NESTED + b"\x85R",
    "shared tuples as a number": b"cbuiltins\ncomplex\n" + NESTED + b"\x85R",
    "shared tuples as a size": b"ctorch\nSize\n" + NESTED + b"\x85R",
    "deep lists": b"]" * 200_000 + b"a" * 199_999,
}  # fmt: skip


@attack
def pickles() -> Iterator[Attack]:
    """Programs in both containers of torch, alone, and as the index of a distributed checkpoint."""
    for name, program in PROGRAMS.items():
        for way, content in (
            ("zip", in_zip(program)),
            ("legacy", legacy(program)),
            ("raw", b"\x80\4" + program + b"."),
        ):
            yield f"{name}, {way}", "checkpoint", one("a.pth", content)
            yield f"{name}, {way}, as an array", "array", one("a.pt", content)
        yield (
            f"{name}, DCP",
            "checkpoint",
            Mutant("d", {"d/.metadata": b"\x80\2" + program + b".", "d/a.distcp": b"0"}, ""),
        )


@attack
def two_directories() -> Iterator[Attack]:
    """Archives in which a reader may find harmless records, and another one a script."""
    harmless, evil = (in_zip(program) for program in (b"}", PROGRAMS["reduce"]))
    for name, (first, second) in {"evil last": (harmless, evil), "evil first": (evil, harmless)}.items():
        end = first.rfind(b"PK\5\6")
        yield f"{name}, one after the other", "checkpoint", one("a.pt", first + second)
        yield (
            f"{name}, one in the comment",
            "checkpoint",
            one("a.pt", first[:-2] + struct.pack("<H", len(second)) + second),
        )
        yield f"{name}, of equal size", "checkpoint", one("a.pt", first[:end] + second[:-6] + first[-6:])
        start = struct.unpack_from("<L", first, end + 16)[0]
        yield (
            f"{name}, side by side",
            "checkpoint",
            one(
                "a.pt",
                first[:start] + second[struct.unpack_from("<L", second, len(second) - 6)[0] : -22] + first[start:],
            ),
        )


@attack
def scripts() -> Iterator[Attack]:
    """TorchScript, whose loading runs code: alone, without its constants, and as a distributed checkpoint's chunk."""
    archive = script()
    yield "a script", "checkpoint", one("a.pt", archive)
    with zipfile.ZipFile(io.BytesIO(archive)) as opened:
        records = {name: opened.read(name) for name in opened.namelist()}
    plain = {name: data for name, data in records.items() if not name.endswith("constants.pkl")}
    yield "a script without constants", "checkpoint", one("a.pt", zipped(plain))
    code = {name: b"import os" if name.endswith(".py") else data for name, data in records.items()}
    yield "a script with other code", "checkpoint", one("a.pt", zipped(code))
    for name, chunk in {"a script": archive, "a module": legacy(PROGRAMS["module with source"]), "zeros": _swollen(),
                        "a program": in_zip(PROGRAMS["reduce"])}.items():  # fmt: skip
        for files in _distributed(chunk):
            yield f"a chunk that is {name}", "checkpoint", Mutant("1/dcp", files, "")


def _swollen() -> bytes:
    """A torch file of 64 MiB of zeros, deflated to 64 kB."""
    with zipfile.ZipFile(io.BytesIO(saved(np.zeros(0)))) as opened:
        records = {name: opened.read(name) for name in opened.namelist()}
    return zipped({**records, "archive/data/0": bytes(64 << 20)}, zipfile.ZIP_DEFLATED)


def _distributed(chunk: bytes) -> Iterator[Files]:
    """A distributed checkpoint whose tensors all are this chunk."""
    with tempfile.TemporaryDirectory() as folder:
        fuzz_seeds.make("DCP folder", Path(folder))
        files = read_folder(Path(folder))
    index = next(name for name in files if name.endswith(".metadata"))
    stored = pickle.loads(files[index])
    part = next(name for name in files if name.endswith(".distcp"))
    for place in stored.storage_data.values():
        place.offset, place.length = 0, len(chunk)
    yield {index: pickle.dumps(stored), part: chunk}
    for place in stored.storage_data.values():
        place.relative_path = "../../executed"
    yield {index: pickle.dumps(stored), part: chunk}


@attack
def arrays() -> Iterator[Attack]:
    """Arrays of objects, wherever numpy's files are read."""
    evil = saved_array([[Runs(), 1], [2, 3]])
    yield "objects, npy", "array", one("a.npy", evil)
    for name in ("embeddings.npy", "z.npy", "a.npy"):
        yield f"objects, npz, {name}", "array", one("a.npz", zipped({name: evil}))
    records = {f"{name}.npy": evil for name in ("x_train", "y_train", "x_test", "y_test")}
    yield "objects for training", "data", one("s.npz", zipped(records))
    header = "{'descr': %s, 'fortran_order': False, 'shape': (2, 2)}\n"
    for name, descr in {"code": "__import__('os').system('touch executed')", "a field": "[('a', '|O')]",
                        "a comprehension": "[open('executed', 'w') for a in (1,)][0]"}.items():  # fmt: skip
        content = (header % descr).encode()
        whole = b"\x93NUMPY\1\0" + struct.pack("<H", len(content)) + content + evil
        yield f"{name} in a header", "array", one("a.npy", whole)


@attack
def zarrs() -> Iterator[Attack]:
    """Codecs that run a pickle, and arrays of objects."""
    chunk = pickle.dumps(Runs())
    base = {"zarr_format": 2, "shape": [2, 2], "chunks": [2, 2], "dtype": "<f8", "compressor": None, "fill_value": 0,
            "order": "C", "filters": None}  # fmt: skip
    for name, change in {
        "filter": {"filters": [{"id": "pickle", "protocol": 5}]},
        "compressor": {"compressor": {"id": "pickle"}},
        "objects": {"dtype": "|O", "filters": [{"id": "pickle"}]},
        "objects of text": {"dtype": "|O", "filters": [{"id": "vlen-utf8"}]},
        "json": {"dtype": "|O", "filters": [{"id": "json2"}]},
        "codec of a module": {"filters": [{"id": "antigravity"}]},
    }.items():
        metadata = json.dumps({**base, **change}).encode()
        yield f"version 2, {name}", "array", Mutant("z", {"z/.zarray": metadata, "z/0.0": chunk}, "")
    newer = {"zarr_format": 3, "node_type": "array", "shape": [2, 2], "data_type": "float64", "fill_value": 0,
             "attributes": {},
             "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [2, 2]}},
             "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}}}  # fmt: skip
    bytes_codec = {"name": "bytes", "configuration": {"endian": "little"}}
    for codec in ("numcodecs.pickle", "pickle", "numcodecs.json2", "antigravity", "antigravity.codec"):
        for codecs in ([bytes_codec, {"name": codec, "configuration": {}}], [{"name": codec, "configuration": {}}]):
            metadata = json.dumps({**newer, "codecs": codecs}).encode()
            yield f"version 3, {codec}", "array", Mutant("z", {"z/zarr.json": metadata, "z/c/0/0": chunk}, "")


@attack
def disguises() -> Iterator[Attack]:
    """Files that other programs would open, under names of images: in folders, zips and tars."""
    for number, content in enumerate(fuzz_pictures.DISGUISES):
        for ending in ("png", "jpg", "tif"):
            yield f"disguise {number}, {ending}", "images", Mutant("photos", {f"photos/cat.{ending}": content}, "")
        yield f"disguise {number}, zip", "images", one("photos.zip", zipped({"cat.png": content}))
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w") as archive:
            for name, data in (("a.png", content), ("a.cls", b"0")):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
        shards = {f"s/{split}.tar": file.getvalue() for split in ("train", "val")}
        yield f"disguise {number}, tar", "data", Mutant("s", shards, "")
        yield f"disguise {number}, checkpoint", "checkpoint", one("a.pth", content)
        yield f"disguise {number}, array", "array", one("a.npy", content)


@attack
def names() -> Iterator[Attack]:
    """Names in configs and headers that lead to code or to the network."""
    with tempfile.TemporaryDirectory() as folder:
        fuzz_seeds.make("safetensors", Path(folder))
        weights = read_folder(Path(folder))["01/a.safetensors"]
    odd = weights.replace(b"conv1.weight", b"other.weight")  # of no family: the name in the config decides
    for name in (
        "hf-hub:evil/net",
        "hf_hub:evil/net",
        "local-dir:.",
        "local-dir:../",
        "os.system",
        "torchvision:../a",
        "timm:hf-hub:evil/a",
    ):
        for content in (weights, odd):
            mapped = {"architectures": [name], "model_type": name, "auto_map": {"AutoModel": "modeling.Net"}}
            for config in ({"architecture": name}, mapped):
                files = {"f/model.safetensors": content, "f/config.json": json.dumps(config).encode(),
                         "f/modeling.py": b"open('executed', 'w')"}  # fmt: skip
                yield f"{name} in config.json", "checkpoint", Mutant("f", files, "")
        size = struct.unpack_from("<Q", weights)[0]
        header = json.loads(weights[8 : 8 + size])
        header["__metadata__"] = {"collapse": json.dumps({"architecture": {"arch": name}})}
        packed = json.dumps(header).encode()
        whole = struct.pack("<Q", len(packed)) + packed + weights[8 + size :]
        yield f"{name} in a header", "checkpoint", one("a.safetensors", whole)


@attack
def runs() -> Iterator[Attack]:
    """A RUN of somebody else, whose state or spectra are programs."""
    import hashlib

    with tempfile.TemporaryDirectory() as folder:
        fuzz_seeds.make("RUN", Path(folder))
        files = {name[3:]: data for name, data in read_folder(Path(folder)).items() if name.startswith("01/")}
    seal = lambda content: content + hashlib.sha256(content).digest()
    for name in (
        "reduce",
        "torch.load",
        "module with source",
        "Counter's update",
        "memo index",
        "shared tuples as a key",
    ):
        for content in (in_zip(PROGRAMS[name]), legacy(PROGRAMS[name])):
            yield f"{name} as a state", "run", Mutant("run", {**files, "run/resume.pt": seal(content)}, "")
    evil = {f"{name}.npy": saved_array([Runs()]) for name in ("steps", "representation")}
    yield "objects as spectra", "run", Mutant("run", {**files, "run/spectra.npz": zipped(evil)}, "")


@attack
def parquets() -> Iterator[Attack]:
    """An extension type of Arrow's, which once was a pickle."""
    import pyarrow
    from pyarrow import parquet

    file, evil = io.BytesIO(), pickle.dumps(Runs())
    about = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": evil}
    field = pyarrow.field("z", pyarrow.list_(pyarrow.float64()), metadata=about)
    table = pyarrow.table([[[1.0, 2.0], [3.0, 5.0]]], schema=pyarrow.schema([field], metadata={"pandas": "{"}))
    parquet.write_table(table, file)
    yield "a pickle as a type", "array", one("a.parquet", file.getvalue())


@attack
def seeds() -> Iterator[Attack]:
    """Every seed of the fuzzer as it is: the odd ones among them are refused."""
    for name, found in fuzz_seeds.FORMATS.items():
        if found.quick:
            with tempfile.TemporaryDirectory() as folder:
                fuzz_seeds.make(name, Path(folder))
                for place in sorted(Path(folder).iterdir()):
                    entry = fuzz_seeds.entry(place)
                    yield f"seed {name} {entry}", found.target, Mutant(entry, read_folder(place), "")
