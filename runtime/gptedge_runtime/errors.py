"""The documented errors: each is a :class:`GptEdgeError`, one line long, and knows the command's exit code."""

MAX_LENGTH = 290  # a line of at most 300 characters, with the command's "error: " before it


def one_line(message: str) -> str:
    """Return ``message`` on one line without control characters; a long one loses its middle, not its remedy."""
    text = " ".join("".join(c if c.isprintable() else " " for c in message).split())
    if len(text) <= MAX_LENGTH:
        return text
    half = (MAX_LENGTH - 5) // 2
    return f"{text[:half]} ... {text[-half:]}"


def shown(value: object) -> str:
    """Return the beginning of a value's text for a message; Python writes no integer of thousands of digits."""
    try:
        return f"{value!r:.40}"
    except ValueError:
        return "a number of thousands of digits"


class GptEdgeError(Exception):
    """Root of all errors that a user can cause; the text names the value, the limit and the remedy."""

    exit_code = 2

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class BundleError(GptEdgeError):
    """The bundle is damaged, incomplete, or not what its manifest says."""


class BundleNotFoundError(BundleError, FileNotFoundError):
    """There is no bundle at the given path."""


class InputError(GptEdgeError, ValueError):
    """A prompt, token id or option that the model cannot take."""


class ProviderError(GptEdgeError, RuntimeError):
    """onnxruntime is missing, or cannot run on the device that was asked for."""


class OutOfMemoryError(GptEdgeError, MemoryError):
    """The bundle, prompt or batch needs more memory than there is."""


class TimeLimitError(GptEdgeError, TimeoutError):
    """The time limit that was given is over."""


def not_finite() -> BundleError:
    """Return what to say about logits that are NaN or infinite."""
    return BundleError("the model's logits are not finite: its weights are damaged or overflow, export it again")


class VerificationError(GptEdgeError):
    """The bundle computes something else than the model it was exported from."""

    exit_code = 3
