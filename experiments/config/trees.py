"""Nested dictionaries with dotted paths."""


def at(tree: dict, path: str):
    """Returns the value at a dotted path, None where there is none.

    >>> at({"train": {"epochs": 240.0}}, "train.epochs")
    240.0
    """
    for name in path.split("."):
        tree = tree.get(name) if isinstance(tree, dict) else None
    return tree


def flatten(tree: dict, prefix: str = "") -> dict:
    """Returns the values by their dotted paths.

    >>> flatten({"train": {"epochs": 240.0}, "seed": 0})
    {'train.epochs': 240.0, 'seed': 0}
    """
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def without(tree: dict, paths, prefix: str = "") -> dict:
    """Returns the tree without some dotted paths.

    >>> without({"data": {"dir": "x", "name": "digits"}}, ["data.dir"])
    {'data': {'name': 'digits'}}
    """
    kept = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if path not in paths:
            kept[key] = (
                without(value, paths, f"{path}.") if isinstance(value, dict) else value
            )
    return kept
