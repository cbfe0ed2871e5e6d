"""Rows of the hub: a real HTTP server here that `datasets` is pointed at."""

import json
import textwrap

import pytest

from tests import hub
from tests.hub import SHA

HUB_ROWS = b'{"text": "one"}\n{"text": "two"}\n'


class Hub(hub.Handler):
  """As much of the hub's API as it takes to serve `own/set`."""

  def response(self):
    folder = '/api/datasets/own/set'
    status, headers, body = 404, {'X-Error-Code': 'EntryNotFound'}, b'{}'
    if '/gated' in self.path:
      status, headers = 403, {'X-Error-Code': 'GatedRepo'}
    elif '/nobody' in self.path:
      headers = {'X-Error-Code': 'RepoNotFound'}
    elif '/broken' in self.path:
      status = 500
    elif self.path.startswith(f'{folder}/tree/{SHA}?'):
      entry = {'type': 'file', 'path': 'data.jsonl', 'oid': 'b' * 40}
      status = 200
      body = json.dumps([entry | {'size': len(HUB_ROWS)}]).encode()
    elif self.path in (folder, f'{folder}/revision/{SHA}'):
      files = [{'rfilename': 'data.jsonl'}]
      status = 200
      body = json.dumps({'id': 'own/set', 'sha': SHA, 'siblings': files})
      body = body.encode()
    elif self.path == f'/datasets/own/set/resolve/{SHA}/data.jsonl':
      status, headers, body = 200, {'ETag': f'"{"b" * 40}"'}, HUB_ROWS
    return status, headers, body


def ask_hub(endpoint, home, *asked, **environment):
  """`read_rows` of each (name, split), in a process of its own."""
  code = textwrap.dedent("""
    import json, sys, time
    import datasets
    from lorax_train.data.source import read_rows
    before = datasets.config.HF_HUB_OFFLINE
    out = []
    for name, split in json.loads(sys.argv[1]):
      begin = time.monotonic()
      try:
        answer = read_rows(name, split)
      except ValueError as error:
        answer = f'{type(error).__name__}: {error}'
      out.append([answer, time.monotonic() - begin])
      assert datasets.config.HF_HUB_OFFLINE == before
    print(json.dumps(out))
  """)
  return hub.ask(code, endpoint, home, json.dumps(asked), **environment)


@pytest.mark.slow
def test_parts_of_a_split_are_its_rows(tmp_path):
  """A slice of a table has the files of all of it, which are not its rows."""
  one, two = {'text': 'one'}, {'text': 'two'}
  asked = {
    'train[1:]': [two],
    'train[:1]': [one],
    'train[1:]+train[:1]': [two, one],
    'train+train': [one, two, one, two],
    'train': [one, two],
  }
  with hub.serving(Hub) as endpoint:
    answers = ask_hub(endpoint, tmp_path, *(('own/set', s) for s in asked))
    kept = ask_hub(
      endpoint,
      tmp_path,
      ('own/set', 'train'),
      HF_DATASETS_IN_MEMORY_MAX_SIZE='1000000',
    )
  for (split, rows), (answer, _) in zip(asked.items(), answers, strict=True):
    places = [f'own/set[{split}] row {n + 1}' for n in range(len(rows))]
    assert answer == [list(row) for row in zip(rows, places, strict=True)]
  assert kept[0][0] == answers[-1][0]


REMEDY = '; pass a local file as --config.data.path'


def refusal(place, cause):
  return (
    f'DataError: {place}: not to be had from the Hugging Face hub ({cause})'
    + REMEDY
  )


def test_the_hub(tmp_path):
  rows = [
    [{'text': 'one'}, 'own/set[train] row 1'],
    [{'text': 'two'}, 'own/set[train] row 2'],
  ]
  with hub.serving(Hub) as endpoint:
    online = ask_hub(
      endpoint,
      tmp_path,
      ('own/set', 'train'),
      ('own/gated', 'train'),
      ('own/nobody', 'train'),
      ('own/broken', 'train'),
      ('own/set', 'test'),
    )
  assert [answer for answer, _ in online] == [
    rows,
    refusal(
      'own/gated[train]',
      'gated: accept its terms on the hub and log in with `hf auth login`',
    ),
    refusal(
      'own/nobody[train]',
      'no such data set, or a private one: check its name',
    ),
    refusal('own/broken[train]', 'HTTP 500'),
    refusal(
      'own/set[test]',
      'ValueError: Unknown split "test". Should be one of [\'train\'].',
    ),
  ]
  # Nothing listens there any more: the cache answers, or nobody, and soon.
  gone, none = ask_hub(
    endpoint, tmp_path, ('own/set', 'train'), ('own/other', 'train')
  )
  assert gone[0] == rows
  assert none[0] == refusal(
    'own/other[train]', 'ConnectError: [Errno 111] Connection refused'
  )
  assert none[1] < 8  # 23 s with the hub's own retries
  cached, absent = ask_hub(
    endpoint,
    tmp_path,
    ('own/set', 'train'),
    ('own/other', 'train'),
    HF_HUB_OFFLINE='1',
  )
  assert cached[0] == rows
  assert absent[0] == refusal(
    'own/other[train]', 'HF_HUB_OFFLINE is set and the cache does not hold it'
  )
