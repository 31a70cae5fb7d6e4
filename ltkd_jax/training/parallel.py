"""One computation, many devices: `jit` over a data mesh (the default), or literally `jax.pmap`.

Both are equal to a single device up to rounding, batch norm and group rebalancing included. Of several processes each
gives and gets what its own devices hold.
"""

from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

from ltkd_jax.bilevel import PyTree

MODES = ("jit", "pmap")
_AXIS = "devices"


class Parallel:
    """How arrays are laid out over devices, and how a function of them is compiled.

    Args:
      mode: "jit" or "pmap".
      devices: by default all, those of other processes too.

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

    def __init__(
        self, mode: str = "jit", devices: Sequence[jax.Device] | None = None
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"parallel={mode!r} must be one of {', '.join(MODES)}")
        self.mode = mode
        # By process, so that each holds one run of positions.
        self.devices = sorted(
            devices or jax.devices(),
            key=lambda device: (device.process_index, device.id),
        )
        self.num_devices = len(self.devices)
        self.axis_name = _AXIS if mode == "pmap" else None
        self._local = [
            device
            for device in self.devices
            if device.process_index == jax.process_index()
        ]
        # `pmap` takes and gives the arrays of this process, `jit` those of all.
        of_arrays = self._local if mode == "pmap" else self.devices
        self._mesh = Mesh(np.asarray(of_arrays), (_AXIS,), axis_types=(AxisType.Auto,))

    def local_positions(self, batch_size: int) -> np.ndarray:
        """Returns the positions of a global batch that this process's devices hold, in order.

        Raises:
          ValueError: the devices do not divide the batch.

        >>> Parallel("jit", jax.devices()[:2]).local_positions(4).tolist()
        [0, 1, 2, 3]
        """
        each, rest = divmod(batch_size, self.num_devices)
        if rest:
            raise ValueError(
                f"batch_size={batch_size} must be a multiple of the {self.num_devices} devices"
            )
        first = self.devices.index(self._local[0])
        return np.arange(first * each, (first + len(self._local)) * each)

    def replicate(self, tree: PyTree) -> PyTree:
        """The tree, the same in every process, on every device.

        It stays as it is under "jit", and gets an axis for this process's devices in front under "pmap".
        """
        if self.mode == "jit":
            return self._put(tree, P())
        stacked = jax.tree.map(
            lambda x: np.broadcast_to(np.asarray(x), (len(self._local), *np.shape(x))),
            tree,
        )
        return self._put(stacked, P(_AXIS))

    def first(self, tree: PyTree) -> PyTree:
        """A replicated tree as one copy."""
        if self.mode == "jit":
            return tree
        # The first device's own copy: indexing the whole array would start a collective for each leaf.
        return jax.tree.map(lambda x: x.addressable_data(0)[0], tree)

    def shard(self, tree: PyTree, batch_axis: int) -> PyTree:
        """Leaves split over the devices along `batch_axis`, of which each process gives its own positions."""
        if self.mode == "pmap":
            stacked = jax.tree.map(
                lambda x: self._split(np.asarray(x), batch_axis), tree
            )
            return self._put(stacked, P(_AXIS))
        return self._put(tree, self._spec(batch_axis), batch_axis)

    def compile(
        self,
        fn: Callable[..., PyTree],
        *,
        batch_axis: int,
        donate: tuple[int, ...] = (),
    ) -> Callable[..., PyTree]:
        """`fn(*replicated, batch)`, compiled: its last argument is sharded, its result replicated.

        Args:
          fn: a pure function; under "pmap" it sees its share of the batch and uses `axis_name`.
          batch_axis: the axis of the last argument's leaves that is split over the devices.
          donate: arguments whose memory the result may take.
        """
        if self.mode == "pmap":
            return jax.pmap(
                fn, axis_name=_AXIS, devices=self.devices, donate_argnums=donate
            )
        replicated, batched = (
            NamedSharding(self._mesh, P()),
            NamedSharding(self._mesh, self._spec(batch_axis)),
        )

        def constrained(*args: PyTree) -> PyTree:
            *rest, batch = args
            return fn(*rest, jax.lax.with_sharding_constraint(batch, batched))

        return jax.jit(constrained, out_shardings=replicated, donate_argnums=donate)

    def _put(self, tree: PyTree, spec: P, spread_axis: int | None = None) -> PyTree:
        """Arrays of the mesh; along `spread_axis` the leaves are this process's part of them."""
        sharding = NamedSharding(self._mesh, spec)

        def put(x: ArrayLike) -> jax.Array:
            x = np.asarray(x)
            shape = list(x.shape)
            if spread_axis is not None:
                shape[spread_axis] = (
                    shape[spread_axis] * self.num_devices // len(self._local)
                )
            return jax.make_array_from_process_local_data(sharding, x, tuple(shape))

        return jax.tree.map(put, tree)

    def _spec(self, batch_axis: int) -> P:
        return P(*([None] * batch_axis), _AXIS)

    def _split(self, x: np.ndarray, batch_axis: int) -> np.ndarray:
        shape = (
            x.shape[:batch_axis] + (len(self._local), -1) + x.shape[batch_axis + 1 :]
        )
        return np.moveaxis(x.reshape(shape), batch_axis, 0)
