"""Spaces over a quantised base, its scales (QZO) and int8 codes (QuZO), against plain-torch transcriptions."""

import copy
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_runs import config, make_data, run
from test_evaluation import bits, build, hooks, make_batch, plain_losses, untouched
from torch import Tensor, nn

from fedzo import spaces
from fedzo.directions import fill, reference, round_stochastically
from fedzo.engine import start
from fedzo.errors import ConfigError, ProtocolError, SpaceError
from fedzo.evaluation import Evaluator, LossRequest
from fedzo.evaluation import evaluator as evaluator_module
from fedzo.experiment import Experiment
from fedzo.export import export
from fedzo.federation.coordinator import Coordinator, replay
from fedzo.models import load_model
from fedzo.quantisation import dequantise, quantise
from fedzo.run_folder import RunFolder
from fedzo.runtime import import_bitsandbytes
from fedzo.spaces import TrainableSpace

try:
    import_bitsandbytes()
except ImportError:
    pytest.skip("needs bitsandbytes: install fedzo[quantised]", allow_module_level=True)

KINDS = [("scales", "nf4"), ("scales", "fp4"), ("scales", "int8"), ("codes", "int8")]


def quantised(held: str, kind: str, name: str = "llama-tied", **options: Any) -> tuple[nn.Module, TrainableSpace]:
    model = build(name)
    quantise(model, kind, double=False, **options)
    return model, getattr(spaces, held)(model)


def plain_weights(model: nn.Module, held: str, kind: str) -> tuple[Tensor, Callable[[Tensor], dict[str, Tensor]]]:
    """theta0, and the weights that a theta stands for, both written out from what bitsandbytes stores."""
    layers = {name: layer for name, layer in sorted(model.named_modules()) if hasattr(layer, "dequantised")}

    def table(name: str) -> tuple[Tensor, Tensor]:
        """Units [groups, n], scales [groups]."""
        layer: Any = layers[name]
        if kind == "int8":
            return layer.weight.data.double(), layer.weight.SCB
        state, packed = layer.weight.quant_state, layer.weight.data.view(-1).long()
        return state.code.double()[torch.stack((packed >> 4, packed & 15), 1)].view(-1, 64), state.absmax

    def weights(theta: Tensor) -> dict[str, Tensor]:
        found, at = {}, 0
        for name, layer in layers.items():
            units, scales = table(name)
            size = units.numel() if held == "codes" else len(scales)
            mine = theta[at : at + size].double()
            at += size
            if held == "codes":
                units = mine.view(units.shape)
            else:
                scales = mine
            step = scales.double() / (127.0 if kind == "int8" else 1.0)
            shape = (layer.out_features, layer.in_features)
            found[name] = (units * step.unsqueeze(1)).view(shape)
        return found

    start = [table(name)[0 if held == "codes" else 1].reshape(-1).float() for name in layers]
    return torch.cat(start), weights


def with_weights(model: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    """A copy in which plain layers with these weights stand for the quantised ones."""
    model = copy.deepcopy(model)
    for name, weight in weights.items():
        parent, _, attribute = name.rpartition(".")
        old: Any = model.get_submodule(name)
        layer = nn.Linear(old.in_features, old.out_features, old.bias is not None)
        layer.weight, layer.bias = nn.Parameter(weight.float()), old.bias
        setattr(model.get_submodule(parent), attribute, layer)
    return model


@pytest.mark.parametrize(("held", "kind"), KINDS)
@pytest.mark.parametrize("name", ["llama-tied", "opt", "bert"])
def test_losses_are_those_of_plain_layers_with_other_scales_or_codes(name: str, held: str, kind: str) -> None:
    model, space = quantised(held, kind, name)
    theta0, weights = plain_weights(model, held, kind)
    theta, batch, eps = space.theta0(model), make_batch(), 2e-2 if held == "scales" else 3.0
    assert torch.equal(theta, theta0) and space.kind == held
    before, clean = bits(model), hooks(model)
    request = LossRequest(theta, batch, (eps, -eps, 0.0), seeds=(12, 13, 14))
    found = [Evaluator(model, space, way).losses(request) for way in ("paired", "sequential")]
    assert torch.equal(*found) and untouched(model, before, clean) and torch.equal(theta, theta0)
    for k, seed in enumerate(request.seeds):
        z = fill(torch.empty(space.size), seed, "rademacher")
        for j, offset in enumerate(request.offsets):
            expected = plain_losses(with_weights(model, weights(theta0 + offset * z)), batch)
            torch.testing.assert_close(found[0][k, j].double(), expected, rtol=1e-4, atol=2e-5)
    assert float((found[0][:, 0] - found[0][:, 1]).abs().min()) > 1e-5


@pytest.mark.parametrize(("held", "kind"), KINDS)
def test_a_part_of_the_layers_and_blocks_of_theta(held: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama-tied")
    quantise(model, kind, double=False, compute_dtype=torch.bfloat16)
    space = getattr(spaces, held)(model, ["*mlp*"], ["*.1.*"])
    assert [segment.name.split(".")[4] for segment in space.segments] == ["down_proj", "gate_proj", "up_proj"]
    theta, batch = space.theta0(model), make_batch()
    at_once = Evaluator(model, space, "sequential").losses(LossRequest(theta, batch, (0.5, 0.0), seeds=(3,)))
    monkeypatch.setattr(evaluator_module, "SMALL", 0)
    part_by_part = Evaluator(model, space, "sequential").losses(LossRequest(theta, batch, (0.5, 0.0), seeds=(3,)))
    assert torch.equal(at_once, part_by_part) and not torch.equal(at_once[0, 0], at_once[0, 1])
    # theta0 is the base itself, to the bit.
    rest = spaces.full(model, ["*norm*"])
    base = Evaluator(model, rest, "sequential", torch.bfloat16).losses(LossRequest(rest.theta0(model), batch, (0.0,)))
    assert torch.equal(at_once[0, 1], base[0, 0])


@pytest.mark.parametrize(("held", "kind"), KINDS)
def test_an_exception_leaves_every_bit(held: str, kind: str) -> None:
    model, space = quantised(held, kind)
    request = LossRequest(space.theta0(model), make_batch(), (0.5, -0.5), seeds=(3,))
    evaluator = Evaluator(model, space)
    expected = evaluator.losses(request)
    before, clean = bits(model), hooks(model)
    victim = [module for module in model.modules() if hasattr(module, "dequantised")][-2]

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    handle = victim.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        evaluator.losses(request)
    handle.remove()
    assert untouched(model, before, clean) and torch.equal(evaluator.losses(request), expected)


@pytest.mark.parametrize(("held", "kind"), KINDS)
def test_theta0_is_the_same_whatever_threads_and_dtype(held: str, kind: str) -> None:
    """The largest magnitude of each block or row, and codes by float32 arithmetic of single operations."""
    threads, found = torch.get_num_threads(), []
    try:
        for count, dtype in ((1, None), (2, None), (2, torch.float32)):
            torch.set_num_threads(count)
            model = load_model("embedded", "causal", dtype=dtype).model
            whole = {name: p.detach().float() for name, p in model.named_parameters()}
            quantise(model, kind, double=False)
            space = getattr(spaces, held)(model)
            found.append((space.theta0(model), space.hash))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(theta, found[0][0]) and digest == found[0][1] for theta, digest in found)
    if held == "scales":
        groups = [whole[s.name] if kind == "int8" else whole[s.name].view(-1, 64) for s in space.segments]
        assert torch.equal(found[0][0], torch.cat([group.abs().amax(1) for group in groups]))


def test_hashes_tell_quantisations_apart() -> None:
    hashes = {quantised(held, kind)[1].hash for held, kind in KINDS}
    assert len(hashes) == len(KINDS)
    other = build("llama-tied")
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight[3].mul_(2.0)  # a step of codes; the codes stay
    quantise(other, "int8")
    assert spaces.codes(other).hash not in hashes


@pytest.mark.parametrize("seed", [7, 2**63 + 5])
def test_rounding_is_of_neighbours_and_the_same_bits_everywhere(seed: int) -> None:
    x = torch.randn(10_007, generator=torch.Generator().manual_seed(0)) * 3
    x = torch.cat((x, torch.tensor([0.0, 254.0, 0.5])))
    for offset in (0, 1, 4095, 2**40 + 5):
        found = round_stochastically(x.clone(), seed, offset=offset)
        assert torch.equal(found, found.round()) and float((found - x).abs().max()) < 1
        assert torch.equal(found, reference.round_stochastically(x.clone(), seed, offset=offset))
        assert torch.equal(round_stochastically(-x, seed, offset=offset), -found)
        assert torch.equal(round_stochastically(x[123:777].clone(), seed, offset=offset + 123), found[123:777])
    assert torch.equal(round_stochastically(found.clone(), seed), found)


def test_rounding_is_unbiased() -> None:
    x = torch.tensor([0.0, 0.25, -0.25, 0.999, 1e-3, -2.75, 126.5, 1e-9])
    draws = 40_000
    total = torch.zeros(8, dtype=torch.float64)
    for seed in range(draws // 64):
        total += round_stochastically(x.repeat(64), seed).view(64, 8).sum(0)
    part = x.abs() % 1
    spread = (part * (1 - part)).sqrt().double() / draws**0.5
    assert bool(((total / (draws // 64 * 64) - x).abs() <= 5 * spread + 1e-6).all())


@pytest.mark.parametrize(("held", "kind"), KINDS)
def test_dequantised_models_are_the_merged_ones(held: str, kind: str) -> None:
    model, space = quantised(held, kind, "opt")
    moved = fill(torch.empty(space.size), 5, "rademacher") * (0.02 if held == "scales" else 2.0)
    theta = space.theta0(model) + moved
    _, weights = plain_weights(model, held, kind)
    expected = Evaluator(model, space).losses(LossRequest(theta, make_batch(), (0.0,)))
    wanted = weights(theta)
    dequantise(model, space, theta)
    assert not any(hasattr(module, "dequantised") for module in model.modules())
    for name, weight in wanted.items():
        torch.testing.assert_close(model.get_submodule(name).weight.double(), weight, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(plain_losses(model, make_batch()).float(), expected[0, 0], rtol=1e-5, atol=1e-5)


def test_refusals(tmp_path: Path) -> None:
    model = build("llama-tied")
    with pytest.raises(SpaceError, match=r'"scales" trains quantised weights, but none .* nf4, fp4 or int8'):
        spaces.scales(model)
    nested = build("llama-tied")
    quantise(nested, "nf4")
    with pytest.raises(SpaceError, match=r"the scales of parameter .* are quantised too"):
        spaces.scales(nested)
    with pytest.raises(SpaceError, match=r'quantised to nf4, .*model.quantisation = "int8"'):
        spaces.codes(nested)
    quantise(model, "int8")
    space = spaces.codes(model)
    with pytest.raises(SpaceError, match=r"codes of parameter .* which is missing"):
        space.theta0(nested)
    with pytest.raises(SpaceError, match="never merged into quantised weights"):
        space.write(model, space.theta0(model))
    layer = model.model.layers[0].mlp.up_proj
    layer.forward = layer.forward  # as a wrapper would
    with pytest.raises(SpaceError, match=r"Linear8bit reads the quantised weight .*up_proj.weight in a way of its own"):
        Evaluator(model, space)

    data = make_data(tmp_path / "data")
    for message, changes in (
        (r'"scales" trains the scales .* needs model.quantisation = "nf4" or "fp4" or "int8", found "none"', {}),
        (
            r'"codes" .* needs .* = "int8", found "nf4"',
            {"space__kind": "codes", "model__quantisation": "nf4", "method__optimizer": "quzo"},
        ),
        (
            r"one quantisation for all, but model.client_quantisation is nf4, int8",
            {"model__quantisation": "nf4", "model__client_quantisation": ["nf4", "int8"]},
        ),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            config(data, **({"space__kind": "scales"} | changes))


def test_another_quantisation_is_refused_at_the_handshake(tmp_path: Path) -> None:
    data = make_data(tmp_path / "data")
    settings = {"space__kind": "scales", "model__quantisation": "nf4"}
    ours = Experiment(config(data, **settings))
    other = Experiment(config(data, **settings | {"model__quantisation": "fp4"}))
    assert ours.space.size == other.space.size
    folder = RunFolder.create(tmp_path / "run", ours.config)
    ledger = start(folder, ours)
    coordinator = Coordinator(ledger, ours.replica(ledger.spec))
    coordinator.admit(ours.worker(0, ours.replica(ledger.spec)).hello())
    with pytest.raises(ProtocolError, match=r"space_hash .*; scales are of one .* base, and this client's is 'fp4'"):
        coordinator.admit(other.worker(1, other.replica(ledger.spec)).hello())
    ledger.close()


@pytest.mark.parametrize(("kind", "steps"), [("nf4", 1), ("int8", 4)])
def test_a_run_over_scales_replays_and_merges(tmp_path: Path, kind: str, steps: int) -> None:
    settings = {"space__kind": "scales", "model__quantisation": kind, "federation__local_steps": steps}
    chosen = config(make_data(tmp_path / "data"), **settings, method__learning_rate=1e-4, data__clients=4)
    with closing(run(tmp_path / "run", chosen)) as ledger:
        experiment = Experiment(chosen)
        replica = experiment.replica(ledger.spec)
        replay(ledger, replica)  # compares the digest of every round
        assert replica.rounds == 3 and not torch.equal(replica.theta, experiment.theta0())
        assert export(chosen, ledger, 3, tmp_path / "merged") == replica.digest().hex()
    merged = load_model(str(tmp_path / "merged"), "causal").model
    whole = spaces.full(merged)
    batch = experiment.validation.batch(np.arange(4))
    ours = experiment.evaluator.losses(LossRequest(replica.theta, batch, (0.0,)))
    theirs = Evaluator(merged, whole).losses(LossRequest(whole.theta0(merged), batch, (0.0,)))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_scalars_are_cut_to_the_clip(tmp_path: Path) -> None:
    settings = {"space__kind": "scales", "model__quantisation": "nf4", "federation__rounds": 1, "data__clients": 1}
    data, scalars = make_data(tmp_path / "data"), {}
    for clip in (0.0, 0.4):
        chosen = config(data, **settings, method__queries=8, method__clip=clip)
        with closing(run(tmp_path / f"run-{clip}", chosen)) as ledger:
            (entry,) = ledger.read()
            scalars[clip] = entry.scalars
    assert float(np.abs(scalars[0.0]).min()) < 0.4 < float(np.abs(scalars[0.0]).max())
    assert np.array_equal(scalars[0.4], scalars[0.0].clip(-0.4, 0.4))
