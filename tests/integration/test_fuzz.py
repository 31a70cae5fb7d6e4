"""Random losses, groups and configs: the result is right, or the error is helpful.

LTKD_FUZZ_EXAMPLES=3000 draws more examples than usual; those drawn by default are the
same every time.
"""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
from helpers import truth
from helpers.fuzzing import EXAMPLES, SEEDS, fuzz
from helpers.loss_family import evaluate
from helpers.small_runs import changed, config_of
from hypothesis import strategies as st

from configs import common
from experiments.config.spec import resolve
from experiments.config.trees import at, flatten
from ltkd_jax import methods, models
from ltkd_jax.groups import ClassGroups, shots

# --- Losses ---

# (shape, dtype) of the logits
FORMS = list(
    itertools.product([(6, 10), (2, 3), (3, 100)], [jnp.float32, jnp.bfloat16])
)


def draw_logits_of_kind(rng, kind, shape):
    scale = 10 ** rng.uniform(-3, 4)
    if kind == "spikes":
        height = rng.choice([-1, 1], shape) * 10 ** rng.uniform(0, 30, shape)
        is_spike = rng.random(shape) < 1.5 / shape[1]
        return np.where(is_spike, height, rng.normal(0, 1, shape))
    if kind == "normal":
        return rng.normal(0, scale, shape)
    if kind == "constant":
        return np.full(shape, rng.normal(0, scale))
    assert kind == "ties"
    return scale * rng.integers(-1, 2, shape)


def draw_logits(rng, shape):
    """Returns logits of one kind, or of two kinds that alternate by row."""
    kinds = ("normal", "constant", "ties", "spikes")
    first = draw_logits_of_kind(rng, rng.choice(kinds), shape)
    second = draw_logits_of_kind(rng, rng.choice(kinds), shape)
    is_first = rng.random((shape[0], 1)) < rng.choice([0, 0.5])
    return np.where(is_first, first, second)


def draw_inputs(seed, temperature, shape, dtype):
    """Returns inputs of all losses.

    Labels are of classes that exist. Groups, and all classes but the label, may not.
    """
    rng = np.random.default_rng(seed)
    batch_size, num_classes = shape
    labels = rng.integers(0, num_classes, batch_size, dtype=np.int32)
    # Every group has a class.
    groups = np.concatenate([np.arange(3), rng.integers(0, 3, num_classes - 3)])
    groups = rng.permutation(groups)
    where = rng.random(shape) < rng.choice([0.0, 0.5, 1.0])
    where |= np.arange(num_classes) == labels[:, None]
    student = jnp.asarray(draw_logits(rng, shape), dtype)
    teacher = jnp.asarray(draw_logits(rng, shape), dtype)
    if rng.random() < 0.1:
        teacher = student
    return truth.Inputs(
        student=student,
        teacher=teacher,
        labels=labels,
        where=where,
        example_mask=rng.random(batch_size) < rng.choice([0.0, 0.5, 1.0]),
        counts=rng.integers(1, 10**6, num_classes).astype(np.int32),
        weights=(10 ** rng.uniform(-4, 4, num_classes)).astype(np.float32),
        groups=ClassGroups.from_assignment(groups),
        temperature=np.float32(temperature),
    )


def test_losses():
    """Losses and their gradients are finite, and no loss is negative."""

    def check(seed, temperature, form):
        results = jax.device_get(evaluate(draw_inputs(seed, temperature, *form)))
        for name, (values, gradient) in results.items():
            loss = truth.FAMILY[name]
            tolerance = 1e-5 * loss.weight
            if loss.has_tau_squared:
                tolerance *= temperature**2
            assert np.isfinite(values).all() and values.dtype == np.float32, name
            assert (values >= -tolerance).all(), (name, values)
            assert np.isfinite(gradient.astype(np.float32)).all(), name

    forms = FORMS if EXAMPLES >= 100 else FORMS[1:2]  # a compilation takes seconds
    fuzz(
        check, seed=SEEDS, temperature=st.floats(0.1, 100), form=st.sampled_from(forms)
    )


# --- Groups ---

UNUSUAL_VALUES = [
    0,
    10**18,
    10**400,
    2**63,
    0.33,
    0.34,
    1 / 3,
    0.5,
    None,
    True,
    "",
    "5",
    "x",
    1j,
    b"1",
    [1],
    {},
]
NUMBERS = st.one_of(st.integers(-2, 9), st.floats(), st.sampled_from(UNUSUAL_VALUES))
GARBAGE = st.one_of(
    NUMBERS,
    st.lists(NUMBERS, max_size=6),
    st.lists(NUMBERS, max_size=6).map(tuple),
    st.text(),
)
COUNTS = st.one_of(st.lists(st.integers(1, 500), min_size=1, max_size=12), GARBAGE)
FRACTIONS = st.lists(st.integers(1, 5), min_size=1, max_size=5).map(
    lambda sizes: [size / sum(sizes) for size in sizes]
)
NAMES = st.one_of(
    st.none(), st.lists(st.text(max_size=2), max_size=5).map(tuple), GARBAGE
)


def try_call(call, *arguments):
    """Returns `call()`, or None if it raises an error that names an argument."""
    try:
        return call()
    except ValueError as error:
        assert any(name in str(error) for name in arguments), error
        return None


def check_partition(groups, num_classes):
    assert groups.assignment.shape == (num_classes,)
    assert groups.assignment.dtype == np.int32
    assert set(groups.assignment.tolist()) == set(range(groups.num_groups))
    assert len(set(groups.names)) == groups.num_groups
    assert all(isinstance(name, str) for name in groups.names)


def test_groups():
    """Groups are a partition of the classes."""

    def check(counts, fractions, names, assignment, few, many):
        arguments = ("class_counts", "fractions", "names", "group")
        groups = try_call(
            lambda: ClassGroups.from_counts(counts, fractions=fractions, names=names),
            *arguments,
        )
        if groups:
            check_partition(groups, len(counts))
        groups = try_call(
            lambda: ClassGroups.from_assignment(assignment, names=names),
            "assignment",
            *arguments,
        )
        if groups:
            check_partition(groups, len(assignment))
            np.testing.assert_array_equal(groups.assignment, assignment)
        masks = try_call(
            lambda: shots(counts, many=many, few=few), "class_counts", "few="
        )
        if masks:
            num_shots = sum(mask.astype(int) for mask in masks.values())
            assert (num_shots == np.ones(len(counts))).all()

    assignment = st.one_of(st.lists(st.integers(0, 3), min_size=1, max_size=9), GARBAGE)
    limits = st.one_of(st.integers(-1, 300), st.floats())
    fuzz(
        check,
        counts=COUNTS,
        fractions=st.one_of(FRACTIONS, GARBAGE),
        names=NAMES,
        assignment=assignment,
        few=limits,
        many=limits,
    )


# --- Configs ---

WORDS = (*methods.METHODS, "bikd", "smoke", "", " ", "kdd", "ltkd ltkd")
NUMERIC_TEXTS = [
    "1",
    "0",
    "-1",
    "0.5",
    "2.0",
    "1e999",
    "nan",
    "9" * 400,
    "-" + "9" * 400,
    "9" * 5000,
    "0x" + "f" * 5000,
]
DEEP_TEXTS = [
    "(" * 300 + ")" * 300,
    "[" * 99 + "]" * 99,
    "-" * 9000 + "1",
    "1+" * 900 + "1",
    "(" * 50 + "1," + ")" * 50,
]
TUPLE_TEXTS = [
    "(0.5, 0.5)",
    "(1j,)",
    "((1,), 2)",
    "(None,)",
    "(b'1', 0.5)",
    "(0.3, 'x')",
    "(nan, 1)",
    "()",
    "(1",
    "1)",
]
OTHER_TEXTS = [
    "True",
    "true",
    "None",
    "{}",
    "{[]: 1}",
    "[1]",
    "b'1'",
    "'a'",
    "...",
    "1_000",
    "\0",
    "a\0b",
    "\ud800",
    "é²",
]
NAME_TEXTS = [
    "all",
    "exponential",
    "autoaugment",
    "kd",
    "ltkd",
    "bikd",
    "base",
    "soft",
    "resnet8",
    "vgg8",
    "wrn_16_1",
]
TEXTS = st.one_of(
    st.sampled_from(
        NUMERIC_TEXTS + DEEP_TEXTS + TUPLE_TEXTS + OTHER_TEXTS + NAME_TEXTS
    ),
    st.integers(-3, 300).map(str),
    st.floats().map(str),
    st.text(max_size=12),
)


def paths_of(method):
    return set(flatten(config_of("digitslt", method).to_dict()))


PATHS = sorted(paths_of("ltkd") | paths_of("bikd"))
KNOWN_NAMES = [
    *sorted(models.REGISTRY),
    "all",
    "never",
    "gpu",
    "pmap",
    "tf32",
    "hard",
    "ltkd",
]
STRINGS = st.sampled_from(KNOWN_NAMES) | st.text()
ENTRIES = st.floats(0, 1) | st.integers(1, 9) | STRINGS
VALUES = {
    bool: st.booleans(),
    int: st.integers(0, 40) | st.integers(),
    float: st.floats(0, 1) | st.floats(),
    str: STRINGS,
    tuple: st.lists(ENTRIES, max_size=4).map(tuple),
}
KEYS = st.sampled_from([*common.SHORT, *PATHS])
ANY_KEYS = KEYS | st.sampled_from(["terms", "recipe", "alpha", "data", ""])
PAIRS = st.one_of(
    st.tuples(ANY_KEYS, TEXTS).map("=".join),
    st.tuples(KEYS, st.integers(1, 20).map(str)).map("=".join),
)
ANYTHING = st.lists(PAIRS | st.sampled_from(WORDS) | st.text(max_size=8), max_size=5)
METHOD_AND_PAIRS = st.tuples(
    st.sampled_from([*WORDS, "kd,name=birds", "bikd,terms=ltkd,name=birds"]),
    st.lists(PAIRS, max_size=3).map(",".join),
)
ARGUMENTS = ANYTHING.map(",".join) | METHOD_AND_PAIRS.map(",".join)


def replace_character(argument, position, character):
    return argument[:position] + character + argument[position + 1 :]


MUTATED = st.builds(
    replace_character,
    ARGUMENTS,
    st.integers(0, 40),
    st.sampled_from([*",=().\n \0\ud800", ""]),
)


def test_config():
    """Any argument and values are refused, or make a config with a stable hash."""

    def resolve_config(name, argument, paths, values):
        config = config_of(name, argument)
        for path in set(paths) & set(flatten(config.to_dict())):
            changed(config, **{path: values[type(at(config.to_dict(), path))]})
        # No file is read, whatever the paths are.
        no_files = {"data.dir": "/nowhere", "teacher.checkpoint": ""}
        return resolve(changed(config, **no_files))

    def check(name, argument, paths, values):
        try:
            spec = resolve_config(name, argument, paths, values)
        except ValueError as error:
            assert str(error)
            return
        again = resolve_config(name, argument, paths, values)
        from_results = resolve(json.loads(json.dumps(spec.config)))
        assert spec.hash == again.hash == from_results.hash
        assert len(spec.hash) == 12

    fuzz(
        check,
        name=st.sampled_from(["digitslt", "cifar100lt", "folderlt"]),
        argument=ARGUMENTS | MUTATED,
        paths=st.lists(st.sampled_from(PATHS), max_size=2),
        values=st.fixed_dictionaries(VALUES),
    )
