"""Chapter 6's classifier: what its bundle must say that its weights do not."""

from dataclasses import dataclass

from gptedge_models import GPTModel

from .errors import ExportError
from .vocabulary import Vocabulary


@dataclass(frozen=True)
class Classifier:
    """Names of the classes; texts are cut or padded to ``max_length`` tokens, or only cut to the context if it is 0."""

    labels: tuple[str, ...]
    max_length: int
    pad_token_id: int


def is_classifier(model: GPTModel) -> bool:
    """Tell whether the head is a classifier's: the book gives that one a bias."""
    return model.out_head.bias is not None


def describe_classifier(
    model: GPTModel, vocabulary: Vocabulary, *, labels: str | None, max_length: int | None
) -> Classifier | None:
    """Return what ``--labels`` and ``--max-length`` say of a classifier; None for a model that generates.

    Raises :class:`ExportError` where something is missing or does not fit.
    """
    if not is_classifier(model):
        if labels is not None or max_length is not None:
            raise ExportError("the model is no classifier: leave --labels and --max-length out")
        return None
    n_classes, context = model.out_head.out_features, model.config.context_length
    if max_length is None:
        raise ExportError(
            f"the model is a classifier of {n_classes} classes: give --max-length, the number of tokens to which its "
            f"training padded each text, at most {context:,} (the book: train_dataset.max_length; 0: no padding)"
        )
    if not 0 <= max_length <= context:
        raise ExportError(
            f"--max-length is {max_length:,}: give a number from 0, no padding, to {context:,}, the model's context"
        )
    names = tuple(labels.split(",")) if labels else tuple(str(i) for i in range(n_classes))
    if len(set(names)) != n_classes or "" in names:
        raise ExportError(f"--labels {labels!r:.80} does not name {n_classes} classes: separate them by commas")
    if vocabulary.eos_token_id is None:
        raise ExportError("the tokenizer has no <|endoftext|>, with which the book pads: give another --tokenizer")
    return Classifier(names, max_length, vocabulary.eos_token_id)
