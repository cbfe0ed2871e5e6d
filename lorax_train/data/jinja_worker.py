"""A program of its own that renders one chat template, under limits.

A chat template comes with a model, from anywhere. jinja2's sandbox keeps it
from reaching Python; nothing in it keeps `'a' * 10**10`, `10**10**10` or nested
loops from taking all memory or for ever, in C code that no Python thread can
interrupt. The operating system can: it bounds a process. `chat_template.py`
starts this file as one and talks to it in frames of JSON on stdin and stdout:

    {'template', 'names'}              -> {} or {'error', 'template'}
    {'messages', 'tools', 'spans'}     -> {'text', 'spans'} or {'error', kind}

It imports nothing of the package, so that it starts quickly.
"""

import contextlib
import json
import resource
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

# Of the template and of each row; 2 more for code that can't be interrupted.
CPU_SECONDS = 5
MEMORY = 2 * 2**30  # address space of the process
# A template may write more than it is given by this much.
OUTPUT = 2**20, 16

# What stands around a learned stretch until it is found again: two of the 32
# code points that Unicode keeps free of characters, not used in the row.
_NONCHARACTERS = [chr(c) for c in range(0xFDD0, 0xFDF0)]

Json = dict[str, Any]


class Refused(Exception):
  """What becomes the answer: `kind` says whose fault it is."""

  def __init__(self, kind: str, message: str):
    super().__init__(message)
    self.kind = kind


class _Generation(jinja2.ext.Extension):
  """`{% generation %}`: the text that the assistant writes.

  The tag is transformers'; here its text is put between `begin` and `end`.
  """

  tags = {'generation'}  # noqa: RUF012
  begin = end = ''

  def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
    lineno = next(parser.stream).lineno
    body = parser.parse_statements(('name:endgeneration',), drop_needle=True)
    call = self.call_method('_marked')
    return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(lineno)

  def _marked(self, caller: Any) -> str:
    return f'{self.begin}{caller()}{self.end}'


def _tojson(
  value: Any,
  ensure_ascii: bool = False,
  indent: int | None = None,
  separators: tuple[str, str] | None = None,
  sort_keys: bool = False,
) -> str:
  # jinja2's own escapes HTML.
  return json.dumps(
    value,
    ensure_ascii=ensure_ascii,
    indent=indent,
    separators=separators,
    sort_keys=sort_keys,
  )


def _raise(message: str) -> None:
  raise Refused('row', f'the template says: {message}')


class Template:
  """A compiled chat template.

  The environment is that of transformers but for `strftime_now`: what it writes
  would be another text tomorrow. Llama's templates ask whether it is there and
  write a fixed date where it is not.
  """

  def __init__(self, source: str, names: Mapping[str, str]):
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
      trim_blocks=True,
      lstrip_blocks=True,
      extensions=[_Generation, jinja2.ext.loopcontrols],
    )
    environment.filters['tojson'] = _tojson
    environment.globals['raise_exception'] = _raise
    try:
      self._template = environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
      raise Refused('template', f'line {error.lineno}: {error}') from error
    self._names = names
    self._mark: Any = environment.extensions[_Generation.identifier]
    tree = environment.parse(source)
    self._marks = any(
      node.identifier == _Generation.identifier
      for node in tree.find_all(jinja2.nodes.ExtensionAttribute)
    )

  def answer(self, asked: Json) -> Json:
    """The text of a conversation, and what of it the assistant wrote."""
    messages, tools = asked['messages'], asked['tools']
    budget = OUTPUT[0] + OUTPUT[1] * len(json.dumps(asked))

    def render(messages: Sequence[Json], prompt: bool = False) -> str:
      return self._render(messages, tools, prompt, budget)

    if self._marks:
      return self._between_marks(render(messages), asked, render)
    return {'text': (text := render(messages)), 'marked': False} | {
      'spans': _by_growing(text, messages, render)
    }

  def _between_marks(self, text: str, asked: Json, render: Any) -> Json:
    used = json.dumps(asked, ensure_ascii=False) + text
    free = [c for c in _NONCHARACTERS if c not in used]
    if len(free) < 2:
      raise Refused('row', 'all 32 noncharacters U+FDD0 ... are in use')
    self._mark.begin, self._mark.end = free[:2]
    try:
      marked = render(asked['messages'])
    finally:
      self._mark.begin = self._mark.end = ''
    spans: list[list[int]] = []
    n, depth, begin = 0, 0, 0
    for char in marked:
      if char == free[0]:
        begin = n if not depth else begin
        depth += 1
      elif char == free[1]:
        depth -= 1
        if not depth:
          spans.append([begin, n])
      else:
        n += 1
    if depth or ''.join(c for c in marked if c not in free[:2]) != text:
      raise Refused(
        'template', 'it does more to {% generation %} than write it'
      )
    return {'text': text, 'spans': spans, 'marked': True}

  def _render(
    self, messages: Sequence[Json], tools: Any, prompt: bool, budget: int
  ) -> str:
    parts: list[str] = []
    try:
      for part in self._template.generate(
        **self._names,
        messages=messages,
        tools=tools,
        documents=None,
        add_generation_prompt=prompt,
      ):
        parts.append(part)
        budget -= len(part)
        if budget < 0:
          raise Refused('template', 'it writes over 16 times what it is given')
    except jinja2.sandbox.SecurityError as error:
      raise Refused('template', f'it is not allowed: {error}') from error
    except jinja2.UndefinedError as error:
      if 'strftime_now' in str(error):
        raise Refused(
          'template',
          "it writes today's date (strftime_now), so the rows"
          ' would be others tomorrow; write a date into it',
        ) from error
      raise Refused('row', str(error)) from error
    except (MemoryError, RecursionError, TimeoutError, Refused):
      raise
    except Exception as error:  # whatever its filters and operators raise
      raise Refused('row', f'{type(error).__name__}: {error}') from error
    text = ''.join(parts)
    if not text.isascii() and any('\ud800' <= c <= '\udfff' for c in text):
      raise Refused('template', 'it writes a lone surrogate')
    return text


def _by_growing(
  text: str, messages: Sequence[Json], render: Any
) -> list[list[int]]:
  """What each assistant's message adds to the conversation before it."""
  spans = []
  for n, message in enumerate(messages):
    if message['role'] != 'assistant':
      continue
    before = render(messages[:n], True)
    last = n + 1 == len(messages)
    after = text if last else render(messages[: n + 1])
    if not (after.startswith(before) and text.startswith(after)):
      raise Refused('growing', f'message {n + 1}')
    spans.append([len(before), len(after)])
  return spans


def _read(stream: BinaryIO) -> Json | None:
  head = stream.read(8)
  if len(head) < 8:
    return None
  return json.loads(stream.read(int.from_bytes(head, 'little')))


def _write(stream: BinaryIO, answer: Json) -> None:
  data = json.dumps(answer).encode()
  stream.write(len(data).to_bytes(8, 'little') + data)
  stream.flush()


def _too_slow(*_: Any) -> None:
  raise TimeoutError


@contextlib.contextmanager
def _limits() -> Any:
  """CPU seconds of what happens inside, and what becomes of its errors.

  The first timer is Python's to see, the second ends the process: one for loops
  in a template, one for a single operation of C that does not come back.
  """
  signal.setitimer(signal.ITIMER_VIRTUAL, CPU_SECONDS)
  signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS + 2)
  try:
    yield
  except TimeoutError:
    raise Refused('template', f'over {CPU_SECONDS} s for one row') from None
  except MemoryError:
    raise Refused('template', 'over 2 GiB for one row') from None
  except RecursionError:
    raise Refused('template', 'nested too deep') from None
  finally:
    signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    signal.setitimer(signal.ITIMER_PROF, 0)


def main() -> None:
  """Answers until stdin ends."""
  with contextlib.suppress(OSError, ValueError):  # macOS has no such limit
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
  resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
  signal.signal(signal.SIGVTALRM, _too_slow)
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to handle
  template: Template | None = None
  while (asked := _read(sys.stdin.buffer)) is not None:
    answer: Json = {}
    try:
      with _limits():
        if template is None:
          template = Template(asked['template'], asked['names'])
        else:
          answer = template.answer(asked)
    except Refused as refused:
      answer = {'error': str(refused), 'kind': refused.kind}
    _write(sys.stdout.buffer, answer)


if __name__ == '__main__':
  main()
