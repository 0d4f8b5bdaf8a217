"""The artifact cache: whole and right, or not there."""

import hashlib
from pathlib import Path

import pytest

from fedzo.cache import ArtifactCache, cache_directory
from fedzo.errors import ProtocolError, RunError

DATA = bytes(range(256)) * 4
NAME = hashlib.sha256(DATA).hexdigest()


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_an_artifact_comes_in_parts_and_stays(tmp_path: Path) -> None:
    cache = ArtifactCache(tmp_path)
    assert cache.get(NAME) is None
    assert cache.receive(NAME, "1", 0, DATA[:1000], len(DATA)) == 1000
    assert cache.get(NAME) is None
    assert cache.receive(NAME, "2", 0, DATA[:10], len(DATA)) == 10  # another client of this machine, at the same time
    assert cache.receive(NAME, "1", 1000, DATA[1000:], len(DATA)) == 1024
    assert cache.get(NAME) == ArtifactCache(tmp_path).get(NAME) == DATA
    assert cache.receive(NAME, "2", 0, DATA, len(DATA)) == 1024  # started over
    cache.receive(NAME, "3", 0, DATA[:10], len(DATA))
    cache.discard(NAME, "3")
    assert files(tmp_path) == [NAME]


def test_wrong_bytes_are_not_kept(tmp_path: Path) -> None:
    cache = ArtifactCache(tmp_path)
    with pytest.raises(ProtocolError, match=f"sent as {NAME[:12]} has the hash"):
        cache.receive(NAME, "1", 0, DATA[:-1] + b"x", len(DATA))
    for offset, part in ((5, DATA[5:]), (0, DATA + b"x"), (0, b"")):
        with pytest.raises(ProtocolError, match="does not follow"):
            cache.receive(NAME, "1", offset, part, len(DATA))
    cache.receive(NAME, "1", 0, DATA[:9], len(DATA))
    with pytest.raises(ProtocolError, match="at 10 does not follow the 9 bytes"):
        cache.receive(NAME, "1", 10, DATA[10:], len(DATA))
    assert cache.get(NAME) is None and files(tmp_path) == []


def test_a_damaged_file_is_as_good_as_none(tmp_path: Path) -> None:
    cache = ArtifactCache(tmp_path)
    cache.receive(NAME, "1", 0, DATA, len(DATA))
    (tmp_path / "artifacts" / NAME).write_bytes(DATA[:-1])
    assert cache.get(NAME) is None
    cache.receive(NAME, "1", 0, DATA, len(DATA))
    assert cache.get(NAME) == DATA


@pytest.mark.parametrize("name", ["../../etc/passwd", "", "A" * 64, NAME + "\n", NAME[:-1] + "/"])
def test_a_name_is_never_a_path(tmp_path: Path, name: str) -> None:
    for call in (
        lambda: ArtifactCache(tmp_path).get(name),
        lambda: ArtifactCache(tmp_path).receive(name, "1", 0, b"", 0),
    ):
        with pytest.raises(ProtocolError, match="no SHA-256"):
            call()


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"cannot write the cache .*FEDZO_CACHE"):
        ArtifactCache(tmp_path / "file").receive(NAME, "1", 0, DATA, len(DATA))


def test_where_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("FEDZO_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_directory() == tmp_path / ".cache" / "fedzo"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_directory() == Path("/x/fedzo")
    monkeypatch.setenv("FEDZO_CACHE", "/own")
    assert cache_directory() == Path("/own")
