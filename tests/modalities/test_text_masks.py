from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Qwen2Config,
)

from headwater.modalities.text.masks import attention_mask_for, position_ids_for

SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 60}
COMMON = {**SIZE, "intermediate_size": 48, "max_position_embeddings": 32}
CONFIGS = {
    "llama": LlamaConfig(**COMMON, num_key_value_heads=2),
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=60, n_positions=32),
    "gpt_neox": GPTNeoXConfig(**COMMON),
    "qwen2": Qwen2Config(**COMMON, num_key_value_heads=2),
    "opt": OPTConfig(**SIZE, ffn_dim=48, max_position_embeddings=32, word_embed_proj_dim=32, dropout=0.0),
}
LENGTH = 9


def build(config, implementation):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
        for parameter in model.parameters():  # larger than usual, so that a leak would be loud
            parameter.data.mul_(3 if parameter.dim() > 1 else 1)
    return model.eval()


def influence(model, mask, position_ids):
    """Return ``(T, T)``: how far the logits of q move when token k changes."""
    ids = torch.arange(LENGTH)[None] + 3
    moved = torch.zeros(LENGTH, LENGTH)
    with torch.no_grad():
        base = model(ids, attention_mask=mask, position_ids=position_ids, use_cache=False).logits
        for k in range(LENGTH):
            changed = ids.clone()
            changed[0, k] = 50
            logits = model(changed, attention_mask=mask, position_ids=position_ids, use_cache=False).logits
            moved[:, k] = (logits - base).abs().amax(dim=-1)[0]
    return moved


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", CONFIGS)
def test_property_no_leak_and_no_blindness(name, implementation):
    model = build(CONFIGS[name], implementation)
    documents = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1]])
    padding = torch.ones(1, LENGTH, dtype=torch.long)
    causal = torch.ones(LENGTH, LENGTH).tril().bool()
    prefix = causal | (torch.arange(LENGTH) < 3)
    same = documents[0][:, None] == documents[0][None, :]
    cases = {
        "causal": (attention_mask_for(model, "causal", padding=padding), None, causal),
        "prefix": (attention_mask_for(model, "prefix", torch.tensor([3]), padding=padding), None, prefix),
        "packed": (attention_mask_for(model, "causal", document_ids=documents), documents, causal & same),
        "all": (attention_mask_for(model, "bidirectional", padding=padding), None, torch.ones_like(causal)),
    }
    for case, (mask, docs, may_see) in cases.items():
        positions = position_ids_for(docs, None if docs is not None else padding)
        moved = influence(model, mask, positions)
        # A masked score is -inf or the lowest number, so its weight is exactly 0 and nothing at all may move.
        assert moved.masked_fill(may_see, 0).max() == 0, case
        assert moved[may_see].min() > 1e-4, case


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_oracle_packed_documents_equal_separate_ones(implementation):
    model = build(CONFIGS["llama"], implementation)
    ids = torch.arange(LENGTH)[None] + 3
    documents = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1]])
    mask = attention_mask_for(model, "causal", document_ids=documents)
    with torch.no_grad():
        packed = model(ids, attention_mask=mask, position_ids=position_ids_for(documents)).logits
        alone = torch.cat([model(ids[:, :4]).logits, model(ids[:, 4:]).logits], dim=1)
    torch.testing.assert_close(packed, alone, atol=2e-5, rtol=1e-5)  # float32, other summation order


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_degenerate_padding_gives_no_nan_and_changes_nothing(implementation):
    model = build(CONFIGS["llama"], implementation)
    ids = torch.tensor([[0, 0, 7, 8, 9], [4, 5, 6, 7, 8]])
    padding = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    mask = attention_mask_for(model, "causal", padding=padding)
    with torch.no_grad():
        logits = model(ids, attention_mask=mask, position_ids=position_ids_for(padding=padding)).logits
        alone = model(ids[:1, 2:]).logits
    assert logits.isfinite().all()
    torch.testing.assert_close(logits[:1, 2:], alone, atol=2e-5, rtol=1e-5)


def test_equation_form_and_content():
    padding = torch.tensor([[1, 1, 0]])
    rows = [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    sdpa = attention_mask_for(build(CONFIGS["llama"], "sdpa"), "causal", padding=padding)
    assert (sdpa.dtype, sdpa.shape) == (torch.bool, (1, 1, 3, 3))
    assert sdpa[0, 0].long().tolist() == rows
    half = build(CONFIGS["llama"], "eager").bfloat16()
    eager = attention_mask_for(half, "causal", padding=padding)
    assert eager.dtype == torch.bfloat16
    assert (eager[0, 0] == 0).long().tolist() == rows
    assert eager.min() == torch.finfo(torch.bfloat16).min


def test_equation_positions():
    documents = torch.tensor([[5, 5, 2, 2, 2, 9]])
    assert position_ids_for(documents).tolist() == [[0, 1, 0, 1, 2, 0]]
    assert position_ids_for(padding=torch.tensor([[0, 0, 1, 1, 0]])).tolist() == [[0, 0, 0, 1, 0]]
    assert position_ids_for(documents, torch.tensor([[1, 1, 1, 0, 1, 1]])).tolist() == [[0, 1, 0, 0, 1, 0]]


def test_rejects_models_that_cannot_honour_it():
    padding = torch.ones(1, 4)
    model = build(CONFIGS["llama"], "sdpa")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="'flash_attention_2' does not take a mask"):
        attention_mask_for(model, "causal", padding=padding)
    sliding = build(MistralConfig(**COMMON, num_key_value_heads=2, sliding_window=4), "sdpa")
    with pytest.raises(ValueError, match="mistral attends in windows"):
        attention_mask_for(sliding, "causal", padding=padding)
    layered = Qwen2Config(
        **COMMON, num_key_value_heads=2, use_sliding_window=True, sliding_window=4, max_window_layers=1
    )
    with pytest.raises(ValueError, match="qwen2 attends in windows"):
        attention_mask_for(build(layered, "sdpa"), "causal", padding=padding)
    alibi = build(BloomConfig(hidden_size=32, n_layer=1, n_head=4, vocab_size=60), "eager")
    with pytest.raises(ValueError, match="bloom uses ALiBi"):
        attention_mask_for(alibi, "causal", padding=padding)


def test_rejects_missing_and_superfluous_arguments():
    model, padding = build(CONFIGS["llama"], "sdpa"), torch.ones(2, 4)
    with pytest.raises(ValueError, match="shape is unknown"):
        attention_mask_for(model, "causal")
    with pytest.raises(ValueError, match="prefix_lengths belongs to kind='prefix'"):
        attention_mask_for(model, "prefix", padding=padding)
    with pytest.raises(ValueError, match="prefix_lengths belongs to kind='prefix'"):
        attention_mask_for(model, "causal", torch.tensor([1, 1]), padding=padding)
    with pytest.raises(ValueError, match=r"prefix_lengths must have shape \(2,\)"):
        attention_mask_for(model, "prefix", torch.tensor([1]), padding=padding)
    with pytest.raises(ValueError, match="differ in shape"):
        attention_mask_for(model, "causal", document_ids=torch.ones(2, 3), padding=padding)
    with pytest.raises(ValueError, match="kind must be"):
        attention_mask_for(model, "full", padding=padding)
