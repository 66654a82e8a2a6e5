"""How the codes and group parameters of one weight are decided."""

from .base import Solved as Solved
from .base import Solver as Solver
from .clip import ClipSearch as ClipSearch
from .clip import clip_search as clip_search
from .gptq import GPTQ as GPTQ
from .gptq import gptq as gptq
from .hqq import HQQ as HQQ
from .hqq import hqq as hqq
from .rounding import Rounding as Rounding
from .rounding import rounding as rounding
from .storage import solve_storage as solve_storage
from .table import get as get
