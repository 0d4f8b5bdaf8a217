"""Spaces: order, ties, masks, files."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fedzo.errors import SpaceError
from fedzo.spaces import full, load_mask, save_mask, sparse
from fedzo.spaces.sparse import choose


class Tied(nn.Module):
    """Two linear layers that share a weight, an embedding and a norm; registered in an order that is not alphabetic."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.norm = nn.LayerNorm(6)
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.embed = nn.Embedding(10, 6)


def test_full_is_sorted_and_lists_a_tied_parameter_once() -> None:
    model = Tied()
    space = full(model)
    names = [segment.name for segment in space.segments]
    assert (
        names
        == sorted(names)
        == ["embed.weight", "first.bias", "first.weight", "norm.bias", "norm.weight", "second.bias"]
    )
    assert space.size == sum(p.numel() for p in model.parameters()) == sum(s.size for s in space.segments)
    assert [s.offset for s in space.segments] == list(np.cumsum([0] + [s.size for s in space.segments])[:-1])
    theta = space.theta0(model)
    assert torch.equal(theta[:60].view(10, 6), model.embed.weight)


def test_patterns_match_every_name_of_a_tied_parameter() -> None:
    assert [s.name for s in full(Tied(), include=["second.*"]).segments] == ["first.weight", "second.bias"]
    assert "first.weight" not in [s.name for s in full(Tied(), exclude=["second.weight"]).segments]
    with pytest.raises(SpaceError, match="no parameter matches"):
        full(Tied(), include=["third.*"])


def test_hash_tells_content_not_order_of_registration() -> None:
    def build(names: list[str], width: int = 3) -> nn.Module:
        return nn.ModuleDict({name: nn.Linear(width, 2) for name in names})

    assert full(build(["a", "b"])).hash == full(build(["b", "a"])).hash
    assert full(build(["a", "b"])).hash != full(build(["a", "c"])).hash
    assert full(build(["a", "b"])).hash != full(build(["a", "b"], 4)).hash
    assert sparse(Tied(), 0.5, "random", 1).hash != sparse(Tied(), 0.5, "random", 2).hash


@pytest.mark.parametrize("kind", ["full", "sparse"])
def test_write_and_theta0_are_inverse_and_touch_nothing_else(kind: str) -> None:
    model = Tied()
    space = full(model, exclude=["norm.*"]) if kind == "full" else sparse(model, 0.3, "random", 3, dense=["norm.bias"])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    theta = torch.randn(space.size)
    space.write(model, theta)
    assert torch.equal(space.theta0(model), theta)
    changed = sum(int((p != before[name]).sum()) for name, p in model.named_parameters())
    assert changed == space.size
    assert model.second.weight is model.first.weight


def test_bind_makes_parameters_follow_theta() -> None:
    model = Tied()
    space = full(model)
    theta = space.theta0(model)
    space.bind(model, theta)
    theta.mul_(2.0)
    assert torch.equal(space.theta0(model), theta)
    assert model.first.weight.untyped_storage().data_ptr() == theta.untyped_storage().data_ptr()
    assert model.second.weight is model.first.weight


def test_theta_and_model_must_fit() -> None:
    space = full(Tied())
    with pytest.raises(SpaceError, match="float32 vector of"):
        space.write(Tied(), torch.zeros(space.size + 1))
    with pytest.raises(SpaceError, match=r"embed\.weight.*missing"):
        space.theta0(nn.Linear(6, 6))


@pytest.mark.parametrize("density", [0.01, 0.25, 0.7, 1.0])
def test_magnitude_mask_is_the_exact_top_k_with_ties_by_name_and_index(density: float) -> None:
    model = Tied()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_((torch.randn_like(p) * 4).round())  # many ties
    space = sparse(model, density, "magnitude")
    matrices = sorted((name, p) for name, p in model.named_parameters() if p.ndim >= 2)
    entries = [(-abs(float(v)), name, i) for name, p in matrices for i, v in enumerate(p.detach().reshape(-1))]
    expected = sorted((name, i) for _, name, i in sorted(entries)[: round(density * len(entries))])
    assert [(s.name, int(i)) for s in space.segments for i in s.indices] == expected


def test_random_mask_is_a_function_of_seed_and_sizes() -> None:
    one, other = sparse(Tied(0), 0.4, "random", 7), sparse(Tied(1), 0.4, "random", 7)
    assert one.hash == other.hash
    assert one.size == round(0.4 * (36 + 60))
    for segment in one.segments:
        assert segment.indices.dtype == torch.int64
        assert bool((segment.indices.diff() > 0).all())


@pytest.mark.parametrize("count", [1, 30, 500, 501, 999, 1000])
def test_choose_draws_without_replacement(count: int) -> None:
    chosen = choose(1000, count, 5)
    assert len(np.unique(chosen)) == count and chosen.min() >= 0 and chosen.max() < 1000
    assert np.array_equal(chosen, np.sort(chosen))


def test_choose_is_uniform() -> None:
    hits = np.zeros(50)
    for seed in range(400):
        hits[choose(50, 10, seed)] += 1
    # 80 expected each, standard deviation 8.
    assert abs(hits - 80).max() < 5 * math.sqrt(400 * 0.2 * 0.8)


def test_dense_names_come_whole_and_outside_the_count() -> None:
    space = sparse(Tied(), 0.5, "random", 0, dense=["embed.weight", "norm.bias"])
    segments = {s.name: s for s in space.segments}
    assert segments["embed.weight"].indices is None and segments["norm.bias"].size == 6
    assert segments["first.weight"].size == 18


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"density": 0.0, "method": "random"}, "density is 0.0"),
        ({"density": 1.5, "method": "random"}, "density is 1.5"),
        ({"density": 0.1, "method": "largest"}, "unknown mask method 'largest'"),
        ({"density": 0.1, "method": "random", "include": ["norm.*"]}, "no matrix matches"),
        ({"density": 0.1, "method": "random", "dense": ["head.weight"]}, "head.weight"),
    ],
)
def test_impossible_masks_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        sparse(Tied(), **arguments)  # type: ignore[arg-type]


def test_mask_file_round_trip_and_refusals(tmp_path: Path) -> None:
    model = Tied()
    space = sparse(model, 0.3, "magnitude", dense=["norm.bias"])
    path = tmp_path / "mask.safetensors"
    save_mask(space, path, "f" * 64)
    again = load_mask(path, model, "f" * 64)
    assert again == space and again.hash == space.hash
    assert torch.equal(again.theta0(model), space.theta0(model))
    with pytest.raises(SpaceError, match="mask for another model"):
        load_mask(path, model, "e" * 64)
    with pytest.raises(SpaceError, match="missing in this model"):
        load_mask(path, nn.Linear(2, 2), "f" * 64)
    with pytest.raises(SpaceError, match="does not exist"):
        load_mask(tmp_path / "none", model, "f" * 64)
    content = bytearray(path.read_bytes())
    content[-8] ^= 1
    path.write_bytes(content)
    with pytest.raises(SpaceError, match="damaged"):
        load_mask(path, model, "f" * 64)
    path.write_bytes(content[:40])
    with pytest.raises(SpaceError, match="damaged"):
        load_mask(path, model, "f" * 64)
