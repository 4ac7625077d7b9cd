"""Questions with answers: what is learned of them, and what a written answer is worth."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from headwater.modalities.text.docs import Document
from headwater.modalities.text.instruct import AnswerFormatter, answered, exact_match, rouge_l

WORDS = st.lists(st.sampled_from(["a", "b", "c"]), max_size=6)


@pytest.fixture(scope="module")
def tokenizer(tiny_causal: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_causal)


def test_oracle_the_learned_tokens_are_the_answer(tokenizer: PreTrainedTokenizerBase) -> None:
    document = answered("1", "graph sum", "node path", task="t")
    assert document == Document("1", "graph sum node path", {"task": "t", "prompt": "graph sum"})
    ((example,),) = AnswerFormatter(tokenizer)([document], room=64)
    learned = example.input_ids[example.trained].tolist()
    assert learned == [*tokenizer(" node path")["input_ids"], tokenizer.eos_token_id]
    assert example.input_ids[~example.trained].tolist() == [
        tokenizer.eos_token_id,
        *tokenizer("graph sum")["input_ids"],
    ]


def test_degenerate_without_a_prompt_everything_is_learned(tokenizer: PreTrainedTokenizerBase) -> None:
    ((example,),) = AnswerFormatter(tokenizer)([Document("1", "graph sum")])
    assert example.trained.all()


def test_property_a_long_answer_has_its_prompt_before_every_piece(tokenizer: PreTrainedTokenizerBase) -> None:
    document = answered("1", "graph sum", " ".join(["node"] * 40))
    (pieces,) = AnswerFormatter(tokenizer)([document], room=16)
    head = [tokenizer.eos_token_id, *tokenizer("graph sum")["input_ids"]]
    assert len(pieces) > 1
    assert all(piece.input_ids[: len(head)].tolist() == head for piece in pieces)
    learned = [token for piece in pieces for token in piece.input_ids[piece.trained].tolist()]
    assert learned == [*tokenizer(document.text[len("graph sum") :])["input_ids"], tokenizer.eos_token_id]


def test_rejects_documents_that_do_not_fit(tokenizer: PreTrainedTokenizerBase) -> None:
    formatter = AnswerFormatter(tokenizer)
    with pytest.raises(ValueError, match="document '7' does not begin with its prompt, 'sum'"):
        formatter([Document("7", "graph sum", {"prompt": "sum"})])
    with pytest.raises(ValueError, match="leave no room for a document after a head"):
        formatter([answered("1", "graph " * 30, "node")], room=16)


def test_equation_rouge_l_of_cases_counted_by_hand() -> None:
    assert rouge_l("the cat sat", ["the cat sat"]) == 1.0
    assert rouge_l("The CAT, sat.", "the cat sat") == 1.0
    # Longest common subsequence "a c e": recall 3/5, precision 3/4.
    assert rouge_l("a c x e", "a b c d e") == pytest.approx(2 * 0.6 * 0.75 / (0.6 + 0.75))
    assert rouge_l("dog", ["cat", "a dog"]) == pytest.approx(2 / 3)
    assert rouge_l("", "cat") == rouge_l("cat", "") == rouge_l("...", "...") == rouge_l("cat", []) == 0.0


@given(WORDS, WORDS)
def test_oracle_the_longest_common_subsequence_is_found(a: list[str], b: list[str]) -> None:
    def subsequences(words: list[str]) -> set[tuple[str, ...]]:
        return {tuple(words[i] for i in at) for n in range(len(words) + 1) for at in combinations(range(len(words)), n)}

    longest = max(map(len, subsequences(a) & subsequences(b)))
    expected = 2 * longest / (len(a) + len(b)) if longest else 0.0
    assert rouge_l(" ".join(a), " ".join(b)) == pytest.approx(expected)


def test_equation_exact_match_leaves_space_aside() -> None:
    assert exact_match(" 42\n", "42") == exact_match("42", ["41", "42 "]) == 1.0
    assert exact_match("42.", "42") == exact_match("", ["42"]) == 0.0
