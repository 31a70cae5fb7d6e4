r"""Trains one row of a table: a teacher (once), then a student by the config's method.

    python -m experiments.main            # LTKD on long-tailed digits, no download
    python -m experiments.main --config=configs/cifar100lt.py:ltkd,imbalance=100 \
        --config.data.dir=DIR

The config's argument is METHOD[,key=value…][,smoke]. Any key can be set by
--config.KEY=VALUE.

The work directory gets config.json, metrics.jsonl, checkpoints, results.json and
report.html. The same command resumes an interrupted run, exactly.
"""

import re
import sys

from absl import app, flags
from ml_collections import config_flags

from ltkd_jax import console, files

_DEFAULT = "configs/digitslt.py"
_CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    f"The config file, with its argument after a colon; {_DEFAULT} by default.",
    lock_config=True,
)
_DISTRIBUTED = flags.DEFINE_string(
    "distributed",
    None,
    "How one of several processes joins the others: auto (TPU pod, Slurm, …), or "
    "HOST:PORT,INDEX,COUNT with the address of process 0.",
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "The work directory; runs/<what is trained> by default."
)
_IMPORT = flags.DEFINE_string(
    "import", "", "Modules that register custom methods and models, by commas."
)
_PRINT_CONFIG = flags.DEFINE_bool(
    "print_config", False, "Print the config with all its keys, and stop."
)


def main(argv: list[str]) -> None:
    """Does the run that the flags describe."""
    if _PRINT_CONFIG.value:
        _print_config()
        return
    # Imported after the flags are parsed: --help need not wait for jax.
    from experiments import runtime, training
    from experiments.config.validation import ConfigError
    from experiments.reporting import load, tables
    from experiments.trainer.interrupts import StoppedError
    from experiments.trainer.loop import DivergedError
    from ltkd_jax.training import hosts

    runtime.initialize(_DISTRIBUTED.value)
    try:
        command = runtime.command_line("experiments.main", sys.argv[1:])
        # An empty --workdir means the default, too.
        workdir = _WORKDIR.value or None
        finished = training.train(_CONFIG.value, workdir, command=command)
        if hosts.is_primary():
            print(tables.render([finished.results]))
            print(f"\n{finished.workdir / 'results.json'}   {finished.report}")
    except (ConfigError, DivergedError, load.ReportError, OSError) as error:
        sys.exit(f"error: {error}")
    except StoppedError as error:
        print(f"{error}. The same command resumes there.", file=sys.stderr)
        sys.exit(runtime.STOPPED)


def parse_flags(argv: list[str]) -> list[str]:
    """Parses the flags; an error of the config is reported in one line.

    Returns:
      The arguments that are no flags: the program's name alone.
    """
    console.replace_unencodable()
    flag_names = [word.lstrip("-").partition("=")[0] for word in argv[1:]]
    if "config" not in flag_names:
        argv = [argv[0], f"--config={_DEFAULT}", *argv[1:]]
    try:
        argv = [_expand_config_path(word) for word in argv]
        _import_modules(argv)
        arguments = flags.FLAGS(argv)
        # The flag keeps an error of loading its file until its value is first used.
        _CONFIG.value.lock()
    # A ValueError is of a module that --import names.
    except (flags.Error, OSError, SyntaxError, ImportError, ValueError) as error:
        sys.exit(f"error: {_one_line(error)}")
    except (AttributeError, KeyError, TypeError):
        sys.exit(f"error: {_unknown_key(argv)}")
    if len(arguments) > 1:
        sys.exit(f"error: unexpected argument {arguments[1]!r}; --help has the flags")
    return arguments


def _print_config() -> None:
    """Prints the config, a line for each key."""
    from experiments.config.trees import flatten

    for path, value in sorted(flatten(_CONFIG.value.to_dict()).items()):
        print(f"{path}={value}")


def _import_modules(argv: list[str]) -> None:
    """Imports the modules of --import: the config's argument may name their methods."""
    from experiments.config import load

    for flag, following in zip(argv, [*argv[1:], ""]):
        name, equals, value = flag.lstrip("-").partition("=")
        if flag.startswith("-") and name == "import":
            load.import_modules(value if equals else following)


def _expand_config_path(word: str) -> str:
    """Returns a word of the command with ~ expanded if it is --config=PATH."""
    flag, _, path = word.partition("=")
    if flag.lstrip("-") != "config" or not path:
        return word
    return f"{flag}={files.expand_user(path)}"


def _one_line(error: Exception) -> str:
    """Returns the last line of an error, which has the cause."""
    message = str(error).strip().splitlines()[-1].strip()
    path = re.search(r"No such file or directory: '(.+)'", message)
    if path:
        from experiments.config.load import missing_file

        message = missing_file(path[1])
    return message.removeprefix("ValueError: ")


def _unknown_key(argv: list[str]) -> str:
    """Returns the error message for a --config.KEY that the config does not have."""
    from configs import common
    from experiments.config import names
    from experiments.config.load import unknown_key

    overrides = [word for word in argv if word.startswith("--config.")]
    keys = [word.removeprefix("--config.").partition("=")[0] for word in overrides]
    for key in keys:
        message = names.renamed(key)
        if message:
            return message
    # ml_collections does not say which of them it is.
    config = common.base("", teacher="", student="", imbalance=1.0)
    paths = common.key_paths(config)
    paths += [f"loss_weighting.{key}" for key in common.bilevel()]
    unknown = [key for key in keys if key not in paths and "method." not in key]
    if len(unknown) == 1:
        return unknown_key(unknown[0], paths)
    return (
        f"the config has no such key: {' '.join(overrides)}; configs/common.py has "
        "all keys"
    )


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
