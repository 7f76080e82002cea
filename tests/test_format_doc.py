"""docs/format.md is a contract: its Python runs, its tables list every field, its definitions give our digests."""

import json
import re
import warnings
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import xxhash
from blake3 import blake3
from conftest import full_cache

from sami_cache.store.cache import Cache
from sami_cache.store.commits import Sample

TEXT = (Path(__file__).parent.parent / "docs" / "format.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", TEXT, re.S)


def canonical(value: object) -> bytes:
    """As the page defines it."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode() + b"\n"


def unsealed(value: dict) -> dict:
    """The fields of a sealed object, its digest checked as the page says."""
    rest = {name: part for name, part in value.items() if name != "blake3"}
    assert value["blake3"] == blake3(canonical(rest)).hexdigest()
    return rest


@pytest.mark.parametrize(("codec", "error"), [("pca", 0.1), ("pca", 0.0003), ("int8", 0.01), ("float16", 0.01)])
@pytest.mark.parametrize("reader", ["zarr", "tensorstore"])
def test_the_decoding_snippets_run_and_agree_with_us(tmp_path: Path, reader: str, codec: str, error: float) -> None:
    cache = full_cache(tmp_path / "c.zarr", codec=codec, error=error, chunk_samples=4)
    decoding = SNIPPETS[0].split("n, kept", 1)
    names: dict = {"path": str(cache.path)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zarr warns of the folders that are no arrays
        exec(SNIPPETS[0] if reader == "zarr" else f"import numpy as np\n{SNIPPETS[1]}\nn, kept{decoding[1]}", names)
    expected = cache.codec.decode(cache.read_codes(0)[:8])
    assert len(names["embeddings"]) == (cache.samples if reader == "zarr" else 8)
    np.testing.assert_allclose(names["embeddings"][:8], expected, rtol=0, atol=1e-4)


def test_there_is_a_snippet_for_each_stock_reader() -> None:
    assert ["zarr.open_group" in snippet for snippet in SNIPPETS] == [True, False]
    assert ["driver" in snippet for snippet in SNIPPETS] == [False, True]


def documented(heading: str) -> set[str]:
    """The fields in the first column of the table under a heading."""
    section = TEXT.split(f"\n## {heading}", 1)[1].split("\n## ", 1)[0]
    return {
        name for line in section.splitlines() if line.startswith("| `") for name in re.findall(r"`([^`]+)`", line.split("|")[1])
    }


def test_every_field_is_documented(cache: Cache) -> None:
    assert documented("The head") - {"identity.view"} == set(unsealed(cache.attributes))
    record = unsealed(json.loads(cache.record_path(1).read_bytes()))
    columns = {f".{name}" for name in record["samples"]}
    assert documented("A commit record") == set(record) | columns
    assert columns == {f".{field.name}" for field in fields(Sample)}
    root = unsealed(json.loads((cache.path / "ROOT.json").read_bytes()))
    section = TEXT.split("## The seal", 1)[1].split("\n## ", 1)[0]
    for name in root:
        assert f"`{name}" in section
    for name in cache.attributes["codec"]:
        assert f"`{name}`" in TEXT


def test_the_tree_lists_every_file(cache: Cache) -> None:
    tree = TEXT.split("```\n", 1)[1].split("```", 1)[0]
    for file in cache.path.rglob("*"):
        name = re.sub(r"codes/\d", "codes/3", re.sub(r"0000\d\d", "000003", str(file.relative_to(cache.path))))
        assert name in tree or name.split("/")[0] + "/" in tree, name


def test_json_is_canonical_and_seals_and_ids_are_what_the_page_says(cache: Cache) -> None:
    for file in cache.path.rglob("*.json"):
        assert canonical(json.loads(file.read_bytes())) == file.read_bytes()
    head = unsealed(json.loads((cache.path / "zarr.json").read_bytes())["attributes"]["sami_cache"])
    essence = {name: head[name] for name in ("format", "identity", "codec", "layout", "samples", "listing")}
    assert head["cache_id"] == blake3(canonical(essence)).hexdigest()
    listing = cache.listing.to_pydict()
    assert head["listing"] == blake3(canonical([listing["key"], listing["label"]])).hexdigest()
    for name, digest in head["codec"]["arrays"].items():
        assert digest == blake3(getattr(cache.codec, name).astype("<i4" if name == "index" else "<f4").tobytes()).hexdigest()
    for name, entry in head["files"].items():
        data = (cache.path / name).read_bytes()
        digests = {"blake3": blake3(data).hexdigest(), "xxh3_128": xxhash.xxh3_128_hexdigest(data)}
        assert entry == {"size": len(data), **digests}


def test_the_roots_are_what_the_page_says(cache: Cache) -> None:
    def merkle(digests: list[str]) -> str:
        level = [blake3(b"\0" + bytes.fromhex(digest)).digest() for digest in digests]
        while len(level) > 1:
            pairs = [level[start : start + 2] for start in range(0, len(level), 2)]
            level = [blake3(b"\1" + b"".join(pair)).digest() if len(pair) == 2 else pair[0] for pair in pairs]
        count = len(digests).to_bytes(8, "big")
        return blake3(b"\2" + bytes.fromhex(cache.cache_id) + count + b"".join(level)).hexdigest()

    records = [json.loads(file.read_bytes()) for file in sorted((cache.path / "commits").iterdir())]
    root = json.loads((cache.path / "ROOT.json").read_bytes())
    assert root["root"] == merkle([record["blake3"] for record in records])
    assert root["content_root"] == merkle([record["content"] for record in records])
    for shard, record in enumerate(records):
        assert record["content"] == blake3(cache.read_codes(shard).tobytes()).hexdigest()


def test_the_page_stays_short() -> None:
    assert len(TEXT.splitlines()) < 200
