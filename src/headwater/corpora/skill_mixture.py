"""Skill-it inside ``transformers.Trainer``: a data set in rounds, and the callback that weighs each of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback

from headwater.core.order import VirtualIndex
from headwater.core.rng import derive_seed
from headwater.corpora.reading import target_losses
from headwater.corpora.skill_graph import difference
from headwater.modalities.text.docs import CorpusError, Document
from headwater.modalities.text.examples import PackedExamples, formatted
from headwater.modalities.text.instruct import AnswerFormatter
from headwater.modalities.text.masks import keeps_documents_apart
from headwater.modalities.text.objectives import PackedObjective
from headwater.modalities.text.packing import MAX_PERIOD, MixedStream

if TYPE_CHECKING:
    from headwater.corpora.skill_it import SkillIt

__all__ = ["MixtureCallback", "SkillMixture"]

LOSS = "skill_loss/"


class SkillMixture:
    """Rows of several skills in rounds, each in the proportions that a controller gives when it begins.

    Pass ``MixtureCallback`` to the Trainer too: it tells the controller the losses, and begins the rounds. In any round
    each skill's rows differ by less than 1 from its share, and a skill is read on from round to round. Rows have
    ``input_ids``, ``labels`` and ``position_ids`` ``(seq_len,)``; documents with a ``prompt`` are learned from their
    answer on.

    Args:
        skills: documents by training skill.
        watched: validation documents by evaluation skill.
        controller: of these skills; not told anything yet.
        formatter: turns both into tokens.
        seq_len: tokens of a row.
        steps: of training.
        rows: per step, over all devices and accumulated batches.
        rounds: of equal length, at least 2 steps each.
        seed: of the order.

    Attributes:
        borders: the step at which each round begins, and the last one's end.
        shares: of each round so far, by skill.

    Raises:
        CorpusError: the skills are not those of the controller's graph.
        ValueError: too few steps for the rounds.
    """

    def __init__(
        self,
        skills: Mapping[str, Sequence[Document]],
        watched: Mapping[str, Sequence[Document]],
        controller: SkillIt,
        formatter: AnswerFormatter,
        *,
        seq_len: int,
        steps: int,
        rows: int,
        rounds: int = 6,
        seed: int = 0,
    ) -> None:
        graph = controller.graph
        for names, given in ((graph.train_skills, skills), (graph.eval_skills, watched)):
            if words := difference(names, tuple(given)):
                raise CorpusError(f"the graph is of other skills than the data ({words})")
        if steps < 2 * rounds:
            raise ValueError(f"a round takes at least 2 steps; got {steps} steps for {rounds} rounds.")
        self.controller, self.steps, self.rows = controller, steps, rows
        self.borders = [steps * t // rounds for t in range(rounds + 1)]
        self.shares: list[dict[str, float]] = []
        tokenizer = formatter.tokenizer
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id

        def packed(documents: Sequence[Document]) -> PackedExamples:
            return PackedExamples(formatted(documents, formatter, seq_len), seq_len, pad_token_id=pad)

        self._tables = [packed(skills[name]) for name in graph.train_skills]
        self._watched = {name: packed(documents) for name, documents in watched.items()}
        self._walks = [
            VirtualIndex(len(table), derive_seed(seed, "order", name))
            for name, table in zip(graph.train_skills, self._tables, strict=True)
        ]
        self._streams: list[MixedStream] = []

    def __len__(self) -> int:
        return self.steps * self.rows

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        if not 0 <= position < len(self):
            raise IndexError(f"position {position} is outside [0, {len(self)}).")
        step, row = divmod(position, self.rows)
        number = next(t for t, end in enumerate(self.borders[1:]) if step < end)
        if number >= len(self._streams):
            raise RuntimeError(
                f"step {step} is of round {number + 1}, which has not begun; pass MixtureCallback to the Trainer."
            )
        batch = self._streams[number].batch(step - self.borders[number], row, row + 1)
        return {name: batch[name][0] for name in ("input_ids", "labels", "position_ids")}

    def losses(self, model: PreTrainedModel) -> dict[str, float]:
        """Nats per target of each evaluation skill."""
        return target_losses(model, self._watched, PackedObjective())

    def begin(self, losses: Mapping[str, float] | None = None) -> None:
        """Begin the next round, after these losses; None for the first."""
        if losses is not None:
            self.controller.update(losses)
        number = len(self._streams)
        begun = [0] * len(self._tables)
        for t, stream in enumerate(self._streams):
            given = stream.given((self.borders[t + 1] - self.borders[t]) * self.rows)
            begun = [before + int(count) for before, count in zip(begun, given, strict=True)]
        self.shares.append(self.controller.weights())
        parts = [
            (table, share if share >= 1 / MAX_PERIOD else 0.0)
            for table, share in zip(self._tables, self.shares[number].values(), strict=True)
        ]
        walks = [VirtualIndex(walk.n, walk.seed, place) for walk, place in zip(self._walks, begun, strict=True)]
        self._streams.append(MixedStream(parts, self.rows, walks=walks))


class MixtureCallback(TrainerCallback):  # type: ignore[misc]  # transformers ships no types that mypy follows
    """Weighs the rounds of a ``SkillMixture`` inside ``transformers.Trainer``.

    The Trainer reads one batch ahead, so losses are taken one step before a round ends. They stand in the Trainer's log
    history as ``skill_loss/NAME``, from which a resumed Trainer goes on with the same shares.

    Args:
        dataset: the Trainer's, new for each training.
    """

    def __init__(self, dataset: SkillMixture) -> None:
        self.dataset = dataset

    def on_train_begin(self, args: Any, state: Any, control: Any, model: PreTrainedModel, **kwargs: Any) -> None:
        """Refuse what would break the rounds, and begin those that a checkpoint knows; Any: transformers' own classes.

        Raises:
            ValueError: says which argument to change.
        """
        dataset = self.dataset
        rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        if args.train_sampling_strategy != "sequential":
            raise ValueError("the Trainer would shuffle the rounds; set train_sampling_strategy='sequential'.")
        if args.dataloader_num_workers:
            raise ValueError("worker processes would read rounds before they begin; set dataloader_num_workers=0.")
        if rows != dataset.rows or state.max_steps != dataset.steps:
            raise ValueError(
                f"the Trainer takes {state.max_steps} steps of {rows} rows and the data set is made for "
                f"{dataset.steps} of {dataset.rows}; give both the same."
            )
        if not keeps_documents_apart(model, args.per_device_train_batch_size):
            raise ValueError(
                "this model's attention ignores position_ids that start anew, so documents of a row would see each "
                "other. Under flash attention set per_device_train_batch_size=1; else load the model with "
                "attn_implementation='sdpa'."
            )
        if dataset.shares:
            raise ValueError("this data set was read by a Trainer before; make a new one, with a new controller.")
        dataset.begin()
        for entry in state.log_history:
            losses = {k.removeprefix(LOSS): v for k, v in entry.items() if k.startswith(LOSS)}
            if losses:
                dataset.begin(losses)

    def on_step_end(self, args: Any, state: Any, control: Any, model: PreTrainedModel, **kwargs: Any) -> None:
        """One step before a round ends, take the losses and begin the next."""
        border = self.dataset.borders[len(self.dataset.shares)]
        if state.global_step == border - 1 and border < self.dataset.steps:
            losses = self.dataset.losses(model)
            self.dataset.begin(losses)
            state.log_history.append({"step": state.global_step, **{LOSS + k: v for k, v in losses.items()}})
