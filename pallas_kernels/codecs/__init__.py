"""Codecs: how a tensor is stored, byte by byte."""

from .base import Codec as Codec
from .base import Parts as Parts
from .cast import Cast as Cast
from .check import validate as validate
from .fp8 import Fp8 as Fp8
from .grouped import GroupCodec as GroupCodec
from .grouped import Params as Params
from .integer import Int as Int
from .mx import Mx as Mx
from .nf4 import NF4 as NF4
from .nvfp4 import Nvfp4 as Nvfp4
from .packed import Packed as Packed
from .packed import fold as fold
from .packed import pack as pack
from .packing import pack_bits as pack_bits
from .packing import packed_bytes as packed_bytes
from .packing import unpack_bits as unpack_bits
from .table import get as get
from .table import names as names
from .view import LayoutError as LayoutError
from .view import View as View
from .view import storage_view as storage_view
