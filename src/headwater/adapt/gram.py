"""Gradient-regulated meta-prompt learning: learn from unlabelled pairs where prompts start and how they may move.

    inner    theta' = theta - alpha M_phi(g; theta),      g = grad_theta L(support; theta)
    outer    min over theta, phi of   E [ L(query; theta') + L(shifted; theta') ] / 2
    gated    M_phi(g; theta)_t = 2 sigmoid(MLP_phi([theta_t, g_t / |g_t|])) * g_t,      MLP_phi = 0 at the start
    after    the prompt of a task starts at theta, and M_phi, frozen, rewrites every gradient of it

L is the cross-entropy of cosines between images and prompted class phrases (``gram_model``). Tasks are made of pairs
without labels (``gram_tasks``): support and query share their classes, and shifted has those of another domain, so that
a step which helps its own task must not cost others.

Source: Li et al., "Gradient-Regulated Meta-Prompt Learning for Generalizable Vision-Language Models", arXiv:2303.06571.
Differs: the form of M_phi, the numbers of clusters, steps and rates could not be checked and are ours; so is that the
    outer loss weighs the task's own queries and another domain's alike. The recipe tunes the text prompt; the parts
    take visual prompts as well.
Needs: a dual or sentence encoder, unlabelled pairs, a few labelled examples and descriptions of their classes.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from headwater.adapt.base import AdaptRecipe, AdaptTask
from headwater.adapt.data import TaskData, encode_task, rows_apart
from headwater.adapt.gram_model import PromptedClassifier, PromptedDualEncoder, Prompts
from headwater.adapt.gram_regulator import (
    GradientRegulator,
    Kind,
    RegulatedOptimizer,
    Regulators,
    adapted_prompts,
    meta_prompt_step,
)
from headwater.adapt.gram_tasks import Episode, TaskSampler, hierarchical_tasks
from headwater.core.checkpoint import CheckpointStore
from headwater.core.recipe import DataRef, Metrics, Name, Spec
from headwater.core.rng import torch_generator
from headwater.core.training_state import load_tensors, training_tensors
from headwater.modalities.models import ModelError
from headwater.modalities.text.labelled import encode_texts
from headwater.modalities.text.softprompt import SoftPrompt
from headwater.modalities.text.sources import open_labelled
from headwater.modalities.vision.labelled import encode_images, open_labelled_images

if TYPE_CHECKING:
    from headwater.core.run import Run

__all__ = [
    "GradientRegulator",
    "Gram",
    "MetaSpec",
    "RegulatedOptimizer",
    "adapted_prompts",
    "episode_loss",
    "meta_prompt_step",
    "meta_train",
    "tune_prompts",
]


def episode_loss(encoder: PromptedDualEncoder, images: Tensor) -> Callable[[Prompts, Sequence[Episode]], Tensor]:
    """The loss of episodes over ``images``, features or pixels ``(N, ...)``: the mean of their mean cross-entropies."""

    def loss(prompts: Prompts, episodes: Sequence[Episode]) -> Tensor:
        phrases = [phrase for episode in episodes for phrase in episode.phrases]
        sizes = [len(episode.phrases) for episode in episodes]
        weights = torch.split(encoder.text_features(phrases, prompts), sizes)
        losses = [
            nn.functional.cross_entropy(
                encoder.scale * encoder.image_features(images[episode.rows], prompts) @ weight.T,
                torch.from_numpy(episode.labels).to(weight.device),
            )
            for episode, weight in zip(episodes, weights, strict=True)
        ]
        return torch.stack(losses).mean()

    return loss


class MetaSpec(Spec):
    """How prompt and regulator are learned from pairs. The rates suit MiniLM; none of the paper's could be checked."""

    steps: int = Field(default=200, gt=0, description="tasks that are drawn, one for each step")
    lr: float = Field(default=3e-3, gt=0, description="Adam's learning rate for prompt and regulator")
    inner_lr: float = Field(default=0.3, gt=0, description="size of the step on a task's support")
    inner_steps: int = Field(
        default=1, ge=0, description="steps on the support; 0 trains the prompt on all tasks jointly, without adapting"
    )
    second_order: bool = Field(default=True, description="differentiate through the inner steps' gradients")
    ways: int = Field(default=5, ge=2, description="classes of a task")
    shots: int = Field(default=4, gt=0, description="support examples of each class")
    queries: int = Field(default=4, gt=0, description="query examples of each class")
    domains: int = Field(default=8, ge=2, description="clusters of the captions")
    classes: int = Field(default=16, ge=2, description="clusters within each domain")
    checkpoint_every: int = Field(default=50, gt=0, description="steps between checkpoints")

    @model_validator(mode="after")
    def _classes_suffice(self) -> Self:
        if self.classes < self.ways:
            raise ValueError(f"classes must be at least ways, {self.ways}, or no domain has a task; got {self.classes}")
        return self


def meta_train(
    encoder: PromptedDualEncoder,
    regulators: Regulators,
    tasks: TaskSampler,
    images: Tensor,
    spec: MetaSpec,
    *,
    store: CheckpointStore | None = None,
    log: Callable[[int, float], None] = lambda step, loss: None,
) -> float:
    """Learn the encoder's prompts and their regulators, in place.

    Args:
        encoder: made with ``second_order`` where ``spec`` says so.
        regulators: by the names of the prompts.
        tasks: what is learned from.
        images: of the pairs, features or pixels ``(N, ...)``.
        spec: how.
        store: where checkpoints go, and a continued run begins.
        log: receives the step and the mean outer loss since the last time, at every checkpoint.

    Returns:
        Seconds spent, those before an interruption included.

    Raises:
        ArithmeticError: the outer loss is not finite.
        CheckpointError: the checkpoint is of other data or another model.
    """
    trained = nn.ModuleDict({"prompts": encoder.prompts, "regulators": nn.ModuleDict(regulators)})
    optimizer = torch.optim.Adam(trained.parameters(), lr=spec.lr)
    loss_fn = episode_loss(encoder, images)
    latest = store.latest() if store is not None else None
    first, spent, total = 0, 0.0, 0.0
    if latest is not None:
        load_tensors([trained], optimizer, latest.tensors)
        first, spent = latest.step, float(latest.state["seconds"])
    begin = time.perf_counter()
    for step in range(first, spec.steps):
        task = tasks.task(step)
        optimizer.zero_grad()
        loss = meta_prompt_step(
            encoder.vectors(),
            regulators,
            loss_fn,
            [task.support],
            [task.query, task.shifted],
            spec.inner_lr,
            spec.inner_steps,
            spec.second_order,
        )
        if not bool(torch.isfinite(loss)):
            raise ArithmeticError(f"meta-training, step {step}: the loss is {loss:g}; lower inner_lr or lr.")
        loss.backward()  # type: ignore[no-untyped-call]  # torch's own
        optimizer.step()
        total += float(loss.detach())
        done = step + 1
        if done % spec.checkpoint_every == 0 or done == spec.steps:
            log(done, total / (done - first))
            if store is not None:
                state = {"seconds": spent + time.perf_counter() - begin}
                store.save(done, training_tensors([trained], optimizer), state)
            total, spent, first, begin = 0.0, spent + time.perf_counter() - begin, done, time.perf_counter()
    return spent


def tune_prompts(
    encoder: PromptedDualEncoder,
    regulators: Regulators,
    images: Tensor,
    labels: Tensor,
    phrases: Sequence[str],
    *,
    steps: int,
    lr: float,
) -> Iterator[float]:
    """Tune an encoder's prompts on a task, in place: full-batch gradient descent, regulated.

    Args:
        encoder: whose prompts.
        regulators: by the names of the prompts.
        images: features or pixels ``(n, ...)``.
        labels: class indices, ``(n,)``.
        phrases: of the classes.
        steps: how many.
        lr: their size.

    Yields:
        The loss before each step, once the step is done.

    Raises:
        ArithmeticError: the loss is not finite.
    """
    prompts: dict[str, SoftPrompt] = dict(encoder.prompts.items())  # type: ignore[arg-type]  # SoftPrompts
    optimizer = RegulatedOptimizer(torch.optim.SGD(encoder.prompts.parameters(), lr=lr), prompts, regulators)
    for step in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(encoder(images, phrases), labels)
        if not bool(torch.isfinite(loss)):
            raise ArithmeticError(f"tuning the prompt, step {step}: the loss is {loss:g}; lower lr.")
        loss.backward()  # type: ignore[no-untyped-call]  # torch's own
        optimizer.step()
        yield float(loss.detach())


class Gram(AdaptRecipe):
    """Recipe: meta-learn prompt and regulator from pairs, tune the prompt on the task, classify by class phrases."""

    id: ClassVar[str] = "gram"

    pairs: DataRef = Field(
        description="unlabelled pairs: texts or, as `modality` says, images; a caption of each in the label's column"
    )
    prompt_tokens: int = Field(default=4, gt=0, description="trained vectors before each class phrase")
    prompt_text: Name | None = Field(
        default=None, description="words that the prompt begins at before meta-training; null for random vectors"
    )
    template: str = Field(default="{}", pattern=r"\{\}", description="what stands behind the prompt; {} is the class")
    regulator: Kind = Field(
        default="gated", description="how gradients are rewritten: by a network, by a factor each, or not at all (MAML)"
    )
    meta: MetaSpec = Field(default=MetaSpec(), description="learning prompt and regulator from the pairs")
    steps: int = Field(default=10, ge=0, description="steps of the prompt on the labelled task")
    lr: float = Field(default=0.1, gt=0, description="their size; it depends on the model")
    scale: float | None = Field(
        default=None, gt=0, description="of the cosines in the softmax; null for the model's own, or 20"
    )

    def run_on(self, data: TaskData, run: Run) -> Metrics:
        """Leave out pairs that repeat a held-out input; then as every method of the stage, on features.

        Raises:
            ValueError: the inputs are features, where texts or images are needed.
        """
        if data.train.inputs.ndim != 1:
            raise ValueError(f"gram reads texts or images (n,); got inputs of shape {data.train.inputs.shape}.")
        bodies, captions = self._pairs()
        digest = hashlib.sha256(json.dumps([captions, self.modality]).encode())
        for body in bodies:
            digest.update(hashlib.sha256(body if isinstance(body, bytes) else body.encode()).digest())
        run.record_data("pairs", digest.hexdigest())
        held = [item for role, part in data.parts() if role != "train" for item in part.inputs]
        kept = rows_apart(bodies, held, self.modality)
        run.write_json("pairs.json", {"kept": kept, "of": len(bodies)})
        encoded = encode_task(data, self.model, modality=self.modality, max_tokens=self.max_tokens)
        metrics = super().run_on(encoded, run)
        return metrics | {
            "data/dropped_pairs": float(len(bodies) - len(kept)),
            "cost/meta_seconds": float(run.cost["meta_seconds"] or 0),
        }

    def adapt(self, task: AdaptTask, run: Run) -> PromptedClassifier:
        """Meta-learn, then tune."""
        encoder = self._encoder(task)
        vectors = encoder.vectors()["text"]
        generator = torch_generator(self.seed, "regulator")
        regulators = {"text": GradientRegulator(len(vectors), vectors.shape[1], self.regulator, generator=generator)}
        images, tasks, seconds = self._tasks(run)
        store = CheckpointStore(run.checkpoints, fingerprint=run.data["pairs"])
        seconds += meta_train(
            encoder,
            regulators,
            tasks,
            images,
            self.meta,
            store=store,
            log=lambda step, loss: run.log({"loss": loss}, phase="meta", step=step),
        )
        run.cost["meta_seconds"] = seconds
        features = torch.from_numpy(np.array(task.train.inputs, dtype=np.float32))
        labels = torch.from_numpy(task.train.labels)
        losses = tune_prompts(encoder, regulators, features, labels, task.label_texts, steps=self.steps, lr=self.lr)
        for step, loss in enumerate(losses):
            run.log({"loss": loss}, phase="task", step=step)
        about = {
            "model": str(self.model),
            "modality": self.modality,
            "max_tokens": self.max_tokens,
            "labels": list(task.label_names),
        }
        return PromptedClassifier(encoder, regulators, task.label_texts, about)

    def _encoder(self, task: AdaptTask) -> PromptedDualEncoder:
        model, processor = task.encoder()
        if self.modality == "image" and not hasattr(model, "get_text_features"):
            raise ModelError(
                f"model {self.model.name!r} reads images but no class phrases; give a dual encoder (CLIP)."
            )
        tokenizer = getattr(processor, "tokenizer", processor)  # a dual encoder's processor holds both
        if self.prompt_text is None:
            tower: Any = getattr(model, "text_model", model)  # Any: Hugging Face's
            width = int(tower.get_input_embeddings().weight.shape[1])
            prompt = SoftPrompt.normal(self.prompt_tokens, width, generator=torch_generator(self.seed, "prompt"))
        else:
            prompt = SoftPrompt.from_text(model, tokenizer, self.prompt_text, self.prompt_tokens)
        second_order = self.meta.second_order and self.meta.inner_steps > 0
        return PromptedDualEncoder(
            model, tokenizer, {"text": prompt}, template=self.template, scale=self.scale, second_order=second_order
        )

    def _tasks(self, run: Run) -> tuple[Tensor, TaskSampler, float]:
        """Features of the captioned sides, tasks over the pairs, and the seconds that the features took."""
        bodies, captions = self._pairs()
        kept = json.loads(run.path("pairs.json").read_text(encoding="utf-8"))["kept"]
        bodies, captions = [bodies[row] for row in kept], [captions[row] for row in kept]
        texts = encode_texts(captions, self.model, max_tokens=self.max_tokens, normalize=True)
        if self.modality == "image":
            images, seconds = encode_images(bodies, self.model, normalize=True)
        else:
            read = encode_texts(bodies, self.model, max_tokens=self.max_tokens, normalize=True)
            images, seconds = read.store, read.seconds
        meta = self.meta
        tasks = hierarchical_tasks(
            texts.store.X,
            images.X,
            captions,
            meta.domains,
            meta.classes,
            ways=meta.ways,
            shots=meta.shots,
            queries=meta.queries,
            seed=self.seed,
        )
        run.notes["tasks"] = f"{sum(map(len, tasks.domains))} classes in {len(tasks.domains)} domains"
        for words in tasks.skipped:
            run.logger.info("skipped: %s", words)
        return torch.from_numpy(np.array(images.X)), tasks, seconds + texts.seconds

    def _pairs(self) -> tuple[list[Any], list[str]]:  # Any: texts or encoded images
        opened = open_labelled_images if self.modality == "image" else open_labelled
        return opened(self.pairs, role="pairs")
