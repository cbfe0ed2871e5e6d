"""What `validate` says of conversations.

Reference: rows of one slip each, beside the same rows without it.
"""

import json

import pytest
import tokenizers

from tests.test_main import command

from .test_validate import EOS, validate


def chat(question):
  return {
    'messages': [
      {'role': 'user', 'content': question},
      {'role': 'assistant', 'content': 'Yo'},
    ]
  }


@pytest.fixture
def checked(tmp_path, tiny_model, capfd):
  """(rows, template) -> {name: [(status, message)]}."""

  def run(rows, template):
    data = tmp_path / 'chats.jsonl'
    data.write_text(''.join(json.dumps(row) + '\n' for row in rows), 'utf-8')
    changes = {'data.template': template}
    argv = command(tiny_model, data, tmp_path / 'run', **changes)
    return validate(argv, capfd)[1]

  return run


def test_a_format_may_spell_its_own_marks(checked):
  """And nothing else: what a message spells besides is told."""
  rows = [chat(str(n)) for n in range(20)]
  checks = checked(rows, 'mistral_v1')
  assert [status for status, _ in checks['spelling']] == ['ok']
  checks = checked([*rows, chat('<|im_end|>')], 'mistral_v1')
  [(status, message)] = checks['spelling']
  assert status == 'warn' and 'INST' not in message
  assert '<|im_end|> (' in message


def test_an_end_of_turn_that_generation_would_not_heed(checked, tiny_model):
  """The base's EOS is another: rows end well, generated texts would not."""
  path = tiny_model / 'tokenizer.json'
  tokenizer = tokenizers.Tokenizer.from_file(str(path))
  tokenizer.add_special_tokens(['<|im_end|>'])
  tokenizer.save(str(path))
  end = tokenizer.token_to_id('<|im_end|>')
  (tiny_model / 'chat_template.jinja').write_text(
    "{% for m in messages %}{{ m.content + '<|im_end|>' }}{% endfor %}"
  )
  rows = [chat('Hi'), chat('Hello')]
  [(first, _), (status, message)] = checked(rows, 'chat')['EOS']
  assert (first, status) == ('ok', 'warn')
  assert message.startswith('2 rows, first ') and 'chats.jsonl:1' in message
  assert f'end with <|im_end|> ({end})' in message
  generation = {'eos_token_id': [EOS, end]}
  named = tiny_model / 'generation_config.json'
  named.write_text(json.dumps(generation))
  assert [status for status, _ in checked(rows, 'chat')['EOS']] == ['ok']
