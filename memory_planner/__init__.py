"""The memory planner: numbers about buffers."""

from .report import MemoryReport as MemoryReport
from .report import format_bytes as format_bytes
from .report import memory_report as memory_report
from .report import tree_nbytes as tree_nbytes
