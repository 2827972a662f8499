"""What a worker publishes of the models that it has opened."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from loramill.schemas.names import Named
from loramill.schemas.prompt import Limits, Prompter
from loramill.worker.manifest import adapter_key, manifest_of
from loramill.worker.models import Models, open_models
from loramill.worker.settings import ModelOptions
from loramill.worker.specs import AdapterSpec
from loramill.worker.tokenizers import Tokenizers


@pytest.fixture(scope="module")
def options(
    tiny_base: Path,
    tiny_adapters: Path,
    make_adapter: Callable[..., Path],
    make_grown: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> ModelOptions:
    root = tmp_path_factory.mktemp("offered")
    specs = {name: AdapterSpec(str(tiny_adapters / name)) for name in ("one", "two")}
    specs["half"] = AdapterSpec(str(tiny_adapters / "one"), scale=0.5)
    specs["tool"] = AdapterSpec(str(make_grown(root / "tool", template="own {{ messages }}")))
    specs["also"] = AdapterSpec(str(shutil.copytree(root / "tool", root / "also")))
    names = root / "names.json"
    names.write_text('{"aliases": {"q": "one"}, "routes": {"task": {"sum": "two"}}}')
    return ModelOptions(base_model=str(tiny_base), adapters=specs, adapters_file=names, seed=3, max_loras_per_batch=5)


@pytest.fixture(scope="module")
def models(options: ModelOptions) -> Models:
    return open_models(options)


def test_it_says_what_rows_may_ask_for(models: Models, options: ModelOptions, tiny_base: Path) -> None:
    manifest, _ = manifest_of(models, options, "float32")
    assert (manifest.base, manifest.max_model_len, manifest.vocab_size, manifest.max_loras) == (
        tiny_base.name, 256, 258, 5
    )  # fmt: skip
    assert manifest.parts == {k: v for k, v in models.parts.items() if k != "--seed"} | {"--dtype": "float32"}
    assert (manifest.aliases, manifest.routes) == ({"q": {"one": 1.0}}, {"task": {"sum": "two"}})
    offers = {offer.name: offer for offer in manifest.adapters}
    assert offers.keys() == {"one", "two", "half", "tool", "also"}
    one, half, tool = offers["one"], offers["half"], offers["tool"]
    assert (one.rank, one.targets, one.scale, one.alone) == (4, ("down_proj", "q_proj", "v_proj"), 1.0, None)
    assert one.key == half.key != offers["two"].key
    assert half.scale == 0.5
    assert tool.template == "own {{ messages }}"
    assert tool.vocab_size == 262
    assert tool.alone
    assert tool.tokenizer == offers["also"].tokenizer != manifest.tokenizer
    assert tool.key == offers["also"].key
    assert manifest.tokenizers.keys() == {manifest.tokenizer, tool.tokenizer}


def test_prompts_can_be_made_from_its_files_alone(models: Models, options: ModelOptions, tmp_path: Path) -> None:
    manifest, blobs = manifest_of(models, options, "float32")
    for tokenizer, files in manifest.tokenizers.items():
        (tmp_path / tokenizer).mkdir()
        for name, sha256 in files.items():
            (tmp_path / tokenizer / name).write_bytes(blobs[sha256])
    base = tmp_path / manifest.tokenizer
    tokenizers = Tokenizers(base, Limits(manifest.max_model_len, manifest.vocab_size), manifest.chat_template)
    assert pieces(tokenizers.base) == pieces(models.prompter)
    (tool,) = (offer for offer in manifest.adapters if offer.name == "tool")
    own = models.names.adapters["tool"].prompter
    assert own is not None
    assert pieces(tokenizers.own(tmp_path / str(tool.tokenizer), tool.vocab_size or 0)) == pieces(own)


def test_the_same_settings_make_the_same_manifest_and_a_seed_is_no_part_of_it(
    models: Models, options: ModelOptions
) -> None:
    manifest, _ = manifest_of(models, options, "float32")
    other = open_models(replace(options, seed=4, device="cpu"))
    assert manifest_of(other, options, "float32")[0].id == manifest.id
    half = manifest_of(models, options, "bfloat16")[0]
    assert half.base_id != manifest.base_id
    shorter = replace(options, max_model_len=100)
    assert manifest_of(open_models(shorter), shorter, "float32")[0].base_id != manifest.base_id


def test_a_key_is_what_decides_the_answers() -> None:
    keys = {
        adapter_key(Named("a"), None), adapter_key(Named("b"), None), adapter_key(Named("a", template="t"), None),
        adapter_key(Named("a"), "tokens"),
    }  # fmt: skip
    assert len(keys) == 4
    assert adapter_key(Named("a", 0.5), None) in keys


def pieces(prompter: Prompter) -> object:
    return prompter.eos, prompter.limits, [prompter.piece(token) for token in range(262)]
