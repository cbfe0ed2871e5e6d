"""Makes the golden files below tests/golden from transformers and PEFT.

The suite itself runs without torch: it compares with these small files, which
transformers (Mistral and Llama in float32, eager attention, random weights)
and PEFT computed once. Made with torch 2.13.0, transformers 5.23.0 and peft
0.21.2; every reference.json names the versions it came from. To make them
again, which gives the same bytes on the same machine:

  pip install -e .[parity]
  python scripts/make_golden.py [--out tests/golden]
"""

import argparse
import pathlib
import shutil

import peft
import torch
import transformers
from golden import adapters, files, models, peft_matching
from safetensors.torch import save_file


def versions() -> dict[str, str]:
  """The versions of everything that computed a number here."""
  modules = (torch, transformers, peft)
  return {module.__name__: module.__version__ for module in modules}


def make_case(name: str, case: models.Case, folder: pathlib.Path) -> None:
  """Writes one model with its references."""
  shutil.rmtree(folder, ignore_errors=True)
  model, batch = models.build_model(case), models.make_batch(case)
  output = models.forward(model, batch)
  logits = output.logits.detach()
  models.save_model(model, case, folder / 'model')
  models.check_saved_model(case, folder / 'model', batch, logits)
  tensors = {**batch, 'logits': logits}
  scalars = {
    'loss': output.loss.item(),
    'params': sum(p.numel() for p in model.parameters()),
    'versions': versions(),
    'mistakes': models.check_mistakes(name, case, batch, logits),
  }
  if case.masked:
    tensors['mask'] = models.make_mask(batch['ids'])
    tensors['logits_masked'] = models.logits_of(model, batch, tensors['mask'])
  if name == 'llama3_rope':
    models.check_llama3_regimes(model)
  if name == 'mistral_window':
    tensors |= adapters.make_adapters(case, folder, batch, logits)
    run_tensors, run_scalars = adapters.train(case, folder, batch)
    tensors, scalars = tensors | run_tensors, scalars | run_scalars
  save_file(tensors, folder / 'reference.safetensors')
  files.write_json(folder / 'reference.json', scalars)


def learning_rates(make_schedule, warmup: int, total: int) -> list[float]:
  """The schedule's rate at steps 0 .. total, for a peak of 1."""
  tx = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=1.0)
  schedule = make_schedule(tx, warmup, total)
  rates = []
  for _ in range(total + 1):
    rates.append(schedule.get_last_lr()[0])
    tx.step()
    schedule.step()
  return rates


def make_schedules(path: pathlib.Path) -> None:
  """Writes transformers' three warm-up schedules, with and without warm-up."""
  makers = {
    'constant': lambda tx, warmup, total: (
      transformers.get_constant_schedule_with_warmup(tx, warmup)
    ),
    'linear': transformers.get_linear_schedule_with_warmup,
    'cosine': transformers.get_cosine_schedule_with_warmup,
  }
  table = [
    {
      'schedule': name,
      'warmup': warmup,
      'total': 20,
      'rates': learning_rates(maker, warmup, 20),
    }
    for name, maker in makers.items()
    for warmup in (5, 0)
  ]
  files.write_json(path, {'cases': table, 'versions': versions()})


def main() -> None:
  """Writes everything."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--out', type=pathlib.Path, default='tests/golden')
  out = parser.parse_args().out
  # One thread and no sums in a free order: the same bytes every time.
  torch.set_num_threads(1)
  torch.use_deterministic_algorithms(True)
  for name, case in models.CASES.items():
    make_case(name, case, out / name)
  make_schedules(out / 'schedules.json')
  peft_matching.make(out / 'peft_matching.json', versions())


if __name__ == '__main__':
  main()
