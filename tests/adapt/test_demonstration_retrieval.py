"""Demonstrations summed out: against one alone, brute force, and the reader without any; and the recipe around it."""

from __future__ import annotations

import itertools
import json
import logging
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from headwater.adapt.demonstration_retrieval import DemonstrationRetrieval, retrieval_metrics
from headwater.adapt.demonstrations import DemonstrationBank, Shown, majority_answers, retrieval_log_weights
from headwater.adapt.marginalised import (
    MarginalisedLM,
    MarginalObjective,
    MixDemonstrations,
    Mode,
    marginal_log_likelihood,
)
from headwater.claims.demonstration_retrieval import CLAIM
from headwater.core.budget import Budget
from headwater.core.claim import judge
from headwater.core.fit import FitSettings, Phase, fit
from headwater.core.optim import OptimSpec
from headwater.core.recipe import load_recipe
from headwater.core.run import Result, execute
from headwater.modalities.text.docs import CorpusError
from headwater.modalities.text.pairs import PairModel, Pairs, pad_pairs
from headwater.modalities.text.retrieval import DenseRetriever, LexicalRetriever
from headwater.modalities.text.tiny import tiny_llama, tiny_t5
from headwater.modalities.text.tokenizers import word_tokenizer

WORDS = [f"w{n}" for n in range(12)]
PAIRS = Pairs(["w0 w1 ?", "w2 ?", "w3 w4 w5 ?", "w6 w0 ?"], ["A", "B A", "A", "B"])


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return word_tokenizer([" ".join([*WORDS, "A", "B", "C", "D", "?"])])


def reader(tokenizer: PreTrainedTokenizerFast, kind: str = "causal", max_source: int = 24) -> PairModel:
    if kind == "causal":
        model = tiny_llama(tokenizer, 32, 1, 2, 32, context=40, generator_seed=0)
    else:
        model = tiny_t5(tokenizer, 32, 1, 2, 32, generator_seed=0)
    with torch.no_grad():  # fresh weights say nearly the same of everything
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter *= 8
    return PairModel(model, tokenizer, kind, max_source, 3)  # type: ignore[arg-type]


def shown(texts: list[list[str]], weights: list[list[float]] | None = None) -> Shown:
    even = [[1 / len(row)] * len(row) for row in texts]
    return Shown(texts, [["A"] * len(row) for row in texts], np.log(np.array(weights or even, np.float32)))


THREE = shown(
    [["w7 ? A", "w8 w9 ? B", "w1 ? A"], ["w2 ? B", "w5 ? A", "w6 w7 w8 ? B"]] * 2,
    [[0.5, 0.3, 0.2], [0.1, 0.6, 0.3]] * 2,
)
kinds = pytest.mark.parametrize("kind", ["causal", "seq2seq"])


def loss_of(lm: MarginalisedLM, pairs: Pairs, by: Shown) -> tuple[torch.Tensor, int]:
    stream = lm.stream(pairs, by, rows=len(pairs), seed=0)
    found = lm.objective(lm.reader.model, stream.batch(0))
    return found.total, int(found.count)


# -- the sum over demonstrations


def test_equation_two_demonstrations_by_hand() -> None:
    # Two tokens; the first demonstration gives them 1/2 and 1/4, the second 1/10 and 1. Weights 3/4 and 1/4.
    log_probs = torch.tensor([[[0.5, 0.25], [0.1, 1.0]]]).log()
    weights, mask = torch.tensor([[0.75, 0.25]]).log(), torch.ones(1, 2, dtype=torch.bool)
    sequence = marginal_log_likelihood(log_probs, mask, weights, "sequence").exp()
    assert sequence.item() == pytest.approx(0.75 * 0.125 + 0.25 * 0.1)
    token = marginal_log_likelihood(log_probs, mask, weights, "token").exp()
    assert token.item() == pytest.approx((0.75 * 0.5 + 0.25 * 0.1) * (0.75 * 0.25 + 0.25 * 1.0))
    for mode in ("sequence", "token"):  # a token that is padding does not count, whatever weights sum to
        first = marginal_log_likelihood(log_probs, torch.tensor([[True, False]]), weights + 1, mode).exp()
        assert first.item() == pytest.approx(np.e * (0.75 * 0.5 + 0.25 * 0.1))


@pytest.mark.parametrize("mode", ["sequence", "token"])
def test_oracle_brute_force_over_five_words_sums_to_one(mode: Mode) -> None:
    generator = torch.Generator().manual_seed(0)
    K, length, vocabulary = 3, 3, 5
    # A distribution for each demonstration and each prefix of an answer.
    table = {
        prefix: torch.randn(K, vocabulary, generator=generator, dtype=torch.float64).log_softmax(-1)
        for n in range(length)
        for prefix in itertools.product(range(vocabulary), repeat=n)
    }
    weights = torch.randn(1, K, generator=generator, dtype=torch.float64).log_softmax(-1)
    total = 0.0
    for answer in itertools.product(range(vocabulary), repeat=length):
        steps = torch.stack([table[answer[:t]][:, answer[t]] for t in range(length)], dim=1)
        p, w = steps.exp(), weights[0].exp()
        by_hand = (w @ p.prod(1)) if mode == "sequence" else (w @ p).prod()
        found = marginal_log_likelihood(steps[None], torch.ones(1, length, dtype=torch.bool), weights, mode).exp()
        assert found.item() == pytest.approx(by_hand.item(), rel=1e-12)
        total += found.item()
    assert total == pytest.approx(1.0, rel=1e-12)


@kinds
@pytest.mark.parametrize("mode", ["sequence", "token", "concat"])
def test_oracle_one_demonstration_is_ordinary_training(
    tokenizer: PreTrainedTokenizerFast, kind: str, mode: Mode
) -> None:
    lm = MarginalisedLM(reader(tokenizer, kind), mode)
    one = shown([["w7 ? A"], ["w8 ? B"], ["w9 ? A"], ["w10 w11 ? B"]])
    total, count = loss_of(lm, PAIRS, one)
    joined = Pairs([f"{t[0]} {s}" for t, s in zip(one.texts, PAIRS.sources, strict=True)], PAIRS.targets)
    plain = lm.reader.objective(lm.reader.model, pad_pairs(lm.reader.encode(joined), lm.reader.kind, lm.reader.pad))
    assert total.item() == pytest.approx(plain.total.item(), rel=1e-5)
    assert count == int(plain.count)


@kinds
@pytest.mark.parametrize("mode", ["sequence", "token"])
def test_property_the_same_demonstration_three_times_is_one(
    tokenizer: PreTrainedTokenizerFast, kind: str, mode: Mode
) -> None:
    lm = MarginalisedLM(reader(tokenizer, kind), mode)
    one, _ = loss_of(lm, PAIRS, shown([["w7 ? A"]] * 4))
    three, _ = loss_of(lm, PAIRS, shown([["w7 ? A"] * 3] * 4))
    assert three.item() == pytest.approx(one.item(), rel=1e-5)


@kinds
def test_property_modes_agree_on_answers_of_one_token_and_only_there(
    tokenizer: PreTrainedTokenizerFast, kind: str
) -> None:
    model = reader(tokenizer, kind)
    model.max_target = 1  # the letter, and no EOS
    short = Pairs(PAIRS.sources, ["A", "B", "A", "B"])
    found = [MarginalisedLM(model, mode).nats(short, THREE) for mode in ("sequence", "token")]
    np.testing.assert_allclose(*found, rtol=1e-5)
    model.max_target = 3
    whole = [MarginalisedLM(model, mode).nats(PAIRS, THREE) for mode in ("sequence", "token")]
    assert np.abs(whole[0] - whole[1]).max() > 1e-3


def test_property_the_order_of_demonstrations_does_not_matter_when_they_are_summed_out(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    turned = Shown([row[::-1] for row in THREE.texts], THREE.targets, THREE.log_weights[:, ::-1].copy())
    for mode in ("sequence", "token", "concat"):
        lm = MarginalisedLM(reader(tokenizer), mode)
        change = np.abs(lm.nats(PAIRS, turned) - lm.nats(PAIRS, THREE)).max()
        assert (change > 1e-3) == (mode == "concat")


def test_property_one_that_is_not_there_has_no_effect_and_no_gradient(tokenizer: PreTrainedTokenizerFast) -> None:
    lm = MarginalisedLM(reader(tokenizer))
    two = Shown([row[:2] for row in THREE.texts], THREE.targets, np.log(np.full((4, 2), 0.5, np.float32)))
    more = Shown(
        [[*row, ""] for row in two.texts],
        THREE.targets,
        np.concatenate([two.log_weights, np.full((4, 1), -np.inf, np.float32)], 1),
    )
    gradients = []
    for by in (two, more):
        lm.reader.model.zero_grad()
        total, _ = loss_of(lm, PAIRS, by)
        total.backward()
        gradients.append(lm.reader.model.get_input_embeddings().weight.grad.clone())
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


@kinds
def test_property_micro_batches_add_up(tokenizer: PreTrainedTokenizerFast, kind: str) -> None:
    lm = MarginalisedLM(reader(tokenizer, kind))
    stream = lm.stream(PAIRS, THREE, rows=4, seed=3)
    whole = lm.objective(lm.reader.model, stream.batch(2))
    parts = [lm.objective(lm.reader.model, stream.batch(2, *span)) for span in ((0, 1), (1, 4))]
    assert sum(part.total.item() for part in parts) == pytest.approx(whole.total.item(), rel=1e-5)
    assert sum(int(part.count) for part in parts) == int(whole.count)
    assert stream.batch(0)["input_ids"].shape[:2] == (4, 3)


@kinds
@pytest.mark.parametrize("mode", ["sequence", "token", "concat"])
def test_oracle_without_demonstrations_it_is_the_reader(
    tokenizer: PreTrainedTokenizerFast, kind: str, mode: Mode
) -> None:
    model = reader(tokenizer, kind)
    lm, nothing = MarginalisedLM(model, mode), Shown.nothing(4)
    np.testing.assert_allclose(lm.nats(PAIRS, nothing), model.nats(PAIRS), rtol=1e-4)
    for beams in (1, 2):
        assert lm.answers(PAIRS.sources, nothing, num_beams=beams) == model.answers(PAIRS.sources, num_beams=beams)
    assert lm.answers([], Shown.nothing(0)) == []


def test_oracle_token_answers_are_greedy_under_the_mixture(tokenizer: PreTrainedTokenizerFast) -> None:
    model = reader(tokenizer)
    lm = MarginalisedLM(model, "token")
    encoded, _ = lm.encode(PAIRS.sources, THREE)
    expected = []
    for rows, weights in zip(encoded, np.exp(THREE.log_weights), strict=True):
        written: list[int] = []
        while len(written) < 3 and (not written or written[-1] != tokenizer.eos_token_id):
            with torch.no_grad():
                p = [model.model(torch.tensor([row + written])).logits[0, -1].softmax(-1) for row in rows]
            written.append(int(sum(w * q for w, q in zip(weights, p, strict=True)).argmax()))
        expected.append(tokenizer.decode(written, skip_special_tokens=True).strip())
    assert lm.answers(PAIRS.sources, THREE) == expected
    alone = [
        MarginalisedLM(model, "token").answers([s], shown([[t[0]]]))[0]
        for s, t in zip(PAIRS.sources, THREE.texts, strict=True)
    ]
    assert alone != expected  # so the mixture decides something here


def test_oracle_sequence_answers_are_the_likeliest_of_what_the_rows_write(tokenizer: PreTrainedTokenizerFast) -> None:
    model = reader(tokenizer)
    lm = MarginalisedLM(model)
    decided = 0
    for place, answer in enumerate(lm.answers(PAIRS.sources, THREE)):
        source, texts = PAIRS.sources[place], THREE.texts[place]
        candidates = {model.answers([f"{text} {source}"])[0] for text in texts}
        by = Shown([texts], [["A"] * 3], THREE.log_weights[place : place + 1])
        total = {c: -lm.nats(Pairs([source], [c]), by)[0] * len(model.encode_targets([c])[0]) for c in candidates}
        assert answer == max(total, key=total.__getitem__)
        decided += len(candidates) > 1
    assert decided


def test_property_mixed_beams_stay_together() -> None:
    weights = torch.tensor([[0.9, 0.1], [0.2, 0.8]]).log()
    scores = torch.randn(2 * 2 * 3, 7, generator=torch.Generator().manual_seed(0))
    mixed = MixDemonstrations(weights)(torch.zeros(12, 1), scores).view(2, 2, 3, 7)
    torch.testing.assert_close(mixed[:, 0], mixed[:, 1])
    p = scores.softmax(-1).view(2, 2, 3, 7)
    torch.testing.assert_close(mixed[1, 0, 2].exp(), 0.2 * p[1, 0, 2] + 0.8 * p[1, 1, 2])


@kinds
def test_property_the_demonstration_is_cut_at_its_beginning_and_never_the_question(
    tokenizer: PreTrainedTokenizerFast, kind: str
) -> None:
    model = reader(tokenizer, kind, max_source=8)
    for mode in ("sequence", "concat"):
        by = shown([["w7 w8 w9 w10 w11 ? A"] * (1 + (mode == "concat"))])
        (rows,), _ = MarginalisedLM(model, mode).encode(["w0 w1 w2 ?"], by)
        text = tokenizer.decode(rows[0], skip_special_tokens=True)
        assert text == ("w11 ? A w0 w1 w2 ?" if kind == "causal" else "w10 w11 ? A w0 w1 w2 ?")
        assert rows[0].count(tokenizer.eos_token_id) == (kind == "causal")  # where it stands for BOS


def test_rejects_questions_that_leave_no_room(tokenizer: PreTrainedTokenizerFast) -> None:
    lm = MarginalisedLM(reader(tokenizer, max_source=4))
    with pytest.raises(ValueError, match="fill all 4 tokens of max_source"):
        lm.encode(["w0 w1 w2 w3 ?"], shown([["w7 ? A"]]))


# -- the bank


def test_equation_weights_are_a_softmax_of_scores_over_temperature(caplog: pytest.LogCaptureFixture) -> None:
    weights = np.exp(retrieval_log_weights(np.array([[2.0, 0.0], [1.0, -np.inf]]), 2.0))
    np.testing.assert_allclose(weights, [[np.e / (np.e + 1), 1 / (np.e + 1)], [1, 0]], rtol=1e-6)
    assert "raise the temperature" not in caplog.text
    with caplog.at_level(logging.WARNING):
        retrieval_log_weights(np.array([[300.0, 250.0]] * 4))
    assert "raise the temperature (now 1)" in caplog.text
    with pytest.raises(ValueError, match="temperature must be positive; got 0"):
        retrieval_log_weights(np.zeros((1, 2)), 0)


def test_property_a_question_is_shown_neither_itself_nor_its_group() -> None:
    bank = DemonstrationBank(LexicalRetriever())
    bank.add(Pairs(["w0 w1", "w0 w2", "w0 w3"], ["A", "B", "C"]), groups=["x", "x", "y"])
    for at_random in (None, 5):
        by = bank.show(["W0  w1", "w9"], 3, at_random=at_random)
        assert sorted(by.targets[0]) == ["", "B", "C"]  # the same text in another case is itself
        assert by.texts[0][by.targets[0].index("")] == ""
        assert np.isneginf(by.log_weights[0]).sum() == 1
        assert sorted(by.targets[1]) == ["A", "B", "C"]
        apart = bank.show(["w0 w1"], 3, at_random=at_random, groups=["x"])
        assert sorted(apart.targets[0]) == ["", "", "C"]
    assert bank.show(["w0 w1"], 1, groups=["x"]).texts == [["w0 w3 C\n\n"]]


def test_property_random_demonstrations_follow_seed_and_question_alone() -> None:
    bank = DemonstrationBank(LexicalRetriever())
    bank.add(Pairs([f"w{n}" for n in range(50)], ["A"] * 50))
    one, other = (bank.show(["q", "r"], 5, at_random=seed).texts for seed in (1, 2))
    assert one[0] != one[1]
    assert one != other
    assert bank.show(["r", "q"], 5, at_random=1).texts == [one[1], one[0]]


def test_property_a_saved_bank_shows_the_same(tmp_path: Path) -> None:
    bank = DemonstrationBank(LexicalRetriever())
    bank.add(Pairs(["w0 w1", "w0 w2"], ["A", "B"]))
    bank.save(tmp_path)
    opened = DemonstrationBank(LexicalRetriever.load(tmp_path))
    assert opened.show(["w0 w2"], 1).texts == bank.show(["w0 w2"], 1).texts == [["w0 w1 A\n\n"]]


def test_degenerate_a_bank_of_the_question_alone_shows_nothing() -> None:
    bank = DemonstrationBank(LexicalRetriever())
    bank.add(Pairs(["w0"], ["A"]))
    by = bank.show(["w0"], 1)
    assert by.texts == [[""]]
    assert by.log_weights.tolist() == [[0]]


def test_rejects_a_bank_that_holds_the_test() -> None:
    bank = DemonstrationBank(LexicalRetriever())
    bank.add(Pairs(["w0 w1", "w2"], ["A", "B"]), ["first", "second"])
    bank.check_apart(["w1 w0"], ["third"])
    with pytest.raises(CorpusError, match="holds 1 of the examples it is tested on, the first being 'W0 w1'"):
        bank.check_apart(["W0 w1"])
    with pytest.raises(CorpusError, match="the first being 'second'"):
        bank.check_apart([], ["second"])


def test_equation_majority_and_share_of_same_labels() -> None:
    by = Shown(
        [["x"] * 3] * 3,
        [["A", "B", "B"], ["A", "B", "C"], ["C", "A", ""]],
        np.log([[0.8, 0.1, 0.1], [0.3, 0.4, 0.3], [0.8, 0.1, 0.1]]).astype(np.float32),
    )
    by.log_weights[2, 2] = -np.inf
    assert majority_answers(by) == ["B", "B", "C"]  # by number, then by weight
    found = retrieval_metrics(by, ["B", "C", "A"])
    assert found == {"retrieval/same_label@k": 4 / 8, "retrieval/knn_accuracy": pytest.approx(1 / 3)}


# -- training, and the recipe


def test_learns_to_answer_from_the_bank_what_no_weight_can_hold(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    letters = "ABCD"

    def tasks(n: int) -> tuple[Pairs, Shown]:
        """Each question's answer stands in two of its three demonstrations; it is another one every time."""
        targets, by = [], []
        for _ in range(n):
            right, wrong = rng.permutation(list(letters))[:2]
            targets.append(str(right))
            by.append([str(right), str(right), str(wrong)])
        words = [" ".join(rng.choice(WORDS, 2)) for _ in range(4 * n)]
        sources = [f"{word} ?" for word in words[:n]]
        texts = [[f"{words[n + 3 * i + k]} ? {by[i][k]}" for k in range(3)] for i in range(n)]
        return Pairs(sources, targets), Shown(texts, by, np.log(np.full((n, 3), 1 / 3, np.float32)))

    learn, by = tasks(400)
    test, held = tasks(100)
    model = tiny_llama(tokenizer, 32, 1, 2, 64, context=24, generator_seed=0)
    lm = MarginalisedLM(PairModel(model, tokenizer, "causal", 20, 1))
    stream = lm.stream(learn, by, rows=32, seed=0)
    fit(
        Phase("train", model, stream, lm.objective),
        budget=Budget(steps=80),
        optim=OptimSpec(lr=1e-2),
        seed=0,
        directory=tmp_path,
        settings=FitSettings(precision="fp32", micro_rows=32),
    )
    right = np.mean([a == t for a, t in zip(lm.answers(test.sources, held), test.targets, strict=True)])
    blind = lm.answers(test.sources, Shown.nothing(100))
    assert right > 0.9
    assert np.mean([a == t for a, t in zip(blind, test.targets, strict=True)]) < 0.5


def run(fields: dict[str, object], directory: Path, **changes: object) -> Result:
    return execute(load_recipe({"method": "demonstration_retrieval", **fields, **changes}), directory)


def test_oracle_no_retrieval_is_plain_fine_tuning(text_to_text_fields: dict[str, object], tmp_path: Path) -> None:
    ours = run(text_to_text_fields, tmp_path / "ours", retrieval="none").metrics
    plain = execute(load_recipe({"method": "text_finetuning", **text_to_text_fields}), tmp_path / "plain").metrics
    for name in ("id/accuracy", "id/chrf"):
        assert ours[name] == plain[name]
    assert ours["id/nll"] == pytest.approx(plain["id/nll"], rel=1e-5)
    assert not [name for name in ours if name.startswith("retrieval/")]


def test_property_the_run_leaves_reader_bank_and_the_way_to_use_them(
    text_to_text_fields: dict[str, object], labelled: dict[str, Path], tmp_path: Path
) -> None:
    other = tmp_path / "other.jsonl"
    rows = [{"text": f"note chord {n} key", "label": "note" if n % 2 else "key"} for n in range(20)]
    other.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    result = run(
        text_to_text_fields,
        tmp_path / "run",
        retrieval="lexical",
        k=3,
        bank=[str(labelled["train"]), str(other)],
        meta_train={"tasks": [str(other)], "share": 0.5},
    )
    entries = pd.read_parquet(tmp_path / "run" / "bank" / "entries.parquet")
    assert len(entries) == 96 + 20
    assert json.loads(entries["meta"].iloc[-1]) == {"source": "note chord 19 key", "target": "note"}
    assert result.metrics["cost/labels"] == 96 + 96 + 20 + 20
    assert 0.3 < result.metrics["retrieval/knn_accuracy"] <= 1  # six classes that share a favourite word
    assert 0 < result.metrics["retrieval/same_label@k"] <= 1
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {row["phase"] for row in steps if "loss" in row} <= {"meta", "finetune"}
    readme = (tmp_path / "run" / "model" / "README.md").read_text(encoding="utf-8")
    compile(readme.split("```python\n")[1].split("```")[0], "README.md", "exec")
    assert "bank/entries.parquet" in readme


def test_rejects_a_test_question_in_the_bank_or_in_meta_training(
    text_to_text_fields: dict[str, object], labelled: dict[str, Path], tmp_path: Path
) -> None:
    for place, leak in enumerate(
        ({"bank": [str(labelled["test"])]}, {"meta_train": {"tasks": [str(labelled["test"])]}})
    ):
        with pytest.raises(CorpusError, match="60 of 60 sources are in the test, validation or shifted test sets"):
            run(text_to_text_fields, tmp_path / str(place), retrieval="lexical", **leak)


def test_property_the_retriever_of_a_bank_may_be_any_encoder() -> None:
    bank = DemonstrationBank(DenseRetriever(lambda of: np.array([[len(text), 1.0] for text in of], np.float32)))
    bank.add(Pairs(["w0", "w0 w1 w2"], ["A", "B"]))
    assert bank.show(["w5"], 1).targets == [["B"]]


@pytest.mark.slow  # the contract suite holds the claim's form
def test_learns_claim_runs_at_smoke_scale(tmp_path: Path) -> None:
    verdict = judge(CLAIM, "smoke", {100: CLAIM.measure("smoke", 100, tmp_path / "claim")})
    assert [part["verdict"] for part in verdict["parts"]] == ["inconclusive"] * 5
    baselines = {part["baseline"]: part["per_seed"][0]["baseline"] for part in verdict["parts"]}
    assert 0.25 < baselines["knn"] <= 1
    assert all(0 <= value <= 1 for value in baselines.values())


def test_rejects_a_field_out_of_range(text_to_text_fields: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="k"):
        DemonstrationRetrieval(**{**text_to_text_fields, "k": 33})  # type: ignore[arg-type]
    assert MarginalObjective().unit == "nats/token"
