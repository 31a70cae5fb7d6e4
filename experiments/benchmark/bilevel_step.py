"""The bilevel step beside naive differentiation: FLOPs, temporary memory and time, all variants interleaved.

FLOPs are the compiler's cost analysis of the whole step, temporary memory its memory analysis. Both are of steps
without loops, which the cost analysis would count once; only the rows "compiled loop" have one. Times are the minimum
over the repeats. Images are random: they change no cost.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import provenance
from experiments.benchmark import timing
from experiments.reporting import writers
from ltkd_jax import bilevel, groups, methods, models
from ltkd_jax.training import bilevel_steps, steps
from ltkd_jax.training import state as states

SHAPE = (32, 32, 3)


@dataclasses.dataclass(frozen=True)
class Pair:
    """What is distilled into what."""

    teacher: str = "resnet32x4"
    student: str = "resnet8x4"
    method: str = "kd"
    batch_size: int = 100
    num_classes: int = 100
    precision: str = "float32"


def naive(problem, params, meta, batches, outer_batch, learning_rate, *, optimizer, every=1, changes=True, unroll=True):
    """`bilevel.step` without its savings: `jax.grad` through the virtual step, then a real update from scratch.

    Of one device: `problem.axis_name` is None.
    """
    outer_loss, hyper = bilevel.hypergradient(
        problem, params, meta.params, batches, outer_batch, learning_rate, unroll=unroll
    )
    after = bilevel.gather(meta, hyper)
    after = bilevel.update(after, optimizer) if changes else after
    first = jax.tree.map(lambda x: x[0], batches)

    def inner_loss(params):
        terms, aux = problem.terms_fn(params, first)
        weights = problem.weight_fn(after.params, jax.lax.stop_gradient(aux.features))
        return jnp.mean(jnp.sum(weights * terms, axis=-1)), (terms, aux, weights)

    gradient, (terms, aux, weights) = jax.grad(inner_loss, has_aux=True)(params)
    return bilevel.Step(gradient, after, terms, aux, weights, outer_loss)


class Iteration:
    """One whole outer iteration of a pair as a function of arrays: virtual and real step, weight net, optimizer."""

    def __init__(self, pair: Pair):
        self.pair = pair
        self._student = models.create(pair.student, pair.num_classes, precision=pair.precision)
        self._teacher = models.create(pair.teacher, pair.num_classes, precision=pair.precision)
        counts = np.arange(pair.num_classes, 0, -1)
        by_rank = groups.ClassGroups.from_counts(counts)
        self._objective = methods.create(pair.method, counts, by_rank)
        self._optimizer = states.sgd(0.1, momentum=0.9, weight_decay=5e-4)
        self._weighting = bilevel_steps.Weighting(
            net=models.WeightNet(len(self._objective.terms)),
            features=methods.features(self._objective, ("student_ce", "teacher_ce")),
            num_features=2,
            outer_loss=methods.outer_loss(self._objective, "hard"),
            scales=(1.0,) * len(self._objective.terms),
            optimizer=optax.adam(1e-3),
            every=5,
            groups=by_rank,
        )

    def arguments(self, ahead: int, seed: int = 0):
        """State, batches `[K, B, …]`, a meta batch, and the teacher's variables; random, but of the real sizes."""
        rng = np.random.default_rng(seed)
        size, classes = self.pair.batch_size, self.pair.num_classes

        def batch(*lead):
            return steps.Batch(
                jnp.asarray(rng.normal(size=(*lead, size, *SHAPE)), jnp.float32),
                jnp.asarray(rng.integers(0, classes, (*lead, size)), jnp.int32),
                jnp.asarray(rng.normal(size=(*lead, size, classes)), jnp.float32),
            )

        state = states.create(self._student, self._optimizer, len(self._objective.terms), SHAPE, seed)
        teacher = self._teacher.init(jax.random.key(seed), jnp.zeros((1, *SHAPE)), train=False)
        return self._weighting.add_to(state, seed), batch(ahead), batch(), teacher

    def step(self, state, batches, meta_batch, teacher, *, step_fn=bilevel.step, in_step: bool = False, **options):
        """The iteration; with `in_step` the teacher's logits of the first batch are computed in it."""
        if in_step:
            logits = self.teach(teacher, batches.images[0])
            batches = batches._replace(teacher_logits=batches.teacher_logits.at[0].set(logits))
        problem = bilevel_steps.problem(
            state.batch_stats, model=self._student, objective=self._objective, weighting=self._weighting
        )
        taken = step_fn(
            problem, state.params, state.meta, batches, meta_batch, 0.1,
            optimizer=self._weighting.optimizer, every=self._weighting.every, **options,
        )  # fmt: skip
        after = steps.advance(
            state, taken.gradient, taken.terms, taken.weights, taken.aux.extra,
            optimizer=self._optimizer, axis_name=None,
        )  # fmt: skip
        return after._replace(meta=taken.meta)

    def teach(self, teacher, images):
        """The teacher's logits, in evaluation mode."""
        return self._teacher.apply(teacher, images, train=False)


@dataclasses.dataclass(frozen=True)
class Variant:
    """One row: a function, its arguments, and whether it is timed."""

    name: str
    fn: Callable
    ahead: int = 1
    timed: bool = True


def variants(iteration: Iteration) -> list[Variant]:
    """The fast path with and without an update of the weight net, the naive step, and lookaheads."""
    loops = jax.default_backend() != "cpu"  # inside one, XLA's convolutions are many times slower there

    def variant(name, ahead=1, timed=True, **options):
        return Variant(name, functools.partial(iteration.step, **options), ahead, timed)

    return [
        variant("fast, weight net unchanged", changes=False),
        variant("fast, weight net changed", changes=True),
        variant("fast, decided on the device", changes=None, timed=loops),
        variant("naive", step_fn=naive),
        variant("naive, teacher in the step", step_fn=naive, in_step=True),
        variant("K = 2, written out", ahead=2, changes=False, unroll=True),
        variant("K = 5, written out", ahead=5, changes=False, unroll=True),
        variant("K = 2, compiled loop", ahead=2, timed=loops, changes=False),
        variant("K = 5, compiled loop", ahead=5, timed=loops, changes=False),
        Variant("teacher, one forward", lambda state, batches, meta, teacher: iteration.teach(teacher, meta.images)),
    ]


@dataclasses.dataclass(frozen=True)
class Cost:
    """FLOPs, temporary bytes, and seconds, None where not timed."""

    flops: float
    memory: int
    seconds: float | None = None


def analyse(variant: Variant, iteration: Iteration):
    """A variant compiled for its arguments, and the compiler's counts."""
    shapes = jax.eval_shape(lambda: iteration.arguments(variant.ahead))
    compiled = jax.jit(variant.fn).lower(*shapes).compile()
    return compiled, Cost(compiled.cost_analysis()["flops"], compiled.memory_analysis().temp_size_in_bytes)


def measure(measured: list[Variant], iteration: Iteration, repeats: int) -> dict[str, Cost]:
    """Costs by name; the repeats go round the variants, so that a slow minute slows all of them."""
    compiled = {variant.name: analyse(variant, iteration) for variant in measured}
    timed = [variant for variant in measured if variant.timed and repeats]
    arguments = {ahead: iteration.arguments(ahead) for ahead in {variant.ahead for variant in timed}}
    calls = {v.name: timing.waiting(compiled[v.name][0], *arguments[v.ahead]) for v in timed}
    seconds = timing.best(calls, repeats) if repeats else {}
    return {name: dataclasses.replace(cost, seconds=seconds.get(name)) for name, (_, cost) in compiled.items()}


def official(costs: dict[str, Cost]) -> float:
    """FLOPs of the official algorithm: the naive step, its teacher, and a teacher's forward of the meta batch."""
    return costs["naive, teacher in the step"].flops + costs["teacher, one forward"].flops


def ours(costs: dict[str, Cost], every: int) -> float:
    """Mean FLOPs of our iteration with the teacher's table: the weight net changes in one of `every`."""
    same, changed = costs["fast, weight net unchanged"].flops, costs["fast, weight net changed"].flops
    return ((every - 1) * same + changed) / every


def table(costs: dict[str, Cost]) -> writers.Table:
    """The costs, and their ratios to the naive step's."""
    base, rows = costs["naive"], []
    for name, cost in costs.items():
        row = [name, f"{cost.flops / 1e9:.2f}", f"{cost.flops / base.flops:.3f}"]
        row += [f"{cost.memory / 2**20:.1f}", f"{cost.memory / base.memory:.3f}"]
        row += ["–", "–"] if cost.seconds is None else [f"{cost.seconds:.3f}", f"{cost.seconds / base.seconds:.3f}"]
        rows.append(row)
    return writers.Table(["step", "GFLOP", "/ naive", "temp MiB", "/ naive", "seconds", "/ naive"], rows)


def report(pair: Pair, repeats: int) -> str:
    """The whole measurement as text."""
    iteration = Iteration(pair)
    costs = measure(variants(iteration), iteration, repeats)
    lines = [
        f"{pair.teacher} → {pair.student}, {pair.method}, batch {pair.batch_size}, {pair.num_classes} classes",
        writers.as_text(table(costs)),
        "FLOPs of our step (table, k = 5) / official algorithm (naive, two teacher forwards): "
        f"{ours(costs, 5) / official(costs):.3f}; with k = 1: {ours(costs, 1) / official(costs):.3f}",
        "Temporary memory, K = 5 / K = 2, compiled loop: "
        f"{costs['K = 5, compiled loop'].memory / costs['K = 2, compiled loop'].memory:.3f}",
    ]
    lines.append(f"{provenance.short()}, precision {pair.precision}")
    return "\n".join(lines)
