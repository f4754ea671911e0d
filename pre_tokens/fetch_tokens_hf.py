"""Download token shards from the Hub ahead of training.

    python pre_tokens/fetch_tokens_hf.py                       # all shards of the recipe
    python pre_tokens/fetch_tokens_hf.py --num-shards 10       # the first ten

train_gpt2.py downloads what it needs by itself.
"""

import contextlib
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # to find the modules beside this folder

from tqdm import tqdm
from tqdm.utils import CallbackIOWrapper

from pre_tokens import shards
from pre_tokens.shards import MANIFEST, SHARD_NAME
from settings import PRESETS
from support import cli, files, hub
from support.cli import UserError

PARALLEL_DOWNLOADS = 4


def fetch(repo_id: str, data_dir: Path, num_shards: int = 0) -> None:
    """Download the missing ones of the first `num_shards` shards (0: all) of a data set on the Hub.

    Existing shards stay, and an interrupted download continues. A file gets its name only after its length
    and SHA-256 match the Hub and the manifest of the data set. The folder keeps a manifest of the complete
    data set, so that a later call needs no network to see that nothing is missing. A folder of other shards
    stays as it is.
    Raises UserError if shards are missing and cannot be downloaded, or are not what they should be.
    """
    manifest = shards.read_manifest(data_dir / MANIFEST)
    if manifest and manifest.get("next"):
        raise UserError(
            f"--data-dir {data_dir}: incomplete: run pre_tokens/handle_tokens.py again to finish it"
        )
    if manifest and not shards.missing(data_dir, manifest, num_shards):
        return
    existing = set(shards.names_in(data_dir))
    try:
        revision, on_hub = _list_hub(repo_id)
    except UserError as error:
        if manifest or not existing:
            raise
        print(f"note: using {data_dir} without knowing whether it is complete: {error}")
        return
    if manifest is None:
        if existing - set(on_hub):
            return
        manifest = _manifest_on_hub(repo_id, revision, on_hub)
    for entry in manifest["shards"]:
        _check_entry(entry, on_hub.get(entry["file"]), repo_id)
    if not shards.missing(data_dir, manifest, num_shards):
        if not (data_dir / MANIFEST).exists():  # otherwise it belongs to another program
            with contextlib.suppress(OSError):  # read-only data; the manifest only saves a request
                shards.write_manifest(data_dir, manifest)
        return
    with shards.locked(data_dir):
        shards.write_manifest(data_dir, manifest)
        needed = shards.missing(data_dir, manifest, num_shards)
        _download_all(repo_id, revision, on_hub, data_dir, needed)


@dataclass(frozen=True)
class HubFile:
    path: str  # in the repository
    n_bytes: int
    sha256: str | None  # None for small files


def _list_hub(repo_id: str) -> tuple[str, dict[str, HubFile]]:
    """Return the newest commit of a data set, and its shards and manifest by file name."""
    without_network = "use --preset demo, or --data-dir with a folder of shards"
    with hub.user_errors(f"--dataset-repo {repo_id}", without_network):
        from huggingface_hub import HfApi

        info = hub.with_retries(lambda: HfApi().dataset_info(repo_id, files_metadata=True, timeout=30))
    found = {}
    for file in info.siblings:
        name = file.rfilename.rsplit("/", 1)[-1]
        if SHARD_NAME.fullmatch(name) or file.rfilename == MANIFEST:
            found[name] = HubFile(file.rfilename, file.size, file.lfs.sha256 if file.lfs else None)
    if not any(SHARD_NAME.fullmatch(name) for name in found):
        raise UserError(f"--dataset-repo {repo_id}: contains no shards named NAME_{{train,val}}_NNNNNN.npy")
    return info.sha, found


def _manifest_on_hub(repo_id: str, revision: str, on_hub: dict[str, HubFile]) -> dict:
    """Return the manifest of the data set; without one, build it from the list of files."""
    from huggingface_hub import hf_hub_download

    if MANIFEST in on_hub:
        what = f"--dataset-repo {repo_id}: {MANIFEST}"
        with hub.user_errors(what):
            path = hub.with_retries(
                lambda: hf_hub_download(repo_id, MANIFEST, repo_type="dataset", revision=revision)
            )
        manifest = shards.read_manifest(Path(path), what)
        if manifest:
            return manifest
    names = shards.in_order(name for name in on_hub if name != MANIFEST)
    entries = [{"file": n, "bytes": on_hub[n].n_bytes, "sha256": on_hub[n].sha256} for n in names]
    return {"source": {"kind": "shards", "repo_id": repo_id, "revision": revision}, "shards": entries}


def _check_entry(entry: dict, file: HubFile | None, repo_id: str) -> None:
    """Raise UserError unless the Hub has the shard that a manifest lists."""
    if file is None:
        raise UserError(f"--dataset-repo {repo_id}: has no {entry['file']}, which {MANIFEST} lists")
    hashes = {entry["sha256"], file.sha256} - {None}
    if len(hashes) > 1 or entry["bytes"] != file.n_bytes:
        raise UserError(
            f"--dataset-repo {repo_id}: {entry['file']} is not the one that {MANIFEST} lists: "
            "use another --data-dir, or ask its owner to upload it again"
        )


def _download_all(
    repo_id: str, revision: str, on_hub: dict[str, HubFile], data_dir: Path, entries: list[dict]
) -> None:
    from huggingface_hub import hf_hub_url

    parts = {e["file"]: data_dir / f".{e['file']}.{(e['sha256'] or revision)[:12]}.part" for e in entries}
    for stale in set(data_dir.glob(".*.npy.*.part")) - set(parts.values()):
        stale.unlink()  # of another version of the data set
    done = sum(part.stat().st_size for part in parts.values() if part.exists())
    total = sum(entry["bytes"] for entry in entries)
    free = shutil.disk_usage(data_dir).free
    if total - done > free:
        raise UserError(
            f"--data-dir {data_dir}: {free / 1e9:.1f} GB free, the shards need {(total - done) / 1e9:.1f}: "
            "free some space, or lower --num-shards"
        )
    options = {"unit": "B", "unit_scale": True, "desc": f"{len(entries)} shards of {repo_id}"}
    with tqdm(total=total, initial=done, **options) as bar, ThreadPoolExecutor(PARALLEL_DOWNLOADS) as pool:
        running = []
        for entry in entries:
            path = on_hub[entry["file"]].path
            url = hf_hub_url(repo_id, path, repo_type="dataset", revision=revision)
            running.append(pool.submit(_download, url, data_dir, parts[entry["file"]], entry, bar))
        try:
            for download in running:
                download.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


class _NoBar(tqdm):
    """Suppresses the per-file progress bars; one bar covers the whole download."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **{**kwargs, "disable": True})


def _download(url: str, data_dir: Path, part: Path, entry: dict, bar: tqdm) -> None:
    """Fetch the rest of `part`, verify the complete file, and give it its name."""
    name, n_bytes = entry["file"], entry["bytes"]
    if part.exists() and part.stat().st_size > n_bytes:
        part.unlink()
    with hub.user_errors(name, "run the same command again to continue"):
        # The client itself retries on the other statuses.
        hub.with_retries(lambda: _continue_download(url, part, n_bytes, bar), retry_on=hub.SERVER_ERRORS)
    if entry["sha256"] and files.sha256_of(part) != entry["sha256"]:
        part.unlink()
        raise UserError(
            f"{name}: arrived with another SHA-256 than the Hub lists: run the same command again"
        )
    try:
        shards.open_shard(part)
    except UserError:
        part.unlink()
        raise
    files.flush_to_disk(part)
    files.replace(part, data_dir / name)


def _continue_download(url: str, part: Path, n_bytes: int, bar: tqdm) -> None:
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    with open(part, "ab") as file:
        http_get(
            url,
            CallbackIOWrapper(bar.update, file, "write"),
            resume_size=file.tell(),
            headers={**build_hf_headers(), "Accept-Encoding": "identity"},
            expected_size=n_bytes,
            tqdm_class=_NoBar,
        )


# ---------------------------------------------------------------- script


@dataclass
class Settings:
    dataset_repo: str = PRESETS["gpt2-124m"].dataset_repo
    """Data set of token shards on the Hub, USER/NAME."""
    data_dir: Path = PRESETS["gpt2-124m"].data_dir
    """Folder for the shards."""
    num_shards: int = 0
    """Fetch only the first N shards, including the validation shard. 0: all."""


def main() -> None:
    s = cli.parse(Settings, "Fetch token shards ahead of training, and verify those already there.")
    fetch(s.dataset_repo, s.data_dir, s.num_shards)
    found = [shard for split in shards.find_shards(s.data_dir, s.num_shards).values() for shard in split]
    manifest = shards.read_manifest(s.data_dir / MANIFEST) or {"shards": []}
    hashes = {entry["file"]: entry["sha256"] for entry in manifest["shards"]}
    for shard in tqdm(found, unit="shard", desc="verifying", disable=None):
        if hashes.get(shard.path.name) not in (None, files.sha256_of(shard.path)):
            raise UserError(f"{shard.path}: damaged: remove it and run the same command again")
    tokens = sum(shard.n_tokens for shard in found)
    print(f"{len(found)} shards, {tokens:,} tokens: {s.data_dir}")


if __name__ == "__main__":
    cli.run(main, must_finish=True)
