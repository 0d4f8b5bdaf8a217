"""Direction structures against plain transcriptions of their papers, and what all of them must keep."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from architectures import batch_of, build, with_scheme
from tiny import Rows, losses, make_replica, make_spec, mean_loss, start, theta0
from torch import Tensor, nn

from fedzo import directions, spaces
from fedzo.config import from_flat
from fedzo.directions import philox
from fedzo.directions.base import Directions
from fedzo.errors import ConfigError
from fedzo.estimators import CoordinateWise, Estimate, Estimator, Query, TwoPoint
from fedzo.evaluation import Batch, Evaluator, LossRequest, evaluator
from fedzo.federation.coordinator import replay
from fedzo.federation.replica import theta_digest
from fedzo.spaces import Segment, TrainableSpace
from fedzo.structures import STRUCTURES, Frame, Layout, Structure, product
from fedzo.structures.blocks import blocks_of

SEED = 2**63 + 5  # of the frame
VALUES = {"rank": 2, "refresh": 3, "layer_share": 0.5, "queries": 4}
# The structures with the family that they are for.
CASES = [
    ("block-wise", "rademacher"), ("block-wise", "gaussian"), ("layer-wise", "rademacher"), ("layer-wise", "gaussian"),
    ("low-rank", "gaussian"), ("subspace", "gaussian"), ("coordinate", "rademacher"),
]  # fmt: skip
EACH = list(dict(CASES).items())
MATRICES = ("low-rank", "subspace")
Part = tuple[str, tuple[int, ...], Tensor | None]


def laid_out(*parts: Part) -> Layout:
    segments: list[Segment] = []
    for name, shape, indices in parts:
        size = math.prod(shape) if indices is None else len(indices)
        segments.append(Segment(name, shape, sum(s.size for s in segments), size, indices))
    return Layout(tuple(segments))


def masked(shape: tuple[int, ...], count: int) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randperm(math.prod(shape), generator=generator)[:count].sort().values


LAYOUTS = {
    "full": laid_out(
        ("embed.weight", (11, 6), None),
        ("layers.0.experts", (2, 3, 4), None),
        ("layers.0.norm", (6,), None),
        ("layers.1.weight", (40, 33), None),
        ("layers.1.bias", (40,), None),
        ("layers.2.weight", (6, 9), None),
        ("norm.scale", (), None),
    ),
    "adapter": laid_out(
        *((f"h.{i}.{x}.weight", (3, 50) if x == "A" else (50, 3), None) for i in range(3) for x in "AB")
    ),
    "sparse": laid_out(
        ("embed.weight", (40, 7), masked((40, 7), 31)),
        ("layers.0.weight", (34, 36), masked((34, 36), 57)),
        ("layers.1.weight", (3, 20), masked((3, 20), 1)),
        ("layers.2.row", (1, 20), masked((1, 20), 7)),
        ("norm.weight", (6,), None),
    ),
}


def made(name: str, layout: Layout, family: str = "gaussian", seed: int = SEED, **values: float) -> Structure:
    return STRUCTURES[name](Frame(family, layout, seed, {**VALUES, **values}))


def direction(found: Directions, seed: int, size: int) -> Tensor:
    return found.fill(torch.full((size,), torch.nan), seed)


def drawn(seed: int, shape: tuple[int, ...], offset: int) -> npt.NDArray[np.float64]:
    """Gaussian draws of a stream."""
    flat = directions.fill(torch.empty(math.prod(shape)), seed, "gaussian", offset=offset)
    return flat.double().numpy().reshape(shape)


def words(seed: int, count: int) -> npt.NDArray[np.uint64]:
    low_high = philox.words(seed, 2 * count).astype(np.uint64).reshape(-1, 2)
    return low_high[:, 0] | (low_high[:, 1] << np.uint64(32))


# -- what all structures keep


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize(("name", "family"), CASES)
def test_a_range_is_what_the_whole_has_there(name: str, family: str, kind: str) -> None:
    layout, c = LAYOUTS[kind], float(np.float32(-0.3))
    found, size = made(name, layout, family).at(4), layout.size
    whole, theta = direction(found, 2**64 - 7, size), torch.linspace(-1, 1, size)
    assert whole.isfinite().all() and whole.any()
    moved = found.axpy(theta, 2**64 - 7, c, out=torch.empty_like(theta))
    assert torch.equal(moved, theta + whole * c) and torch.equal(theta, torch.linspace(-1, 1, size))
    rng = np.random.default_rng(0)
    cuts = [(0, size), *((s.offset, s.offset + s.size) for s in layout.segments)]
    cuts += [tuple(sorted(rng.choice(size + 1, 2, replace=False).tolist())) for _ in range(30)]
    for first, last in cuts:
        here = slice(first, last)
        part = found.fill(torch.full((last - first,), torch.nan), 2**64 - 7, offset=first)
        assert torch.equal(part, whole[here]), (first, last)
        assert torch.equal(found.axpy(theta[here].clone(), 2**64 - 7, c, offset=first), moved[here])


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize(("name", "family"), CASES)
def test_a_replay_is_one_step_after_the_other(name: str, family: str, kind: str) -> None:
    layout = LAYOUTS[kind]
    found, theta, size = made(name, layout, family).at(0), torch.linspace(-1, 1, layout.size), layout.size
    seeds, wanted = np.concatenate([words(1, 40), words(1, 3)]), theta.clone()
    coefficients = np.linspace(-2, 1, 43, dtype=np.float32)
    for seed, c in zip(seeds.tolist(), coefficients.tolist(), strict=True):
        wanted = wanted + direction(found, seed, size) * c
    assert found.replay(theta, seeds, coefficients) is theta and torch.equal(theta, wanted)


SMALL = laid_out(("embed", (3, 2), None), ("layers.0.a", (4, 2), None), ("layers.1.a", (3,), None))


@pytest.mark.parametrize(("name", "family"), CASES)
def test_over_seeds_and_steps_the_second_moment_is_the_identity(name: str, family: str) -> None:
    structure, size, count = made(name, SMALL, family, refresh=1, layer_share=0.3), SMALL.size, 3000
    seeds = np.concatenate([structure.assign(part) for part in np.split(words(3, count), count // 3)])
    z = torch.stack([direction(structure.at(i), seed, size) for i, seed in enumerate(seeds.tolist())]).double()
    products = z[:, :, None] * z[:, None, :]
    error = (products.mean(0) - torch.eye(size)) / (products.std(0) / math.sqrt(count) + 1e-6)
    assert float(error.abs().max()) < 4.5  # standard errors, of 153 entries
    assert 0.9 < float((z**2).mean()) < 1.1


@pytest.mark.parametrize(("name", "family"), CASES)
def test_directions_depend_on_seed_step_and_frame_as_they_say(name: str, family: str) -> None:
    def of(step: int, seed: int = 8, frame: int = SEED) -> Tensor:
        return direction(made(name, LAYOUTS["full"], family, frame).at(step), seed, LAYOUTS["full"].size)

    assert not torch.equal(of(0), of(0, seed=9)) and torch.equal(of(0), of(2))
    assert torch.equal(of(2), of(3)) == STRUCTURES[name].steady == (name not in MATRICES)
    assert torch.equal(of(0), of(0, frame=SEED - 1)) == STRUCTURES[name].steady


@pytest.fixture(scope="module", params=["full", "sparse"])
def scheme(request: pytest.FixtureRequest) -> tuple[nn.Module, TrainableSpace]:
    return with_scheme(build("opt"), request.param)


@pytest.mark.parametrize(("name", "family"), EACH)
def test_a_model_is_evaluated_at_its_points(
    name: str, family: str, scheme: tuple[nn.Module, TrainableSpace], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Module by module, with the embedding row by row, the losses are those of the model at theta + a z."""
    monkeypatch.setattr(evaluator, "SMALL", 0)
    (model, space), batch, a = scheme, batch_of("opt"), float(np.float32(0.1))
    structure, theta = made(name, Layout.of(space), family), space.theta0(model)
    found, seeds = structure.at(0), structure.assign(words(5, 2)).tolist()
    got = Evaluator(model, space, "sequential").losses(LossRequest(theta, batch, (a,), tuple(seeds), found))
    for p, seed in enumerate(seeds):
        point = theta + direction(found, seed, space.size) * a
        wanted = Evaluator(model, space, "sequential").losses(LossRequest(point, batch, (0.0,)))
        torch.testing.assert_close(got[p], wanted[0], atol=2e-6, rtol=0)


# -- blocks


def test_blocks_are_layers_and_the_modules_around_them() -> None:
    names = {name: [block.name for block in blocks_of(Layout.of(spaces.full(build(name).model)))] for name in BLOCKS}
    assert {name: sorted(found) for name, found in names.items()} == BLOCKS
    adapted = blocks_of(Layout.of(with_scheme(build("opt"), "lora")[1]))
    inside = "base_model.model.model.decoder.layers"
    assert [(block.name, block.layer) for block in adapted] == [(f"{inside}.0", True), (f"{inside}.1", True)]
    flat = blocks_of(laid_out(("a.x.weight", (2,), None), ("b", (3,), None), ("a.y.weight", (4,), None)))
    assert [(block.name, block.layer, block.ranges) for block in flat] == [
        ("a", False, ((0, 2), (5, 9))), ("b", False, ((2, 5),)),
    ]  # fmt: skip
    joined = blocks_of(LAYOUTS["full"])
    assert [(block.name, block.layer, block.ranges) for block in joined] == [
        ("embed", False, ((0, 66),)), ("layers.0", True, ((66, 96),)), ("layers.1", True, ((96, 1456),)),
        ("layers.2", True, ((1456, 1510),)), ("norm", False, ((1510, 1511),)),
    ]  # fmt: skip


# Those that ZO-Bench's patterns find for OPT, and their like elsewhere.
BLOCKS = {
    "opt": [
        "model.decoder.embed_positions", "model.decoder.embed_tokens", "model.decoder.final_layer_norm",
        "model.decoder.layers.0", "model.decoder.layers.1",
    ],
    "llama": ["lm_head", "model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm"],
    "gpt2": ["transformer.h.0", "transformer.h.1", "transformer.ln_f", "transformer.wpe", "transformer.wte"],
    "roberta": ["lm_head", "roberta.embeddings", "roberta.encoder.layer.0", "roberta.encoder.layer.1"],
    "bert encoder": ["encoder.embeddings", "encoder.encoder.layer.0", "encoder.encoder.layer.1", "head"],
}  # fmt: skip


@pytest.mark.parametrize("queries", [1, 3, 5, 12])
def test_queries_of_a_step_take_different_blocks(queries: int) -> None:
    structure, taken, chosen = made("block-wise", LAYOUTS["full"]), np.zeros(5), set()
    for step in range(400):
        seeds = structure.assign(given := words(step, queries))
        assert np.array_equal(seeds, structure.assign(given)) and seeds.dtype == np.uint64
        assert np.unique(seeds // np.uint64(5)).size == queries  # no two have one direction
        counts = np.bincount((seeds % np.uint64(5)).astype(np.int64), minlength=5)
        assert counts.max() - counts.min() <= 1
        taken += counts
        chosen.add(tuple(counts.tolist()))
    assert len(chosen) == math.comb(5, queries % 5)
    spread = 400 * (queries % 5) / 5 * (1 - queries % 5 / 5)
    assert np.abs(taken - 400 * queries / 5).max() <= 4.5 * math.sqrt(spread)


def test_a_query_moves_its_block_alone_and_leaves_other_bits() -> None:
    layout = LAYOUTS["full"]
    found, theta = made("block-wise", layout, "rademacher").at(0), torch.full((layout.size,), -0.0)
    for number, block in enumerate(blocks_of(layout)):
        moved = found.axpy(theta, 10**18 + number, 0.5, out=torch.empty_like(theta))
        ((start, stop),) = block.ranges
        assert torch.equal(moved[start:stop].abs(), torch.full((stop - start,), float(np.float32(math.sqrt(5)) / 2)))
        rest = torch.cat([moved[:start], moved[stop:]])
        assert torch.equal(rest.view(torch.int32), theta.view(torch.int32)[: len(rest)])


def test_the_largest_seeds_are_assigned_without_overflow() -> None:
    for count in (2, 3, 5, 7):
        layout = laid_out(*((f"layers.{i}", (2,), None) for i in range(count)))
        given = np.arange(2**64 - 40, 2**64, dtype=np.uint64)
        found = [seed % count for seed in made("block-wise", layout).assign(given).tolist()]
        assert np.ptp(np.bincount(found, minlength=count)) <= 1


# -- the papers' equations in plain torch


def quadratic(size: int) -> Callable[[Tensor], float]:
    """A loss in float64."""
    rng = np.random.default_rng(size)
    root, linear = torch.from_numpy(rng.normal(size=(size, size))), torch.from_numpy(rng.normal(size=size))
    hessian = root @ root.T / size

    def loss(theta: Tensor) -> float:
        return float(theta @ hessian @ theta / 2 + linear @ theta)

    return loss


def start_of(size: int) -> Tensor:
    return torch.linspace(-1, 1, size, dtype=torch.float64)


def two_point(loss: Callable[[Tensor], float], theta: Tensor, z: Tensor, eps: float) -> float:
    return (loss(theta + eps * z) - loss(theta - eps * z)) / (2 * eps)


def ours(structure: Structure, seeds: npt.NDArray[np.uint64], eps: float, step: int = 0) -> Tensor:
    """1/P sum g z, float64."""
    size = structure.frame.layout.size
    loss, theta = quadratic(size), start_of(size)
    z = [direction(structure.at(step), seed, size).double() for seed in seeds.tolist()]
    return torch.stack([two_point(loss, theta, one, eps) * one for one in z]).mean(0)


@pytest.mark.parametrize("family", ["rademacher", "gaussian"])
def test_block_wise_with_a_query_for_each_block_is_zo_bench(family: str) -> None:
    """For every block: its own parameters perturbed by eps u, and its gradient g u."""
    layout = LAYOUTS["adapter"]
    structure = made("block-wise", layout, family)
    seeds, loss, theta = structure.assign(words(9, 3)), quadratic(layout.size), start_of(layout.size)
    wanted = torch.zeros_like(theta)
    for block, prefix in enumerate(("h.0.", "h.1.", "h.2.")):
        seed = next(int(seed) for seed in seeds if seed % 3 == block)
        u = directions.fill(torch.empty(layout.size), seed, family).double()
        for segment in layout.segments:
            if not segment.name.startswith(prefix):
                u[segment.offset : segment.offset + segment.size] = 0
        wanted += two_point(loss, theta, u, 1e-3) * u
    torch.testing.assert_close(ours(structure, seeds, 1e-3 / math.sqrt(3)), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["rademacher", "gaussian"])
@pytest.mark.parametrize(("share", "count"), [(0.1, 1), (0.5, 2), (0.67, 2), (1.0, 3)])
def test_layer_wise_is_lezo_but_for_its_scale(share: float, count: int, family: str) -> None:
    """z' is z with the layers that are left out set to 0; what is in no layer stays."""
    layout, chosen = LAYOUTS["full"], set()
    structure = made("layer-wise", layout, family, layer_share=share)
    for seed in words(2, 60).tolist():
        z, got = directions.fill(torch.empty(layout.size), seed, family), direction(structure.at(5), seed, layout.size)
        kept = set()
        for segment in layout.segments:
            here, layer = slice(segment.offset, segment.offset + segment.size), segment.name.split(".")[1]
            if segment.name.startswith("layers") and got[here].any():
                kept.add(layer)
                assert torch.equal(got[here], z[here] * float(np.float32(math.sqrt(3 / count))))
            elif not segment.name.startswith("layers"):
                assert torch.equal(got[here], z[here])
        assert len(kept) == count
        chosen.add(tuple(sorted(kept)))
    assert len(chosen) == math.comb(3, count)


def test_low_rank_is_lozo() -> None:
    """g U V^T / r with g from points at distance eps along U V^T; V from the period, vectors by plain SPSA."""
    layout, r, seed, step, eps = LAYOUTS["full"], 2, 77, 5, 1e-3
    structure = made("low-rank", layout, rank=r)
    kept = philox.substream(SEED, step // 3)
    found = direction(structure.at(step), seed, layout.size).double().numpy()
    own = shared = 0
    paper = np.empty_like(found)  # U V^T, whose r-th part the paper multiplies by g
    for segment in layout.segments:
        here = slice(segment.offset, segment.offset + segment.size)
        if len(segment.shape) < 2:
            np.testing.assert_array_equal(found[here], drawn(seed, (segment.size,), own))
            own += segment.size
            continue
        m, n = math.prod(segment.shape[:-1]), segment.shape[-1]
        u, v = drawn(seed, (m, r), own), drawn(kept, (r, n), shared)
        paper[here] = (u @ v).ravel()
        np.testing.assert_allclose(found[here], paper[here] / math.sqrt(r), rtol=1e-5, atol=1e-6)
        own, shared = own + m * r, shared + r * n
    assert np.linalg.matrix_rank(found[96 : 96 + 1320].reshape(40, 33), tol=1e-4) == r
    one = laid_out(("w", (9, 5), None))
    u, v = torch.from_numpy(drawn(seed, (9, r), 0)), torch.from_numpy(drawn(kept, (r, 5), 0))
    loss, theta, uv = quadratic(45), start_of(45), (u @ v).ravel()
    wanted = two_point(loss, theta, uv, eps) * uv / r
    got = ours(made("low-rank", one, rank=r), np.array([seed], np.uint64), eps * math.sqrt(r), step)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_subspace_is_subzero(rank: int) -> None:
    """sqrt(m n) / r U Y V^T with U and V from QR decompositions; thin matrices reshaped."""
    layout, seed, step = LAYOUTS["full"], 77, 8
    found = direction(made("subspace", layout, rank=rank).at(step), seed, layout.size).double().numpy()
    kept = philox.substream(SEED, step // 3)
    own = shared = 0
    shapes = {
        "embed.weight": (6, 11),
        "layers.0.experts": (4, 6),
        "layers.1.weight": (40, 33),
        "layers.2.weight": (6, 9),
    }
    for segment in layout.segments:
        got = found[segment.offset : segment.offset + segment.size]
        if segment.name not in shapes:
            np.testing.assert_array_equal(got, drawn(seed, (segment.size,), own))
            own += segment.size
            continue
        m, n = shapes[segment.name]
        r = min(rank, m, n)
        u, v = orthonormal_qr(drawn(kept, (r, m), shared)), orthonormal_qr(drawn(kept, (r, n), shared + r * m))
        wanted = math.sqrt(m * n) / r * u @ drawn(seed, (r, r), own) @ v.T
        np.testing.assert_allclose(got, wanted.ravel(), rtol=1e-4, atol=1e-5)
        own, shared = own + r * r, shared + r * (m + n)


def orthonormal_qr(rows: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Q [n, r] of the QR decomposition of the transpose of [r, n] whose R has a positive diagonal."""
    q, upper = np.linalg.qr(rows.T)
    return q * np.sign(np.diag(upper))


def test_given_its_bases_the_second_moment_of_a_subspace_is_a_scaled_projection() -> None:
    layout, r = laid_out(("w", (33, 34), None)), 3
    found = made("subspace", layout, rank=r).at(0)
    z = torch.stack([direction(found, seed, layout.size) for seed in range(4000)]).double()
    kept = philox.substream(SEED, 0)
    u, v = orthonormal_qr(drawn(kept, (r, 33), 0)), orthonormal_qr(drawn(kept, (r, 34), r * 33))
    basis = torch.from_numpy(np.kron(u, v))  # [33 * 34, 9]
    inside = z @ basis
    torch.testing.assert_close(inside @ basis.T, z, rtol=0, atol=1e-4)
    moment = inside.T @ inside / len(z) / (layout.size / r**2)
    assert float((moment - torch.eye(9)).abs().max()) < 4.5 * math.sqrt(2 / 4000)
    assert abs(float((z**2).mean()) - 1) < 0.05


@pytest.mark.parametrize("name", MATRICES)
def test_a_masked_matrix_has_the_entries_of_the_whole_one(name: str) -> None:
    indices = masked((41, 35), 300)
    whole, part = laid_out(("w", (41, 35), None)), laid_out(("w", (41, 35), indices))
    for step, seed in ((0, 3), (7, 2**64 - 1)):
        dense = direction(made(name, whole, rank=5).at(step), seed, whole.size)
        assert torch.equal(direction(made(name, part, rank=5).at(step), seed, 300), dense[indices])


# -- products and bases, bit for bit


@pytest.mark.parametrize(("rows", "rank", "columns"), [(1, 1, 1), (7, 3, 5), (3, 2, 2500), (900, 4, 310), (5, 70, 33)])
def test_products_have_the_bits_of_rounded_sums_in_order(
    rows: int, rank: int, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(product, "_CHUNK", 1000)
    rng = np.random.default_rng(rows)
    left, right = (torch.from_numpy(rng.normal(size=s).astype(np.float32)) for s in ((rows, rank), (rank, columns)))
    wanted = np.zeros((rows, columns), np.float32)
    for k in range(rank):
        term = left.numpy()[:, k : k + 1] * right.numpy()[k]
        wanted = term if k == 0 else wanted + term
    whole = product.multiply(torch.empty(rows * columns), left, right)
    assert np.array_equal(whole.numpy().view(np.uint32), wanted.ravel().view(np.uint32))
    for first in {0, (rows * columns) // 3, rows * columns - 1}:
        for multiply in (product.multiply, product.multiply_plainly):
            out = torch.full((rows * columns - first,), torch.nan)
            assert multiply(out, left, right, first) is out and torch.equal(out, whole[first:])


def test_bases_are_orthonormal_by_a_fixed_algorithm() -> None:
    draws = torch.from_numpy(drawn(5, (6, 50), 0)).float()
    draws[4] = draws[1] + 1e-6 * draws[4]  # nearly dependent: one pass would not do
    found = product.orthonormal(draws).numpy()
    np.testing.assert_allclose(found.astype(np.float64) @ found.T, np.eye(6), atol=2e-7)
    columns = draws.double().tolist()
    for k, own in enumerate(columns):
        for _ in range(2):
            for other in columns[:k]:
                dot = 0.0
                for a, b in zip(own, other, strict=True):
                    dot += a * b
                own[:] = [a - dot * b for a, b in zip(own, other, strict=True)]
        square = 0.0
        for a in own:
            square += a * a
        own[:] = [a / math.sqrt(square) for a in own]
    assert np.array_equal(found, np.array(columns, np.float32))


def test_a_dependent_column_is_dropped() -> None:
    draws = torch.tensor([[1.0, 2.0, 2.0], [2.0, 4.0, 4.0], [0.0, 3.0, 0.0]])
    found = product.orthonormal(draws)
    assert not found[1].any() and torch.equal(
        (found @ found.T).round(decimals=6), torch.diag(torch.tensor([1.0, 0, 1]))
    )


# -- coordinates


def evaluated(estimator: Estimator, query: Query) -> tuple[Estimate, LossRequest]:
    steps = estimator.estimate(query)
    request = next(steps)
    assert isinstance(request, LossRequest)
    with pytest.raises(StopIteration) as stop:
        steps.send(losses(request))
    return stop.value.value, request


def coordinates(queries: int, eps: float = 1e-3) -> tuple[Tensor, Estimate, Batch]:
    """1/P sum g z of a step on least squares, the estimate, the batch."""
    theta, batch = theta0(), Rows(2).batch(np.arange(9))
    structure = made("coordinate", Layout.flat(12), queries=queries)
    seeds, found = structure.assign(words(4, queries)), structure.at(0)
    query = Query(theta, batch, tuple(seeds.tolist()), eps, 0, found)
    estimate, request = evaluated(CoordinateWise(), query)
    assert request.origin and len(request.seeds) * len(request.offsets) == queries
    g = (estimate.projected.mean(axis=1) / queries).astype(np.float32)
    return found.replay(torch.zeros(12), seeds, g), estimate, batch


def test_with_all_coordinates_the_step_is_the_gradient() -> None:
    step, estimate, batch = coordinates(12)
    x, y, theta = batch.inputs["x"].double(), batch.inputs["y"].double(), theta0().double()
    residual = x @ theta - y
    gradient, bend = (residual[:, None] * x).mean(0), (x**2).mean(0)
    torch.testing.assert_close(step.double(), gradient + 1e-3 / 2 * bend, rtol=0, atol=3e-3)
    assert estimate.projected.shape == (12, 9) and abs(estimate.loss - float((residual**2).mean() / 2)) < 0.05
    exact = math.sqrt(12) * (residual[:, None] * x + 1e-3 / 2 * x**2).T  # [12, 9], one example each
    np.testing.assert_allclose(estimate.projected, exact.numpy(), atol=3e-2)


def test_some_coordinates_are_drawn_without_repetition_and_unbiased() -> None:
    step, _, batch = coordinates(5, 1e-2)
    x, y = batch.inputs["x"].double(), batch.inputs["y"].double()
    gradient = ((x @ theta0().double() - y)[:, None] * x + 1e-2 / 2 * x**2).mean(0)
    moved = step.nonzero().ravel()
    assert len(moved) == 5
    torch.testing.assert_close(step[moved].double(), gradient[moved] * 12 / 5, rtol=0, atol=3e-3)
    structure, counts = made("coordinate", Layout.flat(12), queries=5), np.zeros(12)
    for step_ in range(600):
        seeds = structure.assign(words(step_, 5))
        assert np.unique(seeds).size == 5
        counts[seeds.astype(np.int64)] += 1
    assert np.abs(counts - 250).max() < 4.5 * math.sqrt(600 * 5 / 12 * 7 / 12)


# -- what they refuse


def keys(**changes: object) -> dict[str, object]:
    return {key.replace("__", "."): value for key, value in changes.items()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (keys(method__structure="low-rank"), "needs method.directions = \"gaussian\", found \"rademacher\""),
        (keys(method__structure="block-wise", federation__seeds="pool"), "found \"pool\": a step's queries share"),
        (
            keys(method__structure="subspace", method__directions="gaussian", federation__seeds="pool"),
            "what a seed stands for changes with the step",
        ),
        (
            keys(method__structure="layer-wise", space__theta_dtype="bfloat16"),
            "a bfloat16 theta is moved along isotropic directions only",
        ),
        (keys(method__structure="coordinate"), "needs method.estimator = \"coordinate-wise\", found \"two-point\""),
        (keys(method__estimator="coordinate-wise"), "needs method.structure = \"coordinate\", found \"isotropic\""),
        (
            keys(
                method__structure="low-rank", method__directions="gaussian", space__kind="scales",
                model__quantisation="nf4",
            ),
            "scales are vectors",
        ),
        (keys(method__structure="blockwise"), "Did you mean 'block-wise'"),
    ],
)  # fmt: skip
def test_a_configuration_is_refused_with_the_reason(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_flat(changes)


def test_settings_of_a_structure_are_part_of_the_run() -> None:
    config = from_flat(keys(method__structure="layer-wise", method__layer_share=0.3, federation__seeds="pool"))
    assert config.settings()["layer_share"] == 0.3
    both = keys(method__structure="low-rank", method__directions="gaussian", method__rank=4)
    assert {"rank": 4, "refresh": 50}.items() <= from_flat(both).settings().items()


@pytest.mark.parametrize(
    ("name", "layout", "values", "message"),
    [
        ("block-wise", laid_out(("prompt.weight", (4, 8), None)), {}, "two modules or more, found only prompt"),
        ("layer-wise", laid_out(("a.w", (4,), None), ("b.w", (4,), None)), {}, "a number, found only a, b"),
        ("low-rank", laid_out(("a", (4,), None), ("b", (1, 8), None)), {}, "a parameter that is a matrix"),
        ("coordinate", Layout.flat(3), {}, "method.queries is 4, but theta has 3 entries"),
        ("coordinate", Layout.flat(65_536), {}, "at most 65,535 entries, found 65,536: train less"),
    ],
)  # fmt: skip
def test_a_space_is_refused_with_the_reason(name: str, layout: Layout, values: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        made(name, layout, **values)


# -- federated runs


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize(("name", "family"), EACH)
def test_a_run_replays_and_a_late_client_catches_up(name: str, family: str, steps: int, tmp_path: Path) -> None:
    estimator = "coordinate-wise" if name == "coordinate" else "two-point"
    spec = make_spec(
        structure=name, family=family, estimator=estimator, settings={**VALUES, "weight_decay": 0.0}, queries=4,
        local_steps=steps, learning_rate=0.02,
    )  # fmt: skip
    run = start(tmp_path, spec, [0, 1, 2])
    for _ in range(4):
        run.round()
    run.join(3)
    run.finish()
    server = run.coordinator.replica
    assert [len(plans) for (_, client), plans in run.plans.items() if client == 3] == [1, 1]
    assert run.workers[3].replica.rounds == 5 and run.ledger.rounds == 6
    again = make_replica(spec)
    replay(run.ledger, again)
    assert torch.equal(again.theta, server.theta) and again.digest() == server.digest()
    fused, single = make_replica(spec), make_replica(spec)
    records = [entry.records() for entry in run.ledger.read()]
    fused.apply(records)
    for one in records:
        single.apply([one])
    assert theta_digest(fused.theta) == theta_digest(single.theta) == server.digest()
    assert mean_loss(server.theta) < mean_loss(theta0())


def test_layer_wise_directions_fit_a_pool(tmp_path: Path) -> None:
    """They are the same at every step: theta is a sum over the pool's seeds."""
    spec = make_spec(structure="layer-wise", settings={**VALUES, "weight_decay": 0.0}, seeds="pool", queries=4)
    run = start(tmp_path, spec)
    run.finish()
    again = make_replica(spec)
    replay(run.ledger, again)
    assert again.digest() == run.coordinator.replica.digest()


def test_a_two_point_step_and_the_structure_meet_in_the_worker() -> None:
    """The scalars of a query are derivatives along the structure's z, for each example."""
    theta, batch = theta0(), Rows(2).batch(np.arange(9))
    structure = made("low-rank", laid_out(("w", (4, 3), None)))
    query = Query(theta, batch, (5, 6), 0.1, 0, structure.at(0))
    estimate, _ = evaluated(TwoPoint(), query)
    x, y = batch.inputs["x"].double(), batch.inputs["y"].double()
    for p, seed in enumerate((5, 6)):
        exact = ((x @ theta.double() - y)[:, None] * x) @ direction(structure.at(0), seed, 12).double()
        np.testing.assert_allclose(estimate.projected[p], exact.numpy(), atol=1e-3)
