"""Headers: a recipe is rendered, written and checked here. The same recipe always gives the same bytes."""

from __future__ import annotations

import argparse
import functools
import hashlib
import os
import re
import shlex
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from . import UsageError, __version__
from .contract import BACKENDS, OPERATORS, Contract, Number, parse, shown
from .space import (
    FORM,
    MATRIX_FLOATS,
    MAX_SHIPPED,
    TARGETS,
    Variant,
    canonical,
    default,
    groups,
    parse_variant,
    space,
    targets,
)

ROOT = Path(__file__).resolve().parent.parent
PLACEHOLDER = "0" * 64  # stands for the content hash while rendering


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a header's bytes, besides the templates."""

    contract: Contract
    backend: str
    variants: tuple[Variant, ...]
    prefix: str = "nf_"

    @property
    def kernel(self) -> str:
        return f"nf_{self.contract.name}_{self.backend}"

    @property
    def file_name(self) -> str:
        return f"{self.prefix}{self.contract.name}_{self.backend}.h"

    @property
    def command(self) -> str:
        """The canonical command line: parsing it gives the recipe back."""
        whole = list(self.variants) == space(self.contract, self.backend) and len(self.variants) > MAX_SHIPPED
        names = "all" if whole else ",".join(v.recipe for v in self.variants)
        command = f"./nearfar generate {self.contract.name} --backend {self.backend} --variants {names}"
        return command if self.prefix == "nf_" else f"{command} --prefix {self.prefix}"


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """The part of `generate` that decides the bytes; recipes in banners are parsed by it too."""
    parser.add_argument("contracts", nargs="+", metavar="CONTRACT", help="such as favor_cosh_f32_d64_m128")
    parser.add_argument("--backend", default="cpu", help=f"where it runs: {', '.join(BACKENDS)} (default: cpu)")
    ways = f"at most {MAX_SHIPPED}, separated by commas, written {FORM}, or 'all' (default: one per target)"
    parser.add_argument("--variants", metavar="LIST", help=ways)
    parser.add_argument("--prefix", default="nf_", help="what the names begin with (default: nf_)")


def recipes(args: argparse.Namespace, pick: Callable[[Contract], list[Variant]] | None = None) -> list[Recipe]:
    """The recipes that parsed arguments ask for; pick chooses the variants that were not named."""
    check_backend(args.backend)
    prefix = check_prefix(args.prefix)
    made = []
    for contract in dict.fromkeys(map(parse, args.contracts)):
        check_offered(contract, args.backend)
        if args.variants == "all":
            variants = space(contract, args.backend)
        elif args.variants is not None:
            variants = [parse_variant(v, args.backend, contract) for v in args.variants.split(",")]
            variants = canonical(variants, args.backend)
            if len(variants) > MAX_SHIPPED:
                raise UsageError(f"option --variants = {len(variants)} variants: a header ships at most {MAX_SHIPPED}")
        else:
            variants = (pick or (lambda c: default(c, args.backend)))(contract)
        for variant in variants:
            check_runs(contract, args.backend, variant)
        made.append(Recipe(contract, args.backend, tuple(variants), prefix))
    return made


def check_runs(contract: Contract, backend: str, variant: Variant) -> None:
    """Has the variant's target a kernel for the contract?"""
    target = targets(backend)[variant.target]
    if not target.runs(contract):
        raise UsageError(
            f"variant '{variant.suffix}': the target {target.name} runs {target.kernels}, not {contract.name}"
        )


def check_backend(backend: str) -> None:
    if backend not in BACKENDS:
        raise UsageError(f"option --backend = {shown(backend)}: must be {' or '.join(BACKENDS)}")


def check_offered(contract: Contract, backend: str) -> None:
    """A CPU has not all dtypes of all operators; a GPU not all maps, no value dims and no room for the largest."""
    if space(contract, backend):
        return
    where, operator = f"contract {shown(contract.name)}", OPERATORS[contract.operator]
    if backend == "cpu":
        rule = f"must be {' or '.join(operator.cpu)} on a CPU; cuda and hip have it"
        raise UsageError(f"{where}: field 'dtype' = {shown(contract.dtype)}: {rule}")

    def runs(other: Contract) -> bool:
        return any(target.runs(other) for target in TARGETS[backend])

    maps = [m for m in operator.maps if runs(replace(contract, map=m, v=0))]
    if contract.map and contract.map not in maps:
        rule = f"must be {' or '.join(maps)} with {backend}; the CPU has it"
        raise UsageError(f"{where}: field 'map' = {shown(contract.map)}: {rule}")
    if not runs(contract):
        rule = f"must be left out with {backend}, where values are as wide as heads; the CPU has it"
        raise UsageError(f"{where}: field 'v' = {contract.v}: {rule}")
    nearest = " or ".join(c.name for n in operator.numbers for c in near(contract, n, backend))
    fields, values = ("fields 'd', 'm'", f"{contract.d}, {contract.m}") if contract.m else ("field 'd'", contract.d)
    rule = f"must fit a GPU's registers and shared memory, as {nearest} does"
    raise UsageError(f"{where}: {fields} = {values}: {rule}")


def near(contract: Contract, number: Number, backend: str) -> list[Contract]:
    """The contract that the backend has and that differs least, in this number alone; or none."""
    values = sorted(number.values, key=lambda value: abs(value - getattr(contract, number.letter)))
    changes: list[dict[str, Any]] = [{number.letter: value} for value in values if not number.optional]
    others = (replace(contract, **change) for change in changes)
    return [other for other in others if space(other, backend)][:1]


def check_prefix(prefix: str) -> str:
    """The prefix itself; nearfar_ is taken by the control macros."""
    if re.fullmatch(r"[a-z][a-z0-9]*_([a-z0-9]+_)*", prefix) and prefix != "nearfar_":
        return prefix
    rule = "lower-case letters, digits and single underscores, a letter first and '_' last, not nearfar_"
    raise UsageError(f"option --prefix = {shown(prefix)}: must be {rule}")


def blocks(threads: int, registers: int) -> int:
    """The blocks that an SM is to hold at once, at most 8: each of its four schedulers has 512 registers a lane."""
    return min(max(512 // registers * 4 * 32 // threads, 1), 8)


@functools.cache
def environment(root: Path) -> Any:
    """Jinja2 with delimiters that leave C, CUDA and HIP alone; a misspelt variable is an error."""
    try:
        import jinja2
    except ModuleNotFoundError:
        raise UsageError("this Python has no jinja2: call ./nearfar, which installs it") from None
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader([root / "templates", root / "include"]),
        line_statement_prefix="//%",
        line_comment_prefix="//#",
        variable_start_string="${",
        variable_end_string="}",
        block_start_string="/*%",
        block_end_string="%*/",
        comment_start_string="/*#",
        comment_end_string="#*/",
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,
    )
    made.globals["blocks"] = blocks
    return made


def render(recipe: Recipe, root: Path = ROOT) -> str:
    """The header's text."""
    target = targets(recipe.backend)
    variants = [
        {
            **asdict(v),
            "suffix": v.suffix,
            "name": f"{recipe.kernel}_{v.suffix}",
            "lanes": target[v.target].lanes,
            "groups": groups(recipe.contract, v, target[v.target]) if v.target in MATRIX_FLOATS else 1,
            "width": v.x * target[v.target].lanes,
        }
        for v in recipe.variants
    ]
    text: str = (
        environment(root)
        .get_template("frame.h.j2" if recipe.backend == "cpu" else "gpu/frame.h.j2")
        .render(
            kernel=recipe.kernel,
            contract=recipe.contract,
            backend=recipe.backend,
            variants=variants,
            targets=list(dict.fromkeys(v.target for v in recipe.variants)),
            version=__version__,
            recipe=recipe.command,
            file_name=recipe.file_name,
            content=PLACEHOLDER,
            licence=(root / "LICENSE").read_text(encoding="utf-8"),
        )
    )
    text = re.sub(r"[ \t\r]+$", "", text, flags=re.MULTILINE)
    text = re.sub(r"\n{3,}", "\n\n", text).strip("\n") + "\n"  # comments of templates leave empty lines
    text = re.sub(r"\bnf_", recipe.prefix, text)
    text = re.sub(r"\bNF_", recipe.prefix.upper(), text)
    banner, body = split_banner(text)
    if PLACEHOLDER not in banner:
        raise ValueError("the frame's first comment must hold the recipe and the content hash")
    return banner.replace(PLACEHOLDER, sha256(body), 1) + body


def split_banner(text: str) -> tuple[str, str]:
    """The first comment, and every byte after it."""
    end = text.find("*/\n") + 3
    return (text[:end], text[end:]) if text.startswith("/*") and end > 2 else ("", text)


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


@functools.cache
def variant_code(contract: Contract, backend: str, variant: Variant, root: Path = ROOT) -> str:
    """Hash of the code behind a variant, without comments and blanks: measurements of other code are stale."""
    body = split_banner(render(Recipe(contract, backend, (variant.bare(),)), root))[1]
    body = re.sub(r"/\*.*?\*/|//[^\n]*", " ", body, flags=re.DOTALL)
    return sha256(" ".join(body.split()))[:16]


def write(files: dict[Path, str]) -> dict[Path, bool]:
    """Write all files or none, each at once; True for those that changed. A file that is right stays untouched."""
    pending: list[tuple[str, Path]] = []
    changed = {}
    try:
        for path, text in files.items():
            data = text.encode("utf-8")
            changed[path] = not (path.is_file() and path.read_bytes() == data)
            if changed[path]:
                path.parent.mkdir(parents=True, exist_ok=True)
                handle, name = tempfile.mkstemp(prefix=".nearfar-", dir=path.parent)
                pending.append((name, path))
                with os.fdopen(handle, "wb") as out:
                    out.write(data)
                os.chmod(name, 0o666 & ~umask())
        for name, path in list(pending):
            os.replace(name, path)
            pending.remove((name, path))
    except OSError as error:
        raise UsageError(f"cannot write {shown(str(path))}: {error.strerror}") from None
    finally:
        for name, _ in pending:
            os.unlink(name)
    return changed


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def check(path: Path, recipe_of: Callable[[list[str]], Recipe], root: Path = ROOT) -> tuple[str, str]:
    """(state, what to do) of a file: ok, stale, edited, not ours or missing. A copy may be renamed and moved."""
    try:
        text = path.read_bytes().decode("utf-8").replace("\r\n", "\n")
    except FileNotFoundError:
        return "missing", fix_by_name(path)
    except (OSError, UnicodeDecodeError) as error:
        return "not ours", getattr(error, "strerror", None) or "it is not a text file"
    banner, body = split_banner(text)
    command = re.search(r"^ \* Reproduce: \./nearfar generate (.+)$", banner, re.MULTILINE)
    content = re.search(r"^ \* Content: +sha256 ([0-9a-f]{64})$", banner, re.MULTILINE)
    if not command or not content:
        return "not ours", "it has no banner of nearfar with a recipe and a content hash"
    edited = sha256(body) != content[1]
    try:
        recipe = recipe_of(command[1].split())
    except UsageError as error:
        return "edited" if edited else "stale", f"its recipe is refused: {error}"
    fix = f"{recipe.command} -o {shlex.quote(str(path))}"
    if edited:
        return "edited", f"its content differs from its hash; to undo the edit: {fix}"
    if text != render(recipe, root):
        return "stale", f"today's templates make other bytes; to renew it: {fix}"
    return "ok", ""


def fix_by_name(path: Path) -> str:
    """What makes a missing file, where its name tells."""
    match = re.fullmatch(rf"nf_(.+)_({'|'.join(BACKENDS)})\.h", path.name)
    try:
        contract = parse(match[1] if match else "")
    except UsageError:
        return "no such file"
    backend = f" --backend {match[2]}" if match and match[2] != "cpu" else ""
    return f"to make it: ./nearfar generate {contract.name}{backend} -o {shlex.quote(str(path))}"
