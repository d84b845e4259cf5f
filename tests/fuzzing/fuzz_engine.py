"""Mutants read in forked processes: what each ends in, how long it takes, and which is to blame when one dies."""

import base64
import contextlib
import gc
import json
import os
import re
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

import fuzz_mutants as mutants
import fuzz_seeds
from fuzz_mutants import Mutant
from fuzz_watch import Forbidden, watched

PROCESSOR, WALL, KILL = 2.0, 30.0, 120.0  # seconds: a reader's own, waiting included, until the process is ended
POLL = 0.5  # seconds between two looks; what counts is looks, since a machine may stop all its processes for a while
LINE = 10_000  # characters of a refusal
SHARED = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # in memory: a disk takes longer than most readers
MEMORY, ADDRESSES = 1 << 30, 3 << 30  # bytes that a mutant may take, and that it can take


class Hang(BaseException):
    """A reader took too long; no `except Exception` catches it."""


@dataclass
class Outcome:
    """How the reading of one mutant ended: "answer", "refusal" or what went wrong."""

    kind: str
    text: str = ""
    where: str = ""
    seconds: float = 0.0
    memory: int = 0

    @property
    def failed(self) -> bool:
        """Whether it may not be so."""
        return self.kind not in ("answer", "refusal")

    @property
    def sign(self) -> str:
        """The same for failures of one cause."""
        return re.sub(r"0x[0-9a-f]+|\d+", "N", f"{self.kind} {self.where or self.text[:60]}")


@dataclass
class Job:
    """Mutants `start` to `stop` of a format, and what the process that reads them has said."""

    number: int
    format: str
    start: int
    stop: int
    counts: Counter = field(default_factory=Counter)
    failures: list[dict[str, Any]] = field(default_factory=list)
    slowest: tuple[float, int] = (0.0, 0)
    largest: tuple[int, int] = (0, 0)

    def note(self, index: int, outcome: Outcome) -> None:
        """Count one mutant."""
        self.counts["failure" if outcome.failed else outcome.kind] += 1
        self.slowest = max(self.slowest, (outcome.seconds, index))
        self.largest = max(self.largest, (outcome.memory, index))
        if outcome.failed:
            self.failures.append({"format": self.format, "index": index, **vars(outcome), "sign": outcome.sign})


def load_seeds(names: list[str]) -> dict[str, list[tuple[str, dict[str, bytes]]]]:
    """{format: (what is opened, files) of each seed}, written by another process: writers leave threads behind."""
    with tempfile.TemporaryDirectory() as folder:
        call = [sys.executable, str(Path(fuzz_seeds.__file__)), folder, *names]
        subprocess.run(call, check=True, stderr=subprocess.DEVNULL, timeout=600)
        return {
            name: [
                (fuzz_seeds.entry(place), mutants.read_folder(place))
                for place in sorted((Path(folder) / name).iterdir())
            ]
            for name in names
        }


def mutant(seed: int, name: str, index: int, seeds: list) -> tuple[Mutant, int]:
    """(mutant, which of the format's seeds it comes from)."""
    rng = Random(f"{seed} {name} {index}")
    origin = rng.randrange(len(seeds))
    return mutants.mutate(*seeds[origin], rng), origin


def _bytes_of(key: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(key))


class _Late:
    """The handler of both clocks. A process that was stopped finds one alarm; one that waits gets them all."""

    alarms = 0

    def __call__(self, number: int, frame: Any) -> None:
        self.alarms += number == signal.SIGALRM
        if number == signal.SIGPROF or self.alarms >= 3:
            raise Hang


_LATE = _Late()


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Processor time, time and addresses are limited inside."""
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    for number in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(number, _LATE)
    _LATE.alarms = 0
    resource.setrlimit(resource.RLIMIT_AS, (_bytes_of("VmSize") + ADDRESSES, hard))
    ends = resource.getrlimit(resource.RLIMIT_CPU)[1]
    # A loop in C hears no signal of Python's: SIGXCPU ends the process.
    resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time() + 2 * PROCESSOR) + 1, ends))
    signal.setitimer(signal.ITIMER_PROF, PROCESSOR)
    signal.setitimer(signal.ITIMER_REAL, WALL / 3, WALL / 3)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
        resource.setrlimit(resource.RLIMIT_CPU, (ends, ends))


def attempt(call: Any, made: Mutant, root: Path, truth: str | None = None) -> Outcome:
    """Read a mutant in `root`, a folder of its own. truth: the digest that an answer must have."""
    mutants.write_folder(made.files, root)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the highest memory so far is forgotten
    before, began = _bytes_of("VmRSS"), time.process_time()
    try:
        with (
            limited(),
            watched(
                Path("/") if made.entry.endswith(".txt") else root, root if call.__name__ == "run" else None
            ) as seen,
        ):
            outcome = _read(call, root / made.entry, root, truth)
    except Hang:
        outcome = Outcome("hang", f"over {PROCESSOR} s of processor time, or {WALL} s")
    outcome.seconds = time.process_time() - began
    outcome.memory = max(0, _bytes_of("VmHWM") - before)
    if seen:
        outcome = replace(outcome, kind="forbidden", text=seen[0].replace(str(root), "ROOT"), where="")
    elif outcome.memory > MEMORY and not outcome.failed:
        outcome = replace(outcome, kind="memory", text=f"{outcome.memory >> 20} MiB, then: {outcome.text}", where="")
    if not outcome.failed and any(path.name != root.name for path in root.parent.iterdir()):
        outcome = replace(outcome, kind="forbidden", text="a file appeared beside what was read", where="")
    return outcome


def warm(call: Any, seeds: list, root: Path) -> list[str | None]:
    """Read seeds unwatched, so that what libraries load at first use is loaded; digests of the answers."""
    from fuzz_targets import digest

    truths: list[str | None] = []
    for entry, files in seeds:
        mutants.write_folder(files, root)
        truths.append(None)
        with contextlib.suppress(Exception, Hang), limited():
            truths[-1] = digest(call(root / entry))
    return truths


def _read(call: Any, path: Path, root: Path, truth: str | None) -> Outcome:
    from fuzz_targets import Wrong, digest

    from collapse import InputError

    try:
        found = digest(call(path))
    except InputError as error:
        text = str(error)
        problems = {"several lines": len(text.splitlines()) != 1, "names no file": str(root) not in text,
                    "a long line": len(text) > LINE}  # fmt: skip
        kind = next((problem for problem, there in problems.items() if there), "refusal")
        return Outcome(kind, text.replace(str(root), "ROOT")[:LINE], _place(error))
    except Wrong as error:
        return Outcome("wrong answer", str(error))
    except Hang as error:
        return Outcome("hang", "", _place(error))
    except Forbidden as error:
        return Outcome("forbidden", "", _place(error))
    except BaseException as error:
        return Outcome(
            type(error).__name__, "".join(traceback.format_exception_only(error)).strip()[-400:], _place(error)
        )
    return Outcome("answer" if truth in (None, found) else "wrong answer", "not what the file held, nor an error")


def _place(error: BaseException) -> str:
    """The innermost frame of this package."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f"{os.sep}collapse{os.sep}" in f.filename]
    return f"{Path(frames[-1].filename).name}:{frames[-1].name}" if frames else ""


def _work(job: Job, seed: int, seeds: list, pipe: int) -> None:
    """What a forked process does; it says where it is and how each mutant ended, a line each."""
    from fuzz_targets import SEALED, TARGETS

    call = TARGETS[fuzz_seeds.FORMATS[job.format].target]
    with tempfile.TemporaryDirectory(dir=SHARED) as folder:
        root = Path(folder) / "case"
        os.chdir(folder)
        truths = warm(call, seeds, root)
        for index in range(job.start, job.stop):
            made, origin = mutant(seed, job.format, index, seeds)
            os.write(pipe, b"%d\n" % index)
            sealed = made.noise and job.format in SEALED
            outcome = attempt(call, made, root, truths[origin] if sealed else None)
            os.write(pipe, json.dumps([index, vars(outcome)]).encode() + b"\n")
            gc.collect(0)


def _fork(work: Any, *arguments: Any) -> tuple[int, int]:
    """(process, what it says) of a fork that does some work and ends."""
    reader, writer = os.pipe()
    if pid := os.fork():
        os.close(writer)
        return pid, reader
    code = 1
    try:
        os.close(reader)
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        if not os.environ.get("FUZZ_LOUD"):
            os.dup2(quiet, 2)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        work(*arguments, writer)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


@dataclass
class Lane:
    """A process that reads the mutants of a job; it is begun again behind one that ends it."""

    job: Job
    seed: int
    seeds: list
    at: int = -1
    silent: int = 0
    looked: float = 0.0
    ended: bool = False
    _rest: bytes = b""

    def begin(self) -> None:
        """Fork, from `job.start` or behind the last mutant."""
        self.silent, self.looked, self._rest = 0, time.monotonic(), b""
        rest = Job(self.job.number, self.job.format, max(self.at + 1, self.job.start), self.job.stop)
        self.pid, self.pipe = _fork(_work, rest, self.seed, self.seeds)

    def hear(self, ready: bool) -> None:
        """Take down what was said; a process that died or was silent for too long is a failure of its mutant."""
        said = os.read(self.pipe, 1 << 16) if ready else b""
        if said:
            self.silent = 0
            *lines, self._rest = (self._rest + said).split(b"\n")
            for line in lines:
                told = json.loads(line)
                if isinstance(told, int):
                    self.at = told
                else:
                    self.job.note(told[0], Outcome(**told[1]))
        elif ready:
            self._end(os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1]))
        elif (now := time.monotonic()) - self.looked >= POLL:  # another lane that talks makes looks more frequent
            self.silent, self.looked = self.silent + 1, now
            if self.silent > KILL / POLL:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                self._end(None)

    def _end(self, code: int | None) -> None:
        os.close(self.pipe)
        if code == 0:
            self.ended = True
            return
        if code is not None and code > 0:
            raise RuntimeError(f"{self.job.format}: the process of mutant {self.at} ended with {code}; FUZZ_LOUD=1")
        kind = "hang" if code is None else f"killed by {signal.Signals(-code).name}"
        self.job.note(self.at, Outcome(kind, where=self.job.format, seconds=KILL if code is None else 0.0))
        self.ended = self.at + 1 >= self.job.stop
        if not self.ended:
            self.begin()


def run_jobs(jobs: Iterator[Job], seed: int, seeds: dict, processes: int) -> Iterator[Job]:
    """Do jobs, some at a time; yields each as it ends, and None while they go on."""
    lanes: list[Lane] = []
    try:
        while True:
            while len(lanes) < processes and (job := next(jobs, None)):
                lanes.append(Lane(job, seed, seeds[job.format]))
                lanes[-1].begin()
            if not lanes:
                return
            ready = select.select([lane.pipe for lane in lanes], [], [], POLL)[0]
            for lane in [*lanes]:
                lane.hear(lane.pipe in ready)
                if lane.ended:
                    lanes.remove(lane)
                    yield lane.job
    finally:
        for lane in lanes:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):  # the one that failed is gone
                os.kill(lane.pid, signal.SIGKILL)
                os.waitpid(lane.pid, 0)


def alone(target: str, made: Mutant, seeds: list = ()) -> Outcome:  # type: ignore[assignment]
    """How one mutant ends, in a process of its own."""
    from fuzz_targets import TARGETS

    def work(pipe: int) -> None:
        with tempfile.TemporaryDirectory(dir=SHARED) as folder:
            os.chdir(folder)
            warm(TARGETS[target], seeds, Path(folder) / "case")
            os.write(pipe, json.dumps(vars(attempt(TARGETS[target], made, Path(folder) / "case"))).encode())

    pid, pipe = _fork(work)
    with open(pipe, "rb") as file:
        said = file.read() if select.select([pipe], [], [], KILL)[0] else b""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return Outcome(**json.loads(said)) if said else Outcome(f"killed by {code}")


def shrink(target: str, made: Mutant, seeds: list, seconds: float = 20.0) -> Mutant:
    """A smaller mutant that fails alike: pieces are left out of its files, large ones first."""
    sign, end = alone(target, made, seeds).sign, time.monotonic() + seconds
    if not alone(target, made, seeds).failed:
        return made  # it wants others before it
    for name in sorted(made.files, key=lambda n: -len(made.files[n])):
        content = made.files[name]
        step = len(content) // 2 if isinstance(content, bytes) else 0
        while step and time.monotonic() < end:
            for place in range(0, len(content), step):
                shorter = content[:place] + content[place + step :]
                tried = replace(made, files={**made.files, name: shorter})
                if time.monotonic() < end and alone(target, tried, seeds).sign == sign:
                    made, content = tried, shorter
                    break
            else:
                step //= 2
    return made


def pack(made: Mutant, target: str, why: str) -> str:
    """A case for tests/fuzzing/cases, as JSON."""
    files: dict[str, Any] = {}
    for name, content in made.files.items():
        packed = zlib.compress(content, 9) if isinstance(content, bytes) else b""
        files[name] = base64.b64encode(packed).decode() if packed else {"is": content}
    case = {"target": target, "why": why, "what": made.what, "entry": made.entry, "files": files}
    return json.dumps(case, indent=1) + "\n"


def unpack(text: str) -> tuple[Mutant, str]:
    """(mutant, target) of a case."""
    case = json.loads(text)
    files = {
        name: content["is"] if isinstance(content, dict) else zlib.decompress(base64.b64decode(content))
        for name, content in case["files"].items()
    }
    return Mutant(case["entry"], files, case["what"]), case["target"]
