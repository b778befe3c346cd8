#!/usr/bin/env python3
"""Compares tasks whose answers the model writes (`generate_until`) with lm-evaluation-harness: prompts, answers, filtered answers and
metrics of DROP and of task files with filters and several correct answers.

    pip install "lm_eval[hf]==0.4.13" scipy
    cargo build --example score
    python3 tools/peers/answers_parity.py --examples target/debug/examples --model models/tiny

The correct answers are made of the answers that the model writes, so that a part of them is met.
"""
import argparse, json, random, tempfile

import harness

FILES = {
    "words": """
task: local_words
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/words.test.jsonl, train: FOLDER/words.train.jsonl}}
training_split: train
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: [";", "\\n"], do_sample: false, max_gen_toks: 24}
filter_list:
  - name: strict-match
    filter:
      - {function: regex, regex_pattern: "the (\\\\w+)"}
      - {function: take_first}
  - name: flexible-extract
    filter:
      - {function: regex, group_select: -1, regex_pattern: "([A-Z][a-z]+)|(\\\\bof \\\\w+$)", fallback: "?"}
      - {function: lowercase}
      - {function: take_first}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true, ignore_case: true, ignore_punctuation: false,
     regexes_to_ignore: [",", "\\\\$", "(?s).*#### ", "\\\\.$"]}
metadata: {version: 3.0}
""",
    "aliases": """
task: local_aliases
dataset_path: json
dataset_kwargs: {data_files: {validation: FOLDER/aliases.validation.jsonl, train: FOLDER/aliases.train.jsonl}}
training_split: train
validation_split: validation
output_type: generate_until
description: "Answer these questions:\\n\\n"
doc_to_text: "Question: {{question}}?\\nAnswer:"
doc_to_target: "{{aliases}}"
generation_kwargs: {until: ["\\n", ".", ","], do_sample: false, temperature: 0.0, max_gen_toks: 20}
filter_list:
  - {name: remove_whitespace, filter: [{function: remove_whitespace}, {function: take_first}]}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true, ignore_case: true, ignore_punctuation: true, ignore_numbers: true}
""",
    "plain": """
task: local_plain
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/plain.test.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: question
doc_to_target: answer
generation_kwargs: {max_gen_toks: 12, until: " "}
""",
}
WORDS = "the people of United States government Congress Union law peace war country subject Mr. public 7 1,200 café".split()


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--examples", default="target/debug/examples")
    p.add_argument("--model", required=True)
    p.add_argument("--items", type=int, default=40)
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--write", help="write the tasks, documents and results of the harness to this file, which the tests read")
    a = p.parse_args()
    rng = random.Random(a.seed)
    text = lambda low, high: " ".join(rng.choice(WORDS) for _ in range(rng.randint(low, high)))
    date = {"day": "", "month": "", "year": ""}
    answer = lambda: {"number": "", "date": dict(date), "spans": [], "hit_id": "h", "worker_id": "w"}

    def drop(i):
        # The harness reads DROP as features of fixed types, so every document has every key.
        return {"section_id": "s", "query_id": str(i), "passage": text(5, 30), "question": text(3, 9) + "?", "answer": answer() | {"spans": [text(1, 2)]},
                "validated_answers": {"number": [""], "date": [dict(date)], "spans": [[text(1, 1)]], "hit_id": ["h"], "worker_id": ["w"]}}

    make = {"words": lambda i: {"question": text(3, 20), "answer": text(1, 2)}, "aliases": lambda i: {"question": text(3, 20), "aliases": [text(1, 2), text(1, 3)]},
            "plain": lambda i: {"question": text(3, 20), "answer": text(1, 1)}, "drop": drop}
    splits = {"words": ("test", "train"), "aliases": ("validation", "train"), "plain": ("test",), "drop": ("validation", "train")}
    failed, record = False, {}
    with tempfile.TemporaryDirectory() as folder:
        docs = {(task, split): [make[task](i) for i in range(a.items if split != "train" else 12)] for task, of in splits.items() for split in of}

        def write():
            for (task, split), rows in docs.items():
                with open(f"{folder}/{task}.{split}.jsonl", "w") as f: f.writelines(json.dumps(row) + "\n" for row in rows)

        write()
        harness.local_tasks(folder, ["drop"])
        for task, definition in FILES.items():
            with open(f"{folder}/local_{task}.yaml", "w") as f: f.write(definition.replace("FOLDER", folder))
        # DROP has no limit of its own; 256 tokens would not leave room in the context of a tiny model.
        with open(f"{folder}/local_drop.yaml") as f: definition = f.read().replace("generation_kwargs:", "generation_kwargs:\n  max_gen_toks: 24")
        with open(f"{folder}/local_drop.yaml", "w") as f: f.write(definition)
        first = harness.ours(a.examples, a.model, folder, list(splits), 0, files=True)
        for task, of in splits.items():
            rows = docs[task, of[0]]
            for sample in first["samples"][task]:
                row, found = rows[sample["doc_id"]], sample["filtered_resps"][0]
                if rng.random() < 0.5 or not found.strip(): continue
                if task == "aliases": row["aliases"][1] = found.upper() + "!"
                elif task == "drop":
                    words = found.split()
                    kind = rng.randint(0, 3)
                    if kind == 0: row["answer"]["spans"] = ["the " + found.upper() + ";"]
                    elif kind == 1: row["validated_answers"]["spans"][0] = [words[0], " ".join(words[1:3])]
                    elif kind == 2: row["answer"] = answer() | {"number": "1,200"}
                    else: row["answer"] = answer() | {"date": {"day": words[0], "month": words[-1], "year": "1862"}}
                else: row["answer"] = found + rng.choice(["", ".", "$"])
        write()
        for shots in (0, 3):
            tasks = [t for t in splits if shots == 0 or t != "plain"]
            theirs = harness.run(a.model, folder, tasks, shots, "float32", 4, 2)
            ours = harness.ours(a.examples, a.model, folder, tasks, shots, files=True)
            for task in tasks:
                failed |= compare(task, shots, theirs, ours)
                with open(f"{folder}/local_{task}.yaml") as f: definition = f.read().replace(folder, "FOLDER")
                of_task = record.setdefault(task, {"definition": definition, "documents": {split: docs[task, split] for split in splits[task]}, "results": {}})
                answers = {}
                for s in theirs["samples"][task]: answers.setdefault(s["filter"], []).extend(s["filtered_resps"])
                of_task["results"][shots] = {"answers": answers, "figures": {k: v for k, v in theirs["results"][task].items() if "," in k}}
        if a.write:
            # The functions of DROP are a file of the harness, which the repository does not have.
            del record["drop"]
            with open(a.write, "w") as f: f.write(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    if failed: raise SystemExit("results differ from those of lm-evaluation-harness")


def compare(task, shots, theirs, ours):
    key = lambda s: (s["filter"], s["doc_id"])
    mine = {key(s): s for s in ours["samples"][task]}
    assert len(mine) == len(theirs["samples"][task])
    prompts = answers = filtered = scores = met = 0
    for t in theirs["samples"][task]:
        o = mine[key(t)]
        args = list(t["arguments"].values())[0] if isinstance(t["arguments"], dict) else t["arguments"][0]
        prompts += (args["arg_0"] if isinstance(args, dict) else args[0]) != o["arguments"]["gen_args_0"]["arg_0"]
        answers += t["resps"] != o["resps"]
        filtered += t["filtered_resps"] != o["filtered_resps"]
        for metric in o["metrics"]:
            scores += abs(float(t[metric]) - float(o[metric])) > 1e-9
            met += float(o[metric]) > 0
    figures = {k: (v, ours["results"][task].get(k)) for k, v in theirs["results"][task].items() if "," in k}
    off = {k: (v, o) for k, (v, o) in figures.items() if not (v == o or (isinstance(v, float) and isinstance(o, float) and abs(v - o) <= 1e-9))}
    print(f"{task}, {shots} examples, {len(mine)} answers: {prompts} prompts, {answers} answers, {filtered} filtered answers and {scores} scores differ; "
          f"{met} scores above 0; metrics {off or 'equal'}", flush=True)
    return bool(prompts or answers or filtered or scores or off)


main()
