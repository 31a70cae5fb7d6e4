"""Data parallelism: one function on many devices, by `jit` or by `jax.pmap`.

Under "jit", the default, the function is written for the global batch, and XLA splits
the work by the sharding of the batch. Under "pmap", each device runs the function on
its share of the batch, and the function calls collectives by `Parallel.axis_name`.

Both compute the same as one device up to rounding, batch norm and group rebalancing
included. With several processes, each passes in and gets back the values of its own
devices only.
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
    """Places arrays on devices, and compiles functions of them.

    Args:
      mode: "jit" or "pmap".
      devices: by default all devices of all processes.

    Attributes:
      axis_name: to be passed to steps, models and losses: the name of the device axis
        under "pmap", None under "jit".
      num_devices: D, over all processes.

    >>> import jax.numpy as jnp
    >>> parallel = Parallel("jit", jax.devices()[:1])
    >>> scaled_sum = parallel.compile(lambda scale, x: scale * x.sum(), batch_axis=0)
    >>> scale = parallel.replicate(jnp.float32(2))
    >>> batch = parallel.shard(jnp.ones(4), batch_axis=0)
    >>> float(parallel.unreplicate(scaled_sum(scale, batch)))
    8.0
    """

    def __init__(
        self, mode: str = "jit", devices: Sequence[jax.Device] | None = None
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"parallel={mode!r} must be one of {', '.join(MODES)}")
        self.mode = mode
        # Sorted by process, so that the batch positions of a process are contiguous.
        self.devices = sorted(
            devices or jax.devices(),
            key=lambda device: (device.process_index, device.id),
        )
        self.num_devices = len(self.devices)
        self.axis_name = _AXIS if mode == "pmap" else None
        self._local_devices = [
            device
            for device in self.devices
            if device.process_index == jax.process_index()
        ]
        # A `pmap` function takes arrays with one entry for each local device. A `jit`
        # function takes global arrays, whose mesh spans all processes.
        mesh_devices = self._local_devices if mode == "pmap" else self.devices
        # "Auto" axes leave it to XLA how intermediate values are sharded.
        self._mesh = Mesh(
            np.asarray(mesh_devices), (_AXIS,), axis_types=(AxisType.Auto,)
        )

    def local_positions(self, batch_size: int) -> np.ndarray:
        """Returns the positions in the global batch that belong to this process.

        Args:
          batch_size: B, of the global batch.

        Raises:
          ValueError: B is not a multiple of the number of devices.

        >>> Parallel("jit", jax.devices()[:2]).local_positions(4).tolist()
        [0, 1, 2, 3]
        """
        if batch_size % self.num_devices:
            raise ValueError(
                f"batch_size={batch_size} must be a multiple of the "
                f"{self.num_devices} devices"
            )
        per_device = batch_size // self.num_devices
        first_device = self.devices.index(self._local_devices[0])
        end_device = first_device + len(self._local_devices)
        return np.arange(first_device * per_device, end_device * per_device)

    def replicate(self, tree: PyTree) -> PyTree:
        """Returns the tree with a copy of each leaf on every device.

        Shapes stay as they are under "jit". Under "pmap", leaves get a new first axis,
        of this process's devices.

        Args:
          tree: leaves are arrays, equal in all processes.
        """
        if self.mode == "jit":
            return self._put(tree, P())
        num_copies = len(self._local_devices)

        def stack(x: ArrayLike) -> np.ndarray:
            return np.broadcast_to(np.asarray(x), (num_copies, *np.shape(x)))

        return self._put(jax.tree.map(stack, tree), P(_AXIS))

    def unreplicate(self, tree: PyTree) -> PyTree:
        """Returns a replicated tree with its original shapes, as one copy."""
        if self.mode == "jit":
            return tree
        # Reads the copy on the first local device. Indexing the stacked array, `x[0]`,
        # would run a computation with collectives for every leaf.
        return jax.tree.map(lambda x: x.addressable_data(0)[0], tree)

    def shard(self, tree: PyTree, batch_axis: int) -> PyTree:
        """Returns the tree split over the devices along the batch axis.

        Under "jit" the leaves become global arrays. Under "pmap", the batch axis is
        split in two, and the axis of this process's devices is moved to the front.

        Args:
          tree: leaves hold this process's positions of the batch, see
            `local_positions`.
          batch_axis: the axis to split, in every leaf.
        """
        if self.mode == "jit":
            return self._put(tree, self._batch_spec(batch_axis), batch_axis)

        def split(x: ArrayLike) -> np.ndarray:
            x = np.asarray(x)
            per_device = (len(self._local_devices), -1)
            shape = x.shape[:batch_axis] + per_device + x.shape[batch_axis + 1 :]
            return np.moveaxis(x.reshape(shape), batch_axis, 0)

        return self._put(jax.tree.map(split, tree), P(_AXIS))

    def describe(self, tree: PyTree, batch_axis: int | None = None) -> PyTree:
        """Returns shapes and shardings of what `replicate` or `shard` returns.

        A compiled function can be lowered for them without any arrays, also for devices
        that are only described, see `jax.experimental.topologies`.

        Args:
          tree: leaves have a shape, that of the global batch, and a dtype.
          batch_axis: as for `shard`; None for what `replicate` returns.

        >>> import jax.numpy as jnp
        >>> parallel = Parallel("jit", jax.devices()[:1])
        >>> double = parallel.compile(lambda x: 2 * x, batch_axis=0)
        >>> batch = parallel.describe(jnp.ones(4), batch_axis=0)
        >>> double.lower(batch).out_info.shape
        (4,)
        """
        if self.mode == "pmap":
            spec = P(_AXIS)
        else:
            spec = P() if batch_axis is None else self._batch_spec(batch_axis)
        sharding = NamedSharding(self._mesh, spec)

        def describe(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            shape = list(x.shape)
            if self.mode == "pmap":
                if batch_axis is not None:
                    shape[batch_axis] //= self.num_devices
                shape = [len(self._local_devices), *shape]
            return jax.ShapeDtypeStruct(tuple(shape), x.dtype, sharding=sharding)

        return jax.tree.map(describe, tree)

    def compile(
        self,
        fn: Callable[..., PyTree],
        *,
        batch_axis: int,
        donate_argnums: tuple[int, ...] = (),
    ) -> Callable[..., PyTree]:
        """Returns `fn(*replicated, batch)`, compiled for all devices.

        Its last argument is a tree from `shard`, the others are from `replicate`. Its
        result is replicated, see `unreplicate`.

        Args:
          fn: a pure function. Under "pmap" it gets this device's share of the batch,
            and must itself average or sum over `axis_name` what it returns.
          batch_axis: the axis along which the batch is split.
          donate_argnums: positions of arguments whose memory the result may reuse; the
            caller must not use these arrays again.
        """
        if self.mode == "pmap":
            return jax.pmap(
                fn,
                axis_name=_AXIS,
                devices=self.devices,
                donate_argnums=donate_argnums,
            )
        replicated = NamedSharding(self._mesh, P())
        batch_sharding = NamedSharding(self._mesh, self._batch_spec(batch_axis))

        def constrained_fn(*args: PyTree) -> PyTree:
            *others, batch = args
            # A constraint, since `in_shardings` would need one entry for each argument,
            # whose number is not known here.
            batch = jax.lax.with_sharding_constraint(batch, batch_sharding)
            return fn(*others, batch)

        # The batch is sharded and the result replicated, so XLA inserts collectives,
        # such as the sum of the gradients.
        return jax.jit(
            constrained_fn, out_shardings=replicated, donate_argnums=donate_argnums
        )

    def _put(self, tree: PyTree, spec: P, split_axis: int | None = None) -> PyTree:
        """Returns the tree as arrays on the mesh.

        Args:
          tree: leaves hold the values of this process.
          spec: how the leaves are sharded over the mesh.
          split_axis: the axis of which this process has only its part; None where it
            has all values.
        """
        sharding = NamedSharding(self._mesh, spec)

        def put(x: ArrayLike) -> jax.Array:
            x = np.asarray(x)
            shape = list(x.shape)
            if split_axis is not None:
                # JAX wants the global shape.
                local_size = shape[split_axis]
                num_local = len(self._local_devices)
                shape[split_axis] = local_size * self.num_devices // num_local
            return jax.make_array_from_process_local_data(sharding, x, tuple(shape))

        return jax.tree.map(put, tree)

    def _batch_spec(self, batch_axis: int) -> P:
        """Returns the partition that splits the axis `batch_axis`, and no other."""
        return P(*([None] * batch_axis), _AXIS)
