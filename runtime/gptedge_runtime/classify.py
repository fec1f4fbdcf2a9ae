"""Classify texts with a bundle of the book's chapter 6."""

import os
from dataclasses import dataclass

import numpy as np

from .bundle import ClassifierSpec, open_bundle
from .errors import InputError, not_finite
from .limits import check_timeout, count_threads
from .provider import choose_provider, open_session
from .session import Session
from .tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class Classification:
    """The most likely class, and the probability of each."""

    label: str
    probabilities: dict[str, float]


def load_classifier(
    path: str | os.PathLike[str],
    *,
    provider: str = "auto",
    threads: int | None = None,
    timeout_s: float | None = None,
    progress: bool = False,
) -> "Classifier":
    """Open a classifier's bundle; arguments and errors are those of ``load``. It serves many threads at once."""
    device, n_threads = choose_provider(provider), count_threads(threads)
    check_timeout(timeout_s)
    bundle = open_bundle(path, progress=progress)
    if bundle.classifier is None:
        raise InputError(f"the bundle {bundle.folder} generates text: use load, or the command gptedge generate")
    session = open_session(bundle, provider=provider, device=device, threads=n_threads, timeout_s=timeout_s)
    return Classifier(load_tokenizer(bundle), session, bundle.classifier)


class Classifier:
    """Made by :func:`load_classifier`."""

    def __init__(self, tokenizer: Tokenizer, session: Session, spec: ClassifierSpec) -> None:
        self.labels = spec.labels
        self._tokenizer = tokenizer
        self._session = session
        self._spec = spec

    def classify(self, text: str) -> Classification:
        """Return the class of ``text`` by the logits of its last token, as the book does.

        The text is cut or padded to the length to which the training padded it, and padding counts as tokens. Raises
        :class:`InputError` for a text without tokens, and :class:`BundleError` for logits that are not finite.
        """
        ids = self._tokenizer.encode(text)
        if not ids:
            raise InputError("the text has no tokens: give at least one character")
        length = self._spec.max_length or min(len(ids), self._session.model.context_length)
        ids = (ids + [self._spec.pad_token_id] * length)[:length]
        logits = self._session.forward(np.array([ids]))[0, -1].astype(np.float64)  # (n_classes,)
        if not np.isfinite(logits).all():
            raise not_finite()
        shares = np.exp(logits - logits.max())
        probabilities = dict(zip(self.labels, (shares / shares.sum()).tolist(), strict=True))
        return Classification(self.labels[int(logits.argmax())], probabilities)
