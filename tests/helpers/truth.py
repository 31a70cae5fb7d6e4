"""The losses' reference: the papers' formulas in NumPy, and the inputs of their tests.

It computes in log space in `np.longdouble`, so that it is accurate at |logits| = 1e4,
too. A class that `where` excludes has the log probability −inf. Names and arguments are
those of `ltkd_jax.losses`: one table of calls, `FAMILY`, serves both.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ltkd_jax import groups as groups_lib

REAL = np.longdouble


# --- Probabilities in log space ---


def log_sum_exp(a, axis=-1):
    """Computes log Σ exp(a); −inf where every entry is."""
    maximum = a.max(axis, keepdims=True)
    maximum = np.where(np.isfinite(maximum), maximum, 0)
    with np.errstate(divide="ignore"):
        log_sum = np.log(np.exp(a - maximum).sum(axis))
    return np.squeeze(maximum, axis) + log_sum


def normalize(a, axis=-1):
    """Returns log probabilities from log weights; entries of −inf stay."""
    with np.errstate(invalid="ignore"):
        normalized = a - np.expand_dims(log_sum_exp(a, axis), axis)
    return np.where(np.isfinite(a), normalized, -np.inf)


def kl(log_p, log_q):
    """Computes Σ p (log p − log q) over the last axis; an entry with p = 0 adds 0."""
    with np.errstate(invalid="ignore"):
        terms = np.exp(log_p) * (log_p - log_q)
    return np.where(np.isfinite(log_p), terms, 0).sum(-1)


def scaled(logits, temperature=1.0, where=None):
    """Returns logits/τ in extended precision, −inf where a class does not exist."""
    logits = np.asarray(logits, REAL) / REAL(temperature)
    return logits if where is None else np.where(where, logits, -np.inf)


def log_probabilities(logits, temperature=1.0, where=None):
    return normalize(scaled(logits, temperature, where))


def at_labels(a, labels):
    """Returns the entry of each example at its label."""
    index = np.broadcast_to(np.asarray(labels)[..., None], (*a.shape[:-1], 1))
    return np.take_along_axis(a, index, -1)[..., 0]


# --- The losses ---


def cross_entropy(student_logits, labels, *, where=None):
    return -at_labels(log_probabilities(student_logits, 1, where), labels)


def balanced_softmax(student_logits, labels, class_counts, *, where=None):
    adjusted = scaled(student_logits) + np.log(np.asarray(class_counts, REAL))
    return cross_entropy(adjusted, labels, where=where)


def logit_adjusted(student_logits, labels, class_counts, *, tau=1.0, where=None):
    counts = np.asarray(class_counts, REAL)
    adjustment = REAL(tau) * np.log(counts / counts.sum())
    return cross_entropy(scaled(student_logits) + adjustment, labels, where=where)


def soft_loss(log_target, student_logits, temperature, where):
    """Computes τ² KL(target ‖ student)."""
    log_student = log_probabilities(student_logits, temperature, where)
    return REAL(temperature) ** 2 * kl(log_target, log_student)


def kd(student_logits, teacher_logits, *, temperature=4.0, where=None):
    log_teacher = log_probabilities(teacher_logits, temperature, where)
    return soft_loss(log_teacher, student_logits, temperature, where)


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
    is_label = np.arange(np.shape(student_logits)[-1]) == np.asarray(labels)[..., None]

    def decouple(logits):
        z = scaled(logits, temperature, where)
        others = np.where(is_label, -np.inf, z)
        binary = np.stack([at_labels(z, labels), log_sum_exp(others)], -1)
        return normalize(binary), normalize(others)

    student_binary, student_others = decouple(student_logits)
    teacher_binary, teacher_others = decouple(teacher_logits)
    tckd = kl(teacher_binary, student_binary)
    nckd = kl(teacher_others, student_others)
    return REAL(temperature) ** 2 * (REAL(alpha) * tckd + REAL(beta) * nckd)


def dive(student_logits, teacher_logits, *, power=0.5, temperature=4.0, where=None):
    p = np.exp(log_probabilities(teacher_logits, temperature, where))
    with np.errstate(divide="ignore"):
        log_q = normalize(REAL(power) * np.log(p))
    return soft_loss(log_q, student_logits, temperature, where)


def bkd(student_logits, teacher_logits, class_weights, *, temperature=4.0, where=None):
    log_weights = np.log(np.asarray(class_weights, REAL))
    log_teacher = log_probabilities(teacher_logits, temperature, where)
    log_q = normalize(log_teacher + log_weights)
    return soft_loss(log_q, student_logits, temperature, where)


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
    factor_logits=None,
):
    """Computes WSL; the factor is that of `factor_logits`, if set.

    The factor carries no gradient: for finite differences the student's logits move,
    and those in the factor do not.
    """
    if factor_logits is None:
        factor_logits = student_logits
    student_loss = cross_entropy(factor_logits, labels, where=where)
    teacher_loss = cross_entropy(teacher_logits, labels, where=where)
    factor = -np.expm1(-student_loss / np.maximum(teacher_loss, REAL("1e-7")))
    log_teacher = log_probabilities(teacher_logits, temperature, where)
    log_student = log_probabilities(student_logits, temperature, where)
    exists = np.isfinite(log_teacher)
    terms = np.exp(log_teacher) * np.where(exists, log_student, 0)
    soft = -np.where(exists, terms, 0).sum(-1)
    return REAL(temperature) ** 2 * factor * soft


class GroupKL(NamedTuple):
    inter: Any
    intra: Any
    teacher_log_mass: Any


def split_by_group(logits, groups, temperature, where):
    """Returns log p_G, `[..., G]`, and for each group log p̃, `[..., its classes]`."""
    z = scaled(logits, temperature, where)
    log_sums = []
    within_groups = []
    for group in range(groups.num_groups):
        group_logits = z[..., np.asarray(groups.assignment) == group]
        log_sums.append(log_sum_exp(group_logits))
        within_groups.append(normalize(group_logits))
    return normalize(np.stack(log_sums, -1)), within_groups


def group_kl(student_logits, teacher_logits, groups, *, temperature=1.0, where=None):
    student_mass, student_within = split_by_group(
        student_logits, groups, temperature, where
    )
    teacher_mass, teacher_within = split_by_group(
        teacher_logits, groups, temperature, where
    )
    intra = [kl(t, s) for t, s in zip(teacher_within, student_within)]
    inter = kl(teacher_mass, student_mass)
    return GroupKL(inter, np.stack(intra, -1), teacher_mass)


def rebalance(teacher_log_mass, *, where=None, example_mask=None, teacher_mass=None):
    log_mass = scaled(teacher_log_mass, 1, where)
    if teacher_mass is not None:
        return normalize(log_mass - np.log(np.asarray(teacher_mass, REAL)))
    counted = log_mass
    if example_mask is not None:
        counted = np.where(np.asarray(example_mask)[:, None], log_mass, -np.inf)
    log_sums = log_sum_exp(counted, 0)
    exists = np.isfinite(log_sums)
    if not exists.any():
        return np.full(log_mass.shape, -np.inf)
    log_mean = log_sum_exp(log_sums, 0) - np.log(REAL(exists.sum()))
    log_c = log_mean - np.where(exists, log_sums, 0)
    return normalize(np.where(exists, log_c + log_mass, -np.inf))


def rebalanced_inter_group(
    student_logits,
    teacher_logits,
    groups,
    *,
    temperature=4.0,
    where=None,
    example_mask=None,
    teacher_mass=None,
):
    student_mass, _ = split_by_group(student_logits, groups, temperature, where)
    log_mass, _ = split_by_group(teacher_logits, groups, temperature, where)
    target = rebalance(log_mass, example_mask=example_mask, teacher_mass=teacher_mass)
    loss = REAL(temperature) ** 2 * kl(target, student_mass)
    return loss if example_mask is None else np.where(example_mask, loss, 0)


def uniform_intra_group(
    student_logits, teacher_logits, groups, *, temperature=4.0, where=None
):
    split = group_kl(
        student_logits, teacher_logits, groups, temperature=temperature, where=where
    )
    return REAL(temperature) ** 2 * split.intra.sum(-1)


def ltkd(
    student_logits,
    teacher_logits,
    groups,
    *,
    alpha=1.0,
    beta=1.0,
    temperature=4.0,
    where=None,
    example_mask=None,
    teacher_mass=None,
):
    options = dict(temperature=temperature, where=where)
    inter = rebalanced_inter_group(
        student_logits,
        teacher_logits,
        groups,
        example_mask=example_mask,
        teacher_mass=teacher_mass,
        **options,
    )
    intra = uniform_intra_group(student_logits, teacher_logits, groups, **options)
    loss = REAL(alpha) * inter + REAL(beta) * intra
    return loss if example_mask is None else np.where(example_mask, loss, 0)


# --- One table of calls, for the implementation and the reference ---


class Inputs(NamedTuple):
    """Holds the arguments of all losses: a pytree, for jit, vmap and pmap."""

    student: Any  # [B, C]
    teacher: Any  # [B, C]
    labels: Any  # [B]
    where: Any  # [B, C]
    example_mask: Any  # [B]
    counts: Any  # [C]
    weights: Any  # [C]
    groups: Any
    temperature: Any


# The batch axis of each field; None for fields without one.
BATCH_AXES = Inputs(0, 0, 0, 0, 0, None, None, None, None)


@dataclasses.dataclass(frozen=True)
class Loss:
    """Describes one loss of the family, which is per example.

    Attributes:
      name: unique.
      args: names of the fields of `Inputs` that it takes.
      options: its keyword arguments.
      is_kl: whether it is a KL from teacher to student, 0 where they are equal.
      uses_batch: whether it has batch statistics, and takes `example_mask` and
        `axis_name`.
      has_constant_factor: whether a factor of it carries no gradient.
      weight: sum of the weights of its terms; rounding errors are proportional to it.
      function: its name in the module, if it is not `name`.
      output: selects the loss from what the function returns.
    """

    name: str
    args: str
    options: dict = dataclasses.field(default_factory=dict)
    is_kl: bool = False
    uses_batch: bool = False
    has_constant_factor: bool = False
    weight: float = 1.0
    function: str = ""
    output: Callable = lambda result: result

    @property
    def needs_teacher(self):
        return "teacher" in self.args

    @property
    def needs_groups(self):
        return "groups" in self.args

    @property
    def has_tau_squared(self):
        return self.needs_teacher and self.function != "group_kl"

    def call(self, module, x, **options):
        """Calls the function of `module`: `ltkd_jax.losses`, or this one."""
        options |= self.options | {"where": x.where}
        if self.needs_teacher:
            options["temperature"] = x.temperature
        if self.uses_batch:
            options["example_mask"] = x.example_mask
        function = getattr(module, self.function or self.name)
        args = [getattr(x, arg) for arg in self.args.split()]
        return self.output(function(*args, **options))


LOSSES = [
    Loss("cross_entropy", "student labels"),
    Loss("balanced_softmax", "student labels counts"),
    Loss("logit_adjusted", "student labels counts", {"tau": 1.5}),
    Loss("kd", "student teacher", is_kl=True),
    Loss(
        "dkd",
        "student teacher labels",
        {"alpha": 2.0, "beta": 6.0},
        is_kl=True,
        weight=8,
    ),
    Loss("dive", "student teacher", {"power": 0.7}),
    Loss("bkd", "student teacher weights"),
    Loss("wsl", "student teacher labels", has_constant_factor=True),
    Loss(
        "inter",
        "student teacher groups",
        is_kl=True,
        function="group_kl",
        output=lambda split: split.inter,
    ),
    Loss(
        "intra",
        "student teacher groups",
        is_kl=True,
        weight=3,
        function="group_kl",
        output=lambda split: split.intra.sum(-1),
    ),
    Loss("uniform_intra_group", "student teacher groups", is_kl=True, weight=3),
    Loss("rebalanced_inter_group", "student teacher groups", uses_batch=True),
    Loss(
        "ltkd",
        "student teacher groups",
        {"alpha": 0.7, "beta": 1.3},
        uses_batch=True,
        weight=4.6,
    ),
]
FAMILY = {loss.name: loss for loss in LOSSES}


# --- The inputs ---

B = 6
C = 10

GROUPINGS = {
    "thirds": [2, 0, 1, 1, 0, 2, 1, 0, 1, 2],
    "lone": [0, 2, 2, 0, 2, 1, 0, 2, 0, 2],  # class 5 is a group by itself
    "one": [0] * C,
    "each": [3, 1, 4, 0, 5, 9, 2, 6, 8, 7],
}


def peaks(labels, height):
    return height * (np.arange(C) == np.asarray(labels)[:, None])


def tied_logits(rng):
    z = rng.integers(-1, 2, (B, C)).astype(float)
    z[0] = 0
    return z


def underflowing_logits(rng, group):
    """Returns logits for which a group of "thirds" has mass 0 in float32 at τ = 1."""
    in_group = np.asarray(GROUPINGS["thirds"]) == group
    return rng.normal(size=(B, C)) + np.where(in_group, -95.0, 95.0)


# (rng, labels) -> (student's logits, teacher's logits)
CASES = {
    "random": lambda rng, y: (rng.normal(0, 3, (B, C)), rng.normal(0, 3, (B, C))),
    "wide": lambda rng, y: rng.uniform(-100, 100, (2, B, C)),
    "one_hot": lambda rng, y: (rng.normal(0, 3, (B, C)), peaks(y, 100)),
    "one_hot_apart": lambda rng, y: (peaks((y + 1) % C, 100), peaks((y + 2) % C, 100)),
    # Both are right, and so certain that their cross-entropies are 1e-6: a few rounding
    # errors of log p in float32.
    "confident": lambda rng, y: peaks(y, 14) + rng.normal(0, 1, (2, B, C)),
    "tied": lambda rng, y: (tied_logits(rng), tied_logits(rng)),
    "offset": lambda rng, y: (
        rng.normal(size=(B, C)) + 97,
        rng.normal(size=(B, C)) - 97,
    ),
    "underflow": lambda rng, y: (
        underflowing_logits(rng, 0),
        underflowing_logits(rng, 2),
    ),
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
    """Draws the inputs of a case, B = 6 and C = 10; see `draw_masks` for `masking`."""
    rng = np.random.default_rng(seed)
    where, example_mask = draw_masks(rng, masking)
    labels = [rng.choice(np.flatnonzero(classes)) for classes in where]
    labels = np.array(labels, np.int32)
    student, teacher = {**CASES, **EXTREME}[case](rng, labels)
    return Inputs(
        # float32 first, so that a case has the same numbers in each type.
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


def draw_masks(rng, masking):
    """Returns `where` `[B, C]` and `example_mask` `[B]`.

    "classes" excludes the same classes for all examples; "examples" draws them for each
    example, and excludes two examples.
    """
    where = np.ones((B, C), bool)
    example_mask = np.ones(B, bool)
    if masking == "classes":
        where[:, [1, 5, 6]] = False  # class 5 may be a whole group
    elif masking == "examples":
        where = rng.random((B, C)) < 0.6
        # Only one group of "thirds" exists, and only the label.
        where[0] = np.asarray(GROUPINGS["thirds"]) == 1
        where[1] = np.arange(C) == 7
        where[:, 4] |= ~where.any(-1)
        example_mask[[2, 5]] = False
    return where, example_mask
