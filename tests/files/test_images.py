"""Folders and zips of images: the order, the pixels, and what cannot be read."""

import io
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from collapse import InputError, cli
from collapse.data.batches import pixel_batches
from collapse.data.images import Images
from collapse.data.labelled import open_data
from collapse.data.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from collapse.files.pictures import UnreadableImage


def test_a_folder_and_its_zip_give_the_same_pixels_in_the_same_order(photos, tmp_path):
    archive = tmp_path / "photos.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(photos.rglob("*"), reverse=True):
            file.write(path, f"top/{path.relative_to(photos)}")
        file.writestr("top/readme.txt", "no image")
        file.writestr("__MACOSX/top/._00.png", "no image")
        file.writestr("other/x.png", (photos / "class0/00.png").read_bytes())
    preprocessing = Preprocessing(32, 32)
    read = lambda source, **options: torch.cat(list(pixel_batches(Images(source), preprocessing, 7, **options)))
    folder = read(photos)
    assert folder.shape == (24, 3, 32, 32)
    assert folder.dtype == torch.uint8
    assert torch.equal(folder, read(photos, workers=2))
    assert torch.equal(folder, read(archive / "top"))
    assert torch.equal(folder, read(archive / "top", workers=2))
    assert len(Images(archive)) == 25
    assert torch.equal(folder[:5], read(photos, limit=5))
    assert Images(photos).names == sorted(Images(photos).names)


@pytest.mark.parametrize("name", ["bilinear", "bicubic"])
def test_preprocessing_is_torchvisions_to_rounding(photos, name):
    images = Images(photos)
    own = Preprocessing(48, 40, name)
    theirs = transforms.Compose(
        [
            transforms.Resize(48, transforms.InterpolationMode(name)),
            transforms.CenterCrop(40),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )
    for index in range(len(images)):
        image = images.open(index)
        torch.testing.assert_close(own(image), theirs(image.convert("RGB")), rtol=0, atol=1e-6)


def test_values_stay_in_0_to_1_without_normalisation():
    image = Image.fromarray(np.full((5, 5, 3), 255, np.uint8))
    assert torch.equal(Preprocessing(None, None, mean=None)(image), torch.ones(3, 5, 5))


def broken(folder):
    """(file name, bytes) of images that cannot be read."""
    whole = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(whole, "JPEG")
    yield "truncated.jpg", whole.getvalue()[: len(whole.getvalue()) // 2]
    yield "empty.png", b""
    yield "text.png", b"this is no image"


def test_an_image_that_cannot_be_read_is_named(photos, tmp_path):
    for name, data in broken(tmp_path):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match=name) as caught:
            list(pixel_batches(Images(tmp_path), Preprocessing(32, 32)))
        assert "\n" not in str(caught.value)
        (tmp_path / name).unlink()


def test_a_large_image_is_refused_and_the_limit_can_be_raised(tmp_path, photos, resnet18, capsys):
    Image.new("L", (40, 40)).save(tmp_path / "large.png")
    with pytest.raises(UnreadableImage, match=r"large\.png: not a readable image \(40 x 40 pixels, over 1000"):
        Images(tmp_path, 1000).open(0)
    assert Images(tmp_path, 1600).open(0).size == (40, 40)
    call = ["embed", str(resnet18), str(photos), "--resize", "8", "--crop", "8", "--workers", "2", "--max-pixels"]
    for most, count in (("4000", 21), ("100000000", 24)):
        assert cli.main([*call, most, "--out", str(tmp_path / f"{most}.npy")]) == 0
        assert len(np.load(tmp_path / f"{most}.npy")) == count
    assert "; 3 images were skipped" in capsys.readouterr().out


def test_what_resizing_makes_is_limited(tmp_path, in_child):
    for index, size in enumerate(((1, 60_000), (60_000, 1), (1, 400), (9, 7))):
        Image.new("RGB", size).save(tmp_path / f"{index}.png")
    skipped = []

    def act():
        assert sum(len(batch) for batch in pixel_batches(Images(tmp_path), Preprocessing(), 4, skipped=skipped)) == 2
        assert [entry["why"][:60] for entry in skipped] == [
            "an image of 1 x 60000 becomes 3932160000 pixels, over 894784",
            "an image of 60000 x 1 becomes 3932160000 pixels, over 894784",
        ]

    Preprocessing().pixels(Image.new("RGB", (8, 8)))
    in_child(act)
    for given in ({"resize": 100_000}, {"crop": 100_000}):  # as a config may say
        with pytest.raises(InputError, match="becomes 10000000000 pixels, over 89478485; give a larger max_pixels="):
            Preprocessing(**given).pixels(Image.new("RGB", (8, 8)))


def test_a_place_without_images_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "bad.zip").write_bytes(b"PK\x03\x04 not a zip")
    cases = {"holds no image": tmp_path, "no such folder": tmp_path / "absent", "a truncated zip": tmp_path / "bad.zip"}
    cases["is no list of images"] = tmp_path / "notes.txt"
    (tmp_path / "notes.md").write_text("no image")
    cases["is not a folder or a zip"] = tmp_path / "notes.md"
    for message, place in cases.items():
        with pytest.raises(InputError, match=message):
            Images(place)


def test_images_of_several_sizes_do_not_stack(photos):
    with pytest.raises(InputError, match="resize="):
        list(pixel_batches(Images(photos), Preprocessing(None, None)))


def test_what_cannot_be_read_is_left_out_and_listed(photos, tmp_path):
    folder = tmp_path / "all"
    shutil.copytree(photos, folder)
    names = [name for name, data in broken(tmp_path) if (folder / f"class0/05{name}").write_bytes(data) is not None]
    os.mkfifo(folder / "class1/pipe.png")
    (folder / "class1/gone.png").symlink_to(tmp_path / "nowhere.png")
    for workers in (0, 2):
        skipped = []
        found = torch.cat(list(pixel_batches(Images(folder), Preprocessing(32, 32), 4, workers, skipped=skipped)))
        assert torch.equal(found, torch.cat(list(pixel_batches(Images(photos), Preprocessing(32, 32), 4))))
        expected = [f"class0/05{name}" for name in sorted(names)] + ["class1/gone.png", "class1/pipe.png"]
        assert sorted(entry["path"] for entry in skipped) == [str(folder / name) for name in expected]
        reasons = {Path(entry["path"]).name: entry["why"] for entry in skipped}
        assert reasons["pipe.png"] == "is not a regular file"
        assert reasons["gone.png"] == "no such file"


def test_links_are_followed_once_and_loops_end(photos, tmp_path):
    (tmp_path / "val").mkdir()
    (tmp_path / "val/link").symlink_to(photos)
    (tmp_path / "val/loop").symlink_to(tmp_path / "val")
    (tmp_path / "val/twice").symlink_to(photos)
    assert len(Images(tmp_path / "val")) == 24
    assert all(name.startswith("link/") for name in Images(tmp_path / "val").names)


def test_a_list_keeps_its_order_and_its_folder(photos, tmp_path):
    names = ["class1/03.png", "class0/00.png"]
    (photos / "some.txt").write_text("\n".join(names) + "\n\n")
    images = Images(photos / "some.txt")
    (photos / "some.txt").unlink()
    assert images.names == names
    with Image.open(photos / names[0]) as first:
        assert images.open(0).size == first.size


def test_modes_become_what_pillow_makes_of_them_and_16_bits_are_scaled(tmp_path):
    ramp = np.arange(0, 65536, 1024, dtype=np.uint16).reshape(8, 8)
    Image.fromarray(ramp).save(tmp_path / "16.png")
    pixels = Preprocessing(None, None).pixels(Images(tmp_path).open(0))
    np.testing.assert_allclose(pixels.numpy(), np.broadcast_to(ramp / 65535, (3, 8, 8)), rtol=1e-6)
    rgba = np.random.default_rng(0).integers(0, 256, (8, 8, 4), dtype=np.uint8)
    kept = Preprocessing(None, None).pixels(Image.fromarray(rgba)).permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(kept, rgba[..., :3])  # alpha is dropped, not blended
    grey = Image.fromarray(rgba[..., 0])
    for mode in ("CMYK", "P", "LA", "1", "F", "HSV"):
        image = grey.convert("RGB").convert(mode) if mode in ("CMYK", "P", "HSV") else grey.convert(mode)
        expected = np.asarray(image.convert("RGB"))
        np.testing.assert_array_equal(Preprocessing(None, None).pixels(image).permute(1, 2, 0).numpy(), expected)


def test_a_rotation_in_exif_is_not_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 20)).save(tmp_path / "turned.jpg", exif=exif)
    assert Preprocessing(None, None).pixels(Images(tmp_path).open(0)).shape == (3, 20, 30)


def of_zip(path, records, **how):
    """A zip of a file's records."""
    with zipfile.ZipFile(path, "w", **how) as archive:
        for name, data in records.items():
            archive.writestr(name, data)
    return path


def picture(size=(9, 7)):
    file = io.BytesIO()
    Image.new("RGB", size, (1, 2, 3)).save(file, "PNG")
    return file.getvalue()


def test_names_in_a_zip_are_names_and_never_places(tmp_path, monkeypatch):
    odd = ["../up.png", "/etc/absolute.png", "C:\\drive.png", "a\\b.png", "a/../../c.png", "line\nfeed.png", "dé.png"]
    inner = of_zip(tmp_path / "inner.zip", {"never.png": picture()}).read_bytes()
    path = of_zip(
        tmp_path / "odd.zip", {**dict.fromkeys(odd, picture()), "inner.zip": inner, "link.png": b"/etc/passwd"}
    )
    before = sorted(p for p in tmp_path.rglob("*"))
    images = Images(path)
    assert images.names == sorted([*odd, "link.png"], key=str.encode)
    assert images.left_out == ["inner.zip"]
    opened, skipped, open_ = [], [], os.open
    monkeypatch.setattr(os, "open", lambda path, *a, **k: opened.append(path) or open_(path, *a, **k))
    assert sum(len(batch) for batch in pixel_batches(images, Preprocessing(8, 8), skipped=skipped)) == len(odd)
    assert [entry["path"] for entry in skipped] == [f"{path}/link.png"]
    assert sorted(p for p in tmp_path.rglob("*")) == before
    assert set(map(str, opened)) <= {str(path), os.devnull}


def changed(path, place, value):
    data = bytearray(path.read_bytes())
    for sign, more in ((b"PK\3\4", 0), (b"PK\1\2", 2)):
        start = data.find(sign) + place + more
        data[start : start + len(value)] = value
    path.write_bytes(data)
    return path


def test_zips_that_others_cannot_unpack_are_read_or_refused_in_a_line(tmp_path):
    one = lambda name: of_zip(tmp_path / name, {"é.png": picture(), "b.png": picture((5, 5))})
    assert Images(changed(one("version.zip"), 4, b"\xff\0")).open(1).size == (9, 7)  # "version 25.5 needed"
    encrypted = Images(changed(one("encrypted.zip"), 6, b"\1\x08"))
    with pytest.raises(
        UnreadableImage, match=r"encrypted.zip/é.png: not a readable image \(record 'é.png' is encrypted"
    ):
        encrypted.open(1)
    assert encrypted.open(0).size == (5, 5)
    data = one("names.zip").read_bytes().replace("é.png".encode(), b"\xff\xfe.png")
    (tmp_path / "names.zip").write_bytes(data)
    with pytest.raises(InputError, match="is not UTF-8; make the zip anew"):
        Images(tmp_path / "names.zip")


def test_a_zip_that_unpacks_to_more_than_it_says_is_refused(tmp_path, in_child):
    path = of_zip(
        tmp_path / "bomb.zip", {"a.png": bytes(1 << 28), "b.png": picture()}, compression=zipfile.ZIP_DEFLATED
    )

    def act():
        images = Images(path)
        with pytest.raises(UnreadableImage, match="unpacks to 268435456 bytes, at most 67108864 are read"):
            images.open(0)

    in_child(act)
    lie = changed(path, 22, (5000).to_bytes(4, "little"))
    with pytest.raises(UnreadableImage, match="does not have the size that it declares"):
        Images(lie).open(0)


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_a_zip_is_read_in_any_worker_as_long_as_it_is_the_same_file(tmp_path, photos, method, monkeypatch):
    path = Path(shutil.make_archive(tmp_path / "photos", "zip", photos))
    images, context = Images(path, 100_000_000), multiprocessing.get_context(method)
    before = images.open(3)
    with context.Pool(1) as pool:
        for found in pool.map(images.open, [3] * 3):
            assert np.array_equal(np.array(found), np.array(before))
    copy = pickle.loads(pickle.dumps(images))
    assert copy.max_pixels == 100_000_000
    os.utime(path, (0, 0))
    with pytest.raises(UnreadableImage, match="is another file than at the start; begin again"):
        copy.open(3)
    assert np.array_equal(np.array(images.open(3)), np.array(before))  # this one has it open


def test_a_folder_of_anything_gives_its_images_and_counts_the_rest(tmp_path):
    names = [
        "a.jpg",
        "b.JFIF",
        "c.jpe",
        "d.png",
        "e.tga",
        "f.ppm",
        "g.webp",
        "h.jp2",
        "new\nline.png",
        "x" * 249 + ".png",
    ]
    for name in names:
        kind = {"jfif": "JPEG", "jpe": "JPEG", "ppm": "PPM"}.get(name.rpartition(".")[2].lower())
        Image.new("RGB", (9, 7), (1, 2, 3)).save(tmp_path / name, kind)
    (tmp_path / "no ending").write_bytes(picture())
    (tmp_path / os.fsdecode(b"\xff.png")).write_bytes(picture())
    (tmp_path / "sub").mkdir()
    for name in ("LICENSE", "notes.txt", "sub/z.heic", ".hidden"):
        (tmp_path / name).write_text("no image")
    os.mkfifo(tmp_path / "pipe")
    images = Images(tmp_path)
    assert images.names == sorted([*names, "no ending", os.fsdecode(b"\xff.png")], key=os.fsencode)
    assert images.left_out == ["LICENSE", "notes.txt", "pipe", "sub/z.heic"]
    assert images.warnings == ["4 files are no images by their names, first 'LICENSE'; left out"]
    assert len(torch.cat(list(pixel_batches(images, Preprocessing(8, 8), 5)))) == len(names) + 2
    whole = of_zip(tmp_path / "all.zip", {name: (tmp_path / name).read_bytes() for name in ("no ending", "LICENSE")})
    assert (Images(whole).names, Images(whole).left_out) == (["no ending"], ["LICENSE"])


def test_names_do_not_depend_on_the_locale(tmp_path):
    for name in ("é.png", "z.png", "a\nb.png", os.fsdecode(b"\xff.png")):
        (tmp_path / "train/a").mkdir(parents=True, exist_ok=True)
        (tmp_path / "train/a" / name).write_bytes(picture())
    path = of_zip(
        tmp_path / "set.zip", {f"train/a/{name}": picture() for name in ("é.png", "z.png", "a\nb.png", "ß.png")}
    )
    program = """
import sys
from collapse.data.batches import pixel_batches
from collapse.data.preprocessing import Preprocessing
from collapse.data.labelled import open_data
for path in sys.argv[1:]:
    data = open_data(path, "train")
    print(data.names_digest, data.digest, sum(map(len, pixel_batches(data.images, Preprocessing(8, 8)))))
"""
    call = [sys.executable, "-c", program, tmp_path, path]
    plain = {**os.environ, "PYTHONUTF8": "0", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}
    result = subprocess.run(call, capture_output=True, text=True, env=plain, timeout=100)
    assert result.stderr == ""
    for line, source in zip(result.stdout.splitlines(), (tmp_path, path), strict=True):
        data = open_data(source, "train")
        assert line == f"{data.names_digest} {data.digest} 4"


def test_a_set_of_which_no_image_can_be_read_names_the_first(tmp_path, resnet18, capsys):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"this is no image")
    with pytest.raises(InputError, match=r"none of its images can be read, first .*a\.png \(empty or not JPEG, PNG"):
        list(pixel_batches(Images(tmp_path), Preprocessing(8, 8), skipped=[]))
    call = ["spectrum", str(resnet18), str(tmp_path), "--resize", "8", "--crop", "8", "--workers", "0"]
    assert cli.main(call) == 2
    assert "none of its images can be read, first" in capsys.readouterr().err
    (tmp_path / "b.png").unlink()
    (tmp_path / "a.png").write_bytes(picture())
    assert cli.main(call) == 2
    assert "holds 1 image; a covariance needs at least 2" in capsys.readouterr().err
