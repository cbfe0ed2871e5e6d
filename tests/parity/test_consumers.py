"""Baked adapters in PEFT, and read with one scale by torch.

Reference: the logits of the adapter as PEFT made it, on transformers and
torch.
"""

import json

import jax
import numpy as np
import pytest

from lorax_train.formats import consumers
from lorax_train.infer.load import load_params

torch = pytest.importorskip('torch')
pytest.importorskip('transformers')
their_peft = pytest.importorskip('peft')

from safetensors.torch import load_file  # noqa: E402

from . import reference  # noqa: E402

ATOL = 1e-4
LINEAR = [
  *('q_proj', 'k_proj', 'v_proj', 'o_proj'),
  *('gate_proj', 'up_proj', 'down_proj'),
]
IDS = reference.random_ids(7)
PREFIX = 'base_model.model.'

# LoraConfig keywords.
THEIRS = {
  'all three': {
    'target_modules': LINEAR,
    'use_rslora': True,
    'rank_pattern': {'^model.layers.1.mlp.down_proj': 6, 'q_proj': 2},
    'alpha_pattern': {'v_proj': 3, 'o_proj|k_proj': 20},
  },
  'rslora': {'target_modules': 'all-linear', 'use_rslora': True, 'r': 3},
  'some layers': {
    'target_modules': LINEAR,
    'layers_to_transform': [1],
    'exclude_modules': ['up_proj'],
    'rank_pattern': {'q_proj': 2},
  },
  'a regex': {
    'target_modules': r'.*\.(q|up)_proj',
    'alpha_pattern': {'up_proj': 2},
  },
  'the head': {
    'target_modules': ['k_proj', 'lm_head'],
    'alpha_pattern': {'lm_head': 3},
  },
  'the embedding': {
    'target_modules': ['q_proj', 'embed_tokens'],
    'rank_pattern': {'embed_tokens': 6},
    'use_rslora': True,
  },
}


@pytest.fixture(scope='module')
def directory(tmp_path_factory):
  model = reference.make_model(7, sliding_window=5)
  return reference.save_model(model, tmp_path_factory.mktemp('base'))


def make_adapter(directory, case):
  model = reference.make_adapter(
    reference.load_model(directory), 11, **THEIRS[case]
  )
  with torch.no_grad():
    for name, weight in model.named_parameters():
      if 'lora_embedding' in name:
        weight.normal_(0.0, 0.2)
  return model


def close(got, want):
  np.testing.assert_allclose(got, want, atol=ATOL, rtol=0)


@torch.no_grad()
def add_one_scale(model, adapter):
  """W + alpha / r B A for every pair in the file, as a reader of one scale."""
  config = json.loads((adapter / 'adapter_config.json').read_text())
  scale = config['lora_alpha'] / config['r']
  tensors = load_file(adapter / 'adapter_model.safetensors')
  for key, a in tensors.items():
    for end_a, end_b in (
      ('.lora_A.weight', '.lora_B.weight'),
      ('.lora_embedding_A', '.lora_embedding_B'),
    ):
      if key.endswith(end_a):
        b = tensors[key.removesuffix(end_a) + end_b]
        name = key.removeprefix(PREFIX).removesuffix(end_a)
        update = scale * b @ a
        if 'embedding' in end_a:
          update = update.T
        model.get_submodule(name).weight += update
  return model


@pytest.mark.parametrize('case', THEIRS)
def test_a_baked_adapter_is_the_same_to_peft_and_to_a_reader_of_one_scale(
  case, directory, tmp_path
):
  model = make_adapter(directory, case)
  want = reference.logits(model, IDS)
  plain = reference.logits(reference.load_model(directory), IDS)
  assert np.abs(want - plain).max() > 0.05
  model.save_pretrained(tmp_path / 'theirs')
  for consumer in consumers.CONSUMERS:
    baked = tmp_path / consumer
    consumers.export(
      str(tmp_path / 'theirs'), consumer, str(baked), True, str(directory)
    )
    # Warnings of keys that are missing or unexpected would be errors here.
    loaded = their_peft.PeftModel.from_pretrained(
      reference.load_model(directory), baked
    ).eval()
    close(reference.logits(loaded, IDS), want)
    close(
      reference.logits(
        add_one_scale(reference.load_model(directory), baked), IDS
      ),
      want,
    )
    scales = {
      float(module.scaling['default'])
      for module in loaded.modules()
      if isinstance(getattr(module, 'scaling', None), dict)
    }
    assert scales == {1.0}
  if case != 'the embedding':
    apply, params = load_params(directory, adapter=str(tmp_path / 'vllm'))
    close(jax.jit(apply)(params, IDS), want)


def test_a_setting_that_only_peft_reads_is_copied_to_peft(directory, tmp_path):
  model = reference.make_adapter(
    reference.load_model(directory), 12,
    target_modules=['q_proj'], use_dora=True,
  )  # fmt: skip
  want = reference.logits(model, IDS)
  model.save_pretrained(tmp_path / 'theirs')
  consumers.export(str(tmp_path / 'theirs'), 'peft', str(tmp_path / 'out'))
  loaded = their_peft.PeftModel.from_pretrained(
    reference.load_model(directory), tmp_path / 'out'
  ).eval()
  close(reference.logits(loaded, IDS), want)
