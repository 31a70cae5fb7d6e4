"""Compares methods over settings and seeds: writes a queue, and does it as `experiments.reproduce` does.

    python -m experiments.sweep --config=configs/digits_lt.py --methods=ce,kd,ltkd,bikd --imbalance=10,100 --seeds=3
    python -m experiments.sweep --methods=kd,ltkd,alpha=0.5,ltkd,alpha=2,bikd,terms=ltkd --student=resnet8,resnet20

A method may be followed by its own key=value. What all runs share stands in the config's argument, as in
--config=configs/digits_lt.py:epochs=20 or :smoke. The folder (runs/sweep-<config> unless --name is given) gets
queue.json, results/, a work directory for each run, and the page that compares them. The same command goes on where
it was; with more methods, settings or seeds it runs what is missing. Other options are those of experiments.reproduce
(--data_dir, --minutes, --at_once, --list).
"""

import argparse
import itertools
import json
import pathlib
import sys

from configs import common
from experiments import build, checks, entries, reproduce, setup
from ltkd_jax import files

_FOLDER = pathlib.Path("runs")


def split_methods(text: str) -> list[list[str]]:
    """The methods of a list, each with what is set for it alone.

    Raises:
      checks.ConfigError: a value before any method, or a method that is listed twice.

    >>> split_methods("kd,ltkd,alpha=2,beta=1")
    [['kd'], ['ltkd', 'alpha=2', 'beta=1']]
    """
    found = []
    for word in common.split(text):
        if "=" not in word:
            found.append([word])
        elif found:
            found[-1].append(word)
        else:
            raise checks.ConfigError(
                f"--methods={text}: {word!r} follows no method; for all runs, put it into --config"
            )
    twice = [method for i, method in enumerate(found) if method in found[:i]]
    if twice or not found:
        what = f"{','.join(twice[0])!r} is there twice" if twice else "give at least one, such as ce,kd,ltkd"
        raise checks.ConfigError(f"--methods={text}: {what}")
    return found


def queue_of(config: str, methods: str, axes: dict[str, str | None], seeds: int, about: str) -> dict:
    """The queue of a sweep.

    Args:
      config: "configs/x.py", or with an argument that all runs share: "configs/x.py:epochs=20,smoke".
      methods: a list, see `split_methods`.
      axes: short keys of the argument, each with a list of values, or None for the config's own.
      seeds: of the student, 0 to seeds - 1.
      about: what the queue says of itself.

    Raises:
      checks.ConfigError: a list that is empty or has a value twice, or a config that cannot be.
    """
    if seeds < 1:
        raise checks.ConfigError(f"--seeds={seeds} must be at least 1, a number of seeds")
    path, _, shared = config.partition(":")
    values = [[f"{key}={value}" for value in _listed(key, text)] for key, text in axes.items() if text is not None]
    runs = []
    for setting in itertools.product(*values):
        rest = [*setting, *common.split(shared)]
        for method in _by_one_recipe(path, split_methods(methods), rest):
            runs.append({"config": f"{path}:{','.join([*method, *rest])}", "seeds": list(range(seeds))})
    return {"about": about, "runs": runs}


def _listed(key, text):
    values = [value.strip() for value in text.split(",")]
    if "" in values or len(set(values)) < len(values):
        raise checks.ConfigError(f"--{key}={text} must be a list such as a,b, each value once")
    return values


def _by_one_recipe(path, methods, rest):
    """The methods, those with learned weights apart by their recipe where theirs needs another teacher or schedule.

    Methods are compared over the same images, steps and teacher.
    """

    def recipe(method):
        config = entries.load_config(f"{path}:{','.join([*method, *rest])}")
        return checks.teacher_hash(config), json.dumps(checks.plain(config)["train"])

    if len({recipe(method) for method in methods}) == 1:
        return methods
    chosen = any(word.startswith("recipe=") for word in itertools.chain(rest, *methods))
    return methods if chosen else [[*method, *([] if method[0] == "bikd" else ["recipe=bikd"])] for method in methods]


def summary(path) -> str:
    """Says how much a queue file holds."""
    configs = [entries.resolve(entry) for entry in entries.read_queue(path)]
    taught = {checks.teacher_hash(config) for config in configs if build.needs_teacher(config)}
    return f"{len(configs)} runs, {len(taught)} teacher{'' if len(taught) == 1 else 's'}"


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m experiments.sweep", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--config", default="configs/digits_lt.py", help="a config file, with what all runs share")
    parser.add_argument("--methods", required=True, help="such as ce,kd,ltkd,alpha=2,bikd")
    for key, what in (("imbalance", "10,100"), ("teacher", "resnet20,resnet32"), ("student", "resnet8,resnet20")):
        parser.add_argument(f"--{key}", help=f"a list such as {what} (default: the config's)")
    parser.add_argument("--seeds", type=int, default=3, help="how many student seeds, from 0 (default: 3)")
    parser.add_argument("--name", help="of the folder, runs/NAME (default: sweep-<config>)")
    options, rest = parser.parse_known_args(argv)
    folder = _FOLDER / (options.name or f"sweep-{pathlib.Path(options.config.partition(':')[0]).stem}")
    try:
        axes = {key: getattr(options, key) for key in ("imbalance", "teacher", "student")}
        about = setup.command_line("experiments.sweep", sys.argv[1:] if argv is None else argv)
        queue = queue_of(options.config, options.methods, axes, options.seeds, about)
        folder.mkdir(parents=True, exist_ok=True)
        files.write_text(folder / "queue.json", json.dumps(queue, indent=1) + "\n")
        print(f"{folder / 'queue.json'}: {summary(folder / 'queue.json')}")
        if any("recipe=bikd" in run["config"] for run in queue["runs"]):
            print("All with BiKD's images and schedule (recipe=bikd), so that they can be compared.")
    except (checks.ConfigError, OSError) as error:
        sys.exit(f"error: {error}")
    reproduce.main([str(folder / "queue.json"), f"--results={folder / 'results'}", f"--runs={folder}", *rest])


if __name__ == "__main__":
    main()
