"""Samples, the plot, and what a run shows at its end.

References: the verb `generate` on what the run exported, and the rows.
"""

import contextlib
import io
import json
import re
import shlex
import struct
from pathlib import Path
from typing import NamedTuple

import pytest

from lorax_train import __main__, config
from lorax_train.data import template
from lorax_train.data.rows import Row
from lorax_train.data.tokenize import load_tokenizer, tokenize_rows
from lorax_train.infer import complete
from lorax_train.train import loop, metrics, plot, samples
from lorax_train.train.rows import arrange
from lorax_train.train.samples import Sample
from tests.toys import write_model
from tests.train.test_loop import make_config

CHOSEN = [
  Sample('rows: 1', [1], 'Say: one\nAnswer:', ' 1'),
  Sample('rows: 7', [1], 'Say: two\nAnswer:', ' 2```'),
]
LINES = [
  {'step': 0, 'eval_loss': 3.0},
  {'step': 0, 'samples': {'rows: 1': 'a', 'rows: 7': 'b\n````\nb'}},
  {'step': 1, 'loss': 2.0},
  {'step': 1, 'samples': {'rows: 1': 'c'}},
  {'step': 2, 'samples': {'rows: 1': 'e', 'rows: 7': 'f', 'rows: 9': 'g'}},
]


class Finished(NamedTuple):
  """A run with two samples: its configuration and what it printed."""

  cfg: config.TrainConfig
  run_dir: Path
  said: str


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  folder = tmp_path_factory.mktemp('finished')
  model, rows = write_model(folder / 'model'), folder / 'rows.jsonl'
  lines = [
    json.dumps({'instruction': f'Say {n}.', 'output': f'It is {n}, and {n}.'})
    for n in range(40)
  ]
  rows.write_text('\n'.join(lines))
  cfg = make_config(
    model, rows, folder / 'run', data={'max_length': 320},
    eval={'samples': 2, 'every': 4},
  )  # fmt: skip
  said = io.StringIO()
  with contextlib.redirect_stdout(said):
    loop.run(cfg)
  return Finished(cfg, folder / 'run', said.getvalue())


def test_samples_are_what_generate_says(finished):
  cfg, run_dir, said = finished
  texts = samples.by_step(metrics.read(run_dir, 4))
  assert list(texts) == [0, 4]
  lines = Path(cfg.data.path).read_text().splitlines()
  rows = {f'{cfg.data.path}:{n}': row for n, row in enumerate(lines, 1)}
  markdown = (run_dir / samples.FILE).read_text('utf-8')
  chosen = [json.loads(rows[w]) for w in rows if f'## {w}\n' in markdown]
  assert len(chosen) == 2
  prompts = [template.alpaca(row).prompt for row in chosen]
  options = complete.Options(max_new_tokens=64)
  for adapter, step in ((None, 0), (str(run_dir / 'adapter'), 4)):
    done = complete.complete(cfg.model.path, prompts, options, adapter)
    assert [row['text'] for row in done] == list(texts[step].values())
  for prompt, row in zip(prompts, chosen, strict=True):
    assert prompt in markdown
    assert f'wanted     {row["output"]}\n' in said
  assert texts[0] != texts[4]


def test_of_a_conversation_the_first_answer_is_wanted(tiny_model):
  tokenizer = load_tokenizer(tiny_model)
  turns = [('user', 'Hi'), ('assistant', 'One.'), ('user', 'x'), ('assistant', 'Two.')]  # fmt: skip
  row = Row({'messages': [{'role': r, 'content': c} for r, c in turns]}, 'a:1')
  made = tokenize_rows([row], 'mistral_v1', tokenizer, 99)
  cfg = config.from_mapping({'model': {'path': 'm'}, 'data': {'path': 'd'}})
  rows = arrange(cfg, [made], made, tokenizer)
  [sample] = samples.choose(rows, 3)
  assert (sample.prompt_text, sample.wanted) == ('[INST] Hi [/INST]', 'One.')


def test_the_end_card_says_commands_that_run(finished):
  _, run_dir, said = finished
  card = said[said.rindex('held-out loss') :]
  commands = [
    shlex.split(line.partition(' -m lorax_train ')[2])
    for line in card.splitlines()
    if ' -m lorax_train ' in line
  ]
  assert [argv[0] for argv in commands] == ['generate', 'merge', 'inspect']
  for argv in commands:
    few = ['--max-new-tokens', '2'] if argv[0] == 'generate' else []
    assert __main__.cli(argv + few) == 0, argv
  _, values = plot.series(metrics.read(run_dir, 4), 'eval_loss')
  change = 100 * (values[-1] / values[0] - 1)
  want = f'{values[0]:.4f} -> {values[-1]:.4f} ({change:+.1f} %)'
  assert card.startswith(f'held-out loss {want}\n')
  assert want in (run_dir / 'adapter' / 'README.md').read_text()


def test_a_run_done_before_shows_the_same_card(finished, capsys):
  cfg, _, said = finished
  loop.run(cfg)
  assert capsys.readouterr().out.endswith(said[said.rindex('held-out loss') :])


def test_a_text_in_markdown_stays_in_its_fence():
  text = samples.to_markdown(CHOSEN, LINES)
  assert '`````text\nb\n````\nb\n`````\n' in text
  assert '````text\n 2```\n````\n' in text
  titles = re.findall('^(?:## (.+)|(Step .):)$', text, re.MULTILINE)
  assert [row or step for row, step in titles] == [
    # Fewer samples were asked for at one start, more at another.
    'rows: 1', 'Step 0', 'Step 1', 'Step 2', 'rows: 7', 'Step 0', 'Step 2'
  ]  # fmt: skip


def test_the_terminal_shows_the_first_and_the_last():
  text = samples.before_and_after(CHOSEN, LINES)
  assert text.splitlines() == [
    'prompt     one',
    'wanted     1',
    'step 0     a',
    'step 2     e',
    '',
    'prompt     two',
    'wanted     2```',
    'step 0     b ```` b',
    'step 2     f',
  ]


def test_without_samples_there_is_nothing_to_show():
  assert samples.before_and_after([], LINES) == ''
  assert samples.before_and_after(CHOSEN, LINES[:1]) == ''


@pytest.mark.parametrize(
  'lines',
  [
    [],
    [{'step': 0, 'eval_loss': 2.0}],
    [{'step': n, 'loss': 1 / n} for n in range(1, 4)],
    [{'step': n, 'loss': 1 / n} for n in range(1, 500)]
    + [{'step': 500, 'eval_loss': 0.1}],
  ],
)
def test_a_plot_of_any_length_is_a_png(lines, tmp_path):
  path = tmp_path / plot.FILE
  plot.loss_curve(lines, path)
  head = path.read_bytes()[:24]
  assert head[:8] == b'\x89PNG\r\n\x1a\n'
  assert struct.unpack('>II', head[16:]) == (960, 540)


def test_a_series_has_the_lines_of_its_key():
  assert plot.series(LINES, 'eval_loss') == ([0], [3.0])
  assert plot.series(LINES, 'loss') == ([1], [2.0])
