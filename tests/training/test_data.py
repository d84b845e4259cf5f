"""Data sets of every kind, and the batches that training takes from them."""

import hashlib
import io
import multiprocessing
import os
import pickle
import shutil
import signal
import struct
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from collapse import InputError
from collapse.data.batches import as_bytes
from collapse.data.labelled import of_arrays, open_data, same_classes, to_memory
from collapse.data.preprocessing import Preprocessing
from collapse.data.sources import Pixels
from collapse.files import limits, tars
from collapse.files.descriptor import opened
from collapse.files.pictures import UnreadableImage
from collapse.recipes.config import make_config
from collapse.recipes.views import Augmentation
from collapse.training.loader import BatchOrder, Unreadable, batches


def noise(n, height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, height, width, 3), dtype=np.uint8)


def smooth(n, height, width, seed=0):
    coarse = torch.from_numpy(noise(n, 4, 5, seed)).permute(0, 3, 1, 2).float()
    return (
        torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
        .to(torch.uint8)
        .permute(0, 2, 3, 1)
        .numpy()
    )


@pytest.fixture(scope="module")
def jpegs(tmp_path_factory):
    """A folder of 20 training JPEGs in two classes, of several sizes, and one PNG."""
    folder = tmp_path_factory.mktemp("jpegs")
    for index in range(20):
        image = Image.fromarray(smooth(1, 60 + index, 90 - index, index)[0])
        path = folder / f"train/{'ab'[index % 2]}/{index:02d}.{'png' if index == 3 else 'jpg'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, quality=95)
    return folder


def test_arrays_of_a_file_are_a_set(tmp_path):
    x, y = noise(6, 8, 8), np.array([0, 1, 2, 0, 1, 2])
    np.savez(tmp_path / "a.npz", x_train=x, y_train=y[:, None], x_test=x[:3, :, :, 0], y_test=y[:3])
    train, val = (open_data(tmp_path / "a.npz", split) for split in ("train", "val"))
    assert torch.equal(train.images.pixels, torch.from_numpy(x).permute(0, 3, 1, 2))
    assert train.labels.tolist() == y.tolist()
    assert torch.equal(val.images.pixels[:, 2], torch.from_numpy(x[:3, :, :, 0]))
    assert np.array_equal(np.array(train.images.open(4)), x[4])
    same_classes(train, val, "a.npz")
    assert train.digest != val.digest
    np.savez(tmp_path / "b.npz", x_train=x.astype(float), y_train=y)
    with pytest.raises(InputError, match=r"x_train is float64 \(6, 8, 8, 3\), expected uint8"):
        open_data(tmp_path / "b.npz", "train")
    with pytest.raises(InputError, match="cannot read x_test and y_test"):
        open_data(tmp_path / "b.npz", "val")


def test_cifar_is_read_as_torchvision_stores_it(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10

    rows = np.random.default_rng(0).integers(0, 256, (4, 3072), dtype=np.uint8)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name, *_ in [*CIFAR10.train_list, *CIFAR10.test_list]:
        (folder / name).write_bytes(pickle.dumps({"data": rows, "labels": [3, 1, 4, 1]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [*"abcdefghij"]}))
    with pytest.raises(InputError, match="data_batch_1: is not the file of CIFAR-10 that torchvision knows"):
        open_data(f"cifar10:{tmp_path}", "train")
    with pytest.raises(InputError, match=r"holds no CIFAR-10 as torchvision stores it .*: no such file"):
        open_data(f"cifar10:{folder}", "train")
    md5 = lambda entry: (entry[0], hashlib.md5((folder / entry[0]).read_bytes()).hexdigest())
    for name in ("train_list", "test_list"):
        monkeypatch.setattr(CIFAR10, name, [*map(md5, getattr(CIFAR10, name))])
    meta = {**CIFAR10.meta, "md5": md5([CIFAR10.meta["filename"]])[1]}
    monkeypatch.setattr(CIFAR10, "meta", meta)
    train, val = (open_data(f"cifar10:{tmp_path}", split) for split in ("train", "val"))
    assert (len(train), len(val), train.classes) == (20, 4, tuple("abcdefghij"))
    assert np.array_equal(train.images.pixels[1].numpy(), rows[1].reshape(3, 32, 32))
    assert val.labels.tolist() == [3, 1, 4, 1]


def test_tar_shards_are_read_in_place(tmp_path):
    pixels = noise(6, 10, 12)
    for shard in range(2):
        with tarfile.open(tmp_path / f"train-{shard}.tar", "w") as archive:
            for index in range(3 * shard, 3 * shard + 3):
                file = io.BytesIO()
                Image.fromarray(pixels[index]).save(file, "png")
                label = b"%d" % (index % 2) if index != 5 else b'{"label": 1}'
                for suffix, content in (("png", file.getvalue()), ("json" if index == 5 else "cls", label)):
                    member = tarfile.TarInfo(f"{index:03d}.{suffix}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    data = open_data(tmp_path, "train")
    assert data.labels.tolist() == [0, 1, 0, 1, 0, 1]
    for index in (5, 0, 3):
        assert np.array_equal(np.array(data.images.open(index)), pixels[index])
    (tmp_path / "val.tar").write_bytes(b"no tar, but long enough to look at" * 99)
    with pytest.raises(InputError, match="damaged or compressed tar"):
        open_data(tmp_path, "val")
    with tarfile.open(tmp_path / "val.tar", "w") as archive:
        archive.add(tmp_path / "train-0.tar", "x.png")
    with pytest.raises(InputError, match=r"val\.tar/x\.png: lies in no class; val wants one folder a class, or labels"):
        open_data(tmp_path, "val")


def test_what_is_no_data_set_is_refused(tmp_path, jpegs):
    with pytest.raises(InputError, match="has no folder val"):
        open_data(jpegs, "val")
    loose = tmp_path / "train"
    loose.mkdir()
    Image.fromarray(noise(1, 4, 4)[0]).save(loose / "a.png")
    with pytest.raises(InputError, match=r"a\.png: lies in no class"):
        open_data(tmp_path, "train")
    one, two = (of_arrays(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), np.zeros(2), names) for names in ("ab", "ac"))
    with pytest.raises(InputError, match="class 'b' is in train alone"):
        same_classes(one, two, "set")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.eye(3, dtype=np.int64), r"y_train is int64 \(3, 3\), expected 3 class numbers"),
        (np.array([0, -1, 1]), "expected 3 class numbers from 0"),
        (np.array([0.0, 1.0, 1.0]), "y_train is float64"),
        (np.array([0, 1]), "expected 3 class numbers"),
        (np.array([0, 1, 40_000_000]), "y_train: a class number 40000000, expected 0 to 32767"),
        (np.array([0, 1, 2**63], np.uint64), "y_train: a class number 9223372036854775807"),
        (None, "truncated zip"),
    ],
)
def test_labels_that_are_none_are_refused(tmp_path, labels, message):
    path = tmp_path / "set.npz"
    if labels is None:
        np.savez(path, x_train=noise(3, 4, 4))
        path.write_bytes(path.read_bytes()[:200])
    else:
        np.savez(path, x_train=noise(3, 4, 4), y_train=labels)
    with pytest.raises(InputError, match=message):
        open_data(path, "train")


def test_16_bit_grey_is_scaled_for_training_as_for_evaluation(tmp_path):
    for index, top in enumerate((40000, 65535)):
        path = tmp_path / f"train/{index}/a.png"
        path.parent.mkdir(parents=True)
        Image.fromarray(np.full((24, 20 + index), top, np.uint16)).save(path)
    data = open_data(tmp_path, "train")
    whole = Augmentation(20, scale=(1, 1), ratio=1.0, flip=0, jitter=0, grayscale=0)
    (batch,) = batches(data, BatchOrder(2, 2, 1, 0), (whole,), 0, 0)
    for index, pixels in zip(batch.images, batch.pixels, strict=True):
        assert torch.equal(pixels[0], as_bytes(Preprocessing(20, 20).pixels(data.images.open(int(index)))))


def test_small_sets_of_one_size_are_decoded_once(tmp_path, jpegs):
    pixels = noise(5, 16, 16)
    for index in range(5):
        path = tmp_path / f"train/{index % 2}/{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[index]).save(path)
    data = open_data(tmp_path, "train")
    kept = to_memory(data, 0)
    assert isinstance(kept.images, Pixels)
    assert torch.equal(kept.images.pixels, torch.from_numpy(pixels[[0, 2, 4, 1, 3]]).permute(0, 3, 1, 2))
    assert (kept.digest, kept.labels.tolist()) == (data.digest, [0, 0, 0, 1, 1])
    several = open_data(jpegs, "train")
    assert to_memory(several, 0) is several
    for damaged in ("train/0/0.png", "train/1/3.png"):  # the first, the last
        shutil.copytree(tmp_path / "train", tmp_path / "copy/train", dirs_exist_ok=True)
        (tmp_path / "copy" / damaged).write_bytes(b"nothing")
        assert isinstance(to_memory(open_data(tmp_path / "copy", "train"), 0).images, Pixels)
    whole = Preprocessing(16, 16)
    assert torch.equal(torch.cat(list(data.batches(whole, 2, 0))), torch.cat(list(kept.batches(whole, 2, 0))))
    small = Preprocessing(8, 8)
    assert torch.equal(torch.cat(list(data.batches(small, 2, 0))), torch.cat(list(kept.batches(small, 2, 0))))


def written(folder, count=12, size=(24, 20)):
    """A set of PNGs of one size in two classes, and their pixels (n, 3, h, w) in order."""
    images = [Image.fromarray(smooth(1, *size, seed=k)[0]) for k in range(count)]
    for index, image in enumerate(images):
        path = folder / f"train/{'ab'[index >= count // 2]}/{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    return folder


def test_a_lost_image_is_replaced_alike_in_memory_and_by_workers_and_the_way_stays(tmp_path):
    folder = written(tmp_path)
    (folder / "train/b/11.png").write_bytes(b"nothing")
    (folder / "train/a/03.png").unlink()
    (folder / "train/a/03.png").mkdir()
    (folder / "train/a/03.png/x.png").symlink_to("nowhere")
    data = open_data(folder, "train")
    kept, plan = to_memory(data, 2), BatchOrder(12, 12, 2, 0)
    assert isinstance(kept.images, Pixels)
    whole = Augmentation(20, scale=(1, 1), ratio=24 / 20, flip=0, jitter=0, grayscale=0)
    for here, there in zip(batches(kept, plan, (whole,), 0, 0), batches(data, plan, (whole,), 0, 2), strict=True):
        np.testing.assert_array_equal(here.images, there.images)
        assert sorted(here.images.tolist()) == [0, 0, 1, 2, 4, 4, *range(5, 11)]  # label and all
        assert sorted(here.unreadable) == sorted(there.unreadable)
        assert [text.partition(":")[0][-13:] for text in sorted(here.unreadable)] == [
            "a/03.png/x.png"[1:],
            "rain/b/11.png",
        ]
    part = kept.subset(np.array([11, 3, 5]))
    assert part.labels.tolist() == [0, 0, 0]
    assert torch.equal(part.images.pixels, kept.images.pixels[[0, 4, 5]])
    for path in sorted((folder / "train").rglob("*.png"))[:-2]:
        if path.is_file():
            path.write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"ten images in a row cannot be read, the last: .*png: not a readable"):
        to_memory(open_data(folder, "train"), 0)


@pytest.mark.parametrize("kind", ["folder", "zip", "shards"])
def test_a_set_is_another_when_an_image_is_another_of_the_same_name_and_size(tmp_path, kind):
    def make(place, tone, label=b"1"):
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8), (tone, 0, 0)).save(buffer, "BMP")
        files = {"a/0.bmp": bytes(buffer.getvalue()), "b/1.bmp": bytes(199)}
        (tmp_path / place).mkdir()
        if kind == "folder":
            for name, data in files.items():
                (tmp_path / place / "train" / name).parent.mkdir(parents=True)
                (tmp_path / place / "train" / name).write_bytes(data)
            return open_data(tmp_path / place, "train")
        if kind == "zip":
            with zipfile.ZipFile(tmp_path / place / "set.zip", "w") as archive:
                for name, data in files.items():
                    archive.writestr(f"train/{name}", data)
            return open_data(tmp_path / place / "set.zip", "train")
        shard(tmp_path / place / "train.tar", {**files, "a/0.cls": b"0", "b/1.cls": label})
        return open_data(tmp_path / place, "train")

    one, same, other = make("one", 7), make("same", 7), make("other", 8)
    assert one.digest == same.digest != other.digest
    assert one.names_digest == same.names_digest == other.names_digest
    names = "\n".join(f"{name} {label}" for name, label in zip(one.images.names, [0, 1], strict=True))
    assert one.names_digest == hashlib.sha256(names.encode()).hexdigest()  # as runs of version 1 have it
    parts = [one.subset(np.array(indices)) for indices in ((0, 1), (1, 0))]
    assert len({one.digest, *(part.digest for part in parts)}) == 3
    assert {part.names_digest for part in parts} == {one.names_digest}


def test_contents_of_a_large_set_are_sampled_and_sizes_never(tmp_path, monkeypatch):
    folder = written(tmp_path)
    whole = open_data(folder, "train").digest
    monkeypatch.setattr(limits, "DIGESTED", 100)
    monkeypatch.setattr(limits, "SAMPLED", 3)
    digests = {open_data(folder, "train").digest}
    assert whole not in digests
    for name, change in (("a/01.png", b""), ("a/00.png", b""), ("a/01.png", b"longer")):
        path = folder / f"train/{name}"
        path.write_bytes(path.read_bytes()[:-1] + b"?" + change)
        digests.add(open_data(folder, "train").digest)
    assert len(digests) == 3  # the first change is of a file that is not in the sample
    data = [open_data(folder, "train", most).digest for most in (1000, 2000)]
    assert data[0] != data[1]


def shard(path, files, format=tarfile.PAX_FORMAT):
    with tarfile.open(path, "w", format=format) as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def tar_header(name, size, kind=b"0"):
    """A header of ustar; size: its 12 bytes."""
    block = bytearray(512)
    block[: len(name)], block[100:108], block[124:136], block[156:157] = name, b"0000644\0", size, kind
    block[257:265], block[148:156] = b"ustar\x0000", b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


octal = lambda size: b"%011o\0" % size
LABEL = tar_header(b"a.cls", octal(1)) + b"0".ljust(512, b"\0")
IMAGE = tar_header(b"a.png", octal(4)) + b"\x89PNG".ljust(512, b"\0")
PAX = lambda text: tar_header(b"x", octal(len(text)), b"x") + text.ljust(512, b"\0")


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_the_index_of_a_tar_is_that_of_pythons_own_reader(tmp_path, format):
    long = "d" * 90 + "/" + ("n" * (90 if format == tarfile.USTAR_FORMAT else 160))
    files = {"plain.png": b"x" * 700, "empty.png": b"", f"{long}.png": b"y" * 512, "é\udcff.png": b"z", "v7": b"1"}
    path = shard(tmp_path / "x.tar", files, format)
    with tarfile.open(path, "a", format=format) as archive:
        for name, kind in (("folder", tarfile.DIRTYPE), ("soft.png", tarfile.SYMTYPE), ("hard.png", tarfile.LNKTYPE),
                           ("pipe.png", tarfile.FIFOTYPE), ("device.png", tarfile.CHRTYPE)):  # fmt: skip
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "plain.png"
            archive.addfile(member)
    with opened(path) as source:
        members, links = tars.members(source)
        assert {member.name: source.read(member.start, member.size) for member in members} == files
    assert links == ["soft.png", "hard.png"]
    with tarfile.open(path) as archive:
        theirs = [(m.name, m.offset_data, m.size) for m in archive if m.isfile()]
    assert [tuple(member) for member in members] == theirs


ATTACKS = {
    "a negative size": (tar_header(b"a.png", b"-0000001000\0"), "without a size of bytes"),
    "a negative size in base 256": (tar_header(b"a.png", b"\xff" * 12), "without a size of bytes"),
    "a negative size by pax": (PAX(b"13 size=-512\n") + IMAGE, "a member's size is '-512'"),
    "a size beyond the end": (LABEL + tar_header(b"a.png", octal(1 << 30)), "truncated"),
    "a size beyond all ends": (LABEL + tar_header(b"a.png", b"\x80" + b"\x7f" * 11), "truncated"),
    "a size by pax beyond the end": (PAX(b"22 size=9999999999999\n") + IMAGE, "truncated"),
    "a long name without end": (tar_header(b"l", octal(1 << 30), b"L"), "a header of 1073741824 bytes"),
    "a pax record of no length": (PAX(b"0 path=a\n") + IMAGE, "a damaged pax header"),
    "a pax record of another length": (PAX(b"99 path=a\n") + IMAGE, "a damaged pax header"),
    "a sparse label of gnu": (IMAGE + tar_header(b"a.cls", octal(1), b"S") + b"0".ljust(512, b"\0"), "stored sparse"),
    "a sparse label of pax": (IMAGE + PAX(b"22 GNU.sparse.major=1\n") + LABEL, "stored sparse"),
    "two files of one name": (LABEL + IMAGE + IMAGE, "two files are called 'a.png'"),
    "a checksum": (LABEL + IMAGE[:5] + b"x" + IMAGE[6:], "damaged at byte 1024"),
    "no end": (b"", "truncated"),
    "a large label": (tar_header(b"a.cls", octal(1 << 17)) + bytes(1 << 17) + IMAGE, "a label of 131072 bytes"),
    "a huge class": (tar_header(b"a.cls", octal(8)) + b"40000000".ljust(512, b"\0") + IMAGE, "a class number 40000000"),
    "an endless class": (
        tar_header(b"a.cls", octal(13)) + b"1099511627776".ljust(512, b"\0") + IMAGE,
        "class number 1099",
    ),
    "a negative class": (
        tar_header(b"a.cls", octal(2)) + b"-5".ljust(512, b"\0") + IMAGE,
        "class number from 0, got -5",
    ),
    "a class and a half": (
        tar_header(b"a.cls", octal(3)) + b"1.5".ljust(512, b"\0") + IMAGE,
        "class number from 0, got 1.5",
    ),
    "an infinite class": (
        tar_header(b"a.cls", octal(5)) + b"1e999".ljust(512, b"\0") + IMAGE,
        "expected a class number",
    ),
    "a class in brackets": (
        tar_header(b"a.cls", octal(9999)) + b"[" * 9999 + bytes(241) + IMAGE,
        "expected a class number",
    ),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_shard_that_lies_is_one_line(tmp_path, in_child, attack):
    content, message = ATTACKS[attack]
    (tmp_path / "train.tar").write_bytes(
        content + bytes(1024 if attack != "no end" else 0) if content else LABEL + IMAGE
    )

    def act():
        with pytest.raises(InputError, match=message) as caught:
            open_data(tmp_path, "train")
        assert "\n" not in str(caught.value)

    in_child(act)


def test_a_shard_that_is_replaced_while_it_is_read_is_another(tmp_path, jpegs):
    image = (jpegs / "train/a/00.jpg").read_bytes()
    shard(tmp_path / "train.tar", {"a.jpg": image, "a.cls": b"0", "b.jpg": image, "b.cls": b"1", "notes.txt": b"x"})
    data = open_data(tmp_path, "train")
    assert data.warnings == ("1 files are no images by their names, first 'train.tar/notes.txt'; left out",)
    assert pickle.loads(pickle.dumps(data.images)).open(1).size == data.images.open(1).size
    os.utime(tmp_path / "train.tar", (0, 0))
    with pytest.raises(UnreadableImage, match=r"train\.tar/b\.jpg: .*the shard is another file than at the start"):
        data.images.open(1)


def npz(path, **records):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in records.items():
            archive.writestr(f"{name}.npy", data)
    return path


def npy(shape, data, descr="|u1"):
    head = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(head)) + head.encode() + data


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (npy((100, 32, 32, 1000), bytes(102_400_000)), "unpacks to .* bytes, at most 67108864 are read"),
        (npy((1 << 60, 32, 32, 3), bytes(3072)), "x_train: damaged: shape"),
        (npy((-1, 32, 32, 3), bytes(3072)), "x_train: damaged .its header"),
        (npy((1, 32, 32, 3), bytes(3072), "|O"), "x_train: it holds Python objects"),
        (npy((1, 32, 32, 3), bytes(3071)), "x_train: damaged: shape"),
        (npy("(1, " * 3000, b""), "x_train: truncated or damaged .its header"),
        (b"no array", "x_train: truncated or damaged: it does not begin"),
        (npy((0, 32, 32, 3), b""), r"x_train is uint8 \(0, 32, 32, 3\), expected"),
    ],
)
def test_an_array_of_images_that_lies_is_one_line(tmp_path, in_child, x, message):
    path = npz(tmp_path / "set.npz", x_train=x, y_train=npy((1,), b"\0"))
    del x

    def act():
        with pytest.raises(InputError, match=message) as caught:
            open_data(path, "train")
        assert "\n" not in str(caught.value)

    in_child(act)


def test_the_plan_shows_every_image_once_an_epoch_however_many_processes_share_it():
    alone = list(BatchOrder(26, 8, 3, seed=5).batches(0))
    assert [epoch for epoch, _ in alone] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    for epoch in range(3):
        seen = np.concatenate([images for e, images in alone if e == epoch])
        assert len(set(seen.tolist())) == 24
    assert not np.array_equal(alone[0][1], alone[3][1])
    shared = [list(BatchOrder(26, 8, 3, 5, rank, 2).batches(0)) for rank in range(2)]
    for (_, whole), *parts in zip(alone, *shared, strict=True):
        np.testing.assert_array_equal(whole, np.concatenate([images for _, images in parts]))
    for first in (1, 3, 5, 8):
        for (epoch, images), (e, i) in zip(BatchOrder(26, 8, 3, 5).batches(first), alone[first:], strict=True):
            assert epoch == e
            np.testing.assert_array_equal(images, i)


def test_workers_make_the_same_crops(jpegs):
    data, plan = open_data(jpegs, "train"), BatchOrder(20, 8, 2, 0)
    views = (Augmentation(24), Augmentation(24, scale=(0.5, 1)))
    alone = list(batches(data, plan, views, 1, 0))
    workers = list(batches(data, plan, views, 1, 2))
    assert len(alone) == len(workers) == 3
    for one, two in zip(alone, workers, strict=True):
        assert one.pixels.shape == (8, 2, 3, 24, 24)
        assert torch.equal(one.pixels, two.pixels)
        np.testing.assert_array_equal(one.images, two.images)


def test_the_death_of_a_worker_is_one_line(jpegs):
    running = batches(open_data(jpegs, "train"), BatchOrder(20, 2, 1000, 0), (Augmentation(24),), 0, 2)
    next(running)
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    with pytest.raises(InputError, match=r"a loader process died .*; try workers=0"):
        for _ in running:
            pass


def test_a_damaged_jpeg_is_replaced(jpegs, tmp_path):
    shutil.copytree(jpegs, tmp_path / "set")
    path = tmp_path / "set/train/a/00.jpg"
    path.write_bytes(path.read_bytes()[:300])
    data = open_data(tmp_path / "set", "train")
    (batch,) = batches(data, BatchOrder(20, 20, 1, 0), (Augmentation(24),), 0, 0)
    assert len(batch.unreadable) == 1
    assert "00.jpg: not a readable image" in batch.unreadable[0]
    # Its place is the next one's, label and all.
    assert sorted(batch.images.tolist()) == [1, 1, *range(2, 20)]
    for path in (tmp_path / "set/train").rglob("*.*"):
        path.write_bytes(b"nothing")
    with pytest.raises(InputError, match="ten images in a row"):
        next(batches(open_data(tmp_path / "set", "train"), BatchOrder(20, 20, 1, 0), (Augmentation(24),), 0, 0))


@pytest.mark.parametrize(("n", "limit"), [(20, 10), (5000, 50)])
def test_lost_images_are_reported_once_and_too_many_are_an_error(n, limit, capsys):
    unreadable, names = Unreadable(n), [f"{k:02d}.png: not a readable image" for k in range(limit + 1)]
    for _ in range(2):
        unreadable.note(names[:limit])
    assert capsys.readouterr().err.count("another image is taken instead") == limit
    with pytest.raises(InputError, match=f"{limit + 1} images cannot be read, the last: {limit}.png"):
        unreadable.note(names)


def test_every_preset_says_what_it_is():
    assert make_config("digits").batch_size == 128
    with pytest.raises(InputError, match="expected bf16 or float32"):
        make_config("digits", precision="fp8")
    with pytest.raises(InputError, match="do not divide the batch"):
        make_config("digits", chunks=3)


def test_a_preset_file_of_ones_own(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text('{"arch": "mlp", "planes": [8, 4]}')
    assert make_config(str(path)).planes == (8, 4)
    path.write_text('{"archs": "mlp"}')
    with pytest.raises(InputError, match="unknown value 'archs'; known are arch, batch_size"):
        make_config(str(path))
    path.write_text('{"%s": 1}' % ("a" * 20_000))
    with pytest.raises(InputError, match="unknown value 'aaa") as caught:
        make_config(str(path))
    assert len(str(caught.value)) < 1000
    path.write_text("[]")
    with pytest.raises(InputError, match="unknown value"):
        make_config(str(path))
    path.write_text("{")
    with pytest.raises(InputError, match="not readable as JSON"):
        make_config(str(path))
