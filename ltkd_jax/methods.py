"""The table of methods. A method is a sum of per-example loss terms, each with a weight.

To add one: write a function that returns its terms, and decorate it with `@_method`. Its name is then
`config.method.name`, and its keyword arguments are the hyperparameters that a config may set.
"""

# So that help() shows ArrayLike, not all that it stands for
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
    """What the images of a batch are mixed with."""

    labels: jax.Array  # int [B], of the other image
    lam: jax.Array  # float [B], λ: the weight of the image itself


class Predictions(NamedTuple):
    """What a term may look at. `teacher_logits` is None for a method without a teacher."""

    student_logits: jax.Array  # [B, C]
    teacher_logits: jax.Array | None  # [B, C]
    labels: jax.Array  # int [B]
    axis_name: str | None = (
        None  # the device axis over which the batch is spread, if any
    )
    # Of a method that distils features: float [B, H, W, channels] each, the teacher's of the same shapes.
    student_features: tuple[jax.Array, ...] | None = None
    teacher_features: tuple[jax.Array, ...] | None = None
    mixup: Mixup | None = None

    @property
    def teacher(self) -> jax.Array:
        """`teacher_logits`, for a term that distils: a ValueError where there are none."""
        if self.teacher_logits is None:
            raise ValueError(
                "a term that distils needs predictions with teacher_logits"
            )
        return self.teacher_logits


PerExample = Callable[
    [Predictions], jax.Array
]  # its value is [B], or [B, F] of several


def _mixed(fn: PerExample) -> PerExample:
    """Returns a per-example loss of mixed images: its mean over both labels, each weighted as its image."""

    def loss(p: Predictions) -> jax.Array:
        if p.mixup is None:
            return fn(p)
        lam = p.mixup.lam
        return lam * fn(p) + (1.0 - lam) * fn(p._replace(labels=p.mixup.labels))

    return loss


@dataclasses.dataclass(frozen=True)
class Term:
    """One per-example loss: `fn(predictions) -> [B]`, its static weight, whether it needs the teacher, and features."""

    name: str
    fn: PerExample
    weight: float
    distils: bool
    features: bool = False


@dataclasses.dataclass(frozen=True)
class Objective:
    """Named per-example terms with static weights; those that distil are warmed up linearly.

    >>> import jax.numpy as jnp
    >>> objective = create("kd", [500, 50, 5], warmup_steps=10)
    >>> objective.names, objective.weights(5).tolist()
    (('ce', 'kd'), [0.10000000149011612, 0.44999998807907104])
    """

    terms: tuple[Term, ...]
    warmup_steps: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        """Of the terms, in their order."""
        return tuple(term.name for term in self.terms)

    @property
    def needs_teacher(self) -> bool:
        """Whether a term distils."""
        return any(term.distils for term in self.terms)

    @property
    def needs_features(self) -> bool:
        """Whether a term distils features."""
        return any(term.features for term in self.terms)

    def __call__(self, predictions: Predictions) -> jax.Array:
        """All terms of each example, `[B, T]`."""
        return jnp.stack([_mixed(term.fn)(predictions) for term in self.terms], axis=-1)

    def weights(self, step: jax.Array | float) -> jax.Array:
        """Static weights `[T]` at a step: those that distil grow from 0 over `warmup_steps`."""
        warm = jnp.minimum(1.0, step / self.warmup_steps) if self.warmup_steps else 1.0
        return jnp.stack(
            [
                jnp.asarray(term.weight * (warm if term.distils else 1.0))
                for term in self.terms
            ]
        )


def _equal_groups(counts: npt.ArrayLike, num_groups: int) -> ClassGroups:
    """Groups by rank, of equally many classes as far as that goes."""
    if num_groups != int(num_groups) or num_groups < 0:
        raise ValueError(
            f"num_groups={num_groups} must be a whole number; 0 takes the groups as they are given"
        )
    return ClassGroups.from_counts(
        counts, fractions=(1 / num_groups,) * int(num_groups)
    )


class ClassInfo(NamedTuple):
    """What a method may know of the training set."""

    counts: np.ndarray  # float [C], images of each class
    groups: ClassGroups | None  # where the method uses them


_TermsFn = Callable[..., tuple[Term, ...]]  # (info, **hyperparameters)


@dataclasses.dataclass(frozen=True)
class Method:
    """A row of the table of methods.

    Attributes:
      terms_fn: `(ClassInfo, **hyperparameters) -> terms`.
    """

    terms_fn: _TermsFn

    @functools.cached_property
    def example(self) -> Objective:
        """Its objective for three classes: neither the names of its terms nor what they need depend on the classes."""
        counts = np.array([3.0, 2.0, 1.0])
        return Objective(
            self.terms_fn(ClassInfo(counts, ClassGroups.from_counts(counts)))
        )

    @property
    def needs_teacher(self) -> bool:
        """Whether a term distils."""
        return self.example.needs_teacher

    @property
    def needs_features(self) -> bool:
        """Whether a term distils features."""
        return self.example.needs_features


METHODS: dict[str, Method] = {}


def _method(fn: _TermsFn) -> _TermsFn:
    METHODS[fn.__name__] = Method(fn)
    return fn


def _hard(
    name: str, loss: Callable[[jax.Array, jax.Array], jax.Array], weight: float = 1.0
) -> Term:
    return Term(name, lambda p: loss(p.student_logits, p.labels), weight, distils=False)


def _soft(
    name: str, loss: Callable[[jax.Array, jax.Array], jax.Array], weight: float
) -> Term:
    return Term(name, lambda p: loss(p.student_logits, p.teacher), weight, distils=True)


def _balanced_softmax(info: ClassInfo, weight: float = 1.0) -> Term:
    return _hard(
        "balanced_softmax",
        lambda z, y: losses.balanced_softmax(z, y, info.counts),
        weight,
    )


def _ltkd_terms(
    info: ClassInfo, alpha: float, beta: float, temperature: float, num_groups: int
) -> tuple[Term, Term]:
    groups = _equal_groups(info.counts, num_groups) if num_groups else info.groups
    assert groups is not None  # `create` has them made

    def inter(p: Predictions) -> jax.Array:
        return losses.rebalanced_inter_group(
            p.student_logits,
            p.teacher,
            groups,
            temperature=temperature,
            axis_name=p.axis_name,
        )

    def intra(z: jax.Array, teacher: jax.Array) -> jax.Array:
        return losses.uniform_intra_group(z, teacher, groups, temperature=temperature)

    return (Term("inter", inter, alpha, distils=True), _soft("intra", intra, beta))


@_method
def ce(info: ClassInfo) -> tuple[Term, ...]:
    """Cross-entropy."""
    return (_hard("ce", losses.cross_entropy),)


@_method
def balanced_softmax(info: ClassInfo) -> tuple[Term, ...]:
    """Balanced softmax."""
    return (_balanced_softmax(info),)


@_method
def logit_adjusted(info: ClassInfo, *, tau: float = 1.0) -> tuple[Term, ...]:
    """Cross-entropy with logit adjustment."""
    return (
        _hard(
            "logit_adjusted",
            lambda z, y: losses.logit_adjusted(z, y, info.counts, tau=tau),
        ),
    )


@_method
def kd(
    info: ClassInfo,
    *,
    hard_weight: float = 0.1,
    soft_weight: float = 0.9,
    temperature: float = 4.0,
) -> tuple[Term, ...]:
    """Knowledge distillation with mdistiller's weights."""
    soft = _soft(
        "kd", lambda z, t: losses.kd(z, t, temperature=temperature), soft_weight
    )
    return (_hard("ce", losses.cross_entropy, hard_weight), soft)


@_method
def dkd(
    info: ClassInfo, *, alpha: float = 1.0, beta: float = 8.0, temperature: float = 4.0
) -> tuple[Term, ...]:
    """Decoupled distillation: CE + α TCKD + β NCKD."""

    def part(name: str, weight: float, **only: float) -> Term:
        fn = lambda p: losses.dkd(
            p.student_logits, p.teacher, p.labels, temperature=temperature, **only
        )
        return Term(name, fn, weight, distils=True)

    target, rest = (
        part("tckd", alpha, alpha=1.0, beta=0.0),
        part("nckd", beta, alpha=0.0, beta=1.0),
    )
    return (_hard("ce", losses.cross_entropy), target, rest)


@_method
def dive(
    info: ClassInfo,
    *,
    soft_weight: float = 0.5,
    power: float = 0.5,
    temperature: float = 4.0,
) -> tuple[Term, ...]:
    """DiVE: (1−a) balanced softmax + a distillation of the flattened teacher. The default a is our choice."""
    soft = _soft(
        "dive",
        lambda z, t: losses.dive(z, t, power=power, temperature=temperature),
        soft_weight,
    )
    return (_balanced_softmax(info, 1.0 - soft_weight), soft)


@_method
def bkd(
    info: ClassInfo,
    *,
    soft_weight: float = 1.0,
    class_beta: float = 0.9999,
    temperature: float = 4.0,
) -> tuple[Term, ...]:
    """Balanced distillation: CE + a distillation of the class-weighted teacher. The default a is our choice."""
    weights = losses.effective_number_weights(info.counts, beta=class_beta)
    soft = _soft(
        "bkd",
        lambda z, t: losses.bkd(z, t, weights, temperature=temperature),
        soft_weight,
    )
    return (_hard("ce", losses.cross_entropy), soft)


@_method
def wsl(
    info: ClassInfo, *, soft_weight: float = 2.5, temperature: float = 4.0
) -> tuple[Term, ...]:
    """Weighted soft labels."""

    def soft(p: Predictions) -> jax.Array:
        return losses.wsl(
            p.student_logits, p.teacher, p.labels, temperature=temperature
        )

    return (
        _hard("ce", losses.cross_entropy),
        Term("wsl", soft, soft_weight, distils=True),
    )


@_method
def reviewkd(info: ClassInfo, *, feature_weight: float = 5.0) -> tuple[Term, ...]:
    """ReviewKD: CE + a distillation of features, which the student's pass through fusion modules of their own."""

    def feature(p: Predictions) -> jax.Array:
        if p.student_features is None or p.teacher_features is None:
            raise ValueError(
                "reviewkd needs predictions with student_features and teacher_features"
            )
        return losses.hierarchical_context(p.student_features, p.teacher_features)

    return (
        _hard("ce", losses.cross_entropy),
        Term("review", feature, feature_weight, distils=True, features=True),
    )


@_method
def ltkd(
    info: ClassInfo,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    temperature: float = 4.0,
    num_groups: int = 0,
) -> tuple[Term, ...]:
    """LTKD: CE + α rebalanced inter-group + β uniform intra-group. Other than three groups are this library's."""
    return (
        _hard("ce", losses.cross_entropy),
        *_ltkd_terms(info, alpha, beta, temperature, num_groups),
    )


@_method
def ltkd_bs(
    info: ClassInfo,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    temperature: float = 4.0,
    num_groups: int = 0,
) -> tuple[Term, ...]:
    """LTKD's two terms beside balanced softmax in place of cross-entropy; neither paper has it."""
    return (
        _balanced_softmax(info),
        *_ltkd_terms(info, alpha, beta, temperature, num_groups),
    )


# Hyperparameters that are a term's static weight and nothing else: weights that are learned replace them.
STATIC_WEIGHTS = ("hard_weight", "soft_weight", "feature_weight", "alpha", "beta")


def hyperparameters(method: str, *, learned_weights: bool = False) -> dict[str, float]:
    """The hyperparameters of a method and their defaults; those of its terms alone where the weights are learned.

    >>> hyperparameters("wsl"), hyperparameters("wsl", learned_weights=True)
    ({'soft_weight': 2.5, 'temperature': 4.0}, {'temperature': 4.0})
    """
    parameters = inspect.signature(_lookup(method).terms_fn).parameters
    found = {
        name: p.default for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY
    }
    return {
        name: value
        for name, value in found.items()
        if not (learned_weights and name in STATIC_WEIGHTS)
    }


def create(
    method: str,
    class_counts: npt.ArrayLike,
    groups: ClassGroups | None = None,
    *,
    warmup_steps: int = 0,
    **values: float,
) -> Objective:
    """The objective of a method, for a training set with these class counts.

    Args:
      method: a row of `METHODS`.
      class_counts: `[C]` training images of each class, positive.
      groups: the groups of LTKD; head / medium / tail by rank if not given.
      warmup_steps: steps over which the distillation terms grow linearly to their weight.
      **values: hyperparameters of the method, see `hyperparameters(method)`.

    Raises:
      ValueError: an unknown method or hyperparameter; groups of another number of classes.

    >>> create("ltkd", [500, 50, 5], alpha=2.0).names
    ('ce', 'inter', 'intra')
    """
    known = hyperparameters(method)
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(
            f"method {method!r} has no hyperparameter {unknown[0]!r}; it has {sorted(known)}"
        )
    if warmup_steps < 0:
        raise ValueError(f"warmup_steps={warmup_steps} must not be negative")
    counts = check_counts(class_counts)
    if groups is None and method.startswith("ltkd"):
        groups = ClassGroups.from_counts(counts)
    if groups is not None and len(groups.assignment) != len(counts):
        raise ValueError(
            f"the groups are of {len(groups.assignment)} classes, class_counts of {len(counts)}"
        )
    return Objective(
        METHODS[method].terms_fn(ClassInfo(counts, groups), **values), warmup_steps
    )


def features(objective: Objective, names: Sequence[str]) -> PerExample:
    """Per-example losses as the input of a weight net: `predictions -> [B, F]`.

    Args:
      objective: whose terms may be named.
      names: each a term of the objective, "student_ce", or, where there is a teacher, "teacher_ce". The
        paper's (arXiv 2605.17839) are ("student_ce", "teacher_ce").

    Raises:
      ValueError: no name, one twice, or one that the objective does not have.

    >>> features(create("ce", [5, 3, 1]), ("student_ce", "teacher_ce"))
    Traceback (most recent call last):
    ...
    ValueError: feature 'teacher_ce': these terms have student_ce, ce (there is no teacher)
    """
    known: dict[str, PerExample] = {
        "student_ce": lambda p: losses.cross_entropy(p.student_logits, p.labels)
    }
    if objective.needs_teacher:
        known["teacher_ce"] = lambda p: losses.cross_entropy(p.teacher, p.labels)
    known |= {term.name: term.fn for term in objective.terms}
    without = "" if objective.needs_teacher else " (there is no teacher)"
    if isinstance(names, str) or not names or len(set(names)) < len(names):
        raise ValueError(
            f"features {names!r}: give a tuple of at least one of {', '.join(known)}, each once"
        )
    for name in names:
        if name not in known:
            raise ValueError(
                f"feature {name!r}: these terms have {', '.join(known)}{without}"
            )
    return lambda predictions: jnp.stack(
        [_mixed(known[name])(predictions) for name in names], axis=-1
    )


OUTER = ("hard", "soft", "mix")


def outer_loss(objective: Objective, kind: str) -> PerExample:
    """The loss on balanced images that learned weights are to lower: `predictions -> [B]`.

    Source: arXiv 2605.17839 for KD's terms; the sum over any method's terms is this library's.

    Args:
      objective: whose terms make the soft loss.
      kind: "hard", cross-entropy whatever the objective's own hard term; "soft", the sum of the terms that distil;
        or "mix", the sum of both.

    Raises:
      ValueError: an unknown kind; "soft" or "mix" where no term distils.
    """
    soft = [term.fn for term in objective.terms if term.distils]
    if kind not in OUTER:
        raise ValueError(f"outer loss {kind!r} must be one of {', '.join(OUTER)}")
    if kind != "hard" and not soft:
        raise ValueError(
            f"outer loss {kind!r}: none of the terms {', '.join(objective.names)} distils; give 'hard'"
        )
    hard: list[PerExample] = [
        lambda p: losses.cross_entropy(p.student_logits, p.labels)
    ]
    parts = {"hard": hard, "soft": soft, "mix": hard + soft}[kind]
    return lambda predictions: functools.reduce(
        operator.add, (part(predictions) for part in parts)
    )


def _lookup(method: str) -> Method:
    if method not in METHODS:
        raise ValueError(names.unknown("method", method, METHODS))
    return METHODS[method]
