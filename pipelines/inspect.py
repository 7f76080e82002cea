"""What a cache holds, without reading its codes: identity, counts, bytes, and the error of what is stored."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc

from sami_cache.store.cache import Cache
from sami_cache.store.commits import OK


def inspect_cache(path: Path) -> dict[str, Any]:
    """A summary of the cache at `path`, ready for JSON. Raises SamiCacheError where there is none, DamageError if damaged."""
    cache = Cache(path)
    root = cache.root()
    table = cache.table()
    status = table["status"].to_pylist()
    usable = table.filter(pc.field("status") == OK)
    error, energy = (usable[name].to_numpy() for name in ("error", "energy"))
    keys = usable["key"].to_pylist()
    order = np.argsort(-error)[:5].tolist()
    codec, parameters = cache.attributes["codec"], cache.layout
    files: dict[str, int] = {"codes": 0, "images": 0}
    for record in cache.records():
        for name, entry in record.files.items():
            files[name.split("/")[0]] += entry.size
    total, count = cache.size_on_disk(), max(1, len(usable))
    values = codec["channels"] * cache.grid**2
    return {
        "cache": str(path),
        "cache_id": cache.cache_id,
        "sealed": root is not None,
        "root": root and root["root"],
        "content_root": root and root["content_root"],
        "identity": cache.identity,
        "provenance": cache.attributes["provenance"],
        "samples": cache.samples,
        "committed": len(table),
        "usable": len(usable),
        "failures": [
            {"key": key, "reason": reason} for key, reason in zip(table["key"].to_pylist(), status, strict=True) if reason != OK
        ],
        "shards": cache.shards,
        "shard_samples": parameters.shard_samples,
        "chunk_samples": parameters.chunk_samples,
        "codes": {"dtype": codec["dtype"], "kept_channels": codec["kept"], "channels": codec["channels"], "grid": cache.grid},
        "bytes": {
            "total": total,
            "per_sample": total / count,
            "codes_per_sample": files["codes"] / count,
            "bits_per_value": 8 * files["codes"] / count / values,
            "jpeg_per_sample": files["images"] / count,
            "float16_per_sample": 2 * values,
        },
        "error": {
            "asked": codec["error"],
            "overall": float((error * energy).sum() / energy.sum()) if len(usable) else None,
            "median": float(np.median(error)) if len(usable) else None,
            "p99": float(np.quantile(error, 0.99)) if len(usable) else None,
            "worst": [{"key": keys[index], "error": float(error[index])} for index in order],
            "clipped_codes": int(np.sum(usable["clipped"].to_numpy())) if len(usable) else 0,
        },
    }
