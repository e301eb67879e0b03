"""The test command: on a CPU it installs what the tests need and this machine lacks, runs meson, sums up; on a GPU it
compiles the same test files against the GPU's headers and runs them."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from . import UsageError, build
from .build import BuildError
from .contract import BACKENDS, OPERATORS, Contract, allowed, parse, shown
from .render import ROOT, Recipe, check_backend, check_offered, render
from .space import default, space

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
        description="On a CPU: run all tests with meson. What is missing is installed where this user may; what\n"
        "cannot be is named together with the tests that are skipped for it.\n"
        f"On a GPU: compile the tests {', '.join(TOPICS)} of its kernels and run them.",
        epilog="examples: ./nearfar test\n"
        "          ./nearfar test generator          only the tests of this name\n"
        "          ./nearfar test --backend cuda     every kernel on the GPU: needs its compiler and jinja2, no more",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="tests to run; on a GPU also contracts (default: all)")
    parser.add_argument("--backend", default="cpu", help=f"where it runs: {', '.join(BACKENDS)} (default: cpu)")
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
    check_backend(args.backend)
    if args.backend != "cpu":
        return test_device(args.names, args.backend)
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


# ---- on a GPU ------------------------------------------------------------------------------------------------------

# The files tests/test_<topic>.c for any backend.
TOPICS = ("accuracy", "bits", "layouts", "state", "pattern", "linear", "twins")
SHAPES = (
    {"d": 64, "m": 128, "b": 64},
    {"d": 48, "m": 96, "b": 48},
    {"d": 8, "m": 8, "b": 16},
    {"d": 128, "m": 256, "b": 64},
)
INCLUDE = ("-I.", *(f"-I{ROOT / folder}" for folder in ("bench", "tests", "include", "include/nearfar", ".")))
SECONDS = 240  # for one topic and contract
PROCESSES = 8  # at once: each takes some hundred MB of the GPU's memory for its runtime
# The lists of contracts that the test files know, as meson.build has them.
LISTS = ("FAVORS", "CAUSAL_LINEARS", "FULL_LINEARS", "OTHER_LINEARS", "EXACTS", "SPARSES", "HYBRIDS", "TWINS")


def on_device(backend: str) -> list[Contract]:
    """What is tested: every operator, map and dtype that the backend has, in some sizes."""
    found = []
    for name, operator in OPERATORS.items():
        for map_, dtype, shape in product(operator.maps or ("",), operator.dtypes, SHAPES):
            numbers = {n.letter: shape[n.letter] for n in operator.numbers if not n.optional}
            contract = Contract(name, map_, dtype, **numbers)
            if allowed(map_, contract.d) and space(contract, backend):
                found.append(contract)
    return found


def list_of(contract: Contract) -> str:
    """The list that a contract belongs to; those of 16 bits have a twin in f32, but for softmaxqk: it is not causal."""
    if contract.map == "softmaxqk":
        return "FULL_LINEARS" if contract.dtype == "f32" else "OTHER_LINEARS"
    if contract.dtype != "f32":
        return "TWINS"
    return "CAUSAL_LINEARS" if contract.operator == "linear" else f"{contract.operator.upper()}S"


def twin(contract: Contract) -> Contract:
    return replace(contract, dtype="f32") if list_of(contract) == "TWINS" else contract


def entry(contract: Contract) -> str:
    """Its place in the list."""
    return f" X({', '.join(c.name for c in dict.fromkeys((contract, twin(contract))))}, y)"


def device_recipe(contract: Contract, backend: str) -> Recipe:
    """The shipped variants, and the same with segments of two chunks, so that short sequences have several."""
    shipped = default(contract, backend)
    return Recipe(contract, backend, (*shipped, *(replace(v, s=2 * v.c) for v in shipped if v.s)))


def test_device(names: list[str], backend: str) -> int:
    topics = [name for name in TOPICS if name in names] or list(TOPICS)
    unknown = [name for name in names if name not in TOPICS and "_" not in name]
    if unknown:
        raise UsageError(f"argument NAME = {shown(unknown[0])}: must be {' or '.join(TOPICS)} or a contract")
    contracts = list(map(parse, (name for name in names if name not in TOPICS))) or on_device(backend)
    for contract in contracts:
        check_offered(contract, backend)
    try:
        folder = compile_tests(topics, contracts, backend)
    except BuildError as error:
        print(f"nearfar: {error}", file=sys.stderr)
        return 1
    with ThreadPoolExecutor(min(os.cpu_count() or 1, PROCESSES)) as pool:
        codes = list(pool.map(lambda job: run_device(folder, *job), product(topics, contracts)))
    failed = sum(map(bool, codes))
    print(f"{codes.count(0)} passed, {failed} failed, 0 skipped")
    return 1 if failed or not codes.count(0) else 0


def run_device(folder: Path, topic: str, contract: Contract) -> int | None:
    """Run one topic of one contract: the exit code, with the output if it fails; None where it has no such tests."""
    command = [str(folder / f"test_{topic}"), f"::{contract.name}"]
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=SECONDS, check=False
        )
        told, code = done.stdout, done.returncode
    except subprocess.TimeoutExpired:
        told, code = f"no end after {SECONDS} s", 1
    if code == 0 and not told:
        return None
    print(f"{topic} {contract.name}: {'ok' if code == 0 else 'failed'}", flush=True)
    if code:
        print("\n".join(told.splitlines()[-20:]), flush=True)
    return code


def compile_tests(topics: list[str], contracts: list[Contract], backend: str) -> Path:
    """A folder with a program of every topic for all contracts; the kernels, which take longest, are compiled first."""
    cc, ending = build.compiler(backend), build.TOOLKITS[backend].ending
    folder = ROOT / "build" / f"test_{backend}"
    files, commands, objects = {}, [], ["device.o"]
    strict = ("-std=c99", "-D_POSIX_C_SOURCE=200112L", "-DSIMT", "-DDEVICE", "-DNF_ON_GPU", "-DNO_CRITERION", *INCLUDE)
    for contract in dict.fromkeys((*contracts, *map(twin, contracts))):
        recipe = device_recipe(contract, backend)
        files[recipe.file_name] = render(recipe)
        files[f"{recipe.kernel}.{ending}"] = f'#define NEARFAR_IMPLEMENTATION\n#include "{recipe.file_name}"\n'
        files[f"kernel_{contract.name}.c"] = '#include "kernel.c"\n'
        flags = [f"-DCONTRACT={contract.name}", f"-DBACKEND={backend}", "-DNO_BACKWARD"]
        flags += ["-DFEATURES"] if contract.m else []
        flags += [] if f"{recipe.kernel}_state_bytes(" in files[recipe.file_name] else ["-DNO_STATE"]
        commands.append(build.object_command(cc, f"{recipe.kernel}.{ending}"))
        commands.append(build.object_command(cc, f"kernel_{contract.name}.c", *strict, *flags))
        objects += [f"{recipe.kernel}.o", f"kernel_{contract.name}.o"]
    files[f"device.{ending}"] = '#include "bench/device.cu"\n'
    commands.append(build.object_command(cc, f"device.{ending}", *INCLUDE))
    lists = [f"-D{name}(X,y)={''.join(entry(c) for c in contracts if list_of(c) == name)}" for name in LISTS]
    for topic in topics:
        files[f"test_{topic}.c"] = f'#include "tests/test_{topic}.c"\n'
        commands.append(build.object_command(cc, f"test_{topic}.c", *strict, *lists))
    build.fill(folder, files)
    build.compile_all(folder, commands)
    links = [[*cc.gpu, f"test_{topic}.o", *objects, "-o", f"test_{topic}", "-lm"] for topic in topics]
    build.compile_all(folder, links)
    return folder
