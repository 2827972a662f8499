"""The base model: what its folder says, and the loaded thing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from loramill.kernels import native
from loramill.kernels.router import Router
from loramill.worker import attention
from loramill.worker.batch import Batch, Probe, running
from loramill.worker.cache import KVCache
from loramill.worker.graphs import Graphs
from loramill.worker.host_form import Held, Laid
from loramill.worker.lean import lean_form
from loramill.worker.lora import FusedLinear, install
from loramill.worker.merge import Merged
from loramill.worker.patch import Patches

_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_CONTEXTS = ("max_position_embeddings", "n_positions", "seq_length", "max_seq_len")
_LENGTH_BOUND_ROPE = ("longrope", "dynamic")
"""Rotary kinds whose angles depend on the longest position in the whole batch: served up to the original context only,
where all positions share one set of angles."""
_SAMPLED_BYTES = 65536


class ModelError(Exception):
    """A base model that cannot be served; one line that says why."""


@dataclass(slots=True, frozen=True)
class BaseInfo:
    """What is known of a base model without loading a weight."""

    path: str
    model_type: str
    vocab_size: int
    max_model_len: int
    """Tokens of prompt and answer together."""
    eos_token_ids: tuple[int, ...]
    sampling_defaults: Mapping[str, float]
    """What its generation_config sets, among temperature, top_p, top_k, min_p and repetition_penalty."""
    fingerprint: str
    """Hash over config and weights (size, header and samples of each file)."""
    linears: Mapping[str, tuple[int, int]]
    """(out_features, in_features) by module path."""
    modules: frozenset[str]
    parameters: Mapping[str, tuple[int, ...]]
    """Shapes by name."""
    embedding: str | None
    """The input embedding's module path."""
    head: str | None
    """The output projection's module path."""
    tied_head: str | None
    """The embedding's module path, where the output projection shares its weight."""


def describe_base(path: str, max_model_len: int | None = None) -> BaseInfo:
    """Read a model folder's configuration and build its skeleton without memory.

    Raises:
        ModelError: not a folder with a causal model in safetensors that this engine can serve.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ModelError(f"{path}: no such folder")
    raw = _json(folder / "config.json")
    if "auto_map" in raw:
        raise ModelError(f"{path}: config.json asks to run code of its own (`auto_map`), which is never done")
    if raw.get("quantization_config"):
        raise ModelError(f"{path}: quantised base models are not served (`quantization_config` in config.json)")
    try:
        config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
        with torch.device("meta"):
            skeleton = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention.NAME)
    except Exception as error:  # whatever a broken config.json makes transformers raise is one thing to a user
        raise ModelError(
            f"{path}: config.json is no causal language model that can be served: {_line(error)}"
        ) from error
    generation = _json(folder / "generation_config.json", missing_ok=True)
    names = {module: name for name, module in skeleton.named_modules()}
    text = config.get_text_config()
    return BaseInfo(
        path=path,
        model_type=config.model_type,
        vocab_size=text.vocab_size,
        max_model_len=_context(path, text, max_model_len),
        eos_token_ids=_eos(generation, text),
        sampling_defaults=_sampling_defaults(generation),
        fingerprint=_fingerprint(folder),
        linears={n: (m.out_features, m.in_features) for m, n in names.items() if isinstance(m, nn.Linear)},
        modules=frozenset(names.values()),
        parameters={n: tuple(p.shape) for n, p in skeleton.named_parameters(remove_duplicate=False)},
        embedding=names.get(skeleton.get_input_embeddings()),
        head=names.get(skeleton.get_output_embeddings()),
        tied_head=names.get(skeleton.get_input_embeddings()) if text.tie_word_embeddings else None,
    )


def base_tensor(base: BaseInfo, name: str) -> Tensor | None:
    """A tensor of the base's files by its name in them, or None. A tied head is found under the embedding's name."""
    for file in sorted(Path(base.path).glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            if name in tensors.keys():  # noqa: SIM118 (not a mapping)
                tensor: Tensor = tensors.get_tensor(name)
                return tensor
    if base.head is not None and name == f"{base.head}.weight" and base.tied_head is not None:
        return base_tensor(base, f"{base.tied_head}.weight")
    return None


class Model:
    """A loaded base model whose projections hold adapter slots and whose attention reads our cache."""

    def __init__(self, base: BaseInfo, dtype: str, device: str, slots: int) -> None:
        """Load the weights.

        Raises:
            ModelError: they cannot be read, or the model needs what this engine does not serve.
        """
        wanted = "auto" if dtype == "auto" else getattr(torch, dtype)
        try:
            model = transformers.AutoModelForCausalLM.from_pretrained(
                base.path,
                dtype=wanted,
                attn_implementation=attention.NAME,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
            )
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise ModelError(f"{base.path}: the weights cannot be loaded: {_line(error)}") from error
        self.device = torch.device(device)
        if device == "cpu":
            native.operators()  # compiled now, if it must be, and not amid the first pass
        self.dtype: torch.dtype = model.dtype
        self._model = model.to(self.device).eval()
        self.projections: list[FusedLinear] = install(self._model, slots)
        self._merged = Merged(self._model, self.projections, base.embedding, self.device)
        probe = self._probe()
        self.shapes = probe.shapes
        self._lean = lean_form(self._model, self.projections, probe)
        self._graphs: Graphs | None = None
        self._copies = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def use_graphs(
        self, cache: KVCache, router: Router, max_num_seqs: int, pages_per_row: int, *, scratch_page: int
    ) -> None:
        """Replay decode passes over this cache as CUDA graphs from now on; nobody may read `scratch_page`."""
        self._graphs = Graphs(self._eager, cache, router, max_num_seqs, pages_per_row, scratch_page)

    def put(self, slot: int, held: Held) -> None:
        """Fill an adapter slot of every projection."""
        replaced = True  # also where it breaks off
        try:
            if isinstance(held, Laid):
                each = [projection.put(slot, held.panels.get(projection.names)) for projection in self.projections]
            else:
                deltas = held.to(self.device, self._copies).deltas
                each = [projection.put(slot, deltas) for projection in self.projections]
            replaced = any(each)
        finally:
            if replaced:
                self._forget_graphs()

    def merge(self, patches: Patches) -> None:
        """Compute with the base's weights and these patches, each with its strength; nothing else stays merged.

        Raises:
            MergeError: the sum is not finite. However it fails, the model is the base then.
        """
        self._forget_graphs()
        self._merged.put(patches)

    def restore(self) -> None:
        """Compute with the base's own weights again, bit by bit."""
        self._forget_graphs()
        self._merged.take_out()

    def merge_bytes(self, parameters: Iterable[str], vocab_size: int = 0) -> int:
        """Bytes that merging into these parameters takes at most beside the base, embedding and head of that size."""
        return self._merged.nbytes(parameters, vocab_size)

    def slot_bytes(self, ranks: Mapping[str, int]) -> int:
        """Bytes that the adapter slots take beside the base, for adapters of at most these ranks, by module path."""
        return sum(projection.slot_bytes(ranks) for projection in self.projections)

    @torch.inference_mode()
    def forward(self, batch: Batch) -> Tensor:
        """Run a packed batch; logits [O, vocab] of its output rows, in the model's dtype, good until the next call."""
        replayed = None if self._graphs is None else self._graphs.run(batch)
        return self._eager(batch) if replayed is None else replayed

    def _forget_graphs(self) -> None:
        if self._graphs is not None:
            self._graphs.forget()

    def _eager(self, batch: Batch) -> Tensor:
        with running(batch):
            if self._lean is not None:
                return self._lean(batch)
            return self._call(batch.tokens, batch.positions, batch.outputs)

    def _call(self, tokens: Tensor, positions: Tensor, outputs: Tensor) -> Tensor:
        # No attention mask and no cache of transformers': the batch says who attends to whom.
        logits: Tensor = self._model(
            input_ids=tokens[None], position_ids=positions[None], use_cache=False, logits_to_keep=outputs
        ).logits
        return logits[0]

    @torch.inference_mode()
    def _probe(self) -> Probe:
        """One token through the model: what each layer is, and a refusal before any row instead of amid them."""
        probe, zero = Probe(), torch.zeros(1, dtype=torch.int64, device=self.device)
        try:
            with running(probe):
                self._call(zero, zero, zero)
        except (attention.UnsupportedAttention, TypeError) as error:
            raise ModelError(f"this model cannot be served: {_line(error)}") from error
        if not probe.shapes:
            raise ModelError("this model does not use transformers' attention interface, so it cannot be served")
        return probe


def _context(path: str, config: Any, asked: int | None) -> int:
    context = next((n for n in (getattr(config, name, None) for name in _CONTEXTS) if n), None)
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope] if "rope_type" in rope else [r for r in rope.values() if isinstance(r, dict)]
    for kind in kinds:
        if kind.get("rope_type") in _LENGTH_BOUND_ROPE:
            original = kind.get("original_max_position_embeddings")
            original = original or getattr(config, "original_max_position_embeddings", None)
            context = min(n for n in (context, original) if n) if context or original else None
    if context is None and asked is None:
        raise ModelError(f"{path}: config.json does not say how long its context is: pass --max-model-len")
    if asked is None:
        return int(context or 0)
    if context is not None and asked > context:
        raise ModelError(f"--max-model-len {asked} is more than the {context} tokens that {path} can be served with")
    return asked


def _eos(generation: Mapping[str, Any], config: Any) -> tuple[int, ...]:
    eos = generation.get("eos_token_id", getattr(config, "eos_token_id", None))
    return tuple(eos) if isinstance(eos, list | tuple) else () if eos is None else (int(eos),)


def _sampling_defaults(generation: Mapping[str, Any]) -> dict[str, float]:
    if generation.get("do_sample") is False:
        return {"temperature": 0.0}
    return {name: generation[name] for name in _DEFAULTS if isinstance(generation.get(name), int | float)}


def _fingerprint(folder: Path) -> str:
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        pickled = " (pickled weights are never loaded)" if list(folder.glob("*.bin")) else ""
        raise ModelError(f"{folder}: no .safetensors weights in this folder{pickled}")
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in weights:
        # Samples, not everything: a base is tens of gigabytes, and an edited copy differs in all of them.
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}".encode())
        with file.open("rb") as weight:
            for part in range(8):
                weight.seek(part * max(0, size - _SAMPLED_BYTES) // 7)
                digest.update(weight.read(_SAMPLED_BYTES))
    return digest.hexdigest()


def _json(file: Path, missing_ok: bool = False) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except FileNotFoundError:
        if missing_ok:
            return {}
        raise ModelError(f"{file.parent}: no {file.name} in this folder") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file}: cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{file}: is not a JSON object")
    return content


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__
