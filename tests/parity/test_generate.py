"""Generated tokens and merged models against transformers and PEFT.

Reference: transformers' own `generate`, greedy and with its cache, one prompt
at a time, on the real weights of ../shared.
"""

import shutil

import jax
import numpy as np
import pytest

from lorax_train import __main__
from lorax_train.formats import hf_config
from lorax_train.infer import complete as texts_room
from lorax_train.infer import generate as room
from lorax_train.infer.load import load_params
from lorax_train.models.mistral import Decoder

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')
their_peft = pytest.importorskip('peft')

from . import reference  # noqa: E402

LINEAR = [
  *('q_proj', 'k_proj', 'v_proj', 'o_proj'),
  *('gate_proj', 'up_proj', 'down_proj'),
]
PROMPTS = [
  [1, 403, 407, 261, 378],  # Once upon a time
  [1],
  [1, 410, 420, 300, 280, 299, 350, 400, 401, 290, 270],
]
NEW = 200


@torch.no_grad()
def theirs(model, prompts=PROMPTS, new=NEW, **kwargs):
  """transformers' greedy tokens, each prompt by itself."""
  model.generation_config.eos_token_id = None
  out = []
  for ids in prompts:
    whole = model.generate(
      torch.tensor([ids]),
      attention_mask=torch.ones((1, len(ids)), dtype=torch.long),
      max_new_tokens=new,
      do_sample=False,
      pad_token_id=0,
      **kwargs,
    )
    out.append(whole[0, len(ids) :].tolist())
  return out


def ours(directory, adapter=None, prompts=PROMPTS, new=NEW, **kwargs):
  _, params = load_params(directory, None, adapter)
  model = Decoder(hf_config.read_config(directory))
  return room.generate(model, params, prompts, new, **kwargs)


@pytest.fixture(scope='module')
def story(tmp_path_factory):
  """A model directory, a PEFT adapter on it, and the two in torch."""
  from tests.conftest import SHARED

  source = SHARED / 'models' / 'stories260K-mistral'
  if not source.is_dir():
    pytest.skip('no ../shared: real weights are not part of the code')
  root = tmp_path_factory.mktemp('story')
  directory = shutil.copytree(source, root / 'model')
  directory.chmod(0o755)
  model = reference.make_adapter(
    reference.load_model(directory), 5, r=4, target_modules=LINEAR
  )
  with torch.no_grad():
    for name, weight in model.named_parameters():
      if 'lora_B' in name:
        weight.mul_(0.3)  # another story, not noise
  model.save_pretrained(root / 'adapter')
  out = root / 'merged'
  arguments = ['--model', str(directory), '--adapter', str(root / 'adapter')]
  code = __main__.cli(['merge', *arguments, '--out', str(out)])
  assert code == 0
  return directory, str(root / 'adapter'), out, model


def test_200_greedy_tokens_of_the_base(story):
  want = theirs(reference.load_model(story[0]))
  assert ours(story[0]) == want
  assert min(len(set(ids)) for ids in want) > 20  # stories, not one word


def test_200_greedy_tokens_under_an_adapter_bound_and_merged(story):
  directory, adapter, merged, model = story
  want = theirs(model)
  assert want != theirs(reference.load_model(directory))
  assert ours(directory, adapter) == want
  assert ours(merged) == want


def test_transformers_loads_what_was_merged(story):
  directory, _, merged, model = story
  loaded = reference.load_model(merged)
  assert sum(p.numel() for p in loaded.parameters()) == sum(
    p.numel() for p in reference.load_model(directory).parameters()
  )
  ids = np.array([PROMPTS[2], PROMPTS[2][::-1]], np.int32)
  want = reference.logits(model, ids)
  np.testing.assert_allclose(
    reference.logits(loaded, ids), want, atol=1e-4, rtol=0
  )
  apply, params = load_params(merged)
  np.testing.assert_allclose(
    jax.jit(apply)(params, ids), want, atol=1e-4, rtol=0
  )
  # And PEFT's own merge has the same weights.
  theirs_merged = their_peft.PeftModel.from_pretrained(
    reference.load_model(directory), story[1]
  ).merge_and_unload()
  for (name, x), y in zip(
    theirs_merged.named_parameters(), loaded.parameters(), strict=True
  ):
    np.testing.assert_allclose(
      x.detach(), y.detach(), atol=2e-6, rtol=0, err_msg=name
    )
  tokenizer = transformers.AutoTokenizer.from_pretrained(merged)
  assert tokenizer('Once upon a time')['input_ids'] == PROMPTS[0]


def test_it_stops_where_transformers_stops(story):
  # The model directory names both ids, in generation_config.json.
  texts = ['The big red dog was', 'Lily']
  rows = list(texts_room.complete(str(story[0]), texts, room.Options(NEW)))
  tokenizer = transformers.AutoTokenizer.from_pretrained(story[0])
  prompts = tokenizer(texts)['input_ids']
  model = reference.load_model(story[0])
  want = theirs(model, prompts, eos_token_id=[1, 2])
  assert [len(ids) < NEW for ids in want] == [True, False]
  assert ours(story[0], prompts=prompts, stop_ids=(1, 2)) == want
  assert [row['ids'] for row in rows] == want
  for row, prompt, ids in zip(rows, prompts, want, strict=True):
    whole = tokenizer.decode(prompt + ids, skip_special_tokens=True)
    assert row['prompt'] + row['text'] == whole


@pytest.mark.parametrize('family', ['mistral', 'llama'])
def test_a_random_model_past_its_window(family, tmp_path):
  window = reference.WINDOW if family == 'mistral' else {}
  model = reference.make_model(3, family, **window)
  reference.save_model(model, tmp_path)
  prompts = [reference.random_ids(n, shape=(n,)).tolist() for n in (2, 9, 30)]
  want = theirs(model, prompts, 60)
  assert ours(tmp_path, prompts=prompts, new=60) == want


def test_a_merge_in_bfloat16_and_in_shards_loads_there(story, tmp_path):
  directory, adapter, merged, _ = story
  from lorax_train.formats import hf_save

  _, params = load_params(directory, None, adapter)
  out = tmp_path / 'out'
  hf_save.save_params(out, directory, params, 'bfloat16', 100_000)
  assert len(list(out.glob('model-*.safetensors'))) > 3
  loaded = transformers.AutoModelForCausalLM.from_pretrained(out, dtype='auto')
  assert loaded.dtype == torch.bfloat16
  full = reference.load_model(merged)
  for x, y in zip(loaded.parameters(), full.parameters(), strict=True):
    assert torch.equal(x, y.to(torch.bfloat16))
