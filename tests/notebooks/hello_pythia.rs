// Made of the notebook's cells by tools/notebooks; not to be edited.

pub(crate) fn run() -> Result<(), Box<dyn std::error::Error>> {
    use pricket::hub::Steps;
    use pricket::notebook;
    use pricket::plots::Picture;
    use pricket::sweep::{self, Measure};
    use pricket::{Context, GenerateOptions, SamplingParams, Site, Sweep, Taps};

    let tiny = pricket::tiny()?;
    tiny.clone().evcxr_display();

    let sampling = SamplingParams { temperature: 0.7, top_p: 0.95, ..SamplingParams::default() };
    let options = GenerateOptions { max_tokens: 60, sampling, seed: 7, ..GenerateOptions::default() };
    notebook::stream(&tiny, "My fellow citizens,", &options)?;

    let scored =
        tiny.logprobs("The President of the United States spoke to the Congress, and the Congress to the whale.")?;
    notebook::tokens(&scored)?.evcxr_display();

    Picture::of_pictures(&[
        notebook::next_tokens(&tiny, "The United", 6)?,
        notebook::next_tokens(&tiny, "The Congress of the", 6)?,
    ])?
    .evcxr_display();

    let out = std::env::temp_dir().join(format!("pricket-hello-pythia-{}.jsonl", std::process::id()));
    std::fs::remove_file(&out).ok();
    let models = vec![pricket::checkpoints(concat!(env!("CARGO_MANIFEST_DIR"), "/models/tiny"))?];
    let text = "In the year of our Lord the Congress met, and the President of the United States spoke of the army.";
    let measure = Measure::Text { name: "text".into(), text: text.into() };
    let sweep = Sweep::new(models, "all".parse::<Steps>()?, vec![measure], &out);
    let swept = sweep.run(|row| {
        if row["metric"] == "text/loss" {
            println!(
                "{:>9}  {:.2} nats a token",
                row["revision"].as_str().unwrap_or("?"),
                row["value"].as_f64().unwrap_or(f64::NAN)
            );
        }
    })?;
    println!("{} checkpoints, {} rows", swept.checkpoints, swept.rows);

    let rows = sweep::read_rows(&[&out])?;
    sweep::curves(&rows, &["text/loss".into()], &sweep::CurveOptions::default())?.evcxr_display();

    let ids = tiny.encode("The President of the United")?;
    let ids = pricket::candle::Tensor::new(ids.as_slice(), &pricket::candle::Device::Cpu)?.unsqueeze(0)?;
    let mut context = Context::new().with_taps(Taps::new().record(Site::ResidPost));
    tiny.model().hidden(&ids, &mut context)?;
    let recording = context.take_recording();
    let mut lengths = Vec::new();
    for layer in 0..tiny.info().layers {
        let stream = recording.get(Site::ResidPost, layer).expect("it was recorded");
        let last = stream.narrow(1, stream.dim(1)? - 1, 1)?;
        lengths.push(format!("layer {layer}: {:.1}", last.sqr()?.sum_all()?.sqrt()?.to_scalar::<f32>()?));
    }
    println!("{}", lengths.join("\n"));
    Ok(())
}
