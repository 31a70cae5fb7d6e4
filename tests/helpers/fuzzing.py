"""Property tests by hypothesis.

LTKD_FUZZ_EXAMPLES sets the number of examples. Below 100, as by default, the examples
are the same every time.
"""

import os

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

EXAMPLES = int(os.environ.get("LTKD_FUZZ_EXAMPLES", 40))
SEEDS = st.integers(0, 2**32 - 1)


def fuzz(check, **strategies):
    """Calls `check` with examples of the strategies."""
    configure = settings(
        max_examples=EXAMPLES,
        derandomize=EXAMPLES < 100,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    run = configure(given(**strategies)(check))
    run()
