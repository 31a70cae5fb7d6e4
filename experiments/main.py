"""Trains one row of a table: a teacher (once), then a student by the method of the config.

    python -m experiments.main                                       # LTKD on long-tailed digits, no download
    python -m experiments.main --config=configs/cifar100lt.py:ltkd,imbalance=100 --config.data.dir=DIR

The config's argument is METHOD[,key=value…][,smoke]; any key can be set by --config.KEY=VALUE.
The work directory gets config.json, metrics.jsonl, checkpoints, results.json and report.html. The same command
resumes an interrupted run, exactly.
"""

import pathlib
import re
import sys

from absl import app, flags
from ml_collections import config_flags

_DEFAULT = "configs/digitslt.py"
_CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    f"The config file, with its argument after a colon; {_DEFAULT} unless given.",
    lock_config=True,
)
_DISTRIBUTED = flags.DEFINE_string(
    "distributed",
    None,
    "One of several processes: auto (TPU pod, Slurm, …), or HOST:PORT,INDEX,COUNT of process 0.",
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where the run lives; runs/<what is trained> unless given."
)


def main(argv):
    # Imported after the flags are read, so that --help is quick.
    from experiments import runtime
    from experiments.config.spec import resolve
    from experiments.config.validation import ConfigError
    from experiments.reporting import load, report_page, tables
    from experiments.trainer import run
    from experiments.trainer.interrupts import Stopped
    from experiments.trainer.loop import DivergedError
    from ltkd_jax.training import hosts

    runtime.initialize(_DISTRIBUTED.value)
    try:
        spec = hosts.run_on_all(lambda: resolve(_CONFIG.value))
        workdir = pathlib.Path(_WORKDIR.value or pathlib.Path("runs") / spec.name)
        results = run.run(
            spec,
            workdir,
            command=runtime.command_line("experiments.main", sys.argv[1:]),
        )
        if hosts.is_primary():
            report_page.write_report([load.load(workdir)], workdir / "report.html")
            print(tables.render([results]))
            print(f"\n{workdir / 'results.json'}   {workdir / 'report.html'}")
    except (ConfigError, DivergedError, load.ReportError, OSError) as error:
        sys.exit(f"error: {error}")
    except Stopped as stopped:
        print(f"{stopped}. The same command resumes there.", file=sys.stderr)
        sys.exit(runtime.STOPPED)


def parse_flags(argv):
    """Parses the flags, with a config's own error in one line in place of a traceback."""
    if not any(word.lstrip("-").split("=")[0] == "config" for word in argv[1:]):
        argv = [argv[0], f"--config={_DEFAULT}", *argv[1:]]
    try:
        rest = flags.FLAGS(argv)
        _CONFIG.value.lock()  # a file that could not be loaded only says so when it is used
    except (flags.Error, OSError, SyntaxError, ImportError) as error:
        last = str(error).strip().splitlines()[-1].strip()
        missing = re.search(r"No such file or directory: '(.+)'", last)
        if missing:
            from experiments.config.load import missing_file

            last = missing_file(missing[1])
        sys.exit(f"error: {last.removeprefix('ValueError: ')}")
    except (AttributeError, KeyError, TypeError) as error:
        sys.exit(f"error: {_unknown_key(argv, error)}")
    if len(rest) > 1:
        sys.exit(f"error: unexpected argument {rest[1]!r}; --help has the flags")
    return rest


def _unknown_key(argv, error):
    """Returns the message about a --config.KEY that the config does not have."""
    from configs.common import new_name

    overrides = [word for word in argv if word.startswith("--config.")]
    for word in overrides:
        key = word.removeprefix("--config.").partition("=")[0]
        if new_name(key):
            return f"config key {key!r} is now called {new_name(key)!r}"
    close = re.search(r'mean "(\w+)"', str(error))
    hint = f"did you mean {close[1]!r}? " if close else ""
    return f"the config has no such key: {' '.join(overrides)}; {hint}configs/common.py has all of them"


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
