"""Writes tests/data/documents: parquet files of a few documents, in the form of the Hub's datasets.

    python3 tools/parquet_documents.py tests/golden/scoring/score-neox-4tasks/data tests/data/documents

Needs pyarrow. The same version of pyarrow writes the same bytes.
"""

import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

source, out = Path(sys.argv[1]), Path(sys.argv[2])
out.mkdir(parents=True, exist_ok=True)
for name in ["hellaswag.validation", "piqa.validation", "piqa.train"]:
    rows = [json.loads(line) for line in (source / f"{name}.jsonl").read_text().splitlines()]
    pq.write_table(pa.Table.from_pylist(rows), out / f"{name}.parquet", compression="snappy", row_group_size=20)
questions = [
    {
        "id": f"q{i}",
        "question": f"What is {i} and {i}?",
        "choices": {"text": [str(2 * i), str(2 * i + 1), "none"], "label": ["A", "B", "C"]},
        "answerKey": "A",
    }
    for i in range(5)
]
pq.write_table(pa.Table.from_pylist(questions), out / "arc_easy.test.parquet", compression="snappy")
# Training data in the form of databricks-dolly-15k.
records = [
    {
        "instruction": f"Which number follows {i}?",
        "context": "" if i % 2 else "Numbers are counted one by one.",
        "response": f"The number {i + 1} follows {i}.",
        "category": "open_qa" if i % 2 else "closed_qa",
    }
    for i in range(6)
]
pq.write_table(pa.Table.from_pylist(records), out / "dolly.parquet", compression="snappy")
