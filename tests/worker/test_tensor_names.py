"""However a trainer named its tensors: each finds its projection, or is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from loramill.worker.adapters import CONFIG, WEIGHTS, AdapterError, open_adapter
from loramill.worker.engine import Engine, EngineConfig
from loramill.worker.model import describe_base
from loramill.worker.request import Request, Sampling, plain
from loramill.worker.tensor_names import Kind, Names, Rows, parse
from tests.worker.conftest import SHAPE, save_base
from tests.worker.merging import PROMPT, TOKENS, answer, load, peft_answer, peft_model, save_trained

Q = "model.layers.1.self_attn.q_proj"
PREFIX = "base_model.model."


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (f"{Q}.lora_A.weight", Kind.A),
        (f"{Q}.lora_A.default.weight", Kind.A),
        (f"{Q}.lora_B.sql.weight", Kind.B),
        (f"{Q}.lora_B.default.bias", Kind.B_BIAS),
        (f"{Q}.lora_magnitude_vector", Kind.MAGNITUDE),
        (f"{Q}.lora_magnitude_vector.default.weight", Kind.MAGNITUDE),
        (f"{Q}.lora_embedding_A.default", Kind.EMBEDDING_A),
        (f"{Q}.lora_embedding_B", Kind.EMBEDDING_B),
        (f"{Q}.token_adapter.trainable_tokens_delta", Kind.TOKENS),
        (f"{Q}.base_layer.weight", Kind.KEPT_WEIGHT),
        (f"{Q}.original_module.bias", Kind.KEPT_BIAS),
        (f"{Q}.modules_to_save.default.weight", Kind.WEIGHT),
        (f"{Q}.bias", Kind.BIAS),
    ],
)
@pytest.mark.parametrize("prefix", ["", PREFIX, f"module.{PREFIX}", f"_orig_mod.{PREFIX}_orig_mod.", PREFIX * 2])
def test_what_a_name_means(prefix: str, name: str, kind: Kind) -> None:
    assert parse(prefix + name) == (Q, kind)


@pytest.mark.parametrize("name", [f"{Q}.lora_A.bias", f"{Q}.lora_down.weight_scale", f"{Q}.lora_a", "weight"])
def test_names_of_no_known_form(name: str) -> None:
    assert parse(name) is None


def test_a_base_that_has_two_modules_of_one_end_wants_them_named_whole() -> None:
    modules = {"model.layers.0.q", "language_model.layers.0.q", "model.layers.1.q"}
    names = Names(modules, {})
    assert names.module("model.layers.0.q") == "model.layers.0.q"
    assert names.module("model.model.layers.0.q") is None
    assert names.module("model.language_model.model.layers.1.q") == "model.layers.1.q"


def test_rows_of_fused_and_separate_projections() -> None:
    apart = {
        "m.q_proj": (8, 16),
        "m.k_proj": (4, 16),
        "m.v_proj": (4, 16),
        "m.gate_proj": (6, 16),
        "m.up_proj": (6, 16),
    }
    names = Names({"m", *apart}, apart)
    assert [(p.module[-6:], p.source, p.target) for p in names.places("m.qkv_proj")] == [
        ("q_proj", Rows(0, 8), Rows(0, 8)), ("k_proj", Rows(8, 12), Rows(0, 4)), ("v_proj", Rows(12, 16), Rows(0, 4)),
    ]  # fmt: skip
    assert [p.source for p in names.places("m.gate_up_proj")] == [Rows(0, 6), Rows(6, 12)]
    assert names.places("m.query_key_value") == [], "its heads may be interleaved"
    fused = {"m.qkv_proj": (16, 16), "m.o_proj": (16, 8), "m.gate_up_proj": (12, 16)}
    names = Names({"m", *fused}, fused)
    assert [names.places(f"m.{x}_proj")[0].target for x in "qkv"] == [Rows(0, 8), Rows(8, 12), Rows(12, 16)]
    assert [names.places(f"m.{x}_proj")[0].target for x in ("gate", "up")] == [Rows(0, 6), Rows(6, 12)]


def copy_of(folder: Path, to: Path, rename: Callable[[str], str], **config: Any) -> Path:
    """The adapter with other tensor names."""
    shutil.copytree(folder, to)
    save_file({rename(name): tensor for name, tensor in load_file(folder / WEIGHTS).items()}, to / WEIGHTS)
    (to / CONFIG).write_text(json.dumps({**json.loads((folder / CONFIG).read_text()), **config}))
    return to


@pytest.mark.parametrize(
    "prefix",
    ["", "base_model.model.base_model.model.", "_orig_mod.base_model.model.", "module.base_model.model._orig_mod.",
     "base_model.model.language_model.", "base_model.model.model.language_model.", "base_model.model.model."],
)  # fmt: skip
def test_the_same_adapter_under_another_trainers_names(
    prefix: str, family: Callable[[str], Any], tmp_path: Path
) -> None:
    one = family("llama")

    def rename(name: str) -> str:
        bare = name.removeprefix(PREFIX)
        if prefix.endswith("model.language_model.") and not prefix.endswith("base_model.model.language_model."):
            bare = bare.removeprefix("model.")
        return prefix + bare

    for number in (0, 2, 3, 4):
        renamed = open_adapter(
            str(copy_of(one.adapter_folders[number], tmp_path / f"{number}", rename)), one.base, max_rank=64
        )
        original = one.adapters[number]
        assert renamed.targets.keys() == original.targets.keys()
        for module, delta in original.packed(torch.float32).deltas.items():
            torch.testing.assert_close(renamed.packed(torch.float32).deltas[module].a, delta.a, rtol=0, atol=0)
            torch.testing.assert_close(renamed.packed(torch.float32).deltas[module].b, delta.b, rtol=0, atol=0)


def test_an_adapter_of_the_inner_model(family: Callable[[str], Any], tmp_path: Path) -> None:
    """Trained on transformers' model without its head, whose modules are named without `model.`."""
    one = family("llama")
    inner = copy_of(
        one.adapter_folders[0], tmp_path / "a", lambda name: name.replace("model.model.model", "model.model")
    )
    assert open_adapter(str(inner), one.base, max_rank=64).targets.keys() == one.adapters[0].targets.keys()


def test_a_multimodal_trainers_pattern_finds_its_modules(family: Callable[[str], Any], tmp_path: Path) -> None:
    one = family("llama")
    pattern = r"model\.language_model\.layers\.\d+\.self_attn\.(q|v)_proj"
    folder = save_trained(tmp_path / "a", one.folder, target_modules=["q_proj", "v_proj"])
    renamed = copy_of(
        folder, tmp_path / "b", lambda n: n.replace("model.layers", "model.language_model.layers"),
        target_modules=pattern,
    )  # fmt: skip
    assert len(open_adapter(str(renamed), one.base, max_rank=64).targets) == 6
    tower = copy_of(folder, tmp_path / "c", lambda n: n.replace("model.model.model", "model.model.visual"))
    with pytest.raises(AdapterError, match=r"have no place.*visual.*q_proj\.lora_A"):
        open_adapter(str(tower), one.base, max_rank=64)


def test_two_names_of_one_meaning_are_refused(family: Callable[[str], Any], tmp_path: Path) -> None:
    one = family("llama")
    copy = copy_of(one.adapter_folders[0], tmp_path / "a", lambda name: name)
    tensors = load_file(copy / WEIGHTS)
    name = f"{PREFIX}{Q}.lora_A.weight"
    save_file({**tensors, name.replace("lora_A", "lora_A.default"): tensors[name].clone()}, copy / WEIGHTS)
    with pytest.raises(AdapterError, match="mean one and the same"):
        open_adapter(str(copy), one.base, max_rank=64)
    fused = {f"{PREFIX}{Q}".replace("q_proj", "qkv_proj") + f".lora_{x}.weight": torch.ones(s) for x, s in
             (("A", (4, 64)), ("B", (128, 4)))}  # fmt: skip
    save_file({**tensors, **fused}, copy / WEIGHTS)
    with pytest.raises(AdapterError, match=r"both change model\.layers\.1\.self_attn\.q_proj"):
        open_adapter(str(copy), one.base, max_rank=64)


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One model as Llama, which keeps q/k/v and gate/up apart, and as Phi-3, which fuses them."""
    folder = tmp_path_factory.mktemp("twins")
    shape = {**SHAPE, "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
    apart = save_base(folder / "apart", transformers.LlamaConfig(**shape))
    fused = save_base(folder / "fused", transformers.Phi3Config(**shape))
    tensors = load_file(apart / "model.safetensors")
    for name in [name for name in tensors if "q_proj" in name or "gate_proj" in name]:
        whole, parts = ("qkv", "qkv") if "q_proj" in name else ("gate_up", ("gate", "up"))
        first = "q_proj" if whole == "qkv" else "gate_proj"
        joined = [tensors.pop(name.replace(first, f"{part}_proj")) for part in parts]
        tensors[name.replace(first, f"{whole}_proj")] = torch.cat(joined)
    save_file(tensors, fused / "model.safetensors", metadata={"format": "pt"})
    return {"apart": apart, "fused": fused}


FUSED: dict[str, Any] = {
    "target_modules": ["qkv_proj", "gate_up_proj", "o_proj"], "alpha_pattern": {"gate_up_proj": 3},
}  # fmt: skip
APART: dict[str, Any] = {
    "target_modules": ["q_proj", "v_proj", "gate_proj", "up_proj", "o_proj"],
    "rank_pattern": {"v_proj": 2, "up_proj": 6}, "alpha_pattern": {"q_proj": 3, "gate_proj": 1},
}  # fmt: skip


@pytest.mark.parametrize("config", [{}, {"use_dora": True}], ids=["lora", "dora"])
@pytest.mark.parametrize(
    ("trained_on", "served_by", "targets"),
    [("fused", "apart", FUSED), ("apart", "fused", APART)],
    ids=["split", "join"],
)
def test_an_adapter_of_the_other_form_answers_as_peft_does(
    trained_on: str, served_by: str, targets: dict[str, Any], config: dict[str, Any], twins: dict[str, Path],
    tmp_path: Path,
) -> None:  # fmt: skip
    trained = twins[trained_on]
    folder = save_trained(tmp_path / "a", trained, r=4, lora_alpha=8, **targets, **config)
    expected, tokens = peft_answer(peft_model(trained, folder), PROMPT)
    base = describe_base(str(twins[served_by]))
    adapter = open_adapter(str(folder), base, max_rank=64)
    model = load(base)
    model.merge([(adapter.patch(), 1.0)])
    got, got_tokens = answer(model, PROMPT)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert got_tokens == tokens
    if config:
        return  # merged only
    assert adapter.rank == (10 if trained_on == "apart" else 4), "gate's 4 and up's 6 add up"
    engine = Engine(EngineConfig(base, dtype="float32", device="cpu", max_loras_per_batch=2), [adapter])
    engine.add(Request(0, PROMPT, Sampling(TOKENS, temperature=0, ignore_eos=True, logit_bias={2: -100}),
                       plain(adapter.sha256)))  # fmt: skip
    results = []
    while engine.has_work:
        results += engine.step()
    assert results[0].completions[0].token_ids == tokens


def test_a_part_that_is_missing_is_named(twins: dict[str, Path], tmp_path: Path) -> None:
    folder = save_trained(tmp_path / "a", twins["apart"], r=4, **{**APART, "rank_pattern": {}})
    tensors = load_file(folder / WEIGHTS)
    gone = {name for name in tensors if "layers.1.self_attn.v_proj" in name}
    save_file({name: tensor for name, tensor in tensors.items() if name not in gone}, folder / WEIGHTS)
    with pytest.raises(AdapterError, match=r"without tensors: layers\.1\.self_attn\.v_proj"):
        open_adapter(str(folder), describe_base(str(twins["fused"])), max_rank=64)
