from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from headwater.compose.graft import Mask, Patch, digest, join_patches, merge_masks, overlap, top_entries


def tensors(**values: list[float]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(value) for name, value in values.items()}


def mask(**places: list[int]) -> Mask:
    """Over tensors a and b of six entries."""
    return Mask({n: torch.tensor(p) for n, p in places.items() if p}, {"a": (2, 3), "b": (6,)})


def places(marked: dict[str, torch.Tensor]) -> dict[str, list[int]]:
    return {name: values.flatten().nonzero().flatten().tolist() for name, values in marked.items()}


def test_equation_top_entries_with_ties_go_to_the_earlier():
    scores = tensors(a=[1.0, 3.0, 2.0], b=[3.0, -1.0, 3.0])
    assert places(top_entries(scores, 2)) == {"a": [1], "b": [0]}
    assert places(top_entries(scores, 4)) == {"a": [1, 2], "b": [0, 2]}
    assert places(top_entries(scores, 6)) == {"a": [0, 1, 2], "b": [0, 1, 2]}


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.floats(width=32, allow_nan=False), max_size=12), min_size=1, max_size=4),
    st.floats(0, 1),
)
def test_oracle_top_entries_equal_a_stable_sort(values, share):
    scores = {str(i): torch.tensor(v, dtype=torch.float32) for i, v in enumerate(values)}
    flat = np.concatenate([s.numpy() for s in scores.values()])
    count = round(share * len(flat))
    expected = np.zeros(len(flat), dtype=bool)
    expected[np.argsort(-flat, kind="stable")[:count]] = True
    marked = torch.cat(list(top_entries(scores, count).values())).numpy()
    np.testing.assert_array_equal(marked, expected)


def test_oracle_top_entries_of_more_than_one_block():
    generator = torch.Generator().manual_seed(0)
    scores = {"a": torch.randn(1025, 1030, generator=generator), "b": torch.randn(7, generator=generator).round()}
    flat = torch.cat([s.flatten() for s in scores.values()])
    for count in (1, 1_000, len(flat) - 5):
        marked = torch.cat([m.flatten() for m in top_entries(scores, count).values()])
        assert int(marked.sum()) == count
        assert float(flat[marked].min()) == float(flat.sort(descending=True).values[count - 1])


def test_degenerate_top_entries_of_nothing_and_of_equals():
    assert places(top_entries(tensors(a=[1.0, 2.0]), 0)) == {"a": []}
    assert places(top_entries({"e": torch.empty(0, 3), "a": torch.zeros(2, 2)}, 3)) == {"e": [], "a": [0, 1, 2]}
    assert places(top_entries(tensors(a=[0.0, -0.0], b=[-0.0]), 2)) == {"a": [0, 1], "b": []}


def test_rejects_scores_without_an_order():
    with pytest.raises(ValueError, match="1 of 2 tensors of scores hold NaN"):
        top_entries(tensors(a=[1.0, 2.0], b=[float("nan")]), 1)
    with pytest.raises(ValueError, match=r"count must be in \[0, 2\].*got 3"):
        top_entries(tensors(a=[1.0, 2.0]), 3)
    with pytest.raises(TypeError, match=r"'a' is torch.float64"):
        top_entries({"a": torch.zeros(2, dtype=torch.float64)}, 1)


def test_equation_overlap_and_union():
    # a and b share (a, 1) and (b, 5): 2 / min(3, 4); c shares nothing with either.
    masks = {"x": mask(a=[1, 2], b=[5]), "y": mask(a=[1], b=[3, 4, 5]), "z": mask(a=[0])}
    table = overlap(masks)
    assert table.loc["x", "y"] == table.loc["y", "x"] == pytest.approx(2 / 3)
    assert table.loc["x", "z"] == 0
    assert [table.loc[name, name] for name in masks] == [1, 1, 1]
    joined = merge_masks(list(masks.values()))
    assert {name: p.tolist() for name, p in joined.indices.items()} == {"a": [0, 1, 2], "b": [3, 4, 5]}
    assert joined.count == 6
    assert joined.size == 12


def test_property_a_mask_survives_its_dense_form():
    first = mask(a=[0, 5], b=[2])
    again = Mask.of({name: first.dense(name) for name in first.shapes})
    assert again.shapes == first.shapes
    assert all(torch.equal(again.indices[name], p) for name, p in first.indices.items())


def test_rejects_masks_that_cannot_be_compared():
    other = Mask({"a": torch.tensor([0])}, {"a": (2, 3), "c": (6,)})
    with pytest.raises(ValueError, match="over different tensors, among them 'b'"):
        overlap({"x": mask(a=[1]), "y": other})
    with pytest.raises(ValueError, match="'y' is empty"):
        overlap({"x": mask(a=[1]), "y": mask()})
    with pytest.raises(ValueError, match="no masks"):
        merge_masks([])


@pytest.fixture
def models() -> tuple[nn.Module, nn.Module]:
    """A base and another model of its shape."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(torch.randn(parameter.shape))
    return base, tuned


def patch_of(base: nn.Module, tuned: nn.Module, dtype: torch.dtype | None = None, **chosen: list[int]) -> Patch:
    own, other = dict(base.named_parameters()), dict(tuned.named_parameters())
    indices = {name.replace("_", "."): torch.tensor(p) for name, p in (chosen or {"0_weight": [1, 7, 11]}).items()}
    return Patch.of(Mask(indices, {n: tuple(p.shape) for n, p in own.items()}), own, other, dtype)


def test_property_a_patch_gives_the_tuned_values_and_leaves_the_base(models, tmp_path):
    base, tuned = models
    before = digest(dict(base.named_parameters()))
    patch_of(base, tuned, **{"0_weight": [1, 7, 11], "2_bias": [0]}).save(tmp_path / "p.safetensors")
    patched = Patch.open(tmp_path / "p.safetensors").apply(base)
    assert digest(dict(base.named_parameters())) == before
    for name, values in patched.named_parameters():
        chosen = torch.zeros(values.numel(), dtype=torch.bool)
        chosen[{"0.weight": [1, 7, 11], "2.bias": [0]}.get(name, [])] = True
        expected = torch.where(chosen.view_as(values), tuned.get_parameter(name), base.get_parameter(name))
        assert torch.equal(values, expected)


def test_property_a_patch_file_is_plain_and_as_small_as_its_entries(models, tmp_path):
    base, tuned = models
    patch_of(base, tuned).save(tmp_path / "p.safetensors")
    read = load_file(tmp_path / "p.safetensors")
    assert read["indices/0.weight"].dtype == torch.int32
    assert read["indices/0.weight"].tolist() == [1, 7, 11]
    assert torch.equal(read["values/0.weight"], tuned[0].weight.detach().flatten()[[1, 7, 11]])
    assert sum(value.nbytes for value in read.values()) == 3 * (4 + 4)


def test_property_a_narrow_base_and_its_wide_copy_take_the_same_patch(models):
    base, tuned = (model.to(torch.bfloat16) for model in models)
    patch = patch_of(base, tuned)
    wide = patch.apply(copy.deepcopy(base).float())
    assert patch.values["0.weight"].dtype == torch.bfloat16
    for name, values in patch.apply(base).named_parameters():
        assert torch.equal(values.float(), wide.get_parameter(name))


def test_property_a_narrow_patch_is_rounded_once(models):
    base, tuned = models
    values = patch_of(base, tuned, torch.bfloat16).values["0.weight"]
    assert torch.equal(values, tuned[0].weight.detach().flatten()[[1, 7, 11]].bfloat16())


def test_equation_joined_patches_take_the_mean_where_both_change(models):
    base, tuned = models
    other = copy.deepcopy(tuned)
    with torch.no_grad():
        other[0].weight.add_(2.0)
    joined = join_patches([patch_of(base, tuned), patch_of(base, other, **{"0_weight": [7, 8]})])
    assert joined.mask.indices["0.weight"].tolist() == [1, 7, 8, 11]
    flat = tuned[0].weight.detach().flatten()
    # 1 and 11 are the first's, 8 the second's (first + 2), 7 the mean of both (first + 1)
    expected = torch.stack([flat[1], flat[7] + 1, flat[8] + 2, flat[11]])
    torch.testing.assert_close(joined.values["0.weight"], expected, rtol=0, atol=1e-6)


def test_rejects_another_base(models):
    base, tuned = models
    patch = patch_of(base, tuned)
    with pytest.raises(ValueError, match=f"digest {patch.base}; this model has"):
        patch.apply(tuned)
    with pytest.raises(ValueError, match=r"'0.weight' of shape \(3, 4\); the model has \(5, 4\)"):
        patch.apply(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)))
    with pytest.raises(ValueError, match="no such parameter"):
        patch.apply(nn.Linear(4, 3))
    with pytest.raises(ValueError, match="different bases"):
        join_patches([patch, patch_of(tuned, base)])


def test_rejects_a_base_too_narrow_for_the_values(models):
    base, tuned = models
    narrow = copy.deepcopy(base).to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"torch\.bfloat16 cannot hold the new values of '0\.weight'"):
        patch_of(copy.deepcopy(narrow).float(), tuned).apply(narrow)


def test_fault_a_damaged_or_foreign_file_is_refused(models, tmp_path):
    path = tmp_path / "p.safetensors"
    with pytest.raises(FileNotFoundError, match="no patch at"):
        Patch.open(path)
    save_file({"indices/a": torch.tensor([0])}, path)
    with pytest.raises(ValueError, match="is no patch"):
        Patch.open(path)
    patch_of(*models).save(path)
    read = load_file(path)
    with safe_open(path, framework="pt") as file:
        about = file.metadata()
    read["indices/0.weight"][2] = 12  # the tensor has twelve entries, 0 to 11
    save_file(read, path, metadata=about)
    with pytest.raises(ValueError, match=r"'0.weight' do not fit its shape \(3, 4\)"):
        Patch.open(path)
    assert json.loads(about["patch"])["count"] == 3
