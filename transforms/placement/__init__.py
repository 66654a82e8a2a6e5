"""What a program keeps, makes again, offloads or encodes, by a plan."""

from .baselines import BASELINES as BASELINES
from .offload import Offloaded as Offloaded
from .offload import offload as offload
from .plan import Kept as Kept
from .plan import Plan as Plan
from .planning import plan as plan
from .remat import remat as remat
