"""A small wav2vec 2.0 with fresh weights, for tests and experiments on a laptop."""

from __future__ import annotations

from typing import Literal

import torch
from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2ForPreTraining

__all__ = ["tiny_feature_extractor", "tiny_wav2vec2"]


def tiny_wav2vec2(
    hidden: int = 96,
    layers: int = 3,
    heads: int = 4,
    mlp: int = 192,
    *,
    conv: int = 32,
    codes: int = 32,
    norm: Literal["group", "layer"] = "group",
    generator_seed: int,
) -> Wav2Vec2ForPreTraining:
    """Return a wav2vec 2.0 whose frames are 40 ms at 16 kHz, without dropout.

    Args:
        hidden: width; a multiple of ``heads`` and of 4.
        layers: of the encoder.
        heads: of attention.
        mlp: width of the feed-forward layers.
        conv: channels of the five convolutions, with strides 5, 4, 4, 4, 2.
        codes: entries of each of the two codebooks.
        norm: of the convolutions: ``group``, as the base checkpoints have it, or ``layer``, as the large ones do; the
            encoder goes with it.
        generator_seed: the weights follow from this and the sizes; the global generator is neither read nor moved.

    Raises:
        ValueError: ``hidden`` does not suit ``heads``.
    """
    if hidden % heads or hidden % 4:
        raise ValueError(f"hidden must be a multiple of heads and of 4; got hidden={hidden}, heads={heads}.")
    config = Wav2Vec2Config(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=mlp,
        conv_dim=(conv,) * 5,
        conv_kernel=(10, 8, 8, 8, 4),
        conv_stride=(5, 4, 4, 4, 2),
        num_feat_extract_layers=5,
        feat_extract_norm=norm,
        do_stable_layer_norm=norm == "layer",
        conv_bias=norm == "layer",
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        num_codevector_groups=2,
        num_codevectors_per_group=codes,
        codevector_dim=hidden,
        proj_codevector_dim=hidden,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        feat_proj_dropout=0.0,
        feat_quantizer_dropout=0.0,
        final_dropout=0.0,
        layerdrop=0.0,
        mask_time_prob=0.65,
        mask_time_length=10,
        mask_feature_prob=0.0,
    )
    # Models draw their weights from the global generator only; fork_rng puts it back as it was.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(generator_seed)
        model = Wav2Vec2ForPreTraining(config)
    return model.eval()


def tiny_feature_extractor(norm: Literal["group", "layer"] = "group") -> Wav2Vec2FeatureExtractor:
    """The feature extractor that goes with it: an attention mask for ``layer``, none for ``group``."""
    return Wav2Vec2FeatureExtractor(return_attention_mask=norm == "layer", do_normalize=True)
