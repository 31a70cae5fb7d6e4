"""The custom models of docs/add_a_method.md, a Linen and an NNX module, in runs."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from helpers import small_runs
from helpers.pages import DOCS, captioned
from helpers.small_runs import assert_same_bits, run, tiny

from experiments.audit import inputs
from experiments.config import load
from experiments.config.spec import resolve
from experiments.trainer.trainer import get_trainer
from ltkd_jax import inference, models
from ltkd_jax.models.nnx import NnxModel
from ltkd_jax.training.checkpoint import Checkpoints

VALUES = {"train.max_steps": 2, "teacher.train.max_steps": 2, "devices": 1}


@pytest.fixture(scope="module", autouse=True)
def custom_models(tmp_path_factory):
    """Registers both models by the code of the page, as --import does."""
    folder = tmp_path_factory.mktemp("modules")
    code = captioned(DOCS / "add_a_method.md")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "REGISTRY", dict(models.REGISTRY))
        patch.syspath_prepend(folder)
        for name in ("my_models", "my_nnx_models"):
            (folder / f"{name}.py").write_text(code[f"{name}.py"])
            load.import_modules(name)
        yield
    for name in ("my_models", "my_nnx_models"):
        del sys.modules[name]


@pytest.mark.parametrize("model", ["mlp", "nnx_convnet"])
def test_teacher_and_student(model, tmp_path):
    """It trains, resumes bit for bit, and is saved and exported like any model."""
    values = VALUES | {"teacher.model": model, "student.model": model}
    config = tiny(tmp_path, "ltkd", **values)
    results = run(config, tmp_path / "run")
    assert results["teacher"]["model"] == model
    assert small_runs.records(tmp_path / "run")[0]["terms"]["intra"] > 0
    _, num_stops = small_runs.run_with_stops(config, tmp_path / "resumed")
    assert num_stops == 1
    assert_same_bits(config, tmp_path / "resumed", tmp_path / "run")

    trainer = get_trainer(resolve(config).student_training("none"))
    images = trainer.data.test.images[:7]
    template = jax.eval_shape(trainer.init, 0)
    _, state, _ = Checkpoints(tmp_path / "run" / "checkpoints").restore(template)
    expected = trainer.model.apply(
        state.variables, trainer.data.preprocess(images), train=False
    )
    classifier = inference.load(tmp_path / "run")
    logits, _ = classifier(images)
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
    exported = jax.export.deserialize(bytearray(classifier.export()))
    np.testing.assert_allclose(exported.call(images), expected, rtol=1e-5, atol=1e-5)


def test_nnx_model_is_the_module():
    """Logits, gradient and batch statistics are those of the module by itself."""
    model = models.create("nnx_convnet", 10)
    images = jax.random.normal(jax.random.key(1), (4, 8, 8, 1))
    variables = model.init(jax.random.key(0), images, train=False)
    module = type_of_convnet()(10, nnx.Rngs(jax.random.key(0)))

    def loss_of_module(module):
        return jnp.square(module(images)).mean()

    def loss_of_params(params):
        logits, updates = model.apply(
            {**variables, "params": params}, images, train=True, mutable=["batch_stats"]
        )
        return jnp.square(logits).mean(), updates["batch_stats"]

    np.testing.assert_array_equal(
        model.apply(variables, images, train=True), module(images)
    )
    module = type_of_convnet()(10, nnx.Rngs(jax.random.key(0)))
    expected = nnx.grad(loss_of_module)(module)
    gradient_fn = jax.jit(jax.grad(loss_of_params, has_aux=True))
    gradient, stats = gradient_fn(variables["params"])
    for i in (0, 1):
        np.testing.assert_allclose(
            gradient["convs"][str(i)]["kernel"],
            expected["convs"][i]["kernel"][...],
            rtol=1e-4,
            atol=1e-6,
        )
        np.testing.assert_allclose(
            stats["norms"][str(i)]["mean"], module.norms[i].mean[...], rtol=1e-5
        )
    module.eval()
    np.testing.assert_allclose(
        model.apply({**variables, "batch_stats": stats}, images, train=False),
        module(images),
        rtol=1e-5,
        atol=1e-6,
    )


def type_of_convnet():
    import my_nnx_models

    return my_nnx_models.ConvNet


class CountingNet(linen.Module):
    """A linear network that counts its training steps."""

    num_classes: int

    @linen.compact
    def __call__(self, images, train):
        count = self.variable("batch_stats", "count", jnp.zeros, (), jnp.int32)
        if train:
            count.value += 1
        return linen.Dense(self.num_classes)(images.reshape((images.shape[0], -1)))


def test_integer_variable(tmp_path):
    models.register("counting", lambda num_classes, **_: CountingNet(num_classes))
    values = VALUES | {"teacher.model": "counting", "student.model": "counting"}
    results = run(tiny(tmp_path, "kd", **values), tmp_path / "run")
    classifier = inference.load(tmp_path / "run")
    assert classifier.variables["batch_stats"]["count"] == 2
    # Its run can teach, too.
    values["teacher.checkpoint"] = str(tmp_path / "run")
    taught = run(tiny(tmp_path, "kd", **values), tmp_path / "taught")
    assert taught["teacher"]["test"]["all"] == results["test"]["all"]


def test_audit_of_unregistered_model(tmp_path, monkeypatch):
    run(tiny(tmp_path, "ce", **VALUES, **{"student.model": "mlp"}), tmp_path / "run")
    monkeypatch.delitem(models.REGISTRY, "mlp")
    message = "unknown model 'mlp'.*trained with --import=.*my_models"
    with pytest.raises(ValueError, match=message):
        inputs.read(tmp_path / "run")


def test_nnx_module_with_dropout():
    model = NnxModel(lambda rngs: nnx.Dropout(0.5, rngs=rngs))
    with pytest.raises(ValueError, match="Dropout has variables .* rngs.*no random"):
        model.init(jax.random.key(0), jnp.zeros((1, 4)), train=False)


@pytest.mark.parametrize("role", ["teacher", "student"])
@pytest.mark.parametrize("model", ["mlp", "nnx_convnet"])
def test_reviewkd_without_features(model, role, tmp_path):
    config = tiny(tmp_path, "reviewkd", **{f"{role}.model": model})
    with pytest.raises(ValueError, match="reviewkd compares features, and .* has none"):
        get_trainer(resolve(config).student_training("features"))
