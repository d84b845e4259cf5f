"""Sounds below a folder: WAV by scipy, FLAC by soundfile, as one channel of float32 in -1..1 with its rate.

A file is what its first bytes say.  Only FLAC reaches the codecs of soundfile (libsndfile), and only if its header
declares no more than `limits.SAMPLES`.
"""

import io
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from collapse import InputError
from collapse.files import limits
from collapse.files.containers import first_line
from collapse.files.descriptor import opened

ENDINGS = (".wav", ".wave", ".flac")
RATES = (1, 768_000)  # samples a second


class UnreadableSound(InputError):
    """A sound that cannot be read: where it is, and why."""

    def __init__(self, path: str, why: str) -> None:
        super().__init__(f"{path}: {why}")
        self.path, self.why = path, why


def may_be_sound(name: str) -> bool:
    """Whether a file of this name is looked at."""
    return os.path.splitext(name)[1].lower() in ENDINGS


def below(folder: Path) -> tuple[list[str], list[str]]:
    """(names of the sounds below a folder, of the other files), each in the order of their bytes.

    Raises InputError: no such folder, no sound in it.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: is no folder of sounds ({', '.join(ENDINGS)})")
    sounds, others = list[str](), list[str]()
    for name in _names(folder):
        (sounds if may_be_sound(name) else others).append(name)
    if not sounds:
        raise InputError(f"{folder}: holds no sound ({', '.join(ENDINGS)})")
    return sorted(sounds, key=os.fsencode), sorted(others, key=os.fsencode)


def _names(folder: Path) -> Iterator[str]:
    for place, inner, names in os.walk(folder):  # links to folders are not followed
        inner[:] = [name for name in inner if not name.startswith(".")]
        start = os.path.relpath(place, folder)
        for name in names:
            if not name.startswith("."):
                yield name if start == "." else f"{start}/{name}"


def read(path: Path) -> tuple[int, NDArray]:
    """(rate, samples (t,) float32 in -1..1) of a file; several channels become their mean.

    Raises UnreadableSound, an InputError: no such file, damaged, too long, no WAV or FLAC, a codec that is not there.
    """
    try:
        with opened(path) as file:
            if file.size > limits.SOUND_FILE:
                raise InputError(f"{file.size} bytes; at most {limits.SOUND_FILE} are read")
            data = file.read(0, file.size)
        rate, samples = _flac(data) if data[:4] == b"fLaC" else _wav(data)
        return _checked(rate, samples)
    except InputError as error:
        raise UnreadableSound(str(path), str(error).removeprefix(f"{path}: ")) from error


def _wav(data: bytes) -> tuple[int, NDArray]:
    from scipy.io import wavfile

    if data[:4] not in (b"RIFF", b"RIFX", b"RF64") or data[8:12] != b"WAVE":
        raise InputError("is no WAV or FLAC by its first bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # chunks that it does not know
            rate, samples = wavfile.read(io.BytesIO(data))
    except Exception as error:  # it fails in many ways, all the file's fault
        raise InputError(f"is no WAV that can be read ({first_line(error)})") from error
    kind = samples.dtype
    if kind.kind == "f":
        return rate, samples
    if kind == np.uint8:
        return rate, (samples.astype(np.float32) - 128) / 128
    return rate, samples / np.float32(2.0 ** (8 * kind.itemsize - 1))


def _flac(data: bytes) -> tuple[int, NDArray]:
    try:
        import soundfile
    except (ImportError, OSError) as error:
        raise InputError("FLAC is read by soundfile, which is not here; pip install soundfile") from error
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            if file.format != "FLAC" or file.frames * file.channels > limits.SAMPLES:
                raise InputError(f"declares {file.frames} samples of {file.channels} channels; too many")
            return file.samplerate, file.read(dtype="float32", always_2d=True)
    except (RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"is no FLAC that can be read ({first_line(error)})") from error


def _checked(rate: int, samples: NDArray) -> tuple[int, NDArray]:
    if not RATES[0] <= rate <= RATES[1]:
        raise InputError(f"{rate} samples a second, which no sound has")
    if not samples.size or samples.size > limits.SAMPLES:
        raise InputError(f"{samples.size} samples; from 1 to {limits.SAMPLES} are read")
    if samples.ndim == 2:
        samples = samples.mean(1, dtype=np.float64)
    samples = samples.astype(np.float32)
    if not np.isfinite(samples).all():
        raise InputError("holds NaN or infinity")
    return int(rate), samples


def resampled(samples: NDArray, rate: int, wanted: int) -> NDArray:
    """A sound, (t,), from its rate to the wanted one, both in Hz: (t',) float32, by scipy's polyphase filter."""
    if rate == wanted:
        return samples
    from scipy.signal import resample_poly

    common = int(np.gcd(rate, wanted))
    made: Any = resample_poly(samples.astype(np.float64), wanted // common, rate // common)
    return made.astype(np.float32)
