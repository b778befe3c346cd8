//! Results and samples in the JSON formats of lm-evaluation-harness.

use serde_json::{Map, Value, json};

use super::{EvalOptions, Limit, Outcome, Sample, Task, TaskKind};

impl TaskKind {
    /// Returns the name of this kind in lm-evaluation-harness, its `output_type`.
    pub const fn name(self) -> &'static str {
        match self {
            TaskKind::MultipleChoice => "multiple_choice",
            TaskKind::Loglikelihood => "loglikelihood",
            TaskKind::Perplexity => "loglikelihood_rolling",
            TaskKind::Generation => "generate_until",
        }
    }
}

/// Returns the results of tasks in the format of the harness's `results_*.json`. The caller adds the facts about the
/// model.
pub fn results_json(outcomes: &[(Task, Outcome)], options: &EvalOptions) -> Value {
    let by_task = |f: &dyn Fn(&Task, &Outcome) -> Value| -> Value {
        outcomes.iter().map(|(task, outcome)| (task.name().to_owned(), f(task, outcome))).collect::<Map<_, _>>().into()
    };
    let figures = |_: &Task, outcome: &Outcome| {
        let mut row = Map::new();
        row.insert("alias".into(), json!(outcome.task));
        row.insert("sample_len".into(), json!(outcome.documents));
        for figure in &outcome.figures {
            let (name, filter) = (figure.metric.name(), &figure.filter);
            row.insert(format!("{name},{filter}"), json!(figure.value));
            row.insert(format!("{name}_stderr,{filter}"), figure.stderr.map_or_else(|| json!("N/A"), |x| json!(x)));
        }
        row.into()
    };
    let config = |task: &Task, outcome: &Outcome| {
        let dataset = task.dataset();
        json!({
            "task": task.name(), "output_type": task.kind().name(), "num_fewshot": outcome.shots,
            "dataset_path": dataset.map(|d| d.0), "dataset_name": dataset.and_then(|d| d.1),
            "metadata": {"version": task.version},
        })
    };
    let better = |task: &Task, _: &Outcome| {
        task.metrics().iter().map(|m| (m.name().to_owned(), json!(m.higher_is_better()))).collect::<Map<_, _>>().into()
    };
    json!({
        "results": by_task(&figures),
        "group_subtasks": by_task(&|_, _| json!([])),
        "configs": by_task(&config),
        "versions": by_task(&|task, _| json!(task.version)),
        "n-shot": by_task(&|_, outcome| json!(outcome.shots)),
        "higher_is_better": by_task(&better),
        "n-samples": by_task(&|_, outcome| json!({"original": outcome.documents, "effective": outcome.documents})),
        "config": {
            "model": "pricket", "limit": options.limit.map(Limit::to_json), "bootstrap_iters": options.bootstrap, "fewshot_seed": options.seed,
        },
    })
}

impl Sample {
    /// Returns the sample as a line of the harness's `samples_*.jsonl`.
    pub fn to_json(&self) -> Value {
        let arguments: Map<_, _> = self
            .requests
            .iter()
            .enumerate()
            .map(|(i, (context, continuation))| {
                let arguments = if context.is_empty() && self.target.as_str() == Some(continuation) {
                    json!({"arg_0": continuation})
                } else {
                    json!({"arg_0": context, "arg_1": continuation})
                };
                (format!("gen_args_{i}"), arguments)
            })
            .collect();
        // The harness writes these values as strings.
        let python = |flag: bool| if flag { "True" } else { "False" };
        // The harness always writes the target as a string.
        let target = self.target.as_str().map_or_else(|| self.target.to_string(), str::to_owned);
        let metrics: Vec<_> = self.scores.iter().map(|(metric, _)| metric.name()).collect();
        if let Some(written) = &self.written {
            let context = self.requests.first().map_or("", |(context, _)| context);
            let mut line = json!({
                "doc_id": self.id, "doc": self.document, "target": target,
                "arguments": {"gen_args_0": {"arg_0": context}}, "resps": [written.answers],
                "filtered_resps": [written.filtered], "filter": written.filter, "metrics": metrics,
            });
            for (metric, score) in &self.scores {
                line[metric.name()] = json!(score);
            }
            return line;
        }
        let rolling = arguments.values().all(|arguments| arguments["arg_1"].is_null());
        let answers: Vec<Value> = if rolling {
            vec![json!([self.answers.iter().map(|answer| answer.sum).sum::<f64>().to_string()])]
        } else {
            self.answers.iter().map(|answer| json!([answer.sum.to_string(), python(answer.is_greedy)])).collect()
        };
        let mut line = json!({
            "doc_id": self.id, "doc": self.document, "target": target, "arguments": arguments,
            "resps": answers.iter().map(|answer| json!([answer])).collect::<Vec<_>>(), "filtered_resps": answers,
            "filter": "none", "metrics": metrics,
        });
        for (metric, score) in &self.scores {
            line[metric.name()] = json!(score);
        }
        line
    }
}
