"""The text of the `README.md` of an export. Must not read or write files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TEXT = """# {method} heads for {target}, for {engine}

Written by `headstart export`, against {reader}.

```
{launch}
```
{notes}
## Chains

{chain} drafts per round ({chain_source}).
{by_batch}
## Acceptance at T = 0

{acceptance}

How to check, where {engine} is installed:

```
{check}
```

## Tensors

{rows}
"""


def readme(report: Mapping[str, Any]) -> str:
    """The text for an export. report: content of its `conformance.json`."""
    return TEXT.format_map(
        {**report, "by_batch": _by_batch(report), "notes": _notes(report), "acceptance": _acceptance(report), "rows": _rows(report)}
    )


def _by_batch(report: Mapping[str, Any]) -> str:
    if not report["chain_by_batch"]:
        return ""
    rows = [f"| {first} to {last} | {length or 'none: plain decoding'} |" for first, last, length in report["chain_by_batch"]]
    return "\n".join(["", "| batch size | drafts per round |", "|---|---|", *rows, ""])


def _notes(report: Mapping[str, Any]) -> str:
    return "".join(f"\n{note}.\n" for note in report["notes"])


def _acceptance(report: Mapping[str, Any]) -> str:
    if report["acceptance"] is None:
        return f"By position: {report['acceptance_source']}."
    shares = ", ".join(f"{share:.3f}" for share in report["acceptance"])
    return f"Share of rounds in which the draft at a position and all before it are kept: {shares} ({report['acceptance_source']})."


def _rows(report: Mapping[str, Any]) -> str:
    rows = [f"| {one['ours'] or ''} | {one['theirs']} | {one['file']} | {one['how']} |" for one in report["tensors"]]
    return "\n".join(["| in headstart | here | file | how |", "|---|---|---|---|", *rows])
