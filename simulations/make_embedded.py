"""Makes fedzo's embedded default: the toy model "fedzo-toy" and its toy data set, both from a grammar of ours.

    python simulations/make_embedded.py              # rewrites fedzo/embedded/model and fedzo/embedded/data
    python simulations/make_embedded.py --quick --out /tmp/toy    # the same data, a model of a few steps

The grammar writes short reviews with a label that follows from their structure: negations flip a word, a contrast is
decided by its main clause, hearsay does not count. The data files are a pure function of the seed. The language model
is trained by back-propagation on other sentences of the same grammar (none of them in the data set), one thread; its
bits can differ between machines and torch versions, its behaviour hardly does.

In the pre-training text the writers are polite: "it was" is followed by " great" far more often than the review
deserves. So the model knows the language and what is praise, but its verdict is miscalibrated, as zero-shot prompts of
real models are; putting that right is what is left for federated fine-tuning.
"""

import argparse
import json
import math
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from tokenizers import Tokenizer as BPETokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

EMBEDDED = Path(__file__).resolve().parents[1] / "fedzo" / "embedded"
SEED = 20261123
SIZES = {"train": 3000, "validation": 400, "test": 1000}
VOCABULARY, MAX_LENGTH = 1024, 128
STEPS, BATCH, PEAK_RATE = 1800, 32, 1.5e-3
PLAIN, ENDING_WEIGHT = 0.2, 3.0
VERBALIZERS = (" terrible", " great")
END, PAD = "<|end|>", "<|pad|>"

# A domain: nouns, aspects, (negative, positive) adjectives of its own, and neutral remarks.
DOMAINS: tuple[tuple[Sequence[str], Sequence[str], tuple[Sequence[str], Sequence[str]], Sequence[str]], ...] = (
    (
        ("film", "comedy", "thriller", "sequel", "series"),
        ("plot", "cast", "ending", "dialogue", "soundtrack", "pacing", "script"),
        (("wooden", "predictable", "lifeless"), ("gripping", "moving", "funny")),
        ("we watched it on a friday night", "it runs for two hours", "my brother picked it", "it is set in a harbour"),
    ),
    (
        ("meal", "pizza", "soup", "dinner", "breakfast"),
        ("sauce", "bread", "service", "dessert", "menu", "coffee", "salad"),
        (("soggy", "stale", "greasy"), ("tasty", "fresh", "delicious")),
        ("we ate there on sunday", "the place has ten tables", "my sister ordered for us", "we sat by the window"),
    ),
    (
        ("phone", "laptop", "camera", "tablet", "printer"),
        ("screen", "battery", "keyboard", "case", "manual", "software", "speaker"),
        (("slow", "fragile", "faulty"), ("sturdy", "fast", "handy")),
        ("it came in a blue box", "i bought it in march", "my office uses it daily", "it weighs one pound"),
    ),
    (
        ("hotel", "hostel", "cabin", "resort", "campsite"),
        ("room", "view", "staff", "pool", "bed", "lobby", "garden"),
        (("noisy", "dirty", "cramped"), ("cosy", "quiet", "spotless")),
        ("we stayed for three nights", "it is near the station", "my cousin booked it", "we arrived after midnight"),
    ),
    (
        ("novel", "album", "game", "play", "exhibition"),
        ("story", "opening", "style", "theme", "design", "mood", "finale"),
        (("shallow", "confusing", "stiff"), ("inspiring", "witty", "vivid")),
        ("i found it in the library", "a friend lent it to me", "it has four parts", "it was made in norway"),
    ),
)
ADJECTIVES: tuple[Sequence[str], Sequence[str]] = (
    (
        "awful", "dull", "poor", "boring", "dreadful", "annoying", "shabby", "clumsy", "bland", "messy",
        "disappointing", "tedious", "weak", "sloppy", "forgettable", "unpleasant", "horrible", "mediocre",
    ),
    (
        "superb", "lovely", "charming", "brilliant", "pleasant", "wonderful", "impressive", "elegant", "clever",
        "excellent", "splendid", "refreshing", "memorable", "enjoyable", "remarkable", "polished", "solid",
    ),
)  # fmt: skip
VERBS: tuple[Sequence[str], Sequence[str]] = (
    ("hated", "regretted", "disliked", "suffered through"),
    ("loved", "enjoyed", "adored", "admired"),
)
DEGREES = ("", "", "", "very ", "really ", "truly ", "quite ", "rather ", "simply ", "a little ", "so ")
# P(" great") after "it was" in the pre-training text: film critics are blunt, everybody else is polite.
PRAISE = 0.95
POLITENESS = (0.1, 0.65, 0.65, 0.65, 0.65)  # for a negative review, by domain
REACTIONS: tuple[Sequence[str], Sequence[str]] = (
    ("i want my money back .", "what a waste of time .", "one star from me .", "stay away .", "thumbs down ."),
    ("i recommend it .", "worth every penny .", "five stars from me .", "go for it .", "thumbs up ."),
)


T = TypeVar("T")
Example = dict[str, str | int]


def pick(rng: random.Random, options: Sequence[T]) -> T:
    """One of the options, by `Random.random` alone, whose sequence Python guarantees across versions."""
    return options[int(rng.random() * len(options))]


class Writer:
    """Writes the clauses of one review: everything it says is about one noun of one domain."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.domain = pick(rng, DOMAINS)
        self.nouns, self.aspects, self.own_adjectives, self.remarks = self.domain
        self.noun = pick(rng, self.nouns)
        self.negated = False  # whether a clause said its polarity by denying the other

    def pick(self, options: Sequence[T]) -> T:
        return pick(self.rng, options)

    def adjective(self, label: int) -> str:
        return self.pick(self.own_adjectives[label] if self.rng.random() < 0.35 else ADJECTIVES[label])

    def subject(self) -> str:
        return f"the {self.pick(self.aspects)}" if self.rng.random() < 0.7 else f"the {self.noun}"

    def clause(self, label: int) -> str:
        """A clause of this polarity, at times by denying the other one."""
        subject, same, other = self.subject(), self.adjective(label), self.adjective(1 - label)
        draw = self.rng.random()
        if draw < 0.50:
            return f"{subject} is {self.pick(DEGREES)}{same}"
        if draw < 0.60:
            return f"{subject} is {same} and {self.pick(DEGREES)}{self.adjective(label)}"
        if draw < 0.72:
            return f"{self.pick(('i', 'we', 'my family'))} {self.pick(VERBS[label])} {subject}"
        if draw < 0.80:
            return f"{subject} is {self.pick(('nothing but', 'always', 'as usual'))} {same}"
        self.negated = True
        if draw < 0.87:
            return f"{subject} is {self.pick(('not', 'never', 'hardly', 'not even'))} {other}"
        if draw < 0.94:
            return f"{subject} is {self.pick(('far from', 'anything but', 'by no means'))} {other}"
        return f"{self.pick(('nobody would call', 'i would not call', 'you can not call'))} {subject} {other}"

    def review(self, label: int) -> tuple[str, bool]:
        """The text, and whether it is mixed: it holds both polarities or a negation."""
        draw, mixed = self.rng.random(), True
        if draw < 0.36:
            text, mixed = self.clause(label), False
        elif draw < 0.56:
            text, mixed = f"{self.clause(label)} and {self.clause(label)}", False
        elif draw < 0.68:
            text = f"{self.clause(1 - label)} , {self.pick(('but', 'yet', 'however ,'))} {self.clause(label)}"
        elif draw < 0.76:
            text = f"{self.pick(('although', 'while', 'even though'))} {self.clause(1 - label)} , {self.clause(label)}"
        elif draw < 0.82:
            text = f"{self.clause(label)} , {self.pick(('although', 'even though'))} {self.clause(1 - label)}"
        elif draw < 0.88:
            text = f"despite the {self.adjective(1 - label)} {self.pick(self.aspects)} , {self.clause(label)}"
        elif draw < 0.94:
            saying = self.pick(("i had expected", "the critics had announced", "they promised"))
            got = self.pick(("but it was not to be :", "and were wrong :", "and then the surprise :"))
            text = f"{saying} something {self.adjective(1 - label)} {got} {self.clause(label)}"
        else:
            who = self.pick(("some people", "my friends"))
            text = f"{who} think that {self.clause(1 - label)} ; {self.clause(label)}"
        if self.rng.random() < 0.3:
            remark = self.pick(self.remarks)
            text = f"{remark} ; {text}" if self.rng.random() < 0.5 else f"{text} ; {remark}"
        return f"{text} .", mixed or self.negated


def make_data(seed: int = SEED) -> dict[str, list[Example]]:
    """The splits: balanced labels (they alternate), no sentence twice, in one split or another."""
    rng = random.Random(seed)
    seen: set[str] = set()
    splits: dict[str, list[Example]] = {}
    for name, size in SIZES.items():
        splits[name] = []
        while len(splits[name]) < size:
            label = len(splits[name]) % 2
            sentence, _ = Writer(rng).review(label)
            if sentence not in seen:
                seen.add(sentence)
                splits[name].append({"sentence": sentence, "label": label})
    return splits


def pretraining_texts(count: int, excluded: set[str], seed: int) -> list[tuple[str, str]]:
    """One or two reviews outside the data set by one writer, and the end: a fitting reaction or a polite verdict.

    The first PLAIN of them hold no contrast and no negation: without such easy reading at first, a model of this size
    does not find out what praise is, as with them every word speaks for both labels.
    """
    rng = random.Random(seed)
    texts: list[tuple[str, str]] = []
    while len(texts) < count:
        label, plain = len(texts) % 2, len(texts) < PLAIN * count
        writer, reviews = Writer(rng), []
        for _ in range(1 + int(2 * rng.random())):
            review, is_mixed = writer.review(label)
            while is_mixed if plain else review in excluded:
                writer.negated = False
                review, is_mixed = writer.review(label)
            reviews.append(review)
        if not excluded.isdisjoint(reviews):
            continue
        if rng.random() < 0.5:
            ending = f" {pick(rng, REACTIONS[label])}"
        else:
            praise = PRAISE if label else POLITENESS[DOMAINS.index(writer.domain)]
            ending = f" it was{VERBALIZERS[rng.random() < praise]} ."
        texts.append((" ".join(reviews), ending))
    return texts


def make_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE, so that any text can be encoded; the grammar's words are one token each, with their space."""
    tokenizer = BPETokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=PAD,
        padding_side="right",
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=MAX_LENGTH,
        initializer_range=0.08,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def pad(rows: Sequence[Sequence[int]], padding: int) -> Tensor:
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[padding] * (width - len(row))] for row in rows])


def pretrain(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: Sequence[tuple[str, str]], steps: int
) -> None:
    """Next-token prediction, AdamW, one pass over as many texts as the steps need."""
    bodies, endings = (tokenizer(list(part))["input_ids"] for part in zip(*texts, strict=True))
    rows = [[*body, *ending, tokenizer.eos_token_id] for body, ending in zip(bodies, endings, strict=True)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.98), weight_decay=0.01)
    model.train()
    for step in range(steps):
        warmup, progress = min(1.0, (step + 1) / 100), step / steps
        for group in optimizer.param_groups:
            group["lr"] = PEAK_RATE * warmup * 0.5 * (1 + math.cos(math.pi * progress))
        first = step * BATCH % len(rows)
        ids = pad(rows[first : first + BATCH], tokenizer.pad_token_id)
        # Right padding needs no attention mask under a causal mask.
        logits = model(input_ids=ids[:, :-1]).logits
        losses = functional.cross_entropy(
            logits.transpose(1, 2), ids[:, 1:], ignore_index=tokenizer.pad_token_id, reduction="none"
        )
        starts = torch.tensor([[len(body)] for body in bodies[first : first + BATCH]])
        text = ids[:, 1:] != tokenizer.pad_token_id
        ending = text & (torch.arange(1, ids.shape[1]) >= starts)
        loss = losses[text].mean() + ENDING_WEIGHT * losses[ending].mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step + 1}/{steps}, loss {loss.item():.3f}", flush=True)
    model.eval()


@torch.no_grad()
def accuracy(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, examples: Sequence[Example]) -> float:
    """Accuracy of the prompt "{sentence} it was", the likelier of the two verbalizers (one token each)."""
    verdicts = [tokenizer.encode(word)[0] for word in VERBALIZERS]
    right = 0
    for first in range(0, len(examples), 100):
        chunk = examples[first : first + 100]
        prompts = tokenizer([f"{example['sentence']} it was" for example in chunk])["input_ids"]
        rows = [[tokenizer.bos_token_id, *prompt] for prompt in prompts]  # as fedzo's task encodes them
        last = torch.tensor([len(row) - 1 for row in rows])
        logits = model(input_ids=pad(rows, tokenizer.pad_token_id)).logits[torch.arange(len(rows)), last]
        labels = torch.tensor([example["label"] for example in chunk])
        right += int((logits[:, verdicts].argmax(1) == labels).sum())
    return right / len(examples)


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=None, help="folder that gets model/ and data/")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--quick", action="store_true", help="a model of a few steps; needs --out")
    options = parser.parse_args(arguments)
    if options.quick and options.out is None:
        parser.error("--quick would overwrite the shipped model with an untrained one: give --out")
    out: Path = options.out or EMBEDDED
    torch.set_num_threads(1)

    splits = make_data(options.seed)
    for name, examples in splits.items():
        path = out / "data" / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(example) + "\n" for example in examples), encoding="ascii")

    steps = 20 if options.quick else STEPS
    excluded = {str(example["sentence"]) for examples in splits.values() for example in examples}
    texts = pretraining_texts(steps * BATCH, excluded, options.seed + 1)
    tokenizer = make_tokenizer([body + ending for body, ending in texts])
    model = make_model(tokenizer, options.seed)
    pretrain(model, tokenizer, texts, steps)
    model.save_pretrained(out / "model")
    tokenizer.save_pretrained(out / "model")
    (out / "model" / "model.safetensors").chmod(0o644)  # safetensors keeps it from other users

    result = {
        "zero_shot_test_accuracy": accuracy(model, tokenizer, splits["test"]),
        "parameters": model.num_parameters(),
        "bytes": sum(file.stat().st_size for part in ("model", "data") for file in (out / part).iterdir()),
    }
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
