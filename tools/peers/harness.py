"""Runs lm-evaluation-harness and pricket on local documents in JSON lines, with the task definitions of the harness."""
import json, os, shutil, subprocess, sys
from importlib.util import find_spec

FILES = {"hellaswag": "hellaswag/hellaswag.yaml", "piqa": "piqa/piqa.yaml", "winogrande": "winogrande/default.yaml",
         "arc_easy": "arc/arc_easy.yaml", "openbookqa": "openbookqa/openbookqa.yaml", "sciq": "sciq/sciq.yaml", "lambada_openai": "lambada/lambada_openai.yaml",
         "wikitext": "wikitext/wikitext.yaml", "drop": "drop/default.yaml"}

PROGRAM = r"""
import json, sys, time
import lm_eval, torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
model, folder, tasks, shots, dtype, batch, threads = json.loads(sys.argv[1])
torch.set_num_threads(threads)
lm = HFLM(pretrained=model, dtype=dtype, batch_size=batch, device="cpu")
took = []
for name in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
    def wrap(inner):
        def timed(requests, **kw):
            start = time.time(); out = inner(requests, **kw); took.append(time.time() - start); return out
        return timed
    setattr(lm, name, wrap(getattr(lm, name)))
out = lm_eval.simple_evaluate(lm, tasks=["local_" + t for t in tasks], num_fewshot=shots, task_manager=TaskManager(include_path=folder),
                              bootstrap_iters=1000, log_samples=True)
print(json.dumps({"seconds": sum(took), "results": {t: out["results"]["local_" + t] for t in tasks},
                  "samples": {t: [{k: s.get(k) for k in ("doc_id", "arguments", "resps", "filter", "filtered_resps", *s["metrics"])}
                                  for s in out["samples"]["local_" + t]] for t in tasks}}, default=str))
"""


def local_tasks(folder, tasks):
    """Writes copies of the task definitions that read TASK.SPLIT.jsonl in `folder`."""
    package = os.path.dirname(find_spec("lm_eval").origin)
    for task in tasks:
        source = f"{package}/tasks/{FILES[task]}"
        for name in os.listdir(os.path.dirname(source)):
            if name.endswith(".py"): shutil.copy(os.path.join(os.path.dirname(source), name), folder)
        lines, skip = [], False
        with open(source) as f: text = f.read()
        for line in text.split("\n"):
            if line.startswith("tag:"): skip = True; continue
            if skip and line.startswith("  -"): continue
            skip = False
            if line.startswith("task:"): line = f"task: local_{task}"
            if line.startswith("dataset_name:"): continue
            if line.startswith("dataset_path:"):
                splits = [s for s in ("train", "validation", "test") if os.path.exists(f"{folder}/{task}.{s}.jsonl")]
                line = "dataset_path: json\ndataset_kwargs:\n  data_files:\n" + "\n".join(f"    {s}: {folder}/{task}.{s}.jsonl" for s in splits)
            for split in ("training", "validation", "test"):
                if line.startswith(f"{split}_split:") and "null" not in line:
                    if not os.path.exists(f"{folder}/{task}.{line.split()[-1]}.jsonl"): line = ""
            lines.append(line)
        with open(f"{folder}/local_{task}.yaml", "w") as f: f.write("\n".join(lines))


def run(model, folder, tasks, shots, dtype, batch, threads):
    command = [sys.executable, "-c", PROGRAM, json.dumps([model, folder, tasks, shots, dtype, batch, threads])]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": f"{folder}/cache", "TOKENIZERS_PARALLELISM": "false"}
    out = subprocess.run(command, capture_output=True, text=True, env=env)
    if out.returncode: raise SystemExit(out.stderr[-3000:])
    return json.loads(out.stdout.splitlines()[-1])


def ours(examples, model, folder, tasks, shots, *more, files=False):
    """Runs the example `score` on built-in tasks over TASK.SPLIT.jsonl, or on the task files local_TASK.yaml if `files` is set."""
    out = f"{folder}/ours.json"
    named = [f"{folder}/local_{task}.yaml" for task in tasks] if files else tasks
    command = [f"{examples}/score", "--model", model, "--tasks", ",".join(named), *([] if files else ["--data", folder]),
               "--num-fewshot", str(shots), "--output", out, "--log-samples", "--bootstrap-iters", "1000", *more]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode: raise SystemExit(result.stderr)
    with open(out) as f: results = json.load(f)
    samples = {}
    prefix = "local_" if files else ""
    for task in tasks:
        with open(f"{folder}/samples_{prefix}{task}.jsonl") as f: samples[task] = [json.loads(line) for line in f]
    return {"seconds": float(results["total_evaluation_time_seconds"]), "results": {t: results["results"][prefix + t] for t in tasks},
            "samples": samples}
