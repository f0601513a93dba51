"""The `duplicates` command: the same or nearly the same image twice in train, or in train and in a validation set.

Exact: the same JPEG bytes, as stored or, where a ledger tells, as in the source. Near: perceptual hashes (pHash, 64
bits) that differ in at most --max-distance bits. Mirrored: near to the mirror image. What is found is listed, shown,
and made a list that `shard --exclude` leaves out.

pHash sees gray levels at 32 x 32 pixels: it survives other sizes, qualities and slight changes of brightness, but finds
few crops, and takes drawings that differ only in colour or in small parts for the same. Look at the report first.
"""

import argparse
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tqdm import tqdm

from data_prep.cluster import Cluster, add_cluster_arguments, open_cluster
from data_prep.duplicates.exclusions import exclusion_text
from data_prep.duplicates.findings import KINDS, Findings, Pair
from data_prep.duplicates.hamming import near_pairs, near_pairs_within
from data_prep.duplicates.hashing import (
    HASHES,
    DuplicateError,
    HashedImages,
    ImageRow,
    hash_shard,
    hash_tasks,
    leading_bytes,
)
from data_prep.duplicates.report import print_summary, write_html, write_pairs
from data_prep.ledger import LEDGER_NAME
from data_prep.manifest import Manifest, dataset_folder
from data_prep.storage import Folder, is_url, open_binary, refuse_unwritable, user_path
from data_prep.writer import sole_writer

# pHash sets 32 of its bits, one of them always, so distances are even. Measured on 400 crops of photos: encoding at
# quality 30 or 50, halving, and shrinking to 256 pixels moved 99.5 % of them by at most 4 bits; cutting 2 % off the
# left and the top, 65 %; cutting 5 % off, 6 %. By chance, 14 M unlike hashes make about 25 pairs within 4 bits and
# 2,400 within 6; images, whose hashes are not spread evenly, make more.
MAX_DISTANCE = 4
LEAK_EXIT = 3


def find_within(images: HashedImages, max_distance: int) -> tuple[list[Pair], dict[int, ImageRow]]:
    """Duplicates inside one set. The first by key is kept; every other one is in exactly one pair, with one kept.

    Images are not chained: one is left out only when it is itself within `max_distance` of one that is kept.
    """
    content = np.flatnonzero(~images.flat)
    hashes, node_of, sizes = np.unique(images.plain[content], return_inverse=True, return_counts=True)
    one, other, distance = near_pairs_within(hashes, max_distance)
    # A node is all images of one hash; most nodes are of one image and near to none: they never leave numpy.
    involved = np.zeros(len(hashes), dtype=bool)
    involved[sizes > 1] = involved[one] = involved[other] = True
    chosen = np.flatnonzero(involved[node_of])
    flat = np.flatnonzero(images.flat)
    _, flat_digest, flat_sizes = np.unique(images.digest[flat], return_inverse=True, return_counts=True)
    flat_twice = flat[flat_sizes[flat_digest] > 1]
    rows = images.rows(np.concatenate([content[chosen], flat_twice]))

    nodes: dict[int | bytes, list[int]] = defaultdict(list)
    for node, number in zip(node_of[chosen].tolist(), content[chosen].tolist(), strict=True):
        nodes[node].append(number)
    for number in flat_twice.tolist():  # those are equal only where their bytes are
        nodes[rows[number].sha256].append(number)
    for members in nodes.values():
        members.sort(key=lambda number: rows[number].key)
    near: dict[int | bytes, list[tuple[int, int]]] = defaultdict(list)
    for left, right, bits in zip(one.tolist(), other.tolist(), distance.tolist(), strict=True):
        near[left].append((bits, right))
        near[right].append((bits, left))

    pairs, kept = [], set()
    for node, members in sorted(nodes.items(), key=lambda item: rows[item[1][0]].key):
        first = members[0]
        nearest = min(((bits, nodes[to][0]) for bits, to in near.get(node, ()) if to in kept), default=None)
        if nearest is not None:
            pairs += [Pair(number, nearest[1], nearest[0], "near") for number in members]
            continue
        kept.add(node)
        for number in members[1:]:
            kind = "exact" if rows[number].sha256 == rows[first].sha256 else "near"
            pairs.append(Pair(number, first, 0, kind))
    return pairs, rows


def find_against(
    train: HashedImages, other: HashedImages, max_distance: int
) -> tuple[list[Pair], dict[int, ImageRow], dict[int, ImageRow]]:
    """Every pair of an image of `train` and one of `other` that are duplicates, each once, by its closest kind."""
    found: dict[tuple[int, int], tuple[int, int]] = {}  # images -> (place in KINDS, distance)
    exact, train_rows, other_rows = _exact_pairs(train, other)
    for images in exact:
        found[images] = (0, 0)
    a, b = np.flatnonzero(~train.flat), np.flatnonzero(~other.flat)
    both = np.concatenate([other.plain[b], other.mirrored[b]])
    i, j, distance = near_pairs(train.plain[a], both, max_distance)
    numbers = zip(a[i].tolist(), b[j % max(1, len(b))].tolist(), (j >= len(b)).tolist(), distance.tolist(), strict=True)
    for one, two, mirrored, bits in numbers:
        as_found = (2 if mirrored else 1, bits)
        found[one, two] = min(found.get((one, two), as_found), as_found)
    train_rows |= train.rows(np.array([one for one, _ in found if one not in train_rows], dtype=np.int64))
    other_rows |= other.rows(np.array([two for _, two in found if two not in other_rows], dtype=np.int64))
    pairs = [Pair(one, two, bits, KINDS[kind]) for (one, two), (kind, bits) in sorted(found.items())]
    return pairs, train_rows, other_rows


def _exact_pairs(
    train: HashedImages, other: HashedImages
) -> tuple[set[tuple[int, int]], dict[int, ImageRow], dict[int, ImageRow]]:
    """Pairs of the same bytes, stored or source; the two sets may be stored at different sizes."""
    other_rows = other.rows(np.arange(len(other)))
    owners: dict[bytes, set[int]] = defaultdict(set)
    for number, row in other_rows.items():
        owners[row.sha256].add(number)
    by_place = {(row.file, row.key): number for number, row in other_rows.items()}
    for place, sha256 in _source_digests(other, None):
        if place in by_place:
            owners[sha256].add(by_place[place])
    known = np.frombuffer(b"".join(owners), np.uint8).reshape(-1, 32)
    candidates = np.flatnonzero(np.isin(train.digest, leading_bytes(known)))
    train_rows = train.rows(candidates)
    pairs = {(number, owner) for number, row in train_rows.items() for owner in owners.get(row.sha256, ())}
    in_file: dict[str, dict[str, bytes]] = defaultdict(dict)
    for (file, key), sha256 in _source_digests(train, owners):
        in_file[file][key] = sha256
    for file, digests in in_file.items():
        for number, key in train.numbers_of(file, list(digests)):
            pairs |= {(number, owner) for owner in owners[digests[key]]}
    return pairs, train_rows, other_rows


def _source_digests(images: HashedImages, wanted: Iterable[bytes] | None) -> Iterator[tuple[tuple[str, str], bytes]]:
    """((shard, key), SHA-256 of the source's bytes) from the ledger, those `wanted`; nothing where there is none."""
    if not images.dataset.exists(LEDGER_NAME):
        return
    hexadecimal = None if wanted is None else pa.array([digest.hex() for digest in wanted], pa.string())
    with open_binary(images.dataset.join(LEDGER_NAME)) as file:
        for batch in pq.ParquetFile(file).iter_batches(columns=["split", "shard", "key", "sha256"]):
            keep = pc.is_in(batch["split"], value_set=pa.array(images.splits))
            if hexadecimal is not None:
                keep = pc.and_(keep, pc.is_in(batch["sha256"], value_set=hexadecimal))
            for row in batch.filter(keep).to_pylist():
                if row["key"] and row["sha256"]:
                    yield (row["shard"], row["key"]), bytes.fromhex(row["sha256"])


def hashed_images(cluster: Cluster, dataset: Folder, splits: Sequence[str], output: Folder) -> HashedImages:
    """Hash what has not been hashed before, with a progress bar, and load the hashes of all."""
    manifest = Manifest.load(dataset.url)
    cache = output.folder(HASHES)
    shards = [shard for split in splits for shard in manifest.split(split).shards]
    tasks = hash_tasks(dataset, manifest, shards, cache)
    done = set(cache.names("*.npz"))
    missing = [task for task in tasks if task.target not in done]
    with tqdm(
        desc=f"hashes of {manifest.name}",
        unit="image",
        total=sum(task.samples for task in tasks),
        initial=sum(task.samples for task in tasks) - sum(task.samples for task in missing),
        disable=None if missing else True,
    ) as progress:
        for _, samples in cluster.run(hash_shard, missing):
            progress.update(samples)
    return HashedImages(Folder(manifest.shards_folder(dataset.url)), manifest, splits, tasks)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `duplicates`."""
    parser.description = __doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("dataset", type=user_path, metavar="DATASET", help="data set folder, local or URL, whose images may have to go")
    add("--against", type=user_path, metavar="VAL", help="find images of DATASET that are in this data set (leakage)")
    add("--within", action="store_true", help="find images that are twice in DATASET")
    add("--split", default="train", help="of DATASET (%(default)s)")
    add("--against-split", metavar="SPLIT", help="of VAL (default: val where there is one, otherwise all)")
    add(
        "--max-distance",
        type=int,
        default=MAX_DISTANCE,
        metavar="BITS",
        help="how many of the 64 bits of a perceptual hash may differ; 0: same hash (default: %(default)s)",
    )
    add(
        "--output",
        type=user_path,
        metavar="DIR",
        help="folder of the report (default: DATASET/duplicates; a URL needs one given)",
    )
    add("--show", type=int, default=400, metavar="N", help="pairs shown in the HTML report (%(default)s)")
    add("--fail-on-leak", action="store_true", help=f"exit code {LEAK_EXIT} when an image of VAL is in DATASET")
    add_cluster_arguments(parser)


def _folder(path: str) -> Folder:
    path = dataset_folder(path)
    return Folder(path if is_url(path) else os.path.abspath(path))  # workers may stand in another folder


def run(args: argparse.Namespace) -> int:
    """Find, write the report, the pairs and the exclusion list, print the summary. Raises DuplicateError."""
    if not (args.against or args.within):
        raise DuplicateError("nothing to compare: give --against VAL, --within, or both")
    if not 0 <= args.max_distance <= 16:
        raise DuplicateError(
            f"--max-distance {args.max_distance} is not in 0..16: unlike images differ in about 30 bits"
        )
    dataset = _folder(args.dataset)
    if args.output is None and not dataset.is_local:
        raise DuplicateError(f"{dataset.url} is a URL: say with --output where the report is to go")
    output = _folder(args.output) if args.output else dataset.folder("duplicates")
    Manifest.load(dataset.url).split(args.split)
    against_splits: list[str] = []
    if args.against:
        splits = Manifest.load(args.against)
        against_splits = [args.against_split] if args.against_split else ["val"] if "val" in splits.splits else []
        against_splits = against_splits or sorted(splits.splits)
        splits.split(against_splits[0])
        if Manifest.load(dataset.url).dataset_id == splits.dataset_id and args.split in against_splits:
            raise DuplicateError(f"split {args.split} would be compared with itself: use --within, or --against-split")
    refuse_unwritable(output, "say with --output where the report is to go")
    with sole_writer(output):
        return _search(args, dataset, against_splits, output)


def _search(args: argparse.Namespace, dataset: Folder, against_splits: Sequence[str], output: Folder) -> int:
    with open_cluster(args) as cluster:
        train = hashed_images(cluster, dataset, [args.split], output)
        other = hashed_images(cluster, _folder(args.against), against_splits, output) if args.against else None
    findings = Findings(train, other, args.max_distance, searched_within=args.within)
    if other is not None:
        findings.against_pairs, findings.train_rows, findings.against_rows = find_against(
            train, other, args.max_distance
        )
    if args.within:
        findings.within_pairs, rows = find_within(train, args.max_distance)
        findings.train_rows |= rows
    write_pairs(findings, output)
    write_html(findings, output, args.show)
    use = "WordNet id and name: python -m data_prep shard ... --exclude THIS_FILE"
    if train.manifest.settings.get("indexed"):
        use = "WordNet id and key: tars of others stay as they are, write them anew without these"
    comments = [
        f"images to leave out of train, {use}",
        f"made by: python -m data_prep duplicates; data set {train.manifest.name} ({train.manifest.dataset_id[:12]}), "
        f"split {args.split}",
        *(
            [f"against {other.manifest.name} ({other.manifest.dataset_id[:12]}), {'+'.join(against_splits)}"]
            if other
            else []
        ),
        *(["within: the first by key of each group is kept"] if args.within else []),
        f"perceptual hashes within {args.max_distance} bits; {len(findings.excluded()):,} images",
    ]
    output.write("exclude.txt", exclusion_text(findings.excluded(), comments).encode())
    print_summary(findings, output)
    return LEAK_EXIT if args.fail_on_leak and findings.against_pairs else 0
