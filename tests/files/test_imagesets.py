"""Images wherever people keep them are the same images; their range of values, channels and labels are theirs."""

import gzip
import io
import multiprocessing
import pickle
import re
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import torch
from PIL import Image
from pyarrow import ipc, parquet

import collapse
from collapse import CollapseWarning, InputError, cli
from collapse.checkpoints.own import Module
from collapse.data.batches import pixel_batches
from collapse.data.images import Images
from collapse.data.labelled import UNLABELLED, open_data, open_parts
from collapse.data.preprocessing import Preprocessing
from collapse.files.pictures import UnreadableImage

HERE = Path(__file__).parent
PIXELS = np.random.default_rng(0).integers(0, 256, (6, 12, 10, 3), np.uint8)
LABELS = [0, 1, 2, 0, 1, 2]


def encoded(values):
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    return buffer.getvalue()


def folder(place, pixels=PIXELS, kind="png"):
    place.mkdir(parents=True)
    for index, values in enumerate(pixels):
        if kind == "npy":
            np.save(place / f"{index}.npy", values)
        else:
            Image.fromarray(values).save(place / f"{index}.{kind}")
    return place


def shard(path, labels=None):
    with tarfile.open(path, "w") as archive:
        for index, values in enumerate(PIXELS):
            files = {"png": encoded(values), "txt": b"a caption"}
            if labels:
                files["cls"] = b"%d" % labels[index]
            for ending, data in files.items():
                member = tarfile.TarInfo(f"{index:06d}.{ending}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return path


def table(labels=True):
    rows = [{"bytes": encoded(values), "path": f"/etc/{index}.png"} for index, values in enumerate(PIXELS)]
    return pyarrow.table({"idx": range(6), "image": rows, **({"label": LABELS} if labels else {})})


def saved(place, found=None):
    """What `Dataset.save_to_disk` of the package datasets leaves: streams of Arrow and JSON."""
    place.mkdir(parents=True)
    found = found or table()
    for number, part in enumerate((found.slice(0, 4), found.slice(4))):
        with ipc.new_stream(str(place / f"data-0000{number}-of-00002.arrow"), found.schema) as file:
            file.write_table(part, max_chunksize=3)
    (place / "state.json").write_text("{}")
    (place / "dataset_info.json").write_text("{}")
    return place


def npz(path, **arrays):
    np.savez_compressed(path, **arrays)
    return path


def npy(path, values):
    np.save(path, values)
    return path


def plain_parquet(path):
    parquet.write_table(pyarrow.table({"img": [encoded(values) for values in PIXELS]}), path, row_group_size=4)
    return path


def tiff(path, pixels=PIXELS):
    pages = [Image.fromarray(values) for values in pixels]
    pages[0].save(path, save_all=True, append_images=pages[1:], compression="tiff_lzw")
    return path


PLACES = {
    "folder": lambda place: folder(place / "photos"),
    "folder of .npy": lambda place: folder(place / "arrays", kind="npy"),
    "folder of channels first": lambda place: folder(place / "arrays", PIXELS.transpose(0, 3, 1, 2), "npy"),
    "tar": lambda place: shard(place / "x.tar"),
    "folder of tars": lambda place: shard(place / "x.tar").parent,
    "parquet": lambda place: (
        (parquet.write_table(table(), place / "x.parquet", row_group_size=4), place)[1] / "x.parquet"
    ),
    "parquet of bytes": lambda place: plain_parquet(place / "x.parquet"),
    "saved by datasets": lambda place: saved(place / "set"),
    "npy": lambda place: npy(place / "x.npy", PIXELS),
    "npy of channels first": lambda place: npy(place / "x.npy", PIXELS.transpose(0, 3, 1, 2)),
    "npy in Fortran's order": lambda place: npy(place / "x.npy", np.asfortranarray(PIXELS)),
    "npz": lambda place: npz(place / "x.npz", images=PIXELS, labels=np.array(LABELS)),
    "pages of a TIFF": lambda place: tiff(place / "x.tif"),
}


@pytest.mark.parametrize("place", PLACES)
def test_the_same_images_are_read_from_every_place_in_any_order(tmp_path, place):
    images = Images(PLACES[place](tmp_path))
    assert len(images) == len(set(images.names)) == 6
    for index in (5, 0, 3, 4):
        np.testing.assert_array_equal(np.asarray(images.open(index)), PIXELS[index])
    found = torch.cat(list(pixel_batches(images.some([4, 1]), Preprocessing(None, None))))
    np.testing.assert_array_equal(found.permute(0, 2, 3, 1), PIXELS[[4, 1]])
    copy = pickle.loads(pickle.dumps(images))
    assert copy.names == images.names
    np.testing.assert_array_equal(np.asarray(copy.open(2)), PIXELS[2])
    assert all(size > 0 for size, _ in map(images.mark, range(6)))
    assert len({images.read(index) for index in range(6)}) == 6


@pytest.mark.parametrize("place", ["tar", "saved by datasets"])
def test_workers_read_what_was_opened_before_they_were_forked(tmp_path, place):
    images = Images(PLACES[place](tmp_path))
    images.open(0)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        for index, found in zip((5, 1), pool.map(images.open, [5, 1]), strict=True):
            np.testing.assert_array_equal(np.asarray(found), PIXELS[index])


def test_further_pages_of_tiffs_in_a_folder_are_told(tmp_path):
    tiff(tmp_path / "a.tif")
    Image.fromarray(PIXELS[0]).save(tmp_path / "b.tif")
    images = Images(tmp_path)
    assert len(images) == 2
    (told,) = images.warnings
    assert told.startswith(
        f"{tmp_path}/a.tif holds several pages, of which the first is taken (1 of 2 images looked at)"
    )
    assert Images(tmp_path / "a.tif").warnings == []
    (tmp_path / "a.tif").unlink()
    assert Images(tmp_path).warnings == []


def test_what_holds_several_things_says_how_to_choose(tmp_path):
    places = {
        "holds 2 arrays .train_images, val_images.; name one": npz(
            tmp_path / "m.npz", train_images=PIXELS, val_images=PIXELS, train_labels=np.zeros((6, 1), np.uint8)
        ),
        "holds no column of images as bytes, but idx": tmp_path / "n.parquet",
        "holds the splits test, train; give one, as": saved(tmp_path / "d/train").parent,
        r"does not show which axis holds the channels": npy(tmp_path / "s.npy", np.zeros((4, 3, 9, 3), np.uint8)),
        r"float32 \(6, 10\), expected images": npy(tmp_path / "z.npy", np.zeros((6, 10), np.float32)),
        "feather of version 1": tmp_path / "f.arrow",
        "is compressed; unpack it first": tmp_path / "x.tar.gz",
        "is not a folder or a zip; give a folder of images": tmp_path / "x.doc",
    }
    saved(tmp_path / "d/test")
    (tmp_path / "d/dataset_dict.json").write_text("{}")
    parquet.write_table(table().select(["idx"]), tmp_path / "n.parquet")
    (tmp_path / "x.tar.gz").write_bytes(gzip.compress(shard(tmp_path / "x.tar").read_bytes()))
    (tmp_path / "f.arrow").write_bytes(b"FEA1" + bytes(200))
    (tmp_path / "x.doc").write_bytes(b"none")
    for message, place in places.items():
        with pytest.raises(InputError, match=message) as caught:
            Images(place)
        assert str(caught.value).startswith(str(place))
    np.testing.assert_array_equal(np.asarray(Images(f"{tmp_path / 'm.npz'}:val_images").open(3)), PIXELS[3])


def test_an_array_beside_images_is_no_image(tmp_path):
    place = folder(tmp_path / "photos")
    np.save(place / "z.npy", np.zeros((100, 64), np.float32))
    shard(place / "more.tar")
    images = Images(place)
    assert len(images) == 6
    assert images.left_out == ["more.tar", "z.npy"]
    assert images.warnings == ["2 files are no images by their names, first 'more.tar'; left out"]


def test_a_row_without_bytes_is_left_out_and_its_path_is_never_opened(tmp_path, monkeypatch):
    rows = [{"bytes": None, "path": str(tmp_path / "secret.png")}, {"bytes": encoded(PIXELS[1]), "path": None}]
    (tmp_path / "secret.png").write_bytes(encoded(PIXELS[0]))
    parquet.write_table(pyarrow.table({"image": rows}), tmp_path / "x.parquet")
    skipped = []
    (found,) = pixel_batches(Images(tmp_path / "x.parquet"), Preprocessing(None, None), skipped=skipped)
    np.testing.assert_array_equal(found[0].permute(1, 2, 0), PIXELS[1])
    assert [entry["why"] for entry in skipped] == ["no bytes in this row; what its path names is not opened"]


def test_what_unpacks_to_far_more_than_is_stored_is_refused(tmp_path, in_child):
    rows = pyarrow.table({"image": [bytes(40 << 20)] * 4})
    parquet.write_table(rows, tmp_path / "x.parquet", compression="zstd", use_dictionary=False)
    with ipc.new_file(str(tmp_path / "x.arrow"), rows.schema, options=ipc.IpcWriteOptions(compression="zstd")) as file:
        file.write_table(rows)
    rows = None

    def act():
        for name in ("x.parquet", "x.arrow"):
            with pytest.raises(InputError, match=r"declares 1677\d+ bytes and stores"):
                Images(tmp_path / name)

    in_child(act)


BASE = np.random.default_rng(1).random((8, 6, 6)).repeat(4, 1).repeat(4, 2)
BASE[0, 0, 0] = 1.0
RANGES = {
    "u16": ((BASE * 65535).round().astype(np.uint16), "png", None, ""),
    "12 bits in 16": ((BASE * 4095).round().astype(np.uint16), "png", None, "uint16 that reach 4095 .* as 0..4095"),
    "12 bits in a TIFF": ((BASE * 4095).round().astype(np.uint16), "tif", None, "as 0..4095"),
    "floats in 0..1": (BASE.astype(np.float32), "tif", None, "float32 that reach 1 in 8 images are read as 0..1"),
    "floats in 0..255": ((BASE * 255).astype(np.float32), "tif", None, "as 0..255"),
    "floats of -1..1": ((BASE * 2 - 1).astype(np.float32), "npy", (-1.0, 1.0), ""),
    "a window of floats": ((BASE * 3000 - 1000).astype(np.float32), "npy", (-1000.0, 2000.0), ""),
    "64-bit floats": (BASE, "npy", None, "float64 that reach 1"),
    "12 bits given": ((BASE * 4095).round().astype(np.uint16), "png", (0.0, 4095.0), ""),
}


@pytest.mark.parametrize("kind", RANGES)
def test_deep_images_are_what_their_values_mean(tmp_path, kind):
    values, ending, given, warned = RANGES[kind]
    images = Images(folder(tmp_path / "x", values, ending), pixel_range=given)
    (found,) = pixel_batches(images, Preprocessing(24, 24))
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), np.broadcast_to(BASE[:, None], (8, 3, 24, 24)), atol=2e-4)
    if warned:
        (note,) = images.warnings
        assert re.search(warned, note), note
    else:
        assert images.warnings == []


def test_16_bits_of_three_channels_are_not_cut_to_8(tmp_path):
    with zipfile.ZipFile(HERE / "geotiffs.zip") as archive:
        (tmp_path / "x.tif").write_bytes(archive.read("three-deep.tif"))
        values = np.load(io.BytesIO(archive.read("values.npy")))[..., :3]
    (tmp_path / "photos").mkdir()
    (tmp_path / "x.tif").rename(tmp_path / "photos/x.tif")
    images = Images(tmp_path / "photos")
    np.testing.assert_allclose(images.open(0), values / 255, atol=1e-6)
    assert "uint16 that reach 160 in 1 images are read as 0..255" in images.warnings[0]


def test_a_range_is_never_guessed_wrong_in_silence(tmp_path):
    dark = (BASE * 200).astype(np.uint16)
    place = folder(tmp_path / "many", np.concatenate([dark, dark, dark]), "tif")
    images = Images(place)
    bright = next(k for k in range(24) if k not in np.linspace(0, 23, 16).astype(int))
    Image.fromarray((BASE[0] * 60000).astype(np.uint16)).save(place / images.names[bright])
    with pytest.raises(InputError, match=r"uint16 from \d+ to 60000, where others lie in 0..255; give pixel_range="):
        list(pixel_batches(images, Preprocessing(24, 24), skipped=[]))
    place = folder(tmp_path / "mixed", np.repeat(PIXELS, 4, 0))
    Image.fromarray((BASE[0] * 4095).astype(np.uint16)).save(place / images.names[bright].replace("tif", "png"))
    mixed = Images(place)  # none of those that were looked at is deep
    with pytest.raises(InputError, match=r"uint16 from \d+ to 4095 among images of uint8; give pixel_range="):
        mixed.open(bright)
    both = folder(tmp_path / "both", BASE.astype(np.float32), "tif")
    Image.fromarray((BASE[0] * 65535).astype(np.uint16)).save(both / "a.tif")
    with pytest.raises(
        InputError, match=r"a\.tif: uint16 from .* among images of float32; give pixel_range=, or images"
    ):
        Images(both).open(8)
    for values in (BASE - 0.5, BASE * 1e6):
        place = folder(tmp_path / f"x{values.max()}", values.astype(np.float32), "tif")
        with pytest.raises(InputError, match=r"pixels of float32 from .*; give pixel_range=, which values are black"):
            Images(place)
    holes = BASE.astype(np.float32)
    holes[3, 0, 0] = np.nan
    skipped = []
    list(pixel_batches(Images(folder(tmp_path / "holes", holes, "tif")), Preprocessing(24, 24), skipped=skipped))
    assert [entry["why"] for entry in skipped] == ["it holds NaN or infinity"]


def test_images_without_contrast_are_a_warning_and_counted(tmp_path):
    place = folder(tmp_path / "x", np.concatenate([PIXELS, np.full((2, 12, 10, 3), 7, np.uint8)]))
    net = Module(torch.nn.Flatten())
    with pytest.warns(CollapseWarning, match="2 of 8 images are of one colour, without any contrast"):
        collapse.spectrum(net, place, normalize=False)
    small = np.full((4, 3, 12, 10), 7, np.uint8)
    small[:, 1] += 5  # one value a channel is one colour too
    small[0, 0, 11, 9] = 0
    with pytest.warns(CollapseWarning, match="3 of 4 images are of one colour"):
        collapse.spectrum(net, torch.from_numpy(small), normalize=False)


class Bands(torch.nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = torch.nn.Conv2d(channels, 5, 3)

    def forward(self, x):
        return self.conv(x).mean((2, 3))


@pytest.mark.parametrize("channels", [1, 4, 13])
def test_images_of_any_number_of_channels_reach_a_network_that_takes_them(tmp_path, channels):
    with zipfile.ZipFile(HERE / "geotiffs.zip") as archive:
        values = np.load(io.BytesIO(archive.read("values.npy")))
        data = archive.read("u1-contig-packbits-plain-strips-little.tif")
    place = tmp_path / "x"
    if channels == 13:
        place.mkdir()
        for index in range(3):
            (place / f"{index}.tif").write_bytes(data)
    else:
        folder(place, np.stack([values[..., :channels]] * 3), "npy")
    how = {"mean": (0.1,) * channels, "std": (0.5,) * channels, "crop": 16}
    net = Module(Bands(channels))
    z = collapse.embed(net, place, **how)
    right = (torch.from_numpy(values[..., :channels] / 255).permute(2, 0, 1).float() - 0.1) / 0.5
    np.testing.assert_allclose(z[0], net(right[None, :, 0:16, 1:17]).detach()[0], atol=1e-5)
    with pytest.raises(InputError, match="mean= holds 13 and std= 3 numbers; give both"):
        collapse.embed(net, place, mean=(0.1,) * 13)


def test_other_channels_than_the_network_takes_are_refused_with_the_flag(tmp_path, capsys, resnet18):
    with zipfile.ZipFile(HERE / "geotiffs.zip") as archive:
        (tmp_path / "x").mkdir()
        (tmp_path / "x/a.tif").write_bytes(archive.read("u2-separate-zstd-plain-strips-little.tif"))
    call = ["embed", str(resnet18), str(tmp_path / "x"), "--out", str(tmp_path / "z.npy"), "--workers", "0"]
    assert cli.main(call) == 2
    assert "an image of 13 channels, where --mean has 3; give --mean and --std of 13" in capsys.readouterr().err


def test_sets_without_labels_or_parts_are_trained_on_and_said_once(tmp_path):
    made = {
        "flat": lambda place: folder(place),
        "classes": lambda place: [folder(place / name) for name in "ab"],
        "flat parts": lambda place: [folder(place / name) for name in ("train", "val")],
        "no val": lambda place: [folder(place / "train" / name) for name in "ab"],
        "test": lambda place: [folder(place / split / name) for split in ("train", "test") for name in "ab"],
        "tar": lambda place: (place.mkdir(), shard(place / "train-0.tar")),
        "arrow": lambda place: [saved(place / split) for split in ("train", "validation")],
    }
    labelled, held = {"classes", "no val", "test", "arrow"}, {"flat parts", "test", "arrow"}
    for name, make in made.items():
        place = tmp_path / name
        make(place)
        train, val = open_parts(place, holdout=None if name in held else 0.5)
        whole = sum(1 for _ in place.rglob("*.png")) or 6 * (2 if name == "arrow" else 1)
        assert len(train) + len(val) == whole, name
        assert bool(train.classes) == bool(val.classes) == (name in labelled), name
        assert train.warnings.count(UNLABELLED) == (name not in labelled), name
        both = [{np.asarray(part.images.open(k)).tobytes() for k in range(len(part))} for part in (train, val)]
        assert name in held | {"classes", "no val"} or not both[0] & both[1]
        again, _ = open_parts(place, holdout=None if name in held else 0.5)
        assert (again.digest, again.names_digest) == (train.digest, train.names_digest)
    assert not open_parts(tmp_path / "classes", labels=False)[0].classes
    assert open_parts(tmp_path / "flat", holdout=0)[1] is None
    train, val = open_parts(tmp_path / "classes")
    assert (len(train), len(val)) == (10, 2)  # a covariance needs two
    assert "has no held-out part: 2 of 12 images are held out; holdout= says otherwise" in train.warnings[0]
    with pytest.raises(InputError, match="has a held-out part already; leave out holdout="):
        open_parts(tmp_path / "test", holdout=0.2)
    with pytest.raises(InputError, match="lies in no class; train wants one folder a class, or labels"):
        open_data(tmp_path / "flat parts", "train")
    Image.fromarray(PIXELS[0]).save(tmp_path / "no val/train/loose.png")
    with pytest.raises(InputError, match=r"loose\.png: lies in no class; train wants one folder a class, or labels=Fa"):
        open_parts(tmp_path / "no val")


def test_labels_of_tables_shards_and_medmnist_are_theirs(tmp_path):
    shard(tmp_path / "train-0.tar", LABELS)
    assert open_data(tmp_path, "train").labels.tolist() == LABELS
    saved(tmp_path / "d/train")
    assert open_data(tmp_path / "d", "train").labels.tolist() == LABELS
    (tmp_path / "p/data").mkdir(parents=True)
    parquet.write_table(table(), tmp_path / "p/data/validation-00000-of-00001.parquet")
    assert open_data(tmp_path / "p", "val").labels.tolist() == LABELS
    arrays = {f"{part}_{kind}": x for part in ("train", "val", "test")
              for kind, x in (("images", PIXELS), ("labels", np.array(LABELS, np.uint8)[:, None]))}  # fmt: skip
    med = npz(tmp_path / "med.npz", **arrays)
    assert [len(part) for part in open_parts(med)] == [6, 6]
    assert open_data(med, "val").labels.tolist() == LABELS
    shard(tmp_path / "val-0.tar", [*LABELS[:-1], 70000])
    with pytest.raises(InputError, match="a class number 70000, expected 0 to 32767"):
        open_data(tmp_path, "val")
    with tarfile.open(tmp_path / "train-0.tar", "a") as archive:
        member = tarfile.TarInfo("x.png")
        member.size = len(encoded(PIXELS[0]))
        archive.addfile(member, io.BytesIO(encoded(PIXELS[0])))
    with pytest.raises(InputError, match=r"train-0\.tar/x\.png: no image with a label, as others have"):
        open_data(tmp_path, "train")


def test_a_sample_is_over_all_classes_and_the_same_for_a_seed(tmp_path, resnet18):
    for name in "abcd":
        folder(tmp_path / "x" / name)
    call = [
        "embed",
        str(resnet18),
        str(tmp_path / "x"),
        "--resize",
        "8",
        "--crop",
        "8",
        "--workers",
        "0",
        "--sample",
        "9",
    ]
    for out, seed in (("1", "0"), ("2", "0"), ("3", "5")):
        assert cli.main([*call, "--seed", seed, "--out", str(tmp_path / f"{out}.npy")]) == 0
    lists = [(tmp_path / f"{out}.txt").read_text().splitlines() for out in "123"]
    assert lists[0] == lists[1] == sorted(lists[0]) != lists[2]
    assert len(lists[0]) == 9
    assert {name[0] for name in lists[0]} == set("abcd")


def test_an_image_that_is_far_too_large_is_refused_wherever_it_lies(tmp_path):
    for place in (npy(tmp_path / "x.npy", PIXELS), tiff(tmp_path / "x.tif"), folder(tmp_path / "f", kind="npy")):
        with pytest.raises(UnreadableImage, match="10 x 12 pixels, over 119; give a larger max_pixels="):
            Images(place, 119).open(0)
        assert np.asarray(Images(place, 120).open(0)).shape == (12, 10, 3)
