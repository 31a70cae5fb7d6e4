"""One of two processes of four devices each: `python one_of_two.py HOST:PORT,INDEX,2 FOLDER CASE…`; see test_hosts.py.

It does what both must do together, checks what one can check, and leaves the rest in the folder.
"""

import json
import pathlib
import sys

import jax
import numpy as np

from helpers.small_net import SmallNet, double, teacher_variables, train
from ltkd_jax.training import hosts, steps
from ltkd_jax.training.checkpoint import Checkpoints
from ltkd_jax.training.parallel import Parallel

STEPS = 6  # a collective of eight virtual devices in two processes takes its time


def primitives():
    """What is done once, what all must agree on, and whose errors all get."""
    me = jax.process_index()
    large = hosts.run_on_primary(lambda: {"array": np.arange(1000.0) + me, "me": me})
    assert large["me"] == 0 and (large["array"] == np.arange(1000.0)).all()
    calls = []
    hosts.run_on_primary(lambda: calls.append(1))
    assert len(calls) == (me == 0)
    for _ in range(3):
        assert hosts.all_gather(10 + me) == [10, 11]
    assert hosts.run_on_all(lambda: me) == me
    for culprit in range(2):
        try:
            hosts.run_on_all(lambda: 1 // (me != culprit))  # noqa: B023
            raise SystemExit("an error in one process must be raised in both")
        except ZeroDivisionError:
            pass
    try:
        hosts.run_on_primary(lambda: open("/nowhere/at/all"))
        raise SystemExit("an error in the first process must be raised in both")
    except FileNotFoundError as error:
        assert "/nowhere/at/all" in str(error)

    class Odd(Exception):  # of a function: pickle does not find it
        pass

    def odd():
        raise Odd("it says why")

    try:
        hosts.run_on_all(odd) if me == 1 else hosts.run_on_all(lambda: None)
    except Odd:
        assert me == 1
    except RuntimeError as error:
        assert me == 0 and "Odd: it says why" in str(error)


CASES = {"jit": ("jit", 0), "pmap": ("pmap", 0), "bikd": ("jit", 1)}  # mode, virtual steps


def training(folder, cases):
    with jax.enable_x64(True):
        teacher = jax.device_get(double(teacher_variables()))
        teaching = dict(teacher_fn=steps.network_teacher(SmallNet()), teacher=teacher)
        found = {}
        for case in cases:
            mode, ahead = CASES[case]
            found[case] = train("ltkd", Parallel(mode), STEPS, ahead=ahead, **teaching)
        if "jit" in cases:  # one process with eight devices has left a checkpoint of half the steps
            step, start, _ = hosts.run_on_primary(lambda: Checkpoints(folder / "of_one").restore(found["jit"]))
            assert step == start.step == STEPS // 2
            found["went_on"] = train("ltkd", Parallel("jit"), STEPS, start=start, **teaching)
        for name, state in found.items():
            hosts.run_on_primary(lambda: Checkpoints(folder / name).save(STEPS, state, {}))  # noqa: B023


def reading(folder):
    """Notes which records this process decodes, of two batches of a stream and of an evaluation."""
    from small import config_of

    from experiments.trainer import build
    from ltkd_jax.data import records

    config = config_of("folderlt", "ce,name=insects").lock()
    config.update_from_flattened_dict(json.loads((folder / "values.json").read_text()))
    program = build.student_program(config, "none")
    read = {"crop": [], "image": []}
    for name, noted in read.items():
        original = getattr(records.Records, name)

        def noting(self, index, *rest, original=original, noted=noted):
            noted.append(int(index))
            return original(self, index, *rest)

        setattr(records.Records, name, noting)
    assert len(list(program.chunks(3, 0))) == program.total_steps == 2
    state = program.parallel.replicate(program.init(0))
    sums = program.evaluate(state.variables, program.data.test)
    found = {**read, "train": len(program.data.train), "counted": sums.confusion.sum(axis=1).tolist()}
    (folder / f"read_{jax.process_index()}.json").write_text(json.dumps(found))


def main():
    where, folder, *cases = sys.argv[1:]
    folder = pathlib.Path(folder)
    jax.config.update("jax_numpy_rank_promotion", "raise")
    hosts.start(where)
    assert jax.device_count() == 8 and jax.local_device_count() == 4
    primitives()
    training(folder, cases)
    if (folder / "values.json").exists():
        reading(folder)


if __name__ == "__main__":
    main()
