"""Property tests by hypothesis; LTKD_FUZZ_EXAMPLES sets the number of examples, the usual ones are always the same."""

import os

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

EXAMPLES = int(os.environ.get("LTKD_FUZZ_EXAMPLES", 40))
SEEDS = st.integers(0, 2**32 - 1)


def fuzz(check, **strategies):
    """Calls `check` with examples of the strategies."""
    options = dict(
        deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    settings(max_examples=EXAMPLES, derandomize=EXAMPLES < 100, **options)(
        given(**strategies)(check)
    )()
