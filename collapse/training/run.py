"""A RUN, the folder of one training run: who may write to it, its configuration, log, spectra and resumable state.

config.json; metrics.jsonl; spectra.npz (steps, and singular values of each layer); resume.pt and, should that be
damaged, resume.prev.pt; at the end encoder.safetensors and spectrum.png.  Each file is written whole or not at all.
"""

import fcntl
import hashlib
import io
import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from collapse import InputError
from collapse.results import save_text, strict, to_json, versions, whole

SCHEMA = 1
# What a process that was killed while it wrote has left.
PARTIAL = re.compile(r"\.(config|spectra|resume|spectrum|encoder(-\d+)?)\.\d+\.(json|npz|pt|png|safetensors)")
DIGEST = 32  # bytes of sha256 at the end of resume.pt


class Run:
    """The folder, locked for this process until it ends.

    Raises InputError: another process trains in it, it cannot be made, or it holds a run of another configuration.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], data: Mapping[str, Any]) -> None:
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = open(folder / ".lock", "a+")  # noqa: SIM115  (locked as long as it is open)
        except OSError as error:
            raise InputError(f"{folder}: cannot be made a folder for a run ({error.strerror})") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.seek(0)
            holder = self._lock.read().strip()
            self._lock.close()
            raise InputError(f"{folder}: process {holder} is training in it; wait, or choose another RUN") from error
        self._lock.truncate(0)
        self._lock.write(f"{os.getpid()} on {os.uname().nodename}")
        self._lock.flush()
        os.register_at_fork(after_in_child=self._lock.close)  # workers that outlive this process must not hold it
        try:
            self._same({"config": dict(config), "data": dict(data)})
        except InputError:
            self.close()
            raise
        for partial in filter(lambda path: PARTIAL.fullmatch(path.name), folder.iterdir()):
            partial.unlink(missing_ok=True)

    def close(self) -> None:
        """Let others have it."""
        self._lock.close()

    def _same(self, wanted: dict[str, Any]) -> None:
        path, wanted = self.folder / "config.json", json.loads(to_json(wanted))
        if not path.exists():
            if (self.folder / "resume.pt").exists() or (self.folder / "encoder.safetensors").exists():
                raise InputError(f"{self.folder}: holds a run without its config.json; choose another RUN")
            about = {"schema": "collapse.run/1", "versions": versions("numpy", "torch", "torchvision")}
            save_text(path, to_json({**about, **wanted}))
            return
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            if stored.get("schema") != "collapse.run/1":
                raise InputError(
                    f"{path}: schema {stored.get('schema')!r}, expected collapse.run/1; another version's run"
                )
            parts = [(stored[part], wanted[part]) for part in ("config", "data")]
            different = [(k, old.get(k), new[k]) for old, new in parts for k in new if old.get(k) != new[k]]
        except (OSError, ValueError, KeyError, AttributeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{path}: cannot be read ({error!r}); choose another RUN") from error
        if different:
            texts = ", ".join(f"{key} = {old}, not {new}" for key, old, new in different)
            raise InputError(f"{self.folder}: holds a run with {texts}; choose another RUN, or give the same")

    @property
    def finished(self) -> bool:
        """Whether the final encoder is written."""
        return (self.folder / "encoder.safetensors").exists()

    def require_space(self, size: int) -> None:
        """Raise InputError unless the disk has room for two states of `size` bytes and a little more."""
        free = shutil.disk_usage(self.folder).free
        if free < 2.2 * size:
            raise InputError(
                f"{self.folder}: disk full: {2.2 * size / 2**20:.0f} MiB needed, {free / 2**20:.0f} MiB free"
            )

    def save(self, state: Mapping[str, Any]) -> None:
        """Replace resume.pt; its last 32 bytes are the sha256 of the rest. The one before becomes resume.prev.pt."""
        buffer, path = io.BytesIO(), self.folder / "resume.pt"
        if (log := self.folder / "metrics.jsonl").exists():  # a state says how long it is
            _sync(log)
        torch.save({"schema": SCHEMA, **state}, buffer)
        content = buffer.getbuffer()
        digest = hashlib.sha256(content).digest()
        with whole(path) as partial:
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

    def load(self) -> dict[str, Any] | None:
        """The last whole state, or None at the start. A damaged one is reported and the one before is taken.

        Raises InputError: all states are damaged, or were written by a later version.
        """
        paths = [self.folder / name for name in ("resume.pt", "resume.prev.pt") if (self.folder / name).exists()]
        for path in paths:
            content = path.read_bytes()
            if hashlib.sha256(content[:-DIGEST]).digest() == content[-DIGEST:]:
                state = torch.load(io.BytesIO(content[:-DIGEST]), map_location="cpu", weights_only=True)
                if state["schema"] != SCHEMA:
                    raise InputError(f"{path}: schema {state['schema']}, expected {SCHEMA}; another version's run")
                return state
            print(f"warning: {path} is damaged; the state before it is tried", file=sys.stderr)
        if paths:
            raise InputError(f"{paths[0]}: damaged, and no whole state is left; choose another RUN")
        return None

    def cut_log(self, size: int) -> None:
        """Leave the log's first `size` bytes: what was written after the state was saved will be written again."""
        path = self.folder / "metrics.jsonl"
        with open(path, "ab+") as file:
            if file.tell() < size:
                file.seek(0)
                print(f"warning: {path}: lines are missing; the run goes on without them", file=sys.stderr)
                size = file.read().rfind(b"\n") + 1
            file.truncate(size)

    def log(self, line: Mapping[str, Any]) -> int:
        """Append one line; returns the log's size in bytes."""
        try:
            with open(self.folder / "metrics.jsonl", "ab") as file:
                file.write(json.dumps(strict(line), allow_nan=False).encode() + b"\n")
                return file.tell()
        except OSError as error:
            raise InputError(f"{self.folder}/metrics.jsonl: cannot be written ({error.strerror})") from error

    def add_spectra(self, step: int, values: Mapping[str, NDArray]) -> None:
        """Add the singular values of each layer, (d,), at `step`; what the file holds from `step` on is dropped."""
        path = self.folder / "spectra.npz"
        new = {"steps": np.array([step]), **{name: value[None] for name, value in values.items()}}
        if path.exists():
            with np.load(path, allow_pickle=False) as file:
                kept = file["steps"] < step
                new = {name: np.concatenate([file[name][kept], value]) for name, value in new.items()}
        with whole(path) as partial:
            np.savez(partial, **new)  # type: ignore[arg-type]


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
