"""What every config shares: the defaults, and the argument after the colon, `METHOD[,key=value…][,smoke]`.

METHOD is a row of the table of methods (`ltkd_jax.methods`), or bikd: the terms of a method (`terms=kd` unless given)
with learned weights.
"""

import ast
import re

import ml_collections

from ltkd_jax import methods, names

# Short keys of the argument, and the config keys they stand for. Any other key is a hyperparameter of the method
# (`alpha=2`, `temperature=2`) or a full path (`train.epochs=60`).
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

# Keys of version 0.1, short and long, and what they are called now.
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

# Epochs over which methods are warmed up in their own recipes of 240.
WARMUPS = {"dkd": dict(warmup_epochs=20.0), "reviewkd": dict(warmup_epochs=20.0)}


def new_name(key: str) -> str | None:
    """Returns the present name of a key of version 0.1, None for any other key.

    >>> new_name("seed_split"), new_name("weighting.hidden"), new_name("seed")
    ('split_seed', 'loss_weighting.hidden', None)
    """
    if key in RENAMED:
        return RENAMED[key]
    section, _, rest = key.partition(".")
    return f"{RENAMED[section]}.{rest}" if rest and section in RENAMED else None


def recipe(**values) -> ml_collections.ConfigDict:
    """Returns SGD with momentum and L2; the learning rate is multiplied by `lr_decay` at each milestone."""
    defaults = dict(
        batch_size=64,
        epochs=240.0,
        max_steps=0,  # stop after this many steps; 0 runs all epochs
        lr=0.05,
        momentum=0.9,
        weight_decay=5e-4,
        milestones=(0.625, 0.75, 0.875),  # fractions of all steps
        lr_decay=0.1,
    )
    return ml_collections.ConfigDict({**defaults, **values})


def base(
    dataset: str, *, teacher: str, student: str, imbalance: float
) -> ml_collections.ConfigDict:
    """Returns a config with every key there is, at its default."""
    config = ml_collections.ConfigDict()
    config.seed = 0  # the student's: initialisation, order and views
    config.split_seed = 0
    config.teacher_seed = 0
    config.data = ml_collections.ConfigDict(
        dict(
            name=dataset,
            dir="",  # a TFDS directory; TFDS's own default if empty
            subset="exponential",  # exponential: made long-tailed by imbalance; all: as it is; or a list's path
            imbalance=imbalance,
            n_max=0,  # training images of the most frequent class; 0 takes what the smallest class has left
            outer_per_class=0,  # balanced images set aside for the outer loss of learned weights
            validation_per_class=0,  # balanced images set aside for choosing hyperparameters
            test_images=0,  # evaluate on this many, balanced, rounded to the classes; 0 takes all
            image_size=0,  # side to which images are resized; 0 leaves them as they are stored
            stream=False,  # images stay on disk, and training views are random resized crops
            num_workers=0,  # processes that read a stream; 0 reads by threads, which on few cores is faster
        )
    )
    # For teacher and student alike, beyond crops and flips. With any of it there is no teacher's table.
    config.augment = ml_collections.ConfigDict(
        dict(
            policy="none",  # none | autoaugment (CIFAR's policy)
            cutout=0,  # side of a blackened square; 16 is usual for CIFAR-10, 8 for CIFAR-100
            mixup=0.0,  # α of Beta(α, α); 0.2 is usual
        )
    )
    config.groups = ml_collections.ConfigDict(dict(fractions=(0.33, 0.34, 0.33)))
    config.method = ml_collections.ConfigDict(dict(name="ltkd", warmup_epochs=0.0))
    config.loss_weighting = ml_collections.ConfigDict(dict(name="static"))
    config.student = ml_collections.ConfigDict(dict(model=student))
    config.train = recipe()
    config.teacher = ml_collections.ConfigDict(
        dict(
            model=teacher,
            train=recipe(),
            dir="runs/teachers",  # where trained teachers are kept, for all runs
            checkpoint="",  # a trained teacher's folder, FILE.msgpack (variables) or FILE.npz (logits) in its place
            table="auto",  # auto | always | never
            table_memory=0.4,  # share of the device's memory that the table may take
            table_runs=1,  # runs that will share it
        )
    )
    config.precision = "float32"  # float32 | tf32 | bfloat16
    config.platform = (
        ""  # cpu | gpu | tpu: stop where there is none; empty takes whatever there is
    )
    config.devices = 0  # how many to use; 0 takes all
    config.parallel = "jit"  # jit | pmap
    config.steps_per_call = 0  # 0: one on CPU, an epoch on accelerators
    config.eval_batch_size = 500
    config.eval_every = 10  # epochs
    config.checkpoint_every = 10  # epochs
    config.smoke = False
    return config


def bilevel(**values) -> dict:
    """Returns `loss_weighting` for weights that a net learns; BiKD's for CIFAR-100 (arXiv 2605.17839) by default."""
    defaults = dict(
        name="bilevel",
        lookahead=1,  # K, virtual steps through which the weight net's gradient goes
        update_every=5,  # k, gradients accumulated for one update of the weight net
        outer_loss="hard",  # hard | soft | mix: the loss on the outer set
        features=(
            "student_ce",
            "teacher_ce",
        ),  # per-example losses that the weight net sees; terms by name too
        hidden=(64, 64),
        scales=(),  # constants that multiply the weights, one a term; () is 1 for each
        lr=1e-3,
        weight_decay=1e-4,
        lr_decay=0.8,  # at the milestones of config.train
    )
    return {**defaults, **values}


def bikd_recipe(*, n_max: int, outer_per_class: int) -> dict:
    """Returns BiKD's recipe as config values: 120 epochs of batch 100, the outer set taken before the tail is cut.

    Source: the official code of arXiv 2605.17839. How its teacher was trained is not known: it gets the student's recipe.
    """
    sgd = dict(batch_size=100, epochs=120.0, lr=0.1, milestones=(80 / 120, 100 / 120))
    values = {"data.n_max": n_max, "data.outer_per_class": outer_per_class}
    for role in ("train", "teacher.train"):
        values |= {f"{role}.{key}": value for key, value in sgd.items()}
    return values


def set_method(
    config, name: str, *, loss_weighting: dict | None = None, **defaults
) -> None:
    """Puts a method's hyperparameters into `config.method`.

    Args:
      config: from `base`.
      name: of the method.
      loss_weighting: from `bilevel`; weights are then learned, and the method keeps the hyperparameters of its terms.
      **defaults: hyperparameters of methods, of which this one takes its own.
    """
    hyperparameters = methods.hyperparameters(
        name, learned_weights=loss_weighting is not None
    )
    if loss_weighting:
        config.loss_weighting = ml_collections.ConfigDict(loss_weighting)
    else:
        # A warm-up is of static weights; learned ones replace it.
        hyperparameters = {"warmup_epochs": 0.0, **hyperparameters}
    values = {key: value for key, value in defaults.items() if key in hyperparameters}
    config.method = ml_collections.ConfigDict(
        {"name": name, **hyperparameters, **values}
    )


def split(argument: str) -> list[str]:
    """Returns the parts of an argument; a comma inside brackets belongs to a tuple.

    >>> split("bikd, scales=(1.0,2.0),smoke")
    ['bikd', 'scales=(1.0,2.0)', 'smoke']
    """
    return [
        part.strip() for part in re.split(r",(?![^(]*\))", argument) if part.strip()
    ]


def apply_argument(
    config,
    argument: str | None,
    *,
    bikd: dict,
    loss_weighting: dict,
    method_defaults: dict | None = None,
    default_recipe: str = "base",
) -> ml_collections.ConfigDict:
    """Returns the config with the argument's method and values in it.

    Args:
      config: from `base`.
      argument: `METHOD[,key=value…][,smoke]`, each part optional.
      bikd: config values that make the recipe BiKD's: `recipe=bikd` sets them, `recipe=base` leaves the config's.
      loss_weighting: from `bilevel`, for bikd.
      method_defaults: hyperparameters by method, where this data set's differ from the library's.
      default_recipe: of the other methods; bikd's own is "bikd".

    Raises:
      ValueError: an unknown method, key or a value of the wrong type.
    """
    name, smoke, pairs = _parse_argument(argument or "")
    learned = name == "bikd"
    terms = pairs.pop("terms", "kd") if learned else name
    recipe_name = pairs.pop("recipe", "bikd" if learned else default_recipe)
    if terms not in methods.METHODS:
        choices = [*methods.METHODS] if learned else [*methods.METHODS, "bikd"]
        raise ValueError(names.unknown("method", terms, choices))
    if recipe_name not in ("base", "bikd"):
        raise ValueError(f"recipe={recipe_name!r} must be one of base, bikd")

    # Later lines win: the method's defaults, the recipe, the smoke test, and what the argument says itself.
    defaults = (method_defaults or {}).get(terms, {})
    set_method(
        config, terms, loss_weighting=loss_weighting if learned else None, **defaults
    )
    if recipe_name == "bikd":
        config.update_from_flattened_dict(bikd)
    if smoke:
        _shrink(config)
    for key, text in pairs.items():
        _set(config, key, text)
    if "imbalance" in pairs and config.data.subset != "exponential":
        raise ValueError(
            f"imbalance={pairs['imbalance']} does nothing where subset={config.data.subset!r}: add subset=exponential"
        )
    return config


def _parse_argument(argument):
    """Returns the method's name, whether it is a smoke test, and {key: text} of the rest."""
    words = []
    pairs = {}
    for part in split(argument):
        key, equals, text = (word.strip() for word in part.partition("="))
        if not equals:
            words.append(part)
            continue
        if SHORT.get(key, key) in {SHORT.get(other, other) for other in pairs}:
            raise ValueError(f"the config's argument gives {key!r} twice; give it once")
        pairs[key] = text
    method_names = [word for word in words if word != "smoke"]
    if len(method_names) > 1:
        raise ValueError(
            f"the config's argument names several methods: {', '.join(method_names)}; give one"
        )
    return (method_names or ["ltkd"])[0], "smoke" in words, pairs


def _set(config, key, text):
    path = SHORT.get(key) or (f"method.{key}" if key in config.method else key)
    *sections, leaf = path.split(".")
    node = config
    for section in sections:
        node = (
            node[section]
            if isinstance(node, ml_collections.ConfigDict) and section in node
            else None
        )
    is_value = isinstance(node, ml_collections.ConfigDict) and leaf in node
    if not is_value or isinstance(node[leaf], ml_collections.ConfigDict):
        raise ValueError(_unknown_key(config, key))
    node[leaf] = _parse(key, text, node[leaf])


def _unknown_key(config, key):
    """Returns the message about a key of the argument that the config does not have."""
    learned = config.loss_weighting.name == "bilevel"
    if new_name(key):
        return f"key {key!r} of the config's argument is now called {new_name(key)!r}"
    if learned and key in methods.STATIC_WEIGHTS:
        return f"{key!r} is a static weight, which bikd learns instead; loss_weighting.scales multiplies it"
    short = [
        short
        for short, path in SHORT.items()
        if learned or not path.startswith("loss_weighting.")
    ]
    hyperparameters = [name for name in config.method if name != "name"]
    choices = ["recipe", *short, *hyperparameters]
    hint = names.suggestion(key, choices) or "."
    return (
        f"unknown key {key!r} in the config's argument{hint} Short keys: {', '.join(choices)}; "
        "any other key of the config by its full path, such as train.lr"
    )


def _parse(key, text, old):
    """Returns the text as a value of the old one's type."""
    if isinstance(old, str):
        return text
    try:
        value = ast.literal_eval(
            text.capitalize() if text in ("true", "false") else text
        )
    except (
        ValueError,
        TypeError,
        SyntaxError,
        MemoryError,
        RecursionError,
    ):  # the last two where it is nested deep
        value = None
    parts = value if isinstance(value, tuple) else (value,)
    if not all(_is_plain(part) for part in parts):
        value = None
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if isinstance(old, float) and is_number:
        return float(value)
    if type(value) is not type(old):
        raise ValueError(
            f"{key}={text!r} must be of type {type(old).__name__}, like its default {old!r}"
        )
    return value


def _is_plain(value):
    """Returns whether JSON and 64 bits hold the value."""
    return isinstance(value, (str, float)) or (
        isinstance(value, int) and abs(value) < 2**63
    )


def _shrink(config):
    """Takes the same path in seconds: 20 steps, small models, at most 1,000 test images, small crops of a stream."""
    config.smoke = True
    config.teacher.model = "resnet14"
    config.student.model = "resnet8"
    config.data.test_images = 1000
    for steps in (config.train, config.teacher.train):
        steps.max_steps = 20
    if config.data.stream:
        config.data.image_size = 64
        for steps in (config.train, config.teacher.train):
            steps.batch_size = 64
