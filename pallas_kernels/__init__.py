"""Functions on arrays: codecs and low-bit kernels."""

from . import codecs as codecs
from .append import Kept as Kept
from .append import append as append
from .append import append_kernel as append_kernel
from .decode_attention import FullRows as FullRows
from .decode_attention import Rows as Rows
from .decode_attention import attention_kernel as attention_kernel
from .decode_attention import decode_attention as decode_attention
from .decode_attention import pack_rows as pack_rows
from .matmul import kernel_name as kernel_name
from .matmul import matmul as matmul
from .prefill_attention import prefill_attention as prefill_attention
from .prefill_attention import prefill_kernel as prefill_kernel
from .prefill_attention import prefill_refusal as prefill_refusal
