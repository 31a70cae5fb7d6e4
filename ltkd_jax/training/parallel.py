"""One computation, many devices: `jit` over a data mesh (the default), or literally `jax.pmap`.

Both are equal to a single device up to rounding, batch norm and group rebalancing included.
"""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

MODES = ("jit", "pmap")
_AXIS = "devices"


class Parallel:
    """How arrays are laid out over devices, and how a function of them is compiled.

    Args:
      mode: "jit" or "pmap".
      devices: by default all.

    Attributes:
      axis_name: what a step, a model and a loss must be given: a name under "pmap"; None under "jit", where
        every computation is written for the global batch.
      num_devices: D.

    >>> import jax.numpy as jnp
    >>> parallel = Parallel("jit", jax.devices()[:1])
    >>> total = parallel.compile(lambda scale, rows: scale * rows.sum(), batch_axis=0)
    >>> float(parallel.first(total(parallel.replicate(jnp.float32(2)), parallel.shard(jnp.ones(4), 0))))
    8.0
    """

    def __init__(self, mode: str = "jit", devices=None):
        if mode not in MODES:
            raise ValueError(f"parallel={mode!r} must be one of {', '.join(MODES)}")
        self.mode = mode
        self.devices = list(devices or jax.devices())
        self.num_devices = len(self.devices)
        self.axis_name = _AXIS if mode == "pmap" else None
        self._mesh = Mesh(np.asarray(self.devices), (_AXIS,), axis_types=(AxisType.Auto,))

    def replicate(self, tree):
        """The tree on every device: as it is under "jit", with a leading axis `[D]` under "pmap"."""
        if self.mode == "jit":
            return jax.device_put(tree, NamedSharding(self._mesh, P()))
        stacked = jax.tree.map(lambda x: np.broadcast_to(np.asarray(x), (self.num_devices, *np.shape(x))), tree)
        return jax.device_put(stacked, NamedSharding(self._mesh, P(_AXIS)))

    def first(self, tree):
        """A replicated tree as one copy."""
        return tree if self.mode == "jit" else jax.tree.map(lambda x: x[0], tree)

    def shard(self, tree, batch_axis: int):
        """Leaves split over the devices along `batch_axis`; device d holds the d-th run of positions."""
        if self.mode == "jit":
            return jax.device_put(tree, NamedSharding(self._mesh, self._spec(batch_axis)))
        stacked = jax.tree.map(lambda x: self._split(np.asarray(x), batch_axis), tree)
        return jax.device_put(stacked, NamedSharding(self._mesh, P(_AXIS)))

    def compile(self, fn, *, batch_axis: int, donate: tuple[int, ...] = ()):
        """`fn(*replicated, batch)`, compiled: its last argument is sharded, its result replicated.

        Args:
          fn: a pure function; under "pmap" it sees its share of the batch and uses `axis_name`.
          batch_axis: the axis of the last argument's leaves that is split over the devices.
          donate: arguments whose memory the result may take.
        """
        if self.mode == "pmap":
            return jax.pmap(fn, axis_name=_AXIS, devices=self.devices, donate_argnums=donate)
        replicated, batched = NamedSharding(self._mesh, P()), NamedSharding(self._mesh, self._spec(batch_axis))

        def constrained(*args):
            *rest, batch = args
            return fn(*rest, jax.lax.with_sharding_constraint(batch, batched))

        return jax.jit(constrained, out_shardings=replicated, donate_argnums=donate)

    def _spec(self, batch_axis):
        return P(*([None] * batch_axis), _AXIS)

    def _split(self, x, batch_axis):
        shape = x.shape[:batch_axis] + (self.num_devices, -1) + x.shape[batch_axis + 1 :]
        return np.moveaxis(x.reshape(shape), batch_axis, 0)
