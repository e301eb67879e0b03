"""The kernel tests under sanitizers, odd flags and emulated processors, with the frame of check.h; and the fuzzer."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import ROOT, STRICT_C, Headers, need, run

LISTS = {  # meson.build's lists of contracts, and how the names in them begin or look
    "FAVORS": "favor",
    "CAUSAL_LINEARS": r"linear_(?!softmaxqk)\w+_f32_d\d+$",
    "FULL_LINEARS": r"linear_softmaxqk_f32_d\d+$",
    "OTHER_LINEARS": r"linear_\w+(f16_d\d+|_v\d+)",
    "EXACTS": "exact",
    "SPARSES": "sparse",
    "HYBRIDS": "hybrid",
}
TOPICS = ("accuracy", "bits", "state", "pattern", "linear", "backward", "projection", "compat", "arguments")
VALUES = ("accuracy", "state", "pattern:drawn", "linear", "backward:inputs")  # those in which no NaN is looked for
SMALL = (
    *("favor_exp_f32_d8_m8", "favor_trig_f32_d8_m8", "favor_relu_f32_d8_m8", "linear_elu_f32_d8"),
    *("exact_f32_d8", "sparse_f32_d8_b32", "hybrid_cosh_f32_d8_m8_b16"),
)
HALVES = ("linear_identity_f16_d32_v80", "linear_elu_bf16_d40_v64")
WIDE = ("favor_cosh_f32_d24_m48", "linear_softmaxqk_f32_d24", "exact_f32_d24")
OLDER = (
    "favor_exp_f32_d8_m8",
    "linear_elu_f32_d8",
    "hybrid_cosh_f32_d8_m8_b16",
)  # on emulated processors, and again with clang
CONTRACTS = (*SMALL, *HALVES, *WIDE)


@dataclass(frozen=True)
class Build:
    """A compiler with flags, what runs the program, and what of the tests."""

    compiler: str
    flags: str
    runner: str = ""
    topics: tuple[str, ...] = TOPICS
    contracts: tuple[str, ...] = CONTRACTS


ARM = "aarch64-linux-gnu-gcc"
SANITIZE = "-g -fsanitize=address,undefined -fno-sanitize-recover=all"  # at -O0: clang takes minutes above it
GOLDEN = ("favor_cosh_f32_d48_m96", "favor_cosh_f32_d80_m336", "favor_exp_f32_d8_m8")
BUILDS = {
    "address and undefined, gcc": Build(
        "gcc",
        f"-O0 {SANITIZE}",
        topics=("accuracy", "linear", "backward"),
        contracts=("favor_exp_f32_d8_m8", "favor_trig_f32_d8_m8", "hybrid_cosh_f32_d8_m8_b16", *HALVES, *WIDE),
    ),
    "address and undefined, clang": Build(
        "clang", f"-O0 {SANITIZE}", topics=("state", "pattern", "arguments"), contracts=(*SMALL, *HALVES)
    ),
    "fast-math": Build("gcc", "-O3 -ffast-math", topics=VALUES, contracts=(*OLDER, "sparse_f32_d8_b32", *WIDE)),
    "fast-math, clang": Build("clang", "-O3 -ffast-math", topics=("accuracy", "backward:inputs"), contracts=OLDER),
    "native": Build("gcc", "-O3 -march=native", topics=("accuracy", "backward:inputs"), contracts=WIDE),
    "neon": Build(
        ARM,
        "-O2 -static",
        "qemu-aarch64",
        ("accuracy", "state", "linear", "backward:inputs"),
        (*SMALL, *HALVES),
    ),
    "golden matrices, neon": Build(ARM, "-O1 -static", "qemu-aarch64 {} golden", ("projection",), GOLDEN),
    "golden matrices, fast-math": Build("gcc", "-O1 -ffast-math", "{} golden", ("projection",), GOLDEN),
    # That nothing newer is executed, and that the choice is right: the kernels themselves are tested above.
    "without AVX-512": Build(
        "gcc", "-O2 -static", "qemu-x86_64 -cpu Haswell-v1", ("accuracy", "backward:inputs"), OLDER
    ),
    "without AVX": Build("gcc", "-O2 -static", "qemu-x86_64 -cpu Nehalem-v1", ("accuracy", "arguments"), OLDER),
}
PACKAGES = {ARM: "gcc-aarch64-linux-gnu", "qemu-aarch64": "qemu-user", "qemu-x86_64": "qemu-user"}


def lists(contracts: tuple[str, ...]) -> list[str]:
    """What meson.build says of the contracts."""
    found = {name: " ".join(f"X({c}, y)" for c in contracts if re.match(form, c)) for name, form in LISTS.items()}
    return [f"-D{name}(X,y)={text}" for name, text in found.items()]


def kernel(build: Build, contract: str, headers: Headers, output: Path) -> Path:
    operator = contract.split("_")[0]
    features = ["-DFEATURES"] if operator in ("favor", "hybrid") else []
    run(
        *(build.compiler, "-std=c99", *build.flags.split(), *features, f"-DCONTRACT={contract}"),
        *("-I", headers(contract), "-I", ROOT / "include", "-c", ROOT / "tests" / "kernel.c", "-o", output),
    )
    return output


@pytest.mark.parametrize("name", BUILDS)
def test_build(name: str, headers: Headers, tmp_path: Path) -> None:
    build = BUILDS[name]
    for name in (build.compiler, *build.runner.split()[:1]):
        if name != "{}":
            need(name, PACKAGES.get(name, name))
    kernels = [kernel(build, c, headers, tmp_path / f"{c}.o") for c in build.contracts]
    runner = build.runner if "{}" in build.runner else f"{build.runner} {{}}"
    for topic, _, test in (topic.partition(":") for topic in build.topics):
        program = tmp_path / topic
        flags = [f for f in build.flags.split() if f not in ("-ffast-math", "-march=native")]  # the tests know NaN
        run(
            *(build.compiler, "-std=c99", "-D_POSIX_C_SOURCE=200112L", "-DNO_CRITERION", "-DQUICK=1", *STRICT_C),
            *(*flags, "-O1", *lists(build.contracts), "-I", ROOT / "include"),
            *(ROOT / "tests" / f"test_{topic}.c", *kernels, "-o", program, "-lm"),
        )
        env = {**os.environ, "ASAN_OPTIONS": "detect_leaks=1", "UBSAN_OPTIONS": "print_stacktrace=1"}
        run(*(program if word == "{}" else word for word in runner.split()), *([test] if test else []), env=env)


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
@pytest.mark.parametrize("example, contract", [("threads", "m128"), ("long_sequence", "m256")])
def test_threads_do_not_race(compiler: str, example: str, contract: str, headers: Headers, tmp_path: Path) -> None:
    """Threads that split a call over one state, and over the pieces of one sequence, under ThreadSanitizer."""
    need(compiler, compiler)
    folder = headers(f"favor_cosh_f32_d64_{contract}")
    run(
        *(compiler, "-std=gnu11", "-O0", "-g", "-fsanitize=thread", "-I", folder, ROOT / "examples" / f"{example}.c"),
        *("-o", tmp_path / example, "-pthread", "-lm"),
    )
    run(tmp_path / example, "500", "1", env={**os.environ, "TSAN_OPTIONS": "halt_on_error=1"})


def test_fuzz_arguments(headers: Headers, tmp_path: Path) -> None:
    need("clang", "clang")
    folder = headers("linear_softmaxqk_f32_d8", *SMALL)
    program = tmp_path / "fuzz"
    flags = ["-std=gnu99", "-O0", "-g1", "-fsanitize=fuzzer,address,undefined", "-fno-sanitize-recover=all"]
    probe = tmp_path / "probe.c"
    probe.write_text(
        "int LLVMFuzzerTestOneInput(const char *p, long n);\nint LLVMFuzzerTestOneInput(const char *p, long n)"
        "{ return p && n < 0; }\n",
        encoding="utf-8",
    )
    if os.system(f"clang -fsanitize=fuzzer {probe} -o {tmp_path / 'probe'} >/dev/null 2>&1"):
        pytest.skip("clang has no libFuzzer: apt install libclang-rt-dev")
    run("clang", *flags, "-I", folder, ROOT / "tests" / "fuzz_arguments.c", "-o", program)
    run(
        *(program, "-runs=10000", "-seed=1", "-max_len=96", "-len_control=0", "-timeout=60"),
        cwd=tmp_path,
    )
