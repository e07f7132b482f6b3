"""Change the core one place at a time and see whether a test turns red.

    python scripts/mutation.py                                 # all of core/, for the night
    python scripts/mutation.py --sample 200 --seed 3           # some, by chance, in minutes
    python scripts/mutation.py core/utility.py core/peers      # some files, whole

A *mutant* is the source with one small change: a comparison or an operator turned into another, a
number off by one, a condition negated or dropped, a statement left out, `min` for `max`. The tests
that belong to the module (`TESTS`) run against it, up to the first that fails. A mutant that none
notices survives: a rule has no test, or the code is not needed, or the change means the same.
Texts are not mutated, nor is what only types, messages and decorators see.

Nothing is written into the checkout: package and tests are copied to a temporary folder, and the
mutant exists only in the memory of a forked process. A mutant that needs much more computing time
than the unchanged code counts as caught.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib.abc
import importlib.machinery
import importlib.util
import os
import random
import resource
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, ModuleType

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "moecascade"

# Which tests hold a module: the first prefix that fits, tests that are quickest to tell first.
PROPERTIES = "test_policy_properties"
PINNED = "test_pinned"
MARGINAL = (
    "test_buckets",
    "test_acceptance",
    PINNED,
    "test_drafters",
    "test_ladder",
    PROPERTIES,
    "test_marginal",
    "test_unseen",
    "test_spec",
)
TESTS: dict[str, tuple[str, ...]] = {
    "core/utility": ("test_utility", "test_cascade_rules", PINNED, "test_cascade"),
    "core/baseline": ("test_utility", "test_cascade_rules", PINNED, "test_cascade"),
    "core/policies": ("test_cascade_rules", PINNED, "test_cascade", "test_controller", "test_spec"),
    "core/peers": ("test_peers_rules", "test_spec", "test_baselines", PROPERTIES),
    "core/cost": (
        "test_cost",
        "test_ladder",
        PINNED,
        "test_marginal",
        "test_unseen",
        "test_baselines",
    ),
    "core/marginal": MARGINAL,
    "core/ngram": ("test_drafters", "test_unseen", "test_replay"),
    "core/step": ("test_spec", "test_cascade_rules", "test_baselines", "test_acceptance"),
    "core": ("test_spec", "test_controller", "test_baselines", "test_cascade_rules", "test_http"),
}

COMPILED = "numba.njit"  # of modules that are compiled, and kept on disk by their date alone

# What takes minutes and tells least: a comparison over many seeds, with room for noise.
LEFT_OUT = "not as_well_as_by_the_best_static_k"

COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.BitOr: ast.BitAnd,
    ast.BitAnd: ast.BitOr,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
}
CALLS = {"min": "max", "max": "min", "any": "all", "all": "any"}
UNSEEN = {"strict", "slots", "frozen", "repr", "hash"}  # keywords that change no result


def variants(node: ast.AST) -> Iterator[ast.AST | None]:  # noqa: C901, PLR0912 -- a table
    """Yield what may stand in a node's place; None leaves a statement out."""
    match node:
        case ast.Compare(left, [operator], rest):
            for other in COMPARISONS[type(operator)]:
                yield ast.Compare(left, [other()], rest)
        case ast.Compare(left, operators, rest):
            for i, operator in enumerate(operators):
                for other in COMPARISONS[type(operator)]:
                    yield ast.Compare(left, [*operators[:i], other(), *operators[i + 1 :]], rest)
        case ast.BinOp(left, operator, right) if type(operator) in OPERATORS:
            yield ast.BinOp(left, OPERATORS[type(operator)](), right)
        case ast.AugAssign(target, operator, right):
            if type(operator) in OPERATORS:
                yield ast.AugAssign(target, OPERATORS[type(operator)](), right)
            yield None
        case ast.BoolOp(operator, values):
            yield ast.BoolOp(ast.Or() if isinstance(operator, ast.And) else ast.And(), values)
            for i in range(len(values)):
                kept = [*values[:i], *values[i + 1 :]]
                yield kept[0] if len(kept) == 1 else ast.BoolOp(operator, kept)
        case ast.UnaryOp(ast.Not() | ast.USub(), operand):
            yield operand
        case ast.Constant(bool() as value):
            yield ast.Constant(not value)
        case ast.Constant(int() as value):
            yield ast.Constant(value + 1)
            if value > 1:
                yield ast.Constant(value - 1)
        case ast.Constant(float() as value):
            yield ast.Constant(value * 1.5 if value else 1.0)
        case ast.IfExp(test, body, orelse):
            yield body
            yield orelse
        case ast.If(test, body, orelse) if not isinstance(test, ast.Compare | ast.UnaryOp):
            yield ast.If(ast.UnaryOp(ast.Not(), test), body, orelse)
        case ast.Call(ast.Name(name), arguments, keywords) if name in CALLS:
            yield ast.Call(ast.Name(CALLS[name], ast.Load()), arguments, keywords)
        case ast.Return(value) if value is not None and not _is_none(value):
            yield ast.Return(None)
        case ast.Break():
            yield ast.Continue()
        case ast.Continue():
            yield ast.Break()
        case ast.Raise() | ast.Delete() | ast.Expr(ast.Call()):
            yield None
        case ast.Assign([ast.Attribute() | ast.Subscript() | ast.Tuple()]):
            yield None


def _is_none(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def places(tree: ast.AST) -> Iterator[tuple[ast.AST, str, int | None]]:
    """Yield every place that may be mutated: a parent, its field, and the index in it."""
    for name, value in ast.iter_fields(tree):
        if name in {"annotation", "returns", "decorator_list", "type_params", "bases"}:
            continue
        if isinstance(tree, ast.Raise | ast.JoinedStr):  # messages
            continue
        for i, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if not isinstance(child, ast.AST):
                continue
            if isinstance(child, ast.keyword) and child.arg in UNSEEN:
                continue
            yield tree, name, i
            yield from places(child)


@dataclass(frozen=True)
class Mutant:
    """One change: the file, the line, what stood there and what stands there now."""

    file: str  # below the package
    line: int
    before: str
    after: str
    source: str

    @property
    def module(self) -> str:
        """The module's full name."""
        return f"{PACKAGE}.{self.file.removesuffix('.py').replace('/', '.')}"

    def __str__(self) -> str:
        return f"{PACKAGE}/{self.file}:{self.line}: {self.before}  ->  {self.after}"


def mutants(root: Path, file: str) -> list[Mutant]:
    """Return all mutants of a file."""
    text = (root / PACKAGE / file).read_text()
    tree = ast.parse(text)
    found = []
    for parent, name, i in list(places(tree)):
        whole = getattr(parent, name)
        node = whole if i is None else whole[i]
        for other in variants(node):
            new = ast.Pass() if other is None else other
            put(parent, name, i, new)
            before, after = _short(node), "(left out)" if other is None else _short(new)
            source = ast.unparse(ast.fix_missing_locations(copy.deepcopy(tree)))
            found.append(Mutant(file, node.lineno, before, after, source))
            put(parent, name, i, node)
    return found


def put(parent: ast.AST, name: str, i: int | None, node: ast.AST) -> None:
    """Put a node in a place."""
    if i is None:
        setattr(parent, name, node)
    else:
        getattr(parent, name)[i] = node


def _short(node: ast.AST) -> str:
    first = ast.unparse(ast.fix_missing_locations(copy.deepcopy(node))).splitlines()[0]
    return first if len(first) <= 90 else first[:87] + "..."


class _Loader(importlib.machinery.SourceFileLoader):
    """Loads a module from a text in memory."""

    def __init__(self, name: str, path: str, source: str) -> None:
        super().__init__(name, path)
        self._source = source

    def get_code(self, _fullname: str) -> CodeType:
        code: CodeType = compile(self._source, self.path, "exec")
        return code


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, mutant: Mutant, root: Path) -> None:
        self._name = mutant.module
        path = str(root / PACKAGE / mutant.file)
        self._spec = importlib.util.spec_from_loader(
            self._name, _Loader(self._name, path, mutant.source)
        )

    def find_spec(
        self, fullname: str, _path: Sequence[str] | None, _target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        return self._spec if fullname == self._name else None


def tests_of(file: str, root: Path) -> list[str]:
    """Return the test files of a module."""
    stems = next(stems for prefix, stems in TESTS.items() if file.startswith(prefix))
    found = [f"tests/{stem}.py" for stem in stems]
    return [test for test in found if (root / test).exists()]


def start(mutant: Mutant | None, tests: Sequence[str], root: Path, seconds: int) -> int:
    """Fork a process that runs the tests, on a mutant or on the code as it is; return its id."""
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
        output = os.open(root / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        if mutant is None or COMPILED in mutant.source:  # what was compiled is not this
            os.environ["NUMBA_CACHE_DIR"] = tempfile.mkdtemp(dir=root)
        if mutant is not None:
            sys.meta_path.insert(0, _Finder(mutant, root))
        import pytest

        options = ["-x", "-q", "-p", "no:cacheprovider", "--no-header", "--tb=short"]
        code = int(pytest.main([*options, "-m", "not engine", "-k", LEFT_OUT, *tests]))
    finally:
        os._exit(code)


def prepare(root: Path) -> None:
    """Copy package and tests, and import what every run needs but these."""
    for folder in (PACKAGE, "tests"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", root)
    os.chdir(root)
    sys.path.insert(0, str(root))
    from hypothesis import Phase, settings

    phases = (Phase.explicit, Phase.generate)  # a failure need not be made small or explained
    settings.register_profile(
        "mutation", deadline=None, derandomize=True, max_examples=50, phases=phases
    )
    os.environ["HYPOTHESIS_PROFILE"] = "mutation"
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    importlib.import_module("tests.conftest")  # once, before the forks, for what it imports
    for name in list(sys.modules):
        if name.split(".")[0] in {PACKAGE, "tests"}:
            del sys.modules[name]


def clean_seconds(tests: Sequence[str], root: Path) -> float:
    """Return the computing time of tests on the code as it is; they have to pass."""
    _, status, used = os.wait4(start(None, tests, root, 600), 0)
    if status:
        print((root / "output.txt").read_text(), file=sys.stderr)
        raise SystemExit(f"the unchanged code does not pass {' '.join(tests)}")
    return used.ru_utime + used.ru_stime


def run(chosen: Sequence[Mutant], root: Path, jobs: int) -> Iterator[tuple[Mutant, bool]]:
    """Yield each mutant with whether it was caught, in the order in which they end."""
    limits: dict[tuple[str, ...], int] = {}
    for mutant in chosen:
        tests = tuple(tests_of(mutant.file, root))
        if tests not in limits:
            limits[tests] = 10 + round(5 * clean_seconds(tests, root))
    running: dict[int, Mutant] = {}
    waiting = iter(chosen)
    while True:
        while len(running) < jobs and (new := next(waiting, None)) is not None:
            tests = tuple(tests_of(new.file, root))
            running[start(new, tests, root, limits[tests])] = new
        if not running:
            return
        child, status = os.wait()
        yield running.pop(child), status != 0


def main() -> None:
    """Print the survivors as they are found, then the score by module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", default=["core"], help="below moecascade/")
    parser.add_argument("--sample", type=int, help="mutants to try, drawn by chance; all if absent")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    asked = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        prepare(root)
        top = root / PACKAGE
        files = [
            str(path.relative_to(top))
            for path in sorted(top.rglob("*.py"))
            if any(str(path.relative_to(top)).startswith(asked_for) for asked_for in asked.files)
        ]
        everything = [mutant for file in files for mutant in mutants(root, file)]
        chosen = everything
        if asked.sample is not None and asked.sample < len(everything):
            chosen = random.Random(asked.seed).sample(everything, asked.sample)  # noqa: S311
        caught, total = Counter[str](), Counter[str]()
        for mutant, noticed in run(chosen, root, asked.jobs):
            total[mutant.file] += 1
            caught[mutant.file] += noticed
            if not noticed:
                print(f"survived: {mutant}", flush=True)
        os.chdir(ROOT)
    print()
    for file in sorted(total):
        print(f"{caught[file]:5d} of {total[file]:5d} caught  {PACKAGE}/{file}")
    of, all_ = caught.total(), total.total()
    minutes = (time.monotonic() - began) / 60
    print(
        f"{of:5d} of {all_:5d} caught, {of / max(1, all_):.1%}, "
        f"of {len(everything)} mutants in all; {minutes:.0f} minutes"
    )


if __name__ == "__main__":
    main()
