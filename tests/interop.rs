//! Candle programs and pricket together.

use pricket::candle::{DType, Device, Tensor};
use pricket::convert::{ConvertOptions, Target};
use pricket::interop::{self, hf_hub, tokenizers};
use pricket::{Context, Error, Loader, Pricket, Source};

use crate::common::{root, worst};

fn logits(pricket: &Pricket) -> Tensor {
    let ids = Tensor::new(&[[1u32, 5, 9, 200, 17, 3]], &Device::Cpu).unwrap();
    let model = pricket.model();
    model.head(&model.hidden(&ids, &mut Context::new()).unwrap()).unwrap()
}

/// A VarBuilder over a GGUF file, whose names and order of rows differ, gives the tensors of the Hub's files.
#[test]
fn a_var_builder_has_the_hubs_names_and_rows_whatever_the_format() {
    let directory = tempfile::tempdir().unwrap();
    for model in ["tiny", "tiny-mpt", "tiny-llama", "tiny-rwkv"] {
        let source = root().join("models").join(model);
        let ours = interop::open(&source).unwrap();
        let expected = ours.var_builder(DType::F32, &Device::Cpu);
        let file = directory.path().join(format!("{model}.gguf"));
        let options = ConvertOptions { target: Target::F32, ..ConvertOptions::default() };
        // llama.cpp has no RWKV-4, so a directory is the other form.
        let file = if model == "tiny-rwkv" { directory.path().join(model) } else { file };
        Loader::new(&source).convert(&file, &options).unwrap();
        let opened = interop::open(&file).unwrap();
        let found = opened.var_builder(DType::F32, &Device::Cpu);
        let names = opened.store().names();
        assert!(names.len() > 10 && names.len() == ours.store().names().len(), "{model}: {names:?}");
        for name in names {
            let (found, expected) = (found.get_unchecked(&name).unwrap(), expected.get_unchecked(&name).unwrap());
            assert_eq!(found.dims(), expected.dims(), "{model} {name}");
            assert_eq!(worst(&found, &expected), 0.0, "{model} {name}");
        }
        assert!(!found.contains_tensor("nothing"));
        assert!(found.get_unchecked("nothing").unwrap_err().to_string().contains("nothing"));
        let name = opened.store().names().swap_remove(0);
        let wrong = found.get((3, 3), &name).unwrap_err().to_string();
        assert!(wrong.contains(&name) && wrong.contains("[3, 3]"), "{wrong}");

        // The model over the VarBuilder has the same bits.
        let again = Loader::from_store(opened.config.clone(), interop::store(found)).threads(1).load().unwrap();
        let plain = Loader::new(&source).threads(1).load().unwrap();
        assert_eq!(worst(&logits(&again), &logits(&plain)), 0.0, "{model}");
    }
}

#[test]
fn tensors_missing_from_a_var_builder_are_named() {
    let opened = interop::open(root().join("models/tiny")).unwrap();
    let weights = opened.var_builder(DType::F32, &Device::Cpu);
    let error = Loader::from_store(opened.config, interop::store(weights.pp("elsewhere"))).load().unwrap_err();
    assert!(error.to_string().contains("gpt_neox.embed_in.weight"), "{error}");
}

#[test]
fn tokenizers_convert_both_ways() {
    let ours = pricket::tiny().unwrap();
    let ours = ours.tokenizer().unwrap();
    let theirs = interop::to_tokenizers(ours).unwrap();
    let again = interop::tokenizer(&theirs).unwrap();
    for text in ["The whale, the WHALE!", "", "日本 and ünïcode\n\n  spaces"] {
        let ids = ours.encode(text).unwrap();
        assert_eq!(theirs.encode(text, false).unwrap().get_ids(), ids);
        assert_eq!(again.encode(text).unwrap(), ids);
    }
    let empty = tokenizers::Tokenizer::new(tokenizers::models::wordlevel::WordLevel::default());
    assert!(matches!(interop::tokenizer(&empty), Err(Error::Tokenizer { .. })));
}

#[test]
fn repositories_and_sources_convert_both_ways() {
    let repo = hf_hub::Repo::with_revision("EleutherAI/pythia-70m".into(), hf_hub::RepoType::Model, "step3000".into());
    let source = interop::source(&repo).unwrap();
    assert_eq!(source.to_string(), Source::new("EleutherAI/pythia-70m@step3000").to_string());
    let back = interop::repo(source).unwrap();
    assert_eq!((back.folder_name(), back.revision()), (repo.folder_name(), "step3000"));
    let dataset = hf_hub::Repo::dataset("EleutherAI/lambada_openai".into());
    assert!(matches!(interop::source(&dataset), Err(Error::Source(_))));
    assert!(matches!(interop::repo(root().join("models/tiny")), Err(Error::Source(_))));
}

/// The VarBuilder creates variables when they are requested with a shape.
#[test]
fn a_model_loads_over_variables_and_zeros() {
    use pricket::candle_nn::{VarBuilder, VarMap};

    let config = interop::open(root().join("models/tiny")).unwrap().config;
    let variables = VarMap::new();
    let weights = VarBuilder::from_varmap(&variables, DType::F32, &Device::Cpu);
    let tensors = interop::open(root().join("models/tiny")).unwrap();
    for name in tensors.store().names() {
        let tensor = tensors.var_builder(DType::F32, &Device::Cpu).get_unchecked(&name).unwrap();
        weights.get(tensor.dims(), &name).unwrap();
        variables.data().lock().unwrap()[&name].set(&tensor).unwrap();
    }
    let found = Loader::from_store(config.clone(), interop::store(weights)).threads(1).load().unwrap();
    assert_eq!(worst(&logits(&found), &logits(&pricket::tiny().unwrap())), 0.0);
    let zeros = interop::store(VarBuilder::zeros(DType::F32, &Device::Cpu));
    let found = Loader::from_store(config, zeros).threads(1).load().unwrap();
    assert_eq!(logits(&found).flatten_all().unwrap().to_vec1::<f32>().unwrap(), vec![0.0; 6 * found.info().vocab]);
    let adapted = Loader::new(root().join("models/tiny")).adapter("somewhere");
    assert!(matches!(interop::Opened::from_loader(&adapted), Err(Error::Options(_))));
}
