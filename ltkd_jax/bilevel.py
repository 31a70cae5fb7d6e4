"""Bilevel weighting: a weight net learns to weigh the loss terms of each example.

With l_it(θ) the T loss terms of example i, and w_it(φ) the weights that the weight net
gives them, the inner loss of a batch of B examples is

    L(θ, φ) = (1/B) Σ_i Σ_t w_it(φ) · l_it(θ).

A virtual step is θ' = θ − η ∇_θ L(θ, φ). The weight net descends the outer loss, on
balanced data, of the θ' that K virtual steps lead to. Its input, the features, carries
no gradient to θ, so that ∇_θ L is linear in the weights.

All functions take plain callables and pytrees of arrays: no model, no loss and no
config. Under `pmap` or `shard_map`, set `Problem.axis_name`; under `jit` with sharded
batches, leave it None.

Source: Nguyen, Phan and Ta, "Balancing Knowledge Distillation for Imbalance Learning
with Bilevel Optimization", arXiv 2605.17839, for K = 1; the K-step form is this
library's.
"""

# So that help() shows ArrayLike, not all that it stands for.
from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

PyTree = Any
AxisName = str | tuple[str, ...] | None


class Aux(NamedTuple):
    """What `Problem.terms_fn` returns beside the terms; it is not differentiated.

    Attributes:
      features: `[B, F]`, the weight net's input.
      extra: any pytree, such as new batch statistics.
    """

    features: jax.Array
    extra: PyTree = None


@dataclasses.dataclass(frozen=True)
class Problem:
    """Defines the two levels by callables.

    Attributes:
      terms_fn: `(params, batch) -> (terms [B, T], Aux)`, the loss terms per example.
      outer_fn: `(params, outer batch) -> scalar`, the loss that the weights shall
        lower. It averages over this device's batch only.
      weight_fn: `(meta_params, features [B, F]) -> weights [B, T]`.
      axis_name: name of the device axis (or axes) over which batches are split, if any.
    """

    terms_fn: Callable[[PyTree, PyTree], tuple[jax.Array, Aux]]
    outer_fn: Callable[[PyTree, PyTree], jax.Array]
    weight_fn: Callable[[PyTree, jax.Array], jax.Array]
    axis_name: AxisName = None


class MetaState(NamedTuple):
    """The weight net's state.

    Attributes:
      params: φ, its parameters.
      opt_state: its optimizer's state.
      grad_sum: sum of the gradients accumulated since its last update.
      num_grads: int scalar, how many gradients that is.
    """

    params: PyTree
    opt_state: PyTree
    grad_sum: PyTree
    num_grads: jax.Array


class StepResult(NamedTuple):
    """The result of one outer iteration.

    Attributes:
      gradient: of the inner loss with respect to `params`, under the weights of the
        updated weight net. The student's optimizer takes it.
      meta: the weight net's new state.
      terms: `[B, T]`, the loss terms at `params`.
      aux: what `terms_fn` returned beside them.
      weights: `[B, T]`, from the updated weight net.
      outer_loss: scalar, after the virtual steps.
    """

    gradient: PyTree
    meta: MetaState
    terms: jax.Array
    aux: Aux
    weights: jax.Array
    outer_loss: jax.Array


def init(meta_params: PyTree, optimizer: optax.GradientTransformation) -> MetaState:
    """Returns the state of a new weight net.

    Args:
      meta_params: φ.
      optimizer: of the weight net.
    """
    return MetaState(
        params=meta_params,
        opt_state=optimizer.init(meta_params),
        grad_sum=jax.tree.map(jnp.zeros_like, meta_params),
        num_grads=jnp.zeros((), jnp.int32),
    )


def accumulate(meta: MetaState, gradient: PyTree) -> MetaState:
    """Returns the state with one more gradient of the weight net added to its sum."""
    grad_sum = jax.tree.map(jnp.add, meta.grad_sum, gradient)
    return meta._replace(grad_sum=grad_sum, num_grads=meta.num_grads + 1)


def update(meta: MetaState, optimizer: optax.GradientTransformation) -> MetaState:
    """Returns the state after one optimizer step on the mean accumulated gradient.

    The sum restarts from zero. The mean of no gradients is taken as zero.
    """
    num_grads = jnp.maximum(meta.num_grads, 1)
    mean = jax.tree.map(
        lambda total: total / num_grads.astype(total.dtype), meta.grad_sum
    )
    updates, opt_state = optimizer.update(mean, meta.opt_state, meta.params)
    return MetaState(
        params=optax.apply_updates(meta.params, updates),
        opt_state=opt_state,
        grad_sum=jax.tree.map(jnp.zeros_like, mean),
        num_grads=jnp.zeros_like(meta.num_grads),
    )


def step(
    problem: Problem,
    params: PyTree,
    meta: MetaState,
    batches: PyTree,
    outer_batch: PyTree,
    learning_rate: jax.Array | float,
    *,
    optimizer: optax.GradientTransformation,
    update_every: int = 1,
    update_weight_net: bool | None = None,
    unroll: bool = False,
) -> StepResult:
    """Computes one outer iteration: the weight net's gradient, then the student's.

    1. Look ahead: take K virtual steps of plain SGD over `batches`, and differentiate
       the outer loss at their end with respect to the weight net's parameters.
    2. Accumulate that gradient. Every `update_every` iterations, update the weight net
       with the mean of the accumulated gradients.
    3. Compute the student's gradient at `params` on the first batch, with the weights
       that the weight net gives after 2.

    For K = 1, steps 1 and 3 share one linearization of the terms. If the weight net was
    not updated, the gradient of the virtual step is the student's gradient.

    Source: arXiv 2605.17839, its algorithm ("multi-step SGD": `update_every` is 5 for
    CIFAR-100 and 1 for CIFAR-10).

    Args:
      problem: the two levels.
      params: θ, of the student.
      meta: state of the weight net.
      batches: a pytree with leading axes `[K, B]`: the batch of this iteration, and the
        K − 1 that follow it.
      outer_batch: a batch of the balanced set.
      learning_rate: η of the virtual steps, which are plain SGD whatever the student's
        optimizer is. For SGD, pass its current learning rate. For Adam and its kind, it
        must be chosen: about the rate at which plain SGD would move the parameters as
        far in one step.
      optimizer: of the weight net.
      update_every: k, a Python int >= 1.
      update_weight_net: a Python bool, whether this iteration updates the weight net.
        With None the device decides by `meta.num_grads`, in a branch. A caller who
        counts iterations anyway should pass it: XLA compiles convolutions inside a
        branch to much slower code on CPU.
      unroll: see `lookahead`.

    Returns:
      A `StepResult`, averaged over devices where `problem.axis_name` is set.

    Raises:
      ValueError: k < 1, K < 1, terms that are not `[B, T]`, or weights whose shape
        differs from the terms'.

    >>> import jax, jax.numpy as jnp, optax
    >>> def terms_fn(params, batch):  # two terms of a linear model
    ...     errors = batch["x"] @ params - batch["y"]
    ...     terms = jnp.stack([errors**2, jnp.abs(errors)], axis=-1)
    ...     return terms, Aux(features=errors[:, None])
    >>> def outer_fn(params, batch):
    ...     return jnp.mean((batch["x"] @ params - batch["y"]) ** 2)
    >>> def weight_fn(meta_params, features):
    ...     return jax.nn.sigmoid(features * meta_params[None, :])
    >>> problem = Problem(terms_fn, outer_fn, weight_fn)
    >>> optimizer = optax.adam(0.1)
    >>> batch = {"x": jnp.eye(3), "y": jnp.arange(3.0)}
    >>> batches = jax.tree.map(lambda x: x[None], batch)  # K = 1
    >>> meta = init(jnp.zeros(2), optimizer)
    >>> result = step(
    ...     problem, jnp.zeros(3), meta, batches, batch, 0.1, optimizer=optimizer)
    >>> result.weights.shape
    (3, 2)
    >>> (result.meta.params < 0).tolist()  # all errors are negative: weights now grow
    [True, True]
    """
    if not isinstance(update_every, int) or update_every < 1:
        raise ValueError(
            f"update_every={update_every!r}: the weight net is updated every k "
            "iterations, a whole number >= 1"
        )
    num_lookahead = _num_batches(batches)
    params = _as_own(params, problem.axis_name)

    def iterate(update_weight_net: bool) -> StepResult:
        first_batch = jax.tree.map(lambda x: x[0], batches)
        inner = _linearize(problem, params, first_batch)
        if num_lookahead == 1:
            weights, gradient, outer_loss, hypergrad = _look_one_step_ahead(
                problem, inner, params, meta.params, outer_batch, learning_rate
            )
        else:
            outer_loss, hypergrad = hypergradient(
                problem,
                params,
                meta.params,
                batches,
                outer_batch,
                learning_rate,
                unroll=unroll,
            )
        new_meta = accumulate(meta, hypergrad)
        if update_weight_net:
            new_meta = update(new_meta, optimizer)
        # Else K = 1 and the weight net is unchanged: the virtual step's are the same.
        if update_weight_net or num_lookahead > 1:
            weights = _weigh(problem, new_meta.params, inner.terms, inner.aux)
            gradient = inner.weighted_grad(weights)
        return StepResult(
            gradient, new_meta, inner.terms, inner.aux, weights, outer_loss
        )

    if update_weight_net is None and update_every == 1:
        update_weight_net = True
    if update_weight_net is not None:
        return iterate(update_weight_net)
    # `meta` does not count this iteration's gradient yet. The whole iteration is in the
    # branch: to pass a linearization into one would copy all of its residuals.
    return jax.lax.cond(
        meta.num_grads >= update_every - 1,
        lambda: iterate(True),
        lambda: iterate(False),
    )


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
    """Computes the outer loss after K virtual steps, and its gradient w.r.t. φ.

    This is `jax.grad` of `lookahead`, through all K steps.

    Args:
      problem, params, meta_params, batches, outer_batch, learning_rate, unroll: see
        `lookahead`.

    Returns:
      (outer loss, gradient), averaged over devices where `problem.axis_name` is set.

    Raises:
      ValueError: see `lookahead`.

    One step on w · θ²/2 from θ = 1 leads to 1 − ηw. There the outer loss θ²/2 has the
    derivative −η (1 − ηw) with respect to w:

    >>> problem = Problem(
    ...     terms_fn=lambda theta, x: (0.5 * theta**2 * x[:, None], Aux(x[:, None])),
    ...     outer_fn=lambda theta, _: 0.5 * theta**2,
    ...     weight_fn=lambda w, features: w * features)
    >>> one = jnp.float32(1)
    >>> batches = jnp.ones((1, 1))  # K = 1, B = 1
    >>> outer_loss, slope = hypergradient(problem, one, one, batches, None, 0.1)
    >>> round(float(outer_loss), 4), round(float(slope), 4)
    (0.405, -0.09)
    """
    outer_loss, gradient = jax.value_and_grad(lookahead, argnums=2)(
        problem,
        params,
        _as_own(meta_params, problem.axis_name),
        batches,
        outer_batch,
        learning_rate,
        unroll=unroll,
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
    """Computes the outer loss after K virtual steps of plain SGD.

        θ_{j+1} = θ_j − η ∇_θ L(θ_j, φ; batch j)

    The weight net sees the features at each θ_j.

    Args:
      problem: the two levels.
      params: θ_0.
      meta_params: φ. Gradients with respect to it go through all K steps.
      batches: a pytree with leading axes `[K, B]`.
      outer_batch: passed to `problem.outer_fn`.
      learning_rate: η, the same for all K steps.
      unroll: write the K steps out instead of scanning over them. The scan recomputes
        each step's forward pass in the backward pass, so its memory hardly grows with
        K. XLA compiles convolutions inside a scan to much slower code on CPU.

    Returns:
      Scalar, the outer loss of this device. For its average over devices and the
      gradient of that, call `hypergradient`.

    Raises:
      ValueError: K < 1, or weights whose shape differs from the terms'.
    """

    def inner_loss(params: PyTree, batch: PyTree) -> jax.Array:
        terms, aux = problem.terms_fn(params, batch)
        weights = _weigh(problem, meta_params, terms, aux)
        return jnp.mean(jnp.sum(weights * terms, axis=-1))

    def virtual_step(params: PyTree, batch: PyTree) -> tuple[PyTree, None]:
        gradient = jax.grad(inner_loss)(params, batch)
        gradient = _average(gradient, problem.axis_name)
        return _descend(params, gradient, learning_rate), None

    num_lookahead = _num_batches(batches)
    params = _as_own(params, problem.axis_name)
    if unroll:
        for j in range(num_lookahead):
            batch = jax.tree.map(lambda x, j=j: x[j], batches)
            params, _ = virtual_step(params, batch)
    else:
        params, _ = jax.lax.scan(jax.checkpoint(virtual_step), params, batches)
    return problem.outer_fn(params, outer_batch)


class _Linearization(NamedTuple):
    """The loss terms of a batch at θ, with their Jacobian J `[B, T, params]` as maps.

    Attributes:
      terms: `[B, T]`.
      aux: what `terms_fn` returned beside them.
      jvp: v ↦ J v `[B, T]`, the derivative of every term along v.
      weighted_grad: w `[B, T]` ↦ (1/B) Jᵀ w, the gradient of the inner loss under the
        weights w, averaged over devices.
    """

    terms: jax.Array
    aux: Aux
    jvp: Callable[[PyTree], jax.Array]
    weighted_grad: Callable[[jax.Array], PyTree]


def _linearize(problem: Problem, params: PyTree, batch: PyTree) -> _Linearization:
    """Returns the linearization at `params`.

    A single forward pass serves all products with J.
    """
    terms, jvp, aux = jax.linearize(
        lambda params: problem.terms_fn(params, batch), params, has_aux=True
    )
    vjp = jax.linear_transpose(jvp, params)

    def weighted_grad(weights: jax.Array) -> PyTree:
        (gradient,) = vjp((weights / len(terms)).astype(terms.dtype))
        return _average(gradient, problem.axis_name)

    return _Linearization(terms, aux, jvp, weighted_grad)


def _look_one_step_ahead(
    problem: Problem,
    inner: _Linearization,
    params: PyTree,
    meta_params: PyTree,
    outer_batch: PyTree,
    learning_rate: jax.Array | float,
) -> tuple[jax.Array, PyTree, jax.Array, PyTree]:
    """Looks ahead by a single step, K = 1.

    The virtual step θ' = θ − (η/B) Jᵀ w(φ) is linear in the weights w. With v the
    gradient of the outer loss at θ', the chain rule gives

        ∂ outer / ∂w = −(η/B) J v,    ∂ outer / ∂φ = (∂w/∂φ)ᵀ ∂ outer / ∂w,

    so no second-order derivative is needed: one product J v, and a backward pass of
    the weight net.

    Returns:
      (weights, gradient of the inner loss, outer loss, gradient of the outer loss with
      respect to φ).
    """

    def weigh(meta_params: PyTree) -> jax.Array:
        return _weigh(problem, meta_params, inner.terms, inner.aux)

    weights, weight_vjp = jax.vjp(weigh, _as_own(meta_params, problem.axis_name))
    gradient = inner.weighted_grad(weights)
    ahead_params = _descend(params, gradient, learning_rate)
    # Averaged over devices before the product with J, which has this device's examples.
    outer_loss, outer_grad = _average(
        jax.value_and_grad(problem.outer_fn)(ahead_params, outer_batch),
        problem.axis_name,
    )
    slopes = inner.jvp(_as_own(outer_grad, problem.axis_name))
    cotangent = -learning_rate / len(inner.terms) * slopes
    (hypergrad,) = weight_vjp(cotangent.astype(weights.dtype))
    return weights, gradient, outer_loss, _average(hypergrad, problem.axis_name)


def _weigh(
    problem: Problem, meta_params: PyTree, terms: jax.Array, aux: Aux
) -> jax.Array:
    """Returns the weights `[B, T]` of a batch; the features carry no gradient."""
    if terms.ndim != 2 or not terms.size or not isinstance(aux, Aux):
        raise ValueError(
            f"terms_fn returned terms of shape {terms.shape} and a "
            f"{type(aux).__name__}: it must return terms [B, T], with B > 0, and an "
            "Aux for one batch; batches are stacked, [K, B, …], for K = 1 too"
        )
    weights = problem.weight_fn(meta_params, jax.lax.stop_gradient(aux.features))
    if weights.shape != terms.shape:
        raise ValueError(
            f"weight_fn returned weights of shape {weights.shape} for terms of shape "
            f"{terms.shape}: it must return one weight for each of the "
            f"{terms.shape[-1]} terms of an example"
        )
    # Weights that do not depend on the batch would count as shared by all devices.
    return _as_own(weights, problem.axis_name)


def _descend(
    params: PyTree, gradient: PyTree, learning_rate: jax.Array | float
) -> PyTree:
    # A float32 array as the learning rate would promote bfloat16 parameters.
    return jax.tree.map(
        lambda p, g: (p - learning_rate * g).astype(p.dtype), params, gradient
    )


def _as_own(tree: PyTree, axis_name: AxisName) -> PyTree:
    """Returns arrays that count as each device's own, though all have the same values.

    `jax.shard_map` sums the gradient of an array that all devices share over them, by
    its default `check_vma=True`. Here `_average` combines the gradients, as under
    `pmap`.
    """
    if axis_name is None:
        return tree
    # Always true, and compiled to nothing, but of a type that depends on the device.
    # `jax.lax.pcast` would do it, but refuses arrays that are a device's own already.
    is_device = jax.lax.axis_index(axis_name) >= 0
    return jax.tree.map(lambda x: jnp.where(is_device, x, x), tree)


def _average(tree: PyTree, axis_name: AxisName) -> PyTree:
    return tree if axis_name is None else jax.lax.pmean(tree, axis_name)


def _num_batches(batches: PyTree) -> int:
    """Returns K, the length of the leading axis that all leaves share."""
    shapes = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(batches)}
    if len(shapes) != 1 or shapes <= {(0,), ()}:
        lengths = [str(shape[0]) if shape else "none" for shape in sorted(shapes)]
        raise ValueError(
            f"batches have the leading axes {', '.join(lengths)}: stack K >= 1 "
            "batches, [K, B, …]"
        )
    return shapes.pop()[0]
