"""How much of the phones a model's frames show: a linear probe on exact labels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from headwater.modalities.speech.languages import Utterance
from headwater.modalities.speech.masking import receptive_field
from headwater.modalities.speech.stream import Frames
from headwater.modalities.speech.synthesis import PHONES, SILENCE, frame_labels

__all__ = ["labelled_frames", "phone_probe"]


def labelled_frames(
    model: nn.Module, utterances: Sequence[Utterance], frames: Frames, *, attention_mask: bool
) -> tuple[list[NDArray[np.float32]], list[NDArray[np.int64]]]:
    """Context vectors c_t and phones of the frames that are not silent, for each utterance.

    Args:
        model: a ``Wav2Vec2Model``; its mode is put back.
        utterances: alone in their batch, so that no padding bears on them.
        frames: the model's front end.
        attention_mask: whether the model expects one.

    Returns:
        ``(frames, hidden)`` float32 and ``(frames,)`` int64 for each utterance; labels are positions in ``PHONES``.
    """
    silence, training = list(PHONES).index(SILENCE), model.training
    receptive, stride = receptive_field(frames.kernels, frames.strides)
    device = next(model.parameters()).device
    vectors, labels = [], []
    model.eval()
    for said in utterances:
        inputs = frames.extractor(said.spoken.audio, sampling_rate=frames.extractor.sampling_rate, return_tensors="pt")[
            "input_values"
        ].to(device)
        with torch.inference_mode():
            hidden = model(inputs, attention_mask=torch.ones_like(inputs, dtype=torch.long) if attention_mask else None)
        found = hidden.last_hidden_state[0].float().cpu().numpy()
        phones = frame_labels(said.spoken, len(found), stride=stride, receptive=receptive)
        vectors.append(found[phones != silence])
        labels.append(phones[phones != silence])
    model.train(training)
    return vectors, labels


def phone_probe(
    model: nn.Module,
    train: Sequence[Utterance],
    test: Sequence[Utterance],
    frames: Frames,
    *,
    attention_mask: bool,
) -> float:
    """Accuracy of multinomial logistic regression on frozen c_t, over all test frames that are not silent.

    Features are standardised on the training frames; phones that are not among those count as errors.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    vectors, labels = labelled_frames(model, train, frames, attention_mask=attention_mask)
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500))
    probe.fit(np.concatenate(vectors), np.concatenate(labels))
    vectors, labels = labelled_frames(model, test, frames, attention_mask=attention_mask)
    return float(probe.score(np.concatenate(vectors), np.concatenate(labels)))
