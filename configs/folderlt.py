"""Your own images, a folder for each class: made long-tailed, or taken as they are.

    python -m ltkd_jax.data.prepare folder --name=birds --source=FOLDER --test_per_class=20 --data_dir=DIR      # once
    python -m experiments.main --config=configs/folderlt.py:ltkd,name=birds --config.data.dir=DIR
    python -m experiments.main --config=configs/folderlt.py:ltkd,name=birds,subset=exponential,imbalance=20 --config.data.dir=DIR
    python -m experiments.main --config=configs/folderlt.py:bikd,name=birds,image_size=32 --config.data.dir=DIR
    python -m experiments.main --config=configs/folderlt.py:ltkd,name=birds,data.stream=True,image_size=224,teacher=resnet34_imagenet,student=resnet18_imagenet --config.data.dir=DIR

The argument is METHOD[,key=value…][,smoke]: configs/common.py has the methods, the short keys and all other keys.

`name` is that of the preparation. `subset=all` (the default here) takes the images as they are; subset=exponential makes them
long-tailed by `imbalance`, in the order of the sorted class names. `image_size` is the side to which images are brought, 64
by default: the square in their middle, then crops (pad an eighth) and flips. With data.stream=True images stay on disk, and
training takes random resized crops. For bikd 10 images of each class are set aside;
with fewer than 7 classes set data.outer_per_class to more, since they must fill a batch of 64. FOLDER has a folder for each
class, or train/CLASS and test/CLASS (then without --test_per_class).

Recipe: LTKD's. Hardware: one GPU for images of 64 pixels. Expected: that depends on your images.
"""

from configs import common


def get_config(argument: str = ""):
    config = common.base("", teacher="resnet32x4", student="resnet8x4", imbalance=10.0)
    config.data.subset, config.data.image_size = "all", 64
    return common.apply_argument(
        config,
        argument,
        bikd={"data.outer_per_class": 10},
        loss_weighting=common.bilevel(
            update_every=5, outer_loss="hard", hidden=(64, 64)
        ),
    )
