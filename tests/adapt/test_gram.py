import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers.processors import TemplateProcessing
from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

from headwater.adapt.gram import (
    GradientRegulator,
    Gram,
    MetaSpec,
    RegulatedOptimizer,
    adapted_prompts,
    episode_loss,
    meta_prompt_step,
    meta_train,
    tune_prompts,
)
from headwater.adapt.gram_model import PromptedDualEncoder, use_eager_attention
from headwater.adapt.gram_tasks import MetaClass, TaskSampler, hierarchical_tasks
from headwater.core.checkpoint import CheckpointStore
from headwater.core.recipe import DataRef, ModelRef, RecipeError
from headwater.core.run import execute
from headwater.modalities.features import extract_features
from headwater.modalities.text.labelled import open_encoder
from headwater.modalities.text.softprompt import SoftPrompt
from headwater.modalities.text.tiny import tiny_bert
from headwater.modalities.text.tokenizers import train_bpe

A = torch.tensor([[2.0, 0.5, 0.0], [0.5, 1.0, 0.3], [0.0, 0.3, 0.7]], dtype=torch.float64)
THETA = torch.tensor([[0.4, -1.0, 0.8]], dtype=torch.float64)
SUPPORT, QUERY = (torch.tensor(c, dtype=torch.float64) for c in ([[1.0, 2.0, -1.0]], [[0.5, 0.0, 1.0]]))
ALPHA = 0.3


def quadratic(prompts, centre):
    """L = 1/2 (theta - c)^T A (theta - c); its gradient is A (theta - c)."""
    shift = prompts["text"] - centre
    return 0.5 * (shift @ A * shift).sum()


def outer(theta, kind="identity", **options):
    regulators = {"text": GradientRegulator(1, 3, kind).double()}
    return meta_prompt_step({"text": theta}, regulators, quadratic, SUPPORT, QUERY, ALPHA, **options)


def gradient(theta, **options):
    theta = theta.clone().requires_grad_()
    (found,) = torch.autograd.grad(outer(theta, **options), theta)
    return found


def test_equation_the_meta_gradient_of_a_quadratic():
    # theta' = theta - alpha A (theta - c_s);  d/dtheta L_q(theta') = (I - alpha A)^T A (theta' - c_q)
    adapted = THETA - ALPHA * (THETA - SUPPORT) @ A
    expected = (adapted - QUERY) @ A @ (torch.eye(3, dtype=torch.float64) - ALPHA * A)
    torch.testing.assert_close(gradient(THETA), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("kind", ["identity", "diagonal"])
def test_oracle_the_meta_gradient_by_finite_differences(kind, steps):
    found, size = gradient(THETA, kind=kind, inner_steps=steps), 1e-5
    for i in range(3):
        step = size * torch.eye(3, dtype=torch.float64)[i : i + 1]
        ends = [outer((THETA + s * step).requires_grad_(), kind, inner_steps=steps) for s in (1, -1)]
        torch.testing.assert_close(found[0, i], ((ends[0] - ends[1]) / (2 * size)).detach(), atol=1e-8, rtol=0)


def test_equation_first_order_drops_the_hessian():
    adapted = THETA - ALPHA * (THETA - SUPPORT) @ A
    found = gradient(THETA, second_order=False)
    torch.testing.assert_close(found, (adapted - QUERY) @ A, atol=1e-12, rtol=0)


def test_degenerate_without_inner_steps_the_loss_is_the_query_s():
    assert outer(THETA, inner_steps=0).item() == quadratic({"text": THETA}, QUERY).item()


def test_learns_the_step_that_solves_axis_aligned_quadratics():
    # On L = 1/2 sum_i a_i (theta_i - c_i)^2 one step of factor 1 / (alpha a_i) reaches c from anywhere.
    curvature = torch.tensor([[0.5, 1.0, 4.0]])
    regulator = GradientRegulator(1, 3, "diagonal")
    optimizer = torch.optim.Adam(regulator.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(0)

    def loss(prompts, centre):
        return 0.5 * (curvature * (prompts["text"] - centre) ** 2).sum()

    for _ in range(400):
        centre, start = torch.randn(2, 1, 3, generator=generator)
        optimizer.zero_grad()
        meta_prompt_step({"text": start.requires_grad_()}, {"text": regulator}, loss, centre, centre, 0.5).backward()
        optimizer.step()
    torch.testing.assert_close(regulator.factors.detach(), 1 / (0.5 * curvature), rtol=0.05, atol=0)


@pytest.mark.parametrize("kind", ["gated", "diagonal", "identity"])
def test_property_a_new_regulator_changes_no_bit(kind):
    prompt, grad = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0))
    grad[1] = 0
    regulator = GradientRegulator(3, 16, kind, generator=torch.Generator().manual_seed(1))
    assert torch.equal(regulator(prompt, grad), grad)


def test_property_the_gate_reads_token_and_direction_not_size():
    regulator = GradientRegulator(2, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        regulator.outer.normal_(generator=torch.Generator().manual_seed(2)).mul_(5)
    prompt, grad, other = torch.randn(3, 2, 16, generator=torch.Generator().manual_seed(0))
    factors = regulator(prompt, grad) / grad
    assert factors.min() > 0
    assert factors.max() < 2
    assert factors.std() > 0.1
    torch.testing.assert_close(regulator(prompt, 7 * grad) / (7 * grad), factors)
    for changed in (regulator(prompt, other) / other, regulator(other, grad) / grad):
        assert (changed - factors).abs().max() > 0.05
    zero = torch.zeros(2, 16, requires_grad=True)
    regulator(prompt, zero).sum().backward()
    assert torch.isfinite(zero.grad).all()


@pytest.mark.parametrize("make", [lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), lambda p: torch.optim.Adam(p)])
def test_oracle_an_identity_around_an_optimizer_is_the_optimizer(make):
    ends = []
    for wrapped in (False, True):
        prompt = SoftPrompt(torch.randn(2, 5, generator=torch.Generator().manual_seed(0)))
        optimizer = make(prompt.parameters())
        if wrapped:
            optimizer = RegulatedOptimizer(optimizer, {"text": prompt}, {"text": GradientRegulator(2, 5, "identity")})
        for _ in range(5):
            optimizer.zero_grad()
            (prompt.weight**4).sum().backward()
            optimizer.step()
        ends.append(prompt.weight.detach())
    assert torch.equal(*ends)


def test_equation_the_optimizer_sees_rewritten_gradients():
    prompt, regulator = SoftPrompt(torch.ones(1, 2)), GradientRegulator(1, 2, "diagonal")
    regulator.factors.data = torch.tensor([[0.5, 3.0]])
    optimizer = RegulatedOptimizer(torch.optim.SGD(prompt.parameters(), lr=0.1), {"text": prompt}, {"text": regulator})
    prompt.weight.sum().backward()
    optimizer.step()
    torch.testing.assert_close(prompt.weight.detach(), torch.tensor([[1 - 0.05, 1 - 0.3]]))
    optimizer.zero_grad()
    assert prompt.weight.grad is None


# Tasks made of pairs.

DOMAINS, CLASSES, MEMBERS = 3, 4, 6


def make_pairs(seed=0):
    """Pairs in three domains of four classes; captions differ by domain, the other sides by class."""
    rng = np.random.default_rng(seed)
    domain = np.repeat(np.arange(DOMAINS), CLASSES * MEMBERS)
    cls = np.repeat(np.arange(DOMAINS * CLASSES), MEMBERS)
    text = np.eye(16)[domain] + 0.05 * rng.normal(size=(len(cls), 16))
    image = np.eye(16)[cls] + 0.05 * rng.normal(size=(len(cls), 16))
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (text, image)]
    captions = [f"Class {c} member {i % MEMBERS}" for i, c in enumerate(cls)]
    order = rng.permutation(len(cls))
    return *(x[order] for x in (*unit, domain, cls)), [captions[i] for i in order]


def sampler(**changes):
    text, image, _, _, captions = make_pairs()
    options = {"domains": DOMAINS, "classes": CLASSES, "ways": 3, "shots": 2, "queries": 3, "seed": 1}
    return hierarchical_tasks(text, image, captions, **{**options, **changes})


def test_oracle_clusters_are_the_domains_and_classes_that_were_put_in():
    _, _, domain, cls, captions = make_pairs()
    found = sampler()
    assert len(found.domains) == DOMAINS
    assert not found.skipped
    for classes in found.domains:
        assert len(classes) == CLASSES
        assert len({domain[row] for c in classes for row in c.rows}) == 1
        for c in classes:
            assert len({cls[row] for row in c.rows}) == 1
            assert len(c.rows) == MEMBERS
            assert c.phrase in {captions[row] for row in c.rows}


def test_equation_the_name_of_a_class_is_the_caption_nearest_to_the_mean_that_is_free():
    text = np.array([[0.0, 1.0], [0.1, 1.0], [0.4, 1.0]] * 2 + [[5.0, 0.0]] * 6)  # mean 1/6: row 1 is nearest
    image = np.array([[0.0, 9.0]] * 3 + [[9.0, 0.0]] * 3 + [[0.0, 5.0]] * 3 + [[5.0, 0.0]] * 3)
    captions = ["far", "Near", "off", "far", " near ", "other", *"abcdef"]
    found = hierarchical_tasks(text, image, captions, 2, 2, ways=2, shots=1, queries=1)
    names = next({c.phrase for c in d} for d in found.domains if any(0 in c.rows for c in d))
    assert names in ({"Near", "far"}, {" near ", "far"})  # one has the nearest, the other the next


def test_property_a_task_keeps_support_query_and_domains_apart():
    tasks = sampler()
    home = {int(row): d for d, classes in enumerate(tasks.domains) for c in classes for row in c.rows}
    for step in range(20):
        task = tasks.task(step)
        assert len(task.support.rows) == 6
        assert len(task.query.rows) == len(task.shifted.rows) == 9
        assert not set(task.support.rows) & set(task.query.rows)
        assert task.support.phrases == task.query.phrases != task.shifted.phrases
        own, away = ({home[int(r)] for r in rows} for rows in (task.support.rows, task.shifted.rows))
        assert len(own) == len(away) == 1
        assert own != away
        for episode in (task.support, task.query, task.shifted):
            by_phrase = {c.phrase: set(c.rows) for d in tasks.domains for c in d}
            assert all(r in by_phrase[episode.phrases[y]] for r, y in zip(episode.rows, episode.labels, strict=True))


def test_property_the_task_of_a_step_is_a_function_of_seed_and_step():
    rows = [sampler(seed=seed).task(step).support.rows.tolist() for seed, step in ((1, 5), (1, 5), (1, 6))]
    assert rows[0] == rows[1] != rows[2]


def test_property_small_clusters_are_skipped_and_listed():
    text, image, _, cls, captions = make_pairs()
    kept = np.flatnonzero((cls != 0) | (np.arange(len(cls)) % 3 == 0))  # class 0 loses most of its members
    options = {"ways": 3, "shots": 3, "queries": 3, "seed": 1}
    found = hierarchical_tasks(text[kept], image[kept], [captions[i] for i in kept], DOMAINS, CLASSES, **options)
    assert any("members; 6 are needed" in words for words in found.skipped)
    assert all(len(c.rows) >= 6 for d in found.domains for c in d)


@pytest.mark.parametrize(
    ("captions", "changes", "words"),
    [
        (["the same"] * 72, {}, "72 pairs have 1 distinct captions.*'the same', stands 72 times"),
        (None, {"shots": 5}, "0 of 3 domains have 3 classes of 8 members"),
        (["one"], {}, "1 captions have 72 and 72 features"),
    ],
)
def test_rejects_pairs_that_make_no_tasks(captions, changes, words):
    text, image, _, _, own = make_pairs()
    options = {"ways": 3, "shots": 2, "queries": 3, **changes}
    with pytest.raises(ValueError, match=words):
        hierarchical_tasks(text, image, captions or own, DOMAINS, CLASSES, **options)


# Encoders.

WORDS = {
    "fruit": ["apple", "pear", "plum", "fig", "grape", "melon", "peach", "lemon", "cherry", "quince"],
    "metal": ["iron", "zinc", "lead", "gold", "silver", "copper", "tin", "nickel", "cobalt", "chrome"],
    "river": ["rhine", "nile", "volga", "loire", "ebro", "tiber", "indus", "amur", "elbe", "danube"],
}


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    home = tmp_path_factory.mktemp("bert")
    tokenizer = train_bpe([" ".join(words) for words in WORDS.values()] * 5, 320)
    tiny_bert(tokenizer, hidden=32, layers=1, heads=2, mlp=32, context=32, generator_seed=0).save_pretrained(home)
    tokenizer.save_pretrained(home)
    return ModelRef(name=str(home))


def dual(kind):
    """A tiny CLIP or SigLIP with random weights and its tokenizer; rows are 16 long at most and images 8 wide."""
    tokenizer = train_bpe([" ".join(words) for words in WORDS.values()] * 5, 320, extra_tokens=("<s>",))
    tokenizer.bos_token = "<s>"
    row = "<s> $A <eos>" if kind == "clip" else "$A <eos>"
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "<eos>")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=row, special_tokens=special)
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": 16, "hidden_size": 16}
    text |= {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    image = {"hidden_size": 24, "image_size": 8, "patch_size": 4}
    small = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "clip":
            config = CLIPConfig(text_config=text | small, vision_config=image | small, projection_dim=8)
            return CLIPModel(config).eval(), tokenizer
        config = SiglipConfig(text_config=text | small | {"projection_size": 24}, vision_config=image | small)
        return SiglipModel(config).eval(), tokenizer


def words_prompt(model, tokenizer, text):
    return SoftPrompt.from_text(model, tokenizer, text)


PHRASES = ["apple pear", "iron", "rhine nile volga"]


def test_oracle_without_a_prompt_sentence_features_are_the_encoder_s(bert):
    model, tokenizer = open_encoder(bert)
    encoder = PromptedDualEncoder(model, tokenizer, {"text": SoftPrompt(torch.zeros(0, 32))})
    expected = extract_features(model, PHRASES, processor=tokenizer, normalize=True).X
    np.testing.assert_allclose(encoder.text_features(PHRASES).detach().numpy(), expected, atol=1e-6)
    assert encoder.scale == 20


def test_oracle_a_prompt_of_words_gives_the_features_of_those_words(bert):
    model, tokenizer = open_encoder(bert)
    prompt = words_prompt(model, tokenizer, "melon zinc")
    encoder = PromptedDualEncoder(model, tokenizer, {"text": prompt}, template=" {} ebro")
    expected = extract_features(model, [f"melon zinc {p} ebro" for p in PHRASES], processor=tokenizer, normalize=True)
    np.testing.assert_allclose(encoder.text_features(PHRASES).detach().numpy(), expected.X, atol=1e-5)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_oracle_logits_of_a_dual_encoder(kind):
    model, tokenizer = dual(kind)
    prompts = {"text": words_prompt(model, tokenizer, "melon zinc"), "vision": SoftPrompt(torch.zeros(0, 24))}
    encoder = PromptedDualEncoder(model, tokenizer, prompts, template=" {}")
    pixels = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    full = {"padding": "max_length", "max_length": 16} if kind == "siglip" else {"padding": True}
    tokens = tokenizer([f"melon zinc {p}" for p in PHRASES], return_tensors="pt", **full)
    tokens = {name: tokens[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        logits = encoder(pixels, PHRASES)
        whole = model(pixel_values=pixels, **tokens).logits_per_image
    bias = model.logit_bias if kind == "siglip" else 0.0
    torch.testing.assert_close(logits, whole - bias, atol=1e-5, rtol=1e-5)
    assert (logits[:, 0] - logits[:, 1]).abs().max() > 1e-3
    assert encoder.position == {"clip": "bos", "siglip": "start"}[kind]


def test_property_visual_prompts_are_seen_and_learned():
    model, tokenizer = dual("clip")
    generator = torch.Generator().manual_seed(0)
    prompts = {
        "text": SoftPrompt.normal(2, 16, generator=generator, std=0.5),
        "vision": SoftPrompt.normal(3, 24, generator=generator, std=0.5),
    }
    encoder = PromptedDualEncoder(model, tokenizer, prompts, second_order=True)
    pixels = torch.randn(12, 3, 8, 8, generator=generator)
    with torch.no_grad():
        plain = model.get_image_features(pixel_values=pixels)
        plain = torch.nn.functional.normalize(getattr(plain, "pooler_output", plain), dim=-1)
        assert (encoder.image_features(pixels) - plain).abs().max() > 1e-3
        off = encoder.image_features(pixels, {"vision": torch.zeros(3, 24)})
        assert (encoder.image_features(pixels) - off).abs().max() > 1e-3
    tasks = TaskSampler(
        tuple(
            tuple(MetaClass(p, np.arange(6 * d + 3 * i, 6 * d + 3 * i + 3)) for i, p in enumerate(PHRASES[:2]))
            for d in range(2)
        ),
        2,
        1,
        2,
        0,
    )
    regulators = {
        name: GradientRegulator(len(p), p.weight.shape[1], generator=generator) for name, p in prompts.items()
    }
    before = {name: p.weight.detach().clone() for name, p in prompts.items()}
    meta_train(encoder, regulators, tasks, pixels, MetaSpec(steps=3, ways=2, classes=2))
    for name, prompt in prompts.items():
        assert (prompt.weight - before[name]).abs().min(1).values.max() > 0
        assert regulators[name].outer.abs().max() > 0
    with pytest.raises(ValueError, match="give pixels, not features"):
        encoder.image_features(torch.zeros(2, 8))


@pytest.mark.parametrize(
    ("prompts", "options", "words"),
    [
        ({}, {}, "`text`, `vision` or both"),
        ({"audio": 16}, {}, r"got \['audio'\]"),
        ({"vision": 16}, {}, "has no image tower"),
        ({"text": 16}, {}, "the prompt is 16 wide; the model's embeddings are 32"),
        ({"text": 32}, {"template": "a photo"}, "needs a {}"),
    ],
)
def test_rejects_prompts_that_do_not_suit_a_model(bert, prompts, options, words):
    model, tokenizer = open_encoder(bert)
    with pytest.raises(ValueError, match=words):
        PromptedDualEncoder(
            model, tokenizer, {name: SoftPrompt(torch.zeros(1, width)) for name, width in prompts.items()}, **options
        )


def test_rejects_a_phrase_that_does_not_fit_behind_the_prompt(bert):
    model, tokenizer = open_encoder(bert)
    encoder = PromptedDualEncoder(model, tokenizer, {"text": SoftPrompt(torch.zeros(4, 32))})
    with pytest.raises(ValueError, match="does not fit behind a prompt of 4: the model reads 32"):
        encoder.text_features(["apple " * 40])


def test_oracle_second_order_through_attention_by_finite_differences(bert):
    model, tokenizer = open_encoder(bert)
    prompt = words_prompt(model, tokenizer, "melon")
    encoder = PromptedDualEncoder(model.double(), tokenizer, {"text": prompt.double()}, second_order=True)
    encoder.encoder.register_forward_hook(lambda *call: call[-1])
    images = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    episode = TaskSampler(
        tuple((MetaClass("iron", np.arange(4)), MetaClass("fig", np.arange(4, 8))) for _ in range(2)), 2, 2, 2, 0
    ).task(0)
    loss = episode_loss(encoder, images)
    regulators = {"text": GradientRegulator(len(prompt), 32, "identity")}

    def value(vectors):
        return meta_prompt_step({"text": vectors}, regulators, loss, [episode.support], [episode.query], 1.0)

    start = prompt.weight.detach().requires_grad_()
    (found,) = torch.autograd.grad(value(start), start)
    direction = found / found.norm()
    size = 1e-2  # features are float32, so differences of less are noise
    ends = [value((start + s * size * direction).detach().requires_grad_()).item() for s in (1, -1)]
    assert (ends[0] - ends[1]) / (2 * size) == pytest.approx(float(found.norm()), rel=0.02)


def test_rejects_second_order_for_a_module_without_a_choice():
    with pytest.raises(ValueError, match="offers no choice of attention"):
        use_eager_attention(torch.nn.Linear(1, 1))


def make_learning(bert, kind="gated"):
    """A tiny encoder, a prompt, and tasks whose images are texts behind another prompt, the teacher's."""
    model, tokenizer = open_encoder(bert)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight *= 8  # as they are drawn, a layer hardly mixes tokens
    teacher, prompt = (
        SoftPrompt.normal(3, 32, generator=torch.Generator().manual_seed(seed), std=0.3) for seed in (5, 0)
    )
    encoder = PromptedDualEncoder(model, tokenizer, {"text": prompt}, second_order=True)
    names = [name for words in WORDS.values() for name in words[:4]]
    with torch.no_grad():
        towards = encoder.text_features(names, {"text": teacher.weight}).numpy()
    images = np.repeat(towards, 8, axis=0) + 0.02 * np.random.default_rng(0).normal(size=(8 * len(names), 32))
    classes = [MetaClass(name, np.arange(8 * i, 8 * i + 8)) for i, name in enumerate(names)]
    tasks = TaskSampler((tuple(classes[:6]), tuple(classes[6:])), 3, 3, 3, 0)
    regulators = {"text": GradientRegulator(3, 32, kind, generator=torch.Generator().manual_seed(1))}
    return encoder, regulators, tasks, torch.from_numpy(images.astype(np.float32))


def mean_outer(encoder, regulators, tasks, images, inner_lr, steps):
    loss = episode_loss(encoder, images)
    losses = []
    for step in steps:
        task = tasks.task(step)
        adapted = adapted_prompts(encoder.vectors(), regulators, loss, [task.support], inner_lr)
        losses.append(float(loss(adapted, [task.query, task.shifted]).detach()))
    return np.mean(losses)


def test_learns_to_adapt_better_to_tasks_it_has_not_drawn(bert):
    learning = make_learning(bert)
    before = mean_outer(*learning, 0.1, range(1000, 1020))
    meta_train(*learning, MetaSpec(steps=40, lr=0.03, inner_lr=0.1, ways=3))
    assert mean_outer(*learning, 0.1, range(1000, 1020)) < 0.75 * before


def test_fault_meta_training_goes_on_where_it_stopped_bit_for_bit(bert, tmp_path):
    spec = MetaSpec(steps=6, lr=0.01, inner_lr=0.1, ways=3, checkpoint_every=2)
    whole, stopped, resumed = (make_learning(bert) for _ in range(3))
    meta_train(*whole, spec)
    store = CheckpointStore(tmp_path, fingerprint="pairs")

    def stop(step, loss):
        if step == 4:  # the checkpoint of step 2 is there, that of step 4 is not
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        meta_train(*stopped, spec, store=store, log=stop)
    meta_train(*resumed, spec, store=store)
    for ours, expected in zip(
        (resumed[0].prompts, resumed[1]["text"]), (whole[0].prompts, whole[1]["text"]), strict=True
    ):
        for name, tensor in expected.state_dict().items():
            assert torch.equal(ours.state_dict()[name], tensor), name


def test_rejects_rates_that_blow_up(bert):
    encoder, regulators, tasks, images = make_learning(bert)
    with pytest.raises(ArithmeticError, match="lower lr"):
        list(
            tune_prompts(
                encoder,
                regulators,
                images * torch.nan,
                torch.zeros(96, dtype=torch.int64),
                ["fig", "tin"],
                steps=2,
                lr=1.0,
            )
        )
    with pytest.raises(ArithmeticError, match="meta-training, step 0"):
        meta_train(encoder, regulators, tasks, images * torch.nan, MetaSpec(steps=2, ways=3))


# The recipe.


@pytest.fixture
def fields(tmp_path, monkeypatch, bert):
    monkeypatch.setenv("HEADWATER_CACHE", str(tmp_path / "cache"))
    refs = {}
    for seed, (name, count) in enumerate({"train": 4, "test": 8, "pairs": 30}.items()):
        rng = np.random.default_rng(seed)
        rows = []
        for label, words in WORDS.items():
            for _ in range(count):
                text, caption = " ".join(rng.choice(words, 9)), " ".join(rng.choice(words, 3))
                rows.append({"text": text, "label": caption if name == "pairs" else label})
        if name == "pairs":
            test = json.loads((tmp_path / "test.jsonl").read_text().splitlines()[0])
            rows.append({"text": test["text"], "label": "a pair that repeats a test text"})
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        refs[name] = DataRef(name=str(path))
    meta = MetaSpec(steps=4, ways=2, shots=2, queries=2, domains=2, classes=4, checkpoint_every=2)
    descriptions = {label: " ".join(words[:3]) for label, words in WORDS.items()}
    return {"model": bert, "meta": meta, "steps": 3, "lr": 0.1, "label_texts": descriptions, **refs}


def test_oracle_what_is_saved_answers_as_the_run_did(tmp_path, fields, bert):
    result = execute(Gram(**fields), tmp_path / "run")
    saved = tmp_path / "run" / "model"
    about = json.loads((saved / "prompt.json").read_text())
    model, tokenizer = open_encoder(bert)
    prompt = SoftPrompt(load_file(saved / "prompt.safetensors")["text"])
    encoder = PromptedDualEncoder(model, tokenizer, {"text": prompt}, template=about["template"], scale=about["scale"])
    use_eager_attention(model)
    weight = load_file(saved / "classes.safetensors")["weight"]
    torch.testing.assert_close(encoder.text_features(about["phrases"]).detach(), weight, atol=1e-6, rtol=0)
    rows = [json.loads(line) for line in (tmp_path / "test.jsonl").read_text().splitlines()]
    features = extract_features(model, [row["text"] for row in rows], processor=tokenizer, normalize=True).X
    answers = (torch.from_numpy(features) @ weight.T).argmax(1)
    right = np.mean([about["labels"][a] == row["label"] for a, row in zip(answers, rows, strict=True)])
    assert result.metrics["id/accuracy"] == right
    assert about["phrases"] == [fields["label_texts"][label] for label in about["labels"]]
    assert set(load_file(saved / "regulator.safetensors")) == {
        f"text.{name}" for name in ("inner", "inner_bias", "outer", "outer_bias")
    }


def test_property_the_meta_phase_is_paid_for_and_repeats_of_held_out_texts_are_left_out(tmp_path, fields):
    result = execute(Gram(**fields), tmp_path / "run")
    assert result.metrics["data/dropped_pairs"] == 1
    pairs = json.loads((tmp_path / "run" / "pairs.json").read_text())
    assert pairs["of"] == 91
    assert 90 not in pairs["kept"]
    assert 0 < result.metrics["cost/meta_seconds"] == result.cost["meta_seconds"]
    assert result.metrics["cost/labels"] == 12
    assert result.metrics["cost/trainable"] == 4 * 32


def test_property_fields_reach_the_parts(tmp_path, fields):
    metrics = {}
    for name, changes in {
        "plain": {},
        "words": {"prompt_text": "melon zinc"},
        "diagonal": {"regulator": "diagonal"},
        "template": {"template": "{} river"},
        "scale": {"scale": 5.0},
        "first": {"meta": fields["meta"].model_copy(update={"second_order": False, "lr": 0.1})},
        "joint": {"meta": fields["meta"].model_copy(update={"inner_steps": 0, "lr": 0.1})},
    }.items():
        metrics[name] = execute(Gram(**{**fields, **changes}), tmp_path / name).metrics["id/nll"]
    assert len(set(metrics.values())) == len(metrics), metrics


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"template": "a photo"}, "template"),
        ({"regulator": "affine"}, "regulator"),
        ({"meta": {"classes": 3, "ways": 5}}, "classes must be at least ways, 5"),
        ({"prompt_tokens": 0}, "prompt_tokens"),
    ],
)
def test_rejects_fields_that_cannot_be_honoured(changes, words):
    refs = {name: DataRef(name="unused") for name in ("train", "test", "pairs")}
    with pytest.raises(RecipeError, match=words):
        Gram(model=ModelRef(name="unused"), **refs, **changes)
