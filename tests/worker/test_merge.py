"""Adapters merged into the base: PEFT's logits and tokens, and the base's own again, bit by bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from loramill.worker.adapters import Adapter, AdapterError, open_adapter
from loramill.worker.merge import MergeError
from loramill.worker.model import Model, describe_base
from loramill.worker.patch import Patch
from tests.worker.conftest import FAMILIES, SHAPE, save_base
from tests.worker.merging import PROMPT, answer, load, logits, peft_answer, peft_model, save_trained

CONFIGS: dict[str, transformers.PretrainedConfig] = {
    **{name: FAMILIES[name] for name in ("llama", "qwen2", "phi3", "gemma3")},  # gemma3: tied, embeddings scaled
    "tied": transformers.LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "biased": transformers.LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True),
}
LINEAR = {"phi3": ["qkv_proj", "down_proj"]}


@pytest.fixture(scope="module")
def base_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = save_base(tmp_path_factory.mktemp(name) / "base", CONFIGS[name])
        return made[name]

    return make


def opened(base: Path, folder: Path) -> Adapter:
    return open_adapter(str(folder), describe_base(str(base)), max_rank=64)


def assert_as_peft(model: Model, base: Path, folder: Path, adapter: Adapter, grow_to: int | None = None) -> None:
    """Merged, the model is PEFT's; restored, the base's: bit by bit."""
    before = logits(model, PROMPT)
    model.merge([(adapter.patch(), 1.0)])
    got, tokens = answer(model, PROMPT)
    expected, expected_tokens = peft_answer(peft_model(base, folder, grow_to), PROMPT)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert tokens == expected_tokens
    assert got.shape != before.shape or (got - before).abs().max() > 0.1, "merging changes something"
    model.restore()
    assert torch.equal(logits(model, PROMPT), before)


PLAIN = [("llama", {}), ("qwen2", {"use_rslora": True}), ("phi3", {}), ("tied", {}), ("gemma3", {})]


@pytest.mark.parametrize(("name", "config"), PLAIN, ids=lambda given: given if isinstance(given, str) else "")
def test_plain_lora(name: str, config: dict[str, Any], base_of: Callable[[str], Path], tmp_path: Path) -> None:
    base = base_of(name)
    targets = LINEAR.get(name, ["q_proj", "v_proj", "gate_proj", "down_proj"])
    folder = save_trained(
        tmp_path / "a", base, r=4, lora_alpha=8, target_modules=[*targets, "lm_head"], rank_pattern={targets[0]: 3},
        alpha_pattern={targets[1]: 5}, **config,
    )  # fmt: skip
    adapter = opened(base, folder)
    assert adapter.static_only == ()
    assert_as_peft(load(describe_base(str(base))), base, folder, adapter)


STATIC: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    ("llama", {"use_dora": True}, ("DoRA",)),
    ("qwen2", {"use_dora": True, "use_rslora": True}, ("DoRA",)),
    ("phi3", {"use_dora": True}, ("DoRA",)),
    ("llama", {"use_dora": True, "target_modules": ["q_proj", "lm_head", "embed_tokens"]},
     ("DoRA", "LoRA on embeddings")),
    ("qwen2", {"bias": "all"}, ("bias",)),
    ("qwen2", {"bias": "lora_only"}, ("bias",)),
    ("biased", {"bias": "all"}, ("bias",)),
    ("qwen2", {"bias": "all", "use_dora": True}, ("DoRA", "bias")),
    ("qwen2", {"lora_bias": True}, ("lora_bias",)),
    ("llama", {"lora_bias": True}, ("lora_bias",)),
    ("llama", {"modules_to_save": ["norm", "lm_head", "embed_tokens"]}, ("modules_to_save: ",)),
    ("llama", {"modules_to_save": ["k_proj", "up_proj"]}, ("modules_to_save: ",)),
    ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["mlp"]}, ("modules_to_save: ",)),
    ("qwen2", {"modules_to_save": ["embed_tokens"], "bias": "all"}, ("bias", "modules_to_save: ")),
    ("gemma3", {"modules_to_save": ["q_norm"]}, ("modules_to_save: ",)),
    ("tied", {"modules_to_save": ["lm_head"]}, ("modules_to_save: lm_head",)),
    ("tied", {"modules_to_save": ["embed_tokens"]}, ("modules_to_save: model.embed_tokens",)),
    ("tied", {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
     ("modules_to_save: lm_head, model.embed_tokens",)),
    ("llama", {"target_modules": ["q_proj", "embed_tokens"]}, ("LoRA on embeddings",)),
    ("tied", {"target_modules": ["q_proj", "embed_tokens"]}, ("LoRA on embeddings",)),
    ("tied", {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}, ("LoRA on embeddings",)),
    ("tied", {"target_modules": ["lm_head"], "ensure_weight_tying": True}, ("LoRA on embeddings",)),
    ("gemma3", {"target_modules": ["q_proj", "embed_tokens"]}, ("LoRA on embeddings",)),
    ("llama", {"trainable_token_indices": [3, 5, 96]}, ("trainable_token_indices",)),
    ("llama", {"trainable_token_indices": {"embed_tokens": [5, 3], "lm_head": [4]}}, ("trainable_token_indices",)),
    ("tied", {"trainable_token_indices": [3, 5]}, ("trainable_token_indices",)),
    ("tied", {"trainable_token_indices": {"lm_head": [3, 5]}}, ("trainable_token_indices",)),
    ("tied", {"trainable_token_indices": {"embed_tokens": [3, 5], "lm_head": [6]}}, ("trainable_token_indices",)),
    ("gemma3", {"trainable_token_indices": [3, 5]}, ("trainable_token_indices",)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "config", "reasons"), STATIC, ids=lambda given: str(given))
def test_what_can_only_be_merged(
    name: str, config: dict[str, Any], reasons: tuple[str, ...], base_of: Callable[[str], Path], tmp_path: Path
) -> None:
    base = base_of(name)
    targets = LINEAR.get(name, ["q_proj", "o_proj", "down_proj"])
    folder = save_trained(tmp_path / "a", base, **{"r": 4, "lora_alpha": 8, "target_modules": targets, **config})
    adapter = opened(base, folder)
    assert len(adapter.static_only) == len(reasons)
    for said, reason in zip(adapter.static_only, reasons, strict=True):
        assert said.startswith(reason)
    assert adapter.parameters == adapter.patch().parameters
    with pytest.raises(AdapterError, match="only be served merged"):
        adapter.packed(torch.float32)
    assert_as_peft(load(describe_base(str(base))), base, folder, adapter)


@pytest.mark.parametrize("name", ["llama", "tied"])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
        {"target_modules": ["lm_head"], "modules_to_save": ["embed_tokens"], "lora_bias": True},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
    ],
    ids=["q", "ends", "bias", "saved"],
)
def test_a_vocabulary_that_grew(
    name: str, config: dict[str, Any], base_of: Callable[[str], Path], tmp_path: Path
) -> None:
    base = base_of(name)
    folder = save_trained(tmp_path / "a", base, grow_to=101, **{"target_modules": ["q_proj", "up_proj"], **config})
    adapter = opened(base, folder)
    assert adapter.vocab_size == 101
    assert "a vocabulary of 101 tokens" in adapter.static_only
    model = load(describe_base(str(base)))
    assert_as_peft(model, base, folder, adapter, grow_to=101)
    model.merge([(adapter.patch(), 1.0)])
    assert logits(model, [5, 100, 98]).shape == (3, 101)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["qwen2", "tied"])
def test_the_base_comes_back_bit_by_bit_and_merging_starts_from_it(
    name: str, dtype: str, base_of: Callable[[str], Path], tmp_path: Path
) -> None:
    base = base_of(name)
    config = {"r": 4, "target_modules": ["q_proj", "v_proj", "o_proj", "lm_head"]}
    patches = [opened(base, save_trained(tmp_path / f"a{seed}", base, seed, **config)).patch() for seed in (1, 2)]
    model = load(describe_base(str(base)), dtype)
    before = logits(model, PROMPT)
    model.merge([(patches[0], 1.0)])
    once = logits(model, PROMPT)
    model.merge([(patches[1], 1.0)])
    other = logits(model, PROMPT)
    model.merge([(patches[0], 1.0)])
    assert torch.equal(logits(model, PROMPT), once), "nothing of the second stayed, and the first was not added twice"
    assert not torch.equal(once, other)
    assert not torch.equal(once, before)
    model.restore()
    assert torch.equal(logits(model, PROMPT), before)
    assert torch.equal(logits(load(describe_base(str(base)), dtype), PROMPT), before)


def test_in_bfloat16_the_sum_is_rounded_once(base_of: Callable[[str], Path], tmp_path: Path) -> None:
    base = base_of("qwen2")
    adapter = opened(base, save_trained(tmp_path / "a", base, r=4, target_modules=["q_proj", "v_proj", "gate_proj"]))
    model = load(describe_base(str(base)), "bfloat16")
    model.merge([(adapter.patch(), 1.0)])
    merged = peft_model(base, tmp_path / "a")
    with torch.no_grad():
        # The base in bfloat16, as served; the sum of it and the adapter in float32, and that rounded once.
        expected = merged.to(torch.bfloat16).float()
        expected.load_adapter(tmp_path / "a", "exact")
        expected.set_adapter("exact")
        folder = tmp_path / "merged"
        expected.merge_and_unload().to(torch.bfloat16).save_pretrained(folder)
    assert torch.equal(logits(model, PROMPT), logits(load(describe_base(str(folder)), "bfloat16"), PROMPT))


def test_a_mix_is_the_weighted_sum(base_of: Callable[[str], Path], tmp_path: Path) -> None:
    base = base_of("llama")
    config = {"target_modules": ["q_proj", "down_proj"]}
    folders = [save_trained(tmp_path / f"a{n}", base, n, r=2 + 2 * n, **config) for n in (0, 1)]
    model = load(describe_base(str(base)))
    model.merge([(opened(base, folders[0]).patch(), 0.75), (opened(base, folders[1]).patch(), -0.5)])
    peft = peft_model(base, folders[0])
    peft.load_adapter(folders[1], "other")
    # "cat" is exact: A above A, B beside B, of which only the first carries the weight.
    peft.add_weighted_adapter(["default", "other"], [0.75, -0.5], "mix", combination_type="cat")
    peft.set_adapter("mix")
    torch.testing.assert_close(logits(model, PROMPT), peft_answer(peft, PROMPT)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "tied"])
def test_head_and_embedding_do_not_leak_into_each_other(
    name: str, base_of: Callable[[str], Path], tmp_path: Path
) -> None:
    base = base_of(name)
    model = load(describe_base(str(base)))
    embedding = model._model.get_input_embeddings()
    (head,) = [projection for projection in model.projections if projection.is_head]
    own, own_head = embedding.weight.clone(), head.dense()
    model.merge([(opened(base, save_trained(tmp_path / "h", base, target_modules=["lm_head"])).patch(), 1.0)])
    assert torch.equal(embedding.weight, own)
    model.merge([(opened(base, save_trained(tmp_path / "e", base, target_modules=["embed_tokens"])).patch(), 1.0)])
    assert not torch.equal(embedding.weight, own)
    assert torch.equal(head.dense(), own_head)
    hidden = torch.randn(1, 3, 64)
    torch.testing.assert_close(head._now(hidden), hidden @ own_head.t())
    model.restore()
    assert torch.equal(embedding.weight, own)


@pytest.mark.parametrize("what", ["shape", "overflow"])
def test_a_merge_that_fails_leaves_the_base(what: str, base_of: Callable[[str], Path], tmp_path: Path) -> None:
    base = base_of("llama")
    targets = ["q_proj", "down_proj", "embed_tokens"]
    good = opened(base, save_trained(tmp_path / "a", base, target_modules=targets)).patch()
    model = load(describe_base(str(base)), "float16" if what == "overflow" else "float32")
    before = logits(model, PROMPT)
    model.merge([(good, 1.0)])
    last = "model.layers.2.mlp.down_proj" if what == "shape" else "model.embed_tokens"
    (pair,) = good.low_rank[last]
    b: Tensor = pair.b[:3] if what == "shape" else pair.b * 1e6
    bad = Patch({**good.low_rank, last: [type(pair)(pair.a, b, pair.scale, pair.target)]}, {}, {})
    with pytest.raises(RuntimeError if what == "shape" else MergeError, match=None if what == "shape" else "float16"):
        model.merge([(bad, 1.0)])
    assert torch.equal(logits(model, PROMPT), before)
    assert all(projection._now is projection._base for projection in model.projections)


def test_an_adapter_that_changed_on_disk_is_not_merged(base_of: Callable[[str], Path], tmp_path: Path) -> None:
    base = base_of("llama")
    adapter = opened(base, save_trained(tmp_path / "a", base, target_modules=["q_proj"]))
    save_trained(tmp_path / "a", base, seed=5, target_modules=["q_proj"])
    with pytest.raises(AdapterError, match="changed on disk"):
        adapter.patch()
    with pytest.raises(AdapterError, match="changed on disk"):
        adapter.packed(torch.float32)


def test_what_a_merge_takes_is_known_before(base_of: Callable[[str], Path], tmp_path: Path) -> None:
    base = base_of("llama")
    adapter = opened(base, save_trained(tmp_path / "a", base, target_modules=["q_proj", "down_proj", "embed_tokens"]))
    model = load(describe_base(str(base)))
    fused, down, embedding = (64 + 32 + 32) * (64 + 1), 64 * (96 + 1), 97 * 64
    assert model.merge_bytes(adapter.parameters) == 4 * (3 * (fused + down) + embedding) + 6 * fused
    assert model.merge_bytes(adapter.parameters, 200) > model.merge_bytes(adapter.parameters)
    assert model.merge_bytes(()) == 0
    with torch.inference_mode():  # as a step of the engine merges
        model.merge([(adapter.patch(), 1.0)])
    kept = [projection._now.dense() for projection in model.projections if projection._now is not projection._base]
    weights = [*kept, model._model.get_input_embeddings().weight]
    assert sum(weight.nbytes for weight in weights) < model.merge_bytes(adapter.parameters)
    model.restore()
    assert logits(model, PROMPT).isfinite().all()
