"""The table of methods."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ltkd_jax import groups, losses, methods

COUNTS = np.array([400, 200, 90, 40, 20, 9, 5])
GROUPS = groups.ClassGroups.from_counts(COUNTS)
METHODS = sorted(methods.METHODS)


def predictions(seed=0):
    student, teacher = jax.random.normal(jax.random.key(seed), (2, 8, len(COUNTS))) * 3
    labels = jax.random.randint(jax.random.key(seed + 1), (8,), 0, len(COUNTS))
    maps = jax.random.normal(jax.random.key(seed + 2), (2, 8, 3, 3, 2))
    return methods.Predictions(
        student,
        teacher,
        labels,
        student_features=(maps[0],),
        teacher_features=(maps[1],),
    )


def total(p, method, **values):
    objective = methods.create(method, COUNTS, GROUPS, **values)
    return (jax.jit(objective)(p) * objective.weights(10**6)[None, :]).sum(-1)


def test_names_of_methods():
    assert set(METHODS) == {
        "ce", "balanced_softmax", "logit_adjusted", "kd", "dkd", "dive", "bkd", "wsl", "reviewkd", "ltkd", "ltkd_bs",
    }  # fmt: skip


def test_published_terms():
    """Every method is the weighted sum of its terms, which are of each example and finite."""
    objectives = {method: methods.create(method, COUNTS, GROUPS) for method in METHODS}
    terms = jax.jit(
        lambda p: {method: objective(p) for method, objective in objectives.items()}
    )(predictions())
    expected = jax.jit(published)(predictions())
    assert expected.keys() == objectives.keys()
    for method, objective in objectives.items():
        assert terms[method].shape == (8, len(objective.names)) and bool(
            jnp.isfinite(terms[method]).all()
        ), method
        assert len(set(objective.names)) == len(objective.names), method
        weighted = (terms[method] * objective.weights(0)[None, :]).sum(-1)
        np.testing.assert_allclose(
            weighted, expected[method], rtol=2e-6, atol=1e-5, err_msg=method
        )


def published(p):
    z, t, y, *_ = p
    ce, bs = losses.cross_entropy(z, y), losses.balanced_softmax(z, y, COUNTS)
    return {
        "ce": ce,
        "balanced_softmax": bs,
        "logit_adjusted": losses.logit_adjusted(z, y, COUNTS),
        "kd": 0.1 * ce + 0.9 * losses.kd(z, t),
        "dkd": ce + losses.dkd(z, t, y, alpha=1.0, beta=8.0),
        "dive": 0.5 * bs + 0.5 * losses.dive(z, t, power=0.5),
        "bkd": ce + losses.bkd(z, t, losses.effective_number_weights(COUNTS)),
        "wsl": ce + 2.5 * losses.wsl(z, t, y),
        "reviewkd": ce
        + 5.0 * losses.hierarchical_context(p.student_features, p.teacher_features),
        "ltkd": ce + losses.ltkd(z, t, GROUPS),
        "ltkd_bs": bs + losses.ltkd(z, t, GROUPS),
    }


def test_more_groups_than_three():
    p = predictions()
    two = groups.ClassGroups.from_counts(COUNTS, fractions=(0.5, 0.5))
    expected = losses.cross_entropy(p.student_logits, p.labels) + losses.ltkd(
        p.student_logits, p.teacher_logits, two
    )
    np.testing.assert_allclose(total(p, "ltkd", num_groups=2), expected, rtol=1e-5)
    each = total(
        p, "ltkd", num_groups=len(COUNTS), beta=0.0
    )  # a group a class: all of it is between groups
    np.testing.assert_allclose(
        total(p, "ltkd", num_groups=len(COUNTS), beta=9.0), each, rtol=1e-5
    )
    for bad, message in (
        (-1, "whole number"),
        (2.5, "whole number"),
        (8, "8 groups for 7 classes"),
    ):
        with pytest.raises(ValueError, match=message):
            methods.create("ltkd", COUNTS, GROUPS, num_groups=bad)


def test_hyperparameters():
    z, t, y, *_ = predictions()
    expected = losses.cross_entropy(z, y) + losses.ltkd(
        z, t, GROUPS, alpha=2.0, beta=0.5, temperature=1.5
    )
    np.testing.assert_allclose(
        total(predictions(), "ltkd", alpha=2.0, beta=0.5, temperature=1.5),
        expected,
        rtol=1e-5,
    )
    expected = losses.cross_entropy(z, y) + losses.dkd(
        z, t, y, alpha=3.0, beta=0.25, temperature=2.0
    )
    np.testing.assert_allclose(
        total(predictions(), "dkd", alpha=3.0, beta=0.25, temperature=2.0),
        expected,
        rtol=1e-5,
    )


@pytest.mark.parametrize("method", METHODS)
def test_warm_up(method):
    objective = methods.create(method, COUNTS, GROUPS, warmup_steps=20)
    full = methods.create(method, COUNTS, GROUPS).weights(0)
    distils = np.array([term.distils for term in objective.terms])
    warmed = jax.jit(jax.vmap(objective.weights))(np.array([0, 5, 20, 999]))
    for weights, share in zip(warmed, (0.0, 0.25, 1.0, 1.0)):
        np.testing.assert_allclose(
            weights, np.where(distils, share, 1.0) * full, rtol=1e-6
        )


def test_methods_without_a_teacher():
    needs = {
        method
        for method in METHODS
        if methods.create(method, COUNTS, GROUPS).needs_teacher
    }
    assert set(METHODS) - needs == {"ce", "balanced_softmax", "logit_adjusted"}
    for method in set(METHODS) - needs:
        methods.create(method, COUNTS)(predictions()._replace(teacher_logits=None))


def test_methods_with_features():
    """And only where it is told to: the others are the same without any."""
    needs = {
        method
        for method in METHODS
        if methods.create(method, COUNTS, GROUPS).needs_features
    }
    assert needs == {"reviewkd"}
    bare = predictions()._replace(student_features=None, teacher_features=None)
    for method in ("kd", "ltkd"):
        objective = methods.create(method, COUNTS, GROUPS)
        np.testing.assert_array_equal(objective(bare), objective(predictions()))


@pytest.mark.parametrize("method", ["ltkd", "dkd"])
def test_mixed_images(method):
    objective, p = methods.create(method, COUNTS, GROUPS), predictions()
    others, share = jnp.roll(p.labels, 1), jnp.linspace(0.0, 1.0, 8)
    mixed = objective(p._replace(mixup=methods.Mixup(others, share)))
    own, other = (
        np.asarray(objective(p._replace(labels=labels)))
        for labels in (p.labels, others)
    )
    weight = np.asarray(share)[:, None]
    np.testing.assert_allclose(mixed, weight * own + (1 - weight) * other, rtol=1e-5)
    feature = methods.features(objective, ("student_ce",))
    np.testing.assert_allclose(
        feature(p._replace(mixup=methods.Mixup(others, share)))[:, 0],
        share * losses.cross_entropy(p.student_logits, p.labels)
        + (1 - share) * losses.cross_entropy(p.student_logits, others),
        rtol=1e-5,
    )


def test_default_groups():
    default = methods.create("ltkd", COUNTS)(predictions())
    np.testing.assert_array_equal(
        default, methods.create("ltkd", COUNTS, GROUPS)(predictions())
    )
    one = groups.ClassGroups.from_assignment(np.zeros(len(COUNTS), int))
    z, t, *_ = predictions()
    inter, intra = methods.create("ltkd", COUNTS, one)(predictions())[:, 1:].T
    np.testing.assert_allclose(inter, 0, atol=1e-6)
    np.testing.assert_allclose(intra, losses.kd(z, t), rtol=1e-4)


@pytest.mark.parametrize(
    "arguments, values, message",
    [
        (("ltk", COUNTS), {}, "unknown method 'ltk'; did you mean 'ltkd'"),
        (("kd", COUNTS), {"alpha": 1.0}, "'kd' has no hyperparameter 'alpha'; it has"),
        (("kd", COUNTS), {"warmup_steps": -1}, "warmup_steps=-1"),
        (
            ("ltkd", COUNTS[:4], GROUPS),
            {},
            "groups are of 7 classes, class_counts of 4",
        ),
        (
            ("balanced_softmax", [5, 0]),
            {},
            "must be positive and finite; classes \\[1\\]",
        ),
    ],
)
def test_bad_input(arguments, values, message):
    with pytest.raises(ValueError, match=message):
        methods.create(*arguments, **values)
