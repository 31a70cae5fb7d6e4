"""Config keys of version 0.1, which are refused with a hint at their new names."""

from configs.common import new_name
from experiments.config.validation import ConfigError

__all__ = ["check_key", "new_name"]


def check_key(key: str) -> None:
    """Raises ConfigError with the new name of a config key, if it was renamed."""
    if new_name(key):
        raise ConfigError(f"config key {key!r} is now called {new_name(key)!r}")
