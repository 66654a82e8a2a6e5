"""Function transforms: low-bit weights in any JAX program."""

from . import flax as flax
from . import recipes as recipes
from . import solvers as solvers
from .chain import Chain as Chain
from .chain import chain as chain
from .compress_kv import compress_kv as compress_kv
from .explain import EncodeReport as EncodeReport
from .explain import Explanation as Explanation
from .imports import import_blocks as import_blocks
from .kv import KVState as KVState
from .kv import Method as Method
from .placement import Plan as Plan
from .placement import offload as offload
from .placement import plan as plan
from .placement import remat as remat
from .quantize import Quantize as Quantize
from .quantize import quantize as quantize
from .show import show as show
from .solvers import clip_search as clip_search
from .solvers import gptq as gptq
from .solvers import hqq as hqq
from .solvers import rounding as rounding
from .transform import Transform as Transform
from .transform import Transformed as Transformed
