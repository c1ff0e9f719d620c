"""What work took, and the journal it is kept in."""

import json
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from optimizer import costs, journal
from optimizer.costs import Work, extent, measured, recorded
from optimizer.store import Store
from passes.base import ONNX, TORCH, Model

MIB = 1 << 20
FUSION = Work("fuse_toy", bytes=1000, parameters=500, layers=3)


def work(what: str) -> Work:
    return Work(what, 0, 1, 0)


def test_work_is_remembered_with_its_seconds(tmp_path: Path) -> None:
    with measured(tmp_path, FUSION, threads=2) as spent:
        pass
    (cost,) = recorded(tmp_path, threads=2)
    assert (cost.work, cost.seconds) == (FUSION, spent.seconds)
    assert 0 <= spent.seconds < 5


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of memory can be set back on Linux only")
def test_peak_is_of_the_block_alone(tmp_path: Path) -> None:
    before = np.ones(200 * MIB, np.uint8)  # an earlier, higher peak
    del before
    with measured(tmp_path, work("small"), threads=1) as small:
        pass
    with measured(tmp_path, work("large"), threads=1) as large:
        assert np.ones(100 * MIB, np.uint8).any()
    assert large.peak_bytes - small.peak_bytes == pytest.approx(100 * MIB, abs=20 * MIB)


def test_work_that_fails_or_was_half_done_before_is_not_remembered(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), measured(tmp_path, work("a"), threads=1):
        raise ZeroDivisionError
    with measured(tmp_path, work("b"), threads=1, keep=False):
        pass
    with measured(tmp_path, Work("of an artifact", 1, 0, 0), threads=1):
        pass
    assert recorded(tmp_path, 1) == []


def test_extent_of_a_model_is_read_from_its_headers(tmp_path: Path) -> None:
    save_file({"a": np.ones((3, 4), np.float16), "b": np.ones(5, np.float32)}, tmp_path / "model.safetensors")
    for config in ({"num_hidden_layers": 6}, {"n_layer": 6}, {"text_config": {"num_hidden_layers": 6}, "n_layer": 2}):
        assert extent(Model(TORCH, tmp_path, tmp_path, config)) == (17, 6)
    assert extent(Model(TORCH, tmp_path, tmp_path, {})) == (17, 1)
    assert extent(Model(ONNX, tmp_path, tmp_path, {"n_layer": 6})) == (0, 6)


def test_other_machines_and_other_threads_tell_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with measured(tmp_path, work("a"), threads=1):
        pass
    assert recorded(tmp_path, 2) == []
    monkeypatch.setattr(costs, "host", lambda: "another processor x 64")
    assert recorded(tmp_path, 1) == []


def test_damaged_lines_are_passed_over(tmp_path: Path) -> None:
    with measured(tmp_path, work("a"), threads=1):
        pass
    path = tmp_path / costs.NAME
    path.write_bytes(b'\xff{"half": \n[1]\n{"other": 1}\n' + path.read_bytes() + b'{"cut')
    assert [cost.work.what for cost in recorded(tmp_path, 1)] == ["a"]


def test_writers_at_once_lose_no_line(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"

    def write(number: int) -> None:
        for index in range(50):
            journal.append(path, {"writer": number, "index": index})

    writers = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    found = [(record["writer"], record["index"]) for record in journal.read(path)]
    assert sorted(found) == [(number, index) for number in range(4) for index in range(50)]


def test_journal_drops_its_older_half_when_it_is_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "MOST_BYTES", 1000)
    for index in range(1000):
        journal.append(tmp_path / "j.jsonl", {"index": index})
    kept = [record["index"] for record in journal.read(tmp_path / "j.jsonl")]
    assert kept == list(range(kept[0], 1000))
    assert len(kept) > 30
    assert (tmp_path / "j.jsonl").stat().st_size < 2000


def test_store_that_cannot_be_written_to_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    journal.append(tmp_path / "file" / "j.jsonl", {"a": 1})
    assert list(journal.read(tmp_path / "file" / "j.jsonl")) == []


def test_clean_of_everything_removes_the_journals(tmp_path: Path) -> None:
    journal.append(tmp_path / costs.NAME, {"a": 1})
    with Store(tmp_path) as store:
        store.clean(older_than_days=1)
        assert json.loads((tmp_path / costs.NAME).read_text()) == {"a": 1}
        store.clean(everything=True)
    assert not (tmp_path / costs.NAME).exists()
