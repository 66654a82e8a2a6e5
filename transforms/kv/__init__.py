"""KV caches: found in any program, and kept compressed."""

from .compress import CompressKV as CompressKV
from .compress import explain as explain
from .compress import guess as guess
from .compress import init as init
from .compress import run as run
from .find import Caches as Caches
from .merge import Merge as Merge
from .method import Method as Method
from .spec import Group as Group
from .spec import Site as Site
from .state import KVState as KVState
from .state import Moved as Moved
