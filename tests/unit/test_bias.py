"""The numbers of the bias audit against their definitions in extended precision."""

import numpy as np
import pytest
from helpers import truth

from ltkd_jax import bias, metrics
from ltkd_jax.data import logits
from ltkd_jax.groups import ClassGroups

C = 7
GROUPS = ClassGroups.from_counts([50, 40, 30, 20, 10, 5, 2], fractions=(0.3, 0.3, 0.4))
ASSIGNMENT = np.asarray(GROUPS.assignment)
MEMBERSHIP = np.eye(3)[ASSIGNMENT]


def draw(seed, number=97):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(number, C)) * 2, rng.integers(0, C, number)


def audit(z, labels, student=None, block_size=32, **options):
    student = None if student is None else logits.from_arrays(student, labels)
    return bias.audit(
        logits.from_arrays(z, labels),
        GROUPS,
        student=student,
        block_size=block_size,
        **options,
    )


def mean_or_none(values, members):
    return (
        values[members].mean(axis=0).astype(float).tolist() if members.any() else None
    )


def expected(z, labels, student):
    """The result of `audit`, from the definitions."""
    number = np.arange(len(z))
    prediction = z.argmax(axis=1)
    z = z.astype(truth.REAL)
    z -= z.max(axis=1, keepdims=True)
    p = np.exp(truth.normalize(truth.scaled(z)))
    hit = 100.0 * (prediction == labels)
    confidence = p.max(axis=1)
    group_log_mass = truth.group_kl(z, z, GROUPS).teacher_log_mass
    inter = -group_log_mass[number, ASSIGNMENT[labels]]
    intra = truth.cross_entropy(z, labels) - inter
    of_group = {name: ASSIGNMENT[labels] == g for g, name in enumerate(GROUPS.names)}
    everything = {**of_group, "all": np.ones(len(z), bool)}

    def by_name(values):
        return dict(zip(GROUPS.names, values.astype(float).tolist()))

    def calibration(members):
        # In float32: where classes are tied the confidence 1/n may lie on the edge of a bin.
        index = np.minimum(
            (confidence.astype(np.float32) * metrics.NUM_BINS).astype(int),
            metrics.NUM_BINS - 1,
        )
        in_bin = (index[:, None] == np.arange(metrics.NUM_BINS)) & members[:, None]
        bins = np.stack(
            [
                in_bin.sum(0),
                (in_bin * confidence[:, None]).sum(0),
                (in_bin * hit[:, None]).sum(0) / 100,
            ]
        )
        return bins, 100 * np.abs(bins[1] - bins[2]).sum() / members.sum()

    groups = {}
    for name, members in everything.items():
        bins, ece = calibration(members)
        groups[name] = {
            "examples": int(members.sum()),
            "bins": bins.astype(float).tolist(),
            "ece": float(ece),
        }
        numbers = {
            "accuracy": hit,
            "confidence": 100 * confidence,
            "inter": inter,
            "intra": intra,
        }
        groups[name] |= {
            key: mean_or_none(values, members) for key, values in numbers.items()
        }
        groups[name]["loss"] = groups[name]["inter"] + groups[name]["intra"]
        groups[name]["ece_by_chance"] = float(metrics.calibration_error_by_chance(bins))

    mass, mass_by_group, divergence = {}, {}, {}
    for name, temperature in (("1", 1.0), ("4", 4.0)):
        split = truth.group_kl(student, z, GROUPS, temperature=temperature)
        group_mass = np.exp(split.teacher_log_mass)
        mass[name] = by_name(group_mass.mean(axis=0))
        mass_by_group[name] = [
            mean_or_none(group_mass, members) for members in of_group.values()
        ]
        divergence[name] = {}
        for group, members in everything.items():
            mean_intra = (group_mass * split.intra)[members].mean(axis=0)
            mean_inter = float(split.inter[members].mean())
            kl = mean_inter + float(mean_intra.sum())
            divergence[name][group] = {
                "kl": kl,
                "inter": mean_inter,
                "intra": by_name(mean_intra),
            }

    own_classes = [labels == c for c in range(C)]
    by_class = np.array(
        [
            p[members].mean(axis=0) if members.any() else np.zeros(C)
            for members in own_classes
        ]
    )
    others = np.where(np.eye(C, dtype=bool), -1, by_class)
    empty = [not members.any() for members in own_classes]

    def or_none(values):
        return [None if none else value for none, value in zip(empty, values.tolist())]

    return {
        "examples": len(z),
        "share": by_name(np.array([members.mean() for members in of_group.values()])),
        "mass": mass,
        "mass_by_group": mass_by_group,
        "groups": groups,
        "between": [
            mean_or_none(100 * MEMBERSHIP[prediction], members)
            for members in of_group.values()
        ],
        "classes": {
            "examples": [int(members.sum()) for members in own_classes],
            "share": [float(members.mean()) for members in own_classes],
            "predicted": (np.bincount(prediction, minlength=C) / len(z)).tolist(),
            "mass": p.mean(axis=0).astype(float).tolist(),
            "recall": [mean_or_none(hit, members) for members in own_classes],
            "own": or_none(np.diag(by_class).astype(float)),
            "to": or_none(others.argmax(axis=1)),
            "to_mass": or_none(others.max(axis=1).astype(float)),
            "to_groups": or_none((by_class @ MEMBERSHIP).astype(float)),
        },
        "divergence": divergence,
    }


def assert_close(actual, desired, path=""):
    """Compares nested dicts and lists of numbers."""
    if isinstance(desired, dict):
        assert actual.keys() == desired.keys(), path
        for key in desired:
            assert_close(actual[key], desired[key], f"{path}/{key}")
    elif isinstance(desired, list):
        assert len(actual) == len(desired), path
        for i, pair in enumerate(zip(actual, desired)):
            assert_close(*pair, f"{path}/{i}")
    elif isinstance(desired, float):
        np.testing.assert_allclose(actual, desired, rtol=2e-5, atol=2e-5, err_msg=path)
    else:
        assert actual == desired, path


def one_class(z):
    z = z.copy()
    z[:, 2] += 300
    return z


KINDS = {
    "plain": lambda z: z,
    "float16": lambda z: z.astype(np.float16),
    "extreme": lambda z: np.clip(z * 1e4, -1e4, 1e4),
    "constant": lambda z: z + 1e9,
    "float32_limit": lambda z: (np.sign(z) * 1e29).astype(np.float32),
    "ties": lambda z: np.round(z / 2),
    "one_class": one_class,
}


@pytest.mark.parametrize("kind", KINDS)
def test_audit_equals_definitions(kind):
    z, labels = draw(seed=1)
    z = KINDS[kind](z)
    student, _ = draw(seed=2)
    labels[labels == 4] = 3  # class 4 has no example
    assert_close(audit(z, labels, student), expected(z, labels, student))


def test_audit_of_a_group_without_examples():
    z, labels = draw(seed=3)
    result = audit(z, np.where(ASSIGNMENT[labels] == 2, 0, labels), z)
    assert (
        result["groups"]["tail"] == {"examples": 0}
        and result["groups"]["all"]["examples"] == 97
    )
    assert (
        result["between"][2]
        is result["mass_by_group"]["4"][2]
        is result["divergence"]["4"]["tail"]
        is None
    )
    assert result["divergence"]["4"]["all"]["kl"] == pytest.approx(0, abs=1e-6)


def test_audit_invariances():
    z, labels = draw(seed=5)
    desired = audit(z, labels)
    rng = np.random.default_rng(0)
    assert_close(audit(z + 1e4 * rng.normal(size=(len(z), 1)), labels), desired)
    order = rng.permutation(len(z))
    assert_close(audit(z[order], labels[order]), desired)
    for block_size in (1, 97, None):
        numbers = []
        assert_close(
            audit(z, labels, block_size=block_size, on_block=numbers.append), desired
        )
        assert sum(numbers) == 97


def test_audit_refuses_what_does_not_fit():
    z, labels = draw(seed=6)
    examples = logits.from_arrays(z, labels)
    with pytest.raises(ValueError, match="groups are of 3 classes, the logits of 7"):
        bias.audit(examples, ClassGroups.from_assignment([0, 1, 2]))
    with pytest.raises(ValueError, match=r"\[97, 1, 7\]"):
        bias.audit(logits.from_arrays(z[:, None], labels, views=True), GROUPS)
    with pytest.raises(ValueError, match="96 examples of 7 classes"):
        bias.audit(examples, GROUPS, student=logits.from_arrays(z[1:], labels[1:]))
    with pytest.raises(ValueError, match=r"97 rows differ"):
        bias.audit(examples, GROUPS, student=logits.from_arrays(z, (labels + 1) % C))
