"""Upload a run to the Hugging Face Hub, as a model that others can load.

    python upload_hf.py --run log --repo-id USER/NAME --dry-run      # show the files and the model card
    python upload_hf.py --run log --repo-id USER/NAME --private
    python upload_hf.py --run log --repo-id USER/NAME --checkpoint 500 --revision step-500     # or best

The token comes from HF_TOKEN or `hf auth login`. Only the files listed below and the run's figures are sent.
"""

import json
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import hellaswag
from support import checkpoint, cli, hub, metrics, pretrained, run_files
from support.cli import UserError

MODEL_FILES = (
    "model.safetensors", "config.json", "generation_config.json",
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt",
)  # fmt: skip
# Name in the run folder -> name on the Hub, where config.json is the configuration of the model.
RUN_FILES = {
    run_files.METRICS: run_files.METRICS,
    run_files.CONFIG: "training_config.json",
    run_files.SUMMARY: run_files.SUMMARY,
    run_files.SAMPLES: run_files.SAMPLES,
    run_files.FIGURE: run_files.FIGURE,
}


@dataclass
class Settings:
    run: Path = Path("log")
    """Run folder."""
    repo_id: str = ""
    """Name of the model on the Hub, USER/NAME; created if it does not exist."""
    private: bool = False
    """Create the model as private."""
    dry_run: bool = False
    """Only show the model card and list what would be sent."""
    checkpoint: int | Literal["best"] | None = None
    """Step of the checkpoint to send, or best (lowest validation loss). Default: the newest."""
    revision: str = ""
    """Tag this upload, so that `from_pretrained(..., revision=TAG)` loads it."""
    license: str = ""
    """Licence to state on the model card, such as mit. Default: the data set's, if its card states one."""
    language: str = ""
    """Language to state on the model card, such as en. Default: the data set's, if its card states one."""


def pick_checkpoint(run: Path, step: int | Literal["best"] | None) -> Path:
    """Find and verify the checkpoint of `step` (None: the newest). Raises UserError if there is none."""
    if not run.is_dir():
        raise UserError(f"--run {run}: no such folder: name a run")
    if step is None:
        folder, problems = checkpoint.latest_intact(run)
        if problems:
            raise UserError(f"{problems[0]}: --checkpoint STEP sends an older one")
        if folder is None:
            raise UserError(f"--run {run}: contains no checkpoint{run_files.runs_below(run)}")
        return folder
    if step == "best":
        return run_files.best_checkpoint(run)
    folder = checkpoint.folder_of(run, step)
    if not folder.is_dir():
        steps = ", ".join(str(checkpoint.step_of(path)) for path in checkpoint.folders(run)) or "none"
        raise UserError(f"--checkpoint {step}: not in {run}, which has {steps}")
    checkpoint.verify(folder)
    return folder


def collect(run: Path, folder: Path) -> tuple[dict[str, Path], list[str]]:
    """Return the files to send, name on the Hub -> file, and a line for each file that is left out.

    Raises UserError if a file of the model is missing, if a link leads out of the run folder, or if a file
    contains the user's token.
    """
    files = {name: folder / name for name in MODEL_FILES}
    for path in files.values():
        if not path.is_file():
            raise UserError(f"{path}: missing: a model is not complete without it: send another --checkpoint")
    unsent = {name: f"missing: {run / name}" for name in RUN_FILES if not (run / name).is_file()}
    if run_files.step_of_summary(run) != (step := checkpoint.step_of(folder)):
        for name in {run_files.SUMMARY, run_files.SAMPLES} - set(unsent):
            unsent[name] = f"left out: {run / name}: not of step {step}"
    files |= {there: run / name for name, there in RUN_FILES.items() if name not in unsent}
    files |= {path.name: path for path in sorted(run.glob("[!.]*.png"))}
    token = hub.token()
    for path in files.values():
        # The checkpoint, or the folder of checkpoints, may be a link to a larger disk.
        if not any(path.resolve().is_relative_to(place.resolve()) for place in (run, folder)):
            raise UserError(f"{path}: leads out of {run} to {path.resolve()}: put a copy there")
        if token and path.suffix != ".safetensors" and token.encode() in path.read_bytes():
            raise UserError(f"{path}: contains your Hub token: remove it from there")
    return files, sorted(unsent.values())


def describe_data(config: dict) -> tuple[str, str]:
    """Describe the training data by config.json. Also returns its name on the Hub, or ""."""
    folder = Path(config["settings"]["data_dir"]).name
    data = config.get("data") or {}
    source = data.get("source") or {}
    kind, repo_id = source.get("kind"), source.get("repo_id", "")
    if kind == "builtin":
        return f"documentation that Python {source.get('python', '')} carries", ""
    if kind == "files":
        names = [str(file["name"]) for file in source.get("files", [])]
        more = f" and {len(names) - 3} more files" if len(names) > 3 else ""
        return ", ".join(names[:3]) + more, ""
    if repo_id:
        return f"{repo_id}, {source['subset']}" if source.get("subset") else repo_id, repo_id
    return " ".join(["token shards", *data.get("names", []), f"in {folder}/"]), ""


def licence_and_language(s: Settings, dataset: str) -> list[str]:
    """Return the card's licence and language: from the flags, else from the card of the data set."""
    given: dict[str, object] = {"license": s.license, "language": s.language}
    if dataset and not all(given.values()):
        try:
            with hub.user_errors(dataset):
                from huggingface_hub import HfApi

                card = HfApi().dataset_info(dataset, timeout=10).card_data or {}
            given = {key: value or card.get(key) for key, value in given.items()}
        except UserError as error:
            print(f"note: no licence or language from the data set's card: {error}")
    return [f"{key}: {json.dumps(value)}" for key, value in given.items() if value]


def model_card(s: Settings, step: int, files: dict[str, Path]) -> str:
    """Write the model card: results, usage, figure, recipe and samples."""
    run, repo_id = s.run, s.repo_id
    config = run_files.read_config(run)
    settings, hardware = config.get("settings", {}), config.get("hardware", {})
    records = [r for r in metrics.read(run / run_files.METRICS) if r["step"] <= step]
    last = {record["kind"]: record for record in records}
    shape = json.loads(files["config.json"].read_text(encoding="utf-8"))
    rows = {
        "shape": "{n_layer} layers, {n_head} heads, width {n_embd}, {n_positions} positions".format(**shape)
    }
    if "parameters" in config:
        rows["parameters"] = f"{config['parameters']:,}"
    rows["optimizer steps"] = f"{step:,}"
    if "total_batch_size" in settings:
        rows["tokens"] = f"{step * settings['total_batch_size']:,}"
    dataset = ""
    if "data_dir" in settings:
        rows["data"], dataset = describe_data(config)
    for kind, name in (("val", "validation loss"), ("train", "training loss, last step")):
        if last.get(kind, {}).get("loss") is not None:
            rows[name] = f"{last[kind]['loss']:.4f}"
    if "hellaswag" in last and all(
        last["hellaswag"].get(key) is not None for key in ("acc", "acc_norm", "n")
    ):
        score, published = last["hellaswag"], hellaswag.PUBLISHED["completion"]
        rows["HellaSwag, acc / acc_norm"] = f"{score['acc']:.4f} / {score['acc_norm']:.4f} of {score['n']:,}"
        rows["HellaSwag of the published GPT-2 124M"] = f"{published[0]:.4f} / {published[1]:.4f}"
    if hardware:
        rows["hardware"] = "{processes} x {name}, {dtype}".format(**hardware)
    if any(r["kind"] == "train" for r in records):
        minutes = sum(r.get("step_ms") or 0 for r in records if r["kind"] == "train") / 60_000
        rows["time in training steps"] = (
            f"{minutes / 60:.1f} hours" if minutes > 120 else f"{minutes:.1f} minutes"
        )
    recipe = (
        "optimizer", "learning_rate", "min_lr_ratio", "warmup_steps", "schedule", "weight_decay", "grad_clip",
        "max_steps", "total_batch_size", "sequence_length", "init_from", "seed",
    )  # fmt: skip
    head = licence_and_language(s, dataset)
    head += ["library_name: transformers", "pipeline_tag: text-generation"]
    head += [f"datasets: {dataset}"] if dataset else []
    origin = settings.get("init_from", "scratch")
    made = "trained from scratch" if origin == "scratch" else f"fine-tuned from {Path(origin).name}"
    head += [f"base_model: openai-community/{origin}"] if origin in pretrained.OPENAI_MODELS else []
    parts = ["---", *head, "tags: [gpt2]", "---", f"# {repo_id.split('/')[-1]}", ""]
    parts += [f"GPT-2, {made}.", "", "| | |", "|---|---|"]
    parts += [f"| {name} | {value} |" for name, value in rows.items()]
    parts += ["", "## Use", "", "```python", "from transformers import pipeline", ""]
    parts += [f'generate = pipeline("text-generation", model="{repo_id}")']
    parts += [
        'print(generate("Hello, I\'m a language model,", max_new_tokens=64)[0]["generated_text"])',
        "```",
    ]
    if "loss_curves.png" in files:
        parts += ["", "## Training", "", "![loss curves](loss_curves.png)"]
    if settings:
        parts += ["", "## Recipe", "", "| setting | |", "|---|---|"]
        parts += [f"| {name.replace('_', ' ')} | {settings[name]} |" for name in recipe if name in settings]
    if "samples.txt" in files:
        # Indented rather than fenced, because the text of a model may contain a fence.
        samples = files["samples.txt"].read_text(encoding="utf-8").strip()
        parts += ["", "## Samples", "", textwrap.indent(samples, "    ", lambda line: True)]
    return "\n".join(parts) + "\n"


def upload(s: Settings) -> None:
    """Send the run in one commit, and tag it if there is a --revision."""
    if not s.repo_id:
        raise UserError("--repo-id: required: USER/NAME of the model on the Hub")
    what = f"--repo-id {s.repo_id}"
    hub.check_name(what, s.repo_id)
    folder = pick_checkpoint(s.run, s.checkpoint)
    files, unsent = collect(s.run, folder)
    card = model_card(s, checkpoint.step_of(folder), files)
    for line in unsent:
        print(line)
    for name, path in files.items():
        print(f"{path.stat().st_size:>13,}  {name}  <- {path}")
    print(f"{len(card.encode()):>13,}  README.md")
    if s.dry_run:
        print(f"\n{card}")
        if not s.private:
            print("note: if the model is new on the Hub, everyone may see it: --private prevents that")
        return
    hub.require_token(what)
    with hub.user_errors(what):
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

        api = HfApi()
        hub.with_retries(lambda: api.create_repo(s.repo_id, private=s.private or None, exist_ok=True))
        if s.revision and s.revision in {tag.name for tag in api.list_repo_refs(s.repo_id).tags}:
            raise UserError(f"--revision {s.revision}: a tag of that name already exists: choose another")
        operations = [CommitOperationAdd(name, path) for name, path in files.items()]
        operations.append(CommitOperationAdd("README.md", card.encode()))
        there = hub.with_retries(lambda: api.list_repo_files(s.repo_id))  # may be those of another step
        stale = set(RUN_FILES.values()) & set(there) - set(files)
        operations += [CommitOperationDelete(name) for name in sorted(stale)]
        title = f"Weights after {checkpoint.step_of(folder)} steps"
        commit = hub.with_retries(lambda: api.create_commit(s.repo_id, operations, commit_message=title))
        if s.revision:
            api.create_tag(s.repo_id, tag=s.revision, revision=commit.oid)
    print(f"done: {api.endpoint}/{s.repo_id}")


def main() -> None:
    upload(cli.parse(Settings, "Upload a run to the Hugging Face Hub."))


if __name__ == "__main__":
    cli.run(main, must_finish=True)
