"""One forward pass: token ids in, logits out, on ONNX Runtime's CPU provider.

A session owns the buffers its graph reads and writes. They are bound once for each range of slots; a decode step writes
a few numbers in place, runs, and reads the logits where the graph left them.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from runtime.artifact import PREFILL
from runtime.errors import SessionError
from runtime.huge_pages import huge_pages
from runtime.kv_cache import KVBuffers, Side
from runtime.processor import int8_sums_may_overflow
from runtime.threads import default_threads

_PAST: Final = re.compile(r"past\.(\d+)\.(key|value)")
_SPIN_US: Final = "20"  # how long a thread waits awake for the next operator; onnxruntime's own is above a millisecond
_CACHE_TYPES: Final[Mapping[str, np.dtype[Any]]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(int8)": np.dtype(np.int8),
}
_SMALL: Final = ("input_ids", "seqlens_k", "total_sequence_length", "logits_positions")
_ENCODER: Final = ("input_ids", "attention_mask", "token_type_ids")


def open_graph(model: str | os.PathLike[str], threads: int | None = None) -> Any:
    """Load a graph and return the `onnxruntime.InferenceSession`.

    Args:
        model: path of an .onnx file; its external data lies beside it.
        threads: threads per operator; None takes `default_threads()`.
    """
    path = Path(model)
    if not path.is_file():
        raise SessionError(f"{path}: no such file; expected an ONNX graph")
    onnxruntime = _import_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = default_threads() if threads is None else threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.spin_duration_us", _SPIN_US)
    options.log_severity_level = 3  # errors: its warnings speak to people who build graphs
    options.add_session_config_entry("session.disable_quant_qdq", "1")  # lets what expands constant weights be folded
    if int8_sums_may_overflow():
        options.add_session_config_entry("session.x64quantprecision", "1")  # unsigned weights: slower, and exact
    try:
        with huge_pages():
            return onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own classes share no base but Exception
        raise SessionError(f"{path}: onnxruntime refuses the graph: {_first_line(error)}") from None


def _import_onnxruntime() -> Any:
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read once, while the library loads
    try:
        import onnxruntime
    except ImportError as error:
        hint = "install it with: pip install 'optimize-models[cpu]'"
        raise SessionError(f"runtime: onnxruntime cannot be imported ({_first_line(error)}); {hint}") from None
    return onnxruntime


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


@dataclass(frozen=True)
class _Signature:
    """What a decoder graph's own inputs and outputs say.

    Attributes:
        small: its inputs beside the cache.
        cache: `LAYER.key` and `LAYER.value` -> their form, which may differ from layer to layer.
        vocabulary: width of its logits.
        takes_batches: whether rows of different lengths may share a run.
    """

    small: tuple[str, ...]
    cache: Mapping[str, Side]
    vocabulary: int
    takes_batches: bool

    @property
    def layers(self) -> int:
        return len(self.cache) // 2


class DecoderSession:
    """Sequences on a decoder graph, one in each slot of a key/value cache that the graph reads and writes in place.

    A graph of prompts, where one lies beside the graph, is run by `run`, whatever the number of tokens, and the graph
    itself by `decode` and `step`: which one computes a position is decided by its phase alone.

    A slot holds positions 0..capacity-1 of its sequence. A caller says with `past` how many of them count: going back
    is free, and a new sequence starts with `past=0`. Not thread-safe.

    Attributes:
        even_rows: compute an even number of rows of logits in `run`, for kernels that round the last of an odd number
            differently. False to begin with; `decode` takes even numbers from its caller.
    """

    even_rows: bool = False

    def __init__(
        self, model: str | os.PathLike[str], *, capacity: int, threads: int | None = None, slots: int = 1
    ) -> None:
        """Load the graph and reserve the cache.

        Args:
            model: path of the .onnx file; layers, heads and head width are read from its inputs.
            capacity: most tokens of one sequence. Memory is taken as tokens are written, where the system allows.
            threads: threads per operator; None takes `default_threads()`.
            slots: how many sequences it holds.

        Raises:
            SessionError: when the graph cannot be loaded, is no decoder graph, or takes no more than one sequence.
        """
        for name, value, unit in (("capacity", capacity, "token"), ("slots", slots, "sequence")):
            if value < 1:
                raise SessionError(f"{name}: got {value}, expected at least 1 {unit}")
        self._session = open_graph(model, threads)
        self._signature = _decoder_signature(Path(model), self._session)
        self._prefill = self._open_prefill(Path(model).with_name(PREFILL), threads)
        if slots > 1 and not self._signature.takes_batches:
            raise SessionError(f"{model}: slots: got {slots}, expected 1; this graph runs one sequence at a time")
        self.capacity = capacity
        self.slots = slots
        self.layers = self._signature.layers
        self.heads, self.head_width, _ = self._signature.cache["0.key"]
        self.vocabulary = self._signature.vocabulary
        rows = slots + slots % 2 if slots > 1 else 1  # an odd number of slots has one more, for dummy rows alone
        self.cache = KVBuffers(self._signature.cache, slots=rows, capacity=capacity)
        self._logits = np.empty((rows, self.vocabulary), np.float32)
        self._decodes: dict[tuple[int, int], _Binding] = {}  # by first slot and number of rows
        self._chunks: dict[int, _Binding] = {}  # by slot

    def step(self, token: int, past: int) -> NDArray[np.float32]:
        """Run one token of the sequence in slot 0 at position `past`, after `past` tokens already in the cache.

        Returns:
            Its logits `[V]`: a view that the next call overwrites.
        """
        logits: NDArray[np.float32] = self.decode([token], [past])[0]
        return logits

    def decode(self, tokens: Sequence[int], pasts: Sequence[int], first: int = 0) -> NDArray[np.float32]:
        """Run one token of each of the sequences in slots `first` to `first + n - 1`.

        Where `slots` is an odd number above 1, the slot after the last can run as well, as a dummy row.

        Args:
            tokens: an id for each, n of them.
            pasts: of each, how many tokens in the cache count, and so the position its token takes.
            first: the lowest of the slots.

        Returns:
            Logits `[n, V]`: a view that the next call overwrites.
        """
        if not 1 <= len(tokens) == len(pasts) <= self.cache.slots - first <= self.cache.slots:
            got = f"{len(tokens)} tokens and {len(pasts)} positions from slot {first} on"
            raise SessionError(f"decode: got {got}, expected as many of both, and slots 0 to {self.cache.slots - 1}")
        if not 0 <= min(pasts) <= max(pasts) < self.capacity:
            at = next(past for past in pasts if not 0 <= past < self.capacity)
            raise SessionError(f"decode: got position {at}, expected 0 to {self.capacity - 1}, the cache's capacity")
        key = (first, len(tokens))
        if key not in self._decodes:
            self._decodes[key] = self._bind(*key, self._logits[: len(tokens)], self._session)
        return self._decodes[key].run(np.array(tokens, np.int64)[:, None], pasts)

    def run(self, ids: ArrayLike, past: int = 0, rows: ArrayLike | None = None, slot: int = 0) -> NDArray[np.float32]:
        """Run a chunk of tokens of one sequence after the `past` tokens already in its slot.

        Args:
            ids: token ids `[T]`, T >= 1; they take positions past..past+T-1.
            past: number of tokens in the slot that count.
            rows: which of the T positions to return logits for, `[R]`, R >= 1; None for all of them.
            slot: where the sequence is.

        Returns:
            Logits `[R, V]`: a view that the next call overwrites.
        """
        tokens = np.asarray(ids, np.int64).reshape(-1)
        wanted = np.arange(tokens.size) if rows is None else np.asarray(rows, np.int64).reshape(-1)
        if past < 0 or tokens.size < 1 or past + tokens.size > self.capacity:
            got = f"{tokens.size} tokens after {past}"
            raise SessionError(f"run: got {got}, expected at least 1 and at most {self.capacity} in all")
        if wanted.size < 1 or wanted.min() < 0 or wanted.max() >= tokens.size:
            raise SessionError(f"run: rows: got {wanted.tolist()}, expected positions 0 to {tokens.size - 1}")
        if not 0 <= slot < self.slots:
            raise SessionError(f"run: slot: got {slot}, expected 0 to {self.slots - 1}")
        if slot not in self._chunks:
            self._chunks[slot] = self._bind(slot, 1, np.empty((1, self.vocabulary), np.float32), self._prefill)
        count = wanted.size
        if self.even_rows and count % 2:
            wanted = np.append(wanted, wanted[-1])
        return self._chunks[slot].run(tokens[None], [past], wanted)[:count]

    def free(self, slot: int) -> None:
        """Give a slot's memory back to the system, where it allows, and make its cache read as zeros."""
        self.cache.free(slot)
        if slot in self._chunks and self._chunks[slot].rows > 2:
            del self._chunks[slot]  # logits of many positions

    def _open_prefill(self, path: Path, threads: int | None) -> Any:
        if not path.is_file():
            return self._session
        session = open_graph(path, threads)
        if _decoder_signature(path, session) != self._signature:
            raise SessionError(f"{path}: has other inputs or outputs than the graph beside it; export it again")
        return session

    def _bind(self, first: int, rows: int, logits: NDArray[np.float32], session: Any) -> _Binding:
        return _Binding(session, self._signature.small, self.cache.view(first, rows), logits)


class _Binding:
    """An IOBinding of B slots with its small inputs and logits; the cache stays bound while the lengths change."""

    def __init__(
        self, session: Any, small: Sequence[str], cache: Mapping[str, NDArray[Any]], logits: NDArray[np.float32]
    ) -> None:
        self._session, self._small = session, small
        self._binding = session.io_binding()
        for name, array in cache.items():
            buffer = _on_cpu(array)
            self._binding.bind_ortvalue_input(f"past.{name}", buffer)
            self._binding.bind_ortvalue_output(f"present.{name}", buffer)
        batch = len(logits)
        self._lengths = np.zeros(batch, np.int32)  # seqlens_k [B]
        self._total = np.ones(1, np.int32)
        self._bind("seqlens_k", self._lengths)
        self._bind("total_sequence_length", self._total)
        self._bind_ids((batch, 1))
        self._bind_rows(logits)

    @property
    def rows(self) -> int:
        """How many rows of logits it has memory for."""
        return len(self._logits)

    def run(
        self, ids: NDArray[np.int64], pasts: Sequence[int], rows: NDArray[Any] | None = None
    ) -> NDArray[np.float32]:
        """Run token ids [B, T] after `pasts` [B]; return the logits [R, V] of flat positions `rows`, or of all B."""
        tokens = ids.shape[1]
        if ids.shape != self._ids.shape:
            self._bind_ids(ids.shape)
        if rows is not None:
            if len(rows) != len(self._logits):
                self._bind_rows(np.empty((len(rows), self._logits.shape[1]), np.float32))
            self._positions[:] = rows
        self._ids[:] = ids
        self._lengths[:] = pasts
        self._lengths += tokens - 1
        self._total[0] = max(pasts) + tokens
        self._session.run_with_iobinding(self._binding)
        return self._logits

    def _bind_ids(self, shape: tuple[int, ...]) -> None:
        self._ids = np.zeros(shape, np.int64)
        self._bind("input_ids", self._ids)

    def _bind_rows(self, logits: NDArray[np.float32]) -> None:
        self._logits = logits
        self._positions = np.arange(len(logits))
        self._bind("logits_positions", self._positions)
        self._binding.bind_ortvalue_output("logits", _on_cpu(logits))

    def _bind(self, name: str, array: NDArray[Any]) -> None:
        if name in self._small:
            self._binding.bind_ortvalue_input(name, _on_cpu(array))


def _on_cpu(array: NDArray[Any]) -> Any:
    """Return an OrtValue that shares the array's memory and keeps the array alive."""
    return _import_onnxruntime().OrtValue.ortvalue_from_numpy(array)


def _decoder_signature(path: Path, session: Any) -> _Signature:
    past = {item.name: item for item in session.get_inputs() if _PAST.fullmatch(item.name)}
    others = [item.name for item in session.get_inputs() if item.name not in past]
    outputs = {item.name: item for item in session.get_outputs()}
    layers = len(past) // 2
    names = {f"{layer}.{side}" for layer in range(layers) for side in ("key", "value")}
    if layers == 0 or set(past) != {f"past.{name}" for name in names}:
        raise SessionError(
            f"{path}: is no decoder graph, got the inputs {others}, expected past.0.key, past.0.value, ..."
        )
    if missing := sorted({"logits", *(f"present.{name}" for name in names)} - set(outputs)):
        raise SessionError(f"{path}: lacks the output {missing[0]}; export it again")
    if unknown := sorted(set(others) - set(_SMALL)):
        raise SessionError(f"{path}: unknown input {unknown[0]!r}, expected {', '.join(_SMALL)}; export it again")
    if missing := sorted({"input_ids", "logits_positions"} - set(others)):
        raise SessionError(f"{path}: lacks the input {missing[0]}; export it again")
    if wrong := [name for name, item in past.items() if item.type not in _CACHE_TYPES]:
        raise SessionError(f"{path}: {wrong[0]}: got {past[wrong[0]].type}, expected {' or '.join(_CACHE_TYPES)}")
    vocabulary = outputs["logits"].shape[-1]
    items = {name: past[f"past.{name}"] for name in sorted(names)}
    cache = {name: Side(item.shape[1], item.shape[3], _CACHE_TYPES[item.type]) for name, item in items.items()}
    if not all(isinstance(size, int) for size in (vocabulary, *(size for side in cache.values() for size in side[:2]))):
        got = [*cache["0.key"][:2], vocabulary]
        raise SessionError(f"{path}: got heads, head width, vocabulary {got}, expected fixed sizes; export it again")
    takes_batches = not isinstance(past["past.0.key"].shape[0], int)  # one row has its 1 written out, any number a name
    return _Signature(tuple(others), cache, vocabulary, takes_batches)


class EncoderSession:
    """Batches of whole sequences on an encoder graph. Not thread-safe."""

    def __init__(self, model: str | os.PathLike[str], *, threads: int | None = None, pad_id: int = 0) -> None:
        """Load the graph.

        Args:
            model: path of the .onnx file.
            threads: threads per operator; None takes `default_threads()`.
            pad_id: the token id written where a sequence is shorter than the longest of its batch.

        Raises:
            SessionError: when the graph cannot be loaded or is no encoder graph.
        """
        self._session = open_graph(model, threads)
        self._inputs = [item.name for item in self._session.get_inputs()]
        self._pad_id = pad_id
        self.output: str = self._session.get_outputs()[0].name
        if unknown := sorted(set(self._inputs) - set(_ENCODER)):
            expected = ", ".join(_ENCODER)
            raise SessionError(f"{Path(model)}: is no encoder graph, unknown input {unknown[0]!r}, expected {expected}")

    def run(self, batch: Sequence[Sequence[int]], types: Sequence[Sequence[int]] | None = None) -> NDArray[np.float32]:
        """Return the graph's first output for B sequences of ids, right-padded to the longest of them (T tokens).

        Args:
            batch: token ids.
            types: which text each token belongs to, 0 or 1, as long as its ids; None where there is one text alone. A
                graph without such an input, as of RoBERTa, is not told.

        Returns:
            `[B, labels]` of a classifier or a reranker, `[B, W]` of an embedder that pools, `[B, T, D]` of a graph that
            ends in hidden states; a fresh array.
        """
        if not batch or not all(len(ids) for ids in batch):
            raise SessionError("run: got an empty batch or sequence, expected at least one token each")
        shape = (len(batch), max(len(ids) for ids in batch))
        feed = {
            "input_ids": np.full(shape, self._pad_id, np.int64),
            "attention_mask": np.zeros(shape, np.int64),
            "token_type_ids": np.zeros(shape, np.int64),
        }
        for row, ids in enumerate(batch):
            feed["input_ids"][row, : len(ids)] = ids
            feed["attention_mask"][row, : len(ids)] = 1
        for row, kinds in enumerate(types or ()):
            feed["token_type_ids"][row, : len(kinds)] = kinds
        result = self._session.run([self.output], {name: feed[name] for name in self._inputs})
        return np.asarray(result[0], np.float32)


def pad_id(folder: str | os.PathLike[str]) -> int:
    """Return the padding id of an artifact's `config.json`: models that count positions from it need the right one."""
    try:
        found = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8")).get("pad_token_id")
    except (OSError, ValueError, AttributeError):
        return 0
    return found if type(found) is int else 0
