"""A probe on frozen features, and the pipeline it was fitted under: what an audit of preprocessing leaves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from headwater.adapt.base import head_arrays
from headwater.core.cache import atomic_path, atomic_write_text
from headwater.modalities.vision.pipelines import Features
from headwater.modalities.vision.transform import PretrainingTransform

__all__ = ["Preprocessed", "Probe", "fit_probe"]

Probe = Literal["knn", "linear"]


def fit_probe(probe: Probe, X: Features, y: NDArray[Any], k: int) -> KNeighborsClassifier | Pipeline:
    """Fit what reads the features.

    Args:
        probe: nearest neighbours on features as they are, or logistic regression on standardised ones.
        X: ``(n, D)``.
        y: class indices or names, ``(n,)``.
        k: neighbours, at most n.
    """
    if probe == "knn":
        return KNeighborsClassifier(k).fit(X, y)
    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(X, y)


@dataclass(frozen=True)
class Preprocessed:
    """A probe on an encoder's features under the pipeline that was chosen.

    Attributes:
        probe: fitted nearest neighbours, or a scaler and a logistic regression.
        embed: from encoded images to features.
        transform: the pipeline.
        model, labels: names of the encoder and of the classes.
    """

    probe: KNeighborsClassifier | Pipeline
    embed: Callable[[Sequence[bytes]], Features]
    transform: PretrainingTransform
    model: str
    labels: tuple[str, ...]

    @property
    def trainable_parameters(self) -> int:
        """Numbers that the probe predicts by."""
        return sum(array.size for array in self._arrays().values() if array.dtype == np.float32)

    def predict_scores(self, inputs: NDArray[Any]) -> NDArray[Any]:  # Any: encoded images; a float dtype
        """Log-probabilities, ``(n, classes)``; of k neighbours, (votes + 1 / classes) / (k + 1)."""
        X = self.embed(list(inputs))
        if isinstance(self.probe, Pipeline):
            return np.asarray(self.probe.predict_log_proba(X))
        k = self.probe.n_neighbors
        scores: NDArray[np.float64] = np.log((k * self.probe.predict_proba(X) + 1 / len(self.labels)) / (k + 1))
        return scores

    def _arrays(self) -> dict[str, NDArray[Any]]:  # Any: float32 or int64
        if not isinstance(self.probe, Pipeline):
            return {
                "features": np.asarray(self.probe._fit_X, np.float32),
                "labels": np.asarray(self.probe._y, np.int64),
            }
        scaler, head = (part for _, part in self.probe.steps)
        arrays = head_arrays(head)
        weight = (arrays["weight"] / scaler.scale_).astype(np.float32)
        return {"weight": weight, "bias": (arrays["bias"] - weight @ scaler.mean_).astype(np.float32)}

    def save_pretrained(self, directory: Path) -> None:
        """Write ``preprocessor_config.json``, ``head.safetensors`` and ``README.md``."""
        self.transform.save_pretrained(directory)
        arrays = self._arrays()
        with atomic_path(directory / "head.safetensors") as path:
            save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, path)
        if isinstance(self.probe, Pipeline):
            classes, width = arrays["weight"].shape
            use = f"scores: `features @ weight.T + bias`, `weight` ({classes}, {width})"
        else:
            use = f"the {self.probe.n_neighbors} nearest rows of `features` vote by their `labels`"
        names = "\n".join(f"{number}. {name}" for number, name in enumerate(self.labels))
        atomic_write_text(directory / "README.md", _README.format(model=self.model, use=use, names=names))


_README = """# An encoder's preprocessing, chosen by audit, and a probe

`AutoImageProcessor.from_pretrained(".")` opens the size and normalisation that served `{model}` best on the training
examples; give it the images, and the encoder its `pixel_values` (with `interpolate_pos_encoding=True` where it has
fixed position embeddings and the size is not its own). Features: the projected features of a dual encoder; else the
pooled output; else the class token; else the mean over positions.

`head.safetensors`, opened with `safetensors.torch.load_file`, predicts: {use}. Classes by index:

{names}
"""
