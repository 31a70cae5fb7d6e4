"""The audit's numbers against their definitions in extended precision."""

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
TEMPERATURES = {"1": 1.0, "4": 4.0}


def draw(seed, number=97):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(number, C)) * 2, rng.integers(0, C, number)


def audit(z, labels, student=None, block_size=32, **options):
    if student is not None:
        student = logits.from_arrays(student, labels)
    examples = logits.from_arrays(z, labels)
    return bias.audit(
        examples, GROUPS, student=student, block_size=block_size, **options
    )


# --- The result of `audit`, from the definitions ---


def mean_or_none(values, members):
    if not members.any():
        return None
    return values[members].mean(axis=0).astype(float).tolist()


def by_name(values):
    return dict(zip(GROUPS.names, values.astype(float).tolist()))


def expected_audit(z, labels, student):
    prediction = z.argmax(axis=1)
    z = z.astype(truth.REAL)
    z -= z.max(axis=1, keepdims=True)
    in_groups = {}
    for g, name in enumerate(GROUPS.names):
        in_groups[name] = ASSIGNMENT[labels] == g
    everything = {**in_groups, "all": np.ones(len(z), bool)}
    share = np.array([members.mean() for members in in_groups.values()])
    return {
        "examples": len(z),
        "share": by_name(share),
        "mass": expected_mass(z),
        "mass_by_group": expected_mass_by_group(z, in_groups),
        "groups": expected_groups(z, labels, prediction, everything),
        "between": [
            mean_or_none(100 * MEMBERSHIP[prediction], members)
            for members in in_groups.values()
        ],
        "classes": expected_classes(z, labels, prediction),
        "divergence": expected_divergence(z, student, everything),
    }


def group_masses(z, temperature):
    split = truth.group_kl(z, z, GROUPS, temperature=temperature)
    return np.exp(split.teacher_log_mass)


def expected_mass(z):
    return {
        key: by_name(group_masses(z, temperature).mean(axis=0))
        for key, temperature in TEMPERATURES.items()
    }


def expected_mass_by_group(z, in_groups):
    result = {}
    for key, temperature in TEMPERATURES.items():
        mass = group_masses(z, temperature)
        result[key] = [mean_or_none(mass, members) for members in in_groups.values()]
    return result


def expected_groups(z, labels, prediction, everything):
    hit = 100.0 * (prediction == labels)
    confidence = np.exp(truth.log_probabilities(z)).max(axis=1)
    log_mass = truth.group_kl(z, z, GROUPS).teacher_log_mass
    inter = -log_mass[np.arange(len(z)), ASSIGNMENT[labels]]
    intra = truth.cross_entropy(z, labels) - inter
    result = {}
    for name, members in everything.items():
        bins = expected_bins(confidence[members], hit[members] / 100)
        entry = {
            "examples": int(members.sum()),
            "accuracy": mean_or_none(hit, members),
            "confidence": mean_or_none(100 * confidence, members),
            "inter": mean_or_none(inter, members),
            "intra": mean_or_none(intra, members),
            "ece": float(100 * np.abs(bins[1] - bins[2]).sum() / members.sum()),
            "ece_by_chance": float(metrics.calibration_error_by_chance(bins)),
            "bins": bins.astype(float).tolist(),
        }
        entry["loss"] = entry["inter"] + entry["intra"]
        result[name] = entry
    return result


def expected_bins(confidence, hit):
    # In float32: where classes are tied the confidence 1/n may be the edge of a bin.
    index = (confidence.astype(np.float32) * metrics.NUM_BINS).astype(int)
    index = np.minimum(index, metrics.NUM_BINS - 1)
    in_bin = index[:, None] == np.arange(metrics.NUM_BINS)
    return np.stack(
        [
            in_bin.sum(0),
            (in_bin * confidence[:, None]).sum(0),
            (in_bin * hit[:, None]).sum(0),
        ]
    )


def expected_divergence(z, student, everything):
    result = {}
    for key, temperature in TEMPERATURES.items():
        split = truth.group_kl(student, z, GROUPS, temperature=temperature)
        weighted_intra = np.exp(split.teacher_log_mass) * split.intra
        result[key] = {}
        for name, members in everything.items():
            inter = float(split.inter[members].mean())
            intra = weighted_intra[members].mean(axis=0)
            result[key][name] = {
                "kl": inter + float(intra.sum()),
                "inter": inter,
                "intra": by_name(intra),
            }
    return result


def expected_classes(z, labels, prediction):
    p = np.exp(truth.log_probabilities(z))
    hit = 100.0 * (prediction == labels)
    in_classes = [labels == c for c in range(C)]
    mass = np.zeros((C, C), truth.REAL)  # given by each class to each class
    for c, members in enumerate(in_classes):
        if members.any():
            mass[c] = p[members].mean(axis=0)
    mass_on_others = np.where(np.eye(C, dtype=bool), -1, mass)

    def or_none(values):
        entries = zip(in_classes, values.tolist())
        return [value if members.any() else None for members, value in entries]

    return {
        "examples": [int(members.sum()) for members in in_classes],
        "share": [float(members.mean()) for members in in_classes],
        "predicted": (np.bincount(prediction, minlength=C) / len(z)).tolist(),
        "mass": p.mean(axis=0).astype(float).tolist(),
        "recall": [mean_or_none(hit, members) for members in in_classes],
        "own": or_none(np.diag(mass).astype(float)),
        "to": or_none(mass_on_others.argmax(axis=1)),
        "to_mass": or_none(mass_on_others.max(axis=1).astype(float)),
        "to_groups": or_none((mass @ MEMBERSHIP).astype(float)),
    }


def assert_close(actual, expected, path=""):
    """Compares nested dicts and lists of numbers."""
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys(), path
        for key in expected:
            assert_close(actual[key], expected[key], f"{path}/{key}")
    elif isinstance(expected, list):
        assert len(actual) == len(expected), path
        for i, pair in enumerate(zip(actual, expected)):
            assert_close(*pair, f"{path}/{i}")
    elif isinstance(expected, float):
        np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=2e-5, err_msg=path)
    else:
        assert actual == expected, path


# --- The tests ---


def always_class_2(z):
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
    "one_class": always_class_2,
}


@pytest.mark.parametrize("kind", KINDS)
def test_audit_equals_definitions(kind):
    z, labels = draw(seed=1)
    z = KINDS[kind](z)
    student, _ = draw(seed=2)
    labels[labels == 4] = 3  # class 4 has no example
    assert_close(audit(z, labels, student), expected_audit(z, labels, student))


def test_audit_of_a_group_without_examples():
    z, labels = draw(seed=3)
    result = audit(z, np.where(ASSIGNMENT[labels] == 2, 0, labels), z)
    assert result["groups"]["tail"] == {"examples": 0}
    assert result["groups"]["all"]["examples"] == 97
    assert result["between"][2] is None
    assert result["mass_by_group"]["4"][2] is None
    assert result["divergence"]["4"]["tail"] is None
    assert result["divergence"]["4"]["all"]["kl"] == pytest.approx(0, abs=1e-6)


def test_audit_invariances():
    z, labels = draw(seed=5)
    expected = audit(z, labels)
    rng = np.random.default_rng(0)
    offsets = 1e4 * rng.normal(size=(len(z), 1))
    assert_close(audit(z + offsets, labels), expected)
    order = rng.permutation(len(z))
    assert_close(audit(z[order], labels[order]), expected)
    for block_size in (1, 97, None):
        numbers = []
        result = audit(z, labels, block_size=block_size, on_block=numbers.append)
        assert_close(result, expected)
        assert sum(numbers) == 97


def test_audit_bad_input():
    z, labels = draw(seed=6)
    examples = logits.from_arrays(z, labels)
    with pytest.raises(ValueError, match="groups are of 3 classes, the logits of 7"):
        bias.audit(examples, ClassGroups.from_assignment([0, 1, 2]))
    with pytest.raises(ValueError, match=r"\[97, 1, 7\]"):
        bias.audit(logits.from_arrays(z[:, None], labels, views=True), GROUPS)
    with pytest.raises(ValueError, match="block_size=-1 must be at least 1"):
        audit(z, labels, block_size=-1)
    with pytest.raises(TypeError, match="of type ndarray: give Logits"):
        bias.audit(z, GROUPS)
    with pytest.raises(ValueError, match="96 examples of 7 classes"):
        bias.audit(examples, GROUPS, student=logits.from_arrays(z[1:], labels[1:]))
    with pytest.raises(ValueError, match=r"97 rows differ"):
        bias.audit(examples, GROUPS, student=logits.from_arrays(z, (labels + 1) % C))
