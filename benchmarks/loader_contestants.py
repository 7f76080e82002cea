"""Who takes part: the class of each and the packages it needs."""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loader_engines import Format

OURS = "sami-cache"
PEERS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "zarr-python": ("loader_formats", "ZarrFiles", ("zarr", "pyarrow")),
    "zarrs": ("loader_formats", "Zarrs", ("zarr", "zarrs", "pyarrow")),
    "tensorstore": ("loader_formats", "TensorStore", ("zarr", "tensorstore", "pyarrow")),
    "h5py": ("loader_formats", "HDF5", ("h5py", "hdf5plugin")),
    "numpy memmap": ("loader_formats", "Memmap", ("numpy",)),
    "LMDB": ("loader_formats", "LMDB", ("lmdb",)),
    "WebDataset": ("loader_streams", "WebDataset", ("webdataset",)),
    "LitData": ("loader_streams", "LitData", ("litdata", "zstd")),
    "MosaicML Streaming": ("loader_streams", "Mosaic", ("streaming",)),
    "Lance": ("loader_formats", "Lance", ("lance", "pyarrow")),
    "safetensors": ("loader_formats", "SafeTensors", ("safetensors",)),
}


CHECKED = {"zarr-python", "zarrs", "tensorstore", "h5py"}
"""Who checks the codes that are read."""
STILL_CACHED = "{:.0%} of its bytes cannot be dropped from the page cache"
SHARED_FILES = {"zarrs": "zarr-python", "tensorstore": "zarr-python"}
"""Who reads the files that another one writes."""


def missing_packages(name: str) -> list[str]:
    return [package for package in PEERS[name][2] if find_spec(package) is None]


def format_class(name: str) -> "type[Format]":
    module, kind, _ = PEERS[name]
    return getattr(import_module(module), kind)
