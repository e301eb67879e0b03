"""Contracts: what is computed. One schema gives the names, their parser, the limits, the list and the help."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product, zip_longest
from typing import Any

from . import UsageError

BACKENDS = ("cpu", "cuda", "hip")
DTYPES = ("f32", "bf16", "f16")
F32 = DTYPES[:1]


@dataclass(frozen=True)
class Number:
    """A number in a name: one letter and a plain decimal."""

    letter: str
    text: str
    rule: str
    values: tuple[int, ...]
    optional: bool = False

    def __str__(self) -> str:
        return f"{self.letter}<{self.letter.upper()}>"


@dataclass(frozen=True)
class Operator:
    """What may stand in a name behind the operator, in this order: map, dtype, numbers."""

    text: str
    maps: tuple[str, ...]
    dtypes: tuple[str, ...]
    numbers: tuple[Number, ...]
    cpu: tuple[str, ...] = DTYPES  # the dtypes that a CPU has kernels of; a GPU has all of them

    def pattern(self, name: str) -> str:
        """How the operator's contracts are written: favor_<cosh|exp>_f32_d<D>_m<M>."""
        words = [one_of(choices) for choices in (self.maps, self.dtypes) if choices]
        numbers = (f"[_{n}]" if n.optional else f"_{n}" for n in self.numbers)
        return "_".join([name, *words]) + "".join(numbers)


D = Number("d", "head dim", "a multiple of 8 from 8 to 256", tuple(range(8, 257, 8)))
WIDE = Number("d", "head dim", "a multiple of 8 from 8 to 512", tuple(range(8, 513, 8)))
V = Number("v", "value dim, if not the head dim (cpu only)", WIDE.rule, WIDE.values, optional=True)
M = Number(
    "m",
    "features (cosh: both signs; trig: sine and cosine)",
    "8, or a multiple of 16 up to 1024",
    (8, *range(16, 1025, 16)),
)

B = Number("b", "block of tokens", "a multiple of 16 from 16 to 512", tuple(range(16, 513, 16)))

FAVOR_MAPS = ("cosh", "exp", "trig", "relu")
LINEAR_MAPS = ("elu", "relu", "identity", "taylor2", "softmaxqk")
TAYLOR_LIMIT = 32  # taylor2 makes about d*d/2 features

# The schema. A new operator is one entry here, one in space.py and its templates.
OPERATORS = {
    "favor": Operator("softmax attention by random features (trig, relu: cpu only)", FAVOR_MAPS, DTYPES, (D, V, M)),
    "linear": Operator("linear attention: a map without randomness, or ready features", LINEAR_MAPS, DTYPES, (WIDE, V)),
    "exact": Operator("softmax attention, the exact baseline", (), DTYPES, (WIDE,), F32),
    "sparse": Operator("softmax attention over a pattern: window, globals, blocks", (), DTYPES, (WIDE, B), F32),
    "hybrid": Operator("exact near by, random features far away, one sum", ("cosh", "exp"), DTYPES, (D, M, B), F32),
}


@dataclass(frozen=True)
class Contract:
    """One thing to compute. Made by parse(); its name parses back to it."""

    operator: str
    map: str
    dtype: str
    d: int
    v: int = 0
    m: int = 0
    b: int = 0

    @property
    def name(self) -> str:
        numbers = [f"{n.letter}{x}" for n in OPERATORS[self.operator].numbers if (x := getattr(self, n.letter))]
        return "_".join([self.operator, *([self.map] if self.map else []), self.dtype, *numbers])

    @property
    def values(self) -> int:
        """Value dim: the head dim where the name has no v."""
        return self.v or self.d

    @property
    def features(self) -> int:
        """Features of a token in the far field, or 0: of taylor2 1, x and the products of two, rounded up to 8."""
        if self.operator != "linear":
            return self.m
        return (1 + self.d + self.d * (self.d + 1) // 2 + 7) // 8 * 8 if self.map == "taylor2" else self.d

    @property
    def default_scale(self) -> float:
        """The scale of a call that names none."""
        return 1.0 if self.operator == "linear" and self.map != "taylor2" else float(self.d**-0.5)

    @property
    def rows(self) -> int:
        """Rows of the projection matrix: a row of cosh serves both signs, one of trig sine and cosine."""
        return self.m // 2 if self.map in ("cosh", "trig") else self.m

    @property
    def exponential(self) -> bool:
        """Features that are exponentials of the projections: each has a reference of its own."""
        return self.map in ("cosh", "exp")

    @property
    def terms(self) -> int:
        """What the kernel is the mean of: features, of trig pairs of them."""
        return self.rows if self.map == "trig" else self.m

    @property
    def eps(self) -> str:
        """What args->eps may be, as args.h has it."""
        if not self.m:
            return "IGNORED"
        return {"exp": "FULL", "relu": "ALWAYS"}.get(self.map, "NONE") if self.operator == "favor" else "NONE"

    @property
    def hash(self) -> int:
        """FNV-1a, 64 bits, over the name: marks projections and states."""
        value = 0xCBF29CE484222325
        for byte in self.name.encode():
            value = (value ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
        return value


def parse(name: str) -> Contract:
    """The contract of a name; UsageError names the field, its value and the rule."""
    where = f"contract {shown(name)}"
    bare = re.match(r"(?:nf_)?(.*?)(?:_(?:cpu|cuda|hip)(?:_.*)?)?(?:\.h)?$", name, re.DOTALL)
    if bare and bare[1] != name and bare[1].split("_")[0] in OPERATORS:
        raise UsageError(f"{where}: is the name of a kernel or file; write the contract alone: {shown(bare[1])}")
    head, *words = name.split("_")
    operator = OPERATORS[choice(where, "operator", head, OPERATORS)]
    texts = {"map": operator.maps, "dtype": operator.dtypes}
    numbers = {n.letter: n for n in operator.numbers if not n.optional or any(w.startswith(n.letter) for w in words)}
    slots = [field for field in texts if texts[field]] + list(numbers)
    values: dict[str, Any] = {"operator": head, "map": ""}
    if operator.maps and words[:1] and words[0] in operator.dtypes:
        raise UsageError(f"{where}: field 'map' is missing: write {operator.pattern(head)}")
    for slot, word in zip_longest(slots, words):
        if word is None:
            raise UsageError(f"{where}: field '{slot}' is missing: write {operator.pattern(head)}")
        if slot is None:
            raise UsageError(f"{where}: field {shown(word)} is unknown: write {operator.pattern(head)}")
        values[slot] = number(where, numbers[slot], word) if slot in numbers else choice(where, slot, word, texts[slot])
    if values.get("v") == values.get("d"):
        raise UsageError(f"{where}: field 'v' = {values['v']}: is the head dim; leave it out")
    if not allowed(values["map"], values["d"]):
        raise UsageError(f"{where}: field 'd' = {values['d']}: must be at most {TAYLOR_LIMIT} with taylor2")
    return Contract(**values)


def allowed(map_: str, d: int) -> bool:
    return map_ != "taylor2" or d <= TAYLOR_LIMIT


def number(where: str, field: Number, word: str) -> int:
    """The value of a word such as d64."""
    if not word.startswith(field.letter):
        raise UsageError(f"{where}: field '{field.letter}' = {shown(word)}: must be written {field.letter}<number>")
    digits = word[len(field.letter) :]
    if not re.fullmatch(r"0|-?[1-9][0-9]{0,8}", digits):
        rule = f"{field.rule}, in plain digits without leading zeros"
        raise UsageError(f"{where}: field '{field.letter}' = {shown(digits)}: must be {rule}")
    if int(digits) not in field.values:
        raise UsageError(f"{where}: field '{field.letter}' = {digits}: must be {field.rule}")
    return int(digits)


def choice(where: str, field: str, value: str, choices: Iterable[str]) -> str:
    """The value itself if it is one of the choices."""
    if value in choices:
        return value
    near = difflib.get_close_matches(value, list(choices), 1)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    raise UsageError(f"{where}: field '{field}' = {shown(value)}: must be {' or '.join(choices)}{hint}")


def contracts(operator: str | None = None, backend: str | None = None) -> Iterator[Contract]:
    """Every contract within the limits (of a backend: those with dtypes that it has), in the order of the schema."""
    for name, op in OPERATORS.items():
        if operator in (None, name):
            for map_, dtype in product(op.maps or ("",), op.cpu if backend == "cpu" else op.dtypes):
                for values in product(*((0,) if n.optional else n.values for n in op.numbers)):
                    contract = Contract(name, map_, dtype, **{n.letter: v for n, v in zip(op.numbers, values)})
                    if allowed(map_, contract.d):
                        yield contract


def one_of(choices: tuple[str, ...]) -> str:
    return choices[0] if len(choices) == 1 else f"<{'|'.join(choices)}>"


def shown(text: str) -> str:
    """Quoted, printable and short: fit for a line of an error."""
    return ascii(text if len(text) <= 60 else text[:57] + "...")
