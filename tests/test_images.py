"""Folders and zips of images: the order, the pixels, and what cannot be read."""

import io
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from collapse import InputError
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
    cases["not a folder or a zip"] = tmp_path / "notes.txt"
    for message, place in cases.items():
        with pytest.raises(InputError, match=message):
            Images(place)


def test_images_of_several_sizes_do_not_stack(photos):
    with pytest.raises(InputError, match="--resize"):
        list(pixel_batches(Images(photos), Preprocessing(None, None)))
