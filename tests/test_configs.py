"""Every file in configs/ and scripts/: loads, says what it promises, runs.

Reference: the number of parameters of the reference run, 27,262,976 of
7,241,732,096, from shapes alone; and two steps of each config on a model of
kilobytes, through the same path as the command line.
"""

import importlib.util
import json
import re
from pathlib import Path

import pytest

from lorax_train import config, lora, main
from lorax_train.formats import hf_config, quantised
from lorax_train.train import report, setup

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / 'configs').glob('*.py'))
# What other tests train as well waits for the slow ones.
_SLOW = ('mistral_lora', 'sst2_mezo', 'tiny_pretrain')
TRAINED = [
  pytest.param(path, marks=pytest.mark.slow) if path.stem in _SLOW else path
  for path in CONFIGS
]
REFERENCE = ROOT / 'configs' / 'mistral_lora.py'
QLORA = ROOT / 'configs' / 'mistral_qlora.py'
SCRIPTS = sorted((ROOT / 'scripts').glob('*.py'))
TINY = {
  'model.dtype': 'float32',
  'model.param_dtype': 'float32',
  'data.max_length': 64,
  'data.truncation': 'left',
  'train.steps': 2,
  'train.batch_size': 8,
  'train.warmup_steps': 0,
}

# Configs whose rows have columns of their own: (suffix, content, other keys).
_SST2 = (
  '.tsv',
  'sentence\tlabel\n' + ''.join(f'it is {i} \t{i % 2}\n' for i in range(40)),
  {'data.rows': 24, 'eval.rows': 8},
)
OWN_ROWS: dict[str, tuple[str, str, dict]] = {
  'sst2': _SST2,
  'sst2_mezo': _SST2,
  'tiny_pretrain': ('.txt', 'A story.<|endoftext|>' * 20, {}),
}

# config.json of mistralai/Mistral-7B-v0.1.
MISTRAL_7B = {
  'architectures': ['MistralForCausalLM'],
  'bos_token_id': 1,
  'eos_token_id': 2,
  'hidden_act': 'silu',
  'hidden_size': 4096,
  'initializer_range': 0.02,
  'intermediate_size': 14336,
  'max_position_embeddings': 32768,
  'model_type': 'mistral',
  'num_attention_heads': 32,
  'num_hidden_layers': 32,
  'num_key_value_heads': 8,
  'rms_norm_eps': 1e-05,
  'rope_theta': 10000.0,
  'sliding_window': 4096,
  'tie_word_embeddings': False,
  'torch_dtype': 'bfloat16',
  'transformers_version': '4.34.0.dev0',
  'use_cache': True,
  'vocab_size': 32000,
}

by_name = {'ids': lambda path: path.relative_to(ROOT).as_posix()}


def parse(path, **changes):
  overrides = [f'--config.{key}={value}' for key, value in changes.items()]
  return main.parse(['main', '--config', str(path), *overrides])


def mistral_7b(tmp_path):
  (tmp_path / 'config.json').write_text(json.dumps(MISTRAL_7B))
  return hf_config.read_config(tmp_path)


def counts(cfg, model_cfg):
  frozen, _ = setup.abstract(cfg, setup.plan_adapters(cfg, model_cfg))
  return lora.count(frozen)


@pytest.mark.parametrize('path', CONFIGS, **by_name)
def test_a_config_loads_and_names_all_that_is_required(path):
  cfg = parse(path)
  assert config.from_mapping(config.to_mapping(cfg)) == cfg
  assert cfg.run_dir == f'runs/{path.stem}'  # no two configs share one
  text = path.read_text('utf-8')
  assert f'--config configs/{path.name}' in text  # its own command


@pytest.mark.parametrize('path', CONFIGS, **by_name)
def test_a_config_fits_its_model(path, tmp_path):
  cfg = parse(path)
  trainable, base = counts(cfg, mistral_7b(tmp_path))
  if cfg.method == 'full':
    assert trainable == base
  else:
    assert 0 < trainable < base / 10


@pytest.mark.parametrize('path', TRAINED, **by_name)
def test_a_config_trains_two_steps(
  path, tmp_path, tiny_model, rows_file, capfd
):
  own = {'lora.rank': 2, 'lora.layers_to_transform': ''}
  out_dir = 'adapter'
  if parse(path).method == 'full':
    own, out_dir = {}, 'model'
  suffix, content, more = OWN_ROWS.get(path.stem, ('', '', {}))
  if content:
    rows_file = tmp_path / f'rows{suffix}'
    rows_file.write_text(content)
  overrides = [
    f'--config.{key}={value}'
    for key, value in {
      **TINY,
      **own,
      **more,
      'model.path': tiny_model,
      'data.path': rows_file,
      'run_dir': tmp_path / 'run',
    }.items()
  ]
  assert main.main(['main', '--config', str(path), *overrides]) == 0
  out, err = capfd.readouterr()
  assert err == ''
  assert re.search(r'held-out loss \d\.\d{4} -> \d\.\d{4}', out)
  lines = (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()
  losses = [v for v in map(json.loads, lines) if 'loss' in v]
  assert [v['step'] for v in losses] == [1, 2]
  norm = 'projected_grad' if parse(path).method == 'mezo' else 'grad_norm'
  assert all(0 < v['loss'] < 20 and v[norm] > 0 for v in losses)
  assert any((tmp_path / 'run' / out_dir).glob('*.safetensors'))


def test_the_reference_run_trains_what_it_promises(tmp_path):
  cfg, model_cfg = parse(REFERENCE), mistral_7b(tmp_path)
  assert counts(cfg, model_cfg) == (27_262_976, 7_241_732_096)
  assert '27,262,976 of 7,241,732,096' in REFERENCE.read_text('utf-8')
  adapters = setup.plan_adapters(cfg, model_cfg)
  frozen, _ = setup.abstract(cfg, adapters)
  targets = report.targets(frozen, adapters.names)
  assert targets == 'q_proj x 32 (r 64), v_proj x 32 (r 64)'


def test_the_qlora_run_stores_what_it_promises(tmp_path, one_device):
  cfg, model_cfg = parse(QLORA), mistral_7b(tmp_path)
  adapters = setup.plan_adapters(cfg, model_cfg)
  frozen, _ = setup.abstract(cfg, adapters)
  assert lora.count(frozen) == (27_262_976, 7_241_732_096)
  # Linears two to a byte, embedding and head, norms, adapters.
  halves = 6_979_321_856 // 2
  kept = 2 * 32_000 * 4_096 + 65 * 4_096
  assert halves + kept + 27_262_976 == 3_779_334_144
  # Codes of absmax, one of 64; of these the second level; and each an offset.
  scales = 6_979_321_856 // 64 + 4 * 6_979_321_856 // 64 // 256 + 4 * 7 * 32
  n_bytes = halves + scales + 2 * kept
  assert quantised.stored(frozen) == (halves + kept, n_bytes)
  banner = report.banner(
    cfg, frozen, adapters.all_names, one_device, {}, tmp_path
  )
  assert 'trainable  27,262,976 of 7,241,732,096 (0.3765 %)' in banner
  assert 'stored     3,779,334,144 elements, 4-bit weights two to a' in banner
  assert f'; {(n_bytes + 4 * 27_262_976) / 1e9:.2f} GB with' in banner
  text = ' '.join(QLORA.read_text('utf-8').split())
  assert '27,262,976 of 7,241,732,096 parameters' in text
  assert 'stores 3,779,334,144 elements' in text
  same = parse(REFERENCE)
  assert (cfg.lora, cfg.data, cfg.train) == (same.lora, same.data, same.train)


def test_the_reference_run_is_the_one_of_the_contract():
  cfg = parse(REFERENCE)
  assert cfg.model.path == 'mistralai/Mistral-7B-v0.1'
  assert (cfg.lora.rank, cfg.lora.alpha) == (64, 16.0)
  assert (cfg.lora.targets, cfg.lora.variant) == ('q_proj,v_proj', 'lora')
  assert cfg.data.path == 'llm-wizard/alpaca-gpt4-data'
  assert cfg.data.template == 'uno_reverse'


@pytest.mark.parametrize(
  ('changes', 'trainable'),
  [
    # facts.md, section 5
    ({'lora.rank': 8}, 3_407_872),
    ({'lora.rank': 16, 'lora.targets': 'all-linear'}, 41_943_040),
    ({'lora.targets': 'all-linear'}, 167_772_160),
    ({'lora.targets': '.*self_attn.(q|v)_proj'}, 27_262_976),
    ({'lora.layers_to_transform': '0,31'}, 27_262_976 // 16),
    ({'lora.rank_pattern': 'v_proj=32'}, 32 * (64 * 8192 + 32 * 5120)),
  ],
)
def test_overrides_change_what_is_trained(changes, trainable, tmp_path):
  got = counts(parse(REFERENCE, **changes), mistral_7b(tmp_path))
  assert got == (trainable, 7_241_732_096)


def test_a_mixture_is_given_on_the_command_line(tmp_path):
  text = (
    "({'path': 'a, b.json', 'weight': 7.0, 'template': '{x}{|}'},{'path': 'c'})"
  )
  cfg = parse(REFERENCE, **{'data.path': '', 'data.mixture': text})
  a, b = config.Source('a, b.json', 7.0, '{x}{|}'), config.Source('c', 1.0, '')
  assert cfg.data.mixture == (a, b)
  # In a config file, and one weight of it on the command line.
  own = tmp_path / 'own.py'
  own.write_text(
    REFERENCE.read_text('utf-8').replace(
      "cfg.data.path = 'llm-wizard/alpaca-gpt4-data'",
      f'cfg.data.mixture = {text}',
    )
  )
  assert parse(own).data.mixture == (a, b)
  changed = parse(own, **{'data.mixture[0].weight': 0.5}).data.mixture
  assert changed == (config.Source('a, b.json', 0.5, '{x}{|}'), b)


def commands(path):
  """The command lines in a file's docstring, continued lines joined."""
  text = path.read_text('utf-8').split('"""')[1].replace('\\\n', ' ')
  return re.findall(
    r'^\s+python -m lorax_train\.main (.*)$', text, re.MULTILINE
  )


@pytest.mark.parametrize('path', CONFIGS, **by_name)
def test_the_commands_in_a_docstring_parse(path, monkeypatch):
  monkeypatch.chdir(ROOT)
  found = commands(path)
  assert found
  for command in found:
    cfg = main.parse(['main', *command.split()])
    for flag in re.findall(r'--config\.(\S+)', command):
      key, _, value = flag.partition('=')
      section, _, name = key.rpartition('.')
      assert str(getattr(getattr(cfg, section), name)) == value


def test_the_docstring_of_the_reference_run_shows_the_way_without_the_hub():
  joined = ' '.join(commands(REFERENCE))
  assert '--config.model.path=' in joined
  assert '--config.data.path=' in joined


@pytest.mark.parametrize('path', SCRIPTS, **by_name)
def test_a_script_can_be_imported(path, monkeypatch):
  text = path.read_text('utf-8')
  imported = set(re.findall(r'^(?:import|from) (\w+)', text, re.MULTILINE))
  for package in sorted(imported & {'peft', 'torch', 'transformers'}):
    pytest.importorskip(package)
  monkeypatch.syspath_prepend(str(path.parent))
  spec = importlib.util.spec_from_file_location(f'scripts_{path.stem}', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)  # and does nothing until it is told to
  assert module.__doc__
