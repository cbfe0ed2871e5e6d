"""Frozen weights stored small behind `x @ w`: NF4 and int8.

from lorax_train import quant

q = quant.quantise(matrix_OI)       # numpy, bitsandbytes' own layout
w = quant.nf4.from_bitsandbytes(q)  # [in, out], for devices
x @ w, w.dequantised()
"""

from lorax_train.quant import int8, nf4
from lorax_train.quant.base import QuantWeight
from lorax_train.quant.blockwise import Quantised, quantise
from lorax_train.quant.int8 import Int8Weight
from lorax_train.quant.nf4 import Nf4Weight

__all__ = [
  'Int8Weight',
  'Nf4Weight',
  'QuantWeight',
  'Quantised',
  'int8',
  'nf4',
  'quantise',
]
