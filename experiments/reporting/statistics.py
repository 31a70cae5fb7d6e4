"""Statistics over seeds: the mean and deviation of a method, and the paired comparison of two methods."""

import dataclasses
import math
import statistics

BETTER, WORSE, UNCLEAR = "better", "worse", "not distinguishable"


@dataclasses.dataclass(frozen=True)
class Difference:
    """The mean of `n` paired differences, its standard error (None for fewer than two pairs) and the verdict."""

    mean: float | None
    error: float | None
    n: int
    verdict: str


def mean_std(values):
    """Returns (mean, sample standard deviation, n); None stands for what too few values do not have."""
    values = list(values)
    if not values:
        return None, None, 0
    return (
        statistics.fmean(values),
        statistics.stdev(values) if len(values) > 1 else None,
        len(values),
    )


def paired(candidate, reference, *, lower_is_better=False):
    """Compares two {seed: value} dictionaries over the seeds that both have."""
    differences = [
        candidate[seed] - reference[seed]
        for seed in sorted(candidate.keys() & reference.keys())
    ]
    mean, deviation, n = mean_std(differences)
    if deviation is None:
        return Difference(mean, None, n, UNCLEAR)
    error = deviation / math.sqrt(n)
    if not abs(mean) > 2 * error:
        return Difference(mean, error, n, UNCLEAR)
    return Difference(
        mean, error, n, BETTER if (mean < 0) == lower_is_better else WORSE
    )
