"""Questions that are answered with yes or no, by three kinds of models."""

import copy

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from headwater.core.recipe import ModelRef
from headwater.modalities.models import ModelError
from headwater.modalities.text.tiny import tiny_bert, tiny_llama, tiny_t5
from headwater.modalities.text.tokenizers import word_tokenizer
from headwater.modalities.text.yes_no import YesNoScorer, normalised, open_yes_no, two_row_logits

WORDS = "is this a sum mean row axis sort of yes no true false ? answer :"
TEXTS = ["Sum of a row", "mean", '"axis sort sum"']
QUESTIONS = ["Is this a sum ?", "is this a mean of a row ?", "sort ?"]


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer([WORDS])


def cross_encoder(tokenizer, logits=2):
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config.num_labels = logits
        return BertForSequenceClassification(config).eval()


def models(tokenizer):
    size = {"hidden": 16, "layers": 1, "heads": 2, "mlp": 32, "generator_seed": 0}
    return {
        "causal": tiny_llama(tokenizer, context=64, **size),
        "seq2seq": tiny_t5(tokenizer, **size),
        "classifier": cross_encoder(tokenizer),
    }


@pytest.fixture(params=["causal", "seq2seq", "classifier"])
def scorer(request, tokenizer):
    found = YesNoScorer(models(tokenizer)[request.param], tokenizer)
    assert found.kind == request.param
    return found


def padded(rows, side, pad=0, width=30):
    ids = torch.full((len(rows), width), pad)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[number, place], mask[number, place] = torch.tensor(row), 1
    return {"input_ids": ids, "attention_mask": mask}


def test_equation_a_causal_score_is_the_difference_of_two_of_all_next_token_logits(tokenizer):
    model = models(tokenizer)["causal"]
    prompt = "is this a sum ?\nsum of a row\nanswer:"
    logits = model(torch.tensor([tokenizer(prompt)["input_ids"]])).logits[0, -1]
    yes, no = (tokenizer.convert_tokens_to_ids(word) for word in ("yes", "no"))
    found = YesNoScorer(model, tokenizer).score(TEXTS[:1], QUESTIONS[:1])[0]
    assert found == pytest.approx(float((logits[yes] - logits[no]).detach()), abs=1e-6)


def test_equation_a_decoders_first_token_answers(tokenizer):
    model = models(tokenizer)["seq2seq"]
    ids = torch.tensor([tokenizer("is this a sum ?\nsum of a row")["input_ids"]])
    start = torch.tensor([[model.config.decoder_start_token_id]])
    logits = model(input_ids=ids, decoder_input_ids=start).logits[0, 0]
    yes, no = (tokenizer.convert_tokens_to_ids(word) for word in ("yes", "no"))
    found = YesNoScorer(model, tokenizer).score(TEXTS[:1], QUESTIONS[:1])[0]
    assert found == pytest.approx(float((logits[yes] - logits[no]).detach()), abs=1e-6)


def test_equation_one_logit_of_a_classifier_is_the_score(tokenizer):
    model = cross_encoder(tokenizer, logits=1)
    scorer = YesNoScorer(model, tokenizer)
    batch = padded(scorer.encode(TEXTS, QUESTIONS), "right")
    with torch.no_grad():
        direct = model(**batch).logits[:, 0]
    np.testing.assert_allclose(scorer.score(TEXTS, QUESTIONS), direct.numpy(), atol=1e-6)


def test_property_scores_do_not_depend_on_what_shares_the_batch(scorer):
    together = scorer.score(TEXTS, QUESTIONS)
    alone = [scorer.score([text], [question])[0] for text, question in zip(TEXTS, QUESTIONS, strict=True)]
    np.testing.assert_allclose(together, alone, atol=1e-5)


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
def test_property_padding_on_the_left_gives_what_padding_on_the_right_gives(tokenizer, kind):
    scorer = YesNoScorer(models(tokenizer)[kind], tokenizer)
    rows = scorer.encode(TEXTS, QUESTIONS)
    with torch.no_grad():
        right, left = (scorer.logits(padded(rows, side)) for side in ("right", "left"))
    assert (right[0] != right[1]).any()
    torch.testing.assert_close(left, right, atol=1e-5, rtol=0)


def test_property_swapping_yes_and_no_negates_the_score(tokenizer):
    model = models(tokenizer)["causal"]
    there = YesNoScorer(model, tokenizer).score(TEXTS, QUESTIONS)
    back = YesNoScorer(model, tokenizer, yes="no", no="yes").score(TEXTS, QUESTIONS)
    np.testing.assert_allclose(back, -there, atol=1e-6)


def test_property_a_constant_added_to_all_logits_changes_nothing(tokenizer):
    model = models(tokenizer)["causal"]
    raised = copy.deepcopy(model)
    raised.lm_head = torch.nn.Linear(16, len(tokenizer))
    with torch.no_grad():
        raised.lm_head.weight.copy_(model.lm_head.weight)
        raised.lm_head.bias.fill_(3.0)
    found = YesNoScorer(raised, tokenizer).score(TEXTS, QUESTIONS)
    np.testing.assert_allclose(found, YesNoScorer(model, tokenizer).score(TEXTS, QUESTIONS), atol=1e-5)


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
def test_property_the_output_layer_is_never_computed_and_stands_as_before(tokenizer, kind):
    model = models(tokenizer)[kind]
    head, called = model.get_output_embeddings(), []
    head.register_forward_hook(lambda *_: called.append(1))
    names = list(model.state_dict())
    scorer = YesNoScorer(model, tokenizer)
    scorer.score(TEXTS, QUESTIONS)
    assert not called
    assert model.get_output_embeddings() is head
    assert list(model.state_dict()) == names


def test_property_gradients_are_those_of_all_logits(tokenizer):
    model = models(tokenizer)["causal"]
    scorer = YesNoScorer(model, tokenizer)
    batch = padded(scorer.encode(TEXTS, QUESTIONS), "right")
    places = batch["attention_mask"].sum(1) - 1
    whole = model(**batch).logits[torch.arange(3), places][:, list(scorer.answers)]
    (whole[:, 1] - whole[:, 0]).sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    logits = scorer.logits(batch)
    (logits[:, 1] - logits[:, 0]).sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-6, rtol=1e-5)


def test_property_only_the_text_is_cut(tokenizer):
    for kind, model in models(tokenizer).items():
        scorer = YesNoScorer(model, tokenizer, max_tokens=12)
        (ids,) = scorer.encode(["sum " * 40 + "mean"], ["is this a row ?"])
        assert len(ids) == 12, kind
        shown = tokenizer.decode(ids)
        assert shown.startswith("is this a row ? sum")
        assert "mean" not in shown
        assert shown.endswith("answer :") == (kind == "causal")


def test_property_a_pair_with_separators_has_two_segments(tokenizer):
    special = copy.deepcopy(tokenizer)
    special.add_special_tokens({"sep_token": "?"})
    special.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    seen = {}
    model = cross_encoder(special)
    model.bert.register_forward_pre_hook(lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True)
    scorer = YesNoScorer(model, special)
    sep, word = special.sep_token_id, special.convert_tokens_to_ids("sum")
    scorer.logits(
        {"input_ids": torch.tensor([[word, sep, word, sep, 0]]), "attention_mask": torch.tensor([[1] * 4 + [0]])}
    )
    assert seen["token_type_ids"].tolist() == [[0, 0, 1, 1, 0]]


def test_equation_texts_are_put_in_lower_case_without_quotes():
    assert normalised(' "A fine Plot." ') == "a fine plot."
    assert normalised("it's “odd”") == "it's “odd"


def test_degenerate_no_text_has_no_score(scorer):
    assert scorer.score([], []).shape == (0,)


def test_degenerate_an_empty_text_is_judged_by_its_question(scorer):
    assert np.isfinite(scorer.score([""], ["sum ?"])).all()


def test_rejects_words_of_several_tokens_and_names_others(tokenizer):
    model = models(tokenizer)["causal"]
    with pytest.raises(ModelError, match=r"'sum of' is 2 .*one each for 'yes' and 'no', 'true' and 'false'"):
        YesNoScorer(model, tokenizer, yes="sum of")


def test_rejects_a_question_without_room_for_text(scorer):
    scorer.max_tokens = 8
    with pytest.raises(ModelError, match="leaves no room for text in 8 tokens"):
        scorer.encode(["sum"], ["is this a sum of a row ?"])


def test_rejects_texts_without_a_question_each(scorer):
    with pytest.raises(ValueError, match="got 3 texts and 1 questions"):
        scorer.encode(TEXTS, QUESTIONS[:1])


def test_rejects_other_models(tokenizer):
    with pytest.raises(ModelError, match="BertForMaskedLM cannot be asked"):
        YesNoScorer(tiny_bert(tokenizer, 16, 1, 2, 32, generator_seed=0), tokenizer)
    with pytest.raises(ModelError, match="has one logit or two; this one has 3"):
        YesNoScorer(cross_encoder(tokenizer, logits=3), tokenizer)
    model = models(tokenizer)["causal"]
    model.final_logits_bias = torch.zeros(1, len(tokenizer))
    with pytest.raises(ModelError, match="adds to its logits"):
        two_row_logits(model, padded([[1]], "right"), (1, 2))


@pytest.mark.parametrize("kind", ["causal", "seq2seq", "classifier"])
def test_oracle_an_opened_checkpoint_scores_as_the_model_saved(tokenizer, tmp_path, kind):
    model = models(tokenizer)[kind]
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    opened = open_yes_no(ModelRef(name=str(tmp_path)))
    np.testing.assert_allclose(
        opened.score(TEXTS, QUESTIONS), YesNoScorer(model, tokenizer).score(TEXTS, QUESTIONS), atol=1e-6
    )


def test_property_an_encoder_gets_a_new_head_drawn_from_the_seed(tokenizer, tmp_path):
    tiny_bert(tokenizer, 16, 1, 2, 32, generator_seed=0).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    first, again, other = (open_yes_no(ModelRef(name=str(tmp_path)), seed=seed) for seed in (0, 0, 1))
    assert first.kind == "classifier"
    scores = [found.score(TEXTS, QUESTIONS) for found in (first, again, other)]
    np.testing.assert_array_equal(scores[0], scores[1])
    assert (scores[0] != scores[2]).all()
