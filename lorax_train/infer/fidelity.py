"""A model with an adapter merged into it, and what that cost.

The sum W + s B A is formed in float32; the one thing lost is in rounding it to
the dtype of the merged file. So both models are computed in float32, and what
differs is that rounding. How far the adapter moves the base stands beside it,
as the measure of what is much.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax_train.data.sentencepiece_json import missing_files
from lorax_train.errors import DataError, ModelError
from lorax_train.formats import (
  find,
  hf_config,
  hf_save,
  quant_config,
  safetensors,
)
from lorax_train.infer.inspection import aligned
from lorax_train.infer.load import Model, load_model, load_params
from lorax_train.infer.score import batches, check_ids, read_tokens

# Rows where none are given: ids drawn evenly over the vocabulary.
ROWS, LENGTH, SEED = 8, 64, 0

# Two orders of the same float32 sums differ by so much of the largest logit.
_FLOAT32 = 1e-5
# Of how far the adapter moves the base: below this, a loss is small.
_MUCH = 0.01
# Positions that are in float64 at once.
_POSITIONS = 128

Report = dict[str, Any]


def random_rows(vocab: int, rows: int = ROWS) -> dict[str, np.ndarray]:
  """{'ids': [rows, 64]}, the same ones each time."""
  rng = np.random.default_rng(SEED)
  return {'ids': rng.integers(0, vocab, (rows, LENGTH), np.int32)}


def merge(
  model: str,
  adapter: str,
  out: str,
  dtype: str | None = None,
  *,
  report: bool = False,
  tokens: str | None = None,
  rows: int | None = None,
  batch_size: int = 8,
  quant: str | None = None,
) -> Report:
  """Writes a model directory with W + s B A in place of W.

  Of a quantised base W is what it stands for: what is written is not quantised,
  and computes what the adapter was trained to do on that base.

  Args:
    model: directory in Hugging Face format, or a hub id.
    adapter: PEFT adapter directory.
    out: directory, which must not exist.
    dtype: what to store; None for what is stored.
    report: compare what was written with the adapter unmerged.
    tokens: npz as `score` takes, for the report; None for `random_rows`.
    rows: how many random rows; None for 8.
    batch_size: rows computed at once.
    quant: the base is to be quantised so, as the one that the adapter was
      trained on; None for what its files have.

  Returns:
    {'out', 'base', 'parameters', 'untied', 'no_tokenizer_json', 'report'}: `untied`
    where the head had to be parted from the embedding, which the base ties;
    then why no tokenizer.json could be made for a lone tokenizer.model, or '';
    the last is `compare`'s, or None.

  Raises:
    UserError: what is wrong with the model, the adapter, `tokens` or `out`.
  """
  hf_save.check_absent(out)
  source = find.find_model(model)
  cfg = quant_config.as_asked(hf_config.read_config(source), quant)
  if tokens is None:
    arrays = random_rows(cfg.vocab, rows or ROWS)
  else:
    arrays = read_tokens(tokens)
    check_ids(arrays, cfg.vocab, tokens)
    if report and not np.any(arrays.get('mask', True)):
      raise DataError(f'--tokens {tokens}: mask leaves no position to compare')
  exact = hf_save.exact_dtype(source, dtype)
  if cfg.quant.kind != 'none':
    exact = np.dtype(np.float32)  # what W stands for, and what W + s B A is
  loaded = load_model(source, None, adapter, jnp.float32, exact, quant)
  files, lacking = missing_files(source)
  count = hf_save.save_params(out, source, loaded.params, dtype, files=files)
  cost = None
  if report:
    cost = compare(loaded, Path(out), arrays, batch_size)
    cost = {'tokens': tokens or f'random, seed {SEED}', **cost}
  parted = cfg.tied and not loaded.cfg.tied
  return {
    'out': out,
    'base': cfg.quant.kind,
    'parameters': count,
    'untied': parted,
    'no_tokenizer_json': lacking,
    'report': cost,
  }


def compare(
  model: Model,
  merged: Path,
  arrays: Mapping[str, np.ndarray],
  batch_size: int = 8,
) -> Report:
  """How a merged model differs from the adapted one on some rows.

  A position counts where its mask is not 0. In memory are both models and the
  logits of one batch.

  Args:
    model: the base under the adapter, computing in float32.
    merged: the directory that `hf_save.save_params` wrote of them.
    arrays: `ids` [B, T] and where wanted `mask` [B, T].
    batch_size: rows computed at once.

  Returns:
    The differences; `text` has them in words.

  Raises:
    ModelError: logits that are not finite.
  """
  dtype = hf_save.exact_dtype(merged)
  _, params = load_params(merged, None, None, jnp.float32, dtype)
  models = (model.params, params, model.base)
  run = jax.jit(
    lambda params, ids, mask: model.apply(params, ids, mask_BS=mask)
  )
  found = []
  # In true float32 on any device, where the default may be less.
  with jax.default_matmul_precision('highest'):
    for ids, mask, rows in batches(arrays, batch_size):
      counted = np.ones(ids.shape, bool) if mask is None else mask.copy()
      counted[rows:] = False
      logits = [np.asarray(run(params, ids, mask)) for params in models]
      if not all(np.isfinite(x[counted]).all() for x in logits):
        raise ModelError(f'{merged}: logits that are not finite')
      at = np.argwhere(counted)
      for begin in range(0, len(at), _POSITIONS):
        row, column = at[begin : begin + _POSITIONS].T
        found.append(_differences(*(x[row, column] for x in logits)))
  every = {key: np.concatenate([f[key] for f in found]) for key in found[0]}
  stored = {str(ref.dtype) for ref in safetensors.open_dir(merged).values()}
  report = {
    'dtype': ', '.join(sorted(stored)),
    'rows': len(arrays['ids']),
    'positions': len(every['kl']),
    'max_logit_difference': float(every['max'].max()),
    'mean_logit_difference': float(every['mean'].mean()),
    'mean_kl': float(every['kl'].mean()),
    'max_kl': float(every['kl'].max()),
    'argmax_agreement': float(every['agree'].mean()),
    'mean_kl_of_base': float(every['kl_of_base'].mean()),
    'largest_logit': float(every['largest'].max()),
  }
  return {**report, 'advice': _advice(report)}


def text(done: Report) -> str:
  """What `merge` gives back, in words."""
  written = f'{done["parameters"]:,} parameters: {done["out"]}'
  if done['base'] != 'none':
    written += (
      f'\nbase: {done["base"]}, and the adapter is merged into what it stands'
      ' for; nothing of it is quantised any more'
    )
  if done['untied']:
    written += (
      '\nuntied: the adapter changes one of embedding and head, which the base'
      ' ties; lm_head.weight is written too, and tie_word_embeddings is false'
    )
  if done['no_tokenizer_json']:
    written += f'\ntokenizer: {done["no_tokenizer_json"]}'
  report = done['report']
  if report is None:
    return written
  return f'{written}\n' + aligned(
    {
      'compared': (
        f'{report["rows"]} rows ({report["tokens"]}), {report["positions"]:,}'
        ' positions, merged and unmerged, both computed in float32'
      ),
      'stored': f'{report["dtype"]}, summed in float32 and rounded once',
      'logits': (
        f'differ by {report["max_logit_difference"]:.3g} at most,'
        f' {report["mean_logit_difference"]:.3g} in the mean; the largest is'
        f' {report["largest_logit"]:.3g}'
      ),
      'KL': (
        f'{report["mean_kl"]:.3g} nats in the mean, {report["max_kl"]:.3g} at'
        f' most; the base is {report["mean_kl_of_base"]:.3g} from the adapted one'
      ),
      'argmax': f'agrees at {report["argmax_agreement"]:.2%} of positions',
      'advice': report['advice'],
    }
  )


def _differences(
  adapted: np.ndarray, merged: np.ndarray, base: np.ndarray
) -> dict[str, np.ndarray]:
  """One number a position of each kind; all logits are [positions, V]."""
  # KL is a small difference of large numbers: in float64.
  adapted, merged, base = (
    x.astype(np.float64) for x in (adapted, merged, base)
  )
  apart = np.abs(adapted - merged)
  logp = _log_softmax(adapted)
  return {
    'max': apart.max(-1),
    'mean': apart.mean(-1),
    'largest': np.abs(adapted).max(-1),
    'agree': adapted.argmax(-1) == merged.argmax(-1),
    'kl': _kl(logp, _log_softmax(merged)),
    'kl_of_base': _kl(logp, _log_softmax(base)),
  }


def _log_softmax(x: np.ndarray) -> np.ndarray:
  x = x - x.max(-1, keepdims=True)
  return x - np.log(np.exp(x).sum(-1, keepdims=True))


def _kl(logp: np.ndarray, logq: np.ndarray) -> np.ndarray:
  """KL(p || q) of each row, which rounding alone would put below 0."""
  return np.maximum((np.exp(logp) * (logp - logq)).sum(-1), 0.0)


def _advice(report: Report) -> str:
  dtype, moved = report['dtype'], report['mean_kl_of_base']
  room = _FLOAT32 * max(1.0, report['largest_logit'])
  instead = 'merge with --dtype float32, or serve the adapter unmerged'
  if report['max_logit_difference'] <= room:
    return 'none: the merged model computes what the adapted one does'
  if dtype == 'float32':
    return (
      'more is lost than float32 rounds of logits: where that matters, serve'
      ' the adapter unmerged'
    )
  share = report['mean_kl'] / moved if moved else math.inf
  much = f'{share:.2%} of' if moved else 'more than'
  link = 'to lose nothing, ' if share <= _MUCH else ''
  return (
    f'rounding the sum to {dtype} costs {much} what the adapter does, by mean'
    f' KL, and changes the likeliest token at'
    f' {1 - report["argmax_agreement"]:.2%} of positions: {link}{instead}'
  )
