"""Make `robusteval/baselines/robustbench.json` from RobustBench's `model_info` files gathered in one JSON object.

Usage: python tools/make_baselines.py MODEL_INFO.json [OUTPUT.json]

The input maps `<dataset>/<threat>/<id>.json` to that file's content. Only facts are kept; figures are percent.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

SOURCE = "RobustBench model_info, 2025-03-31, commit 78fcc9e, MIT"
OUTPUT = Path(__file__).resolve().parent.parent / "robusteval" / "baselines" / "robustbench.json"


def entry(path: str, facts: dict[str, Any]) -> dict[str, Any]:
    """Return one entry: numbers as numbers, eps in its own spelling, absent facts as null."""
    dataset, threat, file = path.split("/")
    footnote = facts.get("footnote") or None
    return {
        "id": file.removesuffix(".json"),
        "dataset": dataset,
        "threat": threat,
        "eps": facts["eps"],
        "architecture": facts["architecture"],
        "clean_acc": float(facts["clean_acc"]),
        "autoattack_acc": _number(facts.get("autoattack_acc")),
        "external": _number(facts.get("external")),
        "corruptions_acc": _number(facts.get("corruptions_acc")),
        "unreliable": facts.get("unreliable"),
        "additional_data": facts["additional_data"],
        "says_synthetic": "synthetic images" in (footnote or ""),
        "footnote": footnote,
        "name": facts["name"],
        "venue": facts["venue"],
        "link": facts["link"],
    }


def _number(text: str | None) -> float | None:
    return float(text) if text else None


def render(model_info: dict[str, dict[str, Any]]) -> str:
    """Return the whole file, one line an entry, so that a diff between two snapshots can be read."""
    lines = [json.dumps(entry(path, model_info[path]), ensure_ascii=False) for path in sorted(model_info)]
    return f'{{"source": {json.dumps(SOURCE)}, "entries": [\n' + ",\n".join(lines) + "\n]}\n"


def main(arguments: list[str]) -> int:
    """Read the input, write the output; return the exit code."""
    if len(arguments) not in (1, 2):
        print(__doc__, file=sys.stderr)
        return 2
    output = Path(arguments[1]) if len(arguments) == 2 else OUTPUT
    model_info = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    output.write_text(render(model_info), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
