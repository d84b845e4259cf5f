"""What README, docs and docstrings say: commands parse, files and names exist, examples run, the site builds."""

import ast
import contextlib
import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import collapse
from collapse import cli, experiment, metrics, theory

ROOT = Path(__file__).parents[2]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("figures/*.md")]
SCRIPTS = [path for folder in ("experiments", "benchmarks", "tests") for path in ROOT.glob(f"{folder}/**/*.py")]
by_name = {"ids": lambda path: str(path.relative_to(ROOT))}


def text_of(path):
    text = path.read_text()
    return text if path.suffix == ".md" else ast.get_docstring(ast.parse(text), clean=False) or ""


def fences(text):
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def spans(text):
    """Inline code."""
    return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)


def commands(text):
    """The words of every command in an indented block, a fence or inline code; a \\ goes on, a # comments."""
    prose = re.sub(r"```python\n.*?```", "", text, flags=re.DOTALL).replace("\\\n", " ")
    lines = re.findall(r"^(?: {4,}|\t)(.+)$", prose, re.MULTILINE)
    lines += [line for block in re.findall(r"```\w*\n(.*?)```", prose, re.DOTALL) for line in block.splitlines()]
    for line in [*lines, *spans(prose)]:
        with contextlib.suppress(ValueError):  # an apostrophe: prose
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
                words = words[1:]
            if words:
                yield words


def to_collapse(words):
    """The arguments of `collapse` in a command, or None."""
    words = words[:-1] if words[-1] == "&" else words
    if "-m" in words[:-1] and words[words.index("-m") + 1] == "collapse":
        return words[words.index("-m") + 2 :]
    return words[1:] if words[0] in ("collapse", ".venv/bin/collapse") else None


def check_collapse(arguments):
    """Parse, but for a bare name, which only has to be one."""
    parser = cli.parser()
    if len(arguments) == 1 and not arguments[0].startswith("-"):
        assert arguments[0] in parser.format_help(), arguments
    elif arguments:
        with contextlib.suppress(SystemExit):  # --help, --version
            parser.parse_args(arguments)


def check_script(name, flags):
    """The script is there and takes the flags."""
    path = ROOT / name
    assert path.is_file(), name
    text = path.read_text()
    if "import summary" in text:  # its flags are the study's
        text = (ROOT / "experiments/networks/study.py").read_text()
    if "import Arrays, Meta, main" in text and flags:
        module = importlib.import_module(path.stem)
        experiment._parser(module.__doc__, module.simulate).parse_args(flags)
    else:
        assert all(f'"{flag}"' in text for flag in flags if flag.startswith("--")), (name, flags)


@pytest.mark.parametrize("path", PAGES + SCRIPTS, **by_name)
def test_every_command_parses_and_its_files_exist(path):
    for words in commands(text_of(path)):
        arguments = to_collapse(words)
        if arguments is not None:
            check_collapse(arguments)
        elif words[:2] == ["python", "-c"]:
            compile(words[2], str(path), "exec")
        elif words[0] == "python":
            check_script(words[1], words[2:])
        elif words[0] == "make":
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), words


def test_commands_are_found_wherever_they_stand():
    lines = ["prose", "", "    collapse knn a \\", "        --k 3  # why", "", "| `X=1 python b.py --c` |", ""]
    text = "\n".join([*lines, "```", "make d", "```", ""])
    assert list(commands(text)) == [["collapse", "knn", "a", "--k", "3"], ["make", "d"], ["python", "b.py", "--c"]]
    assert to_collapse(["torchrun", "...", "-m", "collapse", "train"]) == ["train"]
    with pytest.raises(collapse.InputError, match="unrecognized"):
        check_collapse(["spectrum", "z.npy", "--no-such-flag"])
    with pytest.raises(AssertionError):
        check_script("experiments/absent.py", [])
    found = [words for path in PAGES for words in commands(text_of(path)) if to_collapse(words)]
    assert len(found) > 25


def test_the_example_of_every_command_parses():
    (subparsers,) = (action.choices for action in cli.parser()._actions if isinstance(action.choices, dict))
    assert {"spectrum", "train"} <= subparsers.keys()
    for name, subparser in subparsers.items():
        words = shlex.split(subparser.epilog.removeprefix("example: "))
        assert words[:2] == ["collapse", name]
        assert subparser.epilog in subparser.format_help().splitlines()  # in one line, to be copied
        assert subparser.format_help().splitlines()[0].startswith(f"usage: collapse {name} [FLAGS]")
        given = [action for action in subparser._actions if not action.dest.startswith("config_")]
        assert [action.dest for action in given if not action.help] == []
        cli.parser().parse_args(words[1:])


@pytest.mark.parametrize("path", PAGES, **by_name)
def test_every_file_that_a_page_names_exists(path):
    text = path.read_text()
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        assert "://" in target or (path.parent / target).exists(), target
    for name in spans(text):
        if re.fullmatch(r"(collapse|docs|experiments|figures|notebooks|benchmarks|tests)/[\w./*-]*", name):
            assert "NAME" in name or list(ROOT.glob(name.rstrip("/"))), name
        elif path.name == "theory.md" and name.endswith(".py"):
            assert list(ROOT.glob(f"experiments/**/{name}")), name


@pytest.mark.parametrize("path", PAGES, **by_name)
def test_every_name_of_the_package_that_a_page_uses_exists(path):
    text = path.read_text()
    code = [*fences(text), *spans(text)]
    for name in {
        name for part in code for name in re.findall(r"(?<![\w./-])collapse(?:\.[A-Za-z_]\w*)+(?![\w/])", part)
    }:
        found = collapse
        for part in name.split(".")[1:]:
            if not hasattr(found, part):
                importlib.import_module(f"{found.__name__}.{part}")
            found = getattr(found, part)
        assert found is not None, name
    for fence in fences(text):
        compile(fence, str(path), "exec")


@pytest.mark.parametrize("name", ["README.md", "docs/index.md", "docs/quickstart.md", "docs/spectra.md"])
def test_the_examples_in_python_run(name, tmp_path, monkeypatch):
    import torch
    from torch import nn

    monkeypatch.chdir(tmp_path)
    rows = np.random.default_rng(0).standard_normal((3000, 2048)).astype(np.float32)
    model = nn.Module()
    model.backbone = nn.Identity()
    examples = fences((ROOT / name).read_text())
    assert examples
    for fence in examples:
        images = torch.rand(40, 3, 16, 16)
        known = {"collapse": collapse, "embeddings": rows[:, :8], "loader": [rows], "model": model,
                 "net": nn.Identity(), "images": images}  # fmt: skip
        exec(fence, known)


def test_the_site_builds_without_a_warning_and_lists_every_public_name(tmp_path):
    call = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    built = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert built.returncode == 0, built.stdout + built.stderr
    of = lambda page: set(re.findall(r'id="[\w.]*?(\w+)"', (tmp_path / page).read_text()))
    assert set(theory.__all__) <= of("api_theory.html")
    assert set(collapse.__all__) - {"metrics", "plots", "theory"} <= of("api.html")
    assert len(metrics.__all__) > 25
    assert set(metrics.__all__) <= of("api_metrics.html")
    assert (tmp_path / "figures/floor.png").exists()
    for notebook in ROOT.glob("notebooks/*.ipynb"):  # each is a page with its text, code and outputs
        page = (tmp_path / f"notebooks/{notebook.stem}.html").read_text()
        assert page.count("data:image/png;base64,") >= 1
        assert "%pip" not in page
        assert f"{notebook.name}</a>" in page


def test_one_version_everywhere():
    assert f"version: {collapse.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"## {collapse.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_outputs_that_are_shown_are_those_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs/quickstart.md").read_text()
    for fence in fences(page)[:2]:
        exec(fence, {})
    printed = ""
    for call in (["spectrum", "digits.npy"], ["compare", "digits.npy", "ten.npy"]):
        assert cli.main(call) == 0
        printed += capsys.readouterr().out
    for text in (page, (ROOT / "README.md").read_text()):
        shown = [line for block in re.findall("```text\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
        assert len(shown) > 5
        assert [line for line in shown if line.strip() != "..." and line not in printed.splitlines()] == []


def test_the_messages_that_the_questions_quote_are_those_of_the_code():
    quoted = re.findall(r'^\*\*"(.+?)"\.\*\*', (ROOT / "docs/faq.md").read_text(), re.MULTILINE)
    assert len(quoted) > 12
    said = [
        " ".join(text.value.split())
        for path in (ROOT / "collapse").rglob("*.py")
        for text in ast.walk(ast.parse(path.read_text()))
        if isinstance(text, ast.Constant) and isinstance(text.value, str)
    ]
    assert [message for message in quoted if not any(message in text for text in said)] == []


def test_the_cheat_sheet_has_every_metric():
    rows = re.findall(r"^\| (`.+?) \|", (ROOT / "docs/cheatsheet.md").read_text(), re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert named == {name for name in collapse.spectra.METRICS if not re.search(r"_1e-", name)}


def test_every_figure_of_the_gallery_has_its_command():
    page = (ROOT / "docs/gallery.md").read_text()
    scripts = set(re.findall(r"`python (experiments/\w+\.py)`", page))
    assert {f"experiments/figure{k}.py" for k in (1, 2, 3, 4, 5, 6, "7a", "7b", 8, 9, 10, 11)} <= scripts
    assert {"experiments/table1.py", "experiments/table2.py", "experiments/appendix_d0.py"} <= scripts


# What a docstring says: a shape such as (n, d), (K,), (n, 3, h, w), (..., K) or (d + 1, d + 1), and what is refused.
ARRAYS = re.compile(r"\b(NDArray|ndarray|ArrayLike|Tensor|Array|Arrays|Floats|Rows|Picture|Named)\b")
BY_NAME = re.compile(r"\b(Mapping|dict)\[str, Tensor\]")  # a checkpoint's tensors, of which each has its own shape
SIZE = r"(?:\.\.\.|\d+|[A-Za-z]{1,2}\d?'?|batch|channels|classes|columns|count|dim|frames|new|old|patch|points|"
SIZE += r"prefix|repeats|rows|samples|size|steps|views)"
AXIS = rf"{SIZE}(?:(?: ?[-+*/^] ?| ){SIZE})*"
SHAPE = re.compile(
    rf"(?<!\w)\((?=[^()]*[A-Za-z.])(?:{AXIS}, ?)+(?:{AXIS})?\)|(?<!\w)\(\.\.\.\)|\bscalar\b|\b(any|one|same) shapes?\b"
)
REFUSED = re.compile(r"\bInputError\b|Raises Unreadable(Image|Sound)")
DECORATORS = {"same_kind", "of_spectrum"}  # they check the arrays of what they wrap


@pytest.fixture(scope="module")
def modules():
    """{name: syntax tree} of each module of the package."""
    paths = sorted((ROOT / "collapse").rglob("*.py"))
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths]
    return {name: ast.parse(path.read_text()) for name, path in zip(names, paths, strict=True)}


def public(node, owner=None):
    """(function or class, the class it is in) of the public ones in a syntax tree."""
    for item in node.body:
        if isinstance(item, ast.ClassDef) and not item.name.startswith("_"):
            yield item, owner
            yield from public(item, item)
        elif isinstance(item, ast.FunctionDef) and (item.name in ("__init__", "__call__") or item.name[0] != "_"):
            yield item, owner


def said(node, owner=None):
    """The docstring without its examples; of __init__ also that of its class."""
    text = ast.get_docstring(node) or ""
    text = f"{text}\n\n{said(owner)}" if node.name == "__init__" else text
    return "\n".join(line for line in text.splitlines() if not line.lstrip().startswith((">>>", "... ")))


def states(text):
    return SHAPE.search(re.sub(r"min\([^()]*\)", "n", text)) is not None


def is_array(annotation):
    return annotation is not None and ARRAYS.search(BY_NAME.sub("", ast.unparse(annotation))) is not None


def arrays_of(node):
    """The names of the parameters, or of a class's fields, that are arrays; "" stands for what is returned."""
    if isinstance(node, ast.ClassDef):
        return [item.target.id for item in node.body if isinstance(item, ast.AnnAssign) and is_array(item.annotation)]
    every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
    return [each.arg for each in every if each and is_array(each.annotation)] + [""] * is_array(node.returns)


def shape_is_said(node, owner):
    """In its own docstring; or, of a parameter by name, in one sentence of that of its class."""
    if states(said(node, owner)) or owner is None:
        return states(said(node, owner))
    sentences = [part for part in re.split(r"\n\s*\n|(?<=[.;])\s+", said(owner)) if states(part)]
    return any(name and re.search(rf"\b{name}\b", part) for name in arrays_of(node) for part in sentences)


def raises(node):
    """Whether InputError is raised in it, by its name."""
    made = [item.exc for item in ast.walk(node) if isinstance(item, ast.Raise)]
    return any(isinstance(call, ast.Call) and getattr(call.func, "id", "") == "InputError" for call in made)


def names_in(module, tree):
    """{name: where it is defined} of the functions of a module and of what it imports."""
    here = {item.name: f"{module}.{item.name}" for item in tree.body if isinstance(item, ast.FunctionDef)}
    for item in ast.walk(tree):
        if isinstance(item, ast.Import | ast.ImportFrom):
            before = f"{item.module}." if isinstance(item, ast.ImportFrom) else ""
            here |= {alias.asname or alias.name: before + alias.name for alias in item.names}
    return here


def dotted(node):
    """A name as a.b.c; "" for anything else."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def called(node, here):
    """Where each function is defined that a function calls; none of one that takes up an InputError itself."""
    caught = [item.type for item in ast.walk(node) if isinstance(item, ast.ExceptHandler) and item.type]
    calls = [item for item in ast.walk(node) if isinstance(item, ast.Call)]
    caught += [each for call in calls if dotted(call.func).endswith("suppress") for each in call.args]
    if not {dotted(name) for each in caught for name in ast.walk(each)} & {"InputError", "Exception"}:
        for call in calls:
            first, dot, rest = dotted(call.func).partition(".")
            yield here.get(first, "") + dot + rest


def test_functions_of_arrays_say_shapes(modules):
    checked = [
        (f"{module}.{node.name}", shape_is_said(node, owner))
        for module, tree in modules.items()
        for node, owner in public(tree)
        if node.name != "__init__" or not arrays_of(owner)
        if arrays_of(node)
    ]
    assert len(checked) > 290
    silent = [where for where, says in checked if not says]
    assert len(silent) <= 0.05 * len(checked), silent


def test_what_a_function_refuses_is_in_its_docstring(modules):
    raisers = {
        f"{module}.{item.name}"
        for module, tree in modules.items()
        for item in tree.body
        if isinstance(item, ast.FunctionDef) and raises(item)
    }
    itself, by_another = [], []
    for module, tree in modules.items():
        here = names_in(module, tree)
        for node, owner in public(tree):
            if isinstance(node, ast.FunctionDef):
                wrapped = {dotted(each) for each in node.decorator_list} & DECORATORS
                other = wrapped or raisers.intersection(called(node, here))
                found = itself if raises(node) else by_another if other else []
                found.append((f"{module}.{node.name}", REFUSED.search(said(node, owner)) is not None))
    assert len(itself) > 230
    assert len(by_another) > 120
    assert [where for where, says in itself if not says] == []
    silent = {where for where, says in by_another if not says}
    assert silent <= {"collapse.training.relaxation.step"}  # which gives nothing that could be refused


def test_a_docstring_without_a_shape_or_an_error_is_seen():
    assert [states(text) for text in ("(n, d)", "(K,)", "(..., m)", "(min(d1, d2),)", "(d + 1, d + 1)", "(...)")] == [
        True
    ] * 6
    assert not any(map(states, ("(see theorem 2, section 4)", "f(x, y)", "(meta, arrays)", "(1, 2)", "rows", "")))
    tree = ast.parse("class A:\n 'x (n, d).\\n\\ny: no.'\n def f(self, x: Tensor): 0\n def g(self, y: Tensor): 0")
    assert [shape_is_said(node, owner) for node, owner in public(tree) if owner] == [True, False]
    assert raises(ast.parse("def f():\n raise InputError('')"))
    assert not raises(ast.parse("def f():\n raise ValueError('')"))
