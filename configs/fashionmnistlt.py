r"""Fashion-MNIST-LT at γ = 100: ResNet20 → ResNet8 on 28×28 grey images.

Neither paper has it; it is small enough for a laptop. Prepare the data set once (with
--source=FOLDER if there is no network), then train:

    python -m ltkd_jax.data.prepare fashion_mnist --data_dir=DIR
    python -m experiments.main --config=configs/fashionmnistlt.py:ltkd \
        --config.data.dir=DIR
    python -m experiments.main --config=configs/fashionmnistlt.py:bikd,imbalance=50 \
        --config.data.dir=DIR
    python -m experiments.main --config=configs/fashionmnistlt.py:ltkd,smoke \
        --config.data.dir=DIR

The argument is METHOD[,key=value…][,smoke]; configs/common.py has the methods, the
short keys and all other keys.

Recipe: LTKD's for CIFAR, with 60 epochs. bikd uses BiKD's for ten classes, and holds
out 100 images of each class.

Hardware: one GPU, or patience. `smoke` takes under a minute on 2 CPU cores.

Expected: nothing is published; this config has not been run yet.
"""

from configs import common


def get_config(argument: str = ""):
    config = common.base(
        "fashion_mnist", teacher="resnet20", student="resnet8", imbalance=100.0
    )
    config.train.epochs = 60.0
    config.teacher.train.epochs = 60.0
    return common.apply_argument(
        config,
        argument,
        bikd=common.bikd_recipe(n_max=5900, outer_per_class=100),
        loss_weighting=common.bilevel(update_every=1, outer_loss="mix", hidden=(64,)),
    )
