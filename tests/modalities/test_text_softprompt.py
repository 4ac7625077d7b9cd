import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    RobertaConfig,
    RobertaModel,
    SiglipConfig,
    SiglipModel,
)

from headwater.modalities.text.softprompt import SoftPrompt, attach_soft_prompt

VOCAB, WIDTH, LAYERS = 60, 16, {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
BOS, EOS, PAD = 57, 59, 58
WORDS = [7, 11, 13]


def tower(kind):
    """A tiny model with random weights; its special ids are BOS, EOS and PAD above unless the kind says otherwise."""
    text = {"vocab_size": VOCAB, "hidden_size": WIDTH, "max_position_embeddings": 12, **LAYERS}
    ids = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
    image = {"hidden_size": WIDTH, "image_size": 8, "patch_size": 4, **LAYERS}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "clip":
            model = CLIPModel(CLIPConfig(text_config=text | ids, vision_config=image, projection_dim=8))
        elif kind == "old clip":  # says EOS is 2, and pools at the highest id
            ids = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
            model = CLIPModel(CLIPConfig(text_config=text | ids, vision_config=image, projection_dim=8))
        elif kind == "siglip":  # pools at the last position, padding or not
            model = SiglipModel(SiglipConfig(text_config=text | ids | {"projection_size": WIDTH}, vision_config=image))
        elif kind == "roberta":  # numbers positions by what is not padding
            model = RobertaModel(RobertaConfig(**{**text, "max_position_embeddings": 80}, **ids))
        else:
            model = BertModel(BertConfig(**text, pad_token_id=PAD))
    return model.eval()


def row(words, length=None, first=True):
    ids = [*([BOS] if first else []), *words, EOS]
    mask = [1] * len(ids) + [0] * ((length or len(ids)) - len(ids))
    return ids + [PAD] * (len(mask) - len(ids)), mask


def batch_of(kind, texts, length):
    """``input_ids`` and ``attention_mask``; SigLIP's rows are full and have no mask and no first token."""
    rows, masks = zip(*(row(words, length, first=kind != "siglip") for words in texts), strict=True)
    batch = {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(masks)}
    return {"input_ids": batch["input_ids"]} if kind == "siglip" else batch


def features(model, batch):
    if hasattr(model, "get_text_features"):
        found = model.get_text_features(**batch)
        return getattr(found, "pooler_output", found)
    hidden = model(**batch).last_hidden_state  # mean over what is not padding, as sentence encoders have it
    weight = batch["attention_mask"][..., None].float()
    return (hidden * weight).sum(1) / weight.sum(1)


def prompt_of(model, ids):
    return SoftPrompt(getattr(model, "text_model", model).get_input_embeddings().weight[ids])


def attached(kind, model, prompt, **options):
    return attach_soft_prompt(model, prompt, "start" if kind == "siglip" else "bos", **options)


KINDS = ("clip", "old clip", "siglip", "roberta", "bert")


@pytest.mark.parametrize("kind", KINDS)
def test_oracle_a_prompt_of_words_is_those_words(kind):
    model, texts = tower(kind), [[20, 21], [30, 31, 32, 33]]
    length = 12 if kind == "siglip" else 6
    soft = attached(kind, model, prompt_of(model, WORDS))
    batch = soft.extend(batch_of(kind, texts, length))
    with torch.no_grad(), soft.inserted():
        ours = features(model, batch)
    with torch.no_grad():
        words = features(model, batch_of(kind, [WORDS + text for text in texts], length if length == 12 else 9))
    torch.testing.assert_close(ours, words, atol=1e-5, rtol=0)
    assert batch["input_ids"].shape[1] == (12 if kind == "siglip" else 9)


def test_oracle_positions_are_counted_where_padding_has_a_low_id():
    ids = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = RobertaConfig(vocab_size=VOCAB, hidden_size=WIDTH, max_position_embeddings=20, **LAYERS, **ids)
        model = RobertaModel(config).eval()
    soft = attach_soft_prompt(model, prompt_of(model, WORDS))
    with torch.no_grad():
        ours = soft(input_ids=torch.tensor([[0, 20, 21, 2, 1]]), attention_mask=torch.tensor([[1, 1, 1, 1, 0]]))
        words = model(input_ids=torch.tensor([[0, *WORDS, 20, 21, 2]]), attention_mask=torch.ones(1, 7))
    torch.testing.assert_close(ours.last_hidden_state[:, :7], words.last_hidden_state, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_degenerate_no_tokens_change_nothing(kind):
    model = tower(kind)
    soft = attached(kind, model, SoftPrompt(torch.zeros(0, WIDTH)))
    batch = batch_of(kind, [[20, 21], [30]], 6)
    with torch.no_grad():
        plain = features(model, batch)
        with soft.inserted():
            assert torch.equal(features(model, soft.extend(batch)), plain)


def test_property_outside_the_model_is_as_it_was():
    model = tower("bert")
    batch = batch_of("bert", [[20, 21]], 4)
    with torch.no_grad():
        before = model(**batch).last_hidden_state
        soft = attach_soft_prompt(model, prompt_of(model, WORDS))
        inside = soft(**batch).last_hidden_state
        after = model(**batch).last_hidden_state
    assert torch.equal(before, after)
    assert inside.shape[1] == 7
    with pytest.raises(RuntimeError, match="stop"), soft.inserted():
        raise RuntimeError("stop")
    with torch.no_grad():
        assert torch.equal(model(**batch).last_hidden_state, before)


def test_property_gradients_reach_the_prompt_and_vectors_in_its_place():
    model = tower("clip").requires_grad_(False)
    soft = attach_soft_prompt(model, prompt_of(model, WORDS))
    batch = soft.extend(batch_of("clip", [[20, 21], [30]], 5))
    with soft.inserted():
        features(model, batch)[:, 0].sum().backward()
    own = soft.prompt.weight.grad
    others = soft.prompt.weight.detach().clone().requires_grad_()
    with soft.inserted(others):
        (found,) = torch.autograd.grad(features(model, batch)[:, 0].sum(), others)
    assert torch.equal(found, own)
    assert own.abs().min(1).values.max() > 0


def test_property_token_types_are_those_of_the_first_token():
    model = tower("bert")
    soft = attach_soft_prompt(model, prompt_of(model, WORDS))
    batch = batch_of("bert", [[20, 21]], 5) | {"token_type_ids": torch.tensor([[0, 1, 1, 1, 0]])}
    extended = soft.extend(batch)
    assert extended["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1, 1, 0]]
    assert extended["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 1, 1, 0]]


def test_property_padding_gives_way_where_positions_end():
    model = tower("clip")
    soft = attach_soft_prompt(model, prompt_of(model, WORDS))
    assert soft.extend(batch_of("clip", [[20] * 7], 12))["input_ids"].shape == (1, 12)
    longest = {"input_ids": torch.tensor([[BOS, *[20] * 7, EOS]])}
    assert soft.extend(longest)["input_ids"].tolist()[0][-1] == EOS


def test_property_padding_that_is_eos_keeps_the_end_of_the_row():
    model = tower("clip")
    model.config.text_config.pad_token_id = EOS
    soft = attach_soft_prompt(model, prompt_of(model, WORDS))
    batch = {"input_ids": torch.tensor([[BOS, *[20] * 7, *[EOS] * 4]])}
    assert soft.extend(batch)["input_ids"].tolist()[0][-2:] == [20, EOS]
    with pytest.raises(ValueError, match="a text of 10 tokens does not fit"):
        soft.extend({"input_ids": torch.tensor([[BOS, *[20] * 8, *[EOS] * 3]])})


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ({"input_ids": torch.full((1, 10), 20)}, r"a text of 10 tokens does not fit behind a prompt of 3: .* reads 12"),
        (
            {"input_ids": torch.tensor([[PAD, 20]]), "attention_mask": torch.tensor([[0, 1]])},
            "padded on the right",
        ),
        ({"input_ids": torch.tensor([[20]]), "position_ids": torch.tensor([[0]])}, "leave out position_ids"),
    ],
)
def test_rejects_rows_it_cannot_extend(batch, words):
    model = tower("clip")
    with pytest.raises(ValueError, match=words):
        attach_soft_prompt(model, prompt_of(model, WORDS)).extend(batch)


def test_rejects_wrong_widths_and_shapes():
    model = tower("bert")
    with pytest.raises(ValueError, match="the prompt is 8 wide; the model's embeddings are 16"):
        attach_soft_prompt(model, SoftPrompt(torch.zeros(2, 8)))
    with pytest.raises(ValueError, match=r"vectors must be \(tokens, dim\)"):
        SoftPrompt(torch.zeros(8))
    soft = attach_soft_prompt(model, prompt_of(model, WORDS))
    with pytest.raises(ValueError, match=r"vectors must be \(3, 16\)"), soft.inserted(torch.zeros(2, 16)):
        pass


class Words:
    """A tokenizer of numbers."""

    def __call__(self, text, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [int(word) for word in text.split()]}


@pytest.mark.parametrize(("tokens", "ids"), [(None, [3, 5]), (1, [3]), (5, [3, 5, 3, 5, 3])])
def test_equation_a_text_is_cut_or_repeated(tokens, ids):
    model = tower("clip")
    table = model.text_model.get_input_embeddings().weight
    assert torch.equal(SoftPrompt.from_text(model, Words(), "3 5", tokens).weight, table[ids])
    with pytest.raises(ValueError, match="without a token"):
        SoftPrompt.from_text(model, Words(), " ")


def test_property_drawn_prompts_follow_from_their_generator():
    model = tower("bert")

    def drawn(seed):
        generator = torch.Generator().manual_seed(seed)
        return (
            SoftPrompt.normal(3, WIDTH, generator=generator).weight,
            SoftPrompt.from_vocabulary(model, 3, generator=generator).weight,
        )

    state = torch.get_rng_state()
    (normal, words), (again, words_again), (other, _) = drawn(0), drawn(0), drawn(1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(normal, again)
    assert torch.equal(words, words_again)
    assert not torch.equal(normal, other)
    table = model.get_input_embeddings().weight
    assert all((table == vector).all(1).any() for vector in words)
