"""What to adapt and how strongly: LoraSpec, and what it comes to for a module."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import NamedTuple

from lorax_train.lora.init import FROM_BASE, FROM_LOST, INITS

ALL_LINEAR = 'all-linear'
# What `variant` may be made of, with + between them.
VARIANTS = ('lora', 'rslora', 'dora', 'lora_fa')

# A list of names has only these characters; anything else is a regex.
_NAME_LIST = re.compile(r'[\w.]+(\s*,\s*[\w.]+)*\s*,?')


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
    modules_to_save: names separated by commas of modules that are trained
      whole, without an adapter: all whose path ends so ('norm' takes
      input_layernorm as well). Wins over targets.
    trainable_token_indices: {name of an embedding: tokens whose rows of it are
      trained}, the rest of it frozen.
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
  modules_to_save: str = ''
  trainable_token_indices: Mapping[str, tuple[int, ...]] = dataclasses.field(
    default_factory=dict
  )

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
    if self.init in (*FROM_BASE, *FROM_LOST) and least <= 0:
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
    if self.modules_to_save and not target_list(self.modules_to_save):
      problems.append(
        f'modules_to_save {self.modules_to_save!r} is no list of names'
      )
    for name, tokens in self.trainable_token_indices.items():
      wrong = [t for t in tokens if type(t) is not int or t < 0]
      if wrong or not tokens or len(set(tokens)) < len(tokens):
        problems.append(
          f'trainable_token_indices of {name}: {tokens} is no list of different'
          ' token ids'
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


class Whole(NamedTuple):
  """One module is trained itself, without an adapter.

  Attributes:
    rows: which rows of it, in ascending order; None for all of it.
  """

  rows: tuple[int, ...] | None = None


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
