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

_SHAPE = (32, 32, 3)


@dataclasses.dataclass(frozen=True)
class Variant:
    """One row: a function of `Iteration.arguments`, for how many lookahead batches, and whether it is timed."""

    name: str
    fn: Callable
    num_lookahead: int = 1
    timed: bool = True


@dataclasses.dataclass(frozen=True)
class Cost:
    """FLOPs, temporary bytes, and seconds, None where not timed."""

    flops: float
    memory: int
    seconds: float | None = None


def naive(
    problem,
    params,
    meta,
    batches,
    outer_batch,
    learning_rate,
    *,
    optimizer,
    update_every=1,
    update_weight_net=True,
    unroll=True,
):
    """Does `bilevel.step` without its savings: `jax.grad` through the virtual step, then a real step from scratch.

    It is for one device: `problem.axis_name` is None.
    """
    outer_loss, hypergradient = bilevel.hypergradient(
        problem, params, meta.params, batches, outer_batch, learning_rate, unroll=unroll
    )
    meta = bilevel.accumulate(meta, hypergradient)
    meta = bilevel.update(meta, optimizer) if update_weight_net else meta
    batch = jax.tree.map(lambda x: x[0], batches)

    def inner_loss(params):
        terms, aux = problem.terms_fn(params, batch)
        weights = problem.weight_fn(meta.params, jax.lax.stop_gradient(aux.features))
        return jnp.mean(jnp.sum(weights * terms, axis=-1)), (terms, aux, weights)

    gradient, (terms, aux, weights) = jax.grad(inner_loss, has_aux=True)(params)
    return bilevel.StepResult(gradient, meta, terms, aux, weights, outer_loss)


class Iteration:
    """One whole outer iteration as a function of arrays: virtual and real step, weight net, optimizer."""

    def __init__(
        self,
        *,
        teacher: str,
        student: str,
        method: str,
        batch_size: int,
        num_classes: int,
        precision: str,
    ):
        self._batch_size = batch_size
        self._num_classes = num_classes
        self._student = models.create(student, num_classes, precision=precision)
        self._teacher = models.create(teacher, num_classes, precision=precision)
        counts = np.arange(num_classes, 0, -1)
        by_rank = groups.ClassGroups.from_counts(counts)
        self._objective = methods.create(method, counts, by_rank)
        self._optimizer = states.sgd(0.1, momentum=0.9, weight_decay=5e-4)
        self._weighting = bilevel_steps.LearnedWeighting(
            net=models.WeightNet(len(self._objective.terms)),
            features_fn=methods.features(self._objective, ("student_ce", "teacher_ce")),
            num_features=2,
            outer_loss_fn=methods.outer_loss(self._objective, "hard"),
            scales=(1.0,) * len(self._objective.terms),
            optimizer=optax.adam(1e-3),
            update_every=5,
            groups=by_rank,
        )

    def arguments(self, num_lookahead: int, seed: int = 0):
        """Returns a state, batches `[K, B, …]`, an outer batch, and the teacher's variables; random, of real sizes."""
        rng = np.random.default_rng(seed)

        def batch(*leading):
            shape = (*leading, self._batch_size)
            return steps.Batch(
                jnp.asarray(rng.normal(size=(*shape, *_SHAPE)), jnp.float32),
                jnp.asarray(rng.integers(0, self._num_classes, shape), jnp.int32),
                steps.TeacherOutputs(
                    jnp.asarray(
                        rng.normal(size=(*shape, self._num_classes)), jnp.float32
                    )
                ),
            )

        state = states.create(
            self._student, self._optimizer, len(self._objective.terms), _SHAPE, seed
        )
        teacher = self._teacher.init(
            jax.random.key(seed), jnp.zeros((1, *_SHAPE)), train=False
        )
        return (
            self._weighting.init_weight_net(state, seed),
            batch(num_lookahead),
            batch(),
            teacher,
        )

    def step(
        self,
        state,
        batches,
        outer_batch,
        teacher,
        *,
        step_fn=bilevel.step,
        teacher_in_step=False,
        **options,
    ):
        """Returns the state after the iteration; `teacher_in_step` computes the logits of the first batch in it."""
        if teacher_in_step:
            logits = self.teacher_logits(teacher, batches.images[0])
            outputs = steps.TeacherOutputs(batches.teacher.logits.at[0].set(logits))
            batches = batches._replace(teacher=outputs)
        problem = bilevel_steps.make_problem(
            state.batch_stats,
            model=self._student,
            objective=self._objective,
            weighting=self._weighting,
        )
        result = step_fn(
            problem, state.params, state.meta, batches, outer_batch, 0.1,
            optimizer=self._weighting.optimizer, update_every=self._weighting.update_every, **options,
        )  # fmt: skip
        state = steps.apply_gradients(
            state, result.gradient, result.terms, result.weights, *result.aux.extra,
            optimizer=self._optimizer, axis_name=None,
        )  # fmt: skip
        return state._replace(meta=result.meta)

    def teacher_logits(self, teacher, images):
        """Returns the teacher's logits, in evaluation mode."""
        return self._teacher.apply(teacher, images, train=False)


def variants(iteration: Iteration) -> list[Variant]:
    """Returns the fast path with and without an update of the weight net, the naive step, and lookaheads."""
    loops = (
        jax.default_backend() != "cpu"
    )  # inside one, XLA's convolutions are many times slower there

    def variant(name, num_lookahead=1, timed=True, **options):
        return Variant(
            name, functools.partial(iteration.step, **options), num_lookahead, timed
        )

    def teacher_forward(state, batches, outer_batch, teacher):
        return iteration.teacher_logits(teacher, outer_batch.images)

    return [
        variant("fast, weight net unchanged", update_weight_net=False),
        variant("fast, weight net changed", update_weight_net=True),
        variant("fast, decided on the device", update_weight_net=None, timed=loops),
        variant("naive", step_fn=naive),
        variant("naive, teacher in the step", step_fn=naive, teacher_in_step=True),
        variant(
            "K = 2, written out", num_lookahead=2, update_weight_net=False, unroll=True
        ),
        variant(
            "K = 5, written out", num_lookahead=5, update_weight_net=False, unroll=True
        ),
        variant(
            "K = 2, compiled loop",
            num_lookahead=2,
            timed=loops,
            update_weight_net=False,
        ),
        variant(
            "K = 5, compiled loop",
            num_lookahead=5,
            timed=loops,
            update_weight_net=False,
        ),
        Variant("teacher, one forward", teacher_forward),
    ]


def measure(
    variants: list[Variant], iteration: Iteration, repeats: int
) -> dict[str, Cost]:
    """Returns the costs by name."""
    costs, calls, arguments = {}, {}, {}
    for variant in variants:
        shapes = jax.eval_shape(
            functools.partial(iteration.arguments, variant.num_lookahead)
        )
        compiled = jax.jit(variant.fn).lower(*shapes).compile()
        memory = compiled.memory_analysis().temp_size_in_bytes
        costs[variant.name] = Cost(compiled.cost_analysis()["flops"], memory)
        if variant.timed and repeats:
            if variant.num_lookahead not in arguments:
                arguments[variant.num_lookahead] = iteration.arguments(
                    variant.num_lookahead
                )
            calls[variant.name] = timing.blocking(
                compiled, *arguments[variant.num_lookahead]
            )
    seconds = timing.best(calls, repeats) if repeats else {}
    return {
        name: dataclasses.replace(cost, seconds=seconds.get(name))
        for name, cost in costs.items()
    }


def official_flops(costs: dict[str, Cost]) -> float:
    """Returns the FLOPs of the official algorithm: the naive step, and the teacher on both of its batches."""
    return (
        costs["naive, teacher in the step"].flops + costs["teacher, one forward"].flops
    )


def fast_flops(costs: dict[str, Cost], update_every: int) -> float:
    """Returns the mean FLOPs of our step with the teacher's table: one in `update_every` updates the weight net."""
    unchanged, changed = (
        costs[f"fast, weight net {state}"].flops for state in ("unchanged", "changed")
    )
    return ((update_every - 1) * unchanged + changed) / update_every


def table(costs: dict[str, Cost]) -> writers.Table:
    """Returns the costs, and their ratios to the naive step's."""
    naive_cost = costs["naive"]
    rows = []
    for name, cost in costs.items():
        row = [name, f"{cost.flops / 1e9:.2f}", f"{cost.flops / naive_cost.flops:.3f}"]
        row += [f"{cost.memory / 2**20:.1f}", f"{cost.memory / naive_cost.memory:.3f}"]
        if cost.seconds is None:
            row += ["–", "–"]
        else:
            row += [f"{cost.seconds:.3f}", f"{cost.seconds / naive_cost.seconds:.3f}"]
        rows.append(row)
    return writers.Table(
        ["step", "GFLOP", "/ naive", "temp MiB", "/ naive", "seconds", "/ naive"], rows
    )


def report(*, repeats: int, **pair) -> str:
    """Returns the whole measurement as text; `pair` are the arguments of `Iteration`."""
    iteration = Iteration(**pair)
    costs = measure(variants(iteration), iteration, repeats)
    ratios = [
        fast_flops(costs, update_every) / official_flops(costs)
        for update_every in (5, 1)
    ]
    loops = costs["K = 5, compiled loop"].memory / costs["K = 2, compiled loop"].memory
    lines = [
        "{teacher} → {student}, {method}, batch {batch_size}, {num_classes} classes".format(
            **pair
        ),
        writers.as_text(table(costs)),
        "FLOPs of our step (table, k = 5) / official algorithm (naive, two teacher forwards): "
        f"{ratios[0]:.3f}; with k = 1: {ratios[1]:.3f}",
        f"Temporary memory, K = 5 / K = 2, compiled loop: {loops:.3f}",
        f"{provenance.short()}, precision {pair['precision']}",
    ]
    return "\n".join(lines)
