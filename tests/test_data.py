"""Data sets of every kind, and the batches that training takes from them."""

import io
import multiprocessing
import os
import pickle
import shutil
import signal
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from collapse import InputError
from collapse.images import Images, Preprocessing
from collapse.training.config import make_config
from collapse.training.data import Pixels, of_arrays, open_data, same_classes, to_memory
from collapse.training.loader import Plan, Unreadable, batches
from collapse.training.views import Augmentation


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
    with pytest.raises(InputError, match="holds no CIFAR-10"):
        open_data(f"cifar10:{tmp_path}", "train")  # checksums differ
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *a: True)
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
    with pytest.raises(InputError, match=r"val\.tar/x\.png: no image with a label"):
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
        (None, "cannot read x_train and y_train"),
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


def test_a_zip_travels_to_workers_that_are_not_forked(tmp_path, jpegs):
    path = shutil.make_archive(tmp_path / "set", "zip", jpegs)
    images = Images(f"{path}/train")
    first = images.open(0)
    copy = pickle.loads(pickle.dumps(images))
    assert np.array_equal(np.array(copy.open(0)), np.array(first))


def test_16_bit_grey_is_scaled_for_training_as_for_evaluation(tmp_path):
    for index, top in enumerate((40000, 65535)):
        path = tmp_path / f"train/{index}/a.png"
        path.parent.mkdir(parents=True)
        Image.fromarray(np.full((24, 20 + index), top, np.uint16)).save(path)
    data = open_data(tmp_path, "train")
    whole = Augmentation(20, scale=(1, 1), ratio=1.0, flip=0, jitter=0, grayscale=0)
    (batch,) = batches(data, Plan(2, 2, 1, 0), (whole,), 0, 0)
    for index, pixels in zip(batch.images, batch.pixels, strict=True):
        assert torch.equal(pixels[0], Preprocessing(20, 20).pixels(data.images.open(int(index))))


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
        lost = open_data(tmp_path / "copy", "train")
        assert to_memory(lost, 0) is lost
    whole = Preprocessing(16, 16)
    assert torch.equal(torch.cat(list(data.batches(whole, 2, 0))), torch.cat(list(kept.batches(whole, 2, 0))))
    small = Preprocessing(8, 8)
    assert torch.equal(torch.cat(list(data.batches(small, 2, 0))), torch.cat(list(kept.batches(small, 2, 0))))


def test_the_plan_shows_every_image_once_an_epoch_however_many_processes_share_it():
    alone = list(Plan(26, 8, 3, seed=5).batches(0))
    assert [epoch for epoch, _ in alone] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    for epoch in range(3):
        seen = np.concatenate([images for e, images in alone if e == epoch])
        assert len(set(seen.tolist())) == 24
    assert not np.array_equal(alone[0][1], alone[3][1])
    shared = [list(Plan(26, 8, 3, 5, rank, 2).batches(0)) for rank in range(2)]
    for (_, whole), *parts in zip(alone, *shared, strict=True):
        np.testing.assert_array_equal(whole, np.concatenate([images for _, images in parts]))
    for first in (1, 3, 5, 8):
        for (epoch, images), (e, i) in zip(Plan(26, 8, 3, 5).batches(first), alone[first:], strict=True):
            assert epoch == e
            np.testing.assert_array_equal(images, i)


def test_workers_make_the_same_crops(jpegs):
    data, plan = open_data(jpegs, "train"), Plan(20, 8, 2, 0)
    views = (Augmentation(24), Augmentation(24, scale=(0.5, 1)))
    alone = list(batches(data, plan, views, 1, 0))
    workers = list(batches(data, plan, views, 1, 2))
    assert len(alone) == len(workers) == 3
    for one, two in zip(alone, workers, strict=True):
        assert one.pixels.shape == (8, 2, 3, 24, 24)
        assert torch.equal(one.pixels, two.pixels)
        np.testing.assert_array_equal(one.images, two.images)


def test_the_death_of_a_worker_is_one_line(jpegs):
    running = batches(open_data(jpegs, "train"), Plan(20, 2, 1000, 0), (Augmentation(24),), 0, 2)
    next(running)
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    with pytest.raises(InputError, match=r"a loader process died .*; try --workers 0"):
        for _ in running:
            pass


def test_a_damaged_jpeg_is_replaced(jpegs, tmp_path):
    shutil.copytree(jpegs, tmp_path / "set")
    path = tmp_path / "set/train/a/00.jpg"
    path.write_bytes(path.read_bytes()[:300])
    data = open_data(tmp_path / "set", "train")
    (batch,) = batches(data, Plan(20, 20, 1, 0), (Augmentation(24),), 0, 0)
    assert len(batch.unreadable) == 1
    assert "00.jpg: not a readable image" in batch.unreadable[0]
    # Its place is the next one's, label and all.
    assert sorted(batch.images.tolist()) == [1, 1, *range(2, 20)]
    for path in (tmp_path / "set/train").rglob("*.*"):
        path.write_bytes(b"nothing")
    with pytest.raises(InputError, match="ten images in a row"):
        next(batches(open_data(tmp_path / "set", "train"), Plan(20, 20, 1, 0), (Augmentation(24),), 0, 0))


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
    path.write_text("[]")
    with pytest.raises(InputError, match="unknown value"):
        make_config(str(path))
    path.write_text("{")
    with pytest.raises(InputError, match="not a preset"):
        make_config(str(path))
