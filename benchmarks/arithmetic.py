"""(m) How fast are problems of arithmetic drawn and written down, and how fast is a model asked for them?

    python -m benchmarks.arithmetic

Drawing: ten thousand sums of three digits, balanced over lengths and carries, as plain lines. The peer is the loop one
would write: draw a pair, count its carries digit by digit, look whether it is new and its quota open, format it. Both
start from nothing and end with distinct lines in the same quotas.

Asking: sums of up to three digits, put to a Llama of 2 layers and width 64. The peer calls ``generate`` for one prompt
after another, with its cache; ours puts prompts of one length together.
"""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.harness import Bound, alternate, report
from headwater.corpora.arithmetic import ArithmeticFormat, balanced_pairs, char_tokenizer, completions
from headwater.corpora.arithmetic_pairs import carries, lengths
from headwater.modalities.text.tiny import PRESETS, tiny_llama

SUMS, ASKED = 10_000, 200
QUOTAS = {(1, 0): 55, (1, 1): 45, **{(2, c): 300 for c in range(3)}, **{(3, c): 2250 for c in range(4)}}


def by_loop() -> list[str]:
    rng = random.Random(0)
    room, seen = dict(QUOTAS), set()
    lines = [f"{x}+{y}={x + y}\n" for x in range(10) for y in range(10)]
    for length in (2, 3):
        wanted = len(lines) + sum(quota for (digits, _), quota in QUOTAS.items() if digits == length)
        while len(lines) < wanted:
            x, y = rng.randrange(10**length), rng.randrange(10**length)
            carry = count = 0
            for place in (1, 10, 100):
                carry = int(x // place % 10 + y // place % 10 + carry > 9)
                count += carry
            group = (len(str(max(x, y))), count)
            if group[0] == length and (x, y) not in seen and room[group]:
                room[group] -= 1
                seen.add((x, y))
                lines.append(f"{x}+{y}={x + y}\n")
    rng.shuffle(lines)
    return lines


def by_arrays() -> list[str]:
    return ArithmeticFormat("+", "plain").render_many(balanced_pairs("+", 3, SUMS, np.random.default_rng(0)))


def one_by_one(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, form: ArithmeticFormat, pairs: NDArray[np.int64]
) -> list[str]:
    longest, written = max(map(len, form.answers(pairs))), []
    for prompt in form.prompts(pairs):
        ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(prompt)["input_ids"]]])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=longest + 1,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
        written.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip())
    return written


def quotas_of(lines: list[str]) -> Counter[tuple[int, int]]:
    pairs = np.array([[int(side) for side in line.split("=")[0].split("+")] for line in lines])
    assert len(np.unique(pairs, axis=0)) == len(lines)
    return Counter(zip(lengths("+", pairs).tolist(), carries("+", pairs).tolist(), strict=True))


def main() -> None:
    torch.set_num_threads(1)
    assert quotas_of(by_loop()) == quotas_of(by_arrays()) == QUOTAS
    form = ArithmeticFormat("+", "reverse")
    tokenizer = char_tokenizer([form.alphabet])
    model = tiny_llama(tokenizer, **PRESETS["nano"], generator_seed=0)
    pairs = balanced_pairs("+", 3, ASKED, np.random.default_rng(0))
    assert completions(model, tokenizer, form, pairs) == one_by_one(model, tokenizer, form, pairs)
    seconds = alternate({"loop": by_loop, "arrays": by_arrays}, repeats=5) | alternate(
        {
            "generate one by one": lambda: one_by_one(model, tokenizer, form, pairs),
            "batches by length": lambda: completions(model, tokenizer, form, pairs),
        }
    )
    report(
        "How fast are balanced problems made, and how fast is a model asked for them?",
        {
            "loop over arrays": (seconds["loop"] / seconds["arrays"], Bound("higher", floor=2)),
            "one by one over batches": (
                seconds["generate one by one"] / seconds["batches by length"],
                Bound("higher", floor=5),
            ),
        },
        seconds=seconds,
        checked=f"distinct lines in the same quotas; the same {ASKED} answers",
        notes={
            "plain_lines_per_second": round(SUMS / seconds["arrays"]),
            "answers_per_second": round(ASKED / seconds["batches by length"]),
            "time": "processor seconds, one thread",
        },
    )


if __name__ == "__main__":
    main()
