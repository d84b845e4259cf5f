"""Augmented views of batched images, each image its own draw.

No generator has a state: every draw is a hash of (seed, epoch, image, view), so a view does not depend on the batch it
is in, on the number of workers, or on what was drawn before, and a resumed run draws what the unbroken one would have.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor


def _mix(x: Any) -> Any:
    """splitmix64's finaliser (Steele, Lea and Flood 2014): every bit of x changes half of the bits of the result."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def uniforms(seed: int, epoch: int, images: NDArray, view: int, count: int) -> Tensor:
    """(n, count) float32 in [0, 1): the draws of view `view` of `images`, (n,) indices in the data set, in `epoch`."""
    golden = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        key = _mix(np.uint64(seed) * golden + np.uint64(epoch))
        key = _mix(key + np.uint64(view) * golden)
        rows = _mix(key + np.asarray(images, np.uint64) * golden)
        bits = _mix(rows[:, None] + np.arange(1, count + 1, dtype=np.uint64) * golden)
    return torch.from_numpy((bits >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24))


def to_device(x: Tensor, device: torch.device | str) -> Tensor:
    """x, on the host, on a device; to CUDA by pinned memory, for from any other a copy over 64 KiB waits its turn."""
    return x.pin_memory().to(device, non_blocking=True) if torch.device(device).type == "cuda" else x.to(device)


@dataclass(frozen=True)
class Augmentation:
    """One random view of an image: the operations and their order are those of the paper's trainer (torchvision's).

    size: of the view, in pixels (None: that of the images); scale: share of the area that is kept; ratio: largest
    aspect ratio of the crop (log-uniform up to it and its inverse); degrees: largest rotation; flip: probability of a
    left-right flip; jitter: probability of the colour jitter, which changes brightness, contrast, saturation (largest
    relative change) and hue (largest shift, in turns) in an order of its own; grayscale, blur, solarize:
    probabilities; sigma: least and largest deviation of the blur, in pixels.
    """

    size: int | None = None
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: float = 4 / 3
    degrees: float = 0.0
    flip: float = 0.5
    jitter: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    grayscale: float = 0.2
    blur: float = 0.0
    sigma: tuple[float, float] = (0.1, 2.0)
    solarize: float = 0.0

    DRAWS = 37

    def __call__(self, images: Tensor, u: Tensor) -> Tensor:
        """(n, 3, h, w) uint8, or float in 0..1, and u (n, DRAWS) in [0, 1), on the CPU -> views in 0..1.

        Images of one channel too, if saturation and hue are 0.
        """
        if images.device.type == "cpu":
            return self.colour(self.crop(images, u), u)
        places = self.places(u, images.shape[-2:])
        return self.whole(images, to_device(places, images.device), to_device(u, images.device))

    def whole(self, images: Tensor, places: Tensor, u: Tensor) -> Tensor:
        """A view, as `cropped` and `masked` make it: images, places (n, 5) and u (n, DRAWS) on one device."""
        return self.masked(self.cropped(images, places, u), u)

    def places(self, u: Tensor, size: Sequence[int]) -> Tensor:
        """(n, 5) float32 of the host: `boxes` in images of `size` (h, w), and 1 where the view is mirrored.

        u: (n, DRAWS), of the host, so that what they decide costs no wait for a device.
        """
        draws = u.numpy()
        places = np.concatenate([self.boxes(draws, np.array([list(size)])), draws[:, 22:23] < self.flip], 1)
        return torch.from_numpy(places.astype(np.float32))

    def boxes(self, u: NDArray[np.float32], sizes: NDArray[np.integer]) -> NDArray[np.int64]:
        """(n, 4) top, left, height, width: torchvision's RandomResizedCrop, ten tries and then the centre.

        u: (n, DRAWS).  sizes: (n, 2), or (1, 2) for all: heights and widths of the images.
        """
        low, high = self.scale
        height, width = sizes[:, :1], sizes[:, 1:]
        area = height * width * (low + (high - low) * u[:, :10].astype(np.float64))
        ratio = np.exp(math.log(self.ratio) * (2 * u[:, 10:20].astype(np.float64) - 1))
        w, h = (_whole(np.sqrt(x)) for x in (area * ratio, area / ratio))
        fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
        first = fits.argmax(1)[:, None]
        w, h = np.take_along_axis(w, first, 1), np.take_along_axis(h, first, 1)
        top, left = ((u[:, k : k + 1] * room.astype(np.float32)).astype(np.int64)
                     for k, room in ((20, height - h + 1), (21, width - w + 1)))  # fmt: skip
        drawn = np.concatenate([top, left, h, w], 1)
        alone = fits.any(1, keepdims=True)
        return drawn if alone.all() else np.where(alone, drawn, self._centre(height, width))

    def _centre(self, height: NDArray[np.integer], width: NDArray[np.integer]) -> NDArray[np.int64]:
        h, w = (np.minimum(side, _whole(other * self.ratio)) for side, other in ((height, width), (width, height)))
        return np.concatenate([(height - h) // 2, (width - w) // 2, h, w], 1)

    def crop(self, images: Tensor, u: Tensor) -> Tensor:
        """Crop, resize (bicubic, antialiased), flip and rotate, each image its own: -> (n, 3, size, size) in 0..1.

        images: (n, 3, h, w) uint8, or float in 0..1; u: (n, DRAWS).
        """
        places = self.places(u, images.shape[-2:])
        return self.cropped(images, to_device(places, images.device), to_device(u, images.device))

    def cropped(self, images: Tensor, places: Tensor, u: Tensor) -> Tensor:
        """As `crop`; places (n, 5), from `places`, and u (n, DRAWS) are on the images' device."""
        x = images.float() / 255 if images.dtype == torch.uint8 else images
        height, width = images.shape[-2:]
        top, left, h, w, mirror = places.unbind(1)
        rows = _resampling(top, h, self.size or height, height)
        columns = _resampling(left, w, self.size or width, width)
        columns = torch.where(mirror[:, None, None] > 0, columns.flip(1), columns)
        x = (rows[:, None] @ x @ columns[:, None].mT).clamp_(0, 1)
        return self._rotate(x, u) if self.degrees else x

    def crop_one(self, image: Tensor, u: Tensor) -> Tensor:
        """As `crop`, by torchvision's kernels, of one image (3, h, w) uint8, u (DRAWS,) -> (3, size, size) uint8."""
        from torchvision.transforms.v2 import functional

        box = self.boxes(u.numpy()[None], np.array([image.shape[-2:]]))[0].tolist()
        size = [self.size or image.shape[-2], self.size or image.shape[-1]]
        view = functional.resized_crop(image, *box, size, functional.InterpolationMode.BICUBIC, antialias=True)
        view = view.flip(2) if u[22] < self.flip else view
        if self.degrees:
            view = (self._rotate(view[None].float(), u[None])[0]).round().to(torch.uint8)
        return view

    def _rotate(self, x: Tensor, u: Tensor) -> Tensor:
        angle = math.radians(self.degrees) * (2 * u[:, 23] - 1)
        cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
        maps = torch.stack([cos, -sin, zero, sin, cos, zero], 1).view(-1, 2, 3)
        grid = F.affine_grid(maps, list(x.shape), align_corners=False)
        return F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)

    def colour(self, x: Tensor, u: Tensor) -> Tensor:
        """Jitter, grayscale, blur and solarisation of views (n, 3, h, w) in 0..1; x itself may be changed.

        u: (n, DRAWS).  Each change is made in the rows that it is drawn for, which a CPU does quickest; `masked` is for
        devices.
        """
        return self._colour(x, u, _where)

    def masked(self, x: Tensor, u: Tensor) -> Tensor:
        """As `colour`, to the bit, of (n, 3, h, w): every change is made in all rows, and each row takes its own.

        u: (n, DRAWS), on the device of x.  Nothing depends on what is drawn but numbers, so that it compiles to a few
        kernels and waits for nothing.
        """
        return self._colour(x, u, _mask)

    def _colour(self, x: Tensor, u: Tensor, where: Callable[..., Tensor]) -> Tensor:
        if self.jitter:
            x = self._jittered(x, u, where)
        if self.grayscale:
            x = where(x, u[:, 33] < self.grayscale, lambda rows: _grey(rows).expand_as(rows))
        if self.blur:
            low, high = self.sigma
            blur = partial(_blur, reach=math.ceil(3 * high))
            x = where(x, u[:, 34] < self.blur, blur, low + (high - low) * u[:, 35])
        return where(x, u[:, 36] < self.solarize, _solarize) if self.solarize else x

    def _jittered(self, x: Tensor, u: Tensor, where: Callable[..., Tensor]) -> Tensor:
        places = _places(u[:, 29:33])
        jittered = u[:, 24] < self.jitter
        strengths = (self.brightness, self.contrast, self.saturation, self.hue)
        for place in range(4):
            for kind, (change, strength) in enumerate(zip(CHANGES, strengths, strict=True)):
                if strength:
                    base = 0.0 if kind == 3 else 1.0
                    amount = base + strength * (2 * u[:, 25 + kind] - 1)
                    x = where(x, jittered & (places[:, kind] == place), change, amount)
        return x


def _whole(x: NDArray[np.floating]) -> NDArray[np.int64]:
    return np.rint(x).astype(np.int64)


def _places(u: Tensor) -> Tensor:
    """(n, k): the place of each column in the rising order of its row; of equal ones the first is earlier."""
    first = torch.ones(u.shape[1], u.shape[1], dtype=torch.bool, device=u.device).tril(-1)
    return ((u[:, None] < u[..., None]) | ((u[:, None] == u[..., None]) & first)).sum(2)


def _where(x: Tensor, chosen: Tensor, change: Callable[..., Tensor], *amounts: Tensor) -> Tensor:
    """x with `change` made in the rows chosen, (n,) bool on the host; amounts (n,) go with them."""
    rows = chosen.nonzero()[:, 0]
    if len(rows) == 0:
        return x
    amounts = tuple(a[rows].view(-1, 1, 1, 1) for a in amounts)
    if len(rows) == len(x):
        return change(x, *amounts).contiguous()  # what comes next may write to it
    return x.index_copy_(0, rows, change(x[rows], *amounts))


def _mask(x: Tensor, chosen: Tensor, change: Callable[..., Tensor], *amounts: Tensor) -> Tensor:
    """As `_where`, without rows: chosen and amounts (n,) on the device of x."""
    return torch.where(chosen.view(-1, 1, 1, 1), change(x, *(a.view(-1, 1, 1, 1) for a in amounts)), x)


def _resampling(start: Tensor, length: Tensor, size: int, source: int) -> Tensor:
    """(n, size, source) float32: the rows that resample `length` pixels from `start` on to `size` pixels.

    Bicubic with a = -1/2, widened when it shrinks (antialiased), within the crop alone: the filter of Pillow.
    """
    scale = (length / size)[:, None, None]
    wide = scale.clamp(min=1)
    centres = (torch.arange(size, device=start.device)[:, None] + 0.5) * scale
    pixels = torch.arange(source, device=start.device) - start[:, None, None]
    t = ((pixels + 0.5 - centres) / wide).abs()
    near, far = (1.5 * t - 2.5) * t * t + 1, ((-0.5 * t + 2.5) * t - 4) * t + 2
    weights = torch.where(t < 1, near, torch.where(t < 2, far, 0.0))
    weights = weights * ((pixels >= 0) & (pixels < length[:, None, None]))
    return weights / weights.sum(2, keepdim=True)


def _grey(x: Tensor) -> Tensor:
    if x.shape[1] == 1:
        return x
    return (0.299 * x[:, 0] + 0.587 * x[:, 1] + 0.114 * x[:, 2])[:, None]


def _brightness(x: Tensor, amount: Tensor) -> Tensor:
    return (x * amount).clamp_(0, 1)


def _contrast(x: Tensor, amount: Tensor) -> Tensor:
    return torch.lerp(_grey(x).mean((1, 2, 3), keepdim=True), x, amount).clamp_(0, 1)


def _saturation(x: Tensor, amount: Tensor) -> Tensor:
    return torch.lerp(_grey(x), x, amount).clamp_(0, 1)


def _hue(x: Tensor, turns: Tensor) -> Tensor:
    """The hue of HSV moved by `turns`; value and saturation stay."""
    red, green, blue = x.unbind(1)
    value, least = x.amax(1), x.amin(1)
    chroma = value - least
    safe = torch.where(chroma > 0, chroma, 1.0)
    red_most, green_most = value == red, value == green
    sextant = torch.where(red_most, 0.0, torch.where(green_most, 2.0, 4.0))
    within = torch.where(red_most, green - blue, torch.where(green_most, blue - red, red - green)) / safe
    # What a channel of the pure hue lacks is clamp(2 - |k|, 0, 1) of its distance k from where it lacks all, in
    # sextants.  Whole ones are added first, exactly: k is rounded as a number below 2, not as one up to 12.
    sextants = torch.stack([(sextant + n) % 6 - 3 for n in (0.0, 4.0, 2.0)], 1)
    k = sextants + (within + 6 * turns[:, 0])[:, None]
    k = (k - 6 * (k / 6).round()).abs()
    return value[:, None] - chroma[:, None] * (2 - k).clamp(0, 1)


CHANGES = (_brightness, _contrast, _saturation, _hue)


def _blur(x: Tensor, sigma: Tensor, reach: int) -> Tensor:
    """Gaussian of deviation `sigma` pixels, cut at `reach`; pixels beyond the edge repeat it."""
    sides = []
    for size in x.shape[-2:]:
        pixels = torch.arange(-reach, size + reach, device=x.device)
        distance = pixels - torch.arange(size, device=x.device)[:, None]
        kernel = torch.exp(-0.5 * (distance / sigma[:, 0]) ** 2) * (distance.abs() <= reach)
        edges = (pixels.clamp(0, size - 1)[:, None] == torch.arange(size, device=x.device)).to(x)
        sides.append((kernel / kernel.sum(2, keepdim=True)) @ edges)
    return sides[0][:, None] @ x @ sides[1][:, None].mT


def _solarize(x: Tensor) -> Tensor:
    return torch.where(x >= 128 / 255, 1 - x, x)
