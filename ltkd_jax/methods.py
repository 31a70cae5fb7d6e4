"""The table of methods. A method is a weighted sum of per-example loss terms.

To add one, write a function that returns its terms, and decorate it with `register`.
Its name is then `config.method.name`, and its keyword arguments are the hyperparameters
that a config may set.
"""

# So that help() shows ArrayLike, not all that it stands for.
from __future__ import annotations

import dataclasses
import functools
import inspect
import operator
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from ltkd_jax import losses, names
from ltkd_jax.groups import ClassGroups, check_counts


class Mixup(NamedTuple):
    """Describes the images with which those of a batch are mixed.

    Attributes:
      labels: int `[B]`, of the other image.
      lam: float `[B]`, λ, the weight of the image itself; the other has 1 − λ.
    """

    labels: jax.Array
    lam: jax.Array


class Predictions(NamedTuple):
    """Holds what the loss terms of a batch are computed from.

    Attributes:
      student_logits: `[B, C]`.
      teacher_logits: `[B, C]`, or None without a teacher.
      labels: int `[B]`.
      axis_name: name of the device axis over which the batch is split, if any.
      student_features: float `[B, H, W, channels]` each, or None where the method does
        not distil features.
      teacher_features: of the same shapes, or None.
      mixup: describes the other images, or None without Mixup.
      class_mass: float `[C]`, the probability that the teacher gives to each class,
        averaged over the whole training set; None where no term reads it, see
        `Term.mass_temperature`.
    """

    student_logits: jax.Array
    teacher_logits: jax.Array | None
    labels: jax.Array
    axis_name: str | None = None
    student_features: tuple[jax.Array, ...] | None = None
    teacher_features: tuple[jax.Array, ...] | None = None
    mixup: Mixup | None = None
    class_mass: jax.Array | None = None

    def require_teacher(self) -> jax.Array:
        """Returns `teacher_logits`, for a term that needs them.

        Raises:
          ValueError: there are none.
        """
        if self.teacher_logits is None:
            raise ValueError(
                "a term that distils needs predictions with teacher_logits"
            )
        return self.teacher_logits

    def require_class_mass(self) -> jax.Array:
        """Returns `class_mass`, for a term that needs it.

        Raises:
          ValueError: there is none.
        """
        if self.class_mass is None:
            raise ValueError(
                "a term with mass='dataset' needs predictions with class_mass"
            )
        return self.class_mass


# Returns [B], one loss per example, or [B, F], several.
PerExampleFn = Callable[[Predictions], jax.Array]


@dataclasses.dataclass(frozen=True)
class Term:
    """Describes one loss term.

    Attributes:
      name: unique within a method.
      fn: `predictions -> [B]`, the unweighted loss per example.
      weight: its static weight.
      needs_teacher: whether it is a distillation term, which reads the teacher's
        predictions and is warmed up.
      needs_features: whether it reads the features of student and teacher.
      mass_temperature: τ of the softmax whose mean over the training set the term reads
        as `Predictions.class_mass`; None if it does not read it.
    """

    name: str
    fn: PerExampleFn
    weight: float
    needs_teacher: bool
    needs_features: bool = False
    mass_temperature: float | None = None


@dataclasses.dataclass(frozen=True)
class Objective:
    """Holds loss terms with static weights.

    Attributes:
      terms: T terms, with different names.
      warmup_steps: steps over which the weights of distillation terms grow linearly.

    Raises:
      ValueError: two terms have the same name.

    >>> import jax.numpy as jnp
    >>> objective = create("kd", [500, 50, 5], warmup_steps=10)
    >>> objective.names, objective.weights(5).tolist()
    (('ce', 'kd'), [0.10000000149011612, 0.44999998807907104])
    """

    terms: tuple[Term, ...]
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        if len(set(self.names)) < len(self.terms):
            raise ValueError(f"terms have the same name: {', '.join(self.names)}")

    @property
    def names(self) -> tuple[str, ...]:
        """Returns the names of the terms, in order."""
        return tuple(term.name for term in self.terms)

    @property
    def needs_teacher(self) -> bool:
        """Returns whether a term needs the teacher."""
        return any(term.needs_teacher for term in self.terms)

    @property
    def needs_features(self) -> bool:
        """Returns whether a term needs features."""
        return any(term.needs_features for term in self.terms)

    @property
    def mass_temperature(self) -> float | None:
        """Returns τ of `Predictions.class_mass`; None if no term reads it.

        Raises:
          ValueError: the terms have several.
        """
        temperatures = set()
        for term in self.terms:
            if term.mass_temperature is not None:
                temperatures.add(term.mass_temperature)
        if len(temperatures) > 1:
            raise ValueError(
                f"terms have the mass_temperature {sorted(temperatures)}: give all of "
                "a method the same"
            )
        return temperatures.pop() if temperatures else None

    def __call__(self, predictions: Predictions) -> jax.Array:
        """Returns the unweighted terms of each example, `[B, T]`."""
        values = [_average_over_mixup(term.fn)(predictions) for term in self.terms]
        return jnp.stack(values, axis=-1)

    def weights(self, step: jax.Array | float) -> jax.Array:
        """Returns the static weights `[T]` at a step.

        Those of distillation terms grow linearly from 0 over `warmup_steps`.
        """
        warmup: jax.Array | float = 1.0
        if self.warmup_steps:
            warmup = jnp.minimum(1.0, step / self.warmup_steps)
        weights = []
        for term in self.terms:
            factor = warmup if term.needs_teacher else 1.0
            weights.append(jnp.asarray(term.weight * factor))
        return jnp.stack(weights)


def _average_over_mixup(fn: PerExampleFn) -> PerExampleFn:
    """Returns `fn` averaged over both labels of a mixed image, with weights λ, 1 − λ.

    Without Mixup it is `fn`.
    """

    def averaged(p: Predictions) -> jax.Array:
        if p.mixup is None:
            return fn(p)
        lam = p.mixup.lam
        other = p._replace(labels=p.mixup.labels)
        return lam * fn(p) + (1.0 - lam) * fn(other)

    return averaged


# --- The table ---


class ClassInfo(NamedTuple):
    """Describes the training set to a method.

    Attributes:
      counts: float `[C]`, training images of each class.
      groups: such as those of LTKD; None if there are too few classes for the default.
    """

    counts: np.ndarray
    groups: ClassGroups | None


TermsFn = Callable[..., tuple[Term, ...]]  # (info, **hyperparameters) -> terms


@dataclasses.dataclass(frozen=True)
class Method:
    """A row of the table of methods.

    Attributes:
      terms_fn: `(ClassInfo, **hyperparameters) -> terms`.
    """

    terms_fn: TermsFn

    @functools.cached_property
    def example_objective(self) -> Objective:
        """Returns the objective for some three classes.

        Neither the names of its terms nor what they need depend on the classes.
        """
        counts = np.array([3.0, 2.0, 1.0])
        info = ClassInfo(counts, ClassGroups.from_counts(counts))
        return Objective(self.terms_fn(info))

    @property
    def needs_teacher(self) -> bool:
        """Returns whether a term needs the teacher."""
        return self.example_objective.needs_teacher

    @property
    def needs_features(self) -> bool:
        """Returns whether a term needs features."""
        return self.example_objective.needs_features


METHODS: dict[str, Method] = {}


def register(fn: TermsFn) -> TermsFn:
    """Adds a method to the table, under the function's name; a decorator.

    The keyword arguments of the function are the hyperparameters that a config may set.
    Their defaults are floats. A module that is loaded again replaces its own methods.

    Args:
      fn: `(ClassInfo, **hyperparameters) -> terms`.

    Raises:
      ValueError: another module has registered that name.

    >>> @register
    ... def only_kd(info: ClassInfo, *, temperature: float = 2.0) -> tuple[Term, ...]:
    ...     def loss(z, teacher):
    ...         return losses.kd(z, teacher, temperature=temperature)
    ...     return (soft_term("kd", loss, 1.0),)
    >>> create("only_kd", [30, 20, 10]).names
    ('kd',)
    >>> del METHODS["only_kd"]
    """
    name = fn.__name__
    registered = METHODS.get(name)
    if registered and registered.terms_fn.__module__ != fn.__module__:
        raise ValueError(
            f"there is a method {name!r} already, of {registered.terms_fn.__module__}: "
            "give the function another name"
        )
    METHODS[name] = Method(fn)
    return fn


def hard_term(
    name: str, loss: Callable[[jax.Array, jax.Array], jax.Array], weight: float = 1.0
) -> Term:
    """Returns a term of labels.

    Args:
      name: of the term.
      loss: `(student logits [B, C], labels [B]) -> [B]`.
      weight: static.
    """

    def fn(p: Predictions) -> jax.Array:
        return loss(p.student_logits, p.labels)

    return Term(name, fn, weight, needs_teacher=False)


def soft_term(
    name: str, loss: Callable[[jax.Array, jax.Array], jax.Array], weight: float
) -> Term:
    """Returns a term of the teacher's logits.

    Args:
      name: of the term.
      loss: `(student logits [B, C], teacher logits [B, C]) -> [B]`.
      weight: static.
    """

    def fn(p: Predictions) -> jax.Array:
        return loss(p.student_logits, p.require_teacher())

    return Term(name, fn, weight, needs_teacher=True)


@register
def ce(info: ClassInfo) -> tuple[Term, ...]:
    """Returns the term of cross-entropy."""
    return (hard_term("ce", losses.cross_entropy),)


@register
def balanced_softmax(info: ClassInfo) -> tuple[Term, ...]:
    """Returns the term of balanced softmax."""
    return (_balanced_softmax_term(info),)


def _balanced_softmax_term(info: ClassInfo, weight: float = 1.0) -> Term:
    def loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
        return losses.balanced_softmax(logits, labels, info.counts)

    return hard_term("balanced_softmax", loss, weight)


@register
def logit_adjusted(info: ClassInfo, *, tau: float = 1.0) -> tuple[Term, ...]:
    """Returns the term of cross-entropy with logit adjustment."""

    def loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
        return losses.logit_adjusted(logits, labels, info.counts, tau=tau)

    return (hard_term("logit_adjusted", loss),)


@register
def kd(
    info: ClassInfo,
    *,
    hard_weight: float = 0.1,
    soft_weight: float = 0.9,
    temperature: float = 4.0,
) -> tuple[Term, ...]:
    """Returns the terms of knowledge distillation, with mdistiller's weights."""
    hard = hard_term("ce", losses.cross_entropy, hard_weight)
    soft = soft_term(
        "kd", functools.partial(losses.kd, temperature=temperature), soft_weight
    )
    return (hard, soft)


@register
def dkd(
    info: ClassInfo, *, alpha: float = 1.0, beta: float = 8.0, temperature: float = 4.0
) -> tuple[Term, ...]:
    """Returns the terms of decoupled distillation: CE + α TCKD + β NCKD."""

    def tckd(p: Predictions) -> jax.Array:
        return losses.dkd(
            p.student_logits,
            p.require_teacher(),
            p.labels,
            alpha=1.0,
            beta=0.0,
            temperature=temperature,
        )

    def nckd(p: Predictions) -> jax.Array:
        return losses.dkd(
            p.student_logits,
            p.require_teacher(),
            p.labels,
            alpha=0.0,
            beta=1.0,
            temperature=temperature,
        )

    return (
        hard_term("ce", losses.cross_entropy),
        Term("tckd", tckd, alpha, needs_teacher=True),
        Term("nckd", nckd, beta, needs_teacher=True),
    )


@register
def dive(
    info: ClassInfo,
    *,
    soft_weight: float = 0.5,
    power: float = 0.5,
    temperature: float = 4.0,
) -> tuple[Term, ...]:
    """Returns the terms of DiVE: (1 − a) balanced softmax + a flattened distillation.

    The default of a, `soft_weight`, is this library's choice.
    """
    loss = functools.partial(losses.dive, power=power, temperature=temperature)
    hard = _balanced_softmax_term(info, 1.0 - soft_weight)
    return (hard, soft_term("dive", loss, soft_weight))


@register
def bkd(
    info: ClassInfo,
    *,
    soft_weight: float = 1.0,
    class_beta: float = 0.9999,
    temperature: float = 4.0,
) -> tuple[Term, ...]:
    """Returns the terms of balanced distillation: CE + a class-weighted distillation.

    The default of a, `soft_weight`, is this library's choice.
    """
    class_weights = losses.effective_number_weights(info.counts, beta=class_beta)

    def loss(student: jax.Array, teacher: jax.Array) -> jax.Array:
        return losses.bkd(student, teacher, class_weights, temperature=temperature)

    hard = hard_term("ce", losses.cross_entropy)
    return (hard, soft_term("bkd", loss, soft_weight))


@register
def wsl(
    info: ClassInfo, *, soft_weight: float = 2.5, temperature: float = 4.0
) -> tuple[Term, ...]:
    """Returns the terms of weighted soft labels."""

    # It reads the labels, too.
    def soft(p: Predictions) -> jax.Array:
        return losses.wsl(
            p.student_logits, p.require_teacher(), p.labels, temperature=temperature
        )

    return (
        hard_term("ce", losses.cross_entropy),
        Term("wsl", soft, soft_weight, needs_teacher=True),
    )


@register
def reviewkd(info: ClassInfo, *, feature_weight: float = 5.0) -> tuple[Term, ...]:
    """Returns the terms of ReviewKD: CE + a distillation of features.

    The student's features have passed through fusion modules, which are trained with it
    (see `models.review`).
    """

    def review(p: Predictions) -> jax.Array:
        if p.student_features is None or p.teacher_features is None:
            raise ValueError(
                "reviewkd needs predictions with student_features and teacher_features"
            )
        return losses.hierarchical_context(p.student_features, p.teacher_features)

    return (
        hard_term("ce", losses.cross_entropy),
        Term("review", review, feature_weight, needs_teacher=True, needs_features=True),
    )


@register
def ltkd(
    info: ClassInfo,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    temperature: float = 4.0,
    num_groups: int = 0,
    mass: str = "batch",
) -> tuple[Term, ...]:
    """Returns the terms of LTKD: CE + α rebalanced inter-group + β uniform intra-group.

    With `num_groups` > 0, classes are split by rank into that many groups of about
    equal size; 0 means `info.groups`. `mass` says over what the group masses are
    rebalanced: the batch, or, with "dataset", the whole training set, see
    `losses.rebalance`. Both are this library's extensions.
    """
    hard = hard_term("ce", losses.cross_entropy)
    return (hard, *_ltkd_terms(info, alpha, beta, temperature, num_groups, mass))


@register
def ltkd_bs(
    info: ClassInfo,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    temperature: float = 4.0,
    num_groups: int = 0,
    mass: str = "batch",
) -> tuple[Term, ...]:
    """Returns the terms of LTKD with balanced softmax in place of cross-entropy.

    Neither paper has this method.
    """
    hard = _balanced_softmax_term(info)
    return (hard, *_ltkd_terms(info, alpha, beta, temperature, num_groups, mass))


# Over what LTKD rebalances the teacher's group masses.
MASSES = ("batch", "dataset")


def _ltkd_terms(
    info: ClassInfo,
    alpha: float,
    beta: float,
    temperature: float,
    num_groups: int,
    mass: str,
) -> tuple[Term, Term]:
    """Returns LTKD's two distillation terms."""
    if mass not in MASSES:
        raise ValueError(f"mass={mass!r} must be one of {', '.join(MASSES)}")
    of_dataset = mass == "dataset"
    groups = _equal_groups(info.counts, num_groups) if num_groups else info.groups
    if groups is None:
        raise ValueError(
            f"{len(info.counts)} classes are too few for head, medium and tail: give "
            "groups, or num_groups"
        )

    def inter(p: Predictions) -> jax.Array:
        teacher_mass = None
        if of_dataset:
            teacher_mass = _group_sums(p.require_class_mass(), groups)
        return losses.rebalanced_inter_group(
            p.student_logits,
            p.require_teacher(),
            groups,
            temperature=temperature,
            axis_name=p.axis_name,
            teacher_mass=teacher_mass,
        )

    def intra(student: jax.Array, teacher: jax.Array) -> jax.Array:
        return losses.uniform_intra_group(
            student, teacher, groups, temperature=temperature
        )

    inter_term = Term(
        "inter",
        inter,
        alpha,
        needs_teacher=True,
        mass_temperature=temperature if of_dataset else None,
    )
    return (inter_term, soft_term("intra", intra, beta))


def _group_sums(class_mass: jax.Array, groups: ClassGroups) -> jax.Array:
    """Returns the sums over the classes of each group: `[C]` to `[G]`."""
    # Masked sums: a matmul's precision would depend on the platform.
    return jnp.where(groups.membership, class_mass[None, :], 0).sum(axis=-1)


def _equal_groups(class_counts: npt.ArrayLike, num_groups: int) -> ClassGroups:
    """Returns groups by rank, whose numbers of classes are as equal as possible."""
    if num_groups != int(num_groups) or num_groups < 0:
        raise ValueError(
            f"num_groups={num_groups} must be a whole number >= 0; 0 means the groups "
            "of the data set"
        )
    num_groups = int(num_groups)
    num_classes = np.size(class_counts)
    if num_groups > num_classes:
        raise ValueError(
            f"num_groups={num_groups} of {num_classes} classes: give at most one for "
            "each class, or 0 for the groups of the data set"
        )
    return ClassGroups.from_counts(
        class_counts, fractions=(1 / num_groups,) * num_groups
    )


# Hyperparameters that are only the static weight of a term. Learned weights replace
# them.
STATIC_WEIGHTS = ("hard_weight", "soft_weight", "feature_weight", "alpha", "beta")


def hyperparameters(
    method: str, *, learned_weights: bool = False
) -> dict[str, float | str]:
    """Returns the hyperparameters of a method with their defaults.

    Args:
      method: a row of `METHODS`.
      learned_weights: leave out the static weights of terms, `STATIC_WEIGHTS`.

    Raises:
      ValueError: an unknown method.

    >>> hyperparameters("wsl"), hyperparameters("wsl", learned_weights=True)
    ({'soft_weight': 2.5, 'temperature': 4.0}, {'temperature': 4.0})
    """
    if method not in METHODS:
        raise ValueError(names.unregistered("method", method, METHODS))
    parameters = inspect.signature(METHODS[method].terms_fn).parameters
    defaults = {}
    for name, parameter in parameters.items():
        if parameter.kind is not parameter.KEYWORD_ONLY:
            continue
        if learned_weights and name in STATIC_WEIGHTS:
            continue
        defaults[name] = parameter.default
    return defaults


def create(
    method: str,
    class_counts: npt.ArrayLike,
    groups: ClassGroups | None = None,
    *,
    warmup_steps: int = 0,
    **values: float | str,
) -> Objective:
    """Returns the objective of a method for a training set.

    Args:
      method: a row of `METHODS`.
      class_counts: `[C]`, training images of each class, positive.
      groups: such as those of LTKD; by default head, medium and tail by rank, which
        need three classes.
      warmup_steps: steps over which the weights of distillation terms grow linearly.
      **values: hyperparameters of the method, see `hyperparameters`.

    Raises:
      ValueError: an unknown method or hyperparameter, groups of another number of
        classes, or fewer than three classes without groups, if the method needs them.

    >>> create("ltkd", [500, 50, 5], alpha=2.0).names
    ('ce', 'inter', 'intra')
    """
    allowed = hyperparameters(method)
    unknown = sorted(set(values) - set(allowed))
    if unknown:
        raise ValueError(
            f"method {method!r} has no hyperparameter {unknown[0]!r}; it has "
            f"{sorted(allowed)}"
        )
    if warmup_steps < 0:
        raise ValueError(f"warmup_steps={warmup_steps} must not be negative")
    counts = check_counts(class_counts)
    # Head, medium and tail need a class each.
    if groups is None and len(counts) >= 3:
        groups = ClassGroups.from_counts(counts)
    if groups is not None and len(groups.assignment) != len(counts):
        raise ValueError(
            f"the groups are of {len(groups.assignment)} classes, class_counts of "
            f"{len(counts)}"
        )
    terms = METHODS[method].terms_fn(ClassInfo(counts, groups), **values)
    return Objective(terms, warmup_steps)


# --- Functions of predictions for learned weights ---


def features(objective: Objective, names: Sequence[str]) -> PerExampleFn:
    """Returns the input of a weight net as a function: `predictions -> [B, F]`.

    Each feature is a per-example loss.

    Args:
      objective: whose terms may be named.
      names: each a term of the objective, "student_ce", or, if a term needs the
        teacher, "teacher_ce". The paper's (arXiv 2605.17839) are ("student_ce",
        "teacher_ce").

    Raises:
      ValueError: no name, a repeated name, or an unknown one.

    >>> features(create("ce", [5, 3, 1]), ("student_ce", "kd"))
    Traceback (most recent call last):
    ...
    ValueError: feature 'kd': these terms have student_ce, ce (there is no teacher)
    """
    fns: dict[str, PerExampleFn] = {"student_ce": _student_cross_entropy}
    if objective.needs_teacher:
        fns["teacher_ce"] = _teacher_cross_entropy
    for term in objective.terms:
        fns[term.name] = term.fn
    if isinstance(names, str) or not names or len(set(names)) < len(names):
        raise ValueError(
            f"features {names!r}: give a tuple of at least one of {', '.join(fns)}, "
            "each once"
        )
    for name in names:
        if name not in fns:
            reason = "" if objective.needs_teacher else " (there is no teacher)"
            raise ValueError(
                f"feature {name!r}: these terms have {', '.join(fns)}{reason}"
            )
    selected = [_average_over_mixup(fns[name]) for name in names]

    def stacked(predictions: Predictions) -> jax.Array:
        return jnp.stack([fn(predictions) for fn in selected], axis=-1)

    return stacked


OUTER = ("hard", "soft", "mix")


def outer_loss(objective: Objective, kind: str) -> PerExampleFn:
    """Returns the loss that learned weights lower on outer data: `predictions -> [B]`.

    Source: arXiv 2605.17839 for the terms of KD; the sum over the terms of any other
    method is this library's.

    Args:
      objective: its distillation terms are the soft loss.
      kind: "hard" for cross-entropy, whatever the objective's own hard term is; "soft"
        for the unweighted sum of the distillation terms; "mix" for the sum of both.

    Raises:
      ValueError: an unknown kind; "soft" or "mix" without distillation terms.
    """
    if kind not in OUTER:
        raise ValueError(f"outer loss {kind!r} must be one of {', '.join(OUTER)}")
    soft = [term.fn for term in objective.terms if term.needs_teacher]
    if kind != "hard" and not soft:
        raise ValueError(
            f"outer loss {kind!r}: none of the terms {', '.join(objective.names)} "
            "distils; give 'hard'"
        )
    hard: list[PerExampleFn] = [_student_cross_entropy]
    fns = {"hard": hard, "soft": soft, "mix": hard + soft}[kind]

    def summed(predictions: Predictions) -> jax.Array:
        return functools.reduce(operator.add, [fn(predictions) for fn in fns])

    return summed


def _student_cross_entropy(p: Predictions) -> jax.Array:
    return losses.cross_entropy(p.student_logits, p.labels)


def _teacher_cross_entropy(p: Predictions) -> jax.Array:
    return losses.cross_entropy(p.require_teacher(), p.labels)
