"""Exports: each format read back as its user reads it, its model card, and what is refused."""

import copy
import json
import math
import re
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, ShiraConfig, get_peft_model
from safetensors.torch import load_file
from small_runs import config, fedzo, make_data, run
from test_models import batch_for, checkpoint
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedzo.errors import ModelError, SpaceError
from fedzo.evaluation import Evaluator
from fedzo.experiment import Experiment
from fedzo.export import DELTA, Finetuned, apply_delta, write_delta, write_merged, write_peft, write_shira
from fedzo.federation.ledger import Ledger
from fedzo.models import ADAPTERS, EncoderClassifier, LoadedModel, add_adapter, add_head, load_model
from fedzo.spaces import TrainableSpace, adapter, draw_mask, full, sparse

SPARSE: dict[str, Any] = {
    "space__kind": "sparse", "space__density": 0.01, "space__include": "*proj.weight", "method__learning_rate": 0.1,
}  # fmt: skip
LORA: dict[str, Any] = {"space__kind": "adapter", "space__rank": 2, "method__learning_rate": 0.1}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("secretly-named") / "reviews")


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The folder of a finished run with these settings, made once."""
    made: dict[str, Path] = {}

    def folder(**changes: Any) -> Path:
        key = json.dumps(changes)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("run") / "run"
            run(made[key], config(data, **changes)).close()
        return made[key]

    return folder


def finetuned(loaded: LoadedModel, space: TrainableSpace, theta: Tensor) -> Finetuned:
    return Finetuned(loaded, space, theta, "base", None, "0" * 64, 3)


def masked(loaded: LoadedModel, density: float = 0.02, *include: str, dense: tuple[str, ...] = ()) -> TrainableSpace:
    mask = draw_mask(loaded.model, density, "random", loaded.fingerprint, seed=1, include=include or ["*"])
    return sparse(loaded.model, mask, dense)


def moved(loaded: LoadedModel, space: TrainableSpace) -> Tensor:
    """A theta away from the base's, by steps that float32 differences do not hold exactly."""
    noise = torch.randn(space.size, generator=torch.Generator().manual_seed(5))
    return space.theta0(loaded.model) + 0.1 * noise


def scores(loaded: LoadedModel) -> Tensor:
    space = full(loaded.model)
    return Evaluator(loaded.model, space).scores(space.read(loaded.model), batch_for(loaded.kind))


def export(folder: Path, out: Path, *options: str) -> dict[str, Any]:
    answer = fedzo("replay", folder, "--out", out, *options, "--json")
    assert (answer.code, answer.err) == (0, "")
    figures: dict[str, Any] = json.loads(answer.out)
    return figures


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2"])
def test_a_merged_model_is_theta_bit_for_bit(tmp_path: Path, name: str) -> None:
    loaded = load_model(str(checkpoint(tmp_path / "base", name)), "causal")
    space = masked(loaded, 0.3)
    theta = moved(loaded, space)
    wanted = Evaluator(loaded.model, space).scores(theta, batch_for("causal"))
    write_merged(finetuned(loaded, space, theta), tmp_path / "out")
    again = load_model(str(tmp_path / "out"), "causal")
    assert again.fingerprint != loaded.fingerprint
    assert torch.equal(space.read(again.model), theta)
    torch.testing.assert_close(scores(again), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "opt"])  # both with tied embeddings
def test_a_merged_model_of_16_bits(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    loaded = load_model(str(checkpoint(tmp_path / "base", name)), "causal")
    space = full(loaded.model)
    theta = moved(loaded, space)
    write_merged(finetuned(loaded, space, theta), tmp_path / "out", dtype)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    again = load_model(str(tmp_path / "out"), "causal")
    assert torch.equal(space.read(again.model), theta.to(dtype).float())


def test_a_value_beyond_float16_is_refused(tmp_path: Path) -> None:
    loaded = load_model(str(checkpoint(tmp_path / "base")), "causal")
    space = full(loaded.model, ["*layers.1.mlp.up_proj.weight"])
    theta = space.theta0(loaded.model)
    theta[7] = -7e4
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj\.weight holds -70000, .*float16 .*bfloat16"):
        write_merged(finetuned(loaded, space, theta), tmp_path / "out", torch.float16)
    write_merged(finetuned(loaded, space, theta), tmp_path / "out", torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merged_encoder_comes_back_with_its_head(tmp_path: Path, dtype: torch.dtype) -> None:
    base = load_model(str(checkpoint(tmp_path / "base", "bert", "encoder")), "encoder")
    loaded = add_head(base, 2, None, scale=5.0)
    space, batch = full(loaded.model), batch_for("encoder")
    theta = space.theta0(loaded.model) + 0.01
    wanted = Evaluator(loaded.model, space).scores(theta.to(dtype).float(), batch)
    write_merged(finetuned(loaded, space, theta), tmp_path / "out", dtype)
    assert json.loads((tmp_path / "out" / "fedzo_head.json").read_text())["scale"] == 5.0
    again = load_model(str(tmp_path / "out"), "encoder")
    assert isinstance(again.model, EncoderClassifier) and add_head(again, 2, ("a", "b")) is again
    assert full(again.model).hash == space.hash
    assert torch.equal(space.read(again.model), theta.to(dtype).float())
    torch.testing.assert_close(scores(again), wanted)
    with pytest.raises(ModelError, match="the saved head has 2 labels, the task has 6"):
        add_head(again, 6, None)


@pytest.mark.parametrize("which", ADAPTERS)
def test_an_adapter_loads_with_peft(tmp_path: Path, which: str) -> None:
    base = checkpoint(tmp_path / "base")
    loaded = add_adapter(load_model(str(base), "causal"), which, virtual_tokens=4)
    space, batch = adapter(loaded.model), batch_for("causal")
    theta = space.theta0(loaded.model) + 0.1
    wanted = Evaluator(loaded.model, space).scores(theta, batch)
    write_peft(finetuned(loaded, space, theta), tmp_path / "out")
    again = PeftModel.from_pretrained(load_model(str(base), "causal").model, tmp_path / "out").eval()
    torch.testing.assert_close(scores(replace(loaded, model=again)), wanted)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == "base"
    with pytest.raises(ModelError, match="is a PEFT adapter"):
        load_model(str(tmp_path / "out"), "causal")
    if which in ("lora", "ia3"):
        write_merged(finetuned(loaded, space, theta), tmp_path / "merged")
        torch.testing.assert_close(scores(load_model(str(tmp_path / "merged"), "causal")), wanted)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_delta_makes_the_merged_model(tmp_path: Path, name: str) -> None:
    """Bit for bit; an encoder's new head travels whole."""
    kind = "encoder" if name == "bert" else "causal"
    base = str(checkpoint(tmp_path / "base", name, kind))

    def fresh() -> LoadedModel:
        loaded = load_model(base, kind)
        return add_head(loaded, 2, None) if kind == "encoder" else loaded

    loaded = fresh()
    space = masked(loaded, 0.1, "*layer*", dense=loaded.new_parameters)
    theta = moved(loaded, space)
    tuned = finetuned(loaded, space, theta)
    for folder in ("one", "two", "merged"):
        (tmp_path / folder).mkdir()
    write_delta(tuned, tmp_path / "one")
    write_delta(tuned, tmp_path / "two")
    assert (tmp_path / "one" / DELTA).read_bytes() == (tmp_path / "two" / DELTA).read_bytes()
    write_merged(tuned, tmp_path / "merged")
    merged, again = load_model(str(tmp_path / "merged"), kind), fresh()
    apply_delta(again.model, tmp_path / "one", again.fingerprint)
    wanted, found = merged.model.state_dict(), again.model.state_dict()
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[key], found[key]) for key in wanted)
    assert torch.equal(space.read(again.model), theta)


def test_a_delta_that_does_not_fit_changes_nothing(tmp_path: Path) -> None:
    loaded = load_model(str(checkpoint(tmp_path / "base")), "causal")
    space = masked(loaded)
    write_delta(finetuned(loaded, space, moved(loaded, space)), tmp_path)
    before = copy.deepcopy(loaded.model.state_dict())
    path, print_ = tmp_path / DELTA, loaded.fingerprint
    with pytest.raises(SpaceError, match="delta for another base"):
        apply_delta(loaded.model, path, "0" * 64)
    with pytest.raises(SpaceError, match=r"needs parameter model\.\S+ of shape"):
        apply_delta(load_model(str(checkpoint(tmp_path / "opt", "opt")), "causal").model, path, print_)
    with pytest.raises(SpaceError, match="does not exist"):
        apply_delta(loaded.model, tmp_path / "none", print_)
    whole = path.read_bytes()
    for at in (3, 200, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(SpaceError, match="damaged"):
            apply_delta(loaded.model, path, print_)
    path.write_bytes(whole[:-5])
    with pytest.raises(SpaceError, match="damaged"):
        apply_delta(loaded.model, path, print_)
    assert all(torch.equal(value, before[key]) for key, value in loaded.model.state_dict().items())


@pytest.mark.parametrize("name", ["llama", "opt", "bert"])
def test_a_shira_adapter_gives_the_merged_logits(tmp_path: Path, name: str) -> None:
    kind = "masked" if name == "bert" else "causal"
    base = str(checkpoint(tmp_path / "base", name, kind))
    loaded = load_model(base, kind)
    space = masked(loaded, 0.07, "*layer*.weight")
    tuned = finetuned(loaded, space, space.theta0(loaded.model) * 1.01 + 1e-3)
    for folder in ("shira", "merged"):
        (tmp_path / folder).mkdir()
    write_shira(tuned, tmp_path / "shira")
    write_merged(tuned, tmp_path / "merged")
    again = load_model(base, kind)
    model = PeftModel.from_pretrained(again.model, tmp_path / "shira").eval()
    merged = load_model(str(tmp_path / "merged"), kind)
    torch.testing.assert_close(scores(replace(loaded, model=model)), scores(merged), rtol=1e-5, atol=1e-6)
    found = model.merge_and_unload()
    wanted = merged.model.state_dict()
    for key, value in found.state_dict().items():
        torch.testing.assert_close(value, wanted[key], rtol=1e-6, atol=1e-8)


def test_a_shira_adapter_is_stored_as_peft_stores_it(tmp_path: Path) -> None:
    """r is the smallest that holds every mask, and PEFT's own file of the same mask has the same tensors."""
    loaded = load_model(str(checkpoint(tmp_path / "base")), "causal")
    space = masked(loaded, 0.1, "*q_proj.weight", "*down_proj.weight")
    write_shira(finetuned(loaded, space, moved(loaded, space)), tmp_path)
    rank = json.loads((tmp_path / "adapter_config.json").read_text())["r"]
    assert rank == max(math.ceil(segment.size / sum(segment.shape)) for segment in space.segments)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    names = [segment.name.removesuffix(".weight") for segment in space.segments]
    assert len(tensors) == 2 * len(names) == 8
    modules = {id(loaded.model.get_submodule(name)): name for name in names}

    def mask_fn(base_layer: torch.nn.Linear, r: int, **_: Any) -> Tensor:
        mask = torch.zeros_like(base_layer.weight)
        mask[tuple(tensors[f"base_model.model.{modules[id(base_layer)]}.shira_indices"].long())] = 1.0
        return mask

    chosen = ShiraConfig(r=rank, mask_type="custom", target_modules=names)
    chosen.mask_fn = mask_fn
    get_peft_model(loaded.model, chosen).save_pretrained(str(tmp_path / "peft"))
    theirs = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert {k: (v.shape, v.dtype) for k, v in theirs.items()} == {k: (v.shape, v.dtype) for k, v in tensors.items()}
    assert all(torch.equal(theirs[key], tensors[key]) for key in tensors if key.endswith("indices"))


@pytest.mark.parametrize(
    ("name", "kind", "density", "include", "refused"),
    [
        ("llama", "causal", 0.05, "*", "is shared by several layers"),
        ("bert", "encoder", 0.05, "*layer*", "head.weight is trained as a whole"),
        ("bert", "masked", 0.05, "*position_emb*", "belongs to Embedding"),
        ("gpt2", "causal", 0.05, "*attn*", "belongs to Conv1D"),
        ("llama", "causal", 0.99, "*up_proj*", r"rank 20, .* 1600 entries in \S+up_proj.weight, more than its 48 x 32"),
    ],
)
def test_masks_that_shira_cannot_hold(
    tmp_path: Path, name: str, kind: str, density: float, include: str, refused: str
) -> None:
    loaded = load_model(str(checkpoint(tmp_path / "base", name, kind)), kind)
    if kind == "encoder":
        loaded = add_head(loaded, 2, None)
    space = masked(loaded, density, include, dense=loaded.new_parameters)
    with pytest.raises(SpaceError, match=refused) as error:
        write_shira(finetuned(loaded, space, moved(loaded, space)), tmp_path)
    assert "merged or delta" in str(error.value)


@pytest.mark.parametrize(
    ("settings", "form", "files"),
    [
        ({}, "merged", {"model.safetensors", "tokenizer.json", "config.json"}),
        (SPARSE, "delta", {DELTA}),
        (SPARSE, "shira", {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"}),
        (LORA, "peft", {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"}),
    ],
)
def test_every_export_has_its_model_card(
    settings: dict[str, Any], form: str, files: set[str], finished: Callable[..., Path], tmp_path: Path, data: Path
) -> None:
    folder = finished(**settings)
    figures = export(folder, tmp_path / "out", "--as", form)
    assert files <= {path.name for path in (tmp_path / "out").iterdir()}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    card = (tmp_path / "out" / "README.md").read_text()
    from huggingface_hub import ModelCard

    front: dict[str, Any] = ModelCard(card).data.to_dict()  # type: ignore[no-untyped-call]
    assert front["base_model"] == "embedded" and "fedzo" in front["tags"]
    assert front["library_name"] == {"merged": "transformers", "delta": "fedzo"}.get(form, "peft")
    with Ledger(folder / "ledger.sqlite") as ledger:
        for wanted in (ledger.head.hex(), ledger.spec.fingerprint, figures["theta_digest"], "| privacy | none |"):
            assert wanted in card
        accuracy = ledger.evaluations("test")[3]["accuracy"]
    assert f"accuracy {accuracy:.4f}" in card
    match = re.search(r"```toml\n(.*?)```", card, re.DOTALL)
    assert match
    table = tomllib.loads(match[1])
    assert table["data"]["source"] == "reviews" and table["federation"]["rounds"] == 3
    for path in (tmp_path / "out").iterdir():  # where things lie on this machine is in no file
        assert b"secretly-named" not in path.read_bytes() and b"/embedded/model" not in path.read_bytes()


def test_merged_runs_evaluate_as_recorded(finished: Callable[..., Path], data: Path, tmp_path: Path) -> None:
    for name, settings in {"full": {}, "sparse": SPARSE, "lora": LORA}.items():
        folder = finished(**settings)
        with Ledger(folder / "ledger.sqlite") as ledger:
            recorded = ledger.evaluations("test")[3]
        for dtype, tolerance in (("float32", 1e-6), ("bfloat16", 0.05)):
            out = tmp_path / f"{name}-{dtype}"
            figures = export(folder, out, "--as", "merged", "--dtype", dtype)
            again = Experiment(config(data, model__source=str(out)))
            AutoTokenizer.from_pretrained(out)
            assert again.test is not None
            metrics = again.evaluate(again.theta0(), again.test)
            assert metrics["loss"] == pytest.approx(recorded["loss"], rel=tolerance)
            if (name, dtype) == ("full", "float32"):
                assert again.theta0_digest == figures["theta_digest"]
                assert metrics == recorded


def test_a_sparse_run_is_the_same_in_every_format(finished: Callable[..., Path], tmp_path: Path) -> None:
    folder = finished(**SPARSE)
    digests = {form: export(folder, tmp_path / form, "--as", form) for form in ("merged", "delta", "shira")}
    assert len({figures["theta_digest"] for figures in digests.values()}) == 1
    merged = load_model(str(tmp_path / "merged"), "causal")
    patched = load_model("embedded", "causal")
    apply_delta(patched.model, tmp_path / "delta", patched.fingerprint)
    shira = PeftModel.from_pretrained(load_model("embedded", "causal").model, tmp_path / "shira").eval()
    ids = torch.randint(5, 200, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = merged.model(input_ids=ids).logits
        assert torch.equal(patched.model(input_ids=ids).logits, wanted)
        torch.testing.assert_close(shira(input_ids=ids).logits, wanted, rtol=1e-5, atol=1e-5)


def test_an_earlier_round(finished: Callable[..., Path], tmp_path: Path) -> None:
    folder = finished(**SPARSE)
    export(folder, tmp_path / "two", "--as", "delta", "--round", "2")
    card = (tmp_path / "two" / "README.md").read_text()
    with Ledger(folder / "ledger.sqlite") as ledger:
        assert ledger.hash_before(2).hex() in card and ledger.head.hex() not in card
    assert "| test | not recorded after this round |" in card and "| rounds | 2 of 3" in card


@pytest.mark.parametrize(
    ("settings", "options", "refused"),
    [
        ({}, ["--as", "gguf"], 'export format "gguf" is unknown; wanted merged, delta, peft, shira'),
        ({}, ["--dtype", "int8"], 'dtype "int8" is unknown; wanted float32, float16, bfloat16'),
        (SPARSE, ["--as", "delta", "--dtype", "float16"], "leave dtype out"),
        ({}, ["--as", "delta"], "this run's is full: use merged"),
        ({}, ["--as", "shira"], "this run's is full: use merged"),
        (SPARSE, ["--as", "peft"], "this run's is sparse: use merged or delta or shira"),
        (LORA, ["--as", "delta"], "this run's is adapter: use merged or peft"),
    ],
)
def test_wrong_asking(
    settings: dict[str, Any], options: list[str], refused: str, finished: Callable[..., Path], tmp_path: Path
) -> None:
    answer = fedzo("replay", finished(**settings), "--out", tmp_path / "out", *options)
    assert answer.code == 2 and answer.err.count("error:") == 1 and refused in answer.err
    assert list(tmp_path.iterdir()) == []


def test_a_failed_export_leaves_nothing(finished: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    answer = fedzo("replay", finished(), "--out", tmp_path / "file" / "model")
    assert answer.code == 1 and "cannot write the model" in answer.err
    tight = finished(**{**SPARSE, "space__density": 0.8})
    answer = fedzo("replay", tight, "--out", tmp_path / "model", "--as", "shira")
    assert answer.code == 1 and "more than its" in answer.err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_run_in_bfloat16(finished: Callable[..., Path], tmp_path: Path) -> None:
    # A step that moves every tensor of a bfloat16 model is one that a run should not take.
    folder = finished(space__theta_dtype="bfloat16", method__learning_rate=0.1, evaluation__divergence=0)
    for dtype in ("float32", "bfloat16"):
        export(folder, tmp_path / dtype, "--dtype", dtype)
    one, other = (load_file(tmp_path / dtype / "model.safetensors") for dtype in ("float32", "bfloat16"))
    assert all(torch.equal(one[name], other[name].float()) for name in one)
    base = load_model("embedded", "causal").model.state_dict()
    assert not any(torch.equal(one[name], base[name]) for name in one)


def test_a_quantised_run_is_exported_on_the_whole_base(finished: Callable[..., Path], tmp_path: Path) -> None:
    """The same ledger gives the same files whatever the quantisation that the run's configuration asks for."""
    pytest.importorskip("bitsandbytes")
    for settings, form in ((SPARSE, "merged"), (LORA, "peft")):
        plain, folder = finished(**settings), finished(**settings, model__quantisation="nf4")
        figures = export(folder, tmp_path / form, "--as", form)
        weights = load_file(next((tmp_path / form).glob("*.safetensors")))
        assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
        with Ledger(folder / "ledger.sqlite") as ledger, Ledger(plain / "ledger.sqlite") as other:
            assert list(ledger.read())[-1].digest.hex() == figures["theta_digest"]
            assert ledger.spec.theta0 == other.spec.theta0
        assert "| accuracy of | the run's nf4 base" in (tmp_path / form / "README.md").read_text()
