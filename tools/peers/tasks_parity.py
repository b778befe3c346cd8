#!/usr/bin/env python3
"""Every built-in task beside lm-evaluation-harness, over documents made up to be awkward: prompts, likelihoods, figures.

    pip install "lm_eval[hf]==0.4.13"
    cargo build --example score
    python3 tools/peers/tasks_parity.py --examples target/debug/examples --model tests/golden/scoring/score-neox-4tasks/model
"""
import argparse, json, random, tempfile

import harness

WORDS = "the man dog Dan house river old ran Mia’s café naïve \"milk\" 'tis (so) [the] {x} = = N @-@ , . ; 7 s ' ß ﬁ".split()


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
        "sciq": lambda i: {"question": text(3, 9), "distractor1": text(1, 2), "distractor2": text(1, 2), "distractor3": text(1, 2),
                           "correct_answer": text(1, 2), "support": rng.choice(["", "  " + text(3, 30)])},
        "lambada_openai": lambda i: {"text": text(5, 40).strip()},
        "wikitext": lambda i: {"page": text(30, 300)},
    }
    splits = {"hellaswag": ("validation", "train"), "piqa": ("validation", "train"), "winogrande": ("validation", "train"),
              "arc_easy": ("test", "train"), "sciq": ("test", "train"), "lambada_openai": ("test",), "wikitext": ("test",)}
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        for task, of_task in splits.items():
            for split in of_task:
                count = a.items if split != "train" else 30
                with open(f"{folder}/{task}.{split}.jsonl", "w") as f:
                    f.writelines(json.dumps(make[task](i)) + "\n" for i in range(4 if task == "wikitext" else count))
        harness.local_tasks(folder, splits)
        for shots in (0, 3, 7):
            tasks = [t for t in splits if shots == 0 or t != "wikitext"]
            theirs = harness.run(a.model, folder, tasks, shots, "float32", 1, 2)
            ours = harness.ours(a.examples, a.model, folder, tasks, shots)
            for task in tasks:
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
                failed |= bool(prompts or worst > 1e-3 or off)
                print(f"{task}, {shots} examples: {prompts} prompts differ, likelihoods within {worst:.1e}, figures {off or 'equal'}", flush=True)
    if failed: raise SystemExit("not the harness's")


main()
