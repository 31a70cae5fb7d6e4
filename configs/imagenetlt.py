r"""ImageNet-LT: ResNet34 → ResNet18 on a stream of 224×224 crops.

Prepare the data set once; FOLDER has train/WNID and val:

    python -m ltkd_jax.data.prepare imagenet2012 --source=FOLDER --data_dir=DIR

Train at γ = 10 (LTKD reports 5, 10 and 20), at γ = 20, on a list of images, or a smoke
test:

    python -m experiments.main --config=configs/imagenetlt.py:ltkd \
        --config.data.dir=DIR
    python -m experiments.main --config=configs/imagenetlt.py:ltkd,imbalance=20 \
        --config.data.dir=DIR
    python -m experiments.main \
        --config=configs/imagenetlt.py:ltkd,subset=ImageNet_LT_train.txt \
        --config.data.dir=DIR
    python -m experiments.main --config=configs/imagenetlt.py:ltkd,smoke \
        --config.data.dir=DIR

The argument is METHOD[,key=value…][,smoke]; configs/common.py has the methods, the
short keys and all other keys.

`subset` is "exponential" or the path of a list. The former is LTKD's: n_c =
732 · γ^(−c/999), since the smallest class has 732 images (the paper's n_max is not
known). A list has a line "relative/path label" for each image, such as the usual
ImageNet-LT's (115,846 images). The test set is ImageNet's validation set. For bikd, 10
images of each class are held out.

Images stay on disk; threads or `data.num_workers` processes read, crop and flip them.
So there is no table of the teacher's logits.

Recipe: the usual 100 epochs of batch 256, lr 0.1, × 0.1 at 30, 60 and 90, weight decay
1e-4 (the paper's is not known).

Hardware: GPUs.

Expected: LTKD reports this data set, but its numbers are not known here; this config
has not been run yet.
"""

from configs import common


def get_config(argument: str = ""):
    config = common.base(
        "imagenet2012",
        teacher="resnet34_imagenet",
        student="resnet18_imagenet",
        imbalance=10.0,
    )
    config.data.stream = True
    config.data.image_size = 224
    config.train = common.recipe(
        batch_size=256,
        epochs=100.0,
        lr=0.1,
        weight_decay=1e-4,
        milestones=(0.3, 0.6, 0.9),
    )
    config.teacher.train = config.train.copy_and_resolve_references()
    return common.apply_argument(
        config,
        argument,
        bikd={"data.outer_per_class": 10},
        loss_weighting=common.bilevel(
            update_every=5, outer_loss="hard", hidden=(64, 64)
        ),
        method_defaults=common.WARMUPS,
    )
