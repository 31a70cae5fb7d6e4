"""Trains one row of a table: a teacher (once), then a student by the method of the config.

    python -m experiments.main                                       # LTKD on long-tailed digits, no download
    python -m experiments.main --config=configs/cifar100lt.py:ltkd,imbalance=100 --config.data.dir=DIR

The config's argument is METHOD[,key=value…][,smoke]; any key can be set by --config.KEY=VALUE.
The work directory gets config.json, metrics.jsonl, checkpoints, results.json and report.html. The same command
resumes an interrupted run, exactly.
"""

import pathlib
import sys

from absl import app, flags
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file(
    "config", "configs/digits_lt.py", "The config file, with its argument after a colon.", lock_config=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where the run lives; by default runs/<what is trained>.")


def default_workdir(config) -> str:
    """runs/<dataset>-<imbalance>-<method>-<teacher>-<student>-s<seed>, for a smoke run with -smoke behind it."""
    parts = (config.data.name, f"{config.data.imbalance:g}", config.method.name, config.teacher.model)
    return f"runs/{'-'.join(parts)}-{config.student.model}-s{config.seed}" + ("-smoke" if config.smoke else "")


def main(argv):
    if len(argv) > 1:
        sys.exit(f"error: unexpected argument {argv[1]!r}; flags are --config, --config.KEY and --workdir")
    from experiments import build, report, runs, setup, tables, train  # after the flags: --help stays quick

    setup.compilation_cache()
    config, workdir = _CONFIG.value, pathlib.Path(_WORKDIR.value or default_workdir(_CONFIG.value))
    try:
        results = runs.run(config, workdir, command=setup.command_line("experiments.main", sys.argv[1:]))
    except (build.ConfigError, train.Diverged) as error:
        sys.exit(f"error: {error}")
    except train.Stopped as stopped:
        print(f"{stopped}. The same command goes on from there.", file=sys.stderr)
        sys.exit(75)
    report.write_page([report.load(workdir)], workdir / "report.html")
    print(tables.console([results]))
    print(f"\n{workdir / 'results.json'}   {workdir / 'report.html'}")


def parse_flags(argv):
    """Flags, with a config's own error in one line in place of a traceback."""
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        last = str(error).strip().splitlines()[-1].strip()
        sys.exit(f"error: {last.removeprefix('ValueError: ')}")
    except (AttributeError, KeyError) as error:
        given = " ".join(a for a in argv if a.startswith("--config."))
        sys.exit(f"error: no key {str(error).strip(chr(34))} in the config ({given}); configs/common.py has them all")


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
