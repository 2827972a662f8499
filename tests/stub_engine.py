"""`python -m tests.stub_engine`: an engine child without a model, which starts at once and obeys its prompts.

It speaks the child's protocol through the real loop, and answers `ok:<prompt>`. Prompts that hold one of these words:
ABORT dies; HANG never returns from its pass; OOM is out of memory in company, OOM1 always; SLOW takes SLOW_PASSES,
over which a row that is followed tells its tokens. Urgent rows come before those that wait.
Its base is `stub` and its adapters a00 to a15; others may come from --adapters-dir while it runs: any folder with an
adapter_config.json, known by what its files hold. The environment may set STUB_BASE (another base's name, and answers),
STUB_STEP_S (seconds of a pass) and STUB_SEQS (rows of a pass).
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loramill.schemas.manifest import AdapterOffer, Manifest
from loramill.schemas.names import Named
from loramill.schemas.prompt import Limits, Prompter
from loramill.worker import child
from loramill.worker.forecast import Forecast
from loramill.worker.pressure import Pressure
from loramill.worker.registry import find
from loramill.worker.request import AdapterUnavailable, Completion, EngineStats, FinishReason, Request, Result
from loramill.worker.serving import Change, Served
from loramill.worker.settings import ModelOptions
from loramill.worker.specs import check_name

BASE = os.environ.get("STUB_BASE", "stub")
STEP_S = float(os.environ.get("STUB_STEP_S", "0"))
SEQS = int(os.environ.get("STUB_SEQS", "64"))
SLOW_PASSES = 60
SLOW_PASS_S = 0.05
CONTEXT = 4096
ANSWER = b"ok:" if BASE == "stub" else f"{BASE}:".encode()

# A byte a token, spelled as GPT-2 spells bytes; 256 ends an answer.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
_SPELLED = {byte: chr(byte) for byte in _PRINTABLE} | {byte: chr(256 + at) for at, byte in enumerate(_OTHERS)}
VOCABULARY = {_SPELLED[byte]: byte for byte in range(256)}
EOS = 256
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "
TOKENIZER_FILES = {
    "config.json": {"model_type": "gpt2", "vocab_size": 257},
    "tokenizer_config.json": {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "chat_template": TEMPLATE
    },
    "tokenizer.json": {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": EOS, "content": "</s>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
             "special": True}
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                  "vocab": VOCABULARY, "merges": []},
    },
}  # fmt: skip


class ByteTokenizer:
    """What AutoTokenizer makes of TOKENIZER_FILES, without loading transformers."""

    chat_template = TEMPLATE
    eos_token_id = EOS

    def __init__(self) -> None:
        self.all_special_ids = [EOS]

    def __call__(self, text: list[str], **options: Any) -> Mapping[str, Any]:
        return {"input_ids": [list(one.encode()) for one in text]}

    def apply_chat_template(self, conversation: Any, **options: Any) -> str:
        said = "".join(f"{one['role']}: {one['content']}\n" for one in conversation)
        return f"{said}assistant: "

    def decode(self, token_ids: Any, **options: Any) -> str:
        return text_of(token_ids)

    def convert_ids_to_tokens(self, ids: Any, **options: Any) -> str:
        return "</s>" if ids == EOS else _SPELLED[ids]

    def get_vocab(self) -> dict[str, int]:
        return {**VOCABULARY, "</s>": EOS}


@dataclass(slots=True)
class Running:
    """A row with the passes that it still takes."""

    request: Request
    text: str
    left: int
    told: int = 0

    def tell(self) -> None:
        """The tokens that were made by now, to whoever follows it."""
        if self.request.follow is None or not self.left:
            return
        said = answer_to(self.request)[:-1]
        made = len(said) * (SLOW_PASSES - self.left) // SLOW_PASSES
        for token in said[self.told : made]:
            for index in range(self.request.sampling.n):
                self.request.follow(index, token, None)
        self.told = made


def answer_to(request: Request) -> list[int]:
    """Its tokens."""
    return [*ANSWER, *request.prompt, EOS]


class StubEngine:
    """Answers up to `max_num_seqs` rows a pass."""

    device = "stub"

    def __init__(self, adapters: Collection[str]) -> None:
        """`adapters`: content hashes."""
        self.pressure = Pressure(SEQS, SEQS)
        self.resident: list[str] = []
        self._stats = EngineStats()
        self._adapters = set(adapters)
        self._waiting: dict[int, Request] = {}
        self._running: dict[int, Running] = {}

    @property
    def max_num_seqs(self) -> int:
        return self.pressure.max_num_seqs

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._running)

    @property
    def stats(self) -> EngineStats:
        stats = self._stats
        stats.running, stats.places, stats.resident = len(self._running), self.max_num_seqs, len(self.resident)
        stats.kv_used, stats.kv_tokens = CONTEXT * len(self._running), CONTEXT * SEQS
        return stats

    def register(self, sha256: str) -> None:
        self._adapters.add(sha256)

    def forget(self, sha256: str) -> None:
        rows = [*self._waiting.values(), *(row.request for row in self._running.values())]
        if any(sha256 == adapter for row in rows for adapter, _ in row.mix):
            raise ValueError(f"adapter {sha256} is in use")
        self._adapters.discard(sha256)

    def add(self, request: Request) -> None:
        for sha256, _ in request.mix:
            if sha256 not in self._adapters:
                raise AdapterUnavailable(f"adapter {sha256} is not registered with this engine")
        later = {} if not request.urgent else {key: one for key, one in self._waiting.items() if not one.urgent}
        for key in later:
            del self._waiting[key]
        self._waiting |= {request.key: request, **later}

    def step(self, on_start: Callable[[Sequence[int]], None] | None = None) -> list[Result]:
        begun = list(self._waiting)[: max(0, self.max_num_seqs - len(self._running))]
        for key in begun:
            request = self._waiting.pop(key)
            text = text_of(request.prompt)
            self._running[key] = Running(request, text, SLOW_PASSES if "SLOW" in text else 1)
            if request.mix:
                self._hold(request)
        if begun and on_start is not None:
            on_start(begun)
        began_s, rows = time.perf_counter(), len(self._running)
        if STEP_S:
            time.sleep(STEP_S)
        results = self._pass()
        self._stats.stepped(time.perf_counter() - began_s, rows, self.max_num_seqs)
        return results

    def cancel_waiting(self) -> list[int]:
        dropped, self._waiting = list(self._waiting), {}
        return dropped

    def cancel(self, keys: Collection[int]) -> None:
        for key in keys:
            self._waiting.pop(key, None)
            self._running.pop(key, None)

    def watch(self, forecast: Forecast) -> None: ...

    def unwatch(self, forecast: Forecast) -> None: ...

    def _pass(self) -> list[Result]:
        for row in self._running.values():
            if "ABORT" in row.text:
                os.abort()
            while "HANG" in row.text:
                time.sleep(3600)
            if "OOM1" in row.text or ("OOM" in row.text and len(self._running) > 1):
                return self._ran_out()
        self.pressure.went_well()
        for row in self._running.values():
            row.left -= 1
            row.tell()
        done = [row.request for row in self._running.values() if not row.left]
        if not done:
            time.sleep(SLOW_PASS_S)
        return [self._answer(request) for request in done]

    def _answer(self, request: Request) -> Result:
        del self._running[request.key]
        said = answer_to(request)
        self._stats.prompt_tokens += len(request.prompt)
        self._stats.completion_tokens += len(said) * request.sampling.n
        completions = [Completion(index, said, FinishReason.STOP) for index in range(request.sampling.n)]
        return Result(request.key, len(request.prompt), completions)

    def _ran_out(self) -> list[Result]:
        keys = list(self._running)
        given_up = self.pressure.ran_out(keys, len(keys))
        self._stats.out_of_memory += 1
        self._waiting = {key: row.request for key, row in self._running.items()} | self._waiting
        self._running = {}
        if given_up is None:
            return []
        request = self._waiting.pop(given_up)
        return [Result(given_up, len(request.prompt), [], error="out of memory", code="out_of_memory")]

    def _hold(self, request: Request) -> None:
        for sha256, _ in request.mix:
            self._stats.adapter_loads += sha256 not in self.resident
            if sha256 in self.resident:
                self.resident.remove(sha256)
            self.resident.append(sha256)
        self._stats.adapter_evictions += len(self.resident[:-8])
        del self.resident[:-8]


def text_of(tokens: Sequence[int]) -> str:
    """What these bytes say; the end of an answer says nothing."""
    said = [token for token in tokens if token != EOS] if EOS in tokens else tokens
    return bytes(said).decode(errors="replace")


def manifest() -> tuple[Manifest, dict[str, bytes]]:
    """What the stub serves, and the tokenizer's files."""
    files = {name: json.dumps(content).encode() for name, content in TOKENIZER_FILES.items()}
    sha256s = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    offers = tuple(
        AdapterOffer(name=f"a{number:02}", key=f"key-{number:02}", sha256=f"{number:064x}", rank=8, targets=("q_proj",))
        for number in range(16)
    )
    made = Manifest(
        base=BASE, parts={"base model": BASE}, max_model_len=CONTEXT, vocab_size=EOS + 1, max_loras=8,
        sampling_defaults={}, tokenizer="bytes", tokenizers={"bytes": sha256s}, adapters=offers,
    )  # fmt: skip
    return made, {sha256s[name]: data for name, data in files.items()}


def open_stub(options: ModelOptions) -> Served:
    """The stub, whatever the settings say."""
    offered, blobs = manifest()
    first = StubOffers(options, offered, blobs).change()
    engine = StubEngine({one.sha256 for one in offered.adapters})
    prompter = Prompter(ByteTokenizer(), Limits(CONTEXT, EOS + 1))
    return Served(engine, offered, blobs, prompter, first.adapters, first.offers)


@dataclass(slots=True, frozen=True)
class StubOffers:
    """Adapters that come and go."""

    options: ModelOptions
    manifest: Manifest
    blobs: Mapping[str, bytes]

    def adding(self, name: str, source: str | None, scale: float | None) -> Change:
        folder = Path(find(self.options, check_name(name), source).text)
        config = folder / "adapter_config.json"
        if not config.is_file():
            raise ValueError(f"{config}: no such file")
        sha256 = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(folder.iterdir()))).hexdigest()
        offer = AdapterOffer(
            name=name, key=f"key-{sha256[:16]}", sha256=sha256, rank=json.loads(config.read_bytes()).get("r", 8),
            targets=("q_proj",), scale=scale or 1.0,
        )  # fmt: skip
        return self._with(name, offer).change(sha256)

    def removing(self, name: str) -> Change:
        return self._with(name).change()

    def change(self, opened: str | None = None) -> Change:
        adapters = {one.key: Named(one.sha256, one.scale) for one in self.manifest.adapters}
        return Change(self, self.manifest, self.blobs, adapters, opened)

    def _with(self, name: str, *offers: AdapterOffer) -> StubOffers:
        others = tuple(one for one in self.manifest.adapters if one.name != name)
        return StubOffers(self.options, self.manifest.model_copy(update={"adapters": others + offers}), self.blobs)


if __name__ == "__main__":
    child.main(open_stub)
