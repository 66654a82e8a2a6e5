"""What the Mosaic GPU kernels share: fragments of WGMMA made from packed codes, and small loads and stores.

Every function takes `interpret`: inside the interpreter the registers' code has a plain jnp stand-in.
"""

from .channels import expand_channels as expand_channels
from .channels import permute_channels as permute_channels
from .device import is_here as is_here
from .fragments import Plan as Plan
from .fragments import expand as expand
from .fragments import expand_in_order as expand_in_order
from .fragments import load_in_order as load_in_order
from .fragments import offset_of as offset_of
from .fragments import plan_of as plan_of
from .fragments import refusal as refusal
from .fragments import terms_of as terms_of
from .layout import AHEAD as AHEAD
from .layout import ROWS as ROWS
from .layout import WGMMA as WGMMA
from .layout import is_whole as is_whole
from .layout import load_ahead as load_ahead
from .layout import load_columns as load_columns
from .layout import load_table as load_table
from .layout import mma as mma
from .layout import permute_columns as permute_columns
from .layout import pick as pick
from .layout import scale_rows as scale_rows
from .layout import settled as settled
from .layout import store_transposed as store_transposed
from .layout import sync as sync
from .layout import tiled as tiled
from .lookup import fill_lookup as fill_lookup
from .lookup import lookup_bytes as lookup_bytes
from .lookup import lookup_scratch as lookup_scratch
from .nibbles import expand_nibbles as expand_nibbles
from .queries import stage_rows as stage_rows
from .ring import Ring as Ring
from .ring import ring_barriers as ring_barriers
from .ring import tile_of as tile_of
from .softmax import add_rows as add_rows
from .softmax import column as column
from .softmax import column_sums as column_sums
from .softmax import hand_over as hand_over
from .softmax import hide as hide
from .softmax import hide_unset as hide_unset
from .softmax import in_rows as in_rows
from .softmax import spread_max as spread_max
from .softmax import store_columns as store_columns
from .softmax import store_scores as store_scores
from .softmax import store_weights as store_weights
from .softmax import taken as taken
from .softmax import weigh as weigh
from .softmax import words as words
from .staged import stage_transposed as stage_transposed
from .transposed import expand_transposed as expand_transposed
from .transposed import spread_scales as spread_scales
from .whole_bytes import load_bytes as load_bytes
from .whole_bytes import scale_sums as scale_sums
