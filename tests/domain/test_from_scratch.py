"""A vocabulary of the domain, new weights, whole words: the oracles of pretraining from scratch."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from scipy.stats import chisquare
from tests.conftest import sentences
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    PreTrainedTokenizerFast,
)

from headwater.core.recipe import RecipeError, load_recipe
from headwater.core.rng import derive_seed, hash_uniform
from headwater.core.run import Run, execute
from headwater.domain.adaptation import Adaptation
from headwater.domain.corpus import prepare
from headwater.domain.from_scratch import (
    WholeWordMasker,
    domain_tokenizer,
    fresh_like,
    transplant_embeddings,
    vocabulary_report,
)
from headwater.modalities.models import ModelError
from headwater.modalities.text.docs import CorpusError, Document
from headwater.modalities.text.packing import MaskedStream, PackedStream, mask_tokens, tokenize_documents
from headwater.modalities.text.prepared import held_out_sample
from headwater.modalities.text.score import bits_per_byte
from headwater.modalities.text.tiny import tiny_bert, tiny_llama
from headwater.modalities.text.tokenizers import train_bpe, word_tokenizer
from headwater.modalities.text.whole_words import WordBorders

Fields = dict[str, Any]
DOMAIN, GENERAL = sentences("domain", 60), sentences("general", 60)
BPE = train_bpe([*DOMAIN, *GENERAL], 300, extra_tokens=["<mask>"])


def wrapped(model: Any, trainer: Any, pre: Any, decoder: Any, texts: list[str]) -> PreTrainedTokenizerFast:
    backend = Tokenizer(model)
    backend.pre_tokenizer, backend.decoder = pre, decoder
    backend.train_from_iterator(texts, trainer)
    special = {"unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]", "mask_token": "[MASK]"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


SPECIAL = ["[PAD]", "[UNK]", "[SEP]", "[MASK]"]


def wordpiece(texts: list[str], size: int = 80) -> PreTrainedTokenizerFast:
    trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=SPECIAL, show_progress=False)
    model = models.WordPiece(unk_token="[UNK]")
    return wrapped(model, trainer, pre_tokenizers.BertPreTokenizer(), decoders.WordPiece(), texts)


def unigram(texts: list[str]) -> PreTrainedTokenizerFast:
    trainer = trainers.UnigramTrainer(vocab_size=80, special_tokens=SPECIAL, unk_token="[UNK]", show_progress=False)
    return wrapped(models.Unigram(), trainer, pre_tokenizers.Metaspace(), decoders.Metaspace(), texts)


def words_of(tokenizer: Any, text: str) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and, from the tokenizer itself, which word each belongs to; ``(T,)`` both."""
    encoded = tokenizer(text, add_special_tokens=False)
    return np.array(encoded["input_ids"]), np.array(encoded.word_ids())


# -- where words begin


@pytest.mark.parametrize("make", [wordpiece, unigram, lambda texts: BPE], ids=["wordpiece", "unigram", "byte-level"])
def test_oracle_words_begin_where_the_tokenizer_says(make: Any) -> None:
    tokenizer = make([*DOMAIN, *GENERAL])
    text = "Graphs (of 27 nodes), e.g. path_of[3]:\n\n    sorts  trees\n\nnaïvely; über-edges !=\tcasts " + DOMAIN[0]
    if tokenizer.unk_token:  # unknown tokens are special, hence words of their own
        text = "".join(c for c in text if c in " _." or c in "".join(DOMAIN))
    ids, words = words_of(tokenizer, text)
    starts = np.concatenate([[True], words[1:] != words[:-1]])
    assert 1.2 < len(ids) / starts.sum() < 12, "the vocabulary is small enough to cut words"
    assert (WordBorders(tokenizer).starts(ids[None])[0] == starts).all()


def test_property_special_tokens_and_the_beginning_of_a_row_are_borders() -> None:
    long, eos = BPE("pathological", add_special_tokens=False)["input_ids"], BPE.eos_token_id
    assert len(long) > 2
    row = np.array([[*long[1:], eos, *long]])
    starts = WordBorders(BPE).starts(row)[0]
    assert np.flatnonzero(starts).tolist() == [0, len(long) - 1, len(long)]
    pieces = wordpiece(DOMAIN)
    continuation = next(id for token, id in pieces.get_vocab().items() if token.startswith("##"))
    row = np.array([[continuation, continuation, pieces.sep_token_id, continuation, continuation]])
    assert WordBorders(pieces).starts(row)[0].tolist() == [True, False, True, True, False]


def test_degenerate_every_token_of_a_word_vocabulary_is_a_word() -> None:
    tokenizer = word_tokenizer(["one two three"], extra_tokens=["<mask>"])
    assert WordBorders(tokenizer).starts(np.array([[3, 4, 5], [5, 4, 3]])).all()


def test_rejects_tokens_that_do_not_show_where_words_begin() -> None:
    backend = Tokenizer(models.BPE(unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.train_from_iterator(["some text"], trainers.BpeTrainer(special_tokens=SPECIAL, show_progress=False))
    with pytest.raises(ValueError, match="cannot tell where words begin: tokens of this BPE tokenizer"):
        WordBorders(PreTrainedTokenizerFast(tokenizer_object=backend))
    with pytest.raises(ValueError, match=r"a fast tokenizer.*Slow"):
        WordBorders(Slow())


class Slow:
    """What a tokenizer written in Python offers of a fast one: nothing but its vocabulary."""

    def get_vocab(self) -> dict[str, int]:
        return {"a": 0}


# -- whole-word masking


@pytest.fixture(scope="module")
def masked_words() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Ids, words, inputs and labels of 200 rows of 200 random words, padded to one length."""
    rng = random.Random(0)
    texts = [" ".join("".join(rng.choices("abcdefgh", k=rng.randint(1, 7))) for _ in range(200)) for _ in range(200)]
    pairs = [words_of(BPE, text) for text in texts]
    longest = max(len(ids) for ids, _ in pairs)
    ids = np.stack([np.pad(ids, (0, longest - len(ids)), constant_values=BPE.pad_token_id) for ids, _ in pairs])
    words = np.stack([np.pad(words, (0, longest - len(words)), constant_values=-1) for _, words in pairs])
    features = [{"input_ids": row[of >= 0], "row": i} for i, (row, of) in enumerate(zip(ids, words, strict=True))]
    batch = WholeWordMasker(BPE, seed=1)(features)
    assert (batch["attention_mask"].numpy() == (words >= 0)).all()
    return ids, words, batch["input_ids"].numpy(), batch["labels"].numpy()


def fates(masked_words: tuple[np.ndarray, ...]) -> dict[str, int]:
    """How many words were masked, replaced or kept; every word must have one fate."""
    ids, words, inputs, labels = masked_words
    counts = {"masked": 0, "replaced": 0, "kept": 0}
    for row in range(len(ids)):
        for word in range(words[row].max() + 1):
            here = words[row] == word
            target = labels[row, here] != -100
            assert target.all() or not target.any(), "a word is a target as a whole or not at all"
            if not target.any():
                assert (inputs[row, here] == ids[row, here]).all()
                continue
            assert (labels[row, here] == ids[row, here]).all()
            is_mask = inputs[row, here] == BPE.mask_token_id
            same = (inputs[row, here] == ids[row, here]).all()
            counts["masked" if is_mask.all() else "kept" if same else "replaced"] += 1
    return counts


def test_property_words_are_masked_whole_and_eighty_ten_ten(masked_words: tuple[np.ndarray, ...]) -> None:
    counts = fates(masked_words)
    total = sum(counts.values())
    # A random token is the old one, or the mask, once in 300: far below what 6,000 words can show.
    assert chisquare(list(counts.values()), [0.8 * total, 0.1 * total, 0.1 * total]).pvalue > 0.01


def test_property_the_share_of_target_tokens_is_the_probability(masked_words: tuple[np.ndarray, ...]) -> None:
    _, words, _, labels = masked_words
    # 40,000 words: the standard deviation of the share is about 0.002.
    assert abs((labels[words >= 0] != -100).mean() - 0.15) < 0.005


def test_property_padding_and_separators_are_never_masked(masked_words: tuple[np.ndarray, ...]) -> None:
    _, words, inputs, labels = masked_words
    assert (words < 0).any()
    assert (labels[words < 0] == -100).all()
    assert (inputs[words < 0] == BPE.pad_token_id).all()
    ends = np.full((50, 40), BPE.eos_token_id)
    masked, targets = mask_tokens(ends, np.arange(50), BPE, seed=0, words=WordBorders(BPE))
    assert (masked == ends).all()
    assert (targets == -100).all()


def test_oracle_transformers_masks_the_same_units() -> None:
    # Its words are runs without a gap in the text, so that no punctuation may stand at one.
    tokenizer = wordpiece([*DOMAIN, *GENERAL])
    peer = DataCollatorForLanguageModeling(
        tokenizer, whole_word_mask=True, mask_replace_prob=1.0, random_replace_prob=0.0, seed=0
    )
    encoded = tokenizer([text.replace("_", "").strip(".") for text in DOMAIN], return_offsets_mapping=True)
    borders = WordBorders(tokenizer)
    targets = {"ours": 0, "theirs": 0}
    for row, (ids, offsets) in enumerate(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)):
        heads = borders.heads(np.array([ids]))[0]
        labels = {
            "ours": mask_tokens(np.array([ids]), [row], tokenizer, seed=0, words=borders)[1][0],
            "theirs": peer([{"input_ids": ids, "offset_mapping": offsets}])["labels"][0].numpy(),
        }
        assert len(heads) > len(np.unique(heads)) > 100
        for side, found in labels.items():
            share = np.bincount(heads, found != -100) / np.maximum(np.bincount(heads), 1)
            assert set(share) <= {0.0, 1.0}
            targets[side] += (found != -100).sum()
    assert targets["ours"] == pytest.approx(targets["theirs"], rel=0.1)


def test_oracle_single_tokens_are_masked_as_they_were() -> None:
    ids, rows = np.random.default_rng(0).integers(0, 300, (9, 33)), np.arange(5, 14)
    inputs, labels = mask_tokens(ids, rows, BPE, seed=4)
    key = derive_seed(4, "mask")
    for b, row in enumerate(rows):
        for t in range(33):
            chosen, kind, token = (hash_uniform(key, [row], 33, stream=s)[0, t] for s in range(3))
            target = chosen < 0.15 and ids[b, t] not in BPE.all_special_ids
            shown = BPE.mask_token_id if kind < 0.8 else int(token * len(BPE)) if kind >= 0.9 else ids[b, t]
            assert labels[b, t] == (ids[b, t] if target else -100)
            assert inputs[b, t] == (shown if target else ids[b, t])


def test_property_a_stream_of_whole_words_is_another_stream() -> None:
    store = tokenize_documents([Document(str(i), text) for i, text in enumerate(DOMAIN)], BPE)
    plain, whole = (
        MaskedStream(PackedStream(store, 32, rows=4), BPE, seed=2, words=words) for words in (None, WordBorders(BPE))
    )
    assert plain.fingerprint != whole.fingerprint
    batch, parts = whole.batch(3), [whole.batch(3, 0, 1), whole.batch(3, 1)]
    assert torch.equal(torch.cat([part["labels"] for part in parts]), batch["labels"])
    assert not torch.equal(batch["labels"], plain.batch(3)["labels"])


def test_degenerate_masker_takes_an_empty_batch() -> None:
    batch = WholeWordMasker(BPE)([])
    assert batch["input_ids"].shape == (0, 0)


def test_rejects_features_without_a_row_and_tokenizers_without_a_mask() -> None:
    with pytest.raises(ValueError, match="a feature has no 'row'"):
        WholeWordMasker(BPE)([{"input_ids": [5, 6]}])
    with pytest.raises(ValueError, match="tokenizer with a mask token"):
        WholeWordMasker(train_bpe(["a b"], 270))
    with pytest.raises(ValueError, match=r"probability must be in \(0, 1\)"):
        WholeWordMasker(BPE, probability=1.0)


# -- the vocabulary


@pytest.mark.parametrize("like", [BPE, wordpiece(GENERAL)], ids=["byte-level", "wordpiece"])
def test_property_a_domain_tokenizer_is_of_the_same_kind_and_reads_the_domain_better(like: Any) -> None:
    new = domain_tokenizer(iter(DOMAIN), like)
    assert type(new) is type(like)
    assert len(new) <= len(like)
    assert new.special_tokens_map == like.special_tokens_map
    tokens = [sum(len(t(text, add_special_tokens=False)["input_ids"]) for text in DOMAIN) for t in (new, like)]
    assert tokens[0] < 0.9 * tokens[1]
    assert new.decode(new("graphs of edges", add_special_tokens=False)["input_ids"]) == "graphs of edges"


def test_property_special_tokens_of_several_words_survive() -> None:
    like = train_bpe(GENERAL, 300, extra_tokens=["<end of turn>"])
    new = domain_tokenizer(DOMAIN, like)
    assert new("node<end of turn>")["input_ids"][-1] == new.convert_tokens_to_ids("<end of turn>")


def test_property_the_order_of_the_texts_does_not_matter() -> None:
    one, other = domain_tokenizer(DOMAIN, BPE), domain_tokenizer(DOMAIN[::-1], BPE)
    assert one.backend_tokenizer.to_str() == other.backend_tokenizer.to_str()


class Forgetful(PreTrainedTokenizerFast):
    """Trains a tokenizer without the special tokens."""

    def train_new_from_iterator(self, *args: Any, **kwargs: Any) -> PreTrainedTokenizerFast:
        return train_bpe(["a b"], 270)


def test_rejects_tokenizers_that_cannot_be_trained_anew() -> None:
    with pytest.raises(ValueError, match="Slow is a slow tokenizer"):
        domain_tokenizer(DOMAIN, Slow())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"vocab_size 100 is less than .* alone: 259"):
        domain_tokenizer(DOMAIN, BPE, 100)
    forgetful = Forgetful(tokenizer_object=BPE.backend_tokenizer, eos_token="<eos>", sep_token="<the end>")
    with pytest.raises(ValueError, match="'<the end>' would not survive: the new tokenizer makes 9 tokens of it"):
        domain_tokenizer(DOMAIN, forgetful)


def test_equation_vocabulary_report() -> None:
    old, new = train_bpe(["-"], 258), train_bpe(["graph " * 9 + " graph" * 9], 270)
    report = vocabulary_report(old, new, ["graph graph", "graph cut"])
    # Old: one token per byte. New: "graph", " graph" | "graph", " ", "c", "u", "t": 20 bytes in 7 tokens.
    assert report["bytes_per_token"] == {"old": 1.0, "new": pytest.approx(20 / 7)}
    assert report["whole_words"] == {"old": 0.0, "new": 3 / 4}
    # "cut" occurs once only, so it is not listed.
    assert report["fragmented"] == [{"word": "graph", "occurrences": 3, "old": list("graph"), "new": ["Ġgraph"]}] or (
        report["fragmented"] == [{"word": "graph", "occurrences": 3, "old": list("graph"), "new": ["graph"]}]
    )
    with pytest.raises(ValueError, match="hold no word"):
        vocabulary_report(old, new, ["12 34"])


# -- models over another vocabulary


def bodies(vocab: Any) -> list[Any]:
    size = {"hidden": 16, "layers": 1, "heads": 2, "mlp": 32, "generator_seed": 3}
    return [tiny_llama(vocab, **size), tiny_llama(vocab, **size, tie=False), tiny_bert(vocab, **size)]


def test_property_fresh_models_share_the_architecture_and_no_weights() -> None:
    new = domain_tokenizer(DOMAIN, BPE)
    assert len(new) == len(BPE)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    for model in bodies(BPE):
        fresh, again, other = (fresh_like(model, new, seed) for seed in (5, 5, 6))
        assert torch.equal(state, torch.get_rng_state()), "the global generator is left alone"
        old, mine = dict(model.named_parameters()), dict(fresh.named_parameters())
        assert {n: p.shape for n, p in old.items()} == {n: p.shape for n, p in mine.items()}
        drawn = [n for n, p in old.items() if p.ndim > 1]
        assert not any(torch.equal(old[n], mine[n]) for n in drawn)
        assert all(torch.equal(mine[n], p) for n, p in again.named_parameters())
        assert not any(torch.equal(mine[n], p) for n, p in other.named_parameters() if n in drawn)
        assert fresh.config.pad_token_id == new.pad_token_id


def test_property_fresh_models_take_size_and_ids_from_the_tokenizer() -> None:
    tokenizer = train_bpe(DOMAIN, 270)
    model = tiny_bert(wordpiece(GENERAL), hidden=16, layers=1, heads=2, mlp=32, generator_seed=0)
    model.config.pad_token_id, model.config.eos_token_id = 3, None
    fresh = fresh_like(model, tokenizer, 0)
    assert fresh.get_input_embeddings().num_embeddings == fresh.config.vocab_size == 270
    assert fresh.config.pad_token_id == tokenizer.pad_token_id == 0
    assert fresh.config.eos_token_id is None, "what a configuration leaves open stays open"


def test_degenerate_a_transplant_to_the_same_vocabulary_changes_nothing() -> None:
    for model in bodies(BPE):
        before = {n: p.clone() for n, p in model.state_dict().items()}
        if model.get_output_embeddings().bias is not None:
            torch.nn.init.normal_(model.get_output_embeddings().bias)
            before = {n: p.clone() for n, p in model.state_dict().items()}
        assert transplant_embeddings(model, BPE, BPE) == 1.0
        after = model.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[n], after[n]) for n in before)


def test_equation_a_transplanted_row_is_the_mean_of_its_pieces() -> None:
    old, new = train_bpe(GENERAL, 290, extra_tokens=["<mask>"]), domain_tokenizer(DOMAIN, BPE)
    for model in bodies(old):
        inputs, head = model.get_input_embeddings().weight.clone(), model.get_output_embeddings().weight.clone()
        bias = model.get_output_embeddings().bias
        if bias is not None:
            torch.nn.init.normal_(bias)
            bias = bias.clone()
        share = transplant_embeddings(model, old, new)
        made, out = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        assert made.shape == out.shape == (len(new), 16)
        common = [token for token in new.get_vocab() if token in old.get_vocab()]
        assert share == len(common) / len(new)
        for token in common:
            i, j = new.get_vocab()[token], old.get_vocab()[token]
            assert torch.equal(made[i], inputs[j])
        foreign = [token for token in new.get_vocab() if token not in old.get_vocab()]
        assert "Ġgraph" in foreign
        for token in foreign:
            # In running text: the surface string behind another word, so that a leading space is one.
            pieces = old("x" + new.decode([new.get_vocab()[token]]), add_special_tokens=False)["input_ids"][1:]
            if token.startswith("Ġ"):
                row = made[new.get_vocab()[token]]
                assert torch.allclose(row, inputs[pieces].mean(0), atol=1e-7)
                assert torch.allclose(out[new.get_vocab()[token]], head[pieces].mean(0), atol=1e-7)
                if bias is not None:
                    found = model.get_output_embeddings().bias[new.get_vocab()[token]].item()
                    assert found == pytest.approx(bias[pieces].mean().item(), abs=1e-6)


def test_equation_a_wordpiece_continuation_is_spelled_without_its_prefix() -> None:
    old = wordpiece(["a b c"], 20)
    new = wordpiece(["abc abc abc"], 30)
    assert "##c" not in old.get_vocab()
    model = bodies(old)[2]
    rows = model.get_input_embeddings().weight.clone()
    transplant_embeddings(model, old, new)
    assert torch.equal(model.get_input_embeddings().weight[new.get_vocab()["##c"]], rows[old.get_vocab()["c"]])


def test_oracle_bits_per_byte_do_not_depend_on_how_bytes_are_numbered() -> None:
    old = train_bpe(["-"], 258)
    backend = Tokenizer(models.BPE({token: 257 - id for token, id in old.get_vocab().items()}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    new = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>")
    texts = ["a graph of nodes\n", "naïve — edges", ""]
    assert [257 - id for id in old(texts[1])["input_ids"]] == new(texts[1])["input_ids"]
    for model in bodies(old)[:2]:
        before = bits_per_byte(model, old, texts)
        assert transplant_embeddings(model, old, new) == 1.0
        after = bits_per_byte(model, new, texts)
        assert after.nats == pytest.approx(before.nats, rel=1e-6)
        assert after.counts.tolist() == before.counts.tolist() == [17, 16, 0]


def test_property_tied_weights_stay_tied_after_saving(tmp_path: Path) -> None:
    new = domain_tokenizer(DOMAIN, BPE, 280)
    for number, model in enumerate([bodies(BPE)[0], bodies(BPE)[2]]):
        transplant_embeddings(model, BPE, new)
        model.save_pretrained(tmp_path / str(number))
        opened = type(model).from_pretrained(tmp_path / str(number))
        head, inputs = opened.get_output_embeddings().weight, opened.get_input_embeddings().weight
        assert head.data_ptr() == inputs.data_ptr()
        assert torch.equal(inputs, model.get_input_embeddings().weight)


def test_rejects_a_transplant_between_algorithms() -> None:
    with pytest.raises(ValueError, match="fast tokenizers of one algorithm; got BPE, ByteLevel and WordPiece"):
        transplant_embeddings(bodies(BPE)[0], BPE, wordpiece(DOMAIN))


# -- the recipe


def recipe_of(fields: Fields, **changes: Any) -> Any:
    return load_recipe({"method": "from_scratch", **fields, **changes})


def test_oracle_the_kept_vocabulary_is_the_reference_bit_for_bit(domain_fields: Fields, tmp_path: Path) -> None:
    execute(recipe_of(domain_fields, vocab="keep"), tmp_path / "ours")
    execute(load_recipe({"method": "scratch", **domain_fields}), tmp_path / "scratch")
    ours, theirs = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("ours", "scratch"))
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("init", ["random", "transplant"])
def test_oracle_end_and_start_are_scored_under_their_own_tokenizers(
    domain_fields: Fields, tmp_path: Path, init: str
) -> None:
    recipe = recipe_of(domain_fields, init=init, vocab_size=300)
    result = execute(recipe, tmp_path / "a")
    tests = held_out_sample(prepare(recipe.domain, None, held_out=0.1).domain_test, 5_000, at_least=20)
    for directory, metric in ((tmp_path / "a" / "model", "domain/bpb"), (domain_fields["model"], "domain/bpb_start")):
        model = AutoModelForCausalLM.from_pretrained(directory)
        tokenizer = AutoTokenizer.from_pretrained(directory)
        scored = bits_per_byte(model, tokenizer, tests, window=32)
        assert result.metrics[metric] == pytest.approx(scored.bits_per_byte, rel=1e-5)
    assert len(tokenizer) == 320
    assert result.metrics["domain/bytes_per_token"] > result.metrics["domain/bytes_per_token_start"]
    report = json.loads((tmp_path / "a" / "vocabulary.json").read_text())
    assert report["vocab_size"] == 300
    assert (report["copied"] is None) == (init == "random")
    midway = json.loads((tmp_path / "a" / "trajectory.json").read_text())["series"]["domain/bpb"]
    assert midway[-1][1] == pytest.approx(result.metrics["valid/domain_bpb"], rel=0.1), "under the new tokenizer too"


def test_learns_the_domain_over_its_own_vocabulary(domain_fields: Fields, tmp_path: Path) -> None:
    result = execute(recipe_of(domain_fields, budget={"steps": 60}, optim={"lr": 1e-2}), tmp_path / "a")
    assert result.metrics["domain/gain"] > 1.0, "a language of seven words is learned quickly"


def test_property_a_masked_model_over_other_tokens_reports_no_gain_and_no_forgetting(
    domain_fields: Fields, tiny_masked: Path, tmp_path: Path
) -> None:
    fields = {**domain_fields, "model": str(tiny_masked)}
    own = execute(recipe_of(fields), tmp_path / "own")
    assert own.notes["unit"] == "bits/masked token of its own vocabulary"
    assert "not measured" in own.notes["warning/tokenizer"]
    for name in ("domain/gain", "domain/bpb_start", "general/forgetting", "general/bpb_start", "general/worst"):
        assert name not in own.metrics
    assert "valid/general_forgetting" not in own.metrics
    assert json.loads((tmp_path / "own" / "items.json").read_text()) == {}
    assert own.metrics["domain/bpb"] > 0
    opened = AutoModelForMaskedLM.from_pretrained(tmp_path / "own" / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "own" / "model")
    assert opened.config.vocab_size == len(tokenizer)
    kept = execute(recipe_of(fields, vocab="keep"), tmp_path / "kept")
    assert kept.notes["unit"] == "bits/masked token"
    assert "domain/gain" in kept.metrics


def test_property_a_masked_model_trains_on_whole_words_unless_told_not_to(
    domain_fields: Fields, tiny_masked: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(domain_fields, model=str(tiny_masked), vocab="keep")
    for masking, whole in (("whole_word", True), ("token", False)):
        with Run(tmp_path / masking, recipe) as run:
            ctx = Adaptation.open(recipe, run)
            phase = next(recipe.model_copy(update={"masking": masking}).phases(ctx))
        batch = phase.stream.batch(0)
        targets = (batch["labels"] != -100).numpy()
        ids = np.where(targets, batch["labels"], batch["input_ids"])
        heads = WordBorders(ctx.tokenizer).heads(ids)
        split = [
            0 < targets[row, heads[row] == head].mean() < 1 for row in range(len(ids)) for head in np.unique(heads[row])
        ]
        assert any(split) != whole


def test_property_what_trained_the_start_is_charged_where_its_weights_are_used(
    domain_fields: Fields, tmp_path: Path
) -> None:
    fields = {**domain_fields, "budget": {"flops": 2e8}, "start_flops": 1e8, "vocab": "keep", "eval_at": []}
    kept = execute(recipe_of(fields, init="keep"), tmp_path / "kept")
    fresh = execute(recipe_of(fields, init="random"), tmp_path / "fresh")
    assert kept.cost["tokens"] == pytest.approx(fresh.cost["tokens"] / 2, rel=0.05)
    assert kept.cost["flops"] == pytest.approx(fresh.cost["flops"], rel=0.05)
    with pytest.raises(ModelError, match=r"training the starting model took 3e\+08 FLOPs, more than the budget"):
        execute(recipe_of(fields, init="keep", start_flops=3e8), tmp_path / "over")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"init": "keep"}, "rows would belong to other tokens"),
        ({"init": "transplant", "vocab": "keep"}, "nothing to carry over"),
        ({"vocab": "keep", "vocab_size": 300}, "vocab_size 300 needs a new vocabulary"),
        ({"lora": {"r": 2}}, "leave lora out"),
        ({"start_flops": 1e6}, "budget in flops"),
    ],
)
def test_rejects_when_built(domain_fields: Fields, changes: Fields, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        recipe_of(domain_fields, **changes)


def test_rejects_a_vocabulary_of_too_little_text(domain_fields: Fields, tmp_path: Path) -> None:
    few = {"name": domain_fields["domain"], "limit_documents": 100}
    with pytest.raises(CorpusError, match=r"\d+ bytes of training text; a vocabulary of its own needs at least 100000"):
        execute(recipe_of(domain_fields, domain=few, general=None, held_out=0.3), tmp_path / "a")
