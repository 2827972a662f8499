"""Keys in their file, and the command that writes it."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from loramill.producer.api import keys as module
from loramill.producer.api.context import Caller
from loramill.producer.api.keys import Key, Keys, KeysUnreadable, hash_of, new_token, read_keys, write_keys
from loramill.producer.cli import main
from loramill.schemas.failures import ExitCode


class Ended:
    """How `loramill keys ...` ended."""

    def __init__(self, capsys: pytest.CaptureFixture[str], *arguments: object) -> None:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(["keys", *map(str, arguments)])
        self.code = ended.value.code
        self.out, self.err = capsys.readouterr()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.toml"


@pytest.fixture(autouse=True)
def looks_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOK_S", 0.0)


def test_without_a_file_everybody_is_the_same() -> None:
    keys = Keys()
    assert keys.open
    assert keys.caller(None) == keys.caller("anything") == Caller("", True)
    assert keys.named("") is None


def test_a_key_is_made_used_and_removed(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = Ended(capsys, "new", "ann", "--keys", file, "--adapters", "sql-*", "--stored-bytes", "2GiB")
    assert made.code == ExitCode.OK
    token = made.out.strip()
    assert token.startswith("lm-") and len(token) == 46
    assert token not in file.read_text() and stat.S_IMODE(file.stat().st_mode) == 0o600
    keys = Keys(file)
    ann = keys.caller(token)
    assert ann is not None and (ann.name, ann.operator, ann.quota.stored_bytes) == ("ann", False, 2**31)
    assert ann.may_use("sql-1") and not ann.may_use("other")
    for wrong in (None, "", token[:-1], token + "x", token.upper(), hash_of(token), "é", "ann"):
        assert keys.caller(wrong) is None
    other = Ended(capsys, "new", "op", "--keys", file, "--operator", "--questions", 0).out.strip()
    op = keys.caller(other)
    assert op is not None and op.operator and op.quota.questions == 0
    assert keys.caller(token) == ann
    listed = Ended(capsys, "list", "--keys", file)
    assert listed.out.splitlines() == ["ann adapters=sql-* stored_bytes=2147483648", "op operator questions=0"]
    assert Ended(capsys, "remove", "ann", "--keys", file).code == ExitCode.OK
    assert keys.caller(token) is None and keys.caller(other) == op
    assert not keys.open


def test_a_key_with_a_webhook(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = Ended(capsys, "new", "ann", "--keys", file, "--webhook-url", "https://example.com/hook")
    token, secret = made.out.split()
    endpoint = read_keys(file)["ann"].endpoint
    assert endpoint is not None and (endpoint.url, endpoint.secret) == ("https://example.com/hook", secret)
    assert secret.startswith("whsec_")
    shown = Ended(capsys, "list", "--keys", file).out
    assert secret not in shown and hash_of(token) not in shown


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("new", "a/b"), ExitCode.USAGE, "no key's name"),
        (("new", ""), ExitCode.USAGE, "no key's name"),
        (("new", "x" * 65), ExitCode.USAGE, "no key's name"),
        (("new", "old"), ExitCode.USAGE, "there is a key 'old'"),
        (("new", "ann", "--requests-per-minute", "0"), ExitCode.USAGE, "0 is not in the range"),
        (("new", "ann", "--webhook-url", "ftp://x"), ExitCode.USAGE, "https://"),
        (("remove", "nobody"), ExitCode.NOT_FOUND, "no key 'nobody'"),
    ],
)
def test_what_cannot_be_meant(
    file: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], code: int, said: str
) -> None:
    write_keys(file, {"old": Key(sha256="0" * 64)})
    ended = Ended(capsys, *arguments, "--keys", file)
    assert (ended.code, ended.out) == (code, "") and said in ended.err and "Traceback" not in ended.err
    assert list(read_keys(file)) == ["old"]


def test_a_folder_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ended = Ended(capsys, "new", "ann", "--keys", tmp_path / "none" / "keys.toml")
    assert (ended.code, ended.out) == (ExitCode.MACHINE, "") and "cannot write" in ended.err


@pytest.mark.parametrize(
    "text",
    [
        "no toml [",
        "[keys.a]",
        "[keys.a]\nsha256 = 'short'",
        f"[keys.a]\nsha256 = '{'0' * 64}'\nunknown = 1",
        f"[keys.a]\nsha256 = '{'0' * 64}'\noperator = 'yes'",
        f"[keys.a]\nsha256 = '{'0' * 64}'\nopen_batches = -1",
        f"[keys.a]\nsha256 = '{'0' * 64}'\nwebhook_url = 'https://example.com'",
        f"[keys.'a b']\nsha256 = '{'0' * 64}'",
        "other = 1",
        "\udcff",
    ],
)
def test_a_broken_file(
    file: Path, text: str, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    token = new_token()
    write_keys(file, {"ann": Key(sha256=hash_of(token))})
    keys = Keys(file)
    file.write_bytes(text.encode(errors="surrogateescape"))
    # It changes nothing for a server that runs, which says so once; and none starts with it.
    for _ in range(3):
        assert keys.caller(token) is not None and keys.caller("x") is None
    assert [record.levelname for record in caplog.records if "go on" in record.message] == ["ERROR"]
    assert str(file) in caplog.messages[-1] and "\n" not in caplog.messages[-1]
    with pytest.raises(KeysUnreadable, match=r"keys\.toml"):
        Keys(file)
    assert Ended(capsys, "new", "bob", "--keys", file).code == ExitCode.INPUT
    write_keys(file, {"bob": Key(sha256=hash_of(token))})
    bob = keys.caller(token)
    assert bob is not None and bob.name == "bob"


def test_a_file_that_is_not_there_lets_nobody_in(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    keys = Keys(file)
    assert not keys.open and keys.caller(None) is None and keys.caller("x") is None
    assert len([message for message in caplog.messages if "is not there" in message]) == 1
    token = new_token()
    write_keys(file, {"ann": Key(sha256=hash_of(token))})
    assert keys.caller(token) is not None
    file.unlink()
    assert keys.caller(token) is None and not keys.open


def test_a_file_that_others_can_read(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_keys(file, {})
    Keys(file)
    assert caplog.messages == []
    file.chmod(0o644)
    Keys(file)
    assert [message for message in caplog.messages if "can be read by others" in message]


def test_the_process_keeps_its_umask(file: Path) -> None:
    before = os.umask(0o022)
    try:
        write_keys(file, {})
        assert os.umask(0o022) == 0o022
    finally:
        os.umask(before)
