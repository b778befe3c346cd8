//! Models by their ids, from a server with the protocol of the Hub: steps and single tensors.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use pricket::candle::Device;
use pricket::hub::Steps;
use pricket::hub::{Cache, NoProgress, Settings};
use pricket::suites::Checkpoints;
use pricket::{Error, GenerateOptions, Hub, Loader};
use pricket_testhub::{Content, Fault, Repo};
use serde_json::{Value, json};

use crate::common::{example, root, tiny_steps};
use crate::world::{SUITE, World, blob, only, snapshots, suite_repo, tiny_repo};

#[test]
fn a_model_is_loaded_by_its_id() {
    let content = tiny_repo(&["step64"]);
    let commit = content.resolve("step64").unwrap().to_owned();
    let world = World::new([("owner/tiny", content)]);
    let here = Loader::new(tiny_steps().join("step64")).threads(2).load().unwrap();
    let words = "The people of the United";
    let expected = here.generate(words, &GenerateOptions::default()).unwrap();
    for id in ["owner/tiny@step64", &format!("owner/tiny@{commit}")] {
        let loaded = world.loader(id).load().unwrap();
        assert_eq!(loaded.generate(words, &GenerateOptions::default()).unwrap().ids, expected.ids);
        assert!(loaded.warnings().is_empty(), "{:?}", loaded.warnings());
        let from = loaded.provenance();
        assert_eq!((from.repo.as_deref(), from.commit.as_deref()), (Some("owner/tiny"), Some(commit.as_str())));
        let weights = from.files.iter().find(|file| file.path == "model.safetensors").unwrap();
        assert_eq!(weights.digest.as_ref().unwrap().hex(), sha256(&tiny_steps().join("step64/model.safetensors")));
        // A directory of the cache is recognized and gives the same provenance.
        let again = Loader::new(from.directory.as_ref().unwrap()).threads(2).load().unwrap();
        assert_eq!(
            (again.provenance().repo.as_deref(), again.provenance().commit.as_deref()),
            (Some("owner/tiny"), Some(commit.as_str()))
        );
        assert!(again.provenance().files.iter().all(|file| file.digest.is_some()));
    }
    // Offline: by branch and by commit.
    world.server.take_log();
    for id in ["owner/tiny@step64", &format!("owner/tiny@{commit}")] {
        let loaded = Loader::new(id).hub(world.offline()).threads(2).load().unwrap();
        assert_eq!(loaded.provenance().commit.as_deref(), Some(commit.as_str()));
    }
    assert!(world.server.take_log().is_empty());
    let error = Loader::new("owner/tiny").hub(world.offline()).load().unwrap_err();
    assert!(matches!(&error, Error::Offline(what) if what.contains("step64")), "{error}");
    // With a network that is down, the cache is used and a warning says so.
    world.server.misbehave(|_| Some(Fault::Status(503)));
    let mut settings = world.settings();
    settings.patience.pause = std::time::Duration::from_millis(1);
    let loaded = Loader::new("owner/tiny@step64").hub(Hub::new(settings)).threads(2).load().unwrap();
    assert!(loaded.warnings().iter().any(|warning| warning.contains("503")), "{:?}", loaded.warnings());
}

fn sha256(path: &Path) -> String {
    pricket::hub::Digest::sha256_of(path, &NoProgress).unwrap().hex().to_owned()
}

#[test]
fn only_what_loading_needs_is_fetched() {
    let golden = root().join("tests/golden/models/neox-bin-sharded-fp16");
    let mut files: Vec<(String, Content)> = std::fs::read_dir(&golden)
        .unwrap()
        .flatten()
        .map(|entry| (entry.file_name().into_string().unwrap(), Content::file(&entry.path()).unwrap()))
        .collect();
    files.push(("training_state.bin".into(), Content::lfs(vec![0; 100_000])));
    files.push(("pytorch_model-00009-of-00009.bin".into(), Content::lfs(vec![1; 100_000])));
    let world =
        World::new([("owner/sharded", only(files.iter().map(|(name, content)| (name.as_str(), content.clone()))))]);
    let here = Loader::new(&golden).threads(1).load().unwrap();
    let there = world.loader("owner/sharded").load().unwrap();
    assert_eq!(here.info().parameters, there.info().parameters);
    let names: BTreeSet<String> = there.provenance().files.iter().map(|file| file.path.clone()).collect();
    assert!(names.contains("pytorch_model-00001-of-00003.bin") && names.contains("config.json"), "{names:?}");
    assert!(!names.contains("training_state.bin") && !names.contains("pytorch_model-00009-of-00009.bin"), "{names:?}");
    assert!(world.large_bytes() < 100_000);
    // A shard that the index lists and the revision lacks is named.
    let lacking = files.iter().filter(|(name, _)| name != "pytorch_model-00003-of-00003.bin");
    world.server.add("owner/lacking", only(lacking.map(|(name, content)| (name.as_str(), content.clone()))));
    let error = world.loader("owner/lacking").load().unwrap_err();
    assert!(error.to_string().contains("pytorch_model-00003-of-00003.bin"), "{error}");
}

#[test]
fn missing_models_and_revisions_are_explained() {
    let world = World::new([("EleutherAI/pythia-70m", tiny_repo(&["step0", "step512"]))]);
    let error = |id: &str| {
        let error = world.loader(id).load().unwrap_err().to_string();
        assert!(!error.contains('\n') && !error.contains("hf_secret"), "{error}");
        error
    };
    let text = error("EleutherAI/pythia-70m@step7");
    assert!(text.contains("main, step0, step512"), "{text}");
    // The repositories of MPT are gone. The card names copies.
    let text = error("mosaicml/mpt-7b@main");
    assert!(text.contains("2025-12") && text.contains("anas-awadalla/mpt-7b"), "{text}");
    let text = error("nobody/nothing");
    assert!(text.contains("nobody/nothing"), "{text}");
    let text = error("not-a-model");
    assert!(text.contains("no such file or directory"), "{text}");
    let text = error("owner/weights.safetensors");
    assert!(text.contains("no such file or directory"), "{text}");
    // A repository of DeepSpeed shards is recognized.
    world.server.add(
        "owner/shards",
        only([
            ("config.json", Content::text("{\"model_type\": \"gpt_neox\"}")),
            ("layer_00-model_00-model_states.pt", Content::lfs("x")),
        ]),
    );
    let text = error("owner/shards");
    assert!(text.contains("DeepSpeed"), "{text}");
}

#[test]
fn a_card_name_loads_the_model() {
    let world = World::new([("EleutherAI/pythia-70m", tiny_repo(&[]))]);
    for name in ["pythia-70m", "EleutherAI/pythia-19m", "eleutherai/Pythia-70M"] {
        let loaded = world.loader(name).load().unwrap();
        assert_eq!(loaded.provenance().repo.as_deref(), Some("EleutherAI/pythia-70m"));
        assert_eq!(loaded.provenance().license.as_deref(), Some("apache-2.0"));
        // The weights are not the published ones, and the size in the card reveals it.
        assert!(loaded.warnings().iter().any(|warning| warning.contains("70426624")), "{:?}", loaded.warnings());
    }
}

/// INCITE-3B and Pythia-2.8b have the same shapes. Only the configuration distinguishes them.
#[test]
fn a_pythia_is_not_mistaken_for_an_incite() {
    let world = World::new([("togethercomputer/RedPajama-INCITE-Base-3B-v1", tiny_repo(&[]))]);
    let loaded = world.loader("RedPajama-INCITE-Base-3B-v1").load().unwrap();
    assert!(loaded.warnings().join(" ").contains("use_parallel_residual"), "{:?}", loaded.warnings());
}

/// models/tiny-mpt as a repository without its tokenizer.
fn mute_mpt() -> Repo {
    let file = |name: &str| Content::file(&root().join("models/tiny-mpt").join(name)).unwrap();
    only(["config.json", "model.safetensors"].map(|name| (name, file(name))))
}

#[test]
fn a_model_without_a_tokenizer_takes_the_one_that_its_card_names() {
    let tokenizer = Content::file(&root().join("models/tiny/tokenizer.json")).unwrap();
    let world = World::new([
        ("mosaicml/mpt-1b-redpajama-200b-dolly", mute_mpt()),
        ("EleutherAI/gpt-neox-20b", only([("tokenizer.json", tokenizer), ("model.bin", Content::lfs("large"))])),
    ]);
    let loaded = world.loader("mpt-1b-redpajama-200b-dolly").load().unwrap();
    assert!(
        loaded.notes().iter().any(|note| note.contains("tokenizer of EleutherAI/gpt-neox-20b is used")),
        "{loaded:?}"
    );
    assert_eq!(loaded.prompt_format().name, "dolly-blank");
    let options = GenerateOptions { max_tokens: 8, ..Default::default() };
    let own = Loader::embedded("tiny-mpt").unwrap().threads(2).load().unwrap();
    let expected = own.generate("The United", &options).unwrap().ids;
    assert_eq!(loaded.generate("The United", &options).unwrap().ids, expected);
    let names: Vec<_> = loaded.provenance().files.iter().map(|file| file.path.clone()).collect();
    assert!(names.iter().any(|name| name.contains("tokenizer.json")), "{names:?}");
    assert!(!world.server.take_log().iter().any(|request| request.target.contains("model.bin")));
    // The tokenizer also comes from the cache.
    let offline = Loader::new("mpt-1b-redpajama-200b-dolly").hub(world.offline()).threads(2).load().unwrap();
    assert_eq!(offline.generate("The United", &options).unwrap().ids, expected);
    // If the tokenizer cannot be fetched, the model is loaded with a warning.
    let world = World::new([("mosaicml/mpt-1b-redpajama-200b", mute_mpt())]);
    let loaded = world.loader("mpt-1b-redpajama-200b").load().unwrap();
    assert!(
        loaded.warnings().iter().any(|text| text.contains("EleutherAI/gpt-neox-20b cannot be loaded")),
        "{loaded:?}"
    );
    assert!(loaded.generate("The", &options).unwrap_err().to_string().contains("the checkpoint has no tokenizer"));
}

/// Repositories of converted files hold many files and no configuration.
#[test]
fn one_of_several_files_is_loaded_by_its_name() {
    let golden = |case: &str| root().join("tests/golden/files").join(case);
    let file = |path: PathBuf| Content::lfs(std::fs::read(path).unwrap());
    let repo = only([
        ("a.q4_0.gguf", file(golden("neox-gguf-q4_0/model.gguf"))),
        ("a.q8_0.gguf", file(golden("neox-gguf-q8_0/model.gguf"))),
        ("a-ggml-q5_1.bin", file(golden("neox-ggml-20230515-q5_1/model.bin"))),
        ("README.md", Content::text("---\nlicense: mit\n---\n")),
    ]);
    let one = only([("only.gguf", file(golden("mpt-gguf-f16/model.gguf")))]);
    let world = World::new([("owner/many-GGUF", repo), ("owner/one-GGUF", one)]);
    let loaded = world.loader("owner/many-GGUF").file("a.q8_0.gguf").load().unwrap();
    assert_eq!(loaded.info().dtype.to_string(), "q8_0");
    assert_eq!(loaded.provenance().license.as_deref(), Some("mit"));
    assert_eq!(loaded.provenance().repo.as_deref(), Some("owner/many-GGUF"));
    assert!(world.large_bytes() < 80_000, "the others are not fetched");
    let legacy = world.loader("owner/many-GGUF").file("a-ggml-q5_1.bin").load().unwrap();
    assert_eq!(legacy.info().dtype.to_string(), "q5_1");
    let offline = Loader::new("owner/many-GGUF").hub(world.offline()).file("a.q8_0.gguf").load().unwrap();
    assert_eq!(offline.info().parameters, loaded.info().parameters);
    let error = world.loader("owner/many-GGUF").load().unwrap_err().to_string();
    assert!(error.contains("3 files of a model") && error.contains("name one of them"), "{error}");
    let error = world.loader("owner/many-GGUF").file("b.gguf").load().unwrap_err().to_string();
    assert!(error.contains("no file \"b.gguf\"; the files are a-ggml-q5_1.bin, a.q4_0.gguf, a.q8_0.gguf"), "{error}");
    assert_eq!(world.loader("owner/one-GGUF").load().unwrap().info().family, "mpt");
}

#[test]
fn prompt_formats_come_from_the_card_of_the_model_or_its_original() {
    let world = World::new([
        ("togethercomputer/RedPajama-INCITE-Chat-3B-v1", tiny_repo(&[])),
        ("gl198976/mpt-7b-instruct", tiny_repo(&[])),
    ]);
    let format = |id: &str| {
        let loaded = world.loader(id).load().unwrap();
        (loaded.prompt_format().name.clone(), loaded.notes().join(" "))
    };
    let (name, note) = format("RedPajama-INCITE-Chat-3B-v1");
    assert_eq!(name, "incite-chat");
    assert!(note.contains("named by the card of togethercomputer/RedPajama-INCITE-Chat-3B-v1"), "{note}");
    assert_eq!(format("gl198976/mpt-7b-instruct").0, "dolly");
}

#[test]
fn a_noncommercial_license_is_reported() {
    let chat = mute_mpt();
    let world = World::new([("mosaicml/mpt-7b-chat", chat)]);
    let loaded = world.loader("mpt-7b-chat").load().unwrap();
    assert!(loaded.warnings().iter().any(|text| text.contains("cc-by-nc-sa-4.0, no commercial use")), "{loaded:?}");
    // A copy in a directory names its own license.
    let dir = tempfile::tempdir().unwrap();
    for file in ["config.json", "model.safetensors", "tokenizer.json"] {
        std::fs::copy(root().join("models/tiny-mpt").join(file), dir.path().join(file)).unwrap();
    }
    assert!(pricket::load(dir.path()).unwrap().warnings().is_empty());
    std::fs::write(dir.path().join("README.md"), "---\nlicense: cc-by-nc-sa-4.0\n---\n# MPT-7B-Chat\n").unwrap();
    let warnings = pricket::load(dir.path()).unwrap().warnings().join(" ");
    assert!(warnings.contains("license cc-by-nc-sa-4.0, no commercial use"), "{warnings}");
}

#[test]
fn a_revision_known_to_be_wrong_warns_with_its_source() {
    let content = tiny_repo(&["step0", "step64"]);
    let commit = content.resolve("step0").unwrap().to_owned();
    let world = World::new([("EleutherAI/pythia-2.8b", content)]);
    let warnings = |id: &str| world.loader(id).load().unwrap().warnings().join("\n");
    assert!(warnings("pythia-2.8b@step64").contains("pythia/issues/205"));
    let text = warnings("pythia-2.8b@step0");
    assert!(text.contains("step0 holds the final weights") && text.contains("issues/205"), "{text}");
    // The same by commit, also in a new cache.
    assert!(warnings(&format!("pythia-2.8b@{commit}")).contains("issues/205"));
    let fresh = tempfile::tempdir().unwrap();
    let mut settings = world.settings();
    settings.cache = fresh.path().into();
    let loaded = Loader::new(format!("pythia-2.8b@{commit}")).hub(Hub::new(settings)).threads(1).load().unwrap();
    assert!(loaded.warnings().join(" ").contains("issues/205"), "{:?}", loaded.warnings());
    // The same by its directory in the cache.
    let directory = world.loader("pythia-2.8b@step0").load().unwrap().provenance().directory.clone().unwrap();
    let loaded = Loader::new(directory).threads(1).load().unwrap();
    assert!(loaded.warnings().join(" ").contains("issues/205"), "{:?}", loaded.warnings());
    assert!(!warnings("pythia-2.8b@main").contains("issues"));
}

#[test]
fn the_license_of_an_unlisted_model_is_read_from_its_readme() {
    let mut files: Vec<(String, Content)> = ["config.json", "tokenizer.json", "model.safetensors"]
        .into_iter()
        .map(|name| (name.to_owned(), Content::file(&root().join("models/tiny").join(name)).unwrap()))
        .collect();
    files.push(("README.md".into(), Content::text("---\nlanguage: en\nlicense: \"mit\"\n---\n# Hello\n")));
    let world =
        World::new([("owner/tiny", only(files.iter().map(|(name, content)| (name.as_str(), content.clone()))))]);
    let loaded = world.loader("owner/tiny").load().unwrap();
    assert_eq!(loaded.provenance().license.as_deref(), Some("mit"));
    let json = loaded.provenance().to_json();
    assert_eq!((&json["repo"], &json["revision"]), (&json!("owner/tiny"), &json!("main")));
    // The files of a plain directory are hashed only on request.
    let local = Loader::new(root().join("models/tiny")).threads(1).load().unwrap();
    assert_eq!(local.provenance().repo, None);
    let hashed = local.provenance().clone().hashed().unwrap();
    let weights = hashed.files.iter().find(|file| file.path == "model.safetensors").unwrap();
    assert_eq!(weights.digest.as_ref().unwrap().hex(), sha256(&root().join("models/tiny/model.safetensors")));
}

#[test]
fn a_model_in_use_is_not_evicted() {
    let world = World::new([("owner/tiny", tiny_repo(&["step0"]))]);
    let main = world.loader("owner/tiny").load().unwrap();
    drop(world.loader("owner/tiny@step0").load().unwrap());
    let evicted = Cache::new(world.cache.path()).evict(0, &NoProgress).unwrap();
    assert_eq!((evicted.revisions.len(), evicted.in_use.len()), (1, 1));
    assert!(main.provenance().directory.as_ref().unwrap().join("model.safetensors").exists());
    drop(main);
    assert_eq!(Cache::new(world.cache.path()).evict(0, &NoProgress).unwrap().revisions.len(), 1);
}

#[test]
fn steps_are_listed_in_one_request() {
    let mut content = tiny_repo(&["step0", "step512", "step1000"]);
    let commit = content.resolve("step0").unwrap().to_owned();
    content.branch("something-else", &commit);
    let world = World::new([("EleutherAI/pythia-160m", content)]);
    let mut found = world.checkpoints("EleutherAI/pythia-160m");
    assert_eq!(world.server.take_log().len(), 1);
    assert_eq!(found.steps.len(), 154);
    let there: Vec<&str> = found.steps.iter().filter(|c| c.present).map(|c| c.revision.as_str()).collect();
    assert_eq!(there, ["step0", "step512", "step1000"]);
    let last = found.steps.last().unwrap();
    assert_eq!((last.step, last.tokens, last.present), (Some(143_000), Some(299_892_736_000), false));
    assert_eq!(found.steps[0].commit.as_deref(), Some(commit.as_str()));
    let steps = |text: &str| -> Steps { text.parse().unwrap() };
    assert_eq!(found.select(&steps("0..143000:10000")).unwrap().len(), 15);
    let error = found.select(&steps("7")).unwrap_err();
    assert!(error.to_string().contains("4, 8") || error.to_string().contains("4, 8, 2"), "{error}");
    assert!(found.select(&steps("7..7")).is_err());
    found.fetch_sizes(&steps("0,1000"), &NoProgress).unwrap();
    let size = std::fs::metadata(tiny_steps().join("step0/model.safetensors")).unwrap().len();
    assert_eq!((found.steps[0].bytes, found.select(&steps("512")).unwrap()[0].bytes), (Some(size), None));
    // A directory accepts the same selections of steps.
    let local = pricket::checkpoints(root().join("models/tiny").to_str().unwrap()).unwrap();
    assert_eq!(local.select(&steps("log")).unwrap().len(), 8);
    assert_eq!(local.select(&steps("final")).unwrap()[0].revision, "step4000");
}

#[test]
fn one_tensor_comes_without_its_file() {
    let world = World::new([
        (SUITE, suite_repo()),
        ("owner/sharded", {
            let golden = root().join("tests/golden/models/neox-bin-sharded-fp16");
            let mut repo = Repo::default();
            let commit = repo.commit_directory(&golden).unwrap();
            repo.branch("main", &commit);
            repo
        }),
    ]);
    let name = "gpt_neox.layers.1.mlp.dense_h_to_4h.weight";
    let snapshots = snapshots();
    for (revision, file) in [("step64", "pytorch_model.bin"), ("main", "model.safetensors")] {
        let tensors = pricket::suites::Tensors::on(&world.hub(), format!("{SUITE}@{revision}")).unwrap();
        let found = tensors.read(name).unwrap();
        let local = pricket::weights::open_file(&blob(&snapshots[revision].join(file))).unwrap();
        let expected = pricket::weights::read_tensor(&*local, name, &Device::Cpu).unwrap();
        assert_eq!(
            found.flatten_all().unwrap().to_vec1::<half::f16>().unwrap(),
            expected.flatten_all().unwrap().to_vec1::<half::f16>().unwrap()
        );
        let size = std::fs::metadata(blob(&snapshots[revision].join(file))).unwrap().len();
        let sent = world.large_bytes();
        assert!(sent < size / 2, "{revision}: {sent} of {size} bytes");
        assert!(tensors.read("no.such.tensor").unwrap_err().to_string().contains("no.such.tensor"));
        assert_eq!(tensors.names().count(), local.names().len());
    }
    // Of the shards, only the one with the tensor is read.
    let tensors = pricket::suites::Tensors::on(&world.hub(), "owner/sharded").unwrap();
    let local = pricket::suites::tensors(root().join("tests/golden/models/neox-bin-sharded-fp16")).unwrap();
    for name in local.names() {
        let (a, b) = (tensors.read(name).unwrap(), local.read(name).unwrap());
        assert_eq!((a.dims(), a.dtype()), (b.dims(), b.dtype()), "{name}");
    }
    // The cache stays empty. Once the file is in the cache, it is read there.
    assert!(Cache::new(world.cache.path()).repos().unwrap().is_empty());
    pricket::loading::fetch(format!("{SUITE}@step64"), &world.hub(), &NoProgress).unwrap();
    world.server.take_log();
    let tensors = pricket::suites::Tensors::on(&world.hub(), format!("{SUITE}@step64")).unwrap();
    assert!(tensors.is_local() && tensors.read(name).is_ok());
    assert_eq!(world.large_bytes(), 0);
}
#[test]
fn inspecting_keeps_the_cache_and_refusals_fetch_no_weights() {
    let content = tiny_repo(&["step0"]);
    let world = World::new([("owner/tiny", content.clone())]);
    let before = world.loader("owner/tiny").load().unwrap().provenance().commit.clone();
    // main moves. Inspecting it must not leave the branch with a partial snapshot.
    let mut moved = content.clone();
    let commit = content.resolve("step0").unwrap().to_owned();
    moved.branch("main", &commit);
    world.server.add("owner/tiny", moved);
    let mut command = example("inspect");
    command.args(["owner/tiny", "--brief", "--json"]).current_dir(root());
    let output =
        command.env("HF_ENDPOINT", world.server.url()).env("HF_HUB_CACHE", world.cache.path()).output().unwrap();
    let json: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(json["provenance"]["commit"], json!(commit));
    let after = Loader::new("owner/tiny").hub(world.offline()).threads(1).load().unwrap();
    assert_eq!(after.provenance().commit, before);
    // A model of an unsupported family is refused before its weights are fetched.
    world.server.add(
        "owner/other",
        only([
            ("config.json", Content::text("{\"model_type\": \"gpt2\"}")),
            ("model.safetensors", Content::lfs(vec![1; 300_000])),
        ]),
    );
    world.server.take_log();
    let error = world.loader("owner/other").load().unwrap_err();
    assert!(error.to_string().contains("gpt2") && world.large_bytes() == 0, "{error}");
    // The error for an unknown commit lists the known revisions.
    let error = world.loader(&format!("owner/tiny@{}", "0".repeat(40))).load().unwrap_err();
    assert!(matches!(&error, Error::Revision { known, .. } if known.contains(&"step0".to_owned())), "{error}");
    assert!(!error.to_string().contains("no branches"), "{error}");
}

fn checkpoints(world: &World, arguments: &[&str], environment: &[(&str, &str)]) -> (Option<i32>, String, String) {
    let output = example("checkpoints")
        .args(arguments)
        .current_dir(root())
        .env("HF_ENDPOINT", world.server.url())
        .env("HF_HUB_CACHE", world.cache.path())
        .env("HF_TOKEN", "hf_secret")
        .envs(environment.iter().copied())
        .output()
        .unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    let (out, err) = (text(output.stdout), text(output.stderr));
    assert!(!out.contains("hf_secret") && !err.contains("hf_secret"));
    (output.status.code(), out, err)
}

#[test]
fn the_example_lists_fetches_audits_and_cleans_up() {
    let world = World::new([(SUITE, suite_repo())]);
    let run = |arguments: &[&str]| checkpoints(&world, arguments, &[]);
    let (code, out, _) = run(&[]);
    assert!(code == Some(0) && out.contains("8 of 8 steps"), "{out}");
    let (code, out, err) = run(&["list", SUITE, "--sizes", "--json"]);
    let json: Value = serde_json::from_str(&out).unwrap_or_else(|e| panic!("{e}: {out}{err}"));
    assert_eq!((code, json["checkpoints"].as_array().unwrap().len()), (Some(0), 7));
    assert_eq!(json["checkpoints"][0]["bytes"], 561_424);
    let (code, out, err) = run(&["fetch", SUITE, "--steps", "0,64..256", "--budget", "1.2MB"]);
    assert!(code == Some(0) && out.lines().count() == 4 && err.is_empty(), "{out}{err}");
    let (_, out, _) = run(&["cache", "list", "--json"]);
    let json: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(json["repos"][0]["revisions"].as_array().unwrap().len(), 2, "the budget holds two");
    let (code, out, _) = run(&["cache", "verify"]);
    assert!(code == Some(0) && out.contains("0 damaged"), "{out}");
    let (code, out, _) = run(&["audit", SUITE]);
    assert!(code == Some(3) && out.contains("WRONG: step512 holds the weights of step1000"), "{out}");
    let (code, out, _) = run(&["audit", SUITE, "--json", "--steps", "0..256"]);
    let json: Value = serde_json::from_str(&out).unwrap();
    assert_eq!((code, &json["identical"]), (Some(0), &json!([["step0", "step1"]])));
    let (code, out, _) = run(&["norm", SUITE, "--steps", "0,1000"]);
    assert!(code == Some(0) && out.lines().count() == 2, "{out}");
    let (code, out, _) = run(&["cache", "evict", "0"]);
    assert!(code == Some(0) && out.contains("take 0.0 kB"), "{out}");
    let (code, out, err) = run(&["list", "mosaicml/mpt-7b"]);
    assert!(code == Some(1) && out.is_empty() && err.lines().count() == 1 && err.contains("anas-awadalla"), "{err}");
    let (code, out, _) = run(&["cards"]);
    assert!(code == Some(0) && out.lines().count() == pricket::suites::cards().len() + 1);
}

#[test]
fn generate_and_inspect_take_ids() {
    let world = World::new([(SUITE, suite_repo())]);
    let run = |name: &str, arguments: &[&str], offline: &str| {
        let mut command = example(name);
        command.args(arguments).env("HF_ENDPOINT", world.server.url()).env("HF_HUB_CACHE", world.cache.path());
        let output = command.env("HF_HUB_OFFLINE", offline).current_dir(root()).output().unwrap();
        (output.status.code(), String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap())
    };
    let arguments = ["--model", SUITE, "--revision", "step64", "--json", "-n", "4", "--seed", "1"];
    let (code, first, err) = run("generate", &arguments, "0");
    assert_eq!(code, Some(0), "{err}");
    assert!(err.is_empty(), "no bar and no word where there is no terminal: {err}");
    let (first, again): (Value, Value) =
        (serde_json::from_str(&first).unwrap(), serde_json::from_str(&run("generate", &arguments, "1").1).unwrap());
    assert_eq!(first["ids"], again["ids"]);
    assert_eq!(first["provenance"]["revision"], "step64");
    let (code, out, err) = run("inspect", &[&format!("{SUITE}@step64"), "--brief"], "1");
    assert!(code == Some(0) && out.contains("gpt_neox"), "{out}{err}");
    // Inspecting a repository does not fetch its weights.
    world.server.take_log();
    let (code, out, err) = run("inspect", &[SUITE], "0");
    assert!(code == Some(0) && out.contains("safetensors") && out.contains("final_layer_norm"), "{out}{err}");
    let sent = world.large_bytes();
    assert!(sent < 100_000, "{sent}");
}

/// `PRICKET_REAL_HUB=1 cargo test real_hub` uses the real Hub and fetches 70 MB.
#[test]
fn the_real_hub_answers() {
    if std::env::var_os("PRICKET_REAL_HUB").is_none() {
        return;
    }
    let cache = tempfile::tempdir().unwrap();
    let mut settings = Settings::from_env().unwrap();
    settings.cache = cache.path().into();
    let hub = Hub::new(settings);
    let found = Checkpoints::on(&hub, "EleutherAI/pythia-14m", &NoProgress).unwrap();
    assert!(found.steps.iter().filter(|checkpoint| checkpoint.present).count() >= 150);
    let loaded = Loader::new("EleutherAI/pythia-14m@step143000").hub(hub).load().unwrap();
    assert_eq!(loaded.info().parameters, 14_067_712);
    assert!(loaded.provenance().files.iter().all(|file| file.digest.is_some()));
    let model: Arc<dyn pricket::CausalLm> = loaded.model();
    assert_eq!(model.info().vocab, 50_304);
}

/// A legacy file with the words of GPT-NeoX-20B gets that model's tokenizer, with a note.
#[test]
fn a_legacy_file_fetches_the_matching_tokenizer() {
    // A file of the smallest model with that many words. All words are made up, except those that identify the
    // vocabulary.
    let word = |id: usize| match id {
        0 => "<|endoftext|>".to_owned(),
        2422 => "Al".to_owned(),
        547 => "ice".to_owned(),
        _ => format!("w{id}"),
    };
    let (vocab, d) = (50_304usize, 8usize);
    let mut file: Vec<u8> = b"lmgg".to_vec();
    let mut put = |numbers: &[usize]| numbers.iter().for_each(|n| file.extend((*n as u32).to_le_bytes()));
    put(&[vocab, 64, d, 1, 1, 2, 1, 1]);
    for id in 0..vocab {
        file.extend((word(id).len() as u32).to_le_bytes());
        file.extend(word(id).bytes());
    }
    let layer = "gpt_neox.layers.0";
    let tensors = [
        ("gpt_neox.embed_in.weight".to_owned(), vec![vocab, d]),
        ("embed_out.weight".to_owned(), vec![vocab, d]),
        (format!("{layer}.attention.query_key_value.weight"), vec![3 * d, d]),
        (format!("{layer}.attention.query_key_value.bias"), vec![3 * d]),
        (format!("{layer}.attention.dense.weight"), vec![d, d]),
        (format!("{layer}.attention.dense.bias"), vec![d]),
        (format!("{layer}.mlp.dense_h_to_4h.weight"), vec![4 * d, d]),
        (format!("{layer}.mlp.dense_h_to_4h.bias"), vec![4 * d]),
        (format!("{layer}.mlp.dense_4h_to_h.weight"), vec![d, 4 * d]),
        (format!("{layer}.mlp.dense_4h_to_h.bias"), vec![d]),
    ];
    let norms = [
        format!("{layer}.input_layernorm"),
        format!("{layer}.post_attention_layernorm"),
        "gpt_neox.final_layer_norm".into(),
    ];
    let norms = norms.iter().flat_map(|norm| ["weight", "bias"].map(|end| (format!("{norm}.{end}"), vec![d])));
    for (name, shape) in tensors.into_iter().chain(norms) {
        for n in [shape.len(), name.len(), usize::from(shape.len() > 1)] {
            file.extend((n as u32).to_le_bytes());
        }
        shape.iter().rev().for_each(|n| file.extend((*n as u32).to_le_bytes()));
        file.extend(name.bytes());
        let bytes = shape.iter().product::<usize>() * if shape.len() > 1 { 2 } else { 4 };
        file.extend(vec![0; bytes]);
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ggml-model-f16.bin");
    std::fs::write(&path, file).unwrap();
    // The tokenizer of models/tiny replaces the real one.
    let tokenizer = Content::file(&root().join("models/tiny/tokenizer.json")).unwrap();
    let world = World::new([("EleutherAI/gpt-neox-20b", only([("tokenizer.json", tokenizer)]))]);
    let loaded = Loader::new(&path).hub(world.hub()).threads(1).load().unwrap();
    assert!(
        loaded.notes().iter().any(|note| note.contains("the tokenizer of EleutherAI/gpt-neox-20b is used")),
        "{loaded:?}"
    );
    assert!(loaded.encode("Alice").is_ok());
    let alone = tempfile::tempdir().unwrap();
    let mut settings = world.settings();
    settings.cache = alone.path().into();
    settings.offline = true;
    let mute = Loader::new(&path).hub(Hub::new(settings)).threads(1).load().unwrap();
    assert!(mute.warnings().iter().any(|text| text.contains("cannot be loaded")), "{:?}", mute.warnings());
}

/// An adapter by its id: both of its files are fetched, and nothing else of its repository.
#[cfg(feature = "train")]
#[test]
fn an_adapter_is_fetched_by_its_id() {
    let case = root().join("tests/golden/training/lora-train-dora-neox");
    let file = |name: &str| Content::file(&case.join("final").join(name)).unwrap();
    let adapter = only([
        ("adapter_config.json", file("adapter_config.json")),
        ("adapter_model.safetensors", file("adapter_model.safetensors")),
        ("optimizer.bin", Content::lfs(vec![0; 100_000])),
    ]);
    let empty = only([("README.md", Content::text(b"nothing".to_vec()))]);
    let world = World::new([("owner/adapter", adapter), ("owner/empty", empty)]);
    let load = |adapter: &str| Loader::new(case.join("model")).hub(world.hub()).adapter(adapter).threads(1).load();
    let ids = pricket::candle::Tensor::new(&[[1u32, 2, 3]], &Device::Cpu).unwrap();
    let logits = |pricket: &pricket::Pricket| {
        let model = pricket.model();
        let hidden = model.hidden(&ids, &mut pricket::Context::new()).unwrap();
        model.head(&hidden).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap()
    };
    let fetched = load("owner/adapter").unwrap();
    let here = Loader::new(case.join("model")).adapter(case.join("final")).threads(1).load().unwrap();
    assert_eq!(logits(&fetched), logits(&here));
    assert!(
        fetched.notes().iter().any(|note| note.contains("adapter of rank 4 on 4 modules")),
        "{:?}",
        fetched.notes()
    );
    assert!(world.large_bytes() < 100_000, "the optimizer's state is left there");
    let error = load("owner/empty").unwrap_err().to_string();
    assert!(error.contains("owner/empty has no adapter_config.json"), "{error}");
    let error = load("owner/none").unwrap_err().to_string();
    assert!(error.contains("owner/none"), "{error}");
}
