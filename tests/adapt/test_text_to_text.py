"""The family of written answers: figures, what is retained, leaks."""

from __future__ import annotations

import json
from collections.abc import Generator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from headwater.adapt.references import TextFineTuning
from headwater.adapt.text_to_text import PairData, TextTask, TextToText, Written, chrf, format_share, read_pairs
from headwater.core.fit import Phase, Trained
from headwater.core.leak import TestLeak
from headwater.core.recipe import DataRef, load_recipe
from headwater.core.run import Run, execute
from headwater.modalities.text.docs import CorpusError
from headwater.modalities.text.pairs import Pairs

Fields = dict[str, Any]


class Leaking(TextToText):
    """Looks at the test."""

    id: ClassVar[str] = "leaking"

    def phases(self, task: TextTask) -> Generator[Phase, Trained, Written]:
        """Reach for what is sealed."""
        yield task.phase("all", task.open(), share=1.0)
        len(task.test)
        return Written(task.open())


def write(path: Path, rows: list[tuple[str, str]]) -> DataRef:
    path.write_text("\n".join(json.dumps({"text": t, "label": y}) for t, y in rows), encoding="utf-8")
    return DataRef(name=str(path))


def test_equation_format_share_counts_answers_in_the_label_set() -> None:
    assert format_share(["True", " false ", "Paris", "true story"], ["true", "false"]) == 0.5
    assert format_share([], ["true"]) == 0.0


def test_oracle_chrf_is_100_for_the_target_and_0_for_nothing_in_common() -> None:
    assert chrf(["a graph of nodes"], ["a graph of nodes"]) == pytest.approx(100.0)
    assert chrf(["zzz"], ["aaaa"]) == 0.0


def test_property_training_sources_that_repeat_a_held_out_one_are_dropped(tmp_path: Path) -> None:
    train = write(tmp_path / "a.jsonl", [("What is a graph, really?", "x"), ("sum of the rows", "y")])
    test = write(tmp_path / "b.jsonl", [("what is a graph really", "x")])
    data = read_pairs(train, test)
    assert list(data.train.sources) == ["sum of the rows"]
    assert data.dropped == 1


def test_rejects_a_training_set_that_is_all_in_the_test(tmp_path: Path) -> None:
    test = write(tmp_path / "b.jsonl", [("what is a graph", "x")])
    with pytest.raises(CorpusError, match="every source repeats one"):
        read_pairs(test, test)
    with pytest.raises(CorpusError, match=r"retained.none: there is no pair"):
        PairData(Pairs(["a"], ["b"]), Pairs(["c"], ["d"]), retained={"none": Pairs([], [])})


def test_learns_a_task_and_says_what_it_forgot(text_to_text_fields: Fields, tmp_path: Path) -> None:
    """The answer is the last word. What the untouched model said is lost to the task's form."""
    words = ["graph", "node", "edge", "path"]
    rows = [(f"{first} {second} {third}", third) for first in words for second in words for third in words]
    fields = {
        **text_to_text_fields,
        "budget": {"steps": 100},
        "optim": {"lr": 1e-2},
        "fit": {"precision": "fp32"},
    }
    recipe = TextFineTuning(**fields)
    other = [source for source, _ in rows[::3]]
    start = recipe.open(lora=False)
    data = PairData(
        Pairs(*zip(*(row for at, row in enumerate(rows) if at % 3), strict=True)),
        Pairs(*zip(*rows[::3], strict=True)),
        ood={"again": Pairs(*zip(*rows[::3], strict=True))},
        retained={"own": Pairs(other, start.answers(other))},
    )
    with Run(tmp_path / "run", recipe) as run:
        metrics = recipe.run_on(data, run)
    assert metrics["id/accuracy"] > 0.9
    assert metrics["ood/mean"] == metrics["ood/again/accuracy"] == metrics["id/accuracy"]
    assert metrics["retained/own/before"] == 1.0
    assert metrics["retained/own/drop"] == 1.0 - metrics["retained/own/after"] > 0.5
    assert metrics["retained/own/format"] > 0.5 > metrics["retained/own/format_start"]
    assert metrics["cost/labels"] == len(data.train)
    answers = json.loads((tmp_path / "run" / "answers.json").read_text(encoding="utf-8"))
    assert sum(row["answer"] == row["target"] for row in answers) / len(answers) == metrics["id/accuracy"]


def test_property_an_adapter_opens_in_peft(text_to_text_fields: Fields, tmp_path: Path) -> None:
    fields = {"method": "text_finetuning", **text_to_text_fields, "lora": {"r": 2}}
    result = execute(load_recipe(fields), tmp_path / "run")
    base = AutoModelForCausalLM.from_pretrained(text_to_text_fields["model"])
    opened = PeftModel.from_pretrained(base, tmp_path / "run" / "model")
    AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    assert result.metrics["cost/trainable"] == sum(p.numel() for n, p in opened.named_parameters() if "lora_" in n)
    assert "PeftModel.from_pretrained" in (tmp_path / "run" / "model" / "README.md").read_text(encoding="utf-8")


def test_rejects_a_hook_that_looks_at_the_test(text_to_text_fields: Fields, tmp_path: Path) -> None:
    recipe = Leaking(**text_to_text_fields)
    with pytest.raises(TestLeak, match="test set"), Run(tmp_path / "run", recipe) as run:
        recipe.run(run)


def test_property_validation_is_counted_when_it_is_looked_at(text_to_text_fields: Fields, tmp_path: Path) -> None:
    recipe = TextFineTuning(**text_to_text_fields)
    pairs = Pairs(["sum", "row"], ["a", "b"])
    with Run(tmp_path / "run", recipe) as run:
        task = TextTask(PairData(pairs, pairs, pairs), recipe, run, meter=None)  # type: ignore[arg-type]
        assert task.labels == 2
        assert len(task.validation) == 2
        assert task.labels == 4
        bare = TextTask(PairData(pairs, pairs), recipe, run, meter=None)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="name some in `validation`"):
            _ = bare.validation
