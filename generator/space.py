"""Variants: the ways to run a kernel. A table of tiles and chunks per operator and target, and the rules they obey."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from . import UsageError
from .contract import DTYPES, Contract, shown

MAX_TUNING = 32  # variants in a tuning header
MAX_SHIPPED = 5  # variants in a shipped header


@dataclass(frozen=True)
class Target:
    """An instruction set. lanes: floats in a vector; registers: vectors it holds."""

    name: str
    lanes: int
    registers: int
    needs: str
    dtypes: tuple[str, ...] = DTYPES
    operators: tuple[str, ...] = ()  # empty: all
    exponential: bool = False  # of features that are exponentials only

    def runs(self, contract: Contract) -> bool:
        """Has it a kernel for this contract?"""
        known = contract.dtype in self.dtypes and contract.operator in (self.operators or (contract.operator,))
        return known and (contract.exponential or not self.exponential)


# Best first: the order of a header's variants and of the choice at run time.
TARGETS = {
    "cpu": (
        Target(
            "amx",
            16,
            8,
            "Linux on x86-64 with AMX-BF16 and AVX512-BF16, and nf_amx_request()",
            ("bf16",),
            ("favor",),
            True,
        ),
        Target("avx512", 16, 32, "x86-64 with AVX-512F and DQ"),
        Target("avx2", 8, 16, "x86-64 with AVX2 and FMA"),
        Target("neon", 4, 32, "64-bit Arm"),
        Target("c", 4, 16, "any processor"),
    )
}


@dataclass(frozen=True)
class Variant:
    """target_c<tokens per chunk>_r<rows>x<vectors>: the register tile holds r rows of x vectors of accumulators."""

    target: str
    c: int
    r: int
    x: int
    record: str | None = None  # id of the record that chose it

    @property
    def suffix(self) -> str:
        return f"{self.target}_c{self.c}_r{self.r}x{self.x}"

    @property
    def recipe(self) -> str:
        return f"{self.suffix}@{self.record}" if self.record else self.suffix

    def bare(self) -> Variant:
        return replace(self, record=None)


# The tuning space: the register tiles of each target and the tokens per chunk that go with each (for exact: tokens of a
# query block and of a key block). The first of a target is its default.
CPU: dict[str, dict[str, tuple[int, ...]]] = {
    "amx": {"32x2": (64, 128, 256)},  # two rows of two tiles
    "avx512": {"8x2": (32, 64, 128), "12x2": (96,), "8x3": (48, 96), "4x4": (64, 128)},
    "avx2": {"6x2": (48, 96), "4x3": (48, 96), "4x2": (32, 64), "8x1": (32, 64)},
    "neon": {"4x4": (32, 64), "8x2": (32, 64), "6x4": (48, 96)},
    "c": {"1x1": (1,)},  # token by token, without tiles
}
# An exact kernel reads every key again for each block of queries (a few chunks at 64 dims): large blocks first.
EXACT = CPU | {
    "avx512": {"8x2": (64, 128, 32), "12x2": (96,), "8x3": (96, 48), "4x4": (128, 64)},
    "avx2": {"6x2": (96, 48), "4x3": (96, 48)},
}
# A hybrid's window reads a block of keys for each block of queries: chunks of the commonest block first.
HYBRID = CPU | {
    "avx512": {"8x2": (64, 32, 128), "4x4": (64, 128), "12x2": (96,), "8x3": (48, 96)},
    "avx2": {"4x2": (64, 32), "6x2": (96, 48), "4x3": (96, 48), "8x1": (64, 32)},
    "neon": {"4x4": (64, 32), "8x2": (64, 32), "6x4": (48, 96)},
}
SPACE = {
    ("favor", "cpu"): CPU,
    ("linear", "cpu"): CPU,
    ("exact", "cpu"): EXACT,
    ("sparse", "cpu"): EXACT,
    ("hybrid", "cpu"): HYBRID,
}


def fault(variant: Variant, target: Target) -> str | None:
    """The rule that a variant breaks, or None."""
    c, r, x = variant.c, variant.r, variant.x
    if not (1 <= r <= 32 and 1 <= x <= 8):
        return "the tile must be r1x1 to r32x8"
    if target.name == "c":
        return None if (c, r, x) == (1, 1, 1) else "the target c goes token by token: it must be c_c1_r1x1"
    if target.name == "amx":
        return (
            None
            if (r, x) == (32, 2) and c % 32 == 0 and 32 <= c <= 512
            else "the target amx goes by tiles of 32x2: c must be a multiple of 32"
        )
    if r * x + x + 1 > target.registers:  # accumulators, x vectors of B, one broadcast of A
        return f"r*x + x + 1 must be at most the {target.registers} registers of {target.name}"
    if not 8 <= c <= 512 or c % (x * target.lanes) or c % r:
        return f"c must be a multiple of r = {r} and of x*lanes = {x * target.lanes}, from 8 to 512"
    return None


def targets(backend: str) -> dict[str, Target]:
    return {t.name: t for t in TARGETS[backend]}


def space(contract: Contract, backend: str = "cpu") -> list[Variant]:
    """The candidates that the tuner tries, in canonical order; the first of each target is its default."""
    found = []
    for target in filter(lambda t: t.runs(contract), TARGETS[backend]):
        for tile, chunks in SPACE[contract.operator, backend].get(target.name, {}).items():
            r, x = map(int, tile.split("x"))
            found += [v for v in (Variant(target.name, c, r, x) for c in chunks) if not fault(v, target)]
    if len(found) > MAX_TUNING:
        raise ValueError(f"{contract.name}: {len(found)} variants to tune, at most {MAX_TUNING} are allowed")
    return found


def default(contract: Contract, backend: str = "cpu") -> list[Variant]:
    """What a header ships when nothing was measured: one variant per target."""
    first: dict[str, Variant] = {}
    for variant in space(contract, backend):
        first.setdefault(variant.target, variant)
    return list(first.values())


def parse_variant(text: str, backend: str = "cpu") -> Variant:
    """The variant of a suffix such as avx2_c48_r6x2, with @<record> behind it where a record chose it."""
    where = f"variant {shown(text)}"
    number = "([1-9][0-9]{0,3})"
    match = re.fullmatch(rf"([a-z0-9]+)_c{number}_r{number}x{number}(?:@([0-9a-f]{{8}}))?", text)
    if not match:
        raise UsageError(f"{where}: must be written <target>_c<tokens>_r<rows>x<vectors>, such as avx2_c48_r6x2")
    known = targets(backend)
    if match[1] not in known:
        raise UsageError(f"{where}: field 'target' = '{match[1]}': must be {' or '.join(known)}")
    variant = Variant(match[1], int(match[2]), int(match[3]), int(match[4]), match[5])
    broken = fault(variant, known[variant.target])
    if broken:
        raise UsageError(f"{where}: {broken}")
    return variant


def canonical(variants: list[Variant], backend: str = "cpu") -> list[Variant]:
    """Targets in their order, each variant once; within a target the order given stays, the first is its default."""
    order = list(targets(backend))
    once = {v.suffix: v for v in reversed(variants)}
    return sorted(once.values(), key=lambda v: (order.index(v.target), variants.index(v)))
