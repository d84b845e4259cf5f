"""Small files of every format that is read, written by the programs that write such files.

Each function below writes the files of one format: `new(NAME)` is the path of the next, alone in a folder of its own.
"""

import argparse
import csv
import gzip
import io
import json
import pickle
import shutil
import struct
import sys
import tarfile
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import features

sys.path.append(str(Path(__file__).parents[1] / "checkpoints"))  # the layouts, also where this is a program

New = Callable[[str], Path]
ROWS = np.random.default_rng(0).standard_normal((12, 5))
PIXELS = np.random.default_rng(1).integers(0, 256, (4, 9, 11, 3), dtype=np.uint8)


@dataclass(frozen=True)
class Format:
    """Who reads such files (a key of fuzz.TARGETS), who writes them, and whether that takes under a second."""

    target: str
    write: Callable[[New], None]
    quick: bool


FORMATS: dict[str, Format] = {}


def seeds(name: str, target: str, quick: bool = True) -> Callable[[Callable[[New], None]], Callable[[New], None]]:
    """Register the function below as the writer of a format."""

    def register(write: Callable[[New], None]) -> Callable[[New], None]:
        FORMATS[name] = Format(target, write, quick)
        return write

    return register


def make(name: str, folder: Path) -> None:
    """Write the seeds of a format as folder/NUMBER/NAME."""
    count = 0

    def new(entry: str) -> Path:
        nonlocal count
        count += 1
        place = folder / f"{count:02d}"
        place.mkdir(parents=True)
        return place / entry

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        FORMATS[name].write(new)


def entry(place: Path) -> str:
    """What is opened of a seed: the only thing there, or the one that is no neighbour of the others."""
    names = sorted(path.name for path in place.iterdir())
    return next((n for n in names if n.endswith((".txt", ".json"))), names[0])


def _network():
    import torch
    from layouts import Network

    torch.manual_seed(0)
    return Network(widths=(4, 4, 8, 8), depths=(1, 1, 1, 1), stem=3)


def _trees():
    """State dicts as projects save them: bare, among an optimizer's state and arguments, and a pickled module."""
    import torch
    from layouts import mlp, optimizer, put

    net = _network()
    state = net.state_dict()
    args = argparse.Namespace(arch="resnet18", where=Path("/data"), lr=0.1)
    yield state
    yield {
        "epoch": 3,
        "state_dict": put("module.backbone.", state) | put("module.projector.", mlp(8, 16, 4, norm=True).state_dict()),
        "optimizer": optimizer(torch.nn.Linear(1, 1)),
        "args": args,
        "np": np.float64(0.5),
        "random": torch.ByteTensor(9),
    }
    yield net


@seeds("torch zip", "checkpoint")
def torch_zip(new):
    import torch

    for tree in _trees():
        torch.save(tree, new("a.pth"))


@seeds("torch legacy pickle", "checkpoint")
def torch_legacy(new):
    import torch

    for tree in _trees():
        torch.save(tree, new("a.pth"), _use_new_zipfile_serialization=False)
    torch.save(_network().state_dict(), new("protocol4.pth"), _use_new_zipfile_serialization=False, pickle_protocol=4)


@seeds("TorchScript archive", "checkpoint", quick=False)
def script(new):
    from layouts_transformers import openai_clip

    _layout(new("a.pt"), openai_clip)


@seeds("safetensors", "checkpoint")
def safetensors(new):
    from safetensors.torch import save_file

    state = {key: value.contiguous() for key, value in _network().state_dict().items()}
    save_file(state, new("a.safetensors"), {"format": "pt"})
    save_file({key: value.half() for key, value in state.items()}, new("half.safetensors"))
    about = {"preprocessing": {"resize": 32, "crop": 32, "interpolation": "bilinear", "mean": None, "std": None}}
    save_file(state, new("own.safetensors"), {"collapse": json.dumps(about)})


def _layout(path: Path, write: Callable) -> None:
    """A file or folder as a layout's test has it."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.move(write(Path(folder)).tree, path)


@seeds("Hugging Face folder", "checkpoint", quick=False)
def huggingface(new):
    import layouts_transformers as layouts
    import torch
    from safetensors.torch import load_file

    _layout(new("folder"), layouts.huggingface_shards)
    _layout(new("folder"), layouts.huggingface_resnet)
    path = new("folder")
    with tempfile.TemporaryDirectory() as folder:
        saved = layouts.huggingface_vit(Path(folder)).tree
        path.mkdir()
        torch.save(load_file(saved / "model.safetensors"), path / "pytorch_model.bin")
        for name in ("config.json", "preprocessor_config.json"):
            shutil.copy(saved / name, path)


@seeds("folder with a config", "checkpoint", quick=False)
def configured(new):
    from layouts_transformers import open_clip_hub, timm_hub

    _layout(new("folder"), open_clip_hub)
    _layout(new("folder"), timm_hub)


@seeds("encoder of texts", "encoder", quick=False)
def encoder_of_texts(new):
    from layouts_texts import ROWS

    _folders(new, "texts", ROWS)


@seeds("encoder of sounds", "encoder", quick=False)
def encoder_of_sounds(new):
    from layouts_sounds import ROWS

    _folders(new, "sounds", ROWS)


@seeds("encoder of clips", "encoder", quick=False)
def encoder_of_clips(new):
    from layouts_clips import ROWS

    _folders(new, "clips", ROWS)


def _folders(new: New, name: str, rows: list) -> None:
    """The folders of a test's layouts."""
    for row in rows:
        folder = new(name)
        folder.mkdir()
        row.write(folder)


@seeds("texts", "texts")
def texts(new):
    rows = ["a dog runs", "", 'two cats, on a "mat"', "é 日本", "  ", "last"]
    new("t.txt").write_text("\n".join(rows) + "\n")
    new("t.txt").write_bytes("\r\n".join(rows).encode("utf-8-sig"))
    new("t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    new("t.jsonl").write_text("".join(json.dumps({"id": i, "text": row}) + "\n" for i, row in enumerate(rows)))
    for name, delimiter in (("t.csv", ","), ("t.tsv", "\t")):
        with open(new(name), "w", newline="") as file:
            csv.writer(file, delimiter=delimiter).writerows([("id", "sentence"), *enumerate(rows)])


@seeds("sounds", "sounds")
def sounds(new):
    import soundfile
    from scipy.io import wavfile

    wave = np.sin(np.arange(600) / 9) * 0.5
    for name, subtype in (("PCM_16", "wav"), ("PCM_24", "wav"), ("PCM_U8", "wav"), ("FLOAT", "wav"), ("ULAW", "wav"),
                          ("PCM_16", "flac"), ("PCM_24", "flac")):  # fmt: skip
        folder = new("sounds")
        folder.mkdir()
        soundfile.write(folder / f"a.{subtype}", np.stack([wave, -wave / 2], 1), 8000, name)
    (folder := new("sounds")).mkdir()
    wavfile.write(folder / "a.wav", 16_000, (wave * 30_000).astype(np.int16))
    wavfile.write(folder / "b.wav", 44_100, wave)


@seeds("DCP folder", "checkpoint")
def dcp(new):
    import torch.distributed.checkpoint as distributed
    from layouts import put

    state = {"model": put("backbone.", _network().state_dict()), "epoch": 3}
    distributed.save(state, checkpoint_id=new("dcp"), no_dist=True)


@seeds("npy", "array")
def npy(new):
    header = "{{'descr': '<f8', 'fortran_order': False, 'shape': {}, }}"
    np.save(new("a.npy"), ROWS)
    np.save(new("fortran.npy"), np.asfortranarray(ROWS))
    np.save(new("big.npy"), ROWS.astype(">f4"))
    np.save(new("half.npy"), ROWS.astype(np.float16))
    np.save(new("bytes.npy"), (ROWS * 9).astype(np.int8))
    for version in ((2, 0), (3, 0)):
        with open(new("version.npy"), "wb") as file:
            np.lib.format.write_array(file, ROWS, version)
    # numpy writes objects as a pickle only when told to: this seed is one that must be refused.
    np.save(new("objects.npy"), np.array([[{}, 1]], object), allow_pickle=True)
    text = header.format((10**9, 100_000)).encode() + b"\n"
    new("huge.npy").write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text)


@seeds("npz", "array")
def npz(new):
    np.savez(new("stored.npz"), embeddings=ROWS, labels=np.arange(12))
    np.savez_compressed(new("deflated.npz"), z=ROWS.astype(np.float32))
    np.savez(new("objects.npz"), z=np.array([[{}, 1]], object))


@seeds("tensor", "array")
def tensor(new):
    import torch
    from safetensors.torch import save_file

    rows = torch.from_numpy(ROWS)
    torch.save(rows, new("a.pt"))
    torch.save({"embeddings": rows.bfloat16(), "labels": torch.arange(12)}, new("two.pt"))
    torch.save(rows.t(), new("transposed.pt"))
    torch.save(rows[:1].expand(12, 5), new("expanded.pt"))
    torch.save(rows.to_sparse(), new("sparse.pt"))
    torch.save(rows, new("legacy.pt"), _use_new_zipfile_serialization=False)
    save_file({"embeddings": rows.contiguous()}, new("a.safetensors"))


@seeds("HDF5", "array")
def hdf5(new):
    import h5py

    kinds = {"plain": {}, "chunks": {"chunks": (4, 5), "compression": "gzip", "shuffle": True, "fletcher32": True}}
    for name, options in kinds.items():
        for library in ("earliest", "latest"):
            with h5py.File(new(f"{name}-{library}.h5"), "w", libver=library) as file:
                file.create_dataset("embeddings", data=ROWS, **options)
                file.create_dataset("group/labels", data=np.arange(12))
    with h5py.File(new("odd.h5"), "w") as file:
        file["text"] = "a"
        file["external"] = h5py.ExternalLink("/etc/passwd", "/z")
        file["soft"] = h5py.SoftLink("/soft")
        file.create_dataset("outside", (12, 5), "f8", external=[("/etc/passwd", 0, h5py.h5f.UNLIMITED)])
        file.create_dataset("embeddings", (1 << 40, 1 << 20), "f8", chunks=(64, 64))


@seeds("Parquet", "array")
def parquet(new):
    import pyarrow
    from pyarrow import parquet

    lists = pyarrow.array(list(ROWS), pyarrow.list_(pyarrow.float64()))
    fixed = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(ROWS.astype("f4").ravel()), 5)
    parquet.write_table(pyarrow.table({"embeddings": lists}), new("lists.parquet"))
    parquet.write_table(pyarrow.table({"z": fixed, "name": ["a"] * 12}), new("fixed.parquet"), compression="gzip")
    columns = {f"c{i}": ROWS[:, i] for i in range(5)} | {"i": np.arange(12)}
    parquet.write_table(pyarrow.table(columns), new("columns.parquet"), compression="none", use_dictionary=False)
    parquet.write_table(pyarrow.table({"z": [1.0, None] * 6}), new("missing.parquet"), version="1.0")


@seeds("MATLAB", "array")
def matlab(new):
    from scipy.io import savemat

    for packed in (False, True):
        savemat(new("a.mat"), {"embeddings": ROWS, "labels": np.arange(12)}, do_compression=packed)
    savemat(new("odd.mat"), {"z": ROWS.astype(np.float32), "cells": np.array([{"a": 1}, "b"], object), "text": "abc"})
    savemat(new("whole.mat"), {"z": (ROWS * 9).astype(np.int16)})


@seeds("table", "array")
def table(new):
    for name, delimiter in (("a.csv", ","), ("a.tsv", "\t")):
        for heading in ((), [("x0", "x1", "x2", "x3", "x4")]):
            with open(new(name), "w", newline="") as file:
                csv.writer(file, delimiter=delimiter).writerows([*heading, *ROWS.tolist()])
    with open(new("named.csv"), "w", newline="") as file:
        rows = ((f"image {i}", *row) for i, row in enumerate(ROWS.tolist()))
        csv.writer(file).writerows([("name", *(f"feat_{i}" for i in range(5))), *rows])
    new("a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS.tolist()))
    rows = ({"id": i, "response": {"embedding": row}} for i, row in enumerate(ROWS.tolist()))
    new("a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@seeds("Arrow", "array")
def arrow(new):
    import pyarrow
    from pyarrow import feather, ipc

    lists = pyarrow.array(list(ROWS), pyarrow.list_(pyarrow.float64()))
    fixed = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(ROWS.astype("f4").ravel()), 5)
    columns = pyarrow.table({f"c{i}": ROWS[:, i] for i in range(5)})
    for index, table in enumerate((pyarrow.table({"embeddings": lists}), pyarrow.table({"z": fixed}), columns)):
        for write in (ipc.new_stream, ipc.new_file):
            with write(str(new("a.arrow")), table.schema) as file:
                file.write_table(table, max_chunksize=7)
        feather.write_feather(table, str(new("a.feather")), compression=("uncompressed", "lz4", "zstd")[index])


@seeds("pickle of arrays", "array")
def pickle_of_arrays(new):
    for protocol in (2, 4, 5):
        new("a.pkl").write_bytes(pickle.dumps(ROWS, protocol))
        new("a.pkl").write_bytes(pickle.dumps({"embeddings": ROWS.astype("f4"), "names": ["a"] * 12}, protocol))
    new("a.pkl").write_bytes(pickle.dumps(np.asfortranarray(ROWS), 5))


@seeds("zarr", "array")
def zarr(new):
    import zarr

    for version in (2, 3):
        array = zarr.create_array(new("z.zarr"), data=ROWS, chunks=(5, 3), zarr_format=version)
        assert array.shape == ROWS.shape
        group = zarr.create_group(new("g.zarr"), zarr_format=version)
        group.create_array("embeddings", data=ROWS.astype("f4"), compressors=None)
        group.create_array("labels", data=np.arange(12))
    zarr.create_array(new("shards.zarr"), data=ROWS, chunks=(3, 5), shards=(6, 5), zarr_format=3)


def _spectra():
    import collapse

    measured = collapse.spectrum(ROWS, vectors=True, jackknife=2)
    return [replace(measured, source={"kind": "array", "path": "z.npy", "layer": name})
            for name in ("layer1", "representation")]  # fmt: skip


@seeds("result", "result")
def result(new):
    from collapse.results import to_json

    first, second = _spectra()
    new("a.json").write_text(first.to_json())
    second.save(new("vectors.json"))
    layers = [first.to_dict(), second.to_dict()]
    new("all.json").write_text(to_json({"schema": "collapse.spectra/1", "layers": layers}))


@seeds("preset", "preset")
def preset(new):
    from collapse.recipes.config import PRESETS

    for path in sorted(PRESETS.glob("*.json")):
        shutil.copy(path, new("a.json"))


def _picture(index: int = 0):
    from PIL import Image

    return Image.fromarray(PIXELS[index])


def _png(index: int = 0) -> bytes:
    buffer = io.BytesIO()
    _picture(index).save(buffer, "png")
    return buffer.getvalue()


def _images(name: str, *savings: dict) -> None:
    """Register folders of two images: one that stays as it is, and one of each way of saving."""

    def write(new):
        for saving in savings:
            options = dict(saving)
            mode = options.pop("mode", "RGB")
            picture = _picture()
            picture = picture.convert("I").convert("I;16") if mode == "I;16" else picture.convert(mode)
            folder = new("photos")
            folder.mkdir()
            picture.save(folder / f"a.{name}", **options)
            _picture(1).save(folder / "whole.bmp")

    seeds(f"image {name}", "images")(write)


_images("png", {}, {"mode": "P"}, {"mode": "L"}, {"mode": "RGBA"}, {"mode": "I;16"}, {"mode": "1"})
_images("jpg", {}, {"mode": "L"}, {"mode": "CMYK"}, {"progressive": True}, {"exif": b"Exif\0\0II*\0\x08\0\0\0\0\0"})
_images("webp", {}, {"lossless": True}, {"mode": "RGBA"})
_images("gif", {"mode": "P"}, {"mode": "L"})
_images("bmp", {}, {"mode": "P"}, {"mode": "1"})
_images("ppm", {})
_images("pgm", {"mode": "L"}, {"mode": "I;16"})
_images("tga", {}, {"mode": "P"}, {"compression": "tga_rle"})
_images("jp2", {}, {"mode": "L"}, {"irreversible": True})
if features.check("avif"):  # Pillow before 11.3 has no AVIF
    _images("avif", {}, {"mode": "RGBA"})
_images("tif", {}, {"compression": "tiff_lzw"}, {"compression": "tiff_adobe_deflate"}, {"compression": "jpeg"},
        {"mode": "1", "compression": "group4"}, {"mode": "CMYK"}, {"mode": "I;16"}, {"mode": "F"})  # fmt: skip


@seeds("image zip", "images")
def image_zip(new):
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        with zipfile.ZipFile(new("photos.zip"), "w", method) as archive:
            for index in range(3):
                archive.writestr(f"photos/{index}.png", _png(index))


@seeds("image list", "images")
def image_list(new):
    path = new("list.txt")
    for index in range(3):
        _picture(index).save(path.parent / f"{index}.png")
    path.write_text("2.png\n0.png\n1.png\n")


@seeds("image arrays", "images")
def image_arrays(new):
    deep = (PIXELS.astype(np.float32) + 1) / 257
    np.save(new("x.npy"), PIXELS)
    np.save(new("x.npy"), np.asfortranarray(deep.transpose(0, 3, 1, 2)))
    np.savez_compressed(new("x.npz"), images=(deep * 4095).astype(np.uint16))
    (folder := new("photos")).mkdir()
    for index, picture in enumerate(deep):
        np.save(folder / f"{index}.npy", picture)


@seeds("image tables", "images")
def image_tables(new):
    import pyarrow
    from pyarrow import ipc, parquet

    rows = [{"bytes": _png(index), "path": f"{index}.png"} for index in range(3)]
    table = pyarrow.table({"image": rows, "label": [0, 1, 0]})
    parquet.write_table(table, new("x.parquet"), row_group_size=2)
    for write in (ipc.new_stream, ipc.new_file):
        with write(str(new("x.arrow")), table.schema) as file:
            file.write_table(table, max_chunksize=2)
    with ipc.new_file(str(new("x.feather")), table.schema, options=ipc.IpcWriteOptions(compression="lz4")) as file:
        file.write_table(table)


@seeds("image bands", "images")
def image_bands(new):
    with zipfile.ZipFile(Path(__file__).parents[1] / "files/geotiffs.zip") as archive:
        for name in ("pages.tif", "three-deep.tif", "four-infrared.tif", "u1-contig-packbits-plain-strips-little.tif"):
            data = archive.read(name)
            if name == "pages.tif":
                new("x.tif").write_bytes(data)
            else:
                (folder := new("photos")).mkdir()
                (folder / "x.tif").write_bytes(data)
                (folder / "y.tif").write_bytes(data)


@seeds("class folder", "data")
def class_folder(new):
    path = new("set")
    for split in ("train", "val"):
        for index in range(2):
            (path / split / "ab"[index]).mkdir(parents=True)
            _picture(index).save(path / split / "ab"[index] / "x.png")


@seeds("class zip", "data")
def class_zip(new):
    for top in ("", "set/"):
        with zipfile.ZipFile(new("set.zip"), "w", zipfile.ZIP_DEFLATED) as archive:
            for split in ("train", "val"):
                for index in range(2):
                    archive.writestr(f"{top}{split}/{'ab'[index]}/x.png", _png(index))


@seeds("shards", "data")
def shards(new):
    for kind in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = new("set")
        path.mkdir()
        for split in ("train", "val"):
            with tarfile.open(path / f"{split}-0.tar", "w", format=kind) as archive:
                for index in range(2):
                    label = b"%d" % index if index else b'{"label": 0}'
                    for name, content in (("png", _png(index)), ("cls" if index else "json", label)):
                        member = tarfile.TarInfo(f"{'long/' * 25 if index else ''}a.{name}")
                        member.size = len(content)
                        archive.addfile(member, io.BytesIO(content))
    shutil.copytree(path, packed := new("packed"))
    (packed / "train-0.tar").write_bytes(gzip.compress((path / "train-0.tar").read_bytes(), mtime=0))


@seeds("training npz", "data")
def training_npz(new):
    y = np.array([0, 1, 0, 1])
    for save in (np.savez, np.savez_compressed):
        save(new("set.npz"), x_train=PIXELS, y_train=y, x_test=PIXELS[:2, :, :, 0], y_test=y[:2])


@seeds("RUN", "run")
def run(new):
    import torch

    from collapse.recipes.config import Config
    from collapse.training.run import Run

    net = torch.nn.Linear(3, 2)
    for finished in (False, True):
        folder = new("run")
        opened = Run(folder, Config().as_dict(), {"train": "a digest"})
        generator = torch.Generator().get_state()
        for step in (1, 2):
            opened.add_spectra(step, {"representation": np.ones(5), "projector": np.ones(3)})
            opened.log({"step": step, "epoch": 1, "loss": 0.5, "effective_rank": 3.0, "images_per_second": 9.0})
            opened.save({"net": net.state_dict(), "step": step, "generator": generator, "best": None})
        lock = (folder / ".lock").read_text()
        opened.close()
        if finished:
            from safetensors.torch import save_file

            save_file(net.state_dict(), folder / "encoder.safetensors", {"collapse": "{}"})
        else:  # killed: its lock is that of a process that is no more
            (folder / ".lock").write_text(lock)


if __name__ == "__main__":  # fuzz_seeds.py FOLDER FORMAT ...: what the writers load stays in this process
    for chosen in sys.argv[2:]:
        make(chosen, Path(sys.argv[1]) / chosen)
