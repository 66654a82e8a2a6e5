"""The rewriting core: a function as a program, and rules that rewrite it."""

from . import compute as compute
from . import control as control
from . import layout as layout
from .interpret import Interpreter as Interpreter
from .interpret import Recorder as Recorder
from .interpret import Use as Use
from .program import Program as Program
from .program import is_packed as is_packed
from .program import named_leaves as named_leaves
from .program import path_string as path_string
from .program import replace_leaves as replace_leaves
from .program import trace as trace
