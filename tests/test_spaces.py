"""Spaces: order, ties, masks, files."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedzo.errors import SpaceError
from fedzo.spaces import Mask, draw_mask, full, sparse
from fedzo.spaces.selection import choose


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


def drawn(model: nn.Module, density: float, method: str = "random", **options: Any) -> Mask:
    return draw_mask(model, density, method, "f" * 64, **options)


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
    one, other = (sparse(Tied(), drawn(Tied(), 0.5, seed=seed)) for seed in (1, 2))
    assert one.hash != other.hash


@pytest.mark.parametrize("kind", ["full", "sparse"])
def test_write_and_theta0_are_inverse_and_touch_nothing_else(kind: str) -> None:
    model = Tied()
    mask = drawn(model, 0.3, seed=3)
    space = full(model, exclude=["norm.*"]) if kind == "full" else sparse(model, mask, dense=["norm.bias"])
    initial = space.theta0(model)
    assert torch.equal(initial, space.read(model))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    theta = torch.randn(space.size)
    space.write(model, theta)
    assert torch.equal(space.read(model), theta)
    assert torch.equal(space.theta0(model), theta if kind == "full" else torch.cat([initial[:-6], theta[-6:]]))
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
    space = sparse(model, drawn(model, density, "magnitude"))
    matrices = sorted((name, p) for name, p in model.named_parameters() if p.ndim >= 2)
    entries = [(-abs(float(v)), name, i) for name, p in matrices for i, v in enumerate(p.detach().reshape(-1))]
    expected = sorted((name, i) for _, name, i in sorted(entries)[: round(density * len(entries))])
    assert [(s.name, int(i)) for s in space.segments for i in s.indices] == expected


def test_random_mask_is_a_function_of_seed_and_sizes() -> None:
    one, other = (sparse(Tied(), drawn(Tied(weights), 0.4, seed=7)) for weights in (0, 1))
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
    mask = drawn(Tied(), 0.5, exclude=["embed.*"])
    space = sparse(Tied(), mask, dense=["embed.weight", "norm.bias"])
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
        ({"density": 0.1, "method": "sensitive"}, "calibration"),
    ],
)
def test_impossible_masks_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        draw_mask(Tied(), fingerprint="f" * 64, **arguments)  # type: ignore[arg-type]


def test_dense_names_are_checked() -> None:
    mask = drawn(Tied(), 0.5)
    with pytest.raises(SpaceError, match=r"head\.weight, which this model does not have"):
        sparse(Tied(), mask, dense=["head.weight"])
    with pytest.raises(SpaceError, match=r"embed\.weight, which the mask covers"):
        sparse(Tied(), mask, dense=["embed.weight"])


class Packed(nn.Module):
    """What a quantised layer looks like: its weight is a packed integer tensor that knows the shape it packs."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(math.prod(shape) // 2, 1, dtype=torch.uint8), requires_grad=False)
        self.weight.quant_state = SimpleNamespace(shape=torch.Size(shape))  # type: ignore[attr-defined]


def test_a_quantised_model_starts_from_the_values_in_the_mask_and_is_never_written() -> None:
    plain = nn.ModuleDict({"layer": nn.Linear(8, 6, bias=False)})
    mask = drawn(plain, 0.25)
    quantised = nn.ModuleDict({"layer": Packed((6, 8))})
    mask.check(quantised, "f" * 64)
    space = sparse(quantised, mask)
    theta = space.theta0(quantised)
    assert torch.equal(theta, sparse(plain, mask).read(plain)) and space.hash == sparse(plain, mask).hash
    assert space.theta0(quantised, torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(SpaceError, match="never merged into quantised"):
        space.write(quantised, theta)
    with pytest.raises(SpaceError, match="is quantised"):
        space.read(quantised)
    with pytest.raises(SpaceError, match="cannot be trained as a whole"):
        drawn(quantised, 0.25)
    with pytest.raises(SpaceError, match=r"has shape \(6, 4\)"):
        space.theta0(nn.ModuleDict({"layer": Packed((6, 4))}))
