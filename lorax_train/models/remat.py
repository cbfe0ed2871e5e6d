"""What the backward pass of a layer keeps of the forward pass, and makes again.

A policy is a list of names, which the layer gives to its tensors by
`checkpoint_name`. A frozen weight needs no input for a gradient of its own, so
what is worth keeping is what the products make, not what goes into them: all
that stands between is norms, rotations and silu(gate) * up.

| policy | keeps of a layer, beside its input | makes again |
| --- | --- | --- |
| none | what autodiff takes | nothing |
| dots | all below | what is no product: norms, silu(gate) * up |
| mlp | all but gate and up | and those two products |
| full | nothing | all but the product with down_proj |

Axis letters: D model, N heads, K kv heads, H head dim, F mlp, R rank.
"""

from collections.abc import Callable, Mapping

import jax

from lorax_train.models import params as params_lib
from lorax_train.models.params import DecoderConfig

POLICIES = ('none', 'dots', 'mlp', 'full')

# Names of the layer's tensors, and how many numbers a token each of them has.
_SIZES: dict[str, Callable[[DecoderConfig], int]] = {
  'q': lambda cfg: cfg.heads * cfg.head_dim,  # rotated, as k
  'k': lambda cfg: cfg.kv_heads * cfg.head_dim,
  'v': lambda cfg: cfg.kv_heads * cfg.head_dim,
  'attention': lambda cfg: cfg.heads * cfg.head_dim,  # and what it adds
  'residual': lambda cfg: cfg.hidden,  # between attention and MLP
  'gate': lambda cfg: cfg.mlp,
  'up': lambda cfg: cfg.mlp,
}
# Names that are not the model's: what stands between the factors of an adapter,
# and what DoRA's magnitude multiplies.
_OF_ADAPTERS = ('low_rank', 'before_magnitude')

_KEPT: dict[str, tuple[str, ...]] = {
  'dots': (*_SIZES, *_OF_ADAPTERS),
  'mlp': (*(n for n in _SIZES if n not in ('gate', 'up')), 'low_rank'),
  'full': (),
}


def policy(name: str) -> Callable[..., bool]:
  """What `jax.checkpoint` takes, of each policy but 'none'."""
  return jax.checkpoint_policies.save_only_these_names(*_KEPT[name])


def saved_bytes(
  cfg: DecoderConfig,
  name: str,
  itemsize: int,
  ranks: Mapping[str, int],
  normalisers: int = 0,
) -> int:
  """Bytes a token and layer that a policy keeps, its layer's input included.

  The output of attention is counted, which those whose backward pass does not
  want it keep for the adapter of o_proj alone. Not counted are DoRA's products,
  which 'dots' keeps a second time.

  Args:
    cfg: sizes.
    name: any policy but 'none', which keeps what autodiff takes.
    itemsize: bytes of the compute dtype.
    ranks: {'q_proj': R, ...} of a layer's adapters.
    normalisers: float32 numbers a token and head that attention keeps beside
      its output: 1 where that is the log-sum-exp.

  >>> seven = params_lib.DecoderConfig(32000, 4096, 32, 32, 8, 128, 14336)
  >>> [saved_bytes(seven, p, 2, {'q_proj': 16}) for p in POLICIES[1:]]
  [94240, 36896, 8192]
  """
  kept = _KEPT[name]
  numbers = cfg.hidden + sum(_SIZES[n](cfg) for n in kept if n in _SIZES)
  if 'low_rank' in kept:
    numbers += sum(ranks.values())
  own = 4 * normalisers * cfg.heads if 'attention' in kept else 0
  return itemsize * numbers + own


def recomputed_flops(
  cfg: DecoderConfig, name: str, ranks: Mapping[str, int], attended: float
) -> float:
  """FLOPs of products a token and layer that the backward pass makes again.

  The last product of a layer is never among them: nothing needs its result.

  Args:
    cfg: sizes.
    name: the policy.
    ranks: {'q_proj': R, ...} of a layer's adapters.
    attended: keys a query that are multiplied with: about T / 2 where those
      after it are skipped, T where they are masked. Of attention whose backward
      pass makes the scores again by itself that is not counted.
  """
  again: dict[str, tuple[str, ...]]
  again = {'none': (), 'dots': (), 'mlp': ('gate_proj', 'up_proj')}
  flops = 0.0
  for param in params_lib.table(cfg):
    module = param.path.rpartition('/')[2]
    if not (param.stacked and param.linear):
      continue
    n_in, n_out = params_lib.shape(cfg, param)[1:]
    rank = ranks.get(module, 0)
    if module in again.get(name, (module,)):
      down = module == 'down_proj'
      flops += 0 if down else 2 * n_out * (n_in + rank)
      # What is between the factors is kept, but for 'full'.
      flops += 2 * n_in * rank if name == 'full' else 0
  if name == 'full':
    flops += 4 * cfg.heads * cfg.head_dim * attended
  return flops
