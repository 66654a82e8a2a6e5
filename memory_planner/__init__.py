"""The memory planner: numbers about buffers."""

from .cost import op_seconds as op_seconds
from .cost import seconds as seconds
from .devices import Device as Device
from .devices import device as device
from .graph import Block as Block
from .graph import Graph as Graph
from .graph import Op as Op
from .graph import Value as Value
from .graph import trace as trace
from .report import MemoryReport as MemoryReport
from .report import format_bytes as format_bytes
from .report import memory_report as memory_report
from .report import tree_nbytes as tree_nbytes
