"""Conditions over a document's metadata, written as text: read by a parser, never run as code."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

__all__ = ["condition"]

Meta = Mapping[str, Any]  # Any: what documents' metadata hold

_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda value, group: value in group,
    ast.NotIn: lambda value, group: value not in group,
}


def condition(text: str) -> Callable[[Meta], Any]:
    """Read a condition over metadata: names, numbers, strings, lists of those, comparisons, ``and``, ``or``, ``not``.

    It is parsed and walked, never evaluated as code.

    Raises:
        ValueError: it holds anything else; when called, a name that the metadata lack, or values that do not compare.

    Example:
        >>> keep = condition("quality > 0.7 and genre in ['news', 'fiction']")
        >>> keep({"quality": 0.9, "genre": "news"}), keep({"quality": 0.9, "genre": "lore"})
        (True, False)
    """
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        raise ValueError(f"cannot read the condition {text!r}: {error.msg}.") from error
    return _compiled(tree, text)


def _compiled(node: ast.AST, text: str) -> Callable[[Meta], Any]:
    match node:
        case ast.Constant(value=bool() | int() | float() | str() as value):
            return lambda meta: value
        case ast.Name(id=name):
            return lambda meta: _looked_up(meta, name, text)
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            inner = _compiled(operand, text)
            return lambda meta: not inner(meta)
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)):
            return lambda meta: -number
        case ast.List(elts=items) | ast.Tuple(elts=items):
            members = [_compiled(item, text) for item in items]
            return lambda meta: [member(meta) for member in members]
        case ast.BoolOp(op=op, values=values):
            parts = [_compiled(value, text) for value in values]
            together = all if isinstance(op, ast.And) else any
            return lambda meta: together(part(meta) for part in parts)
        case ast.Compare(left=left, ops=ops, comparators=rights):
            sides = [_compiled(side, text) for side in (left, *rights)]
            tests = [_COMPARE.get(type(op)) for op in ops]
            if None not in tests:
                return lambda meta: _compared([side(meta) for side in sides], tests, text)
    raise ValueError(
        f"the condition {text!r} holds {ast.unparse(node)!r}; it may hold names, numbers, strings, lists, comparisons, "
        "`in`, `and`, `or` and `not`."
    )


def _looked_up(meta: Meta, name: str, text: str) -> Any:
    if name not in meta:
        raise ValueError(f"the condition {text!r} names {name!r}; a document has {sorted(meta)}.")
    return meta[name]


def _compared(values: Sequence[Any], tests: Sequence[Any], text: str) -> bool:
    try:
        return all(test(a, b) for a, b, test in zip(values, values[1:], tests, strict=False))
    except TypeError as error:
        raise ValueError(f"the condition {text!r} compares {values}: {error}.") from error
