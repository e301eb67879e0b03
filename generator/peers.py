"""The command peers: our kernels against what people use today, in a throw-away environment that has both.

Installing and telling are here; bench/peers.py measures, run by the Python of that environment.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import UsageError, build, quality, report
from .build import BuildError
from .contract import shown
from .render import ROOT, write
from .tuning import OUTPUT, Progress, guarded, names, numbers, running, writable

RESULTS = OUTPUT / "peers.json"
PACKAGES = ("torch==2.15.0", "performer-pytorch==1.1.4", "numpy")
EXTENSION = "pytorch-fast-transformers==0.4.0"  # compiled here; the others do without it
FLAGS = "-O3 -march=native -g0"  # its causal product is 1.7 times as fast as without -march=native, as pip builds it
# glibc gives every block beyond 32 MB back to the system; with it kept, the others are up to 1.8 times as fast.
MALLOC = ("MALLOC_MMAP_THRESHOLD_=4294967296", "MALLOC_TRIM_THRESHOLD_=68719476736")
ROOM = 8e9  # bytes: the torch of PyPI is not imported without 3 GB of CUDA libraries, used or not
EXP, COSH = "favor_exp_f32_d64_m256", "favor_cosh_f32_d64_m256"
CONTRACTS = (
    EXP,
    COSH,
    "favor_cosh_f32_d64_m128",
    "hybrid_cosh_f32_d64_m128_b64",
    "sparse_f32_d64_b64",
    "exact_f32_d64",
)
HEADS = 8
LENGTHS = "512,1024,2048,4096,8192,16384"
PROMISED = 1e-5  # largest error of a row of ours
PERFORMER = ("performer-pytorch", "FastAttention")
PRODUCT = ("fast-transformers", "causal_dot_product alone")
TORCH = ("torch", "scaled_dot_product_attention")

Line = dict[str, Any]
Done = subprocess.CompletedProcess[str]


def add_commands(commands: Any) -> None:
    parser = commands.add_parser(
        "peers",
        help="our kernels against PyTorch, performer-pytorch and fast-transformers",
        description="Install the others into a throw-away environment (5 GB in the temporary folder), run them and\n"
        "our kernels in one process on the same inputs, with one thread and with two, and compare the outputs with\n"
        "float64. Takes about a quarter of an hour, a third of it to compile fast-transformers. Written to tuned/.",
        epilog="example: ./nearfar peers --keep ../peers --tokens 1024,4096",
    )
    parser.add_argument("--keep", metavar="DIR", help="keep the environment there; it is used again if it is complete")
    parser.add_argument("--tokens", default=LENGTHS, metavar="N,...", help=f"lengths (default: {LENGTHS})")
    parser.add_argument("--threads", default="1,2", metavar="N,...", help="how many threads (default: 1,2)")
    parser.set_defaults(run=guarded(peers))


def peers(args: argparse.Namespace) -> int:
    lengths, threads = (sorted({*numbers(f"--{o}", getattr(args, o))}) for o in ("tokens", "threads"))
    if threads[-1] > HEADS:
        raise UsageError(f"option --threads = {shown(args.threads)}: must be at most {HEADS}, the number of heads")
    if sys.version_info < (3, 10):
        raise BuildError("peers needs Python 3.10 or newer, as torch does")
    build.compiler()
    writable(OUTPUT)
    with Progress() as progress, folder(args.keep) as place:
        missing = install(place, progress)
        progress.step(f"compiling {len(CONTRACTS)} kernels of ours")
        ours = quality.library(list(CONTRACTS))._name
        setup, lines = measure(place, ours, lengths, threads, progress)
    setup |= {"missing": missing, "compiler": compiler_version()}
    text = table(setup, lines)
    write({RESULTS: stored(setup, lines), OUTPUT / "peers.txt": text})
    report.save(draw(setup, lines), OUTPUT / "peers.png")
    print(text)
    names(OUTPUT / "peers.txt", RESULTS, OUTPUT / "peers.png")
    return told(wrong(lines))


def told(faults: list[str]) -> int:
    for fault in faults:
        print(f"nearfar: {fault}", file=sys.stderr)
    return 1 if faults else 0


# ---- the environment -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def folder(keep: str | None) -> Iterator[Path]:
    """Where the environment goes: a temporary folder, or one that stays."""
    if keep is None:
        with tempfile.TemporaryDirectory(prefix="nearfar-peers-") as made:
            yield Path(made)
        return
    place = Path(keep)
    if place.exists() and not (place.is_dir() and ((place / "peers.json").exists() or not any(place.iterdir()))):
        raise UsageError(f"option --keep = {shown(keep)}: must be a new folder or one that this command has kept")
    writable(place)
    yield place.resolve()


def install(place: Path, progress: Progress) -> dict[str, str]:
    """Fill the environment, if it is not complete; what could not be built, and why."""
    mark = place / "peers.json"
    wanted = {"packages": [*PACKAGES, EXTENSION], "flags": FLAGS, "python": sys.version}
    with contextlib.suppress(OSError, ValueError):
        made = json.loads(mark.read_text(encoding="utf-8"))
        if made["wanted"] == wanted:
            return dict(made["missing"])
    if shutil.disk_usage(place).free < ROOM:
        raise BuildError(f"{shown(str(place))} has less than {ROOM / 1e9:.0f} GB free: name another folder by TMPDIR")
    progress.step(f"installing {' '.join(PACKAGES)}")
    write({mark: "{}"})
    must(run([sys.executable, "-m", "venv", "--clear", str(place / "venv")]))
    must(pip(place, *PACKAGES))
    progress.step(f"compiling {EXTENSION}, which takes some minutes")
    # By the torch that is there, and for the CPU alone: its setup must find no CUDA compiler.
    path = [p for p in os.environ.get("PATH", "").split(os.pathsep) if not shutil.which("nvcc", path=p)]
    env = {"PATH": os.pathsep.join(path), "CFLAGS": FLAGS}
    done = pip(place, EXTENSION, "--no-deps", "--no-build-isolation", "--no-cache-dir", **env)
    missing = {EXTENSION: reason(done)} if done.returncode else {}
    write({mark: json.dumps({"wanted": wanted, "missing": missing})})
    return missing


def pip(place: Path, *words: str, **env: str) -> Done:
    call = [str(place / "venv" / "bin" / "python"), "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
    return run([*call, "--retries", "1", "--timeout", "20", *words], **env)


def run(call: list[str], **env: str) -> Done:
    options: Any = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "check": False}
    return subprocess.run(call, env={**os.environ, **env}, **options)


def must(done: Done) -> None:
    if done.returncode:
        raise BuildError(f"cannot install the others: {reason(done)}")


def reason(done: Done) -> str:
    """The line that says why: the first error of a compiler, else of pip, else the last line."""
    lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    for mark in (" error: ", "ERROR: "):
        for line in lines:
            if mark in line:
                return line
    return lines[-1] if lines else "it says nothing"


def compiler_version() -> str:
    cc = build.compiler()
    return next(iter(run([*cc.command, "--version"]).stdout.splitlines()), cc.name)


def measure(
    place: Path, ours: str, lengths: list[int], threads: list[int], progress: Progress
) -> tuple[Line, list[Line]]:
    """Run bench/peers.py: what it ran on, and its measurements."""
    command = [
        "env",
        *MALLOC,
        str(place / "venv" / "bin" / "python"),
        "-W",
        "ignore",
        str(ROOT / "bench" / "peers.py"),
        ours,
    ]
    command += ["--contracts", ",".join(CONTRACTS)]
    command += ["--tokens", ",".join(map(str, lengths)), "--threads", ",".join(map(str, threads))]
    setup: Line = {}
    lines: list[Line] = []
    with running(command) as output:
        for line in map(json.loads, output):
            if "setup" in line:
                setup |= line["setup"]
            elif "begins" in line:
                progress.step(f"running all: {line['begins']}")
            else:
                lines.append(line)
    if "load_after" not in setup:
        raise BuildError("bench/peers.py ended early")
    return setup, lines


# ---- what came out -------------------------------------------------------------------------------------------------


def stored(setup: Line, lines: list[Line]) -> str:
    """JSON, one measurement per line; three digits more than the noise."""
    rounded = [{k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in line.items()} for line in lines]
    body = ",\n".join(json.dumps(line) for line in rounded)
    return f'{{"setup": {json.dumps(setup)},\n"lines": [\n{body}\n]}}\n'


def wrong(lines: list[Line]) -> list[str]:
    """Ours that are not what they stand for (NaN is not below anything)."""
    mine = [line for line in lines if line["by"] == "nearfar"]
    return [
        f"{line['way']}, {line['mask']}, {line['tokens']} tokens: a row is off by {line['row_error']:.1e}"
        for line in mine
        if not line["row_error"] < PROMISED
    ]


def find(lines: list[Line], way: tuple[str, str], mask: str, tokens: int, threads: int = 1) -> Line:
    """The measurement; empty where there is none."""
    wanted = {"by": way[0], "way": way[1], "mask": mask, "tokens": tokens, "threads": threads}
    return next((line for line in lines if wanted.items() <= line.items()), {})


def ways(lines: list[Line], mask: str) -> list[tuple[str, str]]:
    return list(dict.fromkeys((line["by"], line["way"]) for line in lines if line["mask"] == mask))


def times(lines: list[Line], a: tuple[str, str], b: str, mask: str, tokens: int, threads: int = 1) -> float | None:
    """How many times as long as our contract b the way a takes."""
    other, mine = (find(lines, way, mask, tokens, threads) for way in (a, ("nearfar", b)))
    return other["ms"] / mine["ms"] if other and mine else None


def table(setup: Line, lines: list[Line]) -> str:
    """All ways at the reference length; the time of all lengths; the goals."""
    lengths = sorted({line["tokens"] for line in lines})
    threads = sorted({line["threads"] for line in lines})
    reference = max((n for n in lengths if n <= 4096), default=lengths[0])
    versions = ", ".join(f"{name} {version}" for name, version in setup["versions"].items())
    load = " to ".join(f"{setup[k][0]:.1f}" for k in ("load_before", "load_after"))
    text = [
        f"{setup['cpu']} ({setup['torch_runs']} in torch), {setup['date']}, load {load}",
        f"{versions}, Python {setup['python']}, {setup['compiler']}",
        *(f"missing: {name}: {why}" for name, why in setup["missing"].items()),
        "",
        *report.columns(main_rows(lines, reference, threads)),
        f"x: time / that of {EXP} with the same mask and threads. One thread: CPU time; two: wall clock. Medians.",
        "its sum: largest error of a row against what the way computes (softmax, or the sum over the same random",
        "features) in float64, relative to the longest v. softmax: |out - softmax| / |softmax|, what random features",
        f"cost on these inputs: q, k normal with deviation {setup['spread']:g}, v with 1.",
    ]
    if len(lengths) > 1:
        text += ["", *report.columns(length_rows(lines, lengths))]
    judged = goals(lines, lengths)
    if len(judged) > 1:
        text += ["", *report.columns(judged)]
    return "\n".join(text) + "\n"


def main_rows(lines: list[Line], tokens: int, threads: list[int]) -> list[list[str]]:
    head = [f"{tokens} tokens, {HEADS} heads of 64", "mask"]
    for n in threads:
        head += [f"ms, {n} thread{'s' if n > 1 else ''}", "x"]
    rows = [[*head, "its sum", "softmax"]]
    for mask in ("causal", "full"):
        for way in ways(lines, mask):
            cells = [" ".join(way), mask]
            for n in threads:
                cells.append(report.form(find(lines, way, mask, tokens, n).get("ms"), ".1f"))
                cells.append(report.form(times(lines, way, EXP, mask, tokens, n), ".2f"))
            line = find(lines, way, mask, tokens)
            rows.append([*cells, *(report.form(line.get(k), ".0e") for k in ("row_error", "softmax_error"))])
    return rows


def length_rows(lines: list[Line], lengths: list[int]) -> list[list[str]]:
    rows = [["ms with one thread, causal", *map(str, lengths)]]
    for way in ways(lines, "causal"):
        found = [find(lines, way, "causal", n).get("ms") for n in lengths]
        rows.append([" ".join(way), *(report.form(ms, ".1f") for ms in found)])
    return rows


def goals(lines: list[Line], lengths: list[int]) -> list[list[str]]:
    """What we aim at with one thread, M = 256, causal, and what was measured."""
    rows = [["goal, one thread, causal", "", "", *(f"by {c}" for c in (EXP, COSH))]]
    for label, way, least, counted in (
        ("performer-pytorch FastAttention / ours, 4096 tokens", PERFORMER, 100, [4096]),
        ("fast-transformers causal product alone / ours, 4096 tokens", PRODUCT, 10, [4096]),
        ("torch scaled_dot_product_attention / ours, from 1024 tokens", TORCH, 1, [n for n in lengths if n >= 1024]),
    ):
        found = [[times(lines, way, c, "causal", n) for n in counted] for c in (EXP, COSH)]
        lowest = [min((t for t in ratios if t is not None), default=None) for ratios in found]
        if any(t is not None for t in lowest):
            verdict = [f"{t:.1f}{'' if t >= least else ' missed'}" if t is not None else "-" for t in lowest]
            rows.append([label, ">=", str(least), *verdict])
    return rows


def draw(setup: Line, lines: list[Line]) -> Any:
    """Time per token and head against length, causal, one thread."""
    figure, axes = report.new_axes("causal attention with one thread: nearfar (solid) and what people use (dashed)")
    mine = iter(("#1f5f99", "#3aa5c9", "#2a8f6f", "#8a5fb0", "#b08a2e", "#555555"))
    others = iter(("#c44e2b", "#e0a030", "#d17fa3", "#8c5a3c", "#999999"))
    lengths = sorted({line["tokens"] for line in lines})
    for way in ways(lines, "causal"):
        found = [line for n in lengths if (line := find(lines, way, "causal", n))]
        points = [(line["tokens"], line["ms"] * 1e6 / line["tokens"] / HEADS) for line in found]
        ours = way[0] == "nearfar"
        color, style = (next(mine), "-") if ours else (next(others), "--")
        axes.plot(*zip(*points), style, marker="o", markersize=3.5, color=color, label=" ".join(way[ours:]))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(lengths, [str(n) for n in lengths])
    axes.set_xlabel("tokens")
    axes.set_ylabel("ns per token and head")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return figure
