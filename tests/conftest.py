"""What every test starts from: JAX on four virtual CPU devices, hypothesis without deadlines.

Set STOWAX_TEST_PLATFORM (`cuda`, `tpu`) to run on another platform.
"""

import os

PLATFORM = os.environ.get("STOWAX_TEST_PLATFORM", "cpu")
DEVICE_COUNT = 4

FLAGS = {"xla_force_host_platform_device_count": DEVICE_COUNT}
if PLATFORM == "cpu":
    FLAGS["xla_backend_optimization_level"] = (
        0  # programs run once or twice: compiling takes longer
    )

# Both before jax reads them: XLA_FLAGS when the backend starts, JAX_PLATFORMS when jax is imported.
os.environ["JAX_PLATFORMS"] = PLATFORM
given = os.environ.get("XLA_FLAGS", "")
added = [f"--{flag}={value}" for flag, value in FLAGS.items() if flag not in given]
os.environ["XLA_FLAGS"] = " ".join([given, *added]).strip()

import functools  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

# A pytest plugin may have imported jax before this file ran.
jax.config.update("jax_platforms", PLATFORM)

# The same examples on every run of CI, new ones on a laptop.
hypothesis.settings.register_profile("laptop", deadline=None, max_examples=30)
hypothesis.settings.register_profile("ci", deadline=None, max_examples=30, derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "laptop")


@pytest.fixture(scope="session")
def run_apart():
    """Runs code in a process of its own, with other XLA flags than tests have (none: XLA optimizes)."""

    def run(code: str, xla_flags: str = "", cwd: str | None = None) -> None:
        env = os.environ | {"XLA_FLAGS": xla_flags}
        subprocess.run([sys.executable, "-c", code], env=env, cwd=cwd, check=True, timeout=600)

    return run


@pytest.fixture(scope="session")
def load_once():
    """`stowax.models.load`, which keeps what it loaded."""
    from stowax import models

    return functools.cache(models.load)
