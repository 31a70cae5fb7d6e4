"""Measures FLOPs, temporary memory and time of the bilevel step.

It is compared with naive differentiation. FLOPs are the compiler's cost analysis of the
compiled step, temporary memory its memory analysis. The cost analysis counts the body
of a loop once; only the rows "compiled loop" have one. Times are the minimum over the
repeats, all variants in turns. Images are random, since they do not change the costs.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

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

_IMAGE_SHAPE = (32, 32, 3)


@dataclasses.dataclass(frozen=True)
class Variant:
    """Describes a row of the table.

    Attributes:
      name: of the row.
      fn: function of `Iteration.arguments`.
      num_lookahead: K, the batches in its arguments.
      timed: whether it is run; else only the compiler's counts are taken.
    """

    name: str
    fn: Callable
    num_lookahead: int = 1
    timed: bool = True


@dataclasses.dataclass(frozen=True)
class Cost:
    """Holds what a variant costs.

    Attributes:
      flops: of a step.
      memory: temporary bytes.
      seconds: of a step, None if it was not timed.
    """

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
    """Computes `bilevel.step` without its savings, for one device.

    It differentiates through the virtual step, and then computes the student's gradient
    anew. `problem.axis_name` is None; the arguments are those of `bilevel.step`.
    """
    outer_loss, hypergradient = bilevel.hypergradient(
        problem, params, meta.params, batches, outer_batch, learning_rate, unroll=unroll
    )
    meta = bilevel.accumulate(meta, hypergradient)
    if update_weight_net:
        meta = bilevel.update(meta, optimizer)
    first_batch = jax.tree.map(lambda x: x[0], batches)

    def inner_loss(params):
        terms, aux = problem.terms_fn(params, first_batch)
        # The features carry no gradient, as in `bilevel.step`.
        weights = problem.weight_fn(meta.params, jax.lax.stop_gradient(aux.features))
        return jnp.mean(jnp.sum(weights * terms, axis=-1)), (terms, aux, weights)

    gradient, (terms, aux, weights) = jax.grad(inner_loss, has_aux=True)(params)
    return bilevel.StepResult(gradient, meta, terms, aux, weights, outer_loss)


class Iteration:
    """Defines a complete outer iteration as a function of arrays.

    That is the virtual steps, the student's step and the weight net's.
    """

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
        # Any distinct counts give groups of real sizes.
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

    def arguments(self, num_lookahead: int):
        """Returns the arguments of `step`, random and of real sizes.

        They are a state, batches `[K, B, …]`, an outer batch `[B, …]`, and the
        teacher's variables.
        """
        rng = np.random.default_rng(0)

        def random_batch(*leading):
            shape = (*leading, self._batch_size)
            images = rng.normal(size=(*shape, *_IMAGE_SHAPE))
            labels = rng.integers(0, self._num_classes, shape)
            logits = rng.normal(size=(*shape, self._num_classes))
            return steps.Batch(
                jnp.asarray(images, jnp.float32),
                jnp.asarray(labels, jnp.int32),
                steps.TeacherOutputs(jnp.asarray(logits, jnp.float32)),
            )

        num_terms = len(self._objective.terms)
        state = states.create(
            self._student, self._optimizer, num_terms, _IMAGE_SHAPE, 0
        )
        state = self._weighting.init_weight_net(state, 0)
        batches = random_batch(num_lookahead)
        outer_batch = random_batch()
        image = jnp.zeros((1, *_IMAGE_SHAPE))
        teacher = self._teacher.init(jax.random.key(0), image, train=False)
        return state, batches, outer_batch, teacher

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
        """Returns the state after the iteration.

        Args:
          state: see `arguments`.
          batches: see `arguments`.
          outer_batch: see `arguments`.
          teacher: see `arguments`.
          step_fn: `bilevel.step` or `naive`.
          teacher_in_step: whether the teacher's logits of the first batch are computed
            in the step.
          **options: of `step_fn`.
        """
        if teacher_in_step:
            logits = self.teacher_logits(teacher, batches.images[0])
            all_logits = batches.teacher.logits.at[0].set(logits)
            batches = batches._replace(teacher=steps.TeacherOutputs(all_logits))
        problem = bilevel_steps.make_problem(
            state.batch_stats,
            model=self._student,
            objective=self._objective,
            weighting=self._weighting,
        )
        result = step_fn(
            problem,
            state.params,
            state.meta,
            batches,
            outer_batch,
            0.1,
            optimizer=self._weighting.optimizer,
            update_every=self._weighting.update_every,
            **options,
        )
        state = steps.apply_gradients(
            state,
            result.gradient,
            result.terms,
            result.weights,
            *result.aux.extra,
            optimizer=self._optimizer,
            axis_name=None,
        )
        return state._replace(meta=result.meta)

    def teacher_logits(self, teacher, images):
        """Returns the teacher's logits, in evaluation mode."""
        return self._teacher.apply(teacher, images, train=False)


def variants(iteration: Iteration) -> list[Variant]:
    """Returns the rows: the fast step, the naive one, lookaheads, and the teacher."""
    # On CPU, XLA's convolutions are many times slower inside a loop or a branch, so
    # that a step with one is not timed there.
    time_loops = jax.default_backend() != "cpu"

    def variant(name, num_lookahead=1, timed=True, **options):
        fn = functools.partial(iteration.step, **options)
        return Variant(name, fn, num_lookahead, timed)

    def teacher_forward(state, batches, outer_batch, teacher):
        return iteration.teacher_logits(teacher, outer_batch.images)

    rows = [
        variant("fast, weight net unchanged", update_weight_net=False),
        variant("fast, weight net changed", update_weight_net=True),
        variant(
            "fast, decided on the device", timed=time_loops, update_weight_net=None
        ),
        variant("naive", step_fn=naive),
        variant("naive, teacher in the step", step_fn=naive, teacher_in_step=True),
    ]
    for num_lookahead in (2, 5):
        name = f"K = {num_lookahead}, written out"
        options = {"update_weight_net": False, "unroll": True}
        rows.append(variant(name, num_lookahead, **options))
    for num_lookahead in (2, 5):
        name = f"K = {num_lookahead}, compiled loop"
        options = {"update_weight_net": False, "timed": time_loops}
        rows.append(variant(name, num_lookahead, **options))
    return [*rows, Variant("teacher, one forward", teacher_forward)]


def measure(
    variants: list[Variant], iteration: Iteration, repeats: int
) -> dict[str, Cost]:
    """Returns the costs by name; with no repeats, nothing is timed."""
    costs = {}
    calls = {}
    arguments = {}
    for variant in variants:
        num_lookahead = variant.num_lookahead
        # Compilation needs the shapes only, and no memory for the arrays.
        shapes = jax.eval_shape(functools.partial(iteration.arguments, num_lookahead))
        compiled: Any = jax.jit(variant.fn).lower(*shapes).compile()
        costs[variant.name] = Cost(
            flops=compiled.cost_analysis()["flops"],
            memory=compiled.memory_analysis().temp_size_in_bytes,
        )
        if variant.timed and repeats:
            if num_lookahead not in arguments:
                arguments[num_lookahead] = iteration.arguments(num_lookahead)
            call = timing.blocking(compiled, *arguments[num_lookahead])
            calls[variant.name] = call
    seconds = timing.best(calls, repeats) if repeats else {}
    return {
        name: dataclasses.replace(cost, seconds=seconds.get(name))
        for name, cost in costs.items()
    }


def official_flops(costs: dict[str, Cost]) -> float:
    """Returns the FLOPs of the official algorithm.

    That is the naive step, and the teacher on both of its batches.
    """
    naive_step = costs["naive, teacher in the step"].flops
    return naive_step + costs["teacher, one forward"].flops


def fast_flops(costs: dict[str, Cost], update_every: int) -> float:
    """Returns the mean FLOPs of the fast step with the teacher's table.

    One in `update_every` steps updates the weight net.
    """
    unchanged = costs["fast, weight net unchanged"].flops
    changed = costs["fast, weight net changed"].flops
    return ((update_every - 1) * unchanged + changed) / update_every


def table(costs: dict[str, Cost]) -> writers.Table:
    """Returns the table of the costs and of their ratios to the naive step's."""
    naive_cost = costs["naive"]
    rows = []
    for name, cost in costs.items():
        row = [
            name,
            f"{cost.flops / 1e9:.2f}",
            f"{cost.flops / naive_cost.flops:.3f}",
            f"{cost.memory / 2**20:.1f}",
            f"{cost.memory / naive_cost.memory:.3f}",
        ]
        if cost.seconds is None or naive_cost.seconds is None:
            row += ["–", "–"]
        else:
            row += [f"{cost.seconds:.3f}", f"{cost.seconds / naive_cost.seconds:.3f}"]
        rows.append(row)
    header = [
        "step",
        "GFLOP",
        "/ naive",
        "temp MiB",
        "/ naive",
        "seconds",
        "/ naive",
    ]
    return writers.Table(header, rows)


def report(*, repeats: int, **options) -> str:
    """Returns the measurement as text.

    Args:
      repeats: timed rounds.
      **options: the arguments of `Iteration`.
    """
    iteration = Iteration(**options)
    costs = measure(variants(iteration), iteration, repeats)
    official = official_flops(costs)
    ratio_5 = fast_flops(costs, update_every=5) / official
    ratio_1 = fast_flops(costs, update_every=1) / official
    loop_5 = costs["K = 5, compiled loop"].memory
    loop_2 = costs["K = 2, compiled loop"].memory
    lines = [
        f"{options['teacher']} → {options['student']}, {options['method']}, batch "
        f"{options['batch_size']}, {options['num_classes']} classes",
        writers.as_text(table(costs)),
        "FLOPs of our step (table, k = 5) / official algorithm (naive, two teacher "
        f"forwards): {ratio_5:.3f}; with k = 1: {ratio_1:.3f}",
        f"Temporary memory, K = 5 / K = 2, compiled loop: {loop_5 / loop_2:.3f}",
        f"{provenance.short()}, precision {options['precision']}",
    ]
    return "\n".join(lines)
