"""No byte of a file is run, whatever the file: hundreds that try, and each place of the code where one might be.

python tests/files/test_never.py      # the table of places as it is now
"""

import ast
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import collapse

FUZZING, PACKAGE = Path(__file__).parents[1] / "fuzzing", Path(collapse.__file__).parent

READ_ALL = """
import json, os, tempfile, warnings
from pathlib import Path
warnings.simplefilter("ignore")
import torch
torch.set_num_threads(1)
import attacks, fuzz_engine
from fuzz_targets import TARGETS
found = []
made = [variant for write in attacks.ATTACKS for variant in write()]
with tempfile.TemporaryDirectory() as folder:
    os.chdir(folder)
    for name, target, mutant in made:
        if name.startswith("seed "):
            fuzz_engine.warm(TARGETS[target], [(mutant.entry, mutant.files)], Path(folder) / "case")
    for name, target, mutant in made:
        outcome = fuzz_engine.attempt(TARGETS[target], mutant, Path(folder) / "case")
        found.append([name, target, outcome.kind, outcome.text])
print(json.dumps(found))
"""
# Attacks whose tensors are whole, or that are data: read, and what might run is not.
READ = ("seed ", "a script", "disguise")


def test_what_tries_to_run_is_data_or_one_line():
    program = f"import sys; sys.path.insert(0, {str(FUZZING)!r})\n{READ_ALL}"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stderr[-3000:]
    found = json.loads(ended.stdout)
    assert len(found) > 600
    wrong = [entry for entry in found if entry[2] not in ("answer", "refusal")]
    assert not wrong, f"{len(wrong)} of {len(found)}: {wrong[:9]}"
    programs = [entry for entry in found if not entry[0].startswith(READ) and entry[1] in ("checkpoint", "array")]
    assert len(programs) > 300
    assert sum(kind == "refusal" for _, _, kind, _ in programs) > 0.9 * len(programs)


# What may see bytes of a file, or run, fetch or start something.  All uses of these names in the package are below.
LOOKED_AT = (
    "PIL", "__import__", "ast", "builtins", "bz2", "cloudpickle", "compile", "configparser",
    "csv", "ctypes", "dill", "eval", "exec", "gzip", "h5py", "importlib", "joblib", "json.load", "json.loads", "lzma",
    "marshal", "numcodecs", "numpy.fromfile", "numpy.genfromtxt", "numpy.lib", "numpy.load", "numpy.loadtxt",
    "numpy.memmap", "os.exec", "os.popen", "os.posix_spawn", "os.spawn", "os.system", "pickle", "pyarrow", "requests",
    "runpy", "safetensors", "scipy.io", "shelve", "socket", "soundfile", "sqlite3", "subprocess", "tarfile",
    "timm.create_model", "tokenizers", "tomllib",
    "torch.classes", "torch.distributed.checkpoint", "torch.from_file", "torch.hub", "torch.jit", "torch.load",
    "torch.ops", "torch.package", "torch.serialization", "torchvision.datasets", "torchvision.io",
    "torchvision.models.get_model", "transformers", "urllib", "xml", "yaml", "zarr", "zipfile", "zlib",
)  # fmt: skip
HARMLESS = (
    "PIL.Image.Image", "PIL.Image.Resampling", "PIL.Image.Transform", "PIL.Image.Transpose", "PIL.Image.fromarray",
    "PIL.Image.new", "PIL.ImageFilter", "PIL.ImageOps", "importlib.metadata",
)  # fmt: skip

# How often each file of the package names such a thing.  A new one wants a second pair of eyes and docs/security.md.
PLACES = {
    "__init__.py": {"importlib": 1},
    "checkpoints/huggingface.py": {"transformers": 11},
    "checkpoints/library.py": {"timm.create_model": 1, "torchvision.models.get_model": 1},
    "checkpoints/own.py": {"importlib": 4},
    "checkpoints/preprocessing.py": {"json.loads": 1},
    "checkpoints/sentences.py": {"transformers": 2},
    "checkpoints/settings.py": {"json.loads": 1},
    "checkpoints/sounds.py": {"transformers": 3},
    "files/containers.py": {"json.loads": 1},
    "files/folders.py": {"json.loads": 1},
    "files/hdf5.py": {"h5py": 6},
    "files/imagesets/base.py": {"json.loads": 1},
    "files/imagesets/shards.py": {"json.loads": 1},
    "files/imagesets/tables.py": {"pyarrow": 1},
    "files/mat.py": {"zlib": 1},
    "files/npy.py": {"ast": 1},
    "files/packed.py": {"zlib": 1},
    "files/parquet.py": {"pyarrow": 4},
    "files/pictures.py": {"PIL": 15, "importlib": 1},
    "files/rows.py": {"importlib": 1},
    "files/sounds.py": {"scipy.io": 1, "soundfile": 1},
    "files/tables.py": {"csv": 1, "json.loads": 1},
    "files/texts.py": {"csv": 1, "json.loads": 1},
    "files/vocabularies.py": {"json.loads": 1, "tokenizers": 3},
    "files/zarrs.py": {"json.loads": 1, "zarr": 7},
    "files/zips.py": {"zlib": 6},
    "models/backbones.py": {"timm.create_model": 1, "torchvision.models.get_model": 2},
    "moved.py": {"importlib": 6},
    "results/documents.py": {"json.loads": 1},
    "training/lock.py": {"json.loads": 1},
    "training/network.py": {"safetensors": 2},
    "training/parallel.py": {"torch.ops": 5},
    "data/archives.py": {"torchvision.datasets": 7},
    "training/run.py": {"json.loads": 3},
}


def names_in(tree):
    """{local name: full name} of all imports of a file."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {
                a.asname or a.name.partition(".")[0]: a.name if a.asname else a.name.partition(".")[0]
                for a in node.names
            }
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    return found


def dotted(node, names):
    """a.b.c of an attribute, its first name as imported; None for anything else."""
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        owner = dotted(node.value, names)
        return owner and f"{owner}.{node.attr}"
    return None


def _below(name, places):
    return any(name == place or name.startswith(f"{place}.") for place in places)


def uses(source):
    """{name of LOOKED_AT: how often} of the uses in a file, called or passed on, and of `except` clauses none."""
    tree = ast.parse(source)
    names, found = names_in(tree), Counter()
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    caught = {id(part) for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler) and node.type
              for part in ast.walk(node.type)}  # fmt: skip
    for node in ast.walk(tree):
        name = dotted(node, names) if id(node) not in inner | caught else None
        if name and not _below(name, HARMLESS):
            found.update(looked for looked in LOOKED_AT if _below(name, (looked,)))
    return found


def table():
    found = {
        str(path.relative_to(PACKAGE)): dict(sorted(uses(path.read_text()).items())) for path in PACKAGE.rglob("*.py")
    }
    return {name: counts for name, counts in sorted(found.items()) if counts}


def test_every_place_that_may_see_bytes_of_a_file_was_looked_at():
    now = table()
    for name in sorted({*now, *PLACES}):
        assert now.get(name, {}) == PLACES.get(name, {}), (
            f"collapse/{name}: other uses than those looked at; review that none can run or start anything, describe "
            f"the place in docs/security.md, then take its line of `python {Path(__file__).name}` over"
        )


def test_a_new_use_is_seen_however_it_is_written():
    for source, name in {
        "import torch\ntorch.load('a')": "torch.load",
        "import torch as t\nload = t.load": "torch.load",
        "from torch import load as read\nread('a')": "torch.load",
        "def f():\n    import pickle\n    return pickle.Unpickler": "pickle",
        "from pickle import loads\nloads(b'')": "pickle",
        "class A(pickle.Unpickler): ...": "pickle",
        "from importlib import import_module\nimport_module('a')": "importlib",
        "x = eval\n": "eval",
        "from PIL import Image\nImage.open('a')": "PIL",
        "import numpy as np\nmap(np.load, paths)": "numpy.load",
    }.items():
        assert uses(source) == {name: 1}, source
    assert not uses("import zipfile\ntry: ...\nexcept zipfile.BadZipFile: ...\nnet.eval()\nre.compile('a')\nd.load()")


if __name__ == "__main__":
    for file, counts in table().items():
        print(f'    "{file}": {json.dumps(counts)},')
