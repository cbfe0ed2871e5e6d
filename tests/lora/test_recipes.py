"""docs/library.md runs from top to bottom, and its recipes compute the truth.

References: finite differences, a Python loop in place of `vmap`, and merged
weights in place of bound ones.
"""

import doctest
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax_train import lora
from lorax_train.lora import algebra

PAGE = Path(__file__).parents[2] / 'docs' / 'library.md'


def code_of(text):
  """The page with all but its blocks of Python blanked, line for line."""
  kept, inside = [], False
  for line in text.splitlines():
    fence = line.startswith('```')
    inside = line == '```python' if fence else inside
    kept.append(line if inside and not fence else '')
  return '\n'.join(kept) + '\n'


@pytest.fixture(scope='module')
def page():
  """The names that the page's code leaves behind; its results hold."""
  text = PAGE.read_text('utf-8')
  test = doctest.DocTestParser().get_doctest(
    code_of(text), {}, PAGE.name, str(PAGE), 0
  )
  assert len(test.examples) > 40
  report = []
  runner = doctest.DocTestRunner(verbose=False)
  runner.run(test, out=report.append, clear_globs=False)
  assert not report, ''.join(report)
  return test.globs


def close(got, want, **tolerance):
  tolerance = {'rtol': 1e-4, 'atol': 1e-5, **tolerance}
  jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, **tolerance), got,
               want)  # fmt: skip


def merged_loss(page, trainable, x, y):
  return page['loss'](lora.merge(page['frozen'], trainable), x, y)


pytestmark = pytest.mark.compat


def test_a_strangers_model(page):
  frozen, trainable = page['halves']
  moved = jax.tree.map(lambda x: x + 0.1, trainable)
  x = page['tokens_BTD']

  def adapted(trainable):
    return jnp.sum(jnp.sin(page['adapted'](frozen, trainable, x)))

  def merged(trainable):
    return jnp.sum(jnp.sin(page['apply'](lora.merge(frozen, trainable), x)))

  got, want = (jax.value_and_grad(f)(moved) for f in (adapted, merged))
  close(got, want)
  with pytest.raises(lora.LowRankError, match='query'):
    sine = lora.transform(lambda w: jnp.sin(w['query']['kernel']))
    sine(frozen, trainable)


def test_every_block_of_the_page_is_run(page):
  text = PAGE.read_text('utf-8')
  assert text.count('```python') * 2 == text.count('```')
  assert code_of(text).count('>>>') == text.count('>>>')


def test_training_follows_the_gradient_of_the_merged_weights(page):
  slow = page['start']
  for _ in range(100):
    grads = jax.grad(merged_loss, 1)(page, slow, page['x'], page['y'])
    slow = jax.tree.map(lambda w, g: w - 0.1 * g, slow, grads)
  close(page['trainable'], slow, rtol=1e-2, atol=1e-3)


def test_merged_weights_are_the_formula(page):
  for name, w in page['params'].items():
    half = page['trainable'][name]
    want = np.float64(w) + 2.0 * np.float64(half.a).T @ np.float64(half.b)
    np.testing.assert_allclose(page['merged'][name], want, atol=1e-5)


def test_gradients_of_each_example_are_those_of_a_loop(page):
  for i in range(8):
    want = jax.grad(merged_loss, 1)(
      page, page['trainable'], page['x'][i], page['y'][i]
    )
    close(jax.tree.map(lambda g: g[i], page['per_example']), want)  # noqa: B023


def test_the_hessian_times_a_vector_is_a_difference_of_gradients(page):
  step = 1e-2
  there, back = (
    jax.grad(merged_loss, 1)(
      page,
      jax.tree.map(lambda w: w + sign * step * w, page['trainable']),  # noqa: B023
      page['x'],
      page['y'],
    )
    for sign in (1, -1)
  )
  want = jax.tree.map(lambda p, m: (p - m) / (2 * step), there, back)
  close(page['hessian_vector'], want, rtol=1e-2, atol=1e-3)


def test_the_gradient_reaches_the_hypernetwork(page):
  step = 1e-2
  for i, j in ((0, 0), (1, 3), (2, 7)):
    there, back = (
      merged_loss(
        page,
        page['hyper'](
          page['theta'].at[i, j].add(sign * step), page['condition']
        ),
        page['x'],
        page['y'],
      )
      for sign in (1, -1)
    )
    want = (there - back) / (2 * step)
    np.testing.assert_allclose(
      page['d_theta'][i, j], want, rtol=0.02, atol=1e-4
    )


def test_many_runs_are_those_of_a_loop(page):
  for i, (seed, rate) in enumerate(
    zip(page['seeds'], page['rates'], strict=True)
  ):
    _, one = lora.split(seed, page['params'], page['spec'])
    for _ in range(20):
      one = page['sgd'](one, rate)
    close(jax.tree.map(lambda x: x[i], page['runs']), one)  # noqa: B023


def delta(page, update, name):
  merged = lora.merge(*algebra.as_adapter(page['frozen'], update))
  return np.float64(merged[name]) - np.float64(page['params'][name])


def test_vectors_add_as_merged_weights_do(page):
  svd = algebra.svd([page['one'], page['two']], (0.5, 2.0), rank=3)
  for name in page['params']:
    one, two, both, low = (
      delta(page, u, name)
      for u in (page['one'], page['two'], page['both'], svd)
    )
    np.testing.assert_allclose(both, 0.5 * one + 2.0 * two, atol=1e-5)
    left, values, right = np.linalg.svd(0.5 * one + 2.0 * two, False)
    want = (left[:, :3] * values[:3]) @ right[:3]
    np.testing.assert_allclose(low, want, atol=1e-5)


def answers_merged(page):
  for update in (page['one'], page['two'], page['both']):
    params = lora.merge(*algebra.as_adapter(page['frozen'], update))
    yield np.asarray(page['model'](params, page['x']))


def test_switching_gives_the_merged_answers(page):
  for got, want in zip(page['answers'], answers_merged(page), strict=True):
    np.testing.assert_allclose(got, want, atol=1e-5)
  first, second, third = page['answers']
  assert not np.allclose(first, second)
  assert not np.allclose(second, third)


def test_each_example_is_answered_by_its_own_adapter(page):
  answers = list(answers_merged(page))
  for i, index in enumerate(page['index']):
    got = page['rows'][i, 0]
    np.testing.assert_allclose(got, answers[int(index)][i], atol=1e-5)
  assert jnp.unique(page['index']).size == 3


def test_a_wrong_result_on_the_page_would_be_found():
  text = 'words\n\n```python\n>>> 1 + 1\n3\n```\n'
  test = doctest.DocTestParser().get_doctest(code_of(text), {}, 'p', 'p', 0)
  report = []
  doctest.DocTestRunner(verbose=False).run(test, out=report.append)
  assert 'Got:\n    2' in ''.join(report)
