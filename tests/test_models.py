"""Loading, fingerprints, heads, adapters and saving, on tiny models written to a temporary directory."""

import copy
import os
import shutil
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    RobertaConfig,
)

from fedzo.config import from_flat
from fedzo.errors import ModelError
from fedzo.evaluation import Batch, Evaluator, LossRequest, TokenTargets
from fedzo.experiment import prepare
from fedzo.models import (
    ADAPTERS,
    EncoderClassifier,
    LoadedModel,
    add_adapter,
    add_head,
    load_model,
    prefix_activations,
)
from fedzo.spaces import adapter, full

MODELS = Path(__file__).resolve().parents[2] / "shared" / "models"
WORDS = ["<pad>", "<unk>", "<eos>", "it", "was", "great", "terrible", "a", "film", "."]
_SIZE = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIGS = {
    "llama": LlamaConfig(**_SIZE, intermediate_size=48, max_position_embeddings=64, tie_word_embeddings=True),
    "opt": OPTConfig(**_SIZE, word_embed_proj_dim=32, ffn_dim=48, max_position_embeddings=64, init_std=0.1),
    "gpt2": GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "qwen3": Qwen3Config(**_SIZE, intermediate_size=48, num_key_value_heads=2, head_dim=16, max_position_embeddings=64),
    "bert": BertConfig(**_SIZE, intermediate_size=48, max_position_embeddings=64),
    "roberta": RobertaConfig(**_SIZE, intermediate_size=48, max_position_embeddings=64),
}
FACTORIES = {"causal": AutoModelForCausalLM, "masked": AutoModelForMaskedLM, "encoder": AutoModel}
ARCHITECTURES = [
    *((name, "causal") for name in ("llama", "opt", "gpt2", "qwen3")),
    *((name, kind) for name in ("bert", "roberta") for kind in ("masked", "encoder")),
]


def tokenizer(pad: bool = True) -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>"} if pad else {}
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="<eos>", **special)


def checkpoint(directory: Path, name: str = "llama", kind: str = "causal", *, pad: bool = True, **options: str) -> Path:
    torch.manual_seed(0)
    FACTORIES[kind].from_config(copy.deepcopy(CONFIGS[name])).save_pretrained(directory, **options)
    tokenizer(pad).save_pretrained(directory)
    return directory


def batch_for(kind: str) -> Batch:
    ids = torch.randint(4, 64, (3, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] * 5 + [0]])
    labels = torch.tensor([0, 1, 1])
    if kind == "encoder":
        return Batch({"input_ids": ids, "attention_mask": mask}, labels)
    targets = TokenTargets(
        rows=torch.tensor([0, 0, 1, 1, 2, 2]),
        positions=torch.tensor([5, 5, 3, 3, 4, 4]),
        tokens=torch.tensor([5, 6] * 3),
        candidates=torch.arange(6),
        num_candidates=2,
    )
    return Batch({"input_ids": ids, "attention_mask": mask}, labels, targets)


def test_load_gives_float32_eval_and_a_padding_tokenizer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS["llama"])).bfloat16()
    model.save_pretrained(tmp_path)
    tokenizer(pad=False).save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), "causal")
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
    assert not loaded.model.training and loaded.new_parameters == ()
    assert loaded.tokenizer.pad_token == "<eos>" and loaded.tokenizer.padding_side == "right"


def test_fingerprint_is_of_tensors_not_files(tmp_path: Path) -> None:
    one = load_model(str(checkpoint(tmp_path / "one")), "causal").fingerprint
    sharded = checkpoint(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    assert load_model(str(sharded), "causal").fingerprint == one
    other = tmp_path / "other"
    shutil.copytree(tmp_path / "one", other)
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS["llama"])).save_pretrained(other)
    assert load_model(str(other), "causal").fingerprint != one


def test_torch_checkpoints_load_with_the_same_fingerprint(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    expected = load_model(str(checkpoint(tmp_path)), "causal").fingerprint
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    assert load_model(str(tmp_path), "causal").fingerprint == expected


@pytest.mark.parametrize(
    ("remove", "message"),
    [
        ("model.safetensors", "has no weights"),
        ("config.json", r"has no config\.json"),
        ("tokenizer.json", "has no tokenizer"),
    ],
)
def test_a_missing_part_is_named(tmp_path: Path, remove: str, message: str) -> None:
    (checkpoint(tmp_path) / remove).unlink()
    with pytest.raises(ModelError, match=message):
        load_model(str(tmp_path), "causal")


def test_other_errors_are_clear(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        load_model(str(tmp_path / "none"), "causal")
    with pytest.raises(ModelError, match="unknown model kind"):
        load_model(str(tmp_path), "decoder")
    llama, bert = checkpoint(tmp_path / "llama"), checkpoint(tmp_path / "bert", "bert", "encoder")
    with pytest.raises(ModelError, match="not of kind masked; it can serve as causal or encoder"):
        load_model(str(llama), "masked")
    with pytest.raises(ModelError, match="not of kind causal; it can serve as masked or encoder"):
        load_model(str(bert), "causal")
    with pytest.raises(ModelError, match=r"lacks .* weights that kind masked needs"):
        load_model(str(bert), "masked")
    weights = (llama / "model.safetensors").read_bytes()
    (llama / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ModelError, match="cannot be"):
        load_model(str(llama), "causal")


def test_an_unknown_hub_name_offline_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="neither a local directory nor found on the hub") as caught:
        load_model("fedzo-nobody/no-such-model", "causal")
    assert "\n" not in str(caught.value)


def test_head_rows_are_label_features_and_features_skip_the_encoder(tmp_path: Path) -> None:
    loaded = load_model(str(checkpoint(tmp_path, "bert", "encoder")), "encoder")
    texts = ("it was terrible .", "it was great .")
    with_head = add_head(loaded, 2, texts)
    model = with_head.model
    assert isinstance(model, EncoderClassifier) and with_head.new_parameters == ("head.weight",)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not any("pooler" in name for name, _ in model.named_parameters())
    encoded = loaded.tokenizer(list(texts), padding=True, return_tensors="pt")
    with torch.no_grad():
        features = model.features(encoded["input_ids"], encoded["attention_mask"])
        logits = model(input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"])
        assert torch.equal(model(features=features), logits)
    torch.testing.assert_close(model.head.weight, features)
    torch.testing.assert_close(logits.diagonal(), torch.full((2,), 20.0))
    space = full(model, include=["head.*"])
    evaluator = Evaluator(model, space)
    batch = batch_for("encoder")
    with torch.no_grad():
        short = Batch({"features": model.features(**batch.inputs)}, batch.labels)
    theta = space.theta0(model)
    long_way = evaluator.losses(LossRequest(theta, batch, (0.1, -0.1), (3,)))
    assert torch.equal(long_way, evaluator.losses(LossRequest(theta, short, (0.1, -0.1), (3,))))


def test_random_head_and_refusals(tmp_path: Path) -> None:
    directory = str(checkpoint(tmp_path, "bert", "encoder"))
    heads = [add_head(load_model(directory, "encoder"), 6, None, seed=s).model.head.weight for s in (1, 1, 2)]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    assert 0.015 < float(heads[0].detach().std()) < 0.025
    with pytest.raises(ModelError, match="1 label texts for 2 labels"):
        add_head(load_model(directory, "encoder"), 2, ("good",))
    with pytest.raises(ModelError, match="unknown pooling"):
        add_head(load_model(directory, "encoder"), 2, None, pooling="max")
    causal = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS["llama"]))
    with pytest.raises(ModelError, match="needs a model of kind encoder"):
        add_head(LoadedModel(causal, tokenizer(), "causal", ""), 2, None)


def tiny(name: str, kind: str) -> LoadedModel:
    torch.manual_seed(0)
    loaded = LoadedModel(FACTORIES[kind].from_config(copy.deepcopy(CONFIGS[name])).eval(), tokenizer(), kind, "0" * 64)
    return add_head(loaded, 2, None) if kind == "encoder" else loaded


@pytest.mark.parametrize("which", ADAPTERS)
@pytest.mark.parametrize(("name", "kind"), ARCHITECTURES)
def test_adapters_work_and_start_from_the_seed_alone(name: str, kind: str, which: str) -> None:
    before = tiny(name, kind)
    batch = batch_for(kind)
    plain_space = full(before.model, include=["head.*"] if kind == "encoder" else ["*"])
    plain = Evaluator(before.model, plain_space).scores(plain_space.theta0(before.model), batch)
    thetas = []
    for torch_seed in (1, 2):
        loaded = tiny(name, kind)
        torch.manual_seed(torch_seed)
        loaded = add_adapter(loaded, which, virtual_tokens=4, seed=9)
        space = adapter(loaded.model)
        thetas.append(space.theta0(loaded.model))
    assert torch.equal(thetas[0], thetas[1])
    assert sorted(loaded.new_parameters) == [segment.name for segment in space.segments]
    assert ("head.weight" in loaded.new_parameters) == (kind == "encoder")
    assert space.size < plain_space.size or kind == "encoder"
    evaluator = Evaluator(loaded.model, space)
    if which in ("lora", "ia3"):
        torch.testing.assert_close(evaluator.scores(thetas[0], batch), plain)
    losses = evaluator.losses(LossRequest(thetas[0], batch, (0.05, -0.05, 0.0), (4,)))
    assert torch.isfinite(losses).all()
    plus, minus, middle = losses[0]
    assert not torch.equal(plus, middle) and not torch.equal(minus, middle)
    for parameter in (p for n, p in loaded.model.named_parameters() if n not in loaded.new_parameters):
        assert not parameter.requires_grad


def test_a_prefix_starts_from_the_unquantised_base_whatever_the_party_has() -> None:
    pytest.importorskip("bitsandbytes")
    thetas = {}
    for quantisation, init in (("none", "activations"), ("nf4", "activations"), ("nf4", "random")):
        flat = {"space.kind": "adapter", "space.adapter": "prefix", "space.virtual_tokens": 4}
        config = from_flat({**flat, "space.prefix_init": init, "model.quantisation": quantisation})
        loaded, space = prepare(config, load_model("embedded", "causal"), None)
        thetas[quantisation, init] = space.theta0(loaded.model)
    assert torch.equal(thetas["none", "activations"], thetas["nf4", "activations"])
    assert 0.015 < float(thetas["nf4", "random"].std()) < 0.025
    expected = prefix_activations(load_model("embedded", "causal"), 4)
    assert torch.equal(thetas["nf4", "activations"], expected.flatten())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_virtual_tokens_keep_answer_positions_at_the_end(name: str) -> None:
    loaded = add_adapter(tiny(name, "causal"), "prompt", virtual_tokens=4)
    space, batch = adapter(loaded.model), batch_for("causal")
    scores = Evaluator(loaded.model, space).scores(space.theta0(loaded.model), batch)
    with torch.no_grad():
        logits = loaded.model(**batch.inputs).logits
    assert logits.shape[1] == 10
    expected = torch.log_softmax(logits[1, 4 + 3], -1)[[5, 6]]
    torch.testing.assert_close(scores[1], expected)


def test_adapter_refusals() -> None:
    with pytest.raises(ModelError, match="unknown adapter"):
        add_adapter(tiny("llama", "causal"), "dora")
    with pytest.raises(ModelError, match=r"space\.targets"):
        add_adapter(tiny("llama", "causal"), "lora", target_modules=["no_such_layer"])
    with pytest.raises(ModelError, match="takes no target_modules"):
        add_adapter(tiny("llama", "causal"), "prefix", target_modules=["q_proj"])
    with pytest.raises(ModelError, match=r"no activations of 500 tokens .*space.prefix_init"):
        prefix_activations(tiny("gpt2", "causal"), 500)
    with pytest.raises(ModelError, match="has an adapter already"):
        add_adapter(add_adapter(tiny("llama", "causal"), "lora"), "lora")


@pytest.mark.skipif(not MODELS.is_dir(), reason="needs the real models of ../shared")
@pytest.mark.parametrize(("name", "kind"), [("minilm-l6", "encoder"), ("reviews-6m", "causal")])
def test_real_models_load(name: str, kind: str) -> None:
    loaded = load_model(str(MODELS / name), kind)
    assert len(loaded.fingerprint) == 64
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}


def test_the_embedded_model_loads() -> None:
    loaded = load_model("embedded", "causal")
    assert loaded.tokenizer.pad_token_id is not None
    assert full(loaded.model).size < 3_000_000
