"""What `duplicates` leaves behind: pairs.parquet, duplicates.html with thumbnails, and the summary on the console."""

import base64
import html
import io
from collections import Counter, defaultdict
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from rich.console import Console
from rich.table import Table

from data_prep.duplicates.findings import KINDS, Findings, Pair
from data_prep.duplicates.hashing import HashedImages, ImageRow
from data_prep.images.pixels import decode_image, image_size
from data_prep.images.rejection import ImageRejected
from data_prep.images.turbo import dct_scale
from data_prep.labels.spaces import lemma
from data_prep.storage import Folder

THUMBNAIL_PX = 160
SHOWN_PER_IMAGE = 3  # pairs with the same kept image: one placeholder that is there 5,000 times must not fill the page
SHOWN_FLAT = 12

SCHEMA = pa.schema(
    [
        ("scope", pa.string()),  # against: b is in the validation set; within: b is in train too, and kept
        ("kind", pa.string()),  # exact, near, mirrored
        ("distance", pa.int16()),  # bits of the perceptual hash; of the mirror image where mirrored; 0 where exact
        *[(f"{side}_{name}", pa.string()) for side in "ab" for name in ("key", "wnid", "name")],
    ]
)

WHAT = {
    "against": ("in train and in {name}", "train", "{name}"),
    "within": ("twice in train", "left out", "kept"),
}
MEANING = {
    "exact": "The same bytes, as stored or as in the source.",
    "near": "Perceptual hashes that differ in a few bits: the same picture at another size or quality, or one alike.",
    "mirrored": "Near to the mirror image.",
}

PAGE = """\
<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Duplicates: {title}</title>
<style>
:root {{ color-scheme: light dark; --line: light-dark(#d8dce2, #363b44); --soft: light-dark(#5b6472, #9aa4b2);
  --card: light-dark(#fff, #1d2127); }}
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 1200px; padding: 1.5rem;
  background: light-dark(#f6f7f9, #14171b); color: light-dark(#1b1f24, #e6e9ee); }}
h1 {{ font-size: 1.5rem; }} h2 {{ font-size: 1.2rem; margin-top: 2.5rem; }} h3 {{ font-size: 1rem; margin-bottom: 0; }}
p, figcaption {{ color: var(--soft); }} p {{ margin: .3rem 0 .8rem; }}
table {{ border-collapse: collapse; background: var(--card); }}
th, td {{ border: 1px solid var(--line); padding: .35rem .8rem; text-align: right; }}
th:first-child, td:first-child, th:nth-child(2), td:nth-child(2) {{ text-align: left; }}
.pairs {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(350px, 1fr)); gap: .8rem; }}
.pair {{ background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .6rem; display: flex;
  gap: .6rem; flex-wrap: wrap; }}
.pair > div {{ flex-basis: 100%; font-size: .85rem; display: flex; justify-content: space-between; }}
.other {{ color: light-dark(#a33d00, #ffb27a); }}
figure {{ margin: 0; flex: 1; min-width: 0; }}
figcaption {{ font-size: .75rem; line-height: 1.35; overflow-wrap: anywhere; }}
img {{ display: block; width: 100%; height: {px}px; object-fit: contain; background: light-dark(#eceef1, #0e1013); }}
</style></head><body>
<h1>Duplicates: {title}</h1>
{body}
</body></html>
"""


def write_pairs(findings: Findings, output: Folder) -> None:
    """Write pairs.parquet (see SCHEMA)."""
    columns: dict[str, list[object]] = {name: [] for name in SCHEMA.names}
    for scope, pairs, _, rows_b in findings.scopes():
        for pair in pairs:
            a, b = findings.train_rows[pair.a], rows_b[pair.b]
            values = (scope, pair.kind, pair.distance, a.key, a.wnid, a.name, b.key, b.wnid, b.name)
            for name, value in zip(SCHEMA.names, values, strict=True):
                columns[name].append(value)
    with output.writing("pairs.parquet") as temp:
        pq.write_table(pa.table(columns, schema=SCHEMA), temp, compression="zstd")


def counts(findings: Findings) -> list[tuple[str, str, int, int, int, int]]:
    """(scope, kind, pairs, images of train to leave out, images of the other side, pairs across classes)."""
    lines = []
    for scope, pairs, _, rows_b in findings.scopes():
        for kind in KINDS if scope == "against" else KINDS[:2]:
            chosen = [pair for pair in pairs if pair.kind == kind]
            across = sum(findings.train_rows[pair.a].wnid != rows_b[pair.b].wnid for pair in chosen)
            sides = len({pair.a for pair in chosen}), len({pair.b for pair in chosen})
            lines.append((scope, kind, len(chosen), *sides, across))
    return lines


def print_summary(findings: Findings, output: Folder) -> None:
    """Print counts, what they mean, and where everything is."""
    console = Console(soft_wrap=True, highlight=False)
    table = Table(title=f"duplicates of {_title(findings)}", title_justify="left")
    for number, column in enumerate(("search", "kind", "pairs", "of train", "of the other", "across classes")):
        table.add_column(column, justify="left" if number < 2 else "right", no_wrap=True)
    for scope, kind, *numbers in counts(findings):
        table.add_row(scope, kind, *(f"{number:,}" for number in numbers))
    console.print(table)
    for sentence in sentences(findings):
        console.print(sentence, markup=False)
    for name, what in (
        ("duplicates.html", "pairs side by side"),
        ("pairs.parquet", "all pairs"),
        ("exclude.txt", f"{len(findings.excluded()):,} images to leave out of train: shard --exclude"),
    ):
        console.print(f"{output.join(name)}  {what}", markup=False)


def sentences(findings: Findings) -> list[str]:
    """The findings in words."""
    train, other = findings.train, findings.against
    told = []
    if other is not None:
        ours, theirs = ({getattr(pair, side) for pair in findings.against_pairs} for side in "ab")
        told.append(
            f"{len(theirs):,} of {len(other):,} images of {other.manifest.name} ({'+'.join(other.splits)}) are in "
            f"{train.manifest.name} ({'+'.join(train.splits)}), as {len(ours):,} of its {len(train):,} images."
        )
    if findings.searched_within:
        told.append(f"{len(findings.within_pairs):,} of {len(train):,} images of train are there in another copy.")
    flat = int(train.flat.sum())
    if flat:
        told.append(
            f"{flat:,} images of train have no content to hash (one colour); those are compared by bytes alone."
        )
    if train.undecodable:
        told.append(f"{train.undecodable:,} of them cannot be decoded: see `python -m data_prep verify`.")
    return told


def write_html(findings: Findings, output: Folder, show: int) -> None:
    """Write duplicates.html, complete in itself, with at most `show` pairs."""
    header = ("search", "kind", "pairs", "images of train", "images of the other side", "pairs across classes")
    rows = [[scope, kind, *(f"{number:,}" for number in numbers)] for scope, kind, *numbers in counts(findings)]
    cells = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    body = [f"<table><tr>{''.join(f'<th>{name}</th>' for name in header)}</tr>{cells}</table>"]
    body += [f"<p>{html.escape(sentence)}</p>" for sentence in sentences(findings)]
    within = f"within {findings.max_distance} bits"
    body.append(f"<p>Perceptual hashes (pHash, 64 bits) {within}. All pairs are in pairs.parquet.</p>")
    sections = []
    for scope, pairs, images_b, rows_b in findings.scopes():
        by_kind: dict[str, list[Pair]] = defaultdict(list)
        for pair in sorted(pairs, key=lambda pair: (pair.distance, pair.b, pair.a)):
            by_kind[pair.kind].append(pair)
        sections += [(scope, kind, by_kind[kind], images_b, rows_b) for kind in KINDS if by_kind[kind]]
    heading = ""
    left = show
    for number, (scope, kind, pairs, images_b, rows_b) in enumerate(sections):
        title, name_a, name_b = (text.format(name=images_b.manifest.name) for text in WHAT[scope])
        if title != heading:
            body.append(f"<h2>Images that are {html.escape(title)}</h2>")
            heading = title
        # Every section gets an equal share of what is left, so that none goes without.
        chosen = _few_per_image(pairs)[: -(-left // (len(sections) - number))]
        left -= len(chosen)
        more = f" Not shown: {len(pairs) - len(chosen):,}." if len(pairs) > len(chosen) else ""
        body.append(f"<h3>{kind}: {len(pairs):,}</h3><p>{MEANING[kind]}{more}</p><div class='pairs'>")
        side_a = _thumbnails(findings.train, [findings.train_rows[pair.a] for pair in chosen])
        side_b = _thumbnails(images_b, [rows_b[pair.b] for pair in chosen])
        for pair, image_a, image_b in zip(chosen, side_a, side_b, strict=True):
            a, b = findings.train_rows[pair.a], rows_b[pair.b]
            other = "" if a.wnid == b.wnid else "<span class='other'>other class</span>"
            told = kind if kind == "exact" else f"{kind}, {pair.distance} bits"
            figures = _figure(name_a, a, image_a) + _figure(name_b, b, image_b)
            body.append(f"<div class='pair'><div><span>{told}</span>{other}</div>{figures}</div>")
        body.append("</div>")
    if not sections:
        body.append("<p>No duplicates were found.</p>")
    body += _flat_section(findings.train)
    page = PAGE.format(title=html.escape(_title(findings)), px=THUMBNAIL_PX, body="\n".join(body))
    output.write("duplicates.html", page.encode())


def _title(findings: Findings) -> str:
    against = f" against {findings.against.manifest.name}" if findings.against else ""
    return f"{findings.train.manifest.name}{against}"


def _few_per_image(pairs: Sequence[Pair]) -> list[Pair]:
    seen: Counter[int] = Counter()
    few = []
    for pair in pairs:
        seen[pair.b] += 1
        if seen[pair.b] <= SHOWN_PER_IMAGE:
            few.append(pair)
    return few


def _flat_section(images: HashedImages) -> list[str]:
    numbers = images.flat.nonzero()[0]
    if not len(numbers):
        return []
    rows = list(images.rows(numbers[:SHOWN_FLAT]).values())
    figures = "".join(
        f"<div class='pair'>{_figure('train', row, data)}</div>"
        for row, data in zip(rows, _thumbnails(images, rows), strict=True)
    )
    more = f" Not shown: {len(numbers) - len(rows):,}." if len(numbers) > len(rows) else ""
    return [
        f"<h2>Images of train without content: {len(numbers):,}</h2>",
        f"<p>One colour, or not decodable. They would all be alike, so only their bytes are compared.{more}</p>",
        f"<div class='pairs'>{figures}</div>",
    ]


def _thumbnails(images: HashedImages, rows: Sequence[ImageRow]) -> list[str]:
    """A small JPEG of each image, as a data URI; '' where it cannot be decoded."""
    found = []
    for jpeg in images.dataset.read_ranges([(row.file, row.offset, row.offset + row.size) for row in rows]):
        small = io.BytesIO()
        try:
            width, height = image_size(jpeg)
            image = Image.fromarray(decode_image(jpeg, dct_scale(min(width, height) / THUMBNAIL_PX)).pixels)
        except ImageRejected:
            found.append("")
            continue
        image.thumbnail((2 * THUMBNAIL_PX, THUMBNAIL_PX))
        image.save(small, "JPEG", quality=75)
        found.append(f"data:image/jpeg;base64,{base64.b64encode(small.getvalue()).decode()}")
    return found


def _figure(side: str, row: ImageRow, data: str) -> str:
    words = lemma(row.wnid).split(",")[0]
    caption = f"<b>{html.escape(side)}</b> {html.escape(words)} ({row.wnid})<br>{html.escape(row.name)}"
    return f"<figure><img alt='{html.escape(row.name)}' src='{data}'><figcaption>{caption}</figcaption></figure>"
