"""What every test starts from: JAX on four virtual CPU devices, hypothesis without deadlines.

Set STOWAX_TEST_PLATFORM (`cuda`, `tpu`) to run on another platform.
"""

import os

PLATFORM = os.environ.get("STOWAX_TEST_PLATFORM", "cpu")
DEVICE_COUNT = 4

# Both before jax reads them: XLA_FLAGS when the backend starts, JAX_PLATFORMS when jax is imported.
os.environ["JAX_PLATFORMS"] = PLATFORM
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (
        f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICE_COUNT}"
    ).strip()

import hypothesis  # noqa: E402
import jax  # noqa: E402

# A pytest plugin may have imported jax before this file ran.
jax.config.update("jax_platforms", PLATFORM)

# The same examples on every run of CI, new ones on a laptop.
hypothesis.settings.register_profile("laptop", deadline=None, max_examples=30)
hypothesis.settings.register_profile("ci", deadline=None, max_examples=30, derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "laptop")
