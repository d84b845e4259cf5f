"""Do the tests notice a broken formula?  A seeded sample of mutants of theory, spectra and metrics, by mutmut.

    make mutants                                  # 80 mutants, about 15 minutes on 2 cores

mutmut changes one operator, number, name or argument at a time in a copy of the package and runs the tests that reach
it.  Changes of a message's wording are left out of the sample: no test should hang on them.  Prints the mutants that
survive, and exits with 1 if fewer than 95 % are killed.
"""

import argparse
import json
import random
import re
import subprocess
import sys
from pathlib import Path

from mutmut.stats import status_by_exit_code

MUTANTS = Path("mutants")
KILLED = {"killed", "timeout", "segfault", "suspicious"}  # a failing test, or a loop without end
WORDING = re.compile(r"XX|InputError|warnings|notes|f\"|f'|desc=|description|\.upper\(|\.lower\(|title|disable|unit=")


def names() -> list[str]:
    """All mutants that mutmut has made, in order."""
    found = (json.loads(path.read_text())["exit_code_by_key"] for path in sorted(MUTANTS.rglob("*.meta")))
    return sorted(name for codes in found for name in codes)


def changed_lines(name: str) -> str:
    shown = subprocess.run([sys.executable, "-m", "mutmut", "show", name], capture_output=True, text=True).stdout
    return "\n".join(line for line in shown.splitlines() if line[:1] in "+-" and line[:3] not in ("+++", "---"))


def sample(count: int, seed: int) -> dict[str, str]:
    """{name: changed lines} of `count` mutants that change more than wording."""
    order = names()
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
    parser.add_argument("--count", type=int, default=80)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    run = [sys.executable, "-m", "mutmut", "run", "--max-children", "2"]
    # A name that matches one function makes all mutants and runs a few.
    subprocess.run([*run, "collapse.metrics.x_rankme*"], stdout=subprocess.DEVNULL, check=True)
    chosen = sample(options.count, options.seed)
    subprocess.run([*run, *chosen], stdout=subprocess.DEVNULL, check=True)
    found = results()
    survivors = [name for name in chosen if found[name] not in KILLED]
    for name in survivors:
        print(f"{found[name]}: {name}\n{chosen[name]}\n")
    killed = 1 - len(survivors) / len(chosen)
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} mutants killed: {killed:.1%} (seed {options.seed})")
    return 0 if killed >= 0.95 else 1


if __name__ == "__main__":
    sys.exit(main())
