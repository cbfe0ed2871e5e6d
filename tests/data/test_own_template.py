"""Templates of a user's own: format strings and functions.

Reference of the format strings: str.format of the same columns.
"""

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorax_train import config
from lorax_train.data.problems import RowError
from lorax_train.data.template import template_named
from lorax_train.data.tokenize import load_tokenizer
from lorax_train.data.tokenized import tokenize_rows
from lorax_train.errors import DataError

from .toys import rows_of

ROW = {'q': 'Why {x}?', 'a': 'So.', 'n': 3, 'none': None, 'with space': 'w'}
BLANK = {'blank': ' w\n'}


@pytest.mark.parametrize(
  'template, prompt, completion',
  [
    ('Q: {q}\nA:{|} {a}', 'Q: Why {x}?\nA:', ' So.'),
    ('{q}{|}{a}', 'Why {x}?', 'So.'),
    ('{|}{q}{a}', '', 'Why {x}?So.'),
    ('{{"q": "{q}"}}{|}{a}}}', '{"q": "Why {x}?"}', 'So.}'),
    ('p:{|}{q}{q}!\\n', 'p:', 'Why {x}?Why {x}?!\\n'),
    ('{with space}{|}{a}', 'w', 'So.'),
    ('{blank:strip}{|} {blank:strip}{blank}', 'w', ' w w\n'),
  ],
)
def test_format_strings(template, prompt, completion):
  assert template_named(template)(ROW | BLANK) == (prompt, completion)


NAMES = st.sampled_from(['{q}', '{a}', '{{', '}}', 'x', ' ', '\n', ':', '"'])


@given(before=st.lists(NAMES).map(''.join), after=st.lists(NAMES).map(''.join))
def test_each_half_is_what_format_makes_of_it(before, after):
  after += '{a}'
  columns = {'q': ROW['q'], 'a': ROW['a']}
  example = template_named(before + '{|}' + after)(columns)
  assert example == (before.format(**columns), after.format(**columns))


@pytest.mark.parametrize(
  'template, message',
  [
    ('Q: {q} A: {a}', "{|} stands nowhere; put it once, where what is learned begins: 'Q: {question} A:{|} {answer}'"),
    ('{q}{|}{a}{|}', "{|} stands 2 times; put it once, where what is learned begins: 'Q: {question} A:{|} {answer}'"),
    ('{q} {a}{|} end', 'there is no column after {|}, to be learned'),
    ('{q{|}{a}', "unexpected '{' in field name"),
    ('{q}{|}{a', "expected '}' before end of string"),
    ('q}{|}{a}', "Single '}' encountered in format string"),
    ('{q}{|}{a:>9}', "':>9' behind column 'a'; only its name may stand there, :strip, or what to choose from, {label:0=bad,1=good}"),
    ('{q!r}{|}{a}', "'!r' behind column 'q'; only its name may stand there, :strip, or what to choose from, {label:0=bad,1=good}"),
    ('{}{|}{a}', '{} names no column; a brace itself is written twice'),
  ],
)  # fmt: skip
def test_format_strings_that_are_none(template, message):
  with pytest.raises(DataError) as caught:
    template_named(template)
  assert str(caught.value) == f'data.template={template!r}: {message}'


@pytest.mark.parametrize(
  'template, reason, detail',
  [
    ('{qq}{|}{a}', "no column 'qq'", "columns: 'q', 'a', 'n', 'none', 'with space'"),
    # attributes and items are not to be had
    ('{q.upper}{|}{a}', "no column 'q.upper'", "columns: 'q', 'a', 'n', 'none', 'with space'"),
    ('{q[0]}{|}{a}', "no column 'q[0]'", "columns: 'q', 'a', 'n', 'none', 'with space'"),
    ('{0}{|}{a}', "no column '0'", "columns: 'q', 'a', 'n', 'none', 'with space'"),
    ('{n}{|}{a}', "column 'n' is int, not a string", ''),
    ('{q}{|}{none}', "column 'none' is null, not a string", ''),
  ],
)  # fmt: skip
def test_rows_that_a_format_string_does_not_fit(template, reason, detail):
  with pytest.raises(RowError) as caught:
    template_named(template)(ROW)
  assert (caught.value.reason, caught.value.detail) == (reason, detail)


MODULE = """\
import json

def pair(row):
  return row['q'], row['a']

def as_list(row):
  return [row['q'], row['a']]

def as_dict(row):
  return {'prompt': row.pop('q'), 'completion': row.pop('a')}

def raises(row):
  row['nested']['list'].append(1)
  return row['no'
    'thing']

def leaves(row):
  raise SystemExit(0)

number = lambda row: 3
nothing = lambda row: None
one = lambda row: ('a',)
text = lambda row: 'ab'
keys = lambda row: {'prompt': 'p', 'response': 'r'}
wrong = lambda row: ('p', 3)
surrogate = lambda row: {'prompt': '\\ud800', 'completion': 'c'}
CONSTANT = 3
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
  """A working directory with modules; they and sys.path are forgotten after."""
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'own_render.py').write_text(MODULE)
  (tmp_path / 'own_broken.py').write_text('x = 1\nraise KeyError("k")\n')
  (tmp_path / 'own_syntax.py').write_text('x = = 1\n')
  (tmp_path / 'own_needs.py').write_text('import not_to_be_found\n')
  (tmp_path / 'own_exit.py').write_text('import sys\nsys.exit(0)\n')
  (tmp_path / 'own_package').mkdir()
  (tmp_path / 'own_package' / 'inner.py').write_text(MODULE)
  before = list(sys.path)
  yield tmp_path
  assert sys.path == before
  for name in [n for n in sys.modules if n.startswith('own_')]:
    del sys.modules[name]


@pytest.mark.parametrize(
  'name',
  [
    'own_render:pair',
    'own_render:as_list',
    'own_render:as_dict',
    'own_package.inner:pair',
  ],
)
def test_functions(here, name):
  row = {'q': 'p', 'a': 'c', 'nested': {'list': []}}
  render = template_named(name)
  assert render(row) == render(row) == ('p', 'c')


@pytest.mark.parametrize(
  'name, message',
  [
    ('own_nowhere:f', 'no module own_nowhere, neither in {here} nor installed'),
    ('own_package.no:f', 'no module own_package.no, neither in {here} nor installed'),
    ('own_render:par', 'own_render has no function par, did you mean pair?'),
    ('own_render:CONSTANT', 'own_render has no function CONSTANT'),
    ('own_broken:f', 'importing own_broken: KeyError {quote}k{quote} at own_broken.py:2'),
    ('own_syntax:f', 'importing own_syntax: SyntaxError invalid syntax (own_syntax.py, line 1)'),
    ('own_needs:f', "importing own_needs: ModuleNotFoundError No module named 'not_to_be_found' at own_needs.py:1"),
    ('own_exit:f', 'importing own_exit: SystemExit 0 at own_exit.py:2'),
    ('a/b.py:f', 'not module:function; give it like my.module:render'),
    ('own_render:', 'not module:function; give it like my.module:render'),
    ('own_render:a.b', 'not module:function; give it like my.module:render'),
    ('Q: q A: a', 'not module:function; give it like my.module:render'),
    ('own_render..x:f', 'not module:function; give it like my.module:render'),
  ],
)  # fmt: skip
def test_functions_that_are_not_to_be_had(here, name, message):
  with pytest.raises(DataError) as caught:
    template_named(name)
  expected = message.format(here=here, quote="'")
  assert str(caught.value) == f'data.template={name!r}: {expected}'


@pytest.mark.parametrize(
  'function, reason, detail',
  [
    ('raises', 'raised KeyError', "'nothing' at own_render.py:14"),
    ('leaves', 'raised SystemExit', '0 at own_render.py:18'),
    ('number', 'gave int, not prompt and completion', ''),
    ('nothing', 'gave None, not prompt and completion', ''),
    ('text', 'gave str, not prompt and completion', ''),
    ('one', 'gave 1 values, not prompt and completion', ''),
    (
      'keys',
      'gave a dict, but not of prompt and completion',
      "keys: 'prompt', 'response'",
    ),
  ],
)
def test_what_a_function_may_not_do(here, function, reason, detail):
  row = {'q': 'p', 'a': 'c', 'nested': {'list': []}}
  with pytest.raises(RowError) as caught:
    template_named(f'own_render:{function}')(row)
  assert caught.value.reason == f'own_render:{function} {reason}'
  assert caught.value.detail == detail
  assert row['nested'] == {'list': []}


@pytest.mark.parametrize(
  'function, reason',
  [
    ('wrong', 'the completion that own_render:wrong gave is int, not a string'),
    (
      'surrogate',
      'the prompt that own_render:surrogate gave holds a lone surrogate',
    ),
  ],
)
def test_what_a_function_gives_must_be_text(here, function, reason):
  with pytest.raises(RowError) as caught:
    template_named(f'own_render:{function}')({})
  assert caught.value.reason == reason


def test_a_bad_row_is_told_with_its_place_and_the_function(here, bytes_dir):
  rows = rows_of({'q': 'p', 'a': 'c'}, {'q': 'p'})
  tokenizer = load_tokenizer(bytes_dir)
  with pytest.raises(DataError) as caught:
    tokenize_rows(rows, 'own_render:pair', tokenizer, 99)
  assert str(caught.value) == (
    'bad rows: 1 row (1 x own_render:pair raised KeyError), first: a.jsonl:2'
    " ('a' at own_render.py:4); mend them, or leave them out with"
    ' --config.data.on_bad_row=skip'
  )
  assert caught.value.exit_code == 3
  with pytest.raises(
    DataError, match=r"no column 'a'.*a\.jsonl:2 \(columns: 'q'\)"
  ):
    tokenize_rows(rows, '{q}{|}{a}', tokenizer, 99)


def test_the_same_text_has_the_same_fingerprint(here, bytes_dir):
  """However it is made; and another text, or another half, another one."""
  rows = rows_of({'q': 'p', 'a': 'c', 'prompt': 'p', 'completion': 'c'})
  tokenizer = load_tokenizer(bytes_dir)

  def fingerprint(template):
    return tokenize_rows(rows, template, tokenizer, 99).fingerprint

  same = ['{q}{|}{a}', 'own_render:pair', 'own_render:as_dict']
  expected = fingerprint('prompt_completion')
  assert [fingerprint(name) for name in same] == [expected] * 3
  others = ['{q} {|}{a}', '{q}{|} {a}', '{q}{|}{a}.', '{|}{q}{a}']
  assert len({expected, *map(fingerprint, others)}) == 5


@pytest.mark.parametrize('template', ['{q}{|}{a}', 'own.module:f', 'alpaca'])
def test_the_configuration_takes_them(template):
  mapping = config.defaults()
  mapping['model']['path'] = mapping['data']['path'] = 'x'
  mapping['data']['template'] = template
  assert config.from_mapping(mapping).data.template == template
