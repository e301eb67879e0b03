"""Attention of PyTorch and of libraries on it, timed on the GPU: scaled_dot_product_attention by its flash and cuDNN
kernels, the flash kernel's own window, FlexAttention for sparse's pattern (a window and four globals),
flash-linear-attention's chunks.

`./nearfar bench --backend cuda` runs this by a Python that has torch, and reads its lines of JSON. What a version does
not have, or refuses, is a line with the reason.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

WINDOW, GLOBALS = 512, 4
SECONDS, SAMPLES = 0.08, (3, 15)  # for a point; its fewest and most samples
LONGEST = 2.0  # seconds: longer sequences are left out
Make = Callable[[Any, Any, Any], Callable[[], Any]]
Within = Callable[[], AbstractContextManager[Any]]


def sdpa(q: Any, k: Any, v: Any) -> Callable[[], Any]:
    return lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def window(q: Any, k: Any, v: Any) -> Callable[[], Any]:
    """The flash kernel with a window, which scaled_dot_product_attention does not pass on."""
    q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))  # [batch, token, head, dim]
    sides = {"window_size_left": WINDOW - 1, "window_size_right": 0}
    forward, n = torch.ops.aten._flash_attention_forward, q.shape[1]
    return lambda: forward(q, k, v, None, None, n, n, 0.0, False, False, **sides)


def flex(q: Any, k: Any, v: Any) -> Callable[[], Any]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def seen(_batch: Any, _head: Any, i: Any, j: Any) -> Any:
        return (i >= j) & ((i - j < WINDOW) | (j < GLOBALS) | (i < GLOBALS))

    torch.compiler.reset()  # or another length makes a kernel for all lengths, and the ninth runs without one
    mask = create_block_mask(seen, None, None, q.shape[2], k.shape[2], device="cuda", _compile=True)
    compiled = torch.compile(flex_attention)
    return lambda: compiled(q, k, v, block_mask=mask)


def chunks(q: Any, k: Any, v: Any) -> Callable[[], Any]:
    from fla.ops.linear_attn import chunk_linear_attn  # [batch, token, head, dim]

    q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    return lambda: chunk_linear_attn(q, k, v)


WAYS: dict[str, tuple[str, Make, Within]] = {  # the operator, what makes a call, and within what it is timed
    "SDPA flash": ("exact", sdpa, lambda: sdpa_kernel([SDPBackend.FLASH_ATTENTION])),
    "SDPA cuDNN": ("exact", sdpa, lambda: sdpa_kernel([SDPBackend.CUDNN_ATTENTION])),
    "flash window": ("sparse", window, nullcontext),
    "FlexAttention": ("sparse", flex, nullcontext),
    "fla chunk_linear_attn": ("linear", chunks, nullcontext),
}


def sample(call: Callable[[], Any], launches: int) -> float:
    """Seconds of a launch, by events."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(launches):
        call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e-3 / launches


def measure(call: Callable[[], Any]) -> list[float]:
    call()
    once = sample(call, 1)
    launches = 1 + int(0.003 / once)
    count = int(SECONDS / (once * launches))
    return [sample(call, launches) for _ in range(min(max(count, SAMPLES[0]), SAMPLES[1]))]


def time_way(by: str, dtype: str, dim: int, heads: int, lengths: list[int]) -> None:
    """A line for every length, until it takes too long or is refused."""
    operator, make, within = WAYS[by]
    for tokens in lengths:
        line = {"bench": "peer", "by": by, "operator": operator, "dtype": dtype, "d": dim, "tokens": tokens}
        kind = torch.bfloat16 if dtype == "bf16" else torch.float16
        try:
            q, k, v = (torch.randn(1, heads, tokens, dim, device="cuda", dtype=kind) for _ in range(3))
            with within():
                times = measure(make(q, k, v))
        except Exception as error:  # not importable, not supported, no memory: the others go on
            reason = (str(error).splitlines() or [""])[0][:200]
            print(json.dumps({**line, "reason": f"{type(error).__name__}: {reason}"}), flush=True)
            return
        scale = 1e9 / (tokens * heads)
        median = statistics.median(times)
        found = {"heads": heads, "ns_min": min(times) * scale, "ns_med": median * scale, "k": len(times)}
        print(json.dumps({**line, **found}), flush=True)
        if median * (4 if operator == "exact" else 2) > LONGEST:
            return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", default="1024,4096")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--dims", default="64,128")
    parser.add_argument("--dtypes", default="bf16")
    args = parser.parse_args()
    print(json.dumps({"bench": "torch", "version": torch.__version__, "gpu": torch.cuda.is_available()}), flush=True)
    if not torch.cuda.is_available():
        return
    lengths = [int(n) for n in args.tokens.split(",")]
    with torch.no_grad():
        for by in WAYS:
            for dtype in args.dtypes.split(","):
                for dim in args.dims.split(","):
                    time_way(by, dtype, int(dim), args.heads, lengths)


if __name__ == "__main__":
    main()
