"""The embedded model and data: what is shipped loads offline, is small, comes from its script and is a fair task."""

import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from fedzo import embedded

SCRIPT = Path(__file__).resolve().parents[1] / "simulations" / "make_embedded.py"
SPLITS = {"train": 3000, "validation": 400, "test": 1000}
VERBALIZERS = (" terrible", " great")


def load_split(name: str, folder: Path = embedded.DATA) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict]:
    """Two quick runs of the generator, and the last line of the first."""
    folders = [tmp_path_factory.mktemp("embedded") for _ in range(2)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    runs = [
        subprocess.Popen([sys.executable, SCRIPT, "--quick", "--out", folder], env=environment, stdout=subprocess.PIPE)
        for folder in folders
    ]
    outputs = [run.communicate(timeout=120)[0].decode() for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    return folders[0], folders[1], json.loads(outputs[0].splitlines()[-1])


def test_size() -> None:
    folder = embedded.MODEL.parent
    total = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file() and file.suffix != ".pyc")
    assert total < 4_000_000


@pytest.mark.parametrize("name", SPLITS)
def test_split_is_balanced(name: str) -> None:
    examples = load_split(name)
    assert len(examples) == SPLITS[name]
    assert all(set(example) == {"sentence", "label"} for example in examples)
    labels = Counter(example["label"] for example in examples)
    assert set(labels) == {0, 1}
    assert abs(labels[0] - labels[1]) <= 0.02 * len(examples)


def test_no_sentence_twice() -> None:
    sentences = [example["sentence"] for name in SPLITS for example in load_split(name)]
    assert len(set(sentences)) == sum(SPLITS.values())


def test_sentences_hold_no_verdict() -> None:
    for name in SPLITS:
        for example in load_split(name):
            assert not {"great", "terrible"} & set(example["sentence"].split())


def test_model_loads_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tokenizer = AutoTokenizer.from_pretrained(embedded.MODEL, local_files_only=True)
    model, report = AutoModelForCausalLM.from_pretrained(
        embedded.MODEL, local_files_only=True, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert 0.25e6 <= model.num_parameters() <= 1.5e6

    prompt = tokenizer.encode("the plot is never dull . it was")
    for word in VERBALIZERS:  # one token each, and no merge across the boundary
        assert tokenizer.encode("the plot is never dull . it was" + word) == prompt + tokenizer.encode(word)
        assert len(tokenizer.encode(word)) == 1
    assert tokenizer.decode(tokenizer.encode("Any text, even “ünïcode”.")) == "Any text, even “ünïcode”."
    longest = max(load_split("train") + load_split("test"), key=lambda example: len(example["sentence"]))
    assert len(tokenizer.encode(longest["sentence"])) < model.config.max_position_embeddings // 2


def test_zero_shot_leaves_room() -> None:
    """The demo promises a rise of 20 points to at least 85%: the shipped model starts well below."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(embedded.MODEL, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(embedded.MODEL, local_files_only=True).eval()
    verdicts = [tokenizer.encode(word)[0] for word in VERBALIZERS]
    examples = load_split("test")
    batch = tokenizer([example["sentence"] + " it was" for example in examples], padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    last = batch["attention_mask"].sum(1) - 1
    choice = logits[torch.arange(len(examples)), last][:, verdicts].argmax(1)
    accuracy = (choice == torch.tensor([example["label"] for example in examples])).double().mean().item()
    assert 0.5 < accuracy < 0.7


def test_not_a_word_lookup() -> None:
    """Counting the words that speak for a label on the training split does not solve the test split."""
    counts: tuple[Counter[str], Counter[str]] = (Counter(), Counter())
    for example in load_split("train"):
        counts[example["label"]].update(set(example["sentence"].split()))
    examples = load_split("test")
    right = 0
    for example in examples:
        words = set(example["sentence"].split())
        vote = sum((counts[1][word] + 1) / (counts[0][word] + counts[1][word] + 2) - 0.5 for word in words)
        right += (vote > 0) == example["label"]
    assert right / len(examples) < 0.8


def test_shipped_data_comes_from_the_script(generated: tuple[Path, Path, dict]) -> None:
    for name in SPLITS:
        assert (generated[0] / "data" / f"{name}.jsonl").read_bytes() == (embedded.DATA / f"{name}.jsonl").read_bytes()


def test_script_is_deterministic(generated: tuple[Path, Path, dict]) -> None:
    first, second, report = generated
    files = sorted(file.relative_to(first) for file in first.rglob("*") if file.is_file())
    assert files == sorted(file.relative_to(second) for file in second.rglob("*") if file.is_file())
    assert {Path("model/model.safetensors"), Path("model/tokenizer.json")} <= set(files)
    for file in files:
        assert (first / file).read_bytes() == (second / file).read_bytes(), file
    assert set(report) == {"zero_shot_test_accuracy", "parameters", "bytes"}
    assert report["bytes"] == sum((first / file).stat().st_size for file in files)


def test_another_seed_gives_other_data() -> None:
    specification = importlib.util.spec_from_file_location("make_embedded", SCRIPT)
    assert specification is not None and specification.loader is not None
    script = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(script)
    assert script.make_data(1) != script.make_data(2)
    assert script.make_data(1) == script.make_data(1)


def test_quick_does_not_overwrite_the_shipped_files() -> None:
    run = subprocess.run([sys.executable, SCRIPT, "--quick"], capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 2
    assert "--out" in run.stderr
