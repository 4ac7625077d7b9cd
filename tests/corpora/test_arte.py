"""ARTE's parts: drafts and what is left out, one-shot scores, telling questions, pairs, and the aligned teacher."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerBase

from headwater.claims.arte import CLAIM
from headwater.core.claim import judge
from headwater.core.optim import OptimSpec
from headwater.corpora.arte_drafts import (
    Draft,
    Form,
    TeacherPrompts,
    Unseen,
    elicit,
    parse_rationale,
    read_drafts,
    tailor,
    write_drafts,
)
from headwater.corpora.arte_scores import (
    Candidate,
    Metric,
    NoPreference,
    draft_pairs,
    icl_score,
    icl_scores,
    preference_pairs,
    select_discriminative,
)
from headwater.corpora.arte_teacher import DPOSpec, align_teacher, encode_preferences
from headwater.modalities.text.generate import Message, ScriptedGenerator
from headwater.modalities.text.instruct import exact_match
from headwater.modalities.text.pairs import PairModel, Pairs
from headwater.modalities.text.preference import Preference, reference_logps
from headwater.modalities.text.tiny import tiny_llama
from headwater.modalities.text.tokenizers import word_tokenizer

WORDS = "ask so one two three four five six seven eight"
FORM = Form(ask="ask {question}", between=" . ", marker="so")
ITEMS = Pairs(["one", "two three four", "five six", "one one one one one"], ["one", "two", "six", "eight"])
DRAFTS = [Draft("one two", "three so four", "four"), Draft("six", "so six", "six"), Draft("one two", "so one", "one")]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return word_tokenizer([WORDS])


@pytest.fixture
def model(tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """A model whose weights are large enough that it writes something else after every prompt."""
    found = tiny_llama(tokenizer, 16, 2, 2, 32, context=64, tie=False, generator_seed=3)
    with torch.no_grad():
        for weight in found.parameters():
            if weight.ndim == 2:
                weight.mul_(12)
    return found


# -- drafts


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It is 4.\nThe answer is 4.", ("It is 4.\nThe answer is 4", "4")),
        ("The answer is 3? No. The answer is: 4\nDone.", ("The answer is 3? No. The answer is: 4", "4")),
        ("The answer isolates 4", None),
        ("The answer is .", None),
        ("The answer is", None),
        ("", None),
    ],
)
def test_equation_an_answer_follows_the_last_marker(text: str, expected: tuple[str, str] | None) -> None:
    assert parse_rationale(text, "The answer is") == expected


def test_equation_thirteen_words_in_a_row_are_a_repeat() -> None:
    long = " ".join(f"w{i}" for i in range(20))
    unseen = Unseen([long, "What is 2 + 2?"])
    assert unseen.repeats("so: " + " ".join(f"W{i}," for i in range(5, 18)) + " end")
    assert not unseen.repeats(" ".join(f"w{i}" for i in range(5, 17)))
    assert unseen.repeats("and what IS 2, 2 then")
    assert not unseen.repeats("what is 2")
    assert not Unseen([]).repeats(long)


class Teacher:
    """Writes numbered questions and rationales, and remembers what it was asked."""

    def __init__(self, spoiled: Sequence[str] = ()) -> None:
        self.asked: list[str] = []
        self.spoiled = list(spoiled)
        self.generator = ScriptedGenerator({"question": self.question, "rationale": self.rationale})

    def question(self, messages: Sequence[Message], rng: random.Random) -> str:
        self.asked.append(messages[-1].content)
        return self.spoiled.pop() if self.spoiled else f" q{rng.randrange(10**9)} \n"

    def rationale(self, messages: Sequence[Message], rng: random.Random) -> str:
        self.asked.append(messages[-1].content)
        return f"because {rng.randrange(10**9)} so 7" if rng.random() < 0.7 else "no idea"


def test_oracle_drafts_come_from_the_prompts(tmp_path: Path) -> None:
    teacher = Teacher()
    prompts = TeacherPrompts(question="like {question}", rationale=("why {question}", "how {question}"))
    found = elicit(teacher.generator, ["a", "b"], 3, 4, prompts, marker="so")
    assert teacher.asked[:6] == ["like a", "like b"] * 3
    assert found.counts["requests"] == 6 + 24 == len(teacher.asked)
    assert found.counts["unparsed"] == 24 - len(found.drafts) > 0
    questions = [asked.removeprefix("why ") for asked in teacher.asked[6::4]]
    assert len(set(questions)) == 6
    assert teacher.asked[6:10] == [f"{style} {questions[0]}" for style in ("why", "how") * 2]
    assert {draft.question for draft in found.drafts} <= set(questions)
    assert len({draft.rationale for draft in found.drafts}) == len(found.drafts), "every draw is another"
    assert {draft.answer for draft in found.drafts} == {"7"}
    assert found.usd == 0
    write_drafts(found.drafts, tmp_path / "drafts.parquet")
    assert read_drafts(tmp_path / "drafts.parquet") == found.drafts


def test_property_drafts_that_repeat_what_is_asked_are_left_out() -> None:
    teacher = Teacher(["the hidden one", "  ", "fine"])
    found = elicit(teacher.generator, ["a"], 3, 1, marker="so", unseen=Unseen(["hidden one"]))
    assert (found.counts["leaked"], found.counts["empty"]) == (1, 1)
    assert not any("hidden" in asked for asked in teacher.asked[3:])


def test_property_another_seed_draws_others_and_the_same_the_same() -> None:
    one, two, other = (elicit(Teacher().generator, ["a"], 4, 2, marker="so", seed=seed).drafts for seed in (0, 0, 1))
    assert one == two
    assert not {draft.question for draft in one} & {draft.question for draft in other}


def test_property_a_tailored_set_is_filled_up() -> None:
    teacher = Teacher()
    found = tailor(teacher.generator, ["a", "b", "c"], 8, marker="so")
    assert len(found.drafts) == 8
    assert found.counts["unparsed"] > 0
    assert found.counts["requests"] == 2 * (8 + found.counts["unparsed"])
    assert {draft.meta["style"] for draft in found.drafts} == {0}
    by_seed = [sum(draft.meta["seed"] == seed for draft in found.drafts) for seed in range(3)]
    assert min(by_seed) >= 1


def test_degenerate_a_teacher_that_never_answers_ends() -> None:
    silent = ScriptedGenerator({"question": lambda messages, rng: "q", "rationale": lambda messages, rng: "hm"})
    found = tailor(silent, ["a"], 3, marker="so")
    assert found.drafts == []
    assert found.counts["unparsed"] == 4 * 3
    assert elicit(silent, [], 2, 2, marker="so").counts["requests"] == 0


def test_rejects_a_prompt_without_a_question() -> None:
    with pytest.raises(ValueError, match=r"must contain \{question\}"):
        TeacherPrompts(rationale=("think",))


# -- scores


def test_oracle_accuracy_is_that_of_one_text_at_a_time(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    reader = PairModel(model, tokenizer, "causal", 64, 8)
    shown = [f"ask {d.question} {d.rationale} . ask {q}" for d, q in product(DRAFTS, ITEMS.sources)]
    written = [reader.answers([text])[0] for text in shown]
    # The marker is the word that most of what the model happens to write holds before its end.
    marker = max(WORDS.split(), key=lambda word: sum(word in text.split()[:-1] for text in written))
    parsed = [parse_rationale(text, marker) for text in written]
    # Right is what it says after the first example that gets it to say anything.
    right = [next((p[1] for p in parsed[i :: len(ITEMS)] if p), "none") for i in range(len(ITEMS))]
    expected = [exact_match(p[1], right[i % len(ITEMS)]) if p else 0.0 for i, p in enumerate(parsed)]
    assert 0.2 < np.mean(expected) < 0.9, "the model says different things, so that the test can fail"
    for size in (64, 3):
        form = Form(ask="ask {question}", between=" . ", marker=marker)
        items = Pairs(ITEMS.sources, right)
        found = icl_scores(model, tokenizer, DRAFTS, items, form=form, max_answer=8, batch_size=size)
        assert found.ravel().tolist() == expected


def test_oracle_likelihood_is_that_of_one_text_at_a_time(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    asked = list(zip(ITEMS.sources, ITEMS.targets, strict=True))
    # The target here ends in no EOS, which PairModel adds.
    reader = PairModel(model, tokenizer, "causal", 64, 2)
    shown = [f"ask {d.question} {d.rationale} . ask {q}" for d, (q, _) in product(DRAFTS, asked)]
    expected = -reader.nats(Pairs(shown, [f"so {a}" for _, (_, a) in product(DRAFTS, asked)]))
    found = icl_scores(model, tokenizer, DRAFTS, ITEMS, "nll", FORM)
    assert np.allclose(found.ravel(), expected, atol=1e-4)
    assert found.std() > 0.1


@pytest.mark.parametrize("metric", ["accuracy", "nll"])
def test_property_one_draft_scores_the_mean(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, metric: Metric
) -> None:
    matrix = icl_scores(model, tokenizer, [*DRAFTS, DRAFTS[0]], ITEMS, metric, FORM, 8)
    assert matrix.shape == (4, 4)
    assert matrix[3].tolist() == matrix[0].tolist()
    alone = [icl_score(model, tokenizer, d, ITEMS, metric, form=FORM, max_answer=8) for d in DRAFTS]
    assert np.allclose(alone, matrix[:3].mean(axis=1), atol=1e-5)


def test_degenerate_no_draft_and_no_question(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    assert icl_scores(model, tokenizer, [], ITEMS, form=FORM).shape == (0, 4)
    with pytest.raises(ValueError, match="there is none"):
        icl_scores(model, tokenizer, DRAFTS, Pairs([], []), form=FORM)


# -- telling questions


def test_equation_variance_takes_means_nearest_a_half() -> None:
    matrix = np.zeros((10, 5))
    for column, right in enumerate((1, 5, 10, 7, 4)):
        matrix[:right, column] = 1
    # p (1 - p): .09, .25, 0, .21, .24
    assert select_discriminative(matrix, 3).tolist() == [1, 4, 3]
    assert select_discriminative(matrix, 40).tolist() == [1, 4, 3, 0, 2]


def test_oracle_two_parameters_tell_steep_questions_from_flat_ones() -> None:
    rng = np.random.default_rng(0)
    slopes = np.array([0.2, 3.0, 0.2, 3.0, 0.2, 3.0])
    ability = rng.standard_normal(600)
    matrix = (rng.random((600, 6)) < 1 / (1 + np.exp(-ability[:, None] * slopes))).astype(float)
    assert set(select_discriminative(matrix, 3, "2pl").tolist()) == {1, 3, 5}
    # All are right half the time, so their variance knows nothing of it.
    assert np.ptp(matrix.var(axis=0)) < 0.01


def test_degenerate_questions_that_all_get_right_come_last() -> None:
    matrix = np.ones((6, 3))
    matrix[:3, 2] = 0
    assert select_discriminative(matrix, 1, "2pl").tolist() == [2]
    assert select_discriminative(np.ones((2, 3)), 2, "2pl").tolist() == [0, 1]


def test_rejects_matrices_that_say_nothing() -> None:
    with pytest.raises(ValueError, match="at least one draft"):
        select_discriminative(np.zeros((0, 3)), 1)
    with pytest.raises(ValueError, match="k must be >= 1"):
        select_discriminative(np.zeros((1, 3)), 0)
    with pytest.raises(ValueError, match="right \\(1\\) or wrong"):
        select_discriminative(np.full((2, 2), 0.5), 1, "2pl")


# -- pairs

CANDIDATES = [Candidate("p", "a", 0.9), Candidate("p", "b", 0.5), Candidate("p", "c", 0.48), Candidate("q", "d", 0.1)]


def test_equation_pairs_of_one_group() -> None:
    found = preference_pairs(CANDIDATES, 0.05, kind="k")
    assert found == [Preference("p", "a", "c", "k"), Preference("p", "a", "b", "k")]
    assert preference_pairs(CANDIDATES, 0.05, 1) == [Preference("p", "a", "c")]
    # 0.5 - 0.48 is 0.02 up to rounding.
    assert len(preference_pairs(CANDIDATES, 0.02)) == 3
    assert preference_pairs([], 0.1) == []


def test_property_pairs_do_not_depend_on_order_and_turn_with_the_scores() -> None:
    rng = np.random.default_rng(0)
    many = [Candidate("pq"[i % 2], f"t{i // 3}", float(rng.random())) for i in range(24)]
    found = preference_pairs(many, 0.1)
    assert preference_pairs([many[i] for i in rng.permutation(24)], 0.1) == found
    turned = preference_pairs([Candidate(c.prompt, c.text, -c.score) for c in many], 0.1)
    assert {(p.prompt, p.rejected, p.chosen) for p in turned} == {(p.prompt, p.chosen, p.rejected) for p in found}
    means = {
        (prompt, text): np.mean([c.score for c in many if (c.prompt, c.text) == (prompt, text)])
        for prompt, text in {(c.prompt, c.text) for c in many}
    }
    assert found
    assert all(means[p.prompt, p.chosen] - means[p.prompt, p.rejected] >= 0.1 for p in found)


def test_equation_questions_are_judged_by_their_rationales() -> None:
    drafts = [
        Draft(q, f"{q} so {i}", str(i), {"seed": s}) for s, q, i in ((0, "x", 1), (0, "x", 2), (0, "y", 3), (1, "z", 4))
    ]
    prompts = TeacherPrompts(question="like {question}", rationale=("why {question}", "how {question}"))
    found = draft_pairs(drafts, [0.2, 0.6, 0.1, 1.0], ["A", "B"], prompts, margin=0.25)
    assert found == [
        Preference("like A", "x", "y", "question"),  # 0.4 and 0.1
        Preference("why x", "x so 2", "x so 1", "rationale"),
    ]


def test_rejects_drafts_that_score_alike() -> None:
    drafts = [Draft("x", f"so {i}", str(i), {"seed": 0}) for i in range(3)]
    with pytest.raises(NoPreference, match=r"from 0.5 to 0.52.*harder preference questions.*'nll'"):
        draft_pairs(drafts, [0.5, 0.5, 0.52], ["A"])
    with pytest.raises(ValueError, match="margin must be > 0"):
        preference_pairs(CANDIDATES, 0.0)
    with pytest.raises(ValueError, match="per_group must be >= 1"):
        preference_pairs(CANDIDATES, 0.1, 0)


# -- the teacher


def test_oracle_prompts_are_what_the_generator_reads(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    (found,) = encode_preferences(model, tokenizer, [Preference("one two", "three", "four five")])
    words = tokenizer.convert_ids_to_tokens(found.prompt)
    assert [word for word in words if word != "<unk>"] == ["one", "two"]
    assert tokenizer.convert_ids_to_tokens(found.chosen) == ["three", "<eos>"]
    assert tokenizer.convert_ids_to_tokens(found.rejected) == ["four", "five", "<eos>"]
    with pytest.raises(ValueError, match="leaves no room in a context of 64"):
        encode_preferences(model, tokenizer, [Preference("one " * 80, "three", "four")])


def test_learns_preferences_beside_an_untouched_base(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    model = tiny_llama(tokenizer, 16, 2, 2, 32, context=64, tie=False, generator_seed=0)
    words = WORDS.split()[2:]
    pairs = [Preference(word, "so one", "so two") for word in words]
    ids = torch.tensor([[3, 4, 5]])
    before = model(input_ids=ids).logits.detach()
    spec = DPOSpec(epochs=20, rows=8, optim=OptimSpec(lr=1e-2, weight_decay=0.0))
    trained = align_teacher(model, tokenizer, pairs, spec, directory=tmp_path / "a").model
    encoded = encode_preferences(model, tokenizer, pairs)
    base = reference_logps(trained, encoded, 0)
    with trained.disable_adapter():  # type: ignore[operator]  # a PEFT model
        assert torch.equal(trained(input_ids=ids).logits, before)
    merged = trained.merge_and_unload()  # type: ignore[operator]
    gained = reference_logps(merged, encoded, 0) - base
    assert (gained[:, 0] - gained[:, 1]).min() > 0.5
    assert trained is not model


def test_property_a_whole_teacher_can_be_trained_and_saved(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    model = tiny_llama(tokenizer, 16, 1, 2, 32, context=64, tie=False, generator_seed=0)
    pairs = [Preference("one", "so one", "so two")]
    before = reference_logps(model, encode_preferences(model, tokenizer, pairs), 0)
    spec = DPOSpec(epochs=10, lora=None, optim=OptimSpec(lr=1e-2))
    trained = align_teacher(model, tokenizer, pairs, spec, directory=tmp_path / "a")
    trained.model.save_pretrained(tmp_path / "m")  # type: ignore[operator]
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    gained = reference_logps(opened, encode_preferences(opened, tokenizer, pairs), 0) - before
    assert gained[0, 0] - gained[0, 1] > 1
    assert trained.steps == 10


def test_learns_claim_runs_at_smoke_scale(tmp_path: Path) -> None:
    measured = CLAIM.measure("smoke", 100, tmp_path / "claim")
    verdict = judge(CLAIM, "smoke", {100: measured})
    assert verdict["verdict"] == "inconclusive", "one seed says nothing"
    assert set(measured.items) == {"arte", "unaligned", "random pairs"}
    assert all(0 <= arm["share"] <= 1 for name, arm in measured.arms.items() if "share" in arm)
