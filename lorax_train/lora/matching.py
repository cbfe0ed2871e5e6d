"""PEFT's rules for which modules a LoraSpec means.

Names are module names as Hugging Face writes them, such as
`model.layers.3.self_attn.q_proj`. The rules are those of PEFT 0.21
(`check_target_module_exists`, `get_pattern_key`, `_set_trainable`), which the
golden table tests/golden/peft_matching.json holds us to.
"""

import math
import re
from collections.abc import Mapping, Sequence

from lorax_train.lora.spec import (
  ALL_LINEAR,
  LoraSpec,
  Placement,
  Whole,
  target_list,
)

# What 'all-linear' passes over, by the last part of the name.
_NOT_LINEAR = ('embed_tokens', 'lm_head')
# Where PEFT reads a module's layer: `.<name>.<digits>.`
_LAYER_INDEX = re.compile(r'.*?\.[^.]*\.(\d+)\.')


def resolve(
  spec: LoraSpec,
  names: Sequence[str],
  strict: bool = True,
  others: Sequence[str] = (),
) -> dict[str, Placement | Whole]:
  """What is trained of each module of which something is.

  Args:
    spec: what to adapt.
    names: every module that could take an adapter.
    strict: refuse what has no effect. False for adapters made elsewhere:
      PEFT lets it pass, as long as something matches.
    others: modules that can take none, but may be trained whole.

  Returns:
    {name: Placement or Whole} in the order of `names` and `others`; never
    without a Placement.

  Raises:
    ValueError: lists, at once, every name and pattern that matches
      nothing, and the names there are.

  >>> names = ['layers.0.q_proj', 'layers.0.v_proj', 'lm_head']
  >>> resolve(LoraSpec('q_proj', rank=4, alpha=8), names)['layers.0.q_proj']
  Placement(rank=4, scale=2.0, dropout=0.0, init='default', dora=False, train_a=True)
  >>> resolve(LoraSpec('q_proj', modules_to_save='head'), names)['lm_head']
  Whole(rows=None)
  """
  chosen = [
    n
    for n in names
    if _targeted(spec, n)
    and not _listed(spec.exclude, n)
    and not _saved_target(spec, n)
    and _in_layers(spec, n)
  ]
  whole = _whole(spec, [*names, *others])
  unmatched = _unmatched(spec, names, chosen, others) if strict else []
  if unmatched or not chosen:
    what = ', '.join(unmatched) or f'targets {spec.targets!r} less exclusions'
    raise ValueError(
      f'{what} matched no module; there are: {_kinds([*names, *others])}'
    )
  both = [n for n in chosen if n in whole]
  if both:
    raise ValueError(
      f'{_kinds(both)}: both an adapter and trained whole or in part; leave it'
      ' out of targets, modules_to_save or trainable_token_indices'
    )
  placed = {n: place(spec, n) for n in chosen}
  return {
    n: whole.get(n) or placed[n]
    for n in [*names, *others]
    if n in whole or n in placed
  }


def flat(names: Mapping[str, Sequence[str]]) -> list[str]:
  """The module names of all leaves, in order, of {path: module names}."""
  return [name for of_leaf in names.values() for name in of_leaf]


def adapted(
  placed: Mapping[str, Placement | Whole],
) -> dict[str, Placement]:
  """The modules that have an adapter."""
  return {n: p for n, p in placed.items() if isinstance(p, Placement)}


def _whole(spec: LoraSpec, names: Sequence[str]) -> dict[str, Whole]:
  """The modules that are trained themselves."""
  saved = target_list(spec.modules_to_save) or []
  whole = {n: Whole() for n in names if _ends(n, saved)}
  for table, tokens in spec.trainable_token_indices.items():
    for name in names:
      if _ends(name, [table]):
        if name in whole:
          raise ValueError(
            f'{name}: trained by more than one entry of modules_to_save and'
            ' trainable_token_indices'
          )
        whole[name] = Whole(tuple(sorted(tokens)))
  return whole


def _ends(name: str, wanted: Sequence[str]) -> bool:
  """PEFT's rule for modules that are trained whole."""
  return any(name.endswith(w) for w in wanted)


def _saved_target(spec: LoraSpec, name: str) -> bool:
  """PEFT's rule for targets that modules_to_save takes away."""
  return any(
    re.match(rf'(^|.*\.){m}($|\..*)', name)
    for m in target_list(spec.modules_to_save) or ()
  )


def _targeted(spec: LoraSpec, name: str) -> bool:
  if spec.targets.strip() == ALL_LINEAR:
    return name.rpartition('.')[2] not in _NOT_LINEAR
  return _listed(spec.targets, name)


def _listed(text: str, name: str) -> bool:
  """PEFT's rule: a list matches whole names or ends, a regex all of it."""
  wanted = target_list(text)
  if wanted is None:
    return re.fullmatch(text, name) is not None
  return any(name == w or name.endswith('.' + w) for w in wanted)


def _in_layers(spec: LoraSpec, name: str) -> bool:
  # PEFT doesn't ask for the layer of a module that is named in full.
  if not spec.layers_to_transform or name in (target_list(spec.targets) or ()):
    return True
  return _layer(name) in spec.layers_to_transform


def _layer(name: str) -> int | None:
  found = _LAYER_INDEX.match(name)
  return int(found[1]) if found else None


def _first(pattern: Mapping[str, float], name: str) -> str | None:
  """The first key whose regex ends the name at a dot, as PEFT has it."""
  for key in pattern:
    if re.match(rf'(.*\.)?({key})$', name):
      return key
  return None


def place(spec: LoraSpec, name: str) -> Placement:
  """The adapter that a module of that name gets, if it is to have one."""
  rank_key = _first(spec.rank_pattern, name)
  alpha_key = _first(spec.alpha_pattern, name)
  rank = spec.rank if rank_key is None else spec.rank_pattern[rank_key]
  alpha = spec.alpha if alpha_key is None else spec.alpha_pattern[alpha_key]
  root = math.sqrt(rank) if 'rslora' in spec.variants else rank
  return Placement(
    rank,
    alpha / root,
    spec.dropout,
    spec.init,
    'dora' in spec.variants,
    'lora_fa' not in spec.variants,
  )


def _unmatched(
  spec: LoraSpec,
  names: Sequence[str],
  chosen: Sequence[str],
  others: Sequence[str],
) -> list[str]:
  """Everything in the spec that has no effect."""
  lost = []
  if spec.targets.strip() != ALL_LINEAR:
    for one in target_list(spec.targets) or [spec.targets]:
      if not any(_listed(one, n) for n in names):
        hint = ' (which modules_to_save could train)'
        known = any(_listed(one, n) for n in others)
        lost.append(f'target {one!r}' + hint * known)
  every = [*names, *others]
  for field, wanted in {
    'modules_to_save': target_list(spec.modules_to_save) or [],
    'trainable_token_indices': [*spec.trainable_token_indices],
  }.items():
    for one in wanted:
      if not any(_ends(n, [one]) for n in every):
        lost.append(f'{field} {one!r}')
  if spec.exclude.strip():
    for one in target_list(spec.exclude) or [spec.exclude]:
      if not any(_listed(one, n) for n in names):
        lost.append(f'exclude {one!r}')
  layers = {_layer(n) for n in names if _targeted(spec, n)}
  lost += [
    f'layer {i} of layers_to_transform'
    for i in spec.layers_to_transform
    if i not in layers
  ]
  if lost:
    return lost
  for field in ('rank_pattern', 'alpha_pattern'):
    for key in getattr(spec, field):
      if not any(_first({key: 0}, n) for n in chosen):
        lost.append(f'{field} {key!r}')
  return lost


def _kinds(names: Sequence[str]) -> str:
  """The names a user would type: the last parts, in order, each once."""
  return ', '.join(dict.fromkeys(n.rpartition('.')[2] for n in names))
