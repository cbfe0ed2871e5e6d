"""What a process does before and after the run.

Reference: the rule of who keeps compiled programs where, as docs/pods.md has
it. Exit codes of several processes are in test_hosts.
"""

import os

import jax
import pytest

from lorax_train.train import start


@pytest.fixture
def cache_dir():
  """jax's setting, as it was before."""
  name = 'jax_compilation_cache_dir'
  before = jax.config.values[name]
  jax.config.update(name, None)
  yield lambda: jax.config.values[name]
  jax.config.update(name, before)


@pytest.mark.parametrize(
  ('platform', 'chosen', 'kept'),
  [
    ('cpu', None, None),
    ('gpu', None, 'caches/lorax_train/compiled'),
    ('tpu', None, 'caches/lorax_train/compiled'),
    ('tpu', 'mine', 'mine'),
    ('gpu', '', ''),  # switched off by the user
  ],
)
def test_accelerators_keep_what_was_compiled(
  platform, chosen, kept, cache_dir, monkeypatch
):
  monkeypatch.setattr(jax, 'default_backend', lambda: platform)
  monkeypatch.setenv('XDG_CACHE_HOME', 'caches')
  jax.config.update('jax_compilation_cache_dir', chosen)
  start.keep_compiled()
  assert cache_dir() == kept


def test_without_xdg_it_is_below_home(cache_dir, monkeypatch, tmp_path):
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  monkeypatch.delenv('XDG_CACHE_HOME')
  monkeypatch.setenv('HOME', str(tmp_path))
  start.keep_compiled()
  assert cache_dir() == f'{tmp_path}/.cache/lorax_train/compiled'


@pytest.mark.parametrize(
  ('given', 'taken'),
  [
    ({}, {'XLA_CLIENT_MEM_FRACTION': '0.92'}),
    ({'XLA_CLIENT_MEM_FRACTION': '0.5'}, {'XLA_CLIENT_MEM_FRACTION': '0.5'}),
    # jaxlib refuses both at once.
    (
      {'XLA_PYTHON_CLIENT_MEM_FRACTION': '0.5'},
      {'XLA_PYTHON_CLIENT_MEM_FRACTION': '0.5'},
    ),
  ],
)
def test_a_run_takes_nearly_all_of_a_gpu(given, taken, monkeypatch):
  for name in start.SHARES:
    monkeypatch.delenv(name, raising=False)
    if name in given:
      monkeypatch.setenv(name, given[name])
  start.take_memory()
  assert {n: os.environ[n] for n in start.SHARES if n in os.environ} == taken
  monkeypatch.delenv(start.SHARES[0], raising=False)
