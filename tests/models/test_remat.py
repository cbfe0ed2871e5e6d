"""What a policy keeps and makes again, against the traced step.

Reference: the arrays that the forward scan over layers hands to the backward
one, and the FLOPs of all products of the step, both read off its jaxpr; the
formulas of `remat` know neither.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax_train import lora
from lorax_train.models import params as params_lib
from lorax_train.models import remat
from lorax_train.models.mistral import Decoder
from lorax_train.plan import flops as flops_lib
from lorax_train.train import step as step_lib

CFG = params_lib.DecoderConfig(
  vocab=67, hidden=48, layers=3, heads=6, kv_heads=2, head_dim=12, mlp=104
)
B, T = 2, 16
SPECS = {
  'all': lora.LoraSpec('all-linear', rank=5),
  'q,v': lora.LoraSpec('q_proj,v_proj', rank=5),
  'patterns': lora.LoraSpec(
    'all-linear', rank=5, rank_pattern={'down_proj': 7, 'layers.0.*': 2}
  ),
  'dropout': lora.LoraSpec('all-linear', rank=5, dropout=0.5),
}


def gradient(name, spec):
  """(function, its arguments) of one micro-batch in bfloat16."""
  params = params_lib.abstract(CFG, jnp.bfloat16)
  halves = jax.eval_shape(
    lambda p: lora.split(
      jax.random.key(0), p, spec, params_lib.module_names(CFG)
    ),
    params,
  )
  model = Decoder(CFG, jnp.bfloat16, name, head=False)
  loss = step_lib.make_loss(lambda p, ids: model.apply({'params': p}, ids))
  micro = dict.fromkeys(
    ('ids', 'labels'), jax.ShapeDtypeStruct((B, T), jnp.int32)
  )
  key = jax.eval_shape(lambda: jax.random.key(0))

  def run(trainable, frozen, micro, key):
    return jax.value_and_grad(loss, has_aux=True)(trainable, frozen, micro, key)

  frozen, trainable = halves
  return run, (trainable, frozen, micro, key)


def largest_ranks(args):
  """{'q_proj': R, ...} of the frozen half."""
  layers = args[1]['layers']
  halves = {**layers['self_attn'], **layers['mlp']}.items()
  return {n: max(x.ranks) for n, x in halves if isinstance(x, lora.Fixed)}


def kept(function, args):
  """Bytes of tokens that the first scan over layers hands on."""
  found = []

  def visit(jaxpr):
    for eqn in jaxpr.eqns:
      own = eqn.primitive.name == 'scan' and eqn.params['length'] == CFG.layers
      if own:
        found.append(eqn)
      for inner, _ in flops_lib.subjaxprs(eqn):
        visit(inner)

  visit(jax.make_jaxpr(function)(*args).jaxpr)
  handed_on = [v.aval for v in found[0].outvars]
  return sum(
    np.prod(x.shape) * x.dtype.itemsize
    for x in handed_on
    if x.shape[:3] == (CFG.layers, B, T)
  )


@pytest.mark.compat
@pytest.mark.parametrize('name', remat.POLICIES[1:])
@pytest.mark.parametrize('spec', SPECS.values(), ids=SPECS)
def test_bytes_kept_of_a_layer(name, spec):
  """So no dropout mask is among them either: it comes of its key again."""
  function, args = gradient(name, spec)
  want = remat.saved_bytes(CFG, name, 2, largest_ranks(args))
  assert kept(function, args) == want * B * T * CFG.layers


@pytest.mark.compat
@pytest.mark.parametrize('name', remat.POLICIES[1:])
@pytest.mark.parametrize('spec', [SPECS['all'], SPECS['q,v']], ids=['all', 'q,v'])  # fmt: skip
def test_flops_made_again(name, spec):
  function, args = gradient(name, spec)
  again = products(function, args) - products(*gradient('none', spec))
  want = remat.recomputed_flops(CFG, name, largest_ranks(args), attended=0)
  assert again == want * B * T * CFG.layers


def products(function, args):
  """FLOPs of products with weights: those of attention have batch axes."""
  total = 0
  for eqn, times in flops_lib.walk(jax.make_jaxpr(function)(*args).jaxpr):
    if eqn.primitive.name == 'dot_general':
      (contracted, _), (batch, _) = eqn.params['dimension_numbers']
      k = np.prod([eqn.invars[0].aval.shape[i] for i in contracted])
      own = 2 * k * np.prod(eqn.outvars[0].aval.shape) * times
      total += 0 if batch else own
  return total
