#!/usr/bin/env python3
"""Compares prompts, log-likelihoods and metrics with lm-evaluation-harness: every built-in task, the task files of the harness and
task files with rarer keys, over documents with unusual characters and spacing.

    pip install "lm_eval[hf]==0.4.13"
    cargo build --example score
    python3 tools/peers/tasks_parity.py --examples target/debug/examples --model tests/golden/scoring/score-neox-4tasks/model
"""
import argparse, json, random, tempfile

import harness

WORDS = "the man dog Dan house river old ran Mia’s café naïve \"milk\" 'tis (so) [the] {x} = = N @-@ , . ; 7 s ' ß ﬁ".split()

# Task files with keys that the built-in tasks do not use.
FILES = {
    "described": """
task: local_described
dataset_path: json
dataset_kwargs:
  trust_remote_code: true
  data_files: {test: FOLDER/described.test.jsonl, dev: FOLDER/described.train.jsonl}
test_split: test
fewshot_split: dev
fewshot_config:
  sampler: first_n
output_type: multiple_choice
description: "The following are questions about {{subject|upper}}.\n\n"
doc_to_text: "{{question.strip()}}\nA. {{choices[0]}}\nB. {{choices[1]}}\nC. {{choices[2]}}\nAnswer:"
doc_to_choice: ["A", "B", "C"]
doc_to_target: answer
fewshot_delimiter: "\n--\n"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_bytes, aggregation: mean, higher_is_better: true}
metadata: {version: 1.0}
""",
    "own": """
task: local_own
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/own.test.jsonl}}
test_split: test
fewshot_split: test
fewshot_config: {sampler: first_n}
output_type: multiple_choice
doc_to_text: "{{question}} {{names}}"
doc_to_choice: "{{names.values()|list}}"
doc_to_target: 1
metric_list: [{metric: acc}]
""",
    "pairs": """
include: _pairs_base
task: local_pairs
doc_to_choice: "{{[good, bad]}}"
""",
    "several": """
task: local_several
dataset_path: json
dataset_kwargs: {data_files: {validation: FOLDER/several.validation.jsonl}}
validation_split: validation
output_type: multiple_choice
doc_to_text: "{{text|regex_replace('[aeiou](\\\\w)', '<\\\\1>')}} {{flag}} {{score}} {{words}} {{words|length}}"
doc_to_choice: {no: "no", yes: "yes", maybe: "maybe so"}
doc_to_target: "{% if flag %}{{[0, 2]}}{% else %}{{[1]}}{% endif %}"
target_delimiter: ""
metric_list:
  - metric: acc
  - metric: acc_norm
  - metric: acc_bytes
metadata: {version: "0.2.1"}
""",
    "word": """
task: local_word
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/word.test.jsonl, train: FOLDER/word.train.jsonl}}
training_split: train
test_split: test
output_type: loglikelihood
doc_to_text: "{{text.split()[:-1]|join(' ')}}"
doc_to_target: "{{' ' + text.split()[-1].capitalize()}}"
metric_list:
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
  - {metric: acc, aggregation: mean, higher_is_better: true}
""",
}
PAIRS_BASE = """
dataset_path: json
dataset_kwargs: {data_files: {train: FOLDER/pairs.train.jsonl}}
validation_split: train
fewshot_split: train
output_type: multiple_choice
doc_to_text: ""
doc_to_target: 0
num_fewshot: 0
metric_list:
  - metric: acc
metadata: {version: 1.0}
"""


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--examples", default="target/debug/examples")
    p.add_argument("--model", required=True)
    p.add_argument("--items", type=int, default=40)
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--max-length", default="128")
    a = p.parse_args()
    rng = random.Random(a.seed)

    def text(low, high):
        gap = lambda: rng.choice([" "] * 12 + ["  ", "\n", " \n ", "\t", "\u00a0", " : ", " 's "])
        return "".join(rng.choice(WORDS) + gap() for _ in range(rng.randint(low, high)))

    def choice_item(i):
        n = rng.randint(3, 5)
        labels = rng.choice(["ABCDE", "12345"])[:n]
        return {"id": str(i), "question": text(3, 20), "choices": {"text": [text(1, 5) for _ in labels], "label": list(labels)},
                "answerKey": rng.choice(labels)}

    make = {
        "hellaswag": lambda i: {"ind": i, "activity_label": text(1, 3), "ctx_a": text(4, 20), "ctx_b": rng.choice(["", text(1, 4), "ǆ OR so", "ßA"]),
                                "endings": [rng.choice(["", " [title] ", "[step] "]) + text(2, 9) for _ in range(4)], "label": str(rng.randint(0, 3))},
        "piqa": lambda i: {"goal": text(3, 12), "sol1": text(1, 9), "sol2": text(1, 9), "label": rng.randint(0, 1)},
        "winogrande": lambda i: {"sentence": text(3, 9).strip() + " _ " + text(2, 9), "option1": "Dan", "option2": rng.choice(["Mia", "the old dog"]),
                                 "answer": rng.choice("12")},
        "arc_easy": choice_item,
        "openbookqa": lambda i: {"question_stem": text(3, 20), "answerKey": rng.choice([" ", ""]) + rng.choice("ABCD"),
                                 "choices": {"text": [text(1, 5) for _ in "ABCD"], "label": list("ABCD")}},
        "described": lambda i: {"subject": rng.choice(["law", "naïve art"]), "question": " " + text(3, 9), "answer": rng.randint(0, 2),
                                "choices": [text(1, 4) for _ in "ABC"]},
        "own": lambda i: {"question": text(3, 9), "names": {"z": text(1, 3), "a": text(1, 3), "m": text(1, 3)}},
        "pairs": lambda i: {"good": text(3, 9), "bad": text(3, 9)},
        "several": lambda i: {"text": text(3, 9), "flag": bool(i % 2), "score": rng.choice([0.1, 1e-7, 3e20, 5.0]), "words": text(1, 4).split()},
        "word": lambda i: {"text": text(5, 20)},
        "sciq": lambda i: {"question": text(3, 9), "distractor1": text(1, 2), "distractor2": text(1, 2), "distractor3": text(1, 2),
                           "correct_answer": text(1, 2), "support": rng.choice(["", "  " + text(3, 30)])},
        "lambada_openai": lambda i: {"text": text(5, 40).strip()},
        "wikitext": lambda i: {"page": text(30, 300)},
    }
    splits = {"hellaswag": ("validation", "train"), "piqa": ("validation", "train"), "winogrande": ("validation", "train"),
              "arc_easy": ("test", "train"), "openbookqa": ("test", "train"), "sciq": ("test", "train"), "lambada_openai": ("test",), "wikitext": ("test",)}
    more = {"described": ("test", "train"), "own": ("test",), "pairs": ("train",), "several": ("validation",), "word": ("test", "train")}
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        for task, of_task in (splits | more).items():
            for split in of_task:
                count = a.items if split != "train" else 30
                with open(f"{folder}/{task}.{split}.jsonl", "w") as f:
                    f.writelines(json.dumps(make[task](i)) + "\n" for i in range(4 if task == "wikitext" else count))
        harness.local_tasks(folder, splits)
        for task, definition in FILES.items():
            with open(f"{folder}/local_{task}.yaml", "w") as f: f.write(definition.replace("FOLDER", folder))
        with open(f"{folder}/_pairs_base", "w") as f: f.write(PAIRS_BASE.replace("FOLDER", folder))
        for shots in (0, 3, 7):
            named = [t for t in splits if shots == 0 or t != "wikitext"]
            tasks = named + [t for t in more if shots == 0 or t != "several"]
            theirs = harness.run(a.model, folder, tasks, shots, "float32", 1, 2)
            built_in = [t for t in named if t != "openbookqa"]
            for files, asked in ((False, built_in), (True, tasks)):
                ours = harness.ours(a.examples, a.model, folder, asked, shots, files=files)
                for task in asked:
                    failed |= compare(task, shots, theirs, ours, "task file" if files else "built in")
    if failed: raise SystemExit("results differ from those of lm-evaluation-harness")


def compare(task, shots, theirs, ours, of):
    prompts, worst = 0, 0.0
    for t, o in zip(theirs["samples"][task], ours["samples"][task], strict=True):
        args = [tuple(x.values()) if isinstance(x, dict) else tuple(x) for x in (t["arguments"].values() if isinstance(t["arguments"], dict) else t["arguments"])]
        mine = [tuple(x.values()) for x in o["arguments"].values()]
        prompts += sum(tuple(x[: len(y)]) != y for x, y in zip(args, mine, strict=True))
        value = lambda r: float(r[0][0] if isinstance(r[0], list) else r[0])
        worst = max([worst] + [abs(value(x) - value(y)) for x, y in zip(t["resps"], o["resps"], strict=True)])
    figures = {k: (v, ours["results"][task].get(k)) for k, v in theirs["results"][task].items() if "," in k}
    off = {k: (v, o) for k, (v, o) in figures.items()
           if not (v == o or (isinstance(v, float) and isinstance(o, float) and abs(v - o) <= 1e-4 * abs(v)))}
    print(f"{task}, {of}, {shots} examples: {prompts} prompts differ, log-likelihoods within {worst:.1e}, metrics {off or 'equal'}", flush=True)
    return bool(prompts or worst > 1e-3 or off)


main()
