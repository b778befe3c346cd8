//! Cases of 4-bit types: quantization, checkpoints of bitsandbytes, and adapters over them.

use std::collections::HashMap;
use std::path::Path;

use anyhow::{Context as _, Result};
use pricket::Loader;
use pricket::candle::{DType, Device, Tensor};
use pricket::nn::ops::{FourBit, FourBitType};
use pricket::train::Lora;
use pricket::weights::{Dtype, FourBitTensors, Outline, four_bit_parts, read_tensor};
use serde_json::Value;

use super::training::{distance, logits, train_steps};
use super::{Check, Setup, flat, get, read_tensors, tolerance};

/// Runs a case of 4-bit types. Returns `None` for other kinds of cases.
pub(super) fn run(dir: &Path, case: &Value, setup: &Setup, check: &mut Check) -> Option<Result<()>> {
    Some(match case["kind"].as_str()? {
        "quantise-4bit" => quantize(dir, case, check),
        "checkpoint-4bit" => checkpoint(dir, case, setup, check),
        "qlora-train" => qlora(dir, case, setup, check),
        _ => return None,
    })
}

/// Compares the bytes of quantized tensors, and the values that they stand for.
fn quantize(dir: &Path, case: &Value, check: &mut Check) -> Result<()> {
    let expected = read_tensors(&dir.join("expected.safetensors"))?;
    for item in case["items"].as_array().context("case.json has no items")? {
        let name = format!("t{}", item["index"]);
        let input = get(&expected, &format!("{name}.input"))?;
        let kind = if item["quant_type"] == "fp4" { FourBitType::Fp4 } else { FourBitType::Nf4 };
        let is_double = item["double_quant"] == true;
        let block = item["blocksize"].as_u64().context("blocksize")? as usize;
        let matrix = FourBit::quantize(kind, &flat(input)?, input.dims2()?, block, is_double)?;
        for (Outline { name: end, .. }, bytes) in four_bit_parts(&name, &matrix, Dtype::F32) {
            let end = if end == name { format!("{name}.packed") } else { end };
            if let Some(stored) = expected.get(&end) {
                check.equal(&end, &bytes, &raw(stored)?);
            }
        }
        let map = get(&expected, &format!("{}_map", kind.name()))?;
        check.equal("map", &matrix.table().to_vec(), &map.to_vec1::<f32>()?);
        let values = Tensor::from_vec(matrix.to_f32(), input.dims(), &Device::Cpu)?.to_dtype(input.dtype())?;
        match expected.get(&format!("{name}.dequantised")) {
            Some(stored) => check.equal("dequantized", &raw(&values)?, &raw(stored)?),
            None => check.equal(
                "dequantized",
                &super::sha256(&raw(&values)?),
                &item["dequantised_sha256"].as_str().unwrap_or_default().to_owned(),
            ),
        }
        if let pricket::nn::ops::Scales::Double { table, offset, .. } = matrix.scales() {
            check.equal("dynamic_map", table, &get(&expected, "dynamic_map")?.to_vec1::<f32>()?);
            let stored = get(&expected, &format!("{name}.offset"))?.flatten_all()?.to_vec1::<f32>()?;
            check.equal("offset", &vec![*offset], &stored);
        }
    }
    Ok(())
}

/// Returns the bytes of a tensor.
fn raw(tensor: &Tensor) -> Result<Vec<u8>> {
    let tensor = tensor.flatten_all()?;
    Ok(match tensor.dtype() {
        DType::U8 => tensor.to_vec1::<u8>()?,
        DType::F16 => tensor.to_vec1::<half::f16>()?.iter().flat_map(|x| x.to_le_bytes()).collect(),
        DType::BF16 => tensor.to_vec1::<half::bf16>()?.iter().flat_map(|x| x.to_le_bytes()).collect(),
        _ => tensor.to_dtype(DType::F32)?.to_vec1::<f32>()?.iter().flat_map(|x| x.to_le_bytes()).collect(),
    })
}

/// Compares the values of the 4-bit matrices of a checkpoint, bit by bit.
fn dequantized(model: &Path, expected: &HashMap<String, Tensor>, check: &mut Check) -> Result<()> {
    let store = FourBitTensors::over(pricket::loading::open_weights(model.join("model.safetensors"))?)?;
    for (name, wanted) in expected {
        let Some(name) = name.strip_prefix("dequantised.") else { continue };
        check.equal("dequantized", &raw(&read_tensor(&*store, name, &Device::Cpu)?)?, &raw(wanted)?);
    }
    Ok(())
}

/// Compares the values and logits of a 4-bit checkpoint of transformers.
fn checkpoint(dir: &Path, case: &Value, setup: &Setup, check: &mut Check) -> Result<()> {
    let expected = read_tensors(&dir.join("expected.safetensors"))?;
    let model = dir.join(case["model"].as_str().context("model")?);
    dequantized(&model, &expected, check)?;
    let pricket = setup.of(Loader::new(&model)).load()?;
    let found = logits(&pricket, &expected)?;
    let worst = distance(&found, get(&expected, "logits")?, None)?;
    let worst = match expected.get("logits_unrounded") {
        Some(other) => worst.min(distance(&found, other, None)?),
        None => worst,
    };
    check.within("logits", worst, tolerance(case, "logits_atol")?);
    Ok(())
}

/// Compares a 4-bit base, read and quantized here, and the training of an adapter over both.
fn qlora(dir: &Path, case: &Value, setup: &Setup, check: &mut Check) -> Result<()> {
    let expected = read_tensors(&dir.join("expected.safetensors"))?;
    let of = |key: &str| -> Result<_> { Ok(dir.join(case[key].as_str().with_context(|| key.to_owned())?)) };
    let (stored, plain) = (of("checkpoint_4bit")?, of("model")?);
    let atol = |key: &str| tolerance(case, key);
    dequantized(&stored, &expected, check)?;
    let whole = setup.of(Loader::new(&plain)).load()?;
    let worst = distance(&logits(&whole, &expected)?, get(&expected, "logits_f32")?, None)?;
    check.within("logits_f32", worst, atol("logits_atol")?);
    let settings = &case["quantisation"];
    let kind = settings["bnb_4bit_quant_type"].as_str().unwrap_or("nf4");
    let scales = if settings["bnb_4bit_use_double_quant"] == true { "" } else { "_f32" };
    let quantization = format!("{kind}{scales}").parse().map_err(anyhow::Error::msg)?;
    let quantized = Loader::new(&plain).four_bit(quantization).load()?;
    // The bytes that bitsandbytes stored are those that pricket makes.
    let on_file = FourBitTensors::over(pricket::loading::open_weights(stored.join("model.safetensors"))?)?;
    for (name, tensor) in read_tensors(&plain.join("model.safetensors"))? {
        if !matches!(on_file.entry(&name).map(|entry| entry.dtype), Some(Dtype::FourBit(_))) {
            continue;
        }
        let (theirs, original) = on_file.four_bit(&name)?;
        let ours =
            FourBit::quantize(theirs.kind(), &flat(&tensor)?, theirs.shape(), theirs.block(), scales.is_empty())?;
        let parts = |matrix: &FourBit| four_bit_parts(&name, matrix, original);
        for (ours, theirs) in parts(&ours).iter().zip(&parts(&theirs)) {
            check.equal(&ours.0.name, &ours.1, &theirs.1);
        }
    }
    for pricket in [setup.of(Loader::new(&stored)).load()?, quantized] {
        let worst = distance(&logits(&pricket, &expected)?, get(&expected, "logits_4bit")?, None)?;
        check.within("logits_4bit", worst, atol("logits_atol")?);
        let read = |name: &str| Lora::read(dir.join(case["adapter"][name].as_str().unwrap_or(name)));
        let trained = train_steps(&read("initial")?, &pricket, &expected, &case["train"], &case["tolerance"], check)?;
        let reference = read("final")?;
        for (name, tensor) in reference.tensors() {
            let found = trained.tensors().remove(&name).with_context(|| format!("{name} was not trained"))?;
            check.within("final", distance(&found, &tensor, None)?, atol("final_atol")?);
        }
        let adapted = pricket.with_adapter(&reference)?;
        let worst = distance(&logits(&adapted, &expected)?, get(&expected, "logits")?, None)?;
        check.within("logits", worst, atol("logits_atol")?);
    }
    Ok(())
}
