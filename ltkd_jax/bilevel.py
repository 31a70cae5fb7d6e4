"""Bilevel weighting: a weight net for every example and loss term, trained by what its weights do to an outer loss.

With l_it(θ) the T loss terms of example i, and w(φ, features) the weight net, the inner loss is

    L(θ, φ) = (1/B) Σ_i Σ_t w_it(φ) · l_it(θ),

a virtual step is θ' = θ − η ∇_θ L(θ, φ), and φ descends the outer loss of the θ' that K virtual steps lead to. The
features carry no gradient, so L is linear in the weights.

Everything here takes plain callables and pytrees: no model, no loss, no config. Under `pmap` or `shard_map` give
`Problem.axis_name`; under `jit` with sharded batches leave it None.

Source: Nguyen, Phan and Ta, "Balancing Knowledge Distillation for Imbalance Learning with Bilevel Optimization",
arXiv 2605.17839, for K = 1; the K-step form is this library's.
"""

from __future__ import annotations  # so that help() shows ArrayLike, not all that it stands for

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

PyTree = Any


class Aux(NamedTuple):
    """What the terms' forward also yields; nothing of it is differentiated.

    Attributes:
      features: `[B, F]`, the weight net's input.
      extra: any pytree, such as new batch statistics.
    """

    features: jax.Array
    extra: PyTree = None


@dataclasses.dataclass(frozen=True)
class Problem:
    """The two levels as callables.

    Attributes:
      terms_fn: `(params, batch) -> (terms [B, T], Aux)`, the per-example loss terms.
      outer_fn: `(params, outer batch) -> scalar`, the loss that the weights are to lower; local, not yet averaged
        over devices.
      weight_fn: `(meta_params, features [B, F]) -> weights [B, T]`.
      axis_name: the device axis over which batches are spread, if it has a name.
    """

    terms_fn: Callable[[PyTree, PyTree], tuple[jax.Array, Aux]]
    outer_fn: Callable[[PyTree, PyTree], jax.Array]
    weight_fn: Callable[[PyTree, jax.Array], jax.Array]
    axis_name: str | None = None


class MetaState(NamedTuple):
    """The weight net's parameters, its optimizer's state, and the gradients gathered since its last update."""

    params: PyTree
    opt_state: PyTree
    gradients: PyTree  # their sum
    count: jax.Array  # type: ignore[assignment]  # how many; it hides tuple.count


class Step(NamedTuple):
    """What one outer iteration yields.

    Attributes:
      gradient: of the inner loss by `params`, with the weights of the new weight net: what the real update takes.
      meta: the new `MetaState`.
      terms, aux: of the batch at `params`, as `terms_fn` gives them.
      weights: `[B, T]`, of the new weight net.
      outer_loss: after the virtual steps.
    """

    gradient: PyTree
    meta: MetaState
    terms: jax.Array
    aux: Aux
    weights: jax.Array
    outer_loss: jax.Array


def init(meta_params: PyTree, optimizer: optax.GradientTransformation) -> MetaState:
    """The state of a fresh weight net."""
    zeros = jax.tree.map(jnp.zeros_like, meta_params)
    return MetaState(meta_params, optimizer.init(meta_params), zeros, jnp.zeros((), jnp.int32))


def gather(meta: MetaState, gradient: PyTree) -> MetaState:
    """The state with one more gradient of the weight net in it."""
    return meta._replace(gradients=jax.tree.map(jnp.add, meta.gradients, gradient), count=meta.count + 1)


def update(meta: MetaState, optimizer: optax.GradientTransformation) -> MetaState:
    """The state after the optimizer's step on the mean of the gradients gathered, of which there is at least one."""
    mean = jax.tree.map(lambda total: total / meta.count.astype(total.dtype), meta.gradients)
    updates, opt_state = optimizer.update(mean, meta.opt_state, meta.params)
    zeros = jax.tree.map(jnp.zeros_like, mean)
    return MetaState(optax.apply_updates(meta.params, updates), opt_state, zeros, jnp.zeros_like(meta.count))


def step(
    problem: Problem,
    params: PyTree,
    meta: MetaState,
    batches: PyTree,
    outer_batch: PyTree,
    learning_rate: jax.Array | float,
    *,
    optimizer: optax.GradientTransformation,
    every: int = 1,
    changes: bool | None = None,
    unroll: bool = False,
) -> Step:
    """One outer iteration: look ahead, gather the weight net's gradient, every k-th time update it, and weigh.

    The weight net's gradient is that of the outer loss after K virtual steps of plain SGD over `batches`; every
    `every` iterations the optimizer takes one step on the mean of those gathered. The student's gradient is that of
    the first batch with the weights of the net as it then is. For K = 1 both share one linearisation, and the
    student's backward is that of the virtual step unless the weight net has changed.

    Source: arXiv 2605.17839, its algorithm ("multi-step SGD": every = 5 for CIFAR-100, 1 for CIFAR-10).

    Args:
      problem: the two levels.
      params, meta: of the student and of the weight net.
      batches: a pytree with leading axis `[K, …]`: this iteration's batch and the K − 1 that come next.
      outer_batch: a batch of the balanced set.
      learning_rate: η of the virtual steps, the student's current one.
      optimizer: of the weight net.
      every: k >= 1, a Python number, not traced.
      changes: True or False, not traced: whether this call is the k-th since the last update. None asks `meta.count`
        on the device; a caller who knows spares it the branch, inside of which XLA's convolutions are many times slower
        on CPU.
      unroll: as `lookahead`.

    Raises:
      ValueError: k < 1, K < 1, terms that are not `[B, T]`, or weights of another shape than the terms.

    >>> import jax, jax.numpy as jnp, optax
    >>> def terms_fn(params, batch):  # two terms of a linear model
    ...     errors = batch["x"] @ params - batch["y"]
    ...     return jnp.stack([errors**2, jnp.abs(errors)], axis=-1), Aux(errors[:, None])
    >>> problem = Problem(
    ...     terms_fn,
    ...     outer_fn=lambda params, batch: jnp.mean((batch["x"] @ params - batch["y"]) ** 2),
    ...     weight_fn=lambda meta, features: jax.nn.sigmoid(features * meta[None, :]))
    >>> optimizer = optax.adam(0.1)
    >>> batch = {"x": jnp.eye(3), "y": jnp.arange(3.0)}
    >>> taken = step(problem, jnp.zeros(3), init(jnp.zeros(2), optimizer), jax.tree.map(lambda x: x[None], batch),
    ...              batch, 0.1, optimizer=optimizer)
    >>> taken.weights.shape, (taken.meta.params < 0).tolist()  # errors are negative here: large ones now weigh more
    ((3, 2), [True, True])
    """
    if not isinstance(every, int) or every < 1:
        raise ValueError(f"every={every!r}: the weight net is updated every k iterations, a whole number >= 1")
    ahead = _length(batches)

    def taken(changes: bool) -> Step:
        terms, aux, slopes_along, gradient_of = _linearize(problem, params, jax.tree.map(lambda x: x[0], batches))

        def weigh(meta_params: PyTree) -> jax.Array:
            return _weigh(problem, meta_params, terms, aux)

        if ahead == 1:
            weights, by_meta = jax.vjp(weigh, meta.params)
            gradient = gradient_of(weights)
            outer_loss, direction = _outer_gradient(problem, _descend(params, gradient, learning_rate), outer_batch)
            slopes = slopes_along(direction)  # of every term of every example: ⟨v, ∇l_it⟩
            (hyper,) = by_meta((-learning_rate / len(terms) * slopes).astype(weights.dtype))
            hyper = _average(hyper, problem.axis_name)
        else:
            outer_loss, hyper = hypergradient(
                problem, params, meta.params, batches, outer_batch, learning_rate, unroll=unroll
            )
        after = gather(meta, hyper)
        after = update(after, optimizer) if changes else after
        if changes or ahead > 1:
            weights = weigh(after.params)
            gradient = gradient_of(weights)
        return Step(gradient, after, terms, aux, weights, outer_loss)

    if changes is None and every == 1:
        changes = True
    if changes is not None:
        return taken(changes)
    # The whole iteration is in the branch: what a linearisation keeps would cost more to carry into one.
    return jax.lax.cond(meta.count >= every - 1, lambda: taken(True), lambda: taken(False))


def hypergradient(
    problem: Problem,
    params: PyTree,
    meta_params: PyTree,
    batches: PyTree,
    outer_batch: PyTree,
    learning_rate: jax.Array | float,
    *,
    unroll: bool = False,
) -> tuple[jax.Array, PyTree]:
    """The outer loss after K virtual steps and its gradient by the weight net, by `jax.grad` through them.

    Args:
      problem, params, meta_params, batches, outer_batch, learning_rate, unroll: as `lookahead`.

    Returns:
      (outer loss, gradient), averaged over devices.

    Raises:
      ValueError: as `lookahead`.

    One step on w · θ²/2 from θ = 1 leads to 1 − ηw, where the outer loss θ²/2 has the slope −η (1 − ηw) by w:

    >>> problem = Problem(
    ...     terms_fn=lambda theta, batch: (0.5 * theta**2 * batch[:, None], Aux(batch[:, None])),
    ...     outer_fn=lambda theta, batch: 0.5 * theta**2,
    ...     weight_fn=lambda w, features: w * features)
    >>> outer_loss, slope = hypergradient(problem, jnp.float32(1), jnp.float32(1), jnp.ones((1, 1)), None, 0.1)
    >>> round(float(outer_loss), 4), round(float(slope), 4)
    (0.405, -0.09)
    """
    outer_loss, gradient = jax.value_and_grad(lookahead, argnums=2)(
        problem, params, meta_params, batches, outer_batch, learning_rate, unroll=unroll
    )
    return _average((outer_loss, gradient), problem.axis_name)


def lookahead(
    problem: Problem,
    params: PyTree,
    meta_params: PyTree,
    batches: PyTree,
    outer_batch: PyTree,
    learning_rate: jax.Array | float,
    *,
    unroll: bool = False,
) -> jax.Array:
    """The outer loss after K virtual steps, θ_{j+1} = θ_j − η ∇_θ L(θ_j, φ; batch j), features anew at each θ_j.

    Args:
      problem: the two levels.
      params: θ_0.
      meta_params: φ; gradients by it go through all K steps.
      batches: a pytree with leading axis `[K, …]`.
      outer_batch: what `outer_fn` takes.
      learning_rate: η, the same for all K.
      unroll: written out instead of scanned. The scan recomputes each step's forward in the backward pass, so
        that memory hardly grows with K; on CPU XLA's convolutions are many times slower inside it.

    Returns:
      This device's outer loss.

    Raises:
      ValueError: K < 1, or weights of another shape than the terms.
    """

    def inner_loss(params: PyTree, batch: PyTree) -> jax.Array:
        terms, aux = problem.terms_fn(params, batch)
        return jnp.mean(jnp.sum(_weigh(problem, meta_params, terms, aux) * terms, axis=-1))

    def virtual_step(params: PyTree, batch: PyTree) -> tuple[PyTree, None]:
        gradient = _average(jax.grad(inner_loss)(params, batch), problem.axis_name)
        return _descend(params, gradient, learning_rate), None

    ahead = _length(batches)
    if unroll:
        for j in range(ahead):
            params, _ = virtual_step(params, jax.tree.map(lambda x, j=j: x[j], batches))
    else:
        params, _ = jax.lax.scan(jax.checkpoint(virtual_step), params, batches)
    return problem.outer_fn(params, outer_batch)


def _linearize(
    problem: Problem, params: PyTree, batch: PyTree
) -> tuple[jax.Array, Aux, Callable[[PyTree], jax.Array], Callable[[jax.Array], PyTree]]:
    """The terms at `params`, and of their one linearisation: slopes along a direction, gradient of weighted terms."""
    terms, along, aux = jax.linearize(lambda params: problem.terms_fn(params, batch), params, has_aux=True)
    back = jax.linear_transpose(along, params)

    def gradient_of(weights: jax.Array) -> PyTree:
        (gradient,) = back((weights / len(terms)).astype(terms.dtype))
        return _average(gradient, problem.axis_name)

    return terms, aux, along, gradient_of


def _weigh(problem: Problem, meta_params: PyTree, terms: jax.Array, aux: Aux) -> jax.Array:
    if terms.ndim != 2 or not isinstance(aux, Aux):
        raise ValueError(
            f"terms_fn gives terms of shape {terms.shape} and {type(aux).__name__}: it must give terms [B, T] and an "
            "Aux, of one batch; batches are stacked, [K, B, …], for K = 1 too"
        )
    weights = problem.weight_fn(meta_params, jax.lax.stop_gradient(aux.features))
    if weights.shape != terms.shape:
        raise ValueError(
            f"weight_fn gives weights of shape {weights.shape} for terms of shape {terms.shape}: "
            f"it must give one weight for each of the {terms.shape[-1]} terms of an example"
        )
    return weights


def _outer_gradient(problem: Problem, params: PyTree, outer_batch: PyTree) -> tuple[jax.Array, PyTree]:
    """The outer loss and its gradient by the student. Averaged here, before any product with a local Jacobian."""
    return _average(jax.value_and_grad(problem.outer_fn)(params, outer_batch), problem.axis_name)


def _descend(params: PyTree, gradient: PyTree, learning_rate: jax.Array | float) -> PyTree:
    # A learning rate that is an array must not widen the parameters.
    return jax.tree.map(lambda p, g: (p - learning_rate * g).astype(p.dtype), params, gradient)


def _average(tree: PyTree, axis_name: str | None) -> PyTree:
    return tree if axis_name is None else jax.lax.pmean(tree, axis_name)


def _length(batches: PyTree) -> int:
    lengths = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(batches)}
    if len(lengths) != 1 or lengths <= {(0,), ()}:
        found = ", ".join(str(length[0]) if length else "none" for length in sorted(lengths))
        raise ValueError(f"batches: leading axes {found}; give K >= 1 batches, stacked, [K, B, …]")
    return lengths.pop()[0]
