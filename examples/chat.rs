//! A chat with a model, in the prompt format that it was tuned on.
//!
//! `cargo run --example chat`

mod common;
#[path = "common/draft.rs"]
mod draft;
#[path = "common/sampling.rs"]
mod sampling;

use std::io::{BufRead, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use anyhow::{Context as _, bail, ensure};
use clap::Parser;
use pricket::weights::counted;
use pricket::{Conversation, FinishReason, GenerateOptions};
use rustyline::error::ReadlineError;
use rustyline::history::FileHistory;

const HELP: &str = "\
/system [TEXT]  show the system text, or set it and start a new conversation
/system -       remove the system text
/reset          start a new conversation
/undo           remove the last question and its answer
/retry          ask the last question again
/save FILE      save the conversation as JSON
/load FILE      continue a saved conversation
/prompt         show the prompt that the model reads
/quit           quit, like Ctrl-D
A line that ends with \\ continues on the next line. Ctrl-C stops a reply.";

/// Chat with a model. If standard input is not a terminal, each line is a turn.
#[derive(Parser)]
#[command(version, after_help = HELP, mut_arg("model", default_model))]
struct Args {
    #[command(flatten)]
    model: common::ModelArgs,
    #[command(flatten)]
    sampling: sampling::SamplingArgs,
    #[command(flatten)]
    draft: draft::DraftArgs,
    /// Prompt format: a name listed by --formats, a TOML file (its first format is used), or auto for the model's own
    /// format
    #[arg(long, value_name = "NAME", default_value = "auto")]
    prompt_format: String,
    /// List the prompt formats and exit
    #[arg(long)]
    formats: bool,
    /// System text to use instead of the prompt format's own
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Maximum number of tokens of prompt and reply together. The oldest turns are dropped to fit [default: the length
    /// that the model was trained for]
    #[arg(long, value_name = "N")]
    context: Option<usize>,
    /// Continue a conversation saved with /save
    #[arg(long, value_name = "FILE")]
    load: Option<PathBuf>,
    /// After each reply, print its number of tokens, the number of prompt tokens read, and the time in seconds, to
    /// stderr
    #[arg(long)]
    stats: bool,
    /// Print one JSON object per reply instead of text
    #[arg(long)]
    json: bool,
}

/// Replaces the default in the help text of `--model`, which `chat` does not share with the other examples.
fn default_model(arg: clap::Arg) -> clap::Arg {
    let help = arg.get_help().map(ToString::to_string).unwrap_or_default();
    arg.help(help.replace("[default: tiny]", "[default: tiny-chat]"))
}

fn main() -> ExitCode {
    let args = Args::parse();
    args.model.compute.limit_candle_threads();
    common::finish(run(&args))
}

fn run(args: &Args) -> anyhow::Result<()> {
    if args.formats {
        for format in pricket::text::prompt_formats() {
            writeln!(std::io::stdout(), "{:22} {}", format.name, format.about)?;
        }
        return Ok(());
    }
    let pricket = args.model.load("tiny-chat")?;
    let format = sampling::prompt_format(&args.prompt_format, &pricket)?;
    if format.name == "plain" {
        common::tell(format_args!(
            "note: the model has no prompt format, so your text is continued as it is; see --formats"
        ));
    }
    if format.single_turn {
        common::tell(format_args!(
            "note: {} was tuned on single questions; use /reset before a new question",
            format.name
        ));
    }
    let mut conversation = pricket.conversation().with_format(format);
    if let Some((draft, options)) = args.draft.load(&args.model.compute)? {
        conversation = conversation.with_draft(&draft, options);
    }
    if let Some(context) = args.context {
        conversation = conversation.with_context(context);
    }
    if let Some(file) = &args.load {
        load(&mut conversation, file)?;
        common::tell(format_args!("note: loaded {} turns from {}", conversation.turns().len(), file.display()));
    }
    if let Some(text) = &args.system {
        conversation.set_system(Some(text.clone()))?;
    }
    let mut options = args.sampling.options();
    // An explicit --context may exceed the length that the model was trained for.
    options.beyond_trained_length = args.context.is_some();
    let mut chat = Chat { options, stats: args.stats, json: args.json, stop: interrupts()? };
    let mut lines = Lines::new()?;
    let mut failed = 0;
    while let Some(line) = lines.next()? {
        let done = match line.strip_prefix('/') {
            Some(command) => chat.command(&mut conversation, command),
            None => chat.say(&mut conversation, &line).map(|()| false),
        };
        chat.stop.store(true, Ordering::Relaxed);
        match done {
            Ok(true) => break,
            Ok(false) => {}
            Err(e) if common::is_closed(&e) => return Err(e),
            // A failed line does not end the conversation. In a script, it makes the exit code 1 at the end.
            Err(e) => {
                common::tell(format_args!("error: {e:#}"));
                failed += usize::from(!lines.interactive());
            }
        }
    }
    ensure!(failed == 0, "failed lines: {failed}");
    Ok(())
}

/// Returns a flag that Ctrl-C or a request to terminate sets, which stops the reply in progress.
///
/// If the flag is already set, the signal ends the program: no reply is in progress, or the reply was stopped before.
fn interrupts() -> anyhow::Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(true));
    let handler = Arc::clone(&stop);
    ctrlc::set_handler(move || {
        if handler.swap(true, Ordering::Relaxed) {
            std::process::exit(130);
        }
    })?;
    Ok(stop)
}

/// The settings of a chat.
struct Chat {
    options: GenerateOptions,
    stats: bool,
    json: bool,
    stop: Arc<AtomicBool>,
}

impl Chat {
    /// Asks a question and prints the reply.
    fn say(&mut self, conversation: &mut Conversation, text: &str) -> anyhow::Result<()> {
        // Every reply has its own seed, so that a retry gives another reply.
        self.options.seed = self.options.seed.wrapping_add(1);
        self.stop.store(false, Ordering::Relaxed);
        let (start, left_out) = (Instant::now(), conversation.left_out());
        let mut out = std::io::stdout().lock();
        let mut reply = conversation.stream(text, &self.options)?;
        for piece in reply.by_ref() {
            let piece = piece?;
            if !self.json {
                write!(out, "{piece}")?;
                out.flush()?;
            }
            if self.stop.load(Ordering::Relaxed) {
                break;
            }
        }
        let done = reply.finish();
        let seconds = start.elapsed().as_secs_f64();
        let now_left_out = conversation.left_out();
        if self.json {
            let finish = format!("{:?}", done.finish).to_lowercase();
            let json = serde_json::json!({
                "text": done.text, "ids": done.ids, "finish": finish, "prompt_tokens": done.prompt_ids.len(),
                "read": conversation.read(), "left_out": now_left_out, "seconds": seconds,
            });
            writeln!(out, "{json}")?;
        } else {
            writeln!(out)?;
        }
        if now_left_out > left_out {
            common::tell(format_args!(
                "note: the context is full; the model no longer reads the oldest {}",
                counted(now_left_out, "turn")
            ));
        }
        match done.finish {
            FinishReason::Length if !self.json => {
                common::tell(format_args!(
                    "note: the reply was cut off after {}; see --max-tokens",
                    counted(done.ids.len(), "token")
                ));
            }
            FinishReason::Context if !self.json => {
                common::tell(format_args!("note: the context is full; see --context and /reset"));
            }
            _ => {}
        }
        if self.stats {
            let (read, whole, written) = (conversation.read(), done.prompt_ids.len(), done.ids.len());
            common::tell(format_args!(
                "prompt: {read} of {} read; reply: {written}; {seconds:.2} s",
                counted(whole, "token")
            ));
            if let Some(found) = conversation.speculation() {
                draft::report(&found);
            }
        }
        Ok(())
    }

    /// Runs a command, given without its `/`. Returns whether it ends the chat.
    fn command(&mut self, conversation: &mut Conversation, line: &str) -> anyhow::Result<bool> {
        let (name, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
        let rest = rest.trim();
        let file = || if rest.is_empty() { bail!("/{name}: expected a file name") } else { Ok(Path::new(rest)) };
        match name {
            "quit" | "exit" | "q" => return Ok(true),
            "help" | "h" | "?" => writeln!(std::io::stdout(), "{HELP}")?,
            "reset" => conversation.reset(),
            "system" if rest.is_empty() => {
                writeln!(std::io::stdout(), "{}", conversation.system().unwrap_or("(none)"))?;
            }
            "system" => {
                conversation.set_system(Some(if rest == "-" { String::new() } else { rest.into() }))?;
                conversation.reset();
            }
            "undo" => match conversation.undo() {
                Some(asked) => common::tell(format_args!("note: removed: {asked}")),
                None => bail!("/undo: the conversation is empty"),
            },
            "retry" => {
                let before = conversation.clone();
                let asked = conversation.undo().context("/retry: the conversation is empty")?;
                if let Err(e) = self.say(conversation, &asked) {
                    *conversation = before;
                    return Err(e);
                }
            }
            "prompt" => writeln!(std::io::stdout(), "{}", conversation.prompt("...")?)?,
            "save" => save(conversation, file()?)?,
            "load" => {
                load(conversation, file()?)?;
                common::tell(format_args!("note: loaded {} turns from {rest}", conversation.turns().len()));
            }
            other => bail!("unknown command /{other}; see /help"),
        }
        Ok(false)
    }
}

/// Saves a conversation. The file is written completely or not at all. Only a saved conversation is overwritten.
fn save(conversation: &Conversation, path: &Path) -> anyhow::Result<()> {
    let name = path.display();
    if path.exists() {
        let mut probe = conversation.clone();
        load(&mut probe, path).with_context(|| format!("{name} already exists and is not overwritten"))?;
    }
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut file = tempfile::NamedTempFile::new_in(directory).with_context(|| format!("{name} cannot be written"))?;
    writeln!(file, "{}", conversation.to_json())?;
    file.persist(path).with_context(|| format!("{name} cannot be written"))?;
    common::tell(format_args!("note: saved {} turns to {name}", conversation.turns().len()));
    Ok(())
}

/// Loads a saved conversation.
fn load(conversation: &mut Conversation, path: &Path) -> anyhow::Result<()> {
    let name = path.display();
    let json = std::fs::read_to_string(path).with_context(|| format!("{name} cannot be read"))?;
    let was = conversation.load_json(&json).with_context(|| name.to_string())?;
    if let Some(was) = was.filter(|was| *was != conversation.format().name) {
        common::tell(format_args!(
            "note: {name} was saved with prompt format {was}; it continues with {}",
            conversation.format().name
        ));
    }
    Ok(())
}

/// Input lines: from a terminal, with editing and history, or from a file or pipe.
enum Lines {
    Terminal { editor: Box<rustyline::Editor<(), FileHistory>>, history: Option<PathBuf> },
    File(std::io::Lines<std::io::StdinLock<'static>>),
}

impl Lines {
    fn new() -> anyhow::Result<Self> {
        if !std::io::stdin().is_terminal() {
            return Ok(Lines::File(std::io::stdin().lock().lines()));
        }
        let config = rustyline::Config::builder().max_history_size(1000)?.auto_add_history(true).build();
        let past = FileHistory::with_config(&config);
        let mut editor = rustyline::Editor::with_history(config, past)?;
        let history = history_file();
        if let Some(file) = &history {
            // There is no history at the first start.
            let _ = editor.load_history(file);
        }
        common::tell(format_args!("/help lists the commands"));
        Ok(Lines::Terminal { editor: Box::new(editor), history })
    }

    fn interactive(&self) -> bool {
        matches!(self, Lines::Terminal { .. })
    }

    /// Returns the next line that is not empty, joined with the lines that continue it after a backslash.
    fn next(&mut self) -> anyhow::Result<Option<String>> {
        let mut whole = String::new();
        loop {
            let line = match self {
                Lines::File(lines) => lines.next().transpose()?,
                Lines::Terminal { editor, .. } => {
                    match editor.readline(if whole.is_empty() { "> " } else { ". " }) {
                        Ok(line) => Some(line),
                        // As in a shell, Ctrl-C discards the line.
                        Err(ReadlineError::Interrupted) => {
                            whole.clear();
                            continue;
                        }
                        Err(ReadlineError::Eof) => None,
                        Err(e) => return Err(e.into()),
                    }
                }
            };
            let Some(line) = line else { return Ok((!whole.is_empty()).then_some(whole)) };
            if let Some(begun) = line.strip_suffix('\\') {
                whole.push_str(begun);
                whole.push('\n');
                continue;
            }
            whole.push_str(&line);
            if !whole.trim().is_empty() {
                return Ok(Some(whole));
            }
            whole.clear();
        }
    }
}

impl Drop for Lines {
    fn drop(&mut self) {
        if let Lines::Terminal { editor, history: Some(file) } = self {
            let _ = editor.save_history(file);
        }
    }
}

/// Returns the path of the history file, `$XDG_STATE_HOME/pricket/chat_history`.
fn history_file() -> Option<PathBuf> {
    let state = std::env::var_os("XDG_STATE_HOME").map(PathBuf::from);
    let directory = state.or_else(|| Some(std::env::home_dir()?.join(".local/state")))?.join("pricket");
    std::fs::create_dir_all(&directory).ok()?;
    Some(directory.join("chat_history"))
}
