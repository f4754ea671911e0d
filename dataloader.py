"""Token shards: fetched from the Hub, checked, and read as batches in one global order.

    python dataloader.py --num-shards 10     # fetch ahead what train_gpt2.py would fetch by itself

A shard is a file NAME_{train,val}_NNNNNN.npy: one-dimensional uint16, each document preceded by 50256.
The shards of a split make up one endless stream of sequences that is a pure function of (data, seed,
epoch). Step s of training takes sequences s·N to (s+1)·N of it, however many processes share them out; so
a run can be continued on another number of GPUs from nothing but its step, and no rank can drift.
"""

import functools
import hashlib
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from tqdm.utils import CallbackIOWrapper

import cli
import hub
from cli import UserError
from pre_tokens import shards as shard_files
from pre_tokens.shards import MANIFEST, SHARD_NAME
from tokenizer import VOCAB_SIZE

Split = Literal["train", "val"]
SPOT_CHECK_TOKENS = 2**20
PARALLEL_DOWNLOADS = 4


@dataclass(frozen=True)
class Shard:
    path: Path
    offset: int  # bytes before the first token
    n_tokens: int

    def map(self) -> np.ndarray:
        """The tokens, uint16 (n_tokens,), as a memory map: only what is read gets into memory."""
        try:
            return np.memmap(self.path, np.uint16, "r", self.offset, (self.n_tokens,))
        except (OSError, ValueError) as error:
            raise UserError(
                f"{self.path}: gone or cut short while in use: restore it and --resume"
            ) from error


def open_shard(path: Path) -> Shard:
    """Check a shard's header, its length and the ids at both ends.

    Raises UserError where it is not a whole npy file of one-dimensional uint16 ids below 50257.
    """
    try:
        with open(path, "rb") as file:
            version = np.lib.format.read_magic(file)
            read_header = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }[version]
            shape, _, dtype = read_header(file)
            offset = file.tell()
        size = path.stat().st_size
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): check --data-dir") from error
    except Exception as error:  # numpy's parser stumbles over a damaged header in many ways
        raise UserError(f"{path}: not a npy file, or a damaged one: fetch or build it again") from error
    if dtype != np.dtype("<u2"):
        raise UserError(f"{path}: holds {dtype}, not uint16: build it again with pre_tokens/handle_tokens.py")
    if len(shape) != 1:
        raise UserError(f"{path}: has {len(shape)} dimensions, not 1: build it again")
    if shape[0] == 0:
        raise UserError(f"{path}: is empty: fetch or build it again")
    if size != offset + 2 * shape[0]:
        raise UserError(
            f"{path}: {size} bytes where its header says {offset + 2 * shape[0]}: fetch or build it again"
        )
    shard = Shard(path, offset, shape[0])
    tokens = shard.map()
    for part in (tokens[:SPOT_CHECK_TOKENS], tokens[-SPOT_CHECK_TOKENS:]):
        _check_ids(part, path)
    return shard


def _check_ids(tokens: np.ndarray, path: Path) -> None:
    largest = int(tokens.max())
    if largest >= VOCAB_SIZE:
        raise UserError(f"{path}: holds id {largest}, GPT-2's end at {VOCAB_SIZE - 1}: build it again")


def find_shards(data_dir: Path, num_shards: int = 0) -> dict[Split, list[Shard]]:
    """The folder's shards by split, each split in order of name and number, all of them checked.

    num_shards: use only the first so many by number, the validation shard included; 0: all.
    Raises UserError where the folder, the training shards or the validation shards are missing.
    """
    if not data_dir.is_dir():
        raise UserError(f"{data_dir}: no such folder: name one that holds shards with --data-dir")
    names = shard_files.in_order(path.name for path in data_dir.iterdir() if SHARD_NAME.fullmatch(path.name))
    shards: dict[Split, list[Shard]] = {"train": [], "val": []}
    for name in sorted(names[: num_shards or None]):
        shards[SHARD_NAME.fullmatch(name)["split"]].append(open_shard(data_dir / name))
    for split, found in shards.items():
        if not found:
            among = f" among the first {num_shards} (--num-shards)" if num_shards else ""
            raise UserError(
                f"{data_dir}: no shard named NAME_{split}_NNNNNN.npy{among}: check --data-dir, or build "
                "shards with pre_tokens/handle_tokens.py"
            )
    return shards


# ---------------------------------------------------------------- from the Hub


def fetch(repo_id: str, data_dir: Path, num_shards: int = 0) -> None:
    """Make `data_dir` hold the first `num_shards` shards (0: all) of a data set on the Hub.

    What is there stays; a broken download goes on where it broke. Each file's length and sha256 are compared
    with what the Hub and the data set's manifest say before it gets its name. The folder keeps a manifest of
    the whole data set, so that a later call needs no network to see that nothing is missing. A folder of
    other shards is left as it is.
    Raises UserError where shards are missing and cannot be had, or are not what they should be.
    """
    manifest = shard_files.read_manifest(data_dir / MANIFEST)
    if manifest and manifest.get("next"):
        raise UserError(
            f"--data-dir {data_dir}: half built: run pre_tokens/handle_tokens.py again to complete it"
        )
    if manifest and not shard_files.missing(data_dir, manifest, num_shards):
        return
    held = _shard_names(data_dir)
    try:
        revision, on_hub = _list_hub(repo_id)
    except UserError as error:
        if manifest or not held:
            raise
        print(f"note: {data_dir} is taken as it is, whole or not: {error}")
        return
    if manifest is None:
        if held - set(on_hub):
            return
        manifest = _manifest_on_hub(repo_id, revision, on_hub)
    for entry in manifest["shards"]:
        _compare(entry, on_hub.get(entry["file"]), repo_id)
    with shard_files.lock(data_dir):
        shard_files.write_manifest(data_dir, manifest)
        _download_all(
            repo_id, revision, on_hub, data_dir, shard_files.missing(data_dir, manifest, num_shards)
        )


def _shard_names(folder: Path) -> set[str]:
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    return {name for name in names if SHARD_NAME.fullmatch(name)}


@dataclass(frozen=True)
class HubFile:
    path: str  # in the repository
    n_bytes: int
    sha256: str | None  # the Hub knows it of large files only


def _list_hub(repo_id: str) -> tuple[str, dict[str, HubFile]]:
    """The newest commit of a data set, and its shards and manifest by file name."""
    from huggingface_hub import HfApi

    elsewhere = "use --preset demo, or --data-dir with a folder of shards"
    with hub.explained(f"--dataset-repo {repo_id}", elsewhere):
        info = hub.patiently(lambda: HfApi().dataset_info(repo_id, files_metadata=True, timeout=30))
    files = {}
    for file in info.siblings:
        name = file.rfilename.rsplit("/", 1)[-1]
        if SHARD_NAME.fullmatch(name) or file.rfilename == MANIFEST:
            files[name] = HubFile(file.rfilename, file.size, file.lfs.sha256 if file.lfs else None)
    if not any(SHARD_NAME.fullmatch(name) for name in files):
        raise UserError(f"--dataset-repo {repo_id}: holds no shards named NAME_{{train,val}}_NNNNNN.npy")
    return info.sha, files


def _manifest_on_hub(repo_id: str, revision: str, on_hub: dict[str, HubFile]) -> dict:
    """The data set's manifest; where it has none, one of what the Hub lists."""
    from huggingface_hub import hf_hub_download

    if MANIFEST in on_hub:
        what = f"--dataset-repo {repo_id}: {MANIFEST}"
        with hub.explained(what):
            path = hub.patiently(
                lambda: hf_hub_download(repo_id, MANIFEST, repo_type="dataset", revision=revision)
            )
        manifest = shard_files.read_manifest(Path(path), what)
        if manifest:
            return manifest
    names = shard_files.in_order(name for name in on_hub if name != MANIFEST)
    entries = [{"file": n, "bytes": on_hub[n].n_bytes, "sha256": on_hub[n].sha256} for n in names]
    return {"source": {"kind": "shards", "repo_id": repo_id, "revision": revision}, "shards": entries}


def _compare(entry: dict, file: HubFile | None, repo_id: str) -> None:
    """Raise UserError unless the Hub has the shard that a manifest promises."""
    if file is None:
        raise UserError(f"--dataset-repo {repo_id}: has no {entry['file']}, which {MANIFEST} names")
    hashes = {entry["sha256"], file.sha256} - {None}
    if len(hashes) > 1 or entry["bytes"] != file.n_bytes:
        raise UserError(
            f"--dataset-repo {repo_id}: {entry['file']} is not the one that {MANIFEST} names: "
            "use another --data-dir, or ask its owner to upload it again"
        )


def _download_all(
    repo_id: str, revision: str, on_hub: dict[str, HubFile], data_dir: Path, entries: list[dict]
) -> None:
    from huggingface_hub import hf_hub_url

    parts = {e["file"]: data_dir / f".{e['file']}.{(e['sha256'] or revision)[:12]}.part" for e in entries}
    for stale in set(data_dir.glob(".*.npy.*.part")) - set(parts.values()):
        stale.unlink()  # of another version of the data set
    there = sum(part.stat().st_size for part in parts.values() if part.exists())
    total = sum(entry["bytes"] for entry in entries)
    free = shutil.disk_usage(data_dir).free
    if total - there > free:
        raise UserError(
            f"--data-dir {data_dir}: {free / 1e9:.1f} GB free, the shards need {(total - there) / 1e9:.1f}: "
            "make room, or lower --num-shards"
        )
    options = {"unit": "B", "unit_scale": True, "desc": f"{len(entries)} shards of {repo_id}"}
    with tqdm(total=total, initial=there, **options) as bar, ThreadPoolExecutor(PARALLEL_DOWNLOADS) as pool:
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
    """The client's own bar for each file, not shown: there is one for all files."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **{**kwargs, "disable": True})


def _download(url: str, data_dir: Path, part: Path, entry: dict, bar: tqdm) -> None:
    """Fetch what is missing of `part`, check the whole, and give it its name."""
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    name, n_bytes = entry["file"], entry["bytes"]

    def go_on() -> None:
        with open(part, "ab") as file:
            counted = CallbackIOWrapper(bar.update, file, "write")
            http_get(
                url,
                counted,
                resume_size=file.tell(),
                headers={**build_hf_headers(), "Accept-Encoding": "identity"},
                expected_size=n_bytes,
                tqdm_class=_NoBar,
            )

    if part.exists() and part.stat().st_size > n_bytes:
        part.unlink()
    with hub.explained(name, "run the same command again to go on"):
        hub.patiently(go_on, retry_on=hub.SERVER_TROUBLE)  # the client itself waits out the others
    if entry["sha256"] and shard_files.sha256_of(part) != entry["sha256"]:
        part.unlink()
        raise UserError(f"{name}: arrived with another sha256 than the Hub names: run the same command again")
    try:
        open_shard(part)
    except UserError:
        part.unlink()
        raise
    os.replace(part, data_dir / name)


# ---------------------------------------------------------------- batches


def fingerprint(shards: list[Shard]) -> str:
    """A short hash of the shards' names and lengths: what the order of a stream depends on."""
    text = "\n".join(f"{shard.path.name} {shard.n_tokens}" for shard in shards)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class TokenStream:
    """The endless sequence of training examples: number -> tokens, in constant memory.

    With `shuffle`, each epoch visits the shards in an order of its own and the sequences of a shard in an
    order of their own; without, all is read from the start to the end. Nothing is left out but the tail of
    a shard that is too short for a sequence.
    """

    def __init__(
        self, shards: list[Shard], sequence_length: int, seed: int = 0, shuffle: bool = False
    ) -> None:
        self.shards = shards
        self.sequence_length = sequence_length
        self.seed = seed
        self.shuffle = shuffle
        # Each sequence needs one more token, the target of its last.
        self.counts = np.array([(shard.n_tokens - 1) // sequence_length for shard in shards])
        for shard, count in zip(shards, self.counts, strict=True):
            if count == 0:
                raise UserError(
                    f"{shard.path}: {shard.n_tokens} tokens, too short for one sequence of "
                    f"{sequence_length} + 1: lower --sequence-length or remove the file"
                )

    def __len__(self) -> int:
        """Sequences an epoch."""
        return int(self.counts.sum())

    def read(self, numbers: np.ndarray) -> np.ndarray:
        """The sequences of these numbers (B,), from 0 up without end: uint16 (B, sequence_length + 1)."""
        T = self.sequence_length
        shard_of, row_of = self._locate(numbers)
        tokens = np.empty((len(numbers), T + 1), dtype=np.uint16)
        for index in np.unique(shard_of):
            shard = self.shards[index]
            # Mapped anew for each batch: a map that stays would count every page it ever touched as ours.
            mapped = shard.map()
            places = np.flatnonzero(shard_of == index)
            for place, row in zip(places, row_of[places], strict=True):
                tokens[place] = mapped[row * T : (row + 1) * T + 1]
            _check_ids(tokens[places], shard.path)
        return tokens

    def _locate(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sequence numbers -> (index of the shard, number of the sequence within it)."""
        epochs, rests = np.divmod(numbers, len(self))
        shard_of, row_of = np.empty_like(numbers), np.empty_like(numbers)
        for epoch in np.unique(epochs):
            here = np.flatnonzero(epochs == epoch)
            order = np.arange(len(self.shards))
            if self.shuffle:
                order = permute(order, len(self.shards), (self.seed, int(epoch)))
            ends = self.counts[order].cumsum()
            place = np.searchsorted(ends, rests[here], side="right")
            shard_of[here] = order[place]
            row_of[here] = rests[here] - (ends - self.counts[order])[place]
            if self.shuffle:
                for index in np.unique(shard_of[here]):
                    these = here[shard_of[here] == index]
                    key = (self.seed, int(epoch), int(index))
                    row_of[these] = permute(row_of[these], int(self.counts[index]), key)
        return shard_of, row_of


def permute(numbers: np.ndarray, n: int, key: tuple[int, ...]) -> np.ndarray:
    """Where a pseudo-random permutation of range(n), chosen by `key`, sends these numbers, int64 (k,).

    A Feistel network with cycle walking (Black & Rogaway 2002, "Ciphers with Arbitrary Finite Domains"):
    any element without the memory of a table, and the same for every version of numpy.
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    x = numbers.astype(np.uint64)
    todo = np.arange(len(x))
    while len(todo):
        left, right = x[todo] >> half, x[todo] & mask
        for round_key in _round_keys(key):
            left, right = right, left ^ (_mix(right ^ round_key) & mask)
        x[todo] = left << half | right
        # The network permutes a power of four; what falls outside range(n) walks on until it is inside.
        todo = todo[x[todo] >= n]
    return x.astype(np.int64)


@functools.lru_cache(maxsize=1024)
def _round_keys(key: tuple[int, ...]) -> np.ndarray:
    return np.random.SeedSequence(key).generate_state(8, np.uint64)


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele et al. 2014): every bit of x stirs every bit of the result."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def train_batches(
    stream: TokenStream,
    first_step: int,
    sequences_per_step: int,
    micro_batch_size: int,
    rank: int,
    world_size: int,
    device: torch.device,
) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's micro-batches from `first_step` on, without end: (x, y), each int64 (B, T) on `device`.

    A step is sequences_per_step / (B · world_size) micro-batches; each holds B sequences for every rank.
    The next one is read in the background, into pinned memory for a CUDA device.
    """
    B = micro_batch_size
    stride = B * world_size

    def load(number: int) -> tuple[Tensor, Tensor]:
        begin = first_step * sequences_per_step + number * stride + rank * B
        return _to_tensors(stream.read(np.arange(begin, begin + B)), device)

    with ThreadPoolExecutor(1, thread_name_prefix="dataloader") as pool:
        number = 0
        coming = pool.submit(load, number)
        while True:
            x, y = coming.result()
            number += 1
            coming = pool.submit(load, number)
            yield x.to(device, non_blocking=True), y.to(device, non_blocking=True)


def val_batches(
    stream: TokenStream,
    n_sequences: int,
    micro_batch_size: int,
    rank: int,
    world_size: int,
    device: torch.device,
) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's share of the first `n_sequences`: (x, y), each int64 (B, T) on `device`.

    Every batch has B rows, so that a compiled model sees one shape; where sequences run out, the rows that
    are left over have targets of -100 throughout.
    """
    mine = np.arange(rank, n_sequences, world_size)
    for begin in range(0, len(mine), micro_batch_size):
        numbers = mine[begin : begin + micro_batch_size]
        padded = np.concatenate([numbers, np.full(micro_batch_size - len(numbers), numbers[0])])
        x, y = _to_tensors(stream.read(padded), device)
        y[len(numbers) :] = -100
        yield x.to(device, non_blocking=True), y.to(device, non_blocking=True)


def _to_tensors(tokens: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """uint16 (B, T + 1) -> inputs and targets, int64 (B, T), pinned where they go to a CUDA device."""
    whole = torch.from_numpy(tokens.astype(np.int64))
    x, y = whole[:, :-1].contiguous(), whole[:, 1:].contiguous()
    return (x.pin_memory(), y.pin_memory()) if device.type == "cuda" else (x, y)


@dataclass
class FetchSettings:
    dataset_repo: str
    """A data set of token shards on the Hub, USER/NAME."""
    data_dir: Path
    """Folder for the shards."""
    num_shards: int = 0
    """Fetch the first so many, the validation shard included. 0: all."""


def main() -> None:
    from settings import PRESETS

    record = PRESETS["gpt2-124m"]
    default = FetchSettings(record.dataset_repo, record.data_dir)
    s = cli.parse(FetchSettings, "Fetch token shards ahead of training, and check those there.", default)
    fetch(s.dataset_repo, s.data_dir, s.num_shards)
    shards = [shard for split in find_shards(s.data_dir, s.num_shards).values() for shard in split]
    manifest = shard_files.read_manifest(s.data_dir / MANIFEST) or {"shards": []}
    hashes = {entry["file"]: entry["sha256"] for entry in manifest["shards"]}
    for shard in tqdm(shards, unit="shard", desc="checking", disable=None):
        if hashes.get(shard.path.name) not in (None, shard_files.sha256_of(shard.path)):
            raise UserError(f"{shard.path}: damaged: remove it and run the same command again")
    tokens = sum(shard.n_tokens for shard in shards)
    print(f"{len(shards)} shards, {tokens:,} tokens: {s.data_dir}")


if __name__ == "__main__":
    cli.run(main)
