from __future__ import annotations

from pathlib import Path

import pytest

from headwater.core.cache import atomic_path, atomic_write_bytes, atomic_write_text, cache_dir


def test_property_cache_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("HEADWATER_CACHE", str(tmp_path / "here"))
    assert cache_dir("a", "b") == tmp_path / "here" / "a" / "b"
    assert cache_dir("a", "b").is_dir()


def test_property_cache_defaults_to_home(monkeypatch, tmp_path):
    monkeypatch.delenv("HEADWATER_CACHE", raising=False)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert cache_dir() == tmp_path / ".cache" / "headwater"


@pytest.mark.parametrize("part", ["..", "", "a/b", "/etc"])
def test_rejects_a_part_that_leaves_the_cache(monkeypatch, tmp_path, part):
    monkeypatch.setenv("HEADWATER_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match="one plain name"):
        cache_dir(part)


def test_property_written_whole_and_nothing_else_left(tmp_path):
    atomic_write_bytes(tmp_path / "new" / "x", b"\x00\xff")
    atomic_write_text(tmp_path / "new" / "x", "héllo")
    assert (tmp_path / "new" / "x").read_text(encoding="utf-8") == "héllo"
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["x"]


def test_fault_old_content_survives_a_failed_write(tmp_path):
    atomic_write_text(tmp_path / "x", "old")

    def fail_half_way():
        with atomic_path(tmp_path / "x") as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_half_way()
    assert (tmp_path / "x").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_fault_reader_never_sees_a_partial_file(tmp_path):
    with atomic_path(tmp_path / "x") as temporary:
        temporary.write_text("half")
        assert not (tmp_path / "x").exists()
    assert (tmp_path / "x").read_text() == "half"
