"""Run an assert-style test, in a jail of its own, against the program in another jail.

The program supplies the functions under test. It must not supply what judges their results, so a
name that the test uses and does not define comes from the program only if it is no helper. This
file imports only the standard library, because it runs inside jails (jail.py).
"""

import ast
import builtins
import importlib
import re
import socket
import sys
from collections.abc import Iterator
from typing import Any

from infir2.verify.remote import Program, Remote
from infir2.verify.serve import send

# Where a name that neither the test nor its setup imports is looked up, as common judges do.
_MODULES = (
    "math", "collections", "itertools", "functools", "heapq", "bisect", "operator", "copy",
    "string",
)  # fmt: skip
_MORE = {
    "fractions": {"Fraction"},
    "decimal": {"Decimal"},
    "datetime": {"date", "datetime", "time", "timedelta"},
    "statistics": {"mean", "fmean", "median", "mode", "stdev", "pstdev", "variance"},
    "random": {"choice", "choices", "randint", "randrange", "sample", "shuffle", "uniform"},
    "json": {"dumps", "loads"},
}
_JUDGES = {"isclose", "all", "any", "abs", "isinstance", "sorted", "set", "len", "round"}
_ASSERTING = re.compile(
    "_*(assert|check|compare|ensure|equal|expect|match|require|same|test|verify)"
)
_TRUTH = {"all", "any", "bool", "assertTrue", "assertFalse"}


def examine(channel: socket.socket, peer: socket.socket, request: dict[str, Any]) -> None:
    """Run the request's test and send its outcome."""
    program = Program(peer)
    outcome, detail = "ok", ""
    try:
        _run(program, request)
    except AssertionError as error:
        outcome, detail = "wrong", f"AssertionError: {error}"
    except BaseException as error:
        outcome, detail = "error", f"{type(error).__name__}: {error}"
    if program.ended:
        outcome, detail = "ended", program.ended
    elif outcome == "ok" and program.failed:
        outcome, detail = "wrong", program.failed
    send(channel, key=request["key"], outcome=outcome, detail=detail[:200])


def _run(program: Program, request: dict[str, Any]) -> None:
    entry_point, code = request["entry_point"], request["code"]
    space: dict[str, Any] = {"__name__": "examiner"}
    exec(compile(request["setup"], "<setup>", "exec"), space)
    tree = ast.parse(code, "<test>")
    space["__raise_lines__"] = {n.lineno for n in ast.walk(tree) if isinstance(n, ast.Raise)}
    names = _Names(tree, set(space), set(request["names"]), entry_point)
    for name in names.of_program():
        _bind(space, name, program)
    for name in names.missing(set(space)):
        if (found := _standard(name)) is not None:
            space[name] = found
    exec(compile(tree, "<test>", "exec"), space)
    if entry_point and "check" in space:
        space["check"](space[entry_point])


def _bind(space: dict[str, Any], name: str, program: Program) -> None:
    """Bind one of the program's names for the test."""
    kind, value = program.tool("name", name)
    if kind == "module":
        return  # the real one: in the program's own, everything could be close to everything
    if kind == "exception":
        space[name] = program.exception_class(value)
    elif isinstance(value, Remote) and name in sys.stdlib_module_names:
        # A function of that name can be called, but a fake module has no attributes.
        space[name] = value.__call__
    else:
        space[name] = value


def _standard(name: str) -> Any:
    """A module of the standard library, or a name of one; None if there is none."""
    if name in sys.stdlib_module_names:
        return importlib.import_module(name)
    modules = [module for module, names in _MORE.items() if name in names]
    for module in map(importlib.import_module, modules or _MODULES):
        if name in getattr(module, "__all__", vars(module)) and not name.startswith("_"):
            return vars(module)[name]
    return None


def _is_standard(name: str) -> bool:
    return hasattr(builtins, name) or name in sys.stdlib_module_names or _standard(name) is not None


class _Names:
    """Which names of a test come from the program."""

    def __init__(
        self, tree: ast.Module, known: set[str], offered: set[str], entry_point: str
    ) -> None:
        self.tree, self.entry_point = tree, entry_point
        bound = known | set(_bound(tree))
        self.used = set(_names(tree)) - set(_bound(tree))
        self.candidates = (self.used & offered) - bound
        # Functions whose results are the program's: by name, or as the parameter of `check`.
        self.under_test = self.candidates | {entry_point} | set(_parameters_of_check(tree))
        self.derived = self._derived_names()

    def of_program(self) -> set[str]:
        """The entry point; else every name that is no helper and not the standard library's."""
        own = {name for name in self.candidates if not _is_standard(name)} - self._helpers()
        if self.entry_point:
            return {self.entry_point} | {name for name in own if name[0].isupper()}
        # A name that the standard library has too is under test only where nothing else is, or in
        # statements about nothing else.
        alone = {name for name in self.candidates - own - _JUDGES if self._is_alone(name)}
        own |= {name for name in alone if _is_standard(name) and not hasattr(builtins, name)}
        return own or alone or (self.candidates - _JUDGES if len(self.candidates) == 1 else set())

    def missing(self, space: set[str]) -> set[str]:
        """Names without a value so far, which are no builtins."""
        return {name for name in self.used if name not in space and not hasattr(builtins, name)}

    def _derived_names(self) -> set[str]:
        """Variables whose values come from calls of the program."""
        derived: set[str] = set()
        for _ in range(len(self.used) + 2):
            before = len(derived)
            for targets, value in _assignments(self.tree):
                if self._is_derived(value, derived):
                    derived.update(name for target in targets for name in _names(target))
            if len(derived) == before:
                break
        return derived

    def _is_derived(self, node: ast.AST, derived: set[str]) -> bool:
        """Whether a value may be what a function of the program returned."""
        return any(
            (isinstance(n, ast.Name) and n.id in derived)
            or (isinstance(n, ast.Call) and _function(n) in self.under_test and _is_result(n))
            for n in ast.walk(node)
        )

    def _helpers(self) -> set[str]:
        """Names that judge results: a condition is their value for what the program returned.

        A predicate that the test also calls with values of its own is under test itself.
        """
        judging, independent = set(), set()
        decisive = {id(call) for call in _decisive_calls(self.tree)}
        for call in (n for n in ast.walk(self.tree) if isinstance(n, ast.Call)):
            values = [*call.args, *(keyword.value for keyword in call.keywords)]
            if not any(self._is_derived(value, self.derived) for value in values):
                independent.add(_function(call))
            elif id(call) in decisive:
                judging.add(_function(call))
        return judging - independent

    def _is_alone(self, name: str) -> bool:
        """Whether a name stands only in statements about it and values of the test."""
        others = (self.candidates | self.derived) - {name}
        statements = (n for n in ast.walk(self.tree) if isinstance(n, ast.Assert | ast.Expr))
        counts = list(map(_names, statements))
        alone = sum(names.count(name) for names in counts if not others.intersection(names))
        return alone == _names(self.tree).count(name)


def _names(tree: ast.AST) -> list[str]:
    return [node.id for node in ast.walk(tree) if isinstance(node, ast.Name)]


def _bound(tree: ast.AST) -> Iterator[str]:
    """Names that a test binds anywhere."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            yield node.id
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.alias):
            yield (node.asname or node.name).split(".")[0]
        elif isinstance(node, ast.ExceptHandler) and node.name:
            yield node.name


def _parameters_of_check(tree: ast.Module) -> Iterator[str]:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == "check":
            yield from (argument.arg for argument in node.args.args)


def _assignments(tree: ast.AST) -> Iterator[tuple[list[ast.AST], ast.AST]]:
    """Targets and value of everything that binds a name to a value."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            yield list(node.targets), node.value
        elif isinstance(node, ast.AugAssign | ast.AnnAssign | ast.NamedExpr) and node.value:
            yield [node.target], node.value
        elif isinstance(node, ast.For | ast.comprehension):
            yield [node.target], node.iter
        elif isinstance(node, ast.withitem) and node.optional_vars is not None:
            yield [node.optional_vars], node.context_expr


def _function(call: ast.Call) -> str:
    return call.func.id if isinstance(call.func, ast.Name) else ""


def _is_result(call: ast.Call) -> bool:
    """By its spelling: an object of a class, or what a function makes of nothing, is an input."""
    return not _function(call)[:1].isupper() and bool(call.args or call.keywords)


def _decisive_calls(tree: ast.AST) -> Iterator[ast.Call]:
    """Calls whose value is the condition of an assertion or a branch, or which assert something."""
    asserted = any(isinstance(node, ast.Assert) for node in ast.walk(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert | ast.If | ast.While | ast.IfExp):
            yield from _deciding(node.test)
        elif isinstance(node, ast.Call) and _method(node) in _TRUTH:
            for argument in node.args:
                yield from _deciding(argument)
        elif (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Call)
            and (not asserted or _ASSERTING.match(_function(node.value)))
        ):
            yield node.value


def _method(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else _function(call)


def _deciding(node: ast.AST) -> Iterator[ast.Call]:
    """Calls whose truth, or whose closeness to 0 or True, decides a condition."""
    if isinstance(node, ast.Call):
        yield node
    elif isinstance(node, ast.BoolOp):
        for value in node.values:
            yield from _deciding(value)
    elif isinstance(node, ast.UnaryOp):
        yield from _deciding(node.operand)
    elif isinstance(node, ast.GeneratorExp | ast.ListComp | ast.SetComp):
        yield from _deciding(node.elt)
    elif isinstance(node, ast.Compare):
        sides = [node.left, *node.comparators]
        ordered = any(isinstance(op, ast.Lt | ast.LtE | ast.Gt | ast.GtE) for op in node.ops)
        if ordered or any(isinstance(s, ast.Constant) and s.value in (0, 1, None) for s in sides):
            for side in sides:
                yield from _deciding(side)
