"""Templates against their published texts, typed out in full."""

import pytest

from lorax_train.data.problems import RowError
from lorax_train.data.template import TEMPLATES, template_named
from lorax_train.errors import DataError

# stanford_alpaca/train.py, PROMPT_DICT
ALPACA = """\
Below is an instruction that describes a task. Write a response that appropriately completes the request.

### Instruction:
Name a fruit.

### Response:"""
ALPACA_INPUT = """\
Below is an instruction that describes a task, paired with an input that provides further context. Write a response that appropriately completes the request.

### Instruction:
Name a fruit.

### Input:
It is red.

### Response:"""
UNO_REVERSE = """\
### Instruction:
Use the provided input to create an instruction that could have been used to generate the response with an LLM.

### Input:
An apple.

### Response:
"""
ROW = {'instruction': 'Name a fruit.', 'output': 'An apple.'}
RED = ROW | {'input': 'It is red.'}


@pytest.mark.parametrize(
  'template, fields, prompt, completion',
  [
    ('alpaca', ROW | {'input': ''}, ALPACA, 'An apple.'),
    ('alpaca', ROW, ALPACA, 'An apple.'),
    ('alpaca', ROW | {'input': None}, ALPACA, 'An apple.'),
    ('alpaca', RED, ALPACA_INPUT, 'An apple.'),
    # braces in a row are text, not fields to fill in
    (
      'alpaca',
      ROW | {'instruction': 'Name a {x}', 'output': '{}'},
      ALPACA.replace('a fruit.', 'a {x}'),
      '{}',
    ),
    ('uno_reverse', ROW | {'input': ''}, UNO_REVERSE, 'Name a fruit.'),
    ('uno_reverse', RED, UNO_REVERSE, 'Name a fruit.\n\nIt is red.'),
    ('text', {'text': ' all of it\n', 'other': 1}, '', ' all of it\n'),
    ('prompt_completion', {'prompt': '', 'completion': 'c'}, '', 'c'),
    ('prompt_completion', {'prompt': 'p ', 'completion': 'c'}, 'p ', 'c'),
  ],
)
def test_text(template, fields, prompt, completion):
  assert TEMPLATES[template](fields) == (prompt, completion)


@pytest.mark.parametrize(
  'template, fields, reason',
  [
    ('alpaca', {'instruction': 'i'}, "no column 'output'"),
    ('alpaca', {'output': 'o'}, "no column 'instruction'"),
    ('alpaca', ROW | {'output': None}, "column 'output' is null, not a string"),
    ('alpaca', ROW | {'input': 3}, "column 'input' is int, not a string"),
    (
      'uno_reverse',
      ROW | {'output': []},
      "column 'output' is list, not a string",
    ),
    ('text', {'txt': 'x'}, "no column 'text'"),
    ('text', {'text': 'a\ud800b'}, "column 'text' holds a lone surrogate"),
    ('prompt_completion', {'prompt': 'p'}, "no column 'completion'"),
  ],
)
def test_a_row_that_does_not_fit_says_why(template, fields, reason):
  with pytest.raises(RowError) as caught:
    TEMPLATES[template](fields)
  assert caught.value.reason == reason


@pytest.mark.parametrize(
  'name, guess',
  [
    ('alpca', "did you mean 'alpaca'? "),
    ('uno-reverse', "did you mean 'uno_reverse'? "),
    ('token', "did you mean 'tokens'? "),
    ('zzz', ''),
  ],
)
def test_unknown_name(name, guess):
  with pytest.raises(DataError) as caught:
    template_named(name)
  assert str(caught.value) == (
    f'data.template={name!r}: no such template; {guess}known: alpaca,'
    ' uno_reverse, text, prompt_completion, choice, chat, sharegpt, mistral_v1,'
    " mistral_v3, mistral_v3_tekken, tokens, a format string such as 'Q:"
    " {question} A:{|} {answer}', or module:function"
  )
