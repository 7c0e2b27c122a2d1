"""A comparison's files that other programs read; without timings, so that the same runs give the same bytes."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from robusteval.comparison.statistics import Paired
from robusteval.comparison.table import Row, Table
from robusteval.runs import canonical_json, write_atomic, write_json

TABLE, RUNS, TIMINGS, JSON = "table.csv", "runs.csv", "timings.csv", "table.json"


def write_data(table: Table, folder: Path) -> None:
    """Write `table.csv` (a row per objective), `runs.csv` (a row per run), `timings.csv` and `table.json`."""
    rows, runs = [objective_record(row) for row in table.rows], run_records(table)
    write_csv(folder / TABLE, [flat(row, table.columns) for row in rows])
    write_csv(folder / RUNS, runs)
    timed = [result for row in table.rows for result in row.results]
    write_csv(
        folder / TIMINGS,
        [
            {"label": r.cell.label, "seed": r.cell.seed, **{f"{k}_seconds": v for k, v in r.seconds.items()}}
            for r in timed
        ],
    )
    write_json(folder / JSON, {**summary(table), "objectives": rows, "runs": runs})


def summary(table: Table) -> dict[str, Any]:
    """Return what the table is about, as JSON values."""
    return {
        "kind": "robusteval-comparison",
        "title": table.config.title,
        "reference": table.config.reference,
        "suite": {"name": table.config.suite, "stages": list(table.shared)},
        "full_suite": {"name": table.config.full_suite, "stages": list(table.full), "seeds": table.config.full_seeds},
        "facts": table.facts,
    }


def objective_record(row: Row) -> dict[str, Any]:
    """Return an objective's row as JSON values."""
    return {
        "label": row.label,
        "objective": row.objective,
        "params": row.params,
        "note": row.note or None,
        "runs": len(row.results),
        "failed": {str(seed): text for seed, text in row.failures.items()},
        "forward_per_step": row.passes.forward,
        "backward_per_step": row.passes.backward,
        "values": {column: asdict(spread) for column, spread in row.spreads.items()},
        "robust_difference": _paired(row.robust, row.p_holm),
        "clean_difference": _paired(row.clean),
        "alarms": {str(result.cell.seed): list(result.alarms) for result in row.results if result.alarms},
    }


def _paired(difference: Paired | None, p_holm: float | None = None) -> dict[str, Any] | None:
    if difference is None:
        return None
    adjusted = {} if p_holm is None else {"p_holm": p_holm}
    return {**asdict(difference), "by_seed": list(difference.by_seed), **adjusted}


def flat(record: Mapping[str, Any], columns: Sequence[str]) -> dict[str, Any]:
    """Return an objective's record as one CSV row; every row has the same columns."""
    row = {key: record[key] for key in ("label", "objective", "runs")}
    row |= {"params": canonical_json(record["params"]), "failed": len(record["failed"])}
    row |= {key: record[key] for key in ("forward_per_step", "backward_per_step")}
    for column in columns:
        values = record["values"].get(column, {})
        row |= {f"{column}_{key}": values.get(key) for key in ("mean", "std", "min", "max", "n")}
    for name in ("robust_difference", "clean_difference"):
        tested = record[name] or {}
        row |= {name: tested.get("difference")}
        row |= {f"{name}_{key}": tested.get(key) for key in ("low", "high", "p", "p_holm", "seed_p")}
        row[f"{name}_by_seed"] = " ".join(map(repr, tested.get("by_seed", ())))
    return row


def run_records(table: Table) -> list[dict[str, Any]]:
    """Return a row per run, failed ones included, as JSON values."""
    records = []
    for row in table.rows:
        known = {"label": row.label, "objective": row.objective}
        for result in row.results:
            values = {column: result.values.get(column) for column in table.columns}
            suite = result.report.suite.name
            records.append({**known, "seed": result.cell.seed, "suite": suite, "problem": None, **values})
        for seed, text in row.failures.items():
            empty = dict.fromkeys(table.columns)
            records.append({**known, "seed": seed, "suite": None, "problem": text, **empty})
    return records


def write_csv(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows that all have the same columns, atomically."""
    rows = list(rows)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(path, text.getvalue().encode())
