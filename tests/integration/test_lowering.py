"""What runs on a TPU is not run here, but lowered for it: every jit step, and for CUDA, with nothing that they lack."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.small_runs import prepare_insects, streamed, tiny
from jax.extend import core

from experiments.trainer import build
from ltkd_jax import groups, methods
from ltkd_jax.data import sampling
from ltkd_jax.training import bilevel_steps, steps

PLATFORMS = ("tpu", "cuda")
WIDE = (np.float64, np.int64, np.uint64, np.complex128)


def equations(jaxpr):
    """Every equation, those inside loops, branches and calls too."""
    yield from jaxpr.eqns
    for inner in core.subjaxprs(jaxpr):
        yield from equations(inner)


def faults(jaxpr):
    """What an accelerator lacks, or has at a price: 64 bits, calls to the host, shapes that are not known."""
    found = set()
    for equation in equations(jaxpr):
        name = equation.primitive.name
        if "callback" in name or name in ("infeed", "outfeed"):
            found.add(name)
        for variable in (*equation.invars, *equation.outvars):
            if getattr(variable.aval, "dtype", None) in WIDE:
                found.add(f"{variable.aval.dtype} in {name}")
            if not all(isinstance(size, int) for size in getattr(variable.aval, "shape", ())):
                found.add(f"shape {variable.aval.shape} in {name}")
    return found


def shapes(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def assert_lowers(fn, *arguments):
    """A compiled function, for arguments of these shapes."""
    like = shapes(arguments)
    assert faults(jax.make_jaxpr(fn)(*like).jaxpr) == set()
    exported = jax.export.export(fn, platforms=PLATFORMS)(*like)
    assert exported.platforms == PLATFORMS and len(exported.mlir_module_serialized) > 1000


def test_the_search_finds_what_it_looks_for():
    def looped(fn):
        return lambda x: jax.lax.scan(lambda c, _: (fn(c), None), x, None, length=2)[0]

    def to_host(x):
        return jax.pure_callback(np.sin, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    def wide(x):
        with jax.enable_x64(True):
            return x.astype(jnp.float64).astype(jnp.float32)

    x = jnp.ones(3)
    assert faults(jax.make_jaxpr(looped(jnp.sin))(x).jaxpr) == set()
    assert faults(jax.make_jaxpr(looped(to_host))(x).jaxpr) == {"pure_callback"}
    assert any("float64" in fault for fault in faults(jax.make_jaxpr(jax.jit(wide))(x).jaxpr))
    unknown = jax.export.symbolic_shape("n")
    shape = jax.ShapeDtypeStruct(unknown, jnp.float32)
    assert any("shape" in fault for fault in faults(jax.make_jaxpr(jax.jit(jnp.sin))(shape).jaxpr))


@pytest.fixture
def accelerated(monkeypatch):
    """Programs as an accelerator gets them: several steps in one call, loops and branches on the device."""
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    build._program.cache_clear()
    yield
    build._program.cache_clear()


def arguments_of(config, kind):
    """A student's program, and state, data and rows as its step takes them; no table is built for it."""
    program = build.student_program(config, kind)
    data = program.data

    def of(images):
        variables = jax.eval_shape(
            lambda: build.teacher_model(config, data).init(
                jax.random.key(0), jnp.zeros((1, *data.image_shape)), train=False
            )
        )
        table = jax.ShapeDtypeStruct((len(images), data.source.views.num, data.num_classes), jnp.float32)
        teacher = {"none": None, "table": table}.get(kind, variables)
        return steps.TrainData(
            None if data.streams else shapes(images.images), None if data.streams else shapes(images.labels), teacher
        )

    train_data = of(data.train)
    if program.weighting is not None:
        train_data = bilevel_steps.BilevelData(train_data, of(data.meta))
    with contextlib.closing(program.chunks(0, 0)) as chunks:
        count, rows = next(chunks)
    assert count > 1 or data.streams
    return program, jax.eval_shape(program.init, 0), train_data, rows


@pytest.mark.parametrize(
    "argument, kind",
    [
        ("ce", "none"),
        ("ltkd", "table"),
        pytest.param("dkd,policy=none,cutout=2,mixup=0.2", "network", marks=pytest.mark.slow),
        pytest.param("reviewkd", "features", marks=pytest.mark.slow),
        ("bikd,terms=ltkd,outer=mix", "table"),
        pytest.param("bikd,lookahead=3", "network", marks=pytest.mark.slow),
    ],
)
def test_every_step_lowers(argument, kind, accelerated, tmp_path):
    """An epoch of steps in one call, the evaluation, the start, and the rows of an epoch."""
    config = tiny(tmp_path, argument)
    program, state, train_data, rows = arguments_of(config, kind)
    assert_lowers(program.init, np.int32(0))
    assert_lowers(program._compiled(), state, train_data, rows)
    assert_lowers(program._source._plan, np.int32(0), np.int32(0))
    if argument == "ltkd":
        places = program.parallel.shard(np.zeros(64, np.int32), 0)
        batch = steps.EvalBatch(jnp.zeros((64, *program.data.image_shape), jnp.uint8), places, places == 0)
        assert_lowers(program.evaluate.__self__._step, state.variables, batch)
        logits = build.table_logits(config, program.data)
        teacher = train_data._replace(teacher=state.variables)  # of the same model here
        assert_lowers(logits, teacher, sampling.Plan(places, places))


def test_a_streamed_step_lowers(accelerated, tmp_path):
    """With all of the augmentation that is drawn on the device."""
    config = streamed(prepare_insects(tmp_path), tmp_path, "ce,policy=autoaugment,cutout=2,mixup=0.2")
    program, *arguments = arguments_of(config, "none")
    assert_lowers(program._compiled(), *arguments)


@pytest.mark.parametrize("name", sorted(set(methods.METHODS) - {"reviewkd"}))  # whose terms need features: above
def test_every_methods_terms_lower(name):
    """With their gradient by the student's logits."""
    objective = methods.create(name, np.arange(10, 0, -1), groups.ClassGroups.from_counts(np.arange(10, 0, -1)))

    @jax.jit
    def gradient(student, teacher, labels, step):
        def loss(student):
            terms = objective(methods.Predictions(student, teacher, labels))
            return jnp.mean(jnp.sum(terms * objective.weights(step)[None, :], axis=-1))

        return jax.value_and_grad(loss)(student)

    logits = np.zeros((8, 10), np.float32)
    assert_lowers(gradient, logits, logits, np.zeros(8, np.int32), np.int32(0))
