"""Sources with one guard less, one check turned round, or one condition missing from a statement.

A mutant is the whole text of one module. Some are made from the syntax tree, so that a check added tomorrow gets
its mutants by itself; those of SQL are made by replacing a piece of it that must be there.
"""

import ast
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, TypeAlias

ROOT: Final = Path(__file__).parents[2]

Change: TypeAlias = tuple[str, Callable[[], None]]
"""What is changed, and the function that does so."""


@dataclass(frozen=True)
class Mutant:
    path: str
    line: int
    what: str
    source: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line} {self.what}"


def mutants_of(path: str, names: Collection[str], changes: Callable[[ast.AST], Iterator[Change]]) -> list[Mutant]:
    """One for every change that can be made inside the functions and constants called `names`."""
    source = (ROOT / path).read_text()
    places = [number for number, node in enumerate(ast.walk(ast.parse(source))) if _name(node) in names]
    assert len(places) >= len(names), f"{path} does not define all of {sorted(names)}."
    made = []
    for place in places:
        for number, original in enumerate(ast.walk(_nth(ast.parse(source), place))):
            for nth, (what, _) in enumerate(changes(original)):
                tree = ast.parse(source)
                _, change = list(changes(_nth(_nth(tree, place), number)))[nth]
                change()
                made.append(Mutant(path, getattr(original, "lineno", 0), what, ast.unparse(tree)))
    return made


def _nth(tree: ast.AST, number: int) -> ast.AST:
    return list(ast.walk(tree))[number]


def _name(node: ast.AST) -> str | None:
    match node:
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            return name
        case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
            return name
    return None


def checks_removed(node: ast.AST) -> Iterator[Change]:
    """Conditions that are never met."""
    match node:
        case ast.If(test=test):
            yield f"never `if {ast.unparse(test)}`", partial(setattr, node, "test", ast.Constant(False))


_OPPOSITES: Final[dict[type[ast.cmpop], type[ast.cmpop]]] = {
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
_NEIGHBOURS: Final = {"ceil": "floor", "max": "min"}


def everything_changed(node: ast.AST) -> Iterator[Change]:
    """The same, and everything else turned into its opposite, its neighbour or nothing."""
    yield from checks_removed(node)
    match node:
        case ast.BoolOp(values=values):
            for value in values:
                yield f"without `{ast.unparse(value)}`", partial(values.remove, value)
        case ast.If(test=test):
            yield f"always `if {ast.unparse(test)}`", partial(setattr, node, "test", ast.Constant(True))
        case ast.IfExp(test=test):
            for chosen in (True, False):
                yield f"`{ast.unparse(test)}` is {chosen}", partial(setattr, node, "test", ast.Constant(chosen))
        case ast.Compare(ops=[operator]):
            opposite = _OPPOSITES[type(operator)]()
            yield f"not `{ast.unparse(node)}`", partial(setattr, node, "ops", [opposite])
        case ast.Constant(value=bool(value)):
            yield f"{not value} for {value}", partial(setattr, node, "value", not value)
        case ast.Constant(value=int(value)):
            yield f"{value + 1} for {value}", partial(setattr, node, "value", value + 1)
        case ast.Set(elts=elements):
            for element in elements:
                yield f"no {ast.unparse(element)}", partial(elements.remove, element)
        case ast.Attribute(attr=name) if name in _NEIGHBOURS:
            yield f"{_NEIGHBOURS[name]} for {name}", partial(setattr, node, "attr", _NEIGHBOURS[name])
        case ast.Name(id=name) if name in _NEIGHBOURS:
            yield f"{_NEIGHBOURS[name]} for {name}", partial(setattr, node, "id", _NEIGHBOURS[name])


def policies_dropped(node: ast.AST) -> Iterator[Change]:
    """Operations without one of the keywords of their policy, and sets of states or roles without a member."""
    match node:
        case ast.ClassDef(keywords=keywords):
            for keyword in keywords:
                if keyword.arg in {"passes", "roles", "by_appointment"}:
                    yield f"{node.name} without {keyword.arg}", partial(keywords.remove, keyword)
        case ast.Set(elts=elements):
            for element in elements:
                yield f"no {ast.unparse(element)}", partial(elements.remove, element)


def roles_widened(node: ast.AST) -> Iterator[Change]:
    """Permissions that everybody has."""
    match node:
        case ast.Dict(keys=keys, values=values):
            for number, permission in enumerate(keys):
                assert permission is not None
                anybody = ast.parse("frozenset(Role)", mode="eval").body
                yield f"{ast.unparse(permission)} for everybody", partial(values.__setitem__, number, anybody)


def guards_replaced(node: ast.AST) -> Iterator[Change]:
    """Routes that ask for a guard and get `tests.mutation.unguarded` instead."""
    match node:
        case ast.arg(arg=name, annotation=ast.Subscript(value=ast.Name(id="Can" | "Claimed"))):
            guard = node.annotation
            assert isinstance(guard, ast.Subscript)
            assert isinstance(guard.value, ast.Name)
            unguarded = f"unguarded.{guard.value.id}"
            yield f"`{name}` from {unguarded}", partial(setattr, guard, "value", ast.Name(unguarded))
        case ast.arg(
            arg=name,
            annotation=ast.Subscript(slice=ast.Tuple(elts=[_, ast.Call(func=ast.Name(id="can")) as guard])),
        ):
            yield f"`{name}` from unguarded.can", partial(setattr, guard, "func", ast.Name("unguarded.can"))
        case ast.arg(arg="caller" as name):
            yield f"`{name}` from unguarded.Caller", partial(setattr, node, "annotation", ast.Name("unguarded.Caller"))


def unguarded_routes(path: str) -> list[Mutant]:
    """One for each route of the module, its guard replaced."""
    routes = {
        node.name
        for node in ast.parse((ROOT / path).read_text()).body
        if isinstance(node, ast.AsyncFunctionDef) and any("router." in ast.unparse(d) for d in node.decorator_list)
    }
    made = [
        Mutant(each.path, each.line, each.what, "from tests.mutation import unguarded\n" + each.source)
        for each in mutants_of(path, routes, guards_replaced)
    ]
    assert len(made) == len(routes), f"A route of {path} has no guard that this knows of."
    return made


def replaced(path: str, pieces: dict[str, str]) -> list[Mutant]:
    """One for each piece of the text, which is there once, with the other in its place."""
    source = (ROOT / path).read_text()
    made = []
    for piece, other in pieces.items():
        before, found, after = source.partition(piece)
        assert found, f"{path} does not say {piece!r}."
        assert piece not in after, f"{path} says {piece!r} more than once."
        made.append(Mutant(path, before.count("\n") + 1, f"{other!r} for {piece!r}", before + other + after))
    return made
