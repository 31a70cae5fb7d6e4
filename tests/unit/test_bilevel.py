"""The bilevel step against slower formulas, finite differences and a known answer."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.bilevel_problem import (
    create_problem,
    draw_batch,
    fast_hypergradient,
    finite_difference_error,
    relative_error,
)
from helpers.small_net import double

from experiments.benchmark.bilevel_step import naive
from ltkd_jax import bilevel, losses, models
from ltkd_jax.training import state as states


def first_batch(batches):
    return jax.tree.map(lambda x: x[0], batches)


def mean_weighted(weights, terms):
    return jnp.mean(jnp.sum(weights * terms, axis=-1))


def descend(params, gradient, rate):
    return jax.tree.map(lambda p, g: p - rate * g, params, gradient)


def formula_hypergradient(
    problem,
    params,
    meta_params,
    batches,
    outer_batch,
    rate,
    *,
    outer_at_start=False,
    factor=1.0,
):
    """Computes −(η/B) ⟨v, ∇l_it⟩ from the full Jacobian of the terms.

    The keywords make it wrong.
    """
    batch = first_batch(batches)
    terms, aux = problem.terms_fn(params, batch)
    jacobian = jax.jacrev(lambda params: problem.terms_fn(params, batch)[0])(params)
    weights, weight_vjp = jax.vjp(
        lambda meta_params: problem.weight_fn(meta_params, aux.features), meta_params
    )
    gradient = jax.tree.map(
        lambda j: jnp.tensordot(weights, j, 2) / len(terms), jacobian
    )
    ahead_params = descend(params, gradient, rate)
    outer_params = jax.tree.map(
        functools.partial(jnp.where, outer_at_start), params, ahead_params
    )
    outer_grad = jax.grad(problem.outer_fn)(outer_params, outer_batch)
    slopes = 0.0
    for j, v in zip(
        jax.tree.leaves(jacobian), jax.tree.leaves(outer_grad), strict=True
    ):
        slopes += jnp.tensordot(j, v, v.ndim)
    (hypergrad,) = weight_vjp(-rate / len(terms) * slopes * factor)
    return hypergrad


@pytest.mark.parametrize("net, method", [("mlp", "kd"), ("batch norm", "ltkd")])
def test_fast_path(net, method):
    """It equals the naive gradient; wrong variants of its formula do not."""
    with jax.enable_x64(True):
        problem, *arguments = create_problem(net, method)
        arguments = double(arguments)
        rate = 0.3
        fast = functools.partial(fast_hypergradient, problem, learning_rate=rate)
        loss, gradient = jax.jit(fast)(*arguments)
        naive_hypergradient = functools.partial(
            bilevel.hypergradient, problem, learning_rate=rate, unroll=True
        )
        expected_loss, expected = jax.jit(naive_hypergradient)(*arguments)
        assert gradient["weights"]["kernel"].dtype == jnp.float64
        assert relative_error(gradient, expected) < 1e-10
        assert abs(loss - expected_loss) < 1e-12
        # A ReLU net has kinks: small steps, so that none is stepped over.
        step = 1e-4 if net == "mlp" else 1e-6
        error = finite_difference_error(problem, *arguments, rate, expected, step)
        assert error < 1e-6
        formula = jax.jit(functools.partial(formula_hypergradient, problem, rate=rate))
        for outer_at_start, factor, is_right in (
            (False, 1.0, True),
            (True, 1.0, False),
            (False, 1 + 1e-9, False),
        ):
            options = dict(outer_at_start=outer_at_start, factor=factor)
            error = relative_error(formula(*arguments, **options), expected)
            assert bool(error < 1e-10) == is_right, (options, error)


def test_features_carry_no_gradient():
    """Over two virtual steps the features depend on the weights; that path is cut."""
    with jax.enable_x64(True):
        problem, *arguments = create_problem("mlp", "kd", lookahead=2)
        arguments = double(arguments)
        hypergradient = functools.partial(
            bilevel.hypergradient, problem, learning_rate=0.3
        )
        _, actual = jax.jit(hypergradient)(*arguments)

        def inner_loss(params, meta_params, batch):
            terms, aux = problem.terms_fn(params, batch)
            return mean_weighted(problem.weight_fn(meta_params, aux.features), terms)

        def lookahead_without_cut(params, meta_params, batches, outer_batch):
            for j in range(2):
                batch = jax.tree.map(lambda x, j=j: x[j], batches)
                gradient = jax.grad(inner_loss)(params, meta_params, batch)
                params = descend(params, gradient, 0.3)
            return problem.outer_fn(params, outer_batch)

        uncut = jax.jit(jax.grad(lookahead_without_cut, argnums=1))(*arguments)
        assert relative_error(uncut, actual) > 1e-3


def test_lookahead():
    """Scanned with rematerialisation, unrolled, and finite differences are the same."""
    with jax.enable_x64(True):
        problem, *arguments = create_problem("mlp", "kd", lookahead=3)
        arguments = double(arguments)
        hypergradient = functools.partial(
            bilevel.hypergradient, problem, learning_rate=0.3
        )
        unrolled_fn = functools.partial(hypergradient, unroll=True)
        _, unrolled = jax.jit(unrolled_fn)(*arguments)
        _, scanned = jax.jit(hypergradient)(*arguments)
        assert relative_error(scanned, unrolled) < 1e-10
        # Features are computed at each virtual step, and carry no derivative: for the
        # differences they must stay constant.
        problem, arguments = freeze_features(problem, *arguments, 0.3)
        error = finite_difference_error(problem, *arguments, 0.3, unrolled)
        assert error < 1e-6


def split_over_devices(api, step):
    """Returns `step(meta, batches, outer_batch)` for batches split over four devices.

    Batches are `[K, B, …]`, the outer batch is `[B, …]`.
    """
    axis_name = "devices"
    if api in ("pmap", "vmap"):
        transform = getattr(jax, api)
        mapped = transform(step, axis_name=axis_name, in_axes=(None, 1, 0))

        def split(x, axis):
            sizes = (*x.shape[:axis], 4, x.shape[axis] // 4, *x.shape[axis + 1 :])
            return x.reshape(sizes)

        def run(meta, batches, outer_batch):
            batches = jax.tree.map(lambda x: split(x, 1), batches)
            outer_batch = jax.tree.map(lambda x: split(x, 0), outer_batch)
            results = mapped(meta, batches, outer_batch)
            return jax.tree.map(lambda x: x[0], results)

        return run
    mesh = jax.make_mesh(
        (4,),
        (axis_name,),
        axis_types=(jax.sharding.AxisType.Auto,),
        devices=jax.devices()[:4],
    )
    spec = jax.sharding.PartitionSpec
    return jax.jit(
        jax.shard_map(
            step,
            mesh=mesh,
            in_specs=(spec(), spec(None, axis_name), spec(axis_name)),
            out_specs=spec(),
            check_vma=api == "checked shard_map",
        )
    )


@pytest.mark.parametrize("lookahead", [1, 2])
@pytest.mark.parametrize("api", ["pmap", "vmap", "shard_map", "checked shard_map"])
def test_devices_equal_one(api, lookahead):
    """A step on four devices, which decide on the update, equals that on one."""
    with jax.enable_x64(True):
        problem, *arguments = create_problem("mlp", "kd", lookahead=lookahead)
        params, meta_params, batches, outer_batch = double(arguments)
        optimizer = optax.sgd(1.0)
        meta = bilevel.init(meta_params, optimizer)
        # The step updates the weight net, as the second of two.
        meta = meta._replace(num_grads=meta.num_grads + 1)

        def step(problem, meta, batches, outer_batch):
            result = bilevel.step(
                problem,
                params,
                meta,
                batches,
                outer_batch,
                0.3,
                optimizer=optimizer,
                update_every=2,
            )
            return result.gradient, result.meta.params, result.outer_loss

        on_one = jax.jit(functools.partial(step, problem))
        expected = on_one(meta, batches, outer_batch)
        problem = dataclasses.replace(problem, axis_name="devices")
        on_devices = split_over_devices(api, functools.partial(step, problem))
        actual = on_devices(meta, batches, outer_batch)
        for value, expected_value in zip(actual, expected, strict=True):
            assert relative_error(value, expected_value) < 1e-12
        assert relative_error(actual[1], meta_params) > 1e-6


@pytest.mark.parametrize("lookahead", [1, 2])
def test_weights_without_features_on_devices(lookahead):
    """Weights that are the same on all devices have the right gradient, too."""
    problem = bilevel.Problem(
        two_terms,
        outer_fn=lambda params, batch: jnp.mean((params - batch) ** 2),
        weight_fn=lambda meta, features: jnp.tile(meta, (len(features), 1)),
    )
    optimizer = optax.sgd(1.0)
    meta = bilevel.init(jnp.array([0.5, 0.2]), optimizer)
    params = jnp.float32(1)
    batches = jnp.arange(8.0 * lookahead).reshape(lookahead, 8)

    def step(problem, meta, batches, outer_batch):
        result = bilevel.step(
            problem, params, meta, batches, outer_batch, 0.01, optimizer=optimizer
        )
        return result.gradient, result.meta.params

    expected = step(problem, meta, batches, batches[0])
    problem = dataclasses.replace(problem, axis_name="devices")
    on_devices = split_over_devices(
        "checked shard_map", functools.partial(step, problem)
    )
    actual = on_devices(meta, batches, batches[0])
    assert relative_error(actual, expected) < 1e-5


def freeze_features(problem, params, meta_params, batches, outer_batch, rate):
    """Returns a problem, and its arguments, whose batches contain their features.

    These are the features that a lookahead with the arguments computes.
    """

    def inner_loss(params, batch):
        terms, aux = problem.terms_fn(params, batch)
        features = jax.lax.stop_gradient(aux.features)
        weights = problem.weight_fn(meta_params, features)
        return mean_weighted(weights, terms), aux.features

    gradient_fn = jax.jit(jax.grad(inner_loss, has_aux=True))
    features_of_steps = []
    ahead_params = params
    for j in range(jax.tree.leaves(batches)[0].shape[0]):
        batch = jax.tree.map(lambda x, j=j: x[j], batches)
        gradient, features = gradient_fn(ahead_params, batch)
        features_of_steps.append(features)
        ahead_params = descend(ahead_params, gradient, rate)

    def terms_fn(params, batch_and_features):
        batch, features = batch_and_features
        terms, _ = problem.terms_fn(params, batch)
        return terms, bilevel.Aux(features)

    frozen = dataclasses.replace(problem, terms_fn=terms_fn)
    batches_and_features = (batches, jnp.stack(features_of_steps))
    return frozen, (params, meta_params, batches_and_features, outer_batch)


# --- Accumulation, against a loop in NumPy ---

UPDATE_EVERY = 3
NUM_STEPS = 25
DECAY_STEP = 13


def test_accumulation():
    """SGD with momentum and Adam, with L2 and schedules, in float64."""
    milestones = (DECAY_STEP / NUM_STEPS,)
    rate = states.step_schedule(
        0.2, total_steps=NUM_STEPS, milestones=milestones, decay=0.1
    )
    meta_rate = states.step_schedule(
        0.05, total_steps=NUM_STEPS, milestones=milestones, decay=0.8
    )
    with jax.enable_x64(True):
        problem, params, meta_params, *_ = create_problem("mlp", "kd")
        params, meta_params = double((params, meta_params))
        steps = []
        for seed in range(NUM_STEPS):
            steps.append(double((draw_batch(seed, 1), draw_batch(seed + 1000))))
        student_optimizer = states.sgd(rate, momentum=0.9, weight_decay=1e-2)
        meta_optimizer = states.adam(
            lambda update: meta_rate(update * UPDATE_EVERY + UPDATE_EVERY - 1),
            weight_decay=1e-2,
        )

        @jax.jit
        def iterate(step, params, opt_state, meta, batches, outer_batch):
            result = bilevel.step(
                problem,
                params,
                meta,
                batches,
                outer_batch,
                rate(step),
                optimizer=meta_optimizer,
                update_every=UPDATE_EVERY,
            )
            updates, opt_state = student_optimizer.update(
                result.gradient, opt_state, params
            )
            return optax.apply_updates(params, updates), opt_state, result.meta

        student = params
        opt_state = student_optimizer.init(params)
        meta = bilevel.init(meta_params, meta_optimizer)
        for step, (batches, outer_batch) in enumerate(steps):
            student, opt_state, meta = iterate(
                step, student, opt_state, meta, batches, outer_batch
            )

        expected, expected_meta = train_in_numpy(problem, params, meta_params, steps)
    # optax computes its schedules in float32, the reference in float64.
    assert relative_error(student, expected) < 1e-7
    assert relative_error(meta.params, expected_meta) < 1e-7
    assert int(meta.num_grads) == NUM_STEPS % UPDATE_EVERY
    assert relative_error(meta_params, expected_meta) > 0.1  # it has moved


def train_in_numpy(problem, params, meta_params, steps):
    """Returns the parameters after the loop of the paper, with optimizers in NumPy."""

    def inner_loss(params, weights, batch):
        terms, _ = problem.terms_fn(params, batch)
        return mean_weighted(weights, terms)

    @jax.jit
    def hypergradient(params, meta_params, batch, outer_batch, rate):
        def outer_loss(meta_params):
            _, aux = problem.terms_fn(params, batch)
            features = jax.lax.stop_gradient(aux.features)
            weights = problem.weight_fn(meta_params, features)
            gradient = jax.grad(inner_loss)(params, weights, batch)
            return problem.outer_fn(descend(params, gradient, rate), outer_batch)

        return jax.grad(outer_loss)(meta_params)

    @jax.jit
    def student_gradient(params, meta_params, batch):
        _, aux = problem.terms_fn(params, batch)
        weights = problem.weight_fn(meta_params, aux.features)
        return jax.grad(inner_loss)(params, weights, batch)

    student = NumpySgd(params, momentum=0.9, weight_decay=1e-2)
    weight_net = NumpyAdam(meta_params, weight_decay=1e-2)
    grad_sum = weight_net.zeros()
    for step, (batches, outer_batch) in enumerate(steps):
        batch = first_batch(batches)
        rate, meta_rate = (0.2, 0.05) if step < DECAY_STEP else (0.02, 0.04)
        start = student.tree()
        gradient = hypergradient(start, weight_net.tree(), batch, outer_batch, rate)
        grad_sum = [a + g for a, g in zip(grad_sum, to_leaves(gradient))]
        if (step + 1) % UPDATE_EVERY == 0:
            weight_net.update([g / UPDATE_EVERY for g in grad_sum], meta_rate)
            grad_sum = weight_net.zeros()
        gradient = student_gradient(start, weight_net.tree(), batch)
        student.update(to_leaves(gradient), rate)
    return student.tree(), weight_net.tree()


def to_leaves(tree):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


class NumpyParams:
    """The leaves of a pytree, which an optimizer updates."""

    def __init__(self, params):
        self._structure = jax.tree.structure(params)
        self._leaves = to_leaves(params)

    def tree(self):
        return self._structure.unflatten(self._leaves)

    def zeros(self):
        return [0 * x for x in self._leaves]


class NumpySgd(NumpyParams):
    def __init__(self, params, *, momentum, weight_decay):
        super().__init__(params)
        self._momentum = momentum
        self._weight_decay = weight_decay
        self._trace = self.zeros()

    def update(self, gradient, rate):
        for i, (x, g) in enumerate(zip(self._leaves, gradient)):
            g = g + self._weight_decay * x
            self._trace[i] = self._momentum * self._trace[i] + g
            self._leaves[i] = x - rate * self._trace[i]


class NumpyAdam(NumpyParams):
    def __init__(self, params, *, weight_decay):
        super().__init__(params)
        self._weight_decay = weight_decay
        self._first = self.zeros()
        self._second = self.zeros()
        self._num_updates = 0

    def update(self, gradient, rate):
        self._num_updates += 1
        for i, (x, g) in enumerate(zip(self._leaves, gradient)):
            g = g + self._weight_decay * x
            self._first[i] = 0.9 * self._first[i] + 0.1 * g
            self._second[i] = 0.999 * self._second[i] + 0.001 * g**2
            first = self._first[i] / (1 - 0.9**self._num_updates)
            second = self._second[i] / (1 - 0.999**self._num_updates)
            self._leaves[i] = x - rate * first / (np.sqrt(second) + 1e-8)


def test_update_without_gradients():
    meta = bilevel.init(jnp.ones(2), optax.adam(0.1))
    updated = bilevel.update(meta, optax.adam(0.1))
    np.testing.assert_array_equal(updated.params, meta.params)


def test_update_decided_by_caller():
    """`update_weight_net` may be passed or left to the device, with the same result."""
    with jax.enable_x64(True):
        problem, *arguments = create_problem("mlp", "kd")
        params, meta_params, *batches = double(arguments)
        optimizer = optax.adam(0.1)

        def compile_step(step_fn, update_weight_net):
            step = functools.partial(
                step_fn,
                problem,
                optimizer=optimizer,
                update_every=2,
                update_weight_net=update_weight_net,
            )
            return jax.jit(lambda meta: step(params, meta, *batches, 0.1))

        def assert_close(actual, expected, **tolerances):
            compare = functools.partial(np.testing.assert_allclose, **tolerances)
            jax.tree.map(compare, actual, expected)

        decide_on_device = compile_step(bilevel.step, None)
        meta = bilevel.init(meta_params, optimizer)
        for update_weight_net in (False, True):
            result = compile_step(bilevel.step, update_weight_net)(meta)
            expected = compile_step(naive, update_weight_net)(meta)
            assert_close(decide_on_device(meta), result, rtol=1e-12, atol=1e-15)
            assert_close(expected, result, rtol=1e-9, atol=1e-12)
            assert int(result.meta.num_grads) == (0 if update_weight_net else 1)
            meta = result.meta


# --- A problem with a known answer ---


def test_flipped_labels():
    """Examples with flipped labels get smaller weights, and the student gains by it."""
    gains = []
    for seed in range(5):
        data, flipped = draw_flipped_labels(seed)
        accuracy, weights = train_linear(data, learned=True)
        equal_accuracy, _ = train_linear(data, learned=False)
        assert weights[flipped].mean() < 0.2 * weights[~flipped].mean(), seed
        gains.append(float(accuracy - equal_accuracy))
    assert min(gains) > 0.04 and np.mean(gains) > 0.08, gains


def draw_flipped_labels(
    seed, num_train=600, num_test=2000, num_outer=100, classes=4, dimensions=10
):
    """Returns Gaussian classes with clean outer data, and which labels are flipped.

    Half of the training examples of classes 0 and 1 have the label of another class.
    """
    rng = np.random.default_rng(seed)
    means = 3 * np.eye(classes, dimensions)

    def draw(number):
        labels = rng.integers(0, classes, number)
        noise = rng.normal(size=(number, dimensions))
        return (means[labels] + noise).astype(np.float32), labels

    x, y = draw(num_train)
    test = draw(num_test)
    outer = draw(num_outer)
    flipped = (y < 2) & (rng.random(num_train) < 0.5)
    other_labels = (y + rng.integers(1, classes, num_train)) % classes
    train = (x, np.where(flipped, other_labels, y))
    return dict(train=train, test=test, outer=outer), flipped


@functools.partial(jax.jit, static_argnames="learned")
def train_linear(data, *, learned, iterations=400, rate=0.5, classes=4):
    """Returns the test accuracy of a linear student, and the final weights."""
    train_x, _ = data["train"]

    def predict(params, x):
        return jnp.dot(x, params["w"], precision="highest") + params["b"][None, :]

    def cross_entropy(params, batch):
        x, y = batch
        return losses.cross_entropy(predict(params, x), y)

    def mean_cross_entropy(params, batch):
        return cross_entropy(params, batch).mean()

    def terms_fn(params, batch):
        hard = cross_entropy(params, batch)
        return hard[:, None], bilevel.Aux(hard[:, None])

    def weight_fn(meta_params, features):
        return weight_net.apply({"params": meta_params}, features)

    weight_net = models.WeightNet(1, hidden=(16,))
    problem = bilevel.Problem(terms_fn, mean_cross_entropy, weight_fn)
    optimizer = optax.adam(1e-2)

    def train_step(carry, indices):
        params, meta = carry
        batch = jax.tree.map(lambda a: a[indices], data["train"])
        if learned:
            batches = jax.tree.map(lambda a: a[None], batch)
            result = bilevel.step(
                problem,
                params,
                meta,
                batches,
                data["outer"],
                rate,
                optimizer=optimizer,
            )
            meta = result.meta
            gradient = result.gradient
        else:
            gradient = jax.grad(mean_cross_entropy)(params, batch)
        return (descend(params, gradient, rate), meta), None

    params = {"w": jnp.zeros((train_x.shape[1], classes)), "b": jnp.zeros(classes)}
    meta_variables = weight_net.init(jax.random.key(0), jnp.zeros((1, 1)))
    meta = bilevel.init(meta_variables["params"], optimizer)
    indices = jax.random.randint(jax.random.key(1), (iterations, 100), 0, len(train_x))
    (params, meta), _ = jax.lax.scan(train_step, (params, meta), indices)
    test_x, test_y = data["test"]
    accuracy = (predict(params, test_x).argmax(-1) == test_y).mean()
    _, aux = terms_fn(params, data["train"])
    return accuracy, problem.weight_fn(meta.params, aux.features)[:, 0]


# --- Input checks ---


def two_terms(params, batch):
    terms = jnp.stack([params * batch, params**2 * batch], axis=-1)
    return terms, bilevel.Aux(batch[..., None])


def one_dimensional_terms(params, batch):
    return params * batch, bilevel.Aux(batch[:, None])


def terms_without_aux(params, batch):
    return params * batch[:, None], batch


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(update_every=0), "update_every=0"),
        (dict(update_every=2.5), "update_every=2.5"),
        (dict(batches=jnp.ones(4)), "batches are stacked"),  # one batch, not [K, …]
        (dict(batches=1.0), "leading axes none"),
        (dict(terms_fn=one_dimensional_terms), r"terms of shape \(4,\)"),
        (dict(terms_fn=terms_without_aux), "an Aux"),
        (dict(batches=jnp.zeros((0, 4))), "K >= 1"),
        (dict(batches=jnp.zeros((1, 0))), r"terms of shape \(0, 2\).*B > 0"),
        (dict(batches=(jnp.zeros((2, 4)), jnp.zeros((3, 4)))), "leading axes 2, 3"),
        (
            dict(num_weights=3),
            r"shape \(4, 3\) for terms of shape \(4, 2\).*each of the 2 terms",
        ),
        (dict(num_weights=3, batches=jnp.ones((2, 4))), "each of the 2 terms"),
    ],
)
def test_bad_input(change, message):
    defaults = dict(
        terms_fn=two_terms, num_weights=2, batches=jnp.ones((1, 4)), update_every=1
    )
    options = defaults | change
    num_weights = options["num_weights"]
    problem = bilevel.Problem(
        options["terms_fn"],
        outer_fn=lambda params, batch: params,
        weight_fn=lambda meta, features: jnp.tile(meta * features, (1, num_weights)),
    )
    optimizer = optax.sgd(0.1)
    one = jnp.float32(1)
    with pytest.raises(ValueError, match=message):
        bilevel.step(
            problem,
            one,
            bilevel.init(one, optimizer),
            options["batches"],
            None,
            0.1,
            optimizer=optimizer,
            update_every=options["update_every"],
        )


@pytest.mark.parametrize("lookahead", [1, 2])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_array_learning_rate_keeps_dtype(lookahead, dtype):
    problem = bilevel.Problem(
        two_terms,
        outer_fn=lambda params, batch: params**2,
        weight_fn=lambda meta, features: meta[None] * features,
    )
    optimizer = optax.sgd(0.1)
    result = bilevel.step(
        problem,
        dtype(1),
        bilevel.init(jnp.ones(2), optimizer),
        jnp.ones((lookahead, 4)),
        None,
        np.float32(0.1),
        optimizer=optimizer,
    )
    assert result.gradient.dtype == dtype
    assert np.isfinite(result.meta.params).all()
