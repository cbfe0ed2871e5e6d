"""From a path to tokenised rows, by way of the cache."""

import contextlib
import dataclasses
import itertools
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

from lorax_train.data import (
  cache,
  plain,
  source,
  stream,
  template,
  tokenize,
  tokenized,
)
from lorax_train.data.encoded import in_parts
from lorax_train.data.tokenized import TokenizedSet

# Rows on which two tokenizer files of a model must agree before training; fewer
# of long ones.
_PREFLIGHT_ROWS = 200


@dataclasses.dataclass(frozen=True)
class Options:
  """What a run wants of its rows; see `tokenized.tokenize_rows`, `plain`."""

  max_length: int
  truncation: str = 'drop'
  on_bad_row: str = 'error'
  cache: bool = True
  separator: str = plain.SEPARATOR


def cache_root() -> Path:
  """Where tokenised rows are kept: among the user's caches."""
  caches = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
  return Path(caches) / 'lorax_train' / 'rows'


def prepare(
  path: str,
  template_name: str,
  tokenizer: tokenize.Tokenizer | None,
  options: Options,
) -> TokenizedSet:
  """The rows of a path as ids and labels.

  They come out of the cache where they were made before, of the same bytes,
  template, tokenizer, options and code. What a function of the user's makes is
  made each time: nobody knows what else it reads.

  Args:
    path: see `source.files_of`.
    template_name: see `template.template_named`, or `tokens`.
    tokenizer: may be None for `tokens`.
    options: how long rows may be, what becomes of others, and whether to use
      the cache.

  Raises:
    DataError: see `source` and `tokenize_rows`.
    ModelError: the tokenizer's files disagree on these rows.
    OSError: disk full.
  """
  files = source.files_of(path)
  # The key is of what the files are now: of others nothing may be kept.
  found = [stream.check(file) for file in files]

  def make(folder: Path) -> TokenizedSet:
    with contextlib.ExitStack() as stack:
      for file, state in zip(files, found, strict=True):
        stack.enter_context(stream.unchanged(file, state))
      return tokenise(folder)

  def tokenise(folder: Path) -> TokenizedSet:
    rows = source.iter_rows(files, options.separator)
    first = next(in_parts(rows, _PREFLIGHT_ROWS), [])
    if not first:
      raise source.no_rows(path)
    if tokenizer is not None:
      texts = tokenized.rendered_texts(first, template_name, len(first))
      tokenize.check_same_ids(tokenizer.files[0].parent, texts)
    with Progress(path) as progress:
      return tokenized.tokenize_rows(
        itertools.chain(first, rows),
        template_name,
        tokenizer,
        options.max_length,
        options.truncation,
        options.on_bad_row,
        folder=folder,
        progress=progress,
      )

  if not options.cache or template.is_function(template_name):
    return cache.make_unkept(make)
  made_of = {
    'files': source.fingerprint(files),
    'template': template_name,
    'tokenizer': tokenizer
    and [
      tokenizer.fingerprint,
      # some of them may be named in the model's config.json alone
      tokenizer.bos_id,
      tokenizer.eos_id,
      dict(tokenizer.names),
    ],
    'options': dataclasses.astuple(options),
  }
  return cache.tokenized_once(cache_root(), made_of, make, _say)


def _say(text: str) -> None:
  print(text, file=sys.stderr, flush=True)


class Progress:
  """How far tokenising is, on stderr: a live line, or one now and then.

  Of what is done within a second, nothing is said.
  """

  def __init__(
    self,
    path: str,
    out: IO[str] | None = None,
    clock: Callable[[], float] = time.monotonic,
  ):
    """Nothing is said yet."""
    self._path, self._out, self._clock = path, out or sys.stderr, clock
    self._live = self._out.isatty()
    self._every = 0.5 if self._live else 30.0
    self._began = clock()
    self._next = self._began + max(self._every, 1.0)
    self._shown = ''

  def __enter__(self) -> 'Progress':
    return self

  def __call__(self, rows: int, tokens: int) -> None:
    """So many rows and tokens are done."""
    now = self._clock()
    if now < self._next:
      return
    self._next = now + self._every
    speed = tokens / (now - self._began)
    text = f'{rows:,} rows, {tokens:,} tokens, {speed:,.0f} tokens/s'
    self._show(f'tokenising {self._path}: ', text)

  def __exit__(self, *error: object) -> None:
    if self._live and self._shown:
      self._show('', '')

  def _show(self, what: str, how_far: str) -> None:
    text = what + how_far
    if self._live:
      # A line that the terminal breaks can't be written over.
      room = _columns(self._out) - 1
      text = text if len(text) <= room else how_far[:room]
      # What was there goes away, for the lines that follow.
      padded = f'{text:<{len(self._shown)}}'
      self._out.write(f'\r{padded}' if text else f'\r{padded}\r')
    else:
      self._out.write(text + '\n')
    self._shown = text
    self._out.flush()


def _columns(terminal: IO[str]) -> int:
  try:
    # Of a terminal that does not know, 0.
    return os.get_terminal_size(terminal.fileno()).columns or 80
  except (OSError, ValueError):
    return 80
