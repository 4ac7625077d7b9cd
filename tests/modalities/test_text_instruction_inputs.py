"""Instructions as inputs: the exact text, what leaves when there is no room, and batches for two kinds of model."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.conftest import sentences
from tokenizers.processors import TemplateProcessing

from headwater.modalities.text.instruction_inputs import InstructionCollator, InstructionEncoder, encode_instruction
from headwater.modalities.text.instructions import PARTS, Instance, Instruction, InstructionPart, TaskExample
from headwater.modalities.text.tiny import tiny_llama, tiny_t5
from headwater.modalities.text.tokenizers import train_bpe

TASK = Instruction(
    name="colours",
    title="Colours",
    prompt="Name a colour.",
    definition="Given a thing, name its colour.",
    things_to_avoid="Long answers.",
    emphasis_and_caution="One word.",
    positive_examples=(
        TaskExample(input="grass", output="green", reason="it grows"),
        TaskExample(input="snow", output="white"),
        TaskExample(input="coal", output="black"),
    ),
    negative_examples=(TaskExample(input="sky", output="up", reason="no colour", suggestion="blue"),),
    instances=(Instance(input="blood", output=("red", "crimson")), Instance(input="the night sky", output="black")),
)
LINES = [
    "Prompt: Name a colour.",
    "Definition: Given a thing, name its colour.",
    "Things to Avoid: Long answers.",
    "Emphasis & Caution: One word.",
    "Negative Example 1 - input: sky output: up reason: no colour suggestion: blue",
    "Positive Example 1 - input: grass output: green reason: it grows",
    "Positive Example 2 - input: snow output: white",
    "input: blood output:",
]
TOKENIZER = train_bpe([*LINES, *sentences("general", 10)], 400)


def tokens(text: str) -> list[int]:
    found: list[int] = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    return found


@pytest.mark.parametrize(
    ("parts", "lines"),
    [
        ((), [7]),
        (("prompt",), [0, 7]),
        (("prompt", "definition"), [0, 1, 7]),
        (("prompt", "avoid", "emphasis"), [0, 2, 3, 7]),
        (("positive",), [5, 6, 7]),
        (("negative",), [4, 7]),
        (PARTS, range(8)),
        (PARTS[::-1], range(8)),
    ],
)
def test_equation_every_encoding_word_for_word(parts: tuple[InstructionPart, ...], lines: Any) -> None:
    encoded = encode_instruction(TASK, TASK.instances[0], parts, 1024, TOKENIZER)
    assert encoded.text == "\n".join(LINES[line] for line in lines)
    assert encoded.input_ids == tokens(encoded.text)


@given(room=st.integers(8, 400), which=st.sets(st.sampled_from(PARTS)), instance=st.integers(0, 1))
@settings(max_examples=60, deadline=None)
def test_property_the_instance_always_stands_whole_at_the_end(room: int, which: set[Any], instance: int) -> None:
    asked = f"input: {TASK.instances[instance].input} output:"
    encoder = InstructionEncoder(TASK, TOKENIZER, tuple(which), room)
    (encoded,) = encoder([TASK.instances[instance].input])
    if encoded is None:
        assert len(tokens(asked)) > room
        return
    assert encoded.text.endswith(asked)
    assert len(encoded.input_ids) == len(tokens(encoded.text)) <= room
    lines = encoded.text.split("\n")[:-1]
    whole = [text for _, text in TASK.blocks(tuple(which))]
    assert lines == whole[: len(lines)], "examples leave first, from the end, then fields, from the end"
    assert sum(encoded.kept.values()) == len(lines)
    if len(lines) < len(whole):
        assert len(tokens("\n".join([*whole[: len(lines) + 1], asked]))) > room, "as much as fits is kept"


def test_property_what_was_kept_is_told() -> None:
    encoded = encode_instruction(TASK, TASK.instances[0], PARTS, 1024, TOKENIZER, n_positive=3)
    assert encoded.kept == {"prompt": 1, "definition": 1, "avoid": 1, "emphasis": 1, "negative": 1, "positive": 3}
    room = len(tokens("\n".join([*LINES[:6], LINES[7]])))
    assert encode_instruction(TASK, TASK.instances[0], PARTS, room, TOKENIZER).kept["positive"] == 1


def test_oracle_causal_labels_are_the_output_and_its_end() -> None:
    batch = InstructionCollator(TOKENIZER, PARTS, "causal")([(TASK, instance) for instance in TASK.instances])
    for row, output in enumerate(("red", "black")):
        learned = batch["labels"][row]
        assert TOKENIZER.decode(learned[learned != -100]) == f" {output}<eos>"
        seen = batch["input_ids"][row][batch["attention_mask"][row] == 1]
        text = encode_instruction(TASK, TASK.instances[row], PARTS, 1024, TOKENIZER).text
        assert TOKENIZER.decode(seen) == f"<eos>{text} {output}<eos>"
    model = tiny_llama(TOKENIZER, hidden=16, layers=1, heads=2, mlp=32, context=256, generator_seed=0)
    assert torch.isfinite(model(**batch).loss)


@pytest.mark.parametrize("special", [False, True])
def test_oracle_seq2seq_inputs_are_what_the_tokenizer_makes_of_the_text(special: bool) -> None:
    tokenizer = train_bpe(LINES, 400)
    if special:
        ends = TemplateProcessing(single="<pad> $A <eos>", special_tokens=[("<pad>", 0), ("<eos>", 1)])
        tokenizer.backend_tokenizer.post_processor = ends
    collator = InstructionCollator(tokenizer, ("definition",), "seq2seq")
    batch = collator([(TASK, instance) for instance in TASK.instances])
    for row, output in enumerate(("red", "black")):
        text = encode_instruction(TASK, TASK.instances[row], ("definition",), 1024, tokenizer).text
        seen = batch["input_ids"][row][batch["attention_mask"][row] == 1]
        assert seen.tolist() == tokenizer(text)["input_ids"]
        labels = batch["labels"][row][batch["labels"][row] != -100].tolist()
        assert tokenizer.decode(labels, skip_special_tokens=True) == output
        assert labels[-1] == tokenizer.eos_token_id
        assert labels.count(tokenizer.eos_token_id) == 1
    model = tiny_t5(tokenizer, hidden=16, layers=1, heads=2, mlp=32, generator_seed=0)
    assert torch.isfinite(model(**batch).loss)


def test_property_a_task_is_tokenised_once() -> None:
    long = TASK.model_copy(update={"definition": " ".join(sentences("general", 4))})
    inputs = [f"thing {i}" for i in range(1000)]

    def seconds(work: Any) -> float:
        best = float("inf")
        for _ in range(3):
            begin = time.perf_counter()
            work()
            best = min(best, time.perf_counter() - begin)
        return best

    encoder = InstructionEncoder(long, TOKENIZER, PARTS, 4096)
    texts = [encoded.text for encoded in encoder(inputs) if encoded is not None]
    assert len(tokens(texts[0])) > 700
    naive = seconds(lambda: [tokens(text) for text in texts])
    assert seconds(lambda: encoder(inputs)) * 5 < naive


def test_degenerate_no_input_and_an_input_alone() -> None:
    encoder = InstructionEncoder(TASK, TOKENIZER, ())
    assert encoder([]) == []
    assert encoder.one("").text == "input:  output:"


def test_rejects_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="of task 'colours' is longer than 3 tokens; leave it out"):
        encode_instruction(TASK, TASK.instances[0], PARTS, 3, TOKENIZER)
    with pytest.raises(ValueError, match="is longer than 3 tokens"):
        InstructionCollator(TOKENIZER, PARTS, "causal", max_tokens=3)([(TASK, TASK.instances[0])])
    with pytest.raises(ValueError, match="max_tokens must be at least 1; got 0"):
        InstructionEncoder(TASK, TOKENIZER, PARTS, 0)
    with pytest.raises(ValueError, match="unknown part 'title'"):
        InstructionEncoder(TASK, TOKENIZER, ("title",))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no instance to encode"):
        InstructionCollator(TOKENIZER)([])
    bare = train_bpe(LINES, 400)
    bare.eos_token = None
    with pytest.raises(ValueError, match="no EOS token"):
        InstructionCollator(bare)
