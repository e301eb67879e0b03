"""The command peers without the others: what it says without a network, its table, its folder."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT))

from generator import UsageError, peers, tuning

SETUP: dict[str, Any] = {
    "date": "2026-01-01",
    "cpu": "some processor",
    "torch_runs": "AVX512",
    "python": "3.11",
    "compiler": "cc 1.0",
    "versions": {"torch": "1.2.3"},
    "spread": 0.5,
    "load_before": [0.25, 0, 0],
    "load_after": [1.5, 0, 0],
    "missing": {"some-extension": "error: no header"},
}


def line(by: str, way: str, tokens: int, ms: float, **more: Any) -> dict[str, Any]:
    found = {"by": by, "way": way, "mask": "causal", "tokens": tokens, "threads": 1, "ms": ms}
    return found | {"row_error": 1e-7, "softmax_error": 0.2} | more


def lines() -> list[dict[str, Any]]:
    """Ours takes a ms for 100 tokens; FastAttention is 90 times as slow, the product 12 times, torch twice at 4096."""
    found = []
    for tokens in (512, 1024, 4096):
        found += [line("nearfar", peers.EXP, tokens, tokens / 100), line("nearfar", peers.COSH, tokens, tokens / 125)]
        found += [line(*peers.PERFORMER, tokens, 0.9 * tokens), line(*peers.PRODUCT, tokens, 0.12 * tokens)]
        found += [line(*peers.TORCH, tokens, 0.02 * tokens * tokens / 4096)]
    return [*found, line("nearfar", peers.EXP, 4096, 25.0, threads=2)]


def cells(text: str, start: str) -> list[str]:
    return next(row for row in text.splitlines() if row.startswith(start))[len(start) :].split()


def test_table() -> None:
    text = peers.table(SETUP, lines())
    assert "some processor" in text and "load 0.2 to 1.5" in text and "torch 1.2.3" in text and "cc 1.0" in text
    assert "missing: some-extension: error: no header" in text
    assert cells(text, f"nearfar {peers.EXP} ") == ["causal", "41.0", "1.00", "25.0", "1.00", "1e-07", "2e-01"]
    slow = cells(text, " ".join(peers.PERFORMER))
    assert slow == ["causal", "3686.4", "90.00", "-", "-", "1e-07", "2e-01"]
    by_length = text[text.index("ms with one thread") :]
    assert cells(by_length, " ".join(peers.PERFORMER)) == ["460.8", "921.6", "3686.4"]


def test_goals() -> None:
    """The lowest ratio counts: torch is twice as slow as ours at 4096 tokens, and twice as fast at 1024."""
    met = {row[0].split()[0]: row[2:] for row in peers.goals(lines(), [512, 1024, 4096])[1:]}
    assert met == {
        "performer-pytorch": ["100", "90.0 missed", "112.5"],
        "fast-transformers": ["10", "12.0", "15.0"],
        "torch": ["1", "0.5 missed", "0.6 missed"],
    }
    assert len(peers.goals([line("nearfar", peers.EXP, 4096, 1)], [4096])) == 1  # nobody to compare with


def test_wrong_results_fail(capsys: pytest.CaptureFixture[str]) -> None:
    assert peers.told(peers.wrong(lines())) == 0
    bad = [line("nearfar", "a", 64, 1, row_error=2e-5), line("nearfar", "b", 64, 1, row_error=float("nan"))]
    assert peers.told(peers.wrong([*bad, line("torch", "c", 64, 1, row_error=1)])) == 1
    told = capsys.readouterr().err.splitlines()
    assert [t.split(",")[0] for t in told] == ["nearfar: a", "nearfar: b"]


def test_stored_is_read_again() -> None:
    found = json.loads(peers.stored(SETUP, [line("torch", "a", 64, 1.23456789)]))
    assert found["setup"] == SETUP and found["lines"] == [line("torch", "a", 64, 1.2346)]


def test_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    drawn = peers.draw(SETUP, lines()).axes[0].get_lines()
    assert {d.get_label() for d in drawn} >= {peers.EXP, " ".join(peers.TORCH)}
    assert list(drawn[0].get_ydata()) == pytest.approx([1250.0] * 3)  # 10 us a token, 8 heads


def test_without_network(tmp_path: Path) -> None:
    """One line that says why, exit code 1, and nothing is left."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    nowhere = {"PIP_INDEX_URL": "http://127.0.0.1:9/", "PIP_EXTRA_INDEX_URL": "", "PIP_FIND_LINKS": ""}
    env = {**os.environ, **nowhere, "PIP_CONFIG_FILE": os.devnull, "TMPDIR": str(scratch), "PYTHONPATH": str(ROOT)}
    call = [sys.executable, "-m", "generator", "peers"]
    done = subprocess.run(call, env=env, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if sys.version_info < (3, 10) or "GB free" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and "torch" in done.stderr, done.stderr
    assert done.stderr.startswith("nearfar: cannot install the others: ")
    assert list(scratch.iterdir()) == []


@pytest.mark.parametrize("option", [{"threads": "9"}, {"threads": "0"}, {"tokens": "many"}])
def test_bad_options(option: dict[str, str]) -> None:
    with pytest.raises(UsageError, match=f"option --{next(iter(option))} = "):
        peers.peers(argparse.Namespace(**{"tokens": "64", "threads": "1", "keep": None, **option}))


def test_kept_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is used again if it is complete and of these versions; another folder is refused."""
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(UsageError, match="new folder or one that this command has kept"):
        with peers.folder(str(tmp_path)):
            pass
    calls: list[list[str]] = []

    def run(call: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        calls.append(call)
        failed = peers.EXTENSION in call
        return subprocess.CompletedProcess(
            call, int(failed), "", "ERROR: no wheel\nx.cpp:1: error: no type\n" if failed else ""
        )

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(peers, "ROOM", 0)
    with tuning.Progress() as progress, peers.folder(str(tmp_path / "kept")) as place:
        made = peers.install(place, progress)
        assert made == {peers.EXTENSION: "x.cpp:1: error: no type"} and len(calls) == 3
    with tuning.Progress() as progress, peers.folder(str(tmp_path / "kept")) as place:
        assert peers.install(place, progress) == made and len(calls) == 3
        monkeypatch.setattr(peers, "PACKAGES", ("other==1",))
        peers.install(place, progress)
        assert len(calls) == 6 and "other==1" in calls[4]
