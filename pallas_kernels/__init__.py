"""Functions on arrays: codecs and low-bit kernels."""

from . import codecs as codecs
from .matmul import kernel_name as kernel_name
from .matmul import matmul as matmul
