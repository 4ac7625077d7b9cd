"""The verifiable-tasks kit: every generator against its verifier, and both against arithmetic done elsewhere."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from scipy.stats import chi2_contingency
from transformers import AutoTokenizer

from headwater.core.rng import numpy_generator
from headwater.modalities.text.verifiable import (
    TASKS,
    Check,
    Item,
    build_tokenizer,
    read_builtin,
    sample_items,
    to_dataset,
)

CHAINS = ("sym_chain", "word_chain")
every_task = pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)


def draws(task, count, seed=0, **difficulty):
    rng = numpy_generator(seed, "test")
    return [task.sample(rng, **difficulty) for _ in range(count)]


@every_task
def test_oracle_ten_thousand_items_verify_their_own_gold(task):
    for item in draws(task, 10_000):
        check = task.verify(item, item.gold)
        assert (check.correct, check.format_ok, check.quality) == (True, True, 9), item
        assert check.parsed == item.answer


@pytest.mark.parametrize("name", CHAINS)
def test_oracle_answers_and_steps_are_what_python_computes(name):
    for item in draws(TASKS[name], 2000):
        start, *rest = re.findall(r"[+-]? ?\d+", item.prompt) if name == "sym_chain" else (None,)
        if name == "sym_chain":
            total = eval(" ".join([start, *rest]))
        else:
            asked = item.prompt.split()[-3]
            story = [sentence.split() for sentence in item.prompt.split(" . ")[:-1]]
            signs = {"has": 1, "finds": 1, "buys": 1, "gets": 1, "loses": -1, "sells": -1, "gives": -1}
            total = sum(signs[verb] * int(number) for person, verb, number in story if person == asked)
        assert total == item.answer
        left, right = zip(
            *(line.split("=") for line in item.gold.split(" answer")[0].rstrip(" ;").split(";")), strict=True
        )
        assert [eval(line) for line in left] == [int(number) for number in right]
        assert all(0 <= int(number) <= 20 for number in re.findall(r"\d+", item.prompt + item.gold))
        assert len(left) == item.meta["steps"]


def test_oracle_lists_parity_and_truth_are_what_python_computes():
    for name, wanted in (("list_copy", list), ("list_rev", lambda x: x[::-1]), ("list_sort", sorted)):
        for item in draws(TASKS[name], 500):
            numbers = [int(word) for word in item.prompt.split()[1:-1]]
            assert item.answer == " ".join(map(str, wanted(numbers)))
    for item in draws(TASKS["parity"], 500):
        assert item.answer == ("true" if item.prompt.count("1") % 2 == 0 else "false")
    for item in draws(TASKS["chain_true"], 2000):
        lines = item.prompt.split(" true ?")[0].rstrip(" ;").split(" ; ")
        true = all(eval(line.replace("=", "==")) for line in lines)
        ends, begins = [line.split("= ")[1] for line in lines], [line.split()[0] for line in lines]
        assert (item.answer == "true") == (true and ends[:-1] == begins[1:])


@every_task
def test_property_one_changed_number_or_truth_value_is_noticed(task):
    rng = np.random.default_rng(0)
    for item in draws(task, 1000):
        words = item.gold.split()
        places = [p for p, word in enumerate(words) if word.isdigit() or word in ("true", "false")]
        place = int(rng.choice(places))
        if words[place].isdigit():
            words[place] = str((int(words[place]) + int(rng.integers(1, 21))) % 21)
        else:
            words[place] = {"true": "false", "false": "true"}[words[place]]
        check = task.verify(item, " ".join(words))
        assert not check.correct or check.quality < 9, (item, words)
        if place > words.index("answer"):
            assert not check.correct


def test_equation_quality_by_hand():
    task = TASKS["sym_chain"]
    item = Item("7 + 5 - 3 <sep>", "", 9, {"start": 7, "trace": [["+", 5], ["-", 3]]})
    for response, expected in (
        ("7 + 5 = 12 ; 12 - 3 = 9 ; answer 9 <eos>", (True, 9)),
        ("7 - 3 = 4 ; 4 + 5 = 9 ; answer 9 <eos>", (True, 9)),  # another true order
        ("7 + 5 = 12 ; 12 - 3 = 8 ; answer 9 <eos>", (True, 6)),  # floor(9 (1/2 + 1/4)) = floor(6.75)
        ("7 + 5 = 12 ; answer 9 <eos>", (True, 6)),  # one step of the two is missing
        ("answer 9 <eos>", (True, 4)),  # a lucky guess: floor(9 / 2)
        ("7 + 5 = 12 ; 12 - 3 = 9 ; answer 8 <eos>", (False, 4)),
        ("7 + 5 = 12 ; 12 + 5 = 17 ; answer 9 <eos>", (True, 6)),  # + 5 was used already
        ("7 + 5 = 12 ; 11 - 3 = 8 ; answer 8 <eos>", (False, 2)),  # true, but not from 12: floor(9 / 4)
        ("7 + 5 = 12 ; 12 - 3 = 9 ; 9 - 3 = 6 ; answer 9 <eos>", (True, 7)),  # floor(9 (1/2 + 2/6)) = floor(7.5)
        ("7 + 5 12 ; 12 - 3 = 9 ; answer 9 <eos>", (True, 4)),  # the broken line is no step, and 12 is not reached
    ):
        check = task.verify(item, response)
        assert (check.correct, check.quality) == expected, response


def test_property_only_the_right_persons_events_count():
    item = Item("", "", 12, {"start": 7, "trace": [["+", 5]]})  # bob loses 3
    assert TASKS["word_chain"].verify(item, "7 - 3 = 4 ; answer 12 <eos>").quality == 4


@pytest.mark.parametrize(
    "response",
    [
        "",
        "answer 9",
        "answer <eos>",
        "9 <eos>",
        "answer 9 <eos> <eos>",
        "answer 9 <eos> 9",
        "answer 9 answer 9 <eos>",
        "answer 9 9 <eos>",
        "answer nine <eos>",
        "answer 21 <eos>",
        "answer true <eos>",
    ],
)
def test_rejects_answers_of_another_form(response):
    item = Item("", "", 9, {"start": 9, "trace": []})
    assert TASKS["sym_chain"].verify(item, response) == Check(False, None, False, 0)


def test_rejects_words_before_the_answer_of_a_task_without_steps():
    (item,) = sample_items(TASKS["parity"], 1, 0)
    assert not TASKS["parity"].verify(item, "true answer true <eos>").format_ok
    (item,) = sample_items(TASKS["list_copy"], 1, 0, length=3)
    assert not TASKS["list_copy"].verify(item, item.gold.replace(" <eos>", "")).correct


@every_task
def test_property_seeds_differ_and_follow_one_distribution(task):
    one, other = (draws(task, 3000, seed) for seed in (0, 1))
    assert [item.prompt for item in one] == [item.prompt for item in draws(task, 3000, 0)]
    assert [item.prompt for item in one] != [item.prompt for item in other]
    kinds = sorted({item.meta["steps"] for item in one})
    counts = np.array([[sum(i.meta["steps"] == k for i in items) for k in kinds] for items in (one, other)])
    assert chi2_contingency(counts).pvalue > 1e-3
    even = chi2_contingency([counts.sum(0), np.full(len(kinds), counts.sum() / len(kinds))]).pvalue
    assert even > 1e-3, "every difficulty is drawn as often"


def test_property_half_of_the_statements_are_true():
    for name in ("parity", "chain_true"):
        share = np.mean([item.answer == "true" for item in draws(TASKS[name], 4000)])
        assert abs(share - 0.5) < 0.03  # three standard deviations are 0.024


@pytest.mark.parametrize("name", CHAINS)
def test_property_harder_items_share_no_prompt_with_training_ones(name):
    easy = {item.prompt for item in sample_items(TASKS[name], 1500, 0, steps=(1, 3))}
    hard = {item.prompt for item in sample_items(TASKS[name], 1500, 0, steps=(4, 5))}
    assert len(easy) == len(hard) == 1500, "no prompt twice"
    assert not easy & hard


@every_task
def test_oracle_tokenizer_round_trips(task, tmp_path):
    build_tokenizer().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for item in draws(task, 300):
        text = f"<bos> {item.prompt} {item.gold} <pad>"
        ids = tokenizer(text)["input_ids"]
        assert len(ids) == len(text.split()), "one token a word"
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert tokenizer.padding_side == "left"
    padded = tokenizer(["7 + 5 <sep>", "7 <sep>"], padding=True)["input_ids"]
    assert padded[1][:2] == [tokenizer.pad_token_id] * 2


def test_rejects_a_word_outside_the_vocabulary():
    with pytest.raises(Exception, match="UNK"):
        build_tokenizer()("seven")


def test_property_a_data_set_holds_what_the_items_hold():
    task = TASKS["word_chain"]
    dataset, items = to_dataset(task, 50, 3), sample_items(task, 50, 3)
    assert dataset.column_names == ["prompt", "gold", "answer", "meta"]
    for row, item in zip(dataset, items, strict=True):
        again = Item(row["prompt"], row["gold"], int(row["answer"]), json.loads(row["meta"]))
        assert task.verify(again, item.gold).quality == 9
        assert again == item
    assert [item.prompt for item in items] == [item.prompt for item in sample_items(task, 80, 3)][:50]


def test_degenerate_no_item():
    assert sample_items(TASKS["parity"], 0, 0) == []


def test_rejects_what_cannot_be_drawn():
    with pytest.raises(ValueError, match="after 16 of 17 prompts"):
        sample_items(TASKS["parity"], 17, 0, length=4)
    with pytest.raises(ValueError, match=r"begin at 1 or more; got \(3, 2\)"):
        sample_items(TASKS["sym_chain"], 1, 0, steps=(3, 2))
    with pytest.raises(ValueError, match=r"no builtin prompts 'headwater:verifiable/partiy'.*verifiable/parity"):
        read_builtin("verifiable/partiy")


def test_property_builtin_prompts_are_the_same_for_everybody():
    assert read_builtin("verifiable/chain_true", 7) == sample_items(TASKS["chain_true"], 7, 0)
    assert len(read_builtin("verifiable/parity")) == 1200
