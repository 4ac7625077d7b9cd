"""Loss by position and recall from afar."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoTokenizer, LlamaForCausalLM

from headwater.modalities.text import context
from headwater.modalities.text.context import (
    RecallStream,
    RecallTask,
    context_loss,
    key_value_recall,
    passkey,
    passkey_accuracy,
    recall_hits,
)
from headwater.modalities.text.objectives import CausalObjective, PackedObjective
from headwater.modalities.text.tiny import tiny_llama

TASK = RecallTask(pairs=3, keys=4, values=5, fillers=6, queries=2)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny_llama(TASK.vocab, hidden=16, layers=2, heads=2, mlp=32, context=64, generator_seed=0)


def test_oracle_context_loss_is_the_loss_position_by_position(
    model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = np.random.default_rng(0).integers(30, size=(3, 40))
    monkeypatch.setattr(context, "CHUNK", 7)  # so that pieces and their cache are tried on few tokens
    table = context_loss(model, ids, [2, 10, 33])
    tensor = torch.from_numpy(ids)
    with torch.no_grad():
        each = F.cross_entropy(model(input_ids=tensor).logits[:, :-1].transpose(1, 2), tensor[:, 1:], reduction="none")
    # Column p - 1 holds the token with p tokens before it.
    expected = [each[:, :1].mean(), each[:, 1:9].mean(), each[:, 9:32].mean()]
    np.testing.assert_allclose(table["nats"], [float(e) for e in expected], rtol=1e-5)
    assert table["tokens"].tolist() == [3, 24, 69]
    assert table["after"].tolist() == [1, 2, 10]
    assert table["context"].tolist() == [1, 5.5, 21]


@pytest.mark.parametrize(
    ("shape", "lengths", "words"),
    [
        ((0, 9), [4], "at least 1, time"),
        ((2, 9), [4, 4], "lengths must rise within 2 to 9"),
        ((2, 9), [10], "lengths must rise within 2 to 9"),
        ((2, 9), [], "lengths must rise"),
    ],
)
def test_rejects_lengths_and_shapes(model: LlamaForCausalLM, shape: Any, lengths: list[int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        context_loss(model, np.zeros(shape, np.int64), lengths)


def test_property_every_query_has_its_one_answer_in_the_body() -> None:
    ids, labels = key_value_recall(TASK, np.arange(200), 24, seed=1)
    assert TASK.vocab == 6 + 4 * 5 + 4 + 5
    for row, wanted in zip(ids, labels, strict=True):
        body, tail = row[:20], row[20:].reshape(2, 2)
        pairs = dict(divmod(token - 6, 5) for token in body if token >= 6)
        assert len(pairs) == (body >= 6).sum() == 3, "each pair once, each with another key"
        assert set(pairs) <= set(range(4))
        # Keys that are asked for stand at 26 to 29, values from 30.
        assert all(pairs[key - 26] == value - 30 for key, value in tail)
        assert np.flatnonzero(wanted != -100).tolist() == [21, 23]
        assert wanted[[21, 23]].tolist() == tail[:, 1].tolist()


def test_property_keys_values_and_places_are_all_drawn() -> None:
    ids, _ = key_value_recall(TASK, np.arange(400), 24, seed=1)
    assert set(np.unique(ids)) == set(range(TASK.vocab))
    assert set(np.flatnonzero((ids >= 6).any(axis=0))) == set(range(24))


def test_property_a_row_is_the_same_in_any_batch_and_another_with_another_seed() -> None:
    whole, _ = key_value_recall(TASK, [5, 9, 2], 30, seed=1)
    assert np.array_equal(key_value_recall(TASK, [9], 30, seed=1)[0][0], whole[1])
    assert not np.array_equal(key_value_recall(TASK, [9], 30, seed=2)[0][0], whole[1])


def test_property_a_stream_mixes_short_sequences_that_do_not_see_each_other(model: LlamaForCausalLM) -> None:
    stream = RecallStream(TASK, 30, 4, seed=1, short=15)
    batch = stream.batch(3)
    assert torch.equal(batch["row"], torch.arange(12, 16))
    assert batch["position_ids"][0].tolist() == [*range(15), *range(15)]
    assert batch["position_ids"][1].tolist() == list(range(30))
    assert batch["document_ids"].sum(dim=1).tolist() == [15, 0, 15, 0]
    assert (batch["labels"] != -100).sum(dim=1).tolist() == [4, 2, 4, 2]
    part = stream.batch(3, 1, 3)
    assert all(torch.equal(part[name], batch[name][1:3]) for name in batch)
    # The loss of a row is the sum of the losses of its sequences, each alone.
    row = {name: values[:1] for name, values in batch.items()}
    alone = {name: values[0].view(2, 15) for name, values in batch.items() if name in ("input_ids", "labels")}
    with torch.no_grad():
        torch.testing.assert_close(PackedObjective()(model, row).total, CausalObjective()(model, alone).total)
    with pytest.raises(ValueError, match="short sequences must fill a row of 30; got 7"):
        RecallStream(TASK, 30, 4, seed=1, short=7)


def test_degenerate_a_sequence_without_filler_and_one_without_rows(model: LlamaForCausalLM) -> None:
    ids, _ = key_value_recall(TASK, np.arange(50), TASK.shortest, seed=0)
    assert ids.min() >= 6
    assert recall_hits(model, TASK, [], 24, seed=0).shape == (0,)
    with pytest.raises(ValueError, match=r"length must be at least 7 for RecallTask\(pairs=3.*; got 6"):
        key_value_recall(TASK, [0], 6, seed=0)
    with pytest.raises(ValueError, match=r"need 0 < pairs <= keys"):
        RecallTask(pairs=17)


class _Answers(torch.nn.Module):
    """Knows the task: looks the pair up, and gives the next value where the key is 0."""

    def __init__(self) -> None:
        super().__init__()
        self.device = torch.device("cpu")

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        logits = torch.zeros(*input_ids.shape, TASK.vocab)
        for b, row in enumerate(input_ids.tolist()):
            pairs = dict(divmod(token - 6, 5) for token in row if 6 <= token < 26)
            for p in range(1, len(row)):
                if 26 <= row[p] < 30:
                    logits[b, p, 30 + (pairs[row[p] - 26] + (row[p] == 26)) % 5] = 1
        return type("Output", (), {"logits": logits})


def test_oracle_hits_are_the_share_of_queries_answered() -> None:
    rows = np.arange(40)
    ids, _ = key_value_recall(TASK, rows, 24, seed=3)
    model: Any = _Answers()
    expected = (ids[:, 20::2] != 26).mean(axis=1)
    assert recall_hits(model, TASK, rows, 24, seed=3, batch_tokens=24 * 7).tolist() == expected.tolist()
    assert 0 < expected.mean() < 1


@pytest.mark.parametrize("depth", [0.0, 0.37, 1.0])
def test_property_a_passkey_prompt_has_the_length_and_the_number_at_its_depth(tiny_causal: Path, depth: float) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_causal)
    prompt = passkey(tokenizer, 700, depth, seed=4)
    text = tokenizer.decode(prompt.input_ids)
    assert len(prompt.input_ids) == 700
    assert text.endswith("The pass key is")
    assert text.count(prompt.key) == 2
    assert tokenizer.decode(prompt.answer) == f" {prompt.key}"
    room = text.index("What is the pass key?") - len(" The pass key is 12345. Remember it. 12345 is the pass key.")
    assert text.index("The pass key is") == pytest.approx(depth * room, abs=25)
    assert passkey(tokenizer, 700, depth, seed=5).key != prompt.key


def test_rejects_a_prompt_without_room(tiny_causal: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_causal)
    with pytest.raises(ValueError, match="length must be at least"):
        passkey(tokenizer, 10, 0.5, seed=0)
    with pytest.raises(ValueError, match=r"depth must be in \[0, 1\]; got 2"):
        passkey(tokenizer, 700, 2, seed=0)


def test_oracle_passkey_accuracy_is_greedy_decoding(tiny_causal: Path) -> None:
    from transformers import AutoModelForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(tiny_causal)
    reader = AutoModelForCausalLM.from_pretrained(tiny_causal)
    prompts = [passkey(tokenizer, 300, 0.5, seed) for seed in range(3)]
    assert passkey_accuracy(reader, prompts) == 0
    # What the model decodes by itself is right by definition.
    for prompt in prompts[:2]:
        ids = torch.from_numpy(prompt.input_ids)[None]
        with torch.no_grad():
            for _ in range(3):
                ids = torch.cat([ids, reader(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
        prompt.answer.resize(3, refcheck=False)
        prompt.answer[:] = ids[0, -3:].numpy()
    assert passkey_accuracy(reader, prompts) == pytest.approx(2 / 3)
    assert np.isnan(passkey_accuracy(reader, []))
