"""What is said of a base model before a weight is loaded, and which are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from loramill.worker.engine import Engine, EngineConfig
from loramill.worker.model import ModelError, describe_base
from loramill.worker.request import Request, Sampling


@pytest.fixture
def copy(family: Callable[[str], Any], tmp_path: Path) -> Path:
    return Path(shutil.copytree(family("llama").folder, tmp_path / "base"))


def change(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def refusal(folder: Path, **options: Any) -> str:
    with pytest.raises(ModelError) as refused:
        describe_base(str(folder), **options)
    text = str(refused.value)
    assert "\n" not in text
    return text


def test_a_base_is_described(family: Callable[[str], Any]) -> None:
    base = family("llama").base
    assert (base.model_type, base.vocab_size, base.max_model_len) == ("llama", 97, 256)
    assert base.eos_token_ids == (2,)
    assert base.linears["model.layers.2.mlp.down_proj"] == (64, 96)
    assert (base.head, base.tied_head) == ("lm_head", None)


def test_defaults_come_from_the_generation_config(copy: Path) -> None:
    file = copy / "generation_config.json"
    change(file, temperature=0.7, top_p=0.8, top_k=20, do_sample=True, eos_token_id=[2, 3])
    base = describe_base(str(copy))
    assert base.sampling_defaults == {"temperature": 0.7, "top_p": 0.8, "top_k": 20}
    assert base.eos_token_ids == (2, 3)
    change(file, do_sample=False)
    assert describe_base(str(copy)).sampling_defaults == {"temperature": 0.0}
    file.unlink()
    assert describe_base(str(copy)).eos_token_ids == (2,), "config.json's, when there is no generation_config"


def test_the_fingerprint_follows_weights_and_config(copy: Path) -> None:
    before = describe_base(str(copy)).fingerprint
    assert describe_base(str(copy)).fingerprint == before
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    assert describe_base(str(copy)).fingerprint != before


def test_what_cannot_be_served_is_refused_in_one_line(copy: Path, tmp_path: Path) -> None:
    assert "no such folder" in refusal(tmp_path / "nowhere")
    assert "more than the 256" in refusal(copy, max_model_len=257)
    assert describe_base(str(copy), 100).max_model_len == 100
    change(copy / "config.json", auto_map={"AutoModel": "evil.Model"})
    assert "auto_map" in refusal(copy)
    change(copy / "config.json", auto_map=None, quantization_config={"quant_method": "gptq"})
    assert "auto_map" in refusal(copy), "whatever its value"
    config = json.loads((copy / "config.json").read_text())
    del config["auto_map"]
    (copy / "config.json").write_text(json.dumps(config))
    assert "quantised" in refusal(copy)
    (copy / "config.json").write_text("{")
    assert "JSON" in refusal(copy)
    (copy / "config.json").write_text('{"model_type": "no-such-model"}')
    assert "no causal language model" in refusal(copy)
    (copy / "config.json").unlink()
    assert "no config.json" in refusal(copy)


def test_pickled_or_damaged_weights(copy: Path) -> None:
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:4000])
    with pytest.raises(ModelError, match="weights cannot be loaded"):
        Engine(EngineConfig(describe_base(str(copy))))
    file.unlink()
    torch.save({}, copy / "pytorch_model.bin")
    assert "pickled" in refusal(copy)


def test_angles_that_depend_on_the_longest_row_limit_the_context(tmp_path: Path) -> None:
    """LongRoPE switches every position's angles when any row passes the original context: never mix the two."""
    config = transformers.Phi3Config(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, original_max_position_embeddings=64, pad_token_id=0,
        rope_parameters={
            "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8,
            "original_max_position_embeddings": 64, "factor": 4.0,
        },
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    assert describe_base(str(tmp_path)).max_model_len == 64
    assert "--max-model-len 65" in refusal(tmp_path, max_model_len=65)


def test_attention_sinks_are_refused_not_ignored(tmp_path: Path) -> None:
    config = transformers.GptOssConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=256, num_local_experts=2, pad_token_id=0,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="s_aux"):
        Engine(EngineConfig(describe_base(str(tmp_path)), dtype="float32", device="cpu"))


def test_an_engine_without_generation_config_runs_in_bfloat16(
    copy: Path, answer: Callable[[Engine, list[Request]], Any]
) -> None:
    (copy / "generation_config.json").unlink()
    engine = Engine(EngineConfig(describe_base(str(copy)), dtype="bfloat16", device="cpu"))
    assert engine.dtype == "bfloat16"
    results = answer(engine, [Request(0, [5, 6], Sampling(4, ignore_eos=True))])
    assert len(results[0].completions[0].token_ids) == 4
