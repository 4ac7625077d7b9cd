"""How fast are cleaning programs run, and how fast are they written by a linear model over lines?

    python -m benchmarks.prox

Docstrings with planted debris. The executor's peer goes through a program operation by operation, over the whole text
each time, and counts all words for the limits; the programmer's peer reads line by line, n-gram by n-gram, in Python.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

import numpy as np
import torch

from benchmarks.harness import Bound, alternate, report
from headwater.claims.prox import Dirty, plant
from headwater.corpora.prox_lines import NGRAMS, LineProgrammer
from headwater.corpora.prox_programs import Normalize, Program, RemoveLines, run_program
from headwater.modalities.text.docstrings import docstring_corpus

MASK = 0xFFFFFFFF


def operation_by_operation(text: str, program: Program) -> str:
    gone: set[int] = set()
    for op in program:
        if isinstance(op, RemoveLines):
            gone |= set(range(op.start, op.end + 1))
            kept = "\n".join(line for i, line in enumerate(text.split("\n")) if i not in gone)
    for op in program:
        if isinstance(op, Normalize):
            kept = "\n".join(line.replace(op.source, op.target) for line in kept.split("\n"))
    words, left = len(text.split()), len(kept.split())
    return "" if left <= 0.05 * words or left <= 10 else kept


def line_by_line(model: LineProgrammer, texts: Sequence[str]) -> list[float]:
    coef, scores = model.coef_.tolist(), []
    for text in texts:
        lines = text.split("\n")
        for place, line in enumerate(lines):
            data = [48 if 48 <= byte <= 57 else byte for byte in f"\n{line}\n".encode()]
            total, grams = 0.0, 0
            for size in NGRAMS:
                for i in range(len(data) - size + 1):
                    code = 0
                    for byte in data[i : i + size]:
                        code = (code * 0x01000193 + byte) & MASK
                    total += coef[(((code ^ (code >> 15)) * 0x9E3779B9) & MASK) >> (32 - model.bits)]
                    grams += 1
            shape = shape_of(line.encode(), place, len(lines))
            rest = sum(weight * value for weight, value in zip(coef[1 << model.bits :], shape, strict=True))
            scores.append(total / math.sqrt(grams) + rest + model.intercept_)
    return scores


def shape_of(line: bytes, place: int, total: int) -> list[float]:
    size = max(1, len(line))
    lower = sum(97 <= b <= 122 or b >= 128 for b in line) / size
    upper = sum(65 <= b <= 90 for b in line) / size
    digit = sum(48 <= b <= 57 for b in line) / size
    space = sum(b in b" \t\r" for b in line) / size
    where = [place / max(1, total - 1), 1 / (1 + place), 1 / (total - place)]
    sizes = [math.log1p(total) / 5, math.log1p(len(line)) / 5, float(not line)]
    end = [1 - lower - upper - digit - space, float(line[-1] in b".!?\"':")] if line else [0.0, 0.0]
    return [*where, *sizes, lower, upper, digit, space, *end]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--megabytes", type=float, default=2.0)
    chars = int(parser.parse_args().megabytes * 1e6)
    torch.set_num_threads(1)
    dirty: list[Dirty] = plant(docstring_corpus(("numpy", "scipy"), limit_chars=chars), np.random.default_rng(0))
    texts = [d.text for d in dirty]
    model = LineProgrammer().fit(texts[:200], [d.program for d in dirty[:200]])
    words = [Normalize("array", "tensor"), Normalize("ndarray", "tensor"), Normalize("  ", " ")]
    programs = [(*program, *words) for program in model.predict(texts)]
    some = texts[: max(1, len(texts) // 20)]

    def ours() -> list[str]:
        return [run_program(text, program).text for text, program in zip(texts, programs, strict=True)]

    def theirs() -> list[str]:
        return [operation_by_operation(text, program) for text, program in zip(texts, programs, strict=True)]

    both = [i for i, program in enumerate(programs) if any(isinstance(op, RemoveLines) for op in program)]
    texts, programs = [texts[i] for i in both], [programs[i] for i in both]
    assert ours() == theirs()
    np.testing.assert_allclose(model.decision_function(some), line_by_line(model, some), atol=1e-4)
    seconds = alternate(
        {
            "run": ours,
            "operation by operation": theirs,
            "write": lambda: model.predict(texts),
            "write some": lambda: model.predict(some),
            "write some, line by line": lambda: line_by_line(model, some),
        }
    )
    size = sum(len(text.encode()) for text in texts) / 1e6
    report(
        "How fast are cleaning programs run and written, against one operation and one line at a time?",
        {
            "running": (seconds["operation by operation"] / seconds["run"], Bound("higher", floor=3)),
            "writing": (seconds["write some, line by line"] / seconds["write some"], Bound("higher", floor=20)),
        },
        seconds=seconds,
        checked="texts are equal, log-odds agree to 1e-4",
        notes={
            "megabytes": round(size, 2),
            "operations for each document": round(sum(map(len, programs)) / len(programs), 1),
            "MB/s run": round(size / seconds["run"], 1),
            "MB/s written": round(size / seconds["write"], 1),
            "time": "processor seconds, one thread",
        },
    )


if __name__ == "__main__":
    main()
