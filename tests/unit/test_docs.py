"""Names on the pages exist. tests/system/test_docs.py runs their code."""

import ast
import importlib.util
import re
import tomllib

from flax import traverse_util
from helpers.environments import ROOT
from helpers.pages import DOCS, PAGES, blocks

from configs import common
from experiments.config import load
from ltkd_jax import methods

DOCUMENTS = [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
# The reader of docs/add_a_method.md and `make docs` create these.
ADDED = {"kd_adjusted", "experiments/queues/mine.json", "docs/_build/html"}
FLAG = re.compile(r'"--([\w-]+)"|DEFINE_\w+\(\s*"(\w+)"|define_config_file\(\s*"(\w+)"')


def matches(pattern):
    """Yields (page, match) of a pattern; joins commands that are continued."""
    for page in DOCUMENTS:
        text = page.read_text().replace("\\\n", " ")
        for match in re.findall(pattern, text, re.MULTILINE):
            yield str(page.relative_to(ROOT)), match


def defined_flags():
    """Returns the names of all flags of the commands."""
    flags = {"help"}
    for package in ("experiments", "ltkd_jax"):
        for path in (ROOT / package).rglob("*.py"):
            for names in FLAG.findall(path.read_text()):
                flags.update(names)
    return flags


def test_python_blocks():
    for page in DOCUMENTS:
        for code in blocks(page, "code-cell", "python"):
            if not code.lstrip("\n").startswith(("%%", " ")):
                compile(code, str(page), "exec")


def test_modules_exist():
    modules = list(matches(r"python -m ([\w.]+)"))
    assert not [name for name in modules if not importlib.util.find_spec(name[1])]


def test_flags_exist():
    defined = defined_flags()
    used = []
    for page, command in matches(r"python -m ((?:experiments|ltkd_jax)[^`\n#]*)"):
        for flag in re.findall(r"--([a-z]\w*)", command):
            used.append((page, flag))
    assert len(used) > 50
    assert not [(page, flag) for page, flag in used if flag not in defined]


def test_config_arguments():
    for _, (path, argument) in matches(r"--config=(configs/\w+\.py)(?::([^\s`]+))?"):
        if not any(name in argument for name in ADDED):
            load.load_config(f"{path}:{argument}" if argument else path)


def test_config_keys_exist():
    config = common.base("digits", teacher="resnet8", student="resnet8", imbalance=1.0)
    config.loss_weighting.update(common.bilevel())
    for method in methods.METHODS:
        config.method.update(dict.fromkeys(methods.hyperparameters(method), 0.0))
    keys = {*traverse_util.flatten_dict(config.to_dict(), sep="."), "KEY"}
    sections = "|".join(key for key, value in config.items() if hasattr(value, "keys"))
    in_commands = matches(r"--config\.([\w.]*\w)")
    in_text = matches(rf"`((?:{sections})\.[\w.]*\w)[`=]")
    used = [*in_commands, *in_text]
    assert not [(page, key) for page, key in used if key not in keys]


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^([\w-]+):", makefile, re.MULTILINE)
    commands = matches(r"(?:^(?=make [\w-]+(?:  |$))|`)make ([a-z][\w-]*)")
    assert not [(page, target) for page, target in commands if target not in targets]


def test_extras_exist():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    used = matches(r'pip install (?:-e )?"\.\[(\w+)\]"')
    assert not [(page, extra) for page, extra in used if extra not in extras]


def test_paths_exist():
    folders = "configs|docs|experiments|tests|ltkd_jax|results"
    paths = matches(rf"(?<![\w./-])((?:{folders})/[\w./*-]*[\w*])")
    missing = []
    for page, path in paths:
        if path not in ADDED and not list(ROOT.glob(path)):
            missing.append((page, path))
    assert not missing


def test_first_example():
    (code,) = blocks(DOCS / "index.md", "python")
    readme_code = next(blocks(ROOT / "README.md", "python"))
    assert ast.dump(ast.parse(code)) == ast.dump(ast.parse(readme_code))
