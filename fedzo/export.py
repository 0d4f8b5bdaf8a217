"""Export of a finished run: a merged model, a sparse delta, a PEFT adapter or a SHiRA adapter, each with a model card.

On the unquantised base: theta is never merged into quantised weights. Only a theta of scales or codes is part of a
quantised base, which is then written out dequantised.
"""

import json
import math
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedzo.config import Config, flatten, from_flat, to_toml
from fedzo.engine import check_same
from fedzo.errors import ConfigError, ModelError, RunError, SpaceError
from fedzo.experiment import open_experiment
from fedzo.federation.coordinator import replay
from fedzo.federation.ledger import Ledger
from fedzo.federation.replica import theta_digest
from fedzo.models import EncoderClassifier, LoadedModel, quiet, save_head
from fedzo.quantisation import dequantise
from fedzo.runtime import import_peft
from fedzo.spaces import Segment, TrainableSpace
from fedzo.spaces.mask import decode, encode
from fedzo.spaces.space import Part, build

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
DELTA = "delta.safetensors"
_QUANTISED = ("scales", "codes")  # spaces whose theta is part of a quantised base
_DELTA_FORMAT = "fedzo-delta-1"
_ADAPTER = "adapter_model.safetensors"


@dataclass(frozen=True)
class Finetuned:
    """A fine-tuned model before it is written; writing it may change the loaded model.

    Attributes:
        loaded, space: the unquantised base, prepared, and what was trained of it.
        theta: [space.size].
        base, revision: what a reader is told to load: a hub name, or a directory's last part.
        ledger_hash, rounds: where theta comes from.
    """

    loaded: LoadedModel
    space: TrainableSpace
    theta: Tensor
    base: str
    revision: str | None
    ledger_hash: str
    rounds: int

    @property
    def core(self) -> Any:
        """The transformers or PEFT model; of an encoder that under the head."""
        model = self.loaded.model
        return model.encoder if isinstance(model, EncoderClassifier) else model


def export(
    config: Config, ledger: Ledger, rounds: int, directory: Path, *, form: str | None = None, dtype: str | None = None
) -> str:
    """Replays a ledger onto the unquantised base model and writes the result, whole or not at all.

    Args:
        form: "merged" (a directory for ``from_pretrained``), "delta" (:func:`apply_delta` reads it), "peft" or "shira"
            (directories for ``PeftModel.from_pretrained``); None: peft for an adapter space, else merged.
        dtype: of a merged model, one of :data:`DTYPES`; None: float32.

    Returns:
        The digest of theta in hex.

    Raises:
        ConfigError: the directory exists, or form and dtype do not fit each other or the space.
        LedgerError: the ledger is damaged or belongs to another run.
        ModelError: a value is out of the range of dtype, or peft is not installed.
        SpaceError: a SHiRA adapter cannot hold this mask.
        RunError: the directory cannot be written.
    """
    from safetensors import SafetensorError

    form = form or default_form(config)
    _check(config, directory, form, dtype)
    kept = config.model.quantisation if config.space.kind in _QUANTISED else "none"
    whole = config.model.model_copy(update={"quantisation": kept, "compute_dtype": "float32"})
    experiment = open_experiment(config.model_copy(update={"model": whole}), ledger)
    check_same(ledger, experiment)
    replica = experiment.replica(ledger.spec)
    replay(ledger, replica, rounds)
    finetuned = Finetuned(
        experiment.loaded, experiment.space, replica.theta, short_name(config.model.source),
        config.model.revision or None, ledger.hash_before(rounds).hex(), rounds,
    )  # fmt: skip
    scratch = directory.with_name(f".{directory.name}.{os.getpid()}")
    try:
        scratch.mkdir(parents=True)
        with torch.no_grad(), quiet():
            if form == "merged":
                write_merged(finetuned, scratch, DTYPES[dtype or "float32"])
            else:
                _WRITERS[form](finetuned, scratch)
        (scratch / "README.md").write_text(model_card(finetuned, config, ledger, form, dtype), encoding="utf-8")
        scratch.rename(directory)
    except Exception as error:
        # A full disk is a SafetensorError from safetensors, and a bare Exception from tokenizers.
        if isinstance(error, OSError | SafetensorError) or type(error) is Exception:
            raise RunError(f"cannot write the model to {directory}: {error}") from error
        raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return replica.digest().hex()


def default_form(config: Config) -> str:
    """The format of an export when none is asked for."""
    return "peft" if config.space.kind == "adapter" else "merged"


def _check(config: Config, directory: Path, form: str, dtype: str | None) -> None:
    if form not in FORMS:
        raise ConfigError(f'export format "{form}" is unknown; wanted {", ".join(FORMS)}')
    if dtype is not None and form != "merged":
        raise ConfigError(f'dtype "{dtype}" is for a merged model; {form} has float32 values: leave dtype out')
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f'dtype "{dtype}" is unknown; wanted {", ".join(DTYPES)}')
    space = config.space
    if space.kind not in FORMS[form]:
        fitting = " or ".join(name for name, kinds in FORMS.items() if space.kind in kinds)
        raise ConfigError(f"{form} exports a space of kind {FORMS[form][0]}, this run's is {space.kind}: use {fitting}")
    if form == "merged" and space.kind == "adapter" and space.adapter not in ("lora", "ia3"):
        raise ConfigError(f"adapter {space.adapter} adds tokens and cannot be merged into weights: use peft")
    if directory.exists():
        raise ConfigError(f"{directory} exists; give a directory that does not")


@torch.no_grad()
def write_merged(finetuned: Finetuned, directory: Path, dtype: torch.dtype = torch.float32) -> None:
    """The whole model for ``from_pretrained``; an encoder's head goes beside it (:func:`fedzo.models.save_head`).

    Raises:
        ModelError: a finite value is out of the range of dtype.
    """
    loaded, core = finetuned.loaded, finetuned.core
    if finetuned.space.kind in _QUANTISED:
        dequantise(loaded.model, finetuned.space, finetuned.theta)
    else:
        finetuned.space.write(loaded.model, finetuned.theta)
    if hasattr(core, "peft_config"):
        core = core.merge_and_unload()
    for part in (core, getattr(loaded.model, "head", None)):
        if part is not None:
            _check_range(part, dtype)
            part.to(dtype)
    core.save_pretrained(directory)
    _write_rest(loaded, directory)


def _check_range(model: nn.Module, dtype: torch.dtype) -> None:
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and bool((beyond := tensor.isfinite() & ~tensor.to(dtype).isfinite()).any()):
            short = str(dtype).removeprefix("torch.")
            raise ModelError(
                f"parameter {name} holds {tensor[beyond][0].item():g}, beyond the range of {short} "
                f"({torch.finfo(dtype).max:g}): export with dtype bfloat16 or float32"
            )


def write_peft(finetuned: Finetuned, directory: Path) -> None:
    """The adapter for ``PeftModel.from_pretrained``; an encoder's head goes beside it."""
    finetuned.space.write(finetuned.loaded.model, finetuned.theta)
    finetuned.core.save_pretrained(directory)
    # PEFT writes the directory that the base was loaded from: another machine does not have it.
    path = directory / "adapter_config.json"
    description = json.loads(path.read_text(encoding="utf-8"))
    description |= {"base_model_name_or_path": finetuned.base, "revision": finetuned.revision}
    path.write_text(json.dumps(description, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    _write_rest(finetuned.loaded, directory)


def _write_rest(loaded: LoadedModel, directory: Path) -> None:
    loaded.tokenizer.save_pretrained(directory)
    if isinstance(loaded.model, EncoderClassifier):
        save_head(loaded.model, directory)


def write_shira(finetuned: Finetuned, directory: Path) -> None:
    """A SHiRA adapter (Bhardwaj et al. 2024, arXiv 2406.13175) as PEFT stores it: r (m + n) entries of m x n weights.

    r is the smallest with room for every mask; what is left of it are zeros at a weight's first positions out of the
    mask. base + (theta - base) is theta, but where the difference needs more than float32's 24 bits.

    Raises:
        SpaceError: something else than masked weights of linear layers is trained, or a mask is too dense.
    """
    from safetensors.torch import save_file

    try:
        import_peft()
        from peft import ShiraConfig, TaskType
    except ImportError as error:
        raise ModelError("a SHiRA adapter needs the package peft: install fedzo[adapters]") from error
    loaded, space = finetuned.loaded, finetuned.space
    targets = _shira_targets(finetuned)
    rank = max(math.ceil(segment.size / sum(segment.shape)) for segment in targets.values())
    parameters = space.parameters(loaded.model)
    tensors: dict[str, Tensor] = {}
    for name, segment in targets.items():
        (rows, columns), count = segment.shape, rank * sum(segment.shape)
        if count > rows * columns:
            raise SpaceError(
                f"a SHiRA adapter of rank {rank}, which this mask needs, has {count} entries in {segment.name}, more "
                f"than its {rows} x {columns}: export merged or delta, or train a mask of lower density"
            )
        assert segment.indices is not None
        indices = segment.indices.cpu()
        first = torch.arange(count)
        free = first[~torch.isin(first, indices)][: count - segment.size]
        positions = torch.cat((indices, free)).sort().values
        base = parameters[segment.name].detach().cpu().reshape(-1)[indices]
        values = torch.zeros(count)
        values[torch.searchsorted(positions, indices)] = _part(finetuned.theta, segment).cpu() - base
        tensors[f"base_model.model.{name}.shira_weight"] = values
        places = torch.stack((positions // columns, positions % columns))
        tensors[f"base_model.model.{name}.shira_indices"] = places.to(torch.int32)
    save_file(tensors, str(directory / _ADAPTER), metadata={"format": "pt"})
    ShiraConfig(
        r=rank,
        mask_type="custom",
        target_modules="|".join(name.replace(".", r"\.") for name in targets),
        task_type=TaskType.CAUSAL_LM if loaded.kind == "causal" else TaskType.FEATURE_EXTRACTION,
        base_model_name_or_path=finetuned.base,
        revision=finetuned.revision,
        inference_mode=True,
    ).save_pretrained(str(directory))
    loaded.tokenizer.save_pretrained(directory)


def _shira_targets(finetuned: Finetuned) -> dict[str, Segment]:
    """Module name -> its weight's segment.

    Raises:
        SpaceError: a trainable parameter is no masked weight of one linear layer.
    """
    owners: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in finetuned.core.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append((name, module))
    parameters = finetuned.space.parameters(finetuned.loaded.model)
    targets: dict[str, Segment] = {}
    for segment in finetuned.space.segments:
        found, advice = owners.get(id(parameters[segment.name]), []), ", or exclude it from the mask (space.exclude)"
        if segment.indices is None:
            what, advice = "is trained as a whole", ""
        elif len(found) > 1:
            what = "is shared by several layers"
        elif not found or not isinstance(found[0][1], nn.Linear) or len(segment.shape) != 2:
            what = f"belongs to {'the head' if not found else type(found[0][1]).__name__}"
        else:
            targets[found[0][0]] = segment
            continue
        raise SpaceError(
            f"parameter {segment.name} {what}; a SHiRA adapter holds masked weights of linear layers only: export "
            f"merged or delta{advice}"
        )
    return targets


def write_delta(finetuned: Finetuned, directory: Path) -> None:
    """The changed values of a sparse space as delta.safetensors, equal bytes for equal runs.

    ``theta`` (float32) and ``indices`` (uint8, coded as in a mask; none for a parameter trained as a whole), in the
    order of the space, and one metadata key with the rest as canonical JSON.
    """
    from safetensors.torch import save

    space = finetuned.space
    codes = [None if s.indices is None else encode(s.indices.cpu().numpy()) for s in space.segments]
    sizes = [None if code is None else code.size for code in codes]
    description = {
        "format": _DELTA_FORMAT,
        "fingerprint": finetuned.loaded.fingerprint,
        "ledger_hash": finetuned.ledger_hash,
        "rounds": finetuned.rounds,
        "space_hash": space.hash,
        "theta_digest": theta_digest(finetuned.theta).hex(),
        "tensors": [[s.name, list(s.shape), s.size, size] for s, size in zip(space.segments, sizes, strict=True)],
    }
    indices = np.concatenate([np.zeros(0, np.uint8), *(code for code in codes if code is not None)])
    tensors = {"indices": torch.from_numpy(indices), "theta": finetuned.theta.detach().cpu()}
    text = _canonical({**description, "hash": sha256(_canonical(description).encode()).hexdigest()})
    (directory / DELTA).write_bytes(save(tensors, metadata={"delta": text}))


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def apply_delta(model: nn.Module, path: str | Path, fingerprint: str) -> None:
    """Write the values of a delta into its base model; afterwards the model is the merged one, bit for bit.

    Args:
        model: the unquantised base as :func:`fedzo.models.load_model` gives it, an encoder with a head.
        path: the directory of an export, or its delta.safetensors.
        fingerprint: the base model's, ``LoadedModel.fingerprint``.

    Raises:
        SpaceError: the file is missing or damaged, was made on another base, or does not fit the model, or the model
            is quantised; the model is then unchanged.
    """
    path = Path(path)
    space, theta = _load_delta(path / DELTA if path.is_dir() else path, fingerprint)
    space.write(model, theta.to(next(model.parameters()).device))


def _load_delta(path: Path, fingerprint: str) -> tuple[TrainableSpace, Tensor]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise SpaceError(f"delta {path} does not exist: make it with `fedzo replay RUN --as delta`")
    try:
        with safe_open(str(path), framework="pt") as file:
            description = json.loads((file.metadata() or {})["delta"])
            own = description.pop("hash")
            indices, theta = file.get_tensor("indices").numpy(), file.get_tensor("theta")
        if description["format"] != _DELTA_FORMAT:
            raise SpaceError(f"delta {path} has format {description['format']!r}, wanted {_DELTA_FORMAT!r}")
        parts: list[Part] = []
        at = 0
        for name, shape, count, size in description["tensors"]:
            coded = None if size is None else torch.from_numpy(decode(indices[at : at + size], count))
            parts.append((name, tuple(shape), coded, None))
            at += size or 0
        space = build("sparse", parts)
        named = (description["space_hash"], description["theta_digest"], own)
        found = (space.hash, theta_digest(theta).hex(), sha256(_canonical(description).encode()).hexdigest())
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise SpaceError(f"{path} cannot be read as a delta: it is damaged or no delta") from error
    if found != named or theta.shape != (space.size,):
        raise SpaceError(f"delta {path} is damaged: its content does not have the hashes that it names")
    if (base := description["fingerprint"]) != fingerprint:
        raise SpaceError(
            f"delta for another base: {path} was made on a model of fingerprint {str(base)[:16]}, this model or "
            f"revision has {fingerprint[:16]}: load the base that its model card names"
        )
    return space, theta


def _part(theta: Tensor, segment: Segment) -> Tensor:
    return theta[segment.offset : segment.offset + segment.size]


_WRITERS: dict[str, Callable[[Finetuned, Path], None]] = {
    "delta": write_delta,
    "peft": write_peft,
    "shira": write_shira,
}
# Format -> kinds of space that it can hold.
FORMS = {
    "merged": ("full", "sparse", "adapter", *_QUANTISED),
    "delta": ("sparse",),
    "peft": ("adapter",),
    "shira": ("sparse",),
}


def model_card(finetuned: Finetuned, config: Config, ledger: Ledger, form: str, dtype: str | None = None) -> str:
    """README.md of an export, with the hub's front matter; it names files and directories by their last part."""
    from huggingface_hub import ModelCardData

    spec, base, shown = ledger.spec, finetuned.base, _without_paths(config)
    identity = base if re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*", base, re.ASCII) else None  # what the hub can link
    library = {"merged": "transformers", "delta": "fedzo"}.get(form, "peft")
    tags = ["fedzo", "zeroth-order", "federated-learning", *([form] if form != "merged" else [])]
    front = ModelCardData(base_model=identity, library_name=library, tags=tags).to_yaml()
    what = {
        "merged": f"the whole model, merged, {dtype or 'float32'}",
        "delta": "the changed parameters, float32",
        "peft": f"a PEFT adapter, {shown.space.adapter}",
        "shira": "a PEFT SHiRA adapter",
    }[form]
    rows = {
        "content": what,
        "base model": f"`{base}`" + (f", revision `{finetuned.revision}`" if finetuned.revision else ""),
        "base fingerprint": f"`{spec.fingerprint}`",
        "task": f"{shown.task.name}, data `{shown.data.source}`",
        "space": f"{spec.space}, {spec.size:,} trainable of {spec.parameters:,} parameters",
        "method": f"{spec.estimator} with {spec.queries} {spec.family} directions a step, {spec.optimizer}",
        "rounds": f"{finetuned.rounds} of {spec.rounds}, {spec.clients} clients",
        "ledger hash": f"`{finetuned.ledger_hash}`",
        "theta digest": f"`{theta_digest(finetuned.theta).hex()}`",
        **{split: _recorded(ledger, finetuned.rounds, split) for split in ("validation", "test")},
        "privacy": "none",
    }
    if config.space.kind not in _QUANTISED and (base_of_run := config.model.quantisation) != "none":
        rows["accuracy of"] = f"the run's {base_of_run} base; this export is on the unquantised one"
    how = "with forward passes only: clients sent seeds and scalars"
    if parts := shown.method.first_order:
        rows["method"] += f"; {', '.join(f'`{p}`' for p in parts)} by {shown.method.first_order_optimizer} on gradients"
        how = "with forward passes, and gradients of a part: clients sent seeds, scalars and these gradients"
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return (
        f"---\n{front}\n---\n\n# {base}, fine-tuned with fedzo\n\n"
        f"Fine-tuned {how}, and replaying their ledger on the base model gives this model.\n\n"
        f"| | |\n|---|---|\n{table}\n\n"
        f"## Loading\n\n```python\n{_loading(finetuned, form)}```\n\n"
        f"## Configuration\n\n```toml\n{to_toml(shown).strip()}\n```\n"
    )


def _recorded(ledger: Ledger, rounds: int, split: str) -> str:
    metrics = ledger.evaluations(split).get(rounds)
    if not metrics:
        return "not recorded after this round"
    return ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in metrics.items())


def _loading(finetuned: Finetuned, form: str) -> str:
    kind, base, model = finetuned.loaded.kind, finetuned.base, finetuned.loaded.model
    auto = {"causal": "AutoModelForCausalLM", "masked": "AutoModelForMaskedLM", "encoder": "AutoModel"}[kind]
    if form == "delta":
        names, head = "load_model", ""
        if isinstance(model, EncoderClassifier):
            names = "add_head, load_model"
            head = f"loaded = add_head(loaded, {model.head.out_features}, None, {model.scale}, {model.pooling!r})\n"
        return (
            f"from fedzo.export import apply_delta\nfrom fedzo.models import {names}\n\n"
            f'loaded = load_model("{base}", "{kind}")\n{head}'
            f'apply_delta(loaded.model, "{DELTA}", loaded.fingerprint)\n'
        )
    if form == "merged" and kind == "encoder":
        return (
            "from fedzo.models import load_model\n\n"
            'loaded = load_model(".", "encoder")  # with its head; transformers.AutoModel gives the encoder alone\n'
        )
    if form == "merged":
        return f'from transformers import {auto}\n\nmodel = {auto}.from_pretrained(".")\n'
    note = "  # the head is in head.safetensors" if kind == "encoder" else ""
    return (
        f"from peft import PeftModel\nfrom transformers import {auto}\n\n"
        f'model = PeftModel.from_pretrained({auto}.from_pretrained("{base}"), "."){note}\n'
    )


def _without_paths(config: Config) -> Config:
    """With files and directories by their last part: where they lie on this machine is nobody's business."""
    flat = flatten(config).items()
    return from_flat({k: short_name(v) if isinstance(v, str) and not k.startswith("task.") else v for k, v in flat})


def short_name(text: str) -> str:
    """The last part of a local path; a hub name stays whole."""
    path = PurePath(text)
    local = path.is_absolute() or text.startswith((".", "~")) or text.count("/") > 1
    return path.name or text if local else text
