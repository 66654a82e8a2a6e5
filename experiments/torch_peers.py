"""torch's own kernels, timed as `kernel_timing` times ours: by the profiler, over operands in turn.

Run in a process of its own, before JAX takes the GPU's memory: `rows` starts it.

  python -m stowax.experiments.torch_peers matmul 4096,14336,1 4096,14336,16
  python -m stowax.experiments.torch_peers attention 1,32768,32,8,128
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from . import kernel_timing

GROUP = 128  # of tinygemm's int4
ITERATIONS = 3


def rows(kind: str, cases: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
    """What torch takes.

    Args:
      kind: "matmul", whose cases are (K, N, M), or "attention": (batch, tokens, query heads, heads, elements).

    Returns:
      For each case and kernel `case`, `spec`, `nbytes` of its weights or cache, and `us` or the `refusal` of torch.
    """
    if importlib.util.find_spec("torch") is None:
        raise ValueError(
            "--torch: torch is not installed; install it (it is no dependency), or pass --notorch"
        )
    command = [sys.executable, "-m", __spec__.name, kind, *(",".join(map(str, c)) for c in cases)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise RuntimeError(
            f"--torch: `{' '.join(command[1:])}` failed; see above, or pass --notorch"
        )
    return json.loads(done.stdout.splitlines()[-1])


def matmul(torch: Any, k: int, n: int, m: int) -> Iterator[dict[str, Any]]:
    """cuBLAS in bf16, and tinygemm's int4 with groups of 128 along K."""
    x = _normal(torch, m, k)
    dense = lambda: _normal(torch, n, k)
    yield _row(torch, "torch-bf16", [lambda w: x @ w.T], dense, 2 * k * n)

    def packed() -> Any:
        codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device="cuda")
        scales = 0.02 * torch.rand(k // GROUP, n, 2, dtype=torch.bfloat16, device="cuda")
        return torch.ops.aten._convert_weight_to_int4pack(codes, 8), scales  # 8: its widest tiles

    tinygemm = lambda w: torch.ops.aten._weight_int4pack_mm(x, w[0], GROUP, w[1])
    yield _row(torch, "torch-int4", [tinygemm], packed, k * n // 2 + 4 * k * n // GROUP)


def attention(torch: Any, b: int, s: int, n: int, k: int, h: int) -> Iterator[dict[str, Any]]:
    """`scaled_dot_product_attention` of one new token in bf16: the faster of two ways to share heads."""
    from torch.nn.attention import SDPBackend, sdpa_kernel  # pyright: ignore

    q = _normal(torch, b, n, 1, h)
    as_tokens = q.reshape(b, k, n // k, h)  # without a mask, the queries of a head are its tokens
    attend = torch.nn.functional.scaled_dot_product_attention
    forms = [lambda kv: attend(q, *kv, enable_gqa=True), lambda kv: attend(as_tokens, *kv)]
    cache = lambda: (_normal(torch, b, k, s, h), _normal(torch, b, k, s, h))
    for name, backend in [
        ("flash", SDPBackend.FLASH_ATTENTION),
        ("cudnn", SDPBackend.CUDNN_ATTENTION),
    ]:
        with sdpa_kernel(backend):
            yield _row(torch, f"torch-{name}", forms, cache, 4 * b * k * s * h)


def _normal(torch: Any, *shape: int) -> Any:
    return torch.randn(*shape, dtype=torch.bfloat16, device="cuda")


def _row(
    torch: Any, spec: str, forms: Sequence[Any], make: Callable[[], Any], nbytes: int
) -> dict[str, Any]:
    """The fastest of `forms`; or why torch runs none of them."""
    sets = [make() for _ in range(kernel_timing.copies(nbytes))]
    times, refusals = [], []
    for form in forms:
        try:
            times.append(_kernel_us(torch, form, sets))
        except RuntimeError as error:
            refusals.append(str(error).splitlines()[0])
    return {
        "spec": spec,
        "nbytes": nbytes,
        **({"us": min(times)} if times else {"refusal": refusals[0]}),
    }


def _kernel_us(torch: Any, f: Callable[[Any], Any], sets: Sequence[Any]) -> float:
    """Microseconds on the device of ``f(s)``: for each of its kernels the median over `sets`, added up."""
    for s in sets:
        f(s)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(ITERATIONS):
            for s in sets:
                f(s)
        torch.cuda.synchronize()
    kernels: dict[str, list[float]] = {}
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            kernels.setdefault(event.name, []).append(event.time_range.elapsed_us())
    if not kernels:
        raise RuntimeError("torch's profiler saw no kernel")
    calls = ITERATIONS * len(sets)
    return sum(len(times) / calls * statistics.median(times) for times in kernels.values())


def main(kind: str, *cases: str) -> None:
    import torch  # pyright: ignore

    found = []
    for case in (tuple(map(int, c.split(","))) for c in cases):
        for row in {"matmul": matmul, "attention": attention}[kind](torch, *case):
            found.append({"case": case, **row, "torch": torch.__version__})
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
