"""Tiny models of the architectures that fedzo serves, with random weights, and spaces and batches to try on them."""

import copy
import os

import torch
from torch import Tensor, nn
from torch.nn import functional

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertConfig,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    ModernBertConfig,
    OPTConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    RobertaConfig,
)

from fedzo import spaces
from fedzo.evaluation import Batch, TokenTargets
from fedzo.models import LoadedModel, add_adapter, add_head, prefix_activations
from fedzo.spaces import TrainableSpace

VOCAB = 64
_SIZES = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_PLACES = {"max_position_embeddings": 64, "bos_token_id": 2, "eos_token_id": 2}
_GROUPED = {**_SIZES, **_PLACES, "intermediate_size": 48, "num_key_value_heads": 2}
_OPT = {**_SIZES, **_PLACES, "ffn_dim": 48, "init_std": 0.1}
CONFIGS: dict[str, PretrainedConfig] = {
    "opt": OPTConfig(**_OPT, word_embed_proj_dim=32),
    "opt, projected": OPTConfig(**_OPT, word_embed_proj_dim=16, do_layer_norm_before=False),  # as opt-350m
    "llama": LlamaConfig(**_GROUPED, tie_word_embeddings=False),
    "mistral": MistralConfig(**_GROUPED, sliding_window=6),
    "qwen2": Qwen2Config(**_GROUPED, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**_GROUPED, head_dim=16, tie_word_embeddings=True),
    "gpt2": GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=2, eos_token_id=2
    ),
    "gpt-neox": GPTNeoXConfig(**_SIZES, **_PLACES, intermediate_size=48),
    "gemma2": Gemma2Config(**_GROUPED, head_dim=8),
    "bert": BertConfig(**_SIZES, intermediate_size=48, max_position_embeddings=64),
    "roberta": RobertaConfig(**_SIZES, intermediate_size=48, max_position_embeddings=64),
    "electra": ElectraConfig(**_SIZES, intermediate_size=48, embedding_size=16, max_position_embeddings=64),
    "deberta-v2": DebertaV2Config(**_SIZES, intermediate_size=48, max_position_embeddings=64),
    "modernbert": ModernBertConfig(
        **_SIZES, **_PLACES, intermediate_size=48, pad_token_id=0, cls_token_id=1, sep_token_id=2
    ),
    "distilbert": DistilBertConfig(
        vocab_size=VOCAB, dim=32, n_layers=2, n_heads=4, hidden_dim=48, max_position_embeddings=64
    ),
    "bert encoder": BertConfig(**_SIZES, intermediate_size=48, max_position_embeddings=64),
    "roberta encoder": RobertaConfig(**_SIZES, intermediate_size=48, max_position_embeddings=64),
}
MASKED = ("bert", "roberta", "electra", "deberta-v2", "modernbert", "distilbert")
# Layers to adapt where PEFT has no choice of its own for an architecture, or none for IA3.
TARGETS = {"modernbert": ("Wqkv", "mlp.Wo"), "distilbert": ("q_lin", "v_lin"), "electra": ("query", "value")}
ADAPTERS = ("lora", "ia3", "prefix", "prompt")
SCHEMES = ("full", "sparse", *ADAPTERS)
VIRTUAL = 4


def kind_of(name: str) -> str:
    if name.endswith("encoder"):
        return "encoder"
    return "masked" if name in MASKED else "causal"


def build(name: str) -> LoadedModel:
    """A model without a tokenizer; an encoder has a head for 2 classes."""
    kind = kind_of(name)
    factory = {"causal": AutoModelForCausalLM, "masked": AutoModelForMaskedLM, "encoder": AutoModel}[kind]
    torch.manual_seed(0)
    options = {"add_pooling_layer": False} if kind == "encoder" else {}
    loaded = LoadedModel(factory.from_config(copy.deepcopy(CONFIGS[name]), **options).eval(), None, kind, "f" * 64)
    return add_head(loaded, 2, None) if kind == "encoder" else loaded


def with_scheme(loaded: LoadedModel, scheme: str, targets: tuple[str, ...] = ()) -> tuple[nn.Module, TrainableSpace]:
    """The model, with an adapter where the scheme is one, and its space."""
    if scheme == "full":
        return loaded.model, spaces.full(loaded.model)
    if scheme == "sparse":
        mask = spaces.draw_mask(loaded.model, 0.01, "random", loaded.fingerprint, seed=1, exclude=loaded.new_parameters)
        return loaded.model, spaces.sparse(loaded.model, mask, loaded.new_parameters)
    prefix = prefix_activations(loaded, VIRTUAL, seed=3) if scheme == "prefix" else None
    loaded = add_adapter(loaded, scheme, rank=2, virtual_tokens=VIRTUAL, target_modules=targets, seed=3, prefix=prefix)
    return loaded.model, spaces.adapter(loaded.model)


def batch_of(name: str) -> Batch:
    """Three rows of unlike length, of two candidates each."""
    ids = torch.randint(4, VOCAB, (3, 9), generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([9, 5, 7])
    mask = (torch.arange(9) < lengths[:, None]).long()
    inputs = {"input_ids": torch.where(mask.bool(), ids, 1), "attention_mask": mask}
    labels = torch.tensor([0, 1, 1])
    if kind_of(name) == "encoder":
        return Batch(inputs, labels)
    targets = TokenTargets(
        rows=torch.tensor([0, 0, 0, 1, 1, 2, 2]),
        positions=torch.tensor([8, 8, 7, 4, 4, 6, 6]),
        tokens=torch.tensor([5, 9, 30, 5, 9, 5, 9]),
        candidates=torch.tensor([0, 1, 1, 2, 3, 4, 5]),
        num_candidates=2,
    )
    return Batch(inputs, labels, targets)


def plain_losses(model: nn.Module, batch: Batch) -> Tensor:
    """[B] by the model's own forward on all positions, in the dtype of its parameters; carries gradients."""
    output = model(**batch.inputs)
    if batch.targets is None:
        return functional.cross_entropy(output, batch.labels, reduction="none")
    length = batch.inputs["input_ids"].shape[1]
    found = torch.log_softmax(output.logits[:, -length:], -1)  # without virtual tokens in front
    t = batch.targets
    scores = [
        found[t.rows[of], t.positions[of], t.tokens[of]].mean()
        for of in (t.candidates == c for c in range(2 * len(batch)))
    ]
    return functional.cross_entropy(torch.stack(scores).view(-1, 2), batch.labels, reduction="none")
