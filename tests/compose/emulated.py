"""Small models of the architectures that people use, whose distributions are peaked and differ."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCABULARY = 64
WINDOW = 6

ARCHITECTURES: dict[str, tuple[type, type, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 8}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": WINDOW, "head_dim": None}),
}


def absolute_model(seed: int, hidden: int = 16) -> PreTrainedModel:
    """A GPT-2, whose positions are absolute: wrong ones under padding show."""
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=128, n_embd=hidden, n_layer=2, n_head=2, bos_token_id=None, eos_token_id=None
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = GPT2LMHeadModel(config)
    with torch.no_grad():
        made.transformer.wpe.weight.mul_(30)
        made.transformer.wte.weight.mul_(30)
    return made.eval()


def model(kind: str, seed: int, hidden: int = 16, layers: int = 2, **changes: Any) -> PreTrainedModel:
    """A model in eval(), its matrices enlarged so that a step of greedy decoding is no near-tie."""
    config_class, model_class, own = ARCHITECTURES[kind]
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 2 * hidden,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    config = config_class(**(settings | own | changes))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = model_class(config)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6)
    return made.eval()


def prompts() -> tuple[Tensor, Tensor]:
    """Three prompts padded on the left, ``(3, 7)``, and their mask."""
    ids = torch.randint(2, VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    mask[2, :1] = 0
    return ids.masked_fill(mask == 0, 0), mask


@torch.no_grad()
def brute_force(
    large: PreTrainedModel, small: PreTrainedModel, tuned: PreTrainedModel, ids: Tensor, mask: Tensor, tokens: int
) -> Tensor:
    """Greedy decoding by the definition: every step reads everything, no cache, no class of ours."""
    for _ in range(tokens):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        log_p, log_small, log_tuned = (
            part(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
            .logits[:, -1]
            .double()
            .log_softmax(-1)
            for part in (large, small, tuned)
        )
        following = (log_p + log_tuned - log_small).argmax(-1, keepdim=True)
        ids, mask = torch.cat([ids, following], dim=1), torch.cat([mask, torch.ones_like(following)], dim=1)
    return ids
