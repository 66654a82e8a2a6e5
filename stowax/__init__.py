"""stowax: JAX models in less memory."""

from stowax import memory_planner as memory_planner
from stowax import models as models
from stowax import pallas_kernels as pallas_kernels
from stowax import transforms as transforms
from stowax.pallas_kernels import codecs as codecs
from stowax.pallas_kernels.codecs import Packed as Packed
from stowax.transforms import Transformed as Transformed
from stowax.transforms import chain as chain
from stowax.transforms import clip_search as clip_search
from stowax.transforms import flax as flax
from stowax.transforms import gptq as gptq
from stowax.transforms import hqq as hqq
from stowax.transforms import import_blocks as import_blocks
from stowax.transforms import quantize as quantize
from stowax.transforms import rounding as rounding
from stowax.transforms import show as show
