"""The memory planner: numbers about buffers."""

from .packing import Buffer as Buffer
from .packing import CapacityBounds as CapacityBounds
from .packing import PackingError as PackingError
from .packing import PackingTimeout as PackingTimeout
from .packing import min_capacity as min_capacity
from .packing import pack as pack
from .report import MemoryReport as MemoryReport
from .report import format_bytes as format_bytes
from .report import memory_report as memory_report
from .report import tree_nbytes as tree_nbytes
