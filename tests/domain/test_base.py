"""The family of continued pretraining: bad input, hygiene, and what the figures mean."""

from __future__ import annotations

import json
import math
from collections.abc import Generator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from tests.conftest import sentences, write_corpus
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from headwater.core.fit import Phase, Trained
from headwater.core.leak import TestLeak
from headwater.core.recipe import RecipeError, load_recipe
from headwater.core.run import Run, execute, read_result
from headwater.domain.adaptation import Adaptation
from headwater.domain.base import Adapted
from headwater.domain.corpus import prepare
from headwater.domain.references import Interpolated, Plain, plain_phase
from headwater.modalities.models import ModelError
from headwater.modalities.text.docs import CorpusError

Fields = dict[str, Any]


def run(fields: Fields, directory: Path, **changes: Any) -> Any:
    return execute(load_recipe({"method": "plain", **fields, **changes}), directory)


def test_oracle_bits_per_byte_of_the_start_is_the_models_own_loss(domain_fields: Fields, tmp_path: Path) -> None:
    result = run(domain_fields, tmp_path / "a", method="frozen")
    documents = prepare(load_recipe({"method": "plain", **domain_fields}).domain, None, held_out=0.1).domain_test  # type: ignore[attr-defined]
    model = AutoModelForCausalLM.from_pretrained(domain_fields["model"])
    tokenizer = AutoTokenizer.from_pretrained(domain_fields["model"])
    ids = json.loads((tmp_path / "a" / "items.json").read_text())["domain/gain"]["ids"]
    assert [d.id for d in documents][: len(ids)] == ids
    # Token by token with the window's rule: a context of at least half the window of 32, and BOS first.
    nats = size = 0.0
    for document in documents[: len(ids)]:
        tokens = [tokenizer.eos_token_id, *tokenizer(document.text, add_special_tokens=False)["input_ids"]]
        scored, begin = 1, 0
        while scored < len(tokens):
            end = min(begin + 32, len(tokens))
            with torch.no_grad():
                logp = model(input_ids=torch.tensor([tokens[begin:end]])).logits[0].log_softmax(-1)
            nats -= sum(float(logp[i - 1 - begin, tokens[i]]) for i in range(scored, end))
            scored, begin = end, begin + 16
        size += len(document.text.encode())
    assert result.metrics["domain/bpb"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert result.metrics["domain/gain"] == 0
    assert result.metrics["general/forgetting"] == 0


def test_property_items_average_to_the_metric(domain_fields: Fields, tmp_path: Path) -> None:
    result = run(domain_fields, tmp_path / "a", replay=0.25)
    items = json.loads((tmp_path / "a" / "items.json").read_text())
    for name in ("domain/gain", "general/forgetting"):
        assert np.mean(items[name]["values"]) == pytest.approx(result.metrics[name], abs=1e-12)
    gain = result.metrics["domain/bpb_start"] - result.metrics["domain/bpb"]
    assert result.metrics["domain/gain"] == pytest.approx(gain, abs=1e-9)


def test_learns_the_domain_and_replay_forgets_less(domain_fields: Fields, tmp_path: Path) -> None:
    longer = {**domain_fields, "budget": {"steps": 60}, "optim": {"lr": 1e-2}}
    plain = run(longer, tmp_path / "plain")
    replay = run(longer, tmp_path / "replay", replay=0.5)
    assert plain.metrics["domain/gain"] > 1.0, "a random model learns a language of seven words quickly"
    assert replay.metrics["general/bpb"] < plain.metrics["general/bpb"] - 0.1
    assert plain.metrics["general/worst"] >= 0


def test_property_the_budget_is_met_to_one_row(domain_fields: Fields, tmp_path: Path) -> None:
    result = run(domain_fields, tmp_path / "a", budget={"tokens": 1_000})
    assert 1_000 - 32 < result.cost["tokens"] <= 1_000


def test_degenerate_interpolation_ends_are_the_start_and_plain(domain_fields: Fields, tmp_path: Path) -> None:
    plain = run(domain_fields, tmp_path / "plain")
    one = run(domain_fields, tmp_path / "one", method="interpolated", alpha=1.0)
    zero = run(domain_fields, tmp_path / "zero", method="interpolated", alpha=0.0)
    assert one.metrics["domain/bpb"] == pytest.approx(plain.metrics["domain/bpb"], abs=1e-9)
    assert zero.metrics["domain/gain"] == pytest.approx(0, abs=1e-9)
    assert Interpolated.id == "interpolated"


def test_oracle_lora_saves_an_adapter_that_peft_opens(domain_fields: Fields, tmp_path: Path) -> None:
    from peft import PeftModel

    result = run(domain_fields, tmp_path / "a", lora={"r": 2})
    base = AutoModelForCausalLM.from_pretrained(domain_fields["model"])
    full = sum(p.numel() for p in base.parameters())
    model = PeftModel.from_pretrained(base, tmp_path / "a" / "model")
    assert any("lora_B" in name and p.abs().sum() > 0 for name, p in model.named_parameters())
    assert 0 < result.cost["trainable"] < full / 2


def test_oracle_masked_models_are_scored_on_fixed_masks(
    tiny_masked: Path, domain_fields: Fields, tmp_path: Path
) -> None:
    result = run(domain_fields, tmp_path / "a", model=str(tiny_masked))
    again = run(domain_fields, tmp_path / "b", model=str(tiny_masked), method="frozen")
    assert result.notes["unit"] == "bits/masked token"
    assert again.metrics["domain/bpb_start"] == result.metrics["domain/bpb_start"]
    AutoModelForMaskedLM.from_pretrained(tmp_path / "a" / "model")


def test_property_near_copies_of_held_out_text_leave_training(tmp_path: Path, domain_fields: Fields) -> None:
    path = write_corpus(tmp_path / "d.jsonl", "domain")
    reference = load_recipe({"method": "plain", **domain_fields, "domain": str(path)})
    held = prepare(reference.domain, None, held_out=0.1).domain_test  # type: ignore[attr-defined]
    copies = [{"id": f"copy-{i}", "text": d.text.replace(".", " !")} for i, d in enumerate(held)]
    with path.open("a") as stream:
        stream.writelines(json.dumps(copy) + "\n" for copy in copies)
    prepared = prepare(reference.domain, None, held_out=0.1)  # type: ignore[attr-defined]
    held_now = {d.text.rstrip(" .!") for d in (*prepared.domain_test, *prepared.domain.valid)}
    assert prepared.dropped > 0
    assert not held_now & {d.text.rstrip(" .!") for d in prepared.domain.train}


def test_rejects_a_hook_that_reaches_for_the_test_set(domain_fields: Fields, tmp_path: Path) -> None:
    class Cheat(Plain):
        id: ClassVar[str] = "plain"

        def phases(self, ctx: Adaptation) -> Generator[Phase, Trained, Adapted]:
            list(ctx.domain.test)
            trained = yield plain_phase(ctx)
            return Adapted(trained.model)

    fields = {k: v for k, v in load_recipe({"method": "plain", **domain_fields}) if k}
    with pytest.raises(TestLeak, match="test set"):
        execute(Cheat(**fields), tmp_path / "a")


def test_rejects_phases_that_overspend(domain_fields: Fields, tmp_path: Path) -> None:
    class Greedy(Plain):
        id: ClassVar[str] = "plain"

        def phases(self, ctx: Adaptation) -> Generator[Phase, Trained, Adapted]:
            first = yield plain_phase(ctx)
            yield Phase("more", first.model, plain_phase(ctx).stream, ctx.objective, share=0.5)
            raise AssertionError("unreachable")

    fields = dict(load_recipe({"method": "plain", **domain_fields}))
    with pytest.raises(ValueError, match=r"take 1.500 of the budget; at most 1"):
        execute(Greedy(**fields), tmp_path / "a")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"general": None, "replay": 0.2}, "no general corpus to replay"),
        ({"replay": 1.0}, "replay"),
        ({"budget": {}}, "give one of tokens, steps, flops, seconds"),
        ({"eval_at": [0.5, 0.1]}, "must rise"),
        ({"model": "weights/model.bin"}, "is a pickle"),
        ({"model": "headwater:../../etc"}, "is no builtin name"),
        ({"optim": {"lr": 0}}, "optim.lr"),
    ],
)
def test_rejects_when_built(domain_fields: Fields, changes: Fields, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        load_recipe({"method": "plain", **domain_fields, **changes})


def test_rejects_bad_models_and_corpora(domain_fields: Fields, tmp_path: Path, tiny_masked: Path) -> None:
    def refused(error: type[Exception], words: str, **changes: Any) -> None:
        with pytest.raises(error, match=words):
            run(domain_fields, tmp_path / f"run-{len(list(tmp_path.iterdir()))}", **changes)

    (tmp_path / "empty").mkdir()
    few = tmp_path / "few.jsonl"
    few.write_text("".join(json.dumps({"text": t}) + "\n" for t in sentences("domain", 30)))
    refused(CorpusError, r"domain: 0 documents under .*empty", domain=str(tmp_path / "empty"))
    refused(CorpusError, r"at least 20 documents and 20000 bytes", domain=str(few))
    refused(CorpusError, "100% of the domain's documents stand in the general corpus", domain=domain_fields["general"])
    refused(
        CorpusError, "no column 'body' in .*available: ", domain={"name": domain_fields["domain"], "text_field": "body"}
    )
    refused(ModelError, "seq_len is 128 but model .* has 64 positions", seq_len=128)
    refused(ModelError, "less than one step of batch_tokens 256", budget={"tokens": 100})
    refused(ModelError, "batch_tokens .16. is less than one block", batch_tokens=16)
    refused(ModelError, "objective 'masked' was asked for, but model .* is a causal", objective="masked")
    refused(
        ModelError,
        "objective 'causal' was asked for, but model .* is a masked",
        objective="causal",
        model=str(tiny_masked),
    )
    refused(ModelError, "no such directory", model=str(tmp_path / "nowhere"))
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "config.json").write_text("{}")
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"x")
    refused(ModelError, "its weights are a pickle .pytorch_model.bin", model=str(tmp_path / "pickled"))


def test_property_a_corpus_read_often_warns(domain_fields: Fields, tmp_path: Path) -> None:
    few = write_corpus(tmp_path / "few.jsonl", "domain", 220)
    recipe = load_recipe({"method": "plain", **domain_fields, "domain": str(few), "budget": {"tokens": 5_000_000}})
    with Run(tmp_path / "b", recipe) as opened:
        ctx = Adaptation.open(recipe, opened)  # type: ignore[arg-type]
        assert ctx.domain_epochs(ctx.domain.train, 1.0) > 4
    assert "reads the domain text" in opened.notes["warning/epochs"]


def test_property_float16_is_trained_in_bfloat16_with_a_warning(domain_fields: Fields, tmp_path: Path) -> None:
    result = run(domain_fields, tmp_path / "a", model={"name": domain_fields["model"], "dtype": "float16"})
    assert "loaded in bfloat16" in result.notes["warning/dtype"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "a" / "model").dtype == torch.bfloat16


def test_equation_epochs_are_tokens_read_by_tokens_there(domain_fields: Fields, tmp_path: Path) -> None:
    recipe = load_recipe({"method": "plain", **domain_fields, "replay": 0.25})
    result = execute(recipe, tmp_path / "a")
    with Run(tmp_path / "b", recipe) as opened:
        ctx = Adaptation.open(recipe, opened)  # type: ignore[arg-type]
        tokens = int(ctx.num_tokens(ctx.domain.train).sum())
    # 6 steps of 256 tokens, three quarters of them from the domain
    assert result.metrics["data/epochs"] == pytest.approx(6 * 256 * 0.75 / tokens)


def test_rejects_training_quantised_weights_without_lora(
    domain_fields: Fields, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from headwater.domain import adaptation

    # No quantiser runs on this kind of machine, so the fact that one has is planted.
    monkeypatch.setattr(adaptation, "is_quantised", lambda model: True)
    with pytest.raises(ModelError, match="is quantised, so its weights cannot be trained; set `lora`"):
        run(domain_fields, tmp_path / "a")


def test_fault_data_edited_under_a_run_is_refused(domain_fields: Fields, tmp_path: Path) -> None:
    path = write_corpus(tmp_path / "d.jsonl", "domain")
    fields = {**domain_fields, "domain": str(path)}
    recipe = load_recipe({"method": "plain", **fields})
    execute(recipe, tmp_path / "a")
    (tmp_path / "a" / "result.json").unlink()
    path.write_text(path.read_text().replace("graph", "grape"))
    with pytest.raises(RuntimeError, match="the data 'domain' changed since this run began"):
        execute(recipe, tmp_path / "a", resume=True)
    assert read_result(tmp_path / "a").status == "failed"
