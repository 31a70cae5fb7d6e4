r"""Compares methods over settings and seeds.

It writes a queue and does its runs, see `experiments.reproduce`.

    python -m experiments.sweep --config=configs/digitslt.py \
        --methods=ce,kd,ltkd,bikd --imbalance=10,100 --seeds=3
    python -m experiments.sweep --student=resnet8,resnet20 \
        --methods=kd,ltkd,alpha=0.5,ltkd,alpha=2,bikd,terms=ltkd

In the list of methods, key=value belongs to the method before it. The config's argument
has the values that all runs share, as in --config=configs/digitslt.py:epochs=20 or
:smoke.

The folder (runs/sweep-<config> unless --name is given) gets queue.json, results/, a
work directory for each run, and the page that compares them. The same command continues
an interrupted sweep; with more methods, settings or seeds it does the missing runs.
"""

import argparse
import itertools
import json
import pathlib
import re
import sys

from configs import common
from experiments import runtime
from experiments.config import load, spec
from experiments.config.validation import ConfigError
from experiments.jobs import command
from experiments.reporting.load import ReportError
from ltkd_jax import console, files

# Keys of a setting, with example values for --help.
_AXES = {
    "imbalance": "10,100",
    "teacher": "resnet20,resnet32",
    "student": "resnet8,resnet20",
}
_Runs = list[tuple[str, spec.RunSpec]]


def split_methods(text: str) -> list[list[str]]:
    """Returns the methods of a list, each followed by the values that it alone has.

    Raises:
      ConfigError: there is no method, or a value before the first one.

    >>> split_methods("kd,ltkd,alpha=2,beta=1")
    [['kd'], ['ltkd', 'alpha=2', 'beta=1']]
    """
    methods: list[list[str]] = []
    for word in common.split(text):
        if "=" not in word:
            methods.append([word])
        elif methods:
            methods[-1].append(word)
        else:
            raise ConfigError(
                f"--methods={text}: {word!r} follows no method; for all runs, put it "
                "into --config"
            )
    if not methods:
        raise ConfigError(f"--methods={text}: give at least one, such as ce,kd,ltkd")
    if any(method[0] == "smoke" for method in methods):
        raise ConfigError(
            f"--methods={text}: smoke is for all runs, put it into "
            "--config=configs/….py:smoke"
        )
    return methods


def plan(
    config: str, methods: str, axes: dict[str, str | None]
) -> dict[str, spec.RunSpec]:
    """Returns the runs of a sweep: their specifications by "configs/x.py:argument".

    Args:
      config: "configs/x.py", or with values that all runs share:
        "configs/x.py:epochs=20,smoke".
      methods: a list, see `split_methods`.
      axes: short keys of the argument, each with a list of values, or None for the
        config's own value.

    Raises:
      ConfigError: a config is not allowed, or two of them describe the same run.
    """
    path, _, shared_argument = config.partition(":")
    shared_values = common.split(shared_argument)
    axis_values = []
    for key, text in axes.items():
        if text is not None:
            axis_values.append([f"{key}={value.strip()}" for value in text.split(",")])
    specs: dict[str, spec.RunSpec] = {}
    reference_of: dict[str, str] = {}  # by the run's hash
    for setting in itertools.product(*axis_values):
        values = [*setting, *shared_values]
        for reference, run in _comparable_runs(path, split_methods(methods), values):
            if run.hash in reference_of:
                raise ConfigError(
                    f"{reference} is the same run as {reference_of[run.hash]}: give it "
                    "once"
                )
            reference_of[run.hash] = reference
            specs[reference] = run
    return specs


def _comparable_runs(path: str, methods: list[list[str]], values: list[str]) -> _Runs:
    """Returns the config and the specification of each method of a setting.

    Methods should be compared on the same images, steps and teacher. If bikd is among
    them and its recipe differs from that of the others, all of them get bikd's. This is
    not done if the user has chosen recipes, or if they would still differ.
    """
    runs = _resolve_runs(path, methods, values)
    words = itertools.chain(values, *methods)
    has_recipe = any(word.startswith("recipe=") for word in words)
    has_bikd = any(method[0] == "bikd" for method in methods)
    if has_recipe or not has_bikd or _are_comparable(runs):
        return runs
    with_recipe = []
    for method in methods:
        is_bikd = method[0] == "bikd"
        with_recipe.append(method if is_bikd else [*method, "recipe=bikd"])
    runs_with_recipe = _resolve_runs(path, with_recipe, values)
    return runs_with_recipe if _are_comparable(runs_with_recipe) else runs


def _resolve_runs(path: str, methods: list[list[str]], values: list[str]) -> _Runs:
    references = [f"{path}:{','.join([*method, *values])}" for method in methods]
    for reference in references:
        if re.search(r"[:,]\s*seed\s*=", reference):
            raise ConfigError(f"{reference}: set a sweep's seeds by --seeds")
    return [
        (reference, spec.resolve(load.load_config(reference)))
        for reference in references
    ]


def _are_comparable(runs: _Runs) -> bool:
    """Returns whether all runs have the same teacher and the same recipe."""
    conditions = set()
    for _, run in runs:
        conditions.add((run.teacher_hash, json.dumps(run.config["train"])))
    return len(conditions) == 1


def summary(specs: dict[str, spec.RunSpec], seeds: int) -> str:
    """Returns the numbers of runs and teachers of a sweep.

    >>> summary({}, 3)
    '0 runs, 0 teachers'
    """
    teachers = {run.teacher_hash for run in specs.values() if run.needs_teacher}
    num_runs = seeds * len(specs)
    runs_word = "run" if num_runs == 1 else "runs"
    teachers_word = "teacher" if len(teachers) == 1 else "teachers"
    return f"{num_runs} {runs_word}, {len(teachers)} {teachers_word}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.sweep",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[command.parent_parser()],
    )
    parser.add_argument(
        "--config",
        default="configs/digitslt.py",
        help="a config file, with the values that all runs share; these may also be "
        "given by --config.KEY=VALUE",
    )
    parser.add_argument(
        "--methods", required=True, help="such as ce,kd,ltkd,alpha=2,bikd"
    )
    for key, example in _AXES.items():
        parser.add_argument(
            f"--{key}", help=f"a list such as {example} (default: the config's)"
        )
    parser.add_argument(
        "--seeds",
        type=console.at_least(1),
        default=3,
        help="number of student seeds, from 0 (default: 3)",
    )
    parser.add_argument(
        "--name", help="of the folder, runs/NAME (default: sweep-<config>)"
    )
    return parser


def _parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Returns the options; each --config.KEY=VALUE becomes a part of `config`."""
    parser = _parser()
    options, other_words = parser.parse_known_args(argv)
    for word in other_words:
        pair = word.removeprefix("--config.")
        if pair == word or "=" not in pair:
            parser.error(f"unrecognized argument {word!r}")
        separator = "," if ":" in options.config else ":"
        options.config += f"{separator}{pair}"
    return options


def main(argv: list[str] | None = None) -> None:
    """Does the sweep that the arguments describe, and exits."""
    console.replace_unencodable()
    options = _parse_arguments(argv)
    config_name = pathlib.Path(options.config.partition(":")[0]).stem
    name = options.name or f"sweep-{config_name}"
    folder = pathlib.Path("runs") / name
    queue_path = folder / "queue.json"
    try:
        if not re.fullmatch(r"\w[\w .+-]*", name):
            raise ConfigError(f"--name={name!r} must be the name of one folder")
        machine = command.set_up(options)
        axes = {key: getattr(options, key) for key in _AXES}
        specs = plan(options.config, options.methods, axes)
        arguments = sys.argv[1:] if argv is None else argv
        about = runtime.command_line("experiments.sweep", arguments)
        seeds = list(range(options.seeds))
        runs = [{"config": reference, "seeds": seeds} for reference in specs]
        files.make_folder(folder, "give another --name, or start elsewhere")
        files.write_json(queue_path, {"about": about, "runs": runs})
        print(f"{queue_path}: {summary(specs, options.seeds)}")
        if any("recipe=bikd" in reference for reference in specs):
            print(
                "All with BiKD's images and schedule (recipe=bikd), so that they can "
                "be compared."
            )
        status = command.run_queue(
            queue_path, folder / "results", folder, options, machine, check_first=True
        )
    except (ConfigError, ReportError, OSError) as error:
        sys.exit(f"error: {error}")
    sys.exit(status)


if __name__ == "__main__":
    main()
