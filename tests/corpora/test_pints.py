"""1.5-Pints: vocabulary, packing, mixture, features, the review, and the claim's own arithmetic."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.conftest import sentences
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from headwater.claims.pints import tokens_to_target
from headwater.core.recipe import CorpusRef
from headwater.corpora.expository import Describe, expository_features
from headwater.corpora.mixture import Source, mixture_plan
from headwater.corpora.pints import pack, pints_config
from headwater.corpora.review import ReviewQueue
from headwater.corpora.vocabulary import (
    CHAT_TOKENS,
    check_vocabulary,
    compare_tokenizers,
    extend_tokenizer,
    resize_model,
    vocabulary_size,
)
from headwater.modalities.models import ModelError
from headwater.modalities.text.curate import curate
from headwater.modalities.text.docs import CorpusError, Document
from headwater.modalities.text.document_store import stored_corpus
from headwater.modalities.text.packing import PackedBlocks, TokenStore
from headwater.modalities.text.tiny import tiny_llama
from headwater.modalities.text.tokenizers import character_tokenizer, train_bpe, word_tokenizer

TEXTS = [*sentences("domain", 40, words=30), *sentences("general", 40, words=30)]
DOCS = [Document(str(i), text) for i, text in enumerate(TEXTS)]
TOKENIZER = train_bpe(TEXTS, 320)
ORDINARY = [*TEXTS, "naïve ☃ text, with 3.14 and\n\n  spaces |im_start| <pad [INST", ""]


# -- vocabulary


def test_oracle_an_extended_tokenizer_reads_ordinary_text_as_before(tmp_path: Path) -> None:
    extended = extend_tokenizer(TOKENIZER)
    assert len(extended) % 64 == 0
    assert vocabulary_size(extended) == len(extended)
    before = TOKENIZER.get_vocab()
    assert {token: extended.get_vocab()[token] for token in before} == before
    for text in ORDINARY:
        assert extended(text)["input_ids"] == TOKENIZER(text)["input_ids"]
        assert extended.decode(extended(text)["input_ids"]) == text
    assert len(TOKENIZER) == len(before), "the one that was given is not touched"
    extended.save_pretrained(tmp_path)
    opened = AutoTokenizer.from_pretrained(tmp_path)
    assert opened.get_vocab() == extended.get_vocab()
    for tokenizer in (extended, opened):
        for token in [token for tokens in CHAT_TOKENS.values() for token in tokens]:
            assert tokenizer(f"a{token}b")["input_ids"][1] == tokenizer.convert_tokens_to_ids(token)
            assert tokenizer.decode(tokenizer(f"a{token}b")["input_ids"], skip_special_tokens=True) == "ab"


@pytest.mark.parametrize(("reserved", "multiple_of"), [(0, 1), (5, 1), (70, 64), (0, 100)])
def test_property_free_places_fill_up_to_the_multiple_and_once(reserved: int, multiple_of: int) -> None:
    once = extend_tokenizer(TOKENIZER, reserved=reserved, multiple_of=multiple_of)
    free = [token for token in once.get_vocab() if token.startswith("<|reserved_")]
    assert len(once) % multiple_of == 0
    assert reserved <= len(free) < reserved + multiple_of
    assert extend_tokenizer(once, reserved=reserved, multiple_of=multiple_of).get_vocab() == once.get_vocab()


def test_property_padding_is_never_eos() -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=TOKENIZER.backend_tokenizer, eos_token="<eos>")
    as_loaded = PreTrainedTokenizerFast(
        tokenizer_object=TOKENIZER.backend_tokenizer, eos_token="<eos>", pad_token="<eos>"
    )
    for tokenizer in (bare, as_loaded):
        extended = extend_tokenizer(tokenizer)
        assert extended.pad_token == "<|pad|>"
        assert extended.pad_token_id not in (None, extended.eos_token_id)
    assert extend_tokenizer(TOKENIZER).pad_token == "<pad>", "one of its own stays"


def test_rejects_tokenizers_that_cannot_close_or_stop() -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=TOKENIZER.backend_tokenizer)
    with pytest.raises(ValueError, match=r"no eos token to close documents; set tokenizer.eos_token"):
        extend_tokenizer(bare)
    with pytest.raises(ValueError, match=r"no eos token"):
        pack(DOCS, bare, 16)
    with pytest.raises(ValueError, match=r"would never learn to stop; give another: extend_tokenizer\(tokenizer, pad="):
        extend_tokenizer(TOKENIZER, pad="<eos>")
    with pytest.raises(ValueError, match="no chat template 'vicuna'; there are chatml"):
        extend_tokenizer(TOKENIZER, chat_templates=("vicuna",))
    with pytest.raises(ValueError, match="got -1 and 64"):
        extend_tokenizer(TOKENIZER, reserved=-1)


@pytest.mark.parametrize("tie", [True, False])
def test_equation_new_rows_of_a_pretrained_model_are_the_mean(tie: bool) -> None:
    model = tiny_llama(TOKENIZER, 16, 1, 2, 32, 64, tie, generator_seed=3)
    old = [model.get_input_embeddings().weight.clone(), model.get_output_embeddings().weight.clone()]
    ids = torch.tensor([TOKENIZER(TEXTS[0])["input_ids"]])
    before = model(input_ids=ids).logits
    extended = extend_tokenizer(TOKENIZER)
    resize_model(model, extended)
    for layer, rows in zip((model.get_input_embeddings(), model.get_output_embeddings()), old, strict=True):
        assert layer.weight.shape[0] == len(extended)
        assert torch.equal(layer.weight[: len(rows)], rows)
        assert torch.allclose(layer.weight[len(rows) :], rows.mean(0).expand(len(extended) - len(rows), -1))
    assert torch.equal(model(input_ids=ids).logits[..., : len(TOKENIZER)], before)
    assert (model.config.vocab_size, model.config.pad_token_id) == (len(extended), extended.pad_token_id)
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) is tie


def test_property_rows_of_fresh_weights_are_drawn_from_the_seed_alone() -> None:
    def resized(seed: int) -> torch.Tensor:
        model = tiny_llama(TOKENIZER, 16, 1, 2, 32, 64, generator_seed=3)
        rows = resize_model(model, extend_tokenizer(TOKENIZER), seed=seed).get_input_embeddings().weight
        return rows[len(TOKENIZER) :].detach()

    state = torch.get_rng_state()
    assert torch.equal(resized(1), resized(1))
    assert not torch.equal(resized(1), resized(2))
    assert resized(1).std() == pytest.approx(0.02, rel=0.2)  # Llama's initializer_range
    assert torch.equal(torch.get_rng_state(), state)
    small = tiny_llama(4 * len(TOKENIZER), 16, 1, 2, 32, 64, generator_seed=3)
    assert resize_model(small, TOKENIZER).get_input_embeddings().num_embeddings == 4 * len(TOKENIZER)
    assert resize_model(small, TOKENIZER, seed=0).get_input_embeddings().num_embeddings == len(TOKENIZER)


def test_rejects_ids_that_the_model_has_no_rows_for() -> None:
    model = tiny_llama(TOKENIZER, 16, 1, 2, 32, 64, generator_seed=0)
    check_vocabulary(model, TOKENIZER)
    with pytest.raises(ModelError, match=r"ids up to \d+ and the model 320 rows; call resize_model"):
        check_vocabulary(model, extend_tokenizer(TOKENIZER))


def test_oracle_compression_is_bytes_over_ids() -> None:
    tokenizers = {"bpe": TOKENIZER, "letters": character_tokenizer(TEXTS), "words": word_tokenizer(TEXTS)}
    table = compare_tokenizers(tokenizers, {"a": TEXTS[:10], "b": ["é ☃ naïve"]})
    assert list(table["tokenizer"]) == ["bpe", "bpe", "letters", "letters", "words", "words"]
    for row in table.to_dict("records"):
        texts = TEXTS[:10] if row["source"] == "a" else ["é ☃ naïve"]
        ids = [i for text in texts for i in tokenizers[row["tokenizer"]](text)["input_ids"]]
        size = sum(len(text.encode()) for text in texts)
        assert row["bytes_per_token"] == pytest.approx(size / len(ids))
        assert row["tokens_per_word"] == pytest.approx(len(ids) / sum(len(text.split()) for text in texts))
        assert row["megabytes_per_second"] > 0
    single = table.set_index(["tokenizer", "source"])["single_byte_share"]
    assert single["letters", "a"] == 1.0
    # é and ï are two bytes, the snowman three: "é ☃ naïve" is 13 bytes of 9 letters, and no pair of them was learned.
    encoded = TOKENIZER.convert_ids_to_tokens(TOKENIZER("é ☃ naïve")["input_ids"])
    assert single["bpe", "b"] == pytest.approx(np.mean([len(token) == 1 for token in encoded]))
    assert single["bpe", "a"] < single["bpe", "b"]


def test_rejects_a_source_without_text() -> None:
    with pytest.raises(CorpusError, match="source 'b' has no text"):
        compare_tokenizers({"bpe": TOKENIZER}, {"a": TEXTS[:2], "b": [""]})


# -- packing


def stream(documents: Sequence[Document] = DOCS) -> list[int]:
    return [i for document in documents for i in (*TOKENIZER(document.text)["input_ids"], TOKENIZER.eos_token_id)]


@pytest.mark.parametrize("context", [1, 7, 64])
def test_oracle_rows_are_the_stream_and_every_token_is_a_target_once(context: int) -> None:
    tokens, packed = stream(), pack(DOCS, TOKENIZER, context)
    assert len(packed) == (len(tokens) - 1) // context
    rows = packed.columns(np.arange(len(packed)))
    joined = [*rows["input_ids"][0].tolist(), *rows["input_ids"][1:, 1:].ravel().tolist()]
    assert joined == tokens[: len(packed) * context + 1]
    targets = [
        i * context + place
        for i, row in enumerate(rows["labels"])
        for place in range(context + 1)
        if row[place] != -100
    ]
    assert targets == list(range(1, len(packed) * context + 1))
    assert (rows["labels"] == rows["input_ids"])[:, 1:].all()


def test_oracle_document_borders_are_known() -> None:
    packed = pack(DOCS, TOKENIZER, 10)
    owner = [number for number, document in enumerate(DOCS) for _ in stream([document])]
    places = np.arange(len(packed))[:, None] * 10 + np.arange(11)
    assert packed.document_ids(np.arange(len(packed))).tolist() == np.array(owner)[places].tolist()


def test_property_reading_goes_on_from_any_position(tmp_path: Path) -> None:
    packed = pack(iter(DOCS), TOKENIZER, 16, out=tmp_path, seed=5)
    again = PackedBlocks(TokenStore.open(tmp_path), 17, 5, overlap=1)
    assert again.fingerprint == packed.fingerprint
    assert again.fingerprint != PackedBlocks(TokenStore.open(tmp_path), 17, 5).fingerprint
    for position in (0, 3, len(packed) - 1, len(packed) + 2):
        assert torch.equal(packed[position]["input_ids"], again[position]["input_ids"])
    assert isinstance(packed.store.tokens, np.memmap)
    epoch = sorted(tuple(packed[i]["input_ids"].tolist()) for i in range(len(packed)))
    assert epoch == sorted(map(tuple, packed.blocks(np.arange(len(packed))).tolist()))


def test_property_ids_take_two_bytes_until_they_need_four(tmp_path: Path) -> None:
    narrow = pack(DOCS, TOKENIZER, 16, out=tmp_path / "narrow")
    large = extend_tokenizer(TOKENIZER, reserved=70_000)
    large.eos_token = "<|reserved_69999|>"
    wide = pack(DOCS, large, 16, out=tmp_path / "wide")
    assert (narrow.store.tokens.dtype, wide.store.tokens.dtype) == (np.uint16, np.uint32)
    assert int(wide.store.tokens.max()) == large.eos_token_id > 65_535
    assert (tmp_path / "narrow" / "tokens.npy").stat().st_size == 128 + 2 * len(stream())


def test_property_packed_rows_train_a_model_as_they_are() -> None:
    model = tiny_llama(TOKENIZER, 16, 1, 2, 32, 64, generator_seed=0)
    packed = pack(DOCS, TOKENIZER, 20)
    row = {name: values[None] for name, values in packed[0].items() if name != "row"}
    logits = model(input_ids=row["input_ids"]).logits[0, :-1].log_softmax(-1)
    expected = -logits.gather(1, row["input_ids"][0, 1:, None]).mean()
    assert torch.allclose(model(**row).loss, expected, atol=1e-6)


def test_rejects_rows_that_hold_nothing_new_and_texts_that_fill_none() -> None:
    store = pack(DOCS, TOKENIZER, 8).store
    with pytest.raises(ValueError, match=r"overlap must be in \[0, 8\), so that a block has something new; got 8"):
        PackedBlocks(store, 8, overlap=8)
    with pytest.raises(ValueError, match="less than one block of 100001"):
        pack(DOCS, TOKENIZER, 100_000)
    with pytest.raises(CorpusError, match="0 documents"):
        pack([], TOKENIZER, 8)


# -- mixture


def test_equation_what_a_cap_holds_back_goes_to_the_others() -> None:
    # Half of 100 is 50; the small source gives 10 x 2 = 20 at most, and the other takes over 30.
    large, small = mixture_plan([Source("large", 100, 0.5), Source("small", 10, 0.5, 2)], 100)
    assert (large.tokens, large.epochs, large.shortfall, large.taken_over) == (80, 0.8, 0, 30)
    assert (small.tokens, small.epochs, small.shortfall, small.taken_over) == (20, 2.0, 30, 0)


def test_equation_a_source_that_takes_over_may_reach_its_own_cap() -> None:
    # 60 : 30 : 10. a gives 10, so b and c share 90 as 67.5 : 22.5; b gives 50 at most, so c gives 40.
    plan = mixture_plan([Source("a", 10, 6, 1), Source("b", 50, 3, 1), Source("c", 100, 1)], 100)
    assert [part.tokens for part in plan] == [10, 50, 40]
    assert [part.weight for part in plan] == pytest.approx([0.6, 0.3, 0.1])


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(1, 1000), st.floats(0.01, 10), st.floats(0.1, 5)), min_size=1, max_size=6),
    st.floats(0.05, 1),
)
def test_property_water_filling_is_exact_fair_and_under_its_caps(
    parts: list[tuple[int, float, float]], fill: float
) -> None:
    sources = [Source(str(i), *part) for i, part in enumerate(parts)]
    total = fill * sum(source.tokens * source.epochs_cap for source in sources)
    plan = mixture_plan(sources, total)
    assert math.fsum(part.tokens for part in plan) == pytest.approx(total)
    level = [part.tokens / part.weight for part in plan]
    for source, part, own in zip(sources, plan, level, strict=True):
        assert part.epochs <= source.epochs_cap * (1 + 1e-9)
        # Whoever is below its cap stands at the highest level: nobody without a cap gives less for its weight.
        assert part.epochs >= source.epochs_cap * (1 - 1e-9) or own == pytest.approx(max(level))


def test_degenerate_weights_of_zero_and_sums_that_are_not_one() -> None:
    none, all_ = mixture_plan([Source("none", 0, 0.0), Source("all", 50, 3.0)], 100)
    assert (none.tokens, none.epochs, none.weight) == (0, 0, 0)
    assert (all_.tokens, all_.epochs, all_.weight) == (100, 2, 1)
    capped = mixture_plan([Source("a", 10, 1, 2), Source("b", 20, 1, 1)], 40)
    assert [part.tokens for part in capped] == [20, 20]


@pytest.mark.parametrize(
    ("sources", "total", "words"),
    [
        ([Source("a", 10, -0.1)], 5, "weight of 'a' must be >= 0; got -0.1"),
        ([Source("a", 10, math.nan)], 5, "weight of 'a' must be >= 0; got nan"),
        ([Source("a", 10, 0)], 5, "one of the weights must be above 0"),
        ([Source("a", 0, 1)], 5, "'a' has a weight of 1 and no tokens"),
        ([Source("a", 10, 1), Source("a", 10, 1)], 5, "each once; got"),
        ([], 5, "each once; got"),
        ([Source("a", 10, 1, 0)], 5, "epochs_cap of 'a' must be positive; got 0"),
        ([Source("a", 10, 1)], 0, "total_tokens must be positive; got 0"),
        ([Source("a", 10, 1, 2), Source("b", 5, 1, 1)], 26, "give 25 tokens, less than the 26 asked for; raise"),
    ],
)
def test_rejects_plans_that_cannot_be(sources: list[Source], total: float, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        mixture_plan(sources, total)


# -- the architecture


def test_oracle_the_preset_has_the_papers_size() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(pints_config())
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(1.56e9, rel=0.01)


def test_oracle_the_preset_opens_beside_a_tokenizer(tmp_path: Path) -> None:
    extended = extend_tokenizer(TOKENIZER)
    config = pints_config(extended, 16_384)
    config.save_pretrained(tmp_path)
    extended.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(type(config).from_pretrained(tmp_path))
    check_vocabulary(model, AutoTokenizer.from_pretrained(tmp_path))
    assert (model.config.pad_token_id, model.config.max_position_embeddings) == (extended.pad_token_id, 16_384)


# -- features


def test_equation_features_are_counted_by_hand() -> None:
    text = "\n".join(
        [
            "A tree is a graph. It denotes order! Do you see?",  # 11 words, 3 sentences, 2 definitions, 1 "you"
            "- first item",  # 2 words; an item
            "| a | b |",  # 2 words; a row of a table
            ">>> print(1)",  # 2 words; code
            "x = 3",  # 2 words; code
        ]
    )
    assert expository_features(text) == pytest.approx(
        {
            "sentence_rate": 100 * 3 / 19,
            "sentence_words": 19 / 3,
            "definition_rate": 2 / 3,
            "list_share": 2 / 5,
            "code_share": 2 / 5,
            "second_person_share": 1 / 19,
        }
    )


@pytest.mark.parametrize("text", ["", "   \n\n ", "☃", "..."])
def test_degenerate_texts_have_finite_features(text: str) -> None:
    assert all(math.isfinite(value) for value in expository_features(text).values())


def test_oracle_features_are_exported_with_each_document(corpora: dict[str, Path], tmp_path: Path) -> None:
    documents = stored_corpus(CorpusRef(name=str(corpora["general"])), role="x").select(range(5))
    kept = curate(documents, [Describe()], tmp_path / "a").documents
    assert [document.id for document in kept] == [document.id for document in documents]
    for document in kept:
        assert expository_features(document.text).items() <= document.meta.items()


# -- the review


def scored(count: int, source: str = "a") -> list[Document]:
    rng = np.random.default_rng(len(source) + count)
    return [
        Document(f"{source}{i}", f"text {source} {i} <b>&</b>", {"expository": float(score)})
        for i, score in enumerate(rng.random(count))
    ]


def filled(queue: ReviewQueue, directory: Path, words: dict[str, Sequence[str]]) -> Path:
    """The sheet with each source's words in order."""
    _, sheet = queue.write(directory)
    rows = list(csv.DictReader(sheet.open(newline="")))
    left = {source: list(given) for source, given in words.items()}
    for row in rows:
        row["verdict"] = left[row["source"]].pop(0)
    return rewritten(sheet, rows)


def rewritten(sheet: Path, rows: list[dict[str, str]]) -> Path:
    with sheet.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return sheet


def test_oracle_samples_are_spread_over_the_deciles() -> None:
    documents = scored(200)
    queue = ReviewQueue({"a": documents, "b": scored(7, "b")}, 25, seed=1)
    mine = [row for row in queue.rows if row.source == "a"]
    assert np.bincount([row.decile for row in mine])[1:].tolist() == [2] * 5 + [3] * 5
    ranks = {document.id: rank for rank, document in enumerate(sorted(documents, key=lambda d: d.meta["expository"]))}
    assert all(ranks[row.document.id] // 20 + 1 == row.decile for row in mine)
    assert len({row.document.id for row in mine}) == 25
    assert len(queue.rows) - len(mine) == 7, "a small source is seen whole"
    again = ReviewQueue({"a": documents}, 25, seed=1).rows
    assert list(again) == mine
    assert list(ReviewQueue({"a": documents}, 25, seed=2).rows) != mine


def test_equation_verdicts_have_wilsons_interval(tmp_path: Path) -> None:
    queue = ReviewQueue(
        {"a": scored(100), "bb": scored(100, "bb"), "ccc": scored(100, "ccc"), "dddd": scored(100, "dddd")}, 20
    )
    words = {
        "a": ["accept"] * 18 + ["reject"] * 2,
        "bb": ["accept"] * 2 + ["Clean "] * 10 + ["reject"] * 8,
        "ccc": ["accept"] * 2 + ["reject"] * 18,
        "dddd": ["accept"] * 11 + ["reject"] * 9,
    }
    found = queue.apply(filled(queue, tmp_path, words))
    assert [verdict.decision for verdict in found.values()] == ["accept", "clean", "reject", "unsure"]
    z, n, p = 1.959963984540054, 20, 0.9
    middle, half = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    assert found["a"].low == pytest.approx((middle - half) / (1 + z**2 / n))
    assert found["a"].high == pytest.approx((middle + half) / (1 + z**2 / n))
    assert (found["bb"].reviewed, found["bb"].accepted, found["bb"].cleaned, found["bb"].rate) == (20, 2, 10, 0.1)
    assert queue.apply(tmp_path / "review.csv", least=0.95)["a"].decision == "unsure"


def test_property_the_page_shows_texts_as_texts_and_the_sheet_none(tmp_path: Path) -> None:
    page, sheet = ReviewQueue({"a": scored(30)}, 10).write(tmp_path)
    assert "&lt;b&gt;&amp;&lt;/b&gt;" in page.read_text()
    assert "<b>&</b>" not in page.read_text()
    assert "default-src 'none'" in page.read_text()
    assert "text a" not in sheet.read_text()
    assert {row["verdict"] for row in csv.DictReader(sheet.open())} == {""}


def test_rejects_sheets_that_are_half_filled_or_of_something_else(tmp_path: Path) -> None:
    queue = ReviewQueue({"a": scored(30)}, 10)
    _, sheet = queue.write(tmp_path)
    with pytest.raises(CorpusError, match=r"10 of 10 verdicts are blank, in rows 1, 2, .*10; write accept, clean or"):
        queue.apply(sheet)
    rows: list[dict[str, Any]] = list(csv.DictReader(filled(queue, tmp_path, {"a": ["accept"] * 10}).open()))
    rewritten(sheet, [{**row, "verdict": "" if row["row"] in ("3", "7") else "accept"} for row in rows])
    with pytest.raises(CorpusError, match="2 of 10 verdicts are blank, in rows 3, 7;"):
        queue.apply(sheet)
    rewritten(sheet, [{**row, "verdict": "good" if row["row"] == "4" else "accept"} for row in rows])
    with pytest.raises(CorpusError, match="'good' in rows 4 is no verdict; there are accept, clean, reject"):
        queue.apply(sheet)
    rewritten(sheet, [{**row, "source": "z" if row["row"] == "5" else "a"} for row in rows])
    with pytest.raises(CorpusError, match=r"unknown source 'z' in rows 5; there are \['a'\]"):
        queue.apply(sheet)
    with pytest.raises(CorpusError, match="is of other documents: 10 of 10 are not in it"):
        ReviewQueue({"a": scored(31)}, 10, seed=9).apply(rewritten(sheet, [{**row, "document": "x"} for row in rows]))
    rewritten(sheet, [{"row": row["row"], "verdict": "accept"} for row in rows])
    with pytest.raises(CorpusError, match="has no column 'source'"):
        queue.apply(sheet)


def test_rejects_documents_without_a_score() -> None:
    with pytest.raises(CorpusError, match="document '1' of 'a' has no score 'expository'; score it first"):
        ReviewQueue({"a": [Document("1", "text", {"expository": True})]})
    with pytest.raises(ValueError, match="per_source must be at least 1; got 0"):
        ReviewQueue({"a": scored(3)}, 0)


# -- the claim's arithmetic


def test_equation_tokens_to_target_between_points() -> None:
    curve = [(100.0, 4.0), (400.0, 2.0), (800.0, 1.0)]
    assert tokens_to_target(curve, 3.0) == pytest.approx(200.0)  # half way in bits, half way in log tokens: sqrt(4) x
    assert tokens_to_target(curve, 1.0) == pytest.approx(800.0)
    assert tokens_to_target(curve, 5.0) == 100.0
    assert tokens_to_target(curve, 0.9) is None
