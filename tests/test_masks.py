"""Mask artifacts: selection, coding, round trip, damage."""

import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fedzo.errors import SpaceError
from fedzo.spaces import Mask, MaskEntry, draw_mask, overlap
from fedzo.spaces import selection as selection_module
from fedzo.spaces.mask import decode, encode
from fedzo.spaces.selection import Selection, draw, shares

BASE = "f" * 64


def model(order: str = "abc", seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    weights = {name: nn.Linear(5, 4 + number) for number, name in enumerate("abc")}
    return nn.ModuleDict({name: weights[name] for name in order})


def entry(indices: list[int], name: str = "a.weight", shape: tuple[int, ...] = (4, 5)) -> MaskEntry:
    return MaskEntry(name, shape, torch.tensor(indices, dtype=torch.int64), torch.arange(float(len(indices))))


def same(one: Mask, other: Mask) -> bool:
    return one.to_bytes() == other.to_bytes() and all(
        a.name == b.name
        and a.shape == b.shape
        and torch.equal(a.indices, b.indices)
        and torch.equal(a.values, b.values)
        for a, b in zip(one.entries, other.entries, strict=True)
    )


@pytest.mark.parametrize(
    "indices",
    [
        [],
        [0],
        [127, 128, 256, 257],
        [0, 1, 2, 3 + 2**7, 4 + 2**14, 5 + 2**21],
        [5, 2**28 + 4, 2**28 + 2**28 + 6, 2**28 + 2**33, 2**28 + 2**33 + 2**35],
        list(range(0, 70000, 7)),
    ],
)
def test_indices_are_coded_as_gaps_of_at_most_five_bytes(indices: list[int]) -> None:
    coded = encode(np.array(indices, np.int64))
    assert coded.dtype == np.uint8 and coded.size <= 5 * len(indices)
    assert decode(coded, len(indices)).tolist() == indices
    # The definition, one byte at a time.
    expected, last = [], -1
    for index in indices:
        gap, last = index - last - 1, index
        while gap >= 128:
            expected.append(gap % 128 + 128)
            gap //= 128
        expected.append(gap)
    assert coded.tolist() == expected


def test_gaps_beyond_five_bytes_are_refused() -> None:
    with pytest.raises(SpaceError, match=r"2\*\*35"):
        encode(np.array([0, 2**35 + 1]))
    with pytest.raises(ValueError, match="are not 1 indices"):
        decode(np.array([0x80] * 5 + [1], np.uint8), 1)


def test_an_artifact_has_one_form_and_comes_back_with_gaps_and_empty_tensors(tmp_path: Path) -> None:
    entries = (entry([], "a"), entry([3, 2**28 + 5, 2**29 + 2**28], "b", (2**20, 2**10)), entry([0, 19], "c"))
    mask = Mask(BASE, "random", {"seed": 3, "density": 0.5}, entries)
    assert same(Mask.from_bytes(mask.to_bytes()), mask)
    assert Mask(BASE, "random", {"density": 0.5, "seed": 3}, entries).hash == mask.hash
    assert replace(mask, settings={"seed": 4, "density": 0.5}).hash != mask.hash
    assert mask.size == 5 and mask.index_bytes == 1 + 5 + 5 + 1 + 1
    mask.save(tmp_path / "mask.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["mask.safetensors"]
    assert Mask.load(tmp_path / "mask.safetensors").hash == mask.hash


def test_an_artifact_is_a_safetensors_file() -> None:
    from safetensors.torch import load

    mask = draw_mask(model(), 0.3, "magnitude", BASE)
    tensors = load(mask.to_bytes())
    assert torch.equal(tensors["values"], torch.cat([e.values for e in mask.entries]))
    assert tensors["indices"].dtype == torch.uint8 and tensors["indices"].numel() == mask.index_bytes <= 5 * mask.size


def test_damage_is_refused(tmp_path: Path) -> None:
    data = draw_mask(model(), 0.3, "random", BASE).to_bytes()
    # A changed byte is seen, or gives another mask, which the hash tells apart.
    unseen = []
    for place in range(0, len(data), 3):
        changed = bytearray(data)
        changed[place] ^= 0x80
        with suppress(SpaceError):
            unseen.append(Mask.from_bytes(bytes(changed)))
    original = Mask.from_bytes(data)
    assert all(mask.hash != original.hash for mask in unseen)
    for cut in (0, 4, 40, len(data) // 2, len(data) - 1):
        with pytest.raises(SpaceError, match="damaged or no mask"):
            Mask.from_bytes(data[:cut])
    with pytest.raises(SpaceError, match="damaged"):
        Mask.from_bytes(data + b"\0")
    path = tmp_path / "mask.safetensors"
    path.write_bytes(b"no mask")
    with pytest.raises(SpaceError, match=r"mask\.safetensors is damaged or no mask"):
        Mask.load(path)
    with pytest.raises(SpaceError, match="does not exist"):
        Mask.load(tmp_path / "none")


def tampered(**changes: object) -> bytes:
    """An artifact with another description."""
    data = draw_mask(model(), 0.3, "random", BASE).to_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    description = json.loads(header["__metadata__"]["mask"])
    header["__metadata__"]["mask"] = json.dumps({**description, **changes}, sort_keys=True, separators=(",", ":"))
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "fedzo-mask-1"}, "fedzo-mask-1"),
        ({"method": "guess"}, "damaged"),
        ({"tensors": [["a.weight", [1, 2], 22, 22]]}, "out of range"),
        ({"tensors": [["a.weight", [9, 9], 1, 22]]}, "damaged"),
        ({"tensors": [["a.weight", [9, 9], -1, 22]]}, "damaged"),
        ({"tensors": "all"}, "damaged"),
        ({"tensors": []}, "damaged"),
    ],
)
def test_another_description_is_refused(changes: dict[str, object], message: str) -> None:
    assert Mask.from_bytes(tampered()).size == 22 == Mask.from_bytes(tampered()).index_bytes
    with pytest.raises(SpaceError, match=f"the artifact.*{message}"):
        Mask.from_bytes(tampered(**changes), "the artifact")


@pytest.mark.parametrize(
    ("indices", "message"),
    [([0, 20], "index 20 is out of range"), ([-1, 3], "index -1 is out of range"), ([3, 3], "ascending")],
)
def test_wrong_indices_are_refused(indices: list[int], message: str) -> None:
    with pytest.raises(SpaceError, match=f"a.weight.*{message}"):
        entry(indices)


def test_wrong_values_are_refused() -> None:
    with pytest.raises(SpaceError, match="2 indices but 1 values"):
        MaskEntry("a", (4,), torch.tensor([0, 1]), torch.zeros(1))
    with pytest.raises(SpaceError, match="not finite"):
        MaskEntry("a", (4,), torch.tensor([0]), torch.tensor([torch.nan]))
    with pytest.raises(SpaceError, match="each once"):
        Mask(BASE, "random", {}, (entry([0]), entry([1])))


def test_a_mask_is_for_one_model_and_revision() -> None:
    mask = draw_mask(model(), 0.3, "random", BASE)
    mask.check(model(seed=1), BASE)
    with pytest.raises(SpaceError, match=r"another model.*eeee.*or revision|another model"):
        mask.check(model(), "e" * 64)
    with pytest.raises(SpaceError, match=r"a\.weight.*missing"):
        mask.check(nn.Linear(5, 4), BASE)
    with pytest.raises(SpaceError, match=r"a\.weight.*has shape \(6, 5\)"):
        mask.check(nn.ModuleDict({name: nn.Linear(5, 6) for name in "abc"}), BASE)


def test_the_order_of_registration_changes_nothing() -> None:
    for method in ("random", "magnitude"):
        masks = [draw_mask(m, 0.3, method, BASE) for m in (model("abc"), reordered(model("abc"), "cab"))]
        assert masks[0].hash == masks[1].hash


def reordered(source: nn.Module, order: str) -> nn.Module:
    return nn.ModuleDict({name: source.get_submodule(name) for name in order})


def test_overlap_counts_common_entries() -> None:
    one = Mask(BASE, "random", {}, (entry([0, 2, 4], "a"), entry([1, 2], "b")))
    other = Mask(BASE, "random", {}, (entry([2, 3, 4], "a"), entry([1], "c")))
    assert overlap(one, other) == overlap(other, one) == 2 and overlap(one, one) == 5


@pytest.mark.parametrize("per_tensor", [False, True])
@pytest.mark.parametrize("density", [0.001, 0.2, 0.9, 1.0])
def test_streaming_selection_is_exact_in_any_order(
    per_tensor: bool, density: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    scores = {name: rng.integers(0, 30, size).astype(np.float32) for name, size in (("c", 400), ("a", 7), ("b", 90))}
    sizes = {name: values.size for name, values in scores.items()}
    entries = [(-value, name, i) for name in sorted(scores) for i, value in enumerate(scores[name])]
    quotas = shares(sizes, density, per_tensor)
    assert sum(quotas.values()) == max(1, round(density * 497))
    groups = [[e for e in entries if e[1] == name] for name in quotas] if per_tensor else [entries]
    counts = quotas.values()
    expected = {(name, i) for group, k in zip(groups, counts, strict=True) for _, name, i in sorted(group)[:k]}
    for chunk, order in ((7, "abc"), (64, "cba"), (10**6, "bca")):
        monkeypatch.setattr(selection_module, "CHUNK", chunk)
        selection = Selection(sizes, density, per_tensor)
        for name in order:
            half = sizes[name] // 2
            selection.add(name, torch.from_numpy(scores[name][half:]), half)
            selection.add(name, torch.from_numpy(scores[name][:half]))
        chosen = selection.chosen()
        assert {(name, i) for name, indices in chosen.items() for i in indices.tolist()} == expected
        assert all((np.diff(indices) > 0).all() for indices in chosen.values())


def test_selection_holds_a_bounded_number_of_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection_module, "CHUNK", 100)
    selection = Selection({"a": 10**5}, 0.001)
    for start in range(0, 10**5, 1000):
        selection.add("a", torch.arange(start, start + 1000), start)
        assert sum(top._held for top in selection._tops.values()) <= 2 * 100 + 100
    assert selection.chosen()["a"].tolist() == list(range(10**5 - 100, 10**5))


def test_scores_must_be_finite() -> None:
    with pytest.raises(SpaceError, match="score of parameter a is not finite"):
        Selection({"a": 2}, 0.5).add("a", torch.tensor([1.0, torch.nan]))


def test_a_budget_of_each_tensor() -> None:
    sizes = {"a": 100, "b": 100, "c": 37}
    drawn = draw(sizes, 0.1, seed=5, per_tensor=True)
    assert {name: len(indices) for name, indices in drawn.items()} == {"a": 10, "b": 10, "c": 4}
    assert drawn["a"].tolist() != drawn["b"].tolist()
    assert shares({"a": 1, "b": 1, "c": 1}, 0.5, True) == {"a": 1, "b": 1, "c": 0}
    mask = draw_mask(model(), 0.2, "magnitude", BASE, per_tensor=True)
    assert [e.indices.numel() for e in mask.entries] == [4, 5, 6]
