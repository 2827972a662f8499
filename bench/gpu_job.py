"""The job of `make gpu`: a random Llama shape of 8 billion parameters and its adapters, made on the device and saved.

On a host such a model takes minutes; on the device the disk sets the time. Rows are those of `bench.job`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from bench.job import Job, Row, Spec, make_rows

SPEC = Spec(
    layers=32, rows=2000, hidden=4096, intermediate=14336, heads=32, kv_heads=8, vocab=128256, adapters=32,
    prompt_tokens=192, output_tokens=128,
)  # fmt: skip
BASE_STD, ADAPTER_STD = 0.02, 0.01
"""Of the weights: what adapters add is then about a seventh of what the base gives."""
WARM_ROWS, WARM_TOKENS = 64, 4


@dataclass(frozen=True, slots=True)
class DeviceJob(Job):
    """Some rows of a job, with the files of all."""

    some: list[Row]

    def rows(self) -> list[Row]:
        return self.some


def first(job: Job, rows: int) -> DeviceJob:
    """A job's first rows."""
    return DeviceJob(replace(job.spec, rows=rows), job.folder, job.rows()[:rows])


def others(job: Job, rows: int, output_tokens: int) -> DeviceJob:
    """As many other rows of the same model and adapters."""
    spec = replace(job.spec, rows=rows, output_tokens=output_tokens, seed=job.spec.seed + 1)
    return DeviceJob(spec, job.folder, make_rows(spec))


def warm_up(job: Job) -> DeviceJob:
    """Rows that make a runner ready: what is compiled is compiled then."""
    return others(job, WARM_ROWS, WARM_TOKENS)


def prepare(spec: Spec, cache: Path, device: str) -> DeviceJob:
    """The job of `spec`, its files made under `cache` unless they are there already."""
    key = hashlib.sha256(json.dumps(asdict(spec)).encode()).hexdigest()[:12]
    folder = cache / f"llama-{spec.layers}x{spec.hidden}-{key}"
    if not folder.exists():
        making = cache / f"{folder.name}.making"
        shutil.rmtree(making, ignore_errors=True)
        making.mkdir(parents=True)
        (cache / ".gitignore").write_text("*\n")
        write_base(spec, making / "base", device)
        write_adapters(spec, Job(spec, making), device)
        making.rename(folder)
    return DeviceJob(spec, folder, make_rows(spec))


def write_base(spec: Spec, folder: Path, device: str) -> None:
    """The model in bfloat16, as `save_pretrained` leaves it."""
    from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = LlamaConfig(
        vocab_size=spec.vocab, hidden_size=spec.hidden, intermediate_size=spec.intermediate,
        num_hidden_layers=spec.layers, num_attention_heads=spec.heads, num_key_value_heads=spec.kv_heads,
        max_position_embeddings=8192, initializer_range=BASE_STD, bos_token_id=None, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(spec.seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.generation_config = GenerationConfig(eos_token_id=0, pad_token_id=0)
    model.save_pretrained(folder)


def write_adapters(spec: Spec, job: Job, device: str) -> None:
    """PEFT adapters on every linear projection, random in A and in B."""
    from peft import LoraConfig
    from safetensors.torch import save_file

    draw = torch.Generator(device).manual_seed(spec.seed + 1)
    targets = sorted(path.rpartition(".")[2] for path in spec.linears())
    for name in job.adapter_names:
        folder = job.adapters / name
        LoraConfig(
            r=spec.rank, lora_alpha=spec.alpha, target_modules=targets, task_type="CAUSAL_LM", inference_mode=True
        ).save_pretrained(str(folder))
        tensors = {}
        for layer in range(spec.layers):
            for path, (out_features, in_features) in spec.linears().items():
                for side, shape in (("A", (spec.rank, in_features)), ("B", (out_features, spec.rank))):
                    weight = torch.randn(shape, generator=draw, device=device) * ADAPTER_STD
                    key = f"base_model.model.model.layers.{layer}.{path}.lora_{side}.weight"
                    tensors[key] = weight.bfloat16().cpu()
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def setting(spec: Spec) -> str:
    """The job in one sentence."""
    return (
        f"{spec.rows} rows over {spec.adapters} adapters (Zipf {spec.zipf:g}, rank {spec.rank} on all seven linear "
        f"projections), {spec.prompt_tokens} prompt + {spec.output_tokens} output tokens a row; a random Llama shape "
        f"of {weights(spec) / 1e9:.2f}B weights beside its embedding, in bfloat16."
    )


def weights(spec: Spec) -> int:
    """Numbers that every pass reads: the layers' and the head's."""
    return spec.vocab * spec.hidden + spec.layers * sum(out * inp for out, inp in spec.linears().values())
