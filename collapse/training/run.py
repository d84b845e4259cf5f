"""A RUN, the folder of one training run: who may write to it, its configuration, log, spectra and resumable state.

config.json, whose schema is that of the whole folder; metrics.jsonl; spectra.npz (steps, and singular values of each
layer); resume.pt and, should that be damaged, resume.prev.pt; at the end encoder.safetensors and spectrum.png.  Each
file is written whole or not at all.  A damaged one is kept under a name of its own, NAME.damaged-1.SUFFIX.
"""

import hashlib
import io
import json
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from collapse import InputError, __version__
from collapse.files import containers
from collapse.files.descriptor import opened
from collapse.recipes.config import Config
from collapse.results import load_json, read_npz, save_text, strict, to_json, versions
from collapse.results.outputs import LEFTOVER, atomic_write
from collapse.training.lock import Lock

SCHEMA = 2  # of the folder, and of resume.pt
DIGEST = 32  # bytes of sha256 at the end of resume.pt


class Run:
    """The folder, locked for this process until `close`.

    config: as Config.as_dict gives it; data: what identifies the images; behind: states are written by a thread;
    former: what version 1 kept of the images, by the names of `data`, where that was less.
    Raises InputError: another process trains in it, it cannot be made, or it holds a run of another configuration;
    more epochs than before are no other configuration.
    """

    def __init__(
        self,
        folder: Path,
        config: Mapping[str, Any],
        data: Mapping[str, Any],
        behind: bool = False,
        former: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder, self.encoder, self.behind = folder, folder / "encoder.safetensors", behind
        self._writing: Future[None] | None = None
        self._wrote = 0.0  # seconds that the last state took
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = Lock(folder)
        except OSError as error:
            raise InputError(f"{folder}: cannot be made a folder for a run ({error.strerror})") from error
        self.beat = self._lock.beat
        try:
            self._same({"config": dict(config), "data": dict(data)}, former or {})
        except InputError:
            self.close()
            raise
        for partial in folder.iterdir():
            if LEFTOVER.fullmatch(partial.name) and not partial.is_dir():
                partial.unlink(missing_ok=True)

    def close(self) -> None:
        """Let others have it, once what is being written is there."""
        if self._writing is not None:
            wait([self._writing])
        self._lock.release()

    def _same(self, wanted: dict[str, Any], former: Mapping[str, Any]) -> None:
        path, wanted = self.folder / "config.json", json.loads(to_json(wanted))
        if not path.exists():
            if (self.folder / "resume.pt").exists() or self.encoder.exists():
                raise InputError(f"{self.folder}: holds a run without its config.json; choose another RUN")
            header = {"schema": f"collapse.run/{SCHEMA}", "versions": versions("numpy", "torch", "torchvision")}
            save_text(path, to_json({**header, **wanted}))
            return
        stored = _stored(path)
        less = [k for k, v in former.items() if stored["data"].get(k) == v != wanted["data"][k]]
        if less and stored["schema"] == "collapse.run/1":
            stored["data"] |= {key: wanted["data"][key] for key in less}
            print(
                f"warning: {path}: version 1 kept names and labels of the images; their contents were not checked",
                file=sys.stderr,
            )
        parts = [(stored[part], wanted[part]) for part in ("config", "data")]
        different = [(k, old.get(k), new[k]) for old, new in parts for k in new if old.get(k) != new[k]]
        if [key for key, *_ in different] == ["epochs"] and different[0][1] < different[0][2]:
            self._raise(path, stored, wanted)
            return
        if different:
            texts = ", ".join(f"{key} = {old}, not {new}" for key, old, new in different)
            raise InputError(f"{self.folder}: holds a run with {texts}; choose another RUN, or give the same")
        if stored["schema"] != f"collapse.run/{SCHEMA}":
            save_text(path, to_json({**stored, "schema": f"collapse.run/{SCHEMA}", **wanted}))

    def _raise(self, path: Path, stored: dict[str, Any], wanted: dict[str, Any]) -> None:
        """Let a run go on to more epochs; the encoder of a finished one is kept under a name of its own."""
        old, new = stored["config"]["epochs"], wanted["config"]["epochs"]
        if self.encoder.exists():
            if not (self.folder / "resume.pt").exists():
                raise InputError(f"{self.folder}: is finished and has no resume.pt to go on from; choose another RUN")
            os.replace(self.encoder, self._free(f"encoder-{old:04d}"))
        before = [*stored.get("raised_from", []), old]
        schema = {"schema": f"collapse.run/{SCHEMA}"}
        save_text(path, to_json({**stored, **schema, **wanted, "raised_from": before}))
        print(
            f"warning: {self.folder}: {new} epochs instead of {old}: from here on the learning rate follows the "
            f"schedule of {new}, which another run of {new} epochs has from the start",
            file=sys.stderr,
        )

    def _free(self, stem: str) -> Path:
        """A name of the folder that none has: STEM.safetensors, or numbered."""
        names = (self.folder / f"{stem}{f'-{number}' if number else ''}.safetensors" for number in count())
        return next(name for name in names if not name.exists())

    def keep_aside(self, path: Path, what: str) -> None:
        """Move a damaged file of the folder to a name that none has, and say so."""
        names = (path.with_name(f"{path.stem}.damaged-{number}{path.suffix}") for number in count(1))
        aside = next(name for name in names if not name.exists())
        os.replace(path, aside)
        print(f"warning: {path}: damaged; kept as {aside.name}; {what}", file=sys.stderr)

    def require_space(self, size: int) -> None:
        """Raise InputError unless the disk has room for two states of `size` bytes and a little more."""
        free = shutil.disk_usage(self.folder).free
        if free < 2.2 * size:
            raise InputError(
                f"{self.folder}: disk full: {2.2 * size / 2**20:.0f} MiB needed, {free / 2**20:.0f} MiB free"
            )

    def save(self, state: Mapping[str, Any]) -> None:
        """Replace resume.pt, in a thread and from a copy of the state if `behind`; `settle` waits for it.

        Raises InputError: it, or the state before it, cannot be written; another process has the folder.
        """
        self.settle()
        self._lock.check()
        if not self.behind:
            self._save(state)
            return
        copied = snapshot(state)
        ready = torch.cuda.Event() if torch.cuda.is_available() else None
        if ready is not None:
            ready.record()
        writer = ThreadPoolExecutor(1)
        self._writing = writer.submit(self._save, copied, ready)
        writer.shutdown(wait=False)

    def settle(self) -> None:
        """Wait until the last state is on the disk. Raises InputError: it could not be written."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def wrote(self) -> float:
        """Seconds that the last state took to be written; infinity while it is."""
        return math.inf if self._writing is not None and not self._writing.done() else self._wrote

    def _save(self, state: Mapping[str, Any], ready: Any = None) -> None:
        """The state's last 32 bytes are the sha256 of the rest. The one before becomes resume.prev.pt."""
        start = time.monotonic()
        if ready is not None:
            ready.synchronize()
        buffer, path = io.BytesIO(), self.folder / "resume.pt"
        if (log := self.folder / "metrics.jsonl").exists():  # a state says how long it is
            _sync(log)
        torch.save({"schema": SCHEMA, "version": __version__, **state}, buffer)
        content = buffer.getbuffer()
        digest = hashlib.sha256(content).digest()
        with atomic_write(path) as partial:
            with open(partial, "wb") as file:
                file.write(content)
                file.write(digest)
                file.flush()
                os.fsync(file.fileno())
            if partial.stat().st_size != len(content) + DIGEST:
                raise InputError(f"{path}: {partial.stat().st_size} of {len(content) + DIGEST} bytes reached the disk")
            if path.exists():
                os.replace(path, self.folder / "resume.prev.pt")
        _sync(self.folder)
        self._wrote = time.monotonic() - start

    def load(self) -> dict[str, Any] | None:
        """The last whole state, or None at the start and where the encoder of a finished run is all there is.

        A damaged one is kept aside and the one before is taken.
        Raises InputError: all states of a run without an encoder are damaged, or were written by a later version.
        """
        paths = [self.folder / name for name in ("resume.pt", "resume.prev.pt") if (self.folder / name).exists()]
        damaged: list[Path] = []
        for path in paths:
            if (state := _state_of(path)) is not None:
                for other in damaged:
                    self.keep_aside(other, f"the state before it is taken, {path.name}")
                return _migrated(state, path)
            damaged.append(path)
        if paths and not self.encoder.exists():
            raise InputError(f"{paths[0]}: damaged, and no whole state is left; choose another RUN")
        return None

    def cut_log(self, size: int) -> None:
        """Leave the log's first `size` bytes: what was written after the state was saved will be written again.

        Raises InputError: it is no regular file, or cannot be written.
        """
        path = self.folder / "metrics.jsonl"
        try:
            content = b""
            if path.exists() and not path.is_file():
                raise InputError(f"{path}: is not a regular file; remove it, the run goes on without its log")
            if path.exists() and path.stat().st_size:
                with opened(path) as source:
                    content = source.read(0, source.size)
            kept = content[:size]
            if len(content) < size:
                print(f"warning: {path}: lines are missing; the run goes on without them", file=sys.stderr)
                kept = content[: content.rfind(b"\n") + 1]
            sound = [line for line in kept.splitlines(keepends=True) if log_line(line) is not None]
            if b"".join(sound) != kept:
                self.keep_aside(path, "the run goes on with its other lines")
                with atomic_write(path) as partial:
                    partial.write_bytes(b"".join(sound))
            else:
                with open(path, "ab") as file:
                    file.truncate(len(kept))
        except OSError as error:
            raise InputError(f"{path}: cannot be cut to its last save ({error.strerror})") from error

    def log(self, line: Mapping[str, Any]) -> int:
        """Append one line; returns the log's size in bytes. Raises InputError: it cannot be written."""
        try:
            with open(self.folder / "metrics.jsonl", "ab") as file:
                file.write(json.dumps(strict(line), allow_nan=False).encode() + b"\n")
                return file.tell()
        except OSError as error:
            raise InputError(f"{self.folder}/metrics.jsonl: cannot be written ({error.strerror})") from error

    def check_spectra(self, step: int, measured: int) -> None:
        """Keep a damaged spectra.npz aside; warn where it has fewer than the `measured` spectra up to `step`."""
        path = self.folder / "spectra.npz"
        stored = spectra_of(path)
        if stored is None and path.exists():
            self.keep_aside(path, "the run goes on without its spectra so far")
        elif (stored["steps"] <= step).sum() < measured if stored else measured:
            print(f"warning: {path}: spectra are missing; the run goes on without them", file=sys.stderr)

    def add_spectra(self, step: int, values: Mapping[str, NDArray]) -> None:
        """Add the singular values of each layer, (d,), at `step`; what the file holds from `step` on is dropped.

        Raises InputError: the file cannot be written.
        """
        path = self.folder / "spectra.npz"
        new = {"steps": np.array([step]), **{name: value[None] for name, value in values.items()}}
        stored = spectra_of(path)
        fits = stored is not None and {k: v.shape[1:] for k, v in stored.items()} == {
            k: v.shape[1:] for k, v in new.items()
        }
        if path.exists() and not fits:
            self.keep_aside(path, "the run goes on without its spectra so far")
        elif stored is not None:
            kept = stored["steps"] < step
            new = {name: np.concatenate([stored[name][kept], value]) for name, value in new.items()}
        with atomic_write(path) as partial:
            np.savez(partial, **new)  # type: ignore[arg-type]


def snapshot(value: Any) -> Any:
    """A copy of a state on the host; from CUDA into pinned memory, whole once the current stream comes to it."""
    if isinstance(value, torch.Tensor):
        return torch.empty_like(value, device="cpu", pin_memory=value.is_cuda).copy_(value, non_blocking=True)
    if isinstance(value, Mapping):
        return {key: snapshot(item) for key, item in value.items()}
    return [snapshot(item) for item in value] if isinstance(value, list) else value


def spectra_of(path: Path) -> dict[str, NDArray] | None:
    """What spectra.npz holds: steps (n,), and (n, d) singular values of each layer. None: absent or damaged."""
    try:
        arrays = read_npz(path)
        steps = arrays["steps"]
        right = len(steps) > 0 and all(a.dtype.kind in "fi" and a.shape[0] == len(steps) for a in arrays.values())
        return (
            arrays
            if right and steps.ndim == 1 and all(a.ndim == 2 for k, a in arrays.items() if k != "steps")
            else None
        )
    except (InputError, LookupError, TypeError):
        return None


def log_line(text: bytes) -> dict[str, Any] | None:
    """A line of the log, or None for what is none."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    complete = isinstance(line, dict) and all(isinstance(line.get(key), int) for key in ("step", "epoch"))
    return line if complete and text.endswith(b"\n") else None


def last_line(folder: Path) -> dict[str, Any]:
    """The last line of a run's log. Raises InputError: there is none, or it is damaged."""
    path = folder / "metrics.jsonl"
    try:
        with opened(path) as source:
            line = log_line(source.read(0, source.size).splitlines(keepends=True)[-1])
    except InputError:
        line = None
    if line is None:
        raise InputError(f"{path}: absent or damaged; the run is finished, {folder / 'encoder.safetensors'} is whole")
    return line


def _version(schema: Any, path: Path, wrote: Any) -> int:
    """The number of a schema that this version reads; raises InputError for another."""
    number = int(schema) if str(schema).isdigit() else 0
    if number > SCHEMA:
        raise InputError(f"{path}: written by a later version of collapse ({wrote}, schema {number}); install that one")
    if number < 1:
        raise InputError(f"{path}: schema {schema!r}, expected 1 to {SCHEMA}; not a run of collapse")
    return number


def _stored(path: Path) -> dict[str, Any]:
    """config.json of this version or one before: a value that did not exist then is what it was, Config's default.

    Raises InputError: damaged, of a later version, or a value that this version does not know.
    """
    try:
        stored = load_json(path)
        wrote = stored.get("versions", {}).get("dimensional-collapse", "unknown")
        _version(str(stored.get("schema")).removeprefix("collapse.run/"), path, wrote)
        known = json.loads(to_json(vars(Config())))
        unknown = sorted(stored["config"].keys() - known.keys())
        if unknown:
            raise InputError(
                f"{path}: {unknown[0]} is not known to this version of collapse; {wrote} wrote it, install that one"
            )
        return {**stored, "config": {**known, **stored["config"]}, "data": dict(stored["data"])}
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: cannot be read ({error!r}); choose another RUN") from error


def _state_of(path: Path) -> Any:
    """What a state's file holds, read without running anything; None where its digest is not that of its bytes."""
    if path.stat().st_size <= DIGEST:
        return None
    with opened(path) as source:
        content = source.window(0, source.size - DIGEST)
        if content.sha256() != source.read(content.size, DIGEST).hex():
            return None
        return containers.parts_of(content)[1]


def _migrated(state: Any, path: Path) -> dict[str, Any]:
    """A state of this version or one before, as this one writes it."""
    if not isinstance(state, dict):
        raise InputError(f"{path}: not the state of a run; choose another RUN")
    number = _version(state.get("schema"), path, state.get("version", "unknown"))
    return {"measured": 0, **state} if number < 2 else state


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


class Signals:
    """Asks a run to save and leave at SIGINT, SIGTERM, SIGHUP or SIGUSR1; one a second later or more acts at once.

    Launchers and schedulers both pass a signal on, so that it comes twice.
    Call it for the number of the signal that came, or 0.
    """

    KINDS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)

    def __init__(self) -> None:
        self.received, self._since = 0, 0.0

    def __enter__(self) -> "Signals":
        self._old = {kind: signal.signal(kind, self._note) for kind in self.KINDS}
        return self

    def __exit__(self, *error: Any) -> None:
        for kind, handler in self._old.items():
            signal.signal(kind, handler)

    def _note(self, number: int, frame: Any) -> None:
        if self.received and time.monotonic() - self._since > 1:
            signal.signal(number, self._old[signal.Signals(number)])
            signal.raise_signal(number)
        elif not self.received:
            self.received, self._since = number, time.monotonic()

    def __call__(self) -> int:
        return self.received
