"""What a model or an adapter directory is, as facts and in words.

Of a model only the headers of its files are read. An adapter needs no model.
"""

import dataclasses
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lorax_train import lora
from lorax_train.errors import ModelError
from lorax_train.formats import hf_config, peft, peft_tensors, safetensors
from lorax_train.formats.jsonfile import read_object
from lorax_train.formats.safetensors import TensorRef, few
from lorax_train.infer import spectrum
from lorax_train.models import params as params_lib

Facts = dict[str, Any]

# Columns of the tables of updates: (heading, key).
_COLUMNS = (
  ('largest', 'largest'),
  ('smallest', 'smallest'),
  ('norm', 'norm'),
  ('90 %', 'rank_90'),
  ('99 %', 'rank_99'),
  ('entropy', 'effective_rank'),
)
_LEGEND = (
  '90 %, 99 %: singular values that hold so much of the squared norm\n'
  'entropy: effective rank, exp of the entropy of the singular values'
)


def model_facts(directory: Path) -> Facts:
  """Architecture, parameters by kind, sizes and fingerprint of a model.

  Raises:
    ModelError: what is wrong with config.json or the files' headers.
  """
  cfg = hf_config.read_config(directory)
  refs = safetensors.open_dir(directory)
  kinds: dict[tuple, int] = {}
  for name, ref in refs.items():
    pattern = re.sub(r'\.\d+\.', '.{}.', name)
    kind = pattern, ref.shape, str(ref.dtype)
    kinds[kind] = kinds.get(kind, 0) + 1
  order = {p.hf: i for i, p in enumerate(params_lib.MISTRAL_PARAMS)}
  kind_of = read_object(directory / 'config.json')['model_type']
  return {
    'kind': 'model',
    'path': str(directory),
    'architecture': {'model_type': kind_of, **dataclasses.asdict(cfg)},
    'tensors': [
      {'name': name, 'count': n, 'shape': list(shape), 'dtype': dtype}
      for (name, shape, dtype), n in sorted(
        kinds.items(), key=lambda item: order.get(item[0][0], len(order))
      )
    ],
    **_sizes(refs),
    'parameters_by_config': params_lib.total(cfg),
    'files': len({ref.file for ref in refs.values()}),
    'fingerprint': safetensors.fingerprint(refs),
  }


def model_text(facts: Facts) -> str:
  """`model_facts` in words."""
  arch = facts['architecture']
  rope, window = arch['rope_scaling'], arch['window']
  stretched = f', {rope["kind"]} x {rope["factor"]:g}' if rope else ''
  by_config, stored = facts['parameters_by_config'], facts['parameters']
  differs = '' if by_config == stored else f'; config.json makes {by_config:,}'
  quant = arch['quant']
  if quant['stored']:  # what scales the codes is counted as well
    differs = f'; {by_config:,} parameters, linears in {quant["kind"]}'
  return '\n'.join(
    (
      aligned(
        {
          'model': facts['path'],
          'type': f'{arch["model_type"]}, {arch["layers"]} layers',
          'sizes': (
            f'hidden {arch["hidden"]}, mlp {arch["mlp"]}, vocab'
            f' {arch["vocab"]}, embeddings'
            f' {"tied" if arch["tied"] else "not tied"}'
          ),
          'attention': (
            f'{arch["heads"]} heads of {arch["head_dim"]}, {arch["kv_heads"]}'
            f' for keys and values, window {window or "none"}'
          ),
          'positions': f'rope, theta {arch["rope_theta"]:g}{stretched}',
          'parameters': (
            f'{stored:,} in {facts["bytes"]:,} bytes,'
            f' {facts["files"]} file{"s" * (facts["files"] > 1)}{differs}'
          ),
          'fingerprint': facts['fingerprint'],
        }
      ),
      '',
      table(
        ('tensor', 'count', 'shape', 'dtype'),
        [
          (t['name'], t['count'], t['shape'], t['dtype'])
          for t in facts['tensors']
        ],
      ),
    )
  )


def adapter_facts(directory: Path) -> Facts:
  """Settings, tensors and the singular values of every update of an adapter.

  Raises:
    ModelError: see `peft.load_adapter`, or factors and settings that don't
      belong to each other.
  """
  loaded = peft.on_tied(peft.load_adapter(directory))
  refs = safetensors.open_file(directory / peft_tensors.WEIGHTS_FILE)
  names = sorted(loaded.factors, key=_natural)
  placed = lora.adapted(peft.placement(loaded, {'': tuple(names)}))
  stray = [name for name in names if name not in placed]
  if stray:
    raise ModelError(
      f'{directory}: factors of modules that are not targets: {few(stray)}'
    )
  modules = []
  for name in names:
    a, b = loaded.factors[name]
    values = spectrum.singular_values(a, b, placed[name].scale)
    if not np.isfinite(values).all():
      raise ModelError(
        f'{directory}: {name}: its update, scaled by {placed[name].scale:g}, is'
        ' not finite'
      )
    modules.append(
      {
        'name': name,
        'rank': placed[name].rank,
        'scale': placed[name].scale,
        **{half: _tensor(refs, name, half) for half in ('A', 'B')},
        **spectrum.summary(values),
        'singular_values': values.tolist(),
      }
    )
  # Not what PEFT writes twice, of a base that is tied, nor the base's own.
  twice = loaded.tied and peft_tensors.HEAD not in names
  own = {
    key: ref
    for key, ref in refs.items()
    if not key.endswith(peft_tensors.CARRIED)
    and not (twice and f'.{peft_tensors.HEAD}.' in key)
  }
  spec = loaded.spec
  return {
    'kind': 'adapter',
    'path': str(directory),
    'base': loaded.base,
    'spec': dataclasses.asdict(spec),
    **_sizes(own),
    'trained': {
      name: list(x.shape) for name, x in sorted(loaded.trained.items())
    },
    'carried': sorted(loaded.carried),
    'fingerprint': safetensors.fingerprint(refs),
    'kinds': _medians(modules),
    'modules': modules,
  }


def adapter_text(facts: Facts) -> str:
  """`adapter_facts` in words."""
  spec, modules = facts['spec'], facts['modules']
  lines = {
    'adapter': facts['path'],
    'base': facts['base'] or 'not said',
    'settings': (
      f'{spec["variant"]}, rank {spec["rank"]}, alpha {spec["alpha"]:g},'
      f' dropout {spec["dropout"]:g}'
    ),
    'targets': f'{spec["targets"]}: {len(modules)} modules matched',
    'trainable': f'{facts["parameters"]:,} in {facts["bytes"]:,} bytes',
    'fingerprint': facts['fingerprint'],
  }
  for key, label in (
    ('exclude', 'excluded'),
    ('rank_pattern', 'ranks'),
    ('alpha_pattern', 'alphas'),
    ('layers_to_transform', 'layers'),
    ('modules_to_save', 'whole'),
    ('trainable_token_indices', 'rows of'),
  ):
    value = spec[key]
    if key == 'trainable_token_indices':
      value = ', '.join(f'{k}: {few([*map(str, v)])}' for k, v in value.items())
    elif isinstance(value, dict):
      value = ', '.join(f'{k}={v:g}' for k, v in value.items())
    if value:
      lines[label] = str(value)
  if facts['carried']:
    lines['carried'] = f'base weights of {few(facts["carried"])}'
  kinds: dict[tuple, int] = {}
  for m in modules:
    kind = _last(m['name']), m['rank'], f'{m["scale"]:g}', m['A'], m['B']
    kinds[kind] = kinds.get(kind, 0) + 1
  headings = [heading for heading, _ in _COLUMNS]
  return '\n'.join(
    (
      aligned(lines),
      '',
      table(
        ('module', 'count', 'rank', 'scale', 'A', 'B'),
        [(kind[0], n, *kind[1:]) for kind, n in kinds.items()],
      ),
      '\nsingular values of the update s B A, medians over the modules:',
      table(
        ('module', 'count', *headings),
        [(k['name'], k['count'], *_cells(k)) for k in facts['kinds']],
      ),
      '\nof each module:',
      table(
        ('module', 'rank', *headings),
        [
          (m['name'].removeprefix('model.'), m['rank'], *_cells(m))
          for m in modules
        ],
      ),
      _LEGEND,
    )
  )


def aligned(lines: Mapping[str, str]) -> str:
  """A line a key, the values below each other."""
  return '\n'.join(f'{key:<11} {value}' for key, value in lines.items())


def table(headings: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
  """Rows of cells below their headings: words to the left, numbers right."""
  cells = [[str(c) for c in row] for row in (headings, *rows)]
  widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
  left = [not _is_number(cell) for cell in cells[-1]]
  return '\n'.join(
    '  '.join(
      cell.ljust(width) if to_left else cell.rjust(width)
      for cell, width, to_left in zip(row, widths, left, strict=True)
    ).rstrip()
    for row in cells
  )


def _is_number(cell: str) -> bool:
  return bool(re.fullmatch(r'[-+.,e\d]+', cell))


def _cells(facts: Facts) -> list[str]:
  """The numbers of a row, three digits each."""
  return [f'{facts[key]:.3g}' for _, key in _COLUMNS]


def _medians(modules: Sequence[Facts]) -> list[Facts]:
  """{'name', 'count', medians} of each kind of module, in order."""
  kinds: dict[str, list[Facts]] = {}
  for m in modules:
    kinds.setdefault(_last(m['name']), []).append(m)
  return [
    {
      'name': name,
      'count': len(of),
      **{key: statistics.median(m[key] for m in of) for _, key in _COLUMNS},
    }
    for name, of in kinds.items()
  ]


def _tensor(refs: Mapping[str, TensorRef], name: str, half: str) -> str:
  """'float32[4, 64]': as stored."""
  keys = [peft_tensors.factor_key(name, half, e) for e in (False, True)]
  ref = next(refs[key] for key in keys if key in refs)
  return f'{ref.dtype}{list(ref.shape)}'


def _sizes(refs: Mapping[str, TensorRef]) -> dict[str, int]:
  return {
    'parameters': sum(math.prod(ref.shape) for ref in refs.values()),
    'bytes': sum(ref.nbytes for ref in refs.values()),
  }


def _natural(name: str) -> list[Any]:
  """Sorts layer 10 behind layer 9; every second part is a number."""
  return [int(p) if p.isdecimal() else p for p in re.split(r'(\d+)', name)]


def _last(name: str) -> str:
  return name.rpartition('.')[2]
