"""The test command: installs what the tests need and this machine lacks, runs meson, sums up."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import UsageError
from .render import ROOT

BUILD = ROOT / "build" / "test"
LOG = BUILD / "meson-logs" / "testlog.json"


@dataclass(frozen=True)
class Need:
    """Something outside Python: the packages that bring it, and whether it is here."""

    packages: str
    present: Callable[[], bool]
    without: str  # what happens without it; empty: nothing can be tested


def add_test(commands: Any) -> None:
    parser = commands.add_parser(
        "test",
        help="run all tests",
        description="Run all tests with meson. What is missing is installed where this user may; what cannot be is\n"
        "named together with the tests that are skipped for it.",
        epilog="example: ./nearfar test\n         ./nearfar test generator     only the tests of this name",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="tests to run (default: all)")
    parser.set_defaults(run=test)


def has(*programs: str) -> Callable[[], bool]:
    return lambda: all(map(shutil.which, programs))


def compiles(source: str, *command: str) -> Callable[[], bool]:
    def try_it() -> bool:
        if not shutil.which(command[0]):
            return False
        with tempfile.TemporaryDirectory() as folder:
            call = [command[0], "-x", "c", "-", "-o", f"{folder}/a.out", *command[1:]]
            return subprocess.run(call, input=source.encode(), capture_output=True, check=False).returncode == 0

    return try_it


CRITERION = "#include <criterion/criterion.h>\nTest(a, b) {}"
FUZZER = "int LLVMFuzzerTestOneInput(const char *p, long n) { return p && n < 0; }"
NEEDS = (
    Need("gcc g++ libc6-dev", has("cc", "c++"), ""),
    Need(
        "libcriterion-dev", compiles(CRITERION, "cc", "-lcriterion"), "kernels are tested in a small frame of their own"
    ),
    Need("clang", has("clang", "clang++"), "skipping what needs clang"),
    Need("libclang-rt-dev", compiles(FUZZER, "clang", "-fsanitize=fuzzer"), "skipping the fuzzing of arguments"),
    Need(
        "gcc-aarch64-linux-gnu g++-aarch64-linux-gnu",
        has("aarch64-linux-gnu-gcc", "aarch64-linux-gnu-g++"),
        "skipping neon",
    ),
    Need("qemu-user", has("qemu-aarch64"), "skipping neon"),
    Need("libopenmpi-dev openmpi-bin", has("mpicc", "mpirun"), "skipping the example over MPI ranks"),
)


def provide(need: Need) -> None:
    """Install a need if it is missing and this user may; otherwise say how to."""
    if need.present():
        return
    command = ["apt-get", "install", "-y", "--no-install-recommends", *need.packages.split()]
    if os.geteuid() == 0 and shutil.which("apt-get"):
        print(f"installing {need.packages}", flush=True)
        env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for call in (command, ["apt-get", "update"], command):
            done = subprocess.run(call, env=env, stdin=subprocess.DEVNULL, capture_output=True, check=False)
            if call is command and done.returncode == 0 and need.present():
                return
    remedy = f"to install it: sudo {' '.join(command)}"
    if not need.without:
        raise UsageError(f"{need.packages} missing and needed by every test; {remedy}")
    print(f"{need.packages} missing, {need.without}; {remedy}", flush=True)


def test(args: argparse.Namespace) -> int:
    """Exit code of meson: the number of failed tests, at most 1 here."""
    for need in NEEDS:
        provide(need)
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    meson = [sys.executable, "-m", "mesonbuild.mesonmain"]
    again = ["--reconfigure"] if (BUILD / "build.ninja").exists() else []
    call = [*meson, "setup", *again, str(BUILD), str(ROOT)]
    setup = subprocess.run(call, env=env, capture_output=True, text=True, check=False)
    if setup.returncode:
        print(setup.stdout, setup.stderr, sep="", file=sys.stderr)
        raise UsageError(f"meson cannot set up {BUILD}")
    LOG.unlink(missing_ok=True)
    run = subprocess.run([*meson, "test", "-C", str(BUILD), "--print-errorlogs", *args.names], env=env, check=False)
    return sum_up(LOG) or min(run.returncode, 1)


def sum_up(log: Path) -> int:
    """Say what was skipped and why, then the counts."""
    if not log.exists():
        print("0 passed, 1 failed, 0 skipped: no test ran")
        return 1
    results = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines() if line.strip()]
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    for result in results:
        state = {"OK": "passed", "EXPECTEDFAIL": "passed", "SKIP": "skipped"}.get(result["result"], "failed")
        counts[state] += 1
        for line in str(result.get("stdout") or "").splitlines():
            if line.startswith("skipped:"):
                print(f"{result['name']}: {line}")
        if state == "failed":
            print(f"{result['name']}: {result['result'].lower()}")
    print(", ".join(f"{n} {state}" for state, n in counts.items()))
    return 1 if counts["failed"] else 0
