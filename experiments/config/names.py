"""Config keys of version 0.1, which are refused with their present names."""

from configs.common import new_name
from experiments.config.validation import ConfigError

__all__ = ["check_key", "new_name"]


def check_key(key: str) -> None:
    """Raises ConfigError if a config key is one of version 0.1, naming its present name."""
    if new_name(key):
        raise ConfigError(f"config key {key!r} is now called {new_name(key)!r}")
