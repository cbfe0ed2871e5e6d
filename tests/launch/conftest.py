"""Services on PATH that write down their calls and answer by a script."""

import os

import pytest

from tests.launch.standins import STAND_IN


@pytest.fixture
def service(tmp_path, monkeypatch):
  """A folder of stand-ins; the function adds answers, one a call each."""
  (tmp_path / 'answers').mkdir()
  (tmp_path / 'bin').mkdir()
  (tmp_path / 'calls').touch()
  for name in ('gcloud', 'kubectl', 'sleep'):
    program = tmp_path / 'bin' / name
    program.write_text(STAND_IN)
    program.chmod(0o755)
  monkeypatch.setenv('FAKES', str(tmp_path))
  monkeypatch.setenv('PATH', f'{tmp_path / "bin"}:{os.environ["PATH"]}')
  monkeypatch.setenv('LOG', str(tmp_path / 'log'))

  def answers(*pairs):
    for number, (pattern, code) in enumerate(pairs):
      path = tmp_path / 'answers' / f'{number:03}'
      path.write_text(f'{pattern}\n{code}\n')

  return answers
