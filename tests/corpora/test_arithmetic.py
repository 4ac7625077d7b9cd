"""Arithmetic: every style to the letter, exact quotas, tables of rank 2, and a model that is asked for sums."""

from __future__ import annotations

import csv
import itertools
import json
import math
from pathlib import Path
from typing import Any

import networkx
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from headwater.claims.arithmetic import LEARNING_RATES, ROW, SIZES, make_architecture, steps_until
from headwater.core.recipe import RecipeError, load_recipe
from headwater.core.run import Run, execute
from headwater.corpora.arithmetic import (
    Arithmetic,
    ArithmeticData,
    ArithmeticFormat,
    balanced_pairs,
    char_tokenizer,
    check_tokenizer,
    complement,
    completions,
    confusion_by_column,
    judged,
    rank2_complete,
    score_arithmetic,
)
from headwater.corpora.arithmetic_formats import MAX_DIGITS, Operation, results, styles_of
from headwater.corpora.arithmetic_pairs import carries, lengths, num_pairs
from headwater.corpora.context import CorpusContext
from headwater.corpora.reading import Reader
from headwater.modalities.models import ModelError
from headwater.modalities.text.tiny import tiny_llama
from headwater.modalities.text.tokenizers import train_bpe

Fields = dict[str, Any]
OPERATIONS: tuple[Operation, ...] = ("+", "-", "*", "sin", "sqrt")
EVERY = [(op, style, spaced) for op in OPERATIONS for style in styles_of(op) for spaced in (False, True)]
every_style = pytest.mark.parametrize(("op", "style", "spaced"), EVERY)


def drawn(op: Operation, n: int, digits: int = 3, seed: int = 0) -> Any:
    return balanced_pairs(op, digits, n, np.random.default_rng(seed), by=())


# -- styles


DETAILED_SUM = """Input:
128+367
Target:
<scratch>
[1,2,8] has 3 digits.
[3,6,7] has 3 digits.
[1,2,8] + [3,6,7] , A=[] , C=0 , 8+7+0=15 , A->5 , C->1
[1,2] + [3,6] , A=[5] , C=1 , 2+6+1=9 , A->9 , C->0
[1] + [3] , A=[9,5] , C=0 , 1+3+0=4 , A->4 , C->0
[] + [] , A=[4,9,5] C=0 , END
</scratch>
4 9 5
"""
DETAILED_UNEVEN = """Input:
95+7
Target:
<scratch>
[9,5] has 2 digits.
[7] has 1 digits.
[9,5] + [7] , A=[] , C=0 , 5+7+0=12 , A->2 , C->1
[9] + [] , A=[2] , C=1 , 9+0+1=10 , A->0 , C->1
[] + [] , A=[0,2] C=1 , END
</scratch>
1 0 2
"""
DETAILED_DIFFERENCE = """Input:
128-367
Target:
<scratch>
[1,2,8] has 3 digits.
[3,6,7] has 3 digits.
[1,2,8] - [3,6,7] , A=[] , C=0 , 8-7-0=1 , A->1 , C->0
[1,2] - [3,6] , A=[1] , C=0 , 2-6-0=-4 , A->6 , C->1
[1] - [3] , A=[6,1] , C=1 , 1-3-1=-3 , A->7 , C->1
[] - [] , A=[7,6,1] C=1 , 761-1000=-239 , END
</scratch>
-2 3 9
"""
DETAILED_PRODUCT = """Input:
12*36
Target:
<scratch>
[1,2] has 2 digits.
[3,6] has 2 digits.
[1,2] * 6 , A=[7,2] , k=1 , B=[7,2] , C=0+72=72
[1,2] * 3 , A=[3,6] , k=10 , B=[3,6,0] , C=72+360=432 , END
</scratch>
4 3 2
"""
DETAILED_ROOT = """Input:
sqrt(5.5808)
Target:
<scratch>
x_0=1.0000
x_1: 1/2*(1.0000+5.5808/1.0000) , x_1=3.2904
x_2: 1/2*(3.2904+5.5808/3.2904) , x_2=2.4932
x_3: 1/2*(2.4932+5.5808/2.4932) , x_3=2.3658
x_4: 1/2*(2.3658+5.5808/2.3658) , x_4=2.3623 , END
</scratch>
2.3623
"""


@pytest.mark.parametrize(
    ("op", "style", "pair", "text"),
    [
        ("+", "plain", (128, 367), "128+367=495\n"),
        ("+", "padded", (128, 367), "$128+367=0495$\n"),
        ("+", "padded", (7, 30), "$007+030=0037$\n"),
        ("+", "reverse", (128, 367), "$128+367=594$\n"),
        ("+", "padded_reverse", (128, 367), "$128+367=5940$\n"),
        ("+", "simple", (128, 367), "Input:\n128+367\nTarget:\nA->5 , C->1\nA->9 , C->0\nA->4 , C->0.\n495\n"),
        ("+", "detailed", (128, 367), DETAILED_SUM),
        ("+", "detailed", (95, 7), DETAILED_UNEVEN),
        ("-", "plain", (128, 367), "128-367=-239\n"),
        ("-", "padded", (128, 100), "$128-100=028$\n"),
        ("-", "reverse", (128, 367), "$128-367=932-$\n"),
        ("-", "simple", (128, 367), "Input:\n128-367\nTarget:\nA->1 , C->0\nA->6 , C->1\nA->7 , C->1.\n-239\n"),
        ("-", "detailed", (128, 367), DETAILED_DIFFERENCE),
        ("*", "padded", (12, 36), "$012*036=000432$\n"),
        ("*", "reverse", (12, 36), "$12*36=234$\n"),
        ("*", "detailed", (12, 36), DETAILED_PRODUCT),
        ("sqrt", "detailed", (55808, 0), DETAILED_ROOT),
        ("sin", "plain", (10313, 0), "sin(1.0313)=0.8579\n"),
        ("sin", "plain", (-3, 0), "sin(-0.0003)=-0.0002\n"),
    ],
)
def test_equation_golden_strings(op: Any, style: Any, pair: tuple[int, int], text: str) -> None:
    form = ArithmeticFormat(op, style, 4 if op in ("sin", "sqrt") else 3)
    assert form.render(*pair) == text
    assert text.startswith(form.prompt(*pair))
    assert text == form.prompt(*pair) + form.answers([pair])[0] + "\n"


def test_equation_the_sine_adds_terms_of_its_series() -> None:
    lines = ArithmeticFormat("sin", "detailed", 4).render(10313).splitlines()
    # 1.0313 - 1.0313^3 / 6 = 0.84849, + 1.0313^5 / 120 = 0.85821, - 1.0313^7 / 5040 = 0.85797
    assert lines[4:7] == [
        "x_0=1.0313",
        "x_1: x_0 - 1/(3!)*(x^3) , x_1=0.8484",
        "x_2: x_1 + 1/(5!)*(x^5) , x_2=0.8582",
    ]
    assert lines[-1] == "0.8579"


@pytest.mark.parametrize("op", ["sin", "sqrt"])
def test_oracle_the_last_step_of_a_function_is_its_cut_value(op: Any) -> None:
    digits = 3
    form = ArithmeticFormat(op, "detailed", digits)
    pairs = complement([], op, digits)
    truth = {"sin": math.sin, "sqrt": math.sqrt}[op]
    for (x, _), answer in zip(pairs.tolist(), form.answers(pairs), strict=True):
        *_, last, _, final = answer.splitlines()
        assert last.endswith(f"={final} , END") or (x == 0 and final == "0.000")
        error = abs(truth(x / 1000)) - abs(float(final))
        assert -1e-12 < error < 1e-3


@every_style
def test_oracle_answers_are_read_back(op: Any, style: Any, spaced: bool) -> None:
    form = ArithmeticFormat(op, style, 3, spaced=spaced)
    pairs = drawn(op, 120)
    exact = {"+": lambda x, y: x + y, "-": lambda x, y: x - y, "*": lambda x, y: x * y}.get(op)
    for (x, y), text, prompt in zip(pairs.tolist(), form.render_many(pairs), form.prompts(pairs), strict=True):
        read = form.parse(text[len(prompt) :])
        assert read == form.parse(text[len(prompt) :].strip()) == form.result(x, y)
        assert read == form.parse(text[len(prompt) :] + text), "what follows the answer is not read"
        if exact:
            assert read == exact(x, y)
        assert form.verify(text)
        if spaced:
            assert not any(a.isdigit() and b.isdigit() for a, b in itertools.pairwise(text))


@pytest.mark.parametrize("style", ["plain", "padded", "reverse", "padded_reverse", "simple"])
def test_oracle_ten_thousand_sums_are_read_back(style: Any) -> None:
    form = ArithmeticFormat("+", style)
    pairs = drawn("+", 10_000)
    assert [form.parse(answer) for answer in form.answers(pairs)] == pairs.sum(axis=1).tolist()


@pytest.mark.parametrize("op", ["+", "-"])
@pytest.mark.parametrize("spaced", [False, True])
def test_property_one_wrong_digit_is_found(op: Any, spaced: bool) -> None:
    for style in styles_of(op):
        form = ArithmeticFormat(op, style, 3, spaced=spaced)
        for x, y in drawn(op, 2, seed=1).tolist():
            text = form.render(x, y)
            for place, digit in enumerate(text):
                for other in "0123456789" if digit.isdigit() else "":
                    changed = text[:place] + other + text[place + 1 :]
                    assert form.verify(changed) == (other == digit), changed


@pytest.mark.parametrize(
    ("op", "style", "completion"),
    [
        ("+", "plain", "0495\n"),
        ("+", "plain", "495+"),
        ("+", "plain", "-0"),
        ("+", "plain", ""),
        ("+", "plain", " 495"),
        ("+", "padded", "495$"),
        ("+", "padded", "0495"),
        ("+", "reverse", "594"),
        ("+", "reverse", "5940$"),
        ("+", "reverse", "5 9 4$"),
        ("+", "padded_reverse", "594$"),
        ("-", "reverse", "-932$"),
        ("+", "simple", "495\n"),
        ("+", "simple", "A->5 , C->1\nA->9 , C->0\n495\n"),
        ("+", "detailed", "4 9 5\n"),
        ("+", "detailed", "<scratch>\n</scratch>\n495\n"),
        ("sin", "plain", "0.85\n"),
        ("sin", "plain", "8579\n"),
        ("sqrt", "plain", "2..362\n"),
    ],
)
def test_rejects_answers_in_another_style(op: Any, style: Any, completion: str) -> None:
    assert ArithmeticFormat(op, style, 3).parse(completion) is None


def test_property_a_problem_of_another_format_is_not_right() -> None:
    form = ArithmeticFormat("+", "reverse")
    assert not form.verify("128+367=495\n")
    assert not form.verify("$128+367=594$")
    assert not form.verify("")
    assert not ArithmeticFormat("+", "padded", 2).verify("$128+367=0495$\n")
    assert ArithmeticFormat("+", "plain", wrap="#").verify("#128+367=495#\n")


@every_style
def test_property_the_alphabet_holds_every_character(op: Any, style: Any, spaced: bool) -> None:
    form = ArithmeticFormat(op, style, 2, spaced=spaced)
    seen = set("".join(form.render_many(drawn(op, 150, 2))))
    assert seen <= set(form.alphabet)
    assert len(form.alphabet) == len(set(form.alphabet))
    if op != "*":
        assert set(form.alphabet) == seen


def test_property_products_of_the_longest_operands_are_exact() -> None:
    most = 10**MAX_DIGITS - 1
    assert ArithmeticFormat("*", "plain", MAX_DIGITS).result(most, most) == most * most


def test_degenerate_no_problem() -> None:
    form = ArithmeticFormat("+", "padded")
    none = np.empty((0, 2), dtype=np.int64)
    assert form.render_many(none) == form.prompts([]) == form.answers([]) == []
    assert carries("-", none).shape == lengths("+", none).shape == results("sin", none, 3).shape == (0,)
    assert ArithmeticFormat("+", "simple").render(0, 0) == "Input:\n0+0\nTarget:\nA->0 , C->0.\n0\n"
    assert ArithmeticFormat("*", "detailed").parse(ArithmeticFormat("*", "detailed").answers([(0, 57)])[0]) == 0


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ArithmeticFormat("sin", "reverse"), "sin has no style 'reverse'; take one of plain, detailed"),
        (lambda: ArithmeticFormat("*", "simple"), r"\* has no style 'simple'"),
        (lambda: ArithmeticFormat("+", "plain", 10), "digits must be from 1 to 9; got 10"),
        (lambda: ArithmeticFormat("+", "plain", wrap="1"), "wrap must not hold digits, signs or space; got '1'"),
        (lambda: ArithmeticFormat("+", "padded", 2).render(7, 367), "from 0 to 99; got 367. Raise digits"),
        (lambda: ArithmeticFormat("+", "plain", 2).render(7, -1), "got -1"),
        (lambda: ArithmeticFormat("sqrt", "plain", 2).render(99), "from 100 to 999; got 99"),
        (lambda: ArithmeticFormat("sin", "plain", 2).render(158), "from -157 to 157; got 158"),
        (
            lambda: balanced_pairs("+", 1, 101, np.random.default_rng(0)),
            "n is 101, but . with digits=1 has 100 distinct",
        ),
        (lambda: balanced_pairs("+", 1, 0, np.random.default_rng(0)), "n is 0"),
        (lambda: balanced_pairs("+", 9, 10**7, np.random.default_rng(0)), "at most 1000000 are drawn"),
        (lambda: complement([(1, 1)], "+", 1, 100, np.random.default_rng(0)), "100 pairs are asked for beside 1, but"),
        (lambda: complement([(1, 1)], "+", 4), "has 100000000 pairs, too many to list; give n and rng"),
        (lambda: complement([(1, 1)], "+", 1, 5), "give rng"),
        (lambda: rank2_complete(np.ones((2, 3), bool)), r"mask must be square; got shape \(2, 3\)"),
    ],
)
def test_rejects_what_cannot_be_written_or_drawn(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


def test_property_plain_lines_take_operands_of_any_length() -> None:
    assert ArithmeticFormat("+", "plain", 2).render(12345, 1) == "12345+1=12346\n"


# -- choosing problems


@pytest.mark.parametrize("op", ["+", "-"])
def test_oracle_carries_are_counted_by_sums_of_digits(op: Any) -> None:
    pairs = drawn(op, 3_000, 5)
    for (x, y), count in zip(pairs.tolist(), carries(op, pairs).tolist(), strict=True):
        low, high = (x, y) if op == "+" else ((x - y) % 10 ** len(str(max(x, y))), y)
        total = low + high  # a difference borrows where adding it back carries
        assert count == (sum(map(int, str(low))) + sum(map(int, str(high))) - sum(map(int, str(total)))) // 9


def test_equation_ten_thousand_sums_of_three_digits() -> None:
    pairs = balanced_pairs("+", 3, 10_000, np.random.default_rng(0))
    assert len(np.unique(pairs, axis=0)) == len(pairs) == 10_000
    long = lengths("+", pairs)
    assert np.bincount(long).tolist() == [0, 100, 900, 9000]
    assert long.tolist() == [max(len(str(x)), len(str(y))) for x, y in pairs.tolist()]
    count = carries("+", pairs)
    assert np.bincount(count[long == 1]).tolist() == [55, 45], "all of them: 55 of 100 pairs do not carry"
    assert np.bincount(count[long == 2]).tolist() == [300, 300, 300]
    assert np.bincount(count[long == 3]).tolist() == [2250, 2250, 2250, 2250]


@pytest.mark.parametrize(("op", "digits", "n"), [("+", 2, 9_000), ("-", 3, 5_001), ("+", 8, 2_000), ("*", 3, 4_000)])
def test_property_quotas_are_even_or_take_the_whole_group(op: Any, digits: int, n: int) -> None:
    pairs = balanced_pairs(op, digits, n, np.random.default_rng(3))
    assert len(np.unique(pairs, axis=0)) == len(pairs) == n
    assert pairs.min() >= 0
    assert pairs.max() < 10**digits
    every = complement([], op, digits) if digits < 4 else None
    for length in range(1, digits + 1):
        counts = np.bincount(carries(op, pairs[lengths(op, pairs) == length]), minlength=1)
        if every is None:
            assert counts.sum() < length or counts.max() - counts.min() <= 1
        else:
            room = np.bincount(carries(op, every[lengths(op, every) == length]), minlength=len(counts))
            free = counts[counts < room]
            assert not len(free) or (free.max() - free.min() <= 1 and counts.max() <= free.max())


def test_property_the_same_generator_draws_the_same_problems() -> None:
    one, same, other = (balanced_pairs("+", 4, 500, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)


@pytest.mark.parametrize("op", OPERATIONS)
def test_property_the_complement_is_the_rest(op: Any) -> None:
    pairs = balanced_pairs(op, 2, 80, np.random.default_rng(0))
    rest = complement(pairs, op, 2)
    both = {tuple(pair) for pair in np.concatenate([pairs, rest]).tolist()}
    assert len(both) == len(pairs) + len(rest) == num_pairs(op, 2)
    ArithmeticFormat(op, "plain", 2).render_many(rest)
    some = {tuple(pair) for pair in complement(pairs, op, 2, 50, np.random.default_rng(1)).tolist()}
    assert len(some) == 50
    assert not some & {tuple(pair) for pair in pairs.tolist()}


def test_property_what_is_held_out_of_many_was_not_chosen() -> None:
    pairs = balanced_pairs("+", 6, 3_000, np.random.default_rng(0))
    rest = complement(pairs, "+", 6, 2_000, np.random.default_rng(1))
    assert len(np.unique(np.concatenate([pairs, rest]), axis=0)) == 5_000


# -- the table of sums


def connected(mask: Any) -> bool:
    n = len(mask)
    graph = networkx.Graph()
    graph.add_nodes_from(range(2 * n))
    graph.add_edges_from((i, n + j) for i, j in np.argwhere(mask).tolist())
    return bool(networkx.is_connected(graph))


@pytest.mark.parametrize("n", [1, 2, 3])
def test_oracle_a_table_is_solved_where_its_graph_is_connected(n: int) -> None:
    for bits in itertools.product((False, True), repeat=n * n):
        mask = np.array(bits).reshape(n, n)
        table, solved = rank2_complete(mask)
        assert solved == connected(mask)
        known = ~np.isnan(table)
        assert np.array_equal(table[known], np.add.outer(np.arange(n), np.arange(n))[known])
        assert known[mask].all()


def test_oracle_random_tables_of_twenty() -> None:
    rng = np.random.default_rng(0)
    found = []
    for _ in range(60):
        mask = rng.random((20, 20)) < rng.uniform(0.08, 0.3)
        table, solved = rank2_complete(mask)
        found.append(solved)
        assert solved == connected(mask)
        parts = list(networkx.connected_components(_graph(mask)))
        same = np.array([[any({i, 20 + j} <= part for part in parts) for j in range(20)] for i in range(20)])
        assert np.array_equal(~np.isnan(table), same), "what follows is what one component connects"
    assert 10 < sum(found) < 50


def _graph(mask: Any) -> networkx.Graph:
    graph = networkx.Graph((i, len(mask) + j) for i, j in np.argwhere(mask).tolist())
    graph.add_nodes_from(range(2 * len(mask)))
    return graph


def test_property_half_of_the_tables_are_solved_at_about_n_log_n_entries() -> None:
    rng = np.random.default_rng(0)
    ratios = []
    for n in (16, 64):
        order = [rng.permutation(n * n) for _ in range(30)]

        def share(entries: int, n: int = n, order: Any = order) -> float:
            masks = (np.isin(np.arange(n * n), places[:entries]).reshape(n, n) for places in order)
            return float(np.mean([rank2_complete(mask)[1] for mask in masks]))

        low, high = 2 * n - 1, n * n
        while high - low > max(1, n // 8):
            middle = (low + high) // 2
            low, high = (low, middle) if share(middle) >= 0.5 else (middle, high)
        ratios.append(high / (n * math.log(2 * n)))
    assert all(0.7 < ratio < 1.5 for ratio in ratios), ratios  # n^2 would make the second four times the first, n, 0.7
    assert 0.8 < ratios[1] / ratios[0] < 1.25, ratios


def test_degenerate_tables() -> None:
    assert rank2_complete(np.zeros((0, 0), bool))[1]
    table, solved = rank2_complete(np.zeros((2, 2), bool))
    assert np.isnan(table).all()
    assert not solved


# -- streams and scores


def characters(form: ArithmeticFormat) -> Any:
    return char_tokenizer([form.alphabet])


def test_property_the_stream_is_problems_end_to_end_without_padding() -> None:
    form = ArithmeticFormat("+", "reverse", 2)
    pairs, tokenizer = drawn("+", 30, 2), characters(form)
    texts = form.render_many(pairs)
    total = sum(map(len, texts))
    data = ArithmeticData(form, pairs, tokenizer, seq_len=17, seed=4)
    rows = list(itertools.islice(data, 3 * total // 17))
    assert all(torch.equal(row["input_ids"], row["labels"]) and row["input_ids"].shape == (17,) for row in rows)
    stream = "".join(tokenizer.decode(row["input_ids"]) for row in rows)
    epochs = [stream[:total], stream[total : 2 * total], stream[2 * total : 3 * total]]
    assert [sorted(epoch.splitlines(keepends=True)) for epoch in epochs[:2]] == [sorted(texts)] * 2
    assert epochs[0] != epochs[1], "every epoch has an order of its own"
    again = list(itertools.islice(ArithmeticData(form, pairs, tokenizer, 17, 4), len(rows)))
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(rows, again, strict=True))


def test_property_workers_share_the_stream() -> None:
    form = ArithmeticFormat("+", "plain", 2)
    data = ArithmeticData(form, drawn("+", 30, 2), characters(form), seq_len=11)
    alone = [row["input_ids"] for row in itertools.islice(data, 12)]
    shared = [row["input_ids"][0] for row in itertools.islice(DataLoader(data, num_workers=2, batch_size=1), 12)]
    assert all(torch.equal(a, b) for a, b in zip(alone, shared, strict=True))


def test_oracle_scores_are_those_of_generate_one_by_one() -> None:
    form = ArithmeticFormat("-", "reverse", 2)
    tokenizer = characters(form)
    model = tiny_llama(tokenizer, 16, 1, 2, 32, 64, generator_seed=3)
    with torch.no_grad():
        # A model that tends to write digits and ends of lines, so that some answers can be read.
        model.lm_head.weight.mul_(3)
    pairs = drawn("-", 60, 2)
    written = completions(model, tokenizer, form, pairs, batch_size=16)
    longest = max(map(len, form.answers(pairs)))
    for (x, y), text in zip(pairs.tolist(), written, strict=True):
        ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(form.prompt(x, y))["input_ids"]]])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=longest + 1, do_sample=False, pad_token_id=0
        )
        assert text == tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()
    assert score_arithmetic(model, tokenizer, form, pairs, batch_size=7) == judged(form, pairs, written)


def test_equation_judging_by_hand() -> None:
    form = ArithmeticFormat("+", "reverse", 2)
    pairs = [(1, 2), (5, 7), (10, 20), (55, 55)]
    written = ["3$", "31$", "03$", "011$"]  # right, 13 for 12, right, right
    assert judged(form, pairs, written) == {
        "accuracy": 0.75, "invalid": 0.0, "carries/0": 1.0, "carries/1": 0.0, "carries/2": 1.0,
        "digits/1": 0.5, "digits/2": 1.0,
    }  # fmt: skip
    found = judged(form, pairs, ["3", "21$", "0", "x"])
    assert (found["accuracy"], found["invalid"]) == (0.25, 0.75)
    assert confusion_by_column(form, pairs, [*written[:3], "bad"]) == {
        (0, "3", "3"): 1, (0, "2", "3"): 1, (1, "1", "1"): 1, (0, "0", "0"): 1, (1, "3", "3"): 1,
    }  # fmt: skip
    assert confusion_by_column(form, [(5, 7)], ["2$"]) == {(0, "2", "2"): 1, (1, "1", ""): 1}


def test_degenerate_nothing_to_score() -> None:
    form = ArithmeticFormat("+", "plain", 1)
    tokenizer = characters(form)
    model = tiny_llama(tokenizer, 16, 1, 2, 32, 64, generator_seed=3)
    assert completions(model, tokenizer, form, []) == []
    with pytest.raises(ValueError, match="no pair to score"):
        score_arithmetic(model, tokenizer, form, [])
    with pytest.raises(ValueError, match="a stream needs pairs and rows of 2 tokens; got 0 pairs"):
        ArithmeticData(form, [], tokenizer, 8)


def test_rejects_tokenizers_that_merge_digits_or_lack_a_character() -> None:
    merged = train_bpe(["128 " * 40, "12+34=46 " * 40], 300)
    form = ArithmeticFormat("+", "plain")
    with pytest.raises(ModelError, match=r"merges digits: '128' is \['128'\]. Set spaced: true"):
        check_tokenizer(merged, form)
    check_tokenizer(merged, ArithmeticFormat("+", "plain", spaced=True))
    with pytest.raises(ModelError, match=r"no token for '\$', which reverse problems of \+ have"):
        check_tokenizer(characters(form), ArithmeticFormat("+", "reverse"))


def test_property_the_tokenizer_of_characters_opens_in_transformers(tmp_path: Path) -> None:
    form = ArithmeticFormat("+", "detailed")
    characters(form).save_pretrained(tmp_path)
    opened = AutoTokenizer.from_pretrained(tmp_path)
    text = form.render(128, 367)
    ids = opened(text)["input_ids"]
    assert len(ids) == len(text)
    assert opened.decode(ids) == text


# -- the recipe


@pytest.fixture(scope="module")
def architecture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_architecture(SIZES["smoke"].shape, tmp_path_factory.mktemp("arithmetic"))


@pytest.fixture(scope="module")
def fields(architecture: Path) -> Fields:
    return {
        "method": "arithmetic", "model": str(architecture), "digits": 2, "style": "padded_reverse", "n_train": 200,
        "test_size": 30, "valid_size": 20, "packing": "document", "seq_len": ROW, "max_answer": 5,
        "batch_tokens": 4 * ROW, "budget": {"steps": 6}, "eval_at": [0.0, 0.5, 1.0], "fit": {"precision": "fp32"},
    }  # fmt: skip


def opened(fields: Fields, directory: Path) -> tuple[Any, CorpusContext, Any]:
    recipe: Any = load_recipe(fields)
    with Run(directory, recipe) as run:
        ctx, _ = CorpusContext.open(recipe, run)
        return recipe, ctx, recipe.build(ctx)


@pytest.fixture(scope="module")
def finished(fields: Fields, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    directory = tmp_path_factory.mktemp("finished") / "run"
    return directory, execute(load_recipe(fields), directory)


def test_property_held_out_problems_are_not_read(fields: Fields, tmp_path: Path) -> None:
    recipe, _, corpus = opened(fields, tmp_path / "run")
    read = {document.text for document in corpus.tables["problems"]}
    asked = recipe.asked()
    held = {name: {a + b for a, b in zip(pairs.sources, pairs.targets, strict=True)} for name, pairs in asked.items()}
    assert {name: len(texts) for name, texts in held.items()} == {"held_out": 30, "valid": 20}
    assert len(read) == 200
    assert len(read | held["held_out"] | held["valid"]) == 250
    assert all(recipe.form.verify(text + "\n") for text in read | held["held_out"])


def test_oracle_the_figures_and_the_files_agree(finished: tuple[Path, Any], fields: Fields) -> None:
    directory, result = finished
    metrics = result.metrics
    assert metrics["arithmetic/accuracy"] == metrics["eval/held_out/exact"]
    form = ArithmeticFormat("+", "padded_reverse", 2)
    train, held = ((directory / f"{name}.txt").read_text().splitlines(keepends=True) for name in ("train", "held_out"))
    assert (len(train), len(held)) == (200, 30)
    assert not set(train) & set(held)
    assert all(map(form.verify, train + held))
    series = json.loads((directory / "trajectory.json").read_text())["series"]
    assert set(series) == {"valid/bpb", "valid/accuracy"}
    assert [tokens for tokens, _ in series["valid/accuracy"]] == [0, 3 * 4 * ROW, 6 * 4 * ROW]
    recipe: Any = load_recipe(fields)
    model = AutoModelForCausalLM.from_pretrained(directory / "model")
    tokenizer = AutoTokenizer.from_pretrained(directory / "model")
    valid = score_arithmetic(model, tokenizer, form, recipe._splits.valid)
    assert series["valid/accuracy"][-1][1] == valid["accuracy"] == metrics["valid/exact"]
    rows = list(csv.DictReader((directory / "confusion.csv").open()))
    assert sum(int(row["count"]) for row in rows) % 3 == 0, "every answer that can be read has three columns"


def test_property_the_model_says_how_to_ask_it(finished: tuple[Path, Any]) -> None:
    directory, _ = finished
    usage = json.loads((directory / "model" / "corpus.json").read_text())
    form = ArithmeticFormat(usage["op"], usage["style"], usage["digits"])
    assert form.verify(usage["prompt"] + usage["answer"] + "\n")
    assert "style `padded_reverse`" in (directory / "model" / "README.md").read_text()


def test_property_only_the_answer_is_learned_where_so_said(fields: Fields, tmp_path: Path) -> None:
    targets = {}
    for learn in ("all", "answer"):
        _, ctx, corpus = opened({**fields, "learn": learn}, tmp_path / learn)
        batch = next(Reader(ctx, corpus).phases()).stream.batch(0)
        targets[learn] = [int((row != -100).sum()) for row in batch["labels"]]
        assert ctx.tokenizer.decode(batch["input_ids"][0]).startswith("<eos>$")
    assert targets == {"all": [ROW - 1] * 4, "answer": [5] * 4}  # "046$" and EOS


def test_property_shots_are_other_training_problems(fields: Fields, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(fields["model"])
    tiny_llama(tokenizer, 16, 1, 2, 32, 48, generator_seed=0).save_pretrained(tmp_path / "long")
    tokenizer.save_pretrained(tmp_path / "long")
    long = {**fields, "shots": 2, "seq_len": 48, "batch_tokens": 96, "model": str(tmp_path / "long")}
    recipe, _, corpus = opened(long, tmp_path / "run")
    form = recipe.form
    own = {document.text.rpartition("\n")[2] + "\n" for document in corpus.tables["problems"]}
    asked = recipe.asked()["held_out"]
    texts = [a + b for a, b in zip(asked.sources, asked.targets, strict=True)]
    for text in [*(document.text for document in corpus.tables["problems"]), *texts]:
        *worked, last = (text + "\n").splitlines(keepends=True)
        assert len(worked) == 2
        assert last not in worked
        assert set(worked) <= own
        assert form.verify(last)
    metrics = execute(recipe, tmp_path / "b").metrics
    assert metrics["arithmetic/accuracy"] == metrics["eval/held_out/exact"]


def test_property_text_is_mixed_in_at_its_rate(corpora_fields: Fields, tmp_path: Path) -> None:
    mixed = {**corpora_fields, "method": "arithmetic", "digits": 2, "n_train": 300, "test_size": 20, "valid_size": 20,
             "mix_rate": 0.25, "packing": "document"}  # fmt: skip
    _, ctx, corpus = opened(mixed, tmp_path / "run")
    assert corpus.phases[0].weights == (0.75, 0.25)
    parts = [next(Reader(ctx, corpus).phases()).stream.batch(step)["part"].tolist() for step in range(4)]
    assert all(sorted(part) == [0, 0, 0, 1] for part in parts)
    metrics = execute(load_recipe(mixed), tmp_path / "b").metrics
    assert {"eval/held_out/bpb", "eval/arithmetic/exact", "eval/arithmetic/bpb", "valid/exact"} <= set(metrics)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_train": 9_990}, r"n_train \(9990\), test_size \(30\) and valid_size \(20\) are 10040 distinct pairs, but"),
        ({"op": "sin", "style": "reverse"}, "sin has no style 'reverse'"),
        ({"wrap": "7"}, "wrap must not hold digits"),
        ({"join": " "}, "join"),
        ({"mix_rate": 0.0}, "mix_rate"),
        ({"questions": {"arithmetic": "x.jsonl"}}, "'arithmetic' names the held-out problems"),
        ({"digits": 10}, "digits"),
    ],
)
def test_rejects_when_built(fields: Fields, changes: Fields, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        load_recipe({**fields, **changes})


def test_rejects_problems_that_do_not_fit(fields: Fields, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"answers have up to 5 tokens; raise max_answer, now 4"):
        opened({**fields, "max_answer": 4}, tmp_path / "a")
    words = r"prompts of up to 8 tokens and max_answer \(5\) are longer than seq_len 12.*plain 10, padded 12, reverse"
    with pytest.raises(ModelError, match=words):
        opened({**fields, "seq_len": 12}, tmp_path / "b")


# -- learning, and the claim


def test_learns_sums_of_two_digits(tmp_path: Path) -> None:
    size = SIZES["small"]
    model = make_architecture(size.shape, tmp_path / "architecture")
    recipe = Arithmetic(
        model={"name": str(model)}, digits=2, style="padded", learn="answer", packing="document", seq_len=ROW,
        max_answer=5, n_train=4000, test_size=200, valid_size=50, batch_tokens=128 * ROW, budget={"steps": 200},
        eval_at=(1.0,), optim={"lr": LEARNING_RATES[1], "schedule": "constant", "warmup": 0.0, "betas": (0.9, 0.99)},
        fit={"precision": "fp32"},
    )  # fmt: skip
    metrics = execute(recipe, tmp_path / "run").metrics
    assert metrics["arithmetic/accuracy"] > 0.2, "guessing is right in one of two hundred"
    assert metrics["arithmetic/invalid"] < 0.05


def test_equation_the_first_step_at_the_goal() -> None:
    assert steps_until([(25, 0.1), (50, 0.99), (75, 0.5), (100, 1.0)], 0.99, 800) == 50
    assert steps_until([(25, 0.1)], 0.99, 800) == 800
    assert steps_until([], 0.99, 800) == 800
