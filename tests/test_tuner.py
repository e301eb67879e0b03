"""The tuner's own tests: candidates that are slow, wrong, hanging, overflowing or crashing must be told apart, the
default must give way only to a clear margin, and an interruption must leave nothing behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from generator import UsageError, build, inputs, projections, quality, report  # noqa: E402
from generator.contract import parse  # noqa: E402
from generator.render import Recipe  # noqa: E402
from generator.space import default  # noqa: E402

CC = os.environ.get("CC") or shutil.which("cc") or "gcc"
INCLUDE = [f"-I{ROOT / folder}" for folder in ("bench", "tests", "include", "include/nearfar")]
Fault = tuple[str, float, str]  # name, microseconds per launch, fault
PLAIN: Fault = ("plain", 200, "none")

KERNELS_H = """\
#ifndef KERNELS_H
#define KERNELS_H
#define FAULTS(X) {faults}
#include "faulty.h"
#define NF_TOOL "test"
#define NF_BACKEND "{backend}"
#define nf_faulty_cpu_STATE NULL, NULL
{switch}
#define NF_KERNELS(X) X(nf_faulty_cpu, "faulty_d8", exact, none, f32, 8, 8, 0, 0, 0)
#define nf_faulty_cpu_CODES(X) {codes}
#endif
"""


def compile_c(folder: Path, sources: list[str], program: str, cc: str = CC) -> Path:
    """Compile as one line, as it would be done by hand."""
    command = [cc, "-O1", f"-I{folder}", *INCLUDE, *sources, "-o", program, "-lm", "-lpthread"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / program


class Tuner:
    """The tuner, with these candidates; the first is the default. For a GPU (cuda) they get memory of the device from
    the executor's runtime."""

    def __init__(self, folder: Path, faults: list[Fault], backend: str = "cpu") -> None:
        self.records = folder / "records.jsonl"
        rows = " ".join(f"X({name}, {microseconds}, {fault})" for name, microseconds, fault in faults)
        codes = " ".join(f'X("{name}", "code-of-{name}", {int(i == 0)})' for i, (name, _, _) in enumerate(faults))
        gpu = backend != "cpu"
        text = KERNELS_H.format(faults=rows, codes=codes, backend=backend, switch="#define NF_ON_GPU" if gpu else "")
        (folder / "kernels.h").write_text(text)
        (folder / "faulty.c").write_text('#define NEARFAR_IMPLEMENTATION\n#include "kernels.h"\n')
        sources = ["faulty.c", str(ROOT / "bench" / "tune.c"), *([str(ROOT / "bench" / "device.cu")] if gpu else [])]
        self.program = compile_c(folder, sources, "tune", str(ROOT / "tests" / "simt" / "nvcc") if gpu else CC)

    def command(self, *options: str) -> list[str]:
        fixed = ["--json", str(self.records), "--tokens", "64", "--timeout", "1"]
        return [str(self.program), *fixed, *options]

    def run(self, *options: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(self.command(*options), capture_output=True, text=True, check=False, timeout=120)

    def tune(self, *options: str) -> dict[str, Any]:
        """Run it; the record that it appended."""
        done = self.run("--budget", "2", *options)
        assert done.returncode in (0, 1), done.stderr
        lines = self.records.read_text().splitlines()
        record: dict[str, Any] = json.loads(lines[-1])
        assert (done.returncode == 0) == bool(record["winner"])
        return record


Make = Callable[[list[Fault]], Tuner]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    return lambda faults: Tuner(tmp_path, faults)


def states(record: dict[str, Any]) -> dict[str, str]:
    return {tried["n"]: tried["st"] for tried in record["tried"]}


def test_every_fault_is_told_apart(make: Make) -> None:
    faults = {
        "wrong": "wrong",
        "overflow": "wrong",
        "nan": "wrong",
        "workspace": "wrong",
        "error": "wrong",
        "hang": "timeout",
        "late": "timeout",
        "crash": "launch",
        "overread": "launch",
        "stray": "launch",
        "constraint": "constraint",
    }
    record = make(
        [PLAIN, ("slow", 400, "none"), ("hopeless", 900, "none"), *((fault, 50, fault) for fault in faults)]
    ).tune()
    assert states(record) == {"plain": "ok", "slow": "slow", "hopeless": "slow", **faults}
    assert record["winner"] == record["ref"] == "plain"
    assert not record["tie"]
    tried = {t["n"]: t for t in record["tried"]}
    assert tried["wrong"]["err"] > 1e-5
    assert "outside out" in tried["overflow"]["why"]
    assert "outside the workspace" in tried["workspace"]["why"]


def test_a_clearly_faster_candidate_wins(make: Make) -> None:
    record = make([PLAIN, ("other", 190, "none"), ("fast", 150, "none")]).tune()
    assert (record["winner"], record["ref"], record["tie"]) == ("fast", "plain", False)
    assert 0.25 < record["margin"] < 0.42


def test_one_percent_is_a_tie_and_the_default_stays(make: Make) -> None:
    record = make([PLAIN, ("hair", 198, "none")]).tune()
    assert (record["winner"], record["tie"], record["margin"]) == ("plain", True, 0)


def test_a_tie_among_the_faster_goes_by_the_table(make: Make) -> None:
    record = make([PLAIN, ("first", 150, "none"), ("second", 149, "none")]).tune()
    assert (record["winner"], record["tie"]) == ("first", True)


def test_the_default_stays_against_slower_ones(make: Make) -> None:
    record = make([PLAIN, ("a", 230, "none"), ("b", 240, "none")]).tune()
    assert (record["winner"], record["tie"]) == ("plain", False)


def test_a_fast_but_wrong_candidate_never_wins(make: Make) -> None:
    record = make([PLAIN, ("quick", 20, "wrong")]).tune()
    assert record["winner"] == "plain"
    assert "med" not in record["tried"][1]


def test_a_wrong_default_loses(make: Make) -> None:
    record = make([("plain", 100, "wrong"), ("sound", 200, "none")]).tune()
    assert (record["winner"], record["ref"]) == ("sound", "plain")


def test_a_slow_default_still_meets_the_winner(make: Make) -> None:
    record = make([("plain", 700, "none"), ("fast", 100, "none")]).tune()
    assert record["winner"] == "fast"
    assert record["margin"] == pytest.approx(6, rel=0.3)
    assert states(record)["plain"] == "ok"


def test_nothing_right_is_a_failure(make: Make) -> None:
    tuner = make([("plain", 100, "wrong"), ("other", 100, "crash")])
    assert tuner.tune()["winner"] == ""


def test_two_tunings_agree(make: Make) -> None:
    tuner = make([PLAIN, ("a", 150, "none"), ("b", 152, "none"), ("c", 160, "none")])
    first, second = tuner.tune(), tuner.tune()
    assert first["winner"] == second["winner"] or (first["tie"] and second["tie"])
    assert len(tuner.records.read_text().splitlines()) == 2


def test_the_record_is_complete_and_discreet(make: Make) -> None:
    record = make([PLAIN, ("fast", 150, "none")]).tune("--heads", "3", "--batch", "2")
    assert record["v"] == 1
    assert record["contract"] == "faulty_d8"
    assert record["shape"] == {"tokens": 64, "batch": 2, "heads": 3}
    assert record["cache"] == "cold"
    assert {"backend", "vendor", "arch", "name", "units"} <= set(record["device"])
    assert record["toolchain"].split()[0] in ("gcc", "clang")
    fast = record["tried"][1]
    assert {"n", "code", "st", "med", "p20", "p80", "min", "k", "err"} <= set(fast)
    assert fast["code"] == "code-of-fast"
    assert fast["min"] <= fast["p20"] <= fast["med"] <= fast["p80"]
    assert fast["med"] == pytest.approx(150e3 / 64, rel=0.3)
    text = json.dumps(record)
    assert os.uname().nodename not in text
    assert str(ROOT) not in text


def test_lengths_and_events(make: Make) -> None:
    tuner = make([PLAIN, ("fast", 150, "none")])
    done = tuner.run("--tokens", "64,128", "--events", "--budget", "3")
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert [e["record"]["shape"]["tokens"] for e in events if e["event"] == "record"] == [64, 128]
    assert len(tuner.records.read_text().splitlines()) == 2


def test_the_budget_is_kept(make: Make) -> None:
    tuner = make([PLAIN, *((f"v{i}", 190 + i, "none") for i in range(10))])
    start = time.monotonic()
    assert tuner.run("--budget", "1.5").returncode == 0
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("number, wait", [(signal.SIGINT, 0.1), (signal.SIGTERM, 0.9)])
def test_an_interruption_leaves_nothing(make: Make, number: signal.Signals, wait: float) -> None:
    tuner = make([PLAIN, ("hang", 100, "hang"), ("fast", 150, "none")])
    tuner.tune()
    before = tuner.records.read_text()
    process = subprocess.Popen(
        tuner.command("--timeout", "30"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    time.sleep(wait)
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert errors.decode().splitlines() == ["tune: interrupted, nothing recorded"]
    assert tuner.records.read_text() == before
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)  # no child is left


def test_wrong_options_are_one_line(make: Make, tmp_path: Path) -> None:
    tuner = make([PLAIN])
    for options in (["--budget", "-1"], ["--tokens", "0"], ["--tokens", "a"], ["--nonsense"], ["--contract", "none"]):
        done = tuner.run(*options)
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1
        assert options[0] in done.stderr
    done = tuner.run("--json", str(tmp_path / "nowhere" / "records.jsonl"), "--budget", "1")
    assert done.returncode == 2
    assert "cannot write" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_oracle_agrees_with_itself(tmp_path: Path) -> None:
    program = compile_c(tmp_path, [str(ROOT / "tests" / "check_oracle.c")], "check_oracle")
    done = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"they differ by {done.stdout}"


# ---- the Python side -----------------------------------------------------------------------------------------------


def test_crossover() -> None:
    exact = {n: 0.7 * n + 30 for n in (64, 128, 256, 512, 1024, 4096)}
    ours = dict.fromkeys(exact, 350.0)
    assert report.crossover(ours, exact) == pytest.approx(457, rel=0.03)
    assert report.crossover(dict.fromkeys(exact, 1000000000.0), exact) is None
    assert report.crossover({}, exact) is None


def save(folder: Path, **arrays: Any) -> Path:
    import numpy as np

    folder.mkdir(exist_ok=True)
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    return folder


def test_broken_inputs_are_told_in_one_line(tmp_path: Path) -> None:
    np = pytest.importorskip("numpy")
    good = np.ones((1, 4, 2, 8), np.float16)
    bad = good.copy()
    bad[0, 3, 1, 2] = np.nan
    assert inputs.load(save(tmp_path / "good", q=good, k=good, v=good))["q"].dtype == np.float32
    cases = {
        "v.npy": save(tmp_path / "missing", q=good, k=good),
        "shape": save(tmp_path / "shapes", q=good, k=good[:, :2], v=good),
        "dtype": save(tmp_path / "dtype", q=good.astype(np.int32), k=good, v=good),
        "[batch, token, head, dim]": save(tmp_path / "axes", q=good[0], k=good, v=good),
        "[0, 3, 1, 2]": save(tmp_path / "finite", q=good, k=bad, v=good),
        "broken": save(tmp_path / "broken", q=good, k=good, v=good),
        "objects": save(tmp_path / "objects", q=np.array([{}]), k=good, v=good),
    }
    (cases["broken"] / "q.npy").write_bytes(b"\x93NUMPY\x01\x00 nonsense")
    for word, folder in cases.items():
        with pytest.raises(UsageError) as caught:
            inputs.load(folder)
        message = str(caught.value)
        assert "\n" not in message
        assert "npy" in message
        assert word in message or word == "objects"


def nearfar(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "generator", *words]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True, check=False)


def test_a_missing_compiler_is_one_line() -> None:
    done = nearfar("tune", CC="/nowhere/cc")
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "nearfar: environment variable CC = '/nowhere/cc': is no compiler that can be run"
    ]


def test_wrong_usage_of_the_commands(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    for words in (
        ["tune", "favor_cosh_f32_d7_m16"],
        ["tune", "--budget", "soon"],
        ["tune", "--tokens", "1,,2"],
        ["tune", "--input", str(tmp_path / "none")],
        ["tune", "--backend", "abacus"],
        ["pack", "exact_f32_d16", "-o", str(blocked)],
        ["pack", "exact_f32_d16"],
    ):
        done = nearfar(*words)
        assert done.returncode == 2, words
        assert len(done.stderr.splitlines()) == 1


def test_a_pack_tunes_without_python(tmp_path: Path) -> None:
    folder = tmp_path / "pack"
    contracts = ["exact_f32_d8", "favor_cosh_f32_d8_m8"]
    assert nearfar("pack", *contracts, "-o", str(folder)).returncode == 0
    sources = [path.name for path in folder.glob("*.c")]
    done = subprocess.run(
        [CC, "-O0", *sources, "-o", "tune", "-lm"], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    done = subprocess.run(
        [str(folder / "tune"), "--json", "r.jsonl", "--budget", "3", "--tokens", "256"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = [json.loads(line)["contract"] for line in (folder / "r.jsonl").read_text().splitlines()]
    assert sorted(found) == sorted(contracts)
    assert nearfar("generate", "exact_f32_d8", "--tuned", str(folder / "r.jsonl"), "-o", str(tmp_path)).returncode == 0


@pytest.mark.parametrize(
    "contract",
    ["exact_f32_d8", "favor_exp_f32_d8_m8", "linear_elu_f32_d8", "linear_softmaxqk_f32_d8", "sparse_f32_d8_b16"],
)
@pytest.mark.parametrize("program", ["tune", "bench"])
def test_every_operator_alone_makes_a_program(program: str, contract: str, tmp_path: Path) -> None:
    """What a header leaves to others is not missed by the programs around it."""
    for name, text in build.sources(program, [Recipe(parse(contract), "cpu", tuple(default(parse(contract))))]).items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    command = [CC, "-fsyntax-only", "-Wall", "-Wextra", "-Werror", f"{program}.c"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_quality_runs_the_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A window over everything is exact; the far field of a hybrid beats what it leaves out; costs are alike."""
    np = pytest.importorskip("numpy")
    monkeypatch.setattr(quality, "OUTPUT", tmp_path)
    sparse, hybrid = "sparse_f32_d16_b16", "hybrid_cosh_f32_d16_m64_b16"
    ways = (
        quality.Way("all", sparse, window=200),
        quality.Way("near", sparse, window=24),
        quality.Way("both", hybrid, window=16, fit="calibrated"),
        quality.Way("constant far field", window=16),
    )
    dice = np.random.default_rng(1)
    q, k, v = (dice.normal(size=(200, 2, 16)).astype(np.float32) for _ in range(3))
    lines = quality.judge(quality.Case("case", 1, 0.5 * q, 0.5 * k, v, ways), quality.library([sparse, hybrid]))
    errors = {line["way"]: line["error"] for line in lines}
    assert errors["all"] < 1e-5
    assert errors["both"] < 0.5 * errors["near"]
    assert errors["constant far field"] < 0.5 * errors["near"]
    assert "[0.000]" in quality.table(lines)


def test_quality_compares_at_equal_cost() -> None:
    for ways, tokens, d in ((quality.SYNTHETIC, 2048, 64), (quality.REAL, 384, 32)):
        costs = [quality.cost(way, tokens, d) for way in ways]
        assert max(costs) < 1.3 * min(costs)


def test_projections_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With next to no logits left, attention is the mean for every seed; drawn rows scatter, more of them less."""
    np = pytest.importorskip("numpy")
    monkeypatch.setattr(quality, "OUTPUT", tmp_path)
    contracts = ["favor_cosh_f32_d8_m16", "favor_cosh_f32_d8_m256"]
    dice = np.random.default_rng(1)
    q, k, v = (dice.normal(size=(64, 2, 8)).astype(np.float32) for _ in range(3))
    case = quality.Case("case", 1, q / 2, k / 2, v, ())
    loaded = quality.library(contracts)
    few, many = (quality.Kernel(loaded, c) for c in contracts)
    ways = {
        "mean": projections.Way("", fit=True, tau=0.001, flags=projections.KEEP_MEAN),
        "normal": projections.Way("", normal=True),
        "sampled": projections.Way("", flags=projections.SIMPLEX),
        "favor++": projections.Way("", fit=True, flags=projections.OPTIMAL_FEATURES),
    }
    bias, spread = ({}, {})
    for name, way in ways.items():
        for size, kernel in (("few", few), ("many", many)):
            bias[name, size], spread[name, size] = map(float, projections.judge(way, case, kernel).split(" / "))
    average = np.cumsum(v.astype(np.float64), axis=0) / np.arange(1, 65)[:, None, None]
    truth = [quality.softmax(case.q[:, h], case.k[:, h], v[:, h])[32:] for h in range(2)]
    expected = np.mean([quality.distance(average[32:, h], truth[h]) for h in range(2)])
    assert spread["mean", "few"] < 0.002 and abs(bias["mean", "few"] - expected) < 0.002
    for name in ("normal", "sampled", "favor++"):
        assert spread[name, "few"] > 0.05 and spread[name, "many"] < spread[name, "few"] / 2
        assert bias[name, "many"] < 0.1
