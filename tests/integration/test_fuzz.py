"""Random inputs of losses, groups and configs: the result is right, or an error says what was wrong.

More examples than the usual ones, which are always the same: LTKD_FUZZ_EXAMPLES=3000.
"""

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

# Losses.

FORMS = [
    (shape, dtype)
    for shape in ((6, 10), (2, 3), (3, 100))
    for dtype in (jnp.float32, jnp.bfloat16)
]


def any_logits(rng, shape):
    """Of some kind, or of a kind for each row."""

    def of(kind):
        scale = 10 ** rng.uniform(-3, 4)
        if kind == "spikes":
            height = rng.choice([-1, 1], shape) * 10 ** rng.uniform(0, 30, shape)
            return np.where(
                rng.random(shape) < 1.5 / shape[1], height, rng.normal(0, 1, shape)
            )
        return {
            "normal": rng.normal(0, scale, shape),
            "constant": np.full(shape, rng.normal(0, scale)),
            "ties": scale * rng.integers(-1, 2, shape),
        }[kind]

    kinds = ("normal", "constant", "ties", "spikes")
    first, second = of(rng.choice(kinds)), of(rng.choice(kinds))
    return np.where(rng.random((shape[0], 1)) < rng.choice([0, 0.5]), first, second)


def any_inputs(seed, temperature, shape, dtype):
    """Labels are of classes that exist; a group, and for all but the label every class, may not."""
    rng = np.random.default_rng(seed)
    B, C = shape
    labels = rng.integers(0, C, B, dtype=np.int32)
    groups = rng.permutation(np.concatenate([np.arange(3), rng.integers(0, 3, C - 3)]))
    where = rng.random(shape) < rng.choice([0.0, 0.5, 1.0])
    student, teacher = (jnp.asarray(any_logits(rng, shape), dtype) for _ in range(2))
    return truth.Inputs(
        student=student,
        teacher=student if rng.random() < 0.1 else teacher,
        labels=labels,
        where=where | (np.arange(C) == labels[:, None]),
        example_mask=rng.random(B) < rng.choice([0.0, 0.5, 1.0]),
        counts=rng.integers(1, 10**6, C).astype(np.int32),
        weights=(10 ** rng.uniform(-4, 4, C)).astype(np.float32),
        groups=ClassGroups.from_assignment(groups),
        temperature=np.float32(temperature),
    )


def test_losses():
    """They and their gradients are finite, and none is negative."""

    def check(seed, temperature, form):
        for name, (loss, gradient) in jax.device_get(
            evaluate(any_inputs(seed, temperature, *form))
        ).items():
            entry = truth.FAMILY[name]
            assert np.isfinite(loss).all() and loss.dtype == np.float32, name
            assert (
                loss >= -1e-5 * (temperature**2 if entry.squared else 1.0) * entry.terms
            ).all(), (name, loss)
            assert np.isfinite(gradient.astype(np.float32)).all(), name

    forms = FORMS if EXAMPLES >= 100 else FORMS[1:2]  # a compilation takes seconds
    fuzz(
        check, seed=SEEDS, temperature=st.floats(0.1, 100), form=st.sampled_from(forms)
    )


# Groups.

NUMBERS = st.one_of(
    st.integers(-2, 9),
    st.floats(),
    st.sampled_from(
        [
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
    ),
)
GARBAGE = st.one_of(
    NUMBERS,
    st.lists(NUMBERS, max_size=6),
    st.lists(NUMBERS, max_size=6).map(tuple),
    st.text(),
)
COUNTS = st.one_of(st.lists(st.integers(1, 500), min_size=1, max_size=12), GARBAGE)
FRACTIONS = st.lists(st.integers(1, 5), min_size=1, max_size=5).map(
    lambda parts: [p / sum(parts) for p in parts]
)
NAMES = st.one_of(
    st.none(), st.lists(st.text(max_size=2), max_size=5).map(tuple), GARBAGE
)


def try_to(call, *arguments):
    """Returns what it returns; or None where it raises an error that names an argument."""
    try:
        return call()
    except ValueError as error:
        assert any(name in str(error) for name in arguments), error


def check_partition(groups, length):
    assert groups.assignment.shape == (length,) and groups.assignment.dtype == np.int32
    assert set(groups.assignment.tolist()) == set(range(groups.num_groups))
    assert len({*groups.names}) == groups.num_groups and all(
        isinstance(name, str) for name in groups.names
    )


def test_groups():
    """They are a partition of the classes."""

    def check(counts, fractions, names, assignment, few, many):
        arguments = ("class_counts", "fractions", "names", "group")
        groups = try_to(
            lambda: ClassGroups.from_counts(counts, fractions=fractions, names=names),
            *arguments,
        )
        if groups:
            check_partition(groups, len(counts))
        groups = try_to(
            lambda: ClassGroups.from_assignment(assignment, names=names),
            "assignment",
            *arguments,
        )
        if groups:
            check_partition(groups, len(assignment))
            np.testing.assert_array_equal(groups.assignment, assignment)
        masks = try_to(
            lambda: shots(counts, many=many, few=few), "class_counts", "few="
        )
        if masks:
            assert (
                sum(mask.astype(int) for mask in masks.values()) == np.ones(len(counts))
            ).all()

    assignment = st.one_of(st.lists(st.integers(0, 3), min_size=1, max_size=9), GARBAGE)
    limits = st.one_of(st.integers(-1, 300), st.floats())
    fractions = st.one_of(FRACTIONS, GARBAGE)
    fuzz(
        check,
        counts=COUNTS,
        fractions=fractions,
        names=NAMES,
        assignment=assignment,
        few=limits,
        many=limits,
    )


# The config's argument.

WORDS = (*methods.METHODS, "bikd", "smoke", "", " ", "kdd", "ltkd ltkd")
TEXTS = st.one_of(
    st.sampled_from(
        [
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
        + [
            "(" * 300 + ")" * 300,
            "[" * 99 + "]" * 99,
            "-" * 9000 + "1",
            "1+" * 900 + "1",
            "(" * 50 + "1," + ")" * 50,
        ]
        + [
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
        + [
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
        + [
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
    ),
    st.integers(-3, 300).map(str),
    st.floats().map(str),
    st.text(max_size=12),
)


PATHS = sorted(
    {
        path
        for method in ("ltkd", "bikd")
        for path in flatten(config_of("digitslt", method).to_dict())
    }
)
NAMED = (
    st.sampled_from(
        [
            *sorted(models.REGISTRY),
            "all",
            "never",
            "gpu",
            "pmap",
            "tf32",
            "hard",
            "ltkd",
        ]
    )
    | st.text()
)
VALUES = {
    bool: st.booleans(),
    int: st.integers(0, 40) | st.integers(),
    float: st.floats(0, 1) | st.floats(),
    str: NAMED,
    tuple: st.lists(st.floats(0, 1) | st.integers(1, 9) | NAMED, max_size=4).map(tuple),
}
KEYS = st.sampled_from([*common.SHORT, *PATHS])
PAIR = st.one_of(
    st.tuples(
        KEYS | st.sampled_from(["terms", "recipe", "alpha", "data", ""]), TEXTS
    ).map("=".join),
    st.tuples(KEYS, st.integers(1, 20).map(str)).map("=".join),
)
ANYTHING = st.lists(PAIR | st.sampled_from(WORDS) | st.text(max_size=8), max_size=5)
ARGUMENTS = ANYTHING.map(",".join) | st.tuples(
    st.sampled_from([*WORDS, "kd,name=birds", "bikd,terms=ltkd,name=birds"]),
    st.lists(PAIR, max_size=3).map(",".join),
).map(",".join)
MUTATED = st.tuples(
    ARGUMENTS, st.integers(0, 40), st.sampled_from([*",=().\n \0\ud800", ""])
).map(lambda drawn: drawn[0][: drawn[1]] + drawn[2] + drawn[0][drawn[1] + 1 :])


def test_config():
    """An argument, and values put in place of others, are refused or make a config with a lasting hash."""

    def resolved(name, argument, paths, values):
        config = config_of(name, argument)
        for path in set(paths) & set(flatten(config.to_dict())):
            changed(config, **{path: values[type(at(config.to_dict(), path))]})
        # No file is read: the paths are anyone's.
        return resolve(
            changed(config, **{"data.dir": "/nowhere", "teacher.checkpoint": ""})
        )

    def check(name, argument, paths, values):
        try:
            spec = resolved(name, argument, paths, values)
        except ValueError as error:
            assert str(error)
            return
        from_results = resolve(json.loads(json.dumps(spec.config)))
        assert (
            spec.hash
            == resolved(name, argument, paths, values).hash
            == from_results.hash
            and len(spec.hash) == 12
        )

    fuzz(
        check,
        name=st.sampled_from(["digitslt", "cifar100lt", "folderlt"]),
        argument=ARGUMENTS | MUTATED,
        paths=st.lists(st.sampled_from(PATHS), max_size=2),
        values=st.fixed_dictionaries(VALUES),
    )
