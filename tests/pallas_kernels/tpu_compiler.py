"""What the real TPU compiler says of kernels, in a process of its own: libtpu may be loaded once in each."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest

needs_it = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, the TPU compiler, is not installed"
)

SCRIPT = """
import functools, json, sys
from stowax.experiments import tpu_estimates
tpu_estimates.prepare()
import jax, jax.numpy as jnp
{case}
def attempt(*case):
    try:
        compile_it(*case)
    except Exception as error:
        return f"{{type(error).__name__}}: {{error}}"[:500]
    return ""

print(json.dumps([attempt(*case) for case in json.loads(sys.argv[1])]))
"""


def errors(case: str, cases: Sequence[Any]) -> dict[str, str]:
    """The cases that the compiler does not take, and why. A crash of it fails the test.

    Args:
      case: source that defines ``compile_it(*case)``; it may use functools, jax, jnp and `tpu_estimates`.
    """
    command = [sys.executable, "-c", SCRIPT.format(case=case), json.dumps(cases)]
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    return {str(case): error for case, error in zip(cases, found) if error}
