//! Prompt formats and conversations.

use std::path::Path;

use pricket::lm::{Role, Turn};
use pricket::text::prompt_format;
use pricket::{Conversation, FinishReason, GenerateOptions, Loader, Pricket, SamplingParams};
use proptest::prelude::*;
use serde_json::{Value, json};

use crate::common::root;

fn tiny_chat() -> Pricket {
    Loader::embedded("tiny-chat").unwrap().threads(2).load().unwrap()
}

/// Every format, character for character, with the same three turns. `¶` is a line break.
#[test]
fn prompt_formats_match_the_training_format() {
    let intro =
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.";
    let chatml =
        "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers.";
    let stablelm = "<|SYSTEM|># StableLM Tuned (Alpha version)¶- StableLM is a helpful and harmless open-source AI language model \
        developed by StabilityAI.¶- StableLM is excited to be able to help the user, but will refuse to do anything that could \
        be considered harmful to the user.¶- StableLM is more than just an information source, StableLM is also able to write \
        poetry, short stories, and make jokes.¶- StableLM will refuse to participate in anything that could harm a human.¶";
    let expected = [
        ("plain", "One?".into(), "One?Yes.Two?".into()),
        (
            "dolly",
            format!("{intro}¶### Instruction:¶One?¶### Response:¶"),
            format!("{intro}¶### Instruction:¶One?¶### Response:¶Yes.¶### Instruction:¶Two?¶### Response:¶"),
        ),
        (
            "dolly-blank",
            format!("{intro}¶¶### Instruction:¶One?¶¶### Response:¶"),
            format!(
                "{intro}¶¶### Instruction:¶One?¶¶### Response:¶Yes.¶¶### End¶¶### Instruction:¶Two?¶¶### Response:¶"
            ),
        ),
        (
            "mpt-instruct",
            format!("{intro}¶¶###Instruction¶One?¶¶### Response¶"),
            format!("{intro}¶¶###Instruction¶One?¶¶### Response¶Yes.¶¶###Instruction¶Two?¶¶### Response¶"),
        ),
        (
            "chatml",
            format!("<|im_start|>system¶{chatml}<|im_end|>¶<|im_start|>user¶One?<|im_end|>¶<|im_start|>assistant¶"),
            format!(
                "<|im_start|>system¶{chatml}<|im_end|>¶<|im_start|>user¶One?<|im_end|>¶<|im_start|>assistant¶Yes.<|im_end|>¶\
                 <|im_start|>user¶Two?<|im_end|>¶<|im_start|>assistant¶"
            ),
        ),
        (
            "chatml-shipped",
            format!("<|im_start|>system¶{chatml}¶<|im_start|>user¶One?<|im_end|>¶<|im_start|>assistant¶"),
            format!(
                "<|im_start|>system¶{chatml}¶<|im_start|>user¶One?<|im_end|>¶<|im_start|>assistant¶¶<|im_start|>assistant¶\
                 Yes.<|im_end|>¶<|im_start|>assistant¶¶<|im_start|>user¶Two?<|im_end|>¶<|im_start|>assistant¶"
            ),
        ),
        ("incite-chat", "<human>: One?¶<bot>:".into(), "<human>: One?¶<bot>: Yes.¶<human>: Two?¶<bot>:".into()),
        ("incite-instruct", "Q: One?¶A:".into(), "Q: One?¶A: Yes.¶Q: Two?¶A:".into()),
        (
            "rwkv-qa",
            "¶Q & A¶¶Question:¶One?¶¶Detailed Expert Answer:¶".into(),
            "¶Q & A¶¶Question:¶One?¶¶Detailed Expert Answer:¶Yes.¶¶¶Q & A¶¶Question:¶Two?¶¶Detailed Expert Answer:¶"
                .into(),
        ),
        (
            "oasst",
            "<|prompter|>One?<|endoftext|><|assistant|>".into(),
            "<|prompter|>One?<|endoftext|><|assistant|>Yes.<|endoftext|><|prompter|>Two?<|endoftext|><|assistant|>"
                .into(),
        ),
        (
            "stablelm-tuned-alpha",
            format!("{stablelm}<|USER|>One?<|ASSISTANT|>"),
            format!("{stablelm}<|USER|>One?<|ASSISTANT|>Yes.<|USER|>Two?<|ASSISTANT|>"),
        ),
    ];
    assert_eq!(expected.len(), pricket::text::prompt_formats().len());
    let turns = [Turn::user("One?"), Turn::assistant("Yes."), Turn::user("Two?")];
    for (name, one, two) in expected {
        let format = prompt_format(name).unwrap();
        assert_eq!(format.prompt(None, &turns[..1]).unwrap().replace('\n', "¶"), one, "{name}");
        assert_eq!(format.prompt(None, &turns).unwrap().replace('\n', "¶"), two, "{name}");
    }
    // Every card names a known format.
    for card in pricket::suites::cards() {
        prompt_format(&card.prompt).unwrap_or_else(|e| panic!("{}: {e}", card.id));
    }
}

#[test]
fn a_system_text_can_be_set_left_out_and_refused() {
    let chatml = prompt_format("chatml").unwrap();
    let turns = [Turn::user("One?")];
    assert!(chatml.prompt(Some("Be brief."), &turns).unwrap().starts_with("<|im_start|>system\nBe brief.<|im_end|>\n"));
    assert!(chatml.prompt(Some(""), &turns).unwrap().starts_with("<|im_start|>user\n"));
    let refused = prompt_format("incite-chat").unwrap().prompt(Some("Be brief."), &turns).unwrap_err();
    assert!(refused.to_string().contains("incite-chat does not support a system text"), "{refused}");
    let wrong = Turn { role: Role::System, content: "late".into() };
    assert!(chatml.prompt(None, &[turns[0].clone(), wrong]).is_err());
    // A text that contains `{text}` is inserted unchanged.
    assert!(chatml.prompt(None, &[Turn::user("{text}")]).unwrap().contains("user\n{text}<|im_end|>"));
}

#[test]
fn a_format_can_come_from_a_file() {
    let dir = tempfile::tempdir().unwrap();
    let write = |text: &str| {
        let path = dir.path().join("format.toml");
        std::fs::write(&path, text).unwrap();
        prompt_format(path.to_str().unwrap())
    };
    let good =
        write("[[format]]\nname = \"mine\"\nuser = \"U {text}\"\nassistant = \"A {text}\"\nreply = \"A\"\n").unwrap();
    assert_eq!(good.prompt(None, &[Turn::user("x")]).unwrap(), "U xA");
    let wrong = [
        ("[[format]]\nname = \"m\"\nuser = \"U\"\nassistant = \"{text}\"\n", "`user` needs {text} exactly once"),
        ("[[format]]\nname = \"m\"\nuser = \"{text}\"\n", "missing field `assistant`"),
        ("[[format]]\nname = \"m\"\nuser = \"{text}\"\nassistant = \"{text}\"\nstop = [\"\"]\n", "an empty `stop`"),
        ("[[format]]\nname = \"m\"\nusr = \"{text}\"\n", "unknown field `usr`"),
        ("", "missing field `format`"),
    ];
    for (text, part) in wrong {
        let error = write(text).unwrap_err().to_string();
        assert!(error.contains(part) && error.contains("format.toml"), "{error}");
    }
    let unknown = prompt_format("vicuna").unwrap_err().to_string();
    assert!(unknown.contains("incite-chat"), "{unknown}");
}

const TALK: [&str; 6] = [
    "Hello, my name is Zamira.",
    "What is 3 plus 4?",
    "I like horses.",
    "What is my name?",
    "What do I like?",
    "Where does a whale live?",
];

#[test]
fn chat_recalls_earlier_turns() {
    let mut chat = tiny_chat().conversation();
    assert_eq!(chat.format().name, "incite-chat");
    let options = GenerateOptions::default();
    let replies: Vec<String> = TALK.iter().map(|text| chat.say(text, &options).unwrap().text).collect();
    let expected = [
        "Hello, Zamira!",
        "3 plus 4 is 7.",
        "I will remember that you like horses.",
        "Your name is Zamira.",
        "You like horses.",
        "A whale lives in the sea.",
    ];
    assert_eq!(replies, expected);
    chat.reset();
    assert_eq!(chat.say("What is my name?", &options).unwrap().text, "You have not told me your name.");
}

/// Every reply ends where the next question would begin.
#[test]
fn replies_end_before_the_next_question() {
    let pricket = tiny_chat();
    let human = pricket.encode("<human>").unwrap();
    assert!(human.len() > 1, "the stop string is to be several tokens");
    let mut chat = pricket.conversation();
    for seed in 0..12 {
        let sampling = SamplingParams { temperature: 0.7, ..SamplingParams::default() };
        let options = GenerateOptions { sampling, seed, ..Default::default() };
        let mut reply = chat.stream(TALK[seed as usize % TALK.len()], &options).unwrap();
        let pieces: Vec<String> = reply.by_ref().map(Result::unwrap).collect();
        let done = reply.finish();
        assert_eq!(pieces.concat(), done.text);
        assert!(!done.text.contains('<') && done.text == done.text.trim() && !done.text.is_empty(), "{done:?}");
        assert_eq!(chat.turns().last().unwrap().content, done.text);
        match done.finish {
            FinishReason::Stop => assert!(pricket.decode(&done.ids).unwrap().contains("<human>")),
            finish => assert_eq!(finish, FinishReason::Eos),
        }
    }
}

/// A reply that is cut off inside a stop string contains none of that string.
#[test]
fn a_reply_that_is_cut_inside_a_stop_string_ends_before_it() {
    let pricket = tiny_chat();
    let (mut inside, mut chat) = (0, pricket.conversation());
    for max_tokens in 1..40 {
        let options = GenerateOptions { max_tokens, sampling: SamplingParams::greedy(), ..Default::default() };
        let mut reply = chat.stream(TALK[0], &options).unwrap();
        let pieces: Vec<String> = reply.by_ref().map(Result::unwrap).collect();
        let done = reply.finish();
        let (all, kept) = (pricket.decode(&done.ids).unwrap(), chat.turns().last().unwrap().content.clone());
        let begun = (1.."<human>".len()).any(|n| all.ends_with(&"<human>"[..n]));
        inside += usize::from(begun && done.finish == FinishReason::Length);
        assert!(!pieces.concat().contains('<') && !kept.contains('<'), "{max_tokens}: {kept:?} of {all:?}");
        chat.reset();
    }
    assert!(inside > 0, "no reply was cut inside a stop string");
}

fn both_ways(pricket: &Pricket, context: Option<usize>, options: &GenerateOptions) -> (Conversation, usize, usize) {
    let with_context = |chat: Conversation| match context {
        Some(context) => chat.with_context(context),
        None => chat,
    };
    let mut reusing = with_context(pricket.conversation());
    let mut anew = with_context(pricket.conversation().without_reuse());
    let (mut read, mut all) = (0, 0);
    for (i, text) in TALK.iter().cycle().take(12).enumerate() {
        let options = GenerateOptions { seed: i as u64, ..options.clone() };
        let (a, b) = (reusing.say(text, &options).unwrap(), anew.say(text, &options).unwrap());
        assert_eq!((a.ids, &a.prompt_ids, &a.text), (b.ids, &b.prompt_ids, &b.text), "turn {i}");
        assert!(a.logprobs.iter().zip(&b.logprobs).all(|(a, b)| (a - b).abs() < 1e-4));
        assert_eq!(anew.read(), a.prompt_ids.len());
        assert_eq!(reusing.left_out(), anew.left_out());
        read += reusing.read();
        all += anew.read();
    }
    (reusing, read, all)
}

/// Greedy and sampled, with three kinds of models, with and without a full context.
#[test]
fn the_cache_changes_no_token_of_a_conversation() {
    let sampling = SamplingParams { temperature: 0.9, ..SamplingParams::default() };
    for name in ["tiny-chat", "tiny", "tiny-mpt"] {
        let pricket = Loader::embedded(name).unwrap().threads(2).load().unwrap();
        for sampling in [SamplingParams::greedy(), sampling.clone()] {
            let options = GenerateOptions { max_tokens: 24, sampling, ..Default::default() };
            let (_, read, all) = both_ways(&pricket, None, &options);
            assert!(3 * read < all, "{name}: {read} of {all} tokens read");
            let (chat, ..) = both_ways(&pricket, Some(110), &options);
            assert!(chat.left_out() > 0, "{name}");
        }
    }
}

#[test]
fn a_full_context_leaves_out_the_oldest_and_keeps_the_system_text() {
    let pricket = tiny_chat();
    let system = "Be kind.";
    let mut format = prompt_format("incite-chat").unwrap();
    format.system = Some("<system>: {text}".into());
    let mut chat = pricket.conversation().with_format(format).with_context(240);
    chat.set_system(Some(system.into())).unwrap();
    let options = GenerateOptions { max_tokens: 20, ..Default::default() };
    let (mut left_out, mut steps) = (0, 0);
    for (i, text) in TALK.iter().cycle().take(30).enumerate() {
        let done = chat.say(text, &options).unwrap();
        let prompt = pricket.decode(&done.prompt_ids).unwrap();
        assert!(prompt.starts_with("<system>: Be kind.\n<human>: "), "{prompt}");
        assert!(prompt.ends_with(&format!("<human>: {text}\n<bot>:")), "{prompt}");
        assert!(done.prompt_ids.len() + 20 <= 240, "{}", done.prompt_ids.len());
        assert!(chat.left_out().is_multiple_of(2) && chat.left_out() >= left_out);
        steps += usize::from(chat.left_out() > left_out);
        left_out = chat.left_out();
        assert_eq!(chat.turns().len(), 2 * (i + 1));
    }
    // Turns are dropped in larger groups, so that most prompts begin like the one before.
    assert!(left_out >= 20 && 3 * steps < left_out, "{left_out} turns in {steps} steps");
    let before = chat.turns().len();
    let error = chat.say(&"a long story ".repeat(200), &options).unwrap_err().to_string();
    assert!(error.contains("too many for a context of 240 tokens of which 20 are kept for the reply"), "{error}");
    assert_eq!(chat.turns().len(), before, "what could not be said was not said");
    assert!(chat.say("Hello.", &options).is_ok());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// The prompt fits, keeps the last turn, and leaves out whole question and answer pairs only.
    #[test]
    fn fitting_drops_the_fewest_whole_turns(lengths in proptest::collection::vec(0..60usize, 1..20), limit in 1..400usize, reserve in 0..200usize) {
        let tokenizer = pricket::lm::Tokenizer::from_file(root().join("models/tiny/tokenizer.json")).unwrap();
        let format = prompt_format("incite-chat").unwrap();
        let word = |n: usize| "sea ".repeat(n);
        let turns: Vec<Turn> = lengths.iter().enumerate()
            .map(|(i, &n)| if i % 2 == 0 { Turn::user(word(n)) } else { Turn::assistant(word(n)) }).collect();
        let turns = if turns.len().is_multiple_of(2) { &turns[..turns.len() - 1] } else { &turns[..] };
        let room = limit - reserve.min(limit / 2);
        match format.fit(&tokenizer, None, turns, limit, reserve) {
            Ok((ids, left_out)) => {
                prop_assert!(ids.len() <= room);
                prop_assert!(left_out % 2 == 0 && left_out < turns.len());
                let count = |first: usize| tokenizer.encode(&format.prompt(None, &turns[first..]).unwrap()).unwrap().len();
                let goal = count(0).saturating_sub(count(0).saturating_sub(room).next_multiple_of((room / 4).max(1)));
                // Fewer turns would not have freed a quarter of the room, or would not have fitted where a quarter
                // cannot be freed.
                let most = if count(left_out) <= goal { goal } else { room };
                for fewer in (0..left_out).step_by(2) {
                    prop_assert!(count(fewer) > most);
                }
                prop_assert_eq!(&ids, &tokenizer.encode(&format.prompt(None, &turns[left_out..]).unwrap()).unwrap());
            }
            Err(e) => {
                let last = tokenizer.encode(&format.prompt(None, &turns[turns.len() - 1..]).unwrap()).unwrap();
                prop_assert!(last.len() > room, "{e}");
            }
        }
    }
}

#[test]
fn an_interrupted_reply_keeps_its_text() {
    let mut chat = tiny_chat().conversation();
    let options = GenerateOptions::default();
    let begun: String = chat.stream("Count from 1 to 7.", &options).unwrap().take(4).map(Result::unwrap).collect();
    assert_eq!(chat.turns()[1], Turn::assistant(begun.clone()));
    assert!("1, 2, 3, 4, 5, 6, 7.".starts_with(&begun) && begun.len() < 12, "{begun:?}");
    assert_eq!(chat.undo().as_deref(), Some("Count from 1 to 7."));
    assert!(chat.turns().is_empty() && chat.undo().is_none());
    assert_eq!(chat.say("Count from 1 to 7.", &options).unwrap().text, "1, 2, 3, 4, 5, 6, 7.");
}

#[test]
fn conversations_are_saved_and_resumed() {
    let pricket = tiny_chat();
    let options = GenerateOptions::default();
    let mut chat = pricket.conversation();
    chat.say("My name is Vera.", &options).unwrap();
    let json: Value = serde_json::from_str(&chat.to_json()).unwrap();
    assert_eq!(json["messages"][1], json!({"role": "assistant", "content": "Hello, Vera!"}));
    let mut other = pricket.conversation();
    other.load_json(&chat.to_json()).unwrap();
    assert_eq!(other.turns(), chat.turns());
    assert_eq!(other.say("What is my name?", &options).unwrap().text, "Your name is Vera.");
    // Messages of another program, with a system text if the format has one.
    let messages = r#"[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello."}]"#;
    let mut chatml = pricket.conversation().with_format(prompt_format("chatml").unwrap());
    chatml.load_json(messages).unwrap();
    assert_eq!((chatml.system(), chatml.turns().len()), (Some("Be brief."), 1));
    for wrong in [messages, "{", "[{\"role\": \"robot\", \"content\": \"\"}]", "{\"format\": \"none\"}"] {
        assert!(other.load_json(wrong).is_err(), "{wrong}");
        assert_eq!(other.turns().len(), 4, "nothing changes");
    }
}

/// models/tiny with more tokens in its tokenizer and more keys in its configuration.
fn variant(dir: &Path, tokens: &[&str], config: &Value) -> Pricket {
    for file in ["model.safetensors", "config.json", "tokenizer.json"] {
        std::fs::copy(root().join("models/tiny").join(file), dir.join(file)).unwrap();
    }
    let change = |file: &str, change: &dyn Fn(&mut Value)| {
        let mut json = serde_json::from_slice(&std::fs::read(dir.join(file)).unwrap()).unwrap();
        change(&mut json);
        std::fs::write(dir.join(file), json.to_string()).unwrap();
    };
    change("tokenizer.json", &|json| {
        for (i, token) in tokens.iter().enumerate() {
            json["added_tokens"].as_array_mut().unwrap().push(json!({
                "id": 2000 + i, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true,
            }));
        }
    });
    change("config.json", &|json| json.as_object_mut().unwrap().extend(config.as_object().unwrap().clone()));
    pricket::load(dir).unwrap()
}

#[test]
fn the_prompt_format_is_detected_and_reported() {
    let dir = tempfile::tempdir().unwrap();
    let told = |tokens: &[&str], config: Value| {
        let pricket = variant(dir.path(), tokens, &config);
        (pricket.prompt_format().name.clone(), pricket.notes().join("; "))
    };
    let none = || json!({});
    assert_eq!(told(&[], none()), ("plain".into(), String::new()));
    let (name, note) = told(&["<|im_start|>", "<|im_end|>"], none());
    assert_eq!((name.as_str(), note.contains("the tokenizer has <|im_start|>")), ("chatml", true));
    assert_eq!(told(&["<|prompter|>", "<|system|>", "<|assistant|>"], none()).0, "oasst");
    assert_eq!(told(&["<|SYSTEM|>", "<|USER|>", "<|ASSISTANT|>"], none()).0, "stablelm-tuned-alpha");
    assert_eq!(told(&["### End", "### Instruction:", "### Response:\n"], none()).0, "dolly-blank");
    assert_eq!(told(&["<|im_start|>"], none()).0, "plain");
    let (name, note) = told(&[], json!({"_name_or_path": "togethercomputer/RedPajama-INCITE-Chat-3B-v1"}));
    assert_eq!((name.as_str(), note.contains("config.json is derived from that of")), ("incite-chat", true));
    // A copy of a listed model uses the model's format.
    assert_eq!(told(&[], json!({"_name_or_path": "gl198976/mpt-7b-instruct"})).0, "dolly");
    assert_eq!(told(&[], json!({"prompt_format": "mpt-instruct"})).0, "mpt-instruct");
    let (name, note) = told(&[], json!({"prompt_format": "incite_chat"}));
    assert_eq!((name.as_str(), note.contains("incite_chat: named by config.json, but unknown")), ("plain", true));
    assert_eq!(told(&[], json!({"_name_or_path": "somebody/else"})).0, "plain");
}

#[test]
fn special_tokens_and_ids_end_a_reply() {
    use pricket::lm::TextStream;

    let dir = tempfile::tempdir().unwrap();
    let pricket = variant(dir.path(), &["<|im_start|>", "<|im_end|>"], &json!({}));
    // A special token whose spelling is in the format's stop list ends the reply.
    let mut text = TextStream::new(pricket.tokenizer().unwrap(), &pricket.prompt_format().stop);
    let word = pricket.encode(" sea").unwrap();
    let said: String = word.iter().map(|&id| text.push(id)).collect();
    assert_eq!((said.as_str(), text.push(2001).as_str(), text.stopped()), (" sea", "", true));
    // A stop token that occurs in an unrestricted reply ends the reply there.
    let free = pricket.conversation().say("We", &GenerateOptions { max_tokens: 12, ..Default::default() }).unwrap();
    let (at, &id) = free.ids.iter().enumerate().skip(3).find(|(i, id)| !free.ids[..*i].contains(id)).unwrap();
    let options = GenerateOptions { max_tokens: 12, stop_ids: vec![id], ..Default::default() };
    let done = pricket.conversation().say("We", &options).unwrap();
    assert_eq!((done.ids.len(), done.finish), (at + 1, FinishReason::Eos));
    assert_eq!(done.ids[..], free.ids[..=at]);
}

/// The next reply equals that of a conversation that reads all turns again, whatever happened before.
#[test]
fn a_reply_depends_on_the_turns_alone() {
    let pricket = tiny_chat();
    let options = GenerateOptions { max_tokens: 24, ..Default::default() };
    let mut chat = pricket.conversation().with_context(100);
    let same = |chat: &mut Conversation, what: &str| {
        let mut fresh = pricket.conversation().with_context(100).without_reuse();
        fresh.load_json(&chat.to_json()).unwrap();
        let (a, b) = (chat.say("What do I like?", &options).unwrap(), fresh.say("What do I like?", &options).unwrap());
        assert_eq!((a.prompt_ids, a.ids), (b.prompt_ids, b.ids), "{what}");
        chat.undo();
    };
    for text in TALK.iter().cycle().take(9) {
        chat.say(text, &options).unwrap();
    }
    assert!(chat.left_out() > 0);
    same(&mut chat, "after a full context");
    drop(chat.stream("Count from 1 to 7.", &options).unwrap().take(3).map(Result::unwrap).collect::<String>());
    same(&mut chat, "after a reply that was broken off");
    for _ in 0..9 {
        chat.undo();
    }
    same(&mut chat, "after taking back what had pushed the rest out");
    assert_eq!(chat.left_out(), 0);
    chat.load_json(r#"[{"role": "user", "content": "I like tea."}]"#).unwrap();
    same(&mut chat, "after loading");
    let mut long = pricket.conversation().with_context(4000);
    let error = long.say(&"a long story ".repeat(400), &options).unwrap_err().to_string();
    assert!(error.contains("a context of 512"), "a rotary model's own limit holds: {error}");
    let far = GenerateOptions { beyond_trained_length: true, max_tokens: 2, ..Default::default() };
    assert!(long.say(&"a long story ".repeat(400), &far).is_ok());
    let full = GenerateOptions { max_tokens: 500, stop_at_eos: false, ..Default::default() };
    let mut plain = pricket::tiny().unwrap().conversation().with_context(40);
    assert_eq!(plain.say("The sea", &full).unwrap().finish, FinishReason::Context);
}

/// A chat template is not evaluated. A note names the format that is used instead.
#[test]
fn an_unused_chat_template_is_mentioned() {
    let dir = tempfile::tempdir().unwrap();
    let tiny = root().join("models/tiny");
    for file in ["config.json", "tokenizer.json", "model.safetensors"] {
        std::fs::copy(tiny.join(file), dir.path().join(file)).unwrap();
    }
    let notes = || pricket::load(dir.path()).unwrap().notes().join("; ");
    assert!(!notes().contains("prompt format"), "{}", notes());
    let config = dir.path().join("tokenizer_config.json");
    std::fs::write(&config, r#"{"chat_template": "{{ messages[0].content }}"}"#).unwrap();
    assert!(notes().contains("plain: chat_template of ") && notes().contains("--prompt-format"), "{}", notes());
    std::fs::write(&config, r#"{"chat_template": null}"#).unwrap();
    assert!(!notes().contains("prompt format"), "{}", notes());
    std::fs::write(dir.path().join("chat_template.jinja"), "{{ messages }}").unwrap();
    assert!(notes().contains("chat_template.jinja is not evaluated"), "{}", notes());
    // A known format needs no note.
    std::fs::write(&config, "{}").unwrap();
    let mut json: Value = serde_json::from_slice(&std::fs::read(dir.path().join("config.json")).unwrap()).unwrap();
    json["prompt_format"] = "incite-chat".into();
    std::fs::write(dir.path().join("config.json"), json.to_string()).unwrap();
    assert!(notes().contains("incite-chat") && !notes().contains("evaluated"), "{}", notes());
}

#[test]
fn a_reply_that_is_dropped_before_its_first_token_loses_nothing() {
    let mut chat = Loader::embedded("tiny-chat").unwrap().load().unwrap().conversation();
    let options = GenerateOptions::default();
    chat.say("My name is Anna.", &options).unwrap();
    let first = chat.read();
    drop(chat.stream("What is my name?", &options).unwrap());
    chat.undo();
    assert_eq!(chat.say("What is my name?", &options).unwrap().text, "Your name is Anna.");
    assert!(chat.read() < first, "{} tokens were read again, {first} at first", chat.read());
}

/// A recurrence keeps only the marked positions. The rest is read again, and the text is the same.
#[test]
fn a_recurrent_conversation_is_the_same_with_and_without_its_state() {
    pricket::loading::add_family(pricket_toys::RECURRENT);
    let tiny = pricket::tiny().unwrap();
    let vocab = tiny.info().vocab;
    let config = serde_json::json!({"model_type": "toy_recurrent", "vocab": vocab, "width": 24, "layers": 2});
    let store = std::sync::Arc::new(pricket::weights::Random::new(pricket::weights::Dtype::F32, 3));
    let tokenizer = crate::common::root().join("models/tiny/tokenizer.json");
    let model = Loader::from_store(config, store).tokenizer(tokenizer).threads(2).load().unwrap();
    let options = GenerateOptions { max_tokens: 12, ..Default::default() };
    let (mut kept, mut anew) = (model.conversation(), model.conversation().without_reuse());
    let (mut read, mut reread) = (0, 0);
    for text in ["The river was long.", "It ran through the town,", "and the people came to it."] {
        assert_eq!(kept.say(text, &options).unwrap().text, anew.say(text, &options).unwrap().text);
        (read, reread) = (read + kept.read(), reread + anew.read());
    }
    assert!(read < reread, "{read} tokens with the past, {reread} without");
}
