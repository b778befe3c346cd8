//! Tokenizing, streaming, stop strings, sampling.

use pricket::{FinishReason, GenerateOptions, SamplingParams};
use proptest::prelude::*;

fn sampled(seed: u64) -> GenerateOptions {
    let sampling = SamplingParams { temperature: 0.9, top_p: 0.95, ..SamplingParams::default() };
    GenerateOptions { max_tokens: 40, sampling, seed, ..Default::default() }
}

#[test]
fn a_stream_is_the_same_text_in_pieces() {
    let pricket = pricket::tiny().unwrap();
    let whole = pricket.generate("The committee", &sampled(3)).unwrap();
    let mut stream = pricket.stream("The committee", &sampled(3)).unwrap();
    let pieces: Vec<String> = stream.by_ref().map(Result::unwrap).collect();
    assert!(pieces.len() > 10);
    assert_eq!(pieces.concat(), whole.text);
    assert_eq!(stream.into_completion().ids, whole.ids);
    assert_eq!(pricket.decode(&whole.ids).unwrap(), whole.text);
}

#[test]
fn equal_seeds_give_equal_texts() {
    let pricket = pricket::tiny().unwrap();
    let text = |seed| pricket.generate("We", &sampled(seed)).unwrap().text;
    assert_eq!(text(1), text(1));
    assert_ne!(text(1), text(2));
}

/// Every stop string taken from the text ends the text directly before it, across token borders or not.
#[test]
fn stop_strings_work_across_token_borders() {
    let pricket = pricket::tiny().unwrap();
    let free = pricket.generate("My fellow citizens,", &sampled(5)).unwrap().text;
    let chars: Vec<usize> = free.char_indices().map(|(i, _)| i).collect();
    let mut crossed = 0;
    for start in (4..chars.len() - 8).step_by(5) {
        for len in [1, 4, 7] {
            let stop = free[chars[start]..chars[start + len]].to_owned();
            let options = GenerateOptions { stop: vec!["never to be seen".into(), stop.clone()], ..sampled(5) };
            let mut stream = pricket.stream("My fellow citizens,", &options).unwrap();
            let pieces: Vec<String> = stream.by_ref().map(Result::unwrap).collect();
            let done = stream.into_completion();
            assert_eq!(done.finish, FinishReason::Stop);
            assert_eq!(done.text, free[..free.find(&stop).unwrap()], "stopping at {stop:?}");
            assert_eq!(pieces.concat(), done.text);
            let tokens: Vec<String> = done.ids.iter().map(|&id| pricket.decode(&[id]).unwrap()).collect();
            crossed += usize::from(!tokens.last().unwrap().contains(&stop));
        }
    }
    assert!(crossed > 5, "no stop string crossed a border");
}

#[test]
fn prompts_in_a_batch_give_the_texts_they_give_alone() {
    let pricket = pricket::tiny().unwrap();
    let prompts =
        ["The whale", "A", "My fellow citizens of the Senate and of the House of Representatives", "In the year"];
    for options in [GenerateOptions { max_tokens: 48, ..Default::default() }, sampled(11)] {
        let options = GenerateOptions { stop: vec![".".into()], ..options };
        let batch = pricket.generate_batch(&prompts, &options).unwrap();
        for (prompt, together) in prompts.iter().zip(batch) {
            let alone = pricket.generate(prompt, &options).unwrap();
            assert_eq!((together.text, together.finish), (alone.text, alone.finish), "{prompt}");
        }
    }
}

#[test]
fn samples_are_the_texts_of_their_seeds() {
    let pricket = pricket::tiny().unwrap();
    let rows = pricket.samples("The", 3, &sampled(7)).unwrap();
    for (row, seed) in rows.iter().zip(7..) {
        assert_eq!(row.text, pricket.generate("The", &sampled(seed)).unwrap().text);
    }
}

/// Fine-tuned checkpoints store the truncation and padding of their training batches.
#[test]
fn truncation_and_padding_in_a_tokenizer_file_are_left_alone() {
    let plain = pricket::tiny().unwrap().tokenizer().unwrap().clone();
    let mut file: serde_json::Value =
        serde_json::from_slice(&std::fs::read(crate::common::root().join("models/tiny/tokenizer.json")).unwrap())
            .unwrap();
    file["truncation"] =
        serde_json::json!({"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0});
    file["padding"] = serde_json::json!({
        "strategy": {"Fixed": 64}, "direction": "Left", "pad_to_multiple_of": null, "pad_id": 1, "pad_type_id": 0, "pad_token": "x",
    });
    let tokenizer = pricket::lm::Tokenizer::from_bytes(file.to_string().as_bytes(), "changed").unwrap();
    for text in ["", "The", "The people of the United States of America"] {
        assert_eq!(tokenizer.encode(text).unwrap(), plain.encode(text).unwrap());
    }
}

#[test]
fn a_row_can_be_stopped_at_any_time() {
    let pricket = pricket::tiny().unwrap();
    let prompts = vec![pricket.encode("The people of the").unwrap(), pricket.encode("A").unwrap()];
    let options = GenerateOptions { max_tokens: 6, stop_at_eos: false, ..Default::default() };
    let alone = pricket.generate("A", &options).unwrap().ids;
    for when in 0..3 {
        let mut generation = pricket.generation(prompts.clone(), &options).unwrap();
        let mut rows = vec![Vec::new(); 2];
        let mut steps = 0;
        loop {
            if steps == when {
                generation.stop(0);
            }
            let Some(tokens) = generation.step().unwrap() else { break };
            for token in tokens {
                rows[token.row].push(token.id);
            }
            steps += 1;
        }
        assert_eq!((rows[0].len(), &rows[1]), (when, &alone));
    }
}

#[test]
fn tokens_beyond_the_tokenizer_are_never_written() {
    let pricket = pricket::tiny().unwrap();
    let known = pricket.tokenizer().unwrap().vocab_size();
    assert!(known < pricket.info().vocab, "the model's vocabulary is padded");
    // At this temperature the distribution is almost flat: one token in forty would be padding.
    let sampling = SamplingParams { temperature: 1e4, ..SamplingParams::default() };
    let options = GenerateOptions { max_tokens: 400, sampling, stop_at_eos: false, ..Default::default() };
    let ids = pricket.generate("The", &options).unwrap().ids;
    assert_eq!(ids.len(), 400);
    assert!(ids.iter().all(|&id| (id as usize) < known));
}

#[test]
fn an_empty_prompt_begins_a_document_and_a_long_one_is_refused() {
    let pricket = pricket::tiny().unwrap();
    let empty = pricket.generate("", &sampled(2)).unwrap();
    assert_eq!(empty.prompt_ids, [0]);
    let long = "and so on ".repeat(400);
    let error = pricket.generate(&long, &GenerateOptions::default()).unwrap_err();
    assert!(matches!(error, pricket::Error::ContextExceeded { limit: 512, .. }), "{error}");
    let beyond = GenerateOptions { beyond_trained_length: true, max_tokens: 2, ..Default::default() };
    assert!(pricket.generate(&long, &beyond).is_ok());
    assert!(matches!(pricket.logprobs(&long), Err(pricket::Error::ContextExceeded { .. })));
}

#[test]
fn a_full_context_ends_the_text() {
    let pricket = pricket::tiny().unwrap();
    let prompt = pricket.encode(&"the people of ".repeat(200)).unwrap()[..500].to_vec();
    let options = GenerateOptions { max_tokens: 100, stop_at_eos: false, ..Default::default() };
    let mut generation = pricket.generation(vec![prompt], &options).unwrap();
    let mut last = None;
    let mut count = 0;
    while let Some(tokens) = generation.step().unwrap() {
        last = tokens[0].finish;
        count += 1;
    }
    // The 513th token is the prediction at the 512th position.
    assert_eq!((count, last), (13, Some(pricket::FinishReason::Context)));
}

#[test]
fn impossible_settings_are_refused_by_name() {
    let pricket = pricket::tiny().unwrap();
    let settings = [
        (SamplingParams { temperature: -1.0, ..SamplingParams::default() }, "temperature"),
        (SamplingParams { temperature: f32::NAN, ..SamplingParams::default() }, "temperature"),
        (SamplingParams { top_p: 0.0, ..SamplingParams::default() }, "top_p"),
        (SamplingParams { min_p: 2.0, ..SamplingParams::default() }, "min_p"),
        (SamplingParams { repetition_penalty: 0.0, ..SamplingParams::default() }, "repetition_penalty"),
    ];
    for (sampling, name) in settings {
        let options = GenerateOptions { sampling, ..Default::default() };
        assert!(pricket.generate("A", &options).unwrap_err().to_string().contains(name));
    }
}

#[test]
fn penalties_have_their_documented_effect() {
    let pricket = pricket::tiny().unwrap();
    let distinct = |sampling: SamplingParams| {
        let options = GenerateOptions { max_tokens: 120, sampling, stop_at_eos: false, ..Default::default() };
        let ids = pricket.generate("The", &options).unwrap().ids;
        ids.iter().collect::<std::collections::HashSet<_>>().len()
    };
    let plain = distinct(SamplingParams::greedy());
    assert!(distinct(SamplingParams { repetition_penalty: 1.5, ..SamplingParams::greedy() }) > plain);
    assert!(distinct(SamplingParams { frequency_penalty: 1.0, ..SamplingParams::greedy() }) > plain);
    assert_eq!(distinct(SamplingParams { presence_penalty: 1e6, ..SamplingParams::greedy() }), 120);
    let options = GenerateOptions {
        max_tokens: 120,
        sampling: SamplingParams { no_repeat_ngram_size: 2, ..SamplingParams::greedy() },
        stop_at_eos: false,
        ..Default::default()
    };
    let ids = pricket.generate("The", &options).unwrap().ids;
    let pairs: std::collections::HashSet<_> = ids.windows(2).collect();
    assert_eq!(pairs.len(), ids.len() - 1);
}

#[test]
fn log_probabilities_are_those_of_the_whole_text() {
    let pricket = pricket::tiny().unwrap();
    let text = "The Congress of the United States";
    let scored = pricket.logprobs(text).unwrap();
    let ids = pricket.encode(text).unwrap();
    assert_eq!(scored.iter().map(|t| t.id).collect::<Vec<_>>(), ids[1..]);
    assert!(scored.iter().all(|t| t.logprob < 0.0));
    let greedy = pricket.generate(text, &GenerateOptions { max_tokens: 3, ..Default::default() }).unwrap();
    let again = pricket.logprobs(&(text.to_owned() + &greedy.text)).unwrap();
    let tail = &again[again.len() - 3..];
    for (scored, (id, logprob)) in tail.iter().zip(greedy.ids.iter().zip(&greedy.logprobs)) {
        assert_eq!(scored.id, *id);
        assert!(scored.is_greedy && (scored.logprob - logprob).abs() < 1e-4);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    /// Any text survives encoding and decoding, as a whole and token by token.
    #[test]
    fn text_survives_the_tokenizer(text in "\\PC{0,40}") {
        let tokenizer = pricket::tiny().unwrap().tokenizer().unwrap().clone();
        let ids = tokenizer.encode(&text).unwrap();
        let decoded = tokenizer.decode(&ids);
        let mut decoder = tokenizer.decoder();
        let mut streamed: String = ids.iter().map(|&id| decoder.push(id)).collect();
        streamed.push_str(&decoder.finish());
        prop_assert_eq!(&streamed, &decoded);
        // The tokenizer normalizes to NFC, so a second round changes nothing.
        prop_assert_eq!(tokenizer.decode(&tokenizer.encode(&decoded).unwrap()), decoded);
    }

    /// For any ids the pieces add up to the whole text, and no piece holds part of a character.
    #[test]
    fn any_ids_are_decoded(ids in prop::collection::vec(0u32..3000, 0..40)) {
        let tokenizer = pricket::tiny().unwrap().tokenizer().unwrap().clone();
        let mut decoder = tokenizer.decoder();
        let mut streamed: String = ids.iter().map(|&id| decoder.push(id)).collect();
        streamed.push_str(&decoder.finish());
        prop_assert_eq!(streamed, tokenizer.decode(&ids));
    }
}

#[test]
fn both_defaults_are_greedy() {
    assert_eq!(GenerateOptions::default().sampling, SamplingParams::default());
    assert_eq!(SamplingParams::default().temperature, 0.0);
    // Options that have no effect at temperature 0 are refused.
    let pricket = pricket::tiny().unwrap();
    for (sampling, word) in [
        (SamplingParams { top_k: 40, ..SamplingParams::default() }, "top_k has no effect"),
        (SamplingParams { top_p: 0.9, ..SamplingParams::default() }, "top_p has no effect"),
        (SamplingParams { min_p: 0.1, ..SamplingParams::default() }, "min_p has no effect"),
        (SamplingParams { typical_p: 0.9, ..SamplingParams::default() }, "typical_p has no effect"),
    ] {
        let options = GenerateOptions { sampling, max_tokens: 1, ..Default::default() };
        let error = pricket.generate("the", &options).unwrap_err().to_string();
        assert!(error.contains(word), "{error}");
        let warm = GenerateOptions { sampling: SamplingParams { temperature: 0.7, ..options.sampling }, ..options };
        assert!(pricket.generate("the", &warm).is_ok());
    }
}
