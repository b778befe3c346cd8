//! Task files of lm-evaluation-harness, and task options.

use std::path::Path;

use pricket::lm::{Documents, EvalOptions, Limit, Metric, Outcome, Task};
use serde_json::{Value, json};

use crate::common::{example, root};

fn golden(file: &str) -> std::path::PathBuf {
    root().join("tests/golden/scoring/score-neox-4tasks").join(file)
}

fn documents(task: &str, split: &str) -> Documents {
    Documents::open(golden(&format!("data/{task}.{split}.jsonl"))).unwrap()
}

fn written(dir: &Path, name: &str, text: &str) -> std::path::PathBuf {
    let path = dir.join(name);
    std::fs::write(&path, text).unwrap();
    path
}

fn evaluated(task: &Task, data: &str, options: &EvalOptions) -> Outcome {
    let model = pricket::load(golden("model")).unwrap();
    let examples: Vec<Value> = match task.shots(options.shots) {
        0 => Vec::new(),
        _ => documents(data, "train").map(Result::unwrap).collect(),
    };
    model.evaluate(task, documents(data, task.split()), &examples, options).unwrap()
}

const MULTIPLE_CHOICE: &str = "
output_type: multiple_choice
training_split: train
validation_split: validation
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}, {metric: acc_norm}]
metadata: {version: 1.0}
";

/// Each file gives the results of the built-in task of its name, which the golden data hold.
#[test]
fn task_files_of_the_harness_match_the_built_in_tasks() {
    let dir = tempfile::tempdir().unwrap();
    written(dir.path(), "_choices", MULTIPLE_CHOICE);
    for (name, text) in [
        (
            "piqa",
            "include: _choices\ntask: piqa\ndoc_to_text: \"Question: {{goal}}\\nAnswer:\"\ndoc_to_target: label\n\
             doc_to_choice: \"{{[sol1, sol2]}}\"",
        ),
        (
            "sciq",
            "include: _choices\ntask: sciq\ntest_split: test\ndoc_to_text: \"{{support.lstrip()}}\\nQuestion: {{question}}\\nAnswer:\"\n\
             doc_to_target: 3\ndoc_to_choice: \"{{[distractor1, distractor2, distractor3, correct_answer]}}\"",
        ),
        (
            "lambada_openai",
            "task: lambada_openai\noutput_type: loglikelihood\ntest_split: test\nmetadata: {version: 1.0}\n\
             doc_to_text: \"{{text.split(' ')[:-1]|join(' ')}}\"\ndoc_to_target: \"{{' '+text.split(' ')[-1]}}\"\n\
             metric_list: [{metric: perplexity, aggregation: perplexity}, {metric: acc}]",
        ),
        (
            "wikitext",
            "task: wikitext\noutput_type: loglikelihood_rolling\ntest_split: test\ndoc_to_text: ''\n\
             doc_to_target: !function preprocess_wikitext.wikitext_detokenizer\n\
             process_results: !function preprocess_wikitext.process_results\n\
             metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]\nmetadata: {version: 2.0}",
        ),
    ] {
        let file = Task::from_file(written(dir.path(), &format!("{name}.yaml"), text)).unwrap();
        let built_in = Task::named(name).unwrap();
        assert_eq!((file.version(), file.split()), (built_in.version(), built_in.split()));
        let mut counts = vec![None];
        counts.extend(["piqa", "sciq"].contains(&name).then_some(Some(3)));
        for shots in counts {
            let options = EvalOptions { shots, samples: true, bootstrap: 100, ..EvalOptions::default() };
            let (a, b) = (evaluated(&file, name, &options), evaluated(&built_in, name, &options));
            for (a, b) in a.samples.iter().zip(&b.samples) {
                assert_eq!((&a.requests, &a.target), (&b.requests, &b.target), "{name}");
            }
            assert_eq!(a.figures, b.figures, "{name}");
        }
    }
}

/// In winogrande the choices are contexts, and one continuation follows each of them.
#[test]
fn winogrande_prompts_match_its_functions() {
    let dir = tempfile::tempdir().unwrap();
    let task = Task::from_file(written(dir.path(), "w.yaml", &winogrande())).unwrap();
    let document = json!({"sentence": "Anna gave the ball to Mia and _ ran home.", "option1": "Anna", "option2": "Mia", "answer": "2"});
    let model = pricket::load(golden("model")).unwrap();
    let options = EvalOptions { samples: true, ..EvalOptions::default() };
    let run = |task: &Task| model.evaluate(task, [Ok(document.clone())], &[], &options).unwrap();
    let (file, built_in) = (run(&task), run(&Task::named("winogrande").unwrap()));
    assert_eq!(file.samples[0].requests, built_in.samples[0].requests);
    assert_eq!(file.samples[0].requests[1], ("Anna gave the ball to Mia and Mia".into(), " ran home.".into()));
    assert_eq!(file.get(Metric::Acc), built_in.get(Metric::Acc));
}

fn winogrande() -> String {
    format!(
        "{MULTIPLE_CHOICE}task: w\ndoc_to_text: !function preprocess_winogrande.doc_to_text\n\
         doc_to_target: !function preprocess_winogrande.doc_to_target\ndoc_to_choice: !function preprocess_winogrande.doc_to_choice"
    )
}

/// The prompts and choices of one document.
fn asked(text: &str, document: &Value) -> Result<Vec<(String, String)>, String> {
    let dir = tempfile::tempdir().unwrap();
    let task = Task::from_file(written(dir.path(), "t.yaml", text)).map_err(|e| e.to_string())?;
    let model = pricket::load(golden("model")).unwrap();
    let options = EvalOptions { samples: true, bootstrap: 0, ..EvalOptions::default() };
    let outcome = model.evaluate(&task, [Ok(document.clone())], &[], &options).map_err(|e| e.to_string())?;
    Ok(outcome.samples[0].requests.clone())
}

/// The texts of Jinja and Python, from lm-evaluation-harness 0.4.13.
#[test]
fn templates_are_rendered_as_python_renders_them() {
    let document = json!({"text": " The old man's house ", "flag": true, "score": 1e-7, "words": ["it's", "a"], "n": 3, "opts": {"z": 1, "a": 2}});
    for (template, expected) in [
        ("{{text.strip().split(' ')[:-1]|join(' ')}}", "The old man's"),
        ("{{text.split()|length}} {{words.index('a')}} {{text.index('old')}}", "4 1 5"),
        ("{{flag}} {{score}} {{n}} {{words}} {{none}}", "True 1e-07 3 [\"it's\", 'a'] None"),
        ("{{text.lstrip().lower().startswith('the')}}", "True"),
        ("{{opts}} {{opts.values()|list}}", "{'z': 1, 'a': 2} [1, 2]"),
        ("{{text|regex_replace('(o)(l)', '[\\\\\\\\g<2>]')}}", " The [l]d man's house "),
        ("{{text|regex_replace('(o)(l)', '\\\\\\\\2$\\\\\\\\1')}}", " The l$od man's house "),
    ] {
        let file = format!(
            "task: t\noutput_type: loglikelihood\ntest_split: test\ndoc_to_text: \"{template}\"\ndoc_to_target: \" the man\""
        );
        assert_eq!(asked(&file, &document).unwrap()[0].0, expected, "{template}");
    }
}

/// A text is a literal or the name of a column, for all documents alike.
#[test]
fn a_column_that_only_some_documents_have_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let file = "task: t\noutput_type: loglikelihood\ntest_split: test\ndoc_to_text: \"Right Answer:\"\ndoc_to_target: \" {{b}}\"";
    let task = Task::from_file(written(dir.path(), "t.yaml", file)).unwrap();
    let model = pricket::load(golden("model")).unwrap();
    let run = |documents: Vec<Value>| {
        model.evaluate(&task, documents.into_iter().map(Ok), &[], &EvalOptions::default()).map_err(|e| e.to_string())
    };
    assert!(run(vec![json!({"b": "x"}), json!({"b": "y"})]).is_ok());
    let error = run(vec![json!({"b": "x"}), json!({"b": "y", "Right Answer:": "z"})]).unwrap_err();
    assert!(error.contains("some documents have a column \"Right Answer:\""), "{error}");
}

#[test]
fn unsupported_task_files_are_refused_by_name() {
    let document = json!({"a": "the", "b": "man", "list": ["the", "man"], "label": 5});
    let choices = "task: t\noutput_type: multiple_choice\ntest_split: test\ndoc_to_text: a\n";
    let text = "task: t\noutput_type: loglikelihood\ntest_split: test\ndoc_to_text: a\n";
    let long = format!("a: &a [{}]\nb: [{}]\n", "x,".repeat(100_000), "*a,".repeat(1000));
    let deep = "{% set ns = namespace(x=[]) %}{% for i in range(99999) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x }}";
    let nested = "{% set ns = namespace(x=[]) %}{% for i in range(100) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x }}";
    let bomb = (1..40).map(|i| format!("k{i}: &k{i} [*k{}, *k{}]\n", i - 1, i - 1)).collect::<Vec<_>>().concat();
    for (file, expected) in [
        (
            format!("{choices}doc_to_choice: list\ndoc_to_target: !function utils.target"),
            "!function utils.target names a Python function",
        ),
        (
            format!("{choices}doc_to_choice: list\nprocess_docs: !function utils.process_docs"),
            "process_docs: !function",
        ),
        (
            format!("{choices}doc_to_choice: list\ndoc_to_target: 0\nmetric_list: [{{metric: !function m.f}}]"),
            "metric_list: !function m.f",
        ),
        (format!("{choices}doc_to_choice: list\ndoc_to_target: label"), "answer 5 is out of range for 2"),
        (format!("{choices}doc_to_choice: a\ndoc_to_target: 0"), "Python syntax"),
        (format!("{choices}doc_to_choice: \"{{{{a.foo()}}}}\"\ndoc_to_target: 0"), "foo"),
        (format!("{choices}doc_to_target: 0"), "doc_to_choice: the key is missing"),
        (format!("{choices}doc_to_choice: list\ndoc_to_target: 0\nrepeats: 3"), "repeats"),
        (format!("{choices}doc_to_choice: list\ndoc_to_target: 0\ngen_prefix: x"), "gen_prefix"),
        (format!("{choices}doc_to_choice: list\ndoc_to_target: 0\nmetric_list: [{{metric: mcc}}]"), "\"mcc\""),
        (
            format!(
                "{choices}doc_to_choice: list\ndoc_to_target: 0\nmetric_list: [{{metric: acc, ignore_case: true}}]"
            ),
            "ignore_case",
        ),
        (format!("{choices}doc_to_choice: list\ndoc_to_target: 0\nfewshot_config: {{sampler: balanced}}"), "balanced"),
        (format!("{text}doc_to_target: \"{{{{nowhere}}}}\""), "undefined"),
        (
            format!(
                "{text}doc_to_target: \"{{% for i in range(99999) %}}{{% for j in range(99999) %}}x{{% endfor %}}{{% endfor %}}\""
            ),
            "fuel",
        ),
        (format!("{text}doc_to_target: b\ninclude: t.yaml"), "include"),
        (format!("{text}doc_to_target: b\ninclude: nowhere.yaml"), "nowhere.yaml"),
        (format!("{text}doc_to_target: \"{deep}\""), "fuel"),
        (format!("{text}doc_to_target: \"{{{{ a{} }}}}\"", "~a".repeat(100_000)), "the limit is 16384"),
        (format!("{text}doc_to_target: \"{{{{ a{} }}}}\"", ".a".repeat(8000)), "undefined"),
        (format!("{text}doc_to_target: \"{{{{ {}a }}}}\"", "-".repeat(16_000)), "doc_to_target"),
        (format!("{text}doc_to_target: \"{{% if 0 %}}{}{{% endif %}}\"", "{%elif b.x.y%}".repeat(1100)), "undefined"),
        (
            format!("{choices}doc_to_choice: \"{{{{ {}list }}}}\"\ndoc_to_target: 0", "not ".repeat(4000)),
            "doc_to_choice",
        ),
        (format!("{text}doc_to_target: \"{nested}\""), "nested deeper than 64"),
        (format!("{text}doc_to_target: \"{{{{a|regex_replace('t', '\\\\\\\\q')}}}}\""), "replacement"),
        (format!("{text}doc_to_target: \"{{{{a|regex_replace('t', '\\\\\\\\g1')}}}}\""), "replacement"),
        (format!("{text}doc_to_target: \"{{{{a|regex_replace('(t)', '\\\\\\\\101')}}}}\""), "replacement"),
        (format!("{choices}doc_to_choice: nowhere\ndoc_to_target: 0"), "no column \"nowhere\""),
        ("task: t\noutput_type: loglikelihood\ntest_split: test\ndoc_to_target: b".into(), "doc_to_text"),
        (
            format!("{text}doc_to_target: b\ndataset_kwargs: {{data_files: x.jsonl, field: data}}"),
            "dataset_kwargs.field",
        ),
        (format!("{text}doc_to_target: b").replace("task: t", "task: ../t"), "the task name \"../t\""),
        (long, "the file expands to more than"),
        ("task: t\noutput_type: greedy_until".into(), "found greedy_until"),
        ("task: [a, b]\ngroup: g".into(), "groups of tasks"),
        ("- a\n- b".into(), "mapping"),
        ("a: [".into(), "t.yaml"),
        (format!("k0: &k0 x\n{bomb}task: t"), "t.yaml"),
    ] {
        let error = asked(&file, &document).unwrap_err();
        assert!(error.contains(expected), "{file}\n{error}");
    }
}

#[test]
fn unsupported_keys_of_written_answers_are_refused_by_name() {
    let written_answers = "task: t\noutput_type: generate_until\ntest_split: test\ndoc_to_text: a\ndoc_to_target: b\n";
    for (file, expected) in [
        (format!("{written_answers}generation_kwargs: {{until: 3}}"), "generation_kwargs.until: expected a string"),
        (
            format!("{written_answers}generation_kwargs: {{num_beams: 3}}"),
            "generation_kwargs.num_beams: this key is not supported",
        ),
        (
            format!("{written_answers}generation_kwargs: {{max_gen_toks: 0}}"),
            "max_gen_toks: expected a whole number, at least 1",
        ),
        (format!("{written_answers}repeats: 0"), "repeats: expected 1 to 1024, found 0"),
        (
            format!("{written_answers}repeats: 3\nfilter_list: [{{name: a, filter: []}}]"),
            "a keeps 3 answers; end it with take_first",
        ),
        (
            format!("{written_answers}filter_list: [{{name: a, filter: [{{function: regex, regex_pattern: '('}}]}}]"),
            "the pattern \"(\"",
        ),
        (
            format!("{written_answers}filter_list: [{{name: a, filter: [{{function: exec}}]}}]"),
            "exec: this filter is not supported",
        ),
        (format!("{written_answers}metric_list: [{{metric: bleu}}]"), "\"bleu\" is not a metric of this kind of task"),
        (
            format!("{written_answers}metric_list: [{{metric: exact_match, ignore_case: 3}}]"),
            "exact_match with \"ignore_case\": 3 is not supported",
        ),
        (
            format!("{written_answers}metric_list: [{{metric: exact_match, regexes_to_ignore: ['[']}}]"),
            "the pattern \"[\"",
        ),
    ] {
        let error = asked(&file, &json!({"a": "x", "b": "y"})).unwrap_err();
        assert!(error.contains(expected), "{file}\n{error}");
    }
}

/// If the examples come from the evaluated split, a question is not its own example.
#[test]
fn a_question_is_never_its_own_example() {
    let dir = tempfile::tempdir().unwrap();
    let file = |sampler: &str, split: &str| {
        let text = format!(
            "task: t\noutput_type: multiple_choice\ntest_split: validation\nfewshot_split: {split}\n\
             fewshot_config: {{sampler: {sampler}}}\ndoc_to_text: \"{{{{goal}}}}\"\ndoc_to_target: label\ndoc_to_choice: \"{{{{[sol1, sol2]}}}}\""
        );
        Task::from_file(written(dir.path(), "t.yaml", &text)).unwrap()
    };
    let model = pricket::load(golden("model")).unwrap();
    let pool: Vec<Value> = documents("piqa", "validation").take(6).map(Result::unwrap).collect();
    let options = EvalOptions { shots: Some(3), samples: true, ..EvalOptions::default() };
    let prompts = |task: &Task| -> Vec<String> {
        let outcome = model.evaluate(task, pool.iter().cloned().map(Ok), &pool, &options).unwrap();
        outcome.samples.into_iter().map(|sample| sample.requests[0].0.clone()).collect()
    };
    let goal = |i: usize| pool[i]["goal"].as_str().unwrap();
    for sampler in ["first_n", "default"] {
        for (i, prompt) in prompts(&file(sampler, "validation")).iter().enumerate() {
            assert_eq!(prompt.matches(goal(i)).count(), 1, "{sampler}: {prompt}");
        }
    }
    // The first other documents, in order. Another split is used as it is.
    let first = prompts(&file("first_n", "validation"));
    assert!(first[1].starts_with(goal(0)) && first[1].contains(goal(2)) && first[1].contains(goal(3)), "{}", first[1]);
    let other = prompts(&file("first_n", "train"));
    assert_eq!(other[0].matches(goal(0)).count(), 2, "{}", other[0]);
    // With too few other documents.
    let short =
        |count: usize| model.evaluate(&file("first_n", "validation"), [Ok(pool[0].clone())], &pool[..count], &options);
    assert!(short(4).is_ok() && short(3).unwrap_err().to_string().contains("at least 4 documents"));
}

/// A file that changes the keys beside a function of the harness is refused, because the task would differ.
#[test]
fn partly_changed_built_in_tasks_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let refused = |from: &str, to: &str| {
        assert!(winogrande().contains(from), "{from}");
        let text = winogrande().replace(from, to);
        Task::from_file(written(dir.path(), "w.yaml", &text)).unwrap_err().to_string()
    };
    let error = refused("doc_to_text: !function preprocess_winogrande.doc_to_text", "doc_to_text: sentence");
    assert!(error.contains("doc_to_text differs from the built-in task winogrande"), "{error}");
    let error = refused("task: w", "task: w\ntarget_delimiter: ''");
    assert!(error.contains("target_delimiter \" \""), "{error}");
    let error = refused("output_type: multiple_choice", "output_type: loglikelihood");
    assert!(error.contains("multiple_choice") || error.contains("acc_norm"), "{error}");
    let wikitext = "task: w\noutput_type: loglikelihood_rolling\ntest_split: test\ndoc_to_text: ''\n\
                    doc_to_target: !function preprocess_wikitext.wikitext_detokenizer";
    let error = Task::from_file(written(dir.path(), "w.yaml", wikitext)).unwrap_err().to_string();
    assert!(error.contains("process_results differs from the built-in task wikitext"), "{error}");
}

/// The functions of built-in tasks must be those of the harness, not others of the same name.
#[test]
fn a_changed_function_of_the_harness_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = written(dir.path(), "w.yaml", &winogrande());
    assert!(Task::from_file(&path).is_ok());
    written(dir.path(), "preprocess_winogrande.py", "def doc_to_text(doc): return 1\n");
    let error = Task::from_file(&path).unwrap_err().to_string();
    assert!(error.contains("preprocess_winogrande.py differs"), "{error}");
}

#[test]
fn choices_are_compared_by_bytes_too() {
    let dir = tempfile::tempdir().unwrap();
    let text = "task: t\noutput_type: multiple_choice\nvalidation_split: validation\ndoc_to_text: goal\ndoc_to_target: label\n\
                doc_to_choice: \"{{[sol1, sol2]}}\"\nmetric_list: [{metric: acc_norm}, {metric: acc_bytes}]";
    let task = Task::from_file(written(dir.path(), "t.yaml", text)).unwrap();
    let plain = evaluated(&task, "piqa", &EvalOptions::default());
    assert_eq!(plain.get(Metric::AccNorm), plain.get(Metric::AccBytes), "one byte a letter");
    // The letters take two bytes. The choice is short in letters and long in bytes.
    let model = pricket::load(golden("model")).unwrap();
    let options = EvalOptions { samples: true, ..EvalOptions::default() };
    let mut differ = 0;
    for other in ["the dog ran to the old house", "qx zv", "a miller", "Zebra xylophone", "hay", "kqzjx wvu"] {
        let document = json!({"goal": "the", "sol1": "éééééééééé", "sol2": other, "label": 0});
        let outcome = model.evaluate(&task, [Ok(document)], &[], &options).unwrap();
        let [a, b] = [0, 1].map(|i| outcome.samples[0].answers[i].sum);
        let right = |chars: f64| f64::from(u8::from(a / chars >= b / other.len() as f64));
        assert_eq!(outcome.get(Metric::AccNorm), Some(right(10.0)), "{other}");
        assert_eq!(outcome.get(Metric::AccBytes), Some(right(20.0)), "{other}");
        differ += usize::from(outcome.get(Metric::AccNorm) != outcome.get(Metric::AccBytes));
    }
    assert!(differ > 0, "one of the two could pass for the other");
}

#[test]
fn a_share_of_the_documents_is_rounded_up() {
    let limit = |text: &str| text.parse::<Limit>();
    assert_eq!((limit("12"), limit("0.5")), (Ok(Limit::Documents(12)), Ok(Limit::Share(0.5))));
    for text in ["0", "0.0", "1.5", "-1", "half", "NaN"] {
        assert!(limit(text).is_err(), "{text}");
    }
    let task = Task::named("piqa").unwrap();
    let count = documents("piqa", "validation").count();
    for (limit, expected) in [(Limit::Share(0.3), (count as f64 * 0.3).ceil() as usize), (Limit::Documents(5), 5)] {
        let options = EvalOptions { limit: Some(limit), ..EvalOptions::default() };
        assert_eq!(evaluated(&task, "piqa", &options).documents, expected);
    }
}

#[test]
fn several_numbers_of_examples_are_measured_by_one_command() {
    let dir = tempfile::tempdir().unwrap();
    let results = dir.path().join("r.json");
    let mut command = example("score");
    command.arg("--model").arg(golden("model")).arg("--data").arg(golden("data"));
    command.args(["--tasks", "piqa", "--num-fewshot", "0,2", "--limit", "0.25", "--log-samples", "--output"]);
    let output = command.arg(&results).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(said.contains("|piqa|1|0|12|acc|") && said.contains("|piqa|1|2|12|acc|"), "{said}");
    for shots in [0, 2] {
        let text = std::fs::read(dir.path().join(format!("r.{shots}shot.json"))).unwrap();
        let written: Value = serde_json::from_slice(&text).unwrap();
        assert_eq!((&written["n-shot"]["piqa"], &written["config"]["limit"]), (&json!(shots), &json!(0.25)));
        assert!(dir.path().join(format!("samples_piqa.{shots}shot.jsonl")).is_file());
    }
}

/// A task file names its own documents.
#[test]
fn documents_come_from_the_files_that_a_task_names() {
    let dir = tempfile::tempdir().unwrap();
    let file = |split: &str| golden(&format!("data/piqa.{split}.jsonl")).display().to_string();
    let text = format!(
        "{MULTIPLE_CHOICE}task: mine\ndataset_path: json\ndataset_kwargs: {{data_files: {{train: '{}', validation: '{}'}}}}\n\
         doc_to_text: \"Question: {{{{goal}}}}\\nAnswer:\"\ndoc_to_target: label\ndoc_to_choice: \"{{{{[sol1, sol2]}}}}\"\n\
         num_fewshot: 2",
        file("train"),
        file("validation")
    );
    let path = written(dir.path(), "mine.yaml", &text);
    let mut command = example("score");
    let output = command.arg("--model").arg(golden("model")).arg("--tasks").arg(&path).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let expected =
        evaluated(&Task::named("piqa").unwrap(), "piqa", &EvalOptions { shots: Some(2), ..EvalOptions::default() });
    let acc = expected.get(Metric::Acc).unwrap();
    assert!(said.contains(&format!("|mine|1|2|48|acc|{acc:.4}|")), "{said}");
}

/// More context makes a text more likely. An invalid stride is refused before the text is scored.
#[test]
fn a_stride_gives_each_token_more_context() {
    let dir = tempfile::tempdir().unwrap();
    let text =
        (0..40).map(|i| format!("In the year {i} the people of the States met the President. ")).collect::<Vec<_>>();
    let path = written(dir.path(), "text.txt", &text.concat());
    let loss = |more: &[&str]| {
        let output = example("score")
            .arg("--text")
            .arg(&path)
            .args(["--json", "--max-length", "32"])
            .args(more)
            .output()
            .unwrap();
        if !output.status.success() {
            return Err(String::from_utf8_lossy(&output.stderr).into_owned());
        }
        Ok(serde_json::from_slice::<Value>(&output.stdout).unwrap()["loss"].as_f64().unwrap())
    };
    let (disjoint, whole, overlapping) = (loss(&[]), loss(&["--stride", "32"]), loss(&["--stride", "8"]));
    assert_eq!(disjoint, whole);
    assert!(overlapping.unwrap() < disjoint.unwrap());
    for stride in ["0", "33"] {
        assert!(loss(&["--stride", stride]).unwrap_err().contains("stride: expected 1 to 32"));
    }
}

/// Answers, filters and metrics of tasks whose answers the model writes, as lm-evaluation-harness computed them
/// (`tools/peers/answers_parity.py --write`).
#[test]
fn written_answers_are_those_of_the_harness() {
    let file = std::fs::read(crate::common::root().join("tests/data/answers.json")).unwrap();
    let record: serde_json::Value = serde_json::from_slice(&file).unwrap();
    let model = pricket::load(crate::common::root().join("models/tiny")).unwrap();
    let dir = tempfile::tempdir().unwrap();
    for (name, of_task) in record.as_object().unwrap() {
        let definition = of_task["definition"].as_str().unwrap();
        let task = Task::from_file(written(dir.path(), &format!("{name}.yaml"), definition)).unwrap();
        let documents = |split: &str| of_task["documents"][split].as_array().cloned().unwrap_or_default();
        for (shots, expected) in of_task["results"].as_object().unwrap() {
            let options = EvalOptions { shots: Some(shots.parse().unwrap()), samples: true, ..EvalOptions::default() };
            let examples = documents(task.examples_split().unwrap_or_default());
            let questions = documents(task.split()).into_iter().map(Ok);
            let outcome = model.evaluate(&task, questions, &examples, &options).unwrap();
            for (filter, answers) in expected["answers"].as_object().unwrap() {
                let of_filter = outcome.samples.iter().filter_map(|sample| sample.written.as_ref());
                let found: Vec<&str> = of_filter
                    .filter(|written| written.filter == *filter)
                    .map(|written| &written.filtered[..])
                    .collect();
                assert_eq!(json!(found), *answers, "{name}, {shots} examples, {filter}");
            }
            for figure in &outcome.figures {
                let key = |part: &str| format!("{}{part},{}", figure.metric.name(), figure.filter);
                let (value, stderr) = (&expected["figures"][key("")], &expected["figures"][key("_stderr")]);
                assert!((figure.value - value.as_f64().unwrap()).abs() < 1e-9, "{name} {figure:?} {value}");
                assert!((figure.stderr.unwrap() - stderr.as_f64().unwrap()).abs() < 1e-9, "{name} {figure:?} {stderr}");
            }
        }
    }
    // A question leaves no room for an answer as long as the context.
    let text = "task: t\noutput_type: generate_until\ntest_split: test\ndoc_to_text: a\ndoc_to_target: b\n\
                generation_kwargs: {max_gen_toks: 512}";
    let task = Task::from_file(written(dir.path(), "long.yaml", text)).unwrap();
    let error = model.evaluate(&task, [Ok(json!({"a": "x", "b": "y"}))], &[], &EvalOptions::default()).unwrap_err();
    assert!(error.to_string().contains("leaves no room for a question in 512 tokens"), "{error}");
}
