"""What a user calls a model: a directory, a GGUF file, a repo of the hub.

References: the files themselves; a server that answers as the hub does.
"""

import json
import pathlib
import textwrap
from collections.abc import Mapping

import numpy as np
import pytest
from safetensors.numpy import load_file

from lorax_train.formats import find
from tests import hub
from tests.hub import SHA
from tests.toys import write_model

from .refusals import refusal
from .test_gguf import DIMS, write_gguf


def test_a_directory_is_found_without_a_network(tiny_model, monkeypatch):
  assert find.find_model(str(tiny_model)) == tiny_model
  monkeypatch.setenv('HOME', str(tiny_model.parent))
  assert find.find_model('~/model') == tiny_model
  monkeypatch.chdir(tiny_model.parent)
  assert find.find_model('model').samefile(tiny_model)


# Path -> words of the message; {} is a directory that exists.
@pytest.mark.parametrize(('path', 'words'), [
  ('{}/config.json', 'is a file'),
  ('{}/absent', 'no such directory'),
  ('./absent', 'no such directory'),
  ('~/absent-model', 'no such directory'),
  ('absent', 'no such directory'),
  ('a/b/c', 'no such directory'),
  ('{}/absent.gguf', 'no such file'),
  ('own/absent.gguf', 'no such file'),
  ('https://huggingface.co/mistralai/Mistral-7B-v0.1', 'no such directory'),
])  # fmt: skip
def test_paths_that_are_no_model(path, words, tiny_model):
  path = path.format(tiny_model)
  message = refusal(find.find_model, path)
  assert message.startswith(f'model {path}: {words}; give a ')


class Hub(hub.Handler):
  """As much of the hub's API as it takes to serve `own/model`."""

  files: Mapping[str, bytes] = {}

  def response(self):
    status, headers, body = 404, {'X-Error-Code': 'RepoNotFound'}, b'{}'
    path = self.path.partition('?')[0]
    name = path.removeprefix(f'/own/model/resolve/{SHA}/')
    if '/gated' in path:
      status, headers = 403, {'X-Error-Code': 'GatedRepo'}
    elif name in self.files:
      status, headers = 200, {'ETag': f'"{name}"'}
      body = self.files[name]
    elif path == f'/api/models/own/model/tree/{SHA}':
      listing = [
        {'type': 'file', 'path': n, 'size': len(b), 'oid': 'b' * 40}
        for n, b in self.files.items()
      ]
      status, headers, body = 200, {}, json.dumps(listing).encode()
    elif path.startswith('/api/models/own/model'):
      siblings = [{'rfilename': n} for n in self.files]
      info = {'id': 'own/model', 'sha': SHA, 'siblings': siblings}
      status, headers, body = 200, {}, json.dumps(info).encode()
    return status, headers, body


def ask_hub(endpoint, home, *repos, offline='0'):
  """What `find_model` says of each repo, and in how long, in a process apart."""
  code = textwrap.dedent("""
    import json, sys, time
    from lorax_train.errors import ModelError
    from lorax_train.formats import find
    out = []
    for repo in sys.argv[1:]:
      begin = time.monotonic()
      try:
        answer = str(find.find_model(repo))
      except ModelError as error:
        answer = f'ModelError: {error}'
      out.append([answer, time.monotonic() - begin])
    print(json.dumps(out))
  """)
  return hub.ask(code, endpoint, home, *repos, HF_HUB_OFFLINE=offline)


def test_the_hub(tiny_model, tmp_path, monkeypatch):
  wanted = {p.name: p.read_bytes() for p in tiny_model.iterdir()}
  others = ('README.md', 'pytorch_model.bin', 'consolidated.safetensors')
  monkeypatch.setattr(Hub, 'files', {**wanted, **dict.fromkeys(others, b'x')})
  home = tmp_path / 'home'
  with hub.serving(Hub) as endpoint:
    (found, _), (gated, _), (nobody, _), (odd, _) = ask_hub(
      endpoint, home, 'own/model', 'own/gated', 'own/nobody', 'no body/model'
    )
  # Only what we read is fetched.
  files = {p.name: p.read_bytes() for p in pathlib.Path(found).iterdir()}
  assert files == wanted
  for answer, repo, words in (
    (gated, 'own/gated', '(GatedRepoError); accept its terms at the hub'),
    (nobody, 'own/nobody', '(RepositoryNotFoundError); '),
    (odd, 'no body/model', '(HFValidationError); '),
  ):
    assert f'model {repo}: cannot be had from the hub {words}' in answer

  # Nothing listens any more, or nothing may be asked: the cache answers, or an
  # error does, and soon.
  for offline in '01':
    (kept, _), (none, seconds) = ask_hub(
      endpoint, home, 'own/model', 'own/other', offline=offline
    )
    assert kept == found
    assert none.startswith(
      'ModelError: model own/other: cannot be had from the hub ('
    )
    assert none.endswith('; give a local directory')
    assert seconds < 5


@pytest.fixture
def gguf_file(tmp_path, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  model = write_model(tmp_path / 'model', tokenizer=False, **DIMS)
  tensors = load_file(model / 'model.safetensors')
  return write_gguf(tmp_path / 'My Model.GGUF', tensors)


def test_a_gguf_file_is_converted_once_into_the_cache(gguf_file, tmp_path):
  made = find.find_model(str(gguf_file))
  assert made.parent == tmp_path / 'cache' / 'lorax_train' / 'gguf'
  assert made.name.startswith('My Model-')
  want = load_file(tmp_path / 'model' / 'model.safetensors')
  got = load_file(made / 'model.safetensors')
  assert got.keys() == want.keys()
  for name in want:
    np.testing.assert_array_equal(got[name], want[name], name)
  times = {p: p.stat().st_mtime_ns for p in made.iterdir()}
  moved = gguf_file.rename(tmp_path / 'My Model.gguf')
  assert find.find_model(str(moved)) == made
  assert {p: p.stat().st_mtime_ns for p in made.iterdir()} == times


def test_other_contents_under_the_same_name_are_another_model(gguf_file):
  made = find.find_model(str(gguf_file))
  model = made.parent / 'other'
  write_model(model, seed=1, tokenizer=False, **DIMS)
  write_gguf(gguf_file, load_file(model / 'model.safetensors'))
  assert find.find_model(str(gguf_file)) != made


def test_a_damaged_file_leaves_nothing_in_the_cache(gguf_file, tmp_path):
  data = gguf_file.read_bytes()
  gguf_file.write_bytes(data[: len(data) // 2])
  assert str(gguf_file) in refusal(find.find_model, str(gguf_file))
  assert not list(tmp_path.glob('cache/**/*.safetensors'))
