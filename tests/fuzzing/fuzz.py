"""Files that are wrong in one place, in every format that is read: an answer or one line, nothing else.

    make fuzz                                              # 200,000 mutants, two processes, half an hour; it goes on
    python tests/fuzzing/fuzz.py --count 5000 --quick              # by test_fuzz.py, a minute
    python tests/fuzzing/fuzz.py --formats npy zarr --count 2000   # some formats
    python tests/fuzzing/fuzz.py --case tests/fuzzing/cases/NAME.json   # one case, its files in build/fuzz/case

Mutant I of a format is a function of the seed and I.  A forked process reads many of them.  It is a failure if a reader
raises anything but InputError, if that has several lines or does not name the file, if the process dies, takes over
2 s of processor time or 1 GiB, does what fuzz_watch.py forbids, or gives an answer that no file can mean.
Failures are cut down and kept in build/fuzz/failures, as tests/fuzzing/cases keeps those that were mended.
"""

import argparse
import hashlib
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
BUILD, CASES = ROOT / "build/fuzz", ROOT / "tests/fuzzing/cases"
CHUNK = 250  # mutants a process


def _code() -> str:
    """A digest of the readers and of this program: what was counted with others does not count."""
    paths = [*ROOT.glob("collapse/**/*.py"), *ROOT.glob("tests/fuzzing/*.py")]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(paths))).hexdigest()[:16]


class Record:
    """What is counted, kept in build/fuzz from chunk to chunk."""

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self.path, self.about = path, about
        found = json.loads(path.read_text()) if path.exists() else {}
        usable = found.get("about") == about
        self.done: set[int] = set(found["done"]) if usable else set()
        self.formats: dict[str, dict[str, Any]] = found["formats"] if usable else {}
        self.failures: list[dict[str, Any]] = found["failures"] if usable else []
        self.seconds: float = found["seconds"] if usable else 0.0

    def add(self, job: Any) -> None:
        """Take down what a chunk has come to."""
        self.done.add(job.number)
        empty = {"mutants": 0, "answers": 0, "refusals": 0, "failures": 0, "slowest_seconds": 0.0, "slowest": 0,
                 "largest_bytes": 0, "largest": 0}  # fmt: skip
        found = self.formats.setdefault(job.format, empty)
        found["mutants"] += job.counts.total()
        for one, many in (("answer", "answers"), ("refusal", "refusals"), ("failure", "failures")):
            found[many] += job.counts[one]
        for name, (value, index) in (("slowest_seconds", job.slowest), ("largest_bytes", job.largest)):
            if value > found[name]:
                found[name], found[name.split("_")[0]] = value, index
        self.failures += job.failures

    def save(self) -> None:
        """Write it down; a copy is renamed, so that an end in the middle loses one chunk."""
        text = {name: sorted(value) if isinstance(value, set) else value for name, value in vars(self).items()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps({**text, "path": None}))
        partial.replace(self.path)

    def kinds(self) -> dict[str, list[dict[str, Any]]]:
        """The failures by what they have in common."""
        found: dict[str, list[dict[str, Any]]] = {}
        for failure in self.failures:
            found.setdefault(f"{failure['format']}: {failure['sign']}", []).append(failure)
        return found


def jobs(names: list[str], count: int) -> Iterator[Any]:
    """Chunks of mutants, the formats in turn, so that a part of a run has seen them all."""
    from fuzz_engine import Job

    share = {name: count // len(names) + (place < count % len(names)) for place, name in enumerate(names)}
    number = 0
    for start in range(0, max(share.values()), CHUNK):
        for name in names:
            if start < share[name]:
                yield Job(number, name, start, min(start + CHUNK, share[name]))
                number += 1


def fuzz(options: argparse.Namespace, names: list[str]) -> Record:
    """Read all mutants that are not read yet."""
    from fuzz_engine import load_seeds, run_jobs
    from tqdm import tqdm

    about = {"seed": options.seed, "count": options.count, "formats": names, "code": _code()}
    record = Record(BUILD / f"{options.seed}-{options.count}-{len(names)}.json", about)
    print(f"seeds of {len(names)} formats are written", file=sys.stderr)
    seeds, began, before = load_seeds(names), time.monotonic(), record.seconds
    left = (job for job in jobs(names, options.count) if job.number not in record.done)
    read = sum(found["mutants"] for found in record.formats.values())
    with tqdm(total=options.count, initial=read, unit=" mutants", smoothing=0.02, mininterval=1) as bar:
        for job in run_jobs(left, options.seed, seeds, options.processes):
            record.add(job)
            record.seconds = before + time.monotonic() - began
            record.save()
            bar.set_postfix_str(f"{len(record.failures)} failures, {job.format}", refresh=False)
            bar.update(job.counts.total())
    _keep(record, seeds, options)
    return record


def _keep(record: Record, seeds: dict, options: argparse.Namespace) -> None:
    """Cut one failure of each kind down, and write it where --case finds it."""
    from fuzz_engine import mutant, pack, shrink
    from fuzz_seeds import FORMATS

    folder = BUILD / "failures"
    folder.mkdir(parents=True, exist_ok=True)
    for kind, failures in sorted(record.kinds().items()):
        first = failures[0]
        name, target = first["format"], FORMATS[first["format"]].target
        made, _ = mutant(options.seed, name, first["index"], seeds[name])
        small = shrink(target, made, seeds[name], options.shrink) if options.shrink else made
        slug = f"{name}-{hashlib.sha256(kind.encode()).hexdigest()[:8]}".replace(" ", "-")
        (folder / f"{slug}.json").write_text(pack(small, target, f"{kind} {first['text'][:200]}"))
        print(f"{len(failures):6} x {kind}\n         mutant {first['index']}, {made.what[:110]}\n"
              f"         {first['text'][:160]!r}\n         {folder / slug}.json", file=sys.stderr)  # fmt: skip


def result(record: Record) -> dict[str, Any]:
    """What benchmarks/results/fuzz.json holds."""
    from collapse.results import provenance

    total = Counter({name: sum(found[name] for found in record.formats.values())
                     for name in ("mutants", "answers", "refusals", "failures")})  # fmt: skip
    slowest = max(record.formats.items(), key=lambda item: item[1]["slowest_seconds"])
    largest = max(record.formats.items(), key=lambda item: item[1]["largest_bytes"])
    return {
        "schema": "collapse.fuzz/1",
        **provenance(),
        "seed": record.about["seed"],
        **total,
        "seconds": round(record.seconds),
        "slowest": {"format": slowest[0], "mutant": slowest[1]["slowest"], "seconds": slowest[1]["slowest_seconds"]},
        "largest": {"format": largest[0], "mutant": largest[1]["largest"], "bytes": largest[1]["largest_bytes"]},
        "formats": {name: record.formats[name] for name in sorted(record.formats)},
    }


def read_cases(paths: list[Path]) -> int:
    """Read cases again; returns how many fail. The files of a single one are left."""
    import fuzz_mutants
    from fuzz_engine import alone, unpack

    failed = 0
    for path in paths:
        made, target = unpack(path.read_text())
        outcome = alone(target, made)
        failed += outcome.failed
        if outcome.failed or len(paths) == 1:
            print(f"{path.name}: {outcome.kind} {outcome.where} {outcome.text}\n{made.what}; read by {target}")
    if len(paths) == 1:
        BUILD.mkdir(parents=True, exist_ok=True)
        fuzz_mutants.write_folder(made.files, BUILD / "case")
        print(BUILD / "case" / made.entry)
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=200_000, help="mutants of all formats together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--formats", nargs="*", help="some of them")
    parser.add_argument("--quick", action="store_true", help="formats whose seeds are written and read quickly")
    parser.add_argument("--shrink", type=float, default=20.0, help="seconds in which a failure is cut down")
    parser.add_argument("--out", type=Path, help="write the counts to a file")
    parser.add_argument("--case", type=Path, help="read one case again")
    options = parser.parse_args()
    print("the readers are loaded", file=sys.stderr)
    import fuzz_targets  # noqa: F401, before the forks, which would each load it
    import torch
    from fuzz_seeds import FORMATS

    torch.set_num_threads(1)
    if options.case:
        return min(1, read_cases([options.case]))
    names = options.formats or [name for name, found in FORMATS.items() if found.quick or not options.quick]
    record, cases = fuzz(options, names), sorted(CASES.glob("*.json"))
    document = result(record) | {"cases": len(cases), "failing_cases": read_cases(cases)}
    if options.out:
        options.out.write_text(json.dumps(document, indent=1) + "\n")
    counts = ", ".join(f"{document[name]} {name}" for name in ("mutants", "answers", "refusals", "failures"))
    print(f"{counts} in {document['seconds']} s (seed {options.seed}); {len(cases)} cases of before")
    return int(document["failures"] + document["failing_cases"] > 0)


if __name__ == "__main__":
    sys.exit(main())
