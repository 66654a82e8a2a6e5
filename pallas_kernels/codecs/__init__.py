"""Codecs: how a tensor is stored, byte by byte."""

from .base import Codec as Codec
from .base import Parts as Parts
from .cast import Cast as Cast
from .check import validate as validate
from .grouped import GroupCodec as GroupCodec
from .grouped import Params as Params
from .integer import Int as Int
from .packing import pack_bits as pack_bits
from .packing import packed_bytes as packed_bytes
from .packing import unpack_bits as unpack_bits
from .table import get as get
from .table import names as names
