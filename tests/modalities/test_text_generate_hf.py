"""A local model as a generator."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from headwater.modalities.text.generate import Message, Reply, Request
from headwater.modalities.text.generate_hf import HFGenerator, draw
from headwater.modalities.text.generate_store import Cached
from headwater.modalities.text.tiny import tiny_llama
from headwater.modalities.text.tokenizers import train_bpe

Pair = tuple[PreTrainedModel, PreTrainedTokenizerBase]
TEXTS = ("a", "some longer words to read", "x y", "and a whole sentence. Then one more, to make it long.", "")


@pytest.fixture(scope="module")
def pair() -> Pair:
    """A Llama of 32 x 2 that says something different to everything, and its tokenizer."""
    tokenizer = train_bpe(["a few words to learn some merges from, and some more words to read"], 300)
    model = tiny_llama(tokenizer, 32, 2, 4, 64, context=192, tie=False, generator_seed=0)
    with torch.no_grad():  # fresh weights are so small that all tokens are about equally likely
        for parameter in model.parameters():
            parameter.mul_(6)
    return model, tokenizer


def ask(text: str, **fields: Any) -> Request:
    """A request of one turn."""
    return Request((Message("user", text),), **fields)


def test_oracle_greedy_is_generate_one_by_one(pair: Pair) -> None:
    model, tokenizer = pair
    requests = [ask(text, temperature=0, max_tokens=length) for text in TEXTS for length in (1, 7, 20)]
    replies = list(HFGenerator(*pair).generate(requests))
    for request, reply in zip(requests, replies, strict=True):
        ids = tokenizer(f"user: {request.messages[0].content}\nassistant:", return_tensors="pt")["input_ids"]
        alone = model.generate(ids, max_new_tokens=request.max_tokens, do_sample=False, pad_token_id=0, eos_token_id=1)
        written = alone[0, ids.shape[1] :].tolist()
        ended = written[-1] == 1
        assert reply == Reply(
            tokenizer.decode(written, skip_special_tokens=True),
            "stop" if ended else "length",
            ids.shape[1],
            len(written),
            0.0,
            False,
            "LlamaForCausalLM",
        )
    assert len({reply.text for reply in replies}) > 10


@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_property_a_sampled_text_does_not_depend_on_its_batch(pair: Pair, top_p: float) -> None:
    requests = [ask(text, temperature=0.7, top_p=top_p, max_tokens=length) for text in TEXTS for length in (5, 16)]
    requests += [ask("a", temperature=0, max_tokens=9)]
    together = list(HFGenerator(*pair).generate(requests))
    alone = [reply for request in requests for reply in HFGenerator(*pair).generate([request])]
    small = list(HFGenerator(*pair, batch_tokens=60).generate(reversed(requests)))[::-1]
    assert together == alone == small
    assert len({reply.text for reply in together}) == len(requests)


def test_property_samples_and_seeds_draw_again_and_repeat(pair: Pair) -> None:
    requests = [ask("a", max_tokens=12, sample=number) for number in range(4)] + [ask("a", max_tokens=12, seed=1)]
    first, second = (list(HFGenerator(*pair).generate(requests)) for _ in range(2))
    assert first == second
    assert len({reply.text for reply in first}) == 5


def test_oracle_first_tokens_follow_the_model(pair: Pair) -> None:
    # 4000 draws of one token against the softmax: a share p is off by more than 4 sqrt(p / 4000) once in 16 000.
    model, tokenizer = pair
    generator = HFGenerator(*pair)
    ids = torch.tensor([generator.encode(ask("a"))])
    with torch.no_grad():
        probability = (model(ids).logits[0, -1].double() / 1.5).softmax(-1)
    requests = (ask("a", max_tokens=1, temperature=1.5, sample=number) for number in range(4000))
    drawn = Counter(reply.text for reply in generator.generate(requests))
    likely = [token for token in probability.topk(8).indices.tolist() if tokenizer.decode([token]).isascii()]
    assert likely
    for token in likely:
        share, p = drawn[tokenizer.decode([token])] / 4000, float(probability[token])
        assert abs(share - p) < 4 * (p / 4000) ** 0.5


def test_equation_draws_invert_the_cumulative_distribution() -> None:
    # p = 0.5, 0.2, 0.3; at temperature 0.5 their squares: 0.25, 0.04, 0.09 of 0.38.
    logits = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64).log()

    def drawn(u: list[float], temperature: float = 1.0, top_p: float = 1.0) -> list[int]:
        rows = len(u)
        settings = (torch.full((rows,), value, dtype=torch.float64) for value in (temperature, top_p))
        return draw(logits.expand(rows, -1), *settings, torch.tensor(u, dtype=torch.float64)).tolist()

    assert drawn([0.0, 0.49, 0.51, 0.69, 0.71, 1 - 2**-53]) == [0, 0, 1, 1, 2, 2]
    assert drawn([0.65, 0.66, 0.76, 0.77], temperature=0.5) == [0, 1, 1, 2]
    # 0.5 and 0.3 hold 0.8 >= 0.7; of what is left, 0.5 / 0.8 = 0.625.
    assert drawn([0.62, 0.63, 1 - 2**-53], top_p=0.7) == [0, 2, 2]
    assert drawn([0.99], top_p=0.5) == [0]
    assert drawn([0.5], temperature=1e-300) == [0]


def test_property_a_row_that_draws_from_all_is_not_cut_by_its_neighbour() -> None:
    logits = torch.zeros(2, 1000, dtype=torch.float64)
    one = torch.ones(2, dtype=torch.float64)
    got = draw(logits, one, torch.tensor([1.0, 0.001], dtype=torch.float64), torch.full((2,), 1 - 2**-53).double())
    assert got.tolist() == [999, 0]


def test_property_a_stop_string_ends_its_own_row(pair: Pair) -> None:
    texts = [f"{text} {number}" for text in TEXTS for number in range(4)]
    generator = HFGenerator(*pair)
    plain = list(generator.generate([ask(text, temperature=0, max_tokens=24) for text in texts]))
    parts = [reply.text[3:5] for reply in plain]
    stops = [(part,) if number % 2 and part.isascii() else () for number, part in enumerate(parts)]
    stopped = 0
    requests = [ask(text, temperature=0, max_tokens=24, stop=stop) for text, stop in zip(texts, stops, strict=True)]
    for reply, before, stop in zip(generator.generate(requests), plain, stops, strict=True):
        if stop:
            assert (reply.text, reply.finish) == (before.text[: before.text.index(stop[0])], "stop")
            stopped += reply.completion_tokens < before.completion_tokens
        else:
            assert reply == before
    assert stopped >= 5


def test_property_a_stop_string_may_span_tokens_and_is_not_looked_for_in_the_prompt(pair: Pair) -> None:
    (before,) = HFGenerator(*pair).generate([ask("x y", temperature=0, max_tokens=24)])
    stop = before.text[6:12]
    assert len(stop) == 6
    (reply,) = HFGenerator(*pair).generate([ask("x y", temperature=0, max_tokens=24, stop=(stop, "x y", "assistant:"))])
    assert (reply.text, reply.finish) == (before.text[: before.text.index(stop)], "stop")
    assert 0 < reply.completion_tokens < 24


def test_property_chat_templates_are_used(pair: Pair) -> None:
    model, _ = pair
    tokenizer = train_bpe(["a few words"], 290)
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    )
    plain, chat = HFGenerator(*pair), HFGenerator(model, tokenizer)
    messages = (Message("system", "be"), Message("user", "a"), Message("assistant", "b"), Message("user", "c"))
    assert tokenizer.decode(chat.encode(Request(messages))) == "<system>be<user>a<assistant>b<user>c>"
    assert pair[1].decode(plain.encode(Request(messages))) == "system: be\nuser: a\nassistant: b\nuser: c\nassistant:"
    assert plain.count_prompt(Request(messages)) == (len(plain.encode(Request(messages))),) * 2


def test_property_the_id_follows_weights_and_template(pair: Pair) -> None:
    model, tokenizer = pair
    other = tiny_llama(tokenizer, 32, 2, 4, 64, context=192, tie=False, generator_seed=1)
    templated = train_bpe(["a few words"], 290)
    templated.chat_template = "{{ messages[0].content }}"
    ids = {HFGenerator(*pair).id, HFGenerator(other, tokenizer).id, HFGenerator(model, templated).id}
    assert len(ids) == 3
    assert HFGenerator(*pair).id in ids


def test_property_a_prompt_too_long_is_an_error_and_a_long_reply_is_cut(pair: Pair) -> None:
    generator = HFGenerator(*pair)
    requests = [ask("word " * 300), ask("a", temperature=0, max_tokens=500), ask("b", temperature=0, max_tokens=2)]
    long, cut, short = generator.generate(requests)
    assert long.finish == "error"
    assert long.error is not None
    assert "for a context of 192 leaves nothing to write" in long.error
    assert cut.prompt_tokens + cut.completion_tokens <= 192
    assert short.completion_tokens <= 2


def test_property_the_model_is_left_as_it_was(pair: Pair) -> None:
    model, _ = pair
    state = torch.get_rng_state()
    model.train()
    try:
        list(HFGenerator(*pair).generate([ask("a", max_tokens=3)]))
        assert model.training
    finally:
        model.eval()
    assert torch.equal(state, torch.get_rng_state())
    assert not any(parameter.grad is not None for parameter in model.parameters())


def test_property_texts_come_in_order_through_the_cache(pair: Pair, tmp_path: Path) -> None:
    generator = HFGenerator(*pair)
    generator.window = 7
    texts = [str(number) for number in np.random.default_rng(0).integers(0, 12, 40)]
    requests = [ask("word " * int(text), temperature=0, max_tokens=3) for text in texts]
    with Cached(generator, tmp_path / "c.sqlite") as cached:
        replies = list(cached.generate(iter(requests)))
    assert [reply.text for reply in replies] == [r.text for r in HFGenerator(*pair).generate(requests)]


def test_rejects_batches_of_nothing(pair: Pair) -> None:
    with pytest.raises(ValueError, match="batch_tokens must be >= 1; got 0"):
        HFGenerator(*pair, batch_tokens=0)


def test_degenerate_no_requests(pair: Pair) -> None:
    assert list(HFGenerator(*pair).generate([])) == []
