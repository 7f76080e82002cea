"""An evaluation as text: our numbers, each with what it is under, and in a block of their own the published ones."""

from collections.abc import Iterable
from typing import Any

from pipelines.published import PUBLISHED_AP, PUBLISHED_MIOU, PublishedTable


def evaluation_text(result: dict[str, Any]) -> str:
    """Of what `pipelines.evaluate.evaluate` returns. Percent throughout."""
    model, data = result["model"], result["data"]
    pictures = f"{data['pictures']} pictures" + (f" (of {data['of']})" if data["pictures"] != data["of"] else "")
    left_out = [
        f"{data[key]} {what}"
        for key, what in (("crowd_dropped", "crowds dropped"), ("empty_left_out", "empty masks left out"))
        if data[key]
    ]
    lines = [
        model["name"]
        + (f": {model['encoder']}, family {model['family']}, {model['image_size']} px" if "encoder" in model else "")
    ]
    lines.append(", ".join([f"{data['annotations']}: {pictures}, {data['objects']} objects", *left_out]))
    if result["miou"]:
        lines += ["", f"mIoU, mean over objects, protocol {result['protocol']['name']}"]
        lines += _columns(
            (prompt_name(row["prompt"]), "none" if row["miou"] is None else _percent(row["miou"]), row["settings"])
            for row in result["miou"]
        )
    if "ap" in result:
        ap = result["ap"]
        lines += [
            "",
            f"AP of {ap['detections']} masks from a detector's boxes, metric {ap['metric']}, protocol {ap['protocol']}",
        ]
        lines.append(f"  {ap['settings']}")
        names = list(ap["masks"])
        lines += _columns([("", *names), *((kind, *map(_percent, ap[kind].values())) for kind in ("masks", "boxes"))])
        lines.append(f"  -: nothing of the kind in the data. Boxes: the detector's own. To score again: {ap['masks_file']}")
    lines += ["", "Published by others (arXiv 2312.00863), on all of COCO's and LVIS's validation images; not measured here"]
    lines += _published(PUBLISHED_MIOU)
    if "ap" in result:
        lines += _published(PUBLISHED_AP)
    return "\n".join(lines)


def prompt_name(prompt: str) -> str:
    """box, 1 click, 3 clicks."""
    return f"{prompt} click{'' if prompt == '1' else 's'}" if prompt.isdigit() else prompt


def _percent(value: float) -> str:
    return "-" if value < 0 else f"{100 * value:.1f}"


def _published(table: PublishedTable) -> list[str]:
    sets = list(next(iter(table.rows.values())))
    header = [f"{each} {column}" for each in sets for column in map(prompt_name, table.columns)]
    rows = [(method, *(f"{value:.1f}" for each in sets for value in found[each])) for method, found in table.rows.items()]
    return [f"  {table.title}: {table.protocol}", *_columns([("", *header), *rows])]


def _columns(rows: Iterable[tuple[str, ...]]) -> list[str]:
    """Lines whose columns are as wide as their longest entry, numbers to the right."""
    table = list(rows)
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]

    def cell(text: str, width: int) -> str:
        return text.rjust(width) if text[:1].isdigit() or text == "-" else text.ljust(width)

    return ["  " + "  ".join([row[0].ljust(widths[0]), *map(cell, row[1:], widths[1:])]).rstrip() for row in table]
