"""Adapters are served whole or refused with every reason and the tensors' names."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loramill.worker.adapters import CONFIG, WEIGHTS, AdapterError, open_adapter
from tests.worker.merging import save_trained

Q = "base_model.model.model.layers.1.self_attn.q_proj"


@pytest.fixture
def copy(family: Callable[[str], Any], tmp_path: Path) -> Path:
    """A copy of the llama family's first adapter (rank 4, every linear module) to break."""
    return Path(shutil.copytree(family("llama").adapter_folders[0], tmp_path / "broken"))


def change_config(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **fields}))


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def problems(folder: Path, one: Any, **options: Any) -> str:
    with pytest.raises(AdapterError) as refused:
        open_adapter(str(folder), one.base, **{"max_rank": 64, **options})
    return "\n".join(refused.value.problems)


def test_identity_follows_content_not_place(family: Callable[[str], Any], copy: Path) -> None:
    one = family("llama")
    assert open_adapter(str(copy), one.base, max_rank=64).sha256 == one.adapters[0].sha256
    change_config(copy, lora_alpha=9)
    assert open_adapter(str(copy), one.base, max_rank=64).sha256 != one.adapters[0].sha256
    assert len({adapter.sha256 for adapter in one.adapters}) == len(one.adapters)


def test_ranks_and_scales_per_module(family: Callable[[str], Any]) -> None:
    patterned = family("llama").adapters[2]
    assert patterned.rank == 16
    ranks = {path.rpartition(".")[2]: target.rank for path, target in patterned.targets.items()}
    scales = {path.rpartition(".")[2]: target.parts[0].scale for path, target in patterned.targets.items()}
    assert ranks["down_proj"] == 5, "rank_pattern"
    assert scales["v_proj"] == 3 / 16, "alpha_pattern"
    assert scales["o_proj"] == 32 / 16
    rslora = family("llama").adapters[1]
    assert {target.parts[0].scale for target in rslora.targets.values()} == {8 / 8**0.5}
    layered = family("llama").adapters[3]
    assert {path.split(".")[2] for path in layered.targets} == {"0", "2"}


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"use_dora": True}, "`use_dora`"),
        ({"lora_bias": True}, "`lora_bias`"),
        ({"use_dora": True, "lora_bias": True}, "both set"),
        ({"bias": "some"}, "`bias`"),
        ({"modules_to_save": ["lm_head"]}, "`modules_to_save`"),
        ({"modules_to_save": ["score"]}, "score"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices of model.embed_tokens"),
        ({"trainable_token_indices": {"embed_tokens": ["1"]}}, "`trainable_token_indices`"),
        ({"target_parameters": ["mlp.up_proj.weight"]}, "`target_parameters`"),
        ({"layer_replication": [[0, 2]]}, "`layer_replication`"),
        ({"some_new_variant": {"on": 1}}, "`some_new_variant`"),
        ({"init_lora_weights": "pissa"}, "'pissa'"),
        ({"auto_map": {"x": "evil.py"}}, "`auto_map`"),
        ({"peft_type": "LOHA"}, "'LOHA'"),
        ({"r": "8"}, "`r` must be a whole number"),
        ({"r": 0}, "at least 1"),
        ({"lora_alpha": None}, "`lora_alpha` must be a number"),
        ({"target_modules": 5}, "`target_modules`"),
        ({"target_modules": "(["}, "regular expression"),
        ({"rank_pattern": {"q_proj": "x"}}, "`rank_pattern`"),
    ],
    ids=str,
)
def test_what_the_config_asks_and_we_do_not_do_is_refused_by_name(
    family: Callable[[str], Any], copy: Path, fields: dict[str, Any], says: str
) -> None:
    change_config(copy, **fields)
    assert says in problems(copy, family("llama"))


def test_a_tensor_without_a_place_is_named(family: Callable[[str], Any], copy: Path) -> None:
    change_tensors(
        copy, lambda t: t.update({"base_model.model.model.layers.9.mlp.up_proj.lora_A.weight": t.popitem()[1]})
    )
    assert "layers.9.mlp.up_proj.lora_A.weight" in problems(copy, family("llama"))
    (copy / WEIGHTS).unlink()
    save_file({f"{Q}.lora_magnitude_vector": torch.ones(3)}, copy / WEIGHTS)
    assert "lora_magnitude_vector" in problems(copy, family("llama"))


def test_half_an_adapter_is_refused(family: Callable[[str], Any], copy: Path) -> None:
    change_tensors(copy, lambda t: t.pop(f"{Q}.lora_B.weight"))
    assert "model.layers.1.self_attn.q_proj has only lora_A" in problems(copy, family("llama"))
    change_tensors(copy, lambda t: t.pop(f"{Q}.lora_A.weight"))
    assert "target modules without tensors: model.layers.1.self_attn.q_proj" in problems(copy, family("llama"))


def test_tensors_that_the_config_does_not_name_are_refused(family: Callable[[str], Any], copy: Path) -> None:
    change_config(copy, target_modules=["q_proj"])
    assert "target_modules do not name" in problems(copy, family("llama"))


def test_an_adapter_for_another_base_is_refused(family: Callable[[str], Any], copy: Path) -> None:
    change_config(copy, r=8)
    said = problems(copy, family("llama"))
    assert "must be [8, 64]" in said
    assert "16 more modules do not fit" in said


def test_a_target_that_the_base_lacks_or_that_is_no_linear_layer(family: Callable[[str], Any], copy: Path) -> None:
    config = json.loads((copy / CONFIG).read_text())
    change_config(copy, target_modules=[*config["target_modules"], "c_attn"])
    assert "does not have: c_attn" in problems(copy, family("llama"))
    change_config(copy, target_modules=[*config["target_modules"], "embed_tokens"])
    assert "without tensors: model.embed_tokens" in problems(copy, family("llama"))
    change_config(copy, target_modules=[*config["target_modules"], "norm"])
    assert "not served: model.norm" in problems(copy, family("llama"))


def test_files_that_are_missing_cut_short_or_pickled(family: Callable[[str], Any], copy: Path) -> None:
    one = family("llama")
    whole = (copy / WEIGHTS).read_bytes()
    (copy / WEIGHTS).write_bytes(whole[: len(whole) // 2])
    assert "cut short" in problems(copy, one)
    (copy / WEIGHTS).write_bytes(whole[:5])
    assert "cut short" in problems(copy, one)
    (copy / WEIGHTS).unlink()
    torch.save({"x": torch.ones(1)}, copy / "adapter_model.bin")
    assert "adapter_model.bin" in problems(copy, one)
    assert "never loaded" in problems(copy, one)
    (copy / CONFIG).write_text("{not json")
    assert "cannot be read as JSON" in problems(copy, one)
    (copy / CONFIG).write_text("[1]")
    assert "not a JSON object" in problems(copy, one)
    (copy / CONFIG).unlink()
    assert f"no {CONFIG}" in problems(copy, one)
    assert "no such folder" in problems(copy / "nowhere", one)


def test_rank_over_the_limit(family: Callable[[str], Any], copy: Path) -> None:
    assert "--max-lora-rank" in problems(copy, family("llama"), max_rank=3)


def test_an_adapter_that_changes_nothing_is_an_error_unless_asked_for(family: Callable[[str], Any], copy: Path) -> None:
    def untrained(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({name: torch.zeros_like(t) for name, t in tensors.items() if "lora_B" in name})

    change_tensors(copy, untrained)
    assert "change nothing" in problems(copy, family("llama"))
    assert open_adapter(str(copy), family("llama").base, max_rank=64, allow_noop=True).rank == 4


def test_nan_weights_are_refused(family: Callable[[str], Any], copy: Path) -> None:
    change_tensors(copy, lambda t: t[f"{Q}.lora_A.weight"].view(-1)[3:4].fill_(float("nan")))
    assert f"{Q}.lora_A.weight" in problems(copy, family("llama"))


def test_a_head_saved_beside_its_adapter_must_be_the_bases_own(family: Callable[[str], Any], tmp_path: Path) -> None:
    """PEFT writes the whole base head next to an adapter of it: the same weights are no news, others would be lost."""
    one = family("llama")
    copy = Path(shutil.copytree(one.adapter_folders[4], tmp_path / "head"))
    name = "base_model.model.lm_head.base_layer.weight"
    assert name in load_file(copy / WEIGHTS)
    assert open_adapter(str(copy), one.base, max_rank=64).sha256 == one.adapters[4].sha256
    change_tensors(copy, lambda t: t[name].add_(1))
    assert name in problems(copy, one)


def test_packed_it_is_one_tensor_of_the_size_that_was_said(family: Callable[[str], Any]) -> None:
    one = family("qwen2")
    for folder, adapter in zip(one.adapter_folders, one.adapters, strict=True):
        tensors = load_file(folder / WEIGHTS)
        for dtype in (torch.float32, torch.bfloat16):
            packed = adapter.packed(dtype)
            assert packed.flat.ndim == 1
            assert (
                packed.nbytes
                == adapter.nbytes(dtype)
                == sum(delta.a.nbytes + delta.b.nbytes for delta in packed.deltas.values())
            )
            assert packed.deltas.keys() == adapter.targets.keys()
            moved = packed.to("cpu").deltas
            for module, delta in packed.deltas.items():
                assert delta.b.is_contiguous()
                assert delta.a.untyped_storage().data_ptr() == packed.flat.untyped_storage().data_ptr()
                (part,) = adapter.targets[module].parts
                assert torch.equal(delta.a, tensors[part.a].to(dtype))
                assert torch.equal(delta.b, (tensors[part.b].t() * part.scale).to(dtype)), "rounded once"
                assert torch.equal(moved[module].b, delta.b)


def test_whatever_alone_changes_something_is_an_effect(family: Callable[[str], Any], tmp_path: Path) -> None:
    one = family("qwen2")
    configs: list[dict[str, Any]] = [
        {"bias": "all"}, {"lora_bias": True}, {"use_dora": True}, {"modules_to_save": ["norm"]},
        {"trainable_token_indices": [4]},
    ]  # fmt: skip
    for n, config in enumerate(configs):
        trained = save_trained(tmp_path / f"{n}", one.folder, target_modules=["q_proj"], **config)
        change_tensors(trained, lambda t: t.update({k: v.zero_() for k, v in t.items() if "lora_B.weight" in k}))
        assert open_adapter(str(trained), one.base, max_rank=64).static_only, config
        fresh = save_trained(tmp_path / f"fresh{n}", one.folder, target_modules=["q_proj"], std=0, **config)
        assert "change nothing" in problems(fresh, one), config


def test_magnitudes_that_are_zero_or_not_finite(family: Callable[[str], Any], tmp_path: Path) -> None:
    one = family("llama")
    dora = save_trained(tmp_path / "a", one.folder, target_modules=["q_proj"], use_dora=True)
    name = f"{Q}.lora_magnitude_vector"
    change_tensors(dora, lambda t: t[name][3:4].zero_())
    assert f"magnitudes with zeros: {name}" in problems(dora, one)
    change_tensors(dora, lambda t: t[name][3:4].fill_(float("inf")))
    assert f"NaN or infinite values: {name}" in problems(dora, one)
    change_tensors(dora, lambda t: t.update({name: t[name][:5]}))
    assert "must have 64 numbers" in problems(dora, one)
    change_tensors(dora, lambda t: t.pop(name))
    assert "model.layers.1.self_attn.q_proj has no lora_magnitude_vector" in problems(dora, one)
    change_config(dora, use_dora=False)
    assert "`use_dora` is not set" in problems(dora, one)


def test_a_vocabulary_that_did_not_grow_as_one(family: Callable[[str], Any], tmp_path: Path) -> None:
    one = family("llama")
    grown = save_trained(tmp_path / "a", one.folder, grow_to=101, target_modules=["q_proj"])
    head, embedding = "base_model.model.lm_head.weight", "base_model.model.model.embed_tokens.weight"
    change_tensors(grown, lambda t: t.update({head: t[head][:99].clone()}))
    assert "embed_tokens has 101 rows, lm_head has 99 rows, the base's 97" in problems(grown, one)
    change_tensors(grown, lambda t: t.pop(head))
    assert "embed_tokens has 101 rows, the base's 97" in problems(grown, one)
    change_tensors(grown, lambda t: t.update({name: t[embedding][:90].clone() for name in (head, embedding)}))
    assert "has 90 rows, the base's 97" in problems(grown, one)


def test_whole_modules_that_do_not_fit(family: Callable[[str], Any], tmp_path: Path) -> None:
    one = family("qwen2")
    saved = save_trained(tmp_path / "a", one.folder, target_modules=["q_proj"], modules_to_save=["norm"], bias="all")
    name = "base_model.model.model.norm.weight"
    change_tensors(saved, lambda t: t.update({name: torch.ones(63)}))
    assert f"{name} [63] must be [64]" in problems(saved, one)
    change_tensors(saved, lambda t: t.pop(name))
    change_tensors(saved, lambda t: t.pop("base_model.model.model.layers.0.self_attn.k_proj.bias"))
    said = problems(saved, one)
    assert "without tensors: model.layers.0.self_attn.k_proj.bias, model.norm.weight" in said
    change_config(saved, modules_to_save=["up_proj"])
    assert "model.layers.0.mlp.up_proj.weight" in problems(saved, one)
    change_config(saved, modules_to_save=None, bias="none")
    assert "have no place" in problems(saved, one)


def test_one_parameter_saved_twice_is_refused(family: Callable[[str], Any], tmp_path: Path) -> None:
    """PEFT does that itself when a whole module's bias is also one of `bias`, and then loads another than it saved."""
    one = family("qwen2")
    saved = save_trained(tmp_path / "a", one.folder, target_modules=["q_proj"], modules_to_save=["k_proj"], bias="all")
    assert "k_proj.modules_to_save.bias mean one and the same" in problems(saved, one)


def test_a_grown_end_saved_twice_must_be_the_same_twice(family: Callable[[str], Any], tmp_path: Path) -> None:
    one = family("llama")
    ends = ["embed_tokens", "lm_head"]
    saved = save_trained(tmp_path / "a", one.folder, grow_to=101, target_modules=["q_proj"], modules_to_save=ends)
    assert open_adapter(str(saved), one.base, max_rank=64).vocab_size == 101
    change_tensors(saved, lambda t: t["base_model.model.lm_head.modules_to_save.weight"].add_(1))
    assert "lm_head.weight mean one and the same, and differ" in problems(saved, one)
    change_tensors(saved, lambda t: t["base_model.model.lm_head.modules_to_save.weight"].sub_(1))
    change_tensors(saved, lambda t: t["base_model.model.lm_head.original_module.weight"][:5].add_(1))
    assert "have no place in this base model (llama): base_model.model.lm_head.original" in problems(saved, one)


def test_tensors_that_are_no_floating_point_numbers(family: Callable[[str], Any], copy: Path) -> None:
    change_tensors(copy, lambda t: t.update({f"{Q}.lora_A.weight": t[f"{Q}.lora_A.weight"].to(torch.int8)}))
    assert f"not floating point: {Q}.lora_A.weight (I8)" in problems(copy, family("llama"))


def test_every_problem_is_reported_at_once(family: Callable[[str], Any], copy: Path) -> None:
    (copy / WEIGHTS).write_bytes(b"short")
    change_config(copy, auto_map={"x": "evil.py"}, r="x", bias="some")
    assert len(problems(copy, family("llama")).splitlines()) == 4
