"""The style as tests: Python is linted, formatted and typed, C is formatted. Templates are in the same style by hand:
the formatter takes the pieces of a name such as NF_${T} apart."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from conftest import ROOT, run

PYTHON = ["generator", "bench", "tests"]
C_FOLDERS = ["include", "tests", "bench", "examples"]


def tool(name: str, install: str) -> list[str]:
    """How to call a tool: beside this Python, or on the path."""
    beside = Path(sys.executable).parent / name
    if not beside.exists() and not shutil.which(name):
        pytest.skip(f"{name} is missing: {install}")
    return [str(beside) if beside.exists() else name]


def test_ruff() -> None:
    run(*tool("ruff", "pip install ruff"), "check", *PYTHON)


def test_ruff_format() -> None:
    run(*tool("ruff", "pip install ruff"), "format", "--check", *PYTHON)


def test_mypy() -> None:
    run(*tool("mypy", "pip install mypy"), "generator")


def c_files() -> list[Path]:
    endings = (".c", ".h", ".cu")
    return sorted(f for folder in C_FOLDERS for f in (ROOT / folder).rglob("*") if f.name.endswith(endings))


def test_clang_format() -> None:
    run(*tool("clang-format", "pip install clang-format"), "--dry-run", "-Werror", "--style=file", *c_files())
