"""Compares methods over settings and seeds: writes a queue, and does it as `experiments.reproduce` does.

    python -m experiments.sweep --config=configs/digitslt.py --methods=ce,kd,ltkd,bikd --imbalance=10,100 --seeds=3
    python -m experiments.sweep --methods=kd,ltkd,alpha=0.5,ltkd,alpha=2,bikd,terms=ltkd --student=resnet8,resnet20

A method may be followed by its own key=value. What all runs share stands in the config's argument, as in
--config=configs/digitslt.py:epochs=20 or :smoke. The folder (runs/sweep-<config> unless --name is given) gets
queue.json, results/, a work directory for each run, and the page that compares them. The same command continues where
it was; with more methods, settings or seeds it runs what is missing.
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
from ltkd_jax import files

_AXES = {
    "imbalance": "10,100",
    "teacher": "resnet20,resnet32",
    "student": "resnet8,resnet20",
}  # with examples


def split_methods(text: str) -> list[list[str]]:
    """Returns the methods of a list, each followed by what is set for it alone.

    Raises:
      ConfigError: no method, or a value before any.

    >>> split_methods("kd,ltkd,alpha=2,beta=1")
    [['kd'], ['ltkd', 'alpha=2', 'beta=1']]
    """
    methods = []
    for word in common.split(text):
        if "=" not in word:
            methods.append([word])
        elif methods:
            methods[-1].append(word)
        else:
            raise ConfigError(
                f"--methods={text}: {word!r} follows no method; for all runs, put it into --config"
            )
    if not methods:
        raise ConfigError(f"--methods={text}: give at least one, such as ce,kd,ltkd")
    if ["smoke"] in methods:
        raise ConfigError(
            f"--methods={text}: smoke is for all runs, put it into --config=configs/….py:smoke"
        )
    return methods


def plan(
    config: str, methods: str, axes: dict[str, str | None]
) -> dict[str, spec.RunSpec]:
    """Returns the runs of a sweep by their configs, `{"configs/x.py:argument": specification}`.

    Args:
      config: "configs/x.py", or with an argument that all runs share: "configs/x.py:epochs=20,smoke".
      methods: a list, see `split_methods`.
      axes: short keys of the argument, each with a list of values, or None for the config's own.

    Raises:
      ConfigError: a config that cannot be, or the same run twice.
    """
    path, _, shared = config.partition(":")
    values = [
        [f"{key}={value.strip()}" for value in text.split(",")]
        for key, text in axes.items()
        if text is not None
    ]
    specs, references = {}, {}
    for setting in itertools.product(*values):
        for reference, run in _with_one_recipe(
            path, split_methods(methods), [*setting, *common.split(shared)]
        ):
            if run.hash in references:
                raise ConfigError(
                    f"{reference} is the same run as {references[run.hash]}: give it once"
                )
            references[run.hash] = reference
            specs[reference] = run
    return specs


def _with_one_recipe(path, methods, rest):
    """Returns a (config, specification) for each method of a setting.

    Methods are compared over the same images, steps and teacher: where bikd's recipe differs from that of the other
    methods, all get it, unless a recipe was asked for or they would differ all the same.
    """
    own_recipes = _resolved(path, methods, rest)
    is_chosen = any(
        word.startswith("recipe=") for word in itertools.chain(rest, *methods)
    )
    learns_weights = any(method[0] == "bikd" for method in methods)
    if is_chosen or not learns_weights or _are_comparable(own_recipes):
        return own_recipes
    one_recipe = [
        method if method[0] == "bikd" else [*method, "recipe=bikd"]
        for method in methods
    ]
    resolved = _resolved(path, one_recipe, rest)
    return resolved if _are_comparable(resolved) else own_recipes


def _resolved(path, methods, rest):
    references = [f"{path}:{','.join([*method, *rest])}" for method in methods]
    for reference in references:
        if re.search(r"[:,]\s*seed\s*=", reference):
            raise ConfigError(f"{reference}: a sweep's seeds are given by --seeds")
    return [
        (reference, spec.resolve(load.load_config(reference)))
        for reference in references
    ]


def _are_comparable(resolved):
    return (
        len(
            {(run.teacher_hash, json.dumps(run.config["train"])) for _, run in resolved}
        )
        == 1
    )


def summary(specs: dict[str, spec.RunSpec], seeds: int) -> str:
    """Returns how many runs and teachers a sweep has.

    >>> summary({}, 3)
    '0 runs, 0 teachers'
    """
    teachers = {run.teacher_hash for run in specs.values() if run.needs_teacher}
    counts = {"run": seeds * len(specs), "teacher": len(teachers)}
    return ", ".join(
        f"{number} {word}{'' if number == 1 else 's'}"
        for word, number in counts.items()
    )


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m experiments.sweep", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter,
                                     parents=[command.options()])  # fmt: skip
    parser.add_argument(
        "--config",
        default="configs/digitslt.py",
        help="a config file, with what all runs share",
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
        type=int,
        default=3,
        help="how many student seeds, from 0 (default: 3)",
    )
    parser.add_argument(
        "--name", help="of the folder, runs/NAME (default: sweep-<config>)"
    )
    options = parser.parse_args(argv)
    name = (
        options.name or f"sweep-{pathlib.Path(options.config.partition(':')[0]).stem}"
    )
    folder = pathlib.Path("runs") / name
    try:
        if not re.fullmatch(r"\w[\w .+-]*", name):
            raise ConfigError(f"--name={name!r} must be the name of one folder")
        if options.seeds < 1:
            raise ConfigError(
                f"--seeds={options.seeds} must be at least 1, a number of seeds"
            )
        machine = command.set_up(options)
        specs = plan(
            options.config,
            options.methods,
            {key: getattr(options, key) for key in _AXES},
        )
        about = runtime.command_line(
            "experiments.sweep", sys.argv[1:] if argv is None else argv
        )
        runs = [
            {"config": reference, "seeds": list(range(options.seeds))}
            for reference in specs
        ]
        folder.mkdir(parents=True, exist_ok=True)
        files.write_json(folder / "queue.json", {"about": about, "runs": runs})
        print(f"{folder / 'queue.json'}: {summary(specs, options.seeds)}")
        if any("recipe=bikd" in reference for reference in specs):
            print(
                "All with BiKD's images and schedule (recipe=bikd), so that they can be compared."
            )
        sys.exit(
            command.run(
                folder / "queue.json", folder / "results", folder, options, machine
            )
        )
    except (ConfigError, ReportError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
