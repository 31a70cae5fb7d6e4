r"""TinyImageNet-LT by LTKD's recipe: ResNet32x4 → ResNet8x4 at γ = 100.

It has 200 classes and images of 64×64 pixels. Prepare the data set once, then train:

    python -m ltkd_jax.data.prepare tiny_imagenet --source=tiny-imagenet-200.zip \
        --data_dir=DIR
    python -m experiments.main --config=configs/tinyimagenetlt.py:ltkd \
        --config.data.dir=DIR
    python -m experiments.main \
        --config=configs/tinyimagenetlt.py:kd,imbalance=20,seed=1 \
        --config.data.dir=DIR
    python -m experiments.main --config=configs/tinyimagenetlt.py:bikd,terms=ltkd \
        --config.data.dir=DIR
    python -m experiments.main --config=configs/tinyimagenetlt.py:ltkd,smoke \
        --config.data.dir=DIR

The argument is METHOD[,key=value…][,smoke]; configs/common.py has the methods, the
short keys and all other keys.

There are 21,549 training images at γ = 100 (n_max 500). Labels are numbered by sorted
WordNet id. The test set is the official validation set, 10,000 images. Crops (pad 4)
and flips are CIFAR's, and images are normalised by ImageNet's statistics: what the
paper used is not known. BiKD has no recipe for this data set; bikd uses the one for
CIFAR-100, with 10 images of each class held out.

Hardware: one GPU.

Expected: LTKD reports this data set, but its numbers are not known here; this config
has not been run yet.
"""

from configs import common


def get_config(argument: str = ""):
    config = common.base(
        "tiny_imagenet", teacher="resnet32x4", student="resnet8x4", imbalance=100.0
    )
    return common.apply_argument(
        config,
        argument,
        bikd=common.bikd_recipe(n_max=490, outer_per_class=10),
        loss_weighting=common.bilevel(
            update_every=5, outer_loss="hard", hidden=(64, 64)
        ),
        method_defaults=common.WARMUPS,
    )
