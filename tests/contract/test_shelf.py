"""What is kept beside jobs: records, contents, locks and channels."""

import os
import threading

import pytest

from loramill.store.errors import StoreError
from loramill.store.part_files import Files
from loramill.store.shelf import (
    PIECE_BYTES,
    Record,
    RecordChanged,
    RecordExists,
    RecordNotFound,
    Shelf,
    Usage,
)
from tests.contract.places import ModelPlace, Place


def ids(records: list[Record]) -> list[str]:
    return [record.id for record in records]


# Records.


def test_a_record_is_what_was_put(place: Place) -> None:
    with place.open() as store:
        put = store.shelf.put("file", "f", "me", b'{"a":"\xc3\xa9\\u0000"}\x00\xff', size=7, ttl_s=1.5)
        now_ms = place.clock.now_ms
        assert put == Record(
            "file", "f", "me", b'{"a":"\xc3\xa9\\u0000"}\x00\xff', 7, put.version, now_ms, now_ms + 1500
        )
        assert store.shelf.get("file", "f") == put
        assert store.shelf.records("file") == [put]
        assert store.shelf.put("batch", "f", "", b"").expires_ms is None, "another kind is another record"
        with pytest.raises(RecordExists, match="file f"):
            store.shelf.put("file", "f", "another", b"")
        assert store.shelf.get("file", "f") == put
        with pytest.raises(RecordNotFound, match="file g"):
            store.shelf.get("file", "g")


def test_names_may_look_like_each_other(place: Place) -> None:
    """An owner may be nobody, and owners and ids may have in them what separates a key's parts."""
    with place.open() as store:
        owners = ("", ":", "a", "a:b", "*", "ä")
        for owner in owners:
            store.shelf.put("adapter", f"b:{owner}", owner, b"1", size=1)
            store.shelf.put("adapter", owner or "nobody's", owner, b"2", size=2)
        for owner in owners:
            assert ids(store.shelf.records("adapter", owner)) == [owner or "nobody's", f"b:{owner}"]
            assert store.shelf.usage("adapter", owner) == Usage(2, 3)
            assert store.shelf.get("adapter", f"b:{owner}").owner == owner
        assert len(store.shelf.records("adapter", limit=99)) == 12


def test_records_are_listed_by_age_both_ways_page_by_page(place: Place) -> None:
    with place.open() as store:
        made = [f"f{number * 7919 % 1000:03}" for number in range(45)]
        for number, name in enumerate(made):
            store.shelf.put("file", name, "me" if number % 3 else "you", b"")
        mine = [name for number, name in enumerate(made) if number % 3]
        for owner, all_of_them in (("me", mine), (None, made)):
            for oldest_first in (False, True):
                expected = all_of_them if oldest_first else all_of_them[::-1]
                found: list[str] = []
                while page := store.shelf.records(
                    "file", owner, after=found[-1] if found else None, limit=7, oldest_first=oldest_first
                ):
                    assert len(page) == min(7, len(expected) - len(found))
                    found += ids(page)
                assert found == expected
        assert store.shelf.records("file", "nobody") == store.shelf.records("batch") == []


def test_a_list_after_what_is_not_there_is_refused(place: Place) -> None:
    with place.open() as store:
        store.shelf.put("file", "yours", "you", b"")
        store.shelf.put("file", "late", "me", b"", ttl_s=1.0)
        place.clock.advance(2)
        for kind, owner, after in (
            ("file", "me", "yours"),
            ("file", "me", "never"),
            ("file", None, "never"),
            ("file", "me", "late"),
            ("file", None, "late"),
            ("batch", "you", "yours"),
        ):
            with pytest.raises(RecordNotFound, match=after):
                store.shelf.records(kind, owner, after=after)


def test_a_change_keeps_what_it_does_not_say(place: Place) -> None:
    with place.open() as store:
        put = store.shelf.put("batch", "b", "me", b"1", size=5, ttl_s=10.0)
        store.shelf.put("batch", "c", "me", b"1")
        place.clock.advance(1)
        changed = store.shelf.replace(put, b"2")
        assert changed == Record("batch", "b", "me", b"2", 5, changed.version, put.created_ms, None)
        assert changed.version > put.version
        again = store.shelf.replace(changed, b"3", size=0, ttl_s=3.0)
        assert (again.size, again.expires_ms) == (0, place.clock.now_ms + 3000)
        assert store.shelf.get("batch", "b") == again
        assert ids(store.shelf.records("batch")) == ["c", "b"], "in the order in which they were created"


def test_a_change_of_what_was_changed_is_refused(place: Place) -> None:
    with place.open() as store:
        put = store.shelf.put("batch", "b", "me", b"1")
        changed = store.shelf.replace(put, b"2")
        with pytest.raises(RecordChanged, match="batch b"):
            store.shelf.replace(put, b"3")
        assert store.shelf.get("batch", "b") == changed
        assert store.shelf.remove("batch", "b")
        with pytest.raises(RecordNotFound, match="batch b"):
            store.shelf.replace(changed, b"3")
        store.shelf.put("batch", "b", "me", b"new")
        for old in (put, changed):
            with pytest.raises(RecordChanged):
                store.shelf.replace(old, b"3")
        assert store.shelf.get("batch", "b").data == b"new", "another of that name is not the one that was read"


def test_of_changes_at_once_none_is_lost(place: Place) -> None:
    if isinstance(place, ModelPlace):
        return  # one thread only
    refused: list[int] = []
    problems: list[BaseException] = []

    def count(shelf: Shelf) -> None:
        try:
            for _ in range(20):
                while True:
                    record = shelf.get("batch", "b")
                    try:
                        shelf.replace(record, b"%d" % (int(record.data) + 1), size=record.size + 2)
                        break
                    except RecordChanged:
                        refused.append(record.version)
        except BaseException as error:
            problems.append(error)

    with place.open() as one, place.open() as two:
        one.shelf.put("batch", "b", "me", b"0")
        threads = [threading.Thread(target=count, args=(store.shelf,)) for store in (one, two, two)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert problems == []
        assert one.shelf.get("batch", "b").data == b"60"
        assert one.shelf.usage("batch", "me") == Usage(1, 120)
        assert len(set(refused)) <= 60


def test_a_record_whose_time_is_up_is_not_there_and_can_be_removed(place: Place) -> None:
    with place.open() as store:
        late = store.shelf.put("file", "late", "me", b"1", size=5, ttl_s=10.0)
        later = store.shelf.put("file", "later", "me", b"2", ttl_s=20.0)
        stays = store.shelf.put("file", "stays", "me", b"3")
        place.clock.advance(9.999)
        assert store.shelf.get("file", "late") == late and store.shelf.overdue("file") == []
        place.clock.advance(0.001)
        with pytest.raises(RecordNotFound):
            store.shelf.get("file", "late")
        with pytest.raises(RecordNotFound):
            store.shelf.replace(late, b"saved")
        with pytest.raises(RecordExists):
            store.shelf.put("file", "late", "me", b"")
        assert store.shelf.records("file") == [stays, later]
        assert store.shelf.overdue("file") == [late]
        assert store.shelf.overdue("batch") == []
        place.clock.advance(10)
        assert store.shelf.overdue("file") == [late, later], "the longest overdue first"
        assert store.shelf.overdue("file", limit=1) == [late]
        assert store.shelf.remove("file", "late")
        assert not store.shelf.remove("file", "late")
        assert store.shelf.overdue("file") == [later]
        store.shelf.put("file", "late", "you", b"")
        assert ids(store.shelf.records("file")) == ["late", "stays"]


def test_what_is_overdue_does_not_shorten_a_page(place: Place) -> None:
    with place.open() as store:
        for number in range(30):
            store.shelf.put("file", f"f{number:02}", "me", b"", ttl_s=None if number % 10 == 0 else 1.0)
        place.clock.advance(2)
        assert ids(store.shelf.records("file", "me", limit=3)) == ["f20", "f10", "f00"]
        assert ids(store.shelf.records("file", limit=2, oldest_first=True)) == ["f00", "f10"]
        assert ids(store.shelf.records("file", after="f20", limit=1)) == ["f10"]


def test_a_time_to_live_can_be_put_off_and_lifted(place: Place) -> None:
    with place.open() as store:
        record = store.shelf.put("file", "f", "me", b"", size=1, ttl_s=10.0)
        for _ in range(3):
            place.clock.advance(9)
            record = store.shelf.replace(record, b"", ttl_s=10.0)
        store.shelf.replace(record, b"done")
        place.clock.advance(10_000)
        assert store.shelf.get("file", "f").data == b"done"
        assert store.shelf.overdue("file") == []
        assert store.shelf.usage("file", "me") == Usage(1, 1)


def test_usage_is_of_what_is_there(place: Place) -> None:
    with place.open() as store:
        shelf = store.shelf
        assert shelf.usage("file", "me") == Usage()
        a = shelf.put("file", "a", "me", b"", size=2**40)
        b = shelf.put("file", "b", "me", b"", size=5, ttl_s=10.0)
        shelf.put("file", "c", "you", b"", size=100)
        shelf.put("batch", "d", "me", b"", size=1000)
        assert shelf.usage("file", "me") == Usage(2, 2**40 + 5)
        shelf.replace(a, b"", size=3)
        b = shelf.replace(b, b"", size=9, ttl_s=10.0)
        assert shelf.usage("file", "me") == Usage(2, 12)
        b = shelf.replace(b, b"", ttl_s=5.0)
        assert shelf.usage("file", "me") == Usage(2, 12)
        place.clock.advance(5)
        assert shelf.usage("file", "me") == Usage(1, 3), "its time is up, though nobody has removed it"
        assert shelf.usage("file", "you") == Usage(1, 100)
        shelf.remove("file", "b")
        assert shelf.usage("file", "me") == Usage(1, 3)
        shelf.remove("file", "b")
        shelf.remove("file", "a")
        assert shelf.usage("file", "me") == Usage()
        assert shelf.usage("batch", "me") == Usage(1, 1000)


def test_a_record_is_there_for_another_handle(place: Place) -> None:
    with place.open() as one, place.open() as two:
        put = one.shelf.put("file", "f", "me", b"1")
        changed = two.shelf.replace(two.shelf.get("file", "f"), b"2")
        with pytest.raises(RecordChanged):
            one.shelf.replace(put, b"3")
        assert one.shelf.get("file", "f") == changed


# Contents.


def files_of(place: Place) -> list[str]:
    """The part files that there are."""
    if place.files is None:
        return []
    files = Files(place.files)
    return sorted(files._system.find(files._root))


def test_a_content_is_its_pieces(place: Place) -> None:
    with place.open() as store, place.open() as other:
        pieces = [os.urandom(PIECE_BYTES), b"\0" * PIECE_BYTES, b"", b"end"]
        for number in (2, 0, 3, 1):
            store.shelf.put_piece("file-1", number, pieces[number])
        store.shelf.put_piece("file-12", 0, b"another")
        assert [other.shelf.piece("file-1", number) for number in range(4)] == pieces
        for content, number in (("file-1", 4), ("file-2", 0)):
            with pytest.raises(StoreError, match=content):
                store.shelf.piece(content, number)
        assert len(files_of(place)) == (5 if place.files else 0)


def test_a_piece_that_is_put_again_replaces_it(place: Place) -> None:
    with place.open() as store:
        for data in (b"first", b"first", b"second"):
            store.shelf.put_piece("c", 0, data)
        assert store.shelf.piece("c", 0) == b"second"


def test_a_removed_content_leaves_nothing(place: Place) -> None:
    with place.open() as store:
        for content in ("gone", "stays"):
            for number in range(3):
                store.shelf.put_piece(content, number, b"x")
        store.shelf.remove_content("gone")
        store.shelf.remove_content("gone")
        store.shelf.remove_content("never")
        with pytest.raises(StoreError, match="gone"):
            store.shelf.piece("gone", 0)
        assert store.shelf.piece("stays", 2) == b"x"
        left = files_of(place)
        assert len(left) == (3 if place.files else 0)
        assert all("stays" in name for name in left)


# Locks.


def test_a_lock_is_one_holders_until_its_time_is_up(place: Place) -> None:
    with place.open() as store, place.open() as other:
        assert store.shelf.lock("l", "me", 10.0)
        assert not other.shelf.lock("l", "you", 10.0)
        assert other.shelf.lock("another", "you", 10.0)
        place.clock.advance(9.999)
        assert not other.shelf.lock("l", "you", 10.0)
        place.clock.advance(0.001)
        assert other.shelf.lock("l", "you", 10.0), "it had run out"
        assert not store.shelf.lock("l", "me", 10.0)


def test_a_lock_is_renewed_by_its_holder(place: Place) -> None:
    with place.open() as store:
        for _ in range(3):
            assert store.shelf.lock("l", "me", 10.0)
            place.clock.advance(9)
            assert not store.shelf.lock("l", "you", 10.0)
        assert store.shelf.lock("l", "me", 1.0), "also for less"
        place.clock.advance(1)
        assert store.shelf.lock("l", "you", 10.0)


def test_only_its_holder_lets_go_of_a_lock(place: Place) -> None:
    with place.open() as store:
        store.shelf.lock("l", "me", 10.0)
        store.shelf.unlock("l", "you")
        assert not store.shelf.lock("l", "you", 10.0)
        store.shelf.unlock("l", "me")
        store.shelf.unlock("l", "me")
        store.shelf.unlock("never", "me")
        assert store.shelf.lock("l", "you", 10.0)


def test_of_many_who_want_a_lock_one_gets_it(place: Place) -> None:
    if isinstance(place, ModelPlace):
        return  # one thread only
    got: list[str] = []

    def want(shelf: Shelf, name: str) -> None:
        if shelf.lock("l", name, 60.0):
            got.append(name)

    with place.open() as one, place.open() as two:
        threads = [
            threading.Thread(target=want, args=(store.shelf, f"t{at}")) for at in range(6) for store in (one, two)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(set(got)) == 1


# Channels.


def test_a_channel_is_heard_in_order_from_where_one_is(place: Place) -> None:
    with place.open() as speaker, place.open() as listener:
        said = [b'{"a":1}', b"", b"\n\0\xff" * 5000, b"4", b"5"]
        assert listener.shelf.heard("c") == []
        heard: list[bytes] = []
        for number, one in enumerate(said):
            speaker.shelf.say("c", one)
            if number != 2:
                heard += listener.shelf.heard("c", len(heard))
        assert heard == said
        assert listener.shelf.heard("c", 5) == listener.shelf.heard("c", 9) == []
        assert listener.shelf.heard("c", 3) == [b"4", b"5"], "who lost his place may hear it again"
        assert speaker.shelf.heard("c") == said
        speaker.shelf.say("c:2", b"x")
        assert listener.shelf.heard("c:2") == [b"x"] and listener.shelf.heard("d") == []


def test_nothing_of_what_many_say_at_once_is_lost(place: Place) -> None:
    if isinstance(place, ModelPlace):
        return  # one thread only
    with place.open() as one, place.open() as two:

        def speak(shelf: Shelf, name: bytes) -> None:
            for number in range(50):
                shelf.say("c", b"%s %d" % (name, number))

        threads = [
            threading.Thread(target=speak, args=(store.shelf, name)) for store, name in ((one, b"a"), (two, b"b"))
        ]
        heard: list[bytes] = []
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            heard += one.shelf.heard("c", len(heard))
        heard += one.shelf.heard("c", len(heard))
        assert heard == two.shelf.heard("c")
        for name in (b"a", b"b"):
            assert [one for one in heard if one.startswith(name)] == [b"%s %d" % (name, number) for number in range(50)]
        assert len(heard) == 100
