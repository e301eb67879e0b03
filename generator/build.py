"""Folders of C that need no Python any more: tuner, bench and tests of some kernels, and how they are compiled."""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from . import UsageError, __version__
from .render import ROOT, Recipe, render, variant_code, write

SOURCES = {
    "tune": ("bench/tune.c", "bench/verify.h"),
    "bench": ("bench/bench.c",),
    "bench_gpu": ("bench/bench_gpu.c", "include/nearfar/args.h", "include/nearfar/gpu.h"),
}
ON_GPU = {"tune": ("bench/device.cu",), "bench_gpu": ("bench/device.cu", "bench/products.cu")}
SHARED = (
    *("bench/kernel.h", "bench/measure.h", "bench/device.h", "tests/oracle.h"),
    *("include/nearfar/core.h", "include/nearfar/pattern.h"),
)
LIBRARIES = {"tune": ("-lm",), "bench": ("-lm", "-lpthread"), "bench_gpu": ("-lm",)}


class BuildError(Exception):
    """Something outside is missing or failed: one line, exit code 1."""


@dataclass(frozen=True)
class Toolkit:
    """What a GPU's backend needs of a machine: its compiler, and the driver's library with its calls."""

    compiler: str
    variable: str  # names another compiler
    folder: str  # where it is, if it is not in PATH
    flags: tuple[str, ...]  # compile for the GPU that is here
    ending: str  # of its sources
    library: str
    calls: tuple[str, ...]  # to start it, and to count the GPUs
    package: str
    driver: str

    def command(self) -> list[str] | None:
        """The compiler, or None."""
        wanted = shlex.split(os.environ.get(self.variable, ""))
        path = shutil.which(wanted[0] if wanted else self.compiler, path=f"{os.environ.get('PATH')}:{self.folder}")
        return [path, *wanted[1:], *self.flags] if path else None

    def no_gpu(self) -> str:
        """What is missing to run on a GPU; empty: nothing."""
        try:
            library = ctypes.CDLL(self.library)
        except OSError:
            return f"{self.library} (install {self.driver})"
        count = ctypes.c_int(0)
        start = [getattr(library, name)(0) for name in self.calls[:-1]]
        status = next(filter(None, start), 0) or getattr(library, self.calls[-1])(ctypes.byref(count))
        return "" if not status and count.value else f"a GPU ({self.calls[-1]} finds none, status {status})"


TOOLKITS = {
    "cuda": Toolkit(
        "nvcc",
        "NVCC",
        "/usr/local/cuda/bin",
        ("-arch=native",),
        "cu",
        "libcuda.so.1",
        ("cuInit", "cuDeviceGetCount"),
        "the CUDA toolkit",
        "NVIDIA's driver",
    ),
    "hip": Toolkit(
        "hipcc",
        "HIPCC",
        "/opt/rocm/bin",
        ("--offload-arch=native",),
        "hip",
        "libamdhip64.so",
        ("hipGetDeviceCount",),
        "ROCm",
        "ROCm",
    ),
}


@dataclass(frozen=True)
class Compiler:
    """The user's C compiler, and that of a GPU where its kernels are to run."""

    command: tuple[str, ...]
    gpu: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return " ".join(self.command)


def compiler(backend: str = "cpu") -> Compiler:
    """What compiles for the backend on this machine; BuildError names everything that is missing."""
    if backend == "cpu":
        return Compiler(c_compiler())
    kit = TOOLKITS[backend]
    command, missing = kit.command(), [kit.no_gpu()]
    if not command:
        missing.append(f"{kit.compiler} (install {kit.package}, or name yours in the variable {kit.variable})")
    if any(missing):
        raise BuildError(f"option --backend = '{backend}': here is missing: {' and '.join(filter(None, missing))}")
    return Compiler(c_compiler(), tuple(command or ()))


def c_compiler() -> tuple[str, ...]:
    """$CC, or the first of cc, gcc and clang."""
    wanted = os.environ.get("CC", "").strip()
    for command in [shlex.split(wanted)] if wanted else [["cc"], ["gcc"], ["clang"]]:
        if command and shutil.which(command[0]):
            return tuple(command)
    if wanted:
        raise BuildError(f"environment variable CC = {wanted!r}: is no compiler that can be run")
    raise BuildError("no C compiler found: install one (apt install gcc), or name yours in the variable CC")


def text_of(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def sources(program: str, recipes: list[Recipe]) -> dict[str, str]:
    """Every file of a program's folder; the recipes are of one backend."""
    files = {Path(p).name: text_of(p) for p in (*SOURCES[program], *SHARED)}
    kit = TOOLKITS.get(recipes[0].backend)
    ending = kit.ending if kit else "c"
    if kit:
        files.update({f"{Path(p).stem}.{ending}": text_of(p) for p in ON_GPU[program]})
    switch = "#define NEARFAR_FORWARD_ONLY\n" if program == "tune" else ""  # races are forward: compile no more
    for recipe in recipes:
        files[recipe.file_name] = render(recipe)
        files[f"{recipe.kernel}.{ending}"] = f'{switch}#define NEARFAR_IMPLEMENTATION\n#include "{recipe.file_name}"\n'
    files["kernels.h"] = kernels(recipes, files)
    return files


def kernels(recipes: list[Recipe], files: dict[str, str]) -> str:
    """kernels.h: the kernels of a program, whether their headers (in files) have a state, and of each variant its
    code's hash and whether it is what ships."""
    lines = ["/* The kernels of this program; see kernel.h. */", "#ifndef KERNELS_H", "#define KERNELS_H", ""]
    lines += [f'#include "{recipe.file_name}"' for recipe in recipes]
    backend = recipes[0].backend
    lines += ["", f'#define NF_TOOL "{__version__}"', f'#define NF_BACKEND "{backend}"']
    lines += ["#define NF_ON_GPU"] if backend in TOOLKITS else []
    for recipe in recipes:
        entries = [f"{recipe.kernel}_state_{what}" for what in ("bytes", "reset")]
        stateful = recipe.contract.operator != "exact" and f"{entries[0]}(" in files[recipe.file_name]
        lines += [f"#define {recipe.kernel}_STATE {', '.join(entries) if stateful else 'NULL, NULL'}"]
    lines += ["", "#define NF_KERNELS(X) \\"]
    rows = []
    for recipe in recipes:
        c = recipe.contract
        words = [f'"{c.name}"', c.operator, c.map or "none", c.dtype, c.d, c.values, c.m, c.rows, c.b]
        rows.append(f"    X({recipe.kernel}, {', '.join(map(str, words))})")
    lines += [" \\\n".join(rows)]
    for recipe in recipes:
        lines += ["", f"#define {recipe.kernel}_CODES(X) \\", " \\\n".join(codes(recipe))]
    return "\n".join([*lines, "", "#endif", ""])


def codes(recipe: Recipe) -> list[str]:
    """X(suffix, code, default) of every variant; the first of a target is its default."""
    first = {v.target: v for v in reversed(recipe.variants)}
    hashes = {v: variant_code(recipe.contract, recipe.backend, v.bare()) for v in recipe.variants}
    return [f'    X("{v.suffix}", "{hashes[v]}", {int(first[v.target] is v)})' for v in recipe.variants]


def one_line(program: str, backend: str) -> str:
    """How a folder is compiled by hand."""
    kit = TOOLKITS.get(backend)
    words = [kit.compiler, "-O2", *kit.flags, "*.c", f"*.{kit.ending}"] if kit else ["cc", "-O2", "*.c"]
    return " ".join([*words, "-o", program, *LIBRARIES[program]])


def compile_folder(
    folder: Path, program: str, cc: Compiler, flags: tuple[str, ...] = (), link: tuple[str, ...] = ()
) -> Path:
    """Compile and link a folder; BuildError with the first line of what went wrong."""
    files = sorted((p for p in folder.glob("*.[ch]*") if p.suffix != ".h"), key=lambda p: -p.stat().st_size)
    compile_all(folder, [object_command(cc, p.name, *flags) for p in files])
    objects = [f"{source.stem}.o" for source in files]
    run([*(cc.gpu or cc.command), *link, *objects, "-o", program, *LIBRARIES.get(program, ())], folder)
    return folder / program


def object_command(cc: Compiler, source: str, *flags: str) -> list[str]:
    """What makes the object of a source beside it."""
    command = cc.command if source.endswith(".c") else cc.gpu
    return [*command, "-O2", *flags, "-c", source, "-o", f"{Path(source).stem}.o"]


def compile_all(folder: Path, commands: list[list[str]]) -> None:
    """As many at once as there are processors, the first ones first."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda command: run(command, folder), commands))


def run(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if done.returncode:
        first = next((line for line in done.stderr.splitlines() if "error" in line), "it says nothing")
        raise BuildError(f"{shlex.join(command)} failed with status {done.returncode}: {first.strip()}")


def fill(folder: Path, files: dict[str, str]) -> None:
    """Make the folder hold these files, and no source or object of an earlier run."""
    for old in folder.glob("*.[cho]*") if folder.is_dir() else ():
        if old.name not in files:
            try:
                old.unlink()
            except OSError as error:
                raise UsageError(f"cannot write {str(old)!r}: {error.strerror}") from None
    write({folder / name: text for name, text in files.items()})
