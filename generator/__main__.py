"""nearfar's command line."""

from __future__ import annotations

import argparse
import fnmatch
import os
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

from . import UsageError, __version__, peers, quality, records, testing, tuning
from .contract import BACKENDS, OPERATORS, Contract, contracts, parse, shown
from .render import ROOT, Recipe, add_recipe_arguments, check, recipes, render, write
from .space import TARGETS, default, obstacle, space, targets

COMMON = {"d": 64, "m": 128, "b": 64}  # numbers of contracts that stand for their operator
ABOUT = """\
nearfar makes attention kernels: small, specialised single headers in C, and finds out which variant is fastest here.

  ./nearfar list                                     what there is
  ./nearfar generate favor_cosh_f32_d64_m128         write nf_favor_cosh_f32_d64_m128_cpu.h
  ./nearfar tune                                     measure this machine
"""


class Parser(argparse.ArgumentParser):
    """An argparse whose errors are one line."""

    def __init__(self, **options: Any) -> None:
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(**{**options, "allow_abbrev": False})

    def error(self, message: str) -> NoReturn:
        message = re.sub(
            r"argument COMMAND: invalid choice: ('.*') \(choose from (.*)\)", r"command \1: must be \2", message
        )
        message = re.sub(r"argument (?:-./)?(-\S+): expected one argument", r"option \1: a value must follow", message)
        raise UsageError(f"{message} (see {self.prog} --help)")


def add_generate(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = commands.add_parser(
        "generate",
        help="write the header of a contract",
        description="Write one self-contained header per contract. The same command always writes the same bytes.",
        epilog="example: ./nearfar generate favor_cosh_f32_d64_m128 exact_f32_d64 --prefix eng_ -o third_party/",
    )
    add_recipe_arguments(parser)
    parser.add_argument(
        "--tuned", action="append", metavar="RECORDS", help="choose by these records (*.jsonl, or a folder; repeatable)"
    )
    parser.add_argument("-o", "--output", default=".", metavar="DIR|FILE", help="a folder, or a file ending in .h")
    parser.set_defaults(run=generate)


def generate(args: argparse.Namespace) -> int:
    if args.tuned and args.variants is not None:
        raise UsageError("options --tuned and --variants: give one of them, both choose the variants")
    found = records.read(map(Path, args.tuned)) if args.tuned else []
    made = recipes(args, (lambda c: records.choose(found, c, args.backend)) if args.tuned else None)
    output = Path(args.output)
    to_file = output.suffix in (".h", ".hh", ".hpp", ".inc") and not output.is_dir()
    if to_file and len(made) > 1:
        raise UsageError(f"option -o = {shown(args.output)}: one file cannot hold {len(made)} headers, name a folder")
    files = {output if to_file else output / recipe.file_name: render(recipe) for recipe in made}
    for path, changed in write(files).items():
        print(f"{'wrote' if changed else 'unchanged'} {path} ({len(files[path].encode()) / 1000:.0f} kB)")
    return 0


def add_list(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = commands.add_parser(
        "list",
        help="contracts and variants, with what each needs",
        description="Without GLOB: the operators, their limits, what runs where, and the headers in generated/.\n"
        "With a pattern: the contracts that it matches. With the name of one contract: its variants.",
        epilog="examples: ./nearfar list 'favor_*_d64_m128'\n          ./nearfar list exact_f32_d64",
    )
    parser.add_argument("glob", nargs="?", metavar="GLOB", help="a contract, or a pattern with * ? [..] in quotes")
    parser.set_defaults(run=list_)


def list_(args: argparse.Namespace) -> int:
    if args.glob is None:
        list_operators()
    elif any(mark in args.glob for mark in "*?["):
        matching = [c for c in contracts() if fnmatch.fnmatchcase(c.name, args.glob)]
        if not matching:
            raise UsageError(f"argument GLOB = {shown(args.glob)}: no contract matches (see ./nearfar list)")
        for contract in matching:
            print(contract.name, counts(contract))
    else:
        list_variants(parse(args.glob))
    return 0


def list_operators() -> None:
    print("contracts")
    for name, operator in OPERATORS.items():
        print(f"  {operator.pattern(name)}: {operator.text}")
        for number in operator.numbers:
            print(f"      {number.letter}  {number.text}: {number.rule}")
        for dtype in operator.dtypes:
            numbers = {n.letter: COMMON[n.letter] for n in operator.numbers if not n.optional}
            some = Contract(name, operator.maps[0] if operator.maps else "", dtype, **numbers)
            print(f"      such as {some.name}: {runs_on(some)}")
    print("targets, in the order in which a header prefers them")
    for backend in BACKENDS:
        for target in TARGETS[backend]:
            print(f"  {backend + ' ' + target.name:11} needs {target.needs}")
    ready = sorted((ROOT / "generated").glob("*.h"))
    print("ready made in generated/" if ready else "ready made in generated/: none")
    for path in ready:
        print(f"  {path.name}")


def runs_on(contract: Contract) -> str:
    """The targets that have it: cpu none, cuda sm80 simt, hip simt."""
    found = {backend: [v.target for v in default(contract, backend)] for backend in BACKENDS}
    return ", ".join(f"{backend} {' '.join(names or ['none'])}" for backend, names in found.items())


def counts(contract: Contract) -> str:
    """How many variants there are to choose from: avx512 10, avx2 9, cuda simt 3."""
    tally = Counter((backend, v.target) for backend in BACKENDS for v in space(contract, backend))
    return ", ".join(f"{'' if b == 'cpu' else b + ' '}{target} {n}" for (b, target), n in tally.items())


def list_variants(contract: Contract) -> None:
    for backend in BACKENDS:
        shipped = default(contract, backend)
        found = space(contract, backend)
        if not found:
            continue
        print(f"nf_{contract.name}_{backend}: {len(found)} variants; * is shipped unless records choose otherwise")
        for variant in found:
            mark = "*" if variant in shipped else " "
            print(f"{mark} {variant.suffix:20} needs {targets(backend)[variant.target].needs}")
        for target in TARGETS[backend] if backend != "cpu" else ():
            if target.name not in {v.target for v in found}:
                print(f"- {target.name:20} none: {obstacle(contract, backend, target)}")


def add_check(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = commands.add_parser(
        "check",
        help="is this header exactly what its recipe makes?",
        description="Read the recipe in each header, make it again and compare; copies may be renamed and moved.\n"
        "Says ok, stale (the generator changed), edited (the file was changed), not ours or missing.",
        epilog="example: ./nearfar check generated/*.h ../app/third_party/attention.h",
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="a header of nearfar")
    parser.set_defaults(run=check_files)


def check_files(args: argparse.Namespace) -> int:
    states = [check_file(name) for name in args.files]
    return 0 if all(state == "ok" for state in states) else 1


def check_file(name: str) -> str:
    state, advice = check(Path(name), recipe_of)
    print(f"{state:8} {name}{': ' if advice else ''}{advice}")
    return state


def recipe_of(words: list[str]) -> Recipe:
    """The recipe that a banner's command line stands for."""
    parser = Parser(prog="./nearfar generate", add_help=False)
    add_recipe_arguments(parser)
    made = recipes(parser.parse_args(words))
    if len(made) != 1:
        raise UsageError("a recipe makes one header")
    return made[0]


def command_line() -> Parser:
    parser = Parser(prog="./nearfar", description=ABOUT)
    parser.add_argument("--version", action="version", version=f"nearfar {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", dest="command", parser_class=Parser)
    add_generate(commands)
    add_list(commands)
    add_check(commands)
    tuning.add_commands(commands)
    quality.add_commands(commands)
    peers.add_commands(commands)
    testing.add_test(commands)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 ok, 1 a check failed, 2 a mistake in the call, 130 interrupted."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        parser = command_line()
        args, unknown = parser.parse_known_args(argv)
        if unknown:
            told = f"./nearfar {args.command}" if args.command else "./nearfar"
            raise UsageError(f"option or argument {shown(unknown[0])}: is unknown (see {told} --help)")
        if not hasattr(args, "run"):
            parser.print_help()
            return 2
        code = int(args.run(args))
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except UsageError as error:
        print(f"nearfar: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("nearfar: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
