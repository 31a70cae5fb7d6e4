"""What every config shares: the defaults, and the argument after the colon, `METHOD[,key=value…][,smoke]`.

METHOD is a row of the method table, or bikd: the terms of a method (`terms=kd` unless given) with learned weights.
"""

import ast
import difflib
import re

import ml_collections

from ltkd_jax import methods

# Short names of the argument for places in the config. Any other key is a hyperparameter of the method
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
    "seed_split": "seed_split",
    "seed_teacher": "seed_teacher",
    "lookahead": "weighting.lookahead",
    "every": "weighting.every",
    "outer": "weighting.outer",
}


# Epochs over which methods are warmed up in their own recipes of 240.
WARMUPS = {"dkd": dict(warmup_epochs=20.0), "reviewkd": dict(warmup_epochs=20.0)}


def recipe(**values) -> ml_collections.ConfigDict:
    """SGD with momentum and L2, the learning rate times `decay` at each milestone (a fraction of all steps)."""
    defaults = dict(
        batch_size=64,
        epochs=240.0,
        max_steps=0,  # stop after so many steps; 0 runs all epochs
        lr=0.05,
        momentum=0.9,
        weight_decay=5e-4,
        milestones=(0.625, 0.75, 0.875),
        decay=0.1,
    )
    return ml_collections.ConfigDict({**defaults, **values})


def base(dataset: str, *, teacher: str, student: str, imbalance: float) -> ml_collections.ConfigDict:
    """Every key there is, with its default."""
    config = ml_collections.ConfigDict()
    config.seed = 0  # the student's: initialisation, order and views
    config.seed_split = 0
    config.seed_teacher = 0
    config.data = ml_collections.ConfigDict(
        dict(
            name=dataset,
            dir="",  # a TFDS directory; TFDS's own default if empty
            subset="exponential",  # exponential: made long-tailed by imbalance; all: as it is; or a list's path
            imbalance=imbalance,
            n_max=0,  # training images of the most frequent class; 0 takes what the smallest class has left
            meta_per_class=0,  # balanced images set aside for bilevel weighting
            validation_per_class=0,  # balanced images set aside for choosing hyperparameters
            test_images=0,  # evaluate on so many, the test's balanced, so rounded to the classes; 0 takes all
            image_size=0,  # sides to which images are brought; 0 leaves them as they are stored
            stream=False,  # images stay on disk, and training views are random resized crops
            workers=0,  # processes that read a stream; 0 reads by threads, which on few cores is faster
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
    config.weighting = ml_collections.ConfigDict(dict(name="static"))
    config.student = ml_collections.ConfigDict(dict(model=student))
    config.train = recipe()
    config.teacher = ml_collections.ConfigDict(
        dict(
            model=teacher,
            train=recipe(),
            cache="runs/teachers",
            checkpoint="",  # a trained teacher's folder, FILE.msgpack (variables) or FILE.npz (logits) in its place
            table="auto",  # auto | always | never
            table_memory=0.4,  # share of the device's memory that the table may take
            table_runs=1,  # runs that will share it
        )
    )
    config.precision = "float32"  # float32 | tf32 | bfloat16
    config.platform = ""  # cpu | gpu | tpu: stop where there is none; empty takes whatever there is
    config.devices = 0  # how many to use; 0 takes all
    config.parallel = "jit"  # jit | pmap
    config.steps_per_call = 0  # 0: one on CPU, an epoch on accelerators
    config.eval_batch = 500
    config.eval_every = 10  # epochs
    config.checkpoint_every = 10  # epochs
    config.smoke = False
    return config


def bilevel(**values) -> dict:
    """Weights from a net that learns beside the student: BiKD's for CIFAR-100 (arXiv 2605.17839) unless given."""
    defaults = dict(
        name="bilevel",
        lookahead=1,  # K, virtual steps through which the weight net's gradient goes
        every=5,  # k, gradients gathered for one update of the weight net
        outer="hard",  # hard | soft | mix: the loss on the meta images
        features=("student_ce", "teacher_ce"),  # per-example losses that the weight net sees, terms by their names too
        hidden=(64, 64),
        scales=(),  # constants that multiply the weights, one a term; () is 1 for each
        lr=1e-3,
        weight_decay=1e-4,
        decay=0.8,  # of lr, at the milestones of config.train
    )
    return {**defaults, **values}


def bikd_recipe(*, n_max: int, meta_per_class: int) -> dict:
    """BiKD's recipe as values of the config: 120 epochs of batch 100, the meta images taken before the tail is cut.

    Source: the official code of arXiv 2605.17839. How its teacher was trained is not known: it gets the student's recipe.
    """
    sgd = dict(batch_size=100, epochs=120.0, lr=0.1, milestones=(80 / 120, 100 / 120))
    trained = {f"{role}.{key}": value for role in ("train", "teacher.train") for key, value in sgd.items()}
    return {"data.n_max": n_max, "data.meta_per_class": meta_per_class, **trained}


def set_method(config, name: str, *, weighting: dict | None = None, **defaults) -> None:
    """Puts a method's hyperparameters, with their defaults, into `config.method`; with `weighting`, those of its terms.

    Args:
      config: from `base`.
      name: of the method.
      weighting: from `bilevel`.
      **defaults: hyperparameters of methods, of which this one takes its own.
    """
    known = methods.hyperparameters(name, learned_weights=weighting is not None)
    # A warm-up is of static weights; learned ones replace it.
    known = known if weighting else {"warmup_epochs": 0.0, **known}
    values = {key: value for key, value in defaults.items() if key in known}
    config.method = ml_collections.ConfigDict({"name": name, **known, **values})
    if weighting:
        config.weighting = ml_collections.ConfigDict(weighting)


def split(argument: str) -> list[str]:
    """The parts of an argument; a comma inside brackets is a tuple's.

    >>> split("bikd, scales=(1.0,2.0),smoke")
    ['bikd', 'scales=(1.0,2.0)', 'smoke']
    """
    return [part.strip() for part in re.split(r",(?![^(]*\))", argument) if part.strip()]


def apply_argument(
    config,
    argument: str | None,
    *,
    bikd: dict,
    weighting: dict,
    method_defaults: dict | None = None,
    default_recipe: str = "base",
) -> ml_collections.ConfigDict:
    """The config with the argument's method and values in it.

    Args:
      config: from `base`.
      argument: `METHOD[,key=value…][,smoke]`, each part optional.
      bikd: values of the config that make its recipe BiKD's: `recipe=bikd` sets them, `recipe=base` leaves the config's.
      weighting: from `bilevel`, for bikd.
      method_defaults: hyperparameters by method, where this data set's differ from the library's.
      default_recipe: of the other methods; bikd's own is "bikd".

    Raises:
      ValueError: an unknown method, key or a value of the wrong type.
    """
    parts = split(argument or "")
    words, pairs = [p for p in parts if "=" not in p], [p.split("=", 1) for p in parts if "=" in p]
    smoke = "smoke" in words
    given = [word for word in words if word != "smoke"] or ["ltkd"]
    if len(given) > 1:
        raise ValueError(f"the config's argument names several methods: {', '.join(given)}; give one")
    places = [SHORT.get(key.strip(), key.strip()) for key, _ in pairs]
    twice = next((pairs[i][0] for i, place in enumerate(places) if place in places[:i]), None)
    if twice:
        raise ValueError(f"the config's argument gives {twice.strip()!r} twice; give it once")
    (name,), pairs = given, {key.strip(): value.strip() for key, value in pairs}
    learned = name == "bikd"
    terms = pairs.pop("terms", "kd") if learned else name
    recipe = pairs.pop("recipe", "bikd" if learned else default_recipe)
    if terms not in methods.METHODS:
        known = [*methods.METHODS, *(() if learned else ("bikd",))]
        close = difflib.get_close_matches(terms, known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else "."
        raise ValueError(f"unknown method {terms!r}{hint} The methods are: {', '.join(known)}")
    if recipe not in ("base", "bikd"):
        raise ValueError(f"recipe={recipe!r} must be one of base, bikd")
    defaults = (method_defaults or {}).get(terms, {})
    set_method(config, terms, weighting=weighting if learned else None, **defaults)
    if recipe == "bikd":
        config.update_from_flattened_dict(bikd)
    if smoke:
        _shrink(config)
    for key, value in pairs.items():
        _set(config, key, value)
    if "imbalance" in pairs and config.data.subset != "exponential":
        raise ValueError(
            f"imbalance={pairs['imbalance']} does nothing where subset={config.data.subset!r}: add subset=exponential"
        )
    return config


def _set(config, key, text):
    path = SHORT.get(key) or (f"method.{key}" if key in config.method else key)
    *parents, leaf = path.split(".")
    node = config
    for name in parents:
        node = node[name] if isinstance(node, ml_collections.ConfigDict) and name in node else None
    there = isinstance(node, ml_collections.ConfigDict) and leaf in node
    if not there or isinstance(node[leaf], ml_collections.ConfigDict):
        if config.weighting.name == "bilevel" and key in methods.STATIC_WEIGHTS:
            raise ValueError(f"{key!r} is a static weight, which bikd learns instead; weighting.scales multiplies it")
        short = [key for key, path in SHORT.items() if path.split(".")[-1] in config.weighting or "weight" not in path]
        known = ["recipe", *short, *(k for k in config.method if k != "name")]
        close = difflib.get_close_matches(key, known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else "."
        raise ValueError(
            f"unknown key {key!r} in the config's argument{hint} Short keys: {', '.join(known)}; "
            "any other key of the config by its full path, such as train.lr"
        )
    node[leaf] = _parse(key, text, node[leaf])


def _parse(key, text, old):
    """The text as a value of the old one's type."""
    if isinstance(old, str):
        return text
    try:
        value = ast.literal_eval(text.capitalize() if text in ("true", "false") else text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):  # the last two where it is nested deep
        value = None
    if not all(_is_plain(part) for part in (value if isinstance(value, tuple) else (value,))):
        value = None
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if isinstance(old, float) and number:
        return float(value)
    if type(value) is not type(old):
        raise ValueError(f"{key}={text!r} must be of type {type(old).__name__}, like its default {old!r}")
    return value


def _is_plain(value):
    """Whether it is what JSON and 64 bits hold."""
    return isinstance(value, (str, float)) or isinstance(value, int) and abs(value) < 2**63


def _shrink(config):
    """The same path in seconds: 20 steps, small models, at most 1,000 test images, a stream of small crops and batches."""
    config.smoke = True
    config.teacher.model, config.student.model = "resnet14", "resnet8"
    for steps in (config.train, config.teacher.train):
        steps.max_steps = 20
    config.data.test_images = 1000
    if config.data.stream:
        config.data.image_size = 64
        for steps in (config.train, config.teacher.train):
            steps.batch_size = 64
