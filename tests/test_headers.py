"""Headers as users meet them: every standard and compiler, alone and together, once and twice, and what they export."""

from __future__ import annotations

import os
import re
import resource
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT, STRICT, STRICT_C, Headers, generate, need, run

FAVOR = "favor_cosh_f32_d64_m128"
EXACT = "exact_f32_d64"
SPARSE = "sparse_f32_d8_b32"
HYBRID = "hybrid_cosh_f32_d8_m8_b16"
LINEAR = "linear_taylor2_bf16_d8"
SMALL = ["favor_cosh_f32_d8_m8", "favor_exp_f32_d8_m8", "exact_f32_d8"]
MAPS = ["favor_trig_f32_d8_m8", "favor_relu_f32_d8_m8"]
ALL = [FAVOR, EXACT, *SMALL, *MAPS, "favor_cosh_f32_d48_m96", "favor_exp_f32_d64_m256"]
OPTIMISE = {"gcc": "-O2", "g++": "-O1"}  # others -O0: what clang warns of does not depend on it
PACKAGES = {"gcc": "gcc", "g++": "g++", "clang": "clang", "clang++": "clang"}


def include(contract: str, define: str = "") -> str:
    return (f"#define {define}\n" if define else "") + f'#include "nf_{contract}_cpu.h"\n'


# A source for each way to bring a header in.
SOURCES = {
    "alone": include(FAVOR),
    "implementation": include(FAVOR, "NEARFAR_IMPLEMENTATION"),
    "exact": include(EXACT, "NEARFAR_IMPLEMENTATION"),
    "sparse": include(SPARSE, "NEARFAR_IMPLEMENTATION"),
    "hybrid": include(HYBRID, "NEARFAR_IMPLEMENTATION"),
    "linear": include(LINEAR, "NEARFAR_IMPLEMENTATION"),
    "tiles": include("favor_exp_bf16_d8_m8", "NEARFAR_IMPLEMENTATION"),
    "forward only": "#define NEARFAR_FORWARD_ONLY\n" + include(HYBRID, "NEARFAR_IMPLEMENTATION"),
    "static": include(SMALL[0], "NEARFAR_STATIC"),
    "again and again": include(SMALL[0]) + include(SMALL[0], "NEARFAR_IMPLEMENTATION") + include(SMALL[0]),
    "other maps": "".join(include(c, "NEARFAR_IMPLEMENTATION") for c in MAPS),
    "two headers": include(SMALL[0], "NEARFAR_IMPLEMENTATION") + include(SMALL[2]),
    "all operators": "".join(
        include(c, "NEARFAR_STATIC" if c == SPARSE else "") for c in (SPARSE, HYBRID, LINEAR, *SMALL[1:])
    ),
}
# Every source is compiled by one compiler of C and one of C++ (the largest with at most -O1) and checked by the others.
FULL = ("c99", "c++20")
COMPILED = (("gcc", "c99"), ("clang++", "c++20"))
LARGE = ("hybrid", "all operators", "tiles")
C_STANDARDS = ["c99", "c11", "c17", "c2x"]
CXX_STANDARDS = ["c++11", "c++14", "c++17", "c++20"]
MATRIX = [
    (compiler, standard, name)
    for compiler in PACKAGES
    for standard in (CXX_STANDARDS if "++" in compiler else C_STANDARDS)
    for name in SOURCES
    if standard in FULL or name in ("hybrid", "linear", "static")
]


def used_headers(source: str, headers: Headers) -> Path:
    """The folder with the headers that a source includes."""
    return headers(*re.findall(r'#include "nf_(\w+)_cpu.h"', source))


def compile_source(compiler: str, standard: str, source: str, headers: Headers, output: Path, *flags: object) -> Path:
    """An object file of C or C++ source text."""
    language = "c++" if "++" in compiler else "c"
    file = output.with_suffix(".cpp" if language == "c++" else ".c")
    file.write_text(source, encoding="utf-8")
    strict = STRICT if language == "c++" else STRICT_C
    run(
        compiler,
        f"-std={standard}",
        OPTIMISE.get(compiler, "-O0"),
        *strict,
        *flags,
        "-I",
        used_headers(source, headers),
        "-c",
        file,
        "-o",
        output,
    )
    return output


def symbols(file: Path, *flags: str) -> list[str]:
    return [line.split()[-1] for line in run("nm", *flags, file).splitlines() if line.strip()]


# What a compiler may call on its own: copies, the CPU's name, the table of addresses, the stack check.
ALLOWED = re.compile(
    r"memcpy|memset|memmove|memcmp|bcmp|__cpu_model|__cpu_indicator_init|_GLOBAL_OFFSET_TABLE_|__stack_chk_fail"
)


@pytest.mark.parametrize("compiler, standard, name", MATRIX)
def test_compiles(compiler: str, standard: str, name: str, headers: Headers, tmp_path: Path) -> None:
    """No warning; exported are the names of implemented kernels alone; called is nothing but what a compiler brings."""
    need(compiler, PACKAGES[compiler])
    if (compiler, standard) not in COMPILED and name != "all operators":
        compile_source(compiler, standard, SOURCES[name], headers, tmp_path / "a.o", "-fsyntax-only")
        return
    flags = ["-O1"] if name in LARGE and "clang" not in compiler else []
    built = compile_source(compiler, standard, SOURCES[name], headers, tmp_path / "a.o", *flags)
    implemented = re.findall(r'"(\w+)\.h"', SOURCES[name].partition("#define NEARFAR_IMPLEMENTATION\n")[2])
    exported = symbols(built, "-g", "--defined-only")
    assert [s for s in exported if not s.startswith(tuple(f"{header}_" for header in implemented))] == []
    assert all(f"{header}_forward" in exported for header in implemented)
    assert [s for s in symbols(built, "-u") if not ALLOWED.fullmatch(s)] == []


def test_compiles_on_arm(headers: Headers, tmp_path: Path) -> None:
    for compiler, standard, flag in (
        ("aarch64-linux-gnu-gcc", "c99", "-O1"),
        ("aarch64-linux-gnu-g++", "c++20", "-fsyntax-only"),
    ):
        need(compiler, "gcc-aarch64-linux-gnu g++-aarch64-linux-gnu")
        for name in ("implementation", "exact", "sparse", "hybrid"):
            compile_source(compiler, standard, SOURCES[name], headers, tmp_path / "a.o", flag)


def test_compiles_with_nvcc(headers: Headers, tmp_path: Path) -> None:
    need("nvcc", "nvidia-cuda-toolkit")
    source = tmp_path / "a.cu"
    source.write_text(include(SMALL[0], "NEARFAR_IMPLEMENTATION") + "int main() { return 0; }\n", encoding="utf-8")
    run("nvcc", "-x", "cu", "-c", "-I", headers(*SMALL), source, "-o", tmp_path / "a.o")


def test_no_data(headers: Headers, tmp_path: Path) -> None:
    """No variables: the object's writable sections are empty."""
    built = compile_source("gcc", "c99", SOURCES["implementation"], headers, tmp_path / "a.o", "-fno-pic", "-O0")
    kinds = {line.split()[-2] for line in run("nm", built).splitlines() if line.strip()}
    assert not kinds & set("bBC"), "the header has zero-initialised variables"
    sizes = run("size", "-A", built)
    data = re.search(r"^\.data\s+(\d+)", sizes, re.MULTILINE)
    assert not data or int(data[1]) == 0, f"the header has initialised variables\n{sizes}"


def test_one_implementation_two_users(headers: Headers, tmp_path: Path) -> None:
    """One file implements, two use it: they link, the macros stay in their file."""
    entry = f"nf_{SMALL[0]}_cpu_workspace"
    files = {
        "implementation": include(SMALL[0], "NEARFAR_IMPLEMENTATION"),
        "user": include(SMALL[0]) + f"size_t user(void);\nsize_t user(void) {{ return {entry}(NULL); }}\n",
        "main": include(SMALL[0]) + f"size_t user(void);\nint main(void) {{ return user() != {entry}(NULL); }}\n",
    }
    objects = [compile_source("gcc", "c99", text, headers, tmp_path / f"{name}.o") for name, text in files.items()]
    run("gcc", *objects, "-o", tmp_path / "a.out")
    run(tmp_path / "a.out")


@pytest.mark.parametrize("compiler, order", [("gcc", ALL), ("clang++", ALL[::-1])])
def test_all_in_one_file(compiler: str, order: list[str], headers: Headers, tmp_path: Path) -> None:
    """Every header in one translation unit, in both orders."""
    need(compiler, PACKAGES[compiler])
    source = "#define NEARFAR_IMPLEMENTATION\n" + "".join(map(include, order))
    compile_source(compiler, "c++17" if "++" in compiler else "c99", source, headers, tmp_path / "a.o", "-O0")


def test_two_prefixes(headers: Headers, tmp_path: Path) -> None:
    """Two products in one binary, each with its own prefix; even in one file."""
    folder = generate(tmp_path, SMALL[0], "--prefix", "eng_")
    assert not re.search(
        r"\b(nf|NF)_", (folder / f"eng_{SMALL[0]}_cpu.h").read_text(encoding="utf-8").split("*/", 1)[1]
    )
    use = f"nf_{SMALL[0]}_cpu_workspace(NULL) != eng_{SMALL[0]}_cpu_workspace(NULL)"
    main = f"int main(void) {{ return {use}; }}\n"
    source = f'{include(SMALL[0], "NEARFAR_IMPLEMENTATION")}#include "eng_{SMALL[0]}_cpu.h"\n'
    built = compile_source("gcc", "c99", source + main, headers, tmp_path / "a.o", "-O0", "-I", folder)
    run("gcc", built, "-o", tmp_path / "a.out")
    run(tmp_path / "a.out")


def test_static_among_declared(headers: Headers, tmp_path: Path) -> None:
    """NEARFAR_STATIC keeps a header inside the file, whatever was declared before it."""
    source = include(SMALL[0]) + include(SMALL[2], "NEARFAR_STATIC")
    assert not symbols(compile_source("gcc", "c99", source, headers, tmp_path / "a.o", "-O0"), "-g", "--defined-only")


def test_macros_stay_inside(headers: Headers, tmp_path: Path) -> None:
    """A header defines no macro but those of its prefix, and its own guard."""
    source = tmp_path / "a.c"
    for define in ("", "NEARFAR_IMPLEMENTATION"):
        source.write_text(
            "#include <stddef.h>\n#include <stdint.h>\n#include <string.h>\n" + include(FAVOR, define), "utf-8"
        )
        text = run("gcc", "-std=c99", "-dD", "-E", "-I", headers(FAVOR), source)
        file, foreign = "", []
        for line in text.splitlines():
            marker = re.match(r'# \d+ "([^"]*)"', line)
            file = marker[1] if marker else file
            macro = re.match(r"#define (\w+)", line)
            if macro and file.endswith(f"nf_{FAVOR}_cpu.h") and not macro[1].startswith(("NF_", "NEARFAR_")):
                foreign.append(macro[1])
        assert foreign == []


# Contract, most bytes, and seconds that gcc -O2 may take for it: forward only, and with the backward.
LIMITS = [
    ("favor_exp_f32_d64_m256", 150_000, 2.3, 4.5),
    (EXACT, 104_000, 1.5, 3.0),
    ("sparse_f32_d64_b64", 150_000, 2.0, 3.5),
    ("hybrid_cosh_f32_d64_m128_b64", 225_000, 5.0, 9.0),
]


@pytest.mark.parametrize("contract, most, forward, everything", LIMITS)
def test_small_and_quick(
    contract: str, most: int, forward: float, everything: float, headers: Headers, tmp_path: Path
) -> None:
    """Size, and processor time to compile on an idle machine (a half more on a busy one, best of three)."""
    folder = headers(contract)
    size = (folder / f"nf_{contract}_cpu.h").stat().st_size
    source = tmp_path / "a.c"
    source.write_text(include(contract, "NEARFAR_IMPLEMENTATION"), encoding="utf-8")
    for flags, limit in ((["-DNEARFAR_FORWARD_ONLY"], forward), ([], everything)):
        times = []
        for _ in range(3):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            run("gcc", "-O2", *flags, "-I", folder, "-c", source, "-o", tmp_path / "a.o")
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
            if min(times) < 1.5 * limit:
                break
        print(f"{contract} {size / 1000:.0f} kB {' '.join(flags)}: {min(times):.2f} s")
        assert min(times) < 1.5 * limit
    assert size < most


MEMORY = """
#include <stdio.h>
#include <stdlib.h>
#include <sys/resource.h>
static long peak(void)
{
    struct rusage r;
    getrusage(RUSAGE_SELF, &r);
    return r.ru_maxrss;
}
int main(void)
{
    enum { N = 1 << 18, D = 8 };
    float *x = calloc(4 * (size_t)N * D, sizeof(float));
    nf_pattern pattern = {.window = 64, .globals = 4};
    nf_args a = {.batch = 1, .heads = 1, .q_tokens = N, .pattern = &pattern};
    size_t bytes = K(workspace)(&a);
    void *workspace = aligned_alloc(NF_ALIGN, bytes), *projection = NULL;
    long before;
    nf_status s = NF_OK;
    for (size_t i = 0; i < 4 * (size_t)N * D; i++)
        x[i] = (float)(i % 97) / 97;
    a.q.data = x, a.k.data = x + N * D, a.v.data = x + 2 * N * D, a.out.data = x + 3 * N * D;
#ifdef PROJECTION
    projection = aligned_alloc(NF_ALIGN, K(projection_bytes)());
    s = K(projection_init)(projection, 1, NULL);
    a.projection = projection;
#endif
    before = peak();
    if (s == NF_OK)
        s = K(forward)(&a, workspace, bytes);
    printf("%s; %ld KiB\\n", nf_status_text(s), peak() - before);
    free(x), free(workspace), free(projection);
    return 0;
}
"""


@pytest.mark.parametrize("contract", [SPARSE, HYBRID])
def test_memory_is_constant(contract: str, headers: Headers, tmp_path: Path) -> None:
    """A call over 2^18 tokens touches its arrays and its workspace, nothing that grows."""
    source = tmp_path / "a.c"
    entry = f"#define K(name) nf_{contract}_cpu_##name\n" + ("#define PROJECTION\n" if contract == HYBRID else "")
    source.write_text(include(contract, "NEARFAR_STATIC") + entry + MEMORY, encoding="utf-8")
    run("gcc", "-std=gnu11", "-O1", "-w", "-I", headers(contract), source, "-o", tmp_path / "a.out")
    told = re.fullmatch(r"ok; (\d+) KiB\n", run(tmp_path / "a.out"))
    assert told and int(told[1]) < 2048


# Open MPI: run as root too (in a container), and more ranks than cores.
MPI_SETTINGS = ("ALLOW_RUN_AS_ROOT", "ALLOW_RUN_AS_ROOT_CONFIRM", "MCA_rmaps_base_oversubscribe")
EXAMPLES = sorted(file.name for file in (ROOT / "examples").glob("*.c"))


@pytest.mark.parametrize("name", [name for name in EXAMPLES if not name.endswith("_mpi.c")])
def test_examples(name: str, headers: Headers, tmp_path: Path) -> None:
    build_example("gcc", name, headers, tmp_path)
    assert re.match(r"ok; ", run(tmp_path / "a.out"))


@pytest.mark.parametrize("name", [name for name in EXAMPLES if name.endswith("_mpi.c")])
def test_mpi_examples(name: str, headers: Headers, tmp_path: Path) -> None:
    """One compilation, runs of one rank and of more than there are cores."""
    for program in ("mpicc", "mpirun"):
        need(program, "libopenmpi-dev openmpi-bin")
    build_example("mpicc", name, headers, tmp_path)
    env = os.environ | {f"OMPI_{setting}": "1" for setting in MPI_SETTINGS}
    for ranks in (1, 2, 5):
        assert re.search(rf"^ok; {ranks} ranks", run("mpirun", "-n", ranks, tmp_path / "a.out", env=env), re.MULTILINE)


def build_example(compiler: str, name: str, headers: Headers, tmp_path: Path) -> None:
    source = ROOT / "examples" / name
    folder = used_headers(source.read_text(encoding="utf-8"), headers)
    flags = ["-std=gnu11", "-O0", *STRICT_C]
    run(compiler, *flags, "-I", folder, source, "-o", tmp_path / "a.out", "-lm", "-pthread")


def test_readme_example() -> None:
    """The README's example is an excerpt of examples/minimal.c."""
    readme = ROOT / "README.md"
    if not readme.exists():
        pytest.skip("README.md is missing")
    blocks = re.findall(r"```c\n(.*?)```", readme.read_text(encoding="utf-8"), re.DOTALL)
    blocks = [block for block in blocks if "NEARFAR_IMPLEMENTATION" in block]
    assert blocks, "the README has no example"
    minimal = (ROOT / "examples" / "minimal.c").read_text(encoding="utf-8")
    assert all(block.strip() in minimal for block in blocks)


def test_git_ignores_what_the_documented_lines_make() -> None:
    """Programs of the compile lines in README and examples, and headers where their commands write them."""
    need("git", "git")
    if not (ROOT / ".git").exists():
        pytest.skip("this is no checkout of git")
    made = ["nf_x.h", "examples/cuda/nf_x.h"]
    for path in [ROOT / "README.md", *ROOT.glob("examples/**/*.c")]:
        folder = "examples/cuda/" if path.parent.name == "cuda" else ""
        lines = re.findall(r"cc -O2 .*\w\.c .*-o (\w+)", path.read_text(encoding="utf-8"))
        made += [folder + name for name in lines]
    assert {"minimal", "long_sequence_mpi", "examples/cuda/graph"} <= set(made)
    ignored = run("git", "check-ignore", *made).splitlines()
    assert ignored == made


def test_core_of_another_version(headers: Headers, tmp_path: Path) -> None:
    """Two headers of different core ABI in one file: an error that says so."""
    text = (headers(*SMALL) / f"nf_{SMALL[0]}_cpu.h").read_text(encoding="utf-8")
    (tmp_path / "old.h").write_text(re.sub(r"NF_CORE_ABI (\d)\b", "NF_CORE_ABI 1", text), encoding="utf-8")
    source = tmp_path / "a.c"
    source.write_text('#include "old.h"\n' + include(SMALL[1]), encoding="utf-8")
    done = subprocess.run(
        ["gcc", "-c", "-I", str(tmp_path), "-I", str(headers(*SMALL)), str(source), "-o", "/dev/null"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0 and "different core ABI" in done.stderr
