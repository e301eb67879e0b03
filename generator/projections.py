"""quality --projections: what does each way to make a projection do to estimates of attention, on the real inputs?

The generated kernels are run, causal, many times with other seeds. The mean over seeds, less exact softmax, is the
bias; the scatter around that mean is the spread. Both as |..| / |softmax| of the second half of the tokens, mean over
heads; fits see the first half.
"""

from __future__ import annotations

from dataclasses import dataclass

from . import report
from .contract import parse
from .quality import Case, Kernel, library, real, softmax
from .render import write
from .tuning import OUTPUT, Progress, names

KEEP_MEAN, KEEP_CHANNELS, CHI_NORMS, GRAM_SCHMIDT, SIMPLEX, OPTIMAL_FEATURES = 1, 2, 4, 8, 16, 32  # of nf_calibration
SEEDS = 40
MAPS = ("exp", "cosh")
FEATURES = 128


@dataclass(frozen=True)
class Way:
    """A way to make a projection: how rows are sampled, whether they are fitted."""

    label: str
    normal: bool = False  # rows from numpy
    flags: int = 0
    fit: bool = False
    tau: float = 1.0


WAYS = (
    Way("independent normal rows", normal=True),
    Way("orthogonal (Gram-Schmidt), chi norms", flags=GRAM_SCHMIDT | CHI_NORMS),
    Way("orthogonal (Hadamard), chi norms", flags=CHI_NORMS),
    Way("orthogonal (Gram-Schmidt), norms sqrt(D)", flags=GRAM_SCHMIDT),
    Way("orthogonal (Hadamard), norms sqrt(D): default"),
    Way("simplex, norms sqrt(D)", flags=SIMPLEX),
    Way("FAVOR++", fit=True, flags=OPTIMAL_FEATURES | GRAM_SCHMIDT | KEEP_MEAN | KEEP_CHANNELS),
    Way("default + centring", fit=True, flags=KEEP_CHANNELS),
    Way("default + Psi", fit=True, flags=KEEP_MEAN),
    Way("default + centring + Psi", fit=True),
    Way("FAVOR++ + centring + Psi", fit=True, flags=OPTIMAL_FEATURES | GRAM_SCHMIDT),
    Way("default + centring + Psi + tempering 0.7", fit=True, tau=0.7),
    Way("FAVOR++ + centring + Psi + tempering 0.7", fit=True, tau=0.7, flags=OPTIMAL_FEATURES | GRAM_SCHMIDT),
    Way("simplex + centring + Psi + tempering 0.7", fit=True, tau=0.7, flags=SIMPLEX),
)


def compare() -> int:
    """The command."""
    with Progress() as progress:
        cases = list({case.name: case for case in real()}.values())
        contracts = [f"favor_{m}_f32_d{case.q.shape[2]}_m{FEATURES}" for case in cases[:1] for m in MAPS]
        progress.step(f"compiling {len(contracts)} kernels")
        loaded = library(contracts)
        progress.step(f"{len(WAYS)} ways with {SEEDS} seeds on {len(cases)} inputs")
        heading = [f"features m{FEATURES}", *(f"{case.name} {m}" for case in cases for m in MAPS)]
        rows = [heading]
        for at, way in enumerate(WAYS):
            progress.part(way.label, at / len(WAYS))
            rows.append([way.label, *(judge(way, case, Kernel(loaded, c)) for case in cases for c in contracts)])
    note = (
        "bias / spread: |mean over seeds - softmax| and the scatter around that mean, both / |softmax|, of the second\n"
        f"half of the tokens, causal; {SEEDS} seeds, mean over heads; fitted to the first half.\n"
    )
    text = "\n".join(report.columns(rows)) + "\n" + note
    write({OUTPUT / "projections.txt": text})
    print(text)
    names(OUTPUT / "projections.txt")
    return 0


def judge(way: Way, case: Case, kernel: Kernel) -> str:
    """bias / spread of one way."""
    import numpy as np

    tokens, heads, d = case.q.shape
    half = tokens // 2
    rows = parse(kernel.name).rows
    outs = []
    for seed in range(SEEDS):
        drawn = np.random.default_rng(seed).normal(size=(heads, rows, d)).astype(np.float32)
        matrices = drawn if way.normal else None
        made = kernel.projections(case, seed, way.fit, way.tau, way.flags, matrices)
        outs.append(kernel.attend(case, projections=made)[half:].astype(np.float64))
    mean = np.mean(outs, axis=0)
    variance = np.sum((np.array(outs) - mean) ** 2, axis=(0, 1, 3)) / (SEEDS - 1)  # per head
    biases, spreads = [], []
    for h in range(heads):
        truth = softmax(case.q[:, h], case.k[:, h], case.v[:, h])[half:]
        off = np.sum((mean[:, h] - truth) ** 2) - variance[h] / SEEDS  # without the mean's own scatter
        biases.append(np.sqrt(max(off, 0) / np.sum(truth**2)))
        spreads.append(np.sqrt(variance[h] / np.sum(truth**2)))
    return f"{np.mean(biases):.3f} / {np.mean(spreads):.3f}"
