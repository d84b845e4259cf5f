"""Views: keyed draws, and every operation against torchvision's and Pillow's, an image at a time."""

import math
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps
from scipy.stats import kstest
from torchvision import transforms
from torchvision.transforms import functional as F

from collapse.recipes import views
from collapse.recipes.config import Config
from collapse.recipes.views import Augmentation, uniforms

STILL = Augmentation(scale=(1, 1), ratio=1, flip=0, jitter=0, grayscale=0)
DRAWS = Augmentation.DRAWS


@pytest.fixture(scope="module")
def images():
    """(12, 3, 48, 60) uint8, smooth, no two alike."""
    coarse = torch.rand(12, 3, 7, 9, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.interpolate(coarse, (48, 60), mode="bicubic").clamp(0, 1)
    return (smooth * 255).round().to(torch.uint8)


def draws(n, epoch=0):
    return uniforms(0, epoch, np.arange(n), 0, DRAWS)


def test_a_draw_depends_on_its_image_alone():
    whole = uniforms(7, 3, np.arange(100), 1, 8)
    order = np.random.default_rng(0).permutation(100)
    assert torch.equal(uniforms(7, 3, order, 1, 8), whole[torch.from_numpy(order)])
    for seed, epoch, view in ((8, 3, 1), (7, 4, 1), (7, 3, 0)):
        assert not (uniforms(seed, epoch, np.arange(100), view, 8) == whole).any()


def test_draws_are_uniform_and_independent():
    u = torch.cat([uniforms(0, e, np.arange(2000), view, DRAWS) for e in range(3) for view in range(2)]).numpy()
    assert u.min() >= 0
    assert u.max() < 1
    # 37 columns at a level of 1e-5 each: a sound generator fails once in 2,700 seeds, and this seed is fixed.
    assert min(kstest(column, "uniform").pvalue for column in u.T) > 1e-5
    assert np.abs(np.corrcoef(u.T) - np.eye(DRAWS)).max() < 5 / math.sqrt(len(u))


def test_the_hash_is_splitmix64():
    golden = np.arange(1, 4, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        mixed = [hex(value) for value in views._mix(golden)]
    assert mixed == ["0xe220a8397b1dcdaf", "0x6e789e6aa1b965f4", "0x6c45d188009454f"]  # its output from seed 0


def test_boxes_are_those_of_the_draws():
    u = np.full((1, DRAWS), 0.5, np.float32)
    u[:, 21] = 0.99
    assert Augmentation(scale=(0.25, 0.75)).boxes(u, np.array([[20, 20]])).tolist() == [[3, 6, 14, 14]]
    u[:, 10:20] = 1  # 200 pixels of ratio 2
    assert Augmentation(scale=(0.25, 0.75), ratio=2).boxes(u, np.array([[20, 20]])).tolist() == [[5, 0, 10, 20]]
    for edge in (0.0, 1.0):  # a side of no pixel: the centre
        u[:, 10:20] = edge
        assert Augmentation(scale=(0.003, 0.003), ratio=4).boxes(u, np.array([[10, 10]])).tolist() == [[0, 0, 10, 10]]


def test_a_view_does_not_depend_on_the_batch_it_is_in(images):
    augmentation = Augmentation(32, blur=0.5, solarize=0.5, degrees=10)
    whole = augmentation(images, draws(12))
    for index in (0, 5, 11):
        alone = augmentation(images[index : index + 1], uniforms(0, 0, np.array([index]), 0, DRAWS))
        torch.testing.assert_close(alone[0], whole[index], rtol=0, atol=1e-5)


def test_an_augmentation_with_nothing_to_do_returns_the_image(images):
    square = images[..., :48].float() / 255
    torch.testing.assert_close(STILL(square, draws(12)), square, rtol=0, atol=1e-6)
    torch.testing.assert_close(replace(STILL, flip=1.0)(square, draws(12)), square.flip(3), rtol=0, atol=1e-6)
    turned = replace(STILL, degrees=90)
    u = torch.zeros(12, DRAWS)
    torch.testing.assert_close(turned(square, u), square.rot90(-1, (2, 3)), rtol=0, atol=1e-4)
    u[:, 23] = 0.75  # half of the largest rotation
    turned = replace(STILL, degrees=180)
    torch.testing.assert_close(turned(square, u), square.rot90(1, (2, 3)), rtol=0, atol=1e-4)
    assert turned.crop_one(images[0], u[0]).shape == (3, 48, 60)


@pytest.mark.parametrize("size", [20, 32, 64])
def test_batched_crops_are_torchvisions_crop_and_resize(images, size):
    augmentation = Augmentation(size)
    u = draws(12)
    batched = augmentation.crop(images, u)
    for image, box, mirror, ours in zip(
        images, augmentation.boxes(u.numpy(), np.array([[48, 60]])).tolist(), u[:, 22] < 0.5, batched, strict=True
    ):
        pil = F.resized_crop(F.to_pil_image(image), *box, [size, size], Image.Resampling.BICUBIC)
        theirs = F.to_tensor(ImageOps.mirror(pil) if mirror else pil)
        # Pillow rounds to whole grey levels after each of two passes.
        assert (ours - theirs).abs().max() < 3 / 255
        assert (ours - theirs).abs().mean() < 0.5 / 255


@pytest.mark.parametrize("degrees", [0, 20])
def test_workers_crops_are_the_batched_ones_to_a_grey_level(images, degrees):
    augmentation, u = Augmentation(32, degrees=degrees), draws(12)
    alone = torch.stack([augmentation.crop_one(image, row) for image, row in zip(images, u, strict=True)])
    difference = (augmentation.crop(images, u) * 255 - alone).abs()
    assert difference.max() < 3
    assert difference.mean() < 0.5


def test_crops_have_the_distribution_of_torchvisions(images):
    torch.manual_seed(0)
    image = torch.zeros(1, 48, 60)
    theirs = np.array(
        [transforms.RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(4000)]
    )
    ours = Augmentation().boxes(draws(4000).numpy(), np.array([[48, 60]]))
    for mine, other in zip(ours.T, theirs.T, strict=True):
        assert kstest(mine, other).pvalue > 1e-4
    wide = Augmentation(scale=(1, 1)).boxes(draws(5).numpy(), np.array([[10, 60]]))
    assert wide.tolist() == [[0, 23, 10, 13]] * 5  # nothing fits: the centre at the largest ratio, as torchvision
    assert transforms.RandomResizedCrop.get_params(torch.zeros(1, 10, 60), [1, 1], [3 / 4, 4 / 3]) == (0, 23, 10, 13)


@pytest.mark.parametrize("kind", range(4))
def test_colour_changes_are_torchvisions(images, kind):
    theirs = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)[kind]
    x = images.float() / 255
    for amount in (-0.1, 0.07) if kind == 3 else (0.6, 1.37):
        ours = views.CHANGES[kind](x, torch.full((12, 1, 1, 1), amount))
        # torchvision's grey weights are 0.2989, 0.587, 0.114: a part in ten thousand of ours.
        assert (ours - theirs(x, amount)).abs().max() < 1e-4
        pil = torch.stack([F.to_tensor(theirs(F.to_pil_image(image), amount)) for image in images])
        assert (ours - pil).abs().mean() < (2 if kind == 3 else 0.6) / 255  # Pillow's hue has 256 steps


@pytest.mark.parametrize("sigma", [0.3, 1.0, 2.0])
def test_the_blur_is_torchvisions_inside_and_pillows_to_a_grey_level(images, sigma):
    ours = views._blur(images.float() / 255, torch.full((12, 1, 1, 1), sigma), 6)
    theirs = F.gaussian_blur(images.float() / 255, [13, 13], [sigma, sigma])
    torch.testing.assert_close(ours[..., 6:-6, 6:-6], theirs[..., 6:-6, 6:-6], rtol=0, atol=1e-5)
    pil = torch.stack([F.to_tensor(F.to_pil_image(i).filter(ImageFilter.GaussianBlur(sigma))) for i in images])
    assert (ours - pil).abs().mean() < 1 / 255


def test_solarisation_and_grey_are_pillows(images):
    x = images.float() / 255
    solarized = torch.stack([F.to_tensor(ImageOps.solarize(F.to_pil_image(i), 128)) for i in images])
    torch.testing.assert_close(views._solarize(x), solarized, rtol=0, atol=1e-6)
    grey = torch.stack([F.to_tensor(F.to_pil_image(i).convert("L")) for i in images])
    assert (views._grey(x) - grey).abs().max() < 1.01 / 255


def test_probabilities_and_strengths_are_those_asked_for():
    x = torch.full((4000, 3, 1, 2), 0.6)
    x[:, 0, :, 0] = 0.4
    u = draws(4000)
    changed = lambda augmentation: (augmentation.colour(x.clone(), u) != x).flatten(1).any(1).float().mean().item()
    deviation = math.sqrt(0.25 / 4000)
    for options in ({"grayscale": 0.2}, {"jitter": 0.8, "grayscale": 0}, {"blur": 0.3}, {"solarize": 0.2}):
        wanted = next(iter(options.values()))
        assert abs(changed(replace(STILL, **options)) - wanted) < 5 * deviation, options
    level = replace(STILL, jitter=1.0, contrast=0, saturation=0, hue=0).colour(torch.full((4000, 3, 1, 1), 0.5), u)
    assert kstest(level[:, 0, 0, 0].numpy(), "uniform", (0.3, 0.4)).pvalue > 1e-4
    orders = u[:, 29:33].argsort(1)
    assert len(orders.unique(dim=0)) == 24


def test_colour_changes_have_their_own_draws_in_the_order_drawn(images):
    x, u = images.float() / 255, draws(12)
    u[:, 29:33] = torch.tensor([0.9, 0.1, 0.5, 0.3])  # brightness last, then saturation, hue, contrast
    strengths = {"brightness": 0.4, "contrast": 0.3, "saturation": 0.2, "hue": 0.1}
    expected = x
    for kind, base, strength in ((1, 1, 0.3), (3, 0, 0.1), (2, 1, 0.2), (0, 1, 0.4)):
        amount = base - strength + 2 * strength * u[:, 25 + kind]
        expected = views.CHANGES[kind](expected, amount.view(-1, 1, 1, 1))
    ours = replace(STILL, jitter=1.0, **strengths).colour(x.clone(), u)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)
    tied = views._places(torch.tensor([[0.5, 0.2, 0.5, 0.1], [0.0, 0.0, 0.0, 0.0]]))
    assert tied.tolist() == [[2, 1, 3, 0], [0, 1, 2, 3]]


def test_the_blurs_deviation_is_uniform_between_its_ends():
    u = draws(1000)
    dot = torch.zeros(1000, 1, 1, 41)
    dot[..., 20] = 1
    still = replace(STILL, blur=1.0, sigma=(1.0, 2.0), saturation=0, hue=0)
    row = still.colour(dot, u)[:, 0, 0]
    deviation = (row * (torch.arange(41) - 20.0) ** 2).sum(1).sqrt()
    np.testing.assert_allclose(deviation, 1 + u[:, 35], atol=0.03)  # cut at 6 pixels


def test_a_pixel_that_is_half_grey_is_solarised_from_128():
    x = torch.tensor([127.0, 128.0, 255.0]).view(1, 1, 1, 3) / 255
    assert (255 * views._solarize(x)).round().flatten().tolist() == [127, 127, 0]


RECIPE = {field.name for field in fields(Augmentation)} - {"size", "blur", "solarize"}  # these differ by view


def test_the_defaults_are_those_of_the_recipe():
    """Written in two places, for the configuration is read without torch."""
    config, own = Config(), Augmentation()
    for name in RECIPE:
        assert getattr(config, name) == getattr(own, name), name
