"""Every architecture under every scheme: the losses are those of a plain model with the values written into it."""

import copy
from pathlib import Path

import pytest
import torch
from architectures import CONFIGS, SCHEMES, TARGETS, VIRTUAL, batch_of, build, plain_losses, with_scheme

from fedzo.directions import fill
from fedzo.errors import ModelError
from fedzo.evaluation import Evaluator, LossRequest
from fedzo.models import add_adapter, prefix_activations

DOCUMENT = Path(__file__).parents[1] / "docs" / "models.md"


def table() -> dict[str, dict[str, str]]:
    """What docs/models.md says: architecture -> scheme -> "yes", "targets" or "no"."""
    rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in DOCUMENT.open() if line.startswith("|")]
    return {row[0]: dict(zip(rows[0][1:], row[1:], strict=True)) for row in rows[2:]}


STATED = table()


def stated(name: str, scheme: str) -> str:
    return STATED[name.split(",", maxsplit=1)[0].removesuffix(" encoder")][scheme]


def test_the_table_is_complete() -> None:
    assert set(STATED) == {name.split(",")[0].removesuffix(" encoder") for name in CONFIGS}
    assert all(tuple(row) == SCHEMES and set(row.values()) <= {"yes", "targets", "no"} for row in STATED.values())


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", list(CONFIGS))
def test_losses_are_those_of_a_model_with_the_values_written_into_it(name: str, scheme: str) -> None:
    targets: tuple[str, ...] = ()
    if stated(name, scheme) != "yes":
        with pytest.raises(ModelError, match=r"space\.targets" if stated(name, scheme) == "targets" else "use lora"):
            with_scheme(build(name), scheme)
        if stated(name, scheme) == "no":
            with pytest.raises(ModelError, match="use lora"):
                add_adapter(build(name), scheme)
            return
        targets = TARGETS[name]
    model, space = with_scheme(build(name), scheme, targets)
    batch, eps = batch_of(name), 0.02
    theta = space.theta0(model) + 0.01 * torch.randn(space.size, generator=torch.Generator().manual_seed(1))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    request = LossRequest(theta, batch, (eps, -eps), seeds=(5, 6))
    losses = Evaluator(model, space, "paired").losses(request)
    assert torch.equal(losses, Evaluator(model, space, "sequential").losses(request))
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert not torch.allclose(losses[:, 0], losses[:, 1], rtol=1e-6, atol=0.0)
    by_hand = copy.deepcopy(model)
    for seed, pair in zip((5, 6), losses, strict=True):
        z = fill(torch.empty(space.size), seed, "rademacher")
        for a, found in zip((eps, -eps), pair, strict=True):
            space.write(by_hand, theta + torch.tensor(a) * z)
            with torch.no_grad():
                torch.testing.assert_close(found, plain_losses(by_hand, batch), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", ["opt, projected", "llama", "mistral", "qwen3", "gpt2", "bert", "roberta encoder"])
def test_a_prefix_of_activations_is_what_the_tokens_themselves_would_be(name: str) -> None:
    """With the first values of the prefix, the text's outputs are those behind the tokens that left them."""
    loaded, batch = build(name), batch_of(name)
    base = loaded.model.encoder if name.endswith("encoder") else loaded.model
    ids, seen = batch.inputs["input_ids"][:1], []
    length = ids.shape[1]

    def note(_: object, args: tuple[torch.Tensor, ...], keywords: dict[str, torch.Tensor]) -> None:
        seen.append(args[0] if args else keywords["input_ids"])

    handle = base.get_input_embeddings().register_forward_pre_hook(note, with_kwargs=True)
    values = prefix_activations(loaded, VIRTUAL, seed=3)
    handle.remove()
    (tokens,) = seen
    assert tokens.shape == (1, VIRTUAL)
    heads = getattr(base.config, "num_key_value_heads", base.config.num_attention_heads)
    assert values.shape[:3] == (VIRTUAL, 2 * base.config.num_hidden_layers, heads) and values.dtype == torch.float32
    assert torch.equal(values, prefix_activations(build(name), VIRTUAL, seed=3))
    assert not torch.equal(values, prefix_activations(build(name), VIRTUAL, seed=4))
    causal = name not in ("bert", "roberta encoder")  # the others' tokens would see the text behind them, too
    with torch.no_grad():
        whole = base(torch.cat([tokens, ids], 1))[0]
        model, _ = with_scheme(loaded, "prefix")
        wrapped = model.encoder if name.endswith("encoder") else model
        behind = wrapped(input_ids=ids, attention_mask=torch.ones_like(ids))[0]
    assert behind.shape[1] == length
    if causal:
        torch.testing.assert_close(behind, whole[:, -length:], rtol=1e-4, atol=1e-5)
