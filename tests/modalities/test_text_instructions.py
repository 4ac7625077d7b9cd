"""Tasks: both releases of Natural Instructions, rows, and what is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from headwater.core.recipe import DataRef
from headwater.modalities.text.docs import CorpusError
from headwater.modalities.text.instructions import (
    Instance,
    Instruction,
    TaskExample,
    instruction_rows,
    read_tasks,
    tasks_fingerprint,
    tasks_from_rows,
)

V1: dict[str, Any] = {
    "Title": "Finding bad questions",
    "Prompt": "Is the question bad?",
    "Definition": "Answer Yes or No.",
    "Things to Avoid": "- ",
    "Emphasis & Caution": "Two answers are possible.",
    "Examples": {
        "Positive Examples": [{"input": "a cat sat. Who?", "output": "No.", "reason": "it is plain"}],
        "Negative Examples": [
            {"input": "it rained. Who?", "output": "No.", "reason": "nobody", "suggestion": "say Yes"},
            {"input": "odd", "output": ["a", "b"]},
        ],
    },
    "Instances": [{"input": "x", "output": ["Yes.", "yes"]}, {"input": "y", "output": "No."}],
}
V2: dict[str, Any] = {
    "Contributors": ["A. Writer"],
    "Source": ["multirc"],
    "URL": ["https://example.org"],
    "Categories": ["Answer Verification"],
    "Reasoning": [],
    "Definition": ["Answer Yes or No."],
    "Input_language": ["English"],
    "Output_language": ["English"],
    "Instruction_language": ["English"],
    "Domains": ["Fiction"],
    "Positive Examples": [{"input": "a", "output": "No.", "explanation": "it is plain"}],
    "Negative Examples": [],
    "Instances": [{"id": "task-1", "input": "x", "output": ["Yes."]}],
    "Instance License": ["Unknown"],
}


def without(data: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in data.items() if name != key}


def test_property_v1_comes_back_unchanged() -> None:
    before = copy.deepcopy(V1)
    assert Instruction.from_ni_v1(V1, "subtask052_multirc_bad").to_ni_v1() == V1 == before
    more = {**V1, "Categories": ["Classification"], "Source": ["multirc"]}
    assert Instruction.from_ni_v1(more, "bad").to_ni_v1() == more
    through = json.loads(json.dumps(V1))
    assert Instruction.from_ni_v1(through, "t") == Instruction.from_ni_v1(V1, "t")


def test_equation_v1_and_v2_fill_one_schema() -> None:
    old, new = Instruction.from_ni_v1(V1, "subtask052_multirc_bad"), Instruction.from_ni_v2(V2, "task052_multirc_bad")
    assert old.definition == new.definition == "Answer Yes or No."
    assert old.source_names == new.source_names == ("multirc",), "v1 says the data set in its file's name"
    assert (old.category, new.category) == ("none", "Answer Verification")
    assert new.positive_examples == (TaskExample(input="a", output="No.", reason="it is plain"),)
    assert new.instances == (Instance(input="x", output=("Yes.",), id="task-1"),)
    assert new.about["URL"] == ["https://example.org"]
    assert [instance.references for instance in old.instances] == [("Yes.", "yes"), ("No.",)]


def test_equation_messages_are_instruction_input_and_first_output() -> None:
    task = Instruction.from_ni_v1(V1, "t")
    system, user, assistant = task.to_messages(task.instances[0], ("definition", "emphasis"))
    told = "Definition: Answer Yes or No.\nEmphasis & Caution: Two answers are possible."
    assert system == {"role": "system", "content": told}
    assert user == {"role": "user", "content": "x"}
    assert assistant == {"role": "assistant", "content": "Yes."}
    assert [m["role"] for m in task.to_messages(task.instances[0], ())] == ["user", "assistant"]


def test_property_absent_fields_leave_with_their_label() -> None:
    task = Instruction.from_ni_v1(without(V1, "Prompt"), "t")
    assert [part for part, _ in task.blocks(("avoid", "prompt", "definition"))] == ["definition"]
    assert [part for part, _ in task.blocks(("positive", "negative"), 0, 1)] == ["negative"]
    with pytest.raises(ValueError, match="unknown part 'title'"):
        task.blocks(("title",))  # type: ignore[arg-type]


def test_oracle_rows_go_out_and_in() -> None:
    tasks = [Instruction.from_ni_v1({**V1, "Categories": ["c"]}, "first"), Instruction.from_ni_v2(V2, "second")]
    rows = Dataset.from_list(instruction_rows(tasks))
    back = tasks_from_rows(rows)
    assert [task.name for task in back] == ["first", "second"]
    assert [i.references for t in back for i in t.instances] == [i.references for t in tasks for i in t.instances]
    assert [t.category for t in back] == ["c", "Answer Verification"]
    assert instruction_rows(back) == rows.to_list()


def test_oracle_tasks_are_read_from_folders_files_and_rows(tmp_path: Path) -> None:
    folder = tmp_path / "tasks"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "b.json").write_text(json.dumps(V2))
    (folder / "a.json").write_text(json.dumps(V1))
    (folder / ".hidden.json").write_text("not JSON")
    tasks = read_tasks(DataRef(name=str(folder)))
    assert [task.name for task in tasks] == ["a", "b"]
    assert read_tasks(DataRef(name=str(folder / "a.json"))) == tasks[:1]
    rows = tmp_path / "rows.jsonl"
    lines = [{"task_name": "t", "definition": "d", "inputs": "i", "targets": out} for out in ("one", "two")]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (task,) = read_tasks(DataRef(name=str(rows), input_field="inputs", label_field="targets"))
    assert task.instances == (Instance(input="i", output=("one", "two")),)
    assert tasks_fingerprint(tasks) != tasks_fingerprint(tasks[::-1])


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (without(V1, "Instances"), "task 'f' has no 'Instances'"),
        ({**V1, "Promt": "x"}, "unknown key 'Promt'"),
        ({**V2, "Prompts": "x"}, "unknown key 'Prompts'"),
        ({**V1, "Instances": []}, "task 'f' has no instance"),
        ({**V1, "Instances": [{"input": "x", "output": []}]}, r"instances.0.output: an instance needs at least one"),
        ({**V1, "Instances": [{"input": "x", "output": ["a", " "]}]}, "none that is empty"),
        ({**V1, "Instances": [{"input": 3, "output": "a"}]}, r"instances.0.input"),
        ({**V1, "Examples": {"Good Examples": []}}, "'Examples' must hold"),
        ({**V1, "Prompt": ["x"]}, "task 'f': prompt"),
    ],
)
def test_rejects_files_that_are_no_tasks(tmp_path: Path, data: dict[str, Any], words: str) -> None:
    (tmp_path / "f.json").write_text(json.dumps(data))
    with pytest.raises(CorpusError, match=words):
        read_tasks(DataRef(name=str(tmp_path)))


def test_rejects_one_version_for_the_other_and_says_so() -> None:
    with pytest.raises(CorpusError, match="read it by from_ni_v2"):
        Instruction.from_ni_v1(V2, "f")
    with pytest.raises(CorpusError, match="read it by from_ni_v1"):
        Instruction.from_ni_v2(V1, "f")


def test_rejects_places_without_tasks(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"no \.json file under"):
        read_tasks(DataRef(name=str(tmp_path)))
    with pytest.raises(CorpusError, match="no builtin"):
        read_tasks(DataRef(name="headwater:tasks"))
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(CorpusError, match=r"broken\.json is not JSON"):
        read_tasks(DataRef(name=str(tmp_path)))
    (tmp_path / "broken.json").write_text("[]")
    with pytest.raises(CorpusError, match="holds list"):
        read_tasks(DataRef(name=str(tmp_path)))
    with pytest.raises(CorpusError, match="row 0 has no column 'label'"):
        tasks_from_rows([{"task_name": "t", "text": "x"}])
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "same.json").write_text(json.dumps(V1))
    (tmp_path / "broken.json").unlink()
    with pytest.raises(CorpusError, match="two tasks are called 'same'"):
        read_tasks(DataRef(name=str(tmp_path)))
