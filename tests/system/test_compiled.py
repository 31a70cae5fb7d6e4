"""The compilers of GPUs and TPUs, which need no device: what compiles, and its cost.

After a change that is meant to cost more, or with another release of the compiler,
write the budgets anew and look at what they became:

    python -m pytest tests/system/test_compiled.py --store-budgets
    git diff tests/system/compiled_budgets.json
"""

import functools
import json
import pathlib

import jax
import pytest

from experiments.benchmark import __main__ as benchmark
from experiments.benchmark import compiled, compilers, loss

BUDGETS = pathlib.Path(__file__).with_name("compiled_budgets.json")
# A value may grow by this factor without a word.
ALLOWED = 1.05
SMALL = {"teacher": "resnet14", "student": "resnet8"}


def options(programs, **values):
    """Returns what to compile; by default bfloat16, on one device, with the table."""
    defaults = dict(
        methods=["ltkd"],
        teachers=["table"],
        precisions=["bfloat16"],
        teacher="resnet32x4",
        student="resnet8x4",
        losses=list(loss.LOSSES),
        sizes=[(4096, 10_000)],
        devices=[1],
    )
    return compiled.Options(programs, **{**defaults, **values})


BUDGETED = {
    "losses": options(["losses"], precisions=["float32", "bfloat16"]),
    "losses of small logits": options(
        ["losses"],
        losses=["kd", "dkd", "ltkd3"],
        sizes=[(64, 100), (1024, 1000)],
        precisions=["float32"],
    ),
    "steps": options(["step", "epoch"], precisions=["bfloat16", "tf32"]),
    "teacher in the step": options(["step"], teachers=["network"]),
    "learned weights": options(["step"], methods=["bikd"]),
    "table and evaluation": options(["table", "evaluation"]),
    "eight devices": options(["step"], devices=[8]),
}


@pytest.fixture
def target(request, monkeypatch):
    """Returns the target of a parameter; skips where its compiler is absent."""
    device = compilers.TARGETS[request.param]
    package = compilers.missing_package(device)
    if package:
        pytest.skip(f'{package} is absent: pip install -e ".[aot]"')
    cached = jax.config.jax_enable_compilation_cache
    compilers.start(device)
    yield device
    jax.config.update("jax_enable_compilation_cache", cached)


def costs(selected, device):
    """Yields each program with what the compiler says of it."""
    devices_of = functools.partial(compilers.devices, device)
    for program in compiled.programs(selected, devices_of):
        yield (
            program,
            compilers.compile_lowered(program.lower(), device, program.full_size),
        )


def key_of(program):
    return f"{program.name}, {program.num_devices} devices"


def values_of(program, cost):
    """Returns the budgeted values of a program by name."""
    values = {"temporaries, MB": cost.temporaries / 1e6}
    for part, counts in cost.block.parts():
        values[f"{part}: kernels"] = counts.kernels
        values[f"{part}: MB"] = round(counts.bytes / 1e6, 2)
        values[f"{part}: collectives"] = counts.collectives
        if program.full_size:
            values[f"{part}: passes"] = round(counts.passes, 1)
    return values


def excesses(measured, budget):
    """Returns what exceeds its budget; a part that has none does."""
    texts = []
    for name, value in measured.items():
        allowed = budget.get(name, 0) * ALLOWED
        # Less than a tenth of a megabyte of temporaries is rounding up of small arrays.
        if value > max(allowed, 0.1):
            texts.append(f"{name}: {value}, budget {budget.get(name)}")
    return texts


def test_excesses():
    budget = {"entry: kernels": 100, "entry: MB": 10.0, "temporaries, MB": 0.0}
    assert excesses(budget, budget) == []
    assert excesses({"entry: kernels": 105, "entry: MB": 9.0}, budget) == []
    assert len(excesses({"entry: kernels": 106, "entry: MB": 10.6}, budget)) == 2
    assert len(excesses({"temporaries, MB": 5.0, "loop 1 ×9: MB": 1.0}, budget)) == 2


@pytest.mark.parametrize("target", ["h100"], indirect=True)
@pytest.mark.parametrize("name", BUDGETED)
def test_budgets(name, target, request):
    stored = json.loads(BUDGETS.read_text())
    store = request.config.option.store_budgets
    compiler = compilers.version(target)
    if stored["compiler"] != compiler and not store:
        pytest.skip(f"the budgets are those of {stored['compiler']}, not of {compiler}")
    exceeding = []
    for program, cost in costs(BUDGETED[name], target):
        measured = values_of(program, cost)
        key = key_of(program)
        if store:
            stored["programs"][key] = measured
        else:
            budget = stored["programs"][key]
            exceeding += [f"{key}: {text}" for text in excesses(measured, budget)]
    if store:
        stored["compiler"] = compiler
        programs = dict(sorted(stored["programs"].items()))
        BUDGETS.write_text(
            json.dumps(stored | {"programs": programs}, indent=1, ensure_ascii=False)
            + "\n"
        )
    assert not exceeding


@pytest.mark.parametrize("target", ["h100"], indirect=True)
def test_no_budget_is_left_over(target):
    devices_of = functools.partial(compilers.devices, target)
    names = set()
    for selected in BUDGETED.values():
        programs = compiled.programs(selected, devices_of)
        names |= {key_of(program) for program in programs}
    assert set(json.loads(BUDGETS.read_text())["programs"]) == names


@pytest.mark.parametrize(
    "target, num_devices", [("h100", 1), ("h100", 8), ("a100", 1)], indirect=["target"]
)
def test_everything_compiles_for_gpus(target, num_devices):
    """Every kind of step, the evaluation, the table and the losses, small."""
    selected = options(
        [name for name in compiled.PROGRAMS if name != "core_table"],
        methods=["ce", "bikd"],
        sizes=[(64, 100)],
        devices=[num_devices],
        **SMALL,
    )
    for program, cost in costs(selected, target):
        total = cost.block.total()
        assert total.kernels > 0, program.name
        assert total.bytes > 0, program.name
        assert cost.memory > cost.temporaries, program.name
        # The losses are compiled for one device. The others exchange gradients, except
        # the evaluation, which sums.
        assert (total.collectives > 0) == (program.num_devices == 8), program.name


@pytest.mark.parametrize("num_devices", [1, 8])
@pytest.mark.parametrize("target", ["v5e"], indirect=True)
def test_steps_compile_for_tpus(target, num_devices):
    """A step and the evaluation: this compiler takes about a minute for a program."""
    selected = options(["step", "evaluation"], devices=[num_devices], **SMALL)
    for program, cost in costs(selected, target):
        total = cost.block.total()
        assert total.bytes > 0, program.name
        assert (total.collectives > 0) == (num_devices == 8), program.name


@pytest.mark.parametrize("target", ["h100"], indirect=True)
def test_report(target, capsys):
    benchmark.main(
        [
            "compiled",
            "--programs=losses",
            "--losses=kd",
            "--sizes=4096x100000",
            "--precisions=float32",
            "--memory_gib=4",
        ]
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("compiled for h100; nothing ran")
    assert lines[3].startswith("kd [4096, 100000] float32")
    # Two arrays of logits and the gradient are 4.58 GiB.
    assert lines[5].startswith("does not fit into 4 GiB: kd [4096, 100000]")
    assert "needs 4.5" in lines[5]
