"""Compares methods over settings and seeds: writes a queue, and does it as `experiments.reproduce` does.

    python -m experiments.sweep --config=configs/digitslt.py --methods=ce,kd,ltkd,bikd --imbalance=10,100 --seeds=3
    python -m experiments.sweep --methods=kd,ltkd,alpha=0.5,ltkd,alpha=2,bikd,terms=ltkd --student=resnet8,resnet20

A method may be followed by its own key=value. What all runs share stands in the config's argument, as in
--config=configs/digitslt.py:epochs=20 or :smoke. The folder (runs/sweep-<config> unless --name is given) gets
queue.json, results/, a work directory for each run, and the page that compares them. The same command goes on where
it was; with more methods, settings or seeds it runs what is missing.
"""

import argparse
import itertools
import json
import pathlib
import re
import sys

from configs import common
from experiments import reproduce, runtime
from experiments.config import checks
from experiments.jobs import queue_entry
from experiments.trainer import build
from ltkd_jax import files

_FOLDER = pathlib.Path("runs")


def split_methods(text: str) -> list[list[str]]:
    """The methods of a list, each with what is set for it alone.

    Raises:
      checks.ConfigError: no method, or a value before any.

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
    if not found:
        raise checks.ConfigError(f"--methods={text}: give at least one, such as ce,kd,ltkd")
    if ["smoke"] in found:
        raise checks.ConfigError(f"--methods={text}: smoke is for all runs, put it into --config=configs/….py:smoke")
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
      checks.ConfigError: a config that cannot be, or the same one twice.
    """
    if seeds < 1:
        raise checks.ConfigError(f"--seeds={seeds} must be at least 1, a number of seeds")
    path, _, shared = config.partition(":")
    values = [[f"{key}={value.strip()}" for value in text.split(",")] for key, text in axes.items() if text is not None]
    runs, seen = [], {}
    for setting in itertools.product(*values):
        for reference in _by_one_recipe(path, split_methods(methods), [*setting, *common.split(shared)]):
            if re.search(r"[:,]\s*seed\s*=", reference):
                raise checks.ConfigError(f"{reference}: a sweep's seeds are given by --seeds")
            resolved = checks.config_hash(queue_entry.load_config(reference))
            if resolved in seen:
                raise checks.ConfigError(f"{reference} is the same run as {seen[resolved]}: give it once")
            seen[resolved] = reference
            runs.append({"config": reference, "seeds": list(range(seeds))})
    return {"about": about, "runs": runs}


def _by_one_recipe(path, methods, rest):
    """A config for each method: all by the recipe of learned weights, if that makes one teacher and schedule of more.

    Methods are to be compared over the same images, steps and teacher.
    """

    def references(*recipe):
        added = [[] if method[0] == "bikd" else recipe for method in methods]
        return [f"{path}:{','.join([*method, *more, *rest])}" for method, more in zip(methods, added)]

    def differ(found):
        configs = [queue_entry.load_config(reference) for reference in found]
        return len({(checks.teacher_hash(c), json.dumps(checks.plain(c)["train"])) for c in configs}) > 1

    plain = references()
    chosen = any(word.startswith("recipe=") for word in itertools.chain(rest, *methods))
    if chosen or all(method[0] != "bikd" for method in methods) or not differ(plain):
        return plain
    alike = references("recipe=bikd")
    return plain if differ(alike) else alike


def summary(path) -> str:
    """Says how much a queue file holds."""
    configs = [queue_entry.resolve(entry) for entry in queue_entry.read_queue(path)]
    taught = {checks.teacher_hash(config) for config in configs if build.needs_teacher(config)}
    counts = ((len(configs), "run"), (len(taught), "teacher"))
    return ", ".join(f"{number} {word}{'' if number == 1 else 's'}" for number, word in counts)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m experiments.sweep", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter,
                                     parents=[reproduce.options_of_a_queue()])  # fmt: skip
    parser.add_argument("--config", default="configs/digitslt.py", help="a config file, with what all runs share")
    parser.add_argument("--methods", required=True, help="such as ce,kd,ltkd,alpha=2,bikd")
    for key, what in (("imbalance", "10,100"), ("teacher", "resnet20,resnet32"), ("student", "resnet8,resnet20")):
        parser.add_argument(f"--{key}", help=f"a list such as {what} (default: the config's)")
    parser.add_argument("--seeds", type=int, default=3, help="how many student seeds, from 0 (default: 3)")
    parser.add_argument("--name", help="of the folder, runs/NAME (default: sweep-<config>)")
    options = parser.parse_args(argv)
    name = options.name or f"sweep-{pathlib.Path(options.config.partition(':')[0]).stem}"
    folder = _FOLDER / name
    try:
        if not re.fullmatch(r"\w[\w .+-]*", name):
            raise checks.ConfigError(f"--name={name!r} must be the name of one folder")
        axes = {key: getattr(options, key) for key in ("imbalance", "teacher", "student")}
        about = runtime.command_line("experiments.sweep", sys.argv[1:] if argv is None else argv)
        queue = queue_of(options.config, options.methods, axes, options.seeds, about)
        folder.mkdir(parents=True, exist_ok=True)
        files.write_text(folder / "queue.json", json.dumps(queue, indent=1) + "\n")
        print(f"{folder / 'queue.json'}: {summary(folder / 'queue.json')}")
        if any("recipe=bikd" in run["config"] for run in queue["runs"]):
            print("All with BiKD's images and schedule (recipe=bikd), so that they can be compared.")
    except (checks.ConfigError, OSError) as error:
        sys.exit(f"error: {error}")
    how = {"results": folder / "results", "runs": folder, "data_dir": options.data_dir, "minutes": options.minutes}
    how["at_once"] = options.at_once or "auto"
    words = [f"--{key}={value}" for key, value in how.items()] + ["--list"] * options.list
    reproduce.main([str(folder / "queue.json"), *words])


if __name__ == "__main__":
    main()
