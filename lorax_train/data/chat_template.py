"""The chat template of a model, rendered in a process of its own.

jinja_worker.py says why, and what is bounded there: CPU time of a row, memory
of the process, size of a text. The process is started by exec, not by forking
this one, which can hang once jax has threads.
"""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from lorax_train.data.problems import RowError, one_line, shorten
from lorax_train.errors import ModelError

# -P: the worker's folder has a tokenize.py, as the standard library has.
_WORKER = ['-P', str(Path(__file__).with_name('jinja_worker.py'))]


class Rendered(NamedTuple):
  """A conversation as text.

  Attributes:
    text: all of it.
    spans: [begin, end) of what the assistant wrote, in characters.
    marked: whether `{% generation %}` told so.
  """

  text: str
  spans: list[tuple[int, int]]
  marked: bool


class ChatTemplate:
  """A template that is ready; a context manager, since a process is behind it.

  Args:
    source: the template.
    names: what else it may read: {'bos_token': '<s>'}.
    where: what it is called in messages.

  Raises:
    ModelError: it is no template.
  """

  def __init__(self, source: str, names: Mapping[str, str], where: str):
    self._where = where
    self._process = subprocess.Popen(
      [sys.executable, *_WORKER],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.DEVNULL,
    )
    try:
      self._ask({'template': source, 'names': dict(names)})
    except BaseException:
      self.close()
      raise

  def render(
    self, messages: list[dict[str, Any]], tools: list[Any] | None
  ) -> Rendered:
    """A conversation as text, and what of it is the assistant's.

    Raises:
      RowError: the template does not take this conversation.
      ModelError: the template fails whatever the conversation, or goes beyond
        its limits.
    """
    answer = self._ask({'messages': messages, 'tools': tools})
    spans = [(begin, end) for begin, end in answer['spans']]
    return Rendered(answer['text'], spans, answer['marked'])

  def close(self) -> None:
    """Ends the process."""
    self._process.kill()
    self._process.communicate()

  def __enter__(self) -> 'ChatTemplate':
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    traceback: TracebackType | None,
  ) -> None:
    self.close()

  def _ended(self) -> ModelError:
    """Why the process is no more: its limits, or nothing can run as it does."""
    status = self._process.wait()
    idle = subprocess.run(
      [sys.executable, *_WORKER],
      stdin=subprocess.DEVNULL,
      capture_output=True,
      check=False,
    )
    if idle.returncode:
      said = idle.stderr.decode('utf-8', 'replace').strip().rpartition('\n')[2]
      return ModelError(
        f'{self._where}: {sys.executable} can not run what renders it'
        f' ({shorten(one_line(said), 120)}); mend its jinja2, or what stands in'
        ' PYTHONPATH'
      )
    return ModelError(
      f'{self._where}: rendering it ended the process it ran in (exit status'
      f' {status}): it takes too long or too much memory; use the template of'
      ' a model you trust'
    )

  def _ask(self, asked: dict[str, Any]) -> dict[str, Any]:
    data = json.dumps(asked).encode()
    assert self._process.stdin and self._process.stdout
    try:
      self._process.stdin.write(len(data).to_bytes(8, 'little') + data)
      self._process.stdin.flush()
      head = self._process.stdout.read(8)
      body = self._process.stdout.read(int.from_bytes(head, 'little'))
    except BrokenPipeError:
      head = body = b''
    if not body:
      raise self._ended()
    answer = json.loads(body)
    if 'error' not in answer:
      return answer
    message = shorten(one_line(answer['error']), 200)
    if answer['kind'] == 'row':
      raise RowError('the chat template does not take it', message)
    if answer['kind'] == 'growing':
      raise RowError(
        'the chat template rewrites what came before when a message is added,'
        ' so what the assistant wrote can not be told (mark it in the template'
        ' with {% generation %}, or name a format such as mistral_v3)',
        message,
      )
    raise ModelError(
      f'{self._where}: {message}; mend it, or put another chat_template.jinja'
      ' there'
    )
