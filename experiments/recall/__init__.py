"""Long-context recall in small: tasks, a model trained on them, and its accuracy under any cache.

  config, params, functions = recall.load()
  scores = recall.score_all(functions.step, params, functions.init_cache, length=256)

`train` made the weights in ``experiments/data/recall.safetensors``.
"""

from .model import Recall as Recall
from .model import load as load
from .model import save as save
from .scoring import Score as Score
from .scoring import score as score
from .scoring import score_all as score_all
from .tasks import TASKS as TASKS
from .tasks import Example as Example
from .tasks import batch as batch
