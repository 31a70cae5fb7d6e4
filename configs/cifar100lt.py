"""CIFAR-100-LT, LTKD's recipe: ResNet32x4 → ResNet8x4 at γ = 100, 240 epochs of batch 64.

    python -m ltkd_jax.data.prepare cifar100 --data_dir=DIR             # once
    python -m experiments.main --config=configs/cifar100lt.py:ltkd --config.data.dir=DIR
    python -m experiments.main --config=configs/cifar100lt.py:kd,imbalance=20,seed=1 --config.data.dir=DIR
    python -m experiments.main --config=configs/cifar100lt.py:ltkd,smoke --config.data.dir=DIR

METHOD is one of ce, balanced_softmax, logit_adjusted, kd, dkd, dive, bkd, wsl, ltkd, ltkd_bs; short keys are
imbalance, teacher, student, epochs, seed, and the method's own (alpha, beta, temperature, …); `smoke` runs 20 steps
of small models.

Hardware: one GPU (float32; `--config.precision=tf32` or `bfloat16` for speed); `smoke` on 2 CPU cores in under
3 minutes. Expected, published: 51.08 all / 27.21 tail for LTKD; not yet run here. Measured here: ResNet20 → ResNet8, 15
epochs, one seed, on two CPU cores: teacher 21.7 / 0.1, ce 16.6 / 0.0, kd 18.6 / 0.0, ltkd 23.2 / 2.3 (results/README.md).
LTKD's temperature, α, β and warm-up are not published: these are this library's defaults, not the paper's.
"""

from configs import common

METHOD_DEFAULTS = {"dkd": dict(warmup_epochs=20.0)}


def get_config(argument: str = ""):
    config = common.base("cifar100", teacher="resnet32x4", student="resnet8x4", imbalance=100.0)
    config.train = common.recipe()
    config.teacher.train = common.recipe()
    return common.apply_argument(config, argument, method_defaults=METHOD_DEFAULTS)
