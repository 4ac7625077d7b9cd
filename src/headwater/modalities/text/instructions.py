"""Instructions: a task in the words that its workers were given, and instances of it.

    title, prompt, definition                 what is to be done
    things to avoid, emphasis and caution     what goes wrong
    positive and negative examples            input, output, reason, and of a negative one a suggestion
    instances                                 input and its right outputs

``read_tasks`` takes what there is: folders of task files of Natural Instructions (v1) and of Super-NaturalInstructions
(v2), told apart by their keys, and data sets of one row per instance, on disk or on the Hub.

Source: Mishra et al., "Cross-Task Generalization via Natural Language Crowdsourcing Instructions", arXiv:2104.08773,
    section 3 (the schema) and 4 (the order in which it is read); Wang et al., "Super-NaturalInstructions",
    arXiv:2204.07705 (v2).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from headwater.core.recipe import DataRef
from headwater.modalities.text.docs import CorpusError, read_documents

__all__ = [
    "PARTS",
    "Instance",
    "Instruction",
    "InstructionPart",
    "TaskExample",
    "instruction_rows",
    "read_tasks",
    "tasks_fingerprint",
    "tasks_from_rows",
]

InstructionPart = Literal["prompt", "definition", "avoid", "emphasis", "negative", "positive"]

PARTS: tuple[InstructionPart, ...] = ("prompt", "definition", "avoid", "emphasis", "negative", "positive")
"""The parts in the order in which they are read."""

_V1 = {
    "Title": "title",
    "Prompt": "prompt",
    "Definition": "definition",
    "Things to Avoid": "things_to_avoid",
    "Emphasis & Caution": "emphasis_and_caution",
}
_FIELDS: dict[InstructionPart, tuple[str, str]] = {
    "prompt": ("prompt", "Prompt"),
    "definition": ("definition", "Definition"),
    "avoid": ("things_to_avoid", "Things to Avoid"),
    "emphasis": ("emphasis_and_caution", "Emphasis & Caution"),
}
_EXAMPLES = {"Positive Examples": "positive_examples", "Negative Examples": "negative_examples"}
_LISTS = {"Categories": "categories", "Source": "sources"}
_V2_ABOUT = (
    "Contributors",
    "URL",
    "Reasoning",
    "Input_language",
    "Output_language",
    "Instruction_language",
    "Domains",
    "Instance License",
)
_FILE_NAME = re.compile(r"(?:sub)?task\d+_([^_]+)_")


class _Schema(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TaskExample(_Schema):
    """A solved example: a right output or, among the negative ones, a wrong one."""

    input: str
    output: str | tuple[str, ...]
    reason: str | None = None
    suggestion: str | None = None

    @property
    def text(self) -> str:
        """The example in words."""
        output = self.output if isinstance(self.output, str) else ", ".join(self.output)
        told = [f"input: {self.input}", f"output: {output}"]
        told += [f"reason: {self.reason}"] if _present(self.reason) else []
        told += [f"suggestion: {self.suggestion}"] if _present(self.suggestion) else []
        return " ".join(told)


class Instance(_Schema):
    """An input and what may be written for it: one right output, or several."""

    input: str
    output: str | tuple[str, ...]
    id: str | None = None

    @field_validator("output")
    @classmethod
    def _is_written(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if not value or not all(text.strip() for text in ((value,) if isinstance(value, str) else value)):
            raise ValueError("an instance needs at least one output, and none that is empty")
        return value

    @property
    def references(self) -> tuple[str, ...]:
        """All right outputs; the first is the one that is learned."""
        return (self.output,) if isinstance(self.output, str) else self.output


class Instruction(_Schema):
    """A task: its name, its instruction, where it comes from, and its instances.

    A field that is None, blank or "-" is absent. ``about`` holds what v2 says beside the schema, as JSON data.
    """

    name: str
    title: str | None = None
    prompt: str | None = None
    definition: str | None = None
    things_to_avoid: str | None = None
    emphasis_and_caution: str | None = None
    positive_examples: tuple[TaskExample, ...] = ()
    negative_examples: tuple[TaskExample, ...] = ()
    instances: tuple[Instance, ...]
    categories: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    about: dict[str, Any] = {}  # Any: JSON data

    @property
    def category(self) -> str:
        """The first category, or ``none``."""
        return self.categories[0] if self.categories else "none"

    @property
    def source_names(self) -> tuple[str, ...]:
        """The data sets that the task was made from; v1 says so in the name of the file alone."""
        named = _FILE_NAME.match(self.name)
        return self.sources or ((named[1],) if named else ())

    def blocks(
        self, parts: Sequence[InstructionPart], n_positive: int = 2, n_negative: int = 2
    ) -> list[tuple[InstructionPart, str]]:
        """What is read before an instance, a line each, in the order of ``PARTS``; absent fields are left out.

        Args:
            parts: which, in any order.
            n_positive: so many right examples at most.
            n_negative: so many wrong ones.

        Raises:
            ValueError: an unknown part.
        """
        if unknown := sorted(set(parts) - set(PARTS)):
            raise ValueError(f"unknown part {unknown[0]!r} of an instruction; the parts are {', '.join(PARTS)}.")
        found: list[tuple[InstructionPart, str]] = []
        for part, (field, label) in _FIELDS.items():
            if part in parts and _present(value := getattr(self, field)):
                found.append((part, f"{label}: {value.strip()}"))
        if "negative" in parts:
            for number, example in enumerate(self.negative_examples[:n_negative], start=1):
                found.append(("negative", f"Negative Example {number} - {example.text}"))
        if "positive" in parts:
            for number, example in enumerate(self.positive_examples[:n_positive], start=1):
                found.append(("positive", f"Positive Example {number} - {example.text}"))
        return found

    def to_messages(
        self, instance: Instance, parts: Sequence[InstructionPart] = PARTS, n_positive: int = 2, n_negative: int = 2
    ) -> list[dict[str, str]]:
        """A conversation as chat templates take it: the instruction, the input, the first right output."""
        told = "\n".join(text for _, text in self.blocks(parts, n_positive, n_negative))
        system = [{"role": "system", "content": told}] if told else []
        asked = {"role": "user", "content": instance.input}
        return [*system, asked, {"role": "assistant", "content": instance.references[0]}]

    @classmethod
    def from_ni_v1(cls, data: Mapping[str, Any], name: str) -> Instruction:  # Any: JSON data
        """A task of Natural Instructions; ``Categories`` and ``Source`` may be added to what v1 has.

        Args:
            data: the content of a task file.
            name: the file's, without its ending.

        Raises:
            CorpusError: no instances, an unknown key, a value of the wrong kind, or a task of v2.
        """
        known = {*_V1, *_LISTS, "Examples", "Instances"}
        _check_keys(data, known, name, "v1", "from_ni_v2" if set(_EXAMPLES) & set(data) else None)
        examples = data.get("Examples", {})
        if not isinstance(examples, Mapping) or not set(examples) <= set(_EXAMPLES):
            raise CorpusError(f"task {name!r}: 'Examples' must hold {' and '.join(map(repr, _EXAMPLES))}.")
        fields = {field: data[key] for key, field in {**_V1, **_LISTS}.items() if key in data}
        fields |= {_EXAMPLES[key]: value for key, value in examples.items()}
        return _checked({"name": name, **fields, "instances": data["Instances"]})

    def to_ni_v1(self) -> dict[str, Any]:  # Any: JSON data
        """The task as a file of v1 holds it; what ``from_ni_v1`` read comes back unchanged."""
        plain = self.model_dump(mode="json", exclude_none=True)
        data = {key: plain[field] for key, field in _V1.items() if field in plain}
        data |= {key: plain[field] for key, field in _LISTS.items() if plain[field]}
        data["Examples"] = {key: plain[field] for key, field in _EXAMPLES.items()}
        return {**data, "Instances": plain["instances"]}

    @classmethod
    def from_ni_v2(cls, data: Mapping[str, Any], name: str) -> Instruction:  # Any: JSON data
        """A task of Super-NaturalInstructions; arguments and errors as ``from_ni_v1``."""
        known = {*_LISTS, *_EXAMPLES, *_V2_ABOUT, "Definition", "Instances"}
        _check_keys(data, known, name, "v2", "from_ni_v1" if "Examples" in data else None)
        definition = data.get("Definition")
        fields: dict[str, Any] = {field: data[key] for key, field in _LISTS.items() if key in data}
        fields["definition"] = " ".join(map(str, definition)) if isinstance(definition, list) else definition
        for key, field in _EXAMPLES.items():
            fields[field] = [_renamed(example, "explanation", "reason") for example in data.get(key, ())]
        about = {key: data[key] for key in _V2_ABOUT if key in data}
        return _checked({"name": name, **fields, "instances": data["Instances"], "about": about})


def _present(value: str | None) -> bool:
    return value is not None and value.strip() not in ("", "-")


def _check_keys(data: Mapping[str, Any], known: set[str], name: str, version: str, other: str | None) -> None:
    hint = f" It looks like the other version; read it by {other}." if other else ""
    if "Instances" not in data:
        raise CorpusError(f"task {name!r} has no 'Instances'.{hint}")
    if unknown := sorted(set(data) - known):
        raise CorpusError(
            f"task {name!r}: unknown key {unknown[0]!r}; a task of {version} has {', '.join(sorted(known))}.{hint}"
        )


def _renamed(example: Any, old: str, new: str) -> Any:  # Any: JSON data, checked later
    if not isinstance(example, Mapping):
        return example
    return {new if key == old else key: value for key, value in example.items()}


def _checked(fields: dict[str, Any]) -> Instruction:  # Any: JSON data
    try:
        task = Instruction(**fields)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        message = first["msg"].removeprefix("Value error, ")
        raise CorpusError(f"task {fields['name']!r}: {place}: {message}; got {str(first['input'])[:80]!r}.") from None
    if not task.instances:
        raise CorpusError(f"task {task.name!r} has no instance.")
    return task


def instruction_rows(tasks: Iterable[Instruction]) -> list[dict[str, str]]:
    """One row per instance and right output, as ``datasets.Dataset.from_list`` takes them; see ``tasks_from_rows``."""
    return [
        {
            "task_name": task.name,
            "definition": task.definition or "",
            "category": task.category,
            "text": instance.input,
            "label": output,
        }
        for task in tasks
        for instance in task.instances
        for output in instance.references
    ]


def tasks_from_rows(
    rows: Iterable[Mapping[str, Any]], input_field: str = "text", label_field: str = "label"
) -> list[Instruction]:
    """Tasks from rows, one per instance and right output; rows of one task and input are one instance.

    Args:
        rows: with the input, the output and, where there are any, ``task_name``, ``definition``, ``category`` and
            ``source``; what a task's first row says of it holds. Rows without a name are one task, ``rows``, such as
            prompts and answers of many kinds.
        input_field: column of the input.
        label_field: column of the output.

    Raises:
        CorpusError: a column is missing, or an output is empty.
    """
    about: dict[str, Mapping[str, Any]] = {}
    outputs: dict[str, dict[str, list[Any]]] = {}
    for number, row in enumerate(rows):
        if lacking := [key for key in (input_field, label_field) if key not in row]:
            raise CorpusError(f"tasks: row {number} has no column {lacking[0]!r}; it has {', '.join(row)}.")
        name = str(row.get("task_name", "rows"))
        about.setdefault(name, row)
        outputs.setdefault(name, {}).setdefault(row[input_field], []).append(row[label_field])
    return [
        _checked(
            {
                "name": name,
                "definition": row.get("definition"),
                "categories": [row["category"]] if _present(row.get("category")) else [],
                "sources": [row["source"]] if _present(row.get("source")) else [],
                "instances": [{"input": text, "output": found} for text, found in outputs[name].items()],
            }
        )
        for name, row in about.items()
    ]


def read_tasks(ref: DataRef) -> list[Instruction]:
    """Tasks of a folder of JSON files, of one such file, or of rows on disk or on the Hub.

    Args:
        ref: a folder (searched recursively, in sorted order, hidden names skipped) or a file of ``.json``; else rows as
            ``tasks_from_rows`` takes them, ``input_field`` and ``label_field`` naming their columns.

    Raises:
        CorpusError: nothing there, a file that is no task, or two tasks of one name.
    """
    path = ref.path
    if ref.kind == "builtin":
        raise CorpusError(f"tasks: there is no builtin {ref.name!r}; give a folder of task files, or rows.")
    if ref.kind == "local" and (path.is_dir() or path.suffix == ".json"):
        files = [path] if path.is_file() else _task_files(path)
        if not files:
            raise CorpusError(f"tasks: no .json file under {path}.")
        tasks = [_read_file(file) for file in files]
    else:
        where = str(path) if ref.kind == "local" else ref.name
        documents = read_documents(
            where,
            text_field=ref.input_field,
            config=ref.config,
            split=ref.split,
            limit_documents=ref.limit,
            role="tasks",
        )
        rows = ({**document.meta, ref.input_field: document.text} for document in documents)
        tasks = tasks_from_rows(rows, ref.input_field, ref.label_field)
    names = [task.name for task in tasks]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise CorpusError(f"tasks: two tasks are called {twice[0]!r}; rename one of the files.")
    return tasks


def _task_files(folder: Path) -> list[Path]:
    inside = (
        p for p in folder.rglob("*.json") if not any(part.startswith(".") for part in p.relative_to(folder).parts)
    )
    return sorted(p for p in inside if p.is_file())


def _read_file(file: Path) -> Instruction:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CorpusError(f"tasks: {file} is not JSON in UTF-8 ({error}).") from error
    if not isinstance(data, dict):
        raise CorpusError(f"tasks: {file} holds {type(data).__name__}; a task file holds an object.")
    version = Instruction.from_ni_v1 if "Examples" in data or "Title" in data else Instruction.from_ni_v2
    return version(data, file.stem)


def tasks_fingerprint(tasks: Iterable[Instruction]) -> str:
    """Thirty-two hex digits that change with any task, any instance, or the order."""
    digest = hashlib.blake2b(digest_size=16)
    for task in tasks:
        digest.update(task.model_dump_json().encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()
