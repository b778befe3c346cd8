//! A conversation with a model, in the prompt format that it was tuned on.
//!
//! `cargo run --example chat`

mod common;
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
/system [TEXT]  show the system text, or set it and start anew; /system - for none
/reset          forget what was said
/undo           take back the last question and its answer
/retry          ask the last question again
/save FILE      write the conversation as JSON
/load FILE      go on with one
/prompt         show what the model reads
/quit           leave; so does Ctrl-D
A line that ends with \\ goes on in the next. Ctrl-C ends a reply.";

/// Talks with a model. Without a terminal each line of standard input is a turn.
#[derive(Parser)]
#[command(version, after_help = HELP)]
struct Args {
    #[command(flatten)]
    model: common::ModelArgs,
    #[command(flatten)]
    sampling: sampling::SamplingArgs,
    /// How the prompt is spelled: a name of --formats, a file like models/prompts.toml, or auto for the model's own
    #[arg(long, value_name = "NAME", default_value = "auto")]
    prompt_format: String,
    /// Lists the prompt formats
    #[arg(long)]
    formats: bool,
    /// What the model is told about the conversation, instead of the format's own text
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Tokens of prompt and reply together; the oldest turns are left out beyond [default: what the model was trained for]
    #[arg(long, value_name = "N")]
    context: Option<usize>,
    /// Goes on with a conversation that /save wrote
    #[arg(long, value_name = "FILE")]
    load: Option<PathBuf>,
    /// Tells after each reply what was read, written and how fast
    #[arg(long)]
    stats: bool,
    /// One JSON object for each reply instead of text
    #[arg(long)]
    json: bool,
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
        common::tell(format_args!("note: no prompt format: what you write is continued as it is; see --formats"));
    }
    if format.single_turn {
        common::tell(format_args!(
            "note: {} was tuned on single questions; /reset before a new one may help",
            format.name
        ));
    }
    let mut conversation = pricket.conversation().with_format(format);
    if let Some(context) = args.context {
        conversation = conversation.with_context(context);
    }
    if let Some(file) = &args.load {
        load(&mut conversation, file)?;
        common::tell(format_args!("note: {} turns of {}", conversation.turns().len(), file.display()));
    }
    if let Some(text) = &args.system {
        conversation.set_system(Some(text.clone()))?;
    }
    let mut options = args.sampling.options();
    // Somebody who asks for more than the model was trained for has asked for it.
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
            // One bad line does not end the conversation; the exit code of a script tells.
            Err(e) => {
                common::tell(format_args!("error: {e:#}"));
                failed += usize::from(!lines.interactive());
            }
        }
    }
    ensure!(failed == 0, "lines that failed: {failed}");
    Ok(())
}

/// Set by Ctrl-C or a request to terminate. Where it is set already, since no reply is being written or the last signal was for the same
/// reply, the program ends.
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

struct Chat {
    options: GenerateOptions,
    stats: bool,
    json: bool,
    stop: Arc<AtomicBool>,
}

impl Chat {
    fn say(&mut self, conversation: &mut Conversation, text: &str) -> anyhow::Result<()> {
        // Every reply has random numbers of its own, so that a retry is another reply.
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
                "note: the context is full; left out from now on: the oldest {}",
                counted(now_left_out, "turn")
            ));
        }
        match done.finish {
            FinishReason::Length if !self.json => {
                common::tell(format_args!(
                    "note: cut off after {}; see --max-tokens",
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
            common::tell(format_args!("{read} of {} read, {written} written, {seconds:.2} s", counted(whole, "token")));
        }
        Ok(())
    }

    /// Does what a line after `/` says; gives whether that was the end.
    fn command(&mut self, conversation: &mut Conversation, line: &str) -> anyhow::Result<bool> {
        let (name, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
        let rest = rest.trim();
        let file = || if rest.is_empty() { bail!("/{name} needs a file") } else { Ok(Path::new(rest)) };
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
                Some(asked) => common::tell(format_args!("note: taken back: {asked}")),
                None => bail!("nothing was said yet"),
            },
            "retry" => {
                let before = conversation.clone();
                let asked = conversation.undo().context("nothing was said yet")?;
                if let Err(e) = self.say(conversation, &asked) {
                    *conversation = before;
                    return Err(e);
                }
            }
            "prompt" => writeln!(std::io::stdout(), "{}", conversation.prompt("...")?)?,
            "save" => save(conversation, file()?)?,
            "load" => {
                load(conversation, file()?)?;
                common::tell(format_args!("note: {} turns of {rest}", conversation.turns().len()));
            }
            other => bail!("/{other} is no command; see /help"),
        }
        Ok(false)
    }
}

/// Writes a conversation whole or not at all, and over nothing but a conversation.
fn save(conversation: &Conversation, path: &Path) -> anyhow::Result<()> {
    let name = path.display();
    if path.exists() {
        let mut probe = conversation.clone();
        load(&mut probe, path).with_context(|| format!("{name} is there and is not overwritten"))?;
    }
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut file = tempfile::NamedTempFile::new_in(directory).with_context(|| format!("{name} cannot be written"))?;
    writeln!(file, "{}", conversation.to_json())?;
    file.persist(path).with_context(|| format!("{name} cannot be written"))?;
    common::tell(format_args!("note: {} turns in {name}", conversation.turns().len()));
    Ok(())
}

fn load(conversation: &mut Conversation, path: &Path) -> anyhow::Result<()> {
    let name = path.display();
    let json = std::fs::read_to_string(path).with_context(|| format!("{name} cannot be read"))?;
    let was = conversation.load_json(&json).with_context(|| name.to_string())?;
    if let Some(was) = was.filter(|was| *was != conversation.format().name) {
        common::tell(format_args!(
            "note: {name} was in the prompt format {was}, and goes on in {}",
            conversation.format().name
        ));
    }
    Ok(())
}

/// Lines of a terminal, with editing and history, or of a file.
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
            // The first time there is none.
            let _ = editor.load_history(file);
        }
        common::tell(format_args!("/help tells the commands"));
        Ok(Lines::Terminal { editor: Box::new(editor), history })
    }

    fn interactive(&self) -> bool {
        matches!(self, Lines::Terminal { .. })
    }

    /// The next line that says something; those that end with a backslash go on.
    fn next(&mut self) -> anyhow::Result<Option<String>> {
        let mut whole = String::new();
        loop {
            let line = match self {
                Lines::File(lines) => lines.next().transpose()?,
                Lines::Terminal { editor, .. } => {
                    match editor.readline(if whole.is_empty() { "> " } else { ". " }) {
                        Ok(line) => Some(line),
                        // As in a shell, Ctrl-C throws the line away.
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

/// Where the lines that were typed are kept: `$XDG_STATE_HOME/pricket/chat_history`.
fn history_file() -> Option<PathBuf> {
    let state = std::env::var_os("XDG_STATE_HOME").map(PathBuf::from);
    let directory = state.or_else(|| Some(std::env::home_dir()?.join(".local/state")))?.join("pricket");
    std::fs::create_dir_all(&directory).ok()?;
    Some(directory.join("chat_history"))
}
