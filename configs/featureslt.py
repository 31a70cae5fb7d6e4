r"""Features: embeddings, or rows of a table, in an .npz file.

    np.savez("DIR/NAME.npz", x=x, y=y, x_test=x_test, y_test=y_test)

`x` holds the training rows, numbers [N, D], and `y` their labels; `class_names` and
`keys` are optional (`ltkd_jax.data.features` has them). Columns are normalised by their
mean and deviation in `x`. `name` is the name of the file.

Train on the rows as they are; on a long-tailed draw; with learned weights:

    python -m experiments.main --config=configs/featureslt.py:ltkd,name=NAME \
        --config.data.dir=DIR
    python -m experiments.main \
        --config=configs/featureslt.py:ltkd,name=NAME,subset=exponential,imbalance=20 \
        --config.data.dir=DIR
    python -m experiments.main --config=configs/featureslt.py:bikd,name=NAME \
        --config.data.dir=DIR

The argument is METHOD[,key=value…][,smoke]; configs/common.py has the methods, the
short keys and all other keys.

The models are mlp_DEPTH_WIDTH: hidden layers with batch norm and ReLU. There are no
crops and flips, so the table of the teacher's logits has one view of each row; mixup is
the only augmentation.

For bikd, 8 rows of each class are held out. They must fill a batch of 64: with fewer
than 8 classes, increase data.outer_per_class.

Hardware: a CPU. Expected on the digits of docs/features.md, drawn with imbalance 10 and
data.n_max=100, over student seeds 0-2 (results/README.md): ltkd 91.8 ± 0.8 all,
88.3 ± 2.9 tail; ce 90.6 ± 1.7 all, 78.7 ± 3.5 tail.
"""

from configs import common


def get_config(argument: str = ""):
    config = common.base("", teacher="mlp_2_512", student="mlp_1_32", imbalance=10.0)
    config.data.subset = "all"
    config.train = common.recipe(batch_size=64, epochs=60.0)
    config.teacher.train = common.recipe(batch_size=64, epochs=60.0)
    config.eval_every = 5
    config.checkpoint_every = 20
    return common.apply_argument(
        config,
        argument,
        bikd={"data.outer_per_class": 8},
        loss_weighting=common.bilevel(
            update_every=1, outer_loss="hard", hidden=(64,), lr=0.01
        ),
        smoke_models=("mlp_1_128", "mlp_1_32"),
    )
