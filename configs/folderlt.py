r"""A custom data set: a folder of images for each class.

Prepare it once. FOLDER has a folder for each class, or train/CLASS and test/CLASS (then
without --test_per_class). `name` is the name for the data set from then on.

    python -m ltkd_jax.data.prepare folder --name=birds --source=FOLDER \
        --test_per_class=20 --data_dir=DIR

Train on the images as they are; on a long-tailed draw; with learned weights; and on
images that stay on disk:

    python -m experiments.main --config=configs/folderlt.py:ltkd,name=birds \
        --config.data.dir=DIR
    python -m experiments.main \
        --config=configs/folderlt.py:ltkd,name=birds,subset=exponential,imbalance=20 \
        --config.data.dir=DIR
    python -m experiments.main \
        --config=configs/folderlt.py:bikd,name=birds,image_size=32 \
        --config.data.dir=DIR
    python -m experiments.main --config=configs/folderlt.py:ltkd,name=birds \
        --config.data.dir=DIR --config.data.stream=True --config.data.image_size=224 \
        --config.teacher.model=resnet34_imagenet \
        --config.student.model=resnet18_imagenet

The argument is METHOD[,key=value…][,smoke]; configs/common.py has the methods, the
short keys and all other keys.

subset=all (the default here) takes the images as they are; subset=exponential makes
them long-tailed by `imbalance`, with the classes sorted by name. The centre square of
each image is resized to `image_size` (64 by default); training crops it (padded by an
eighth) and flips it. With data.stream=True images stay on disk, and training takes
random resized crops.

For bikd, 10 images of each class are held out (data.outer_per_class).

Recipe: LTKD's. Hardware: one GPU for images of 64 pixels. Expected: that depends on
your images.
"""

from configs import common


def get_config(argument: str = ""):
    config = common.base("", teacher="resnet32x4", student="resnet8x4", imbalance=10.0)
    config.data.subset = "all"
    config.data.image_size = 64
    return common.apply_argument(
        config,
        argument,
        bikd={"data.outer_per_class": 10},
        loss_weighting=common.bilevel(
            update_every=5, outer_loss="hard", hidden=(64, 64)
        ),
    )
