"""Files of weights: read whole, once, and refused when anything about them is off."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loramill.worker.adapters import WEIGHTS, AdapterError, open_adapter
from loramill.worker.tensor_file import INDEX, read, read_config


@pytest.fixture
def copy(family: Callable[[str], Any], tmp_path: Path) -> Path:
    """A copy of the llama family's first adapter to break."""
    return Path(shutil.copytree(family("llama").adapter_folders[0], tmp_path / "a"))


def shard(folder: Path, count: int = 2) -> list[Path]:
    """Cut the file of weights in shards with an index."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    files, where = [], {}
    for n in range(count):
        name = f"adapter_model-{n + 1:05d}-of-{count:05d}.safetensors"
        part = dict(list(tensors.items())[n::count])
        save_file(part, folder / name)
        where |= dict.fromkeys(part, name)
        files.append(folder / name)
    (folder / INDEX).write_text(json.dumps({"weight_map": where}))
    return files


def refusal(folder: Path) -> str:
    with pytest.raises(AdapterError) as refused:
        read(str(folder), read_config(str(folder)))
    return "\n".join(refused.value.problems)


def test_tensors_are_the_librarys(copy: Path) -> None:
    save_file(
        {"a": torch.randn(3, 5).half(), "b": torch.randn(7).bfloat16(), "c": torch.zeros(0, 4), "n": torch.arange(3)},
        copy / WEIGHTS, metadata={"format": "pt"},
    )  # fmt: skip
    files = read(str(copy), read_config(str(copy)))
    expected = load_file(copy / WEIGHTS)
    assert files.others == {"n": "I64"}
    assert files.tensors.keys() == expected.keys() - {"n"}
    for name, tensor in files.tensors.items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name])


def test_a_sharded_adapter_is_the_same_adapter(family: Callable[[str], Any], copy: Path) -> None:
    one = family("llama")
    shard(copy, 3)
    sharded = open_adapter(str(copy), one.base, max_rank=64)
    assert sharded.targets == one.adapters[0].targets
    assert torch.equal(sharded.packed(torch.float32).flat, one.adapters[0].packed(torch.float32).flat)


def test_shards_that_do_not_belong_together(copy: Path) -> None:
    whole = load_file(copy / WEIGHTS)
    first, second = shard(copy)
    data = second.read_bytes()
    second.write_bytes(data[:-8])
    assert f"{second.name} is damaged or cut short" in refusal(copy)
    second.unlink()
    assert f"of 2 shards only these are here: {first.name}" in refusal(copy)
    second.write_bytes(first.read_bytes())
    assert f"is in {first.name} and in {second.name}" in refusal(copy)
    second.write_bytes(data)
    index = json.loads((copy / INDEX).read_text())
    index["weight_map"]["more"] = first.name
    (copy / INDEX).write_text(json.dumps(index))
    assert "not where it says: more" in refusal(copy)
    (copy / INDEX).write_text("[]")
    assert f"{INDEX} cannot be read" in refusal(copy)
    save_file(whole, copy / WEIGHTS)
    assert f"both {WEIGHTS} and {first.name}" in refusal(copy)


def test_a_header_that_says_one_thing_twice(copy: Path) -> None:
    tensor = '{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
    header = f'{{"a":{tensor},"a":{tensor}}}'.encode()
    (copy / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    assert load_file(copy / WEIGHTS).keys() == {"a"}, "the library takes the last one"
    assert "has a twice" in refusal(copy)
