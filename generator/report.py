"""What the measurements say: tables and pictures, from the lines of the bench and the records of the tuner."""

from __future__ import annotations

import io
import math
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from . import UsageError
from .contract import parse, shown

Line = dict[str, Any]
COMPARED = (1024, 4096, 16384)  # lengths of the speed-up columns
GOAL_CONTRACTS = (
    "favor_exp_f32_d64_m256",
    "favor_cosh_f32_d64_m256",
    "favor_cosh_f32_d64_m128",
    "exact_f32_d64",
    "sparse_f32_d64_b64",
    "hybrid_cosh_f32_d64_m128_b32",
    "hybrid_cosh_f32_d64_m128_b64",
)


def verdict(record: Line) -> str:
    """One line on one race."""
    states = [tried["st"] for tried in record["tried"]]
    counts = ", ".join(f"{states.count(s)} {s}" for s in dict.fromkeys(states))
    place = f"{record['contract']}, {record['shape']['tokens']} tokens ({counts})"
    if not record["winner"]:
        return f"{place}: no candidate is left"
    if record["winner"] == record["ref"]:
        return f"{place}: the default {record['winner']} stays{', a tie' if record['tie'] else ''}"
    tie = " (tied with another)" if record["tie"] else ""
    return f"{place}: {record['winner']} wins by {100 * record['margin']:.1f} %{tie}"


# ---- reading the lines ---------------------------------------------------------------------------------------------


def of(results: Iterable[Line], bench: str, **wanted: Any) -> list[Line]:
    return [r for r in results if r.get("bench") == bench and all(r.get(k) == v for k, v in wanted.items())]


def contracts(results: list[Line]) -> list[str]:
    return list(dict.fromkeys(r["contract"] for r in of(results, "speed")))


def curve(results: list[Line], contract: str) -> dict[int, float]:
    """Nanoseconds per token and head by length, of the variant that the contract's own symbol runs (the first line)."""
    lines = of(results, "speed", contract=contract)
    return {r["tokens"]: r["ns_med"] for r in lines if r["variant"] == lines[0]["variant"]}


def baseline(contract: str) -> str:
    c = parse(contract)
    return f"exact_{c.dtype}_d{c.d}"


def crossover(ours: dict[int, float], exact: dict[int, float]) -> float | None:
    """The length from which ours is faster, interpolated in the logarithms; None where the curves never cross."""
    lengths = sorted(set(ours) & set(exact))
    gap = {n: math.log(ours[n] / exact[n]) for n in lengths}
    for low, high in zip(lengths, lengths[1:]):
        if gap[low] > 0 >= gap[high]:
            part = gap[low] / (gap[low] - gap[high])
            return math.exp(math.log(low) + part * (math.log(high) - math.log(low)))
    return None


def crossing(results: list[Line], contract: str) -> str:
    ours, exact = curve(results, contract), curve(results, baseline(contract))
    at = crossover(ours, exact)
    if at is not None:
        return f"{at:.0f}"
    common = sorted(set(ours) & set(exact))
    return f"<{common[0]}" if common and ours[common[0]] <= exact[common[0]] else "-"


# ---- the table -----------------------------------------------------------------------------------------------------


def table(results: list[Line]) -> str:
    names = contracts(results)
    device: Line = next((r["device"] for r in of(results, "device")), {})
    reference = max((n for name in names for n in curve(results, name) if n <= 4096), default=4096)
    seen = list(dict.fromkeys(r["input"] for r in of(results, "input")))
    head = ["contract", "variant", "ns/token", "% peak", "vs fp64", *seen]
    head += [f"x at {label(n)}" for n in COMPARED] + ["crossover"]
    rows = [row(results, name, reference, seen) for name in names]
    title = f"{device.get('name', '')} ({device.get('arch', '')}), one thread"
    notes = [
        f"ns/token: per token and head at {label(reference)} tokens, causal, f32; "
        "% peak: GEMM flops against the FMA peak measured between the runs",
        "vs fp64: largest row error against the fp64 kernel sum at |k'| = 3; "
        "x at: speed-up over exact of the same head dim; crossover: tokens from which it is faster",
    ]
    if seen:
        notes.append(
            f"{', '.join(seen)}: real input, error of the output against exact softmax "
            "(full mask, mean over heads): plain / calibrated per head"
        )
    return "\n".join([title, *columns([head, *rows]), *notes, *masks(results, seen)]) + "\n"


def row(results: list[Line], name: str, reference: int, seen: list[str]) -> list[str]:
    ours, exact = curve(results, name), curve(results, baseline(name))
    main = next((r for r in of(results, "speed", contract=name, tokens=reference)), {})
    error = next((r for r in of(results, "error", contract=name, norm=3)), {})
    cells = [name, str(main.get("variant", "")), form(main.get("ns_med"), ".0f"), form(main.get("percent"), ".0f")]
    cells.append(form(error.get("row"), ".1e"))
    cells += [against_softmax(results, name, source, "full") for source in seen]
    if name == baseline(name):
        return [*cells, *("1" for _ in COMPARED), "-"]
    cells += [form(exact[n] / ours[n] if n in exact and n in ours else None, ".2f") for n in COMPARED]
    return [*cells, crossing(results, name)]


def against_softmax(results: list[Line], name: str, source: str, mask: str) -> str:
    line = next((r for r in of(results, "input", contract=name, input=source, mask=mask)), None)
    if not line:
        return "-"
    if "calibrated" not in line:
        return form(line["plain"], ".1e")
    return f"{form(line['plain'], '.3f')} / {form(line['calibrated'], '.3f')}"


def masks(results: list[Line], seen: list[str]) -> list[str]:
    """The errors on real inputs in full: both masks, every fit, and what plain averaging would give."""
    lines = [r for r in of(results, "input") if "calibrated" in r]
    if not lines:
        return []
    head = ["real input", "mask", "contract", "average", "plain", "centred+Psi", "calibrated", "(worst head)"]
    rows = [
        [r["input"], r["mask"], r["contract"]]
        + [form(r.get(k), ".3f") for k in ("uniform", "plain", "balanced", "calibrated", "calibrated_worst")]
        for source in seen
        for r in lines
        if r["input"] == source
    ]
    note = "average: error of plain averaging; centred+Psi: without tempering; calibrations see half of the tokens"
    return ["", *columns([head, *rows]), note]


def standing(results: list[Line]) -> str:
    """What ./nearfar bench adds: targets, decode, threads, compile time and size."""
    parts: list[list[list[str]]] = []
    speed = of(results, "speed", tokens=4096)
    parts.append([["speed at 4096", "variant", "ns/token", "min", "% peak"]])
    parts[-1] += [
        [r["contract"], r["variant"]] + [form(r.get(k), ".1f") for k in ("ns_med", "ns_min", "percent")] for r in speed
    ]
    parts.append([["decode, 32 heads", "variant", "cached", "ns/head", "min"]])
    parts[-1] += [
        [r["contract"], r["variant"], str(r["cached"] or "state"), form(r["ns_med"], ".0f"), form(r["ns_min"], ".0f")]
        for r in of(results, "decode")
    ]
    parts.append([["pattern of sparse", "variant", "tokens", "keys", "ns/token", "% peak"]])
    parts[-1] += [
        [r["pattern"], r["variant"], str(r["tokens"])] + [form(r[k], ".1f") for k in ("keys", "ns_med", "percent")]
        for r in of(results, "pattern")
    ]
    parts.append([["backward at 4096", "variant", "forward ns", "backward ns", "ratio"]])
    parts[-1] += [
        [
            r["contract"],
            r["variant"],
            form(r["ns_forward"], ".0f"),
            form(r["ns_backward"], ".0f"),
            form(r["ratio"], ".2f"),
        ]
        for r in of(results, "backward")
    ]
    parts.append([["two threads", "variant", "one ns/token", "two ns/token", "speed-up"]])
    parts[-1] += [
        [r["contract"], r["variant"], form(r["ns_one"], ".0f"), form(r["ns_two"], ".0f"), form(r["speedup_med"], ".2f")]
        for r in of(results, "splits")
    ]
    parts.append([["header", "compile s", "kB"]])
    compiled = of(results, "compile")
    parts[-1] += [[r["contract"], form(r["seconds"], ".2f"), form(r["bytes"] / 1000, ".0f")] for r in compiled]
    return "\n".join("\n".join(columns(part)) + "\n" for part in parts if len(part) > 1)


def goals(results: list[Line]) -> str:
    """What the kernels aim at on one core with AVX-512, and what was measured."""

    def best(contract: str, target: str, key: str) -> float | None:
        lines = of(results, "speed", contract=contract, target=target, tokens=4096)
        return lines[0][key] if lines else None

    def ratio(a: float | None, b: float | None) -> float | None:
        return a / b if a and b else None

    def first(bench: str, key: str, **wanted: Any) -> float | None:
        lines = of(results, bench, **wanted)
        return lines[0][key] if lines else None

    def pattern(name: str, key: str, tokens: int = 4096) -> float | None:
        return first("pattern", key, pattern=name, tokens=tokens, target="avx512")

    def per_pair(name: str) -> float | None:
        return ratio(pattern(name, "ns_min"), pattern(name, "keys"))

    def against(contract: str, other: str) -> float | None:
        return ratio(best(contract, "avx512", "ns_min"), best(other, "avx512", "ns_min"))

    def backward(contract: str) -> float | None:
        return first("backward", "ratio", contract=contract, target="avx512")

    exp, cosh, small, exact, sparse, *hybrids = GOAL_CONTRACTS
    window = [pattern("window 512", "ns_min", n) for n in (4096, 32768, 262144)]
    steady = max(w for w in window if w) / min(w for w in window if w) if all(window) else None
    compiled = of(results, "compile")
    rows = [
        ("% of the FMA peak, exp m256, avx512", ">=", 82, best(exp, "avx512", "percent")),
        ("% of the FMA peak, exp m256, avx2", ">=", 78, best(exp, "avx2", "percent")),
        ("% of the FMA peak, exact", ">=", 78, best(exact, "avx512", "percent")),
        ("cosh m256 / exp m256, time", "<=", 0.80, against(cosh, exp)),
        ("crossover of cosh m128, tokens", "<=", 450, crossover(curve(results, small), curve(results, exact))),
        ("two threads, speed-up", ">=", 1.85, min((r["speedup"] for r in of(results, "splits")), default=None)),
        (
            "decode cosh m128 / exact over 120 tokens",
            "<=",
            1,
            ratio(first("decode", "ns_med", contract=small), first("decode", "ns_med", contract=exact, cached=120)),
        ),
        ("sparse, window 512: % of the FMA peak", ">=", 70, pattern("window 512", "percent")),
        ("its time per token, longest / shortest, 4k to 256k", "<=", 1.05, steady),
        (
            "sparse with 4 globals / without, time",
            "<=",
            1.08,
            ratio(pattern("window 512, 4 globals", "ns_min"), pattern("window 512", "ns_min")),
        ),
        (
            "sparse with dilation 4 / 1, time per attended pair",
            "<=",
            1.5,
            ratio(per_pair("window 512, dilation 4"), per_pair("window 512")),
        ),
        ("sparse, 8 random blocks of 64: % of the FMA peak", ">=", 60, pattern("8 random blocks", "percent")),
        (
            "masked dense / sparse, window 512, time",
            ">=",
            3,
            ratio(pattern("window 512, masked dense", "ns_min"), pattern("window 512", "ns_min")),
        ),
        *(
            (f"{hybrid}, window of one block / {other}, time", "<=", limit, against(hybrid, other))
            for hybrid in hybrids
            for other, limit in ((small, 1.25), (exact, 0.16))
        ),
        ("backward / forward, favor cosh m128", "<=", 2.9, backward(small)),
        *((f"backward / forward, {hybrid}", "<=", 2.9, backward(hybrid)) for hybrid in hybrids),
        ("backward / forward, sparse window 512", "<=", 2.8, backward(sparse)),
        ("compile time of a header, s", "<=", 2, max((r["seconds"] for r in compiled), default=None)),
        ("size of a header, kB", "<=", 150, max((r["bytes"] / 1000 for r in compiled), default=None)),
    ]
    return "\n".join(columns([["goal", "", "", "measured", ""], *(goal(*r) for r in rows if r[3] is not None)])) + "\n"


def goal(what: str, sign: str, limit: float, value: float | None) -> list[str]:
    met = value is not None and (value >= limit if sign == ">=" else value <= limit)
    spec = ".0f" if value and value >= 1000 else ".3g"
    return [what, sign, f"{limit:g}", form(value, spec), "" if met else "open" if value is None else "missed"]


def label(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)


def form(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)


def columns(rows: list[list[str]]) -> list[str]:
    """Rows as text: the first row is the head, words to the left, numbers to the right."""
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    left = [not any(c.isdigit() for c in rows[-1][i][:1]) and rows[-1][i] != "-" for i in range(len(widths))]

    def line(r: list[str]) -> str:
        return "  ".join(c.ljust(w) if to_left else c.rjust(w) for c, w, to_left in zip(r, widths, left)).rstrip()

    return [line(rows[0]), "  ".join("-" * w for w in widths), *map(line, rows[1:])]


# ---- a GPU ---------------------------------------------------------------------------------------------------------


def gpu_curves(results: list[Line]) -> dict[str, dict[int, float]]:
    """Nanoseconds per token and head by length, of our contracts and of the peers that could be timed."""
    curves: dict[str, dict[int, float]] = {}
    for r in results:
        if r["bench"] == "speed":
            curves.setdefault(r["contract"], {})[r["tokens"]] = r["ns_med"]
        elif r["bench"] == "peer" and "ns_med" in r:
            curves.setdefault(f"{r['by']}, {r['dtype']} d{r['d']}", {})[r["tokens"]] = r["ns_med"]
    return curves


def gpu_table(results: list[Line]) -> str:
    device: Line = next((r["device"] for r in of(results, "device")), {})
    curves = gpu_curves(results)
    lengths = sorted({n for points in curves.values() for n in points})
    best = {r["contract"]: r for r in of(results, "speed")}  # of the longest sequence
    rows = [["ns per token and head", "variant", *map(label, lengths), "TFLOP/s", "% matrix"]]
    for name, points in curves.items():
        line = best.get(name, {})
        rows.append([name, str(line.get("variant", "-")), *(form(points.get(n), ".3g") for n in lengths)])
        rows[-1] += [form(line.get("tflops"), ".3g"), form(line.get("percent"), ".3g")]
    decodes = [["decode", "variant", "heads", "cached", "ns/head", "GB/s", "% copy"]]
    for r in of(results, "decode"):
        decodes.append([r["contract"], r["variant"], str(r["heads"]), str(r["cached"] or "state")])
        decodes[-1] += [form(r["ns_med"], ".3g"), form(r["gbs"], ".3g"), form(r["percent"], ".3g")]
    parts = [f"{device.get('name', '')} ({device.get('arch', '')}), causal"]
    parts += [f"{r['what']}: {form(r['value'], '.4g')}" for r in of(results, "ceiling")]
    parts += [f"PyTorch {r['version']}" for r in of(results, "torch")]
    parts += [part for table in (rows, decodes) if len(table) > 1 for part in ("", *columns(table))]
    refused = [f"{r['by']}, {r['dtype']} d{r['d']} at {r['tokens']}: {r['reason']}" for r in results if "reason" in r]
    notes = ["TFLOP/s: GEMM flops at the longest length; % of the bf16 products and of the copy measured above"]
    return "\n".join([*parts, *notes, *refused]) + "\n"


def gpu_goals(results: list[Line]) -> str:
    """What the kernels aim at on one H200 in bf16, and what was measured; empty if nothing of it was."""
    curves = gpu_curves(results)
    ceilings = {r["what"]: r["value"] for r in of(results, "ceiling")}
    decoded = of(results, "decode", contract="favor_cosh_bf16_d64_m128")
    speed = of(results, "speed", contract="favor_cosh_bf16_d64_m128")
    favor, hybrid, sparse, flash, window = (
        curves.get(name, {})
        for name in (
            *("favor_cosh_bf16_d64_m128", "hybrid_cosh_bf16_d64_m128_b64", "sparse_bf16_d64_b64"),
            *("SDPA flash, bf16 d64", "flash window, bf16 d64"),
        )
    )

    def ratio(a: dict[int, float], b: dict[int, float], tokens: int = 0) -> float | None:
        """At so many tokens, or at the most that both have."""
        n = tokens or max(a.keys() & b.keys(), default=0)
        return a[n] / b[n] if n in a and n in b else None

    faster: float | None = None
    if both := sorted(favor.keys() & flash.keys()):
        slower = max((n for n in both if favor[n] >= flash[n]), default=0)
        faster = next((n for n in both if n > slower), math.inf)
    roofline = None
    if speed and ceilings:
        last = max(speed, key=lambda r: int(r["tokens"]))
        bytes_ns = 4 * 64 * 2 / ceilings["copy, GB/s"]  # q, k, v and out of a token and head
        roofline = last["ns_med"] / max(bytes_ns, last["ns_med"] * last["percent"] / 100)
    rows = [
        ("favor cosh d64 m128 faster than flash from, tokens", "<=", 2048, faster),
        ("flash / favor at 16k tokens, time", ">=", 6, ratio(flash, favor, 16384)),
        ("favor / roofline of the ceilings above, time", "<=", 2.5, roofline),
        ("flash's own window of 512 / sparse d64, time", ">=", 0.8, ratio(window, sparse)),
        ("hybrid / favor, time", "<=", 1.3, ratio(hybrid, favor)),
        ("decode of favor, % of the copy", ">=", 80, decoded[0]["percent"] if decoded else None),
    ]
    if all(r[3] is None for r in rows):
        return ""
    head = ["goal on one H200, bf16", "", "", "measured", ""]
    return "\n".join(["", *columns([head, *(goal(*r) for r in rows)])]) + "\n"


def draw_gpu(results: list[Line], path: Path) -> list[Path]:
    """Time per token against length, where there is matplotlib."""
    curves = {name: points for name, points in gpu_curves(results).items() if len(points) > 1}
    try:
        figure, axes = new_axes("attention on a GPU: time per token and head")
    except ModuleNotFoundError:
        return []
    for name, points in curves.items():
        peer = "," in name
        axes.plot(*zip(*sorted(points.items())), "--" if peer else "-", marker="o", markersize=3.5, label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("tokens")
    axes.set_ylabel("ns per token and head")
    if curves:
        axes.legend(frameon=False, fontsize=8)
    save(figure, path)
    return [path]


# ---- pictures ------------------------------------------------------------------------------------------------------


def draw(results: list[Line], folder: Path) -> list[Path]:
    """The pictures that the results are enough for."""
    os.environ.setdefault("MPLCONFIGDIR", os.path.join(tempfile.gettempdir(), "nearfar-matplotlib"))
    import matplotlib

    matplotlib.use("Agg")
    made = []
    for name, paint in (("time.png", draw_time), ("error.png", draw_error)):
        figure = paint(results)
        if figure is None:
            (folder / name).unlink(missing_ok=True)  # of an earlier run
        else:
            save(figure, folder / name)
            made.append(folder / name)
    return made


def save(figure: Any, path: Path) -> None:
    """Write a picture at once, without dates in it."""
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=130, metadata={"Software": None})
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        scratch.write_bytes(data.getvalue())
        os.replace(scratch, path)
    except OSError as error:
        scratch.unlink(missing_ok=True)
        raise UsageError(f"cannot write {shown(str(path))}: {error.strerror}") from None


def new_axes(title: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.6, 4.8), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, fontsize=11)
    axes.grid(True, which="both", linewidth=0.3, alpha=0.6)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def draw_time(results: list[Line]) -> Any:
    """Time per token against length, both logarithmic; crossovers marked."""
    names = [n for n in contracts(results) if len(curve(results, n)) > 1]
    if not names:
        return None
    figure, axes = new_axes("attention on one core: time per token and head")
    dims = sorted({parse(n).d for n in names})
    lengths = sorted({n for name in names for n in curve(results, name)})
    cool = iter(("#1f5f99", "#2a8f6f", "#8a5fb0", "#3aa5c9", "#b08a2e", "#555555") * 8)
    for place, name in enumerate(names):
        color = "#c44e2b" if name == baseline(name) else next(cool)
        points = sorted(curve(results, name).items())
        style = ("-", "--", ":", "-.")[(len(dims) - 1 - dims.index(parse(name).d)) % 4]
        axes.plot(*zip(*points), style, marker="o", markersize=3.5, color=color, label=name)
        at = crossover(curve(results, name), curve(results, baseline(name)))
        if at is not None:
            mark_crossing(axes, dict(points), at, color, above=place % 2 == 0)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(lengths, [str(n) for n in lengths])
    axes.set_xlabel("tokens")
    axes.set_ylabel("ns per token and head")
    axes.legend(frameon=False, fontsize=9)
    return figure


def mark_crossing(axes: Any, points: dict[int, float], at: float, color: str, above: bool) -> None:
    low, high = max(n for n in points if n <= at), min(n for n in points if n >= at)
    part = 0 if high == low else math.log(at / low) / math.log(high / low)
    height = math.exp((1 - part) * math.log(points[low]) + part * math.log(points[high]))
    axes.plot([at], [height], marker="o", markersize=10, markerfacecolor="none", markeredgecolor=color)
    place: dict[str, Any] = {"xytext": (-6, 9), "ha": "right"} if above else {"xytext": (6, -15), "ha": "left"}
    axes.annotate(f"{at:.0f}", (at, height), textcoords="offset points", color=color, **place)


def draw_error(results: list[Line]) -> Any:
    """Error against exact softmax on real inputs, against the cost of a token: for two contracts or more."""
    lines = [r for r in of(results, "input", mask="full") if "calibrated" in r]
    if len({r["contract"] for r in lines}) < 2:
        return None
    figure, axes = new_axes("real inputs: error against exact softmax, and what a token costs")
    colors = ("#1f5f99", "#2a8f6f", "#8a5fb0", "#c44e2b")
    seen = list(dict.fromkeys(r["input"] for r in lines))
    for r in lines:
        ours = curve(results, r["contract"])
        tokens = max(n for n in ours if n <= 4096)
        color = colors[seen.index(r["input"]) % len(colors)]
        for key, marker in (("plain", "x"), ("balanced", "s"), ("calibrated", "o")):
            text = f"{r['input']}, {key}" if r["contract"] == lines[0]["contract"] else None
            axes.plot([ours[tokens]], [r[key]], marker=marker, color=color, linestyle="", label=text)
        axes.axhline(r["uniform"], color=color, linewidth=0.8, linestyle=":")
    axes.set_ylim(bottom=0)
    axes.set_xlabel(f"ns per token and head at {tokens} tokens")
    axes.set_ylabel("relative error (dotted: plain averaging)")
    axes.legend(frameon=False, fontsize=9)
    return figure
