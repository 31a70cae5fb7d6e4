"""Statistics over seeds: means, deviations and paired comparisons of methods."""

import dataclasses
import math
import statistics

import scipy.stats

BETTER = "better"
WORSE = "worse"
UNCLEAR = "not distinguishable"

_CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True)
class Difference:
    """Describes the mean difference between two methods over the seeds they share.

    Attributes:
      mean: of the paired differences, None without a shared seed.
      margin: half the length of the 95 % confidence interval of that mean, by the t
        distribution; None for fewer than two pairs.
      num_pairs: how many seeds both methods have.
      verdict: BETTER, WORSE or UNCLEAR.
    """

    mean: float | None
    margin: float | None
    num_pairs: int
    verdict: str


def mean_std(values):
    """Returns (mean, sample standard deviation, number of values).

    The mean of no values is None, and so is the deviation of fewer than two.
    """
    values = list(values)
    if not values:
        return None, None, 0
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return statistics.fmean(values), deviation, len(values)


def compare_paired(candidate, reference, *, lower_is_better=False):
    """Returns the `Difference` of two {seed: value} dictionaries over shared seeds.

    The verdict is clear if the confidence interval of the mean difference, which
    assumes that differences are normal, does not contain 0.
    """
    shared_seeds = sorted(candidate.keys() & reference.keys())
    differences = [candidate[seed] - reference[seed] for seed in shared_seeds]
    mean, deviation, num_pairs = mean_std(differences)
    if deviation is None:
        return Difference(mean, None, num_pairs, UNCLEAR)
    quantile = scipy.stats.t.ppf((1 + _CONFIDENCE) / 2, df=num_pairs - 1)
    margin = float(quantile) * deviation / math.sqrt(num_pairs)
    # Strictly greater: identical runs have a difference and a margin of zero.
    if abs(mean) > margin:
        verdict = BETTER if (mean < 0) == lower_is_better else WORSE
    else:
        verdict = UNCLEAR
    return Difference(mean, margin, num_pairs, verdict)
