"""The table of methods."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ltkd_jax import groups, losses, methods

COUNTS = np.array([400, 200, 90, 40, 20, 9, 5])
GROUPS = groups.ClassGroups.from_counts(COUNTS)
METHODS = sorted(methods.METHODS)


def create_all():
    return {method: methods.create(method, COUNTS, GROUPS) for method in METHODS}


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


def weighted_loss(p, method, **hyperparameters):
    objective = methods.create(method, COUNTS, GROUPS, **hyperparameters)
    weights = objective.weights(10**6)[None, :]
    return (jax.jit(objective)(p) * weights).sum(-1)


def test_names_of_methods():
    assert set(METHODS) == {
        "ce",
        "balanced_softmax",
        "logit_adjusted",
        "kd",
        "dkd",
        "dive",
        "bkd",
        "wsl",
        "reviewkd",
        "ltkd",
        "ltkd_bs",
    }


def test_published_terms():
    """Every method is the weighted sum of its terms, which are finite."""
    objectives = create_all()
    terms_fn = jax.jit(lambda p: {name: fn(p) for name, fn in objectives.items()})
    terms = terms_fn(predictions())
    expected = jax.jit(published_losses)(predictions())
    assert expected.keys() == objectives.keys()
    for method, objective in objectives.items():
        num_terms = len(objective.names)
        assert terms[method].shape == (8, num_terms), method
        assert bool(jnp.isfinite(terms[method]).all()), method
        assert len(set(objective.names)) == num_terms, method
        actual = (terms[method] * objective.weights(0)[None, :]).sum(-1)
        np.testing.assert_allclose(
            actual, expected[method], rtol=2e-6, atol=1e-5, err_msg=method
        )


def published_losses(p):
    z, t, y, *_ = p
    ce = losses.cross_entropy(z, y)
    bs = losses.balanced_softmax(z, y, COUNTS)
    review = losses.hierarchical_context(p.student_features, p.teacher_features)
    return {
        "ce": ce,
        "balanced_softmax": bs,
        "logit_adjusted": losses.logit_adjusted(z, y, COUNTS),
        "kd": 0.1 * ce + 0.9 * losses.kd(z, t),
        "dkd": ce + losses.dkd(z, t, y, alpha=1.0, beta=8.0),
        "dive": 0.5 * bs + 0.5 * losses.dive(z, t, power=0.5),
        "bkd": ce + losses.bkd(z, t, losses.effective_number_weights(COUNTS)),
        "wsl": ce + 2.5 * losses.wsl(z, t, y),
        "reviewkd": ce + 5.0 * review,
        "ltkd": ce + losses.ltkd(z, t, GROUPS),
        "ltkd_bs": bs + losses.ltkd(z, t, GROUPS),
    }


def test_number_of_groups():
    p = predictions()
    two_groups = groups.ClassGroups.from_counts(COUNTS, fractions=(0.5, 0.5))
    hard = losses.cross_entropy(p.student_logits, p.labels)
    expected = hard + losses.ltkd(p.student_logits, p.teacher_logits, two_groups)
    actual = weighted_loss(p, "ltkd", num_groups=2)
    np.testing.assert_allclose(actual, expected, rtol=1e-5)
    # With a group per class the whole KL is between groups, so beta has no effect.
    expected = weighted_loss(p, "ltkd", num_groups=len(COUNTS), beta=0.0)
    actual = weighted_loss(p, "ltkd", num_groups=len(COUNTS), beta=9.0)
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


@pytest.mark.parametrize(
    "num_groups, message",
    [(-1, "whole number"), (2.5, "whole number"), (8, "num_groups=8 of 7 classes")],
)
def test_number_of_groups_bad_input(num_groups, message):
    with pytest.raises(ValueError, match=message):
        methods.create("ltkd", COUNTS, GROUPS, num_groups=num_groups)


@pytest.mark.parametrize("method", ["ltkd", "ltkd_bs"])
def test_mass_of_the_dataset(method):
    """Parts of a batch have the terms of the whole; the mean mass is NumPy's."""
    p = predictions()
    by_batch = methods.create(method, COUNTS, GROUPS)
    by_dataset = methods.create(method, COUNTS, GROUPS, mass="dataset")
    assert by_batch.mass_temperature is None and by_dataset.mass_temperature == 4.0
    scaled = np.exp(np.asarray(p.teacher_logits, np.float64) / 4.0)
    class_mass = (scaled / scaled.sum(-1, keepdims=True)).mean(0)
    p = p._replace(class_mass=jnp.asarray(class_mass, jnp.float32))
    terms_fn = jax.jit(by_dataset)
    expected = jax.jit(by_batch)(p)
    np.testing.assert_allclose(terms_fn(p), expected, rtol=1e-5, atol=1e-6)
    for part in (slice(0, 1), slice(1, 4), slice(4, 8)):
        of_part = p._replace(
            student_logits=p.student_logits[part],
            teacher_logits=p.teacher_logits[part],
            labels=p.labels[part],
        )
        np.testing.assert_allclose(
            terms_fn(of_part), expected[part], rtol=1e-5, atol=1e-6
        )
    with pytest.raises(ValueError, match="mass='dataset'.*class_mass"):
        by_dataset(p._replace(class_mass=None))


def test_mass_bad_input():
    with pytest.raises(ValueError, match="mass='epoch' must be one of batch, dataset"):
        methods.create("ltkd", COUNTS, GROUPS, mass="epoch")
    terms = methods.create("ltkd", COUNTS, mass="dataset", temperature=2.0).terms
    for term in methods.create("ltkd", COUNTS, mass="dataset", temperature=3.0).terms:
        terms += (dataclasses.replace(term, name=f"second {term.name}"),)
    with pytest.raises(ValueError, match=r"mass_temperature \[2.0, 3.0\]"):
        _ = methods.Objective(terms).mass_temperature


def test_method_gets_default_groups(monkeypatch):
    monkeypatch.setattr(methods, "METHODS", dict(methods.METHODS))
    received = []

    @methods.register
    def grouped(info):
        received.append(info.groups)
        return (methods.hard_term("ce", losses.cross_entropy, 1.0),)

    methods.create("grouped", [50, 20, 5])
    assert received[0].assignment.tolist() == [0, 1, 2]


def test_terms_with_the_same_name():
    term = methods.hard_term("ce", losses.cross_entropy, 1.0)
    with pytest.raises(ValueError, match="same name: ce, ce"):
        methods.Objective((term, term))


def test_two_classes():
    assert methods.create("ce", [5, 3]).names == ("ce",)
    objective = methods.create("ltkd", [5, 3], num_groups=2)
    assert objective.names == ("ce", "inter", "intra")
    with pytest.raises(ValueError, match="2 classes are too few for head, med"):
        methods.create("ltkd", [5, 3])


def test_hyperparameters():
    p = predictions()
    z, t, y, *_ = p
    hard = losses.cross_entropy(z, y)
    options = dict(alpha=2.0, beta=0.5, temperature=1.5)
    expected = hard + losses.ltkd(z, t, GROUPS, **options)
    actual = weighted_loss(p, "ltkd", **options)
    np.testing.assert_allclose(actual, expected, rtol=1e-5)
    options = dict(alpha=3.0, beta=0.25, temperature=2.0)
    expected = hard + losses.dkd(z, t, y, **options)
    actual = weighted_loss(p, "dkd", **options)
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_warmup(method):
    objective = methods.create(method, COUNTS, GROUPS, warmup_steps=20)
    full = methods.create(method, COUNTS, GROUPS).weights(0)
    is_warmed_up = np.array([term.needs_teacher for term in objective.terms])
    weights_of_steps = jax.jit(jax.vmap(objective.weights))(np.array([0, 5, 20, 999]))
    for weights, factor in zip(weights_of_steps, (0.0, 0.25, 1.0, 1.0)):
        expected = np.where(is_warmed_up, factor, 1.0) * full
        np.testing.assert_allclose(weights, expected, rtol=1e-6)


def test_methods_without_a_teacher():
    without_teacher = {
        method: objective
        for method, objective in create_all().items()
        if not objective.needs_teacher
    }
    assert without_teacher.keys() == {"ce", "balanced_softmax", "logit_adjusted"}
    for objective in without_teacher.values():
        objective(predictions()._replace(teacher_logits=None))


def test_methods_with_features():
    """The other methods are the same with and without features."""
    objectives = create_all()
    with_features = {
        method for method, objective in objectives.items() if objective.needs_features
    }
    assert with_features == {"reviewkd"}
    p = predictions()
    without_features = p._replace(student_features=None, teacher_features=None)
    for method in ("kd", "ltkd"):
        objective = objectives[method]
        np.testing.assert_array_equal(objective(without_features), objective(p))


@pytest.mark.parametrize("method", ["ltkd", "dkd"])
def test_mixup(method):
    objective = methods.create(method, COUNTS, GROUPS)
    p = predictions()
    other = p._replace(labels=jnp.roll(p.labels, 1))
    lam = jnp.linspace(0.0, 1.0, 8)
    mixed = p._replace(mixup=methods.Mixup(other.labels, lam))
    weight = np.asarray(lam)[:, None]
    expected = weight * objective(p) + (1 - weight) * objective(other)
    np.testing.assert_allclose(objective(mixed), expected, rtol=1e-5)
    feature = methods.features(objective, ("student_ce",))(mixed)
    ce = losses.cross_entropy(p.student_logits, p.labels)
    other_ce = losses.cross_entropy(p.student_logits, other.labels)
    expected = lam * ce + (1 - lam) * other_ce
    np.testing.assert_allclose(feature[:, 0], expected, rtol=1e-5)


def test_default_groups():
    p = predictions()
    default = methods.create("ltkd", COUNTS)
    np.testing.assert_array_equal(default(p), methods.create("ltkd", COUNTS, GROUPS)(p))


def test_one_group():
    p = predictions()
    z, t, *_ = p
    one_group = groups.ClassGroups.from_assignment(np.zeros(len(COUNTS), int))
    _, inter, intra = methods.create("ltkd", COUNTS, one_group)(p).T
    np.testing.assert_allclose(inter, 0, atol=1e-6)
    np.testing.assert_allclose(intra, losses.kd(z, t), rtol=1e-4)


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        (("ltk", COUNTS), {}, "unknown method 'ltk'; did you mean 'ltkd'.*--import"),
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
            r"must be positive and finite; classes \[1\]",
        ),
    ],
)
def test_bad_input(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        methods.create(*arguments, **options)


def test_register():
    def kd(info, *, temperature=1.0):
        return ()

    with pytest.raises(ValueError, match="a method 'kd' already, of ltkd_jax.methods"):
        methods.register(kd)
    assert methods.METHODS["kd"].terms_fn is not kd
