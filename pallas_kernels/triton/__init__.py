"""What the small kernels share: Pallas' Triton backend, for programs that XLA would cut into dozens of kernels.

Such a kernel is a few microseconds of arithmetic on a few kilobytes; it runs on every NVIDIA GPU. The backend is
deprecated in jax 0.11 and its code is in no exported program (its form is not stable); where it is missing, XLA's path
is taken and says so.
"""

from .call import barrier as barrier
from .call import call as call
from .call import load as load
from .call import lowering as lowering
from .call import refusal as refusal
from .call import store as store
from .traced import Traced as Traced
