"""Prompts: the tokens around the gap, the answers, and what a language model reads of them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer, PreTrainedTokenizerFast

from headwater.core.lora import LoraSpec, add_lora
from headwater.modalities.models import ModelError
from headwater.modalities.text.class_inputs import ClassStream
from headwater.modalities.text.prompted import PromptTexts, prompted
from headwater.modalities.text.prompts import Prompt, Template, Verbaliser, logits_at

KINDS = ("masked", "causal")
LABELS = ("x", "y", "z")
WORDS = {"x": "a", "y": "b", "z": "c"}
PATTERNS = {"masked": "{text} is ={mask} now.", "causal": "{text} is ={mask}"}
TEXTS = ["graph node edge path cut", "sum mean row axis sort fill cast " * 2, "tree"]
CLASSES = {"masked": AutoModelForMaskedLM, "causal": AutoModelForCausalLM}


@pytest.fixture
def homes(tiny_causal: Path, tiny_masked: Path) -> dict[str, Path]:
    return {"masked": tiny_masked, "causal": tiny_causal}


def prompt_of(home: Path, kind: str, pattern: str = "", **changes: Any) -> Prompt:
    tokenizer, template = AutoTokenizer.from_pretrained(home), Template(pattern or PATTERNS[kind])
    words = Verbaliser.of(changes.pop("words", WORDS), LABELS, tokenizer, template, **changes)
    return Prompt(template, words, tokenizer, causal=kind == "causal", max_tokens=60)


def with_special_tokens(words: str) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words that puts [CLS] before and [SEP] after, as BERT's does."""
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*names, *words.split()])}, "[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    keys = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    return PreTrainedTokenizerFast(tokenizer_object=inner, **dict(zip(keys, names, strict=True)))


# -- templates and words


def test_equation_a_prompt_token_by_token() -> None:
    tokenizer = with_special_tokens("a it was great bad . fine plot")
    template = Template("{text} it was {mask} .")
    words = Verbaliser.of({"+": "great", "-": "bad"}, ("-", "+"), tokenizer, template)
    prompt = Prompt(template, words, tokenizer, causal=False, max_tokens=9)
    assert words.ids == ((9,), (8,))
    # [CLS] fine plot it was [MASK] . [SEP]
    assert prompt.encode(["fine plot"]) == [[2, 11, 12, 6, 7, 4, 10, 3]]
    # Three tokens of five have room: the text loses its end.
    assert prompt.encode(["plot fine fine plot plot"]) == [[2, 12, 11, 11, 6, 7, 4, 10, 3]]
    assert prompt.fill([[2, 11, 12, 6, 7, 4, 10, 3]], [1]) == [([2, 11, 12, 6, 7, 8, 10, 3], 5)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "pattern", ["{text} It was {mask}", "So {text}. Class: {mask}", "{text} {mask}", "{text}:{mask}"]
)
def test_oracle_a_filled_prompt_has_the_tokens_of_the_text_as_a_person_reads_it(
    kind: str, pattern: str, homes: dict[str, Path]
) -> None:
    # The leading-space pitfall: " a" and "a" are different tokens of a byte-level tokenizer.
    pattern += " ." if kind == "masked" else ""
    prompt = prompt_of(homes[kind], kind, pattern, multi_token="mean")
    classes = (0, 2, 1)
    for (row, _), text, index in zip(prompt.fill(prompt.encode(TEXTS), classes), TEXTS, classes, strict=True):
        shown = prompt.template.show(text, prompt.verbaliser.words[index])
        assert row == prompt.tokenizer(shown, add_special_tokens=False)["input_ids"]


def test_property_pairs_keep_their_order_and_the_shorter_text(tiny_masked: Path) -> None:
    prompt = prompt_of(tiny_masked, "masked", "{text_a} ?{mask}, {text_b}")
    (row,) = prompt.encode([("graph", "node edge")])
    assert prompt.tokenizer.decode(row) == "graph ?<mask>, node edge"
    (row,) = prompt.encode([("graph", "node edge " * 100)])
    assert prompt.tokenizer.decode(row).startswith("graph ?<mask>, node edge node")
    assert len(row) == 60
    (row,) = prompt.encode([("path " * 100, "node " * 100)])
    left, right = prompt.tokenizer.decode(row).split(" ?<mask>,")
    lengths = [len(prompt.tokenizer(part)["input_ids"]) for part in (left, right)]
    assert abs(lengths[0] - lengths[1]) <= 1


@pytest.mark.parametrize("kind", KINDS)
@given(words=st.integers(0, 5000))
@settings(max_examples=10, deadline=None)
def test_property_truncation_keeps_template_and_gap(kind: str, words: int, tmp_path_factory, request) -> None:
    prompt = prompt_of(request.getfixturevalue("homes")[kind], kind)
    (row,) = prompt.encode(["q" * words])
    shown = prompt.tokenizer.decode(row)
    assert shown.endswith(" is =<mask> now." if kind == "masked" else " is =")
    assert len(row) + (kind == "causal") == min(60, len(prompt.encode([""])[0]) + (kind == "causal") + words)
    assert len(prompt.fill([row], [0])[0][0]) <= 60


def test_property_a_text_with_the_mask_token_still_has_one_gap(tiny_masked: Path) -> None:
    prompt = prompt_of(tiny_masked, "masked")
    (row,) = prompt.encode(["what <mask> means <mask>"])
    assert row.count(prompt.tokenizer.mask_token_id) == 1
    assert "what < mask> means" in prompt.tokenizer.decode(row)


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("{text} It was .", r"exactly one \{mask\}; .* has 0"),
        ("{mask} {text} {mask}", r"exactly one \{mask\}; .* has 2"),
        ("It was {mask}", r"has none"),
        ("{text} {title} {mask}", r"has \{text\}, \{title\}"),
        ("{text_a} {mask}", r"has \{text_a\}"),
    ],
)
def test_rejects_templates(pattern: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Template(pattern)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"words": {"x": "a", "y": "b"}}, "no word for label 'z'"),
        ({"words": {**WORDS, "z": "  "}}, "no word for label 'z'"),
        ({"words": {**WORDS, "z": " a "}}, "two labels have the same word"),
        ({"words": {**WORDS, "z": "grap"}}, r"'grap' for label 'z' is \d tokens .* like it: .*graph"),
        (
            {"pattern": "{text} grap{mask} now.", "words": {**WORDS, "z": "h"}},
            "joins the word to what stands before it",
        ),
        ({"pattern": "{text} <mask> ={mask}"}, "holds the mask token itself"),
        ({"pattern": "{text} " + "sum mean row axis " * 20 + "={mask}"}, "fill all of 60 tokens"),
    ],
)
def test_rejects_words_and_templates_that_do_not_fit_the_model(
    changes: dict[str, Any], words: str, tiny_masked: Path
) -> None:
    with pytest.raises(ModelError, match=words):
        prompt_of(tiny_masked, "masked", **changes)


def test_rejects_what_the_kind_of_model_cannot_do(homes: dict[str, Path]) -> None:
    with pytest.raises(ModelError, match="must be the template's end"):
        prompt_of(homes["causal"], "causal", PATTERNS["masked"])
    with pytest.raises(ModelError, match="its tokenizer has no mask token"):
        prompt_of(homes["causal"], "masked")
    with pytest.raises(ValueError, match="takes one text"):
        prompt_of(homes["causal"], "causal").encode([("a", "b")])  # type: ignore[list-item]
    with pytest.raises(ModelError, match="does not know 'splendid'"):
        Verbaliser.of({"+": "splendid"}, ("+",), with_special_tokens("it was"), Template("{text} it was {mask}"))


# -- answers


@pytest.mark.parametrize("kind", KINDS)
def test_oracle_answers_are_the_models_own_logits_at_the_gap(kind: str, homes: dict[str, Path]) -> None:
    prompt, model = prompt_of(homes[kind], kind), CLASSES[kind].from_pretrained(homes[kind])
    classes = prompted(model, prompt).classes
    expected = []
    for row in prompt.encode(TEXTS):  # one text at a time, without padding
        at = -1 if kind == "causal" else row.index(prompt.tokenizer.mask_token_id)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row])).logits[0, at]
        expected.append(logits[[prompt.verbaliser.ids[index][0] for index in range(3)]].softmax(0).numpy())
    np.testing.assert_allclose(classes.probabilities(TEXTS), expected, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_property_the_output_layer_sees_one_place_of_each_row(kind: str, homes: dict[str, Path]) -> None:
    model, seen = CLASSES[kind].from_pretrained(homes[kind]), []
    inputs = torch.arange(10, 34).view(4, 6)
    places = torch.tensor([0, 5, 2, 3])
    whole = model(input_ids=inputs, attention_mask=torch.ones_like(inputs)).logits
    model.get_output_embeddings().register_forward_hook(lambda module, args, out: seen.append(out.shape))
    found = logits_at(model, inputs, torch.ones_like(inputs), places)
    assert seen == [(4, 1, model.config.vocab_size)]
    torch.testing.assert_close(found, whole[torch.arange(4), places], atol=1e-6, rtol=1e-5)
    after = model(input_ids=inputs, attention_mask=torch.ones_like(inputs)).logits
    assert torch.equal(after, whole), "the model is left as it was"


def test_equation_several_tokens_are_averaged_and_labels_permute() -> None:
    logits = torch.tensor([[0.0, 1.0, 5.0, -2.0], [3.0, 0.0, 1.0, 4.0]])
    words = Verbaliser(("p", "q"), ("pp", "qq"), ((1, 2), (3,)))
    # (1 + 5) / 2 = 3 and -2; (0 + 1) / 2 = 0.5 and 4.
    assert words.scores(logits).tolist() == [[3.0, -2.0], [0.5, 4.0]]
    single = Verbaliser(("p", "q"), ("pp", "qq"), ((2,), (3,)))
    turned = Verbaliser(("q", "p"), ("qq", "pp"), ((3,), (2,)))
    assert torch.equal(single.scores(logits), turned.scores(logits)[:, [1, 0]])


@pytest.mark.parametrize("kind", KINDS)
def test_oracle_the_code_that_is_saved_with_it_gives_its_answers(
    kind: str, homes: dict[str, Path], tmp_path: Path
) -> None:
    model = CLASSES[kind].from_pretrained(homes[kind])
    classes = prompted(model, prompt_of(homes[kind], kind)).classes
    classes.save_pretrained(tmp_path)
    assert "headwater" not in classes.opening
    for text, expected in zip(TEXTS, classes.probabilities(TEXTS), strict=True):
        names: dict[str, Any] = {"DIR": str(tmp_path), "TEXT": text}
        exec(classes.opening, names)
        found = torch.tensor([names["scores"][label] for label in LABELS]).softmax(0)
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)
        assert names["answer"] == LABELS[expected.argmax()]
    assert re.search(r"import (AutoModel\w*)", classes.opening)


@pytest.mark.parametrize("kind", KINDS)
def test_property_adapters_are_trained_through_the_gap_and_merged(kind: str, homes: dict[str, Path]) -> None:
    model = add_lora(CLASSES[kind].from_pretrained(homes[kind]), LoraSpec(r=2), seed=0)
    made = prompted(model, prompt_of(homes[kind], kind))
    stream = ClassStream(made.classes.encode(TEXTS), np.eye(3), rows=3, pad=made.classes.pad)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(3):
        made.objective(model, stream.batch(0)).total.backward()
        optimizer.step()
    whole = made.whole()
    assert not [name for name in whole.model.state_dict() if "lora" in name]
    np.testing.assert_allclose(whole.probabilities(TEXTS), made.classes.probabilities(TEXTS), atol=1e-5)
    start = prompted(CLASSES[kind].from_pretrained(homes[kind]), made.objective.prompt).classes
    assert np.abs(start.probabilities(TEXTS) - whole.probabilities(TEXTS)).max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_property_the_loss_is_a_sum_over_examples(kind: str, homes: dict[str, Path]) -> None:
    made = prompted(CLASSES[kind].from_pretrained(homes[kind]), prompt_of(homes[kind], kind))
    stream = ClassStream(made.classes.encode(TEXTS), np.eye(3), rows=3, pad=made.classes.pad)
    whole = made.objective(made.model, stream.batch(0))
    parts = [made.objective(made.model, stream.batch(0, i, i + 1)) for i in range(3)]
    assert whole.count == 3
    assert float(whole.total.detach()) == pytest.approx(sum(float(part.total.detach()) for part in parts), rel=1e-5)


# -- what a language model reads


def texts_of(prompt: Prompt | None, home: Path, kind: str, **changes: Any) -> tuple[PromptTexts, list[list[int]]]:
    tokenizer = AutoTokenizer.from_pretrained(home)
    inputs = prompt.encode(TEXTS) if prompt is not None else tokenizer(TEXTS)["input_ids"]
    stream = ClassStream(inputs, np.eye(3)[[1, 0, 2]], rows=3, pad=tokenizer.pad_token_id)
    made = PromptTexts(stream, tokenizer, prompt, causal=kind == "causal", seed=0, **changes)
    filled = inputs if prompt is None else [ids for ids, _ in prompt.fill(inputs, [1, 0, 2])]
    return made, filled


def unmasked(batch: dict[str, Tensor], row: int) -> list[int]:
    size = int(batch["attention_mask"][row].sum())
    assert (batch["labels"][row, size:] == -100).all(), "padding is not predicted"
    ids, labels = batch["input_ids"][row, :size], batch["labels"][row, :size]
    return torch.where(labels == -100, ids, labels).tolist()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("with_prompt", [True, False])
def test_property_rows_are_the_texts_with_their_words(kind: str, with_prompt: bool, homes: dict[str, Path]) -> None:
    prompt = prompt_of(homes[kind], kind) if with_prompt else None
    made, filled = texts_of(prompt, homes[kind], kind)
    batch = made.batch(0)
    assert sorted(batch["row"].tolist()) == [0, 1, 2]
    for row in range(3):
        assert unmasked(batch, row) == filled[int(batch["row"][row])]
    part = made.batch(0, 1, 3)
    width = part["input_ids"].shape[1]
    assert torch.equal(part["input_ids"], batch["input_ids"][1:, :width])
    assert torch.equal(part["labels"], batch["labels"][1:, :width])
    mean = -(-sum(map(len, filled)) // 3)
    assert abs(made.tokens_per_row - mean) <= 1


def test_property_with_no_other_mask_exactly_the_word_is_predicted(tiny_masked: Path) -> None:
    prompt = prompt_of(tiny_masked, "masked")
    made, _ = texts_of(prompt, tiny_masked, "masked", probability=0.0, always_mask_label=True)
    batch = made.batch(0)
    assert (batch["labels"] != -100).sum(1).tolist() == [1, 1, 1]
    for row in range(3):
        expected = prompt.verbaliser.ids[[1, 0, 2][int(batch["row"][row])]][0]
        at = int((batch["labels"][row] != -100).nonzero())
        assert batch["labels"][row, at] == expected
        assert batch["input_ids"][row, at] == prompt.tokenizer.mask_token_id


def test_property_masks_are_drawn_anew_and_the_word_is_a_token_like_others(tiny_masked: Path) -> None:
    prompt = prompt_of(tiny_masked, "masked")
    made, _ = texts_of(prompt, tiny_masked, "masked")
    batches = [made.batch(step) for step in range(400)]
    words = [ids[0] for ids in prompt.verbaliser.ids]
    # The words stand nowhere else in these texts, which are of no single letters a, b, c after "=".
    predicted = np.mean([bool(np.isin(row[row != -100], words).any()) for b in batches for row in b["labels"].numpy()])
    total = np.mean([float((b["labels"] != -100).sum() / b["attention_mask"].sum()) for b in batches])
    assert 0.12 < total < 0.18
    # 1,200 draws at 0.15 have a standard deviation of 0.01; other "a", "b", "c" of the texts may add to it.
    assert predicted > 0.11
    assert not torch.equal(batches[0]["labels"].sum(), batches[1]["labels"].sum())
    again, _ = texts_of(prompt, tiny_masked, "masked")
    assert torch.equal(again.batch(7)["input_ids"], batches[7]["input_ids"])
