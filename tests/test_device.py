"""The commands for a machine with a GPU, without one: bench/device.cu runs on the executor's stand-in for CUDA's
runtime (tests/simt/runtime.c, tests/simt/nvcc), so verifying, racing, recording and choosing are seen to work. Times
from it are a CPU's; they stay in the test's folder."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT, run
from test_tuner import PLAIN, Tuner, nearfar, states

sys.path.insert(0, str(ROOT))

from generator import build, report, testing, tuning
from generator.__main__ import main
from generator.contract import contracts, parse
from generator.space import default, space

NVCC = ROOT / "tests" / "simt" / "nvcc"
SMALL = "exact_f32_d8"


@pytest.fixture
def executor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The commands take the executor for a GPU and write to this folder."""

    class Executor(build.Toolkit):
        def no_gpu(self) -> str:
            return ""

    kit = build.TOOLKITS["cuda"]
    monkeypatch.setitem(build.TOOLKITS, "cuda", Executor(**vars(kit)))
    monkeypatch.setenv("NVCC", str(NVCC))
    for name, value in (("OUTPUT", ""), ("RECORDS", "records.jsonl"), ("RESULTS", "bench.jsonl")):
        monkeypatch.setattr(tuning, name, tmp_path / value)
    return tmp_path


# ---- without a GPU -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["tune", "test", "bench"])
@pytest.mark.parametrize("backend", ["cuda", "hip"])
def test_what_is_missing_is_one_line(
    command: str, backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kit = build.TOOLKITS[backend]
    monkeypatch.setitem(build.TOOLKITS, backend, replace(kit, library="libnowhere.so"))
    monkeypatch.setenv(kit.variable, "/nowhere/compiler")
    monkeypatch.setattr(tuning, "OUTPUT", tmp_path / "tuned")
    assert main([command, "--backend", backend]) == 1
    told = capsys.readouterr()
    assert told.out == "" and len(told.err.splitlines()) == 1
    for word in (f"'{backend}'", "libnowhere.so", kit.compiler, kit.variable, kit.driver):
        assert word in told.err
    assert "no GPU" not in told.err  # nobody could look
    assert not list(tmp_path.iterdir())


def test_a_driver_without_gpus_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any library that loads will do: this one's answer is always that something is wrong."""
    kit = replace(build.TOOLKITS["hip"], library="libc.so.6", calls=("close",))
    assert kit.no_gpu() == "a GPU (close finds none, status -1)"


def test_the_program_itself_says_that_there_is_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tuner = Tuner(tmp_path, [PLAIN], "cuda")
    monkeypatch.setenv("NO_GPU", "1")
    done = tuner.run()
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "tune: no GPU here: no CUDA-capable device is detected\n"
    assert not tuner.records.exists()


# ---- the tuner -----------------------------------------------------------------------------------------------------


def test_faults_on_a_device_are_told_apart(tmp_path: Path) -> None:
    """As on a CPU, but for a load beyond a buffer, which a GPU lets pass (the executor does not)."""
    faults = {
        "wrong": "wrong",
        "overflow": "wrong",
        "stray": "wrong",
        "nan": "wrong",
        "workspace": "wrong",
        "error": "wrong",
        "hang": "timeout",
        "late": "timeout",
        "crash": "launch",
        "constraint": "constraint",
    }
    candidates = [PLAIN, ("fast", 100, "none"), *((fault, 50, fault) for fault in faults)]
    record = Tuner(tmp_path, candidates, "cuda").tune()
    assert states(record) == {"plain": "ok", "fast": "ok", **faults}
    assert (record["winner"], record["ref"]) == ("fast", "plain")
    why = {t["n"]: t.get("why", "") for t in record["tried"]}
    assert "beside its memory" in why["stray"] and "outside out" in why["overflow"]
    assert "beside its workspace" in why["workspace"]


def test_the_record_of_a_device(tmp_path: Path) -> None:
    record = Tuner(tmp_path, [PLAIN, ("hair", 198, "none")], "cuda").tune()
    assert (record["winner"], record["tie"], record["backend"]) == ("plain", True, "cuda")
    assert record["device"]["backend"] == "cuda" and record["device"]["name"] == "the executor, not a GPU"
    assert record["device"]["arch"].startswith("sm_") and record["toolchain"].startswith("nvcc")
    assert "peak" not in record
    assert record["shape"] == {"tokens": 64, "batch": 1, "heads": 32}
    assert record["tried"][0]["med"] == pytest.approx(200e3 / 64 / 32, rel=0.3)  # a launch is all heads


def test_a_pack_for_a_gpu_tunes_without_python(tmp_path: Path) -> None:
    """One line compiles it; the record that it makes decides what `generate` ships, and only for this backend."""
    folder = tmp_path / "pack"
    assert nearfar("pack", SMALL, "--backend", "cuda", "-o", str(folder)).returncode == 0
    line = build.one_line("tune", "cuda")
    assert line == "nvcc -O2 -arch=native *.c *.cu -o tune -lm" and line in (folder / "README").read_text()
    run("sh", "-c", line.replace("nvcc", str(NVCC)), cwd=folder)
    run("./tune", "--json", "r.jsonl", "--budget", "2", "--tokens", "32", "--heads", "1", cwd=folder)
    record = json.loads((folder / "r.jsonl").read_text())
    assert {t["n"] for t in record["tried"]} == {v.suffix for v in space(parse(SMALL), "cuda")}
    assert {t["st"] for t in record["tried"]} <= {"ok", "slow"}
    last = record["tried"][-1]
    last["st"], record["winner"] = "ok", last["n"]  # on the executor anyone may win
    (folder / "r.jsonl").write_text(json.dumps(record))
    baked = nearfar("generate", SMALL, "--backend", "cuda", "--tuned", str(folder / "r.jsonl"), "-o", str(tmp_path))
    assert baked.returncode == 0, baked.stderr
    header = (tmp_path / f"nf_{SMALL}_cuda.h").read_text()
    assert f"--variants {last['n']}@" in header and last["n"] != default(parse(SMALL), "cuda")[0].suffix
    other = nearfar("generate", SMALL, "--tuned", str(folder / "r.jsonl"), "-o", str(tmp_path))
    assert "no record of" in other.stderr


def test_an_engine_in_c_attends(tmp_path: Path) -> None:
    """examples/cuda/engine.c, on the executor."""
    contract = "favor_cosh_f32_d64_m128"
    assert nearfar("generate", contract, "--backend", "cuda", "-o", str(tmp_path)).returncode == 0
    files = [str(ROOT / "examples" / "cuda" / name) for name in ("engine.c", "attention.cu")]
    include = [f"-I{tmp_path}", f"-I{ROOT / 'tests' / 'simt' / 'cuda'}"]
    run(NVCC, "-O1", "-arch=native", *include, *files, "-o", "engine", cwd=tmp_path)
    assert run("./engine", cwd=tmp_path) == "ok; the mean of equal values is 3.0000\n"


# ---- tests and bench -----------------------------------------------------------------------------------------------


def test_the_tests_run_on_a_device(
    executor: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A kernel that scales its logits wrongly is found out."""
    monkeypatch.setattr(testing, "ROOT", executor)
    words = ["test", "--backend", "cuda", "state", SMALL]
    assert main(words) == 0
    assert capsys.readouterr().out.splitlines() == [f"state {SMALL}: ok", "1 passed, 0 failed, 0 skipped"]
    right = testing.render
    assert right(testing.device_recipe(parse(SMALL), "cuda")).count("0.353553391f") == 1
    monkeypatch.setattr(testing, "render", lambda recipe: right(recipe).replace("0.353553391f", "0.36f"))
    assert main(words) == 1
    told = capsys.readouterr().out
    assert f"state {SMALL}: failed" in told and "error" in told and "0 passed, 1 failed" in told


def test_what_is_tested_on_a_device_follows_the_schema() -> None:
    for backend in build.TOOLKITS:
        found = testing.on_device(backend)
        some = (c for c in contracts() if (c.dtype, c.d, c.v) == ("f32", 16, 0) and c.m % 128 == c.b % 64 == 0)
        everything = {(c.operator, c.map) for c in some if space(c, backend)}
        assert {(c.operator, c.map) for c in found} == everything
        assert all(testing.list_of(c) in testing.LISTS for c in found)


def test_bench_for_a_gpu(executor: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(tuning, "torch_python", lambda: Path(fake_torch(executor)))
    monkeypatch.setattr(tuning, "GPU_HEADS", {"heads": 1, "decode-heads": 1})
    assert main(["bench", "favor_exp_f32_d8_m8", SMALL, "--backend", "cuda", "--tokens", "64,128"]) == 0
    lines = [json.loads(line) for line in (executor / "bench_cuda.jsonl").read_text().splitlines()]
    kinds = [line["bench"] for line in lines]
    assert kinds == ["device", "ceiling", "ceiling", *(["speed", "speed", "decode"] * 2), "torch", "peer", "peer"]
    for line in lines:
        if line["bench"] in ("speed", "decode"):
            assert 0 < line["ns_min"] <= line["ns_med"] and 0 < line["percent"] < 100
        if line["bench"] == "ceiling":
            assert line["value"] > 0
    told = capsys.readouterr().out
    assert "goal on" not in told  # of other contracts
    assert "the executor, not a GPU" in told and "SDPA flash, bf16 d64" in told and "no module named fla" in told


def fake_torch(folder: Path) -> str:
    """What bench/torch_gpu.py says, without torch."""
    peer = {"bench": "peer", "operator": "exact", "dtype": "bf16", "d": 64, "tokens": 64}
    lines = [
        {"bench": "torch", "version": "0", "gpu": True},
        {**peer, "by": "SDPA flash", "ns_med": 1.0},
    ]
    lines.append({**peer, "by": "fla", "reason": "ModuleNotFoundError: no module named fla"})
    path = folder / "fake_torch"
    path.write_text("#!/bin/sh\n" + "".join(f"echo '{json.dumps(line)}'\n" for line in lines))
    path.chmod(0o755)
    return str(path)


def test_goals_of_a_gpu() -> None:
    """Each is met, missed or open; the roofline is the larger of what the ceilings allow."""
    favor, sparse = "favor_cosh_bf16_d64_m128", "sparse_bf16_d64_b64"
    lines: list[report.Line] = [
        {"bench": "ceiling", "what": "copy, GB/s", "value": 4000.0},
        {"bench": "ceiling", "what": "bf16 products, TFLOP/s", "value": 700.0},
        *(
            {"bench": "speed", "contract": favor, "tokens": n, "ns_med": 0.25, "percent": 40.0}
            for n in (1024, 2048, 16384)
        ),
        {"bench": "speed", "contract": sparse, "tokens": 16384, "ns_med": 1.0},
        {"bench": "decode", "contract": favor, "percent": 81.0},
    ]
    for by, times in (("SDPA flash", (0.2, 0.3, 2.0)), ("flash window", (0.4, 0.5, 0.7))):
        for n, ns in zip((1024, 2048, 16384), times):
            lines.append({"bench": "peer", "by": by, "dtype": "bf16", "d": 64, "tokens": n, "ns_med": ns})
    told = [re.split(r"  +", row) for row in report.gpu_goals(lines).splitlines()[3:]]
    assert [row[3:] for row in told] == [["2048"], ["8"], ["1.95"], ["0.7", "missed"], ["-", "open"], ["81"]]
    lines[2]["ns_med"] = lines[4]["ns_med"] = 3.0  # slower at the longest
    assert report.gpu_goals(lines).count("missed") == 3 and "inf" in report.gpu_goals(lines)
    assert report.gpu_goals([]) == ""


def test_tune_for_a_gpu(executor: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", SMALL, "--backend", "cuda", "--tokens", "8", "--budget", "2"]) == 0
    record = json.loads((executor / "records.jsonl").read_text())
    assert record["contract"] == SMALL and record["device"]["name"] == "the executor, not a GPU"
    assert f"{record['winner']}" in (executor / f"nf_{SMALL}_cuda.h").read_text()
    assert record["winner"] in capsys.readouterr().out
