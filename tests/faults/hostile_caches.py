"""Hostile caches, weights and checkpoints from a seed: consistent with their own digests, and still lying."""

import io
import json
import os
import pickle
import random
import shutil
import struct
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from blake3 import blake3
from conftest import reseal_head
from hostile_images import good_images, mutate

from sami_cache.store.files import canonical_json, digest, seal
from sami_cache.store.head import ESSENCE, metadata_files
from sami_cache.store.shards import ShardLayout

HUGE = 1 << 62
FOLDERS = ("codes", "commits", "images", "tmp", "quarantine")


def values(outside: Path) -> list[Any]:
    """What a field may be set to."""
    nested: Any = 1
    for _ in range(300):
        nested = [nested]
    climbs = [
        "../../x",
        "../" * 40 + str(outside).lstrip("/") + "/x",
        f"{outside}/x",
        "/dev/zero",
        "a\0b",
        "\ud800",
        "\x1b[2J\n",
        "",
    ]
    return [
        HUGE,
        -HUGE,
        1 << 31,
        1 << 20,
        10**30,
        0,
        -1,
        1,
        0.5,
        1e308,
        True,
        None,
        [],
        {},
        "x" * 1_000_000,
        nested,
        [HUGE] * 3,
        *climbs,
    ]


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value[:20]) if isinstance(value, list) else ()
    return [path, *(place for name, child in inner for place in _places(child, (*path, name)))]


def _change(rng: random.Random, value: Any, outside: Path) -> None:
    """One place somewhere in `value` gets another value, another name, or goes away."""
    place = rng.choice([place for place in _places(value) if place])
    for name in place[:-1]:
        value = value[name]
    how = rng.random()
    if how < 0.1:
        del value[place[-1]]
    elif how < 0.2 and isinstance(value, dict):
        value[str(rng.choice(values(outside)))[:300]] = value.pop(place[-1])
    else:
        value[place[-1]] = rng.choice(values(outside))


def _sealed(value: dict[str, Any]) -> bytes:
    return canonical_json(seal({name: item for name, item in value.items() if name != "blake3"}))


def forge_head(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Edit the head so that it, the metadata that follows from it, records and root all agree with it."""
    attributes = json.loads((path / "zarr.json").read_bytes())["attributes"]["sami_cache"]
    edit(attributes)
    try:
        codec, layout, grid = attributes["codec"], attributes["layout"], attributes["identity"]["grid"]
        shape = (codec["kept"], grid // codec["block"], grid // codec["block"])
        numbers = {name: layout[name] for name in ("shard_samples", "chunk_samples")}
        files = metadata_files(
            ShardLayout(sample_shape=shape, dtype=codec["dtype"], **numbers),
            attributes["samples"],
            codec,
        )
        for name, data in files.items():
            (path / name).write_bytes(data)
            attributes["files"][name] = {"size": len(data), "blake3": digest(data)}
    except (ArithmeticError, LookupError, TypeError, ValueError):
        pass  # no metadata follows from it; the head stands alone
    attributes["cache_id"] = digest(canonical_json({name: attributes.get(name) for name in ESSENCE}))
    reseal_head(path, **attributes, **{name: ... for name in ESSENCE if name not in attributes})
    for file in (path / "commits").iterdir():
        file.write_bytes(_sealed(json.loads(file.read_bytes()) | {"cache_id": attributes["cache_id"]}))
    root = json.loads((path / "ROOT.json").read_bytes())
    (path / "ROOT.json").write_bytes(_sealed(root | {"cache_id": attributes["cache_id"]}))


@lru_cache
def _many_rows() -> bytes:
    """A listing of a hundred million rows that are nothing: a few kilobytes."""
    sink = io.BytesIO()
    rows = pa.table({"key": pa.nulls(1_000_000, pa.string()), "label": pa.nulls(1_000_000, pa.int64())})
    with pq.ParquetWriter(sink, rows.schema, compression="zstd") as writer:
        for _ in range(100):
            writer.write_table(rows)
    return sink.getvalue()


def _forge_table(rng: random.Random, path: Path) -> None:
    """Another listing or manifest, whose digest the head or the root states."""
    name = rng.choice(("listing.parquet", "manifest.parquet"))
    data = rng.choice((_many_rows(), mutate(rng, (path / name).read_bytes(), b"PAR1")))
    (path / name).write_bytes(data)
    entry = {"size": len(data), "blake3": digest(data)}
    if name == "listing.parquet":
        forge_head(path, lambda attributes: attributes["files"].update({name: entry}))
    else:
        (path / "ROOT.json").write_bytes(_sealed(json.loads((path / "ROOT.json").read_bytes()) | {"manifest": entry}))


def _forge_numbers(rng: random.Random, path: Path) -> None:
    """Another number of samples, another cut into shards, or a grid that no memory holds."""
    samples = rng.choice((HUGE, HUGE - 1, 1 << 31, 1 << 24, 1 << 10, 0, -8, 23, 25))
    cut = {"shard_samples": rng.choice((HUGE, 1 << 15, 0, -8)), "chunk_samples": rng.choice((HUGE, 1 << 15, 0, -1, 1))}
    grid = rng.choice((HUGE, 1 << 20, 1 << 12, 0, -4))
    edits: list[Callable[[dict[str, Any]], None]] = [
        lambda attributes: attributes.update(samples=samples),
        lambda attributes: attributes.update(layout=cut),
        lambda attributes: attributes["identity"].update(grid=grid),
        lambda attributes: attributes["codec"].update({rng.choice(("kept", "directions", "block")): grid}),
    ]
    forge_head(path, rng.choice(edits))


def hostile_cache(rng: random.Random, good: Path, path: Path, outside: Path) -> str:
    """A hostile copy of the cache `good` at `path`; returns what was done to it."""
    shutil.copytree(good, path)

    def numbers() -> None:
        _forge_numbers(rng, path)

    def table() -> None:
        _forge_table(rng, path)

    def head() -> None:
        forge_head(path, lambda attributes: _change(rng, attributes, outside))

    def provenance() -> None:
        make_weights(rng, outside / "seen.pth", outside)
        data = rng.choice(("/dev", "/proc/self/fd", str(outside), "\0", "\ud800"))
        forge_head(path, lambda attributes: attributes["provenance"].update(weights=str(outside / "seen.pth"), data=data))

    def sealed() -> None:
        file = rng.choice([*sorted((path / "commits").iterdir()), path / "ROOT.json"])
        value = json.loads(file.read_bytes())
        for _ in range(rng.choice((1, 1, 3))):
            _change(rng, value, outside)
        file.write_bytes(_sealed(value))
        if rng.random() < 0.3:
            (path / "ROOT.json").unlink()

    def text() -> None:
        file = rng.choice([path / "zarr.json", path / "ROOT.json", *sorted((path / "commits").iterdir())])
        data = file.read_bytes()
        whole = (b"[" * 100_000, b'{"a":' * 50_000, b"\xff" * 9, b"NaN", b"1" * 5000, data.replace(b":0", b":NaN"), data * 2)
        file.write_bytes(rng.choice((*whole, mutate(rng, data, data), mutate(rng, data, data))))

    def anything() -> None:
        file = rng.choice([file for file in sorted(path.rglob("*")) if file.is_file()])
        file.write_bytes(mutate(rng, file.read_bytes(), good_images()["zstd.tif"]))

    def no_file() -> None:
        file = rng.choice([file for file in sorted(path.rglob("*")) if file.is_file()])
        file.unlink()
        how = rng.choice(("fifo", "folder", "/dev/zero", "/dev/full", str(outside / "canary"), file.name, "nowhere"))
        if how == "fifo":
            os.mkfifo(file)
        elif how == "folder":
            file.mkdir()
        else:
            file.symlink_to(how)

    def folder_link() -> None:
        name = rng.choice(FOLDERS)
        if (path / name).exists():
            shutil.copytree(path / name, outside / name, dirs_exist_ok=True)
            shutil.rmtree(path / name)
        (outside / name).mkdir(exist_ok=True)
        (path / name).symlink_to(outside / name)
        if rng.random() < 0.7:  # something that a resumed extraction and a repair write again
            for file in (path / "commits" / "000001.json", path / "ROOT.json"):
                file.unlink()

    kinds = (head, head, head, provenance, sealed, sealed, numbers, numbers, table, text, anything, no_file, folder_link)
    change = rng.choice(kinds)
    change()
    return change.__name__


# Weights and checkpoints


class Payload:
    """Pickled, a program that touches a file when it is unpickled."""

    def __init__(self, marker: Path, how: int) -> None:
        self.marker, self.how = str(marker), how

    def __reduce__(self) -> tuple[Any, ...]:
        touch = f"open({self.marker!r}, 'w').close()"
        return ((os.system, (f"touch '{self.marker}'",)), (exec, (touch,)), (eval, (touch,)), (os.mkdir, (self.marker,)))[
            self.how
        ]


def make_weights(rng: random.Random, path: Path, outside: Path) -> None:
    """A file at `path` that torch.load would take, with a payload in it."""
    payload = Payload(outside.parent / "markers" / f"{path.parent.name}-{path.name}", rng.randrange(4))
    protocol = rng.randrange(6)
    content = rng.choice(
        (payload, {"a": payload}, {"state_dict": {"a": torch.zeros(2), "b": payload}}, OrderedDict(x=[payload]))
    )
    raw = pickle.dumps(content, protocol)
    how = rng.randrange(6)
    if how == 0:
        path.write_bytes(raw)
    elif how in (1, 2):
        torch.save(content, path, _use_new_zipfile_serialization=how == 1, pickle_protocol=max(2, protocol))
    elif how == 3:  # as torch wrote before 0.1.10
        with tarfile.open(path, "w") as tar:
            for name in ("sys_info", "pickle", "storages", "tensors"):
                info = tarfile.TarInfo(name)
                info.size = len(raw)
                tar.addfile(info, io.BytesIO(raw))
    else:
        with zipfile.ZipFile(path, "w", rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as file:
            for name in ("data.pkl", "version", "byteorder", *(("constants.pkl", "code/x.py") if how == 5 else ())):
                file.writestr(f"archive/{name}", raw)
            file.writestr("archive/../../x", raw)


def hostile_weights(rng: random.Random, folder: Path, outside: Path) -> Path:
    """One hostile file or folder of weights below `folder`; returns it."""
    folder.mkdir()
    kind = rng.randrange(10)
    if kind < 4:
        path = folder / rng.choice(("a.pth", "a.pt", "a.bin", "a.ckpt", "a.safetensors"))
        make_weights(rng, path, outside)
        return path
    if kind == 4:
        path = folder / "a.pth"
        torch.save({"a": torch.zeros(100)}, path, _use_new_zipfile_serialization=rng.random() < 0.5)
        path.write_bytes(mutate(rng, path.read_bytes(), b"\x80\x02" * 50))
        return path
    if kind < 8:
        path = folder / "a.safetensors"
        path.write_bytes(_safetensors(rng))
        return path
    if kind == 8:
        path = folder / rng.choice(("a.pth", "a.safetensors"))
        target = rng.choice(("fifo", "/dev/zero", "/dev/full", "nowhere", path.name))
        if target == "fifo":
            os.mkfifo(path)
        else:
            path.symlink_to(target)
        return path
    names = rng.choice(
        ([f"{outside}/canary"], ["../a.pth"], ["x/../../a"], [".."], ["."], [""], [None, 1], [["a"]], ["a\0b"], ["n" * 5000])
    )
    index = json.dumps({"weight_map": {str(number): name for number, name in enumerate(names)}})
    text = rng.choice((index, index, index, "[" * 100_000, '{"weight_map":' * 50_000, '{"weight_map": 7}', "\ud800", "NaN"))
    (folder / "model.safetensors.index.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    return folder


def _safetensors(rng: random.Random) -> bytes:
    number = rng.choice((HUGE, -1, (1 << 64) - 1, 0, 1 << 40, 1.5, None, "8"))
    header: dict[str, Any] = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    header["b"] = rng.choice(
        (
            {"dtype": "F32", "shape": [number], "data_offsets": [8, 16]},
            {"dtype": "F32", "shape": [2], "data_offsets": [8, number]},
            {"dtype": "F32", "shape": [1 << 31] * 4 + [0], "data_offsets": [8, 8]},
            {"dtype": rng.choice(("F4", "X", 7, "I64")), "shape": [2], "data_offsets": [0, 8]},
        )
    )
    text = rng.choice((json.dumps(header), json.dumps(header), "[" * 100_000, '{"a":' * 50_000, "{}", "\0")).encode()
    length = rng.choice((len(text), len(text), len(text), HUGE, (1 << 64) - 1, 99_000_000))
    data = struct.pack("<Q", length) + text + bytes(16)
    return mutate(rng, data, data) if rng.random() < 0.3 else data


def hostile_run(rng: random.Random, good: Path, path: Path, outside: Path) -> str:
    """A hostile copy of the training run `good`."""
    shutil.copytree(good, path)
    folder = next((path / "checkpoints").iterdir())
    state = json.loads((folder / "state.json").read_bytes())["state"]
    how = rng.choice(("state", "state", "state", "text", "tensors", "tensors", "no file", "name"))
    if how == "state":
        _change(rng, state, outside)
    elif how == "tensors":
        name = rng.choice(("model.safetensors", "optimizer.safetensors"))
        data = (folder / name).read_bytes()
        data = rng.choice(
            (_safetensors(rng), mutate(rng, data, data), pickle.dumps(Payload(outside.parent / "markers" / "run", 0)))
        )
        (folder / name).write_bytes(data)
        state["files"][name] = {"bytes": len(data), "blake3": blake3(data).hexdigest()}
    text = json.dumps(state, sort_keys=True).encode()
    (folder / "state.json").write_text(json.dumps({"state": state, "blake3": blake3(text).hexdigest()}))
    if how == "text":
        target = rng.choice((folder / "state.json", path / "config.json"))
        data = target.read_bytes()
        target.write_bytes(rng.choice((b"[" * 100_000, b'{"state":' * 50_000, b"NaN", mutate(rng, data, data))))
    elif how == "no file":
        target = rng.choice((folder / "state.json", folder / "model.safetensors", path / "config.json"))
        target.unlink()
        if rng.random() < 0.4:
            os.mkfifo(target)
        else:
            target.symlink_to(rng.choice(("/dev/zero", str(outside / "canary"), target.name, "/dev/full")))
    elif how == "name":
        folder.rename(folder.with_name(rng.choice(("step-" + "9" * 200, "step-٣", "step-00000000", "step-x"))))
    return how
