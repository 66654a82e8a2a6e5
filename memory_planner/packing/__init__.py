"""Offset allocation: where in memory each buffer lies."""

from .buffers import Buffer as Buffer
from .explain import PackingError as PackingError
from .explain import PackingTimeout as PackingTimeout
from .io import read_buffers as read_buffers
from .solve import CapacityBounds as CapacityBounds
from .solve import Packing as Packing
from .solve import find_packing as find_packing
from .solve import min_capacity as min_capacity
from .solve import pack as pack
from .validate import validate as validate
