"""What to adapt and how strongly: LoraSpec, and PEFT's rules to resolve it.

Names are module names as Hugging Face writes them, such as
`model.layers.3.self_attn.q_proj`. The matching rules are those of PEFT 0.21
(`check_target_module_exists`, `get_pattern_key`), which the golden table
tests/golden/peft_matching.json holds us to.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from lorax_train.lora.init import FROM_BASE, INITS

ALL_LINEAR = 'all-linear'
# What `variant` may be made of, with + between them.
VARIANTS = ('lora', 'rslora', 'dora', 'lora_fa')

# A list of names has only these characters; anything else is a regex.
_NAME_LIST = re.compile(r'[\w.]+(\s*,\s*[\w.]+)*\s*,?')
# Where PEFT reads a module's layer: `.<name>.<digits>.`
_LAYER_INDEX = re.compile(r'.*?\.[^.]*\.(\d+)\.')


@dataclasses.dataclass(frozen=True)
class LoraSpec:
  """Which weights get an adapter, of which rank and strength.

  Attributes:
    targets: names separated by commas ('q_proj, v_proj'; each matches a module
      of that name or one whose path ends in `.name`), or a regex that matches
      the whole path, or 'all-linear' (every linear but the output head).
    rank: r.
    alpha: strength; the update is multiplied by alpha / r, or by
      alpha / sqrt(r) with 'rslora' (Kalajdzievski 2023).
    dropout: rate on the adapter's input, in [0, 1).
    variant: 'lora', or one or more of these with + between: 'rslora' (see
      alpha); 'dora' (Liu et al. 2024: lengths of columns are trained apart);
      'lora_fa' (Zhang et al. 2023: A stays as it begins).
    init: how A and B begin, one of `init.INITS`.
    exclude: names or a regex, as `targets`; wins over it. '' for none.
    rank_pattern: {regex: rank}; the first that matches `(.*\\.)?(regex)$`
      wins.
    alpha_pattern: {regex: alpha}, likewise.
    layers_to_transform: layer indices to adapt, () for all. For targets given
      as names: with a regex or 'all-linear' PEFT refuses it, and so do we.
  """

  targets: str = 'q_proj,v_proj'
  rank: int = 8
  alpha: float = 16.0
  dropout: float = 0.0
  variant: str = 'lora'
  init: str = 'default'
  exclude: str = ''
  rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
  alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
  layers_to_transform: tuple[int, ...] = ()

  def __post_init__(self):
    problems = []
    if not self.targets.strip():
      problems.append('targets is empty: name modules, or all-linear')
    if not self.variants <= set(VARIANTS):
      problems.append(
        f'variant {self.variant!r} is not of {", ".join(VARIANTS)}, with +'
        ' between them'
      )
    if self.init not in INITS:
      problems.append(f'init {self.init!r} is none of {", ".join(INITS)}')
    least = min([self.alpha, *self.alpha_pattern.values()])
    if self.init in FROM_BASE and least <= 0:
      problems.append(f'init {self.init} needs an alpha above 0, not {least}')
    for where, rank in [('rank', self.rank), *self.rank_pattern.items()]:
      if type(rank) is not int or rank < 1:
        problems.append(f'{where}: a rank of {rank} is no integer above 0')
    for where, alpha in [('alpha', self.alpha), *self.alpha_pattern.items()]:
      if not math.isfinite(alpha):
        problems.append(f'{where}: an alpha of {alpha} is not finite')
    if not 0 <= self.dropout < 1:
      problems.append(f'dropout {self.dropout} is outside [0, 1)')
    if self.layers_to_transform and (
      self.targets.strip() == ALL_LINEAR or target_list(self.targets) is None
    ):
      problems.append(
        'layers_to_transform needs targets given as names: put the layers into'
        ' the regex, or list the names'
      )
    for text in (self.targets, self.exclude, *self.rank_pattern,
                 *self.alpha_pattern):  # fmt: skip
      try:
        re.compile(text)
      except re.error as error:
        problems.append(f'{text!r} is no regular expression: {error}')
    if problems:
      raise ValueError('; '.join(problems))

  @property
  def variants(self) -> set[str]:
    """What `variant` is made of."""
    return {part.strip() for part in self.variant.split('+')}


class Placement(NamedTuple):
  """The adapter of one module.

  Attributes:
    rank: r.
    scale: alpha / r, or alpha / sqrt(r).
    dropout: rate on its input.
    init: how A and B begin.
    dora: whether lengths of columns are trained apart.
    train_a: whether A is trained.
  """

  rank: int
  scale: float
  dropout: float = 0.0
  init: str = 'default'
  dora: bool = False
  train_a: bool = True


def target_list(text: str) -> list[str] | None:
  """'q_proj, v_proj' -> ['q_proj', 'v_proj']; None if `text` is a regex."""
  text = text.strip()
  if not text:
    return []
  if not _NAME_LIST.fullmatch(text):
    return None
  return [name.strip() for name in text.split(',') if name.strip()]


def resolve(
  spec: LoraSpec, names: Sequence[str], strict: bool = True
) -> dict[str, Placement]:
  """The adapter of each module that gets one, in the order of `names`.

  Args:
    spec: what to adapt.
    names: every module that could take an adapter.
    strict: refuse what has no effect. False for adapters made elsewhere:
      PEFT lets it pass, as long as something matches.

  Returns:
    {name: Placement}; never empty.

  Raises:
    ValueError: lists, at once, every target, exclusion and pattern that
      matches nothing, and the names there are.

  >>> names = ['layers.0.q_proj', 'layers.0.v_proj', 'lm_head']
  >>> resolve(LoraSpec('q_proj', rank=4, alpha=8), names)['layers.0.q_proj']
  Placement(rank=4, scale=2.0, dropout=0.0, init='default', dora=False, train_a=True)
  """
  chosen = [
    n
    for n in names
    if _targeted(spec, n)
    and not _listed(spec.exclude, n)
    and _in_layers(spec, n)
  ]
  unmatched = _unmatched(spec, names, chosen) if strict else []
  if unmatched or not chosen:
    what = ', '.join(unmatched) or f'targets {spec.targets!r} less exclusions'
    raise ValueError(f'{what} matched no module; there are: {_kinds(names)}')
  return {n: _placement(spec, n) for n in chosen}


def _targeted(spec: LoraSpec, name: str) -> bool:
  if spec.targets.strip() == ALL_LINEAR:
    return name.rpartition('.')[2] != 'lm_head'
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


def _placement(spec: LoraSpec, name: str) -> Placement:
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
  spec: LoraSpec, names: Sequence[str], chosen: Sequence[str]
) -> list[str]:
  """Everything in the spec that has no effect."""
  lost = []
  if spec.targets.strip() != ALL_LINEAR:
    for one in target_list(spec.targets) or [spec.targets]:
      if not any(_listed(one, n) for n in names):
        lost.append(f'target {one!r}')
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
