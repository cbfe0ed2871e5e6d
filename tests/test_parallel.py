"""Where arrays go, and how devices that are not all alike make a mesh.

Reference: `jax.device_put` for arrays; for TPU slices the sizes that jax's own
arrangement of them is asked for, worked out by hand.
"""

import types

import jax
import numpy as np
import pytest

from lorax_train import parallel


def test_what_is_put_lies_as_jax_would_put_it():
  mesh = parallel.make_mesh(2, 4, 1)
  tree = {'x': np.arange(16.0).reshape(8, 2), 'y': jax.numpy.ones((4, 3))}
  shardings = {
    'x': parallel.batch_sharding(mesh, 0), 'y': parallel.replicated(mesh)
  }  # fmt: skip
  for where in (shardings, shardings['y']):
    got, want = parallel.put(tree, where), jax.device_put(tree, where)
    for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
      assert a.sharding == b.sharding
      np.testing.assert_array_equal(a, b)
  # All of it can be read here: nothing is fetched.
  assert parallel.fetch(got)['x'] is got['x']


@pytest.mark.parametrize(
  ('sizes', 'within', 'across'),
  [
    ((2, 16, 1), [1, 16, 1], [2, 1, 1]),
    ((1, 32, 1), [1, 16, 1], [1, 2, 1]),
    ((4, 4, 2), [2, 4, 2], [2, 1, 1]),
    ((1, -1, 4), [1, 4, 4], [1, 2, 1]),
  ],
)
def test_slices_are_joined_along_data_or_fsdp(
  sizes, within, across, monkeypatch
):
  """Two slices of 16 devices, which jax.make_mesh itself refuses."""
  devices = [
    types.SimpleNamespace(platform='tpu', slice_index=n // 16)
    for n in range(32)
  ]
  asked = []

  def arranged(*args):
    asked.append(args)
    return np.array(jax.devices()).reshape(2, 2, 2)

  monkeypatch.setattr(
    parallel.mesh_utils, 'create_hybrid_device_mesh', arranged
  )
  mesh = parallel.make_mesh(*sizes, devices=devices)
  assert asked == [(within, across, devices)]
  assert mesh.axis_names == ('data', 'fsdp', 'tensor')
  assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}
  with pytest.raises(ValueError, match='make one of them a multiple of 2'):
    parallel.make_mesh(1, 1, 32, devices=devices)
