"""A plan as facts, and the facts in words."""

from typing import Any

from lorax_train import lora
from lorax_train.hardware import GIB
from lorax_train.models import params as params_lib
from lorax_train.plan import hlo, shapes
from lorax_train.plan.compiled import Compiled
from lorax_train.plan.estimate import (
  ERROR,
  matmul_parameters,
  needed_flops,
  seconds,
)
from lorax_train.plan.verdict import Case, Change
from lorax_train.train import setup

_WHAT = {
  'compute': 'its products at the peak of its matrix units',
  'memory': 'reading and writing its memory',
  'links': 'receiving from other chips',
}


def facts(
  case: Case,
  change: Change | None,
  compiled: Compiled | None = None,
  not_compiled: str = '',
) -> dict[str, Any]:
  """All that is known of a run, as JSON takes it.

  Args:
    case: the run by the formula.
    change: what would make it fit, where it does not.
    compiled: what the compiler says.
    not_compiled: why it was not asked.
  """
  found, topology = case.found, case.topology
  whole, _ = setup.abstract(case.cfg, case.adapters)
  n = matmul_parameters(case.adapters)
  devices = topology.devices
  a_token = found.flops * devices / found.tokens
  out: dict[str, Any] = {
    'fits': fits(case, compiled),
    'by': 'compiler' if compiled else 'formula',
    'not_compiled': not_compiled,
    'topology': {
      'name': topology.name,
      'chips': topology.chips,
      'devices': devices,
      'mesh': {n: int(size) for n, size in case.mesh.shape.items()},
      'limit': topology.limit,
    },
    'model': {
      'parameters': params_lib.total(case.adapters.model_cfg),
      'matmul_parameters': n,
      'trained': lora.count(whole)[0],
    },
    'step': {
      'grad_accum': case.cfg.train.grad_accum,
      'batch_size': case.cfg.train.batch_size,
      'length': case.length,
      'choices': shapes.choices_of(case.cfg),
      'tokens': found.tokens,
      'remat': case.cfg.model.remat,
    },
    'bytes': {**found.given, **found.made, 'peak': found.peak},
    'flops': {
      'step': found.flops * devices,
      'token': a_token,
      'token_over_n': a_token / n,
      'needed': dict(needed_flops(case.adapters, whole, case.length)),
    },
    'collectives': found.collectives,
    'seconds': seconds(found, topology),
    'tokens_per_second_chip': None,
    'change': change.words if change else None,
  }
  if out['seconds']:
    least = max(out['seconds'].values())
    out['tokens_per_second_chip'] = found.tokens / least / topology.chips
  if compiled:
    out['compiled'] = _of_compiler(compiled)
  return out


def fits(case: Case, compiled: Compiled | None) -> str:
  """'yes', 'no' or 'close': within what the formula may be wrong by."""
  if compiled is not None:
    return 'yes' if compiled.fits else 'no'
  if not case.topology.limit:
    return 'unknown'
  if case.share > 1 + ERROR:
    return 'no'
  return 'yes' if case.share < 1 - ERROR else 'close'


def _of_compiler(compiled: Compiled) -> dict[str, Any]:
  by_kind = {}
  for kind in hlo.KINDS:
    own = [c for c in compiled.collectives if c.kind == kind]
    if own:
      by_kind[kind] = {
        'in_program': len(own),
        'a_step': sum(c.runs for c in own),
        'bytes': sum(c.bytes * c.runs for c in own),
        'largest': max(c.bytes for c in own),
      }
  shapes = compiled.weight_gradients
  return {
    'peak': compiled.peak,
    'refusal': compiled.refusal,
    'collectives': by_kind,
    'kernels': compiled.kernels,
    'weight_gradients': None if shapes is None else sorted(shapes),
  }


def text(of: dict[str, Any]) -> str:
  """Facts in words, for those who have not read this code."""
  lines = [_model(of), _step(of), _devices(of), _verdict(of)]
  if of['change']:
    lines.append(_row('what fits', of['change']))
  lines += _memory(of)
  lines += _compute(of)
  lines += _links(of)
  lines += _speed(of)
  if 'compiled' in of:
    lines += _compiled(of['compiled'])
  return '\n'.join(lines)


def _row(name: str, words: str) -> str:
  return f'{name:<11}{words}'


def _gib(n: float) -> str:
  return f'{n / GIB:,.2f}'


def _model(of: dict[str, Any]) -> str:
  m = of['model']
  return _row(
    'model',
    f'{m["parameters"]:,} parameters, of which N ='
    f' {m["matmul_parameters"]:,} are in products;'
    f' {m["trained"]:,} are trained',
  )


def _step(of: dict[str, Any]) -> str:
  s = of['step']
  each = f'{s["choices"]} x ' if s['choices'] else ''
  return _row(
    'step',
    f'{s["grad_accum"]:,} x {s["batch_size"]:,} rows of {each}{s["length"]:,} tokens:'
    f' {s["tokens"]:,}, padding included; remat {s["remat"]}',
  )


def _devices(of: dict[str, Any]) -> str:
  t = of['topology']
  mesh = ', '.join(f'{name} {size}' for name, size in t['mesh'].items())
  ways = f'{_several(t["chips"], "chip")}, {_several(t["devices"], "device")}'
  return _row('devices', f'{t["name"]}: {ways}; mesh {mesh}')


def _several(n: int, what: str) -> str:
  return f'{n} {what}' if n == 1 else f'{n:,} {what}s'


def _verdict(of: dict[str, Any]) -> str:
  limit, peak = of['topology']['limit'], of['bytes']['peak']
  there = f' of {_gib(limit)}' if limit else ''
  if of['by'] == 'compiler':
    own = of['compiled']
    if own['refusal']:
      return _row('verdict', f'does not fit: {own["refusal"]}')
    verb = 'fits' if of['fits'] == 'yes' else 'does not fit'
    words = f'{verb}: {_gib(own["peak"])}{there} GiB a device, by the compiler'
    return _row('verdict', f'{words} (the formula says {_gib(peak)})')
  verb = {
    'yes': 'fits',
    'no': 'does not fit',
    'close': 'too close to call',
    'unknown': 'nobody knows how much there is',
  }[of['fits']]
  why = f'; not compiled: {of["not_compiled"]}' if of['not_compiled'] else ''
  return _row(
    'verdict',
    f'{verb}: {_gib(peak)}{there} GiB a device, by a formula that may be'
    f' {100 * ERROR:.0f} % off{why}',
  )


def _memory(of: dict[str, Any]) -> list[str]:
  lines = [_row('memory', 'GiB a device, where a step takes the most')]
  for kind, n in of['bytes'].items():
    lines.append(f'{"":11}{_gib(n):>9}  {kind}')
  return lines


def _compute(of: dict[str, Any]) -> list[str]:
  f, n = of['flops'], of['model']['matmul_parameters']
  needed = ' + '.join(
    f'{value / n:.2f} N {kind}' if kind != '4 N' else '4 N'
    for kind, value in f['needed'].items()
  )
  return [
    _row(
      'compute',
      f'{f["token"] / 1e9:,.1f} GFLOP a token = {f["token_over_n"]:.2f} N,'
      f' {f["step"] / 1e12:,.0f} TFLOP a step',
    ),
    f'{"":11}needed are {needed}; the rest is computed twice (remat), or'
    ' masked',
  ]


def _links(of: dict[str, Any]) -> list[str]:
  parts = [f'{k} {n / 1e9:,.2f}' for k, n in of['collectives'].items() if n]
  if not parts:
    return []
  return [_row('links', f'GB a device receives in a step: {", ".join(parts)}')]


def _speed(of: dict[str, Any]) -> list[str]:
  found = of['seconds']
  if not found:
    return []
  limit = max(found, key=lambda k: found[k])
  rate, chips = of['tokens_per_second_chip'], of['topology']['chips']
  times = ', '.join(f'{k} {v:.3g} s' for k, v in found.items() if v)
  return [
    _row(
      'at best',
      f'{rate:,.0f} tokens a second and chip, {rate * chips:,.0f} in all:'
      f' limited by {_WHAT[limit]}',
    ),
    f'{"":11}a step cannot take less than the longest of {times}',
  ]


def _compiled(own: dict[str, Any]) -> list[str]:
  lines: list[str] = []
  for kind, c in own['collectives'].items():
    lines.append(
      _row(
        'compiled' if not lines else '',
        f'{kind}: {c["in_program"]} in the program, {c["a_step"]} a step,'
        f' {c["bytes"] / 1e9:,.2f} GB of results, the largest'
        f' {c["largest"] / 1e6:,.2f} MB',
      )
    )
  kernels = ', '.join(f'{n} x {k}' for k, n in own['kernels'].items())
  lines.append(_row('kernels', kernels or 'none but those that XLA makes'))
  shapes = own['weight_gradients']
  words = {
    None: 'not checked: so many rows as a weight has',
    True: 'none: no product has the shape of a frozen weight',
    False: f'products of these shapes: {shapes}',
  }[None if shapes is None else not shapes]
  lines.append(_row('dW', words))
  return lines
