"""Statistics over seeds: means, deviations and paired comparisons of methods."""

import dataclasses
import math
import statistics

BETTER = "better"
WORSE = "worse"
UNCLEAR = "not distinguishable"


@dataclasses.dataclass(frozen=True)
class Difference:
    """Describes the mean difference between two methods over the seeds they share.

    Attributes:
      mean: of the paired differences, None without a shared seed.
      standard_error: of that mean, None for fewer than two pairs.
      num_pairs: how many seeds both methods have.
      verdict: BETTER, WORSE or UNCLEAR.
    """

    mean: float | None
    standard_error: float | None
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

    The verdict is clear if the mean difference exceeds twice its standard error.
    """
    shared_seeds = sorted(candidate.keys() & reference.keys())
    differences = [candidate[seed] - reference[seed] for seed in shared_seeds]
    mean, deviation, num_pairs = mean_std(differences)
    if deviation is None:
        return Difference(mean, None, num_pairs, UNCLEAR)
    standard_error = deviation / math.sqrt(num_pairs)
    # Strictly greater: identical runs have a difference and an error of zero.
    if abs(mean) > 2 * standard_error:
        verdict = BETTER if (mean < 0) == lower_is_better else WORSE
    else:
        verdict = UNCLEAR
    return Difference(mean, standard_error, num_pairs, verdict)
