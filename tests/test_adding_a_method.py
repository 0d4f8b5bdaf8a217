"""docs/adding-a-method.md, followed literally in a copy of the project."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"`([\w./-]+)`(?:(?!`).)*?\n\n```(python|diff)\n(.*?)```", re.DOTALL)


def copy_project(target: Path) -> None:
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("fedzo", "simulations", "configs", "docs", "clients", "server"):
        shutil.copytree(ROOT / name, target / name, ignore=ignored)
    (target / "tests").mkdir()
    for name in ("tests/test_methods.py", "tests/small_runs.py", "pyproject.toml"):
        shutil.copy(ROOT / name, target / name)


def insert(text: str, diff: str) -> str:
    """Puts each added line of a diff after the line above it, which the text must have once."""
    above = ""
    for line in diff.splitlines():
        if line.startswith("+"):
            assert text.count(f"{above}\n") == 1, above
            text = text.replace(f"{above}\n", f"{above}\n{line[1:]}\n")
        above = line[1:]
    return text


@pytest.mark.slow
def test_following_it_works(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "adding-a-method.md").read_text(encoding="utf-8")
    copy_project(tmp_path)
    blocks = BLOCK.findall(text)
    assert [path for path, _, _ in blocks] == [
        "fedzo/optimizers/adamm.py", "fedzo/optimizers/__init__.py", "fedzo/methods.py", "tests/test_adamm.py"
    ]  # fmt: skip
    lines = [
        line for _, language, body in blocks for line in body.splitlines() if language == "python" or line[0] == "+"
    ]
    assert len(lines) < 60
    for path, language, body in blocks:
        file = tmp_path / path
        assert file.exists() == (language == "diff")
        made = insert(file.read_text(encoding="utf-8"), body) if language == "diff" else body
        file.write_text(made, encoding="utf-8")
    (commands,) = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    bin_ = Path(sys.executable).parent
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "PATH": f"{bin_}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-ec", commands], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "ZO-AdaMM, arXiv 1910.06513" in done.stdout
    assert "| zo-adamm | estimator one-point, optimizer adamm | P + 1 | 1 | 3 | any |" in (
        tmp_path / "docs" / "methods.md"
    ).read_text(encoding="utf-8")
    for tool in (["ruff", "check"], ["ruff", "format", "--check"]):
        files = [path for path, language, _ in blocks if language == "python"]
        subprocess.run([sys.executable, "-m", *tool, *files], cwd=tmp_path, check=True, capture_output=True)
