"""Any causal or masked model of transformers can be continued: small random ones, saved as on the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    DebertaV2Config,
    GPT2Config,
    GPTNeoXConfig,
    MistralConfig,
    OPTConfig,
    Qwen2Config,
    RobertaConfig,
)

from headwater.core.recipe import load_recipe
from headwater.core.run import execute

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 70}
CAUSAL = {
    "gpt2, tied": GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=64),
    "gpt-neox": GPTNeoXConfig(**SIZES, intermediate_size=32),
    "mistral, grouped heads": MistralConfig(**SIZES, intermediate_size=32, num_key_value_heads=1, head_dim=8),
    "qwen2, tied": Qwen2Config(**SIZES, intermediate_size=32, num_key_value_heads=2, tie_word_embeddings=True),
    "qwen2, untied": Qwen2Config(**SIZES, intermediate_size=32, num_key_value_heads=2, tie_word_embeddings=False),
    "opt": OPTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, ffn_dim=32, word_embed_proj_dim=16),
}
MASKED = {
    "roberta": RobertaConfig(**SIZES, intermediate_size=32, pad_token_id=0),
    "deberta-v2": DebertaV2Config(**SIZES, intermediate_size=32, pad_token_id=0),
}


def saved(config: Any, cls: Any, tokenizer_home: Path, target: Path, *, shards: bool = False) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_home)
    config.vocab_size = len(tokenizer)
    config.bos_token_id = config.eos_token_id = tokenizer.eos_token_id
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = cls.from_config(config)
    model.save_pretrained(target, max_shard_size="8KB" if shards else "1GB")
    tokenizer.save_pretrained(target)
    return target


@pytest.mark.parametrize("name", CAUSAL)
def test_learns_with_any_causal_architecture(
    name: str, tiny_causal: Path, domain_fields: dict[str, Any], tmp_path: Path
) -> None:
    model = saved(CAUSAL[name], AutoModelForCausalLM, tiny_causal, tmp_path / "start", shards=name.startswith("qwen2"))
    fields = {**domain_fields, "model": str(model), "budget": {"steps": 25}, "optim": {"lr": 1e-2}}
    result = execute(load_recipe({"method": "plain", **fields, "replay": 0.25}), tmp_path / "run")
    assert result.metrics["domain/gain"] > 0.3
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    if opened.config.tie_word_embeddings:
        assert opened.get_output_embeddings().weight is opened.get_input_embeddings().weight


@pytest.mark.parametrize("name", MASKED)
def test_learns_with_any_masked_architecture(
    name: str, tiny_masked: Path, domain_fields: dict[str, Any], tmp_path: Path
) -> None:
    model = saved(MASKED[name], AutoModelForMaskedLM, tiny_masked, tmp_path / "start")
    fields = {**domain_fields, "model": str(model), "budget": {"steps": 25}, "optim": {"lr": 1e-2}}
    result = execute(load_recipe({"method": "plain", **fields}), tmp_path / "run")
    assert result.metrics["domain/gain"] > 0.3
    AutoModelForMaskedLM.from_pretrained(tmp_path / "run" / "model")


def test_learns_in_bfloat16_weights(tiny_causal: Path, domain_fields: dict[str, Any], tmp_path: Path) -> None:
    model = {"name": str(tiny_causal), "dtype": "bfloat16"}
    fields = {**domain_fields, "model": model, "budget": {"steps": 25}, "optim": {"lr": 1e-2}}
    result = execute(load_recipe({"method": "plain", **fields}), tmp_path / "run")
    assert result.metrics["domain/gain"] > 0.3
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").dtype == torch.bfloat16


def test_learns_from_the_adapter_of_an_earlier_run(domain_fields: dict[str, Any], tmp_path: Path) -> None:
    lora = {"lora": {"r": 4}, "budget": {"steps": 25}, "optim": {"lr": 3e-2}}
    first = execute(load_recipe({"method": "plain", **domain_fields, **lora}), tmp_path / "first")
    fields = {**domain_fields, "model": str(tmp_path / "first" / "model")}
    second = execute(load_recipe({"method": "frozen", **fields}), tmp_path / "second")
    assert second.metrics["domain/bpb_start"] == pytest.approx(first.metrics["domain/bpb"], rel=1e-5)
