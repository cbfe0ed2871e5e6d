"""The rank that an adapter uses: the singular values of its update.

s B A has the shape of a weight but at most r singular values that are not 0,
so it is never formed. With the QR decompositions B = Q P and A^T = U R,

    s B A = Q (s P R^T) U^T,

and Q and U have orthonormal columns: the values are those of s P R^T, r x r.

Axis letters: R rank, I in, O out.
"""

from typing import Any

import numpy as np


def singular_values(
  a_RI: np.ndarray, b_RO: np.ndarray, scale: float
) -> np.ndarray:
  """Singular values of scale B A, the largest first, float64 [min(R, I, O)].

  Args:
    a_RI: A.
    b_RO: B, transposed.
    scale: s.

  >>> a, b = np.array([[3.0, 4.0]]), np.array([[0.0, 2.0, 0.0]])
  >>> singular_values(a, b, scale=0.5).tolist()
  [5.0]
  """
  left, right = (
    np.linalg.qr(x_RN.T.astype(np.float64)).R for x_RN in (b_RO, a_RI)
  )
  with np.errstate(over='ignore'):  # a scale may be whatever JSON can hold
    return abs(scale) * np.linalg.svdvals(left @ right.T)


def summary(values: np.ndarray) -> dict[str, Any]:
  """What the singular values of an update say of the rank it uses.

  Args:
    values: from `singular_values`, finite.

  Returns:
    largest, smallest: of the values.
    norm: Frobenius norm of the update.
    rank_90, rank_99: how many values hold 90 and 99 % of the squared norm.
    effective_rank: exp of the entropy of the values over their sum (Roy and
      Vetterli 2007): n where n values are equal and the rest 0.
    An update of nothing has rank 0 by each of these.

  >>> [summary(np.array([2.0, 2.0, 0.0]))[k] for k in ('rank_90', 'rank_99')]
  [2, 2]
  >>> round(summary(np.array([2.0, 2.0, 0.0]))['effective_rank'], 6)
  2.0
  """
  largest = float(values.max(initial=0.0))
  if largest == 0:
    ranks: dict[str, Any] = {'rank_90': 0, 'rank_99': 0, 'effective_rank': 0.0}
    return {'largest': 0.0, 'smallest': 0.0, 'norm': 0.0, **ranks}
  relative = values / largest  # their squares can't leave the range of floats
  held = np.cumsum(relative**2)
  p = relative / relative.sum()
  p = p[p > 0]
  return {
    'largest': largest,
    'smallest': float(values[-1]),
    'norm': largest * float(np.sqrt(held[-1])),
    'rank_90': 1 + int((held < 0.90 * held[-1]).sum()),
    'rank_99': 1 + int((held < 0.99 * held[-1]).sum()),
    'effective_rank': float(np.exp(-np.sum(p * np.log(p)))),
  }
