from __future__ import annotations

import json
import shutil

import pytest
import torch

from headwater.core.checkpoint import CheckpointError, CheckpointStore

TENSORS = {
    "model/layer.weight": torch.arange(6.0).reshape(2, 3),
    "model/half": torch.ones(3, dtype=torch.bfloat16),
    "optimizer/model.layer.weight/step": torch.tensor(3.0),
}


@pytest.fixture
def store(tmp_path):
    return CheckpointStore(tmp_path / "runs", fingerprint="abc")


def test_oracle_what_is_read_is_what_was_written(store):
    path = store.save(40, TENSORS, {"seconds": 0.1 + 0.2, "nested": [1, {"a": None}]})
    saved = store.latest()
    assert (saved.step, saved.path, saved.state) == (40, path, {"seconds": 0.1 + 0.2, "nested": [1, {"a": None}]})
    assert saved.tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert saved.tensors[name].dtype == tensor.dtype
        assert torch.equal(saved.tensors[name], tensor)
    assert sorted(file.name for file in path.iterdir()) == [
        "manifest.json", "model.safetensors", "optimizer.safetensors", "state.json",
    ]  # fmt: skip


def test_property_views_and_transposes_are_stored_by_value(store):
    base = torch.arange(6.0).reshape(2, 3)
    store.save(1, {"model/t": base.T, "model/row": base[1]}, {})
    assert torch.equal(store.latest().tensors["model/t"], base.T)
    assert torch.equal(store.latest().tensors["model/row"], base[1])


def test_property_the_newest_are_kept(store):
    for step in (5, 10, 100):
        store.save(step, TENSORS, {})
    assert sorted(path.name for path in store.directory.iterdir()) == ["step-00000010", "step-00000100"]
    assert store.latest().step == store.newest_step() == 100


def test_property_saving_a_step_again_replaces_it(store):
    store.save(5, TENSORS, {"n": 1})
    store.save(5, TENSORS, {"n": 2})
    assert store.latest().state == {"n": 2}
    assert len(list(store.directory.iterdir())) == 1


def test_degenerate_no_directory_and_no_tensors(store):
    assert store.latest() is None
    assert store.newest_step() is None
    store.save(0, {}, {})
    assert store.latest().tensors == {}


def test_degenerate_an_interrupted_first_write_is_nothing(store):
    store.save(5, TENSORS, {})
    (store.directory / "step-00000005").rename(store.directory / ".writing-step-00000005")
    assert store.latest() is None
    store.save(5, TENSORS, {})
    assert [path.name for path in store.directory.iterdir()] == ["step-00000005"]


def test_fault_partial_ones_are_passed_over(store):
    store.save(5, TENSORS, {})
    store.save(10, TENSORS, {})
    (store.directory / "step-00000010/manifest.json").unlink()
    assert store.latest().step == 5


def test_rejects_a_directory_with_partial_ones_only(store):
    for step in (40, 80):
        store.save(step, TENSORS, {})
        (store.directory / f"step-{step:08d}/manifest.json").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"no complete checkpoint in .*runs \(2 partial: step 40, step 80\)\. Give another"
    ):
        store.latest()


def test_fault_every_flipped_bit_of_every_file_is_refused(store):
    path = store.save(5, TENSORS, {"seconds": 1.5})
    for file in sorted(path.iterdir()):
        content = file.read_bytes()
        stride = (
            1 if file.name == "manifest.json" else 7
        )  # the manifest vouches for the others and is tried byte by byte
        for position in range(0, len(content), stride):
            damaged = bytearray(content)
            damaged[position] ^= 1 << position % 8
            file.write_bytes(damaged)
            with pytest.raises(CheckpointError, match=file.name):
                store.latest()
        file.write_bytes(content)
    assert store.latest().step == 5


@pytest.mark.parametrize("name", ["model.safetensors", "state.json"])
def test_fault_a_missing_or_truncated_file_is_refused(store, name):
    path = store.save(5, TENSORS, {})
    (path / name).write_bytes((path / name).read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=name):
        store.latest()
    (path / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        store.latest()


def test_rejects_other_data(store):
    store.save(5, TENSORS, {})
    with pytest.raises(CheckpointError, match=r"the data changed under .* it was 'abc', it is now 'xyz'"):
        CheckpointStore(store.directory, fingerprint="xyz").latest()


def test_rejects_a_name_without_a_group_before_writing_anything(store):
    for name in ("weight", "../evil/weight", "/weight"):
        with pytest.raises(ValueError, match="group/name"):
            store.save(1, {name: torch.ones(1)}, {})
    assert not store.directory.exists()


def test_rejects_a_state_that_is_not_json_and_leaves_no_checkpoint(store):
    with pytest.raises(ValueError, match="JSON"):
        store.save(1, {}, {"loss": float("nan")})
    assert store.latest() is None


def test_property_no_pickle_is_written(store):
    path = store.save(5, TENSORS, {})
    assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json"}
    json.loads((path / "manifest.json").read_text())
    shutil.rmtree(path)
