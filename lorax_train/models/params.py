"""What a decoder is made of: its sizes, and one row for each parameter.

Everything about a parameter stands in its row: where it lives in our tree,
its logical axes (which give shape and sharding), and its Hugging Face name.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from lorax_train.quant import int8, nf4


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """How rotary frequencies are stretched past the trained length.

  Attributes:
    kind: 'linear' (all by `factor`) or 'llama3' (Llama 3.1: long wavelengths
      by `factor`, short ones kept, in between interpolated).
    factor: how many times longer.
    low_freq_factor: llama3: wavelengths above original / low are stretched.
    high_freq_factor: llama3: wavelengths below original / high are kept.
    original_max_positions: llama3: length of the original training, tokens.
  """

  kind: str
  factor: float
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  original_max_positions: int = 8192


@dataclasses.dataclass(frozen=True)
class Quant:
  """How the linears of the layers are stored; see `lorax_train.quant`.

  Attributes:
    kind: 'none', 'nf4' or 'int8'.
    double: of nf4, whether the absmax of its blocks is quantised in turn.
    stored: whether the files hold them so, and nobody has the numbers that
      they were made of.
    kept: paths of the linears that are not quantised.
  """

  kind: str = 'none'
  double: bool = True
  stored: bool = False
  kept: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
  """Sizes and constants of a Mistral or Llama decoder.

  Attributes:
    vocab: V, rows of the embedding.
    hidden: D.
    layers: L.
    heads: N, query heads.
    kv_heads: K, key and value heads; divides N.
    head_dim: H; N * H may differ from D.
    mlp: F, inner width of the gated MLP.
    norm_eps: epsilon of RMSNorm.
    rope_theta: base of the rotary frequencies.
    rope_scaling: None for plain RoPE.
    window: a query sees itself and the window - 1 tokens before; None: all.
    tied: the output head is the embedding, transposed.
    init_std: standard deviation of random initial weights.
    quant: how the linears of the layers are stored.
  """

  vocab: int
  hidden: int
  layers: int
  heads: int
  kv_heads: int
  head_dim: int
  mlp: int
  norm_eps: float = 1e-5
  rope_theta: float = 10000.0
  rope_scaling: RopeScaling | None = None
  window: int | None = None
  tied: bool = False
  init_std: float = 0.02
  quant: Quant = Quant()


class Param(NamedTuple):
  """One parameter.

  Attributes:
    path: place in our tree, 'layers/self_attn/q_proj'.
    axes: logical axes in our order; 'layers' in front for a stack.
    hf: Hugging Face name, `{}` standing for the layer index.
    linear: Hugging Face stores it (out, in), we [in, out].
  """

  path: str
  axes: tuple[str, ...]
  hf: str
  linear: bool = False

  @property
  def stacked(self) -> bool:
    """One array for all layers."""
    return self.axes[0] == 'layers'


def _layer(name: str, *axes: str) -> Param:
  return Param(
    f'layers/{name.replace(".", "/")}',
    ('layers', *axes),
    f'model.layers.{{}}.{name}.weight',
    linear=len(axes) == 2,
  )


MISTRAL_PARAMS = (
  Param('embed_tokens', ('vocab', 'embed'), 'model.embed_tokens.weight'),
  _layer('input_layernorm', 'norm'),
  _layer('self_attn.q_proj', 'embed', 'heads'),
  _layer('self_attn.k_proj', 'embed', 'kv_heads'),
  _layer('self_attn.v_proj', 'embed', 'kv_heads'),
  _layer('self_attn.o_proj', 'heads', 'embed'),
  _layer('post_attention_layernorm', 'norm'),
  _layer('mlp.gate_proj', 'embed', 'mlp'),
  _layer('mlp.up_proj', 'embed', 'mlp'),
  _layer('mlp.down_proj', 'mlp', 'embed'),
  Param('norm', ('norm',), 'model.norm.weight'),
  Param('lm_head', ('embed', 'vocab'), 'lm_head.weight', linear=True),
)


def table(cfg: DecoderConfig) -> tuple[Param, ...]:
  """The rows that a model of this configuration has."""
  return tuple(p for p in MISTRAL_PARAMS if not (cfg.tied and p.path == 'lm_head'))  # fmt: skip


def axis_size(cfg: DecoderConfig, axis: str) -> int:
  """Length of a logical axis."""
  return _units(cfg, axis) * _unit(cfg, axis)


def shape(cfg: DecoderConfig, param: Param) -> tuple[int, ...]:
  """Shape of a parameter, the stack axis included."""
  return tuple(axis_size(cfg, axis) for axis in param.axes)


def axis_units(cfg: DecoderConfig, param: Param) -> tuple[int, ...]:
  """Into how many parts each axis may be cut: heads are never split.

  Nor are the blocks of a quantised weight.
  """
  units = tuple(_units(cfg, axis) for axis in param.axes)
  if quant_of(cfg, param) != 'nf4':
    return units
  stack, n_in, n_out = units
  whole, rest = divmod(axis_size(cfg, param.axes[1]), nf4.BLOCK)
  # Blocks that go on from one output to the next are one after the other.
  return (stack, 1, 1) if rest else (stack, math.gcd(n_in, whole), n_out)


def quant_of(cfg: DecoderConfig, param: Param) -> str:
  """'nf4' or 'int8'; 'none' of what is stored as it is."""
  small = param.stacked and param.linear and param.path not in cfg.quant.kept
  return cfg.quant.kind if small else 'none'


def _units(cfg: DecoderConfig, axis: str) -> int:
  return {
    'vocab': cfg.vocab,
    'embed': cfg.hidden,
    'norm': cfg.hidden,
    'heads': cfg.heads,
    'kv_heads': cfg.kv_heads,
    'mlp': cfg.mlp,
    'layers': cfg.layers,
  }[axis]


def _unit(cfg: DecoderConfig, axis: str) -> int:
  return cfg.head_dim if axis in ('heads', 'kv_heads') else 1


def nest(by_path: Mapping[str, Any]) -> dict:
  """{'a/b': x} -> {'a': {'b': x}}."""
  tree: dict = {}
  for path, value in by_path.items():
    *parents, name = path.split('/')
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[name] = value
  return tree


def abstract(cfg: DecoderConfig, dtype: Any) -> dict:
  """The whole tree of parameters as shapes; allocates nothing."""
  return nest({p.path: abstract_leaf(cfg, p, dtype) for p in table(cfg)})


def abstract_leaf(cfg: DecoderConfig, param: Param, dtype: Any) -> Any:
  """A parameter as its shape; of a quantised one, of each of its arrays."""
  kind, own = quant_of(cfg, param), shape(cfg, param)
  if kind == 'none':
    return jax.ShapeDtypeStruct(own, dtype)
  if kind == 'int8':
    return int8.abstract(own, dtype)
  return nf4.abstract(own, dtype, cfg.quant.double)


def module_names(cfg: DecoderConfig) -> dict[str, tuple[str, ...]]:
  """{path: Hugging Face module name of each stack index} of all matrices.

  >>> cfg = DecoderConfig(8, 4, 2, 1, 1, 4, 4)
  >>> module_names(cfg)['layers/self_attn/q_proj'][1]
  'model.layers.1.self_attn.q_proj'
  """
  return {p.path: _modules(cfg, p) for p in table(cfg) if p.axes[-1] != 'norm'}


def norm_names(cfg: DecoderConfig) -> dict[str, tuple[str, ...]]:
  """The same of what takes no adapter, but may be trained whole."""
  return {p.path: _modules(cfg, p) for p in table(cfg) if p.axes[-1] == 'norm'}


def layout(cfg: DecoderConfig) -> dict[str, str]:
  """{path: letters of its axes} of everything, as `lora.split` takes it."""

  def letters(p: Param) -> str:
    if p.axes[-1] == 'norm':
      return '.'
    return 'io' if p.linear else 'vo'

  return {p.path: 's' * p.stacked + letters(p) for p in table(cfg)}


def _modules(cfg: DecoderConfig, param: Param) -> tuple[str, ...]:
  return tuple(n.removesuffix('.weight') for n in hf_names(cfg, param))


def hf_names(cfg: DecoderConfig, param: Param) -> tuple[str, ...]:
  """The tensors that a parameter is read from, in stack order."""
  layers = range(cfg.layers if param.stacked else 1)
  return tuple(param.hf.format(i) for i in layers)


def total(cfg: DecoderConfig) -> int:
  """Number of parameters of the base model."""
  return sum(math.prod(shape(cfg, p)) for p in table(cfg))
