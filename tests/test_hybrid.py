"""Hybrid runs: part of theta by first-order steps, whose gradients travel, are kept and replay; the rest by scalars."""

import copy
import dataclasses
import json
import sqlite3
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_runs import config, fedzo, make_data, options, run
from tiny import SIZE, Rows, answer, make_replica, make_spec, mean_loss, respond, rounds_of, start
from tiny import theta0 as first_theta
from torch import Tensor

from fedzo.config import from_flat
from fedzo.directions import fill
from fedzo.directions.base import Isotropic
from fedzo.errors import ConfigError, LedgerError, ProtocolError, SpaceError
from fedzo.evaluation import GradientRequest, LossRequest
from fedzo.experiment import Experiment
from fedzo.federation.artifact import artifact_name
from fedzo.federation.coordinator import replay
from fedzo.federation.ledger import NO_DIGEST, Ledger, LedgerRound
from fedzo.federation.messages import Contribution, Failure, RoundRecords, decode
from fedzo.federation.replica import theta_digest
from fedzo.federation.spec import RunSpec
from fedzo.optimizers import Hybrid, Records
from fedzo.optimizers.hybrid import Outside, first_order_ranges
from fedzo.spaces import Segment
from fedzo.structures import Layout

BODY, HEAD = slice(0, SIZE - 4), slice(SIZE - 4, SIZE)
SETTINGS = {
    "first_order": "head", "first_order_optimizer": "sgd", "first_order_rate": 0.05, "weight_decay": 0.0,
    "momentum": 0.9, "nesterov": False, "beta1": 0.9, "beta2": 0.99, "adam_eps": 1e-8,
    "smoothing": 0.1,
}  # fmt: skip


def hybrid_spec(first: str = "sgd", rate: float = 0.05, decay: float = 0.0, **changes: Any) -> RunSpec:
    """A tiny run whose head moves by first-order steps."""
    settings = SETTINGS | {"first_order_optimizer": first, "first_order_rate": rate, "weight_decay": decay}
    return make_spec(settings=settings, **changes)


def sent(data: bytes) -> Contribution:
    message = decode(data)
    assert isinstance(message, Contribution)
    return message


# -- the part, and directions that leave it out


def test_the_part_is_named_by_patterns() -> None:
    names = (("a.bias", 3), ("a.weight", 6), ("b.bias", 2), ("c.bias", 1), ("c.weight", 4))
    segments, at = [], 0
    for name, size in names:
        segments.append(Segment(name, (size,), at, size))
        at += size
    space = Layout(tuple(segments))
    assert first_order_ranges(space, ["c.*"]) == ((11, 5),)  # neighbours are one range
    assert first_order_ranges(space, ["c.bias", "a.*"]) == ((0, 9), (11, 1))
    assert first_order_ranges(space, ["*.bias"]) == ((0, 3), (9, 3))
    with pytest.raises(SpaceError, match=r"first_order = head, d\.\* matches no trainable .* this space: a\.bias$"):
        first_order_ranges(space, ["head", "d.*"])
    with pytest.raises(SpaceError, match="matches every trainable parameter, which leaves none to the zeroth-order"):
        first_order_ranges(space, ["*"])
    packed = Layout((*segments, Segment("d.weight", (2,), at, 2, holds="scales")))
    with pytest.raises(SpaceError, match=r"names d\.weight, of which theta holds the scales"):
        first_order_ranges(packed, ["d.*"])


def test_directions_are_zero_within_the_part_and_the_others_outside() -> None:
    size, seed, ranges = 300, 2**64 - 1, ((0, 7), (130, 1), (200, 60))
    inside = torch.zeros(size, dtype=torch.bool)
    for offset, length in ranges:
        inside[offset : offset + length] = True
    z = fill(torch.empty(size), seed, "gaussian")
    z[inside] = 0.0
    theta, outside = torch.randn(size), Outside(Isotropic("gaussian"), ranges)
    for start_, stop in ((0, size), (3, 5), (5, 131), (131, 260), (180, 210), (270, 300)):
        part, at = slice(start_, stop), start_
        assert torch.equal(outside.fill(torch.empty(stop - start_), seed, offset=at), z[part])
        moved = theta[part] + 0.3 * z[part]
        kept = theta.clone()
        assert torch.equal(outside.axpy(kept[part], seed, 0.3, offset=at, out=torch.empty(stop - start_)), moved)
        assert torch.equal(kept, theta)
        assert torch.equal(outside.axpy(kept[part], seed, 0.3, offset=at), moved)
        assert torch.equal(kept[part], moved)
    seeds, coefficients = np.array([seed, 5], np.uint64), np.array([0.5, -2.0], np.float32)
    found = outside.replay(theta.clone(), seeds, coefficients)
    assert torch.equal(found[inside], theta[inside])
    assert torch.equal(found[~inside], Isotropic("gaussian").replay(theta.clone(), seeds, coefficients)[~inside])


# -- tiny federated runs


@pytest.mark.parametrize("local_steps", [1, 4])
@pytest.mark.parametrize(
    ("seeds", "aggregation", "rules"),
    [
        ("shared", "mean", ("sgd", "adam")),
        ("shared", "median", ("adam", "momentum")),
        ("shared", "trimmed-mean", ("sign", "sgd")),
        ("independent", "mean", ("momentum", "adamw")),
        ("independent", "uniform", ("hiso", "sgd")),
        ("shared", "norm-bound", ("sgd", "adam")),
        ("independent", "norm-bound", ("momentum", "sgd")),
    ],
)
def test_replay_late_joiner_and_resume_stand_where_the_run_does(
    tmp_path: Path, seeds: str, aggregation: str, rules: tuple[str, str], local_steps: int
) -> None:
    spec = hybrid_spec(
        rules[1], 0.02, 0.1, optimizer=rules[0], seeds=seeds, aggregation=aggregation, local_steps=local_steps
    )
    whole = start(tmp_path / "whole", spec)
    head = whole.finish()
    entries = rounds_of(whole.ledger)
    assert all(e.gradients is not None and e.gradients.shape == (local_steps, 4) for e in entries)
    assert mean_loss(whole.coordinator.replica.theta) < mean_loss(first_theta())
    replica = make_replica(spec)
    for entry in entries:
        before = replica.theta.clone()
        replica.apply([entry.records()])
        assert theta_digest(replica.theta) == entry.digest
        assert not torch.equal(replica.theta[BODY], before[BODY]) and not torch.equal(replica.theta[HEAD], before[HEAD])
    fused = make_replica(spec)
    replay(whole.ledger, fused)
    assert fused.digest() == entries[-1].digest == whole.coordinator.replica.digest()

    parts = start(tmp_path / "parts", spec)
    for _ in range(3):
        parts.round()
    parts.coordinator.open_round()
    parts.ledger.close()  # dies with the fourth round in flight
    again = start(tmp_path / "parts", spec, range(3))
    again.join(3)
    assert again.finish() == head


def test_gradients_travel_behind_second_scalars(tmp_path: Path) -> None:
    spec = hybrid_spec("adam", 0.02, estimator="hizoo", optimizer="hizoo", family="gaussian")
    run_ = start(tmp_path, spec)
    assert run_.round().bytes_up == 4 * (36 + 16 * 3 + 4 * 4)
    run_.finish()
    late = make_replica(spec)
    replay(run_.ledger, late)
    (last, *_) = reversed(rounds_of(run_.ledger))
    assert last.scalars.shape == (1, 6) and last.gradients is not None and last.gradients.shape == (1, 4)
    assert late.digest() == last.digest and mean_loss(late.theta) < mean_loss(first_theta())


@pytest.mark.parametrize(("size", "kind"), [(400, "records"), (SIZE, "snapshot")])
@pytest.mark.parametrize(("seeds", "local_steps"), [("shared", 1), ("independent", 4)])
def test_a_late_joiner_is_sent_what_is_cheaper(
    tmp_path: Path, size: int, kind: str, seeds: str, local_steps: int
) -> None:
    """Records with their arrays, or theta with the state of both rules."""
    spec = hybrid_spec("adam", 1e-3, seeds=seeds, local_steps=local_steps, size=size, queries=1)
    run_ = start(tmp_path, spec, range(3))
    for _ in range(4):
        run_.round()
    late = run_.join(3)
    run_.finish()
    caught = run_.plans[(4, 3)][0].catch_up
    entries = rounds_of(run_.ledger)[:4]
    rule, state = run_.coordinator.replica.rule, run_.coordinator.replica.state
    records = sum(RoundRecords(e.seeds, e.scalars, e.gradients).nbytes for e in entries)
    whole = rule.snapshot_bytes(run_.coordinator.replica.theta, state)
    assert whole == len(rule.snapshot(run_.coordinator.replica.theta, state)) == 4 * size + 2 * 4 * 4 + 16
    assert caught.kind == kind == ("snapshot" if records > whole else "records")
    assert theta_digest(late.replica.theta) == rounds_of(run_.ledger)[4].digest
    assert 3 in rounds_of(run_.ledger)[5].clients
    ours, theirs = late.replica.state, make_replica(spec)
    theirs.apply(entry.records() for entry in rounds_of(run_.ledger)[:5])
    assert ours.keys() == theirs.state.keys() and all(torch.equal(ours[k], theirs.state[k]) for k in ours)


def transcribed(make: Any, rounds: int, local_steps: int) -> Tensor:
    """The head after plain federated optimisation with torch's own optimizer, all data a step, the body at theta0."""
    rows, body = [Rows(client) for client in range(4)], first_theta()[BODY].double()
    counts = np.array([len(r) for r in rows])
    head = torch.nn.Parameter(first_theta()[HEAD].double())
    optimizer = make([head])

    def gradient_of(parameter: Tensor, data: Rows) -> Tensor:
        loss = (0.5 * (data.x.double() @ torch.cat([body, parameter]) - data.y.double()) ** 2).mean()
        return torch.autograd.grad(loss, parameter)[0]

    for _ in range(rounds):
        found = []
        for data in rows:
            own = torch.nn.Parameter(head.detach().clone())
            local = make([own])
            local.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            steps = []
            for _ in range(local_steps):
                own.grad = gradient_of(own, data)
                steps.append(own.grad.clone())
                local.step()
            found.append(torch.stack(steps))
        mean = sum(g * (n / counts.sum()) for g, n in zip(found, counts, strict=True))
        for step in mean:
            head.grad = step
            optimizer.step()
    return head.detach()


@pytest.mark.parametrize("local_steps", [1, 4])
@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("sgd", lambda p: torch.optim.SGD(p, lr=0.05, weight_decay=0.1)),
        ("momentum", lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1)),
        ("adam", lambda p: torch.optim.Adam(p, lr=0.05, betas=(0.9, 0.99), weight_decay=0.1)),
        ("adamw", lambda p: torch.optim.AdamW(p, lr=0.05, betas=(0.9, 0.99), weight_decay=0.1)),
    ],
)
def test_the_part_alone_is_plain_federated_optimisation(tmp_path: Path, name: str, make: Any, local_steps: int) -> None:
    """With a zeroth-order rate of 0 the body stays, and what is left is torch's own optimizer on averaged gradients."""
    spec = hybrid_spec(
        name, 0.05, 0.1, learning_rate=0.0, schedule="constant", warmup_steps=0, batch_size=100, local_steps=local_steps
    )
    done = start(tmp_path, spec)
    done.finish()
    theta = done.coordinator.replica.theta
    assert torch.equal(theta[BODY], first_theta()[BODY])
    torch.testing.assert_close(theta[HEAD].double(), transcribed(make, 6, local_steps), rtol=1e-4, atol=1e-5)


def test_weight_decay_acts_once_on_each_part_at_its_own_rate() -> None:
    spec = hybrid_spec("sgd", 0.5, 0.25, learning_rate=0.125, schedule="constant", warmup_steps=0)
    replica = make_replica(spec)
    seeds, scalars = np.ones((1, 3), np.uint64), np.zeros((1, 3), np.float32)
    replica.apply([Records(0, seeds, scalars, np.zeros((1, 4), np.float32))])
    assert torch.equal(replica.theta[BODY], first_theta()[BODY] * (1 - 0.125 * 0.25))
    assert torch.equal(replica.theta[HEAD], first_theta()[HEAD] * (1 - 0.5 * 0.25))
    assert isinstance(replica.rule, Hybrid) and replica.rule.ranges == ((SIZE - 4, 4),)


def test_a_step_is_both_at_one_theta_and_batch(tmp_path: Path) -> None:
    """The body moves along scalars of directions that leave the head alone; both parts move before the next step."""
    spec = hybrid_spec(schedule="constant", warmup_steps=0, local_steps=2)
    run_ = start(tmp_path, spec)
    (plan, *_), seen = run_.coordinator.open_round(), []

    def watched(request: Any) -> Tensor:
        seen.append(dataclasses.replace(request, theta=request.theta.clone()))
        return respond(request)

    message = sent(answer(run_.workers[0], plan.to_bytes(), watched))
    assert [type(request) for request in seen] == [LossRequest, GradientRequest] * 2
    assert message.gradients is not None and message.gradients.shape == (2, 4) and message.scalars.shape == (2, 3)
    theta = first_theta()
    for k, (loss, gradient) in enumerate(zip(seen[::2], seen[1::2], strict=True)):
        assert torch.equal(loss.theta, gradient.theta) and loss.batch is gradient.batch
        torch.testing.assert_close(loss.theta, theta)
        x, y = loss.batch.inputs["x"], loss.batch.inputs["y"]
        whole = ((x @ theta - y)[:, None] * x).mean(0)
        torch.testing.assert_close(torch.from_numpy(message.gradients[k]), whole[HEAD], rtol=1e-4, atol=1e-4)
        z = torch.stack([fill(torch.empty(SIZE), seed, "rademacher") for seed in plan.seeds[k].tolist()])
        z[:, HEAD] = 0.0
        along = z @ whole  # of a quadratic the central difference is exact
        torch.testing.assert_close(torch.from_numpy(message.scalars[k]), along, rtol=1e-3, atol=1e-3)
        theta = theta - spec.learning_rate / 3 * (along @ z)
        theta[HEAD] -= 0.05 * whole[HEAD]
    assert torch.equal(run_.workers[0].replica.theta, first_theta())


# -- what is wrong is dropped, and what is damaged is found


def test_wrong_arrays_are_dropped_with_their_reason(tmp_path: Path) -> None:
    spec, right = hybrid_spec(clients=8, quorum=2), np.ones((1, 4), np.float32)
    wrong = {
        1: (None, "shape"),
        2: (np.ones((1, 3), np.float32), "shape"),
        3: (np.ones((1, 5), np.float32), "malformed"),  # longer than any right message
        4: (np.array([[0, 0, np.nan, 0]], np.float32), "not-finite"),
        5: (np.array([[0, 0, -np.inf, 0]], np.float32), "not-finite"),
        6: (np.array([[0, -1.1e4, 0, 0]], np.float32), "bound"),
        7: (right * 1e4, None),
    }

    def tamper(round_: int, client: int, data: bytes) -> Iterable[bytes]:
        gradients = wrong.get(client, (right, None))[0]
        yield dataclasses.replace(sent(data), gradients=gradients).to_bytes()

    run_ = start(tmp_path, spec)
    summary = run_.round(tamper)
    assert summary.dropped == {"bound": 1, "malformed": 1, "not-finite": 2, "shape": 2} and summary.accepted == 2
    (entry,) = rounds_of(run_.ledger)
    assert entry.clients == (0, 7) and entry.gradients is not None
    first, last = len(Rows(0)), len(Rows(7))
    np.testing.assert_allclose(entry.gradients, right * (first + 1e4 * last) / (first + last), rtol=1e-6)

    below = run_.round(lambda round_, client, data: [data] if client == 0 else [])
    assert below.accepted == 0
    entry = rounds_of(run_.ledger)[1]
    assert entry.gradients is None and entry.seeds.size == 0 and entry.digest == rounds_of(run_.ledger)[0].digest

    plain = start(tmp_path / "plain", make_spec())
    for entries, reason in ((0, "malformed"), (4, "malformed")):  # a run without a part takes no arrays
        array = np.ones((1, entries), np.float32)
        found = plain.round(lambda r, c, data, a=array: [dataclasses.replace(sent(data), gradients=a).to_bytes()])
        assert found.dropped == {reason: 4}


def test_a_gradient_that_is_not_finite_is_the_clients_failure(tmp_path: Path) -> None:
    run_ = start(tmp_path, hybrid_spec())
    (plan, *_) = run_.coordinator.open_round()

    def evaluate(request: Any) -> Tensor:
        found = respond(request)
        return found / 0.0 if isinstance(request, GradientRequest) else found

    message = decode(answer(run_.workers[0], plan.to_bytes(), evaluate))
    assert isinstance(message, Failure) and message.reason == "not-finite"


def test_records_without_their_gradient_move_nothing() -> None:
    replica = make_replica(hybrid_spec())
    seeds, scalars = np.ones((1, 3), np.uint64), np.ones((1, 3), np.float32)
    for gradients, found in ((None, 0), (np.ones((1, 3), np.float32), 3)):
        with pytest.raises(ProtocolError, match=f"gradient of step 0 has {found} entries, wanted 4"):
            replica.apply([Records(0, seeds, scalars, gradients)])
    assert torch.equal(replica.theta, first_theta())
    with pytest.raises(ValueError, match=r"gradients \(2, 4\) must have the shape \[S, F\] with S = 1"):
        Records(0, seeds, scalars, np.ones((2, 4), np.float32))


def test_a_round_with_its_gradients_survives_the_ledger(tmp_path: Path) -> None:
    spec = hybrid_spec(local_steps=2)
    rng = np.random.default_rng(1)
    shared = rng.normal(size=(2, 4)).astype(np.float32)
    written = [
        LedgerRound(
            number, rng.integers(0, 2**63, (2, width), np.uint64), rng.normal(size=(2, width)).astype(np.float32),
            (0, 2), bytes([number]) * 32, gradients,
        )
        for number, (width, gradients) in enumerate([(3, shared), (0, None), (1, shared), (8, -shared), (2, None)])
    ]  # fmt: skip
    with closing(Ledger.create(tmp_path / "ledger.sqlite", spec)) as ledger:
        for entry in written:
            ledger.append(entry, {})
        for entry, found in zip(written, ledger.read(), strict=True):
            for name in ("seeds", "scalars"):
                assert getattr(entry, name).tobytes() == getattr(found, name).tobytes()
            assert (entry.gradients is None) == (found.gradients is None)
            if entry.gradients is not None and found.gradients is not None:
                assert np.array_equal(entry.gradients, found.gradients) and found.gradients.shape == (2, 4)
            assert found.clients == (0, 2) and found.digest == entry.digest
    kept = sqlite3.connect(tmp_path / "ledger.sqlite").execute("SELECT hash, data FROM artifacts").fetchall()
    assert dict(kept) == {artifact_name(a.tobytes()): a.tobytes() for a in (shared, -shared)}
    # A round costs its chain 32 bytes more; without gradients it is as long as ever.
    assert len(written[0].to_bytes()) == len(dataclasses.replace(written[0], gradients=None).to_bytes()) + 32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("DELETE FROM artifacts", r"artifact \w+ is missing or damaged, and round 1 is made of it"),
        ("UPDATE artifacts SET data = zeroblob(16)", "is missing or damaged, and round 1"),
        ("UPDATE artifacts SET data = 'text'", "is missing or damaged, and round 1"),
    ],
)
def test_a_damaged_artifact_is_found(tmp_path: Path, change: str, message: str) -> None:
    run_ = start(tmp_path, hybrid_spec())
    run_.finish()
    (first, second, *_), file = rounds_of(run_.ledger), tmp_path / "ledger.sqlite"
    run_.ledger.close()
    assert len(second.artifacts) == 1
    with closing(sqlite3.connect(file)) as db, db:
        db.execute(f"{change} WHERE hash = ?", [*second.artifacts])
    with closing(Ledger(file)) as ledger:
        assert next(ledger.read(0)).gradients is not None and first.digest != NO_DIGEST
        with pytest.raises(LedgerError, match=message):
            replay(ledger, make_replica(ledger.spec))


def test_arrays_are_counted_in_the_bytes(tmp_path: Path) -> None:
    spec = hybrid_spec(local_steps=2, size=400)
    run_ = start(tmp_path, spec)
    summaries = [run_.round() for _ in range(3)]
    up = 36 + 12 * 2 * 3 + 4 * 2 * 4
    assert [s.bytes_up for s in summaries] == [4 * up] * 3
    plan, caught = 89 + 8 * 2 * 3, 7 + 12 * 2 * 3 + 4 + 4 * 2 * 4
    assert [s.bytes_down for s in summaries] == [4 * plan, 4 * (plan + caught), 4 * (plan + caught)]
    assert [s.artifact_bytes for s in summaries] == [0, 4 * 32, 4 * 32]


# -- what it is valid under


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"federation.seeds": "pool"}, r'first_order = "head\.\*, b" needs federation.seeds = "shared" or'),
        ({"space.theta_dtype": "bfloat16"}, 'first_order = .* needs space.theta_dtype = "float32", found "bfloat16"'),
        ({"method.optimizer": "conservative"}, 'needs method.optimizer = .* look at theta as a whole'),
        ({"method.optimizer": "dizo"}, "needs method.optimizer"),
        ({"method.first_order_optimizer": "qzo"}, "needs method.first_order_optimizer = .* more than a gradient"),
        ({"method.first_order_optimizer": "adm"}, r"unknown method.first_order_optimizer 'adm'. Did you mean 'adam'\?"),
        ({"method.first_order_rate": 0}, r"method.first_order_rate: .*greater than 0"),
        ({"space.kind": "codes", "model.quantisation": "int8", "method.optimizer": "quzo"}, "needs method.optimizer"),
    ],
)  # fmt: skip
def test_what_is_not_valid_is_refused_with_the_reason(changes: dict[str, Any], message: str) -> None:
    from_flat(given := {"method.first_order": "head.*, b"})
    with pytest.raises(ConfigError, match=message):
        from_flat(given | changes)


def test_no_privacy_mode_covers_arrays_and_other_runs_know_nothing_of_them() -> None:
    parts = dict((name, part) for part, name in from_flat({"method.first_order": "head"}).parts())
    assert parts["first_order"] is Hybrid and Hybrid.private == ()
    settings = from_flat({"method.first_order": ["a", "b.*"], "method.first_order_optimizer": "adam"}).settings()
    assert settings["first_order"] == "a, b.*" and settings["beta1"] == 0.9
    assert not any(name.startswith("first_order") for name in from_flat({}).settings())
    spec = make_spec(settings=settings)
    assert RunSpec.from_json(spec.to_json()) == spec


# -- the embedded model


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        (
            {"method__first_order": "model.layers.1.*, model.norm.*", "method__first_order_optimizer": "adam"},
            201_088,
        ),
        (
            {
                "space__kind": "adapter", "federation__local_steps": 4, "federation__seeds": "independent",
                "model__quantisation": "nf4", "method__first_order": "*layers.1.*",
                "method__first_order_optimizer": "momentum", "method__optimizer": "adam",
            },
            4096,
        ),
    ],
    ids=["last-block", "lora"],
)  # fmt: skip
def test_a_run_of_the_embedded_model_replays_exports_and_verifies(
    tmp_path: Path, changes: dict[str, Any], part: int
) -> None:
    data = make_data(tmp_path / "data")
    chosen = changes | {"method__learning_rate": 1e-4, "method__first_order_rate": 1e-3}
    said = fedzo("run", "--out", tmp_path / "run", "--json", *options(data, **chosen))
    assert said.code == 0, said.err
    figures = json.loads(said.out)
    steps = chosen.get("federation__local_steps", 1)
    with closing(Ledger(tmp_path / "run" / "ledger.sqlite")) as ledger:
        entries = list(ledger.read())
        first, *_ = (entry.gradients for entry in entries)
    assert first is not None and first.shape == (steps, part) and np.abs(first).max() > 0
    assert figures["bytes_up_per_client"] == 3 * (36 + 12 * steps * 2 + 4 * first.size)
    assert figures["artifact_bytes"] == 2 * 3 * 4 * first.size
    assert figures["bytes_down_per_client"] > 2 * 4 * first.size

    verified = fedzo("verify", tmp_path / "run", "--json")
    assert verified.code == 0, verified.err
    assert json.loads(verified.out)["digests_compared"] == 3
    out = fedzo("replay", tmp_path / "run", "--out", tmp_path / "model", "--json")
    assert out.code == 0, out.err
    assert json.loads(out.out)["theta_digest"] == entries[-1].digest.hex()
    card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    assert "and gradients of a part" in card and f"by {chosen['method__first_order_optimizer']} on gradients" in card
    shown = fedzo("inspect", tmp_path / "run")
    assert shown.code == 0 and "method.first_order = " in shown.out and "artifact bytes" in shown.out


def test_a_part_that_the_model_does_not_have_is_named_before_there_is_a_run(tmp_path: Path) -> None:
    chosen = options(make_data(tmp_path / "data"), method__first_order="lm_head.*")
    said = fedzo("run", "--out", tmp_path / "run", *chosen)
    assert said.code != 0 and "matches no trainable parameter" in said.err and "model.embed_tokens.weight" in said.err
    assert not (tmp_path / "run").exists()


def test_the_last_block_by_first_order_steps_learns_faster_than_without(tmp_path: Path) -> None:
    """The point of it: the same few rounds, with and without first-order steps on the last block."""
    losses = {}
    for name, changes in {
        "zo": {},
        "hybrid": {"method__first_order": "model.layers.1.*", "method__first_order_rate": 0.05},
    }.items():
        chosen = config(make_data(tmp_path / "data"), federation__rounds=8, method__learning_rate=1e-4, **changes)
        with closing(run(tmp_path / name, chosen)) as ledger:
            losses[name] = ledger.evaluations("validation")[8]["loss"]
            experiment = Experiment(chosen)
            replica = experiment.replica(ledger.spec)
            replay(ledger, replica)
            assert replica.digest() == list(ledger.read())[-1].digest
    assert losses["hybrid"] < losses["zo"] - 0.05
