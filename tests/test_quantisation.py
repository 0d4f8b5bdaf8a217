"""Quantised bases: exact zeros, the same bits always, which layers, adapters on top, and refusals."""

import copy
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from test_models import MODELS, batch_for, checkpoint, tiny
from torch import Tensor, nn
from torch.nn import functional

import fedzo
from fedzo.errors import ModelError
from fedzo.evaluation import candidate_scores
from fedzo.models import ADAPTERS, LoadedModel, add_adapter, add_head, is_quantised, load_model
from fedzo.quantisation import COMPUTE_DTYPES, quantise
from fedzo.runtime import import_bitsandbytes
from fedzo.spaces import adapter, draw_mask, sparse

try:
    import_bitsandbytes()
except ImportError:
    pytest.skip("needs bitsandbytes: install fedzo[quantised]", allow_module_level=True)

import bitsandbytes
from bitsandbytes.functional import has_avx512bf16

from fedzo._bitsandbytes import Linear4bit

KINDS = ("nf4", "fp4", "int8")
SHAPES = [(256, 128), (96, 50), (48, 12), (9, 64)]  # in, out: blocks over the ends of rows, odd rows


def linear(width: int, height: int) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(width, height).eval()


def quantised(layer: nn.Linear, kind: str, **options: Any) -> Any:
    holder = nn.Sequential(copy.deepcopy(layer))
    quantise(holder, kind, **options)
    return holder[0]


def stored(layer: Any) -> list[Tensor]:
    """Copies of all that a quantised layer keeps of its weight."""
    if isinstance(layer, bitsandbytes.nn.Linear8bitLt):
        return [layer.weight.data.clone(), layer.weight.SCB.clone()]
    state = layer.weight.quant_state
    return [tensor.clone() for tensor in (layer.weight.data, state.absmax, state.state2.absmax, state.offset)]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_masked_entries_are_exactly_zero_and_the_others_close(kind: str, shape: tuple[int, int]) -> None:
    layer = linear(*shape)
    size = layer.weight.numel()
    indices = torch.cat((torch.arange(64, 256), torch.randperm(size)[: size // 5])).unique()  # whole blocks and some
    found = quantised(layer, kind, masked={"0.weight": indices}).dequantised()
    expected = layer.weight.detach().reshape(-1).index_fill(0, indices, 0.0).view(layer.weight.shape)
    assert found.dtype == torch.float32 and found.shape == layer.weight.shape
    assert not found.reshape(-1)[indices].count_nonzero()
    # nf4's and fp4's widest gaps are 0.30 and 0.33 of the block's largest, int8's is 1/127.
    assert float((found - expected).abs().max()) < (0.005 if kind == "int8" else 0.18) * float(expected.abs().max())
    assert torch.equal(quantised(layer, kind).dequantised(), quantised(layer, kind).dequantised())


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", SHAPES)
def test_dequantised_is_code_times_scale(kind: str, shape: tuple[int, int]) -> None:
    layer = quantised(linear(*shape), kind)
    state, packed = layer.weight.quant_state, layer.weight.data.view(-1)
    assert tuple(state.shape) == (shape[1], shape[0]) and state.nested
    scales = state.state2.code[state.absmax.long()]
    scales = scales * state.state2.absmax.repeat_interleave(256)[: len(scales)] + state.offset
    values = state.code[torch.stack((packed >> 4, packed & 15), 1).view(-1).long()]
    torch.testing.assert_close(
        layer.dequantised(), (values.view(-1, 64) * scales.unsqueeze(1)).view(state.shape), rtol=1e-6, atol=0.0
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", COMPUTE_DTYPES.values())
def test_a_forward_is_the_same_bits_always_and_writes_nothing(kind: str, dtype: torch.dtype) -> None:
    layer = quantised(linear(128, 64), kind, compute_dtype=dtype)
    before = stored(layer)
    threads = torch.get_num_threads()
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(1))
    expected = functional.linear(x.to(dtype), layer.dequantised(), layer.bias)
    assert expected.dtype == dtype
    try:
        with torch.no_grad():
            for training in (False, True, False):
                layer.train(training)
                for count in (1, 2):
                    torch.set_num_threads(count)
                    assert torch.equal(layer(x), expected)
                    again = quantised(linear(128, 64), kind, compute_dtype=dtype)
                    assert torch.equal(again(x), expected) and torch.equal(again(x), expected)
                layer.state_dict()
    finally:
        torch.set_num_threads(threads)
    assert same(stored(layer), before)


@pytest.mark.skipif(not has_avx512bf16(), reason="needs a CPU with avx512_bf16")
def test_the_trap_is_there_and_ours_is_not_in_it() -> None:
    plain = bitsandbytes.nn.Linear4bit(128, 64, compute_dtype=torch.float32, quant_type="nf4").to("cpu").eval()
    ours = quantised(linear(128, 64), "nf4")

    def writes(layer: Any) -> bool:
        before = layer.weight.data.clone()
        with torch.no_grad():
            layer(torch.randn(1, 128))
        return not torch.equal(layer.weight.data.view(-1), before.view(-1))

    assert writes(plain) and not writes(ours)


def test_scales_do_not_depend_on_threads() -> None:
    layer = linear(1024, 2304)
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(stored(quantised(layer, "nf4")))
    finally:
        torch.set_num_threads(threads)
    assert same(*found)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_gives_the_same_layers_from_any_dtype(tmp_path: Path, kind: str) -> None:
    directory = checkpoint(tmp_path)
    half = load_model(str(directory), "causal").model.bfloat16()
    half.save_pretrained(directory)
    lean, wide = (load_model(str(directory), "causal", dtype=dtype) for dtype in (None, torch.float32))
    assert {p.dtype for p in lean.model.parameters()} == {torch.bfloat16}
    assert lean.fingerprint == wide.fingerprint
    mask = draw_mask(wide.model, 0.1, "random", wide.fingerprint)
    for loaded in (lean, wide):
        quantise(loaded.model, kind, masked={entry.name: entry.indices for entry in mask.entries})
    batch = batch_for("causal")
    with torch.no_grad():
        assert torch.equal(candidate_scores(lean.model, batch), candidate_scores(wide.model, batch))
    # theta0 comes from the mask, the same on every base.
    assert torch.equal(sparse(lean.model, mask).theta0(lean.model), sparse(wide.model, mask).theta0(wide.model))


def layers_of(model: nn.Module) -> tuple[set[str], set[str]]:
    """Names of the layers that are quantised, and of the linear ones that are not."""
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    ours = {name for name, module in linears.items() if hasattr(module, "dequantised")}
    return ours, set(linears) - ours


@pytest.mark.parametrize("kind", KINDS)
def test_which_layers_are_quantised(kind: str) -> None:
    loaded = load_model("embedded", "causal")
    names = [name for name, _ in loaded.model.named_parameters()]
    before, rest = layers_of(loaded.model)
    quantise(loaded.model, kind)
    ours, kept = layers_of(loaded.model)
    assert not before and ours == rest - {"lm_head"} and kept == {"lm_head"} and is_quantised(loaded.model)
    assert [name for name, _ in loaded.model.named_parameters()] == names
    assert not loaded.model.training and not any(module.training for module in loaded.model.modules())

    opt, llama = tiny("opt", "causal").model, tiny("llama", "causal").model
    for model in (opt, llama):  # a head of its own, a tied one
        quantise(model, kind)
        assert layers_of(model)[1] == {"lm_head"}
    classifier = tiny("bert", "encoder").model
    quantise(classifier, kind, compute_dtype=torch.bfloat16)
    assert layers_of(classifier)[1] == {"head"} and len(layers_of(classifier)[0]) == 13  # with the pooler
    floating = {n: p.dtype for n, p in classifier.named_parameters() if p.is_floating_point()}
    assert floating.pop("head.weight") == torch.float32 and set(floating.values()) == {torch.bfloat16}


def test_sizes_that_do_not_fill_blocks_stay() -> None:
    model = nn.Sequential(nn.Linear(10, 7), nn.Linear(64, 3))
    before = model[0].weight.detach().clone()
    quantise(model, "nf4", masked={"0.weight": torch.tensor([3])})
    assert layers_of(model) == ({"1"}, {"0"}) and torch.equal(model[0].weight, before)
    model = nn.Sequential(nn.Linear(10, 7), nn.Linear(64, 3))
    quantise(model, "int8")
    assert layers_of(model) == ({"0", "1"}, set())
    shared = nn.Linear(8, 8)
    model = nn.Sequential(shared, nn.ReLU(), shared)  # one layer twice stays one layer
    quantise(model, "nf4")
    assert model[0] is model[2] and isinstance(model[0], Linear4bit)


def test_one_layer_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(5)))
    weights = [weakref.ref(layer.weight) for layer in model]
    alive: list[int] = []
    make = Linear4bit.of

    def counted(*arguments: Any) -> Linear4bit:
        alive.append(sum(weight() is not None for weight in weights))
        return make(*arguments)

    monkeypatch.setattr(Linear4bit, "of", counted)
    quantise(model, "nf4")
    assert alive == [5, 4, 3, 2, 1] and all(weight() is None for weight in weights)


@pytest.mark.parametrize("kind", ["none", *KINDS])
@pytest.mark.parametrize(("name", "model_kind"), [("llama", "causal"), ("opt", "causal"), ("bert", "encoder")])
def test_compute_dtypes_and_copies(kind: str, name: str, model_kind: str) -> None:
    batch = batch_for(model_kind)
    scores = {}
    for dtype in COMPUTE_DTYPES.values():
        model = tiny(name, model_kind).model
        quantise(model, kind, compute_dtype=dtype)
        with torch.no_grad():
            scores[dtype] = candidate_scores(model, batch)
            assert torch.equal(candidate_scores(copy.deepcopy(model), batch), scores[dtype])
        assert scores[dtype].dtype == torch.float32
    for dtype in (torch.bfloat16, torch.float16):
        assert not torch.equal(scores[dtype], scores[torch.float32])
        torch.testing.assert_close(scores[dtype], scores[torch.float32], rtol=0.05, atol=0.1)


def plain_copy(model: nn.Module) -> nn.Module:
    """The model with ordinary linear layers that hold the dequantised weights."""
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and hasattr(child, "dequantised"):
                layer = nn.Linear(child.in_features, child.out_features, child.bias is not None)
                layer.weight = nn.Parameter(child.dequantised())
                layer.bias = child.bias
                parent._modules[name] = layer
    return model


@pytest.mark.parametrize("which", ADAPTERS)
@pytest.mark.parametrize(("name", "model_kind"), [("llama", "causal"), ("bert", "masked"), ("bert", "encoder")])
def test_adapters_over_quantised_bases(name: str, model_kind: str, which: str) -> None:
    batch = batch_for(model_kind)
    on_float32 = add_adapter(tiny(name, model_kind), which, virtual_tokens=4, seed=9)
    theta0 = adapter(on_float32.model).theta0(on_float32.model)
    for kind in ("nf4", "int8"):
        base = tiny(name, model_kind)
        quantise(base.model, kind)
        twin = LoadedModel(plain_copy(base.model), base.tokenizer, model_kind, base.fingerprint)
        ours, reference = (add_adapter(loaded, which, virtual_tokens=4, seed=9) for loaded in (base, twin))
        space = adapter(ours.model)
        assert torch.equal(space.theta0(ours.model), theta0) and space.hash == adapter(on_float32.model).hash
        if which in ("lora", "ia3"):
            found = {type(m).__module__ for m in ours.model.modules() if getattr(m, "base_layer", None) is not None}
            assert found == {f"peft.tuners.{which}.bnb"}
        scores = []
        for loaded in (ours, reference):
            space.write(loaded.model, theta0 + 0.1)
            with torch.no_grad():
                scores.append(candidate_scores(loaded.model, batch))
        torch.testing.assert_close(scores[0], scores[1], rtol=1e-5, atol=1e-6)
        with torch.no_grad():
            assert not torch.allclose(scores[0], candidate_scores(tiny(name, model_kind).model, batch), atol=1e-3)


@pytest.mark.parametrize("which", ADAPTERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_are_float32_over_half_precision(which: str, dtype: torch.dtype) -> None:
    for name, model_kind in (("llama", "causal"), ("bert", "encoder")):
        for kind in ("none", "nf4"):
            loaded = tiny(name, model_kind)
            quantise(loaded.model, kind, compute_dtype=dtype)
            loaded = add_adapter(loaded, which, virtual_tokens=4)
            parameters = dict(loaded.model.named_parameters())
            assert {parameters[name].dtype for name in loaded.new_parameters} == {torch.float32}
            with torch.no_grad():
                assert torch.isfinite(candidate_scores(loaded.model, batch_for(model_kind))).all()


def test_refusals_leave_the_model_as_it_is() -> None:
    model = tiny("llama", "causal").model
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    first = "model.layers.0.mlp.up_proj.weight"
    for message, kind, options in (
        ("unknown quantisation 'nf3'", "nf3", {}),
        ("compute dtype is torch.float64", "nf4", {"compute_dtype": torch.float64}),
        ("names parameter nowhere", "nf4", {"masked": {"nowhere": torch.tensor([1])}}),
        ("out of range", "nf4", {"masked": {first: torch.tensor([1, 32 * 48])}}),
        ("out of range", "int8", {"masked": {first: torch.tensor([-1, 5])}}),
    ):
        with pytest.raises(ModelError, match=message):
            quantise(model, kind, **options)
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in before.items()) and len(after) == len(before)

    with pytest.raises(ModelError, match="no layer of this GPT2LMHeadModel"):
        quantise(tiny("gpt2", "causal").model, "nf4")
    quantise(model, "nf4")
    with pytest.raises(ModelError, match="quantised already"):
        quantise(model, "int8")
    with pytest.raises(ModelError, match="quantise the base first"):
        quantise(add_adapter(tiny("llama", "causal"), "lora").model, "nf4")


def test_without_bitsandbytes_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.delitem(sys.modules, "fedzo._bitsandbytes")
    monkeypatch.delattr(fedzo, "_bitsandbytes")
    model = nn.Sequential(nn.Linear(64, 64))
    with pytest.raises(ModelError, match=r"install fedzo\[quantised\]"):
        quantise(model, "nf4")
    quantise(model, "none", compute_dtype=torch.bfloat16)
    assert model[0].weight.dtype == torch.bfloat16


def test_a_quantised_checkpoint_is_refused(tmp_path: Path) -> None:
    config = json.loads((checkpoint(tmp_path) / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="is a quantised checkpoint"):
        load_model(str(tmp_path), "causal")


@pytest.mark.slow  # it imports everything anew
def test_nothing_is_asked_of_the_hub(tmp_path: Path) -> None:
    (tmp_path / "kernels.py").write_text("def get_kernel(*args, **kwargs):\n    raise SystemExit('asked the hub')\n")
    program = """
import fedzo, torch
from fedzo.models import add_adapter, load_model
from fedzo.quantisation import quantise
add_adapter(load_model("embedded", "causal"), "lora")
model = torch.nn.Sequential(torch.nn.Linear(64, 64)).eval()
quantise(model, "nf4")
model(torch.ones(1, 64))
import kernels  # still there for others
"""
    root = Path(__file__).resolve().parents[1]
    path = os.pathsep.join((str(tmp_path), str(root)))
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "kernels-community" not in done.stderr and "asked the hub" not in done.stderr


@pytest.mark.skipif(not MODELS.is_dir(), reason="needs the real models of ../shared")
@pytest.mark.parametrize("kind", KINDS)
def test_losses_of_real_models_stay_near(kind: str) -> None:
    texts = ["a moving and funny film", "the plot makes no sense and the acting is worse", "I would watch it again"]
    loaded = load_model(str(MODELS / "reviews-6m"), "causal")
    ids = loaded.tokenizer(" . ".join(texts), return_tensors="pt").input_ids
    with torch.no_grad():
        before = float(loaded.model(input_ids=ids, labels=ids).loss)
        quantise(loaded.model, kind)
        after = float(loaded.model(input_ids=ids, labels=ids).loss)
    assert after != before and abs(after - before) < (0.02 if kind == "int8" else 0.25)

    classifier = add_head(
        load_model(str(MODELS / "minilm-l6"), "encoder"), 2, ("a terrible film", "a great film"), scale=1.0
    )
    encoded = classifier.tokenizer(texts, padding=True, return_tensors="pt")
    inputs = {name: encoded[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        before_cosines = classifier.model(**inputs)
        quantise(classifier.model, kind)
        after_cosines = classifier.model(**inputs)
    assert float((after_cosines - before_cosines).abs().max()) < (0.01 if kind == "int8" else 0.15)
