"""Token shards to the Hub.

    python pre_tokens/transfer_tokens_hf.py --folder data/mine --repo-id USER/NAME --dry-run
    python pre_tokens/transfer_tokens_hf.py --folder data/mine --repo-id USER/NAME

Logs in with HF_TOKEN or what `hf auth login` has stored. Interrupted, the same command goes on: what the Hub
already has with the same sha256 is left out. The way back is `python dataloader.py --dataset-repo USER/NAME`,
or train_gpt2.py itself.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # to find the modules beside this folder

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import RepositoryNotFoundError

import cli
import hub
from cli import UserError
from pre_tokens import shards

# The Hub limits commits by the hour; what was sent before an interruption need not be sent again in any case.
SHARDS_A_COMMIT = 10


@dataclass
class Settings:
    folder: Path
    """Folder of shards, as handle_tokens.py leaves it."""
    repo_id: str
    """Data set on the Hub, USER/NAME; made if it is not there."""
    private: bool = False
    """Make a new data set private."""
    dry_run: bool = False
    """Only list what would be sent."""


def main() -> None:
    s = cli.parse(Settings, "Upload token shards to the Hugging Face Hub.")
    manifest = manifest_of(s.folder)
    what = f"--repo-id {s.repo_id}"
    held = {}
    try:
        if get_token() or s.dry_run:
            with hub.explained(what):
                held = hashes_on_hub(s.repo_id)
    except UserError as error:
        if not s.dry_run:
            raise
        print(f"note: listed as if nothing were there yet: {error}")
    new = [entry for entry in manifest["shards"] if held.get(entry["file"]) != entry["sha256"]]
    for entry in manifest["shards"]:
        state = "send" if entry in new else "there"
        print(f"{state:5}  {entry['file']}  {entry['bytes'] / 1e6:,.1f} MB")
    megabytes = sum(entry["bytes"] for entry in new) / 1e6
    print(
        f"{len(new)} of {len(manifest['shards'])} shards to send: {megabytes:,.1f} MB, and {shards.MANIFEST}"
    )
    if s.dry_run:
        return
    if not get_token():
        raise UserError(f"{what}: no token: set HF_TOKEN to one with write access, or run `hf auth login`")
    for entry in new:
        if shards.sha256_of(s.folder / entry["file"]) != entry["sha256"]:
            raise UserError(f"{s.folder / entry['file']}: not as {shards.MANIFEST} has it: build it again")
    with hub.explained(what):
        send(s, manifest, new)
    print(f"done: {HfApi().endpoint}/datasets/{s.repo_id}")


def manifest_of(folder: Path) -> dict:
    """The folder's manifest, every shard of it there; for shards without one, a manifest of what is there."""
    if not folder.is_dir():
        raise UserError(f"--folder {folder}: no such folder")
    manifest = shards.read_manifest(folder / shards.MANIFEST)
    if manifest is None:
        names = shards.in_order(
            path.name for path in folder.iterdir() if shards.SHARD_NAME.fullmatch(path.name)
        )
        if not names:
            raise UserError(f"--folder {folder}: holds no shards named NAME_{{train,val}}_NNNNNN.npy")
        sizes = {name: (folder / name).stat().st_size for name in names}
        entries = [{"file": n, "bytes": sizes[n], "sha256": shards.sha256_of(folder / n)} for n in names]
        return {"shards": entries}
    if manifest.get("next"):
        raise UserError(f"--folder {folder}: half built: run handle_tokens.py again to complete it")
    if missing := shards.missing(folder, manifest):
        raise UserError(f"--folder {folder}: {missing[0]['file']} is missing: restore or build it")
    return manifest


def hashes_on_hub(repo_id: str) -> dict[str, str]:
    """File name -> sha256 of what the data set holds; nothing where there is no such data set."""
    try:
        info = hub.patiently(lambda: HfApi().dataset_info(repo_id, files_metadata=True))
    except RepositoryNotFoundError:
        return {}
    return {file.rfilename: file.lfs.sha256 for file in info.siblings if file.lfs}


def send(s: Settings, manifest: dict, new: list[dict]) -> None:
    """Upload the shards, a few a commit, and the manifest last: where it is, the data set is whole."""
    api = HfApi()
    hub.patiently(
        lambda: api.create_repo(s.repo_id, repo_type="dataset", private=s.private or None, exist_ok=True)
    )
    batches = [new[i : i + SHARDS_A_COMMIT] for i in range(0, len(new), SHARDS_A_COMMIT)]
    text = json.dumps(manifest, indent=2) + "\n"
    for number, batch in enumerate([*batches, None], 1):
        title = "Add the manifest" if batch is None else f"Add shards, part {number} of {len(batches)}"

        def commit(batch: list[dict] | None = batch, title: str = title) -> None:
            if batch is None:
                files = [CommitOperationAdd(shards.MANIFEST, text.encode())]
            else:
                files = [CommitOperationAdd(e["file"], s.folder / e["file"]) for e in batch]
            api.create_commit(s.repo_id, files, commit_message=title, repo_type="dataset")

        hub.patiently(commit, retry_on=(*hub.PASSING, *hub.CONFLICTS))


if __name__ == "__main__":
    cli.run(main)
