"""README.md and README.zh-CN.md say the same; what the documents name is there."""

import dataclasses
import functools
import re
import shlex
from pathlib import Path

import pytest
from helpers import ROOT

import bench
import convert
import generate
import hellaswag
import plot_loss
import settings
import upload_hf
from model import GPTConfig
from pre_tokens import fetch_tokens_hf, handle_tokens, transfer_tokens_hf
from support import cli, planning

ENGLISH, CHINESE = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh-CN.md"))
WORKFLOW = (ROOT / "workflow.md").read_text(encoding="utf-8")
DOCUMENTS = sorted(path.relative_to(ROOT) for path in ROOT.glob("*.md"))
DOCUMENTS += [Path("support/README.md"), Path("pre_tokens/README.md"), Path("benchmarks/recipes.md")]
# Flags of other programs (torchrun, Docker, SLURM, pip, uv, pytest, git, lm_eval, llama.cpp, optimum-cli),
# and those of scripts in benchmarks/ and tests/.
OTHERS = {
    "--standalone", "--nproc_per_node", "--nnodes", "--max-restarts", "--rdzv_backend", "--rdzv_id",
    "--rdzv_endpoint", "--gpus", "--ipc", "--rm", "--job-name", "--nodes", "--ntasks-per-node",
    "--gpus-per-node", "--time", "--signal", "--requeue", "--index-url", "--hypothesis-profile", "--help",
    "--minutes", "--tiny", "--peer", "--only", "--out", "--processes", "--lengths", "--rungs", "--recipes",
    "--seeds", "--jobs", "--results", "--report", "--shm-size", "--data", "--prompt-tokens", "--limit",
    "--rounds", "--depth", "--model_args", "--tasks", "--batch_size", "--outfile", "--outtype", "--task",
    "--stop-timeout", "--bucket-mb",
}  # fmt: skip


def code_blocks(text: str) -> list[str]:
    """Indented lines, without the remarks behind them."""
    lines = re.findall(r"^    (.*)$", text, re.MULTILINE)
    return [re.sub(r"\s+# .*|  +.*[^\x00-\x7F].*|\s{2,}\S.*$", "", line).rstrip() for line in lines]


def prose(text: str) -> str:
    return re.sub(r"^    .*$", "", text, flags=re.MULTILINE)


def test_both_readmes_have_the_same_sections() -> None:
    shapes = [
        re.findall(r"^(#+) |^(\|---)|^(!\[)|^(- \*\*)", text, re.MULTILINE) for text in (ENGLISH, CHINESE)
    ]
    assert shapes[0] == shapes[1]
    rows = [
        [line.count("|") for line in text.splitlines() if line.startswith("|")] for text in (ENGLISH, CHINESE)
    ]
    assert rows[0] == rows[1]


def test_both_readmes_have_the_same_commands_and_names() -> None:
    assert code_blocks(ENGLISH) == code_blocks(CHINESE)
    names = [sorted(re.findall(r"`([^`]+)`", prose(text))) for text in (ENGLISH, CHINESE)]
    assert names[0] == names[1]


def test_both_readmes_have_the_same_figures() -> None:
    """Numbers written in digits; "10 billion tokens" is "100 亿 token", "7 million" is "700 万"."""
    english = prose(ENGLISH).replace("10 billion tokens", "100").replace("7 million", "700")
    figures = [sorted(re.findall(r"\d[\d,.]*\d|\d", t)) for t in (english, prose(CHINESE))]
    assert figures[0] == figures[1]


def test_steps_hours_and_shards_match_the_presets() -> None:
    presets = settings.PRESETS
    for name, steps in re.findall(r"^\| `([\w-]+)`[^|]*\| ([\d,]+) \|", ENGLISH, re.MULTILINE):
        assert presets[name].max_steps == int(steps.replace(",", "")), name
    gpt2 = GPTConfig()
    for name, text in (
        ("gpt2-124m", r"steps of `gpt2-124m` should take ([\d.]+) hours"),
        ("gpt2-124m-muon", r"those of `gpt2-124m-muon` ([\d.]+)"),
    ):
        s = presets[name]
        plan = planning.plan(
            "8xA100-80GB", gpt2, 1024, s.total_batch_size, s.max_steps, 0.45, optimizer=s.optimizer
        )
        assert re.search(text, ENGLISH)[1] == f"{plan.hours:.1f}"
    notebook = re.search(r"--preset (gpt2-124m-muon) .*--num-shards (\d+)", WORKFLOW)
    s = presets[notebook[1]]
    training_tokens = (int(notebook[2]) - 1) * 100_000_000  # FineWeb-Edu 10B has 100 M in a shard
    assert 0.95 < s.max_steps * s.total_batch_size / training_tokens < 1


def test_both_readmes_link_to_the_same_places() -> None:
    links = [re.findall(r"\]\(([^)]+)\)", text)[1:] for text in (ENGLISH, CHINESE)]
    assert sorted(links[0]) == sorted(links[1])


def anchors(text: str) -> set[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_links_lead_somewhere(document: Path) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith("http"):
            continue
        name, _, anchor = link.partition("#")
        target = (ROOT / document).parent / name if name else ROOT / document
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), link


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_documented_flags_exist(document: Path) -> None:
    modules = [bench, convert, generate, hellaswag, plot_loss, settings, upload_hf]
    modules += [fetch_tokens_hf, handle_tokens, transfer_tokens_hf]
    known = {f.name for module in modules for f in dataclasses.fields(module.Settings)}
    text = re.sub(r"`git [^`]*`|pip install [^\n`]*", "", (ROOT / document).read_text(encoding="utf-8"))
    for flag in set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text)) - OTHERS:
        name = flag[2:].removeprefix("no-") if flag[2:].replace("-", "_") not in known else flag[2:]
        assert name.replace("-", "_") in known, flag


PARSERS = {"train_gpt2.py": settings.read_settings}
for script, module in {
    "bench.py": bench, "convert.py": convert, "generate.py": generate, "hellaswag.py": hellaswag,
    "plot_loss.py": plot_loss, "upload_hf.py": upload_hf, "pre_tokens/fetch_tokens_hf.py": fetch_tokens_hf,
    "pre_tokens/handle_tokens.py": handle_tokens, "pre_tokens/transfer_tokens_hf.py": transfer_tokens_hf,
}.items():  # fmt: skip
    PARSERS[script] = functools.partial(cli.parse, module.Settings, "", None)
PLACEHOLDERS = {"N": "1", "STEP": "1", "DTYPE": "float32"}


def documented_commands() -> list[str]:
    """Each call of one of our scripts in a code block, from the script's name on."""
    found = set()
    for document in DOCUMENTS:
        text = re.sub(r"\\\n\s*", " ", (ROOT / document).read_text(encoding="utf-8"))
        for line in re.findall(r"^    +(.*)$", text, re.MULTILINE):
            call = re.search(r"\b(?:python|torchrun|uv run)\b.*?([\w/]+\.py)(?= |$)[^#|&;>`]*", line)
            if call and call[1] in PARSERS:
                found.add(call[0][call.start(1) - call.start() :].split("   ")[0].strip())
    return sorted(found)


@pytest.mark.parametrize("command", documented_commands())
def test_documented_commands_parse(command: str) -> None:
    script, *arguments = [PLACEHOLDERS.get(word, word) for word in shlex.split(command)]
    PARSERS[script](arguments)


@pytest.mark.parametrize("folder", ["support", "pre_tokens"])
def test_every_file_has_a_row(folder: str) -> None:
    listed = re.findall(
        r"^\| `(\w+\.py)` \|", (ROOT / folder / "README.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert sorted(listed) == sorted(p.name for p in (ROOT / folder).glob("*.py") if p.name != "__init__.py")
