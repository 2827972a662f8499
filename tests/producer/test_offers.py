from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from loramill.producer.offers import able, choose, open_offer, together
from loramill.producer.tokenizer_cache import tokenizer_folder
from loramill.schemas.failures import ExitCode, Failure
from loramill.schemas.manifest import Manifest
from loramill.schemas.request import parse_line
from loramill.store.errors import StoreError
from loramill.store.records import WorkerRecord
from tests.producer.served_by_stub import BLOBS, MANIFEST, manifest, offer

OTHER = manifest(base="other", parts={"base model": "other"})
CHANGED = manifest(parts={"base model": "stub, trained on"})


def worker(name: str, serves: Manifest, state: str = "ready") -> WorkerRecord:
    return WorkerRecord(name, serves.id, serves.base_id, "cpu", state, 1, 2, "here")


def test_the_only_base_needs_no_name() -> None:
    more = manifest(offer("x"))
    assert choose([more, MANIFEST], [], None) == [more, MANIFEST]
    assert choose([OTHER, more, MANIFEST], [], "stub") == [more, MANIFEST]


def test_several_bases_need_one_unless_workers_serve_only_one_of_them() -> None:
    with pytest.raises(Failure, match=r"several bases \(other, stub\)") as refused:
        choose([OTHER, MANIFEST], [], None)
    assert refused.value.code is ExitCode.USAGE
    assert choose([OTHER, MANIFEST], [worker("w", MANIFEST)], None) == [MANIFEST]


def test_of_one_name_the_base_that_workers_serve_now_counts_or_the_latest() -> None:
    assert choose([MANIFEST, CHANGED], [], None) == [MANIFEST]
    assert choose([MANIFEST, CHANGED], [worker("w", CHANGED)], "stub") == [CHANGED]


def test_an_unknown_base_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(Failure, match="there is other, stub; did you mean `stub`") as refused:
        choose([OTHER, MANIFEST], [], "stab")
    assert refused.value.code is ExitCode.INPUT


def test_names_of_all_workers_together_the_latest_published_first() -> None:
    old = manifest(
        offer("a"), offer("b", key="old"), offer("c"), offer("d"), aliases={"al": {"a": 1.0}, "both": {"c": 1.0}},
        routes={"team": {"x": "a"}, "other": {"x": "a"}},
    )  # fmt: skip
    new = manifest(offer("b"), offer("both"), offer("d", scale=2.0), aliases={"c": {"b": 1.0}}, routes={"team": {}})
    all_ = together([new, old])
    assert {name: one.key for name, one in all_.adapters.items()} == {
        "a": "key-a", "b": "key-b", "both": "key-both", "d": "key-d"
    }  # fmt: skip
    assert all_.aliases == {"c": {"b": 1.0}, "al": {"a": 1.0}}
    assert all_.routes == {"team": {}, "other": {"x": "a"}}
    assert all_.differing == {"b": "adapter", "c": "alias", "d": "adapter", "both": "adapter", "team": "route"}


def test_an_offer_checks_rows_as_the_worker_would(tmp_path: Path) -> None:
    served = manifest(offer("x", scale=0.5, template="{{ 'of x' }}"), offer("y", alone="DoRA"), max_loras=2)
    made = open_offer([served], [], BLOBS.__getitem__, tmp_path)
    assert made.names.resolve(parse_line(b'{"id": "1", "prompt": "p", "adapter": "x"}')) == (("x", 0.5),)
    assert made.names.template((("x", 0.5),)) == "{{ 'of x' }}"
    assert made.names.adapters["y"].alone == "DoRA"
    assert made.prompter.encode_rows([parse_line(b'{"id": "1", "prompt": "hi"}')], [None]) == [list(b"hi")]
    assert (made.prompter.limits.max_model_len, made.prompter.limits.vocab_size) == (4096, 257)
    assert (made.max_mix, made.max_loras) == (2, 2)


def test_an_operators_template_stands_in_for_the_tokenizers(tmp_path: Path) -> None:
    made = open_offer([manifest(chat_template="{{ 'mine' }}")], [], BLOBS.__getitem__, tmp_path)
    row = parse_line(b'{"id": "1", "messages": [{"role": "user", "content": "hi"}]}')
    assert made.prompter.encode_rows([row], [None]) == [list(b"mine")]


def test_an_adapter_with_a_tokenizer_of_its_own_is_read_by_it(tmp_path: Path) -> None:
    config = b'{"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": "{{ \'own\' }}"}'
    grown = dict(MANIFEST.tokenizers["bytes"], **{"tokenizer_config.json": hashlib.sha256(config).hexdigest()})
    blobs = {**BLOBS, grown["tokenizer_config.json"]: config}
    served = manifest(
        offer("grown", tokenizer="more", vocab_size=300), tokenizers={**MANIFEST.tokenizers, "more": grown}
    )
    made = open_offer([served], [], blobs.__getitem__, tmp_path)
    prompter = made.names.prompter((("grown", 1.0),))
    assert prompter is not None
    row = parse_line(b'{"id": "1", "messages": [{"role": "user", "content": "hi"}]}')
    assert prompter.encode_rows([row], [None]) == [list(b"own")]
    assert prompter.limits.vocab_size == 300


def test_limits_are_those_of_the_workers_that_run(tmp_path: Path) -> None:
    few, many = manifest(max_loras=2), manifest(max_loras=16)
    made = open_offer([few, many, MANIFEST], [worker("a", few), worker("b", MANIFEST)], BLOBS.__getitem__, tmp_path)
    assert (made.max_mix, made.max_loras) == (8, 2)


def test_who_could_run_what() -> None:
    first, second = manifest(offer("x"), offer("y")), manifest(offer("y"), offer("z"), max_loras=1)
    workers = [worker("w1", first), worker("w2", second), worker("w3", OTHER), worker("w4", first, "draining")]
    manifests = [first, second, OTHER]

    def asked(*shards: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
        found = able(manifests, workers, shards, MANIFEST.base_id)
        return found.all_of_it, found.part_of_it, found.lacking

    assert asked(()) == (("w1", "w2"), (), ())
    assert asked(("key-x", "key-y"), ()) == (("w1",), ("w2",), ())
    assert asked(("key-x",), ("key-z",)) == ((), ("w1", "w2"), ())
    assert asked(("key-y", "key-z")) == ((), (), ())
    assert asked(("key-x", "key-new")) == ((), (), ("key-new",))


def test_it_is_said_in_words() -> None:
    manifests, shards = [MANIFEST], [("key-00",), ("key-x",)]
    names = {"key-x": "x"}
    ready = [worker("w1", MANIFEST), worker("w2", MANIFEST)]

    def said(workers: list[WorkerRecord], kinds: list[tuple[str, ...]]) -> str:
        return able(manifests, workers, kinds, MANIFEST.base_id).in_words(names)

    assert said(ready, shards[:1]) == "2 workers could run all of it: w1, w2"
    assert said(ready[:1], shards) == "1 worker could run part of it: w1; none serves `x`"
    assert said(ready, shards[1:]) == "none of 2 workers that are running could run it yet; none serves `x`"
    assert said([], shards) == "no worker is running yet that could run it"


FILES = {"a.json": b"one", "b.txt": b"two"}
NAMED = {name: hashlib.sha256(content).hexdigest() for name, content in FILES.items()}
CONTENT = {NAMED[name]: content for name, content in FILES.items()}


def test_tokenizer_files_are_fetched_once(tmp_path: Path) -> None:
    folder = tokenizer_folder(NAMED, CONTENT.__getitem__, tmp_path)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == FILES
    assert tokenizer_folder(NAMED, {}.__getitem__, tmp_path) == folder
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("damage", ["changed", "missing", "more"])
def test_a_damaged_cache_is_made_again(tmp_path: Path, damage: str) -> None:
    folder = tokenizer_folder(NAMED, CONTENT.__getitem__, tmp_path)
    if damage == "missing":
        (folder / "a.json").unlink()
    else:
        (folder / {"changed": "a.json", "more": "c.json"}[damage]).write_bytes(b"other")
    folder = tokenizer_folder(NAMED, CONTENT.__getitem__, tmp_path)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == FILES
    assert list(tmp_path.iterdir()) == [folder]


def test_many_may_make_it_at_once(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        made = set(pool.map(lambda _: tokenizer_folder(NAMED, CONTENT.__getitem__, tmp_path), range(40)))
    (folder,) = made
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == FILES
    assert list(tmp_path.iterdir()) == [folder]


def test_a_blob_that_is_not_what_its_hash_says_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"a\.json is not what its hash"):
        tokenizer_folder(NAMED, lambda digest: b"else", tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["../x", "/x", "..", "", "a/b"])
def test_files_stay_inside_the_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(StoreError, match="no file's name"):
        tokenizer_folder({name: NAMED["a.json"]}, CONTENT.__getitem__, tmp_path)


def test_a_cache_that_cannot_be_written_says_what_moves_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setitem(os.environ, "XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(Failure, match="XDG_CACHE_HOME moves it"):
        tokenizer_folder(NAMED, CONTENT.__getitem__)
