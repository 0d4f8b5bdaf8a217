"""Base models: loading and fingerprint, heads for encoders, adapters."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedzo import directions
from fedzo.directions import philox
from fedzo.errors import ModelError
from fedzo.runtime import import_peft

KINDS = ("causal", "masked", "encoder")
ADAPTERS = ("lora", "ia3", "prefix", "prompt")
POOLINGS = ("mean", "cls")

_HEAD_FILE = "head.safetensors"
_HEAD_CONFIG = "fedzo_head.json"
_INITIAL_STD = 0.02
# Linear layers that end a feed-forward block: IA3 scales their input, of the others the output.
_FEEDFORWARD = ("down_proj", "fc2", "output.dense", "mlp.c_proj", "fc_out", "dense_4h_to_h", "wo", "w2")


@dataclass(frozen=True)
class LoadedModel:
    """A model ready for evaluation.

    Attributes:
        model: eval mode, float32 unless loaded or quantised otherwise; a transformers model, a PEFT model or an
            :class:`EncoderClassifier`.
        tokenizer: pads on the right and has a pad token.
        kind: "causal", "masked" or "encoder".
        fingerprint: SHA-256 hex of the checkpoint's tensors on disk (names, shapes, dtypes, bytes).
        new_parameters: names of the parameters that do not come from the checkpoint: head, adapters.
    """

    model: nn.Module
    tokenizer: Any
    kind: str
    fingerprint: str
    new_parameters: tuple[str, ...] = ()


class EncoderClassifier(nn.Module):
    """Classes by cosine similarity: ``scale * features @ head.weight.T`` with unit-length features.

    The head is float32 whatever the encoder's dtype.
    """

    def __init__(self, encoder: nn.Module, num_labels: int, scale: float, pooling: str) -> None:
        super().__init__()
        self.encoder = encoder
        self.scale = scale
        self.pooling = pooling
        width = int(encoder.config.hidden_size)  # type: ignore[union-attr,arg-type]
        device = next(encoder.parameters()).device
        self.head = nn.Linear(width, num_labels, bias=False, device=device, dtype=torch.float32)

    def features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """[B, d] in the head's dtype, at least float32: the pooled last hidden state, normalised to length 1."""
        hidden: Tensor = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        hidden = hidden[:, -input_ids.shape[1] :]  # without the virtual tokens of an adapter
        hidden = hidden.to(torch.promote_types(self.head.weight.dtype, torch.float32))
        if self.pooling == "cls":
            pooled = hidden[:, 0]
        else:
            mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
            pooled = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1.0)
        return functional.normalize(pooled, dim=-1)

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, features: Tensor | None = None
    ) -> Tensor:
        """Class logits [B, C], from tokens [B, T] or, skipping the encoder, from features [B, d]."""
        if features is None:
            if input_ids is None or attention_mask is None:
                raise ValueError("EncoderClassifier needs input_ids and attention_mask, or features")
            features = self.features(input_ids, attention_mask)
        logits: Tensor = self.scale * self.head(features.to(self.head.weight.dtype))
        return logits


def load_model(
    source: str,
    kind: str,
    *,
    device: str = "cpu",
    revision: str | None = None,
    dtype: torch.dtype | None = torch.float32,
) -> LoadedModel:
    """Load a model and its tokenizer.

    Args:
        source: "embedded" (fedzo's own toy model), a local directory, or a name on the Hugging Face hub.
        kind: "causal", "masked" or "encoder"; an encoder gets its classes by :func:`add_head`, unless the directory
            holds a head that :func:`save_head` wrote.
        revision: branch, tag or commit on the hub.
        dtype: of the model's parameters; None is the checkpoint's own, which takes the least memory before
            quantising. The fingerprint does not depend on it.

    Raises:
        ModelError: nothing is found there, a part is missing, the model is not of that kind, or it is quantised.
    """
    if kind not in KINDS:
        raise ModelError(f"unknown model kind {kind!r}; known: {', '.join(KINDS)}")
    directory = _locate(source, revision)
    files = _weight_files(directory, source)
    config = _load_config(directory, source)
    _check_kind(config, kind, source)
    tokenizer = _load_tokenizer(directory, source)
    model = _load_weights(directory, kind, source, dtype)
    head = directory / _HEAD_FILE
    if kind == "encoder" and head.is_file():
        model = _with_saved_head(model, directory)
        files = [*files, head]
    return LoadedModel(model.to(device).eval(), tokenizer, kind, _fingerprint(files), ())


def add_head(
    loaded: LoadedModel,
    num_labels: int,
    label_texts: Sequence[str] | None,
    scale: float = 20.0,
    pooling: str = "mean",
    seed: int = 0,
) -> LoadedModel:
    """Put a bias-free classification head, parameter ``head.weight`` [C, d], on an encoder.

    Its rows are the features of the label texts, which makes a zero-shot classifier, or, without texts, Gaussian of
    standard deviation 0.02 from the seed. A head that was loaded from disk is kept.

    Raises:
        ModelError: the model is no encoder, the numbers of labels differ, or the pooling is unknown.
    """
    if loaded.kind != "encoder":
        raise ModelError(f"a classification head needs a model of kind encoder, this one is {loaded.kind}")
    if pooling not in POOLINGS:
        raise ModelError(f"unknown pooling {pooling!r}; known: {', '.join(POOLINGS)}")
    if label_texts is not None and len(label_texts) != num_labels:
        raise ModelError(f"{len(label_texts)} label texts for {num_labels} labels: give one text for each label")
    if isinstance(loaded.model, EncoderClassifier):
        present = loaded.model.head.out_features
        if present != num_labels:
            raise ModelError(f"the saved head has {present} labels, the task has {num_labels}: use the base model")
        return loaded
    model = EncoderClassifier(loaded.model, num_labels, scale, pooling).eval()
    if label_texts is None:
        rows = directions.fill(torch.empty(model.head.weight.numel()), seed, "gaussian") * _INITIAL_STD
    else:
        rows = _label_features(model, loaded.tokenizer, label_texts)
    _set(model.head.weight, rows)
    return replace(
        loaded, model=model, new_parameters=(*(f"encoder.{name}" for name in loaded.new_parameters), "head.weight")
    )


def add_adapter(
    loaded: LoadedModel,
    kind: str,
    *,
    rank: int = 8,
    alpha: float = 16,
    virtual_tokens: int = 16,
    target_modules: Sequence[str] = (),
    seed: int = 0,
    prefix: Tensor | None = None,
) -> LoadedModel:
    """Wrap the model (of an encoder with a head: its encoder) with a PEFT adapter and freeze the rest but the head.

    The adapter's parameters are float32 whatever the base; a quantised base keeps its weights.

    Initial values are a function of the seed alone: LoRA A Gaussian with the variance of PEFT's own initialisation,
    1 / (3 fan_in), and B zero; IA3 one; prefix Gaussian of standard deviation 0.02 unless it is given; prompt rows
    copied from vocabulary rows that the seed chooses.

    Args:
        rank, alpha: of LoRA (Hu et al. 2021).
        virtual_tokens: length of the prefix (Li and Liang 2021) or prompt (Lester et al. 2021).
        target_modules: suffixes of the names of the layers for lora and ia3; empty: PEFT's choice for the architecture.
        prefix: first values of a prefix, from :func:`prefix_activations`.

    Raises:
        ModelError: the adapter is unknown, peft is not installed, or PEFT cannot put it on this architecture.
    """
    if kind not in ADAPTERS:
        raise ModelError(f"unknown adapter {kind!r}; known: {', '.join(ADAPTERS)}")
    try:
        import_peft()
        import peft
    except ImportError as error:
        raise ModelError("adapters need the package peft: install fedzo[adapters]") from error
    classifier, base = _parts(loaded.model)
    if isinstance(base, peft.PeftModel):
        raise ModelError("the model has an adapter already: add one only")
    config = _adapter_config(
        loaded.kind, kind, base, rank=rank, alpha=alpha, virtual_tokens=virtual_tokens, target_modules=target_modules
    )
    architecture = _architecture(base)
    try:
        with quiet():
            _mark_quantised(base)
            wrapped = peft.get_peft_model(base, config).eval()
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        advice = "name its layers in space.targets" if kind in ("lora", "ia3") else "use lora"
        raise ModelError(
            f"PEFT cannot put adapter {kind} on architecture {architecture}: {advice} ({_line(error)})"
        ) from error
    if kind == "prompt":
        wrapped.get_prompt = partial(_prompts, wrapped)
    if kind == "prefix" and prefix is not None:
        _place_prefix(wrapped, prefix, architecture)
    else:
        _initialise(wrapped, kind, seed)
    if kind in ("prefix", "prompt"):
        _try_adapter(wrapped, kind, architecture)
    model: nn.Module = wrapped
    if classifier is not None:
        classifier.encoder = wrapped
        model = classifier
    names = tuple(name for name, p in model.named_parameters() if p.requires_grad)
    return replace(loaded, model=model, new_parameters=names)


@torch.no_grad()
def prefix_activations(loaded: LoadedModel, virtual_tokens: int, seed: int = 0) -> Tensor:
    """First values of a prefix, as in the code of MeZO (arXiv 2305.17333): what real tokens would leave in its place.

    One forward of the base model over ``virtual_tokens`` tokens that the seed draws from the whole vocabulary; the keys
    and values that it leaves in the cache are the prefix itself, without a network between.

    They are computed in the base model's own dtype, so other machines may find other last bits. A run takes those of
    its ledger, where they are an artifact as all initial values are. Take them before quantising.

    Returns:
        [virtual_tokens, 2 * layers, heads, head size] float32 on the model's device: keys and values of the first
        layer, then those of the second; ``heads`` are key-value heads.

    Raises:
        ModelError: the model takes no prefix, or not so long a one, or its layers' keys are of unlike shape.
    """
    from transformers import DynamicCache

    _, base = _parts(loaded.model)
    table = base.get_input_embeddings().weight
    words = philox.words(seed, virtual_tokens).astype("int64") % table.shape[0]
    ids = torch.from_numpy(words).to(table.device).unsqueeze(0)
    cache = DynamicCache()
    try:
        base(input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=cache)
        found = [values[0].float() for layer in cache.layers for values in (layer.keys, layer.values)]
    except Exception as error:
        raise ModelError(
            f"architecture {_architecture(base)} gives no activations of {virtual_tokens} tokens to start a prefix "
            f'from: set space.prefix_init = "random", or use lora ({_line(error)})'
        ) from error
    if len({values.shape for values in found}) != 1:
        why = "has layers with keys of unlike shape" if found else "takes no keys and values from outside"
        raise ModelError(f"adapter prefix does not work on architecture {_architecture(base)}, which {why}: use lora")
    return torch.stack(found).permute(2, 0, 1, 3).contiguous()


def save_head(classifier: EncoderClassifier, directory: Path) -> None:
    """Write the head beside its encoder: head.safetensors and fedzo_head.json, which :func:`load_model` reads back."""
    from safetensors.torch import save_file

    weight = classifier.head.weight.detach().cpu().clone()
    save_file({"head.weight": weight}, str(directory / _HEAD_FILE), metadata={"format": "pt"})
    description = {"num_labels": weight.shape[0], "scale": classifier.scale, "pooling": classifier.pooling}
    (directory / _HEAD_CONFIG).write_text(json.dumps(description, indent=2) + "\n")


def is_quantised(model: nn.Module) -> bool:
    """Whether :func:`fedzo.quantisation.quantise` has quantised a layer of it."""
    return any(hasattr(module, "dequantised") for module in model.modules())


def _parts(model: nn.Module) -> tuple[EncoderClassifier | None, Any]:
    """The classifier, if it is one, and the transformers model."""
    return (model, model.encoder) if isinstance(model, EncoderClassifier) else (None, model)


def _architecture(base: Any) -> str:
    return str(getattr(base.config, "model_type", type(base).__name__))


def _locate(source: str, revision: str | None) -> Path:
    if source == "embedded":
        return Path(__file__).parent / "embedded" / "model"
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1:
        raise ModelError(f"model directory {source} does not exist: give a directory, a hub name or 'embedded'")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    def download(patterns: list[str]) -> Path:
        return Path(snapshot_download(source, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*"]))

    at = f" at revision {revision}" if revision else ""
    try:
        with quiet():
            found = download(["*.json", "*.txt", "*.model", "*.jinja", "*.safetensors"])
            if not any(found.glob("*.safetensors")):
                found = download(["*.bin"])
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        raise ModelError(
            f"model {source}{at} is neither a local directory nor found on the hub or in its cache: check the name and "
            "the connection, or give a directory"
        ) from error
    return found


def _weight_files(directory: Path, source: str) -> list[Path]:
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = directory / f"{name}.index.json"
        if index.is_file():
            files = [directory / shard for shard in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
            missing = [file.name for file in files if not file.is_file()]
            if missing:
                raise ModelError(f"model {source} lacks the weight file {missing[0]} that its index names")
            return files
        if (directory / name).is_file():
            return [directory / name]
    if (directory / "adapter_config.json").is_file():
        raise ModelError(f"{source} is a PEFT adapter: give the base model here and add an adapter to it")
    raise ModelError(f"model {source} has no weights: model.safetensors or pytorch_model.bin is wanted in {directory}")


def _fingerprint(files: Iterable[Path]) -> str:
    """SHA-256 over the tensors of all files, in the order of their names."""
    tensors = sorted(((name, file) for file in files for name in _names(file)), key=lambda item: item[0])
    digest = hashlib.sha256()
    opened: dict[Path, Any] = {}
    for name, file in tensors:
        if file not in opened:
            opened[file] = _open(file)
        source = opened[file]
        tensor: Tensor = source[name] if isinstance(source, dict) else source.get_tensor(name)
        digest.update(f"{name}\n{','.join(map(str, tensor.shape))}\n{tensor.dtype}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _open(file: Path) -> Any:
    try:
        if file.suffix == ".safetensors":
            from safetensors import safe_open

            return safe_open(str(file), framework="pt")
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # SafetensorError, UnpicklingError, RuntimeError, OSError...
        raise ModelError(f"weight file {file} cannot be read: it is damaged or cut off") from error


def _names(file: Path) -> list[str]:
    opened = _open(file)
    return list(opened.keys())


def _load_config(directory: Path, source: str) -> Any:
    from transformers import AutoConfig

    if not (directory / "config.json").is_file():
        raise ModelError(f"model {source} has no config.json in {directory}: it is no transformers model directory")
    try:
        with quiet():
            return AutoConfig.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"model {source} has a config.json that transformers cannot read: {_line(error)}") from error


def _check_kind(config: Any, kind: str, source: str) -> None:
    from transformers.models.auto import modeling_auto as auto

    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(
            f"model {source} is a quantised checkpoint: give the unquantised one and choose a quantisation here, since "
            "the entries to train must be taken out before quantising"
        )
    model_type = config.model_type
    masked = model_type in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    causal = model_type in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not (
        masked and not getattr(config, "is_decoder", False)
    )
    fits = {"causal": causal, "masked": masked, "encoder": True}
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"model {source} ({model_type}) is an encoder-decoder: only {', '.join(KINDS)} models are served"
        )
    if not fits[kind]:
        kinds = " or ".join(name for name in KINDS if fits[name])
        raise ModelError(f"model {source} ({model_type}) is not of kind {kind}; it can serve as {kinds}")


def _load_tokenizer(directory: Path, source: str) -> Any:
    from transformers import AutoTokenizer

    wanted = ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
    if not any((directory / name).is_file() for name in wanted):
        raise ModelError(f"model {source} has no tokenizer: one of {', '.join(wanted)} is wanted in {directory}")
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # tokenizers raises bare Exception for a damaged file
        raise ModelError(f"model {source} has a tokenizer that cannot be read: {_line(error)}") from error
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        # Padding is masked, so any token will do.
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.bos_token
    if tokenizer.pad_token is None:
        raise ModelError(f"the tokenizer of model {source} has no token to pad with: set its pad_token")
    return tokenizer


def _load_weights(directory: Path, kind: str, source: str, dtype: torch.dtype | None) -> nn.Module:
    import transformers

    factory = {
        "causal": transformers.AutoModelForCausalLM,
        "masked": transformers.AutoModelForMaskedLM,
        "encoder": transformers.AutoModel,
    }[kind]
    try:
        with quiet():
            model, report = factory.from_pretrained(
                directory, dtype=dtype or "auto", local_files_only=True, output_loading_info=True
            )
    except Exception as error:  # OSError, SafetensorError, RuntimeError: size mismatch...
        raise ModelError(f"model {source} cannot be loaded as kind {kind}: {_line(error)}") from error
    if kind == "encoder" and getattr(model, "pooler", None) is not None:
        model.pooler = None  # we pool ourselves; its parameters would be entries of theta without effect
    missing = sorted(name for name in report["missing_keys"] if not (kind == "encoder" and name.startswith("pooler.")))
    if missing:
        raise ModelError(
            f"model {source} lacks {len(missing)} weights that kind {kind} needs ({missing[0]}...): "
            "choose the kind that its checkpoint was saved as"
        )
    loaded: nn.Module = model
    return loaded


def _with_saved_head(encoder: nn.Module, directory: Path) -> nn.Module:
    from safetensors.torch import load_file

    try:
        description = json.loads((directory / _HEAD_CONFIG).read_text())
        weight = load_file(str(directory / _HEAD_FILE))["head.weight"]
        model = EncoderClassifier(encoder, weight.shape[0], float(description["scale"]), str(description["pooling"]))
        _set(model.head.weight, weight)
    except Exception as error:  # a file that is missing or damaged, or does not fit
        raise ModelError(f"{directory} has a head that cannot be read: {_line(error)}") from error
    return model


@torch.no_grad()
def _label_features(model: EncoderClassifier, tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """Features of the texts, computed in float64 and rounded once, so that every machine gets the same float32."""
    encoded = tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt").to(model.head.weight.device)
    dtypes = [(tensor, tensor.dtype) for tensor in (*model.parameters(), *model.buffers())]
    model.double()  # and back: both are exact
    try:
        return model.features(encoded["input_ids"], encoded["attention_mask"]).float()
    finally:
        for tensor, dtype in dtypes:
            tensor.data = tensor.data.to(dtype)


def _adapter_config(
    model_kind: str,
    kind: str,
    base: Any,
    *,
    rank: int,
    alpha: float,
    virtual_tokens: int,
    target_modules: Sequence[str],
) -> Any:
    import peft

    # PEFT puts virtual tokens in front of what a masked model or an encoder reads only as a feature extractor.
    task = peft.TaskType.CAUSAL_LM if model_kind == "causal" else peft.TaskType.FEATURE_EXTRACTION
    targets = list(target_modules) or None
    if kind == "lora":
        return peft.LoraConfig(task_type=task, r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=targets)
    if kind == "ia3":
        feedforward = None if targets is None else [name for name in targets if name.endswith(_FEEDFORWARD)]
        return peft.IA3Config(task_type=task, target_modules=targets, feedforward_modules=feedforward)
    if target_modules:
        raise ModelError(f"adapter {kind} takes no target_modules: leave them out")
    if kind == "prefix":
        return peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=virtual_tokens)
    return peft.PromptTuningConfig(
        task_type=task,
        num_virtual_tokens=virtual_tokens,
        prompt_tuning_init=peft.PromptTuningInit.RANDOM,
        token_dim=base.get_input_embeddings().embedding_dim,  # OPT may project these up to the hidden size
        num_attention_heads=getattr(base.config, "num_attention_heads", 1),  # PEFT wants one, and makes nothing of it
    )


def _prompts(model: Any, batch_size: int, task_ids: Tensor | None = None, max_cache_len: int | None = None) -> Tensor:
    """As `PeftModel.get_prompt` for a prompt, but looked up for each row, so that rows may be at unlike points."""
    tokens = model.prompt_tokens[model.active_adapter].to(model.device)
    prompts: Tensor = model.prompt_encoder[model.active_adapter](tokens.expand(batch_size, -1))
    return prompts


def _mark_quantised(base: nn.Module) -> None:
    """Set the attributes by which PEFT knows that layers of bitsandbytes are there."""
    for module in base.modules():
        if hasattr(module, "dequantised"):
            setattr(base, f"is_loaded_in_{module.bits}bit", True)


@torch.no_grad()
def _initialise(model: nn.Module, kind: str, seed: int) -> None:
    """Draw the adapter's initial values from the seed, in the order of the names."""
    trainable = sorted((name, p) for name, p in model.named_parameters() if p.requires_grad)
    offset = 0
    for name, parameter in trainable:
        if kind == "lora" and "lora_A" in name:
            std = (3.0 * parameter.shape[1]) ** -0.5
        elif kind == "lora":
            std = 0.0
        elif kind == "prefix":
            std = _INITIAL_STD
        elif kind == "prompt":
            table = model.get_input_embeddings().weight  # type: ignore[operator]
            words = philox.words(seed, parameter.shape[0]).astype("int64") % table.shape[0]
            _set(parameter, table.detach()[torch.from_numpy(words).to(table.device)])
            continue
        else:
            parameter.fill_(1.0)
            continue
        values = directions.fill(torch.empty(parameter.numel()), seed, "gaussian", offset=offset)
        offset += parameter.numel()
        _set(parameter, values * std)


def _place_prefix(model: nn.Module, prefix: Tensor, architecture: str) -> None:
    """Put given first values into PEFT's layout, [virtual tokens, layers x (keys, values) x heads x head size]."""
    (parameter,) = (p for p in model.parameters() if p.requires_grad)
    if prefix.dim() != 4 or prefix.numel() != parameter.numel() or len(prefix) != len(parameter):
        raise ModelError(
            f"PEFT's prefix for architecture {architecture} is {list(parameter.shape)}, the activations of the model "
            f'are {list(prefix.shape)}: set space.prefix_init = "random", or space.adapter = "lora"'
        )
    _set(parameter, prefix)


@torch.no_grad()
def _try_adapter(model: nn.Module, kind: str, architecture: str) -> None:
    """One forward: whether an architecture takes virtual tokens shows only there."""
    device = next(model.parameters()).device
    ids = torch.ones(1, 2, dtype=torch.int64, device=device)
    try:
        first = model(input_ids=ids, attention_mask=torch.ones_like(ids))[0]
        trainable = [p for p in model.parameters() if p.requires_grad]
        before = [p.clone() for p in trainable]
        for p in trainable:
            p.add_(1.0)
        second = model(input_ids=ids, attention_mask=torch.ones_like(ids))[0]
        for p, value in zip(trainable, before, strict=True):
            p.copy_(value)
    except Exception as error:
        raise ModelError(
            f"adapter {kind} does not work on architecture {architecture}: use lora ({_line(error)})"
        ) from error
    if torch.equal(first[:, -2:], second[:, -2:]):
        raise ModelError(f"adapter {kind} has no effect on architecture {architecture}: use lora")


@torch.no_grad()
def _set(parameter: Tensor, values: Tensor) -> None:
    parameter.copy_(values.view(parameter.shape))


@contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars and warnings of transformers, peft and huggingface_hub."""
    import warnings

    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    hub_bars = os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars and hub_bars != "1":
            logging.enable_progress_bar()


def _line(error: BaseException) -> str:
    """The first line of an error's text, which for transformers is the one that says what is wrong."""
    text = str(error).strip().splitlines()
    return text[0][:200] if text else type(error).__name__
