"""The command line on the embedded model: what each command gives, and one message for each mistake."""

import json
import os
import shutil
import signal
import sqlite3
import struct
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from small_runs import Answer, config, fedzo, make_data, options, settings

from fedzo import __version__, spaces
from fedzo.config import Config, flatten, load_config
from fedzo.embedded import MODEL
from fedzo.experiment import Experiment
from fedzo.federation.ledger import Ledger
from fedzo.run_folder import RunFolder

PROGRAM = [sys.executable, "-c", "from fedzo.cli import main; main()"]
# The process may write no file beyond a number of bytes: to its writers the disk is full.
SMALL_DISK = """
import resource, sys
limit = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
from fedzo.cli import main
main()
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of three rounds; tests that change it take `copy`."""
    path = tmp_path_factory.mktemp("finished") / "run"
    answer = fedzo("run", *options(data), "--out", path, "--json")
    assert answer.code == 0, answer.err
    return path


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copy"))


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("COLUMNS", "80")
    yield


def fails(answer: Answer, *parts: str, code: int = 1) -> None:
    """Asserts one message on stderr that has these parts, nothing on stdout, no traceback."""
    assert answer.code == code, answer
    assert answer.out == ""
    lines = answer.err.strip().splitlines()
    assert len(lines) == 1, answer.err
    assert lines[0].startswith("error: ")
    for part in parts:
        assert part in lines[0]


def head(path: Path) -> str:
    with Ledger(path / "ledger.sqlite") as ledger:
        return ledger.head.hex()


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


# What the commands give.


def test_json_is_one_line_and_nothing_else(data: Path, finished: Path, tmp_path: Path) -> None:
    answer = fedzo("run", *options(data), "--out", tmp_path / "run", "--json")
    assert (answer.code, answer.err) == (0, "")
    assert answer.out.count("\n") == 1
    figures = json.loads(answer.out)
    assert figures["ledger_hash"] == head(tmp_path / "run") == head(finished)
    assert figures["rounds"] == figures["rounds_planned"] == 3
    assert 0 <= figures["test_accuracy"] <= 1
    assert figures["records"] == 6
    assert figures["bytes_up_per_client"] < 1000 < figures["model_up_per_client"] / 1000


def test_a_run_folder_holds_what_it_should(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert {"config.toml", "ledger.sqlite", "metrics.jsonl", "tensorboard", "loss.png", "accuracy.png"} <= names
    assert "bytes.png" in names
    assert load_config(finished / "config.toml").federation.rounds == 3
    events = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [event["round"] for event in events if event["event"] == "round"] == [0, 1, 2]


def test_quiet_prints_the_result_only_and_nothing_is_cut(copy: Path) -> None:
    answer = fedzo("resume", copy, "--quiet")
    assert (answer.code, answer.err) == (0, "")
    shown = dict(line.split("  ", 1) for line in answer.out.splitlines())
    assert shown["ledger hash"].strip() == head(copy)
    assert shown["dropped"].strip() == "none"
    assert shown["test accuracy"].strip().endswith("%")


def test_progress_and_result_at_80_columns(data: Path, tmp_path: Path) -> None:
    answer = fedzo("run", *options(data), "--out", tmp_path / "run")
    assert answer.code == 0
    assert "after 0 rounds: validation accuracy" in answer.err
    assert "after 3 rounds: test accuracy" in answer.err
    assert "round 3/3" in answer.err
    assert " scalars " in answer.err
    assert "sent by a client" in answer.err
    assert "…" not in answer.err + answer.out
    assert "warning" not in answer.err
    assert head(tmp_path / "run") in answer.out


def test_resuming_a_finished_run_changes_nothing(copy: Path) -> None:
    before, figures = head(copy), fedzo("inspect", copy, "--json").out
    answer = fedzo("resume", copy, "--json")
    assert (answer.code, json.loads(answer.out)["ledger_hash"]) == (0, before)
    assert head(copy) == before
    assert fedzo("inspect", copy, "--json").out == figures


def test_replayed_directory_is_the_model(finished: Path, data: Path, tmp_path: Path) -> None:
    """`from_pretrained` loads it, and as a base model it starts with the run's accuracy."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    answer = fedzo("replay", finished, "--out", tmp_path / "deep" / "model", "--json")
    assert (answer.code, answer.err) == (0, "")
    figures, ran = json.loads(answer.out), json.loads(fedzo("inspect", finished, "--json").out)
    assert figures["theta_digest"] == ran["theta_digest"]
    AutoTokenizer.from_pretrained(tmp_path / "deep" / "model")
    assert sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(figures["model"]).parameters()) == 530_688
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["model"]
    experiment = Experiment(config(data, model__source=figures["model"]))
    assert experiment.theta0_digest == ran["theta_digest"]
    assert experiment.test is not None
    metrics = experiment.evaluate(experiment.theta0(), experiment.test)
    assert (metrics["accuracy"], metrics["loss"]) == (ran["test_accuracy"], ran["test_loss"])


def test_replayed_adapter_is_loaded_by_peft(data: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    lora = options(data, space__kind="adapter", space__rank=2, evaluation__every=0, data__test="")
    assert fedzo("run", *lora, "--out", tmp_path / "run", "-q").code == 0
    answer = fedzo("replay", tmp_path / "run", "--out", tmp_path / "model", "--json")
    assert (answer.code, answer.err) == (0, "")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(MODEL), tmp_path / "model")
    experiment = Experiment(load_config(tmp_path / "run" / "config.toml"))
    with Ledger(tmp_path / "run" / "ledger.sqlite") as ledger:
        from fedzo.federation.coordinator import replay

        replica = experiment.replica(ledger.spec)
        replay(ledger, replica)
    experiment.space.write(experiment.loaded.model, replica.theta)
    wanted = {name.replace(".default", ""): tensor for name, tensor in experiment.loaded.model.named_parameters()}
    loaded = {name.replace(".default", ""): tensor for name, tensor in model.named_parameters() if "lora" in name}
    assert loaded
    assert all(tensor.equal(wanted[name]) for name, tensor in loaded.items())


def test_evaluate_repeats_the_recorded_metrics(finished: Path) -> None:
    ran = json.loads(fedzo("inspect", finished, "--json").out)
    answer = fedzo("evaluate", finished, "--json")
    assert (answer.code, answer.err) == (0, "")
    figures = json.loads(answer.out)
    assert figures["accuracy"] == ran["test_accuracy"]
    assert figures["theta_digest"] == ran["theta_digest"]
    start = json.loads(fedzo("evaluate", finished, "--round", "0", "--json").out)
    assert (start["rounds"], start["accuracy"]) == (0, ran["test_accuracy_before"])
    best = json.loads(fedzo("evaluate", finished, "--round", "best", "--split", "validation", "--json").out)
    assert best["rounds"] == ran["best_round"]
    assert best["accuracy"] >= ran["validation_accuracy"]


def test_inspect(finished: Path) -> None:
    figures = json.loads(fedzo("inspect", finished, "--json").out)
    assert figures["config"] == flatten(load_config(finished / "config.toml"))
    answer = fedzo("inspect", finished / "ledger.sqlite")
    assert answer.code == 0
    assert figures["ledger_hash"] in answer.out
    assert "federation.rounds = 3" in answer.out


def test_verify(finished: Path) -> None:
    answer = fedzo("verify", finished, "--json")
    wanted = {"rounds_verified": 3, "digests_compared": 3, "ledger_hash": head(finished), "complete": True}
    assert (answer.code, json.loads(answer.out)) == (0, wanted)
    chain = json.loads(fedzo("verify", finished, "--chain-only", "--json").out)
    assert chain == {**wanted, "digests_compared": 0}
    assert "complete          yes" in fedzo("verify", finished, "--chain-only").out


def test_plot(copy: Path) -> None:
    for path in copy.glob("*.png"):
        path.unlink()
    answer = fedzo("plot", copy)
    assert (answer.code, answer.err) == (0, "")
    paths = [Path(line) for line in answer.out.splitlines()]
    assert {path.name for path in paths} == {"loss.png", "accuracy.png", "macro_f1.png", "bytes.png"}
    for path in paths:
        content = path.read_bytes()
        assert content[:8] == b"\x89PNG\r\n\x1a\n"
        assert content[-8:-4] == b"IEND"
        assert min(struct.unpack(">II", content[16:24])) >= 400


def test_config_prints_the_defaults(tmp_path: Path) -> None:
    answer = fedzo("config")
    assert tomllib.loads(answer.out)["federation"]["rounds"] == Config().federation.rounds
    (tmp_path / "fedzo.toml").write_text(answer.out, encoding="utf-8")
    assert load_config(tmp_path / "fedzo.toml") == Config()


def test_version_and_help() -> None:
    assert fedzo("--version").out == f"fedzo {__version__}\n"
    for command in ("run", "resume", "replay", "evaluate", "inspect", "verify", "plot", "config"):
        answer = fedzo(command, "--help")
        assert answer.code == 0
        assert "Usage" in answer.out


def test_overlap_of_the_splits_is_a_warning(data: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(data, tmp_path / "data"))
    with (folder / "train.jsonl").open("a", encoding="utf-8") as train:
        train.write((folder / "test.jsonl").read_text(encoding="utf-8").splitlines()[0] + "\n")
    chosen = options(folder, federation__rounds=1, evaluation__every=0)
    answer = fedzo("run", *chosen, "--out", tmp_path / "run")
    assert "warning: 1 training examples are also in the test data" in answer.err
    assert fedzo("run", *chosen, "--out", tmp_path / "quiet", "-q").err == ""


# Mistakes in the configuration, the data and the model: no folder is made.


@pytest.mark.parametrize(
    ("key", "parts"),
    [
        ("method.epss=1", ["unknown key 'method.epss'", "method.eps"]),
        ("federation.round=1", ["unknown key 'federation.round'", "federation.rounds"]),
        ("method.eps=-1", ["method.eps", "greater than 0", "-1"]),
        ("federation.rounds=many", ["federation.rounds", "many"]),
        ("method.optimizer=sdg", ["method.optimizer", "sgd"]),
        ("federation.aggregation=medium", ["federation.aggregation", "median"]),
        ("federation.quorum=50", ["federation.quorum is 50"]),
        ("space.kind=half", ["space.kind", "half", "sparse"]),
        ("runtime.device=tpu", ["runtime.device", "tpu", "cpu"]),
        ("task.name=toyreviews", ["unknown task 'toyreviews'", "toy-reviews"]),
        ("rounds", ["no '='"]),
    ],
)
def test_wrong_keys_and_values(key: str, parts: list[str], data: Path, tmp_path: Path) -> None:
    answer = fedzo("run", *options(data), "-o", key, "--out", tmp_path / "run")
    fails(answer, *parts, code=2)
    assert not (tmp_path / "run").exists()


def test_wrong_config_files(data: Path, tmp_path: Path) -> None:
    (tmp_path / "right.toml").write_text("seed = 1\n")
    fails(fedzo("run", "-c", tmp_path / "wrong.toml"), "no configuration file", "right.toml", code=2)
    (tmp_path / "bad.toml").write_text("[method\neps = 1\n")
    fails(fedzo("run", "-c", tmp_path / "bad.toml"), "bad.toml", "TOML", "line 1", code=2)
    (tmp_path / "key.toml").write_text("[method]\nlearning-rate = 1\n")
    fails(fedzo("run", "-c", tmp_path / "key.toml"), "key.toml", "method.learning_rate", code=2)


def no_file(folder: Path) -> None:
    (folder / "train.jsonl").rename(folder / "training.jsonl")


def no_column(folder: Path) -> None:
    edit(folder / "train.jsonl", '"sentence"', '"text"')


def unknown_label(folder: Path) -> None:
    edit(folder / "train.jsonl", '"label": 1', '"label": 7')


def no_json(folder: Path) -> None:
    edit(folder / "test.jsonl", '"label": 1}', '"label": 1')


def empty(folder: Path) -> None:
    (folder / "train.jsonl").write_text("")


@pytest.mark.parametrize(
    ("spoil", "parts"),
    [
        (no_file, ["no data file 'train'", "training.jsonl"]),
        (no_column, ["train.jsonl, line 1", "column 'sentence' is missing", "columns found: text, label"]),
        (unknown_label, ["train.jsonl, line ", "unknown label (7)"]),
        (no_json, ["test.jsonl, line ", "not JSON"]),
        (empty, ["train.jsonl", "no examples"]),
    ],
)
def test_wrong_data(spoil: Callable[[Path], None], parts: list[str], data: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(data, tmp_path / "data"))
    spoil(folder)
    fails(fedzo("run", *options(folder), "--out", tmp_path / "run"), *parts)
    assert not (tmp_path / "run").exists()


def test_wrong_partition(data: Path, tmp_path: Path) -> None:
    answer = fedzo("run", *options(data, data__partition="natural"), "--out", tmp_path / "run")
    fails(answer, 'partition "natural"', "set data.column", code=2)
    assert not (tmp_path / "run").exists()


def test_wrong_csv(tmp_path: Path) -> None:
    for name in ("train", "validation", "test"):
        (tmp_path / f"{name}.csv").write_text(f"sentence,label\n{name} was fine .,1\n{name} was bad .,maybe\n")
    fails(fedzo("run", *options(tmp_path)), "train.csv, line 3", "unknown label")
    fails(fedzo("run", *options(tmp_path / "none")), "no directory or file", "train.csv")


def test_wrong_models(data: Path, tmp_path: Path) -> None:
    out = ["--out", tmp_path / "run"]
    bare = Path(shutil.copytree(MODEL, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors")))
    fails(fedzo("run", *options(data, model__source=str(bare)), *out), "bare", "weights")
    broken = Path(shutil.copytree(MODEL, tmp_path / "broken"))
    weights = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    fails(fedzo("run", *options(data, model__source=str(broken)), *out), "broken")
    fails(fedzo("run", *options(data, model__source=str(tmp_path / "none")), *out), "none")
    assert not (tmp_path / "run").exists()


def test_mask_for_another_model(data: Path, tmp_path: Path) -> None:
    experiment = Experiment(config(data, space__kind="sparse"))
    mask = tmp_path / "mask.safetensors"
    spaces.draw_mask(experiment.loaded.model, 0.01, "random", "0" * 64).save(mask)
    chosen = options(data, space__kind="sparse", space__mask=str(mask))
    fails(fedzo("run", *chosen, "--out", tmp_path / "run"), "another model", "make a new mask")
    mask.write_bytes(b"no mask")
    fails(fedzo("run", *chosen, "--out", tmp_path / "run"), "mask.safetensors")
    assert not (tmp_path / "run").exists()


# Mistakes with a run that there is: its rounds stay as they are.


def test_a_run_is_not_overwritten(finished: Path, data: Path) -> None:
    before = (finished / "ledger.sqlite").read_bytes()
    for engine in ("local", "flower"):
        answer = fedzo("run", *options(data), "--out", finished, "--engine", engine)
        fails(answer, "already holds a run", "fedzo resume")
    assert (finished / "ledger.sqlite").read_bytes() == before


def test_output_directories_that_exist(finished: Path, data: Path, tmp_path: Path) -> None:
    fails(fedzo("replay", finished, "--out", tmp_path), "exists", code=2)
    (tmp_path / "file").write_text("")
    fails(fedzo("run", *options(data), "--out", tmp_path / "file"), "is a file")
    fails(fedzo("run", *options(data), "--out", tmp_path / "file" / "run"), "cannot write the run folder")
    (tmp_path / "empty").mkdir()
    chosen = options(data, federation__rounds=1, evaluation__every=0, data__test="")
    assert fedzo("run", *chosen, "--out", tmp_path / "empty", "-q").code == 0


@pytest.mark.parametrize("text", ["4", "-1", "middle", "1.5"])
def test_rounds_out_of_range(text: str, finished: Path, tmp_path: Path) -> None:
    fails(fedzo("evaluate", finished, "--round", text), f"round '{text}'", "a number up to 3")
    fails(fedzo("replay", finished, "--out", tmp_path / "model", "--round", text), "a number up to 3")
    assert not (tmp_path / "model").exists()


def test_folders_without_a_run(tmp_path: Path) -> None:
    for command in ("resume", "evaluate", "inspect", "verify", "plot"):
        fails(fedzo(command, tmp_path), "is no run")
    (tmp_path / "config.toml").write_text("seed = 1\n")
    fails(fedzo("inspect", tmp_path), "no ledger")


def test_ledger_of_another_model(copy: Path, tmp_path: Path) -> None:
    """config.toml names another base model: every command that needs it refuses and names the field."""
    from safetensors.torch import load_file, save_file

    other = Path(shutil.copytree(MODEL, tmp_path / "other"))
    tensors = load_file(other / "model.safetensors")
    first = sorted(tensors)[0]
    save_file({**tensors, first: tensors[first] * 1.5}, other / "model.safetensors", metadata={"format": "pt"})
    edit(copy / "config.toml", 'source = "embedded"', f"source = {json.dumps(str(other))}")
    before = head(copy)
    for command in ("resume", "verify", "evaluate"):
        fails(fedzo(command, copy, "--json"), "belongs to another run", "fingerprint")
    fails(fedzo("replay", copy, "--out", tmp_path / "model", "--json"), "belongs to another run", "fingerprint")
    assert fedzo("verify", copy, "--chain-only").code == 0
    assert head(copy) == before


def sql(path: Path, *statements: str) -> None:
    db = sqlite3.connect(path / "ledger.sqlite")
    with db:
        for statement in statements:
            db.execute(statement)
    db.close()


def test_edited_ledger(copy: Path) -> None:
    """One scalar of round 1 changed: the chain breaks there; its hashes made anew: the replay breaks there."""
    from fedzo.federation.ledger import chain

    db = sqlite3.connect(copy / "ledger.sqlite")
    rows = db.execute("SELECT payload FROM rounds ORDER BY round").fetchall()
    payloads = [bytes(payload) for (payload,) in rows]
    payloads[1] = payloads[1][:-1] + bytes([payloads[1][-1] ^ 1])
    with db:
        db.execute("UPDATE rounds SET payload = ? WHERE round = 1", (payloads[1],))
    for command in (["verify"], ["verify", "--chain-only"], ["resume"]):
        fails(fedzo(*command, copy, "--json"), "round 1 does not match its hash")
    with Ledger(copy / "ledger.sqlite") as ledger:
        previous = ledger.spec.hash
    with db:
        for number, payload in enumerate(payloads):
            previous = chain(previous, payload)
            db.execute("UPDATE rounds SET hash = ? WHERE round = ?", (previous, number))
        db.execute("UPDATE header SET head_hash = ?", (previous,))
    db.close()
    assert fedzo("verify", copy, "--chain-only").code == 0
    fails(fedzo("verify", copy, "--json"), "round 1 replays to another theta")


def test_truncated_ledger(copy: Path) -> None:
    sql(copy, "DELETE FROM rounds WHERE round = 2")
    for command in ("verify", "resume"):
        fails(fedzo(command, copy, "--json"), "round 2 is missing", "truncated")
    answer = fedzo("evaluate", copy, "--round", "2", "--json")
    assert answer.code == 0, answer.err


@pytest.mark.parametrize("kept", [0, 100, 5000])
def test_ledger_file_cut_short(kept: int, copy: Path) -> None:
    content = (copy / "ledger.sqlite").read_bytes()
    (copy / "ledger.sqlite").write_bytes(content[:kept])
    for command in ("verify", "resume", "inspect", "plot"):
        fails(fedzo(command, copy), "ledger.sqlite")


def test_garbage_for_a_ledger(copy: Path) -> None:
    (copy / "ledger.sqlite").write_bytes(b"no database, but long enough to be taken for one" * 1000)
    for command in ("verify", "resume", "inspect", "evaluate"):
        fails(fedzo(command, copy, "--json"), "ledger.sqlite", "no ledger")


def test_second_process_is_refused(copy: Path) -> None:
    with RunFolder(copy).locked():
        fails(fedzo("resume", copy, "--json"), "another process")
    assert fedzo("resume", copy, "--json").code == 0


# Interrupted from outside, in processes of their own.


def heed_ctrl_c() -> None:
    """In the child: a shell that runs the tests in the background has Ctrl-C ignored, which is inherited."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(arguments: list[Any], program: list[str] = PROGRAM) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [*program, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "COLUMNS": "80"}, preexec_fn=heed_ctrl_c,  # noqa: PLW1509
    )  # fmt: skip


def finish(process: "subprocess.Popen[str]") -> Answer:
    out, err = process.communicate(timeout=120)
    return Answer(process.returncode, out, err)


def test_ctrl_c_and_resume(data: Path, tmp_path: Path) -> None:
    """SIGINT in the middle of a run; `fedzo resume` ends with the hash of a run that nobody stopped."""
    chosen = {"federation__rounds": 40, "evaluation__every": 0, "data__test": ""}
    path = tmp_path / "my run"
    process = start(["run", *options(data, **chosen), "--out", path, "--quiet"])
    lines = path / "metrics.jsonl"
    for _ in range(1200):
        if process.poll() is not None or (lines.exists() and lines.read_text().count('"round"') > 2):
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    stopped = finish(process)
    assert stopped.code == 130, stopped
    assert stopped.out == ""
    assert stopped.err.startswith("interrupted after ")
    assert stopped.err.count("\n") == 1
    assert f"fedzo resume '{path}'" in stopped.err
    with Ledger(path / "ledger.sqlite") as ledger:
        assert 2 <= ledger.rounds < 40
    resumed = fedzo("resume", path, "--json")
    whole = fedzo("run", *options(data, **chosen), "--out", tmp_path / "whole", "--json")
    assert json.loads(resumed.out)["ledger_hash"] == json.loads(whole.out)["ledger_hash"]


def test_ctrl_c_before_the_run(tmp_path: Path) -> None:
    """A named pipe for the configuration: the command waits in it when the signal comes."""
    os.mkfifo(tmp_path / "config.toml")
    process = start(["run", "-c", tmp_path / "config.toml", "--out", tmp_path / "run", "-q"])
    pipe = -1
    while pipe < 0 and process.poll() is None:
        with suppress(OSError):  # ENXIO: nobody reads yet
            pipe = os.open(tmp_path / "config.toml", os.O_WRONLY | os.O_NONBLOCK)
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    stopped = finish(process)
    os.close(pipe)
    assert (stopped.code, stopped.out, stopped.err) == (130, "", "interrupted\n")


def test_full_disk(data: Path, tmp_path: Path) -> None:
    """The ledger may grow to 50 kB: the run stops with one message, and goes on when there is room."""
    chosen = {"federation__rounds": 12, "evaluation__every": 0, "data__test": ""}
    small = [sys.executable, "-c", SMALL_DISK]
    path = tmp_path / "run"
    stopped = finish(start([50_000, "run", *options(data, **chosen), "--out", path, "-q"], small))
    fails(stopped, "could not be written", "ledger.sqlite", "rounds before it are intact", "fedzo resume")
    with Ledger(path / "ledger.sqlite") as ledger:
        assert 1 <= ledger.rounds < 12
    fails(
        finish(start([50_000, "replay", path, "--out", tmp_path / "model", "--json"], small)),
        "cannot write the model to",
    )
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]
    resumed = fedzo("resume", path, "--json")
    assert resumed.code == 0, resumed.err
    whole = fedzo("run", *options(data, **chosen), "--out", tmp_path / "whole", "--json")
    assert json.loads(resumed.out)["ledger_hash"] == json.loads(whole.out)["ledger_hash"]


def test_console_script(finished: Path) -> None:
    program = Path(sys.executable).with_name("fedzo")
    if not program.exists():
        pytest.skip("fedzo is not installed as a console script")
    answer = finish(start(["verify", finished, "--chain-only", "--json"], [str(program)]))
    assert (answer.code, answer.err) == (0, "")
    assert json.loads(answer.out)["complete"] is True
    fails(finish(start(["verify", finished / "nothing"], [str(program)])), "is no run")


def test_settings_are_all_keys(data: Path) -> None:
    assert set(settings(data)) <= set(flatten(Config()))
