"""How fast is text scored, and what do two processes give a curation?

    python -m benchmarks.curation

The same linear classifier of hashed words and pairs of words, three ways: ours; scikit-learn's ``HashingVectorizer``
and ``SGDClassifier`` asked for all documents at once; and the same asked document by document, as a filter that sees
one at a time would. Beside it datatrove's rules of Gopher, whose words come from spaCy, on a tenth of the documents,
and a fastText classifier where the package ``fasttext-numpy2-wheel`` is installed. The documents are docstrings.

Two processes: datatrove's rules of Gopher over four shards, wall seconds, workers started anew each time. (Scoring
alone is over before a worker has started.)
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from sklearn.feature_extraction.text import HashingVectorizer
from sklearn.linear_model import SGDClassifier
from threadpoolctl import threadpool_limits

from benchmarks.harness import Bound, alternate, least_of, report
from headwater.core.recipe import CorpusRef
from headwater.modalities.text.document_store import DocumentStore, stored_corpus
from headwater.modalities.text.quality import QualityClassifier

ROWS = 2_000


def megabytes(texts: Sequence[str]) -> float:
    return sum(len(text.encode()) for text in texts) / 1e6


def gopher(texts: Sequence[str]) -> Callable[[], object]:
    from datatrove.data import Document
    from datatrove.pipeline.filters import GopherQualityFilter

    block = GopherQualityFilter()
    rows = [Document(text=text, id=str(place)) for place, text in enumerate(texts)]
    return lambda: [block.filter(row) for row in rows]


def fast_text(texts: Sequence[str], labels: Sequence[int], folder: Path) -> Callable[[], object] | None:
    try:
        import fasttext
    except ImportError:
        return None
    lines = [text.replace("\n", " ") for text in texts]
    rows = [f"__label__{label} {line}\n" for label, line in zip(labels, lines, strict=True)]
    (folder / "train.txt").write_text("".join(rows), encoding="utf-8")
    model = fasttext.train_supervised(
        str(folder / "train.txt"), wordNgrams=2, bucket=1 << 18, dim=16, epoch=5, thread=1
    )
    return lambda: [model.f.predict(line + "\n", 1, 0.0, "strict") for line in lines]


def processes(documents: DocumentStore, folder: Path) -> dict[str, float]:
    from datatrove.pipeline.filters import GopherQualityFilter

    from headwater.modalities.text.curate import Executor, curate

    counter = iter(range(1_000))

    def run(workers: int) -> Callable[[], float]:
        def timed() -> float:
            begin = time.perf_counter()
            curate(
                documents,
                [GopherQualityFilter()],
                folder / str(next(counter)),
                executor=Executor(workers=workers),
                shard_documents=-(-len(documents) // 4),
            )
            return time.perf_counter() - begin

        return timed

    return least_of({"one process": run(1), "two processes": run(2)}, repeats=4)


def main() -> None:
    documents = stored_corpus(CorpusRef(name="headwater:general"), role="benchmark")
    texts = [document.text for document in documents][:ROWS]
    labels = [place % 2 for place in range(len(texts))]
    size = megabytes(texts)
    vectorizer = HashingVectorizer(n_features=1 << 18, ngram_range=(1, 2), alternate_sign=False)
    peer = SGDClassifier(loss="log_loss", random_state=0).fit(vectorizer.transform(texts), labels)
    ours = QualityClassifier().fit(texts, labels)
    agreed = np.corrcoef(ours(texts), peer.predict_proba(vectorizer.transform(texts))[:, 1])[0, 1]
    if agreed < 0.8:
        raise RuntimeError(f"the two classifiers score differently: correlation {agreed:.3f}")
    tenth = texts[: len(texts) // 10]
    with threadpool_limits(1), tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fast = fast_text(texts, labels, folder)
        sides: dict[str, Callable[[], object]] = {
            "ours": lambda: ours(texts),
            "scikit-learn, all at once": lambda: peer.predict_proba(vectorizer.transform(texts)),
            "scikit-learn, one by one": lambda: [peer.predict_proba(vectorizer.transform([text])) for text in texts],
            **({"fastText": fast} if fast else {}),
        }
        seconds = alternate(sides)
        begin = time.process_time()
        gopher(tenth)()
        seconds["Gopher's rules, a tenth of the text"] = time.process_time() - begin
        scaling = processes(documents.select(range(len(documents) // 2)), folder)
    speed = {name: size / value for name, value in seconds.items() if "tenth" not in name}
    slow = megabytes(tenth) / seconds["Gopher's rules, a tenth of the text"]
    ratios = {
        "MB/s": (speed["ours"], Bound("higher", 20)),
        "scikit-learn one by one / ours": (speed["ours"] / speed["scikit-learn, one by one"], Bound("higher", 5)),
        "scikit-learn all at once / ours": (speed["ours"] / speed["scikit-learn, all at once"], Bound("higher", None)),
        "Gopher's rules / ours": (speed["ours"] / slow, Bound("higher", None)),
        "one process / two": (scaling["one process"] / scaling["two processes"], Bound("higher", None)),
    }
    if fast:
        ratios["fastText / ours"] = (speed["ours"] / speed["fastText"], Bound("higher", None))
    report(
        "How fast is text scored, and what do two processes give a curation?",
        ratios,
        seconds=seconds | scaling,
        checked=f"both classifiers learn the same labels; their scores correlate by {agreed:.3f}",
        notes={"megabytes": round(size, 2), "documents": len(texts), "curated": len(documents) // 2},
    )


if __name__ == "__main__":
    main()
