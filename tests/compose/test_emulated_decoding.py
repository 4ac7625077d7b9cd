from __future__ import annotations

import pytest
import torch
from scipy.stats import chisquare
from tests.compose.emulated import ARCHITECTURES, WINDOW, absolute_model, brute_force, model, prompts
from torch import nn
from transformers import LogitsProcessorList

from headwater.compose.emulated_decoding import (
    EmulatedLogitsProcessor,
    Speculated,
    accept_drafts,
    speculative_generate,
)
from headwater.compose.emulated_finetuning import EmulatedModel, emulated_log_probs

Three = tuple[nn.Module, nn.Module, nn.Module]


@pytest.fixture(scope="module")
def parts() -> dict[str, Three]:
    return {kind: (model(kind, 0, hidden=32, layers=3), model(kind, 1), model(kind, 2)) for kind in ARCHITECTURES}


def tokens_read(processor: EmulatedLogitsProcessor) -> list[int]:
    """How many tokens the processor feeds, call by call, from now on."""
    read: list[int] = []
    processor.parts.register_forward_pre_hook(lambda _, args: read.append(args[0].shape[1]))
    return read


# -- the processor


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_oracle_the_processor_is_brute_force_and_the_model(parts, kind):
    large, small, tuned = parts[kind]
    ids, mask = prompts()
    processor = EmulatedLogitsProcessor(small, tuned)
    settings = {"input_ids": ids, "attention_mask": mask, "do_sample": False, "pad_token_id": 0}
    greedy, beams = {"max_new_tokens": 64}, {"max_new_tokens": 24, "num_beams": 4}
    composed = EmulatedModel(large, small, tuned)
    for options in (greedy, beams):
        processor.reset()
        processor.set_prompt_mask(mask)
        found = large.generate(**settings, **options, logits_processor=LogitsProcessorList([processor]))
        assert torch.equal(found, composed.generate(**settings, **options))
        if options is greedy:
            assert torch.equal(found, brute_force(large, small, tuned, ids, mask, 64))


def test_oracle_absolute_positions_count_from_the_first_token_of_text():
    three = absolute_model(0, hidden=32), absolute_model(1), absolute_model(2)
    ids, mask = prompts()
    expected = brute_force(*three, ids, mask, 32)
    settings = {"input_ids": ids, "attention_mask": mask, "do_sample": False, "pad_token_id": 0, "max_new_tokens": 32}
    assert torch.equal(EmulatedModel(*three).generate(**settings), expected)
    processor = EmulatedLogitsProcessor(*three[1:], pad_token_id=0)
    assert torch.equal(three[0].generate(**settings, logits_processor=LogitsProcessorList([processor])), expected)


def test_oracle_the_processor_without_a_cache_is_the_same(parts):
    large, small, tuned = parts["qwen3"]
    ids, mask = prompts()
    found = []
    for cache in (True, False):
        processor = EmulatedLogitsProcessor(small, tuned, scale=0.5, top_p=0.9, cache=cache, pad_token_id=0)
        found.append(
            large.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=16,
                do_sample=False,
                pad_token_id=0,
                logits_processor=LogitsProcessorList([processor]),
            )
        )
    composed = EmulatedModel(large, small, tuned, scale=0.5, top_p=0.9)
    expected = composed.generate(input_ids=ids, attention_mask=mask, max_new_tokens=16, do_sample=False, pad_token_id=0)
    assert torch.equal(found[0], expected)
    assert torch.equal(found[1], expected)


def expected_scores(parts: Three, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return emulated_log_probs(*(part(ids, use_cache=False).logits[:, -1] for part in parts))


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_property_the_cache_follows_any_turn_the_ids_take(parts, kind):
    large, small, tuned = parts[kind]
    processor = EmulatedLogitsProcessor(small, tuned)
    read = tokens_read(processor)
    ids = torch.randint(2, 64, (3, 2 * WINDOW), generator=torch.Generator().manual_seed(0))
    other = torch.randint(2, 64, (2, 5), generator=torch.Generator().manual_seed(1))
    following = torch.tensor([[7], [8], [9]])
    windows = kind == "mistral"  # a window has dropped what going back needs, so everything is read again
    turns = [
        (ids, 12),  # a prompt
        (torch.cat([ids, following], 1), 1),  # one token more
        (torch.cat([ids[[2, 0, 0]], following[[2, 0, 0]], following], 1), 1),  # beams: reordered, one dropped
        (torch.cat([ids[[2, 0]], following[[2, 0]], following[:2], following[:2]], 1), 1),  # one row less
        (torch.cat([ids[[2, 0]], following[[2, 0]], following[1:]], 1), 14 if windows else 1),  # taken back
        (ids[[2, 0], :8], 8 if windows else 1),  # taken back further
        (other, 5),  # another prompt
        (other, 5 if windows else 1),  # the same again
        (torch.cat([other, other], 1), 5),  # several tokens at once
        (ids, 12),
    ]
    for rows, fed in turns:
        with torch.no_grad():
            scores = large(rows, use_cache=False).logits[:, -1]
        assert torch.allclose(processor(rows, scores), expected_scores(parts[kind], rows), atol=1e-4)
        assert read.pop() == fed
        assert not read


def test_property_rows_with_the_same_ids_and_another_mask_are_not_the_same(parts):
    _, small, tuned = parts["llama"]
    processor = EmulatedLogitsProcessor(small, tuned)
    read = tokens_read(processor)
    ids = torch.tensor([[5, 5, 9]])
    scores = torch.zeros(1, 64)
    processor.set_prompt_mask(torch.tensor([[0, 1, 1]]))
    padded = processor(ids, scores)
    processor.set_prompt_mask(torch.tensor([[1, 1, 1]]))
    whole = processor(ids, scores)
    assert read == [3, 3]
    with torch.no_grad():
        short, long = (
            emulated_log_probs(scores, small(x).logits[:, -1], tuned(x).logits[:, -1]) for x in (ids[:, 1:], ids)
        )
    assert torch.allclose(padded, short, atol=1e-4)
    assert torch.allclose(whole, long, atol=1e-4)


def test_property_a_token_ruled_out_stays_ruled_out(parts):
    _, small, tuned = parts["llama"]
    scores = torch.zeros(1, 64)
    scores[0, 3] = -torch.inf
    found = EmulatedLogitsProcessor(small, tuned)(torch.tensor([[5, 6]]), scores)
    assert found[0, 3] == -torch.inf
    assert found.exp().sum() == pytest.approx(1)


def test_rejects_padding_that_ids_cannot_tell_and_masks_of_other_prompts(parts):
    _, small, tuned = parts["llama"]
    ending = model("llama", 1, eos_token_id=1)
    with pytest.raises(ValueError, match="token 1 both pads and ends texts"):
        EmulatedLogitsProcessor(ending, tuned, pad_token_id=1)
    with pytest.raises(ValueError, match="names other than 'small'"):
        EmulatedLogitsProcessor(small, {})
    processor = EmulatedLogitsProcessor(small, tuned)
    processor.set_prompt_mask(torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"2 prompts of 4 tokens; the ids are \(3, 5\)"):
        processor(torch.ones(3, 5, dtype=torch.long), torch.zeros(3, 64))


# -- speculation


def test_equation_of_acceptance():
    # pi = (.5, .5), q = (1, 0): token 0 is kept with probability 1/2; else (pi - q)+ = (0, .5), so token 1.
    target, draft = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[1.0, 0.0]]).log()
    generator = torch.Generator().manual_seed(0)
    drawn = [accept_drafts(target, draft, torch.tensor([0]), generator=generator) for _ in range(2000)]
    assert {(count, None if token is None else int(token)) for count, token in drawn} == {(1, None), (0, 1)}
    assert abs(sum(count for count, _ in drawn) / 2000 - 0.5) < 3.3 * (0.25 / 2000) ** 0.5  # 99.9 %


def test_oracle_drafted_and_corrected_tokens_are_drawn_from_the_target():
    generator = torch.Generator().manual_seed(1)
    target, draft = torch.randn(2, 8, generator=generator).log_softmax(-1)
    counts = torch.zeros(8)
    for token in torch.multinomial(draft.exp(), 20_000, replacement=True, generator=generator):
        accepted, instead = accept_drafts(target[None], draft[None], token[None], generator=generator)
        counts[token if accepted else instead] += 1
    assert chisquare(counts.numpy(), 20_000 * target.exp().double().numpy() / target.exp().double().sum()).pvalue > 1e-3


def test_oracle_sampled_pairs_follow_the_composed_distribution():
    three = tuple(model("llama", seed, hidden=8, layers=1, vocab_size=4) for seed in range(3))
    for part in three:  # flat enough that no pair is rare
        part.lm_head.weight.data.mul_(0.15)
    composed, prompt = EmulatedModel(*three), torch.tensor([[1, 2]])
    first = torch.arange(4)
    with torch.no_grad():
        start = composed(prompt).logits[0, -1]
        second = composed(torch.cat([prompt.expand(4, -1), first[:, None]], dim=1)).logits[:, -1]
    expected = (start[:, None] + second).exp().flatten().double()
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(16)
    draws, accepted = 800, 0
    for _ in range(draws):
        found = speculative_generate(composed, prompt, max_new_tokens=2, block=1, do_sample=True, generator=generator)
        counts[found.input_ids[0, 2] * 4 + found.input_ids[0, 3]] += 1
        accepted += found.accepted
    assert float(expected.min()) * draws > 5
    assert chisquare(counts.numpy(), (draws * expected / expected.sum()).numpy()).pvalue > 1e-3
    assert 0.1 * draws < accepted < 2 * draws  # both ways of getting a token were taken


@pytest.mark.parametrize("block", [1, 4, 50])
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_oracle_greedy_speculation_is_greedy_generation(parts, kind, block):
    composed = EmulatedModel(*parts[kind])
    for length in (1, 3 * WINDOW):
        ids = torch.randint(2, 64, (1, length), generator=torch.Generator().manual_seed(length))
        found = speculative_generate(composed, ids, max_new_tokens=30, block=block)
        assert torch.equal(found.input_ids, composed.generate(ids, max_new_tokens=30, do_sample=False))
        assert found.drafted >= found.accepted


def test_property_a_draft_from_the_target_itself_is_always_accepted(parts):
    _, small, tuned = parts["llama"]
    composed = EmulatedModel(small, small, tuned)  # the composed distribution is the tuned model's
    ids = prompts()[0][1:2]
    found = speculative_generate(composed, ids, max_new_tokens=20, block=4)
    assert found.acceptance == 1
    assert found.input_ids.shape[1] == 27
    assert torch.equal(found.input_ids, tuned.generate(ids, max_new_tokens=20, do_sample=False))


def test_property_speculation_ends_after_an_end_token(parts):
    composed = EmulatedModel(*parts["llama"])
    ids = prompts()[0][1:2]
    free = speculative_generate(composed, ids, max_new_tokens=20).input_ids
    end = int(free[0, 12])
    for given in (end, [end, 99]):
        composed.generation_config.eos_token_id = given
        found = speculative_generate(composed, ids, max_new_tokens=20).input_ids
        assert torch.equal(found, free[:, : free[0].tolist().index(end, 7) + 1])


def test_degenerate_no_draft_has_no_acceptance():
    assert Speculated(torch.ones(1, 1), 0, 0).acceptance != Speculated(torch.ones(1, 1), 0, 0).acceptance  # NaN


def test_oracle_speculation_with_several_tuned_models_and_other_widths():
    large, small = model("qwen2", 0), model("qwen2", 1, vocab_size=60)
    tuned = {"a": (model("qwen2", 2, vocab_size=66), 0.5), "b": (model("qwen2", 3), 0.5)}
    composed = EmulatedModel(large, small, tuned)
    ids = prompts()[0][1:2] % 60
    found = speculative_generate(composed, ids, max_new_tokens=20)
    assert torch.equal(found.input_ids, composed.generate(ids, max_new_tokens=20, do_sample=False))
    drawn = speculative_generate(
        composed, ids, max_new_tokens=20, do_sample=True, generator=torch.Generator().manual_seed(0)
    )
    assert drawn.input_ids[0, 7:].max() < 60


def test_rejects_batches_and_empty_blocks(parts):
    composed = EmulatedModel(*parts["llama"])
    with pytest.raises(ValueError, match=r"one prompt, \(1, time\); got \(3, 7\)"):
        speculative_generate(composed, prompts()[0], max_new_tokens=3)
    with pytest.raises(ValueError, match="at least 1; got 0 and 3"):
        speculative_generate(composed, prompts()[0][:1], max_new_tokens=3, block=0)
