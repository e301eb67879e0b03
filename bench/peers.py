"""Times and checks our kernels and those of others in one process: the same inputs, threads and projection.

`./nearfar peers` (generator/peers.py) runs this in an environment that has the others, and reads its lines of JSON.
Everybody gets the layout that suits them. Of every output some rows are compared with what it stands for, in float64.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import importlib.metadata
import importlib.util
import io
import json
import os
import platform
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from generator.contract import parse
from generator.peers import HEADS
from generator.quality import Args, Kernel, Pattern, aligned

DIM = 64
SPREAD = 0.5  # standard deviation of the components of q and k
CHECKED = 64  # rows of every head that are compared
FEW, MANY = (3, 20.0), (11, 2.0)  # samples of a way: three if they fit into 20 s (else fewer), up to eleven into 2 s
REST = 0.02  # seconds before a sample, in which the threads of the one before fall asleep
PACKAGES = ("torch", "performer-pytorch", "pytorch-fast-transformers", "numpy")
MASKS = ("causal", "full")
SDPA = torch.nn.functional.scaled_dot_product_attention


@dataclass(frozen=True)
class Formula:
    """Softmax over the near keys, and the sum over random features for the others: exp(w x - |x|^2 / 2) of the rows of
    the matrix `far`, with both signs where it is one of `cosh`. Without `far`, the others do not count."""

    near: int | None = None  # how many blocks away ends the near field; 0: no near keys, None: all are
    block: int = 1
    far: str = ""  # the contract whose matrix it is

    def weights(self, case: Case, rows: Any, head: int) -> Any:
        """[row, key], before the causal mask."""
        q, k = (x[:, head].astype(np.float64) * DIM**-0.25 for x in (case.q, case.k))
        exact = np.exp(q[rows] @ k.T)
        blocks = np.abs(rows[:, None] // self.block - np.arange(case.tokens) // self.block)
        near = blocks < (case.tokens if self.near is None else self.near)
        if not self.far:
            return np.where(near, exact, 0)
        w = case.matrices[self.far].astype(np.float64)
        if "_cosh_" in self.far:
            w = np.concatenate([w, -w])
        phi_q, phi_k = (np.exp(x @ w.T - (x**2).sum(axis=1, keepdims=True) / 2) for x in (q[rows], k))
        return np.where(near, exact, phi_q @ phi_k.T / len(w))


SOFTMAX = Formula()


@dataclass(frozen=True)
class Way:
    """One way to attend: whose it is, and how to run it with so many threads."""

    by: str
    label: str
    mask: str
    formula: Formula
    run: Callable[[int], Any]
    finish: Callable[[Any], Any]  # from what it returns to [token, head, dim] of numpy


class Case:
    """The inputs of one length, in the layouts that people like, and what should come out."""

    def __init__(self, tokens: int, matrices: dict[str, Any]) -> None:
        dice = np.random.default_rng(1)
        self.tokens, self.matrices = tokens, matrices
        self.q, self.k, self.v = (dice.normal(size=(tokens, HEADS, DIM)).astype(np.float32) for _ in range(3))
        self.q *= SPREAD
        self.k *= SPREAD
        self.by_token = [torch.from_numpy(x)[None] for x in (self.q, self.k, self.v)]
        self.by_head = [x.transpose(1, 2).contiguous() for x in self.by_token]
        self.rows = np.unique(np.linspace(0, tokens - 1, CHECKED).astype(np.int64))
        self.truth = functools.cache(self._truth)

    def _truth(self, formula: Formula, mask: str) -> Any:
        """[row, head, dim] of the checked rows in float64."""
        out = np.empty((len(self.rows), HEADS, DIM))
        for h in range(HEADS):
            weights = formula.weights(self, self.rows, h)
            if mask == "causal":
                weights[np.arange(self.tokens) > self.rows[:, None]] = 0
            out[:, h] = weights @ self.v[:, h].astype(np.float64) / weights.sum(axis=1, keepdims=True)
        return out

    def errors(self, way: Way, result: Any) -> dict[str, float]:
        """The largest error of a row relative to the head's longest v; and how far it all is from softmax."""
        out = way.finish(result)[self.rows].astype(np.float64)
        off = np.linalg.norm(out - self.truth(way.formula, way.mask), axis=2)
        softmax = self.truth(SOFTMAX, way.mask)
        return {
            "row_error": float((off / np.linalg.norm(self.v, axis=2).max(axis=0)).max()),
            "softmax_error": float(np.linalg.norm(out - softmax) / np.linalg.norm(softmax)),
        }


def from_token_major(result: Any) -> Any:
    return result[0].numpy()


def from_head_major(result: Any) -> Any:
    return result[0].transpose(0, 1).numpy()


# ---- ours ----------------------------------------------------------------------------------------------------------


class Call:
    """One of our kernels on a case; threads take the splits."""

    def __init__(self, kernel: Kernel, case: Case, mask: str, window: int) -> None:
        self.kernel, self.case, self.mask = kernel, case, mask
        self.out = np.full_like(case.v, np.nan)
        self.pattern = Pattern(window=window)
        self.forward = kernel.entry("forward")
        self.projection = projection(kernel, case.matrices)
        self.parts = functools.cache(self._parts)

    def _parts(self, threads: int) -> list[tuple[Args, Any]]:
        return [self.part(i * HEADS // threads, (i + 1) * HEADS // threads) for i in range(threads)]

    def part(self, begin: int, end: int) -> tuple[Args, Any]:
        """The arguments of a share of the heads, and its workspace."""
        case = self.case
        args = Args(batch=1, heads=HEADS, q_tokens=case.tokens, mask=MASKS.index(self.mask))
        args.q.data, args.k.data, args.v.data = case.q.ctypes.data, case.k.ctypes.data, case.v.ctypes.data
        args.out.data, args.pattern = self.out.ctypes.data, ctypes.pointer(self.pattern)
        args.projection = self.projection.ctypes.data
        args.split_begin, args.split_count = begin, end - begin
        return args, aligned(int(self.kernel.entry("workspace", ctypes.c_size_t)(ctypes.byref(args))))

    def one(self, part: tuple[Args, Any]) -> None:
        args, space = part
        self.kernel.must(self.forward(ctypes.byref(args), ctypes.c_void_p(space.ctypes.data), len_of(space)))

    def __call__(self, threads: int) -> Any:
        parts = self.parts(threads)
        if threads == 1:
            self.one(parts[0])
        else:
            list(pool(threads).map(self.one, parts))
        return self.out


@functools.cache
def pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)


def len_of(space: Any) -> Any:
    return ctypes.c_size_t(len(space))


def matrices(library: ctypes.CDLL, contracts: list[str]) -> dict[str, Any]:
    """The matrix of every contract that has one, as we sample it; the others get the same."""
    found = {}
    for contract in map(parse, contracts):
        if contract.m:
            kernel = Kernel(library, contract.name)
            memory = aligned(int(kernel.entry("projection_bytes", ctypes.c_size_t)()))
            at = ctypes.c_void_p(memory.ctypes.data)
            kernel.must(kernel.entry("projection_init")(at, ctypes.c_uint64(1), None))
            found[contract.name] = np.empty((contract.rows, contract.d), np.float32)
            kernel.must(kernel.entry("projection_read")(at, ctypes.c_void_p(found[contract.name].ctypes.data)))
    return found


def projection(kernel: Kernel, matrices: dict[str, Any]) -> Any:
    """Of this matrix; nothing for a kernel without features."""
    if kernel.name not in matrices:
        return aligned(0)
    memory = aligned(int(kernel.entry("projection_bytes", ctypes.c_size_t)()))
    w = matrices[kernel.name].ctypes.data
    kernel.must(kernel.entry("projection_from")(ctypes.c_void_p(memory.ctypes.data), ctypes.c_void_p(w), 0))
    return memory


def ours(case: Case, library: ctypes.CDLL, contracts: list[str]) -> Iterator[Way]:
    for contract in map(parse, contracts):
        name, window, formula = contract.name, 0, SOFTMAX
        label = name
        if contract.operator == "favor":
            formula = Formula(near=0, far=name)
        elif contract.operator == "hybrid":  # the window counts in whole blocks before the query's own
            window, formula = contract.b, Formula(near=2, block=contract.b, far=name)
        elif contract.operator == "sparse":
            window, formula = 512, Formula(near=512)
        if window:
            label += f", window {window}"
        for mask in MASKS if contract.operator in ("favor", "exact") else MASKS[:1]:
            call = Call(Kernel(library, name), case, mask, window)
            yield Way("nearfar", label, mask, formula, call, lambda out: out)


# ---- the others ----------------------------------------------------------------------------------------------------


def torch_ways(case: Case) -> Iterator[Way]:
    for mask in MASKS:
        causal = mask == "causal"

        def run(threads: int, causal: bool = causal) -> Any:
            return SDPA(*case.by_head, is_causal=causal)

        yield Way("torch", "scaled_dot_product_attention", mask, SOFTMAX, run, from_head_major)


def performer_ways(case: Case) -> Iterator[Way]:
    """FastAttention, which without the CUDA extension of fast-transformers takes its own causal sum in PyTorch."""
    from performer_pytorch import performer_pytorch as performer

    far = "favor_exp_f32_d64_m256"
    sums: list[tuple[str, str, Any]] = [
        ("FastAttention", "full", None),
        ("FastAttention", "causal", performer.causal_linear_attention_noncuda),
    ]
    if has_fast_transformers():
        label = "FastAttention + causal_dot_product"
        sums.append((label, "causal", performer.causal_linear_attention))
    for label, mask, causal_sum in sums:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints that it found no CUDA
            layer = performer.FastAttention(DIM, len(case.matrices[far]), causal=mask == "causal").eval()
        layer.projection_matrix.copy_(torch.from_numpy(case.matrices[far]))
        if causal_sum:
            layer.causal_linear_fn = causal_sum

        def run(threads: int, layer: Any = layer) -> Any:
            return layer(*case.by_head)

        yield Way("performer-pytorch", label, mask, Formula(near=0, far=far), run, from_head_major)


def has_fast_transformers() -> bool:
    return importlib.util.find_spec("fast_transformers") is not None


def fast_transformers_ways(case: Case) -> Iterator[Way]:
    """The whole attention with its Favor features; and its causal product alone, with features that are ready."""
    if not has_fast_transformers():
        return
    from fast_transformers import masking
    from fast_transformers.attention import CausalLinearAttention, LinearAttention
    from fast_transformers.causal_product import causal_dot_product
    from fast_transformers.feature_maps import Favor

    far = "favor_cosh_f32_d64_m256"
    formula = Formula(near=0, far=far)
    omega = torch.from_numpy(case.matrices[far].T.copy())
    lengths = masking.LengthMask(torch.full((1,), case.tokens, dtype=torch.int64))
    for mask, kind, triangle in (
        ("causal", CausalLinearAttention, masking.TriangularCausalMask(case.tokens)),
        ("full", LinearAttention, masking.FullMask(case.tokens)),
    ):
        layer = kind(DIM, Favor.factory(n_dims=2 * omega.shape[1], deterministic_eval=True)).eval()
        layer.feature_map.omega = omega

        def run(threads: int, layer: Any = layer, triangle: Any = triangle) -> Any:
            return layer(*case.by_token, triangle, lengths, lengths)

        yield Way("fast-transformers", f"{kind.__name__}, Favor", mask, formula, run, from_token_major)

    phi_q, phi_k = (layer.feature_map(x).transpose(1, 2).contiguous() for x in case.by_token[:2])

    def product(threads: int) -> Any:
        return causal_dot_product(phi_q, phi_k, case.by_head[2])

    def divided(result: Any) -> Any:
        sums = (phi_q.double() * phi_k.double().cumsum(dim=2)).sum(dim=3, keepdim=True)
        return from_head_major(result / sums)

    yield Way("fast-transformers", "causal_dot_product alone", "causal", formula, product, divided)


# ---- timing --------------------------------------------------------------------------------------------------------


def sample(way: Way, threads: int) -> tuple[float, float]:
    """Seconds that count and the processors that were busy. One thread: CPU time of the process, which the other work
    of a shared machine does not lengthen. More: the clock on the wall."""
    time.sleep(REST)
    cpu, wall = time.process_time(), time.perf_counter()
    way.run(threads)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return (cpu if threads == 1 else wall), cpu / wall


def measure(case: Case, ways: list[Way], threads: int) -> Iterator[dict[str, Any]]:
    """One line per way; the first call warms up and is checked, then all ways take turns."""
    torch.set_num_threads(threads)
    errors = [case.errors(way, way.run(threads)) for way in ways]
    taken: list[list[tuple[float, float]]] = [[] for _ in ways]
    for turn in range(MANY[0]):
        for way, mine in zip(ways, taken):
            spent = sum(s for s, _ in mine)
            if any(turn < count and spent < seconds for count, seconds in (FEW, MANY)):
                mine.append(sample(way, threads))
    for way, mine, error in zip(ways, taken, errors):
        times = [1e3 * s for s, _ in mine]
        line = {"by": way.by, "way": way.label, "mask": way.mask, "tokens": case.tokens, "threads": threads}
        line |= {"ms": statistics.median(times), "ms_min": min(times), "samples": len(mine)}
        yield line | {"busy": statistics.median(b for _, b in mine)} | error


def setup() -> dict[str, Any]:
    """What it ran on."""
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": cpu,
        "torch_runs": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "versions": found,
        "shape": f"{HEADS} heads of {DIM}",
        "spread": SPREAD,
    }


def show(line: dict[str, Any]) -> None:
    print(json.dumps(line), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("library", help="our kernels, compiled")
    parser.add_argument("--contracts", required=True)
    parser.add_argument("--tokens", required=True)
    parser.add_argument("--threads", required=True)
    args = parser.parse_args()
    contracts, library = args.contracts.split(","), ctypes.CDLL(args.library)
    sampled = matrices(library, contracts)
    show({"setup": setup() | {"load_before": os.getloadavg()}})
    with torch.inference_mode():
        for threads in map(int, args.threads.split(",")):  # rising: one thread before there are any others
            for tokens in map(int, args.tokens.split(",")):
                show({"begins": f"{tokens} tokens, threads: {threads}"})
                case = Case(tokens, sampled)
                ways = [*ours(case, library, contracts)]
                ways += [*torch_ways(case), *performer_ways(case), *fast_transformers_ways(case)]
                for line in measure(case, ways, threads):
                    show(line)
    show({"setup": {"load_after": os.getloadavg()}})
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Exception as error:  # the first line is what a user sees
        print(f"bench/peers.py: {type(error).__name__}: {error}", file=sys.stderr)
        traceback.print_exc()
        sys.exit(2)
