"""tour.ipynb: its committed outputs, and its cells run as they stand, without Jupyter."""

import ast
import base64
import contextlib
import importlib
import io
import itertools
import json
import math
import re
import shutil
import sys
import types
from pathlib import Path

import matplotlib
import pytest
import torch
from helpers import ROOT, history

NOTEBOOK = ROOT / "tour.ipynb"
CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
CODE = {cell["id"]: "".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"}
OUTPUTS = {cell["id"]: cell["outputs"] for cell in CELLS if cell["cell_type"] == "code"}
# Of cells whose output depends neither on the machine nor on the version of Python.
ALWAYS_THE_SAME = ("tokens", "size")


def committed_text(name: str) -> str:
    return "".join("".join(output.get("text", "")) for output in OUTPUTS[name])


def test_committed_outputs_come_from_one_run_from_top_to_bottom() -> None:
    counts = [cell["execution_count"] for cell in CELLS if cell["cell_type"] == "code"]
    assert counts == list(range(1, len(CODE) + 1))
    outputs = [output for of_cell in OUTPUTS.values() for output in of_cell]
    assert {o["output_type"] for o in outputs} == {"stream", "display_data"}  # no error among them
    assert {o["name"] for o in outputs if o["output_type"] == "stream"} == {"stdout"}
    figures = [base64.b64decode(o["data"]["image/png"]) for o in outputs if "data" in o]
    assert len(figures) == 2 and all(figure.startswith(b"\x89PNG") for figure in figures)
    assert NOTEBOOK.stat().st_size < 400_000
    text = "".join(map(committed_text, CODE))
    assert not re.search(r"/(home|root|tmp|work|Users|usr|opt|content)/|[A-Z]:\\", text)
    assert "124,439,808" in text and "all equal: True" in text


def test_a_text_introduces_every_code_cell() -> None:
    for before, cell in itertools.pairwise(CELLS):
        assert cell["cell_type"] == "markdown" or before["cell_type"] == "markdown", cell["id"]


def test_the_notebook_uses_only_names_that_exist() -> None:
    """A function that is renamed is missed at once, not only when all cells are run."""
    used = 0
    tree = ast.parse("\n".join(CODE.values()))
    modules = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                path = [node.module, alias.name] if isinstance(node, ast.ImportFrom) else [alias.name]
                if (ROOT / path[0]).is_dir() or (ROOT / f"{path[0]}.py").exists():
                    with contextlib.suppress(ModuleNotFoundError):  # a function or class of a module
                        modules[alias.name] = importlib.import_module(".".join(path))
                    if len(path) == 2 and alias.name not in modules:
                        assert hasattr(importlib.import_module(path[0]), alias.name), path
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            assert hasattr(modules[node.value.id], node.attr), f"{node.value.id}.{node.attr}"
            used += 1
    assert used > 20 and {"dataloader", "hellaswag", "metrics", "optim", "train_gpt2"} <= set(modules)


@pytest.mark.slow
def test_the_cells_run_and_show_what_the_text_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them, in a copy of the repository, with a training run of 5 steps."""
    clone = tmp_path / "clone"
    ignored = shutil.ignore_patterns(".*", "__pycache__", "data", "log", "tests", "benchmarks")
    shutil.copytree(ROOT, clone, ignore=ignored)
    before = {path.name for path in clone.iterdir()}
    monkeypatch.chdir(clone)
    monkeypatch.setattr(sys, "path", list(sys.path))
    matplotlib.use("agg")
    shown = []

    def display(figure: object, display_id: bool = False) -> types.SimpleNamespace:
        shown.append(figure)
        return types.SimpleNamespace(update=shown.append)

    monkeypatch.setitem(sys.modules, "IPython.display", types.SimpleNamespace(display=display))
    seen: dict[str, object] = {"__name__": "tour"}
    for name, source in CODE.items():
        if name == "imports":
            assert source.count("STEPS = 200\n") == 1
            source = source.replace("STEPS = 200\n", "STEPS = 5\n")
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(source, f"tour.ipynb: {name}", "exec"), seen)
        if name in ALWAYS_THE_SAME:
            assert printed.getvalue() == committed_text(name)

    assert {path.name for path in clone.iterdir()} - before <= {"data", "log", "__pycache__"}
    assert torch.equal(seen["x"][:, 1:], seen["y"][:, :-1])
    assert torch.equal(torch.cat(seen["on_two_gpus"]), seen["x"])
    assert seen["difference"][:64].max() == 0 < seen["difference"][64:].min()
    assert seen["apart"] < 1e-5 and seen["moved"] > 1e-4  # by hand and by script

    first, last = seen["validation"]
    assert abs(first - math.log(50257)) < 0.2 and 8 < last < first - 0.1
    assert len(shown) > 2 and all(figure is shown[0] for figure in shown[:-1])
    points = {line.get_label(): len(line.get_xdata()) for line in seen["left"].get_lines()}
    assert points["training"] == 5 and points["validation"] == 2  # after steps 0 and 5
    assert float(seen["alone"]) == pytest.approx(float(seen["losses"][0, 0]), rel=1e-5)

    runs = clone / "log" / "tour"
    killed_after = max(step for _, step in seen["before_kill"])
    assert seen["resumed_at"] < killed_after < 40 and seen["resumed_at"] in (10, 20, 30)
    assert len(history(runs / "killed")) == 45
    assert history(runs / "killed") == history(runs / "undisturbed")
    assert len(set(seen["hashes"])) == 1
