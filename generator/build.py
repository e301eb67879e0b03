"""Folders of C that need no Python any more: tuner and bench for some kernels, and how they are compiled."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from . import UsageError, __version__
from .render import ROOT, Recipe, render, variant_code, write

SOURCES = {"tune": ("bench/tune.c", "bench/verify.h"), "bench": ("bench/bench.c",)}
SHARED = ("bench/kernel.h", "bench/measure.h", "tests/oracle.h")
LIBRARIES = {"tune": ("-lm",), "bench": ("-lm", "-lpthread")}


class BuildError(Exception):
    """Something outside is missing or failed: one line, exit code 1."""


@dataclass(frozen=True)
class Compiler:
    """The user's C compiler."""

    command: tuple[str, ...]

    @property
    def name(self) -> str:
        return " ".join(self.command)


def compiler() -> Compiler:
    """$CC, or the first of cc, gcc and clang."""
    wanted = os.environ.get("CC", "").strip()
    for command in [shlex.split(wanted)] if wanted else [["cc"], ["gcc"], ["clang"]]:
        if command and shutil.which(command[0]):
            return Compiler(tuple(command))
    if wanted:
        raise BuildError(f"environment variable CC = {wanted!r}: is no compiler that can be run")
    raise BuildError("no C compiler found: install one (apt install gcc), or name yours in the variable CC")


def sources(program: str, recipes: list[Recipe]) -> dict[str, str]:
    """Every file of a program's folder."""
    files = {Path(p).name: (ROOT / p).read_text(encoding="utf-8") for p in (*SOURCES[program], *SHARED)}
    switch = "#define NEARFAR_FORWARD_ONLY\n" if program == "tune" else ""  # races are forward: compile no more
    for recipe in recipes:
        files[recipe.file_name] = render(recipe)
        files[f"{recipe.kernel}.c"] = f'{switch}#define NEARFAR_IMPLEMENTATION\n#include "{recipe.file_name}"\n'
    files["kernels.h"] = kernels(recipes)
    return files


def kernels(recipes: list[Recipe]) -> str:
    """kernels.h: the kernels of a program, and of each variant its code's hash and whether it is what ships."""
    lines = ["/* The kernels of this program; see kernel.h. */", "#ifndef KERNELS_H", "#define KERNELS_H", ""]
    lines += [f'#include "{recipe.file_name}"' for recipe in recipes]
    lines += ["", f'#define NF_TOOL "{__version__}"', "", "#define NF_KERNELS(X) \\"]
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


def compile_folder(
    folder: Path, program: str, cc: Compiler, flags: tuple[str, ...] = (), link: tuple[str, ...] = ()
) -> Path:
    """Compile and link a folder, two files at a time; BuildError with the first line of what went wrong."""

    def one(source: Path) -> None:
        run([*cc.command, "-O2", *flags, "-c", source.name, "-o", f"{source.stem}.o"], folder)

    files = sorted(folder.glob("*.c"), key=lambda p: -p.stat().st_size)
    with ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
        list(pool.map(one, files))
    objects = [f"{source.stem}.o" for source in files]
    run([*cc.command, *link, *objects, "-o", program, *LIBRARIES.get(program, ())], folder)
    return folder / program


def run(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if done.returncode:
        first = next((line for line in done.stderr.splitlines() if "error" in line), "it says nothing")
        raise BuildError(f"{shlex.join(command)} failed with status {done.returncode}: {first.strip()}")


def fill(folder: Path, files: dict[str, str]) -> None:
    """Make the folder hold these files, and no C of an earlier run."""
    for old in folder.glob("*.[cho]") if folder.is_dir() else ():
        if old.name not in files:
            try:
                old.unlink()
            except OSError as error:
                raise UsageError(f"cannot write {str(old)!r}: {error.strerror}") from None
    write({folder / name: text for name, text in files.items()})
