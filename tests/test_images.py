"""Folders and zips of images: the order, the pixels, and what cannot be read."""

import io
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from collapse import InputError
from collapse import images as images_module
from collapse.images import IMAGENET_MEAN, IMAGENET_STD, Images, Preprocessing, pixel_batches


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


def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch):
    Image.new("L", (40, 40)).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(InputError, match=r"large\.png"):
        Images(tmp_path).open(0)


def test_a_place_without_images_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "bad.zip").write_bytes(b"PK\x03\x04 not a zip")
    cases = {"holds no image": tmp_path, "no such folder": tmp_path / "absent", "damaged zip": tmp_path / "bad.zip"}
    cases["is no list of images"] = tmp_path / "notes.txt"
    (tmp_path / "notes.md").write_text("no image")
    cases["is not a folder or a zip"] = tmp_path / "notes.md"
    for message, place in cases.items():
        with pytest.raises(InputError, match=message):
            Images(place)


def test_images_of_several_sizes_do_not_stack(photos):
    with pytest.raises(InputError, match="--resize"):
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
        assert reasons["pipe.png"] == "not a regular file"
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
    np.testing.assert_array_equal(pixels[0].numpy(), np.floor(ramp / 257))
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


def test_a_zip_that_unpacks_to_more_than_it_says_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(images_module, "LARGEST_FILE", 1000)
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", bytes(5000))
    with pytest.raises(InputError, match="unpacks to over"):
        Images(tmp_path / "bomb.zip").open(0)
    monkeypatch.setattr(images_module, "ENTRIES", 0)
    with pytest.raises(InputError, match="over 0 entries"):
        Images(tmp_path / "bomb.zip")
