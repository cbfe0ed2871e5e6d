"""Adapters made there and loaded here, and the other way round.

Reference: PEFT on transformers and torch, its own `get_peft_model`,
`save_pretrained` and `from_pretrained`.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from lorax_train import lora, parallel
from lorax_train.formats import hf, hf_config, peft
from lorax_train.infer.load import load_params
from lorax_train.lora import algebra
from lorax_train.models import params as params_lib
from lorax_train.models.mistral import Decoder
from tests.formats.refusals import refusal

pytest.importorskip('torch')
pytest.importorskip('transformers')
their_peft = pytest.importorskip('peft')

from . import reference  # noqa: E402

ATOL = 1e-4
LINEAR = [
  *('q_proj', 'k_proj', 'v_proj', 'o_proj'),
  *('gate_proj', 'up_proj', 'down_proj'),
]
IDS = reference.random_ids(7)


@pytest.fixture(scope='module')
def directory(tmp_path_factory):
  model = reference.make_model(7, sliding_window=5)
  return reference.save_model(model, tmp_path_factory.mktemp('base'))


def close(got, want):
  np.testing.assert_allclose(got, want, atol=ATOL, rtol=0)


# LoraConfig keywords.
THEIRS = {
  'defaults': {},
  'list': {'target_modules': ['q_proj', 'v_proj'], 'r': 5},
  'all-linear': {'target_modules': 'all-linear', 'r': 2, 'lora_alpha': 3},
  'regex': {'target_modules': r'.*\.(q|up)_proj'},
  'one layer': {'target_modules': LINEAR, 'layers_to_transform': [1]},
  'a full path': {'target_modules': ['model.layers.2.mlp.down_proj']},
  'exclude': {'target_modules': 'all-linear', 'exclude_modules': ['v_proj']},
  'the head': {'target_modules': ['k_proj', 'lm_head']},
  'rslora': {'target_modules': LINEAR, 'use_rslora': True, 'r': 3},
  'dropout, off in eval': {'target_modules': LINEAR, 'dropout': 0.5},
  'patterns': {
    'target_modules': LINEAR,
    'rank_pattern': {'^model.layers.1.mlp.down_proj': 6, 'q_proj': 2},
    'alpha_pattern': {'v_proj': 3, 'o_proj|k_proj': 20},
  },
  'patterns, rslora': {
    'target_modules': ['q_proj', 'down_proj'],
    'use_rslora': True,
    'rank_pattern': {r'layers\.[02]\..*': 2},
    'alpha_pattern': {'down_proj': 5},
  },
  'gaussian': {'target_modules': LINEAR, 'init_lora_weights': 'gaussian'},
  'orthogonal': {'target_modules': LINEAR, 'init_lora_weights': 'orthogonal'},
  'mica': {'target_modules': LINEAR, 'init_lora_weights': 'mica'},
  'all random': {'target_modules': LINEAR, 'init_lora_weights': False},
}


@pytest.mark.parametrize('case', THEIRS)
def test_their_adapter_here(case, directory, tmp_path):
  base = reference.load_model(directory)
  plain = reference.logits(base, IDS)
  model = reference.make_adapter(base, 11, **THEIRS[case])
  want = reference.logits(model, IDS)
  assert np.abs(want - plain).max() > 0.05
  model.save_pretrained(tmp_path)
  apply, params = load_params(directory, adapter=str(tmp_path))
  close(jax.jit(apply)(params, jnp.asarray(IDS)), want)


# These subtract the adapter's first value from the base, and again whenever
# the adapter is loaded: A and B alone are not what was trained.
@pytest.mark.parametrize('init', ['pissa', 'pissa_niter_2', 'olora'])
def test_an_adapter_that_changes_the_base_is_refused(init, directory, tmp_path):
  model = reference.make_adapter(
    reference.load_model(directory), 12,
    target_modules=['q_proj'], init_lora_weights=init,
  )  # fmt: skip
  model.save_pretrained(tmp_path)
  message = refusal(peft.load_adapter, tmp_path)
  assert f"init_lora_weights='{init}', which changes the base" in message
  # Were it taken for a plain one, the logits would be others.
  want = reference.logits(
    their_peft.PeftModel.from_pretrained(
      reference.load_model(directory), tmp_path
    ),
    IDS,
  )
  path = tmp_path / 'adapter_config.json'
  path.write_text(
    json.dumps({**json.loads(path.read_text()), 'init_lora_weights': True})
  )
  apply, params = load_params(directory, adapter=str(tmp_path))
  assert np.abs(np.asarray(apply(params, jnp.asarray(IDS))) - want).max() > 0.01


# LoraSpec keywords.
OURS = {
  'list': {'targets': 'q_proj, v_proj', 'rank': 5, 'alpha': 7.5},
  'all-linear': {'targets': 'all-linear', 'rank': 2},
  'regex': {'targets': r'.*\.(q|up)_proj'},
  'one name as a regex': {'targets': r'(?:model.layers.1.mlp.up_proj)'},
  'regex over whole layers': {'targets': r'.*layers\.1\..*'},
  'regex over everything': {'targets': '.*', 'exclude': 'lm_head,up_proj'},
  'exclude a regex': {'targets': 'all-linear', 'exclude': r'.*\.mlp\..*'},
  'layers': {'targets': 'q_proj,down_proj', 'layers_to_transform': (0, 2)},
  'the head': {'targets': 'q_proj,lm_head'},
  'rslora': {'targets': 'all-linear', 'variant': 'rslora', 'rank': 3},
  'dropout, off in eval': {'targets': 'q_proj', 'dropout': 0.5},
  'patterns': {
    'targets': 'all-linear',
    'rank_pattern': {'^model.layers.1.mlp.down_proj': 6, 'q_proj': 2},
    'alpha_pattern': {'v_proj': 3.0},
  },
  # Sorted, as PEFT does, these two would mean something else.
  'patterns whose order matters': {
    'targets': 'q_proj,k_proj',
    'rank_pattern': {'q_proj': 2, 'layers.1.self_attn.q_proj': 6},
    'alpha_pattern': {'k_proj': 6.0, '.*_proj': 2.0},
  },
  'patterns whose order matters, rslora': {
    'targets': 'q_proj,k_proj',
    'variant': 'rslora',
    'rank': 3,
    'rank_pattern': {'q_proj': 5, 'layers.1.self_attn.q_proj': 6},
  },
}


def our_adapter(directory, spec):
  """(cfg, frozen, trainable, names), B random."""
  cfg = hf_config.read_config(directory)
  mesh = parallel.make_mesh(devices=jax.devices()[:1])
  params = hf.load_params(directory, cfg, jnp.float32, mesh)
  names = params_lib.module_names(cfg)
  frozen, trainable = lora.split(
    jax.random.key(3), params, spec, names, params_lib.layout(cfg)
  )

  def randomise(a):
    if not a.a.any():  # an embedding's, whose B is random already
      return lora.Adapter(
        0.1 * jax.random.normal(jax.random.key(5), a.a.shape), a.b
      )
    # Rows past a module's true rank are zero in A and stay so in B.
    live = jnp.any(a.a != 0, axis=-1, keepdims=True)
    b = 0.1 * jax.random.normal(jax.random.key(4), a.b.shape)
    return lora.Adapter(a.a, b * live)

  trainable = jax.tree.map(
    randomise, trainable, is_leaf=lambda x: isinstance(x, lora.Adapter)
  )
  return cfg, frozen, trainable, names


@pytest.mark.parametrize('case', OURS)
def test_our_adapter_there(case, directory, tmp_path):
  spec = lora.LoraSpec(**OURS[case])
  cfg, frozen, trainable, names = our_adapter(directory, spec)
  ours = jax.jit(Decoder(cfg).apply)(
    {'params': lora.bind(frozen, trainable)}, IDS
  )
  peft.save_adapter(
    tmp_path / 'ours', frozen, trainable, names, spec, str(directory)
  )
  # PEFT warns of keys that are missing, and warnings are errors here.
  model = their_peft.PeftModel.from_pretrained(
    reference.load_model(directory), tmp_path / 'ours'
  ).eval()
  close(reference.logits(model, IDS), ours)
  result = model.load_adapter(tmp_path / 'ours', 'again')
  assert result.unexpected_keys == []
  assert not [k for k in result.missing_keys if 'lora_' in k and '.again.' in k]

  # What PEFT makes of it, written again and read here, is what we had.
  model.save_pretrained(tmp_path / 'theirs', selected_adapters=['default'])
  files = [
    tmp_path / x / 'adapter_model.safetensors' for x in ('ours', 'theirs')
  ]
  mine, back = (load_file(f) for f in files)
  back.pop('base_model.model.lm_head.base_layer.weight', None)
  assert mine.keys() == back.keys()
  for key, tensor in mine.items():
    np.testing.assert_array_equal(back[key], tensor)
  apply, params = load_params(directory, adapter=str(tmp_path / 'theirs'))
  close(jax.jit(apply)(params, jnp.asarray(IDS)), ours)


def test_the_adapter_in_bfloat16_costs_what_it_costs_peft(directory, tmp_path):
  base = reference.load_model(directory)
  model = reference.make_adapter(base, 13, target_modules=LINEAR)
  exact = reference.logits(model, IDS)
  model.save_pretrained(tmp_path)
  theirs = reference.logits(
    their_peft.PeftModel.from_pretrained(
      reference.load_model(directory, 'bfloat16'), tmp_path
    ).eval(),
    IDS,
  )
  apply, params = load_params(
    directory, adapter=str(tmp_path), dtype=jnp.bfloat16
  )
  ours = np.asarray(jax.jit(apply)(params, jnp.asarray(IDS)))

  def error(x):
    return np.sqrt(np.mean((x - exact) ** 2) / np.mean(exact**2))

  # PEFT keeps its factors and their products in float32: a few roundings less
  # of a part of each linear's result.
  assert error(ours) < 1.25 * error(theirs)


def test_a_mixture_there(directory, tmp_path):
  specs = (
    lora.LoraSpec('q_proj,lm_head', rank=2, rank_pattern={'lm_head': 3}),
    lora.LoraSpec('q_proj,up_proj', rank=4, layers_to_transform=(1, 2)),
  )
  cfg, frozen, trainable, names = our_adapter(directory, specs[0])
  _, other, factors, _ = our_adapter(directory, specs[1])
  updates = [
    algebra.as_update(frozen, trainable), algebra.as_update(other, factors)
  ]  # fmt: skip
  mixture = algebra.cat(updates, (0.7, -1.5))
  _, every, _, _ = our_adapter(
    directory, lora.LoraSpec('q_proj,up_proj,lm_head')
  )
  halves = algebra.as_adapter(every, mixture)
  spec = lora.spec_of(halves[0], names)
  peft.save_adapter(tmp_path, *halves, names, spec, str(directory))
  model = their_peft.PeftModel.from_pretrained(
    reference.load_model(directory), tmp_path
  ).eval()
  ours = jax.jit(Decoder(cfg).apply)({'params': lora.merge(*halves)}, IDS)
  close(reference.logits(model, IDS), ours)
  apply, params = load_params(directory, adapter=str(tmp_path))
  close(jax.jit(apply)(params, jnp.asarray(IDS)), ours)
