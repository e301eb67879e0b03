"""The command quality: how far from exact softmax does each operator end up, at the same cost?

The generated kernels themselves are run (through ctypes), causal, on real and on synthetic inputs; the reference is
softmax attention in float64. Errors are |out - softmax| / |softmax| over the rows of the second half of the tokens,
mean over heads and seeds; calibrations see the first half only.
"""

from __future__ import annotations

import argparse
import ctypes
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from . import build, inputs, report
from .contract import parse
from .render import Recipe, render, write
from .space import default
from .tuning import INPUTS, OUTPUT, Progress, guarded, names, writable

RESULTS = OUTPUT / "quality.jsonl"
SEEDS = (1, 2, 3)


@dataclass(frozen=True)
class Way:
    """A way to attend: contract and pattern (window and globals in tokens), and how its projection is made."""

    label: str
    contract: str = ""  # empty: the constant far field, in numpy
    window: int = 0
    globals: int = 0
    fit: str = "plain"  # plain, calibrated


@dataclass(frozen=True)
class Case:
    """An input [token, head, dim] and the ways that are compared on it."""

    name: str
    seed: int
    q: Any
    k: Any
    v: Any
    ways: tuple[Way, ...]


def ways(d: int, b: int, favor: int, near: int, far: int, sparse: int, constant: int) -> tuple[Way, ...]:
    """The ways at about one cost: features of favor; window and features of hybrid; windows of sparse and of the
    constant far field."""
    hybrid = f"hybrid_cosh_f32_d{d}_m{far}_b{b}"
    return (
        Way("sparse", f"sparse_f32_d{d}_b{b}", sparse),
        Way("sparse + 4 globals", f"sparse_f32_d{d}_b{b}", sparse, 4),
        Way("favor", f"favor_cosh_f32_d{d}_m{favor}"),
        Way("favor calibrated", f"favor_cosh_f32_d{d}_m{favor}", fit="calibrated"),
        Way("constant far field", window=constant),
        Way("hybrid", hybrid, near),
        Way("hybrid calibrated", hybrid, near, fit="calibrated"),
        Way("hybrid calibrated + 4 globals", hybrid, near, 4, "calibrated"),
    )


# Synthetic: 2048 tokens, D = 64, about 154 kflop a token. Real: 384 tokens, D = 32, about half of what exact costs.
SYNTHETIC = ways(64, 64, favor=368, near=256, far=208, sparse=600, constant=512)
REAL = ways(32, 16, favor=48, near=32, far=32, sparse=96, constant=80)


def cost(way: Way, tokens: int, d: int) -> float:
    """Kiloflop of matrix products per token and head, mean over the second half of the tokens."""
    if not way.contract:
        return near_keys(way.window + 64 // 2, tokens) * 4 * d / 1e3
    c = parse(way.contract)
    exact = far = 0.0
    if c.operator == "sparse":
        exact = near_keys(way.window, tokens) + way.globals
    elif c.operator == "hybrid":
        exact = near_keys(way.window + c.b / 2, tokens) + way.globals
    if c.m:
        far = 4 * c.rows * c.d + 4 * c.m * c.d
    if c.operator == "favor":
        far += 32 * (c.m + c.d)  # the chunk's own pairs, chunk 32
    return (4 * d * exact + far) / 1e3


def near_keys(window: float, tokens: int) -> float:
    return sum(min(window, p + 1) for p in range(tokens // 2, tokens)) / (tokens - tokens // 2)


# ---- inputs --------------------------------------------------------------------------------------------------------


def synthetic() -> Iterator[Case]:
    """Five families, N(0, 1) values. `s` is the standard deviation of the components of q and k, D = 64.

    gauss: independent normal. local: q and k are the same slowly changing vector (autoregressive, 0.97), so that near
    tokens attract. topic: segments of 128 tokens share one of 16 vectors. sink: local, the keys with a mean, and four
    first tokens that every query likes. peaked: local with s = 1.5.
    """
    import numpy as np

    tokens, d = 2048, 64
    families = {"gauss s=0.5": 0.5, "local s=1": 1.0, "topic s=1": 1.0, "sink s=1": 1.0, "peaked s=1.5": 1.5}
    for seed in SEEDS:
        for name, s in families.items():
            dice = np.random.default_rng(seed)
            kind = name.split()[0]
            if kind == "gauss":
                q, k = dice.normal(size=(2, tokens, d))
            elif kind == "topic":
                topics = dice.normal(size=(16, d))
                mine = topics[dice.integers(16, size=tokens // 128).repeat(128)]
                q, k = np.sqrt(0.5) * (mine + dice.normal(size=(2, tokens, d)))
            else:
                x = dice.normal(size=(tokens, d))
                for t in range(1, tokens):
                    x[t] = 0.97 * x[t - 1] + np.sqrt(1 - 0.97**2) * x[t]
                q = k = x
            q, k = s * q, s * k
            if kind == "sink":
                mean = dice.normal(size=d)
                mean *= 2 * d**0.25 / np.linalg.norm(mean)  # |mean'| = 2
                q, k = q + 0.5 * mean, k + mean
                k[:4] += 3 * mean
            v = dice.normal(size=(tokens, d))
            q, k, v = (np.ascontiguousarray(a[:, None, :], np.float32) for a in (q, k, v))
            yield Case(name, seed, q, k, v, SYNTHETIC)


def real() -> Iterator[Case]:
    for folder in INPUTS:
        if folder.is_dir():
            arrays = inputs.load(folder)
            for seed in SEEDS:
                yield Case(folder.name, seed, arrays["q"][0], arrays["k"][0], arrays["v"][0], REAL)


# ---- the references ------------------------------------------------------------------------------------------------


def softmax(q: Any, k: Any, v: Any) -> Any:
    """Causal softmax attention [token, dim] of one head in float64."""
    import numpy as np

    logits = q.astype(np.float64) @ k.T.astype(np.float64) / np.sqrt(q.shape[1])
    logits[np.triu_indices(len(q), 1)] = -np.inf
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return weights @ v / weights.sum(axis=1, keepdims=True)


def constant_far_field(way: Way, b: int, q: Any, k: Any, v: Any) -> Any:
    """Exact in the window's blocks; what is farther counts by number, mean value, and the mean weight of a normal logit
    whose moments are those of the first half of the keys."""
    import numpy as np

    tokens, d = q.shape
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    sample = k[: tokens // 2]
    out = np.empty_like(v)
    total = np.cumsum(v, axis=0)
    for i in range(tokens):
        first = max(0, i // b - way.window // b) * b
        logits = k[first : i + 1] @ q[i] / np.sqrt(d)
        far = q[i] @ sample.mean(axis=0) / np.sqrt(d) + (q[i] ** 2 @ sample.var(axis=0)) / (2 * d)
        top = max(logits.max(), far)
        weights = np.exp(logits - top)
        mass = np.exp(far - top)
        out[i] = weights @ v[first : i + 1] + (mass * total[first - 1] if first else 0)
        out[i] /= weights.sum() + mass * first
    return out


# ---- the kernels, through ctypes -----------------------------------------------------------------------------------


class Tensor(ctypes.Structure):
    _fields_: ClassVar = [
        ("data", ctypes.c_void_p),
        ("batch", ctypes.c_int64),
        ("token", ctypes.c_int64),
        ("head", ctypes.c_int64),
    ]


class Pattern(ctypes.Structure):
    _fields_: ClassVar = [
        ("window", ctypes.c_int64),
        ("dilation", ctypes.c_void_p),
        ("globals", ctypes.c_int64),
        ("global_tokens", ctypes.c_void_p),
        ("global_count", ctypes.c_int64),
        *((name, ctypes.c_int64) for name in ("block", "block_heads", "block_rows", "block_count")),
        *((name, ctypes.c_void_p) for name in ("block_offsets", "block_keys", "far_gain")),
        ("flags", ctypes.c_uint32),
    ]


class Args(ctypes.Structure):
    _fields_: ClassVar = [
        *((name, ctypes.c_int64) for name in ("batch", "heads", "kv_heads", "q_tokens", "kv_tokens")),
        *((name, Tensor) for name in ("q", "k", "v", "out")),
        ("lse", ctypes.c_void_p),
        ("scale", ctypes.c_float),
        ("mask", ctypes.c_int32),
        ("cu_tokens", ctypes.c_void_p),
        ("sequences", ctypes.c_int64),
        ("projection", ctypes.c_void_p),
        ("projection_stride", ctypes.c_size_t),
        ("pattern", ctypes.POINTER(Pattern)),
        ("state", ctypes.c_void_p),
        ("split_begin", ctypes.c_int64),
        ("split_count", ctypes.c_int64),
        ("stream", ctypes.c_void_p),
    ]


class Calibration(ctypes.Structure):
    _fields_: ClassVar = [
        ("q", ctypes.c_void_p),
        ("k", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("q_tokens", "k_tokens", "q_stride", "k_stride")),
        ("tau", ctypes.c_float),
        ("flags", ctypes.c_uint32),
    ]


def aligned(count: int) -> Any:
    """Bytes at a multiple of 64."""
    import numpy as np

    room = np.zeros(count + 64, np.uint8)
    start = -room.ctypes.data % 64
    return room[start : start + count]


def contiguous(*arrays: Any) -> list[Any]:
    import numpy as np

    return [np.ascontiguousarray(a) for a in arrays]


@dataclass(frozen=True)
class Projections:
    """Projections of all heads, one behind the other."""

    memory: Any
    stride: int


@dataclass
class Kernel:
    """One generated header, compiled into the library."""

    library: ctypes.CDLL
    name: str

    def entry(self, what: str, result: Any = ctypes.c_int) -> Any:
        function = getattr(self.library, f"nf_{self.name}_cpu_{what}")
        function.restype = result
        return function

    def projections(
        self, case: Case, seed: int, fit: bool = False, tau: float = 0.0, flags: int = 0, matrices: Any = None
    ) -> Projections:
        """One projection per head: sampled, fitted to the first half of the tokens, or of matrices [head, row, dim]."""
        tokens, heads, d = case.q.shape
        q, k = contiguous(case.q, case.k)
        stride = int(self.entry("projection_bytes", ctypes.c_size_t)())
        memory = aligned(heads * stride)
        for h in range(heads):
            at = ctypes.c_void_p(memory.ctypes.data + h * stride)
            if matrices is not None:
                self.must(self.entry("projection_from")(at, ctypes.c_void_p(matrices[h].ctypes.data), 0))
                continue
            how = Calibration(tau=tau, flags=flags)
            if fit:
                half, step = tokens // 2, heads * d
                how = Calibration(q[:, h].ctypes.data, k[:, h].ctypes.data, half, half, step, step, tau, flags)
            self.must(self.entry("projection_init")(at, ctypes.c_uint64(seed), ctypes.byref(how)))
        return Projections(memory, stride)

    def attend(self, case: Case, window: int = 0, globals: int = 0, projections: Projections | None = None) -> Any:
        """out [token, head, dim], causal."""
        import numpy as np

        q, k, v = contiguous(case.q, case.k, case.v)
        tokens, heads, _ = q.shape
        out = np.full_like(q, np.nan)
        pattern = Pattern(window=window, globals=globals)
        args = Args(batch=1, heads=heads, q_tokens=tokens, pattern=ctypes.pointer(pattern))
        args.q.data, args.k.data, args.v.data, args.out.data = (x.ctypes.data for x in (q, k, v, out))
        if projections:
            args.projection, args.projection_stride = projections.memory.ctypes.data, projections.stride
        size = int(self.entry("workspace", ctypes.c_size_t)(ctypes.byref(args)))
        space = aligned(size)
        self.must(self.entry("forward")(ctypes.byref(args), ctypes.c_void_p(space.ctypes.data), ctypes.c_size_t(size)))
        return out

    def must(self, status: int) -> None:
        if status:
            raise build.BuildError(f"{self.name}: status {status}")


def library(contracts: list[str]) -> ctypes.CDLL:
    """All kernels in one shared library."""
    recipes = [Recipe(c, "cpu", tuple(default(c, "cpu"))) for c in map(parse, contracts)]
    folder = OUTPUT / "build" / "quality"
    files = {}
    for recipe in recipes:
        files[recipe.file_name] = render(recipe)
        text = f'#define NEARFAR_IMPLEMENTATION\n#define NEARFAR_FORWARD_ONLY\n#include "{recipe.file_name}"\n'
        files[f"{recipe.kernel}.c"] = text
    build.fill(folder, files)
    return ctypes.CDLL(str(build.compile_folder(folder, "quality.so", build.compiler(), ("-fPIC",), ("-shared",))))


# ---- the command ---------------------------------------------------------------------------------------------------


def add_commands(commands: Any) -> None:
    parser = commands.add_parser(
        "quality",
        help="error against exact softmax at equal cost",
        description="Run sparse, favor, hybrid and a constant far field at about the same cost on real and synthetic\n"
        "inputs, causal, and compare with exact softmax. Takes about a minute. Written to tuned/.",
        epilog="example: ./nearfar quality; the ways and their cost: generator/quality.py",
    )
    parser.add_argument(
        "--projections",
        action="store_true",
        help="instead: bias and spread of every way to make a projection (generator/projections.py); a minute more",
    )
    parser.set_defaults(run=guarded(quality))


def quality(args: argparse.Namespace) -> int:
    build.compiler()
    writable(OUTPUT)
    if args.projections:
        from . import projections

        return projections.compare()
    with Progress() as progress:
        cases = [*real(), *synthetic()]
        contracts = list(dict.fromkeys(w.contract for case in cases for w in case.ways if w.contract))
        progress.step(f"compiling {len(contracts)} kernels")
        loaded = library(contracts)
        progress.step(f"comparing on {len(cases)} inputs")
        lines = []
        for at, case in enumerate(cases):
            progress.part(f"{case.name}, seed {case.seed}", at / len(cases))
            lines += judge(case, loaded)
    text = table(lines)
    write({RESULTS: "".join(json.dumps(line) + "\n" for line in lines), OUTPUT / "quality.txt": text})
    report.save(draw(lines), OUTPUT / "quality.png")
    print(text)
    names(OUTPUT / "quality.txt", RESULTS, OUTPUT / "quality.png")
    return 0


def judge(case: Case, loaded: ctypes.CDLL) -> list[dict[str, Any]]:
    """The errors of every way on one input."""
    import numpy as np

    tokens, heads, d = case.q.shape
    half = tokens // 2
    truth = [softmax(case.q[:, h], case.k[:, h], case.v[:, h]) for h in range(heads)]
    lines = []
    for way in (*case.ways, Way("average")):
        if way.contract:
            kernel = Kernel(loaded, way.contract)
            made = kernel.projections(case, case.seed, way.fit == "calibrated") if parse(way.contract).m else None
            out = kernel.attend(case, way.window, way.globals, made)
        elif way.window:
            b = next(parse(w.contract).b for w in case.ways if w.contract.startswith("hybrid"))
            ours = [constant_far_field(way, b, case.q[:, h], case.k[:, h], case.v[:, h]) for h in range(heads)]
            out = np.stack(ours, axis=1)
        else:
            out = np.cumsum(case.v.astype(np.float64), axis=0) / np.arange(1, tokens + 1)[:, None, None]
        errors = [float(distance(out[half:, h], truth[h][half:])) for h in range(heads)]
        line = {"case": case.name, "seed": case.seed, "way": way.label, "contract": way.contract}
        line |= {"window": way.window, "globals": way.globals}
        line["kflop"] = 0 if way.label == "average" else cost(way, tokens, d)
        lines.append(line | {"error": sum(errors) / heads, "worst": max(errors)})
    return lines


def distance(out: Any, truth: Any) -> Any:
    import numpy as np

    return np.linalg.norm(out - truth) / np.linalg.norm(truth)


def mean(lines: list[dict[str, Any]], case: str, way: str) -> float:
    found = [float(line["error"]) for line in lines if line["case"] == case and line["way"] == way]
    return sum(found) / len(found)


def table(lines: list[dict[str, Any]]) -> str:
    """One row per way, one column per input; the best way of a column in brackets."""
    cases = list(dict.fromkeys(line["case"] for line in lines))
    labels = list(dict.fromkeys(line["way"] for line in lines))
    best = {c: min(mean(lines, c, w) for w in labels) for c in cases}
    rows = [["error against exact softmax", *cases]]
    for way in labels:
        cells = [mean(lines, c, way) for c in cases]
        rows.append(
            [way, *(f"[{x:.3f}]" if f"{x:.3f}" == f"{best[c]:.3f}" else f"{x:.3f} " for c, x in zip(cases, cells))]
        )
    costs = []
    for case in cases:
        spent = [line["kflop"] for line in lines if line["case"] == case and line["kflop"]]
        costs.append(f"{min(spent):.0f}-{max(spent):.0f} ")
    rows.append(["kflop per token and head", *costs])
    note = (
        "|out - softmax| / |softmax| of the second half of the tokens, causal, mean over heads and three seeds;\n"
        "calibrated on the first half. [best]. constant far field: exact in a window, elsewhere one weight (normal\n"
        "logits) for the mean value. average: the plain mean of v.\n"
    )
    return "\n".join(report.columns(rows)) + "\n" + note


def draw(lines: list[dict[str, Any]]) -> Any:
    """Error of every way on every input."""
    cases = list(dict.fromkeys(line["case"] for line in lines))
    figure, axes = report.new_axes("error against exact softmax at equal cost (causal)")
    shown = ("sparse + 4 globals", "favor calibrated", "constant far field", "hybrid", "hybrid calibrated + 4 globals")
    colors = ("#8a5fb0", "#2a8f6f", "#999999", "#e0a030", "#1f5f99")
    width = 0.8 / len(shown)
    for i, (way, color) in enumerate(zip(shown, colors)):
        places = [at + (i - 2) * width for at in range(len(cases))]
        axes.bar(places, [mean(lines, c, way) for c in cases], width, color=color, label=way)
    axes.set_xticks(range(len(cases)), cases, fontsize=8)
    axes.set_ylabel("relative error")
    axes.set_ylim(0, 1.5)
    axes.legend(frameon=False, fontsize=8)
    return figure
