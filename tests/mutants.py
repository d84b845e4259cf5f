"""Do the tests notice a broken formula?  A seeded sample of mutants of the parts that compute, by mutmut.

    make mutants                                  # 120 mutants, about half an hour on 2 cores
    python tests/mutants.py --only "collapse.monitor.*" --count 5 --out monitor.json
    python tests/mutants.py --resume              # go on with a run that was interrupted

The parts are `source_paths` in pyproject.toml: theory, spectra, metrics, diagnosis, drawing, the monitor, views, the
optimiser and the keys of checkpoints.

mutmut changes one operator, number, name or argument at a time in a copy of the package, build/mutants, and runs the
tests that reach it.  Changes of a message's wording are left out of the sample: no test should hang on them.  Prints
the mutants that survive, writes benchmarks/results/mutants.json, and exits with 1 if fewer than 95 % are killed.
Each result is kept in build/mutants as it comes.  --resume takes tests and package as they are now, and runs again what
was not killed, or is of a function that has changed.
"""

import argparse
import ast
import difflib
import fnmatch
import json
import random
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

from mutmut.stats import status_by_exit_code

from collapse.results import provenance, save_text, to_json

ROOT = Path(__file__).parents[1]
COPY = ROOT / "build/mutants"
MUTANTS = COPY / "mutants"
KILLED = {"killed", "timeout", "segfault", "suspicious"}  # a failing test, or a loop without end
WORDING = re.compile(r"XX|InputError|warnings|notes|f\"|f'|desc=|description|\.upper\(|\.lower\(|title|disable|unit=")


def undecorated(source: str) -> str:
    """A module in which top-level functions are decorated after they are made: mutmut skips what has an `@`.

    It tests each mutant in a fork of one process, so what that one has cached is cleared there.
    """
    decorator = re.compile(r"^@(.+)\n(?=def (\w+)\()", re.MULTILINE)
    later = [f"{name} = {wrapper}({name})\n" for wrapper, name in decorator.findall(source)]
    clear = "__import__('os').register_at_fork(after_in_child={}.cache_clear)\n"
    later += [clear.format(line.split()[0]) for line in later if "lru_cache" in line]
    return decorator.sub("", source) + "".join(later)


def copy_package() -> None:
    """The package and its tests in build/mutants, and beside them where mutmut writes; what is there already stays.

    mutmut makes the mutants of a file whose two copies have one date.
    """
    COPY.mkdir(parents=True, exist_ok=True)
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, COPY)
    shutil.copytree(ROOT / "tests", COPY / "tests", ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
    for path in (path for path in ROOT.glob("collapse/**/*") if path.is_file() and path.suffix != ".pyc"):
        data = undecorated(path.read_text()).encode() if path.suffix == ".py" else path.read_bytes()
        copy, mutated = (folder / path.relative_to(ROOT) for folder in (COPY, MUTANTS))
        for target in (copy, mutated):
            target.parent.mkdir(parents=True, exist_ok=True)
        changed = not copy.exists() or copy.read_bytes() != data
        if changed:
            copy.write_bytes(data)
        if changed or not mutated.with_name(f"{mutated.name}.meta").exists():  # it has no mutants, or not yet
            shutil.copy2(copy, mutated)


def run(*names: str) -> None:
    """Run mutants by name; mutmut keeps each result as it comes. Ends with its last words where it fails."""
    command = [sys.executable, "-m", "mutmut", "run", "--max-children", "2", *names]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=COPY)
    if done.returncode:
        sys.exit(f"{done.stdout[-4000:]}\nmutmut failed; what it has found is kept: go on with --resume")


def names() -> list[str]:
    """All mutants that mutmut has made, in order."""
    found = (json.loads(path.read_text())["exit_code_by_key"] for path in sorted(MUTANTS.rglob("*.meta")))
    return sorted(name for codes in found for name in codes)


@cache
def functions(path: Path) -> dict[str, list[str]]:
    """{name: lines} of all functions and methods of a file that mutmut made, each original and mutant one of them."""
    source = path.read_text()
    lines = source.splitlines()
    found = (node for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))
    slices = {node.name: lines[node.lineno - 1 : node.end_lineno] for node in found}
    return {name: [line.replace(name, "") for line in body] for name, body in slices.items()}


def changed_lines(name: str) -> str:
    """The lines that a mutant takes away (-), and those that it puts in their place (+)."""
    module, _, function = name.rpartition(".")
    path = MUTANTS / module.replace(".", "/")
    bodies = functions(path.with_suffix(".py") if path.with_suffix(".py").exists() else path / "__init__.py")
    original = bodies[function.rpartition("__mutmut_")[0] + "__mutmut_orig"]
    return "\n".join(line for line in difflib.ndiff(original, bodies[function]) if line[0] in "+-")


def sample(count: int, seed: int, only: str) -> dict[str, str]:
    """{name: changed lines} of `count` mutants that change more than wording, of names that match `only`."""
    order = fnmatch.filter(names(), only)
    random.Random(seed).shuffle(order)
    chosen: dict[str, str] = {}
    for name in order:
        if len(chosen) == count:
            break
        lines = changed_lines(name)
        if lines and not WORDING.search(lines):
            chosen[name] = lines
    return chosen


def results() -> dict[str, str]:
    """{mutant: killed, survived, ...}"""
    found: dict[str, str] = {}
    for path in MUTANTS.rglob("*.meta"):
        codes = json.loads(path.read_text())["exit_code_by_key"]
        found |= {name: status_by_exit_code[code] for name, code in codes.items()}
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="*", help="mutants of these names alone, * and ? as in a shell")
    parser.add_argument("--resume", action="store_true", help="go on in build/mutants: run what was not killed")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/mutants.json", metavar="FILE.json")
    options = parser.parse_args()
    if not options.resume:
        shutil.rmtree(COPY, ignore_errors=True)
    copy_package()
    run("collapse.metrics.spectral.x_rankme__mutmut_1")  # one mutant's name makes the mutants of all
    chosen = sample(options.count, options.seed, options.only)
    before = results()
    if left := [name for name in chosen if before[name] not in KILLED]:
        run(*left)
    found = results()
    survivors = [name for name in chosen if found[name] not in KILLED]
    for name in survivors:
        print(f"{found[name]}: {name}\n{chosen[name]}\n")
    killed = 1 - len(survivors) / len(chosen)
    about = {
        "schema": 1,
        **provenance(),
        "seed": options.seed,
        "only": options.only,
        "mutants": {name: found[name] for name in chosen},
        "killed": killed,
    }
    save_text(options.out, to_json(about))
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} mutants killed: {killed:.1%} (seed {options.seed})")
    return 0 if killed >= 0.95 else 1


if __name__ == "__main__":
    sys.exit(main())
