"""Instructions as model inputs: as much of an instruction as there is room for, and always the whole instance.

    Prompt: ...
    Definition: ...
    Things to Avoid: ...
    Emphasis & Caution: ...
    Negative Example 1 - input: ... output: ... reason: ... suggestion: ...
    Positive Example 1 - input: ... output: ... reason: ...
    input: x output:

Without any part it is the last line alone. Where it is too long, examples leave whole, the last one first, then fields,
the last one first. An instruction is tokenised once for all instances of its task.

Source: Mishra et al., arXiv:2104.08773, section 4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from headwater.modalities.text.instructions import PARTS, Instance, Instruction, InstructionPart
from headwater.modalities.text.pairs import Encoded, pad_pairs
from headwater.modalities.text.score import start_token

__all__ = ["EncodedInstruction", "InstructionCollator", "InstructionEncoder", "encode_instruction"]


class EncodedInstruction(NamedTuple):
    """An instance behind its instruction.

    Attributes:
        text: ends with the instance and ``output:``.
        input_ids: its tokens, without special ones.
        kept: how many lines of each part there was room for; parts without one are left out.
    """

    text: str
    input_ids: list[int]
    kept: dict[InstructionPart, int]


class InstructionEncoder:
    """Puts instances of one task behind its instruction.

    The instruction and the instance are tokenised apart. A tokenizer that joins characters over the end of a line
    would give the text as a whole a few tokens less or more.

    Args:
        instruction: the task.
        tokenizer: the model's.
        parts: what is read of the instruction; none for the instance alone.
        max_tokens: of an encoded instance, special tokens apart.
        n_positive, n_negative: so many examples at most.

    Raises:
        ValueError: an unknown part, or ``max_tokens`` below 1.
    """

    def __init__(
        self,
        instruction: Instruction,
        tokenizer: PreTrainedTokenizerBase,
        parts: Sequence[InstructionPart] = PARTS,
        max_tokens: int = 1024,
        n_positive: int = 2,
        n_negative: int = 2,
    ) -> None:
        if max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1; got {max_tokens}.")
        self.name, self.tokenizer, self.max_tokens = instruction.name, tokenizer, max_tokens
        blocks = instruction.blocks(parts, n_positive, n_negative)
        self._parts = [part for part, _ in blocks]
        self._heads = ["".join(f"{text}\n" for _, text in blocks[:count]) for count in range(len(blocks) + 1)]
        self._head_ids = _token_ids(tokenizer, self._heads)

    def __call__(self, inputs: Sequence[str]) -> list[EncodedInstruction | None]:
        """Encode inputs, in order; None where an input alone is too long."""
        tails = [f"input: {text} output:" for text in inputs]
        return [self._encoded(tail, ids) for tail, ids in zip(tails, _token_ids(self.tokenizer, tails), strict=True)]

    def one(self, text: str) -> EncodedInstruction:
        """Encode one input.

        Raises:
            ValueError: it alone is too long.
        """
        (encoded,) = self([text])
        if encoded is None:
            raise ValueError(
                f"an instance of task {self.name!r} is longer than {self.max_tokens} tokens; leave it out, or raise "
                f"max_tokens: {text[:60]!r}."
            )
        return encoded

    def _encoded(self, tail: str, ids: list[int]) -> EncodedInstruction | None:
        room = self.max_tokens - len(ids)
        # The lines stand in the order in which they are given up, the last one first.
        count = next((c for c in reversed(range(len(self._heads))) if len(self._head_ids[c]) <= room), None)
        if count is None:
            return None
        kept: dict[InstructionPart, int] = {}
        for part in self._parts[:count]:
            kept[part] = kept.get(part, 0) + 1
        return EncodedInstruction(self._heads[count] + tail, self._head_ids[count] + ids, kept)


def _token_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    if not texts:  # which a tokenizer refuses
        return []
    found: list[list[int]] = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return found


def encode_instruction(
    instruction: Instruction,
    instance: Instance,
    parts: Sequence[InstructionPart],
    max_tokens: int,
    tokenizer: PreTrainedTokenizerBase,
    *,
    n_positive: int = 2,
    n_negative: int = 2,
) -> EncodedInstruction:
    """One instance behind its instruction; for many of one task, ``InstructionEncoder``.

    Raises:
        ValueError: the instance alone has more than ``max_tokens`` tokens; see ``InstructionEncoder`` too.
    """
    return InstructionEncoder(instruction, tokenizer, parts, max_tokens, n_positive, n_negative).one(instance.input)


class InstructionCollator:
    """Batches of (task, instance) for a loop of one's own or ``transformers.Trainer``.

    The loss is on the first right output and its end. Every task's instruction is tokenised once.

    Args:
        tokenizer: the model's, with an EOS.
        parts: what is read of the instructions.
        model_type: ``seq2seq`` reads the input in the encoder; ``causal`` reads it before the output, unlearned.
        max_tokens: of an input, special tokens apart.
        n_positive, n_negative: so many examples at most.
        join: stands between input and output under a causal model, and belongs to the output.

    Raises:
        ValueError: the tokenizer has no EOS; when called, no feature, or an instance that alone exceeds ``max_tokens``.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        parts: Sequence[InstructionPart] = PARTS,
        model_type: Literal["causal", "seq2seq"] = "seq2seq",
        *,
        max_tokens: int = 1024,
        n_positive: int = 2,
        n_negative: int = 2,
        join: str = " ",
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no EOS token, which ends an output; set tokenizer.eos_token.")
        self.tokenizer, self.parts, self.model_type, self.join = tokenizer, tuple(parts), model_type, join
        self.max_tokens, self.n_positive, self.n_negative = max_tokens, n_positive, n_negative
        self._pad = int(tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)
        self._encoders: dict[str, tuple[Instruction, InstructionEncoder]] = {}
        self._sides = ([start_token(tokenizer)], []) if model_type == "causal" else _special_sides(tokenizer)

    def __call__(self, features: Sequence[tuple[Instruction, Instance]]) -> Mapping[str, Tensor]:
        """Encode and pad.

        Returns:
            ``input_ids``, ``attention_mask`` and ``labels``, see ``pad_pairs``.
        """
        if not features:
            raise ValueError("there is no instance to encode.")
        before, after = self._sides
        sources = [[*before, *self._input(task, instance).input_ids, *after] for task, instance in features]
        targets = [self._target(instance.references[0]) for _, instance in features]
        pairs = [Encoded(source, target) for source, target in zip(sources, targets, strict=True)]
        return pad_pairs(pairs, self.model_type, self._pad)

    def _input(self, task: Instruction, instance: Instance) -> EncodedInstruction:
        known = self._encoders.get(task.name)
        if known is None or known[0] is not task:
            sizes = (self.max_tokens, self.n_positive, self.n_negative)
            known = self._encoders[task.name] = (task, InstructionEncoder(task, self.tokenizer, self.parts, *sizes))
        return known[1].one(instance.input)

    def _target(self, output: str) -> list[int]:
        if self.model_type == "causal":
            return [*_token_ids(self.tokenizer, [self.join + output])[0], int(self.tokenizer.eos_token_id)]
        ids: list[int] = self.tokenizer(text_target=output, verbose=False)["input_ids"]
        end = int(self.tokenizer.eos_token_id)
        return ids if ids[-1:] == [end] else [*ids, end]


def _special_sides(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The special tokens that an encoder's input has before and after it."""
    word = "output:"
    whole: list[int] = tokenizer(word)["input_ids"]
    (bare,) = _token_ids(tokenizer, [word])
    begin = next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
    return whole[:begin], whole[begin + len(bare) :]
