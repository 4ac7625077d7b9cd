"""The family of pretraining: streams, held-out hygiene, shared probes, what is saved and counted."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.conftest import sentences
from torch import Tensor, nn

from headwater.core.fit import FitSettings
from headwater.core.leak import TestLeak
from headwater.core.objective import Loss
from headwater.core.optim import OptimSpec
from headwater.core.recipe import RecipeError
from headwater.core.run import Run, execute
from headwater.modalities.models import ModelError
from headwater.modalities.text.corruption import Corruption, SpanCorruption, SuffixCorruption
from headwater.modalities.text.docs import CorpusError, Document
from headwater.modalities.text.objectives import CausalObjective
from headwater.modalities.text.packing import PackedBlocks, tokenize_documents
from headwater.modalities.text.tiny import tiny_llama
from headwater.modalities.text.tokenizers import train_bpe
from headwater.pretrain.base import CollatedStream, PretrainParts, TextPretraining, with_rows
from headwater.pretrain.probes import TextProbe, TextProbes, measured_loss, probe_masks
from headwater.pretrain.text import open_text

Fields = dict[str, Any]


def next_token(features: Any) -> dict[str, Tensor]:
    """A collator without draws."""
    ids = torch.stack([torch.as_tensor(feature["input_ids"]) for feature in features])
    return {"input_ids": ids, "labels": ids.clone()}


def asked_left_to_right(ids: np.ndarray, mask: np.ndarray, corruption: Corruption) -> dict[str, Tensor]:
    """A causal model's format: what is taken out is predicted from what stands before it."""
    return {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(np.where(mask, ids, -100))}


class Headed(nn.Module):
    """Next-token prediction with a weight of its own."""

    unit = "nats/token"

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Loss:
        loss = CausalObjective()(model, batch)
        return Loss(loss.total * self.scale.exp().squeeze(), loss.count)


class NextToken(TextPretraining):
    """The smallest method of the family."""

    id: ClassVar[str] = "next_token"

    headed: bool = False

    def parts(self, run: Run) -> PretrainParts:
        text = open_text(self, run)
        with pytest.raises(TestLeak, match="the test set"):
            len(text.test)  # type: ignore[arg-type]
        objective: Any = Headed() if self.headed else CausalObjective()
        return text.parts(
            objective,
            next_token,
            asked_left_to_right,
            usage={"objective": "next token"},
            positions=lambda batch: batch["input_ids"].numel(),
        )


@pytest.fixture(scope="module")
def fields(pretrain_fields: Fields) -> Fields:
    return {**pretrain_fields, "model": {**pretrain_fields["model"], "kind": "llama"}}


@pytest.fixture(scope="module")
def finished(fields: Fields, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    directory = tmp_path_factory.mktemp("next") / "run"
    return directory, execute(NextToken(**fields, headed=True), directory).metrics


# -- rows and streams


def test_equation_with_rows_numbers_every_epoch() -> None:
    dataset = with_rows([{"input_ids": [1]}, {"input_ids": [2]}], epochs=2)
    assert len(dataset) == 4
    assert [dataset[i] for i in (0, 3)] == [{"input_ids": [1], "row": 0}, {"input_ids": [2], "row": 3}]
    with pytest.raises(IndexError, match="position 4 is outside"):
        dataset[4]
    with pytest.raises(ValueError, match="epochs must be at least 1; got 0"):
        with_rows([], epochs=0)


def test_property_a_stream_is_read_by_number() -> None:
    data = [{"input_ids": [i, i]} for i in range(20)]
    stream = CollatedStream(data, next_token, rows=4, tokens_per_row=2, fingerprint="x")
    assert stream.batch(2)["input_ids"][:, 0].tolist() == [8, 9, 10, 11]
    assert stream.batch(2, 1, 3)["input_ids"][:, 0].tolist() == [9, 10]
    for wrong in ((-1, 0, 4), (0, 3, 2), (0, 0, 5)):
        with pytest.raises(ValueError, match="need step >= 0"):
            stream.batch(*wrong)
    with pytest.raises(ValueError, match="rows must be at least 1; got 0"):
        CollatedStream(data, next_token, rows=0, tokens_per_row=2, fingerprint="x")


# -- hygiene


def test_property_held_out_text_is_not_trained_on(fields: Fields, tmp_path: Path) -> None:
    texts = sentences("general", 120)
    # Copies of documents under other ids: those whose twin is held out must leave the training text.
    rows = [{"id": f"a{i}", "text": text} for i, text in enumerate(texts)]
    rows += [{"id": f"b{i}", "text": text.upper()} for i, text in enumerate(texts)]
    path = tmp_path / "twins.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    recipe = NextToken(**{**fields, "data": {"name": str(path)}})
    with Run(tmp_path / "run", recipe) as run:
        text = open_text(recipe, run)
        trained = text.tokenizer.decode(text.train.store.tokens, skip_special_tokens=True).lower()
        held = [text.tokenizer.decode(row[:20], skip_special_tokens=True).lower() for row in text.valid]
    assert len(held) > 10
    assert not [piece for piece in held if piece.strip() in trained]


def test_property_the_split_does_not_depend_on_the_seed(fields: Fields, tmp_path: Path) -> None:
    found = []
    for seed in (0, 1):
        recipe = NextToken(**fields, seed=seed)
        with Run(tmp_path / str(seed), recipe) as run:
            text = open_text(recipe, run)
            found.append((text.valid, text.train.tokens([0])))
    assert np.array_equal(found[0][0], found[1][0])
    assert not np.array_equal(found[0][1], found[1][1])


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"batch_tokens": 16}, ModelError, "is less than one row of seq_length 32"),
        ({"seq_length": 30_000, "batch_tokens": 30_000}, CorpusError, "less than one window of seq_length 30000"),
    ],
)
def test_rejects_what_cannot_work(
    fields: Fields, tmp_path: Path, changes: Fields, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        execute(NextToken(**{**fields, **changes}), tmp_path / "a")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"eval_at": [0.5, 0.2]}, "must rise within"),
        ({"budget": {}}, "give one of tokens"),
        ({"probe_steps": 0}, "probe_steps"),
        (
            {"probes": [{"name": "a", "corruption": {"kind": "suffix", "rate": 0.5}}] * 2},
            "two probes have one name",
        ),
        ({"probes": [{"name": "A b", "corruption": {"kind": "suffix", "rate": 0.5}}]}, "name"),
        ({"model": {"kind": "gru"}}, "model"),
    ],
)
def test_rejects_when_built(fields: Fields, changes: Fields, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        NextToken(**{**fields, **changes})


# -- what is measured


def test_equation_loss_over_batches_of_different_sizes() -> None:
    class Twos(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

    def objective(model: nn.Module, batch: Mapping[str, Tensor]) -> Loss:
        assert not model.training
        return Loss(batch["x"].sum(), len(batch["x"]))

    model = Twos().train()
    assert measured_loss(model, objective, [{"x": torch.ones(3)}, {"x": torch.tensor([5.0])}]) == (8.0, 4.0)  # type: ignore[arg-type]
    assert model.training
    with pytest.raises(ValueError, match="1 held-out batches hold nothing to predict"):
        measured_loss(model, objective, [{"x": torch.ones(0)}])  # type: ignore[arg-type]


def test_property_probe_masks_depend_on_the_row_alone() -> None:
    probe = TextProbe(name="infill", corruption=SpanCorruption(mean_span=3, rate=0.15))
    rows = np.arange(-1, -8, -1)
    whole = probe_masks(probe, rows, 40, seed=0)
    assert np.array_equal(probe_masks(probe, rows[3:5], 40, seed=0), whole[3:5])
    assert (whole.sum(axis=1) == 6).all()
    assert not np.array_equal(probe_masks(probe, rows, 40, seed=1), whole)


def make_probes(tmp_path: Path, steps: int) -> tuple[TextProbes, nn.Module]:
    documents = [Document(str(i), text, {}) for i, text in enumerate(sentences("general", 40))]
    tokenizer = train_bpe((document.text for document in documents), 320)
    store = tokenize_documents(documents, tokenizer)
    windows = store.tokens[: 20 * 24].reshape(20, 24).astype(np.int64)
    probes = TextProbes(
        CausalObjective(),  # type: ignore[arg-type]
        asked_left_to_right,
        (TextProbe(name="continuation", corruption=SuffixCorruption(rate=0.5)),),
        PackedBlocks(store, 24, 0),
        windows[:10],
        windows[10:],
        tokenizer,
        steps,
        OptimSpec(lr=1e-2),
        FitSettings(precision="fp32"),
        0,
        tmp_path,
    )
    return probes, tiny_llama(tokenizer, 32, 1, 2, 64, generator_seed=0)


def test_oracle_continuation_is_the_likelihood_of_the_second_half(tmp_path: Path) -> None:
    probes, model = make_probes(tmp_path, 1)
    metrics = probes(model)
    nats = size = 0.0
    for window in probes.test:
        with torch.no_grad():
            logp = model(input_ids=torch.from_numpy(window)[None]).logits[0].log_softmax(-1)
        nats -= sum(float(logp[i - 1, window[i]]) for i in range(12, 24))
        size += len(probes.tokenizer.decode(window[12:], skip_special_tokens=True).encode())
    assert metrics["probe/continuation"] == pytest.approx(nats / 120, rel=1e-5)  # float32 sums of 120 terms
    assert metrics["probe/continuation_bpb"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)


def test_learns_the_format_and_leaves_the_model_alone(tmp_path: Path) -> None:
    probes, model = make_probes(tmp_path, 20)
    before = copy.deepcopy(model.state_dict())
    metrics = probes(model)
    # From chance, ln 320 = 5.8, twenty steps on 35 words take off more than half a nat.
    assert metrics["adapted/continuation"] < metrics["probe/continuation"] - 0.5
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# -- the run


def test_equation_tokens_are_counted(finished: tuple[Path, dict[str, float]]) -> None:
    _, metrics = finished
    assert metrics["tokens_source"] == metrics["tokens_processed"] == 6 * 256
    assert metrics["tokens_target"] == 6 * 256  # labels stand on every token


def test_property_what_is_left_behind(finished: tuple[Path, dict[str, float]]) -> None:
    directory, metrics = finished
    assert {"val/loss", "probe/infill", "adapted/infill_bpb", "valid/continuation_bpb"} <= metrics.keys()
    assert json.loads((directory / "model" / "pretraining.json").read_text()) == {"objective": "next token"}
    heads = load_file(directory / "heads.safetensors")
    assert heads["scale"].shape == (1,)
    assert heads["scale"] != 1.0, "the objective's own weight was trained"
    readme = (directory / "model" / "README.md").read_text()
    assert "AutoModelForCausalLM" in readme
    assert "heads.safetensors" in readme
    series = json.loads((directory / "trajectory.json").read_text())["series"]["val/loss"]
    assert [tokens for tokens, _ in series] == [0, 3 * 256, 6 * 256]


def test_property_adaptation_is_not_charged_to_the_budget(fields: Fields, tmp_path: Path) -> None:
    cost = execute(NextToken(**fields), tmp_path / "a").cost
    assert (cost["steps"], cost["tokens"]) == (6, 6 * 256)
