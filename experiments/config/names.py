"""Config keys of version 0.1, which are refused with a hint at their new names."""

from configs import common
from experiments.config.validation import ConfigError


def renamed(key: str) -> str | None:
    """Returns the error message for a renamed config key, None for any other key."""
    name = common.new_name(key)
    return f"config key {key!r} is now called {name!r}" if name else None


def check_key(key: str) -> None:
    """Raises ConfigError with the new name of a config key, if it was renamed."""
    message = renamed(key)
    if message:
        raise ConfigError(message)
