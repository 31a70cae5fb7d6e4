"""Digits-LT: scikit-learn's 1,797 real 8×8 digits, made long-tailed.

It needs no download, and trains within minutes on a CPU.

    python -m experiments.main --config=configs/digitslt.py            # LTKD
    python -m experiments.main --config=configs/digitslt.py:kd,seed=1
    python -m experiments.main --config=configs/digitslt.py:bikd,terms=ltkd

The argument is METHOD[,key=value…][,smoke]; configs/common.py has the methods, the
short keys and all other keys.

For bikd, 8 images of each digit are held out as the outer set. The training images stay
the same, since n_max is set. The weight net is the one that the paper uses for the ten
classes of CIFAR-10.

Hardware: 2 CPU cores.

Expected over student seeds 0-2 (results/README.md): ltkd 79.0 ± 1.1 all, 46.4 ± 1.8
tail; bikd 75.3 ± 0.7 all, 26.8 ± 0.7 tail. `make demo` writes that table.
"""

from configs import common


def get_config(argument: str = ""):
    config = common.base(
        "digits", teacher="resnet20", student="resnet8", imbalance=50.0
    )
    config.data.n_max = 100
    config.train = common.recipe(batch_size=64, epochs=60.0)
    config.teacher.train = common.recipe(batch_size=64, epochs=60.0)
    config.eval_every = 5
    config.checkpoint_every = 20
    return common.apply_argument(
        config,
        argument,
        bikd={"data.outer_per_class": 8},
        loss_weighting=common.bilevel(update_every=1, outer_loss="mix", hidden=(64,)),
    )
