"""The step that scripts/bench_cpu.py writes out in plain JAX, against ours.

Reference: that step, which has no code of lorax_train in it.
"""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).parents[1] / 'scripts' / 'bench_cpu.py'
SMALL = {'V': 80, 'D': 48, 'L': 3, 'N': 4, 'K': 2, 'H': 12, 'F': 72, 'T': 16}


@pytest.mark.slow
@pytest.mark.compat
@pytest.mark.parametrize('dtype, tolerance', [('float32', 1e-5), ('bfloat16', 2e-3)])  # fmt: skip
def test_ours_takes_the_steps_of_a_bare_one(dtype, tolerance):
  spec = importlib.util.spec_from_file_location('bench_cpu', SCRIPT)
  bench = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(bench)
  for name, size in SMALL.items():
    setattr(bench, name, size)
  bench.BLOCK = 4
  ours, bare = bench.ours(dtype), bench.bare(dtype)
  got = [ours() for _ in range(4)]
  np.testing.assert_allclose(got, [bare() for _ in range(4)], rtol=tolerance)
  assert got[-1] < got[0]
