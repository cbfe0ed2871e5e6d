"""What is read out of compiled programs, against what they were made of."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from lorax_train import parallel
from lorax_train.plan import hlo
from lorax_train.quant import nf4


def compiled(function, *args):
  """The text of a function that runs on parts of a mesh of 4."""
  mesh = parallel.make_mesh(1, 4, 1, devices=jax.devices()[:4])
  mapped = jax.shard_map(
    function,
    mesh=mesh,
    in_specs=P('fsdp'),
    out_specs=P('fsdp'),
    check_vma=False,
  )
  return jax.jit(mapped).lower(*args).compile().as_text()


def summed(x):
  return x + jax.lax.psum(x, 'fsdp')


def summed_in_a_loop(x):
  def body(carry, _):
    return jnp.sin(jax.lax.psum(carry, 'fsdp')), None

  return jax.lax.scan(body, x, length=5)[0]


def gathered(x):
  whole = jax.lax.all_gather(x, 'fsdp', tiled=True)
  return x + jnp.sum(whole * whole)


def scattered(x):
  whole = jnp.tile(x, (4, 1))
  return jax.lax.psum_scatter(whole * 2, 'fsdp', tiled=True) + x


def passed_on(x):
  ring = [(i, (i + 1) % 4) for i in range(4)]
  return jax.lax.ppermute(jnp.sin(x), 'fsdp', ring)


# Each device has float32 [2, 6] of [8, 6].
PROGRAMS = [
  (summed, 'all-reduce', 48, 1),
  (summed_in_a_loop, 'all-reduce', 48, 5),
  (gathered, 'all-gather', 192, 1),
  (scattered, 'reduce-scatter', 48, 1),
  (passed_on, 'collective-permute', 48, 1),
]


@pytest.mark.parametrize(('function', 'kind', 'size', 'runs'), PROGRAMS)
def test_collectives_are_found_with_size_and_runs(function, kind, size, runs):
  text = compiled(function, np.ones((8, 6), np.float32))
  assert hlo.collectives(text) == [hlo.Collective(kind, size, runs)]


def test_products_are_found_by_their_shapes():
  def function(x, w):
    return jax.grad(lambda w: jnp.sum(jnp.sin(x @ w)))(w)

  x, w = np.ones((5, 7), np.float32), np.ones((7, 11), np.float32)
  text = jax.jit(function).lower(x, w).compile().as_text()
  shapes = [(7, 11), (5, 11), (11, 5), (7, 5)]
  assert (7, 11) in hlo.products_of_shape(text, shapes, {5})
  assert (7, 11) not in hlo.products_of_shape(text, shapes, {6})
  assert (7, 5) not in hlo.products_of_shape(text, shapes, {5, 7, 11})


# Lines as compilers for TPU and GPU write them, shortened.
OTHERS = """
%fused.1 (p: bf16[4,8]) -> bf16[4,32] {
  %all-gather.1 = bf16[4,32]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=7
}
%fused.2 (p: bf16[4,8]) -> bf16[4,32] {
  %all-gather.2 = bf16[4,32]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=7
}
%condition (t: (s32[], bf16[4,8])) -> pred[] {
  %constant.3 = s32[]{:T(128)} constant(32)
  ROOT %lt = pred[]{:T(512)} compare(%i, %constant.3), direction=LT
}
%body (t: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %a = bf16[4,32]{1,0} fusion(%x), kind=kOutput, calls=%fused.1
  %b = bf16[4,32]{1,0} fusion(%x), kind=kOutput, calls=%fused.2
  %k = bf16[4,8]{1,0} custom-call(%x), custom_call_target="tpu_custom_call"
}
ENTRY %main (p: bf16[4,8]) -> bf16[4,8] {
  %w = (s32[]{:T(128)}, bf16[4,8]{1,0}) while(%t), condition=%condition, body=%body
  %s = ((bf16[2,8]{1,0}), bf16[16,8]{1,0}) all-gather-start(%y), channel_id=9
  %d = bf16[16,8]{1,0} all-gather-done(%s)
  %f = (f32[4]{0}, s32[]) custom-call(%q), custom_call_target="__cudnn$fmhaSoftmax"
}
"""


def test_other_compilers_write_the_same_in_other_ways():
  assert sorted(hlo.collectives(OTHERS)) == [
    hlo.Collective('all-gather', 256, 1),
    hlo.Collective('all-gather', 256, 32),
  ]
  assert hlo.kernels(OTHERS) == {'tpu_custom_call': 1, '__cudnn$fmhaSoftmax': 1}


def in_a_scan(x, w):
  return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]


def all_at_once(x, w):
  return jax.lax.scan(lambda x, w: (x @ w, None), x, w.dequantised())[0]


@pytest.mark.parametrize(
  ('function', 'found'), [(in_a_scan, set()), (all_at_once, {(128, 128)})]
)
def test_a_stack_that_is_made_whole_is_seen(function, found):
  x = jax.ShapeDtypeStruct((5, 128), jnp.float32)
  w = nf4.abstract((7, 128, 128), jnp.float32)
  text = jax.jit(function).lower(x, w).compile().as_text()
  assert hlo.float_stacks(text, {(128, 128), (128, 64)}, 7) == found
