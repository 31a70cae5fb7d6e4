"""The defaults that all configs share, and the argument after a config file's colon.

The argument is `METHOD[,key=value…][,smoke]`. METHOD is a row of the table of methods
(`ltkd_jax.methods`), or bikd: the terms of a method (`terms=kd` by default) with
learned weights.
"""

import ast
import re
from typing import Any

import ml_collections

from ltkd_jax import methods, names

# Short keys of the argument, and the config keys that they stand for. Any other key is
# a hyperparameter of the method (`alpha=2`, `temperature=2`) or a full path
# (`train.epochs=60`).
SHORT = {
    "name": "data.name",
    "imbalance": "data.imbalance",
    "subset": "data.subset",
    "image_size": "data.image_size",
    "policy": "augment.policy",
    "cutout": "augment.cutout",
    "mixup": "augment.mixup",
    "teacher": "teacher.model",
    "student": "student.model",
    "epochs": "train.epochs",
    "seed": "seed",
    "split_seed": "split_seed",
    "teacher_seed": "teacher_seed",
    "lookahead": "loss_weighting.lookahead",
    "update_every": "loss_weighting.update_every",
    "outer_loss": "loss_weighting.outer_loss",
}

# Keys of version 0.1, short and long, and their new names.
RENAMED = {
    "seed_split": "split_seed",
    "seed_teacher": "teacher_seed",
    "eval_batch": "eval_batch_size",
    "data.workers": "data.num_workers",
    "data.meta_per_class": "data.outer_per_class",
    "train.decay": "train.lr_decay",
    "teacher.train.decay": "teacher.train.lr_decay",
    "teacher.cache": "teacher.dir",
    "method.strength": "method.tau",
    "strength": "tau",
    "every": "update_every",
    "outer": "outer_loss",
    "weighting.every": "loss_weighting.update_every",
    "weighting.outer": "loss_weighting.outer_loss",
    "weighting.decay": "loss_weighting.lr_decay",
    "weighting": "loss_weighting",
}

# Warm-up of the methods whose authors warm them up, over 20 of 240 epochs.
WARMUPS = {"dkd": dict(warmup_epochs=20.0), "reviewkd": dict(warmup_epochs=20.0)}


def new_name(key: str) -> str | None:
    """Returns the new name of a key of version 0.1, None for any other key.

    >>> new_name("seed_split"), new_name("weighting.hidden"), new_name("seed")
    ('split_seed', 'loss_weighting.hidden', None)
    """
    if key in RENAMED:
        return RENAMED[key]
    section, _, subkey = key.partition(".")
    if subkey and section in RENAMED:
        return f"{RENAMED[section]}.{subkey}"
    return None


def recipe(**values: Any) -> ml_collections.ConfigDict:
    """Returns a recipe of SGD with momentum and L2 regularisation.

    Args:
      **values: keys of the recipe that differ from the defaults.
    """
    defaults = dict(
        batch_size=64,
        epochs=240.0,
        # Stop after this number of steps; 0: after all epochs.
        max_steps=0,
        lr=0.05,
        # Epochs over which the learning rate grows linearly to lr.
        lr_warmup_epochs=0.0,
        momentum=0.9,
        weight_decay=5e-4,
        # Fractions of all steps; at each, the learning rate is multiplied by lr_decay.
        milestones=(0.625, 0.75, 0.875),
        lr_decay=0.1,
    )
    return ml_collections.ConfigDict({**defaults, **values})


def base(
    dataset: str, *, teacher: str, student: str, imbalance: float
) -> ml_collections.ConfigDict:
    """Returns a config with all keys at their defaults.

    Args:
      dataset: the name of a data set.
      teacher: the name of the teacher's model.
      student: the name of the student's model.
      imbalance: images of the most frequent class / images of the rarest.
    """
    config = ml_collections.ConfigDict()
    # The student's seed: initialisation, order of the images and augmentation.
    config.seed = 0
    # The seed of the draw of the training set and the held-out sets.
    config.split_seed = 0
    # The seed of the teacher's training.
    config.teacher_seed = 0
    config.data = ml_collections.ConfigDict(
        dict(
            name=dataset,
            # The TFDS directory, also of files of features; empty: TFDS's own default.
            dir="",
            # exponential: make it long-tailed by `imbalance`; all: take all images;
            # or the path of a list of images.
            subset="exponential",
            imbalance=imbalance,
            # Training images of the most frequent class; 0: the size of the smallest
            # class, less its held-out images.
            n_max=0,
            # Images of each class held out for the outer loss of learned weights. An
            # outer batch has train.batch_size of them, or all if there are fewer.
            outer_per_class=0,
            # Images of each class held out for the choice of hyperparameters.
            validation_per_class=0,
            # Evaluate on about this number of test images, the same for each class (all
            # of a class that has fewer); 0: all.
            test_images=0,
            # Resize images to this side length; 0: leave them as they are stored.
            image_size=0,
            # Leave images on disk; training views are then random resized crops.
            stream=False,
            # Processes that read a stream; 0: threads, faster where cores are few.
            num_workers=0,
        )
    )
    # Augmentation of teacher and student beyond crops and flips. With any of it there
    # can be no table of the teacher's logits.
    config.augment = ml_collections.ConfigDict(
        dict(
            # none | autoaugment (the policy for CIFAR)
            policy="none",
            # Side of a blackened square; 16 is usual for CIFAR-10, 8 for CIFAR-100.
            cutout=0,
            # α of Beta(α, α); 0.2 is usual.
            mixup=0.0,
        )
    )
    # Fractions of the classes in each group, from the most frequent class on. With two
    # classes the default means head and tail.
    config.groups = ml_collections.ConfigDict(dict(fractions=(0.33, 0.34, 0.33)))
    # The method with its hyperparameters, see `set_method`.
    config.method = ml_collections.ConfigDict(dict(name="ltkd", warmup_epochs=0.0))
    # static | bilevel (see `bilevel`)
    config.loss_weighting = ml_collections.ConfigDict(dict(name="static"))
    config.student = ml_collections.ConfigDict(dict(model=student))
    config.train = recipe()
    config.teacher = ml_collections.ConfigDict(
        dict(
            model=teacher,
            train=recipe(),
            # Trained teachers are kept here, and shared by all runs.
            dir="runs/teachers",
            # An external teacher: the folder of a trained one, the work directory of a
            # run (its student), FILE.msgpack (variables) or FILE.npz (logits); empty:
            # train one.
            checkpoint="",
            # Look the teacher's logits up in a table: auto (if worthwhile) | always |
            # never.
            table="auto",
            # The largest fraction of the device's memory that the table may take.
            table_memory=0.4,
            # Number of runs that will share the table.
            table_runs=1,
        )
    )
    # float32 | tf32 | bfloat16
    config.precision = "float32"
    # cpu | gpu | tpu: stop if jax has no such device; empty: use what there is.
    config.platform = ""
    # Number of devices; 0: all.
    config.devices = 0
    # jit | pmap
    config.parallel = "jit"
    # Steps in one compiled call; 0: one on CPU or with data.stream, else an epoch.
    config.steps_per_call = 0
    config.eval_batch_size = 500
    # In epochs.
    config.eval_every = 10
    # In epochs.
    config.checkpoint_every = 10
    # Whether this is a short test run, see `_make_smoke_test`.
    config.smoke = False
    return config


def bilevel(**values: Any) -> dict[str, Any]:
    """Returns `loss_weighting` for weights that a net learns.

    The defaults are BiKD's for CIFAR-100 (arXiv 2605.17839).

    Args:
      **values: keys that differ from the defaults.
    """
    defaults = dict(
        name="bilevel",
        # K, virtual steps that the weight net's gradient goes through.
        lookahead=1,
        # k, gradients accumulated for one update of the weight net.
        update_every=5,
        # The loss on the outer set: hard | soft | mix.
        outer_loss="hard",
        # Losses of each example that the weight net sees; also terms by their names.
        features=("student_ce", "teacher_ce"),
        # Sizes of the weight net's hidden layers.
        hidden=(64, 64),
        # Constants that multiply the learned weights, one for each term; (): all 1.
        scales=(),
        lr=1e-3,
        weight_decay=1e-4,
        # Applied at the milestones of config.train.
        lr_decay=0.8,
    )
    return {**defaults, **values}


def bikd_recipe(*, n_max: int, outer_per_class: int) -> dict[str, Any]:
    """Returns BiKD's recipe as config values: 120 epochs of batch 100.

    The outer set is held out before the tail is cut. How BiKD's teacher was trained is
    not known: here it gets the student's recipe.

    Source: the official code of arXiv 2605.17839.

    Args:
      n_max: training images of the most frequent class.
      outer_per_class: images of each class in the outer set.
    """
    sgd = dict(batch_size=100, epochs=120.0, lr=0.1, milestones=(80 / 120, 100 / 120))
    values: dict[str, Any] = {
        "data.n_max": n_max,
        "data.outer_per_class": outer_per_class,
    }
    for role in ("train", "teacher.train"):
        for key, value in sgd.items():
            values[f"{role}.{key}"] = value
    return values


def set_method(
    config: ml_collections.ConfigDict,
    name: str,
    *,
    loss_weighting: dict[str, Any] | None = None,
    **defaults: float | str,
) -> None:
    """Puts a method and its hyperparameters into `config.method`.

    Args:
      config: from `base`.
      name: of the method.
      loss_weighting: from `bilevel`. The weights are then learned, and the method has
        only the hyperparameters of its terms.
      **defaults: hyperparameters that differ from the library's defaults; those that
        the method does not have are ignored.
    """
    learned = loss_weighting is not None
    hyperparameters = methods.hyperparameters(name, learned_weights=learned)
    if loss_weighting:
        config.loss_weighting = ml_collections.ConfigDict(loss_weighting)
    else:
        # Only static weights are warmed up.
        hyperparameters = {"warmup_epochs": 0.0, **hyperparameters}
    for key, value in defaults.items():
        if key in hyperparameters:
            hyperparameters[key] = value
    config.method = ml_collections.ConfigDict({"name": name, **hyperparameters})


def split(argument: str) -> list[str]:
    """Returns the items of an argument; a comma within brackets belongs to a tuple.

    >>> split("bikd, scales=(1.0,2.0),smoke")
    ['bikd', 'scales=(1.0,2.0)', 'smoke']
    """
    # A comma is within brackets if the next bracket after it is a closing one.
    items = [item.strip() for item in re.split(r",(?![^(]*\))", argument)]
    return [item for item in items if item]


def apply_argument(
    config: ml_collections.ConfigDict,
    argument: str | None,
    *,
    bikd: dict[str, Any],
    loss_weighting: dict[str, Any],
    method_defaults: dict[str, dict[str, float]] | None = None,
    default_recipe: str = "base",
    smoke_models: tuple[str, str] = ("resnet14", "resnet8"),
) -> ml_collections.ConfigDict:
    """Returns the config, changed by the argument after its colon.

    The argument has two keys of its own. `terms=METHOD` names the method whose terms
    bikd weighs. `recipe=bikd` sets the values of `bikd` for any method; `recipe=base`
    keeps those of `config`.

    Args:
      config: from `base`; it is changed.
      argument: `METHOD[,key=value…][,smoke]`; each item is optional, in any order.
      bikd: BiKD's recipe for this data set, by config keys.
      loss_weighting: from `bilevel`, for bikd.
      method_defaults: hyperparameters by method that differ from the library's defaults
        on this data set.
      default_recipe: the recipe of all methods but bikd, whose default is "bikd".
      smoke_models: the teacher's and the student's model of a smoke test.

    Raises:
      ValueError: an unknown method or key, or a value of the wrong type.
    """
    method, smoke, values = _parse_argument(argument or "")
    learned = method == "bikd"
    if learned:
        method = values.pop("terms", "kd")
        recipe_name = values.pop("recipe", "bikd")
    else:
        recipe_name = values.pop("recipe", default_recipe)
    if method not in methods.METHODS:
        choices = [*methods.METHODS] if learned else [*methods.METHODS, "bikd"]
        raise ValueError(names.unregistered("method", method, choices))
    if recipe_name not in ("base", "bikd"):
        raise ValueError(f"recipe={recipe_name!r} must be one of base, bikd")

    # Each of these may overwrite the values of those before it, so the argument's own
    # values come last.
    set_method(
        config,
        method,
        loss_weighting=loss_weighting if learned else None,
        **(method_defaults or {}).get(method, {}),
    )
    if recipe_name == "bikd":
        config.update_from_flattened_dict(bikd)
    if smoke:
        _make_smoke_test(config, *smoke_models)
    for key, text in values.items():
        _set_value(config, key, text)

    if "imbalance" in values and config.data.subset != "exponential":
        raise ValueError(
            f"imbalance={values['imbalance']} has no effect with "
            f"subset={config.data.subset!r}: add subset=exponential"
        )
    return config


def _parse_argument(argument: str) -> tuple[str, bool, dict[str, str]]:
    """Returns the method, whether it is a smoke test, and the values as text by key."""
    words = []
    values: dict[str, str] = {}
    paths = set()
    for item in split(argument):
        key, equals, text = (word.strip() for word in item.partition("="))
        if not equals:
            words.append(item)
            continue
        # `epochs` and `train.epochs` are the same key.
        path = SHORT.get(key, key)
        if path in paths:
            raise ValueError(f"the config's argument has {key!r} twice; give it once")
        paths.add(path)
        values[key] = text
    method_names = [word for word in words if word != "smoke"]
    if len(method_names) > 1:
        raise ValueError(
            "the config's argument names several methods: "
            f"{', '.join(method_names)}; give one"
        )
    method = method_names[0] if method_names else "ltkd"
    return method, "smoke" in words, values


def _set_value(config: ml_collections.ConfigDict, key: str, text: str) -> None:
    """Sets a config value from a key of the argument and its text."""
    if key in SHORT:
        path = SHORT[key]
    elif key in config.method:
        path = f"method.{key}"
    else:
        path = key
    *sections, leaf = path.split(".")
    node: Any = config
    for section in sections:
        exists = isinstance(node, ml_collections.ConfigDict) and section in node
        node = node[section] if exists else None
    exists = isinstance(node, ml_collections.ConfigDict) and leaf in node
    if not exists or isinstance(node[leaf], ml_collections.ConfigDict):
        raise ValueError(_unknown_key(config, key))
    node[leaf] = _parse_value(key, text, node[leaf])


def key_paths(config: ml_collections.ConfigDict, prefix: str = "") -> list[str]:
    """Returns the dotted paths of a config's keys, the shorter ones first.

    >>> config = ml_collections.ConfigDict({"seed": 0, "train": {"lr": 0.1}})
    >>> key_paths(config)
    ['seed', 'train.lr']
    """
    paths = []
    for key, value in config.items():
        if isinstance(value, ml_collections.ConfigDict):
            paths += key_paths(value, f"{prefix}{key}.")
        else:
            paths.append(f"{prefix}{key}")
    return sorted(paths, key=lambda path: path.count("."))


def _unknown_key(config: ml_collections.ConfigDict, key: str) -> str:
    """Returns the error message for a key that the config does not have."""
    learned = config.loss_weighting.name == "bilevel"
    if new_name(key):
        return f"key {key!r} of the config's argument is now called {new_name(key)!r}"
    if learned and key in methods.STATIC_WEIGHTS:
        return (
            f"{key!r} is a static weight, which bikd learns instead; "
            "loss_weighting.scales multiplies it"
        )
    choices = ["recipe"]
    for short, path in SHORT.items():
        if learned or not path.startswith("loss_weighting."):
            choices.append(short)
    choices += [name for name in config.method if name != "name"]
    hint = names.suggestion(key, [*choices, *key_paths(config)]) or "."
    return (
        f"unknown key {key!r} in the config's argument{hint} Short keys: "
        f"{', '.join(choices)}; any other key of the config by its full path, such as "
        "train.lr"
    )


def _parse_value(key: str, text: str, default: Any) -> Any:
    """Returns the text as a value of its default's type."""
    if isinstance(default, str):
        return text
    if text in ("true", "false"):
        text = text.capitalize()
    try:
        value = ast.literal_eval(text)
    # The last two are raised for deeply nested text.
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        value = None
    items = value if isinstance(value, tuple) else (value,)
    if not all(_is_storable(item) for item in items):
        value = None
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if isinstance(default, float) and is_number:
        return float(value)
    if type(value) is not type(default):
        raise ValueError(
            f"{key}={text!r} must be of type {type(default).__name__}, like its "
            f"default {default!r}"
        )
    return value


def _is_storable(value: Any) -> bool:
    """Returns whether JSON can store the value, and 64 bits an integer."""
    if isinstance(value, int):
        return abs(value) < 2**63
    return isinstance(value, (str, float))


def _make_smoke_test(
    config: ml_collections.ConfigDict, teacher: str, student: str
) -> None:
    """Shortens a run to a test of seconds.

    It trains small models for 20 steps, and evaluates on at most 1,000 images. Streamed
    images get smaller crops and batches.
    """
    config.smoke = True
    config.teacher.model = teacher
    config.student.model = student
    config.data.test_images = 1000
    for steps in (config.train, config.teacher.train):
        steps.max_steps = 20
    if config.data.stream:
        config.data.image_size = 64
        for steps in (config.train, config.teacher.train):
            steps.batch_size = 64
