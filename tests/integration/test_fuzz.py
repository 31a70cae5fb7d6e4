"""Anything goes in: what comes out is right, or an error that says what was wrong."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import truth
from helpers.small_runs import config_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from configs import common
from experiments.config import checks
from ltkd_jax import losses, methods, models
from ltkd_jax.groups import ClassGroups, shots

SEEDS = st.integers(0, 2**32 - 1)


def times(few, many):
    """A few cases that are always the same, and in the slow suite many that are not."""
    return pytest.mark.parametrize("number", [few, pytest.param(many, marks=pytest.mark.slow)])


def fuzz(number, check, **strategies):
    kind = dict(deadline=None, database=None, suppress_health_check=list(HealthCheck))
    settings(max_examples=number, derandomize=number < 100, **kind)(given(**strategies)(check))()


# Losses.

FORMS = [(shape, dtype) for shape in ((6, 10), (2, 3), (3, 100)) for dtype in (jnp.float32, jnp.bfloat16)]


@functools.cache
def every_loss():
    """All losses at once, with gradients by student and teacher: one compilation for each form of the logits."""

    def context(x):
        features = [jnp.clip(z, -1e15, 1e15)[..., None, None] for z in (x.student, x.teacher)]  # it squares them
        return losses.hierarchical_context(features[:1], features[1:])

    calls = {name: functools.partial(loss.call, losses) for name, loss in truth.FAMILY.items()} | {"context": context}

    def of(call, x):
        def total(student, teacher):
            loss = call(x._replace(student=student, teacher=teacher))
            return loss.sum(), loss

        return jax.grad(total, argnums=(0, 1), has_aux=True)(x.student, x.teacher)

    return jax.jit(lambda x: {name: of(call, x) for name, call in calls.items()})


def any_logits(rng, shape):
    """Of some kind, or of a kind for each row."""

    def of(kind):
        scale = 10 ** rng.uniform(-3, 4)
        if kind == "spikes":
            height = rng.choice([-1, 1], shape) * 10 ** rng.uniform(0, 30, shape)
            return np.where(rng.random(shape) < 1.5 / shape[1], height, rng.normal(0, 1, shape))
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


@times(20, 4000)
def test_losses_are_finite_not_negative_and_leave_the_teacher_alone(number):
    def check(seed, temperature, form):
        x = any_inputs(seed, temperature, *form)
        for name, ((by_student, by_teacher), loss) in jax.device_get(every_loss()(x)).items():
            known = truth.FAMILY.get(name)
            squared = temperature**2 if known and known.squared else 1.0
            assert np.isfinite(loss).all() and loss.dtype == np.float32, name
            assert (loss >= -1e-5 * squared * (known.terms if known else 1)).all(), (name, loss)
            assert np.isfinite(by_student.astype(np.float32)).all(), name
            assert not by_teacher.any(), name

    forms = FORMS if number > 100 else FORMS[1:2]  # a compilation takes seconds
    fuzz(number, check, seed=SEEDS, temperature=st.floats(0.1, 100), form=st.sampled_from(forms))


# Groups.

NUMBERS = st.one_of(
    st.integers(-2, 9),
    st.floats(),
    st.sampled_from([0, 10**18, 10**400, 2**63, 0.33, 0.34, 1 / 3, 0.5, None, True, "", "5", "x", 1j, b"1", [1], {}]),
)
GARBAGE = st.one_of(NUMBERS, st.lists(NUMBERS, max_size=6), st.lists(NUMBERS, max_size=6).map(tuple), st.text())
COUNTS = st.one_of(st.lists(st.integers(1, 500), min_size=1, max_size=12), GARBAGE)
PARTS = st.lists(st.integers(1, 5), min_size=1, max_size=5).map(lambda parts: [p / sum(parts) for p in parts])
NAMES = st.one_of(st.none(), st.lists(st.text(max_size=2), max_size=5).map(tuple), GARBAGE)


def refuses(call, *about):
    """What it gives; or None, where it raises an error that says what it is about."""
    try:
        return call()
    except ValueError as error:
        assert any(word in str(error) for word in about), error


@times(20, 3000)
def test_groups_are_a_partition_or_an_error(number):
    def partition(groups, length):
        if groups is not None:
            assert groups.assignment.shape == (length,) and groups.assignment.dtype == np.int32
            assert set(groups.assignment.tolist()) == set(range(groups.num_groups))
            assert len({*groups.names}) == groups.num_groups and all(isinstance(n, str) for n in groups.names)

    def check(counts, fractions, names, assignment, few, many):
        about = ("class_counts", "fractions", "names", "group")
        found = refuses(lambda: ClassGroups.from_counts(counts, fractions=fractions, names=names), *about)
        partition(found, found and len(counts))
        found = refuses(lambda: ClassGroups.from_assignment(assignment, names=names), "assignment", *about)
        partition(found, found and len(assignment))
        if found:
            np.testing.assert_array_equal(found.assignment, assignment)
        masks = refuses(lambda: shots(counts, many=many, few=few), "class_counts", "few=")
        if masks:
            assert (sum(mask.astype(int) for mask in masks.values()) == np.ones(len(counts))).all()

    assignment = st.one_of(st.lists(st.integers(0, 3), min_size=1, max_size=9), GARBAGE)
    fractions, limits = st.one_of(PARTS, GARBAGE), st.one_of(st.integers(-1, 300), st.floats())
    strategies = dict(counts=COUNTS, fractions=fractions, names=NAMES, assignment=assignment, few=limits, many=limits)
    fuzz(number, check, **strategies)


# The config's argument.

WORDS = (*methods.METHODS, "bikd", "smoke", "", " ", "kdd", "ltkd ltkd")
TEXTS = st.one_of(
    st.sampled_from(
        ["1", "0", "-1", "0.5", "2.0", "1e999", "nan", "9" * 400, "-" + "9" * 400, "9" * 5000, "0x" + "f" * 5000]
        + ["(" * 300 + ")" * 300, "[" * 99 + "]" * 99, "-" * 9000 + "1", "1+" * 900 + "1", "(" * 50 + "1," + ")" * 50]
        + ["(0.5, 0.5)", "(1j,)", "((1,), 2)", "(None,)", "(b'1', 0.5)", "(0.3, 'x')", "(nan, 1)", "()", "(1", "1)"]
        + ["True", "true", "None", "{}", "{[]: 1}", "[1]", "b'1'", "'a'", "...", "1_000", "\0", "a\0b", "\ud800", "é²"]
        + ["all", "exponential", "autoaugment", "kd", "ltkd", "bikd", "base", "soft", "resnet8", "vgg8", "wrn_16_1"]
    ),
    st.integers(-3, 300).map(str),
    st.floats().map(str),
    st.text(max_size=12),
)


def paths_of(tree, prefix=""):
    """Of a config's values."""
    for key, value in tree.items():
        yield from paths_of(value, f"{prefix}{key}.") if isinstance(value, dict) else [prefix + key]


EVERY = sorted({path for method in ("ltkd", "bikd") for path in paths_of(config_of("digitslt", method).to_dict())})
NAMED = st.sampled_from([*sorted(models.REGISTRY), "all", "never", "gpu", "pmap", "tf32", "hard", "ltkd"]) | st.text()
VALUES = {
    bool: st.booleans(),
    int: st.integers(0, 40) | st.integers(),
    float: st.floats(0, 1) | st.floats(),
    str: NAMED,
    tuple: st.lists(st.floats(0, 1) | st.integers(1, 9) | NAMED, max_size=4).map(tuple),
}
KEYS = st.sampled_from([*common.SHORT, *EVERY])
PAIR = st.one_of(
    st.tuples(KEYS | st.sampled_from(["terms", "recipe", "alpha", "data", ""]), TEXTS).map("=".join),
    st.tuples(KEYS, st.integers(1, 20).map(str)).map("=".join),
)
ANYTHING = st.lists(PAIR | st.sampled_from(WORDS) | st.text(max_size=8), max_size=5)
ARGUMENTS = ANYTHING.map(",".join) | st.tuples(
    st.sampled_from([*WORDS, "kd,name=birds", "bikd,terms=ltkd,name=birds"]), st.lists(PAIR, max_size=3).map(",".join)
).map(",".join)
MUTATED = st.tuples(ARGUMENTS, st.integers(0, 40), st.sampled_from([*",=().\n \0\ud800", ""])).map(
    lambda drawn: drawn[0][: drawn[1]] + drawn[2] + drawn[0][drawn[1] + 1 :]
)


@times(20, 4000)
def test_an_argument_is_refused_or_makes_a_config_with_a_lasting_hash(number, tmp_path):
    """Whatever is put in place of its values afterwards, too."""

    def resolve(name, argument, paths, values):
        config = config_of(name, argument)
        for path in set(paths) & set(paths_of(config.to_dict())):
            config.update_from_flattened_dict({path: values[type(checks._at(config, path))]})
        config.data.dir, config.teacher.checkpoint = str(tmp_path), ""
        checks.validate(config)
        return checks.identity(config), checks.config_hash(config)

    def check(name, argument, paths, values):
        try:
            first = resolve(name, argument, paths, values)
        except ValueError as error:
            assert str(error)
            return
        again = resolve(name, argument, paths, values)
        assert again[1] == first[1] and checks.identity_hash(first[0]) == first[1] and len(first[1]) == 12
        assert not any(tmp_path.iterdir())

    fuzz(
        number,
        check,
        name=st.sampled_from(["digitslt", "cifar100lt", "folderlt"]),
        argument=ARGUMENTS | MUTATED,
        paths=st.lists(st.sampled_from(EVERY), max_size=2),
        values=st.fixed_dictionaries(VALUES),
    )
