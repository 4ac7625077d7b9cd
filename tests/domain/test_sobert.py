"""Threads, positions, rows that threads do not share, and the plan beside what was spent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer, BertConfig, RobertaConfig, RobertaForMaskedLM

from headwater.core.recipe import RecipeError, load_recipe
from headwater.core.run import execute
from headwater.domain.sobert import AlignedObjective, Sobert, aligned_stream, lengthen_positions
from headwater.domain.training_plan import Shape
from headwater.modalities.models import ModelError
from headwater.modalities.text.docs import Document
from headwater.modalities.text.tiny import tiny_bert
from headwater.modalities.text.tokenizers import train_bpe

Fields = dict[str, Any]
WORDS = ["graph", "node", "edge", "path", "tree", "flow", "cut"]


def texts(count: int, words: int) -> list[Document]:
    rng = np.random.default_rng(0)
    return [Document(str(n), " ".join(rng.choice(WORDS, size=words))) for n in range(count)]


def recipe_of(fields: Fields, **changes: Any) -> Sobert:
    recipe = load_recipe({"method": "sobert", **fields, **changes})
    assert isinstance(recipe, Sobert)
    return recipe


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe([d.text for d in texts(50, 30)], 300, extra_tokens=("<mask>",))


def test_property_no_row_crosses_from_one_thread_into_another(tokenizer) -> None:
    documents = texts(60, 9)
    stream = aligned_stream([(documents, 1.0)], tokenizer, seq_len=40, rows=8, seed=0)
    whole = {tuple(tokenizer(d.text, add_special_tokens=False)["input_ids"]) for d in documents}
    batch = stream.batch(0)
    shown = torch.where(batch["labels"] >= 0, batch["labels"], batch["input_ids"])
    found = 0
    for row, owners in zip(shown, batch["document_ids"], strict=True):
        for owner in owners.unique().tolist():
            if owner:
                ids = row[owners == owner].tolist()
                assert tuple(ids[1:-1]) in whole, "a start token, a whole document, an end token"
                found += 1
    assert found > 16
    assert (batch["labels"][batch["document_ids"] == 0] == -100).all()


def test_oracle_packed_threads_are_read_as_if_alone(tokenizer) -> None:
    model = tiny_bert(tokenizer, hidden=16, layers=2, heads=2, mlp=32, context=64, generator_seed=0).eval()
    stream = aligned_stream([(texts(60, 9), 1.0)], tokenizer, seq_len=40, rows=4, seed=0)
    batch = stream.batch(0)
    packed = AlignedObjective()(model, batch)
    total = count = 0.0
    for row in range(4):
        for owner in batch["document_ids"][row].unique().tolist():
            here = batch["document_ids"][row] == owner
            labels = batch["labels"][row][here]
            if owner and (labels >= 0).any():
                with torch.no_grad():
                    logits = model(input_ids=batch["input_ids"][row][here][None]).logits[0]
                total += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum", ignore_index=-100))
                count += int((labels >= 0).sum())
    assert float(packed.total) == pytest.approx(total, rel=1e-5)
    assert float(packed.count) == count


@pytest.mark.parametrize("config", [BertConfig, RobertaConfig])
def test_equation_of_longer_positions(config) -> None:
    made = config(max_position_embeddings=66, pad_token_id=1)
    offset = 2 if config is RobertaConfig else 0
    longer = lengthen_positions(made, 128)
    assert longer.max_position_embeddings == 128 + offset
    assert made.max_position_embeddings == 66
    assert lengthen_positions(made, 8).max_position_embeddings == 66


def test_oracle_the_run_reads_threads_and_leaves_a_longer_encoder(sobert_fields: Fields, tmp_path: Path) -> None:
    result = execute(recipe_of(sobert_fields), tmp_path / "run")
    about = json.loads((tmp_path / "run" / "threads.json").read_text())
    assert about["posts"] == 2700
    assert about["threads"] == 900
    assert about["orphans"] == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "threads.jsonl").read_text().splitlines()]
    members = [post for line in lines for post in line["posts"]]
    assert sorted([*members, *about["dropped"]], key=int) == [str(n) for n in range(2700)]
    tokenizer = AutoTokenizer.from_pretrained(sobert_fields["model"])
    for line in lines:
        size = len(tokenizer(line["text"], add_special_tokens=False)["input_ids"])
        assert size <= 94 + 2 * len(line["posts"]) or len(line["posts"]) == 1
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "run" / "model")
    assert model.config.max_position_embeddings == 96
    assert np.isfinite(result.metrics["context/96"])


def test_oracle_the_plan_says_what_is_spent(sobert_fields: Fields, tmp_path: Path) -> None:
    execute(recipe_of(sobert_fields, vocab="keep"), tmp_path / "run")
    about = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert about["plan"]["tokens"] == about["spent"]["tokens"] == 150 * 384
    assert about["spent"]["flops"] == pytest.approx(about["plan"]["flops"], rel=0.15)
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "run" / "model")
    attention = Shape(1, 16, 96).flops_per_token
    positions = 96 * 16 + 2 * 16  # tables of positions and of segments
    params = sum(p.numel() for p in model.parameters()) - positions
    assert model.config.tie_word_embeddings
    assert about["plan"]["flops"] == pytest.approx(150 * 384 * (6 * params + attention))


def test_learns_its_language(sobert_fields: Fields, tmp_path: Path) -> None:
    few, many = (
        execute(
            recipe_of(sobert_fields, vocab="keep", plan=None, optim={"lr": 1e-2}, budget={"steps": steps}),
            tmp_path / str(steps),
        ).metrics["context/96"]
        for steps in (1, 150)
    )
    assert many < few - 0.5


def test_property_transplanted_weights_keep_all_but_the_positions(sobert_fields: Fields, tmp_path: Path) -> None:
    changes = {"init": "transplant", "vocab_size": 300, "budget": {"steps": 1}, "optim": {"lr": 1e-9}, "plan": None}
    execute(recipe_of(sobert_fields, **changes), tmp_path / "run")
    start = AutoModelForMaskedLM.from_pretrained(sobert_fields["model"]).state_dict()
    end = AutoModelForMaskedLM.from_pretrained(tmp_path / "run" / "model").state_dict()
    name = "bert.encoder.layer.0.attention.self.query.weight"
    assert torch.allclose(start[name], end[name], atol=1e-6)
    assert end["bert.embeddings.position_embeddings.weight"].shape[0] == 96


def test_property_code_is_stripped_where_asked(sobert_fields: Fields, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in Path(sobert_fields["domain"]).read_text().splitlines()]
    path = tmp_path / "code.jsonl"
    path.write_text("".join(json.dumps({**row, "text": f"{row['text']}\n```\nx = 1\n```\n"}) + "\n" for row in rows))
    changes = {"domain": str(path), "code": "strip", "threads": None, "plan": None, "budget": {"steps": 1}}
    execute(recipe_of(sobert_fields, **changes, vocab="keep"), tmp_path / "run")
    assert "x = 1" not in (tmp_path / "run" / "threads.jsonl").read_text()


def test_property_tags_are_warned_of(sobert_fields: Fields, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in Path(sobert_fields["domain"]).read_text().splitlines()]
    path = tmp_path / "tags.jsonl"
    path.write_text("".join(json.dumps({**row, "text": f"<p>{row['text']}</p>"}) + "\n" for row in rows))
    result = execute(recipe_of(sobert_fields, domain=str(path), plan=None, budget={"steps": 1}), tmp_path / "run")
    assert result.notes["warning/html"].startswith("100% of the posts hold HTML tags")


def test_property_posts_that_are_lost_to_a_short_context_are_warned_of(sobert_fields: Fields, tmp_path: Path) -> None:
    changes = {"plan": None, "vocab": "keep", "budget": {"steps": 1}}
    short = execute(recipe_of(sobert_fields, **changes, context=64), tmp_path / "short")
    about = json.loads((tmp_path / "short" / "threads.json").read_text())
    assert short.notes["warning/dropped"].startswith(f"{len(about['dropped'])} of 2700 posts did not fit")
    long = execute(recipe_of(sobert_fields, **changes, context=160, batch_tokens=640), tmp_path / "long")
    assert "warning/dropped" not in long.notes


def test_property_roberta_counts_positions_from_its_padding_id() -> None:
    read: list[torch.Tensor] = []
    config = RobertaConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, pad_token_id=1
    )
    model = RobertaForMaskedLM(config)
    model.roberta.embeddings.position_embeddings.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    ids = torch.tensor([[3, 4, 5, 6]])
    batch = {"input_ids": ids, "labels": ids, "document_ids": torch.tensor([[1, 1, 2, 2]])}
    AlignedObjective()(model, {**batch, "position_ids": torch.tensor([[0, 1, 0, 1]])})
    assert read[0].tolist() == [[2, 3, 2, 3]]


def test_rejects_what_cannot_be(sobert_fields: Fields, tiny_causal: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="init 'keep' would keep the start's positions"):
        recipe_of(sobert_fields, init="keep", vocab="keep")
    with pytest.raises(ModelError, match="this method trains encoders"):
        execute(recipe_of(sobert_fields, model=str(tiny_causal)), tmp_path / "a")
    with pytest.raises(ModelError, match="less than one row of 512"):
        execute(recipe_of(sobert_fields, context=512), tmp_path / "b")
    with pytest.raises(ValueError, match="too few to train them"):
        execute(recipe_of(sobert_fields, budget={"steps": 20}), tmp_path / "c")
