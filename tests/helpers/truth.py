"""Independent truth for the losses: the papers' formulas in NumPy, and the inputs they are tried on.

Log space in `np.longdouble`, so that the truth itself holds at |logits| = 1e4. A class that `where` excludes
has the log probability -inf. Names and arguments are those of `ltkd_jax.losses`, so one table of calls, `FAMILY`,
serves the implementation and the truth.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ltkd_jax import groups as groups_lib

REAL = np.longdouble


# --- Probabilities in log space -------------------------------------------------------------------


def log_sum_exp(a, axis=-1):
    """log Σ exp(a); -inf where every entry is."""
    top = a.max(axis, keepdims=True)
    top = np.where(np.isfinite(top), top, 0)
    with np.errstate(divide="ignore"):
        return np.squeeze(top, axis) + np.log(np.exp(a - top).sum(axis))


def normalize(a, axis=-1):
    """Log weights to log probabilities; an entry of -inf stays."""
    with np.errstate(invalid="ignore"):
        return np.where(
            np.isfinite(a), a - np.expand_dims(log_sum_exp(a, axis), axis), -np.inf
        )


def kl(log_p, log_q):
    """Σ p (log p - log q) along the last axis; an entry with p = 0 adds 0."""
    with np.errstate(invalid="ignore"):
        return np.where(np.isfinite(log_p), np.exp(log_p) * (log_p - log_q), 0).sum(-1)


def scaled(logits, temperature=1.0, where=None):
    """logits/τ in extended precision, -inf where a class does not exist."""
    logits = np.asarray(logits, REAL) / REAL(temperature)
    return logits if where is None else np.where(where, logits, -np.inf)


def pick(a, labels):
    index = np.broadcast_to(np.asarray(labels)[..., None], (*a.shape[:-1], 1))
    return np.take_along_axis(a, index, -1)[..., 0]


# --- The losses -----------------------------------------------------------------------------------


def cross_entropy(student_logits, labels, *, where=None):
    return -pick(normalize(scaled(student_logits, 1, where)), labels)


def balanced_softmax(student_logits, labels, class_counts, *, where=None):
    return cross_entropy(
        scaled(student_logits) + np.log(np.asarray(class_counts, REAL)),
        labels,
        where=where,
    )


def logit_adjusted(student_logits, labels, class_counts, *, tau=1.0, where=None):
    counts = np.asarray(class_counts, REAL)
    adjustment = REAL(tau) * np.log(counts / counts.sum())
    return cross_entropy(scaled(student_logits) + adjustment, labels, where=where)


def _soft(log_target, student_logits, temperature, where):
    return REAL(temperature) ** 2 * kl(
        log_target, normalize(scaled(student_logits, temperature, where))
    )


def kd(student_logits, teacher_logits, *, temperature=4.0, where=None):
    return _soft(
        normalize(scaled(teacher_logits, temperature, where)),
        student_logits,
        temperature,
        where,
    )


def dkd(
    student_logits,
    teacher_logits,
    labels,
    *,
    alpha=1.0,
    beta=8.0,
    temperature=4.0,
    where=None,
):
    target = np.arange(np.shape(student_logits)[-1]) == np.asarray(labels)[..., None]

    def split(logits):
        z = scaled(logits, temperature, where)
        rest = np.where(target, -np.inf, z)
        binary = np.stack([pick(z, labels), log_sum_exp(rest)], -1)
        return normalize(binary), normalize(rest)

    (binary_s, rest_s), (binary_t, rest_t) = (
        split(student_logits),
        split(teacher_logits),
    )
    both = REAL(alpha) * kl(binary_t, binary_s) + REAL(beta) * kl(rest_t, rest_s)
    return REAL(temperature) ** 2 * both


def dive(student_logits, teacher_logits, *, power=0.5, temperature=4.0, where=None):
    p = np.exp(normalize(scaled(teacher_logits, temperature, where)))
    with np.errstate(divide="ignore"):
        log_q = normalize(REAL(power) * np.log(p))
    return _soft(log_q, student_logits, temperature, where)


def bkd(student_logits, teacher_logits, class_weights, *, temperature=4.0, where=None):
    log_w = np.log(np.asarray(class_weights, REAL))
    log_q = normalize(normalize(scaled(teacher_logits, temperature, where)) + log_w)
    return _soft(log_q, student_logits, temperature, where)


def effective_number_weights(class_counts, *, beta=0.9999):
    counts = np.asarray(class_counts, REAL)
    w = (1 - REAL(beta)) / (1 - REAL(beta) ** counts)
    return w / w.sum() * len(counts)


def wsl(
    student_logits,
    teacher_logits,
    labels,
    *,
    temperature=4.0,
    where=None,
    held_logits=None,
):
    """`held_logits`: the student's logits in the factor, which carries no gradient."""
    h_student = cross_entropy(
        student_logits if held_logits is None else held_logits, labels, where=where
    )
    h_teacher = cross_entropy(teacher_logits, labels, where=where)
    factor = -np.expm1(-h_student / np.maximum(h_teacher, REAL("1e-7")))
    log_t, log_s = (
        normalize(scaled(z, temperature, where))
        for z in (teacher_logits, student_logits)
    )
    soft = -np.where(
        np.isfinite(log_t), np.exp(log_t) * np.where(np.isfinite(log_t), log_s, 0), 0
    ).sum(-1)
    return REAL(temperature) ** 2 * factor * soft


class GroupKL(NamedTuple):
    inter: Any
    intra: Any
    teacher_log_mass: Any


def _by_group(logits, groups, temperature, where):
    """log p_G, [..., G], and log p̃ within each group, G arrays [..., classes of the group]."""
    z = scaled(logits, temperature, where)
    parts = [
        z[..., np.asarray(groups.assignment) == group]
        for group in range(groups.num_groups)
    ]
    return normalize(np.stack([log_sum_exp(part) for part in parts], -1)), [
        normalize(part) for part in parts
    ]


def group_kl(student_logits, teacher_logits, groups, *, temperature=1.0, where=None):
    mass_s, within_s = _by_group(student_logits, groups, temperature, where)
    mass_t, within_t = _by_group(teacher_logits, groups, temperature, where)
    intra = np.stack([kl(t, s) for t, s in zip(within_t, within_s)], -1)
    return GroupKL(kl(mass_t, mass_s), intra, mass_t)


def rebalance(teacher_log_mass, *, where=None, example_mask=None):
    mass = scaled(teacher_log_mass, 1, where)
    counted = (
        mass
        if example_mask is None
        else np.where(np.asarray(example_mask)[:, None], mass, -np.inf)
    )
    log_sums = log_sum_exp(counted, 0)
    exists = np.isfinite(log_sums)
    if not exists.any():
        return np.full(mass.shape, -np.inf)
    log_c = (
        log_sum_exp(log_sums, 0)
        - np.log(REAL(exists.sum()))
        - np.where(exists, log_sums, 0)
    )
    return normalize(np.where(exists, log_c + mass, -np.inf))


def rebalanced_inter_group(student_logits, teacher_logits, groups, *, temperature=4.0, where=None,
                           example_mask=None):  # fmt: skip
    mass_s, mass_t = (
        _by_group(z, groups, temperature, where)[0]
        for z in (student_logits, teacher_logits)
    )
    loss = REAL(temperature) ** 2 * kl(
        rebalance(mass_t, example_mask=example_mask), mass_s
    )
    return loss if example_mask is None else np.where(example_mask, loss, 0)


def uniform_intra_group(
    student_logits, teacher_logits, groups, *, temperature=4.0, where=None
):
    split = group_kl(
        student_logits, teacher_logits, groups, temperature=temperature, where=where
    )
    return REAL(temperature) ** 2 * split.intra.sum(-1)


def ltkd(student_logits, teacher_logits, groups, *, alpha=1.0, beta=1.0, temperature=4.0, where=None,
         example_mask=None):  # fmt: skip
    same = dict(temperature=temperature, where=where)
    inter = rebalanced_inter_group(
        student_logits, teacher_logits, groups, example_mask=example_mask, **same
    )
    intra = uniform_intra_group(student_logits, teacher_logits, groups, **same)
    loss = REAL(alpha) * inter + REAL(beta) * intra
    return loss if example_mask is None else np.where(example_mask, loss, 0)


# --- One table of calls, for the implementation and the truth alike -------------------------------


class Inputs(NamedTuple):
    """All that a loss may ask for; a pytree, so it goes through jit, vmap and pmap as one argument."""

    student: Any  # [B, C]
    teacher: Any  # [B, C]
    labels: Any  # [B]
    where: Any  # [B, C]
    example_mask: Any  # [B]
    counts: Any  # [C]
    weights: Any  # [C]
    groups: Any
    temperature: Any


# How an Inputs is split over its examples; the rest is the same for all of them.
BATCHED = Inputs(0, 0, 0, 0, 0, None, None, None, None)


@dataclasses.dataclass(frozen=True)
class Loss:
    """One loss of the family, per example; `module` is either `ltkd_jax.losses` or this one."""

    name: str
    args: str  # the fields of Inputs that it takes
    options: dict = dataclasses.field(default_factory=dict)
    is_kl: bool = (
        False  # between teacher and student as they are: 0 where they are equal
    )
    batch: bool = False  # has batch statistics: takes example_mask and axis_name
    held: bool = False  # a factor of it carries no gradient
    terms: float = (
        1.0  # the sum of the weights of its terms, which rounding errors scale with
    )
    function: str = ""
    take: Callable = lambda out: out

    @property
    def teacher(self):
        return "teacher" in self.args

    @property
    def grouped(self):
        return "groups" in self.args

    @property
    def squared(self):
        """Contains τ²."""
        return self.teacher and self.function != "group_kl"

    def call(self, module, x, **more):
        more |= self.options | {"where": x.where}
        if self.teacher:
            more["temperature"] = x.temperature
        if self.batch:
            more["example_mask"] = x.example_mask
        function = getattr(module, self.function or self.name)
        return self.take(
            function(*(getattr(x, arg) for arg in self.args.split()), **more)
        )


FAMILY = {
    loss.name: loss
    for loss in (
        Loss("cross_entropy", "student labels"),
        Loss("balanced_softmax", "student labels counts"),
        Loss("logit_adjusted", "student labels counts", {"tau": 1.5}),
        Loss("kd", "student teacher", is_kl=True),
        Loss(
            "dkd",
            "student teacher labels",
            {"alpha": 2.0, "beta": 6.0},
            is_kl=True,
            terms=8,
        ),
        Loss("dive", "student teacher", {"power": 0.7}),
        Loss("bkd", "student teacher weights"),
        Loss("wsl", "student teacher labels", held=True),
        Loss(
            "inter",
            "student teacher groups",
            is_kl=True,
            function="group_kl",
            take=lambda out: out.inter,
        ),
        Loss(
            "intra",
            "student teacher groups",
            is_kl=True,
            terms=3,
            function="group_kl",
            take=lambda out: out.intra.sum(-1),
        ),
        Loss("uniform_intra_group", "student teacher groups", is_kl=True, terms=3),
        Loss("rebalanced_inter_group", "student teacher groups", batch=True),
        Loss(
            "ltkd",
            "student teacher groups",
            {"alpha": 0.7, "beta": 1.3},
            batch=True,
            terms=4.6,
        ),
    )
}


# --- The inputs -----------------------------------------------------------------------------------

B, C = 6, 10

GROUPINGS = {
    "thirds": [2, 0, 1, 1, 0, 2, 1, 0, 1, 2],
    "lone": [0, 2, 2, 0, 2, 1, 0, 2, 0, 2],  # class 5 is a group by itself
    "one": [0] * C,
    "each": [3, 1, 4, 0, 5, 9, 2, 6, 8, 7],
}


def _peaks(labels, height):
    return height * (np.arange(C) == np.asarray(labels)[:, None])


def _tied(rng):
    z = rng.integers(-1, 2, (B, C)).astype(float)
    z[0] = 0
    return z


def _gone(rng, group):
    """One group of 'thirds' so low that its mass is 0 in float32 at τ = 1."""
    return rng.normal(size=(B, C)) + np.where(
        np.asarray(GROUPINGS["thirds"]) == group, -95.0, 95.0
    )


CASES = {
    "random": lambda rng, y: (rng.normal(0, 3, (B, C)), rng.normal(0, 3, (B, C))),
    "wide": lambda rng, y: rng.uniform(-100, 100, (2, B, C)),
    "one_hot": lambda rng, y: (rng.normal(0, 3, (B, C)), _peaks(y, 100)),
    "one_hot_apart": lambda rng, y: (
        _peaks((y + 1) % C, 100),
        _peaks((y + 2) % C, 100),
    ),
    # Both right, and so sure that their cross-entropies are 1e-6: few roundings of a float32 log p.
    "confident": lambda rng, y: _peaks(y, 14) + rng.normal(0, 1, (2, B, C)),
    "tied": lambda rng, y: (_tied(rng), _tied(rng)),
    "offset": lambda rng, y: (
        rng.normal(size=(B, C)) + 97,
        rng.normal(size=(B, C)) - 97,
    ),
    "underflow": lambda rng, y: (_gone(rng, 0), _gone(rng, 2)),
    "near": lambda rng, y: rng.normal(0, 3, (1, B, C)) + rng.normal(0, 1e-3, (2, B, C)),
}
EXTREME = {
    "uniform_1e4": lambda rng, y: rng.uniform(-1e4, 1e4, (2, B, C)),
    "corners_1e4": lambda rng, y: rng.choice([-1e4, 0.0, 1e4], (2, B, C)),
    "offset_1e4": lambda rng, y: (
        rng.normal(size=(B, C)) + 1e4,
        rng.normal(size=(B, C)) - 1e4,
    ),
}
MASKINGS = ("none", "classes", "examples")


def draw(
    case,
    *,
    grouping="thirds",
    masking="none",
    temperature=4.0,
    seed=0,
    dtype=np.float32,
):
    """The inputs of one case, B = 6 and C = 10; `masking` says which classes and examples are left out."""
    rng = np.random.default_rng(seed)
    where, example_mask = np.ones((B, C), bool), np.ones(B, bool)
    if (
        masking == "classes"
    ):  # the same for all: class 5, which may be a whole group, and two more
        where[:, [1, 5, 6]] = False
    elif (
        masking == "examples"
    ):  # a mask for each: example 0 has one group of 'thirds', 1 has its label only
        where = rng.random((B, C)) < 0.6
        where[0] = np.asarray(GROUPINGS["thirds"]) == 1
        where[1] = np.arange(C) == 7
        where[:, 4] |= ~where.any(-1)
        example_mask[[2, 5]] = False
    labels = np.array([rng.choice(np.flatnonzero(row)) for row in where], np.int32)
    student, teacher = {**CASES, **EXTREME}[case](rng, labels)
    return Inputs(
        student=np.asarray(student, np.float32).astype(dtype),
        teacher=np.asarray(teacher, np.float32).astype(dtype),
        labels=labels,
        where=where,
        example_mask=example_mask,
        counts=np.round(500 * 0.01 ** (np.arange(C) / (C - 1))).astype(np.int32),
        weights=np.linspace(0.125, 2.875, C).astype(np.float32).astype(dtype),
        groups=groups_lib.ClassGroups.from_assignment(np.asarray(GROUPINGS[grouping])),
        temperature=dtype(temperature),
    )
