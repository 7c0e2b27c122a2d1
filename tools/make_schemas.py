"""Write `schemas/v1/*.schema.json` from the pydantic models: `python tools/make_schemas.py`."""

from __future__ import annotations

import json
from pathlib import Path

from robusteval.report import SCHEMAS, json_schema

FOLDER = Path(__file__).resolve().parents[1] / "schemas" / "v1"


def main() -> None:
    """Write every schema."""
    for name in SCHEMAS:
        text = json.dumps(json_schema(name), indent=2) + "\n"
        (FOLDER / f"{name}.schema.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
