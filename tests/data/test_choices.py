"""Rows of choices, from columns to ids and batches.

Reference: what stands in the tables, written by hand; ids of a tokenizer of
three letters and one merge, 'ab' (a 3, b 4, c 5, ab 6; BOS 1, EOS 2).
"""

import numpy as np
import pytest

from lorax_train.data import prepare, sequences
from lorax_train.data.encoded import Sizes
from lorax_train.data.joined import Joined
from lorax_train.data.problems import RowError
from lorax_train.data.template import template_named
from lorax_train.data.tokenize import load_tokenizer
from lorax_train.data.tokenized import tokenize_rows
from lorax_train.errors import ConfigError, DataError

from .toys import ABC_CONFIG, abc_tokenizer, lists, rows_of, write_tokenizer

_ = -100
CHOICE = {'prompt': 'p', 'choices': [' a', ' b', ' c'], 'answer': 1}
SST2 = '{text:strip} It was{|} {label:0=bad, 1=good}'


@pytest.fixture
def abc(tmp_path):
  folder = write_tokenizer(
    tmp_path / 'abc', abc_tokenizer(), tokenizer_config=ABC_CONFIG
  )
  return load_tokenizer(folder)


# --- from columns to texts


@pytest.mark.parametrize(
  'template, row, expected',
  [
    ('choice', CHOICE, ('p', (' a', ' b', ' c'), 1)),
    ('choice', CHOICE | {'answer': ' c'}, ('p', (' a', ' b', ' c'), 2)),
    ('choice', {**CHOICE, 'choices': (' a', ' b')}, ('p', (' a', ' b'), 1)),
    (SST2, {'text': ' So. ', 'label': '1'}, ('So. It was', (' bad', ' good'), 1)),
    (SST2, {'text': 'So.', 'label': 0}, ('So. It was', (' bad', ' good'), 0)),
    ('{q}?{|}{a:yes,no}', {'q': 'q', 'a': 'no'}, ('q?', ('yes', 'no'), 1)),
    ('{q}{|} {a:true=Yes,false=No}.', {'q': 'q', 'a': False}, ('q', (' Yes.', ' No.'), 1)),
    # Another column behind {|} belongs to each of them.
    ('{q}{|}{a:1=x,2=y,3=z} {q}', {'q': 'q', 'a': 3}, ('q', ('x q', 'y q', 'z q'), 2)),
  ],
)  # fmt: skip
def test_texts_to_choose_from(template, row, expected):
  assert template_named(template)(row) == expected


@pytest.mark.parametrize(
  'template, row, reason',
  [
    ('choice', {'prompt': 'p', 'choices': ['a', 'b']}, "no column 'answer'"),
    ('choice', CHOICE | {'choices': 'ab'}, "'choices' is str, not a list of texts"),
    ('choice', CHOICE | {'choices': ['a']}, 'fewer than two choices'),
    ('choice', CHOICE | {'choices': ['a', 3]}, 'a choice is int, not a string'),
    ('choice', CHOICE | {'choices': ['a', ' ']}, 'empty choice'),
    ('choice', CHOICE | {'choices': ['a', 'b', 'a']}, 'two choices are alike'),
    ('choice', CHOICE | {'answer': 3}, "'answer' is out of range"),
    ('choice', CHOICE | {'answer': -1}, "'answer' is out of range"),
    ('choice', CHOICE | {'answer': True}, "'answer' is bool, neither a number nor a choice"),
    ('choice', CHOICE | {'answer': 'a'}, "'answer' is no choice"),
    (SST2, {'text': 'a', 'label': '2'}, "column 'label' has a value that is not listed"),
    (SST2, {'text': 'a', 'label': None}, "column 'label' has a value that is not listed"),
    (SST2, {'text': 'a', 'label': 1.0}, "column 'label' has a value that is not listed"),
    ('{q}{|}{a:x=w,y=w}', {'q': 'a', 'a': 'x'}, 'two choices are alike'),
  ],
)  # fmt: skip
def test_rows_without_a_choice(template, row, reason):
  with pytest.raises(RowError) as caught:
    template_named(template)(row)
  assert caught.value.reason == reason


@pytest.mark.parametrize(
  'template, message',
  [
    ('{q:0=a,1=b}{|}{a}', 'choices stand before {|}; they are learned'),
    ('{q}{|}{a:0=a,1=b}{q:x,y}', 'two columns list choices; one may'),
    ('{q}{|}{a:0=a,1=}', "'1=' in '0=a,1=' is not VALUE=WORD"),
    ('{q}{|}{a:0=a,=b}', "'=b' in '0=a,=b' is not VALUE=WORD"),
    ('{q}{|}{a:0=a,0=b}', "'0' stands twice in '0=a,0=b'"),
    ('{q}{|:0=a,1=b}{a}', "':0=a,1=b' behind column '|'; only its name may stand there, :strip, or what to choose from, {label:0=bad,1=good}"),
    ('{q}{|}{a:0=a}', "':0=a' behind column 'a'; only its name may stand there, :strip, or what to choose from, {label:0=bad,1=good}"),
  ],
)  # fmt: skip
def test_lists_of_choices_that_are_none(template, message):
  with pytest.raises(DataError) as caught:
    template_named(template)
  assert str(caught.value) == f'data.template={template!r}: {message}'


def test_a_function_may_give_choices(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'ours_to_choose.py').write_text(
    'def render(row):\n'
    "  return {'prompt': row['q'], 'choices': ['a', 'b'], 'answer': row['n']}\n"
  )
  render = template_named('ours_to_choose:render')
  assert render({'q': 'c', 'n': 1}) == ('c', ('a', 'b'), 1)
  with pytest.raises(RowError, match='out of range'):
    render({'q': 'c', 'n': 2})


# --- from texts to ids


def made(tokenizer, *rows, template='choice', length=20, **options):
  return tokenize_rows(rows_of(*rows), template, tokenizer, length, **options)


def choice(prompt, *texts, answer=0):
  return {'prompt': prompt, 'choices': list(texts), 'answer': answer}


def test_the_right_one_stands_first(abc):
  tokenized = made(abc, choice('ca', 'c', 'bb', 'acc', answer=2), choice('c', 'a', 'b'))  # fmt: skip
  first, second = lists(tokenized)
  # 'ca' and 'bb' share the token 'ab': for all of them the prompt is 'c'.
  assert first == (
    [1, 5, 3, 3, 5, 5, 1, 5, 3, 5, 1, 5, 6, 4],
    [_, _, 3, 3, 5, 5, _, _, 3, 5, _, _, 6, 4],
  )
  assert second == ([1, 5, 3, 1, 5, 4], [_, _, 3, _, _, 4])
  report = tokenized.report
  assert report.sizes == Sizes(choices=3, length=6, choice=4)
  assert (report.merged_boundary, report.tokens, report.target_tokens) == (1, 20, 10)  # fmt: skip
  assert (report + report).sizes == report.sizes
  assert '20 tokens (10 of choices)' in report.summary()


def test_a_batch_holds_every_choice_and_fills_up(abc):
  tokenized = made(abc, choice('c', 'a', 'bb', 'cc', answer=1), choice('cc', 'b', 'c'))  # fmt: skip
  batch = sequences.take(tokenized, [1, -1, 0], tokenized.report.sizes, 5, 9)
  none = [9] * 5
  expected = {
    'ids': [
      [[1, 5, 5, 4, 9], [1, 5, 5, 5, 9], none],
      [none] * 3,
      [[1, 5, 4, 4, 9], [1, 5, 3, 9, 9], [1, 5, 5, 5, 9]],
    ],
    'targets': [
      [[4, _], [5, _], [_, _]],
      [[_, _]] * 3,
      [[4, 4], [3, _], [5, 5]],
    ],
    'begins': [[3, 3, 1], [1, 1, 1], [2, 2, 2]],
  }
  for name, shape in sequences.shapes(tokenized.report.sizes, 5).items():
    assert batch[name].dtype == np.int32
    assert batch[name].shape == (3, *shape)
    assert batch[name].tolist() == expected[name]
  with pytest.raises(ValueError, match='row 0 has 4 tokens, the batch 3'):
    sequences.take(tokenized, [0], tokenized.report.sizes, 3, 9)


def test_choices_of_one_token_share_a_sequence(abc):
  tokenized = made(abc, choice('c', 'a', 'b', answer=1), choice('cc', 'b', 'a'))
  sizes = tokenized.report.sizes
  assert sizes == Sizes(choices=2, length=4, choice=1)
  batch = sequences.take(tokenized, [1, -1, 0], sizes, 4, 9)
  assert batch['ids'].tolist() == [[[1, 5, 5, 9]], [[9] * 4], [[1, 5, 9, 9]]]
  assert batch['targets'].tolist() == [[[4], [3]], [[_], [_]], [[4], [3]]]
  assert batch['begins'].tolist() == [[3, 3], [1, 1], [2, 2]]
  for name, shape in sequences.shapes(sizes, 4).items():
    assert batch[name].shape == (3, *shape)


def test_the_right_ones_alone(abc):
  rows = choice('c', 'a', 'bb', answer=1), choice('cc', 'b', 'c')
  both = Joined([made(abc, row) for row in rows])
  right = sequences.Right(both)
  assert right.lengths.tolist() == [4, 4]
  assert [right.ids[i].tolist() for i in range(2)] == [[1, 5, 4, 4], [1, 5, 5, 4]]  # fmt: skip
  assert [right.labels[i].tolist() for i in range(2)] == [[_, _, 4, 4], [_, _, _, 4]]  # fmt: skip
  assert sequences.longest(both, np.array([1, 0])).tolist() == [4, 4]
  assert both.report.sizes == Sizes(2, 4, 2)


@pytest.mark.parametrize(
  'rows, options, message',
  [
    # <unk> is all that the tokenizer makes of x and y.
    ([choice('c', 'x', 'y')], {}, 'two choices have the same tokens'),
    ([choice('c', 'a', 'b'), {'prompt': 'c', 'choices': ['a', 'b'], 'answer': 2}],
     {}, "bad rows: 1 row (1 x 'answer' is out of range), first: a.jsonl:2 (2 of 2); mend"),
    ([choice('c', 'a', 'bbb')], {'length': 4}, 'dropped 1 row (1 x longer than 4 tokens), first: a.jsonl:1 (5 tokens)'),
    ([choice('c', 'a', 'bbb')], {'length': 4, 'truncation': 'error'}, 'over-long rows: 1 row'),
    ([choice('c', 'a', 'bbb')], {'length': 3, 'truncation': 'left'}, 'choice longer than 3 tokens'),
  ],
)  # fmt: skip
def test_rows_that_can_not_be_chosen_from(abc, rows, options, message):
  with pytest.raises(DataError) as caught:
    made(abc, *rows, **options)
  assert message in str(caught.value)


def test_a_prompt_loses_its_front_for_all_alike(abc):
  tokenized = made(abc, choice('cbca', 'c', 'cc'), length=5, truncation='left')
  assert lists(tokenized) == [([1, 5, 3, 5, 1, 5, 3, 5, 5], [_, _, _, 5, _, _, _, 5, 5])]  # fmt: skip
  assert tokenized.report.truncated == 1
  with pytest.raises(ConfigError, match='choices are compared whole'):
    made(abc, choice('cbca', 'c', 'cc'), length=5, truncation='right')


def test_choices_are_in_all_rows_or_none(tmp_path, monkeypatch, abc):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'some_to_choose.py').write_text(
    'def render(row):\n'
    "  return row if 'answer' in row else (row['prompt'], 'b')\n"
  )
  with pytest.raises(DataError, match='1 of 2 rows have choices'):
    made(abc, choice('c', 'a', 'b'), {'prompt': 'c'}, template='some_to_choose:render')  # fmt: skip


def test_without_bos_something_must_precede(tmp_path):
  config = {'eos_token': '</s>', 'add_bos_token': False}
  folder = write_tokenizer(
    tmp_path / 'no_bos', abc_tokenizer(), tokenizer_config=config
  )
  tokenizer = load_tokenizer(folder)
  with pytest.raises(DataError, match='empty prompt'):
    made(tokenizer, choice('', 'a', 'b'))
  assert lists(made(tokenizer, choice('c', 'a', 'b')))[0][0] == [5, 3, 5, 4]


def test_choices_come_out_of_the_cache_alike(tmp_path, abc):
  path = tmp_path / 'rows.tsv'
  path.write_text('text\tlabel\nc \t1\ncc\t0\n')
  template = '{text:strip}{|}{label:0=a,1=bb}'
  twice = [
    prepare.prepare(str(path), template, abc, prepare.Options(20))
    for _ in range(2)
  ]
  assert twice[0].report == twice[1].report
  assert twice[0].report.sizes == Sizes(2, 5, 2)
  assert lists(twice[0]) == lists(twice[1])
  assert twice[0].fingerprint == twice[1].fingerprint
