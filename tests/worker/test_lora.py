"""Fused projections: they compute what the separate ones did, and a slot holds its adapter and nothing of the last."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from loramill.kernels.mixes import only
from loramill.kernels.multi_lora import Routing
from loramill.kernels.segments import segments_of
from loramill.worker import lora
from loramill.worker.batch import Batch, Probe, running
from loramill.worker.lora import FusedLinear, Product, install
from loramill.worker.packed import Delta

CPU = torch.device("cpu")
none = torch.zeros(0, dtype=torch.int64)


class Attention(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q_proj = nn.Linear(32, 24, bias=True, dtype=dtype)
        self.k_proj = nn.Linear(32, 8, bias=True, dtype=dtype)
        self.v_proj = nn.Linear(32, 8, bias=True, dtype=dtype)
        self.o_proj = nn.Linear(24, 32, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.v_proj(x), self.q_proj(x), self.k_proj(x)]


def batch(mix: list[tuple[int, int]]) -> Batch:
    routing = Routing(segments_of((only(slot) if slot >= 0 else (), rows) for slot, rows in mix), CPU)
    return Batch(None, none, none, none, None, none, routing, routing)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.inference_mode()
def test_siblings_are_one_product_with_the_same_answers(dtype: torch.dtype) -> None:
    plain, fused = Attention(dtype), Attention(dtype)
    projections = install(fused, slots=2)
    assert [p.names for p in projections] == [("q_proj", "k_proj", "v_proj"), ("o_proj",)]
    x = torch.randn(1, 7, 32).to(dtype)
    with running(Probe()):
        for _ in range(2):
            for got, expected in zip(fused(x), plain(x), strict=True):
                torch.testing.assert_close(got, expected)
        # Another input right after a half-read one is computed, not taken for it.
        first, second = torch.randn(1, 3, 32).to(dtype), torch.randn(1, 3, 32).to(dtype)
        fused.q_proj(first)
        torch.testing.assert_close(fused.k_proj(second), plain.k_proj(second))


def test_bfloat16_weights_are_packed_where_torch_can_and_kept_once() -> None:
    packs = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    linear = nn.Linear(16, 8, dtype=torch.bfloat16)
    assert (FusedLinear(["x"], [linear], 1, is_head=False).weight.device.type == "meta") == packs
    assert FusedLinear(["x"], [nn.Linear(16, 8)], 1, is_head=False).weight.device.type == "cpu"


def test_without_packing_the_answers_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    linear = nn.Linear(16, 8, dtype=torch.bfloat16)
    x = torch.randn(1, 5, 16).to(torch.bfloat16)
    with running(Probe()), torch.inference_mode():
        packed = FusedLinear(["x"], [linear], 1, is_head=False).columns(x, 0)
        monkeypatch.setattr(lora, "_prepacked", lambda weight: None)
        plain = FusedLinear(["x"], [linear], 1, is_head=False).columns(x, 0)
    torch.testing.assert_close(packed, plain)


def test_products_are_compiled_for_few_numbers_of_rows() -> None:
    numbers = [lora.compiled_rows(rows) for rows in range(1, 8193)]
    assert len(set(numbers)) == 32
    assert all(rows <= number < 1.25 * rows + 16 for rows, number in enumerate(numbers, 1))
    assert lora.compiled_rows(0) == 0


@pytest.mark.parametrize("shape", [(1,), (15,), (16,), (33,), (200,), (1, 77), (0,)])
@torch.inference_mode()
def test_rows_that_fill_a_product_up_are_not_seen(shape: tuple[int, ...]) -> None:
    linear = nn.Linear(16, 8, dtype=torch.bfloat16)
    product = Product(linear.weight, linear.bias)
    x = torch.randn(*shape, 16).to(torch.bfloat16)
    expected = nn.functional.linear(x.float(), linear.weight.float(), linear.bias.float())
    got = product(x)
    assert got.shape == expected.shape
    torch.testing.assert_close(got.float(), expected, atol=0.02, rtol=0.02)


@torch.inference_mode()
def test_what_slots_will_take_is_known_before_they_are_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = {"q_proj": 4, "v_proj": 2}
    for projection in install(Attention(torch.float32), slots=3):
        if projection.form is not None:  # slots point at what host memory holds
            assert projection.slot_bytes(ranks) == 0
    monkeypatch.setattr(lora, "panel_form", lambda *_: None)
    qkv, o = install(Attention(torch.float32), slots=3)
    qkv.put(
        1, {"q_proj": Delta(torch.ones(4, 32), torch.ones(4, 24)), "v_proj": Delta(torch.ones(2, 32), torch.ones(2, 8))}
    )
    o.put(1, {})
    assert isinstance(qkv.lora, lora.DenseLora)
    assert (qkv.slot_bytes(ranks), o.slot_bytes(ranks)) == (qkv.lora.a.nbytes + qkv.lora.b.nbytes, 0)


@torch.inference_mode()
def test_a_slot_holds_its_adapter_and_nothing_of_the_last() -> None:
    generator = torch.Generator().manual_seed(1)

    def delta(rank: int, out: int) -> Delta:
        return Delta(torch.randn(rank, 32, generator=generator), torch.randn(rank, out, generator=generator))

    fused = Attention(torch.float32)
    qkv, o_proj = install(fused, slots=2)
    adapters: list[dict[str, Delta]] = [
        {"q_proj": delta(2, 24)},
        {"q_proj": delta(9, 24), "v_proj": delta(5, 8)},
        {"k_proj": delta(1, 8)},
        {},
    ]
    plain = Attention(torch.float32)
    x = torch.randn(1, 6, 32, generator=generator)
    for held in adapters:
        for projection in (qkv, o_proj):
            projection.put(0, held)
        with running(batch([(-1, 2), (0, 4)])):
            got = dict(zip(["v_proj", "q_proj", "k_proj"], fused(x), strict=True))
        for name, answer in got.items():
            expected = getattr(plain, name)(x)
            if name in held:
                expected[:, 2:] += (x[:, 2:] @ held[name].a.t()) @ held[name].b
            torch.testing.assert_close(answer, expected)
    assert o_proj.lora is None, "no adapter ever touched it, so it takes no memory"


def test_a_tied_head_still_shares_the_embeddings_memory(family: Callable[[str], Any]) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True, pad_token_id=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    embedding = model.get_input_embeddings().weight
    (head,) = [p for p in install(model, 1) if p.is_head]
    assert head.weight.data_ptr() == embedding.data_ptr()
