from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from headwater.modalities.text.checks import CHECKERS, PROMPTS, Instruction, followed
from headwater.modalities.text.docs import Document
from headwater.modalities.text.ledger import NAMES, copy_tasks, ledger, ledger_metrics, pattern_tasks
from headwater.modalities.text.score import bits_per_byte
from headwater.modalities.text.tiny import PRESETS, tiny_llama
from headwater.modalities.text.tokenizers import train_bpe, word_tokenizer

TOKENIZER = train_bpe([f"{n} -> {n}\n the cat sat {n}" for n in range(100)], 400)
DOCUMENTS = [Document(str(n), f"the cat sat on {n} mats and then {n} more") for n in range(30)]


class Oracle(torch.nn.Module):
    """A model that puts ``confidence`` on the token that comes next, or on another one."""

    def __init__(self, rule, confidence=0.9):
        super().__init__()
        self.rule, self.confidence = rule, confidence
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(max_position_embeddings=512))
        self.device = torch.device("cpu")

    def forward(self, input_ids, attention_mask):
        size = len(TOKENIZER)
        logits = torch.full((*input_ids.shape, size), (1 - self.confidence) / (size - 1)).log()
        for row, (ids, mask) in enumerate(zip(input_ids.tolist(), attention_mask.tolist(), strict=True)):
            ids = ids[: sum(mask)]
            for place in range(len(ids) - 1):
                logits[row, place, self.rule(ids, place)] = torch.tensor(self.confidence).log()
        return SimpleNamespace(logits=logits)


def right(ids, place):
    return ids[place + 1]


def wrong(ids, place):
    return (ids[place + 1] + 1) % len(TOKENIZER)


def test_oracle_a_model_that_knows_what_comes_and_how_well():
    found = ledger(Oracle(right), TOKENIZER, DOCUMENTS, tasks=8)
    assert found["copy"] == found["pattern"] == 1
    assert found["calibration"] == pytest.approx(0.1, abs=1e-6)  # always right, at a confidence of 0.9
    # every token costs -ln 0.9 nats
    tokens = sum(len(TOKENIZER(d.text)["input_ids"]) for d in DOCUMENTS)
    size = sum(len(d.text.encode()) for d in DOCUMENTS)
    assert found["general"] == pytest.approx(-np.log2(0.9) * tokens / size, rel=1e-5)


def test_oracle_a_model_that_is_sure_and_wrong():
    found = ledger(Oracle(wrong), TOKENIZER, DOCUMENTS, tasks=8)
    assert found["copy"] == found["pattern"] == 0
    assert found["calibration"] == pytest.approx(0.9, abs=1e-6)


def test_property_the_tasks_say_what_they_promise():
    for task in copy_tasks(50, 0):
        first, second, asked = task.prompt.split("\n")
        for shot in (first, second):
            left, _, copied = shot.partition(" -> ")
            assert left == copied
        assert asked == task.answer.strip() + " ->"
    for task in pattern_tasks(50, 0):
        words = task.prompt.split()
        period = task.answer.split()
        assert words == period * 2
        assert len(set(period)) == len(period) >= 2
    assert copy_tasks(5, 0) == copy_tasks(5, 0) != copy_tasks(5, 1)


def test_property_padding_and_batches_do_not_matter():
    model = tiny_llama(TOKENIZER, **PRESETS["nano"], context=256, generator_seed=0)
    model.train()
    one, many = (ledger(model, TOKENIZER, DOCUMENTS, tasks=12, batch_size=size) for size in (1, 7))
    assert model.training
    assert one.keys() == many.keys()
    for name in one:
        assert one[name] == pytest.approx(many[name], abs=1e-4)
    assert one["general"] == pytest.approx(bits_per_byte(model, TOKENIZER, DOCUMENTS).bits_per_byte)


def test_degenerate_what_cannot_be_measured_is_absent():
    model = tiny_llama(TOKENIZER, **PRESETS["nano"], context=256, generator_seed=0)
    assert set(ledger(model, TOKENIZER, tasks=4)) == {"copy", "pattern"}  # no text, no chat template
    assert set(ledger(model, TOKENIZER, tasks=4, window=4)) == set()  # no task fits
    assert ledger_metrics({"copy": 0.5, "general": 2.0}, {"copy": 0.25}) == {
        "ledger/copy_start": 0.5,
        "ledger/copy": 0.25,
    }


def test_degenerate_a_vocabulary_that_cannot_say_numbers_is_not_asked_for_them():
    words = word_tokenizer(["the cat sat on a mat"])
    model = tiny_llama(words, **PRESETS["nano"], context=256, generator_seed=0)
    assert ledger(model, words, tasks=4) == {}


def test_property_a_chat_model_is_asked_for_forms():
    chat = PreTrainedTokenizerFast(
        tokenizer_object=TOKENIZER.backend_tokenizer, eos_token=TOKENIZER.eos_token, pad_token=TOKENIZER.eos_token
    )
    chat.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}:"
    model = tiny_llama(TOKENIZER, **PRESETS["nano"], context=512, generator_seed=0)
    asked = []

    def shouts(input_ids, **settings):
        asked.append(chat.decode(input_ids[0]))
        answer = torch.tensor(chat("the cat sat")["input_ids"])[None]
        return torch.cat([input_ids, answer], dim=1)

    model.generate = shouts
    found = ledger(model, chat, tasks=2)["instruction"]
    assert len(asked) == len(PROMPTS)
    assert asked[0].endswith("Answer in at most 8 words.:")
    by_hand = np.mean([followed(each, "the cat sat") for each in PROMPTS])
    assert found == by_hand == pytest.approx(9 / 24)  # short enough, no ' the ' inside, and lowercase


@pytest.mark.parametrize(
    ("name", "argument", "good", "bad"),
    [
        ("max_words", "3", ["a", "a b c", "a\nb c"], ["", "a b c d", "one two three four"]),
        ("must_contain", "lantern", ["a Lantern", "lanterns", "LANTERN"], ["", "lamp", "lan tern"]),
        ("must_not_contain", " the ", ["a sea", "The sea", "theory"], ["", "on the sea", "ON THE SEA"]),
        ("lowercase", "", ["abc", "a 1!", "é"], ["", "Abc", "123"]),
        ("uppercase", "", ["ABC", "A 1!", "É"], ["", "Abc", "123"]),
        ("json", "", ['{"a": 1}', "[1, 2]", '```json\n{"a": 1}\n```'], ["", "1", "{'a': 1}"]),
        (
            "ends_with",
            "that is all",
            ["So, that is all", "that is all\n", "x that is all "],
            ["", "that is all.", "no"],
        ),
        ("bullets", "2", ["- a\n- b", "* a\n* b", "so:\n - a\n - b"], ["", "- a", "- a\n- b\n- c"]),
    ],
)
def test_equation_of_each_checker(name, argument, good, bad):
    assert all(CHECKERS[name](response, argument) for response in good)
    assert not any(CHECKERS[name](response, argument) for response in bad)


def test_equation_of_loose():
    asked = Instruction("Say it.", "lowercase")
    assert not followed(asked, "Sure:\nthe sea is wide")
    assert followed(asked, "Sure:\nthe sea is wide", loose=True)
    assert followed(Instruction("", "ends_with", "that is all"), "*that is all*", loose=True)
    assert not followed(asked, "Sure: The sea", loose=True)


def test_rejects_a_checker_that_does_not_exist():
    with pytest.raises(ValueError, match="no checker 'politeness'; there are max_words"):
        Instruction("", "politeness")


def test_property_every_name_is_in_the_table():
    assert set(NAMES) == {"general", "copy", "pattern", "calibration", "instruction"}
