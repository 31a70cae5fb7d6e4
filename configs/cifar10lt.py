r"""CIFAR-10-LT by BiKD's recipe: ResNet32x4 → ResNet8x4 at ρ = 50.

Prepare the data set once, then train:

    python -m ltkd_jax.data.prepare cifar10 --data_dir=DIR
    python -m experiments.main --config=configs/cifar10lt.py:bikd --config.data.dir=DIR
    python -m experiments.main \
        --config=configs/cifar10lt.py:bikd,terms=ltkd,imbalance=100 \
        --config.data.dir=DIR
    python -m experiments.main --config=configs/cifar10lt.py:bkd --config.data.dir=DIR

The argument is METHOD[,key=value…][,smoke]; configs/common.py has the methods, the
short keys and all other keys. All methods use BiKD's recipe here; recipe=base selects
LTKD's.

Hardware: one GPU.

Expected: published at ρ = 50 (second-hand) are bikd 82.45, bkd 81.67, dive 80.79; this
config has not been run yet.
"""

from configs import common


def get_config(argument: str = ""):
    config = common.base(
        "cifar10", teacher="resnet32x4", student="resnet8x4", imbalance=50.0
    )
    return common.apply_argument(
        config,
        argument,
        bikd=common.bikd_recipe(n_max=4900, outer_per_class=100),
        loss_weighting=common.bilevel(update_every=1, outer_loss="mix", hidden=(64,)),
        default_recipe="bikd",
    )
