"""A recipe as YAML with every field explained: what ``headwater init`` prints."""

from __future__ import annotations

import json
import textwrap
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from headwater.core.yamlio import dump_yaml

if TYPE_CHECKING:
    from headwater.core.catalogue import Entry

__all__ = ["explained_recipe"]


def explained_recipe(entry: Entry) -> str:
    """YAML of a method's recipe: required fields to fill in, the others with their defaults, each with a comment."""
    cls = entry.recipe_class()
    blocks = [f"# {entry.title}", *_comment(entry.summary, ""), f"method: {entry.id}", ""]
    ordered = sorted(cls.model_fields.items(), key=lambda item: not item[1].is_required())
    for name, field in ordered:
        blocks += [*_comment(f"{field.description}{_bounds(field)}", ""), *_value(name, field), ""]
    return "\n".join(blocks)


def _comment(text: str, indent: str) -> list[str]:
    return [f"{indent}# {line}" for line in textwrap.wrap(text, 100)]


def _bounds(field: FieldInfo) -> str:
    limits = []
    for constraint in field.metadata:
        for word, sign in (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<=")):
            value = getattr(constraint, word, None)
            if value is not None and abs(value) < 2**62:
                limits.append(f"{sign} {value}")
    return f" ({', '.join(limits)})" if limits else ""


def _value(name: str, field: FieldInfo) -> list[str]:
    if field.is_required():
        return [f"{name}:   # required"]
    default = field.get_default(call_default_factory=True)
    plain: Any = (
        default.model_dump(mode="json")
        if isinstance(default, BaseModel)
        else json.loads(json.dumps(default, default=list))
    )
    if isinstance(plain, dict) and plain:
        described = (
            {key: f.description for key, f in type(default).model_fields.items()}
            if isinstance(default, BaseModel)
            else {}
        )
        lines = [f"{name}:"]
        for key, value in plain.items():
            lines += _comment(described.get(key) or "", "  ") if described.get(key) else []
            lines.append("  " + dump_yaml({key: value}).strip().replace("\n", "\n  "))
        return lines
    return [dump_yaml({name: plain}).strip()]
