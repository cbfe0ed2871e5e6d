"""What a run tells its user: the banner, the end card, the model card."""

import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from lorax_train import config as config_lib
from lorax_train import lora
from lorax_train.config import TrainConfig
from lorax_train.formats import quantised
from lorax_train.train import plot, samples

# What transformers is told of a base that a run has quantised.
_BITS = {
  'nf4': (
    "BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4',"
    ' bnb_4bit_use_double_quant=True)'
  ),
  'int8': 'BitsAndBytesConfig(load_in_8bit=True)',
}


def banner(
  cfg: TrainConfig,
  frozen: Any,
  names: Mapping[str, Sequence[str]],
  mesh: jax.sharding.Mesh,
  rows: Mapping[str, str],
  run_dir: Path,
) -> str:
  """The facts of a run, a line each.

  Args:
    cfg: the run.
    frozen: from `lora.split`; shapes suffice.
    names: {path: module names}.
    mesh: devices.
    rows: lines about the data.
    run_dir: where the run goes.
  """
  trainable, base = lora.count(frozen)
  axes = ' x '.join(f'{k} {v}' for k, v in mesh.shape.items())
  share = 100 * trainable / base
  lines = {
    'model': f'{cfg.model.path}, {base:,} parameters',
    'trainable': f'{trainable:,} of {base:,} ({share:.4f} %)',
    'targets': (
      'every weight' if config_lib.trains_all(cfg) else targets(frozen, names)
    ),
    'precision': f'compute {cfg.model.dtype}, {_what_is_stored(cfg, frozen)}',
    **_stored(frozen, trainable),
    'devices': f'{mesh.size} {mesh.devices.flat[0].device_kind} ({axes})',
    **rows,
    'run_dir': str(run_dir),
  }
  return '\n'.join(f'{key:<10} {value}' for key, value in lines.items())


def _what_is_stored(cfg: TrainConfig, frozen: Any) -> str:
  """'frozen weights nf4 and bfloat16, adapters and optimizer float32'."""
  kind, dtype = quantised.kind_of(frozen), cfg.model.param_dtype
  if cfg.method == 'full':
    return f'seen as {dtype}, weights and optimizer float32'
  if config_lib.trains_all(cfg):
    return f'trained weights {dtype}, no gradients and no optimizer'
  kinds = dtype if kind == 'none' else f'{kind} and {dtype}'
  others = 'adapters' if cfg.method == 'mezo' else 'adapters and optimizer'
  return f'frozen weights {kinds}, {others} float32'


def _stored(frozen: Any, trainable: int) -> dict[str, str]:
  """Of a quantised base, what is stored; else nothing."""
  if quantised.kind_of(frozen) == 'none':
    return {}
  elements, n_bytes = quantised.stored(frozen)
  return {
    'stored': (
      f'{elements + trainable:,} elements, 4-bit weights two to a byte, adapters'
      f' among them; {(n_bytes + 4 * trainable) / 1e9:.2f} GB with the scales'
    )
  }


def targets(frozen: Any, names: Mapping[str, Sequence[str]]) -> str:
  """'q_proj x 32 (r 64), v_proj x 32 (r 64)': what was matched."""
  parts = []
  for path, leaf in jax.tree_util.tree_leaves_with_path(
    frozen, is_leaf=lora.is_trained
  ):
    of_path = names.get(lora.path_of(path), ('',))
    module = of_path[0].rpartition('.')[2]
    if isinstance(leaf, lora.Fixed):
      ranks = [r for r in leaf.ranks if r]
      low, high = min(ranks), max(ranks)
      rank = f'{low}' if low == high else f'{low}-{high}'
      parts.append(f'{module} x {len(ranks)} (r {rank})')
    elif isinstance(leaf, lora.Original):
      whole = f'{module} x {len(leaf.layers or of_path)} (whole)'
      parts.append(f'{module} ({len(leaf.rows)} rows)' if leaf.rows else whole)
  return ', '.join(parts)


def held_out(lines: Sequence[Mapping[str, Any]]) -> str:
  """'held-out loss 2.1000 -> 1.4000 (-33.3 %)', from metrics.jsonl.

  Of choices ', accuracy 0.5000 -> 0.8000' as well.
  """
  _, values = plot.series(lines, 'eval_loss')
  if not values:
    return 'no rows held out'
  first, last = values[0], values[-1]
  change = 100 * (last / first - 1)
  text = f'held-out loss {first:.4f} -> {last:.4f} ({change:+.1f} %)'
  _, shares = plot.series(lines, 'eval_accuracy')
  if shares:
    text += f', accuracy {shares[0]:.4f} -> {shares[-1]:.4f}'
  return text


def end_card(
  cfg: TrainConfig,
  run_dir: Path,
  model_dir: Path,
  lines: Sequence[Mapping[str, Any]],
) -> str:
  """What came out, where it is, and the commands to use it.

  Args:
    cfg: the run.
    run_dir: of the run.
    model_dir: the base, as files.
    lines: of metrics.jsonl.
  """
  what = 'model' if config_lib.trains_all(cfg) else 'adapter'
  out = run_dir / what
  size = sum(path.stat().st_size for path in out.iterdir())
  use = (
    _use_model(out)
    if what == 'model'
    else _use_adapter(run_dir, model_dir, cfg.model.quant)
  )
  made = {
    what: f'{out} ({size / 1e6:.1f} MB with its tokenizer)',
    'loss': str(run_dir / plot.FILE),
  }
  if (run_dir / samples.FILE).is_file():
    made['samples'] = str(run_dir / samples.FILE)
  return '\n'.join(
    [
      held_out(lines),
      *(f'{key:<10} {value}' for key, value in made.items()),
      '',
      'use it:',
      *(f'  {line}' for line in use),
    ]
  )


def _use_adapter(run_dir: Path, model_dir: Path, quant: str) -> list[str]:
  adapter = run_dir / 'adapter'
  lorax = f'{_python()} -m lorax_train'
  both = f'--model {_quoted(model_dir)} --adapter {_quoted(adapter)}'
  how = ''
  if quant != 'none':
    both += f' --quant {quant}'
    how = f', quantization_config={_BITS[quant]}'
  return [
    f"{lorax} generate {both} --prompt '...'",
    f'{lorax} merge {both} --out {_quoted(run_dir / "merged")}',
    f'{lorax} inspect {_quoted(adapter)}',
    'PeftModel.from_pretrained('
    f'AutoModelForCausalLM.from_pretrained({str(model_dir)!r}{how}),'
    f' {str(adapter)!r})',
  ]


def _use_model(model: Path) -> list[str]:
  lorax, path = f'{_python()} -m lorax_train', _quoted(model)
  return [
    f"{lorax} generate --model {path} --prompt '...'",
    f'{lorax} score --model {path} --tokens IN.npz --out OUT.npz',
    f'{lorax} inspect {path}',
    f'AutoModelForCausalLM.from_pretrained({str(model)!r})',
  ]


def _python() -> str:
  """What a shell must be told to run this Python."""
  here, path = Path.cwd(), Path(sys.executable)
  found = shutil.which('python')
  if found and Path(found).parent == path.parent:
    return 'python'
  return _quoted(path.relative_to(here) if path.is_relative_to(here) else path)


def _quoted(path: Path) -> str:
  return shlex.quote(str(path))


def _also(spec: lora.LoraSpec) -> str:
  """What is trained besides, in words."""
  rows = {n: len(t) for n, t in spec.trainable_token_indices.items()}
  parts = [f'`{spec.modules_to_save}` whole'] if spec.modules_to_save else []
  parts += [f'{n} rows of `{name}`' for name, n in rows.items()]
  return f'; {", ".join(parts)}' if parts else ''


def _templates(cfg: TrainConfig) -> str:
  """Those that rows are trained on in."""
  used = dict.fromkeys(s.template for s in config_lib.sources(cfg.data))
  return ', '.join(f'`{template}`' for template in used)


def _of_base(quant: str) -> list[str]:
  """What a model card says of a base that the run has quantised."""
  return [f'- trained on its base in {quant}: `{_BITS[quant]}`'] if quant in _BITS else []  # fmt: skip


def model_card(cfg: TrainConfig, spec: lora.LoraSpec, result: str) -> str:
  """README.md of an adapter directory, with the hub's front matter."""
  lines = [
    *_front(cfg, 'peft', 'lora'),
    '',
    '# LoRA adapter',
    '',
    'Trained with lorax_train. Load it on its base model:',
    '',
    '```python',
    'from peft import PeftModel',
    'model = PeftModel.from_pretrained(base_model, "path/to/this")',
    '```',
    '',
    f'- variant {spec.variant}, rank {spec.rank}, alpha {spec.alpha:g}, targets'
    f' `{spec.targets}`{_also(spec)}',
    *_how(cfg),
    *_of_base(cfg.model.quant),
    f'- {result}',
    '',
  ]
  return '\n'.join(lines)


def full_model_card(cfg: TrainConfig, result: str) -> str:
  """README.md of a model of which every weight was trained."""
  drawn = cfg.model.init == 'random'
  lines = [
    *_front(cfg, 'transformers', 'text-generation'),
    '',
    '# Pre-trained model' if drawn else '# Fine-tuned model',
    '',
    'Trained with lorax_train, all weights of it.',
    '',
    '```python',
    'from transformers import AutoModelForCausalLM',
    'model = AutoModelForCausalLM.from_pretrained("path/to/this")',
    '```',
    '',
    f'- from {"random weights" if drawn else "the base"}, by {_stepped_by(cfg)};'
    f' weights {cfg.model.param_dtype}',
    *_how(cfg),
    f'- {result}',
    '',
  ]
  return '\n'.join(lines)


def _front(cfg: TrainConfig, library: str, tag: str) -> list[str]:
  """The hub's front matter."""
  base = cfg.model.path
  # The hub wants a repo id there; a path of this machine is nobody's business.
  is_id = base.count('/') == 1 and not Path(base).expanduser().exists()
  named = is_id and cfg.model.init == 'weights'
  return [
    '---',
    f'library_name: {library}',
    f'tags: [{tag}, lorax_train]',
    *([f'base_model: {base}'] if named else []),
    '---',
  ]


def _stepped_by(cfg: TrainConfig) -> str:
  return 'MeZO' if cfg.method == 'mezo' else cfg.train.optimizer


def _how(cfg: TrainConfig) -> list[str]:
  """Steps, rows and rate, in a line."""
  of_batch = (
    f'packs of rows, {cfg.data.max_length} tokens each'
    if cfg.data.packing
    else 'rows'
  )
  return [
    f'- {cfg.train.steps} steps of {cfg.train.batch_size * cfg.train.grad_accum}'
    f' {of_batch}, template {_templates(cfg)}, peak learning rate'
    f' {cfg.train.learning_rate:g}, {cfg.train.schedule}',
    *(['- without gradients, by MeZO'] if cfg.method == 'mezo' else []),
  ]
