"""The library as its users write it.

test_packaging runs it, and checks it by `mypy --strict` against the installed wheel.
Every call in `misuse` is wrong, and mypy must reject it: it reports an ignore that is
not needed.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import ltkd_jax
from ltkd_jax import bilevel, groups, losses, methods, metrics, models

Params = dict[str, jax.Array]
Batch = dict[str, jax.Array]


def mean_loss(
    student_logits: jax.Array, teacher_logits: np.ndarray, labels: np.ndarray
) -> jax.Array:
    """The README's first example; the teacher's logits come from disk."""
    g = groups.ClassGroups.from_counts(
        [500, 300, 100, 50, 20, 10], names=["many", "some", "few"]
    )
    loss = losses.cross_entropy(student_logits, labels)
    loss += losses.ltkd(
        student_logits, teacher_logits, g, alpha=1, beta=jnp.float32(1), temperature=4.0
    )
    class_counts = np.array([9, 8, 7, 6, 5, 4])
    loss += ltkd_jax.losses.balanced_softmax(student_logits, labels, class_counts)
    return loss.mean()


def terms_fn(params: Params, batch: Batch) -> tuple[jax.Array, bilevel.Aux]:
    error = batch["x"] @ params["w"] - batch["y"]
    terms = jnp.stack([error**2, jnp.abs(error)], axis=-1)
    return terms, bilevel.Aux(features=terms)


def outer_fn(params: Params, batch: Batch) -> jax.Array:
    return jnp.mean((batch["x"] @ params["w"] - batch["y"]) ** 2)


def weight_fn(meta_params: jax.Array, features: jax.Array) -> jax.Array:
    return jax.nn.sigmoid(features @ meta_params)


def learned_weights(batch: Batch) -> jax.Array:
    """A step of `bilevel` over custom terms."""
    problem = bilevel.Problem(terms_fn, outer_fn, weight_fn)
    optimizer = optax.adam(1e-3)
    result = bilevel.step(
        problem,
        {"w": jnp.zeros(3)},
        bilevel.init(jnp.zeros((2, 2)), optimizer),
        jax.tree.map(lambda x: x[None], batch),
        batch,
        jnp.float32(0.1),
        optimizer=optimizer,
        update_every=2,
    )
    return result.weights


def confidence(predictions: methods.Predictions) -> jax.Array:
    return -jax.nn.log_softmax(predictions.student_logits).max(axis=-1)


def custom_objective(
    student: jax.Array, teacher: jax.Array, labels: jax.Array
) -> jax.Array:
    """A method of the table with a custom term, and its static weights."""
    kd = methods.create("kd", [5, 3, 1], warmup_steps=10, temperature=2.0)
    term = methods.Term("confidence", confidence, 0.1, needs_teacher=False)
    objective = methods.Objective((*kd.terms, term))
    predictions = methods.Predictions(student, teacher, labels)
    weighted = objective(predictions) * objective.weights(0)[None, :]
    soft = losses.kd(predictions.student_logits, predictions.require_teacher())
    return weighted.sum(axis=-1) + soft


def evaluate(images: jax.Array, labels: jax.Array) -> dict[str, float]:
    """The group masses of a model on one batch."""
    model = models.create("resnet8", num_classes=3)
    variables = model.init(jax.random.key(0), images, train=False)
    logits, features, _ = models.apply_with_features(
        model, variables, images, train=False
    )
    assert features["pooled"].ndim == 2
    sums = metrics.eval_sums(logits, labels, jnp.ones(len(labels), bool))
    return metrics.group_mass(sums, groups.ClassGroups.from_assignment([0, 0, 1]))


def misuse(logits: jax.Array, g: groups.ClassGroups) -> None:
    """Each line is wrong; it is never run."""
    losses.ltkd(logits, logits, "head")  # type: ignore[arg-type]
    losses.ltkd(logits, logits, g, 4.0)  # type: ignore[call-arg]
    losses.ltkd(logits, logits)  # type: ignore[call-arg]
    losses.kd(logits, logits, temprature=4.0)  # type: ignore[call-arg]
    losses.kd(logits, logits, temperature="4")  # type: ignore[arg-type]
    losses.cross_entropy(logits, None)  # type: ignore[arg-type]
    _ = losses.group_kl(logits, logits, g).mass  # type: ignore[attr-defined]
    _ = ltkd_jax.loses  # type: ignore[attr-defined]
    groups.ClassGroups.from_counts([5, 3, 1], names="abc")  # type: ignore[arg-type]
    g.num_groups = 3  # type: ignore[misc]
    bilevel.Problem(terms_fn, outer_fn)  # type: ignore[call-arg]
    bilevel.Problem(outer_fn, outer_fn, weight_fn)  # type: ignore[arg-type]
    methods.Term("kd", losses.kd, 1.0, needs_teacher=True)  # type: ignore[arg-type]
    methods.create("kd", None)  # type: ignore[arg-type]
    models.create("resnet8", "100")  # type: ignore[arg-type]
    # Results are typed, not Any.
    number: int = losses.kd(logits, logits)  # type: ignore[assignment]
    optimizer = optax.sgd(1.0)
    problem = bilevel.Problem(terms_fn, outer_fn, weight_fn)
    meta = bilevel.init({}, optimizer)
    result = bilevel.step(problem, {}, meta, {}, {}, 0.1, optimizer=optimizer)
    text: str = result  # type: ignore[assignment]
    print(number, text)
