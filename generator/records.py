"""Records: what the tuner measured, one JSON object per line, and which variants follow from it."""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from . import UsageError
from .contract import Contract, shown
from .render import variant_code
from .space import Variant, default, parse_variant

MARGIN = 1.02  # the default gives way only to a variant that is faster by more than this
Code = Callable[[Contract, str, Variant], str]


@dataclass(frozen=True)
class Record:
    """One tuning of one contract on one device at one length."""

    id: str
    where: str  # file:line
    data: dict[str, Any]

    def part(self, name: str) -> dict[str, Any]:
        """A nested object such as the device or the shape."""
        found = self.data.get(name)
        return found if isinstance(found, dict) else {}

    @property
    def tokens(self) -> int:
        found = self.part("shape").get("tokens")
        return found if isinstance(found, int) and found > 0 else 1

    @property
    def key(self) -> str:
        """What a newer record replaces."""
        device = [self.part("device").get(k) for k in ("vendor", "arch", "name")]
        return json.dumps([*map(self.data.get, ("contract", "backend", "cache", "shape")), device], sort_keys=True)


def warn(message: str) -> None:
    print(f"nearfar: warning: {message}", file=sys.stderr)


def read(paths: Iterable[Path]) -> list[Record]:
    """The records of files, and of the *.jsonl in folders. A bad line is a warning; the newest of a key wins."""
    newest: dict[str, Record] = {}
    for path in (p for given in paths for p in (sorted(given.glob("*.jsonl")) if given.is_dir() else [given])):
        try:
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError as error:
            raise UsageError(f"cannot read {shown(str(path))}: {error.strerror}") from None
        if lines and not any(line.lstrip().startswith("{") for line in lines):
            raise UsageError(f"file {shown(str(path))}: must hold records as tune writes them, a JSON object a line")
        for at, line in enumerate(lines, 1):
            record = read_line(line, f"{path}:{at}") if line.strip() else None
            if record:
                newest.pop(record.key, None)
                newest[record.key] = record
    return list(newest.values())


def read_line(line: str, where: str) -> Record | None:
    """The record of a line; a warning and None where it is not one."""
    try:
        data = json.loads(line)
    except (ValueError, RecursionError):
        warn(f"{where}: not a line of JSON, skipped")
        return None
    needed = {"contract": str, "backend": str, "tried": list}
    if not isinstance(data, dict) or not all(isinstance(data.get(k), kind) for k, kind in needed.items()):
        warn(f"{where}: not a record, skipped")
        return None
    if data.get("v") != 1:
        warn(f"{where}: version {shown(str(data.get('v')))} of records is unknown, skipped")
        return None
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return Record(hashlib.sha256(text.encode()).hexdigest()[:8], where, data)


class Timing(NamedTuple):
    median: float
    stayed: bool  # in the race to its end; one dropped early for being slow has few samples


Times = dict[Variant, Timing]
Measured = tuple[Record, Times]


def times(record: Record, contract: Contract, backend: str, code: Code) -> Times:
    """The time of every variant that ran right and whose code is still today's."""
    found: Times = {}
    stale = []
    for tried in record.data["tried"]:
        if not isinstance(tried, dict) or tried.get("st") not in ("ok", "slow"):
            continue
        name, median = str(tried.get("n")).split(f"{backend}_")[-1], tried.get("med")
        try:
            variant = parse_variant(name, backend).bare()
        except UsageError:
            stale.append(name)
            continue
        if tried.get("code") != code(contract, backend, variant):
            stale.append(name)
        elif isinstance(median, (int, float)) and math.isfinite(median) and median > 0:
            found[variant] = Timing(float(median), tried["st"] == "ok")
    if stale:
        advice = f"to measure them again: ./nearfar tune {contract.name} --backend {backend}"
        warn(f"{record.where}: ignored, changed since they were measured: {', '.join(stale)}; {advice}")
    return found


def choose(
    records: list[Record],
    contract: Contract,
    backend: str = "cpu",
    device: dict[str, Any] | None = None,
    tokens: int | None = None,
    code: Code = variant_code,
) -> list[Variant]:
    """One variant per target, with the id of the record that chose it; the default where nothing was measured."""
    mine = [r for r in records if (r.data["contract"], r.data.get("backend")) == (contract.name, backend)]
    if not mine:
        warn(f"no record of {contract.name} on {backend}: its default variants are taken")
    measured = [(r, times(r, contract, backend, code)) for r in mine]
    chosen = []
    for base in default(contract, backend):
        of_target = [(r, {v: t for v, t in found.items() if v.target == base.target}) for r, found in measured]
        chosen.append(best(near([m for m in of_target if m[1]], device or {}, tokens), base))
    return chosen


def near(pool: list[Measured], device: dict[str, Any], tokens: int | None) -> list[Measured]:
    """Same device (at the nearest length), else same arch, else same vendor, else all."""
    for keys in (("vendor", "arch", "name"), ("arch",), ("vendor",)):
        same = [m for m in pool if all(device.get(k) and device[k] == m[0].part("device").get(k) for k in keys)]
        if same and tokens and "name" in keys:
            same = [min(same, key=lambda m: abs(math.log(tokens / m[0].tokens)))]
        if same:
            return same
    return pool


def best(pool: list[Measured], base: Variant) -> Variant:
    """The variant whose worst case over the pool is best; a near-tie goes to the default."""
    common = [v for v in (pool[0][1] if pool else {}) if all(v in found for _, found in pool)]
    common = [v for v in common if any(found[v].stayed for _, found in pool)]
    if not common:
        return base
    for variant in common:  # the tuner's own verdict comes from finals, which a median cannot replace
        if all(r.data.get("winner") == variant.suffix for r, _ in pool):
            return replace(variant, record=pool[-1][0].id)
    worst = {v: max((found[v].median / min(found.values()).median, r.id) for r, found in pool) for v in common}
    first = min(common, key=lambda v: (worst[v][0], v.suffix))
    chosen = base if base in worst and worst[base][0] <= MARGIN * worst[first][0] else first
    return replace(chosen, record=worst[chosen][1])
