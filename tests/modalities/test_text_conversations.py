"""Conversations as examples: what is learned of them, and that it is how a model is asked."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from headwater.modalities.text.conversations import ConversationFormatter, conversation, messages_of, prompt_ids
from headwater.modalities.text.docs import CorpusError, Document
from headwater.modalities.text.examples import PlainFormatter
from headwater.modalities.text.generate import Message, Request
from headwater.modalities.text.generate_hf import HFGenerator
from headwater.modalities.text.tiny import tiny_llama
from headwater.modalities.text.tokenizers import train_bpe

TURNS = (
    Message("user", "show irony"),
    Message("assistant", "how nice"),
    Message("user", "again"),
    Message("assistant", "how very nice"),
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OTHER_END = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}<turn>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def tokenizer_with(template: str | None = None, eos: str | None = None) -> Any:
    tokenizer = train_bpe(
        ["user: assistant: how very nice"], 300, extra_tokens=("<|im_start|>", "<|im_end|>", "<turn>")
    )
    tokenizer.chat_template = template
    if eos is not None:
        tokenizer.eos_token = eos
    return tokenizer


def learned(tokenizer: Any, example: Any) -> list[str]:
    """The runs of learned tokens of an example, as text."""
    runs: list[list[int]] = []
    before = False
    for token, trained in zip(example.input_ids.tolist(), example.trained.tolist(), strict=True):
        if trained:
            runs = runs if before else [*runs, []]
            runs[-1].append(token)
        before = trained
    return [tokenizer.decode(run) for run in runs]


def test_property_without_a_template_each_answer_is_an_example_asked_as_the_generator_asks() -> None:
    tokenizer = tokenizer_with()
    (examples,) = ConversationFormatter(tokenizer)([conversation("c", TURNS)], 200)
    assert len(examples) == 2
    generator = HFGenerator(tiny_llama(tokenizer, 16, 1, 2, 32, context=256, generator_seed=0), tokenizer)
    for example, place in zip(examples, (1, 3), strict=True):
        head = generator.encode(Request(TURNS[:place]))
        assert example.input_ids[: len(head)].tolist() == head == prompt_ids(tokenizer, TURNS[:place])
        assert example.trained.tolist() == [False] * len(head) + [True] * (len(example.trained) - len(head))
        assert learned(tokenizer, example) == [f" {TURNS[place].content}<eos>"]


def test_property_a_template_gives_one_example_whose_answers_are_learned_to_their_end() -> None:
    tokenizer = tokenizer_with(CHATML, eos="<|im_end|>")
    ((example,),) = ConversationFormatter(tokenizer)([conversation("c", TURNS)], 200)
    assert learned(tokenizer, example) == ["how nice<|im_end|>", "how very nice<|im_end|>"]
    whole = tokenizer.apply_chat_template(
        [{"role": m.role, "content": m.content} for m in TURNS], tokenize=False, add_generation_prompt=False
    )
    assert tokenizer.decode(example.input_ids) == whole.removesuffix("\n"), "nothing stands after the last EOS"
    for place in (1, 3):
        head = prompt_ids(tokenizer, TURNS[:place])
        assert example.input_ids[: len(head)].tolist() == head, "asked in the words that were read"


def test_property_the_last_eos_is_learned_where_the_template_has_none() -> None:
    tokenizer = tokenizer_with(OTHER_END)
    ((example,),) = ConversationFormatter(tokenizer)([conversation("c", TURNS)], 200)
    assert learned(tokenizer, example) == ["how nice<turn>", "how very nice<turn><eos>"]
    assert example.input_ids[-1] == tokenizer.eos_token_id
    assert example.trained[-1]


def test_oracle_labels_outside_the_answers_are_ignored() -> None:
    tokenizer = tokenizer_with(CHATML, eos="<|im_end|>")
    ((example,),) = ConversationFormatter(tokenizer)([conversation("c", TURNS)])
    labels = torch.tensor(example.features()["labels"])
    first, second = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in ("how nice", "how very nice"))
    kept = labels[labels != -100].tolist()
    assert [token for token in kept if token != tokenizer.eos_token_id] == [*first, *second]
    assert kept.count(tokenizer.eos_token_id) == 2


def test_degenerate_other_documents_are_learned_whole_and_cut_where_they_must_be() -> None:
    tokenizer = tokenizer_with()
    formatter = ConversationFormatter(tokenizer)
    document = Document("d", "how very nice " * 20)
    ours, plain = formatter([document], 16), PlainFormatter(tokenizer)([document], 16)
    assert [e.input_ids.tolist() for e in ours[0]] == [e.input_ids.tolist() for e in plain[0]]
    assert formatter.longest(document) == 0
    assert messages_of(document) == ()


def test_property_a_conversation_survives_json_and_unanswered_turns_are_left_out() -> None:
    tokenizer = tokenizer_with(CHATML, eos="<|im_end|>")
    document = conversation("c", TURNS, k=2)
    stored = Document("c", document.text, json.loads(json.dumps(dict(document.meta))))
    assert messages_of(stored) == TURNS
    assert document.text.splitlines() == [f"{m.role}: {m.content}" for m in TURNS]
    ((example,),) = ConversationFormatter(tokenizer)([conversation("c", TURNS[:3])])
    assert learned(tokenizer, example) == ["how nice<|im_end|>"]
    assert example.input_ids[-1] == tokenizer.eos_token_id


def test_property_the_template_is_part_of_what_examples_are_cached_under() -> None:
    plain, chat = (ConversationFormatter(tokenizer_with(t)) for t in (None, OTHER_END))
    assert plain.about != chat.about
    assert chat.about == ConversationFormatter(tokenizer_with(OTHER_END)).about


def test_rejects_what_is_no_conversation_or_does_not_fit() -> None:
    formatter = ConversationFormatter(tokenizer_with())
    longest = formatter.longest(conversation("c", TURNS))
    assert formatter([conversation("c", TURNS)], longest)
    with pytest.raises(ValueError, match=rf"'c' has {longest} tokens for {longest - 1}; leave it out"):
        formatter([conversation("c", TURNS)], longest - 1)
    with pytest.raises(ValueError, match="'c' has no turn of the assistant"):
        formatter([conversation("c", TURNS[:1])])
    for rows in ([{"role": "robot", "content": "x"}], [{"role": "user"}], ["hello"], "hello"):
        with pytest.raises(CorpusError, match="document 'd': messages must be a list of objects"):
            messages_of(Document("d", "x", {"messages": rows}))
    forgets = tokenizer_with("{{ messages[-1].content }}{% if add_generation_prompt %}:{% endif %}")
    with pytest.raises(ValueError, match="the chat template writes turn 1 of conversation 'c' differently"):
        ConversationFormatter(forgets)([conversation("c", TURNS)])
