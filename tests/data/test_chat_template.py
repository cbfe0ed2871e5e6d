"""A chat template is somebody else's program: what it can do to us is bounded.

Reference: the limits that jinja_worker.py states; transformers' renderer for
what its environment offers.
"""

import resource
import time

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from lorax_train.data import jinja_worker
from lorax_train.data.chat_template import ChatTemplate
from lorax_train.data.problems import RowError
from lorax_train.errors import ModelError

MESSAGES = [
  {'role': 'user', 'content': 'a <b> "ü" \n'},
  {'role': 'assistant', 'content': "it's"},
]
AROUND = '{% generation %}x{% endgeneration %}'


def render(source, messages=MESSAGES, tools=None, **names):
  with ChatTemplate(AROUND + source, names, 'm: chat template') as template:
    return template.render(messages, tools)


# Of time: loops, one operation of C; when compiled, when rendered.
SLOW = [
  '{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}',
  '{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}',
  '{{ 10**(10**10) }}',
  '{% set n = namespace(x=7) %}{% for i in range(99) %}{% set n.x = n.x**99 %}'
  '{% endfor %}',
]
# Of memory.
LARGE = [
  "{{ 'a' * 10**10 }}",
  '{% set x = messages[0].content * 10**10 %}',
  "{{ '%10000000000d' % 1 }}",
  "{{ 'a'.ljust(10**10) }}",
  '{{ [0] * 10**10 }}',
  "{% set n = namespace(x='ab') %}{% for i in range(99) %}"
  '{% set n.x = n.x ~ n.x %}{% endfor %}',
  '{{ messages | tojson(indent=10**10) }}',
  "{{ 'x' | center(10**10) }}",
]
# Of output, forbidden, or no template.
WRONG = [
  ("{% for i in range(99999) %}{{ 'a' * 99 }}{% endfor %}", 'over 16 times'),
  ("{{ ''.__class__.__mro__[1].__subclasses__() }}", 'not allowed'),
  ("{{ messages.append(1) }}", 'not allowed'),
  ("{{ range(10**12) }}", 'Range too big'),
  ('{% for m in messages %}', 'line 1'),
  ("{% include 'x' %}", 'no loader'),
  ('{{ strftime_now("%Y") }}', "today's date (strftime_now)"),
  ("{{ '\\ud800' }}", 'lone surrogate'),
  ('{% generation %}x', 'line 1'),
]  # fmt: skip


@pytest.mark.parametrize(
  'source',
  [
    SLOW[0],
    *(pytest.param(s, marks=pytest.mark.slow) for s in SLOW[1:]),
    *LARGE,
  ],
)
def test_a_bomb_ends_in_one_line(source):
  begin = time.monotonic()
  with pytest.raises((ModelError, RowError)) as caught:
    render(source)
  assert '\n' not in str(caught.value)
  # By the clock, on a machine that may be busy; the limit is of CPU time.
  assert time.monotonic() - begin < 60
  # Ours has grown by no such thing.
  assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 3 * 2**20


@pytest.mark.parametrize(('source', 'word'), WRONG)
def test_what_a_template_may_not(source, word):
  with pytest.raises((ModelError, RowError)) as caught:
    render(source)
  detail = getattr(caught.value, 'detail', '')
  assert word in f'{caught.value} {detail}'


def test_a_python_that_can_not_render_is_no_fault_of_the_template(
  tmp_path, monkeypatch
):
  (tmp_path / 'jinja2.py').write_text("raise RuntimeError('a shadow')")
  monkeypatch.setenv('PYTHONPATH', str(tmp_path))
  with pytest.raises(ModelError) as caught:
    render('')
  message = str(caught.value)
  assert 'RuntimeError: a shadow' in message and 'PYTHONPATH' in message
  assert 'too long' not in message


def test_the_process_has_its_limits_before_it_reads_a_template():
  assert jinja_worker.CPU_SECONDS <= 5
  assert jinja_worker.MEMORY <= 2 * 2**30


def test_a_date_where_there_is_no_today():
  source = (
    '{% if strftime_now is defined %}{{ strftime_now("%d") }}{% else %}'
    '26 Jul 2024{% endif %}'
  )
  assert render(source).text == 'x26 Jul 2024'


# What transformers' environment has.
SAME = [
  '{{ messages | tojson }}',
  '{{ messages | tojson(indent=2) }}{{ tools | tojson }}',
  '{%- for m in messages %}\n  {% if loop.first %}{% continue %}{% endif %}\n'
  '   {{ m.content | trim | upper }}\n{% endfor %}\n',
  '{% set n = namespace(x=1) %}{% for i in range(3) %}{% set n.x = n.x + i %}'
  '{% if i == 1 %}{% break %}{% endif %}{% endfor %}{{ n.x }}',
  '{% macro f(x) %}[{{ x }}]{% endmacro %}{{ f(bos_token) }}{{ nothing }}',
  '{{ messages[0]["content"].split("b")[1:] | list }}',
  '{{ add_generation_prompt }} {{ documents }} {{ dict(a=1) }}',
]


@pytest.mark.parametrize('source', SAME)
def test_the_environment_is_that_of_transformers(source):
  tools = [{'name': 'é'}]
  [want], _ = render_jinja_template(
    [MESSAGES], tools=tools, chat_template=AROUND + source, bos_token='<s>'
  )
  assert render(source, tools=tools, bos_token='<s>').text == want


# Marked text -> learned, by hand; and as transformers finds it.
MARKED = [
  ('', ['x']),
  ('a{% generation %}b{% endgeneration %}c', ['x', 'b']),
  ('{% for m in messages %}{% generation %}{{ m.role }}{% endgeneration %};'
   '{% endfor %}', ['x', 'user', 'assistant']),
  ('{%- generation -%} b  {%- endgeneration -%} c', ['x', 'b']),
  ('{% if false %}{% generation %}b{% endgeneration %}{% endif %}', ['x']),
]  # fmt: skip


@pytest.mark.parametrize(('source', 'want'), MARKED)
def test_generation_marks(source, want):
  got = render(source)
  assert [got.text[begin:end] for begin, end in got.spans] == want
  [text], [spans] = render_jinja_template(
    [MESSAGES],
    chat_template=AROUND + source,
    return_assistant_tokens_mask=True,
  )
  assert (got.text, got.spans) == (text, spans)


def test_marks_where_a_message_has_the_noncharacters():
  used = ''.join(chr(c) for c in range(0xFDD0, 0xFDEE))
  messages = [{'role': 'assistant', 'content': used}]
  source = '{% generation %}{{ messages[0].content }}{% endgeneration %}'
  got = render(source, messages)
  assert got.spans == [(0, 1), (1, 31)]
  messages[0]['content'] += '\ufdee'
  with pytest.raises(RowError) as caught:
    render(source, messages)
  assert 'noncharacters' in caught.value.detail


def test_a_row_that_fails_leaves_the_next_one_be():
  source = "{{ raise_exception('odd') if messages[1:] else 'fine' }}"
  with ChatTemplate(AROUND + source, {}, 'm') as template:
    for _ in range(3):
      with pytest.raises(RowError) as caught:
        template.render(MESSAGES, None)
      assert caught.value.detail == 'the template says: odd'
      assert template.render(MESSAGES[:1], None).text == 'xfine'
