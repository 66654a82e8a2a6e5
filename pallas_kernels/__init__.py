"""Functions on arrays: codecs and low-bit kernels."""

from . import codecs as codecs
