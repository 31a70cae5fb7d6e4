"""Nested dictionaries, addressed by dotted paths."""

from collections.abc import Collection
from typing import Any


def at(tree: dict, path: str) -> Any:
    """Returns the value at a dotted path, or None if the path does not exist.

    >>> at({"train": {"epochs": 240.0}}, "train.epochs")
    240.0
    """
    node: Any = tree
    for name in path.split("."):
        node = node.get(name) if isinstance(node, dict) else None
    return node


def flatten(tree: dict, prefix: str = "") -> dict[str, Any]:
    """Returns a flat dictionary from dotted paths to values.

    >>> flatten({"train": {"epochs": 240.0}, "seed": 0})
    {'train.epochs': 240.0, 'seed': 0}
    """
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        # An empty section counts as a value, so that it is not lost.
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def without(tree: dict, paths: Collection[str], prefix: str = "") -> dict[str, Any]:
    """Returns a copy of the tree that lacks some dotted paths.

    >>> without({"data": {"dir": "x", "name": "digits"}}, ["data.dir"])
    {'data': {'name': 'digits'}}
    """
    result: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if path in paths:
            continue
        if isinstance(value, dict):
            value = without(value, paths, f"{path}.")
        result[key] = value
    return result
