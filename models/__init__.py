"""Plain Flax models, loaders, tokenizer and generation; knows nothing of transforms."""

from .generation import Generated as Generated
from .generation import Sampling as Sampling
from .generation import generate as generate
from .llama import Llama as Llama
from .llama import LlamaConfig as LlamaConfig
from .llama import functions as functions
from .llama import init_params as init_params
from .llama import params_of as params_of
from .loader import Model as Model
from .loader import find_smollm2 as find_smollm2
from .loader import load as load
from .scoring import perplexity as perplexity
from .tokenizer import Tokenizer as Tokenizer
from .weights import Block as Block
