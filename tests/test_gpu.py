"""The headers of a GPU without one: declarations in plain C, implementations as far as the compilers here go."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, STRICT, STRICT_C, generate, need, run

sys.path.insert(0, str(ROOT))

from generator.contract import Contract, parse
from generator.render import Recipe, render
from generator.space import SPACE, Variant, default, space

CONTRACTS = (
    "favor_cosh_f32_d64_m128",
    "favor_cosh_f32_d128_m256",
    "favor_cosh_bf16_d64_m128",
    "favor_cosh_f16_d64_m128",
    "favor_cosh_bf16_d64_m256",
    "favor_cosh_bf16_d128_m256",
    "linear_elu_f32_d64",
    "linear_elu_bf16_d64",
    "linear_elu_bf16_d128",
    "linear_taylor2_bf16_d16",
    "linear_softmaxqk_f16_d64",
    "exact_f32_d64",
    "exact_f32_d128",
    "sparse_f32_d64_b64",
    "exact_bf16_d64",
    "exact_f16_d128",
    "sparse_bf16_d64_b64",
    "hybrid_cosh_f32_d64_m128_b64",
    "hybrid_cosh_bf16_d64_m128_b64",
)
MATRIX = "favor_cosh_bf16_d64_m128"
EVERYWHERE = (  # compiled for every NVIDIA GPU: each kind of kernel once
    "favor_cosh_f32_d64_m128",
    "favor_cosh_bf16_d64_m128",
    "linear_elu_f32_d64",
    "exact_bf16_d64",
    "sparse_f32_d64_b64",
)
NVIDIA = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
AMD = ("gfx90a", "gfx942", "gfx1100", "gfx1201", "gfx1030")  # the last has no target of its own: simt


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every contract for both backends, and sources that implement and that only use them."""
    made = tmp_path_factory.mktemp("gpu")
    for backend, ending in (("cuda", "cu"), ("hip", "hip")):
        generate(made, *CONTRACTS, "--backend", backend)
        for c in CONTRACTS:
            header = f'#include "nf_{c}_{backend}.h"\n'
            (made / f"{c}.{ending}").write_text(f"#define NEARFAR_IMPLEMENTATION\n{header}", encoding="utf-8")
            (made / f"{c}_{backend}.c").write_text(
                f'#include "simt/simt.h"\n#define NEARFAR_IMPLEMENTATION\n{header}', encoding="utf-8"
            )
        names = [f"nf_{c}_{backend}" for c in CONTRACTS]
        text = "".join(f'#include "{name}.h"\n' for name in names) + "int main(void)\n{\n    return "
        (made / f"use_{backend}.c").write_text(
            text + " + ".join(f"(int){name}_workspace(NULL)" for name in names) + ";\n}\n", encoding="utf-8"
        )
    return made


@pytest.mark.parametrize("backend", ["cuda", "hip"])
@pytest.mark.parametrize("language", ["-xc -std=c99", "-xc -std=c2x", "-xc++ -std=c++11", "-xc++ -std=c++20"])
@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_declarations_need_no_gpu_compiler(backend: str, language: str, compiler: str, folder: Path) -> None:
    flags = STRICT_C if "-xc " in language else STRICT
    run(need(compiler, compiler), *language.split(), *flags, "-fsyntax-only", folder / f"use_{backend}.c")


@pytest.mark.parametrize("language", ["-xc -std=c99", "-xc -std=c2x", "-xc++ -std=c++11", "-xc++ -std=c++20"])
@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_kernels_are_clean_c(language: str, compiler: str, folder: Path) -> None:
    """What nvcc is silent about: the executor's view of the same source, under the hardest flags."""
    flags = STRICT_C if "-xc " in language else STRICT
    for name in (
        "favor_cosh_f32_d64_m128_cuda",
        "favor_cosh_f16_d64_m128_hip",
        "linear_elu_f32_d64_cuda",
        "linear_taylor2_bf16_d16_hip",
        "linear_softmaxqk_f16_d64_cuda",
        "sparse_f32_d64_b64_cuda",
        "hybrid_cosh_f32_d64_m128_b64_hip",
    ):
        source = folder / f"{name}.c"
        run(
            need(compiler, compiler),
            *language.split(),
            *flags,
            "-O1" if (compiler, language[-3:]) in (("gcc", "c99"), ("clang", "+20")) else "-fsyntax-only",
            "-c",
            "-I",
            ROOT / "tests",
            source,
            "-o/dev/null",
        )


def test_the_implementation_says_what_it_needs(folder: Path) -> None:
    source = folder / "exact_f32_d64.cu"
    with pytest.raises(AssertionError, match="needs nvcc or hipcc"):
        run(need("gcc", "gcc"), "-xc", "-fsyntax-only", "-fmax-errors=1", source)


def nvcc() -> str:
    path = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if not path:
        pytest.skip("nvcc is missing: install the CUDA toolkit")
    return path


def codes(everywhere: bool) -> list[str]:
    """nvcc's options for every GPU that it knows, or for sm_80 and sm_90. From sm_80 on the code is one: compiled once,
    assembled for each."""
    known = [arch for arch in NVIDIA if arch.replace("sm_", "compute_") in run(nvcc(), "--list-gpu-arch").split()]
    assert {"sm_80", "sm_90"} <= set(known)
    newer = [arch for arch in known if arch != "sm_75" and (everywhere or arch in ("sm_80", "sm_90"))]
    older = ["-gencode=arch=compute_75,code=sm_75"] if everywhere and "sm_75" in known else []
    return [*older, f"-gencode=arch=compute_80,code=[{','.join(newer)}]"]


def resources(log: str) -> list[tuple[str, str, int, int, int]]:
    """(architecture, kernel, registers, bytes spilled, bytes of stack) of everything that ptxas tells."""
    rows = []
    for part in log.split("Compiling entry function '")[1:]:
        kernel, arch = re.findall(r"^([^']*)' for '([^']*)'", part)[0]
        stack, stores, loads = map(int, re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", part)[:3])
        registers = re.search(r"Used (\d+) registers", part)
        rows.append((arch, kernel, int(registers[1]) if registers else 0, stores + loads, stack))
    return rows


@pytest.mark.parametrize("contract", CONTRACTS)
def test_nvidia(contract: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Compiles without a warning, and no kernel spills a register. (-s shows the table; with ALL_ARCHS=1 all of it.)"""
    flags = [
        *codes(contract in EVERYWHERE or "ALL_ARCHS" in os.environ),
        "-Werror",
        "all-warnings",
        "-Xcompiler",
        "-Wall,-Wextra,-Werror",
        "-Xptxas",
        "-v",
    ]
    found = resources(run(nvcc(), *flags, "-c", folder / f"{contract}.cu", "-o", folder / "out.o"))
    assert {row[0] for row in found} >= {"sm_80", "sm_90"}
    with capsys.disabled():
        for arch, kernel, registers, spilled, stack in found:
            if "_kernel" in kernel or spilled:
                print(f"{arch} {kernel}: {registers} registers, {spilled} bytes spilled, {stack} bytes of stack")
    assert [row for row in found if row[4]] == [], "spills"


# Compile quickly; of some tiles and chunks no smaller contract has a variant.
SMALL = (
    "favor_exp_bf16_d16_m96",
    "favor_cosh_f16_d32_m64",
    "linear_elu_bf16_d16",
    "linear_relu_f16_d48",
    "linear_identity_bf16_d80",
    "linear_elu_bf16_d96",
    "linear_elu_bf16_d112",
    "exact_bf16_d16",
    "exact_f32_d32",
    "sparse_f16_d16_b16",
    "hybrid_exp_bf16_d16_m64_b16",
)


def traits(contract: Contract, variant: Variant) -> set[tuple[str, object]]:
    """What a tuner chooses among, and what it is chosen for; on matrix units, tiles of each operator."""
    tile = f"{variant.r}x{variant.x}"
    some = (contract.operator, contract.dtype, tile, variant.c, f"s{variant.s}", (contract.operator, tile))
    return {(variant.target, one) for one in (some if variant.target != "simt" else some[:-1])}


def sample(backend: str, target: str) -> dict[Contract, list[Variant]]:
    """Variants that only a tuner generates: every tile, chunk, segment, operator and dtype of a target and of simt at
    least once, as few variants as a greedy choice finds. Without what test_nvidia or test_amd compile."""

    def of(
        names: tuple[str, ...], variants: Callable[[Contract, str], list[Variant]]
    ) -> list[tuple[Contract, Variant]]:
        return [(c, v) for c in map(parse, names) for v in variants(c, backend) if v.target in (target, "simt")]

    candidates = of(SMALL, space)
    left = {trait for one in candidates for trait in traits(*one)}
    for (_, where), table in SPACE.items():
        for name in {target, "simt"} & table.keys() if where == backend else ():
            left |= {(name, tile) for tile in table[name]}
            left |= {(name, c) for chunks in table[name].values() for c in chunks}
    left -= {trait for one in of(CONTRACTS, default) for trait in traits(*one)}
    chosen: dict[Contract, list[Variant]] = {}
    while left:
        contract, variant = max(candidates, key=lambda one: len(traits(*one) & left))
        assert traits(contract, variant) & left, f"no small contract has {left}"
        left -= traits(contract, variant)
        chosen.setdefault(contract, []).append(variant)
    return chosen


@pytest.mark.parametrize(("backend", "target"), [("cuda", "sm80"), ("hip", "gfx90a")])
def test_what_a_tuner_may_choose(backend: str, target: str, tmp_path: Path) -> None:
    """Compiles without a warning and without spills, as what is shipped."""
    source, text = tmp_path / "tuned.cu", "#define NEARFAR_IMPLEMENTATION\n"
    for contract, variants in sample(backend, target).items():
        recipe = Recipe(contract, backend, tuple(variants))
        (tmp_path / recipe.file_name).write_text(render(recipe), encoding="utf-8")
        text += f'#include "{recipe.file_name}"\n'
    source.write_text(text, encoding="utf-8")
    if backend == "cuda":
        flags = ["-arch=sm_80", "-cubin", "-Werror", "all-warnings", "-Xptxas", "-v"]
        found = resources(run(nvcc(), *flags, source, "-o", tmp_path / "out"))
        assert len(found) > 10 and [row for row in found if row[4]] == [], "spills"
    else:
        flags = [*AMD_FLAGS, "--offload-arch=gfx90a", "-Rpass-analysis=kernel-resource-usage"]
        numbers = usage(run(clang(), *flags, "-I", ROOT / "tests" / "simt", source, "-o", tmp_path / "out"))
        spilled = {
            kernel: n for kernel, n in numbers.items() if n["VGPRs Spill"] or ("_kernel" in kernel and n["ScratchSize"])
        }
        assert len(numbers) > 10 and spilled == {}


def test_headers_share_a_file(folder: Path) -> None:
    """Several contracts, and one of them under a second prefix."""
    flags = "-std=c++20 -rdc=true --use_fast_math"
    generate(folder, CONTRACTS[0], "--backend", "cuda", "--prefix", "eng_")
    several = (CONTRACTS[0], "exact_f32_d64", "sparse_bf16_d64_b64")
    names = [f"nf_{c}_cuda.h" for c in several] + [f"eng_{CONTRACTS[0]}_cuda.h"]
    text = "#define NEARFAR_IMPLEMENTATION\n" + "".join(f'#include "{name}"\n' for name in names)
    (folder / "all.cu").write_text(text, encoding="utf-8")
    strict = ["-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra,-Werror"]
    run(nvcc(), "-arch", "sm_80", *flags.split(), *strict, "-c", folder / "all.cu", "-o", folder / "all.o")


def test_an_engine_in_c_links_a_cuda_header(folder: Path) -> None:
    """One .cu file implements, a C file uses; all that C could meet begins with the kernel's name."""
    c = "favor_cosh_f32_d64_m128"
    run(nvcc(), "-arch", "sm_80", "-c", folder / f"{c}.cu", "-o", folder / "kernel.o")
    symbols = run(need("nm", "binutils"), "-g", "--defined-only", folder / "kernel.o")
    exported = [line.split()[-1] for line in symbols.splitlines()]
    ours = [name for name in exported if name.startswith(f"nf_{c}_cuda_")]
    assert len(ours) > 10 and [n for n in exported if n not in ours and not re.match(r"_|DW\.ref", n)] == []
    (folder / "engine.c").write_text(
        f'#include "nf_{c}_cuda.h"\nint main(void)\n{{\n    return nf_{c}_cuda_workspace(NULL) == 0;\n}}\n',
        encoding="utf-8",
    )
    run("gcc", "-std=c99", *STRICT_C, "-c", folder / "engine.c", "-o", folder / "engine.o")
    run(nvcc(), folder / "engine.o", folder / "kernel.o", "-o", folder / "engine")
    run(folder / "engine")


BENCH = [f"-I{ROOT / folder}" for folder in ("bench", "include/nearfar")]


@pytest.mark.parametrize("arch", ["sm_75", "sm_90"])
@pytest.mark.parametrize("name", ["device", "products"])
def test_the_bench_compiles(name: str, arch: str, tmp_path: Path) -> None:
    flags = ["-arch", arch, "-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra,-Werror", "-Xptxas", "-v"]
    log = run(nvcc(), *flags, *BENCH, "-c", ROOT / "bench" / f"{name}.cu", "-o", tmp_path / "out.o")
    assert [row for row in resources(log) if row[3] or row[4]] == [], "spills"


@pytest.mark.parametrize("name", ["engine", "graph"])
def test_examples_link(name: str, folder: Path) -> None:
    """As their comments say, but for the arch of a GPU that is not here. Without one they say why, in words."""
    source = ROOT / "examples" / "cuda" / f"{name}.c"
    line = f"nvcc -O2 -arch=native {name}.c attention.cu -o {name}"
    assert f" *         {line}\n" in source.read_text(encoding="utf-8")
    run("gcc", "-std=c11", *STRICT_C, "-I", folder, "-isystem", cuda_include(), "-fsyntax-only", source)
    attention = source.with_name("attention.cu")
    run(nvcc(), "-O2", "-arch", "sm_80", "-I", folder, source, attention, "-o", folder / name)
    done = subprocess.run([folder / name], capture_output=True, text=True, check=False)
    assert done.returncode == 0 or re.fullmatch(r"\w+: [A-Za-z]+ [a-zA-Z ]+\n", done.stderr)


def cuda_include() -> Path:
    """Where nvcc has its headers."""
    log = run(nvcc(), "--dryrun", "-c", "none.cu")
    return Path(re.findall(r'INCLUDES="-I(.+?)"', log)[0])


AMD_FLAGS = "-x hip --cuda-device-only -nogpulib -nogpuinc -O3 -S -Wall -Wextra -Werror".split()


def clang() -> str:
    found = next((c for c in ("clang-20", "clang-19", "clang-18") if shutil.which(c)), None)
    if not found:
        pytest.skip("clang-19 is missing, which compiles for AMD's GPUs: apt install clang-19")
    return found


SIMT_ON_AMD = ("favor_cosh_f32_d64_m128", "hybrid_cosh_f32_d64_m128_b64")  # wherever there are no matrix units


AMD_CONTRACTS = tuple(c for c in CONTRACTS if "d128_m256" not in c and c != "exact_f32_d128")


def usage(log: str) -> dict[str, dict[str, int]]:
    """Of everything that clang tells: kernel, what, number."""
    found = {}
    for part in log.split("Function Name: ")[1:]:
        numbers = re.findall(r"remark: +([A-Za-z ]+?)(?: \[\S+\])?: (\d+) ", part)
        found[part.split()[0]] = {what: int(number) for what, number in numbers}
    return found


def documented() -> tuple[str, dict[tuple[str, str], dict[str, str]]]:
    """The table of docs/gpu.md: whose it is, and of a contract and a tile the columns."""
    text = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    head, body = re.findall(r"(clang \d+\.\d+\.\d+).*\n\n(\| AMD \|.*\n(?:\|.*\n)+)", text)[0]
    lines = [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in body.splitlines()]
    return head, {(cells[0], cells[1].split("_", 1)[1]): dict(zip(lines[0], cells)) for cells in lines[2:]}


@pytest.mark.parametrize("arch", AMD)
def test_amd(arch: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The device's part compiles with clang alone, no kernel spills a vector register or has memory of its own, and
    the table says what it takes. What has no matrix units is the same code everywhere: all of it is compiled for
    gfx90a, the two largest for each. (-s shows the numbers.)"""
    flags = [*AMD_FLAGS, f"--offload-arch={arch}", "-Rpass-analysis=kernel-resource-usage"]
    version, table = documented()
    same = version in run(clang(), "--version")
    for contract in AMD_CONTRACTS:
        variants = [v for v in default(parse(contract), "hip") if v.target == "simt" or arch.startswith(v.target)]
        if variants[0].target == "simt" and contract not in SIMT_ON_AMD and arch != "gfx90a":
            continue
        source = folder / f"{contract}.hip"
        found = usage(run(clang(), *flags, "-I", ROOT / "tests" / "simt", source, "-o", folder / "out.s"))
        assert {numbers["VGPRs Spill"] for numbers in found.values()} == {0}, found
        for variant in variants:
            numbers = next(n for k, n in found.items() if f"_{variant.suffix}_kernel" in k)
            matrix = f" + {numbers['AGPRs']}" if numbers.get("AGPRs") else ""
            cell = f"{numbers['VGPRs']}{matrix}, {numbers['Occupancy']}"
            with capsys.disabled():
                print(f"{arch} {contract} {variant.suffix}: {cell}")
            assert numbers["ScratchSize"] == 0
            row = table[contract, variant.suffix.split("_", 1)[1]]
            assert not same or row.get(arch, cell) == cell, f"docs/gpu.md: {contract} {variant.suffix} on {arch}"


def test_shared_memory_on_amd(folder: Path) -> None:
    """As the table says."""
    text = '#include "simt/simt.h"\n#define NEARFAR_STATIC\n'
    text += "".join(f'#include "nf_{c}_hip.h"\n' for c in AMD_CONTRACTS)
    for (contract, _), cells in documented()[1].items():
        text += (
            f'_Static_assert(sizeof(nf_{contract}_hip_{cells["variant"]}_space) == {cells["LDS, bytes"]}, "docs");\n'
        )
    (folder / "shared.c").write_text(text, encoding="utf-8")
    run("gcc", "-std=c11", "-fsyntax-only", "-I", ROOT / "tests", folder / "shared.c")


def test_the_host_of_amd(folder: Path) -> None:
    """The host's part, too: checks, launches, the runtime's calls."""
    flags = [flag for flag in AMD_FLAGS if flag != "--cuda-device-only"]
    flags += ["--cuda-host-only", "--offload-arch=gfx90a", "-I", ROOT / "tests" / "simt"]
    run(clang(), *flags, folder / f"{MATRIX}.hip", "-o", folder / "out.s")
    for called in ("hipGetDeviceProperties", "hipDeviceGetAttribute", "hipLaunchKernel"):
        assert called in (folder / "out.s").read_text(encoding="utf-8")


RUNTIME = """
#include <stdio.h>
#include <string.h>
#include <hip/hip_runtime_api.h>
#include "nf_{contract}_hip.h"
static int current, asked, fails;
static const char *const names[] = {{"gfx90a:sramecc+", "gfx942", "gfx1030"}};
hipError_t hipGetDevice(int *device) {{ *device = current; return hipSuccess; }}
hipError_t hipDeviceGetAttribute(int *most, hipDeviceAttribute_t, int) {{ asked++; *most = 65536; return hipSuccess; }}
hipError_t hipGetDeviceProperties(hipDeviceProp_t *p, int device)
{{
    strcpy(p->gcnArchName, names[device % 3]);
    return fails ? (hipError_t)1 : hipSuccess;
}}
hipError_t hipLaunchKernel(const void *, dim3, dim3, void **, size_t, hipStream_t) {{ return hipSuccess; }}
extern "C" hipError_t __hipPopCallConfiguration(dim3 *, dim3 *, size_t *, hipStream_t *) {{ return hipSuccess; }}
extern "C" void **__hipRegisterFatBinary(const void *) {{ return nullptr; }}
extern "C" void __hipUnregisterFatBinary(void **) {{}}
extern "C" void __hipRegisterFunction() {{}}
int main()
{{
    const int devices[] = {{0, 0, 1, 1, 2, 0, 1, 33, 33}};
    for (fails = 1; fails >= 0; fails--)
        for (int device : devices) {{
            int32_t count;
            const nf_variant *v = nf_{contract}_hip_variants(&count);
            current = device, asked = 0;
            printf("%d:", device);
            for (; count > 0; count--, v++)
                v->supported() ? printf(" %s", v->target) : 0;
            printf(" %d\\n", asked);
        }}
}}
"""


def test_the_device_is_asked_once(tmp_path: Path) -> None:
    """Each variant, each device, whichever was asked before; again where the runtime did not answer."""
    contract = "exact_bf16_d16"
    generate(tmp_path, contract, "--backend", "hip", "--variants", "gfx90a_c64_r1x4,gfx942_c64_r1x4,simt_c16_r8x1")
    (tmp_path / "kernel.hip").write_text(
        f'#define NEARFAR_IMPLEMENTATION\n#include "nf_{contract}_hip.h"\n', encoding="utf-8"
    )
    (tmp_path / "main.cpp").write_text(RUNTIME.format(contract=contract), encoding="utf-8")
    host = "-x hip --cuda-host-only --offload-arch=gfx90a -nogpulib -nogpuinc -Xclang -fcuda-include-gpubinary".split()
    host += ["-Xclang", "/dev/null"]  # no kernels
    include = ["-I", ROOT / "tests" / "simt"]
    run(clang(), *host, *include, "-c", tmp_path / "kernel.hip", "-o", tmp_path / "kernel.o")
    run("g++", *include, tmp_path / "main.cpp", tmp_path / "kernel.o", "-o", tmp_path / "main")
    silent = "0: simt 3|0: simt 2|1: simt 3|1: simt 2|2: simt 3|0: simt 2|1: simt 2|33: simt 3|33: simt 3"
    first = "0: gfx90a simt 2|0: gfx90a simt 0|1: gfx942 simt 2|1: gfx942 simt 0|2: simt 2"
    later = "0: gfx90a simt 0|1: gfx942 simt 0|33: gfx90a simt 3|33: gfx90a simt 3"  # beyond 32 nothing is kept
    assert run(tmp_path / "main").split() == f"{silent}|{first}|{later}".replace("|", " ").split()


PROBE = """
#include <string.h>
#include "nearfar/core.h"

#include "nearfar/pattern.h"

#include "nearfar/args.h"

#include "nearfar/gpu.h"
#ifdef NF_FRAGMENTS
NF_KERNEL(64, 1) probe(const uint16_t *in, float *out)
{
    uint16_t *s = (uint16_t *)nf_shared();
    nf_sums c;
    nf_copy_async(s + 8 * nf_thread(), in + 8 * nf_thread(), 1);
    nf_copy_commit();
    nf_copy_wait(0);
    nf_barrier();
    for (int i = 0; i < NF_SUMS; i++)
        c.at[i] = 0;
    nf_product_bf16(&c, nf_left_rows(s, 24), nf_right_columns(s, 24));
    nf_product_f16(&c, nf_left_rows(s, 24), nf_right_columns(s, 24));
    for (int i = 0; i < NF_SUMS; i++)
        out[nf_sum_row(i) * 16 + nf_sum_column(i)] = c.at[i];
}
void *probe_address(void);
void *probe_address(void)
{
    return (void *)probe;
}
#endif
"""


ALIAS = (
    PROBE.split("#ifdef")[0]
    + """
NF_KERNEL(64, 1) probe(const uint16_t *in, uint16_t *one, uint16_t *out)
{
    uint16_t before[8], behind[8];
    nf_load8(before, in + 8 * nf_thread());
    *one = 1; /* which may be one of them */
    nf_load8(behind, in + 8 * nf_thread());
    for (int i = 0; i < 8; i++)
        out[i] = (uint16_t)(before[i] + behind[i]);
}
void *probe_address(void);
void *probe_address(void)
{
    return (void *)probe;
}
"""
)


def test_8_numbers_are_the_same_memory_as_each_of_them(tmp_path: Path) -> None:
    """What is written one by one must be there when 16 bytes are read at once, whatever their type."""
    source, out = tmp_path / "probe.cu", tmp_path / "out"
    source.write_text(ALIAS, encoding="utf-8")
    run(nvcc(), "-arch", "sm_80", "-I", ROOT / "include", "-ptx", source, "-o", out)
    assert out.read_text(encoding="utf-8").count("ld.global.v4") == 2
    flags = [*AMD_FLAGS, "--offload-arch=gfx90a", "-I", ROOT / "include", "-I", ROOT / "tests" / "simt"]
    run(clang(), *flags, source, "-o", out)
    assert len(re.findall("_load_dwordx4 v", out.read_text(encoding="utf-8"))) == 2


POINTERS = (
    PROBE.split("#ifdef")[0]
    + """
NF_KERNEL(64, 1) probe(float *first, float *second)
{
    float **const at = (float **)nf_shared();
    if (nf_thread() == 0)
        at[0] = first, at[1] = second;
    nf_barrier();
    NF_GMEM(at[1])[nf_thread()] = NF_GMEM(at[0])[nf_thread()];
}
void *probe_address(void);
void *probe_address(void)
{
    return (void *)probe;
}
"""
)


def test_what_pointers_in_shared_memory_point_to_is_known(tmp_path: Path) -> None:
    source, out = tmp_path / "probe.cu", tmp_path / "out"
    source.write_text(POINTERS, encoding="utf-8")
    run(nvcc(), "-arch", "sm_80", "-Werror", "all-warnings", "-I", ROOT / "include", "-ptx", source, "-o", out)
    assert sorted(re.findall(r"(?:ld|st)\S*\.f32", out.read_text(encoding="utf-8"))) == [
        "ld.global.f32",
        "st.global.f32",
    ]
    for arch in ("gfx90a", "gfx1100"):
        flags = [*AMD_FLAGS, f"--offload-arch={arch}", "-I", ROOT / "include", "-I", ROOT / "tests" / "simt"]
        run(clang(), *flags, source, "-o", out)
        found = re.findall(r"(?:flat|global)_(?:load|store)", out.read_text(encoding="utf-8"))
        assert sorted(found) == ["global_load", "global_store"]


def test_products_of_fragments_are_single_instructions_on_nvidia(tmp_path: Path) -> None:
    (tmp_path / "probe.cu").write_text(PROBE, encoding="utf-8")
    flags = ["-Werror", "all-warnings", "-I", ROOT / "include", "-ptx", tmp_path / "probe.cu", "-o", tmp_path / "ptx"]
    run(nvcc(), "-arch", "sm_80", *flags)
    ptx = (tmp_path / "ptx").read_text(encoding="utf-8")
    for found in (
        "cp.async.cg",
        "cp.async.wait_group",
        "ldmatrix.sync",
        "x4.trans",
        "m16n8k16.row.col.f32.bf16",
        "m16n8k16.row.col.f32.f16",
    ):
        assert found in ptx
    run(nvcc(), "-arch", "sm_75", *flags)
    assert "mma.sync" not in (tmp_path / "ptx").read_text(encoding="utf-8")


def nvdisasm() -> str:
    """The disassembler of the toolkit, or of the Python package."""
    found = shutil.which("nvdisasm") or shutil.which("nvdisasm", path="/usr/local/cuda/bin")
    packaged = sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/*/bin/nvdisasm"))
    if not found and not packaged:
        pytest.skip("nvdisasm is missing: pip install nvidia-cuda-nvdisasm")
    return found or str(packaged[-1])


def loops(kernel: str) -> list[list[str]]:
    """The instructions of a disassembled kernel from every label to the last branch back to it."""
    labels: dict[str, int] = {}
    ends: dict[str, int] = {}
    instructions: list[str] = []
    for line in kernel.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif found := re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ +)?(.*?);", line):
            instructions.append(found[1])
            if (back := re.search(r"BRA.*`\((\.L_x_\d+)\)", found[1])) and back[1] in labels:
                ends[back[1]] = len(instructions)
    return [instructions[labels[label] : end] for label, end in ends.items()]


# Products of a warp, once in the text. favor, a chunk: of keys, S and z, queries, the state's outputs, scores; then
# those of rows and of w that bf16 does not hold. Its scores alone. exact and sparse: a tile of keys.
PRODUCTS = [
    ("favor_cosh_bf16_d64_m128", 32 + 72 + 32 + 72 + 25 + 32, 4800),
    ("favor_cosh_bf16_d64_m128", 25, 90),
    ("exact_bf16_d64", 32 + 36, 1800),
    ("sparse_bf16_d64_b64", 32 + 36, 2500),
]


@pytest.mark.parametrize(("contract", "products", "most"), PRODUCTS)
def test_disassembly(contract: str, products: int, most: int, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What nvcc makes of a loop: the algorithm's products, no memory of a thread's own, tensors known to be in global
    memory, and at most so many instructions, rare branches included. (-s shows them.)"""
    run(nvcc(), "-arch", "sm_90", "-cubin", folder / f"{contract}.cu", "-o", folder / "cubin")
    kernels = run(nvdisasm(), "-c", folder / "cubin").split("\n.text.")
    kernel = next(text for text in kernels if "_sm80_" in text.split(":", 1)[0])
    found = [loop for loop in loops(kernel) if sum("HMMA" in one for one in loop) == products]
    assert found, f"no loop of {products} products"
    shortest = min(found, key=len)
    kinds = Counter(re.split(r"[. ]", one)[0] for one in shortest)
    with capsys.disabled():
        print(f"{contract}: {len(shortest)} instructions; {dict(kinds.most_common(12))}")
    assert kinds["LDL"] == kinds["STL"] == 0 and len(shortest) <= most
    assert kinds["LD"] + kinds["ST"] <= kinds["LDG"] + kinds["STG"]  # of the rest, rare: one thread's, unaligned rows


@pytest.mark.parametrize(("arch", "instruction"), [("gfx90a", "v_mfma"), ("gfx1100", "v_wmma"), ("gfx1201", "v_wmma")])
def test_products_of_fragments_are_single_instructions_on_amd(arch: str, instruction: str, tmp_path: Path) -> None:
    (tmp_path / "probe.hip").write_text(PROBE, encoding="utf-8")
    flags = [*AMD_FLAGS, f"--offload-arch={arch}", "-I", ROOT / "include", "-I", ROOT / "tests" / "simt"]
    run(clang(), *flags, tmp_path / "probe.hip", "-o", tmp_path / "out.s")
    assembly = (tmp_path / "out.s").read_text(encoding="utf-8")
    assert len(re.findall(instruction, assembly)) == 2


@pytest.mark.parametrize(
    ("arch", "instruction"), [("gfx90a", "v_mfma"), ("gfx1100", "v_wmma"), ("gfx1030", "s_endpgm")]
)
def test_the_ceiling_of_matrix_units_on_amd(arch: str, instruction: str, tmp_path: Path) -> None:
    """Six products in a row; nothing where there are no units."""
    flags = [*AMD_FLAGS, f"--offload-arch={arch}", *BENCH, "-I", ROOT / "tests" / "simt"]
    run(clang(), *flags, ROOT / "bench" / "products.cu", "-o", tmp_path / "out.s")
    assert instruction in (tmp_path / "out.s").read_text(encoding="utf-8")


def test_matrix_variants_are_empty_where_there_are_no_such_units(folder: Path) -> None:
    """The same header on a GPU of the target and on another one: supported() then leaves the call to simt."""
    for arch, there in (("sm_80", True), ("sm_75", False)):
        run(nvcc(), "-arch", arch, "-ptx", folder / f"{MATRIX}.cu", "-o", folder / "ptx")
        ptx = (folder / "ptx").read_text(encoding="utf-8")
        for found in ("m16n8k16.row.col.f32.bf16", "ldmatrix.sync", "cp.async.cg", "ex2.approx.ftz", "cvt.rn.bf16x2"):
            assert (found in ptx) == there, f"{found} for {arch}"
    for arch, there in (("gfx942", True), ("gfx1030", False)):
        flags = [*AMD_FLAGS, f"--offload-arch={arch}", "-I", ROOT / "tests" / "simt"]
        run(clang(), *flags, folder / f"{MATRIX}.hip", "-o", folder / "out.s")
        assert ("v_mfma_f32_16x16x16" in (folder / "out.s").read_text(encoding="utf-8")) == there, arch


def test_hipcc(folder: Path) -> None:
    run(
        need("hipcc", "hipcc (ROCm)"), "--offload-arch=gfx90a", "-c", folder / f"{CONTRACTS[0]}.hip", "-o", folder / "o"
    )
