"""What the pages name exists. That their code runs is held by tests/system/test_docs.py."""

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

READ = [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
ADDED = {
    "kd_adjusted",
    "experiments/queues/mine.json",
}  # by the reader of docs/add_a_method.md
SOURCES = "\n".join(
    path.read_text()
    for room in ("experiments", "ltkd_jax")
    for path in (ROOT / room).rglob("*.py")
)
FLAG = re.compile(r'"--([\w-]+)"|DEFINE_\w+\(\s*"(\w+)"|define_config_file\(\s*"(\w+)"')


def named(pattern):
    """Yields (page, match) of a pattern in every page; a command that is broken over lines is one line."""
    for page in READ:
        for match in re.findall(
            pattern, page.read_text().replace("\\\n", " "), re.MULTILINE
        ):
            yield str(page.relative_to(ROOT)), match


def test_python_parses():
    for page in READ:
        for code in blocks(page, "code-cell", "python"):
            if not code.lstrip("\n").startswith(("%%", " ")):
                compile(code, str(page), "exec")


def test_modules_exist():
    unknown = [
        (page, module)
        for page, module in named(r"python -m ([\w.]+)")
        if not importlib.util.find_spec(module)
    ]
    assert not unknown


def test_flags_exist():
    flags = {name for names in FLAG.findall(SOURCES) for name in names} | {"help"}
    commands = named(r"python -m ((?:experiments|ltkd_jax)[^`\n#]*)")
    used = [
        (page, flag)
        for page, command in commands
        for flag in re.findall(r"--([a-z]\w*)", command)
    ]
    assert len(used) > 50
    assert not [(page, flag) for page, flag in used if flag not in flags]


def test_config_arguments_are_accepted():
    for _, (path, argument) in named(r"--config=(configs/\w+\.py)(?::([^\s`]+))?"):
        if not any(new in argument for new in ADDED):
            load.load_config(f"{path}:{argument}" if argument else path)


def test_config_keys_exist():
    config = common.base("digits", teacher="resnet8", student="resnet8", imbalance=1.0)
    config.loss_weighting.update(common.bilevel())
    config.method.update(
        {
            key: 0.0
            for method in methods.METHODS
            for key in methods.hyperparameters(method)
        }
    )
    keys = {*traverse_util.flatten_dict(config.to_dict(), sep="."), "KEY"}
    sections = "|".join(
        name for name, value in config.items() if hasattr(value, "keys")
    )
    in_commands = named(r"--config\.([\w.]*\w)")
    in_text = named(rf"`((?:{sections})\.[\w.]*\w)[`=]")
    assert not [
        (page, key) for page, key in (*in_commands, *in_text) if key not in keys
    ]


def test_make_targets_and_extras_exist():
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    commands = named(r"(?:^(?=make [\w-]+(?:  |$))|`)make ([a-z][\w-]*)")
    assert not [(page, target) for page, target in commands if target not in targets]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    assert not [
        (page, extra)
        for page, extra in named(r'pip install (?:-e )?"\.\[(\w+)\]"')
        if extra not in extras
    ]


def test_paths_exist():
    paths = named(
        r"(?<![\w./-])((?:configs|docs|experiments|tests|ltkd_jax|results)/[\w./*-]*[\w*])"
    )
    assert not [
        (page, path)
        for page, path in paths
        if path not in ADDED and not list(ROOT.glob(path))
    ]


def test_first_example_is_the_readmes():
    (code,) = blocks(DOCS / "index.md", "python")
    readmes = next(blocks(ROOT / "README.md", "python"))
    assert ast.dump(ast.parse(code)) == ast.dump(ast.parse(readmes))
