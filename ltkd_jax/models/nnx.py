"""Adapts NNX modules, so that `models.register` takes them as students and teachers."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax import nnx, traverse_util

_COLLECTIONS = {"params": nnx.Param, "batch_stats": nnx.BatchStat}


class NnxModel:
    """Adapts an NNX module to `models.Model`, the interface that training uses.

    The module is called with float images `[B, H, W, channels]` alone and returns
    logits `[B, C]` in float32; `module.train()` and `module.eval()` set its mode. Its
    parameters and batch statistics become the collections "params" and "batch_stats"
    of Linen, so checkpoints, saved classifiers and exports are those of any model.

    Args:
      constructor: `rngs -> module`. It is called whenever the model is traced.

    >>> import jax.numpy as jnp
    >>> class Linear(nnx.Module):
    ...     def __init__(self, num_classes, rngs):
    ...         self.layers = nnx.List([nnx.Linear(4, num_classes, rngs=rngs)])
    ...     def __call__(self, images):
    ...         return self.layers[0](images.reshape((images.shape[0], -1)))
    >>> model = NnxModel(lambda rngs: Linear(3, rngs))
    >>> variables = model.init(jax.random.key(0), jnp.zeros((1, 2, 2, 1)), train=False)
    >>> variables["params"]["layers"]["0"]["kernel"].shape
    (4, 3)
    >>> model.apply(variables, jnp.zeros((2, 2, 2, 1)), train=False).shape
    (2, 3)
    """

    def __init__(self, constructor: Callable[[nnx.Rngs], nnx.Module]) -> None:
        self._constructor = constructor

    def init(self, key: jax.Array, images: jax.Array, /, *, train: bool) -> Any:
        """Returns new variables, as a dict with an entry for each collection.

        Raises:
          ValueError: the module has variables of other types, such as the random keys
            of dropout.
        """
        _, *states = _split(self._constructor(nnx.Rngs(key)))
        variables = {}
        for name, state in zip(_COLLECTIONS, states):
            if jax.tree.leaves(state):
                variables[name] = _to_dict(state)
        # Fails for images that the module cannot take, as `init` of Linen does.
        self.apply(variables, images, train=train)
        return variables

    def apply(
        self,
        variables: Any,
        images: jax.Array,
        /,
        *,
        train: bool,
        mutable: Sequence[str] = (),
    ) -> Any:
        """Returns logits `[B, C]`; with `mutable`, (logits, updated collections)."""
        # Only its structure and shapes are needed: the arrays come from `variables`.
        template = nnx.eval_shape(lambda: self._constructor(nnx.Rngs(0)))
        graph, *shapes = _split(template)
        states = []
        for name, state in zip(_COLLECTIONS, shapes):
            states.append(_from_dict(variables.get(name, {}), state))
        module = nnx.merge(graph, *states)
        if train:
            module.train()
        else:
            module.eval()
        logits = module(images)
        if not mutable:
            return logits
        _, *states = _split(module)
        new_variables = zip(_COLLECTIONS, map(_to_dict, states))
        return logits, {name: tree for name, tree in new_variables if name in mutable}


def _split(module: nnx.Module) -> tuple[Any, ...]:
    """Returns the structure of a module, and the state of each collection."""
    graph, *states = nnx.split(module, *_COLLECTIONS.values(), ...)
    other_paths = [path for path, _ in _named_leaves(states.pop())]
    if other_paths:
        raise ValueError(
            f"{type(module).__name__} has variables that are neither nnx.Param nor "
            f"nnx.BatchStat, such as {'.'.join(other_paths[0])}: leave them out; a "
            "training step has no random numbers for dropout"
        )
    return graph, *states


def _named_leaves(state: Any) -> list[tuple[tuple[str, ...], Any]]:
    """Returns (path, array) of each variable; the index in a list is a string, too."""
    leaves = []
    for path, leaf in jax.tree.leaves_with_path(state):
        keys = [key for key in path if isinstance(key, jax.tree_util.DictKey)]
        leaves.append((tuple(str(key.key) for key in keys), leaf))
    return leaves


def _to_dict(state: Any) -> dict[str, Any]:
    """Returns the arrays of a state as a nested dict with string keys."""
    return traverse_util.unflatten_dict(dict(_named_leaves(state)))


def _from_dict(tree: Mapping[str, Any], state: Any) -> Any:
    """Returns a state of the structure of `state`, with the arrays of a dict."""
    arrays = traverse_util.flatten_dict(dict(tree))
    leaves = [arrays[path] for path, _ in _named_leaves(state)]
    return jax.tree.unflatten(jax.tree.structure(state), leaves)
