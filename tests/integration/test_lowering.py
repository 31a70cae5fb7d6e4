"""Every jitted function of a run, lowered for TPU and CUDA.

It is not run there, but must use nothing that these platforms lack.
"""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.small_runs import prepare_insects, streamed, tiny
from jax.extend import core

from experiments.config.spec import resolve
from experiments.trainer.trainer import get_trainer, teacher_model
from ltkd_jax import groups, methods
from ltkd_jax.data import sampling
from ltkd_jax.training import steps

PLATFORMS = ("tpu", "cuda")
WIDE = (np.float64, np.int64, np.uint64, np.complex128)


def equations(jaxpr):
    """Yields every equation, with those inside loops, branches and calls."""
    yield from jaxpr.eqns
    for inner in core.subjaxprs(jaxpr):
        yield from equations(inner)


def faults(jaxpr):
    """Returns what an accelerator lacks or is slow at.

    That is 64-bit types, calls to the host, and unknown shapes.
    """
    problems = set()
    for equation in equations(jaxpr):
        name = equation.primitive.name
        if "callback" in name or name in ("infeed", "outfeed"):
            problems.add(name)
        for variable in (*equation.invars, *equation.outvars):
            if getattr(variable.aval, "dtype", None) in WIDE:
                problems.add(f"{variable.aval.dtype} in {name}")
            shape = getattr(variable.aval, "shape", ())
            if not all(isinstance(size, int) for size in shape):
                problems.add(f"shape {shape} in {name}")
    return problems


def shapes(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def assert_lowers(fn, *arguments):
    """Checks a jitted function for arguments of these shapes."""
    argument_shapes = shapes(arguments)
    assert faults(jax.make_jaxpr(fn)(*argument_shapes).jaxpr) == set()
    exported = jax.export.export(fn, platforms=PLATFORMS)(*argument_shapes)
    assert exported.platforms == PLATFORMS
    assert len(exported.mlir_module_serialized) > 1000


def test_faults_are_detected():
    def faults_of(fn, x):
        return faults(jax.make_jaxpr(fn)(x).jaxpr)

    def looped(fn):
        def loop(x):
            result, _ = jax.lax.scan(lambda c, _: (fn(c), None), x, None, length=2)
            return result

        return loop

    def to_host(x):
        return jax.pure_callback(np.sin, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    def wide(x):
        with jax.enable_x64(True):
            return x.astype(jnp.float64).astype(jnp.float32)

    x = jnp.ones(3)
    assert faults_of(looped(jnp.sin), x) == set()
    assert faults_of(looped(to_host), x) == {"pure_callback"}
    assert any("float64" in fault for fault in faults_of(jax.jit(wide), x))
    unknown = jax.ShapeDtypeStruct(jax.export.symbolic_shape("n"), jnp.float32)
    assert any("shape" in fault for fault in faults_of(jax.jit(jnp.sin), unknown))


@pytest.fixture
def accelerated(monkeypatch):
    """Makes trainers choose what they choose on an accelerator.

    That is several steps in one call, and loops and branches on the device.
    """
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    get_trainer.cache_clear()
    yield
    get_trainer.cache_clear()


def assert_steps_lower(config, teacher_source):
    """Checks an epoch of steps in one call.

    Returns the trainer, and the shapes of its state and its data.
    """
    student = get_trainer(resolve(config).student_training(teacher_source))
    data = student.data
    variables = jax.eval_shape(
        lambda: teacher_model(student.spec, data).init(
            jax.random.key(0), jnp.zeros((1, *data.image_shape)), train=False
        )
    )

    def train_data(images):
        table = jax.ShapeDtypeStruct(
            (len(images), data.source.views.num, data.num_classes), jnp.float32
        )
        teacher = {"none": None, "table": table}.get(teacher_source, variables)
        if data.is_streamed:
            return steps.TrainData(None, None, teacher)
        return steps.TrainData(shapes(images.images), shapes(images.labels), teacher)

    outer = train_data(data.outer) if student.loss_weighting else None
    device_data = train_data(data.train)._replace(outer=outer)
    with contextlib.closing(student.inputs(0, 0)) as inputs_of_calls:
        num_steps, inputs = next(inputs_of_calls)
    assert num_steps > 1 or data.is_streamed
    state = jax.eval_shape(student.init, 0)
    assert_lowers(
        jax.jit(functools.partial(student.train_steps, 0)), state, device_data, inputs
    )
    return student, state, device_data._replace(teacher=variables)


@pytest.mark.parametrize(
    "argument, teacher_source",
    [
        ("ce", "none"),
        ("dkd,policy=none,cutout=2,mixup=0.2", "network"),
        ("reviewkd", "features"),
        ("bikd,terms=ltkd,outer_loss=mix", "table"),
        ("bikd,lookahead=3", "network"),
    ],
)
def test_steps_lower(argument, teacher_source, accelerated, tmp_path):
    assert_steps_lower(tiny(tmp_path, argument), teacher_source)


def test_run_functions_lower(accelerated, tmp_path):
    """The initial state, indices, steps, evaluation, and the teacher's logits."""
    student, state, data = assert_steps_lower(tiny(tmp_path, "ltkd"), "table")
    assert_lowers(student.init, np.int32(0))
    sizes = dict(num_examples=50, batch_size=16, num_views=9, random_bits=True)
    assert_lowers(
        jax.jit(functools.partial(sampling.lookahead_indices, lookahead=2, **sizes)),
        np.int32(0),
        np.int32(0),
    )

    def evaluate(variables, batch):
        return steps.eval_step(
            variables, batch, model=student.model, preprocess=student.data.preprocess
        )

    def logits(data, indices):
        options = dict(
            views=student.data.source.views, preprocess=student.data.preprocess
        )
        teacher_fn = steps.network_teacher(teacher_model(student.spec, student.data))
        return steps.make_batch(
            data, indices, teacher_fn=teacher_fn, **options
        ).teacher.logits

    numbers = np.zeros(64, np.int32)
    images = np.zeros((64, *student.data.image_shape), np.uint8)
    assert_lowers(
        jax.jit(evaluate),
        state.variables,
        steps.EvalBatch(images, numbers, numbers == 0),
    )
    assert_lowers(jax.jit(logits), data, sampling.BatchIndices(numbers, numbers))


def test_streamed_steps_lower(accelerated, tmp_path):
    """With all augmentation that is computed on the device."""
    config = streamed(
        prepare_insects(tmp_path), tmp_path, "ce,policy=autoaugment,cutout=2,mixup=0.2"
    )
    assert_steps_lower(config, "none")


# The terms of reviewkd need features; they are lowered with its steps.
@pytest.mark.parametrize("name", sorted(set(methods.METHODS) - {"reviewkd"}))
def test_terms_lower(name):
    """With their gradient with respect to the student's logits."""
    counts = np.arange(10, 0, -1)
    objective = methods.create(name, counts, groups.ClassGroups.from_counts(counts))

    @jax.jit
    def gradient(student, teacher, labels, step):
        def loss(student):
            terms = objective(methods.Predictions(student, teacher, labels))
            return jnp.mean(jnp.sum(terms * objective.weights(step)[None, :], axis=-1))

        return jax.value_and_grad(loss)(student)

    logits = np.zeros((8, 10), np.float32)
    assert_lowers(gradient, logits, logits, np.zeros(8, np.int32), np.int32(0))


@pytest.mark.parametrize(
    "argument, teacher_source, parallel",
    [
        ("ltkd", "table", "jit"),
        ("dkd,policy=none,cutout=2,mixup=0.2", "none", "pmap"),
        ("bikd,lookahead=3", "table", "pmap"),
    ],
)
def test_argument_shapes(argument, teacher_source, parallel, tmp_path):
    """The described arguments of a call are those that the loop passes."""
    config = tiny(tmp_path, argument, parallel=parallel, steps_per_call=2)
    assert_described(config, teacher_source)


def test_argument_shapes_of_streamed_images(tmp_path):
    data_dir = prepare_insects(tmp_path)
    config = streamed(
        data_dir, tmp_path, "bikd,lookahead=3,mixup=0.2", steps_per_call=2
    )
    assert_described(config, "none")


def assert_described(config, teacher_source):
    trainer = get_trainer(resolve(config).student_training(teacher_source))
    assert trainer.parallel.num_devices == 8
    teacher = None
    if teacher_source == "table":
        num_images = len(trainer.data.train), trainer.data.source.views.num
        teacher = np.zeros((*num_images, trainer.data.num_classes), np.float32)
    state = trainer.parallel.replicate(trainer.init(0))
    data = trainer.device_data(teacher)
    with contextlib.closing(trainer.inputs(0, 0)) as inputs_of_calls:
        _, inputs = next(inputs_of_calls)
    arguments = state, data, inputs
    described = trainer.argument_shapes(shapes(teacher))
    assert jax.tree.structure(described) == jax.tree.structure(arguments)
    for shape, array in zip(jax.tree.leaves(described), jax.tree.leaves(arguments)):
        assert (shape.shape, shape.dtype) == (array.shape, array.dtype)
        assert shape.sharding.is_equivalent_to(array.sharding, array.ndim)
