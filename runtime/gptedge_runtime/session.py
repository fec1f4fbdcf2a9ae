"""decode.onnx in onnxruntime.

In the shapes below B is the batch, T the number of tokens and V the vocabulary size.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .bundle import MANIFEST, Bundle, GraphSpec, ModelConfig, TensorSpec
from .cache import Cache, Ids, Logits, split_rows
from .errors import BundleError
from .huge_pages import huge_pages
from .invariance import is_batch_invariant, step_difference
from .limits import ShouldStop, TimeLimit
from .mapped import let_go, newly_mapped
from .memory_map import Region
from .ort import compare_graphs, empty, import_onnxruntime, open_graph, out_of_memory, run_error, run_options
from .prefill import GRAPH, MIN_TOKENS, Prefill
from .workers import in_worker

TRIED_ROWS = 16  # of the batch in which a row's bits are tried out
LEAST_PARITY = 0.1  # which no model is trusted to stay below, however near to it its graphs were
FORWARD_TOKENS = 1024  # of one run at most, unless one row is longer: bounds memory and the time until a stop is heard


class Session:
    """The bundle's decode graph, checked against the manifest; many threads may use one at the same time.

    ``exact``: in an int8 or int4 bundle, too, no kernel rounds its inputs. That is slow, and for ``verify``.
    """

    graph = "decode"
    prefill_tokens = FORWARD_TOKENS
    """Of one run of a prefill, whose logits are those of each row's last position alone."""
    holds_batches = True
    """Whether greedy rows of a batch get the ids that they get alone."""
    places_are_positions = False
    """Whether the graph keeps a token in the cache at its position, and not behind the tokens before it."""
    n_steps = 0
    """Decode steps so far."""
    weights: Sequence[Region] = ()
    """Where the mapped weights file lies, of which ``decode`` reads rows of the tables."""
    why_not_cuda: str | None = None
    """Why ``auto`` took the CPU for this bundle where there is a GPU."""

    def __init__(
        self, bundle: Bundle, *, provider: str, threads: int, timeout_s: float | None = None, exact: bool = False
    ) -> None:
        self._bundle, self._threads = bundle, threads
        self.model = bundle.model
        self.provider = provider
        self.timeout_s = timeout_s
        self.precision, self.rounds_finely = bundle.precision, exact or bundle.rounds_finely
        self.cache_names, self.cache_dtype = bundle.model.cache_names, bundle.cache_dtype
        self.parity = min(1.0, max(LEAST_PARITY, 4 * bundle.read_parity()))
        """How far logits that kernels add in another order may be from these, as a share of the bound of parity: four
        times what the export saw, which looked at fewer tokens than a session writes."""
        self._ort = import_onnxruntime()
        self._session = self._open(bundle, threads, exact)
        self._options = run_options(self._ort)
        self._step_differences: dict[int, float | None] = {}
        self._is_batch_invariant: bool | None = None
        self._probe()

    def _open(self, bundle: Bundle, threads: int, exact: bool) -> Any:
        compare_graphs(MANIFEST, bundle.graphs["decode"], decode_contract(bundle.model, bundle.cache_dtype))
        with huge_pages(), newly_mapped(bundle.folder) as self.weights:
            session = open_graph(bundle, bundle.graphs["decode"], threads, packed=not exact)
        if not self.rounds_finely:
            let_go(self.weights)
        return session

    def prefill_of(self, n_tokens: int) -> Prefill | None:
        """Return what reads a prompt of so many tokens alone; None where it is ``decode`` as well."""
        return self._prefill if n_tokens > MIN_TOKENS.get(self.precision, n_tokens) else None

    @cached_property
    def _prefill(self) -> Prefill | None:
        """Opened at the first need, since its weights count in memory; where a new bundle stands by then it is not."""
        if self.rounds_finely or GRAPH not in self._bundle.graphs or not self._bundle.is_in_place():
            return None
        return Prefill(self._bundle, self._threads)

    def is_batch_invariant(self, should_stop: ShouldStop) -> bool:
        """Whether a row's logits have the same bits alone and among others: tried out once.

        Attention of float32 parts the keys of a long row among the threads for which there are no heads, in other parts
        in a batch: no short trial tells.
        """
        if self.rounds_finely and self.model.n_heads < self._threads:
            return False
        if self._is_batch_invariant is None:
            self._is_batch_invariant = is_batch_invariant(self, TRIED_ROWS, should_stop)
        return self._is_batch_invariant

    def step_difference(self, n_tokens: int) -> float | None:
        """How far logits of a step of so many tokens are from plain ones', as a share of the bound of parity.

        Where activations are rounded it is tried out once: 0 where the bits are the same, None where keys and values
        are others, too.
        """
        if self.rounds_finely:
            return self.parity
        if n_tokens not in self._step_differences:
            is_known = self.cache_dtype == "int8"
            self._step_differences[n_tokens] = step_difference(self, n_tokens) if is_known else None
        return self._step_differences[n_tokens]

    def new_cache(self, batch: int, capacity: int) -> Cache:
        """Return an empty cache for ``batch`` rows of at most ``capacity`` tokens; it belongs to one thread."""
        return Cache(self, self.new_key_values(batch, capacity))

    def take_back(self, cache: Cache) -> None:
        """Take back what a cache holds that nobody uses any more; on the CPU its memory goes by itself."""

    def new_key_values(self, batch: int, capacity: int) -> list[Any]:
        """Return one zeroed array (B, n_heads, capacity, cache_width) for each entry of ``cache_names``."""
        shape = (batch, self.model.n_heads, capacity, self.model.cache_width)
        try:
            return [np.zeros(shape, self.cache_dtype) for _ in self.cache_names]
        except MemoryError as error:
            raise out_of_memory() from error

    def forward(self, ids: Ids) -> Logits:
        """Return logits float32 (B, T, V) of all positions of ids int64 (B, T)."""
        batch, length = ids.shape
        should_stop = TimeLimit(self.timeout_s)
        logits = empty(batch, length, self.model.n_outputs)
        for part in split_rows([length] * batch, FORWARD_TOKENS):
            lengths = np.full(len(ids[part]), length)
            feeds = prefill_feeds(ids[part], lengths, np.tile(np.arange(length), (len(lengths), 1)))
            binding = self.bind(feeds, self.new_key_values(len(lengths), length), logits[part])
            self.run_long(binding, should_stop)
            self.read_logits(binding)
        return logits

    def bind(self, feeds: dict[str, NDArray[Any]], key_values: Sequence[NDArray[Any]], logits: Logits) -> Any:
        """Return an IO binding over these arrays; past and present are the same memory."""
        binding = self._session.io_binding()
        binding.arrays = [*feeds.values(), *key_values, logits]  # until 1.29 onnxruntime does not hold them
        for name, array in feeds.items():
            binding.bind_ortvalue_input(name, self._ort.OrtValue.ortvalue_from_numpy(array))
        for name, array in zip(self.cache_names, key_values, strict=True):
            value = self._ort.OrtValue.ortvalue_from_numpy(array)
            binding.bind_ortvalue_input(f"past_key_values.{name}", value)
            binding.bind_ortvalue_output(f"present.{name}", value)
        binding.bind_ortvalue_output("logits", self._ort.OrtValue.ortvalue_from_numpy(logits))
        return binding

    def read(
        self,
        rows: Sequence[Sequence[int]],
        past: int,
        key_values: Sequence[NDArray[Any]],
        logits: Logits,
        should_stop: ShouldStop,
        padding: int = 0,
    ) -> None:
        """Read the ids of B rows behind ``past`` ones, in one run, into ``logits`` (B, 1, V) of each row's last."""
        lengths = np.array([len(row) for row in rows])
        ids = pad_right(rows, lengths.max() + padding)
        binding = self.bind(prefill_feeds(ids, lengths, lengths[:, None] - 1, past), key_values, logits)
        self.run_long(binding, should_stop)
        self.read_logits(binding)

    def run(self, binding: Any, options: Any = None) -> None:
        """Run a binding."""
        try:
            self._session.run_with_iobinding(binding, options or self._options)
        except Exception as error:  # onnxruntime's own share no other base class
            raise run_error(error, "the decode graph") from error

    def read_logits(self, binding: Any) -> None:
        """Bring the logits of the last run into the array that was bound for them; on the CPU they are there."""

    def read_best_ids(self, binding: Any) -> Ids | None:
        """Return the most likely ids (B, T) of the last run where the graph tells them, which on the CPU costs more."""
        return None

    def run_long(self, binding: Any, should_stop: ShouldStop) -> None:
        """Run a binding that may take long: Ctrl-C ends it, and so does ``should_stop``, which raises ``Stopped``."""
        self._bundle.check_weights()
        options = run_options(self._ort)
        in_worker(lambda: self.run(binding, options), options, should_stop)

    def _probe(self) -> None:
        """Run the last token at the last position: smaller tables than the manifest says show now, not in use."""
        feeds = prefill_feeds(np.array([[self.model.vocab_size - 1]]), np.array([1]), np.array([[0]]))
        feeds["position_ids"][:] = self.model.context_length - 1
        key_values = self.new_key_values(1, self.model.context_length if self.places_are_positions else 1)
        logits = np.empty((1, 1, self.model.n_outputs), np.float32)
        try:
            self.run_long(self.bind(feeds, key_values, logits), TimeLimit(self.timeout_s))
        except BundleError as error:
            raise BundleError(
                f"the graph {self.graph} cannot read token {self.model.vocab_size - 1} at position "
                f"{self.model.context_length - 1}, the last of manifest.json's sizes: export the bundle again, or "
                f"update onnxruntime {self._ort.__version__} (int8 and int4 take 1.27)"
            ) from error


def prefill_feeds(ids: Ids, lengths: Ids, logit_positions: Ids, past: int = 0) -> dict[str, NDArray[Any]]:
    """Return decode's inputs for ids int64 (B, T) behind ``past`` ones; row b has ``lengths[b]``, then padding."""
    batch, width = ids.shape
    return {
        "input_ids": ids,
        "position_ids": np.tile(np.arange(past, past + width), (batch, 1)),
        "seqlens_k": (past + lengths - 1).astype(np.int32),
        "total_sequence_length": np.array(past + width, np.int32),
        "logit_positions": np.ascontiguousarray(logit_positions),
    }


def pad_right(rows: Sequence[Sequence[int]], width: int) -> Ids:
    """Return the rows as int64 (B, width), filled up with id 0."""
    ids = np.zeros((len(rows), width), np.int64)
    for padded, row in zip(ids, rows, strict=True):
        padded[: len(row)] = row
    return ids


def decode_contract(model: ModelConfig, cache_dtype: str = "float32") -> GraphSpec:
    """Return the inputs and outputs that decode.onnx must have for a model of these sizes."""
    cache = ("batch_size", model.n_heads, "max_sequence_length", model.cache_width)
    tokens = ("batch_size", "sequence_length")
    inputs = [
        TensorSpec("input_ids", "int64", tokens),
        TensorSpec("position_ids", "int64", tokens),
        TensorSpec("seqlens_k", "int32", ("batch_size",)),
        TensorSpec("total_sequence_length", "int32", ()),
        TensorSpec("logit_positions", "int64", ("batch_size", "logit_count")),
        *(TensorSpec(f"past_key_values.{name}", cache_dtype, cache) for name in model.cache_names),
    ]
    outputs = [
        TensorSpec("logits", "float32", ("batch_size", "logit_count", model.n_outputs)),
        *(TensorSpec(f"present.{name}", cache_dtype, cache) for name in model.cache_names),
    ]
    return GraphSpec("", tuple(inputs), tuple(outputs))
