"""YAML as data: floats as YAML 1.2 writes them, no tags, no duplicate keys, no dates."""

from __future__ import annotations

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

__all__ = ["YamlError", "dump_yaml", "load_yaml", "read_yaml"]


class YamlError(ValueError):
    """A YAML text that cannot be read as plain data."""


class _PlainLoader(yaml.SafeLoader):
    """SafeLoader that reads ``1e-4`` as a number and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


# PyYAML follows YAML 1.1, in which 1e-4 is a string, `no` is false and 2020-01-01 a date. Recipes want none of it.
_YAML_1_1 = {f"tag:yaml.org,2002:{kind}" for kind in ("timestamp", "float", "bool")}
_PlainLoader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag not in _YAML_1_1]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_PlainLoader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_FLOAT = re.compile(
    r"^[-+]?(?:(?:\d[\d_]*\.[\d_]*|\.\d[\d_]*)(?:[eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+|\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)
_PlainLoader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def load_yaml(text: str, *, source: str = "YAML text") -> Any:  # Any: YAML holds whatever it holds
    """Parse one YAML document into plain Python data.

    Args:
        text: the document.
        source: what to call it in an error.

    Raises:
        YamlError: the text is not YAML, holds a tag that would construct an object, or a key twice.
    """
    try:
        return yaml.load(text, Loader=_PlainLoader)  # noqa: S506  (a SafeLoader subclass)
    except yaml.constructor.ConstructorError as error:
        raise YamlError(f"{source}: {error.problem} {error.problem_mark or ''}. Only plain data is read.") from error
    except yaml.YAMLError as error:
        raise YamlError(f"{source} is not valid YAML: {error}") from error


def read_yaml(path: Path) -> Any:  # Any: see load_yaml
    """Parse a YAML file; a missing one is a ``FileNotFoundError`` that names it."""
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}. Write one with `headwater init ID > {path.name}`.")
    return load_yaml(path.read_text(encoding="utf-8"), source=str(path))


def dump_yaml(data: Any) -> str:  # Any: see load_yaml
    """Write plain data as block YAML, keys in the order given; ``load_yaml`` reads back the same data."""
    text = _dump(data, allow_unicode=True)
    # PyYAML writes these line breaks raw and reads them back as another; escaped they survive.
    return _dump(data, allow_unicode=False) if any(c in text for c in "\x85\u2028\u2029") else text


def _dump(data: Any, *, allow_unicode: bool) -> str:  # Any: see load_yaml
    text: str = yaml.dump(
        data, Dumper=_PlainDumper, sort_keys=False, allow_unicode=allow_unicode, default_flow_style=False, width=110
    )
    return text


class _PlainDumper(yaml.SafeDumper):
    """SafeDumper whose floats are read back as floats by any YAML reader."""


def _represent_float(dumper: yaml.SafeDumper, value: float) -> yaml.ScalarNode:
    text = repr(value)
    if "e" in text and "." not in text:
        text = text.replace("e", ".0e")  # YAML 1.1 readers want the dot
    return dumper.represent_scalar(
        "tag:yaml.org,2002:float", {"inf": ".inf", "-inf": "-.inf", "nan": ".nan"}.get(text, text)
    )


_PlainDumper.add_representer(float, _represent_float)
# Text that either version of YAML would take for something else is quoted.
_PlainDumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
