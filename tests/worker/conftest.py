"""Small random models of several families and real PEFT adapters for them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from transformers.utils import logging

from loramill.worker.adapters import Adapter, open_adapter
from loramill.worker.engine import Engine, EngineConfig
from loramill.worker.model import BaseInfo, describe_base
from loramill.worker.request import Request, Result

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    "llama": transformers.LlamaConfig(**SHAPE),
    "mistral": transformers.MistralConfig(**SHAPE, sliding_window=24),
    "qwen2": transformers.Qwen2Config(**SHAPE),
    "qwen3": transformers.Qwen3Config(**SHAPE, head_dim=16),
    "gemma2": transformers.Gemma2Config(**SHAPE, head_dim=16, sliding_window=24),
    "gemma3": transformers.Gemma3TextConfig(**SHAPE, head_dim=16, sliding_window=24),
    "phi3": transformers.Phi3Config(**SHAPE),
}


@dataclass
class Family:
    """A base model folder, its adapters' folders, and both as the engine reads them."""

    folder: Path
    adapter_folders: list[Path]
    base: BaseInfo
    adapters: list[Adapter]


@pytest.fixture(autouse=True, scope="session")
def quiet() -> Iterator[None]:
    """Transformers' and PEFT's own warnings are not ours to fail on."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        yield


def save_base(folder: Path, config: transformers.PretrainedConfig, seed: int = 0) -> Path:
    """A random model whose greedy answers vary."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.generation_config = transformers.GenerationConfig(eos_token_id=2, pad_token_id=0)
    model.save_pretrained(folder)
    return folder


def save_adapter(folder: Path, base: Path, seed: int = 0, std: float = 0.15, **config: Any) -> Path:
    """A PEFT adapter with random A and B."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_pretrained(base)
        adapted = peft.get_peft_model(model, peft.LoraConfig(**config))
        torch.manual_seed(seed)
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=std)
        adapted.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Family]:
    """Make (once) the family of that name with five adapters that differ in rank, targets and scaling."""
    made: dict[str, Family] = {}

    def make(name: str) -> Family:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            base_folder = save_base(folder / "base", FAMILIES[name])
            base = describe_base(str(base_folder))
            linear = sorted({path.rpartition(".")[2] for path in base.linears if path != base.head})
            configs: list[dict[str, Any]] = [
                {"r": 4, "lora_alpha": 8, "target_modules": linear},
                {"r": 8, "lora_alpha": 8, "target_modules": linear[:2], "use_rslora": True},
                {
                    "r": 16,
                    "lora_alpha": 32,
                    "target_modules": "all-linear",
                    "rank_pattern": {linear[0]: 5},
                    "alpha_pattern": {linear[-1]: 3},
                },
                {"r": 2, "lora_alpha": 4, "target_modules": linear[-2:], "layers_to_transform": [0, 2]},
                {"r": 4, "lora_alpha": 8, "target_modules": ["lm_head", linear[0]]},
            ]
            folders = [save_adapter(folder / f"a{n}", base_folder, n, **config) for n, config in enumerate(configs)]
            adapters = [open_adapter(str(path), base, max_rank=64) for path in folders]
            made[name] = Family(base_folder, folders, base, adapters)
        return made[name]

    return make


@pytest.fixture(scope="session")
def make_engine(family: Callable[[str], Family]) -> Callable[..., Engine]:
    """An engine on a family in float32; keyword arguments are EngineConfig's."""

    def make(name: str = "llama", **options: Any) -> Engine:
        one = family(name)
        config = EngineConfig(one.base, **{"dtype": "float32", "device": "cpu", **options})
        return Engine(config, one.adapters)

    return make


@pytest.fixture(scope="session")
def answer() -> Callable[[Engine, list[Request]], dict[int, Result]]:
    """Run requests to the end: results by key."""

    def run(engine: Engine, requests: list[Request]) -> dict[int, Result]:
        for request in requests:
            engine.add(request)
        results: dict[int, Result] = {}
        while engine.has_work:
            for result in engine.step():
                assert result.key not in results, "a row finished twice"
                results[result.key] = result
        return results

    return run
