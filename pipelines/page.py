"""What our HTML pages share: one file each, no template library, nothing fetched from anywhere."""

import base64
import html
import io
from collections.abc import Iterable, Mapping
from typing import Any

from matplotlib.figure import Figure

STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:960px;margin:2em auto;padding:0 1em;color:#222}img{max-width:100%}"
    "table{border-collapse:collapse;margin:1em 0}td,th{padding:.2em .9em .2em 0;text-align:left;border-bottom:1px solid #ddd}"
    "td.n{text-align:right;font-variant-numeric:tabular-nums}code{font-size:90%}td{overflow-wrap:anywhere;vertical-align:top}"
)


def png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    sink = io.BytesIO()
    figure.savefig(sink, format="png")
    return sink.getvalue()


def picture(alt: str, data: bytes) -> str:
    """An <img> that carries its PNG with it. `alt` is our own text."""
    return f'<img alt="{alt}" src="data:image/png;base64,{base64.b64encode(data).decode()}">'


def settings_table(settings: Mapping[str, Any]) -> str:
    """A <table> of nested settings, `name.name` and value a row, escaped."""
    rows = (
        f"<tr><td><code>{html.escape(key)}</code></td><td><code>{html.escape(str(value))}</code></td></tr>"
        for key, value in _flatten(settings)
    )
    return f"<table>{''.join(rows)}</table>"


def text_table(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """A <table> with a heading row unless `head` is empty; text is escaped, numbers stand to the right."""
    heads = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return f"<table>{f'<tr>{heads}</tr>' if heads else ''}{body}</table>"


def document(title: str, body: str) -> str:
    """The page. `title` is escaped here; of `body` everything that is not our own must have been."""
    name = html.escape(title)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{name}</title><style>{STYLE}</style>'
        f"<h1>{name}</h1>{body}</html>\n"
    )


def _cell(value: Any) -> str:
    if isinstance(value, int | float):
        return f'<td class="n">{value}</td>'
    return f"<td>{html.escape(str(value))}</td>"


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for key, value in settings.items():
        pairs += _flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(f"{prefix}{key}", value)]
    return pairs
