"""What the pytest files share: generated headers, compilers, and skips that say how to get what is missing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable

import pytest

ROOT = Path(__file__).resolve().parent.parent
STRICT = "-Wall -Wextra -Wpedantic -Wconversion -Wsign-conversion -Wshadow -Wcast-qual -Wundef -Werror".split()
STRICT_C = [*STRICT, "-Wstrict-prototypes"]


def need(program: str, package: str) -> str:
    """The program's path, or a skip that says how to get it."""
    if not shutil.which(program):
        pytest.skip(f"{program} is missing: apt install {package}")
    return program


def run(*command: object, cwd: Path = ROOT, **more: Any) -> str:
    """Run a command that must succeed; its output."""
    words = [str(word) for word in command]
    done = subprocess.run(
        words, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, **more
    )
    assert done.returncode == 0, f"exit {done.returncode}: {' '.join(words)}\n{done.stdout[-6000:]}"
    return str(done.stdout)


def generate(folder: Path, *words: str) -> Path:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    run(sys.executable, "-m", "generator", "generate", *words, "-o", folder, env=env)
    return folder


Headers = Callable[..., Path]


@pytest.fixture(scope="session")
def headers(tmp_path_factory: pytest.TempPathFactory) -> Headers:
    """headers("contract", ...): a folder that holds their headers."""
    folder = tmp_path_factory.mktemp("headers")

    def make(*contracts: str) -> Path:
        missing = [c for c in contracts if not (folder / f"nf_{c}_cpu.h").exists()]
        return generate(folder, *missing) if missing else folder

    return make


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for report in terminalreporter.stats.get("skipped", []):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        terminalreporter.write_line(f"skipped: {report.nodeid.split('::')[-1]}: {reason.removeprefix('Skipped: ')}")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """All skipped: 77, as meson wants it."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    stats = reporter.stats if reporter else {}
    if exitstatus == 0 and stats.get("skipped") and not stats.get("passed"):
        session.exitstatus = 77
