"""The bilevel step against naive differentiation, finite differences, a hand-written loop and a known answer."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.bilevel_problem import difference, draw, fast, finite_differences, setting
from helpers.small_net import double

from experiments.benchmark.bilevel_step import naive
from ltkd_jax import bilevel, losses, models
from ltkd_jax.training import state as states


def by_the_formula(
    problem,
    params,
    meta_params,
    batches,
    outer_batch,
    rate,
    *,
    outer_at_start=False,
    share=1.0,
):
    """−(η/B) ⟨v, ∇l_it⟩ with the whole Jacobian of the terms written out; the keywords make it wrong."""
    batch = jax.tree.map(lambda x: x[0], batches)
    terms, aux = problem.terms_fn(params, batch)
    jacobian = jax.jacrev(lambda params: problem.terms_fn(params, batch)[0])(params)
    weights, back = jax.vjp(
        lambda meta: problem.weight_fn(meta, aux.features), meta_params
    )
    gradient = jax.tree.map(
        lambda j: jnp.tensordot(weights, j, 2) / len(terms), jacobian
    )
    virtual = jax.tree.map(lambda p, g: p - rate * g, params, gradient)
    where = jax.tree.map(functools.partial(jnp.where, outer_at_start), params, virtual)
    direction = jax.grad(problem.outer_fn)(where, outer_batch)
    pairs = zip(jax.tree.leaves(jacobian), jax.tree.leaves(direction), strict=True)
    slopes = sum(jnp.tensordot(j, v, v.ndim) for j, v in pairs)
    return back(-rate / len(terms) * slopes * share)[0]


@pytest.mark.parametrize("net, method", [("mlp", "kd"), ("batch norm", "ltkd")])
def test_fast_path(net, method):
    """In float64 it is the naive gradient to 1e-10 and finite differences to 1e-6; wrong variants are told apart."""
    with jax.enable_x64(True):
        problem, *arguments = setting(net, method)
        arguments = double(arguments)
        rate = 0.3
        loss, gradient = jax.jit(functools.partial(fast, problem, learning_rate=rate))(
            *arguments
        )
        naive_gradient = jax.jit(
            functools.partial(
                bilevel.hypergradient, problem, learning_rate=rate, unroll=True
            )
        )
        naive_loss, expected = naive_gradient(*arguments)
        assert gradient["weights"]["kernel"].dtype == jnp.float64
        assert difference(gradient, expected) < 1e-10 and abs(loss - naive_loss) < 1e-12
        # A ReLU net has kinks: small steps, so that none is stepped over.
        width = 1e-4 if net == "mlp" else 1e-6
        assert finite_differences(problem, *arguments, rate, expected, width) < 1e-6
        formula = jax.jit(functools.partial(by_the_formula, problem, rate=rate))
        for outer_at_start, share, right in (
            (False, 1.0, True),
            (True, 1.0, False),
            (False, 1 + 1e-9, False),
        ):
            error = difference(
                formula(*arguments, outer_at_start=outer_at_start, share=share),
                expected,
            )
            assert bool(error < 1e-10) == right, (outer_at_start, share, error)


def test_features_carry_no_gradient():
    """Through two virtual steps the features depend on the weights; that path is cut, by definition."""
    with jax.enable_x64(True):
        problem, *arguments = setting("mlp", "kd", lookahead=2)
        arguments = double(arguments)
        cut = jax.jit(
            functools.partial(bilevel.hypergradient, problem, learning_rate=0.3)
        )(*arguments)[1]

        def leaky(params, meta_params, batches, outer_batch):
            for j in range(2):

                def loss(params):
                    terms, aux = problem.terms_fn(
                        params, jax.tree.map(lambda x: x[j], batches)
                    )
                    return jnp.mean(
                        jnp.sum(
                            problem.weight_fn(meta_params, aux.features) * terms,
                            axis=-1,
                        )
                    )

                params = jax.tree.map(
                    lambda p, g: p - 0.3 * g, params, jax.grad(loss)(params)
                )
            return problem.outer_fn(params, outer_batch)

        assert difference(jax.jit(jax.grad(leaky, argnums=1))(*arguments), cut) > 1e-3


def test_lookahead():
    """Scanned with rematerialisation and written out are the same, and finite differences."""
    with jax.enable_x64(True):
        problem, *arguments = setting("mlp", "kd", lookahead=3)
        arguments = double(arguments)
        written, scanned = (
            jax.jit(
                functools.partial(
                    bilevel.hypergradient, problem, learning_rate=0.3, unroll=unroll
                )
            )(*arguments)
            for unroll in (True, False)
        )
        assert difference(scanned[1], written[1]) < 1e-10
        # Features are anew at each virtual step, and no path for a derivative: held, for the differences.
        held_problem, held_arguments = hold_features(problem, *arguments, 0.3)
        assert finite_differences(held_problem, *held_arguments, 0.3, written[1]) < 1e-6


def hold_features(problem, params, meta_params, batches, outer_batch, rate):
    """The problem whose batches bring the features that a lookahead at these arguments meets, and its arguments."""
    features_of_steps = []
    start = params
    for j in range(jax.tree.leaves(batches)[0].shape[0]):
        batch = jax.tree.map(lambda x, j=j: x[j], batches)

        def loss(params, batch=batch):
            terms, aux = problem.terms_fn(params, batch)
            weights = problem.weight_fn(
                meta_params, jax.lax.stop_gradient(aux.features)
            )
            return jnp.mean(jnp.sum(weights * terms, axis=-1)), aux.features

        gradient, features = jax.jit(jax.grad(loss, has_aux=True))(params)
        features_of_steps.append(features)
        params = jax.tree.map(lambda p, g: p - rate * g, params, gradient)

    def terms_fn(params, pair):
        return problem.terms_fn(params, pair[0])[0], bilevel.Aux(pair[1])

    arguments = start, meta_params, (batches, jnp.stack(features_of_steps)), outer_batch
    return dataclasses.replace(problem, terms_fn=terms_fn), arguments


def test_accumulation():
    """25 iterations, k = 3, in float64: SGD with momentum, Adam, both with L2 and schedules, written out in NumPy."""
    update_every, steps_, decayed = 3, 25, 13
    rate = states.step_schedule(
        0.2, total_steps=steps_, milestones=(decayed / steps_,), decay=0.1
    )
    meta_rate = states.step_schedule(
        0.05, total_steps=steps_, milestones=(decayed / steps_,), decay=0.8
    )
    with jax.enable_x64(True):
        problem, params, meta_params, *_ = setting("mlp", "kd")
        params, meta_params = double((params, meta_params))
        stream = [double((draw(seed, 1), draw(seed + 1000))) for seed in range(steps_)]
        student = states.sgd(rate, momentum=0.9, weight_decay=1e-2)
        net = states.adam(
            lambda update: meta_rate(update * update_every + update_every - 1),
            weight_decay=1e-2,
        )

        @jax.jit
        def iteration(step, params, opt_state, meta, batches, outer_batch):
            taken = bilevel.step(
                problem,
                params,
                meta,
                batches,
                outer_batch,
                rate(step),
                optimizer=net,
                update_every=update_every,
            )
            updates, opt_state = student.update(taken.gradient, opt_state, params)
            return optax.apply_updates(params, updates), opt_state, taken.meta

        state = params, student.init(params), bilevel.init(meta_params, net)
        for step, batches in enumerate(stream):
            state = iteration(step, *state, *batches)

        got = by_hand(problem, params, meta_params, stream, update_every, decayed)
    # optax keeps its schedules in float32, here and there the same
    assert (
        difference(state[0], got[0]) < 1e-7
        and difference(state[2].params, got[1]) < 1e-7
    )
    assert int(state[2].num_grads) == steps_ % update_every
    assert difference(meta_params, got[1]) > 0.1  # it did move


def by_hand(problem, params, meta_params, stream, update_every, decayed):
    """The loop of the paper, step by step, with optimizers in NumPy."""

    @jax.jit
    def hypergradient(params, meta_params, batch, outer_batch, rate):
        def outer(meta_params):
            terms, aux = problem.terms_fn(params, batch)
            weights = problem.weight_fn(
                meta_params, jax.lax.stop_gradient(aux.features)
            )
            gradient = jax.grad(
                lambda p: jnp.mean(
                    jnp.sum(weights * problem.terms_fn(p, batch)[0], axis=-1)
                )
            )(params)
            return problem.outer_fn(
                jax.tree.map(lambda p, g: p - rate * g, params, gradient), outer_batch
            )

        return jax.grad(outer)(meta_params)

    @jax.jit
    def gradient_at(params, meta_params, batch):
        weights = problem.weight_fn(
            meta_params, problem.terms_fn(params, batch)[1].features
        )
        return jax.grad(
            lambda p: jnp.mean(
                jnp.sum(weights * problem.terms_fn(p, batch)[0], axis=-1)
            )
        )(params)

    def leaves(tree):
        return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]

    p, structure = leaves(params), jax.tree.structure(params)
    m, meta_structure = leaves(meta_params), jax.tree.structure(meta_params)
    momentum, first, second = [0 * x for x in p], [0 * x for x in m], [0 * x for x in m]
    gathered, updates = [0 * x for x in m], 0
    for step, (batches, outer_batch) in enumerate(stream):
        batch = jax.tree.map(lambda x: x[0], batches)
        rate, meta_rate = (0.2, 0.05) if step < decayed else (0.02, 0.04)
        tree, meta_tree = structure.unflatten(p), meta_structure.unflatten(m)
        gathered = [
            a + g
            for a, g in zip(
                gathered,
                leaves(hypergradient(tree, meta_tree, batch, outer_batch, rate)),
            )
        ]
        if (step + 1) % update_every == 0:
            updates += 1
            g = [a / update_every + 1e-2 * x for a, x in zip(gathered, m)]
            first = [0.9 * a + 0.1 * x for a, x in zip(first, g)]
            second = [0.999 * a + 0.001 * x**2 for a, x in zip(second, g)]
            moments = [
                (a / (1 - 0.9**updates), b / (1 - 0.999**updates))
                for a, b in zip(first, second)
            ]
            m = [
                x - meta_rate * a / (np.sqrt(b) + 1e-8) for x, (a, b) in zip(m, moments)
            ]
            gathered = [0 * x for x in m]
        g = leaves(gradient_at(tree, meta_structure.unflatten(m), batch))
        momentum = [0.9 * a + x + 1e-2 * y for a, x, y in zip(momentum, g, p)]
        p = [x - rate * a for x, a in zip(p, momentum)]
    return structure.unflatten(p), meta_structure.unflatten(m)


def test_update_decided_beforehand():
    """`changes` given or decided on the device makes no difference; nor do the savings of the step."""
    with jax.enable_x64(True):
        problem, *arguments = setting("mlp", "kd")
        params, meta_params, *batches = double(arguments)
        net = optax.adam(0.1)

        def compiled(step_fn, changes):
            step = functools.partial(
                step_fn,
                problem,
                optimizer=net,
                update_every=2,
                update_weight_net=changes,
            )
            return jax.jit(lambda meta: step(params, meta, *batches, 0.1))

        decide_on_device = compiled(bilevel.step, None)
        meta = bilevel.init(meta_params, net)
        for changes in (False, True):
            result = compiled(bilevel.step, changes)(meta)
            expected = compiled(naive, changes)(meta)
            jax.tree.map(
                functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-15),
                decide_on_device(meta),
                result,
            )
            jax.tree.map(
                functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12),
                expected,
                result,
            )
            assert int(result.meta.num_grads) == (0 if changes else 1)
            meta = result.meta


def test_flipped_labels():
    """Half of the labels of two classes flipped, a clean outer set: over five seeds flipped examples get smaller hard
    weights than clean ones, and the student is better than with equal weights."""
    gains = []
    for seed in range(5):
        data, flipped = flipped_labels(seed)
        weighed, weights = learn(data, learned=True)
        equal, _ = learn(data, learned=False)
        assert weights[flipped].mean() < 0.2 * weights[~flipped].mean(), seed
        gains.append(float(weighed - equal))
    assert min(gains) > 0.04 and np.mean(gains) > 0.08, gains


def flipped_labels(seed, train=600, test=2000, meta=100, classes=4, dimensions=10):
    """Gaussian classes; half of the training examples of classes 0 and 1 carry the label of any other class."""
    rng = np.random.default_rng(seed)
    means = 3 * np.eye(classes, dimensions)

    def draw(n):
        y = rng.integers(0, classes, n)
        return (means[y] + rng.normal(size=(n, dimensions))).astype(np.float32), y

    (x, y), (test_x, test_y), (meta_x, meta_y) = draw(train), draw(test), draw(meta)
    flipped = (y < 2) & (rng.random(train) < 0.5)
    observed = np.where(flipped, (y + rng.integers(1, classes, train)) % classes, y)
    return dict(
        x=x, y=observed, test_x=test_x, test_y=test_y, meta_x=meta_x, meta_y=meta_y
    ), flipped


@functools.partial(jax.jit, static_argnames="learned")
def learn(data, *, learned, iterations=400, rate=0.5, classes=4):
    """Returns the test accuracy of a linear student and its weights of the training examples at the end."""

    def cross_entropy(params, batch):
        logits = (
            jnp.dot(batch[0], params["w"], precision="highest") + params["b"][None, :]
        )
        return losses.cross_entropy(logits, batch[1])

    def terms_fn(params, batch):
        hard = cross_entropy(params, batch)
        return hard[:, None], bilevel.Aux(hard[:, None])

    net = models.WeightNet(1, hidden=(16,))
    problem = bilevel.Problem(
        terms_fn,
        outer_fn=lambda params, batch: cross_entropy(params, batch).mean(),
        weight_fn=lambda meta, features: net.apply({"params": meta}, features),
    )
    optimizer = optax.adam(1e-2)
    everything, outer_batch, test = (
        (data[f"{part}x"], data[f"{part}y"]) for part in ("", "meta_", "test_")
    )

    def descend(carry, index):
        params, meta = carry
        batch = jax.tree.map(lambda a: a[index], everything)
        if learned:
            ahead = jax.tree.map(lambda a: a[None], batch)
            taken = bilevel.step(
                problem, params, meta, ahead, outer_batch, rate, optimizer=optimizer
            )
            meta, gradient = taken.meta, taken.gradient
        else:
            gradient = jax.grad(lambda p: cross_entropy(p, batch).mean())(params)
        return (jax.tree.map(lambda p, g: p - rate * g, params, gradient), meta), None

    params = {"w": jnp.zeros((data["x"].shape[1], classes)), "b": jnp.zeros(classes)}
    meta = bilevel.init(
        net.init(jax.random.key(0), jnp.zeros((1, 1)))["params"], optimizer
    )
    order = jax.random.randint(jax.random.key(1), (iterations, 100), 0, len(data["x"]))
    (params, meta), _ = jax.lax.scan(descend, (params, meta), order)
    predicted = (test[0] @ params["w"] + params["b"][None, :]).argmax(-1)
    weights = problem.weight_fn(meta.params, terms_fn(params, everything)[1].features)
    return (predicted == test[1]).mean(), weights[:, 0]


def two_terms(params, batch):
    return jnp.stack([params * batch, params**2 * batch], axis=-1), bilevel.Aux(
        batch[..., None]
    )


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(update_every=0), "update_every=0"),
        (dict(update_every=2.5), "update_every=2.5"),
        (dict(batches=jnp.ones(4)), "batches are stacked"),  # one batch, not [K, …]
        (dict(batches=1.0), "leading axes none"),
        (
            dict(
                terms_fn=lambda params, batch: (
                    params * batch,
                    bilevel.Aux(batch[:, None]),
                )
            ),
            r"terms of shape \(4,\)",
        ),
        (
            dict(terms_fn=lambda params, batch: (params * batch[:, None], batch)),
            "an Aux",
        ),
        (dict(batches=jnp.zeros((0, 4))), "K >= 1"),
        (dict(batches=(jnp.zeros((2, 4)), jnp.zeros((3, 4)))), "leading axes 2, 3"),
        (
            dict(outputs=3),
            r"shape \(4, 3\) for terms of shape \(4, 2\).*each of the 2 terms",
        ),
        (dict(outputs=3, batches=jnp.ones((2, 4))), "each of the 2 terms"),
    ],
)
def test_bad_input(change, message):
    change = dict(change)  # the parameter itself stays as it is
    outputs, batches = change.pop("outputs", 2), change.pop("batches", jnp.ones((1, 4)))
    problem = bilevel.Problem(
        change.pop("terms_fn", two_terms),
        outer_fn=lambda params, batch: params,
        weight_fn=lambda meta, features: jnp.tile(meta * features, (1, outputs)),
    )
    optimizer = optax.sgd(0.1)
    with pytest.raises(ValueError, match=message):
        bilevel.step(problem, jnp.float32(1), bilevel.init(jnp.float32(1), optimizer), batches, None, 0.1,
                     optimizer=optimizer, **change)  # fmt: skip


@pytest.mark.parametrize("lookahead", [1, 2])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_array_learning_rate_widens_nothing(lookahead, dtype):
    problem = bilevel.Problem(
        two_terms,
        lambda params, batch: params**2,
        lambda meta, features: meta[None] * features,
    )
    optimizer = optax.sgd(0.1)
    meta = bilevel.init(jnp.ones(2), optimizer)
    rate = np.float32(0.1)
    taken = bilevel.step(
        problem,
        dtype(1),
        meta,
        jnp.ones((lookahead, 4)),
        None,
        rate,
        optimizer=optimizer,
    )
    assert taken.gradient.dtype == dtype and np.isfinite(taken.meta.params).all()
