"""The page of the loader benchmark: a table for every cache, page cache state and kind of images, and the ratios asked for."""

import statistics
from dataclasses import dataclass, field
from typing import Any

from loader_contestants import CHECKED, OURS, PEERS

IMAGES = {"none": "codes only", "encoded": "codes and JPEG", "pixels": "codes and pixels, cropped and resized to 224"}
BARE, DISK = "bare zstd + crc32c", "the disk, sequentially"
PIXELS = "decode, crop, resize"


@dataclass
class Entry:
    """What is known of a contestant in a section."""

    name: str
    way: str = ""
    problem: str = ""
    """Why it was not measured."""
    rounds: list[dict[str, float]] = field(default_factory=list)
    checks: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    """Of its way: bytes on disk a sample, largest memory."""
    tried: dict[str, str] = field(default_factory=dict)
    """Samples a second of each way in the trial, or why it failed."""

    @property
    def speed(self) -> float:
        return statistics.median(one["speed"] for one in self.rounds)


@dataclass
class Section:
    """One cache, one state of the page cache, with or without images."""

    kind: str
    images: str
    state: str
    entries: dict[str, Entry]

    def ratio(self, name: str) -> float | None:
        """Our speed divided by another's: the median of the rounds' ratios."""
        ours, other = self.entries.get(OURS), self.entries.get(name)
        if not ours or not other or not ours.rounds or not other.rounds:
            return None
        return statistics.median(a["speed"] / b["speed"] for a, b in zip(ours.rounds, other.rounds, strict=True))

    def title(self) -> str:
        return f"{self.kind}, {IMAGES[self.images]}, page cache {self.state}"


def page(sections: list[Section], head: list[str]) -> str:
    lines = [*head, "", "## Asked for, and reached", "", *reached(sections)]
    for section in sections:
        lines += ["", f"## {section.title()}", "", *table(section)]
    return "\n".join([*lines, "", "## Ways that were tried", "", *trials(sections)]) + "\n"


def table(section: Section) -> list[str]:
    lines = [
        "| | samples/s | ours / it | bytes a sample | CPU ms a sample | memory, MB (mapped) | checks what it reads | way |",
        "|---|---|---|---|---|---|---|---|",
    ]
    measured = [entry for entry in section.entries.values() if entry.rounds]
    for entry in sorted(measured, key=lambda entry: -entry.speed):
        ratio, facts = section.ratio(entry.name), entry.facts
        low, high = min(one["speed"] for one in entry.rounds), max(one["speed"] for one in entry.rounds)
        memory = f"{facts['own'] / 1e6:.0f} ({facts['mapped'] / 1e6:.0f})" if "own" in facts else ""
        cells = [
            f"**{entry.name}**" if entry.name == OURS else entry.name,
            f"{entry.speed:.0f} ({low:.0f}-{high:.0f})",
            f"{ratio:.2f}" if ratio and entry.name != OURS else "",
            f"{facts['bytes']:.0f}" if "bytes" in facts else "",
            f"{1000 * statistics.median(one['cpu'] for one in entry.rounds):.3f}",
            memory,
            entry.checks,
            entry.way.replace(" | ", ", ").lstrip(" ,"),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [f"| {entry.name} | {entry.problem} |" + " |" * 6 for entry in section.entries.values() if not entry.rounds]
    left = max((one.get("resident", 0.0) for entry in measured for one in entry.rounds), default=0.0)
    if section.state == "cold":
        lines += ["", f"At most {left:.1%} of a contestant's bytes were still in the page cache when a cold epoch began."]
    return lines


def reached(sections: list[Section]) -> list[str]:
    """A line for each ratio that the project asks for, in every section it is asked of."""
    lines = ["| | asked for | found |", "|---|---|---|"]
    for section in sections:
        for what, name, asked, share in _asked(section):
            ratio = section.ratio(name)
            if ratio is not None:
                found = f"{ratio:.0%}" if share else f"{ratio:.2f}"
                lines.append(f"| {section.title()}: ours / {what} | {asked} | {found} |")
    return lines


def _asked(section: Section) -> list[tuple[str, str, str, bool]]:
    """(what, contestant, asked for, whether as a share)."""
    if section.images == "pixels":
        names = [name for name in section.entries if name.endswith(PIXELS)]
        return [(name, name, "80 % of the decoder that it uses", True) for name in names]
    rivals = [entry for name, entry in section.entries.items() if name in PEERS and name in CHECKED and entry.rounds]
    asked = []
    if section.state == "warm":
        asked.append(("zarr-python", "zarr-python", "10", False))
        if rivals:
            best = max(rivals, key=lambda entry: entry.speed).name
            asked.append((f"the best peer that checks what it reads ({best})", best, "1.2", False))
        return [*asked, (BARE, BARE, "75 %", True)]
    return [(DISK, DISK, "85 %", True)]


def trials(sections: list[Section]) -> list[str]:
    lines = ["Samples a second in one short round.", "", "| | way | " + " | ".join(_short(each) for each in sections) + " |"]
    lines.append("|---|---|" + "---|" * len(sections))
    names = dict.fromkeys(
        (entry.name, way) for section in sections for entry in section.entries.values() for way in entry.tried
    )
    for name, way in names:
        cells = [section.entries[name].tried.get(way, "") if name in section.entries else "" for section in sections]
        lines.append(f"| {name} | {way.replace(' | ', ', ').lstrip(' ,')} | " + " | ".join(cells) + " |")
    return lines


def _short(section: Section) -> str:
    return f"{section.kind}, {section.images}, {section.state}"
