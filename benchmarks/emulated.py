"""(j) What does decoding three models together cost beside running them one by one, and beside the large one alone?

    python -m benchmarks.emulated

A large model of 29 M parameters and two small ones of a tenth each, in float32 on one thread, 64 tokens after a prompt
of 32, greedily, through ``generate`` on both sides: the composed model, the same through a logits processor, and each
of the three with its own ``generate``. No way of composing them can avoid the sum of the three, but for the two
``generate`` loops it saves. At 256 tokens, one step with caches against one that reads everything again.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel
from transformers.utils import logging as transformers_logging

from benchmarks.harness import Bound, alternate, report
from headwater.compose.emulated_decoding import EmulatedLogitsProcessor, speculative_generate
from headwater.compose.emulated_finetuning import EmulatedModel
from headwater.modalities.text.tiny import tiny_llama

VOCABULARY, PROMPT, NEW, LONG = 8192, 32, 64, 256


def parts() -> dict[str, PreTrainedModel]:
    """A large model and two of a tenth of its size, their weights enlarged so that greedy decoding has no near-ties."""
    sizes = {"large": (512, 8, 8, 1376), "small": (192, 4, 4, 512), "tuned": (192, 4, 4, 512)}
    made = {
        name: tiny_llama(VOCABULARY, *size, 512, generator_seed=seed) for seed, (name, size) in enumerate(sizes.items())
    }
    with torch.no_grad():
        for model in made.values():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(3)
    return made


@torch.no_grad()
def check(models: dict[str, PreTrainedModel], found: Tensor, tokens: int) -> None:
    """Stop unless the first tokens of ``found`` are what the formula gives without caches."""
    ids = found[:, :PROMPT]
    for _ in range(tokens):
        log_p = {name: model(ids, use_cache=False).logits[:, -1].log_softmax(-1) for name, model in models.items()}
        ids = torch.cat([ids, (log_p["large"] + log_p["tuned"] - log_p["small"]).argmax(-1, keepdim=True)], dim=1)
    if not torch.equal(ids, found[:, : PROMPT + tokens]):
        raise SystemExit("the composed model decodes something else than the formula")


@torch.no_grad()
def step(composed: EmulatedModel, rows: int) -> dict[str, Callable[[], object]]:
    """The step after ``LONG`` tokens, with caches and without."""
    ids = torch.randint(VOCABULARY, (rows, LONG), generator=torch.Generator().manual_seed(2))
    cache = composed(ids[:, :-1], logits_to_keep=1, use_cache=True).past_key_values

    @torch.no_grad()
    def cached() -> None:
        composed(ids[:, -1:], past_key_values=cache, logits_to_keep=1)
        cache.keep(LONG - 1)

    @torch.no_grad()
    def recomputed() -> None:
        composed(ids, use_cache=False, logits_to_keep=1)

    return {"step, cached": cached, "step, recomputed": recomputed}


def main() -> None:
    """Ask."""
    transformers_logging.set_verbosity_error()
    torch.set_num_threads(1)
    models = parts()
    composed = EmulatedModel(*models.values())
    processor = EmulatedLogitsProcessor(models["small"], models["tuned"])
    ratios: dict[str, tuple[float, Bound]] = {}
    seconds: dict[str, float] = {}
    for rows in (1, 8):
        ids = torch.randint(VOCABULARY, (rows, PROMPT), generator=torch.Generator().manual_seed(rows))

        def decoded(model: PreTrainedModel, ids: Tensor = ids, *processors: EmulatedLogitsProcessor) -> Tensor:
            return model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=NEW,
                do_sample=False,
                logits_processor=LogitsProcessorList(processors),
            )

        def processed(ids: Tensor = ids) -> Tensor:
            processor.reset()
            return decoded(models["large"], ids, processor)

        together = decoded(composed)
        check(models, together, tokens=12)
        if not torch.equal(together, processed()):
            raise SystemExit("the processor decodes something else than the model")
        sides: dict[str, Callable[[], object]] = {"composed": lambda: decoded(composed), "processor": processed}
        sides |= {name: lambda model=model: decoded(model) for name, model in models.items()}
        least = alternate(sides | step(composed, rows), repeats=5, warmup=1)
        whole = least["large"] + least["small"] + least["tuned"]
        said = f"{rows} row{'s' if rows > 1 else ''}"
        ratios |= {
            f"{said}: composed over the sum of the parts": (least["composed"] / whole, Bound("lower", 1.15)),
            f"{said}: processor over the sum of the parts": (least["processor"] / whole, Bound("lower", 1.15)),
            f"{said}: composed over the large model alone": (
                least["composed"] / least["large"],
                Bound("lower", 1.35),
            ),
            f"{said}: recomputed over cached, one step at {LONG} tokens": (
                least["step, recomputed"] / least["step, cached"],
                Bound("higher", 10.0),
            ),
        }
        seconds |= {f"{said}: {name}": value for name, value in least.items()}
    prompt = torch.randint(VOCABULARY, (1, PROMPT), generator=torch.Generator().manual_seed(1))
    guessed = speculative_generate(composed, prompt, max_new_tokens=NEW)
    if not torch.equal(guessed.input_ids, composed.generate(prompt, max_new_tokens=NEW, do_sample=False)):
        raise SystemExit("speculation decodes something else than the model")
    report(
        "(j) emulated fine-tuning per token, 29 M and twice 3 M parameters",
        ratios,
        seconds=seconds,
        checked="the composed model decodes what the formula gives without caches; processor and speculation the same",
        notes={
            "parameters": {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()},
            "new tokens": NEW,
            "acceptance of drafts between unrelated random models": round(guessed.acceptance, 3),
        },
    )


if __name__ == "__main__":
    main()
