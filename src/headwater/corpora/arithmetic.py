"""Teaching arithmetic: the form and the choice of the problems decide whether a small transformer learns them.

    plain     128+367=495      the first digit written depends on every column
    reverse   $128+367=594$    each digit written depends on one column and a carry
    scratchpads                each step depends on what was just written

Problems follow one another in a stream, every character of which is learned, and are chosen so that short ones and
every number of carries are met. Reversed, sums are learned in a sharp transition and from fewer problems.

Source: Lee et al., "Teaching Arithmetic to Small Transformers", arXiv:2307.03381; the defaults are its NanoGPT's on
    sums of three digits (6 layers, width 384, a token for each character, 5000 steps).
Differs: EOS stands after a problem in place of the line feed. ``padded_reverse`` is ours, so that the order of the
    digits can be compared with nothing else changed. How scratchpads of -, *, sin and sqrt go on is told in
    ``arithmetic_formats``; details of the paper's are unverified, and so are quotas for other than 10 000 sums of three
    digits, and how often text is mixed in.
Needs: a model whose tokenizer gives every digit a token.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import islice
from typing import ClassVar, Literal, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from pydantic import Field, model_validator
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from headwater.core.cache import atomic_write_text
from headwater.core.optim import OptimSpec
from headwater.core.recipe import CorpusRef
from headwater.core.rng import numpy_generator
from headwater.corpora.arithmetic_formats import MAX_DIGITS, ArithmeticFormat, Operation, Style, styles_of
from headwater.corpora.arithmetic_pairs import balanced_pairs, complement, num_pairs, rank2_complete
from headwater.corpora.arithmetic_scores import (
    check_tokenizer,
    completions,
    confusion_by_column,
    judged,
    score_arithmetic,
)
from headwater.corpora.base import CorpusRecipe, TableName
from headwater.corpora.context import CorpusContext
from headwater.corpora.plan import Corpus, Reading
from headwater.modalities.models import ModelError
from headwater.modalities.text.docs import Document
from headwater.modalities.text.examples import Formatter, PlainFormatter
from headwater.modalities.text.instruct import AnswerFormatter, answered
from headwater.modalities.text.pairs import Pairs
from headwater.modalities.text.tokenizers import character_tokenizer as char_tokenizer

__all__ = [
    "Arithmetic",
    "ArithmeticData",
    "ArithmeticFormat",
    "balanced_pairs",
    "char_tokenizer",
    "check_tokenizer",
    "complement",
    "completions",
    "confusion_by_column",
    "judged",
    "rank2_complete",
    "score_arithmetic",
]

SAMPLED = 200
"""Problems by which the length of each style is told."""


class ArithmeticData(IterableDataset[dict[str, Tensor]]):
    """An endless stream of problems, cut into rows without padding: ``input_ids`` and ``labels``, each ``(seq_len,)``.

    For loops of your own and ``transformers.Trainer``. Problems are laid end to end as ``ArithmeticFormat.render``
    writes them, in an order that is drawn anew in every epoch; every character is learned. Several workers give the
    rows of one, in turn.

    Args:
        fmt: how problems are written.
        pairs: ``(n, 2)``.
        tokenizer: its tokens.
        seq_len: tokens of a row.
        seed: of the order.

    Raises:
        ValueError: there is no pair, or ``seq_len`` is below 2.
        ModelError: see ``check_tokenizer``.
    """

    def __init__(
        self, fmt: ArithmeticFormat, pairs: ArrayLike, tokenizer: PreTrainedTokenizerBase, seq_len: int, seed: int = 0
    ) -> None:
        super().__init__()
        check_tokenizer(tokenizer, fmt)
        texts = fmt.render_many(pairs)
        if not texts or seq_len < 2:
            raise ValueError(f"a stream needs pairs and rows of 2 tokens; got {len(texts)} pairs, seq_len {seq_len}.")
        self.seq_len, self.seed = seq_len, seed
        self._rows = [np.array(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        worker = get_worker_info()
        return islice(self._blocks(), worker.id if worker else 0, None, worker.num_workers if worker else 1)

    def _blocks(self) -> Iterator[dict[str, Tensor]]:
        rest, epoch = np.empty(0, dtype=np.int64), 0
        while True:
            order = numpy_generator(self.seed, "stream", epoch).permutation(len(self._rows))
            tokens = np.concatenate([rest, *(self._rows[place] for place in order.tolist())])
            whole = len(tokens) // self.seq_len * self.seq_len
            for block in tokens[:whole].reshape(-1, self.seq_len):
                ids = torch.from_numpy(block.copy())
                yield {"input_ids": ids, "labels": ids.clone()}
            rest, epoch = tokens[whole:], epoch + 1


class _Splits(NamedTuple):
    """Problems to learn from, held out, and for choosing, each ``(n, 2)``; no two are the same."""

    train: NDArray[np.int64]
    test: NDArray[np.int64]
    valid: NDArray[np.int64]


class Arithmetic(CorpusRecipe):
    """Problems of one operation in one style, alone or mixed with text."""

    id: ClassVar[str] = "arithmetic"

    sources: dict[TableName, CorpusRef] = Field(
        default={}, description="name -> text to mix in; held-out problems are then scored as eval/arithmetic"
    )
    op: Operation = Field(default="+", description="the operation")
    style: Style = Field(
        default="reverse",
        description="how problems are written: plain; padded with zeros; reverse, the last digit of the result first; "
        "both; or with a simple or detailed scratchpad",
    )
    digits: int = Field(default=3, ge=1, le=MAX_DIGITS, description="of the longest operands; decimals of sin and sqrt")
    wrap: str | None = Field(default=None, description="stands around a line; null for $, and nothing around plain")
    spaced: bool = Field(default=False, description="a space between digits, for tokenizers that merge them")
    n_train: int = Field(default=10_000, ge=2, description="different problems to learn from")
    balanced: bool = Field(
        default=True, description="short operands as numbers have them and all numbers of carries alike; else uniform"
    )
    shots: int = Field(default=0, ge=0, le=32, description="worked problems before each, in training and when asked")
    learn: Literal["all", "answer"] = Field(default="all", description="what is learned: every character, or answers")
    mix_rate: float = Field(
        default=0.5, gt=0, lt=1, description="share of text in every batch, where there are sources"
    )
    test_size: int = Field(default=10_000, gt=0, description="problems held out for the figures")
    valid_size: int = Field(default=1_000, gt=0, description="further problems held out for choosing and the curve")
    join: Literal[""] = Field(default="", description="nothing stands between a problem and its answer")
    seq_len: int = Field(default=256, ge=8, le=131_072, description="tokens per row")
    batch_tokens: int = Field(default=65_536, gt=0, description="input tokens per optimizer step, padding included")
    packing: Literal["concat", "document", "document, running positions"] = Field(
        default="concat", description="concat: problems end to end, cut anywhere; document: whole ones, each seen alone"
    )
    optim: OptimSpec = Field(
        default=OptimSpec(lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1, warmup=0.02),
        description="how weights are moved",
    )  # cosine to 1e-4, 100 steps of warmup in 5000

    @model_validator(mode="after")
    def _fits(self) -> Self:
        form = self.form
        asked = self.n_train + self.test_size + self.valid_size
        if asked > (there := num_pairs(self.op, self.digits)):
            raise ValueError(
                f"n_train ({self.n_train}), test_size ({self.test_size}) and valid_size ({self.valid_size}) are "
                f"{asked} distinct pairs, but {self.op} with digits={form.digits} has {there}; lower them"
            )
        if "arithmetic" in {**self.evals, **self.questions}:
            raise ValueError("'arithmetic' names the held-out problems; choose another name for your own set")
        return self

    @property
    def form(self) -> ArithmeticFormat:
        """How problems are written."""
        return ArithmeticFormat(self.op, self.style, self.digits, self.wrap, self.spaced)

    def build(self, ctx: CorpusContext) -> Corpus:
        """Draw problems, write them down, and read them, with text where there are sources."""
        check_tokenizer(ctx.tokenizer, self.form)
        train, valid = self._splits.train, self._splits.valid
        problems = self._problems(train, "train")
        self._check_lengths(ctx)
        documents = [
            answered(f"{x},{y}", prompt, answer, join="")
            for (x, y), prompt, answer in zip(train.tolist(), problems.sources, problems.targets, strict=True)
        ]
        atomic_write_text(ctx.run.path("train.txt"), "".join(self.form.render_many(train)))
        tables: dict[str, Sequence[Document]] = {"problems": documents}
        weights = None
        if ctx.sources:
            text = {name: source.train for name, source in ctx.sources.items()}
            total = sum(map(len, text.values()))
            weights = (1 - self.mix_rate, *(self.mix_rate * len(part) / total for part in text.values()))
            tables |= {f"text/{name}": part for name, part in text.items()}
        formatter: Formatter = (PlainFormatter if self.learn == "all" else AnswerFormatter)(ctx.tokenizer)

        def midway(model: PreTrainedModel) -> Mapping[str, float]:
            before = self._before(valid, "valid")
            return {
                "valid/accuracy": score_arithmetic(model, ctx.tokenizer, self.form, valid, before=before)["accuracy"]
            }

        return Corpus(
            (Reading("train", 1.0, tuple(tables), weights, formatter),),
            tables,
            midway=midway,
            examine=lambda model: self._examine(ctx, model),
            usage={
                "op": self.op,
                "style": self.style,
                "digits": self.digits,
                "prompt": problems.sources[0],
                "answer": problems.targets[0],
            },
            readme=f"It answers problems of `{self.op}` written in the style `{self.style}`. Give it a prompt with the "
            "start token before it, and it writes the answer and EOS.",
            files=("train.txt", "held_out.txt", "confusion.csv"),
        )

    def asked(self) -> dict[str, Pairs]:
        """The held-out problems and those for choosing, beside the recipe's own questions."""
        name = "arithmetic" if self.sources else "held_out"  # where the text has held-out documents by that name
        return super().asked() | {
            name: self._problems(self._splits.test, "test"),
            "valid": self._problems(self._splits.valid, "valid"),
        }

    @cached_property
    def _splits(self) -> _Splits:
        rng = numpy_generator(self.seed, "problems")
        by: tuple[Literal["digits", "carries"], ...] = ("digits", "carries") if self.balanced else ()
        train = balanced_pairs(self.op, self.digits, self.n_train, rng, by)
        rest = complement(train, self.op, self.digits, self.test_size + self.valid_size, rng)
        return _Splits(train, rest[: self.test_size], rest[self.test_size :])

    def _before(self, pairs: NDArray[np.int64], name: str) -> list[str]:
        """Worked problems of the training set to stand before each of ``pairs``, which is never among them."""
        if not self.shots:
            return [""] * len(pairs)
        train = self._splits.train
        rng = numpy_generator(self.seed, "shots", name)
        # Counted from the problem's own place, so that a training problem does not stand before itself.
        places = np.arange(len(pairs))[:, None] + rng.integers(1, len(train), (len(pairs), self.shots))
        worked = self.form.render_many(train)
        return ["".join(worked[place] for place in row) for row in (places % len(train)).tolist()]

    def _problems(self, pairs: NDArray[np.int64], name: str) -> Pairs:
        sides = zip(self._before(pairs, name), self.form.prompts(pairs), strict=True)
        return Pairs([before + prompt for before, prompt in sides], self.form.answers(pairs))

    def _check_lengths(self, ctx: CorpusContext) -> None:
        def tokens(texts: Sequence[str]) -> NDArray[np.int64]:
            return np.array([len(ids) for ids in ctx.tokenizer(list(texts), add_special_tokens=False)["input_ids"]])

        sides = [self._problems(pairs, name) for name, pairs in self._splits._asdict().items()]
        prompts = 1 + np.concatenate([tokens(side.sources) for side in sides])  # the start token
        answers = 1 + np.concatenate([tokens(side.targets) for side in sides])  # EOS
        if answers.max() > self.max_answer:
            raise ModelError(f"answers have up to {answers.max()} tokens; raise max_answer, now {self.max_answer}")
        if prompts.max() + self.max_answer > self.seq_len or (prompts + answers).max() > self.seq_len:
            sample = self._splits.train[:SAMPLED]
            each = {
                style: int(
                    tokens(ArithmeticFormat(self.op, style, self.digits, None, self.spaced).render_many(sample)).max()
                )
                for style in styles_of(self.op)
            }
            raise ModelError(
                f"prompts of up to {prompts.max()} tokens and max_answer ({self.max_answer}) are longer than seq_len "
                f"{self.seq_len}; raise it, or take a shorter style. Tokens of a problem: "
                + ", ".join(f"{style} {count}" for style, count in each.items())
            )

    def _examine(self, ctx: CorpusContext, model: PreTrainedModel) -> dict[str, float]:
        """Accuracy by carries and digits, and the files that hold the problems and what went wrong."""
        test = self._splits.test
        written = completions(model, ctx.tokenizer, self.form, test, before=self._before(test, "test"))
        atomic_write_text(ctx.run.path("held_out.txt"), "".join(self.form.render_many(test)))
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(("column", "right", "written", "count"))
        confusion = confusion_by_column(self.form, test, written)
        writer.writerows((*key, count) for key, count in sorted(confusion.items()))
        atomic_write_text(ctx.run.path("confusion.csv"), text.getvalue())
        return {f"arithmetic/{name}": value for name, value in judged(self.form, test, written).items()}
