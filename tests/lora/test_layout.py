"""What `layout` reads off a function, against tables written by hand."""

import jax
import jax.numpy as jnp
import pytest

from lorax_train import lora
from tests.lora.cases import CASES, normal


@pytest.mark.compat
@pytest.mark.parametrize('name', CASES)
def test_layout_of(name):
  case = CASES[name]()
  assert lora.layout(case.fn, case.params, *case.args) == case.layout


def test_shapes_are_enough():
  case = CASES['scan_over_layers']()
  shapes = jax.eval_shape(lambda: (case.params, case.args))
  assert lora.layout(case.fn, shapes[0], *shapes[1]) == case.layout


def test_leaves_that_meet_no_product_are_left_out():
  def fn(params, x):
    x = x * params['gain'] + params['bias']
    normed = params['normed'] / jnp.linalg.norm(params['normed'], axis=0)
    return (
      x @ normed,
      params['position'][:5] + x,
      jnp.vdot(x, params['like_x']),
    )

  params = {
    'bias': normal(12),
    'gain': normal(1, 12),
    'like_x': normal(2, 5, 12),
    'normed': normal(12, 7),
    'position': normal(9, 12),
    'unused': normal(3, 4),
  }
  assert lora.layout(fn, params, normal(2, 5, 12)) == {}


def test_the_head_of_a_tied_embedding_may_come_first():
  def fn(params, x, ids):
    return x @ params['embed'].T, params['embed'][ids]

  params = {'embed': normal(37, 12)}
  got = lora.layout(fn, params, normal(5, 12), jnp.arange(3))
  assert got == {'embed': 'vo'}


def test_other_products():
  def fn(params, x):
    @jax.custom_vjp
    def own(x, w):
      return x @ w

    own.defvjp(lambda x, w: (x @ w, w), lambda w, g: (g @ w.T, w))
    y = own(x, params['own'])
    z = jnp.einsum('td,edf->tef', x, params['experts'])
    merged = params['heads'].reshape(12, 6)
    return y, z, x @ merged

  params = {
    'experts': normal(3, 12, 8), 'heads': normal(12, 2, 3), 'own': normal(12, 7)
  }  # fmt: skip
  got = lora.layout(fn, params, normal(5, 12))
  assert got == {'experts': 'oio', 'heads': 'ioo', 'own': 'io'}


def test_two_ways_that_do_not_fit_are_an_error_with_both():
  def fn(params, x):
    kept = jnp.einsum('td,dnh->tnh', x, params['block']['w'])
    return jnp.einsum('tnh,dnh->tdn', kept, params['block']['w'])

  params = {'block': {'w': normal(12, 2, 3)}}
  with pytest.raises(ValueError, match='two ways') as caught:
    lora.layout(fn, params, normal(5, 12))
  first = fn.__code__.co_firstlineno
  for part in (
    'block/w', 'ioo', 'osi', 'dot_general', '[5,12]', '[12,2,3]',
    f'test_layout.py:{first + 1}', f'test_layout.py:{first + 2}',
  ):  # fmt: skip
    assert part in str(caught.value)


def test_nothing_is_computed():
  def fn(params, x):
    jax.debug.callback(lambda: pytest.fail('it ran'))
    return x @ params['w']

  assert lora.layout(fn, {'w': normal(3, 4)}, normal(2, 3)) == {'w': 'io'}
