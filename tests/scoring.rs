//! Log-likelihoods, tasks, slices.

use pricket::lm::{
    Continuation, Documents, EvalOptions, Metric, ScoreOptions, Task, loglikelihoods, slice_losses, token_logprobs,
};
use pricket::{Error, Loader};
use proptest::prelude::*;
use serde_json::{Value, json};

use crate::common::{example, root, small};
use crate::properties::any_config;

fn golden(file: &str) -> std::path::PathBuf {
    root().join("tests/golden/scoring/score-neox-4tasks").join(file)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Batched requests with shared contexts, cut off where the context is full, give the results of single requests
    /// read from the start.
    #[test]
    fn batched_scores_match_single_scores(
        contexts in prop::collection::vec(prop::collection::vec(0u32..61, 1..40), 1..5),
        choices in prop::collection::vec((0usize..5, prop::collection::vec(0u32..61, 1..12)), 1..14),
        room in 14usize..60, batch in 1usize..200, config in any_config(),
    ) {
        let model = small(&config, 2).model();
        let request = |(i, ids): &(usize, Vec<u32>)| {
            Continuation { context: contexts[i % contexts.len()].clone(), ids: ids.clone() }
        };
        let requests: Vec<Continuation> = choices.iter().map(request).collect();
        let options = ScoreOptions { max_length: Some(room), batch_tokens: Some(batch), ..ScoreOptions::default() };
        let found = loglikelihoods(&*model, &requests, &options).unwrap();
        for (request, found) in requests.iter().zip(&found) {
            let all = [&request.context[..], &request.ids].concat();
            let read = &all[all.len().saturating_sub(room + 1)..];
            let scored = token_logprobs(&*model, read).unwrap();
            let scored = &scored[scored.len() - request.ids.len()..];
            let sum: f64 = scored.iter().map(|token| f64::from(token.logprob)).sum();
            prop_assert!((sum - found.sum).abs() < 1e-4, "{sum} and {}", found.sum);
            prop_assert_eq!(found.is_greedy, scored.iter().all(|token| token.is_greedy));
            prop_assert_eq!((found.tokens, found.cut), (request.ids.len(), all.len() - read.len()));
        }
    }

    /// Every token is scored once. The first is scored after the prefix. From the second window on, tokens get all the
    /// context that fits.
    #[test]
    fn windows_cover_a_text(len in 0usize..70, room in 1usize..20, stride in 1usize..20) {
        let ids: Vec<u32> = (1..=len as u32).collect();
        for stride in [stride.min(room), room] {
            let windows = Continuation::windows(&ids, 0, room, stride);
            prop_assert_eq!(windows.iter().flat_map(|window| window.ids.clone()).collect::<Vec<_>>(), &ids[..]);
            for (i, window) in windows.iter().enumerate() {
                let read = [&window.context[..], &window.ids].concat();
                prop_assert!(read.len() <= room + 1 && read.windows(2).all(|pair| pair[1] == pair[0] + 1));
                prop_assert_eq!(i == 0, window.context == [0]);
                prop_assert!(i == 0 || window.ids.len() <= stride && read.len() == room + 1);
            }
        }
        // A window size of 0 counts as 1.
        prop_assert_eq!(Continuation::windows(&ids, 0, 0, 0), Continuation::windows(&ids, 0, 1, 1));
    }
}

#[test]
fn invalid_requests_are_refused() {
    let model = small(&json!({}), 2).model();
    let score = |context: &[u32], ids: &[u32]| {
        let request = Continuation { context: context.to_vec(), ids: ids.to_vec() };
        loglikelihoods(&*model, &[request], &ScoreOptions::default()).map_err(|e| e.to_string())
    };
    assert!(score(&[1], &[2]).is_ok());
    assert!(score(&[1], &[61]).unwrap_err().contains("token 61"));
    assert!(score(&[1], &[]).is_err() && score(&[], &[1]).is_err());
    assert!(score(&[1], &[2; 97]).unwrap_err().contains("97 tokens"), "more than the model reads at once");
    assert!(score(&[1], &[2; 96]).is_ok());
}

/// Spaces at the end of the context move to the continuation. Token borders are those of the whole text.
#[test]
fn token_borders_match_the_harness() {
    let tokenizer = pricket::lm::Tokenizer::from_file(golden("model/tokenizer.json")).unwrap();
    let encode = |context: &str, continuation: &str| Continuation::encode(&tokenizer, 0, context, continuation);
    assert_eq!(encode("the dog ", "ran").unwrap(), encode("the dog", " ran").unwrap());
    assert_eq!(encode("the dog\n", "ran").unwrap(), encode("the dog", "\nran").unwrap());
    let alone = encode("", "the dog").unwrap();
    assert_eq!((alone.context, alone.ids), (vec![0], tokenizer.encode("the dog").unwrap()));
    assert!(encode("the dog", "").is_err());
}

/// The built-in piqa, as a task file of a user.
#[test]
fn a_user_task_matches_the_built_in_task() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("mine.toml");
    let text = r#"
        name = "mine"
        kind = "multiple_choice"
        text = "Question: {{ goal }}\nAnswer:"
        choices = "[sol1, sol2]"
        answer = "label"
        examples = true
    "#;
    std::fs::write(&path, text).unwrap();
    let model = pricket::load(golden("model")).unwrap();
    let documents = |split: &str| Documents::open(golden(&format!("data/piqa.{split}.jsonl"))).unwrap();
    let examples: Vec<Value> = documents("train").map(Result::unwrap).collect();
    let options = EvalOptions { shots: Some(2), samples: true, ..EvalOptions::default() };
    let run = |task: &Task| model.evaluate(task, documents("validation"), &examples, &options).unwrap();
    let (ours, theirs) = (run(&Task::from_file(&path).unwrap()), run(&Task::named("piqa").unwrap()));
    assert_eq!(ours.figures, theirs.figures);
    for (a, b) in ours.samples.iter().zip(&theirs.samples) {
        assert_eq!((&a.requests, &a.target, &a.answers), (&b.requests, &b.target, &b.answers));
    }

    // Where the contexts differ, the harness calls the continuation the target. A file of samples holds texts only.
    let document = json!({"sentence": "Anna gave the ball to Mia and _ ran home.", "option1": "Anna", "option2": "Mia", "answer": "2"});
    let run = |name: &str, document: Value| {
        let outcome = model.evaluate(
            &Task::named(name).unwrap(),
            [Ok(document)],
            &[],
            &EvalOptions { shots: Some(0), ..options.clone() },
        );
        outcome.unwrap().samples[0].to_json()
    };
    let sample = run("winogrande", document);
    assert_eq!(sample["target"], "ran home.");
    assert_eq!(
        sample["arguments"]["gen_args_1"],
        json!({"arg_0": "Anna gave the ball to Mia and Mia", "arg_1": " ran home."})
    );
    let piqa = run("piqa", json!({"goal": "g", "sol1": "a", "sol2": "b", "label": 1}));
    assert_eq!(piqa["target"], "1");
    assert_eq!(run("lambada_openai", json!({"text": "He saw the wolf"}))["target"], " wolf");

    // Whole texts, and one continuation.
    let whole = "name = 'w'\nkind = 'perplexity'\ntarget = '{{ goal }}'";
    std::fs::write(&path, whole).unwrap();
    let outcome =
        model.evaluate(&Task::from_file(&path).unwrap(), documents("validation"), &[], &EvalOptions::default());
    assert!(outcome.unwrap().get(Metric::BitsPerByte).unwrap() > 0.0);
    let word = "name = 'l'\nkind = 'loglikelihood'\ntext = '{{ goal }}'\ntarget = ' {{ sol1 }}'\nmetrics = ['acc']";
    std::fs::write(&path, word).unwrap();
    let task = Task::from_file(&path).unwrap();
    let outcome = model.evaluate(&task, documents("validation"), &[], &EvalOptions::default()).unwrap();
    assert_eq!(outcome.figures.len(), 1);

    for (text, what) in [
        ("name = 'x'", "kind"),
        ("name = 'x'\nkind = 'multiple_choice'\ntext = ''", "the key choices is missing"),
        ("name = 'x'\nkind = 'loglikelihood'\ntext = '{{ a'\ntarget = ''", "text"),
        ("name = 'x'\nkind = 'perplexity'\ntarget = ''\nmetrics = ['acc']", "expected one of word_perplexity"),
        ("name = 'x'\nkind = 'perplexity'\ntarget = ''\nmetric = []", "metric"),
    ] {
        std::fs::write(&path, text).unwrap();
        let error = Task::from_file(&path).unwrap_err().to_string();
        assert!(error.contains("mine.toml") && error.contains(what), "{error}");
    }
    let missing = "name = 'x'\nkind = 'perplexity'\ntarget = '{{ nowhere }}'";
    std::fs::write(&path, missing).unwrap();
    let task = Task::from_file(&path).unwrap();
    let error = model.evaluate(&task, documents("validation"), &[], &EvalOptions::default()).unwrap_err().to_string();
    assert!(error.contains("document 0") && error.contains("undefined"), "{error}");
}

#[test]
fn invalid_documents_are_named() {
    let model = pricket::load(golden("model")).unwrap();
    let ask = |name: &str, document: Value| {
        let task = Task::named(name).unwrap();
        model.evaluate(&task, [Ok(document)], &[], &EvalOptions::default()).map(|_| ()).map_err(|e| e.to_string())
    };
    for (task, document, what) in [
        ("piqa", json!({"goal": "g", "sol1": "a"}), "\"sol2\""),
        ("piqa", json!({"goal": "g", "sol1": "a", "sol2": "b", "label": 2}), "answer 2 is out of range for 2"),
        ("winogrande", json!({"sentence": "no blank"}), "no blank"),
        ("arc_easy", json!({"question": "q", "choices": {"label": ["A"], "text": ["x"]}, "answerKey": "B"}), "\"B\""),
        ("hellaswag", json!({"activity_label": "a", "ctx_a": "b", "ctx_b": "c", "endings": "d"}), "endings"),
        ("wikitext", json!([]), "page"),
    ] {
        let error = ask(task, document).unwrap_err();
        assert!(error.contains(task) && error.contains("document 0") && error.contains(what), "{error}");
    }
    let none: [pricket::lm::Result<Value>; 0] = [];
    let none = model.evaluate(&Task::named("piqa").unwrap(), none, &[], &EvalOptions::default());
    assert!(matches!(none, Err(Error::Text(_))), "{none:?}");
    let few = EvalOptions { shots: Some(2), ..EvalOptions::default() };
    let document = json!({"goal": "g", "sol1": "a", "sol2": "b", "label": 0});
    let error = model.evaluate(&Task::named("piqa").unwrap(), [Ok(document.clone())], &[document], &few).unwrap_err();
    assert!(error.to_string().contains("at least 3 documents"), "{error}");
    assert!(Task::named("mmlu").unwrap_err().to_string().contains("lambada_openai"));

    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("d.jsonl");
    std::fs::write(&path, "{\"a\": 1}\n\n{\"a\": \n").unwrap();
    let read: Vec<_> = Documents::open(&path).unwrap().collect();
    assert_eq!(read.len(), 2);
    let error = read[1].as_ref().unwrap_err().to_string();
    assert!(error.contains("d.jsonl, line 3"), "{error}");
}

/// The loss of a slice is that of its texts, in any order among other slices.
#[test]
fn slices_add_up() {
    let model = Loader::embedded("tiny").unwrap().load().unwrap();
    let text = |i: usize| format!("In the year {i} the people of the States met the President.");
    let documents: Vec<Value> = (0..40)
        .map(|i| json!({"text": text(i), "meta": {"pile_set_name": if i % 3 == 0 { "A" } else { "B" }}}))
        .collect();
    let score = |documents: Vec<Value>| {
        let (model, tokenizer) = (model.model(), model.tokenizer().unwrap());
        slice_losses(&*model, tokenizer, documents.into_iter().map(Ok), 0, &ScoreOptions::default()).unwrap()
    };
    let both = score(documents.clone());
    assert_eq!(both.keys().collect::<Vec<_>>(), ["A", "B"]);
    assert_eq!((both["A"].documents, both["B"].documents), (14, 26));
    let only: Vec<Value> = documents.iter().step_by(3).map(|d| json!({"text": d["text"]})).collect();
    let alone = score(only)["all"];
    assert!((alone.loss() - both["A"].loss()).abs() < 1e-6);
    let bytes: usize = (0..40).step_by(3).map(|i| text(i).len()).sum();
    assert_eq!(alone.bytes, bytes as u64);
    assert!((alone.bits_per_byte() - alone.nats / bytes as f64 / std::f64::consts::LN_2).abs() < 1e-12);
}

/// The command, from its flags to its output files.
#[test]
fn score_writes_the_format_of_the_harness() {
    let dir = tempfile::tempdir().unwrap();
    let results = dir.path().join("results.json");
    let score = |more: &[&str]| {
        let mut command = example("score");
        command.arg("--model").arg(golden("model")).arg("--data").arg(golden("data")).args(more);
        command.output().unwrap()
    };
    let output = score(&[
        "--tasks",
        "piqa,wikitext",
        "--log-samples",
        "--output",
        results.to_str().unwrap(),
        "--bootstrap-iters",
        "0",
    ]);
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(said.contains("|piqa|1|0|48|acc|0.7292|0.0648|"), "{said}");
    let written: Value = serde_json::from_slice(&std::fs::read(&results).unwrap()).unwrap();
    let expected: Value = serde_json::from_slice(&std::fs::read(golden("results.json")).unwrap()).unwrap();
    for (task, metric) in [("piqa", "acc"), ("piqa", "acc_norm"), ("wikitext", "byte_perplexity")] {
        let (found, wanted) = (&written["results"][task][format!("{metric},none")], &expected["0-shot"][task][metric]);
        assert!((found.as_f64().unwrap() - wanted.as_f64().unwrap()).abs() < 1e-6, "{task} {metric}: {found} {wanted}");
    }
    assert_eq!(written["versions"], json!({"piqa": 1.0, "wikitext": 2.0}));
    assert_eq!(written["n-samples"]["piqa"], json!({"original": 48, "effective": 48}));
    let samples = std::fs::read_to_string(dir.path().join("samples_piqa.jsonl")).unwrap();
    let first: Value = serde_json::from_str(samples.lines().next().unwrap()).unwrap();
    assert_eq!(samples.lines().count(), 48);
    assert!(first["arguments"]["gen_args_0"]["arg_0"].as_str().unwrap().starts_with("Question: How do you"));
    assert_eq!(first["resps"][0][0].as_array().unwrap().len(), 2);

    let output = score(&["--tasks", "arc_easy"]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && said.contains("arc_easy.test.jsonl: file not found"), "{said}");
    let output = example("score").args(["--prompt", "The whale", "--json"]).output().unwrap();
    let text: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(text["perplexity"].as_f64().unwrap() > 1.0 && !text["tokens"].as_array().unwrap().is_empty());
}
