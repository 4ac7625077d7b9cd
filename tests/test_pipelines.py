"""Several methods in a row as one recipe, stopped in the middle and continued."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from headwater.core.recipe import load_recipe
from headwater.core.run import Run, execute

Fields = dict[str, Any]


def short(fields: Fields, **changes: Any) -> Fields:
    return {**fields, "budget": {"steps": 4}, "eval_at": [1.0], **changes}


@pytest.fixture
def four_stages(
    corpora_fields: Fields, domain_fields: Fields, compose_fields: Fields, localization_fields: Fields
) -> Fields:
    """Pretrained with its sources, continued, given the instruction vector, and the skill's few parameters found."""
    suites = compose_fields["suites"]
    meco = {**corpora_fields, "method": "meco", "metadata_field": "source", "conditional_evals": ["s1"]}
    domain = short(domain_fields, method="stability_gap", model="steps.0", quality="none", epochs=1)
    merged = {
        "method": "instruction_vector",
        "models": {"base": "steps.0", "domain": "steps.1", "instruct": compose_fields["models"]["instruct"]},
        "suites": suites,
    }
    skill = {
        **{key: localization_fields[key] for key in ("seq_len", "batch_tokens", "fit")},
        "method": "skill_localization",
        "models": {"base": "steps.0", "merged": "previous"},
        "suites": suites,
        "data": {"merged": localization_fields["data"]["domain"]},
        "sparsity": [0.1],
        "steps": 2,
    }
    return {"method": "pipeline", "steps": [meco, domain, merged, skill]}


def test_fault_a_pipeline_of_four_stages_goes_on_where_it_stopped(
    four_stages: Fields, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = execute(load_recipe(four_stages), tmp_path / "whole")
    finished: list[str] = []
    original = Run.write_json

    def failing(self: Run, name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "items.json" and self.directory.name.startswith("02-"):
            raise OSError(28, "no space left on device")
        return original(self, name, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "write_json", failing)
        with pytest.raises(OSError, match="no space"):
            execute(load_recipe(four_stages), tmp_path / "run")
    for step in ("00-meco", "01-stability_gap"):
        result = tmp_path / "run" / step / "result.json"
        assert json.loads(result.read_text())["status"] == "done"
        finished.append(result.read_text())
    resumed = execute(load_recipe(four_stages), tmp_path / "run", resume=True)
    for step, before in zip(("00-meco", "01-stability_gap"), finished, strict=True):
        assert (tmp_path / "run" / step / "result.json").read_text() == before, "a finished step is not run again"
    assert comparable(resumed.metrics) == comparable(whole.metrics)
    assert resumed.metrics["03-skill_localization/ledger/pattern"] >= 0
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "03-skill_localization" / "model")


def comparable(metrics: Fields) -> Fields:
    clock = ("seconds", "bytes", "per_1k")
    return {name: value for name, value in metrics.items() if not any(word in name for word in clock)}
