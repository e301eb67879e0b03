"""Variants: the ways to run a kernel. A table of tiles and chunks per operator and target, and the rules they obey."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from . import UsageError
from .contract import DTYPES, OPERATORS, Contract, shown

MAX_TUNING = 32  # variants in a tuning header
MAX_SHIPPED = 5  # variants in a shipped header
FORM = "<target>_c<tokens>_r<rows>x<vectors>[_s<tokens>]"  # of a variant's name


@dataclass(frozen=True)
class Target:
    """An instruction set. lanes: floats in a vector (a GPU with matrix units: threads that share them, otherwise 1);
    registers: vectors it holds (a GPU: 0, see misfit)."""

    name: str
    lanes: int
    registers: int
    needs: str
    dtypes: tuple[str, ...] = DTYPES
    operators: tuple[str, ...] = ()  # empty: all
    exponential: bool = False  # of features that are exponentials only
    square: bool = False  # values as wide as heads only

    @property
    def kernels(self) -> str:
        """What it has kernels for."""
        return f"{' or '.join(self.operators) or 'any operator'} in {' or '.join(self.dtypes)}"

    def runs(self, contract: Contract) -> bool:
        """Has it a kernel for this contract?"""
        known = contract.dtype in self.dtypes and contract.operator in (self.operators or (contract.operator,))
        features = not self.exponential or not contract.m or contract.exponential
        return known and features and not (self.square and contract.v)


HALVES = ("bf16", "f16")
# What matrix units have; the loops of hybrid are more than clang 19 unrolls.
NVIDIA_KERNELS = (HALVES, ("favor", "linear", "exact", "sparse", "hybrid"), True, True)
CDNA_KERNELS = (HALVES, ("favor", "linear", "exact", "sparse"), True, True)
RDNA_KERNELS = (HALVES, ("exact", "sparse"), True, True)
GPU_KERNELS = (DTYPES, ("favor", "linear", "exact", "sparse", "hybrid"), True, True)  # what a GPU has kernels for
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
    ),
    "cuda": (
        Target("sm80", 32, 0, "NVIDIA GPUs from compute capability 8.0 on", *NVIDIA_KERNELS),
        Target("simt", 1, 0, "any NVIDIA GPU from compute capability 7.5 on", *GPU_KERNELS),
    ),
    "hip": (
        Target("gfx90a", 64, 0, "AMD Instinct MI200", *CDNA_KERNELS),
        Target("gfx942", 64, 0, "AMD Instinct MI300", *CDNA_KERNELS),
        Target("gfx11", 32, 0, "AMD RDNA3", *RDNA_KERNELS),
        Target("gfx12", 32, 0, "AMD RDNA4", *RDNA_KERNELS),
        Target("simt", 1, 0, "any AMD GPU that HIP knows", *GPU_KERNELS),
    ),
}


@dataclass(frozen=True)
class Variant:
    """target_c<tokens per chunk>_r<rows>x<vectors>: the register tile holds r rows of x vectors of accumulators.
    On a GPU r threads share x columns of the values, and _s<tokens> is the segment of a sequence that a block takes.
    On its matrix units: of x tiles of features r are computed on the special function unit, the others by products;
    softmax takes tiles of 16 x keys."""

    target: str
    c: int
    r: int
    x: int
    record: str | None = None  # id of the record that chose it
    s: int = 0

    @property
    def suffix(self) -> str:
        return f"{self.target}_c{self.c}_r{self.r}x{self.x}" + (f"_s{self.s}" if self.s else "")

    @property
    def recipe(self) -> str:
        return f"{self.suffix}@{self.record}" if self.record else self.suffix

    def bare(self) -> Variant:
        return replace(self, record=None)


# The tuning space: the register tiles of each target and the tokens per chunk that go with each (for exact: tokens of a
# query block and of a key block). The first of a target is its default.
CPU: dict[str, dict[str, tuple[int, ...]]] = {
    "avx512": {"8x2": (32, 64, 128), "12x2": (96,), "8x3": (48, 96), "4x4": (64, 128)},
    "avx2": {"6x2": (48, 96), "4x3": (48, 96), "4x2": (32, 64), "8x1": (32, 64)},
    "neon": {"4x4": (32, 64), "8x2": (32, 64), "6x4": (48, 96)},
    "c": {"1x1": (1,)},  # token by token, without tiles
}
AMX: dict[str, dict[str, tuple[int, ...]]] = {"amx": {"32x2": (64, 128, 256)}}  # two rows of two tiles
FAVOR = AMX | CPU
# An exact kernel reads every key again for each block of queries (a few chunks at 64 dims): large blocks first.
EXACT = CPU | {
    "avx512": {"8x2": (64, 128, 32), "12x2": (96,), "8x3": (96, 48), "4x4": (128, 64)},
    "avx2": {"6x2": (96, 48), "4x3": (96, 48)},
}
# A hybrid goes through each block of queries in chunks: those of the commonest block first.
HYBRID = CPU | {
    "avx512": {"8x2": (64, 32, 128), "4x4": (64, 128), "12x2": (96,), "8x3": (48, 96)},
    "avx2": {"4x2": (64, 32), "6x2": (96, 48), "4x3": (96, 48), "8x1": (64, 32)},
    "neon": {"4x4": (64, 32), "8x2": (64, 32), "6x4": (48, 96)},
}
# On a GPU the threads of a block hold the state in registers: more columns in one, more products for what it reads.
GPU = {
    "simt": {
        "4x1": (16, 32, 8),
        "4x2": (16, 32, 8),
        "4x4": (16, 8),
        "8x1": (16, 8),
        "8x2": (16, 8),
        "16x1": (8, 4),
        "16x2": (8, 4),
    }
}
# On matrix units 16 tokens of a chunk are a warp's, or several warps' (groups): the largest chunks first.
MATRIX_FLOATS = {"sm80": 160, "gfx90a": 192, "gfx942": 192}
MATRIX = {"1x1": (64, 48, 32, 16), "3x4": (32, 16), "1x2": (64, 32)}
# Linear maps: as many channels as a chunk has tokens, or a few times as many; on AMD what 64 KiB hold.
LINEAR: dict[str, tuple[int, ...]] = {"1x1": (64, 128, 112, 96, 80, 48, 32, 16)}
SMALL_LINEAR: dict[str, tuple[int, ...]] = {"1x1": (64, 80, 48, 32, 16)}
# Softmax: on matrix units a warp has 16 rows of a block; on RDNA tiles of 64 keys would spill.
SMALL_TILES: dict[str, tuple[int, ...]] = {"1x2": (64, 32)}
LARGE_TILES: dict[str, tuple[int, ...]] = {"1x4": (64, 128, 32), **SMALL_TILES}
GPU_EXACT: dict[str, dict[str, tuple[int, ...]]] = {
    "sm80": LARGE_TILES,
    "gfx90a": LARGE_TILES,
    "gfx942": LARGE_TILES,
    "gfx11": SMALL_TILES,
    "gfx12": SMALL_TILES,
    "simt": {"4x1": (32, 16), "4x2": (32, 16), "4x4": (16,), "8x1": (32, 16)},
}
SPACE = {
    **{
        ("favor", "cpu"): FAVOR,
        ("linear", "cpu"): CPU,
        ("exact", "cpu"): EXACT,
        ("sparse", "cpu"): EXACT,
        ("hybrid", "cpu"): HYBRID,
    },
    **{(operator, "cuda"): {"sm80": MATRIX} | GPU for operator in ("favor", "hybrid")},
    ("favor", "hip"): {"gfx90a": MATRIX, "gfx942": MATRIX} | GPU,
    ("hybrid", "hip"): GPU,
    ("linear", "cuda"): {"sm80": LINEAR} | GPU,
    ("linear", "hip"): {"gfx90a": SMALL_LINEAR, "gfx942": SMALL_LINEAR} | GPU,
    **{
        (operator, backend): {t.name: GPU_EXACT[t.name] for t in TARGETS[backend]}
        for operator in ("exact", "sparse")
        for backend in ("cuda", "hip")
    },
}
# Tokens of a segment, where an operator has a state; the second with the first tile of its best targets alone.
SEGMENTS = (1024, 256)


def fault(variant: Variant, target: Target) -> str | None:
    """The rule that a variant breaks, or None."""
    c, r, x = variant.c, variant.r, variant.x
    if target.lanes > 1 and not target.registers:
        if c % 16 or not 16 <= c <= 128 or x not in (1, 2, 4) or r > x:
            return "c must be a multiple of 16 from 16 to 128, x 1, 2 or 4, r at most x"
        return None if not variant.s or variant.s >= 16 else "segments must be of 16 to 9999 tokens"
    if not target.registers:
        if c % 4 or not 4 <= c <= 128 or r not in (1, 2, 4, 8, 16, 32) or x not in (1, 2, 4):
            return "c must be a multiple of 4 from 4 to 128, r 1, 2, 4 and so on to 32, x 1, 2 or 4"
        return None if not variant.s or variant.s >= 16 else "segments must be of 16 to 9999 tokens"
    if variant.s:
        return f"segments are the GPU's: {target.name} has none"
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


def misfit(contract: Contract, variant: Variant, target: Target) -> str | None:
    """The rule that a variant breaks with this contract, or None."""
    if target.registers:
        return None
    if target.lanes > 1 and contract.operator == "linear":
        return misfit_linear(contract, variant, target)
    if target.lanes > 1:
        return misfit_matrix(contract, variant, target) if contract.m else misfit_softmax(contract, variant)
    c, r, d, m = variant.c, variant.r, contract.d, -(-contract.features // (4 * variant.r)) * 4 * variant.r
    if (variant.s > 0) != (m > 0):
        return f"it must{'' if m else ' not'} end in _s<tokens>, the segments of operators with a state"
    threads = d // variant.x * r
    far, near = m > 0, contract.operator in ("exact", "sparse", "hybrid")
    floats = variant.x * (far * m // r + near * c)
    what = " and ".join(far * ["the state"] + near * ["the outputs"])
    shared = far * (4 * (2 * c * (m + 4) + d * (c + 4) + c * d + c * (c + 1) + 3 * m + 6 * c) + 420)
    shared += near * (4 * (d * (3 * c + 5) + c * (c + 14)) + 600)
    if d % variant.x or threads % 32 or threads > 512:
        return f"d / x * r = {threads} threads of a block must be a multiple of 32 up to 512"
    if floats > 128 or threads * (floats + 100) > 65536:
        return f"{threads} threads with {floats} floats of {what} each do not fit a GPU's registers"
    return None if shared <= 65536 else f"it takes {shared} bytes of shared memory, at most 65536 are everywhere"


def groups(contract: Contract, variant: Variant, target: Target) -> int:
    """On matrix units: the warps that share 16 tokens of a chunk. One if its registers hold all that they need, else as
    many as make 8 warps of the block; 0 if neither does."""
    c, d, m, rows = variant.c, contract.d, contract.m, contract.rows
    halves, most = 1 if contract.dtype == "bf16" else 2, MATRIX_FLOATS[variant.target] * target.lanes
    if rows % c == 0 and m * d * 16 // c + max(rows * 16, halves * m * 8) + d * 16 <= most:
        return 1
    n = 128 // c
    keys, queries = halves * m * c // 16 + d * 8, (rows + d) * 16 // n
    fits = m * d // 8 + keys + 2 * queries <= 240 * target.lanes  # of which more spill
    return n if fits and 128 % c == m % 128 == rows % (16 * n) == d % (16 * n) == 0 else 0


def misfit_matrix(contract: Contract, variant: Variant, target: Target) -> str | None:
    """The same on matrix units: a warp holds a few times 16 features with their sums."""
    c, d, m, rows = variant.c, contract.d, contract.m, contract.rows
    halves, n = 1 if contract.dtype == "bf16" else 2, groups(contract, variant, target)
    if d % 16 or rows % 16 or c > 64:
        return f"d = {d} and the {rows} rows of w must be multiples of 16, c = {c} at most 64"
    if not variant.s:
        return "it must end in _s<tokens>, the segments of operators with a state"
    if not n:
        return f"neither {c // 16} warps nor 8 can share the {rows} rows of w and hold {m} x {d} sums in registers"
    if contract.b and (
        n > 1
        or m * d * 16 // c + max(rows * 16, halves * m * 8) + d * 24 > MATRIX_FLOATS[variant.target] * target.lanes
    ):
        return f"{m} x {d} sums and what a query needs of both fields do not fit the registers of {c // 16} warps"
    if variant.x > m // c // n:
        return f"x must be at most the {m // c // n} tiles of features of a warp"
    shared = 2 * (d + 8) * (rows + halves * (c + m)) + 2 * halves * m * (c + 9) + 4 * m + 12 * c + 420
    shared += 4 * c * max(d + 8, halves * (c + 8)) + 2 * halves * c * (m + 8) + 4 * n * c if n > 1 else 4 * c * (d + 8)
    shared += softmax_shared(d, c, max(c // 2, 16)) if contract.b else 0
    most = 65536 if target.name.startswith("gfx") else 232448
    return None if shared <= most else f"it takes {shared} bytes of shared memory, at most {most} are there"


def misfit_linear(contract: Contract, variant: Variant, target: Target) -> str | None:
    """The same of linear maps on matrix units: features are channels, so a warp holds a few times 16 channels' sums."""
    c, d, halves = variant.c, contract.d, 1 if contract.dtype == "bf16" else 2
    state, tokens = d * d * 16 // c, 16 * d * (1 + halves)  # floats of a warp: S; features of keys or queries, outputs
    registers = 192 if state < tokens else MATRIX_FLOATS[variant.target]
    if contract.map not in ("elu", "relu", "identity"):
        return "the map must be of each channel alone: elu, relu or identity"
    if d % 16 or d % c:
        return f"d = {d} must be a multiple of 16 and of c = {c}"
    if (variant.r, variant.x) != (1, 1) or not variant.s:
        return "it must be r1x1 and end in _s<tokens>, the segments of operators with a state"
    if state + tokens > registers * target.lanes:
        return f"{d} x {d} sums and {16 * d} outputs do not fit the registers of {c // 16} warps"
    shared = 2 * c * (d + 8) * (1 + halves) + 2 * halves * d * (c + d + 17) + 8 * c + 420
    most = 65536 if target.name.startswith("gfx") else 232448
    return None if shared <= most else f"it takes {shared} bytes of shared memory, at most {most} are there"


def misfit_softmax(contract: Contract, variant: Variant) -> str | None:
    """The same of softmax on matrix units: a thread holds queries and outputs, a block two tiles of keys and values."""
    c, d, n = variant.c, contract.d, 16 * variant.x
    most = 64 if variant.target == "gfx11" else 128  # whose queries take twice the registers
    if d % 16 or d > most:
        return f"d = {d} must be a multiple of 16 up to {most}"
    if variant.r != 1 or variant.s or c > 2 * n:
        return f"it must be r1, without segments, and c at most {2 * n}, two tiles of keys"
    shared = softmax_shared(d, c, n)
    return None if shared <= 65536 else f"it takes {shared} bytes of shared memory, at most 65536 are everywhere"


def softmax_shared(d: int, rows: int, keys: int) -> int:
    """Bytes of shared memory that softmax takes on matrix units: two tiles of keys and values, and what is small."""
    return 8 * keys * (d + 8) + 36 * keys + 12 * rows + 900


def targets(backend: str) -> dict[str, Target]:
    return {t.name: t for t in TARGETS[backend]}


def entries(contract: Contract, backend: str, target: Target) -> list[Variant]:
    """The tuning space's tiles and chunks, whether they fit or not."""
    made: list[Variant] = []
    segment = SEGMENTS[0] if contract.features and not target.registers else 0
    for tile, chunks in SPACE.get((contract.operator, backend), {}).get(target.name, {}).items():
        r, x = map(int, tile.split("x"))
        if contract.operator == "hybrid" and target.registers:  # chunk by chunk of a block: the fewest tokens first
            chunks = tuple(sorted(chunks, key=lambda c: -(-contract.b // c) * c))
        made += [Variant(target.name, c, r, x, s=segment) for c in chunks]
    return made


def obstacle(contract: Contract, backend: str, target: Target) -> str:
    """Why a GPU's target has no variant of the contract: the rule that stops the first of its tiles."""
    if not target.runs(contract):
        return f"it has {target.kernels}"
    return next(rule for v in entries(contract, backend, target) if (rule := misfit(contract, v, target)))


def space(contract: Contract, backend: str = "cpu") -> list[Variant]:
    """The candidates that the tuner tries, in canonical order; the first of each target is its default."""
    found: list[Variant] = []
    if backend == "cpu" and contract.dtype not in OPERATORS[contract.operator].cpu:
        return found
    for target in filter(lambda t: t.runs(contract), TARGETS[backend]):
        made = entries(contract, backend, target)
        segment = made[0].s if made else 0
        fitting = [v for v in made if not fault(v, target) and not misfit(contract, v, target)]
        if segment and (target.lanes > 1 or not found):  # matrix units, or simt where there are none
            fitting += [replace(v, s=SEGMENTS[1]) for v in fitting[:1]]
        found += fitting
    if len(found) > MAX_TUNING:
        raise ValueError(f"{contract.name}: {len(found)} variants to tune, at most {MAX_TUNING} are allowed")
    return found


def default(contract: Contract, backend: str = "cpu") -> list[Variant]:
    """What a header ships when nothing was measured: one variant per target."""
    first: dict[str, Variant] = {}
    for variant in space(contract, backend):
        first.setdefault(variant.target, variant)
    return list(first.values())


def parse_variant(text: str, backend: str = "cpu", contract: Contract | None = None) -> Variant:
    """The variant of a suffix such as avx2_c48_r6x2, with @<record> behind it where a record chose it."""
    where, known = f"variant {shown(text)}", targets(backend)
    number = "([1-9][0-9]{0,3})"
    match = re.fullmatch(rf"([a-z0-9]+)_c{number}_r{number}x{number}(?:_s{number})?(?:@([0-9a-f]{{8}}))?", text)
    if not match:
        some = "avx2_c48_r6x2" if backend == "cpu" else "simt_c16_r4x1_s1024"
        raise UsageError(f"{where}: must be written {FORM}, such as {some}")
    if match[1] not in known:
        raise UsageError(f"{where}: field 'target' = '{match[1]}': must be {' or '.join(known)}")
    variant = Variant(match[1], int(match[2]), int(match[3]), int(match[4]), match[6], int(match[5] or 0))
    broken = fault(variant, known[variant.target])
    if contract and not broken:
        broken = misfit(contract, variant, known[variant.target])
    if broken:
        raise UsageError(f"{where}: {broken}")
    return variant


def canonical(variants: list[Variant], backend: str = "cpu") -> list[Variant]:
    """Targets in their order, each variant once; within a target the order given stays, the first is its default."""
    order = list(targets(backend))
    once = {v.suffix: v for v in reversed(variants)}
    return sorted(once.values(), key=lambda v: (order.index(v.target), variants.index(v)))
