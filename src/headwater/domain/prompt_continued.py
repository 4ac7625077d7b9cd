"""Prompt-based continued pretraining: read the task's texts in the prompt, answers filled in, then learn to answer.

    1. teacher      T = prompt-finetune(M0, L)                     cross-entropy over the label words, at the gap
    2. pseudo-label y~(x) = argmax_c T(x)                          for every x in U
    3. corpus       C = {prompt(x) with v(y~(x)) in the gap}       labelled texts with their true words
    4. pretraining  P = train(M0, C)                               the language model's own loss, over the whole string
    5. fine-tune    S = prompt-finetune(P, L)

L are few labelled texts and U many without. The word is a token like others in step 4: a masked model predicts it in 15
of 100 passes (``always_mask_label`` makes that all of them). Nothing is added to the model at any step.

Source: Shi and Lipani, "Don't Stop Pretraining? Make Prompt-based Fine-tuning Powerful Learner", arXiv:2305.01711.
Differs: written templates only, no trainable ones. One text per labelled example in the recipe; ``prompts.Template``
    renders pairs for loops of one's own. Causal models are an addition. The paper keeps the best of several checkpoints
    of each step by validation; here each step ends where its share of the budget does.
Needs: a language model, labelled texts, more texts of the same kind, a template and a word for each label.
"""

from __future__ import annotations

from collections.abc import Generator
from itertools import chain
from typing import Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from headwater.core.cache import cache_dir, cache_key
from headwater.core.fit import Phase, Trained
from headwater.core.recipe import Name
from headwater.core.rng import derive_seed, hash_uniform
from headwater.domain.adaptation import Adaptation
from headwater.domain.base import Adapted
from headwater.domain.labelling import LabelledPretraining, LabelTask
from headwater.domain.pseudo_labels import class_inputs, pseudo_label
from headwater.modalities.text.classes import ClassModel
from headwater.modalities.text.docs import CorpusError, Document
from headwater.modalities.text.document_store import write_documents
from headwater.modalities.text.prompted import PromptedModel, PromptTexts, prompted
from headwater.modalities.text.prompts import Prompt, Template, Verbaliser

__all__ = ["PromptContinued"]


class PromptContinued(LabelledPretraining):
    """Continued pretraining on prompts with pseudo-labels in words, between two prompt-based fine-tunings."""

    id: ClassVar[str] = "prompt_continued"

    template: Name = Field(
        description="how a text is asked about, with {text} and {mask}: '{text} It was {mask} .'; for a causal model "
        "{mask} comes last"
    )
    verbaliser: dict[str, Name] = Field(
        min_length=2, description="label: the word that says it, of one token where it stands in the template"
    )
    multi_token: Literal["refuse", "mean"] = Field(
        default="refuse", description="what to do with words of several tokens; `mean` scores them by their mean logit"
    )
    use_labels: Literal["pseudo", "true", "random", "none"] = Field(
        default="pseudo",
        description="whose words stand in the unlabelled texts: a fine-tuned model's; the true ones, in the column of "
        "`labelled`'s label, each counted; words drawn by lot; or none, and no template either, which is task-adaptive "
        "pretraining",
    )
    always_mask_label: bool = Field(
        default=False, description="a masked model must predict the word in every pass, not in 15 of 100"
    )
    shares: tuple[float, float, float] = Field(
        default=(0.15, 0.55, 0.3),
        description="of the budget, for the first fine-tuning, pretraining and the last fine-tuning; where no "
        "pseudo-labels are needed, pretraining has the first one's too",
    )
    continued_lr: float | None = Field(
        default=None, gt=0, description="learning rate of the pretraining; by default that of `optim`"
    )

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if Template(self.template).pair:
            raise ValueError(
                f"template {self.template!r} takes pairs, but labelled texts are single here; use one {{text}}"
            )
        words = [word.strip() for word in self.verbaliser.values()]
        if len(set(words)) < len(words):
            raise ValueError(f"verbaliser gives two labels the same word: {self.verbaliser}")
        if min(self.shares) <= 0 or sum(self.shares) > 1 + 1e-9:
            raise ValueError(f"shares must be > 0 and sum to at most 1; got {self.shares}")
        if self.replay > 0:
            raise ValueError(
                f"replay is {self.replay}, but this method reads prompts and not running text; set replay: 0 "
                "(`general` is still measured)"
            )
        return self

    def learn(self, ctx: Adaptation, task: LabelTask) -> Generator[Phase, Trained, Adapted]:
        """Teacher, pseudo-labels, pretraining from the start, fine-tuning."""
        first, middle, last = self.shares
        prompt = self._prompt(ctx, task)
        if self.use_labels == "pseudo":
            teacher = prompted(ctx.start(), prompt)
            yield task.fine_tuning("teacher", teacher, share=first)
            task.hand_in("start", teacher)
            words = self._pseudo_labels(ctx, task, teacher)
            del teacher
        else:
            middle += first
            words = self._other_labels(ctx, task)
        student = prompted(ctx.start(), prompt)
        yield self._pretraining(ctx, task, student, words, middle)
        # model/ is what pretraining left, which still speaks; fine-tuning makes it answer and ends in classifier/.
        continued = ctx.start().to(next(student.model.parameters()).device)
        continued.load_state_dict(student.model.state_dict())
        yield task.fine_tuning("finetune", student, share=last)
        task.hand_in("end", student)
        said = dict(zip(task.labels, np.bincount(words, minlength=len(task.labels)).tolist(), strict=True))
        about = {"template": self.template, "labels_from": self.use_labels, "per_class": said}
        ctx.run.write_json("prompts.json", about)
        files = ("prompts.json", "pseudo") if self.use_labels == "pseudo" else ("prompts.json",)
        return Adapted(continued, files=files, metrics={"pseudo/labels": float(len(words))})

    def _prompt(self, ctx: Adaptation, task: LabelTask) -> Prompt:
        template = Template(self.template)
        words = Verbaliser.of(self.verbaliser, task.labels, ctx.tokenizer, template, multi_token=self.multi_token)
        most = min(ctx.seq_len, ctx.tokenizer.model_max_length)
        return Prompt(template, words, ctx.tokenizer, ctx.head == "causal", most)

    def _pseudo_labels(self, ctx: Adaptation, task: LabelTask, teacher: PromptedModel) -> NDArray[np.int64]:
        found = pseudo_label(teacher.classes, task.unlabelled, ctx.run.path("pseudo")).with_format("numpy")
        inputs = class_inputs(task.unlabelled, teacher.classes)
        ctx.charge_forward(teacher.model, int(inputs.lengths.sum()))
        code = np.asarray(found["label"][:], dtype=np.int64)
        if len(said := np.unique(code)) == 1:
            ctx.warn(
                "teacher",
                f"every pseudo-label is {task.labels[int(said[0])]!r}: the teacher tells nothing apart, and its words "
                "tell the model nothing. Give it more labels, other words or a larger share of the budget.",
            )
        return code

    def _other_labels(self, ctx: Adaptation, task: LabelTask) -> NDArray[np.int64]:
        number = len(task.unlabelled)
        if self.use_labels == "random":
            drawn = hash_uniform(derive_seed(self.seed, "random words"), np.arange(number), 1)[:, 0]
            return (drawn * len(task.labels)).astype(np.int64)
        if self.use_labels == "none":
            return np.zeros(0, dtype=np.int64)
        column, code = self.labelled.label_field, {label: index for index, label in enumerate(task.labels)}
        found = [str(document.meta.get(column)) for document in task.unlabelled]
        if unknown := sorted(set(found) - set(code)):
            raise CorpusError(
                f"use_labels is 'true', but an unlabelled text has {unknown[0]!r} in the column {column!r}, which is "
                f"none of {', '.join(task.labels)}."
            )
        ctx.meter.add(labels=number)
        return np.array([code[label] for label in found], dtype=np.int64)

    def _pretraining(
        self, ctx: Adaptation, task: LabelTask, student: PromptedModel, words: NDArray[np.int64], share: float
    ) -> Phase:
        """The language model's own training on prompts, or, without labels, on the texts as they are."""
        labelled = [Document(f"labelled-{place}", text) for place, text in enumerate(task.train.texts)]
        name = cache_key([task.unlabelled.fingerprint, task.train.texts])
        documents = write_documents(chain(labelled, task.unlabelled), cache_dir("documents") / f"{name}.prompts.arrow")
        classes: ClassModel = student.classes
        prompt: Prompt | None = student.objective.prompt
        if self.use_labels == "none":
            classes, prompt = ClassModel(student.model, ctx.tokenizer, task.labels, max_tokens=classes.max_tokens), None
            words = np.zeros(len(task.unlabelled), dtype=np.int64)
        targets = np.eye(len(task.labels), dtype=np.float32)[np.concatenate([task.train.classes, words])]
        phase = task.phase("pretrain", student, class_inputs(documents, classes), targets, share=share)
        stream = PromptTexts(
            phase.stream,
            ctx.tokenizer,
            prompt,
            causal=ctx.head == "causal",
            seed=derive_seed(self.seed, "pretrain"),
            always_mask_label=self.always_mask_label,
        )
        optim: Any = self.optim  # Any: one of several optimizers' settings
        if self.continued_lr is not None:
            optim = optim.model_copy(update={"lr": self.continued_lr})
        return Phase(phase.name, phase.model, stream, ctx.objective, phase.share, optim)
