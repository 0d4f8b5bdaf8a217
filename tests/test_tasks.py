"""Prompts, encoding and batches: on tokenizers built here, and on real ones where they lie beside the repository."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from fedzo.errors import ConfigError, DataError
from fedzo.evaluation.scores import candidate_scores, losses_from_scores
from fedzo.tasks import (
    TASKS,
    EncodedDataset,
    Reading,
    Task,
    accuracy,
    build_task,
    class_f1,
    confusion,
    correct,
    exact_match,
    load_splits,
    macro_f1,
    mean_loss,
    perplexity,
    scored_tokens,
    task_spec,
    token_f1,
)
from fedzo.tasks.encoding import Candidate, Row, causal_rows, masked_rows
from fedzo.tasks.metrics import credited

SHARED = Path(__file__).resolve().parents[2] / "shared"

TEXT = """the film is a warm and funny story of two friends who find each other again it was great
a dull and lifeless plot with no heart it was terrible the acting is good and the story is better
a charming journey and a moving end it was great nobody laughed at the jokes it was terrible"""
REVIEWS = [
    {"sentence": "a warm and funny story", "label": 1},
    {"sentence": "dull", "label": 0},
    {"sentence": "the acting is good and the story is better", "label": 1},
    {"sentence": "no heart", "label": 0},
]


def bpe(bos: bool = True, adds_bos: bool = False, vocabulary: int = 330) -> Any:
    """A byte-level BPE trained on TEXT."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<pad>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TEXT.splitlines(), trainer)
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"} if bos else {}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def characters(*merges: tuple[str, str]) -> Any:
    """A tokenizer of single characters and the given merges, which also cross spaces."""
    letters = "abcdefghijklmnopqrstuvwxyz ."
    vocabulary = {letter: index for index, letter in enumerate(letters)}
    for first, second in merges:
        vocabulary[first + second] = len(vocabulary)
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocabulary, list(merges))))


def words() -> Any:
    """A BERT-like tokenizer of whole words, with [CLS], [SEP], [MASK] and [PAD]."""
    special = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]"]
    known = sorted(set(TEXT.split()) | set(".,:?") | {"very", "bad"})
    vocabulary = {word: index for index, word in enumerate([*special, *known])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        unk_token="[UNK]",
    )


def llama(vocabulary: int) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
    )
    return LlamaForCausalLM(config).eval()


def log_probabilities(model: Any, tokens: list[int]) -> Tensor:
    """[T - 1]: log p of each token but the first, given those before, by one plain forward."""
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0].double()
    return logits.log_softmax(-1)[:-1].gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]


def scored(rows: list[Row], candidate: int) -> list[int]:
    return [token for row in rows for _, token, owner in row.targets if owner == candidate]


# ---- prompts


PAIR = {"premise": "The cat sat on the mat.", "hypothesis": "An animal sat."}
EXAMPLES: dict[str, dict[str, Any]] = {
    "sst2": {"sentence": "a warm film", "label": 1},
    "sst5": {"text": "a warm film", "label": 4, "label_text": "very positive"},
    "trec": {"sentence": "Who wrote it ?", "label": 3},
    "rte": {**PAIR, "label": 0},
    "cb": {**PAIR, "label": 0},
    "snli": {**PAIR, "label": 0},
    "mnli": {**PAIR, "label": 0},
    "boolq": {"passage": "Salt -- Salt is a mineral.", "question": "is salt a mineral", "label": 1},
    "wsc": {"text": "Ann met Eve and She smiled.", "span1_text": "Ann", "span2_text": "She", "label": 0},
    "wic": {"word": "bank", "sentence1": "A river bank.", "sentence2": "The bank is shut.", "label": 0},
    "multirc": {"paragraph": "Tom ate.", "question": "Who ate?", "answer": "Tom", "label": 1},
    "copa": {
        "premise": "It rained.",
        "choice1": "I stayed in.",
        "choice2": "We went out.",
        "question": "effect",
        "label": 0,
    },
    "winogrande": {"sentence": "Sam beat Kim so _ was glad.", "option1": "Sam", "option2": "Kim", "answer": "1"},
    "record": {
        "passage": "Ann met Eve in Rome.\n@highlight\nThey talked",
        "query": "Later @placeholder went home, and @placeholder slept.",
        "entities": ["Ann", "Eve", "Rome"],
        "answers": ["Eve", "Ann"],
    },
    "squad": {
        "title": "Salt",
        "context": "Salt is white.",
        "question": " Which colour? ",
        "answers": {"text": ["white"]},
    },
    "drop": {"passage": "He ran 3 yards.", "question": "How far?", "answers_spans": {"spans": ["3", "3 yards"]}},
}
SUPPOSE = 'Suppose The cat sat on the mat. Can we infer that "An animal sat."? Yes, No, or Maybe?\n'
FOLLOWS = "The cat sat on the mat? {}, an animal sat."
HIGHLIGHT = "Ann met Eve in Rome.\n- They talked\n-"
QUERY = HIGHLIGHT + " Later {0} went home, and {0} slept."
# The whole text with each answer in it, in the order of the classes: causal, masked.
RENDERED: dict[tuple[str, str], tuple[str, tuple[str, ...]]] = {
    ("sst2", "causal"): ("a warm film It was{}", (" terrible", " great")),
    ("sst2", "masked"): ("a warm film It was {}.", ("terrible", "great")),
    ("sst5", "causal"): ("a warm film It was{}", (" terrible", " bad", " okay", " good", " great")),
    ("sst5", "masked"): ("a warm film It was {}.", ("terrible", "bad", "okay", "good", "great")),
    ("trec", "causal"): (
        "Question: Who wrote it ?\nType of answer:{}",
        (" Description", " Entity", " Abbreviation", " Person", " Location", " Number"),
    ),
    ("trec", "masked"): (
        "{}: Who wrote it ?",
        ("Description", "Entity", "Expression", "Human", "Location", "Number"),
    ),
    ("rte", "causal"): (
        'The cat sat on the mat.\nDoes this mean that "An animal sat." is true? Yes or No?\n{}',
        ("Yes", "No"),
    ),
    ("rte", "masked"): (FOLLOWS, ("Yes", "No")),
    ("cb", "causal"): (SUPPOSE + "{}", ("Yes", "No", "Maybe")),
    ("cb", "masked"): (FOLLOWS, ("Yes", "No", "Maybe")),
    ("snli", "causal"): (SUPPOSE + "{}", ("Yes", "Maybe", "No")),
    ("snli", "masked"): (FOLLOWS, ("Yes", "Maybe", "No")),
    ("mnli", "causal"): (SUPPOSE + "{}", ("Yes", "Maybe", "No")),
    ("mnli", "masked"): (FOLLOWS, ("Yes", "Maybe", "No")),
    ("boolq", "causal"): ("Salt -- Salt is a mineral. Is salt a mineral?\n{}", ("No", "Yes")),
    ("boolq", "masked"): ("Salt -- Salt is a mineral. Is salt a mineral? {}.", ("No", "Yes")),
    ("wsc", "causal"): (
        'Ann met Eve and She smiled.\nIn the previous sentence, does the pronoun "she" refer to Ann? Yes or No?\n{}',
        ("No", "Yes"),
    ),
    ("wsc", "masked"): (
        'Ann met Eve and She smiled. In the previous sentence, does the pronoun "she" refer to Ann? {}.',
        ("No", "Yes"),
    ),
    ("wic", "causal"): (
        'Does the word "bank" have the same meaning in these two sentences? Yes, No?\nA river bank.\n'
        "The bank is shut.\n{}",
        ("No", "Yes"),
    ),
    ("wic", "masked"): ('"A river bank." / "The bank is shut." Similar sense of "bank"? {}.', ("No", "Yes")),
    ("multirc", "causal"): (
        'Tom ate.\nQuestion: Who ate?\nI found this answer "Tom". Is that correct? Yes or No?\n{}',
        ("No", "Yes"),
    ),
    ("multirc", "masked"): ('Tom ate. Question: Who ate? Is it "Tom"? {}.', ("No", "Yes")),
    ("copa", "causal"): ("It rained so{}", (" I stayed in.", " we went out.")),
    ("copa", "masked"): ("It rained so {}.", ("I stayed in", "we went out")),
    ("winogrande", "causal"): ("Sam beat Kim so {} was glad.", ("Sam", "Kim")),
    ("winogrande", "masked"): ("Sam beat Kim so {} was glad.", ("Sam", "Kim")),
    ("record", "causal"): (QUERY, ("Ann", "Eve", "Rome")),
    ("record", "masked"): (
        HIGHLIGHT + " Later {} went home, and @placeholder slept.",
        ("Ann", "Eve", "Rome"),
    ),
    ("squad", "causal"): ("Title: Salt\nContext: Salt is white.\nQuestion: Which colour?\nAnswer:{}", (" white\n",)),
    ("drop", "causal"): ("Passage: He ran 3 yards.\nQuestion: How far?\nAnswer:{}", (" 3\n",)),
}


def test_every_published_task_has_an_example_for_every_kind() -> None:
    found = {(name, kind) for name, spec in TASKS.items() for kind in spec.prompts}
    assert found - set(RENDERED) == {("toy-reviews", "causal"), ("toy-reviews", "masked"), ("lm", "causal")}


@pytest.mark.parametrize(("name", "kind"), RENDERED)
def test_the_rendered_prompt(name: str, kind: str) -> None:
    spec, example = task_spec(name, kind), EXAMPLES[name]
    spec.check(example)
    template, answers = RENDERED[name, kind]
    found = spec.candidates(example)
    assert [c.before + c.answer + c.after for c in found] == [template.format(answer) for answer in answers]
    if (name, kind) != ("record", "causal"):
        assert [c.answer for c in found] == list(answers)


@pytest.mark.parametrize("name", [name for name, spec in TASKS.items() if spec.label_texts])
def test_an_encoder_reads_a_text_or_a_pair_and_has_a_text_for_each_class(name: str) -> None:
    spec = task_spec(name, "encoder")
    assert len(spec.label_texts) == len(spec.classes) == len(set(spec.label_texts))
    if name in EXAMPLES:
        texts = spec.texts(EXAMPLES[name])
        assert len(texts) in (1, 2)
        assert all(EXAMPLES[name][column].lower() in "".join(texts).lower() for column in spec.columns)


def test_wsc_and_wic_for_encoders_are_one_text() -> None:
    assert task_spec("wsc", "encoder").texts(EXAMPLES["wsc"]) == (
        'Ann met Eve and She smiled. The pronoun "she" refers to Ann.',
    )
    answers = ("one meaning", "two meanings")
    assert task_spec("wic", "encoder", verbalizers=answers).texts(EXAMPLES["wic"]) == (
        'The word "bank" has the same meaning in: A river bank. / The bank is shut.',
    )


def test_the_first_right_entity_is_trained_and_each_is_correct() -> None:
    spec = task_spec("record", "causal")
    assert spec.label(EXAMPLES["record"]) == 1 and spec.right(EXAMPLES["record"]) == (1, 0)
    right = [(1, 0), (2,), (0, 2), (1,)]
    assert credited(torch.tensor([0, 1, 2, -1]), right).tolist() == [0, 2, 2, 1]
    tokenizer = bpe()
    data = EncodedDataset(build_task("record", "causal", tokenizer, max_length=128), [EXAMPLES["record"]])
    batch = data.batch([0])
    assert batch.targets is not None and batch.targets.num_candidates == 3 and batch.labels.tolist() == [1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"entities": []}, "'entities' must hold a list"),
        ({"answers": []}, "test split has no answers"),
        ({"answers": ["Zoe"]}, "1 answers that are not in column 'entities'"),
        ({"query": "Who?"}, "@placeholder"),
    ],
)
def test_impossible_record_examples_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        task_spec("record", "causal").check({**EXAMPLES["record"], **change})
    assert "Zoe" not in str(error.value)


def test_references_come_as_text_list_or_object() -> None:
    for name, answers in (("squad", "answers"), ("drop", "answers_spans")):
        spec = task_spec(name, "causal")
        assert isinstance(spec, Reading)
        forms = ("a", ["a", "", "a"], {"text": ["a"], "answer_start": [3]}, {"spans": ["a"], "types": ["span"]})
        for form in forms:
            example = {**EXAMPLES[name], answers: form}
            spec.check(example)
            assert spec.references(example) == ("a",)
        for empty in ("", [], {"text": []}, {"other": ["a"]}, 3, None):
            with pytest.raises(DataError, match=f"'{answers}' must hold an answer"):
                spec.check({**EXAMPLES[name], answers: empty})


def test_the_answer_and_its_line_end_are_scored() -> None:
    tokenizer = bpe()
    task = build_task("squad", "causal", tokenizer, max_length=256)
    [[row]] = task.encode([EXAMPLES["squad"]])
    assert tokenizer.decode([token for _, token, _ in row.targets]) == " white\n"
    assert task.num_labels is None
    prompt = RENDERED["squad", "causal"][0].format("")
    [ids] = task.prompts([EXAMPLES["squad"]], 20)
    assert tokenizer.decode(ids) == "<s>" + prompt
    [short] = build_task("squad", "causal", tokenizer, max_length=32).prompts([EXAMPLES["squad"]], 20)
    assert len(short) == 12 and short[0] == 0 and prompt.endswith(tokenizer.decode(short[1:]))
    with pytest.raises(ConfigError, match=r"max_new_tokens is 32 and model.max_length 32"):
        build_task("squad", "causal", tokenizer, max_length=32).prompts([], 32)


# ---- causal


def test_merges_across_the_boundary_are_scored_as_in_running_text() -> None:
    tokenizer = characters(("s", "g"), ("t", "o"))
    [rows] = causal_rows([[Candidate("was", "go"), Candidate("was", "to")]], tokenizer, 32)
    ids = tokenizer.get_vocab()
    # "was" is w a s, but "wasgo" is w a sg o: scoring begins after "wa" for both candidates.
    assert scored(rows, 0) == [ids["sg"], ids["o"]]
    assert scored(rows, 1) == [ids["s"], ids["to"]]
    assert sorted(row.tokens for row in rows) == sorted(
        [[ids["w"], ids["a"], ids["sg"]], [ids["w"], ids["a"], ids["s"]]]
    )


def test_a_new_split_of_the_prompt_that_all_candidates_share_is_not_scored() -> None:
    tokenizer = characters(("s", " "), ("a", "s"))
    ids = tokenizer.get_vocab()
    [rows] = causal_rows([[Candidate("it was", " bad"), Candidate("it was", " good")]], tokenizer, 32)
    assert tokenizer("it was")["input_ids"][-1] == ids["as"]
    assert tokenizer("it was bad")["input_ids"][4:6] == [ids["a"], ids["s "]]
    # The "a" in place of "as" is the same for both: prompt. The scored parts begin with what follows.
    assert scored(rows, 0) == [ids["s "], *tokenizer("bad")["input_ids"]]
    assert scored(rows, 1) == [ids["s "], *tokenizer("good")["input_ids"]]


def test_one_token_candidates_share_one_row() -> None:
    tokenizer = bpe()
    data = EncodedDataset(build_task("toy-reviews", "causal", tokenizer, max_length=64), REVIEWS)
    batch = data.batch(range(4))
    assert batch.inputs["input_ids"].shape[0] == len(batch) == 4
    assert batch.targets is not None and batch.targets.num_candidates == 2
    for row, position, token, candidate in zip(
        batch.targets.rows.tolist(),
        batch.targets.positions.tolist(),
        batch.targets.tokens.tolist(),
        batch.targets.candidates.tolist(),
        strict=True,
    ):
        mask = batch.inputs["attention_mask"][row]
        assert row == candidate // 2 and position == int(mask.sum()) - 1
        context = tokenizer.decode(batch.inputs["input_ids"][row, : position + 1])
        assert context == f"<s>{REVIEWS[row]['sentence']} it was"
        assert tokenizer.decode([token]) == (" terrible", " great")[candidate % 2]
    assert batch.labels.tolist() == [1, 0, 1, 0]


@pytest.mark.parametrize("adds_bos", [False, True])
def test_scores_equal_those_of_plain_forwards(adds_bos: bool) -> None:
    """Shared and padded rows give each candidate the mean log-probability that it has alone."""
    tokenizer = bpe(adds_bos=adds_bos)
    model = llama(len(tokenizer))
    answers = (" great", " terrible", " great and funny", " zebra")  # one token, one, several, several
    task = build_task("custom", "causal", tokenizer, max_length=64, template="{sentence} it was", verbalizers=answers)
    batch = EncodedDataset(task, REVIEWS).batch([2, 1, 0])
    assert batch.inputs["input_ids"].shape[0] == 3 * 2  # " great" and " terrible" are read off the longer rows
    with torch.no_grad():
        scores = candidate_scores(model, batch)
    for place, index in enumerate([2, 1, 0]):
        prompt = tokenizer(REVIEWS[index]["sentence"] + " it was", add_special_tokens=False)["input_ids"]
        for column, answer in enumerate(answers):
            tail = tokenizer(answer, add_special_tokens=False)["input_ids"]  # this tokenizer never merges over spaces
            expected = log_probabilities(model, [0, *prompt, *tail])[-len(tail) :].mean()
            assert scores[place, column].item() == pytest.approx(expected.item(), abs=1e-5)


def test_bos_is_there_once_or_not_at_all() -> None:
    for tokenizer, expected in ((bpe(), [0]), (bpe(adds_bos=True), [0]), (bpe(bos=False), [])):
        task = build_task("toy-reviews", "causal", tokenizer, max_length=64)
        [[row]] = task.encode(REVIEWS[:1])
        body = tokenizer("a warm and funny story it was", add_special_tokens=False)["input_ids"]
        assert row.tokens == expected + body
    assert EncodedDataset(task, REVIEWS).batch([0, 1]).inputs["input_ids"][1, -1] == 0  # no pad, no EOS: 0


def test_truncation_cuts_the_beginning_of_the_prompt() -> None:
    tokenizer = bpe()
    long = {"sentence": "the story of two friends " * 20, "label": 1}
    task = build_task("toy-reviews", "causal", tokenizer, max_length=20)
    [[row]] = task.encode([long])
    whole = tokenizer(long["sentence"] + " it was")["input_ids"]
    assert len(row.tokens) == 20
    assert row.tokens == [0, *whole[-19:]]
    assert [position for position, _, _ in row.targets] == [19, 19]


def test_a_candidate_is_never_cut() -> None:
    tokenizer = bpe()
    answers = (" great", " " + "xyz" * 10)
    arguments = {"template": "{sentence} it was", "verbalizers": answers}
    task = build_task("custom", "causal", tokenizer, max_length=16, **arguments)
    with pytest.raises(DataError, match=r"example 7 .*needs 31 tokens, but max_length is 16") as error:
        task.encode(REVIEWS[:1], 7)
    assert "warm" not in str(error.value)
    task = build_task("custom", "causal", tokenizer, max_length=31, **arguments)
    [rows] = task.encode(REVIEWS[:1])
    assert max(len(row.tokens) for row in rows) == 31
    assert scored(rows, 1) == tokenizer(answers[1])["input_ids"]


def test_a_candidate_without_tokens_is_refused() -> None:
    with pytest.raises(DataError, match="candidate 1 has no tokens"):
        causal_rows([[Candidate("it was", " good"), Candidate("it was", "")]], bpe(), 32)
    with pytest.raises(DataError, match="no BOS token"):
        causal_rows([[Candidate("", "a"), Candidate("", "b")]], bpe(bos=False), 32)


def test_copa_reads_the_examples_own_choices() -> None:
    tokenizer = bpe()
    example = {
        "premise": "The man laughed.",
        "choice1": "The story was funny.",
        "choice2": "It was great.",
        "question": "cause",
        "label": 0,
    }
    [rows] = build_task("copa", "causal", tokenizer, max_length=64).encode([example])
    assert tokenizer.decode(scored(rows, 0)) == " the story was funny."
    assert tokenizer.decode(scored(rows, 1)) == " it was great."
    assert {tokenizer.decode(row.tokens)[:30] for row in rows} == {
        "<s>The man laughed because the",
        "<s>The man laughed because it ",
    }
    [rows] = build_task("copa", "causal", tokenizer, max_length=64).encode([{**example, "question": "effect"}])
    assert all("laughed so " in tokenizer.decode(row.tokens) for row in rows)
    with pytest.raises(DataError, match="cause"):
        TASKS["copa"].check({**example, "question": "why"})


def test_winogrande_scores_the_same_continuation_after_each_option() -> None:
    tokenizer = bpe()
    example = {"sentence": "Sam beat Kim so _ was happy.", "option1": "Sam", "option2": "Kim", "answer": "1"}
    task = build_task("winogrande", "causal", tokenizer, max_length=64)
    [rows] = task.encode([example])
    assert scored(rows, 0) == scored(rows, 1)
    assert tokenizer.decode(scored(rows, 0)) == " was happy."
    assert sorted(tokenizer.decode(row.tokens) for row in rows) == [
        "<s>Sam beat Kim so Kim was happy",
        "<s>Sam beat Kim so Sam was happy",
    ]
    assert task.spec.label(example) == 0
    with pytest.raises(DataError, match="one blank '_', but has 2"):
        task.spec.check({**example, "sentence": "_ and _"})


# ---- masked


def test_a_candidate_of_n_tokens_is_read_at_n_masks() -> None:
    tokenizer = words()
    ids = tokenizer.get_vocab()
    group = [Candidate("the film it was ", answer, ".") for answer in ("good", "bad", "very good")]
    [rows] = masked_rows([group], tokenizer, 32)
    assert [tokenizer.decode(row.tokens) for row in rows] == [
        "[CLS] the film it was [MASK] . [SEP]",
        "[CLS] the film it was [MASK] [MASK] . [SEP]",
    ]
    assert rows[0].targets == [(5, ids["good"], 0), (5, ids["bad"], 1)]
    assert rows[1].targets == [(5, ids["very"], 2), (6, ids["good"], 2)]


def test_masked_truncation_keeps_masks_and_drops_the_beginning_then_the_end() -> None:
    tokenizer = words()
    ids = tokenizer.get_vocab()
    before = [Candidate("story " * 30 + "it was ", answer, ".") for answer in ("good", "bad")]
    [[row]] = masked_rows([before], tokenizer, 8)
    assert tokenizer.decode(row.tokens) == "[CLS] story story it was [MASK] . [SEP]"
    assert row.targets == [(5, ids["good"], 0), (5, ids["bad"], 1)]
    after = [Candidate("", answer, ": " + "story " * 30) for answer in ("good", "very good")]
    one, two = masked_rows([after], tokenizer, 8)[0]
    assert tokenizer.decode(one.tokens) == "[CLS] [MASK] : story story story story [SEP]"
    assert tokenizer.decode(two.tokens) == "[CLS] [MASK] [MASK] : story story story [SEP]"
    with pytest.raises(DataError, match="max_length is 3"):
        masked_rows([[Candidate("it ", "very good", ".")]], tokenizer, 3)


def test_a_mask_in_the_examples_own_text_is_not_the_answers() -> None:
    [[row]] = masked_rows([[Candidate("the [MASK] story it was ", "good", ".")]], words(), 32)
    assert [position for position, _, _ in row.targets] == [6]


def test_masked_scores_equal_those_of_plain_forwards() -> None:
    tokenizer = words()
    torch.manual_seed(0)
    model = BertForMaskedLM(
        BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            max_position_embeddings=64,
        )
    ).eval()
    task = build_task(
        "custom",
        "masked",
        tokenizer,
        max_length=32,
        template="{sentence} it was {mask} .",
        verbalizers=("very good", "bad"),
    )
    with torch.no_grad():
        scores = candidate_scores(model, EncodedDataset(task, REVIEWS).batch([1, 2]))
        for place, index in enumerate([1, 2]):
            for column, answer in enumerate(("very good", "bad")):
                wanted = tokenizer(answer, add_special_tokens=False)["input_ids"]
                text = f"{REVIEWS[index]['sentence']} it was {'[MASK] ' * len(wanted)}."
                tokens = tokenizer(text, return_tensors="pt")["input_ids"]
                log = model(tokens).logits[0].log_softmax(-1)[tokens[0] == tokenizer.mask_token_id]
                expected = log[range(len(wanted)), wanted].mean()
                assert scores[place, column].item() == pytest.approx(expected.item(), abs=1e-5)


# ---- encoder


def test_encoder_reads_texts_and_pairs() -> None:
    tokenizer = words()
    task = build_task("sst2", "encoder", tokenizer, max_length=6)
    assert task.label_texts == ("It was terrible.", "It was great.")
    batch = EncodedDataset(task, REVIEWS).batch([2, 1])
    assert batch.targets is None
    assert [tokenizer.decode(row) for row in batch.inputs["input_ids"]] == [
        "[CLS] the acting is good [SEP]",
        "[CLS] dull [SEP] [PAD] [PAD] [PAD]",
    ]
    assert batch.inputs["attention_mask"].tolist() == [[1] * 6, [1, 1, 1, 0, 0, 0]]
    pair = {"premise": "the film is funny", "hypothesis": "it was good", "label": "not_entailment"}
    task = build_task("rte", "encoder", tokenizer, max_length=32)
    batch = EncodedDataset(task, [pair]).batch([0])
    assert tokenizer.decode(batch.inputs["input_ids"][0]) == "[CLS] the film is funny [SEP] it was good [SEP]"
    assert batch.labels.tolist() == [1]


def test_features_replace_the_tokens() -> None:
    data = EncodedDataset(build_task("sst2", "encoder", words(), max_length=16), REVIEWS)
    features = torch.arange(12.0).reshape(4, 3)
    batch = data.with_features(features).batch([3, 0, 3])
    assert list(batch.inputs) == ["features"]
    assert torch.equal(batch.inputs["features"], features[[3, 0, 3]])
    assert batch.labels.tolist() == [0, 1, 0] and batch.targets is None
    assert "input_ids" in data.batch([0]).inputs
    with pytest.raises(ValueError, match=r"\[4, d\]"):
        data.with_features(features[:3])


# ---- language modelling


def documents() -> list[dict[str, Any]]:
    lines = TEXT.splitlines()
    return [{"text": lines[0], "role": "a"}, {"text": "dull", "role": "a"}, {"text": lines[1], "role": "b"}]


def test_documents_become_blocks() -> None:
    tokenizer = bpe()
    task = build_task("lm", "causal", tokenizer, max_length=8)
    blocks = task.prepare(documents())
    stream = [t for d in documents() for t in [*tokenizer(d["text"])["input_ids"], tokenizer.eos_token_id]]
    assert [token for block in blocks for token in block["tokens"]] == stream
    assert all(len(block["tokens"]) == 8 for block in blocks[:-1])
    assert task.prepare(blocks) == blocks
    data = EncodedDataset(task, documents())
    assert len(data) == len(blocks) and data.labels.tolist() == [0] * len(blocks)
    batch = data.batch([1])
    assert batch.inputs["input_ids"].tolist() == [[0, *stream[8:15]]]  # BOS, and the last token is only predicted
    assert batch.targets is not None and batch.targets.tokens.tolist() == stream[8:16]
    assert batch.targets.num_candidates == 1


def test_no_block_mixes_clients() -> None:
    task = build_task("lm", "causal", bpe(), max_length=8)
    blocks = task.prepare(documents(), "role")
    for role in "ab":
        alone = task.prepare([d for d in documents() if d["role"] == role])
        assert [b["tokens"] for b in blocks if b["role"] == role] == [b["tokens"] for b in alone]
    with pytest.raises(DataError, match="'speaker' is missing"):
        task.prepare(documents(), "speaker")


@pytest.mark.parametrize("bos", [True, False])
def test_language_modelling_loss_is_the_mean_over_a_blocks_tokens(bos: bool) -> None:
    tokenizer = bpe(bos=bos)
    model = llama(len(tokenizer))
    task = build_task("lm", "causal", tokenizer, max_length=8)
    data = EncodedDataset(task, documents())
    batch = data.batch(range(len(data)))
    with torch.no_grad():
        losses = losses_from_scores(candidate_scores(model, batch), batch.labels)
    sums = []
    for loss, block in zip(losses, task.prepare(documents()), strict=True):
        logs = log_probabilities(model, [0, *block["tokens"]] if bos else block["tokens"])
        assert loss.item() == pytest.approx(-logs.mean().item(), abs=1e-5)
        sums.append(logs)
    tokens = scored_tokens(batch)[:, 0]
    assert tokens.tolist() == [len(logs) for logs in sums]
    everything = -torch.cat(sums).mean()
    assert perplexity(losses, tokens) == pytest.approx(everything.exp().item(), rel=1e-5)
    assert mean_loss(losses) == pytest.approx(losses.mean().item(), rel=1e-6)


# ---- batches


def test_batches_are_the_rows_right_padded() -> None:
    tokenizer = bpe()
    task = build_task(
        "custom",
        "causal",
        tokenizer,
        max_length=32,
        template="{sentence} it",
        verbalizers=(" was zebra", " is", " was"),
    )
    data = EncodedDataset(task, REVIEWS)
    encoded = task.encode(REVIEWS)
    generator = np.random.default_rng(0)
    for _ in range(20):
        chosen = generator.integers(0, len(REVIEWS), generator.integers(1, 6))
        batch = data.batch(chosen)
        rows = [(place, row) for place, index in enumerate(chosen) for row in encoded[index]]
        width = max(len(row.tokens) for _, row in rows)
        pad = tokenizer.pad_token_id
        assert batch.inputs["input_ids"].tolist() == [r.tokens + [pad] * (width - len(r.tokens)) for _, r in rows]
        assert batch.inputs["attention_mask"].sum(1).tolist() == [len(row.tokens) for _, row in rows]
        targets = batch.targets
        assert targets is not None
        found = torch.stack((targets.rows, targets.positions, targets.tokens, targets.candidates), 1).tolist()
        assert found == [[n, p, t, 3 * place + c] for n, (place, row) in enumerate(rows) for p, t, c in row.targets]
    with pytest.raises(ValueError, match="at least one"):
        data.batch([])
    with pytest.raises(IndexError):
        data.batch([len(REVIEWS)])


# ---- specifications


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("sst2", {0: 0, "1": 1, "Positive": 1, 1.0: 1}),
        ("rte", {"entailment": 0, "not_entailment": 1, 1: 1}),
        ("boolq", {True: 1, False: 0, "true": 1, "No": 0, "1": 1}),
        ("winogrande", {"1": 0, "2": 1, 2: 1}),
        ("trec", {5: 5, "NUM": 5, "abbr": 2}),
        ("sst5", {0: 0, 4: 4, "very positive": 4, "neutral": 2}),
        ("cb", {0: 0, "contradiction": 1, "neutral": 2}),
        ("snli", {"entailment": 0, 1: 1, "contradiction": 2}),
        ("mnli", {0: 0, "neutral": 1, 2: 2}),
        ("wsc", {True: 1, "false": 0}),
        ("wic", {"True": 1, 0: 0}),
        ("multirc", {1: 1, False: 0}),
    ],
)
def test_labels_come_as_numbers_or_words(name: str, values: dict[Any, int]) -> None:
    spec = TASKS[name]
    for value, index in values.items():
        assert spec.label({spec.label_column: value}) == index


def test_an_unknown_label_is_named_without_data() -> None:
    with pytest.raises(DataError, match=r"unknown label \(-1\).*0/negative, 1/positive"):
        TASKS["sst2"].label({"label": -1})
    with pytest.raises(DataError, match="a value of type str") as error:
        TASKS["sst2"].label({"label": "a private remark"})
    assert "private" not in str(error.value)


def test_overrides_and_custom_tasks() -> None:
    spec = task_spec("sst2", "causal", template="Review: {text}\nVerdict:", verbalizers=(" bad", " good"))
    assert spec.columns == ("text",)
    assert spec.candidates({"text": "fine"}) == [
        Candidate("Review: fine\nVerdict:", " bad"),
        Candidate("Review: fine\nVerdict:", " good"),
    ]
    custom = task_spec("custom", "masked", template="{a} {{x}} {mask} {b}", verbalizers=("Low", "Mid", "High"))
    assert custom.columns == ("a", "b")
    assert custom.candidates({"a": "1", "b": "2"})[2] == Candidate("1 {x} ", "High", " 2")
    assert [custom.label({"label": value}) for value in (0, "2", "mid")] == [0, 2, 1]
    encoder = task_spec("custom", "encoder", template="{a} / {b}", verbalizers=("one", "two"))
    assert encoder.texts({"a": "x", "b": "y"}) == ("x / y",) and encoder.label_texts == ("one", "two")
    assert task_spec("sst2", "causal", verbalizers=(" bad", " good")).prompts["causal"].template == "{sentence} It was"


@pytest.mark.parametrize(
    ("name", "kind", "arguments", "message"),
    [
        ("sst3", "causal", {}, "Did you mean 'sst[25]'"),
        ("sst2", "decoder", {}, "causal, masked, encoder"),
        ("copa", "encoder", {}, "causal or masked"),
        ("lm", "masked", {}, "kind causal"),
        ("copa", "causal", {"template": "{premise}"}, "nothing|no template"),
        ("sst2", "causal", {"template": "{sentence"}, "template"),
        ("sst2", "causal", {"template": "{sentence.x} It was"}, "plain column name"),
        ("sst2", "causal", {"template": "It was"}, "names no column"),
        ("sst2", "masked", {"template": "{sentence} It was"}, "no {mask}"),
        ("sst2", "causal", {"verbalizers": (" bad", " fine", " good")}, "2 classes, but 3"),
        ("sst2", "causal", {"verbalizers": (" bad", " bad")}, "different"),
        ("custom", "causal", {}, "needs a template"),
        ("squad", "masked", {}, "kind causal"),
        ("record", "encoder", {}, "causal or masked"),
        ("squad", "causal", {"verbalizers": ("a", "b")}, "0 classes, but 2"),
    ],
)
def test_impossible_tasks_are_refused(name: str, kind: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        task_spec(name, kind, **arguments)


def test_impossible_lengths_and_missing_mask_are_refused() -> None:
    tokenizer = bpe()
    tokenizer.model_max_length = 512
    for length in (1, 513):
        with pytest.raises(ConfigError, match="from 2 to 512"):
            build_task("sst2", "causal", tokenizer, max_length=length)
    with pytest.raises(ConfigError, match="no mask token"):
        build_task("sst2", "masked", tokenizer, max_length=64)


# ---- metrics


def test_metrics() -> None:
    scores = torch.tensor(
        [[2.0, 1.0, 0.0], [0.0, 1.0, 0.0], [3.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.0, float("nan"), 9.0]]
    )
    labels = torch.tensor([0, 1, 1, 0, 2])
    assert correct(scores, labels) == 2 and accuracy(scores, labels) == 0.4  # NaN is never right
    assert confusion(scores, labels).tolist() == [[1, 0, 1], [1, 1, 0], [0, 0, 0]]
    # Class 0: TP 1, predicted 2, actual 2. Class 1: TP 1, predicted 1, actual 2. Class 2: TP 0.
    assert class_f1(scores, labels) == pytest.approx([0.5, 2 / 3, 0.0])
    assert macro_f1(scores, labels) == pytest.approx((0.5 + 2 / 3) / 3)
    assert perplexity(torch.tensor([1.0, 3.0]), torch.tensor([3, 1])) == pytest.approx(np.exp(1.5))
    assert perplexity(torch.tensor([1e4]), torch.tensor([3])) == float("inf")
    assert np.isnan(accuracy(scores[:0], labels[:0]))


@pytest.mark.parametrize(
    ("answer", "references", "exact", "f1"),
    [
        ("The  Eiffel Tower.", ["eiffel tower"], 1.0, 1.0),
        ("an apple, a pear", ["Apple pear"], 1.0, 1.0),
        ("U.S.", ["US"], 1.0, 1.0),
        ("theatre", ["atre"], 0.0, 0.0),  # articles are whole words
        ("in Paris", ["Rome", "Paris"], 0.0, 2 / 3),  # the best over the references
        ("red red blue", ["red blue blue"], 0.0, 2 / 3),  # words count as often as they occur
        ("", ["white"], 0.0, 0.0),
        ("the", ["a"], 1.0, 1.0),
    ],
)
def test_exact_match_and_f1_are_squads(answer: str, references: list[str], exact: float, f1: float) -> None:
    assert exact_match(answer, references) == exact
    assert token_f1(answer, references) == pytest.approx(f1)


# ---- real tokenizers, data and a real model

REAL = [("sst2", "dev"), ("trec", "test"), ("rte", "val"), ("copa", "val"), ("boolq", "val"), ("winogrande", "dev")]


def real_task(name: str, kind: str, model: str, max_length: int = 96, **arguments: Any) -> Task:
    path = SHARED / "models" / model
    if not path.is_dir():
        pytest.skip(f"{path} is not there: real models are not part of the repository")
    return build_task(name, kind, AutoTokenizer.from_pretrained(path), max_length=max_length, **arguments)


def real_examples(task: Task, name: str, split: str) -> list[dict[str, Any]]:
    if not (SHARED / "data" / name).is_dir():
        pytest.skip(f"{SHARED / 'data' / name} is not there: real data are not part of the repository")
    file = next((SHARED / "data" / name).glob(f"{split}*.jsonl"))
    splits = load_splits(str(file), task.spec, test="")
    return splits.train + splits.validation


@pytest.mark.parametrize("model", ["reviews-6m", "tinystories-656k"])
@pytest.mark.parametrize(("name", "split"), REAL)
def test_real_causal_encoding_reads_back(name: str, split: str, model: str) -> None:
    """Row and scored tokens together are the tokens of prompt plus candidate, whatever the example."""
    task = real_task(name, "causal", model)
    tokenizer = task.tokenizer
    examples = real_examples(task, name, split)[:60]
    for example, rows in zip(examples, task.encode(examples), strict=True):
        for number, candidate in enumerate(task.spec.candidates(example)):
            text = candidate.before + candidate.answer + candidate.after
            whole = tokenizer(text, add_special_tokens=False)["input_ids"]
            row = next(row for row in rows if any(owner == number for _, _, owner in row.targets))
            targets = [(position, token) for position, token, owner in row.targets if owner == number]
            tail = [token for _, token in targets]
            assert tail == whole[-len(tail) :]
            assert [position for position, _ in targets] == list(range(targets[0][0], targets[-1][0] + 1))
            context = row.tokens[: targets[0][0] + 1]
            assert context[0] == tokenizer.bos_token_id and len(row.tokens) <= 96
            assert context[1:] == whole[: -len(tail)][-(len(context) - 1) :]


@pytest.mark.parametrize("kind", ["masked", "encoder"])
@pytest.mark.parametrize(("name", "split"), REAL)
def test_real_masked_and_encoder_encoding(name: str, split: str, kind: str) -> None:
    if kind not in TASKS[name].kinds():
        pytest.skip(f"{name} has no {kind} form")
    task = real_task(name, kind, "minilm-l6")
    data = EncodedDataset(task, real_examples(task, name, split)[:60])
    batch = data.batch(range(len(data)))
    ids = batch.inputs["input_ids"]
    assert ids.shape[1] <= 96 and bool((ids[:, 0] == task.tokenizer.cls_token_id).all())
    if kind == "masked":
        assert batch.targets is not None
        assert bool((ids[batch.targets.rows, batch.targets.positions] == task.tokenizer.mask_token_id).all())
    else:
        assert batch.targets is None and len(ids) == len(batch)


@pytest.mark.slow
def test_reviews_6m_zero_shot_on_sst2_is_75_percent() -> None:
    answers = (" terrible", " great")
    task = real_task("sst2", "causal", "reviews-6m", 256, template="{sentence} it was", verbalizers=answers)
    examples = sorted(real_examples(task, "sst2", "dev"), key=lambda example: len(example["sentence"]))
    data = EncodedDataset(task, examples)
    model = AutoModelForCausalLM.from_pretrained(SHARED / "models" / "reviews-6m").eval()
    with torch.no_grad():
        parts = [candidate_scores(model, data.batch(range(i, min(i + 64, len(data))))) for i in range(0, len(data), 64)]
    assert accuracy(torch.cat(parts), torch.from_numpy(data.labels)) == 654 / 872
