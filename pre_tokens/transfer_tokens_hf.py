"""Upload token shards to the Hub.

    python pre_tokens/transfer_tokens_hf.py --folder data/mine --repo-id USER/NAME --dry-run
    python pre_tokens/transfer_tokens_hf.py --folder data/mine --repo-id USER/NAME

The token comes from HF_TOKEN or `hf auth login`. If interrupted, run the same command again: it does not send
shards again that the Hub already has with the same SHA-256. To train on them, give train_gpt2.py
`--dataset-repo USER/NAME --data-dir DIR`.
"""

import functools
import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # to find the modules beside this folder

from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from pre_tokens import shards
from support import cli, hub
from support.cli import UserError
from support.files import sha256_of

# The Hub limits commits per hour. Files that arrived before an interruption are never sent again.
SHARDS_PER_COMMIT = 10


@dataclass
class Settings:
    folder: Path
    """Folder of shards written by handle_tokens.py."""
    repo_id: str
    """Name of the data set on the Hub, USER/NAME; created if it does not exist."""
    private: bool = False
    """Create the data set as private."""
    dry_run: bool = False
    """Only list what would be sent."""


def main() -> None:
    s = cli.parse(Settings, "Upload token shards to the Hugging Face Hub.")
    what = f"--repo-id {s.repo_id}"
    hub.check_name(what, s.repo_id)
    manifest = manifest_of(s.folder)
    held = {}
    try:
        with hub.user_errors(what):
            if s.dry_run or hub.token():
                held = hashes_on_hub(s.repo_id)
    except UserError as error:
        if not s.dry_run:
            raise
        print(f"note: listing all shards as new: {error}")
    new = [entry for entry in manifest["shards"] if held.get(entry["file"]) != entry["sha256"]]
    for entry in manifest["shards"]:
        state = "send" if entry in new else "there"
        print(f"{state:5}  {entry['file']}  {entry['bytes'] / 1e6:,.1f} MB")
    megabytes = sum(entry["bytes"] for entry in new) / 1e6
    print(
        f"{len(new)} of {len(manifest['shards'])} shards to send: {megabytes:,.1f} MB, and {shards.MANIFEST}"
    )
    if s.dry_run:
        if not s.private:
            print("note: if the data set is new on the Hub, everyone may see it: --private prevents that")
        return
    hub.require_token(what)
    for entry in new:
        if sha256_of(s.folder / entry["file"]) != entry["sha256"]:
            raise UserError(f"{s.folder / entry['file']}: differs from {shards.MANIFEST}: build it again")
    with hub.user_errors(what):
        send(s, manifest, new)


def manifest_of(folder: Path) -> dict:
    """Return the manifest of a folder, whose shards must all exist; without one, build it from its shards."""
    if not folder.is_dir():
        raise UserError(f"--folder {folder}: no such folder")
    manifest = shards.read_manifest(folder / shards.MANIFEST)
    if manifest is None:
        names = shards.names_in(folder)
        if not names:
            raise UserError(f"--folder {folder}: contains no shards named NAME_{{train,val}}_NNNNNN.npy")
        sizes = {name: (folder / name).stat().st_size for name in names}
        entries = [{"file": n, "bytes": sizes[n], "sha256": sha256_of(folder / n)} for n in names]
        return {"shards": entries}
    if manifest.get("next"):
        raise UserError(f"--folder {folder}: incomplete: run handle_tokens.py again to finish it")
    if missing := shards.missing(folder, manifest):
        raise UserError(f"--folder {folder}: {missing[0]['file']} is missing: restore or build it")
    return manifest


def hashes_on_hub(repo_id: str) -> dict[str, str]:
    """Map file names of the data set to their SHA-256. Empty if there is no such data set."""
    from huggingface_hub import HfApi

    try:
        info = hub.with_retries(lambda: HfApi().dataset_info(repo_id, files_metadata=True))
    except GatedRepoError:  # a kind of the next
        raise
    except RepositoryNotFoundError:
        return {}
    return {file.rfilename: file.lfs.sha256 for file in info.siblings if file.lfs}


def send(s: Settings, manifest: dict, new: list[dict]) -> None:
    """Upload the shards, a few per commit, and the manifest last, because it makes the data set complete."""
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    hub.with_retries(
        lambda: api.create_repo(s.repo_id, repo_type="dataset", private=s.private or None, exist_ok=True)
    )
    batches = [new[i : i + SHARDS_PER_COMMIT] for i in range(0, len(new), SHARDS_PER_COMMIT)]
    text = json.dumps(manifest, indent=2) + "\n"
    commits: list[tuple[str, dict[str, Path | bytes]]] = [
        (f"Add shards, part {number} of {len(batches)}", {e["file"]: s.folder / e["file"] for e in batch})
        for number, batch in enumerate(batches, 1)
    ]
    commits.append(("Add the manifest", {shards.MANIFEST: text.encode()}))

    def commit(title: str, contents: dict[str, Path | bytes]) -> None:
        files = [CommitOperationAdd(name, content) for name, content in contents.items()]
        api.create_commit(s.repo_id, files, commit_message=title, repo_type="dataset")

    for title, contents in commits:
        work = functools.partial(commit, title, contents)
        hub.with_retries(work, retry_on=(*hub.RETRYABLE, *hub.CONFLICTS))
    print(f"done: {api.endpoint}/datasets/{s.repo_id}")


if __name__ == "__main__":
    cli.run(main, must_finish=True)
