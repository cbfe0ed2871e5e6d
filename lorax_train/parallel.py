"""Where arrays live: the mesh, and one table from logical to mesh axes.

Mesh axes: `data` (batch only), `fsdp` (batch, and the embed axis of weights),
`tensor` (heads, mlp, vocab). The adapters' shardings are those of the weight
they belong to, with the rank axis whole.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lorax_train.lora import Adapter, Fixed, Original
from lorax_train.lora.halves import is_half

MESH_AXES = ('data', 'fsdp', 'tensor')

# In bytes: an adapter's leaf below it is not cut over fsdp.
SMALL = 64 * 2**20

AXIS_RULES: dict[str, str | tuple[str, ...] | None] = {
  'batch': ('data', 'fsdp'),
  'embed': 'fsdp',
  'heads': 'tensor',
  'kv_heads': 'tensor',
  'mlp': 'tensor',
  'vocab': 'tensor',
  'norm': None,
  'layers': None,
}


def make_mesh(
  data: int = 1,
  fsdp: int = -1,
  tensor: int = 1,
  devices: Sequence[jax.Device] | None = None,
) -> Mesh:
  """A mesh (data, fsdp, tensor) over all the devices given.

  Args:
    data: size of the axis; -1, for one axis, takes what the others leave.
    fsdp: likewise.
    tensor: likewise.
    devices: all of jax.devices() by default.

  Raises:
    ValueError: sizes that don't multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else list(devices)
  sizes = mesh_sizes(data, fsdp, tensor, len(devices))
  types = (AxisType.Auto,) * 3
  n_slices = len({getattr(d, 'slice_index', 0) for d in devices})
  if n_slices > 1 and devices[0].platform == 'tpu':
    return Mesh(_of_slices(sizes, n_slices, devices), MESH_AXES, types)
  return jax.make_mesh(sizes, MESH_AXES, axis_types=types, devices=devices)


def _of_slices(
  sizes: Sequence[int], n_slices: int, devices: Sequence[jax.Device]
) -> np.ndarray:
  """TPU slices joined by a network: along data, or else along fsdp."""
  along = next((i for i in (0, 1) if sizes[i] % n_slices == 0), None)
  if along is None:
    raise ValueError(
      f'mesh data={sizes[0]} fsdp={sizes[1]} tensor={sizes[2]}: {n_slices} slices'
      f' are joined along data or fsdp: make one of them a multiple of {n_slices}'
    )
  within, across = list(sizes), [1, 1, 1]
  within[along], across[along] = sizes[along] // n_slices, n_slices
  return mesh_utils.create_hybrid_device_mesh(within, across, devices)


def abstract_mesh(data: int, fsdp: int, tensor: int, n: int) -> AbstractMesh:
  """A mesh of n devices that nobody has; see `make_mesh`."""
  sizes = mesh_sizes(data, fsdp, tensor, n)
  return AbstractMesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def mesh_sizes(data: int, fsdp: int, tensor: int, n: int) -> tuple[int, ...]:
  """Sizes of the axes of a mesh of n devices; see `make_mesh`."""
  sizes = [data, fsdp, tensor]
  known = math.prod(s for s in sizes if s > 0)
  if sizes.count(-1) == 1 and n % known == 0:
    sizes[sizes.index(-1)] = n // known
  if min(sizes) < 1 or math.prod(sizes) != n:
    raise ValueError(
      f'mesh data={data} fsdp={fsdp} tensor={tensor} does not cover'
      f' {n} device(s): the sizes must multiply to that number, and'
      ' one of them may be -1 for the rest'
    )
  return tuple(sizes)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
  """Says where an activation lives, by logical axes; outside a mesh, x.

  An axis of x that its mesh axes don't divide stays whole.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return x
  return jax.lax.with_sharding_constraint(x, partition(mesh, axes, x.shape))


def sharding(
  mesh: Mesh, axes: Sequence[str | None], units: Sequence[int]
) -> NamedSharding:
  """Where a parameter lives.

  Args:
    mesh: the mesh.
    axes: logical axes.
    units: into how many parts each axis may be cut; an axis whose units the
      mesh axis does not divide stays whole on each device.
  """
  return NamedSharding(mesh, partition(mesh, axes, units))


def adapter_sharding(fixed: Fixed, adapter: Adapter) -> Adapter:
  """Where the parts of an adapter lie, from where its W does.

  The rank axis is whole everywhere.
  """
  return Adapter(
    None if adapter.a is None else _beside(fixed, adapter.a, '.i'),
    _beside(fixed, adapter.b, '.o'),
    None if adapter.m is None else _beside(fixed, adapter.m, 'o'),
  )


def frozen_shardings(frozen: Any) -> Any:
  """The frozen tree with a sharding in each array's place.

  What stands beside a weight lies as it does, wherever the rule put that.
  """
  axes = {'a': '.i', 'a0': '.i', 'b0': '.o', 'norm2': 'o'}

  def of(half: Any) -> Any:
    if isinstance(half, Fixed):
      beside: dict[str, Any] = {
        name: _beside(half, getattr(half, name), axes.get(name, ''))
        for name in ('scale', 'rate', *axes)
        if getattr(half, name) is not None
      }
      return dataclasses.replace(half, w=_each(half.w), **beside)
    return _each(half)

  return jax.tree.map(of, frozen, is_leaf=is_half)


def _each(w: Any) -> Any:
  """Where each array of a weight lies."""
  return jax.tree.map(lambda x: x.sharding, w)


def _beside(fixed: Fixed, part: Any, axes: str) -> NamedSharding:
  """Where `part` [*stack, *axes] lies: as W does by its letters, '.' whole.

  A small one is whole over fsdp, or each layer of a scan would gather it, and
  over tensor XLA would rather add up x A^T than gather A.
  """
  spec = _full_spec(fixed.w)
  small = math.prod(part.shape) * part.dtype.itemsize < SMALL
  parts: list[Any] = []
  for letter in 's' + axes:
    own = [p for p, kind in zip(spec, fixed.axes, strict=True) if kind == letter]  # fmt: skip
    parts += [None] if letter == '.' else own
  if small:
    parts = [None if name == 'fsdp' else name for name in parts]
  return NamedSharding(fixed.w.sharding.mesh, P(*parts))


def trainable_shardings(frozen: Any, trainable: Any) -> Any:
  """The trainable tree with a sharding in each leaf's place.

  Reads where the frozen weights lie, so it follows them whatever rule put
  them there; what is trained whole stays where `lora.split` left it.
  """

  def of(half: Any, own: Any) -> Any:
    if own is None:
      return None
    if isinstance(half, Fixed):
      return adapter_sharding(half, own)
    if isinstance(half, Original) and half.w is not None:
      mesh, spec = half.w.sharding.mesh, _full_spec(half.w)
      return NamedSharding(mesh, P(None, *spec[1:]))
    return own.sharding

  return jax.tree.map(of, frozen, trainable, is_leaf=is_half)


def _full_spec(w: Any) -> tuple[Any, ...]:
  """What of the mesh each axis of an array is cut by."""
  spec = tuple(w.sharding.spec)
  return spec + (None,) * (len(w.shape) - len(spec))


def replicated(mesh: Mesh) -> NamedSharding:
  """The whole array on each device."""
  return NamedSharding(mesh, P())


def put(tree: Any, shardings: Any) -> Any:
  """Arrays that each process has whole, on the mesh.

  `jax.device_put` does it too, but of several processes it first compares what
  they have, array by array, and so waits for all of them.

  Args:
    tree: of arrays; one that is on the devices of several processes already is
      moved.
    shardings: the same tree of shardings, or one for all.
  """

  def of(x: Any, where: jax.sharding.Sharding) -> jax.Array:
    placed = isinstance(x, jax.Array) and not x.is_fully_addressable
    if placed or where.is_fully_addressable:
      return jax.device_put(x, where)
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, where, host.__getitem__)

  if isinstance(shardings, jax.sharding.Sharding):
    return jax.tree.map(lambda x: of(x, shardings), tree)
  return jax.tree.map(of, tree, shardings)


def fetch(tree: Any) -> Any:
  """Arrays of a mesh, so that each process can read them whole.

  Called by all processes where the mesh is of several.
  """

  def of(x: Any) -> Any:
    if not isinstance(x, jax.Array) or x.is_fully_addressable:
      return x
    if x.is_fully_replicated:
      return np.asarray(x)
    return multihost_utils.process_allgather(x, tiled=True)

  return jax.tree.map(of, tree)


def batch_sharding(mesh: Mesh, axis: int) -> NamedSharding:
  """Rows of a batch, which stand on `axis`, over data and fsdp."""
  return NamedSharding(mesh, P(*(None,) * axis, AXIS_RULES['batch']))


def batch_ways(mesh: Mesh) -> int:
  """Into how many parts a batch is cut."""
  return mesh.shape['data'] * mesh.shape['fsdp']


def rows_of(
  mesh: Mesh,
  n_rows: int,
  process: int | None = None,
  process_of: Callable[[Any], int] = lambda device: device.process_index,
) -> np.ndarray:
  """Which rows of a batch a process holds, int64, in order.

  They need not lie side by side: along a mesh axis the devices of a TPU pod
  stand as they are wired, and in between are those of other hosts. Processes
  whose devices share rows (`tensor` across them) hold the same ones.

  Args:
    mesh: the mesh.
    n_rows: of the batch; `batch_ways` divides it.
    process: which process; this one by default.
    process_of: device -> the process that it belongs to.
  """
  process = jax.process_index() if process is None else process
  ways = batch_ways(mesh)
  own = [
    way
    for way, devices in enumerate(mesh.devices.reshape(ways, -1))
    if any(process_of(device) == process for device in devices)
  ]
  return np.arange(n_rows).reshape(ways, -1)[own].ravel()


def put_rows(
  own: np.ndarray, rows: np.ndarray, n_rows: int, where: NamedSharding
) -> jax.Array:
  """A batch on the mesh, of the rows that each process holds.

  Args:
    own: which rows, from `rows_of`.
    rows: these, on axis 1.
    n_rows: of the whole batch.
    where: from `batch_sharding`, axis 1.
  """
  shape = (rows.shape[0], n_rows, *rows.shape[2:])

  def of_device(index: tuple[slice, ...] | None) -> np.ndarray:
    assert index is not None  # which jax allows of arrays that have no axes
    begin, end, _ = index[1].indices(n_rows)
    first = int(np.searchsorted(own, begin))
    return rows[:, first : first + end - begin]

  return jax.make_array_from_callback(shape, where, of_device)


def partition(mesh: Any, axes: Sequence[str | None], units: Sequence[int]) -> P:
  """The mesh axes that cut each axis, see `sharding`."""
  parts: list[str | tuple[str, ...] | None] = []
  for axis, n in zip(axes, units, strict=True):
    rule = None if axis is None else AXIS_RULES[axis]
    names = (rule,) if isinstance(rule, str) else rule or ()
    ways = math.prod(mesh.shape[name] for name in names)
    parts.append(rule if n % ways == 0 else None)
  return P(*parts)
