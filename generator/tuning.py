"""The commands tune, pack, bench and report: everything around the C programs that measure."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import UsageError, build, inputs, records, report
from .build import BuildError
from .contract import BACKENDS, DTYPES, Contract, parse, shown
from .render import ROOT, Recipe, check_backend, check_offered, render, write
from .space import default, space

OUTPUT = ROOT / "tuned"
RECORDS = OUTPUT / "records.jsonl"
RESULTS = OUTPUT / "bench.jsonl"
TUNED = ("favor_cosh_f32_d32_m128", "favor_cosh_f32_d64_m128", "exact_f32_d64")
GPU_TUNED = ("favor_cosh_bf16_d64_m128", "hybrid_cosh_bf16_d64_m128_b64", "exact_bf16_d64")
STANDING = report.GOAL_CONTRACTS
INPUTS = (ROOT / "tests" / "data" / "minilm_first", ROOT / "tests" / "data" / "minilm_last")
LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096, 16384)
GPU_LENGTHS = tuple(1 << n for n in range(10, 18))
GPU_HEADS = {"heads": 32, "decode-heads": 1024}
GPU_STANDING = (
    "favor_cosh_{}_d64_m128",
    "favor_cosh_{}_d64_m256",
    "favor_cosh_{}_d128_m128",
    "favor_cosh_{}_d128_m256",
    "linear_elu_{}_d64",
    "exact_{}_d64",
    "exact_{}_d128",
    "sparse_{}_d64_b64",
    "sparse_{}_d128_b64",
    "hybrid_cosh_{}_d64_m128_b64",
)


# ---- command line --------------------------------------------------------------------------------------------------


def add_commands(commands: Any) -> None:
    add_tune(commands)
    add_pack(commands)
    add_bench(commands)
    parser = commands.add_parser(
        "report",
        help="draw the pictures of the last tune or bench",
        description="Draw, from the last measurements of a CPU: time against length, error against cost. Written\n"
        "to tuned/.",
        epilog="example: ./nearfar report",
    )
    parser.set_defaults(run=guarded(draw_report))


def add_tune(commands: Any) -> None:
    parser = commands.add_parser(
        "tune",
        help="find the fastest variants on this machine",
        description="Generate every variant, compile, verify against fp64, time, record, and write the tuned headers;\n"
        "on a CPU measure them, on real attention inputs too. Takes about two minutes. Everything is written\n"
        "to tuned/; tuned/records.jsonl is what `generate --tuned` reads.",
        epilog="examples: ./nearfar tune favor_cosh_f32_d64_m256 --input my_arrays --budget 120 --tokens 2048\n"
        "          ./nearfar tune favor_cosh_bf16_d64_m128 --backend cuda",
    )
    defaults = f"default: {' '.join(TUNED)}; on a GPU, where 16 bits are common, {' '.join(GPU_TUNED)}"
    parser.add_argument("contracts", nargs="*", metavar="CONTRACT", help=defaults)
    add_backend(parser)
    parser.add_argument(
        "--input", metavar="DIR", help="q.npy, k.npy, v.npy [batch, token, head, dim] of your own (cpu)"
    )
    parser.add_argument(
        "--budget",
        default="40",
        metavar="SECONDS",
        help="for all races together, without compiling and measuring (default: 40)",
    )
    parser.add_argument("--tokens", default="1024,4096", metavar="N,...", help="lengths (default: 1024,4096)")
    parser.set_defaults(run=guarded(tune))


def add_pack(commands: Any) -> None:
    parser = commands.add_parser(
        "pack",
        help="write the tuner for a machine without Python",
        description="Write a folder with everything that tuning needs on a target: one line compiles it, one runs it.",
        epilog="examples: ./nearfar pack favor_cosh_f32_d64_m128 exact_f32_d64 -o to_target\n"
        "          ./nearfar pack favor_cosh_f32_d64_m128 --backend cuda -o to_target",
    )
    parser.add_argument("contracts", nargs="+", metavar="CONTRACT", help="such as favor_cosh_f32_d64_m128")
    add_backend(parser)
    parser.add_argument("-o", "--output", required=True, metavar="DIR", help="the folder to write")
    parser.set_defaults(run=guarded(pack))


def add_bench(commands: Any) -> None:
    parser = commands.add_parser(
        "bench",
        help="measure the default variants of some contracts",
        description="On a CPU: speed against the FMA peak, error, decode, two threads, compile time and size.\n"
        "On a GPU: speed and decode against what its memory and matrix units give, measured in the same run, and\n"
        "against PyTorch's attention where a Python has it. Written to tuned/.",
        epilog="examples: ./nearfar bench exact_f32_d128 --tokens 512,4096\n          ./nearfar bench --backend cuda",
    )
    gpu = "those of a GPU: all that it has of " + " ".join(GPU_STANDING).replace("{}", "<dtype>")
    parser.add_argument("contracts", nargs="*", metavar="CONTRACT", help=f"default: {' '.join(STANDING)}; {gpu}")
    add_backend(parser)
    parser.add_argument(
        "--tuned",
        action="append",
        metavar="RECORDS",
        help="measure the variants that these records choose (default: the shipped ones)",
    )
    parser.add_argument("--tokens", metavar="N,...", help="lengths (default: 64 to 16384; on a GPU 1024 to 131072)")
    parser.set_defaults(run=guarded(bench))


def add_backend(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backend", default="cpu", help=f"where it runs: {', '.join(BACKENDS)} (default: cpu)")


def guarded(command: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    """Failures of the machine are one line and exit code 1; SIGTERM ends like Ctrl-C."""

    def run(args: argparse.Namespace) -> int:
        previous = signal.signal(signal.SIGTERM, interrupt)
        try:
            return command(args)
        except BuildError as error:
            print(f"nearfar: {error}", file=sys.stderr)
            return 1
        finally:
            signal.signal(signal.SIGTERM, previous)

    return run


def interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def numbers(option: str, text: str) -> list[int]:
    rule = "must be one to eight whole numbers from 1 to 1048576, separated by commas"
    words = text.split(",")
    if not (len(words) <= 8 and all(w.isascii() and w.isdigit() and 1 <= int(w) <= 1 << 20 for w in words)):
        raise UsageError(f"option {option} = {shown(text)}: {rule}")
    return [int(w) for w in words]


def seconds(option: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 1 <= value <= 86400:
        raise UsageError(f"option {option} = {shown(text)}: must be a number of seconds from 1 to 86400")
    return value


def chosen(names: list[str], standard: tuple[str, ...], backend: str) -> list[Contract]:
    """The contracts that were named, all of which the backend must have; or of the standard ones those that it has."""
    check_backend(backend)
    contracts = list(dict.fromkeys(map(parse, names or standard)))
    for contract in contracts if names else ():
        check_offered(contract, backend)
    return [c for c in contracts if space(c, backend)]


# ---- progress ------------------------------------------------------------------------------------------------------


class Progress:
    """A bar on a terminal, a few plain lines in a pipe."""

    def __init__(self) -> None:
        self.bar: Any = None
        self.start = time.monotonic()

    def __enter__(self) -> Progress:
        with suppress(ModuleNotFoundError):
            if not sys.stdout.isatty():
                return self
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

            columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
            self.bar = Progress(*columns, transient=True)
            self.task = self.bar.add_task("", total=1.0)
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar:
            self.bar.stop()

    def step(self, text: str) -> None:
        """A new piece of work: the one line of it that a pipe sees."""
        if self.bar:
            self.bar.update(self.task, description=text, completed=0)
        else:
            print(f"[{time.monotonic() - self.start:3.0f} s] {text}", flush=True)

    def say(self, text: str) -> None:
        """A result: a line that stays."""
        if self.bar:
            self.bar.console.print(text, highlight=False, markup=False)
        else:
            self.step(text)

    def part(self, text: str, done: float) -> None:
        if self.bar:
            self.bar.update(self.task, description=text, completed=done)


# ---- the C programs ------------------------------------------------------------------------------------------------


@contextmanager
def running(command: list[str]) -> Iterator[Any]:
    """A program whose output is read line by line; it is ended whenever this block is left."""
    errors = tempfile.TemporaryFile("w+", encoding="utf-8")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, stdin=subprocess.DEVNULL, text=True)
    try:
        yield process.stdout
        process.wait()
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
        errors.seek(0)
        message = errors.read().strip().splitlines()
        errors.close()
    if process.returncode not in (0, 1):
        raise BuildError(message[0] if message else f"{Path(command[0]).name} ended with status {process.returncode}")


def prepare(program: str, recipes: list[Recipe]) -> Path:
    """Write and compile a program; its path."""
    backend = recipes[0].backend
    cc = build.compiler(backend)
    folder = OUTPUT / "build" / (program if backend == "cpu" else f"{program}_{backend}")
    build.fill(folder, build.sources(program, recipes))
    return build.compile_folder(folder, program, cc)


def race(program: Path, args: argparse.Namespace, progress: Progress) -> list[dict[str, Any]]:
    """Run the tuner; the records that it appended."""
    command = [str(program), "--events", "--json", str(RECORDS), "--budget", f"{args.seconds:g}"]
    command += ["--tokens", ",".join(map(str, args.lengths))]
    found = []
    with running(command) as lines:
        for line in lines:
            event = json.loads(line)
            if event["event"] == "progress":
                place = f"{event['contract']}, {event['tokens'] or 'all'} tokens"
                progress.part(f"{place}: {event['phase']}", event["part"])
            elif event["event"] == "record":
                found.append(event["record"])
                progress.say(report.verdict(event["record"]))
    return found


def measure(program: Path, options: list[str], progress: Progress) -> list[dict[str, Any]]:
    """Run the bench; its lines."""
    found = []
    with running([str(program), *options]) as lines:
        for line in lines:
            found.append(json.loads(line))
            place = " ".join(str(found[-1].get(k, "")) for k in ("bench", "contract", "tokens"))
            progress.part(place, len(found) % 50 / 50)
    return found


@contextmanager
def raw_inputs(folders: list[Path]) -> Iterator[list[str]]:
    """The folders' arrays as files that the bench reads: its options."""
    with tempfile.TemporaryDirectory(prefix="nearfar-") as scratch:
        options = []
        for at, folder in enumerate(folders):
            name = folder.resolve().name.replace(".", "_") or "input"
            path = Path(scratch) / str(at) / f"{name}.raw"
            path.parent.mkdir()
            path.write_bytes(inputs.raw(inputs.load(folder)))
            options += ["--input", str(path)]
        yield options


# ---- tune ----------------------------------------------------------------------------------------------------------


def tune(args: argparse.Namespace) -> int:
    contracts = chosen(args.contracts, TUNED if args.backend == "cpu" else GPU_TUNED, args.backend)
    args.seconds, args.lengths = seconds("--budget", args.budget), numbers("--tokens", args.tokens)
    on_cpu = args.backend == "cpu"
    if args.input and not on_cpu:
        raise UsageError(f"option --input = {shown(args.input)}: errors on inputs of your own are judged on a cpu")
    folders = [Path(args.input)] if args.input else [p for p in INPUTS if p.is_dir() and on_cpu]
    for folder in folders:
        inputs.load(folder)  # a bad input is told before any work
    build.compiler(args.backend)
    writable(OUTPUT)
    with Progress() as progress:
        everything = [Recipe(c, args.backend, tuple(space(c, args.backend))) for c in contracts]
        progress.step(f"compiling {sum(len(r.variants) for r in everything)} variants of {len(contracts)} contracts")
        program = prepare("tune", everything)
        progress.step(f"verifying and timing them, about {args.seconds:.0f} s")
        made = race(program, args, progress)
        device = made[-1]["device"] if made else {}
        recipes = tuned_recipes(contracts, args.backend, records.read([RECORDS]), device)
        headers = {OUTPUT / r.file_name: render(r) for r in recipes}
        write(headers)
        if on_cpu:
            progress.step("measuring the tuned headers")
            with raw_inputs(folders) as raw:
                lengths = sorted({*LENGTHS, *args.lengths})
                options = ["--tests", "speed,error,input", "--tokens", ",".join(map(str, lengths)), *raw]
                results = measure(prepare("bench", recipes + baselines(recipes, args.backend)), options, progress)
    if on_cpu:
        publish(results, [RECORDS, *headers])
    else:
        names(RECORDS, *headers)
    return 0 if made and all(r["winner"] for r in made) else 1


def shipped(contracts: list[Contract], backend: str) -> list[Recipe]:
    """The headers as they are without records."""
    return [Recipe(c, backend, tuple(default(c, backend))) for c in contracts]


def tuned_recipes(
    contracts: list[Contract], backend: str, found: list[records.Record], device: dict[str, Any]
) -> list[Recipe]:
    """The headers that the records choose on this device."""
    return [Recipe(c, backend, tuple(records.choose(found, c, backend, device))) for c in contracts]


def baselines(recipes: list[Recipe], backend: str) -> list[Recipe]:
    """exact at every head dim at which something is compared with it and it is not there yet; with the variants that
    were chosen for another head dim, if there is one: the baseline must not be the only one that was not tuned."""
    wanted = dict.fromkeys(Contract("exact", "", "f32", r.contract.d) for r in recipes)
    missing = [c for c in wanted if c not in [r.contract for r in recipes]]
    alike = next((r for r in recipes if r.contract.operator == "exact"), None)
    return [replace(alike, contract=c) for c in missing] if alike else shipped(missing, backend)


def publish(results: list[dict[str, Any]], written: list[Path]) -> None:
    """Print the table; write it, the numbers and the pictures; name all files."""
    text = report.table(results)
    write({RESULTS: "".join(json.dumps(r) + "\n" for r in results), OUTPUT / "table.txt": text})
    pictures = report.draw(results, OUTPUT)
    print(text)
    names(*written, OUTPUT / "table.txt", RESULTS, *pictures)


def names(*paths: Path) -> None:
    print("written: " + " ".join(os.path.relpath(p) for p in paths))


def writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(f"cannot write to {shown(str(folder))}: {error.strerror}") from None


# ---- pack ----------------------------------------------------------------------------------------------------------

README = """\
The tuner of nearfar {version} for: {names}

On the target, with {needs}:

    {line}
    ./tune --json records.jsonl

It verifies every variant against fp64, times what is right, prints a table and appends one line per contract and
length to records.jsonl. ./tune --help tells its options. Bring records.jsonl home; there

    ./nearfar generate {names} --backend {backend} --tuned records.jsonl

writes the headers with the variants that won.
"""


def pack(args: argparse.Namespace) -> int:
    from . import __version__

    contracts = chosen(args.contracts, (), args.backend)
    folder = Path(args.output)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"option -o = {shown(args.output)}: must be a folder")
    files = build.sources("tune", [Recipe(c, args.backend, tuple(space(c, args.backend))) for c in contracts])
    kit, line = build.TOOLKITS.get(args.backend), build.one_line("tune", args.backend)
    files["README"] = README.format(
        version=__version__,
        names=" ".join(c.name for c in contracts),
        backend=args.backend,
        needs=f"a GPU and {kit.package}" if kit else "GCC or Clang on Linux or another POSIX system",
        line=line,
    )
    files["LICENSE"] = (ROOT / "LICENSE").read_text(encoding="utf-8")
    write({folder / name: text for name, text in files.items()})
    print(f"wrote {folder} ({len(files)} files); there: {line} && ./tune --json records.jsonl")
    return 0


# ---- bench and report ----------------------------------------------------------------------------------------------


def bench(args: argparse.Namespace) -> int:
    on_cpu = args.backend == "cpu"
    contracts = chosen(args.contracts, STANDING if on_cpu else gpu_standing(), args.backend)
    found = records.read(map(Path, args.tuned)) if args.tuned else None
    lengths = list(LENGTHS if on_cpu else GPU_LENGTHS) if args.tokens is None else numbers("--tokens", args.tokens)
    recipes = shipped(contracts, args.backend) if found is None else tuned_recipes(contracts, args.backend, found, {})
    if not on_cpu:
        return bench_gpu(recipes, lengths)
    recipes += baselines(recipes, args.backend)
    writable(OUTPUT)
    with Progress() as progress:
        progress.step("compiling")
        program = prepare("bench", recipes)
        results = [compile_cost(recipe) for recipe in recipes]
        progress.step("measuring speed, error, decode, patterns, backward and two threads")
        options = [
            "--tests",
            "speed,error,decode,patterns,backward,splits",
            "--seconds",
            "0.4",
            "--cached",
            "60,120,240",
        ]
        results += measure(program, [*options, "--tokens", ",".join(map(str, lengths))], progress)
        progress.step("measuring the narrower targets")
        narrow = {v.target for r in recipes for v in r.variants} - {entry(results)}
        options = ["--tests", "speed", "--way", ",".join(sorted(narrow)), "--tokens", str(min(lengths, key=near_4k))]
        results += measure(program, options, progress)
    publish(results, [])
    print(report.standing(results))
    print(report.goals(results))
    return 0


def gpu_standing() -> tuple[str, ...]:
    """The names that are contracts, in every dtype."""
    names = []
    for name in (pattern.format(dtype) for dtype in DTYPES for pattern in GPU_STANDING):
        with suppress(UsageError):
            names.append(parse(name).name)
    return tuple(names)


def bench_gpu(recipes: list[Recipe], lengths: list[int]) -> int:
    backend = recipes[0].backend
    build.compiler(backend)
    writable(OUTPUT)
    tokens = ["--tokens", ",".join(map(str, lengths))]
    with Progress() as progress:
        progress.step(f"compiling {len(recipes)} contracts")
        program = prepare("bench_gpu", recipes)
        progress.step("measuring ceilings, speed and decode")
        heads = [word for name, count in GPU_HEADS.items() for word in (f"--{name}", str(count))]
        results = measure(program, [*tokens, *heads], progress)
        python = torch_python()
        progress.step("measuring PyTorch's attention" if python else "no Python here has torch to compare with")
        if python:
            results += measure(python, [str(ROOT / "bench" / "torch_gpu.py"), *tokens, *heads[:2]], progress)
    text, path = report.gpu_table(results) + report.gpu_goals(results), OUTPUT / f"bench_{backend}.jsonl"
    write({path: "".join(json.dumps(r) + "\n" for r in results), OUTPUT / f"table_{backend}.txt": text})
    print(text)
    names(path, OUTPUT / f"table_{backend}.txt", *report.draw_gpu(results, OUTPUT / f"time_{backend}.png"))
    return 0


def torch_python() -> Path | None:
    """A Python that has torch: this one, or the system's."""
    for python in (sys.executable, shutil.which("python3")):
        command = [python or "false", "-c", "import torch"]
        if subprocess.run(command, capture_output=True, check=False).returncode == 0:
            return Path(command[0])
    return None


def near_4k(tokens: int) -> int:
    return abs(tokens - 4096)


def entry(results: list[dict[str, Any]]) -> str | None:
    return next((str(r["target"]) for r in results if r.get("bench") == "speed"), None)


def compile_cost(recipe: Recipe) -> dict[str, Any]:
    """Time to compile one header with all its targets, and its size."""
    folder = OUTPUT / "build" / "bench"
    cc = build.compiler()
    took = []
    for _ in range(3):
        start = time.monotonic()
        build.run([*cc.command, "-O2", "-c", f"{recipe.kernel}.c", "-o", f"{recipe.kernel}.o"], folder)
        took.append(time.monotonic() - start)
    size = (folder / recipe.file_name).stat().st_size
    line = {"bench": "compile", "contract": recipe.contract.name, "compiler": cc.name}
    return {**line, "seconds": min(took), "bytes": size}


def draw_report(args: argparse.Namespace) -> int:
    try:
        lines = RESULTS.read_text(encoding="utf-8").splitlines()
        results = [json.loads(line) for line in lines]
    except (OSError, ValueError):
        raise UsageError(f"{shown(str(RESULTS))}: no measurements yet: run ./nearfar tune or ./nearfar bench") from None
    writable(OUTPUT)
    print(report.table(results))
    names(*report.draw(results, OUTPUT))
    return 0
