// Made of the notebook's cells by tools/notebooks; not to be edited.

pub(crate) fn run() -> Result<(), Box<dyn std::error::Error>> {
    use pricket::GenerateOptions;
    use pricket::notebook::{LossCurve, Tabular};
    use pricket::text::prompt_format;
    use pricket::train::{Dataset, Evaluation, Lora, LoraConfig, TrainOptions, TrainTarget, Trainer, read_records};

    let tiny = pricket::tiny()?;
    let format = prompt_format("dolly")?;
    let questions = ["Which month precedes May?", "What is the opposite of hot?", "Add 3 and 4."];
    let options = GenerateOptions { max_tokens: 24, ..GenerateOptions::default() };
    for question in questions {
        let prompt = format.prompt(None, &[pricket::text::Turn::user(question)])?;
        println!("{question} {:?}", tiny.generate(&prompt, &options)?.text);
    }

    let mut data_options = tiny.dataset_options();
    data_options.format = format.clone();
    let train = read_records(&[concat!(env!("CARGO_MANIFEST_DIR"), "/docs/data/instructions.jsonl")])?;
    let held_out = read_records(&[concat!(env!("CARGO_MANIFEST_DIR"), "/docs/data/instructions.validation.jsonl")])?;
    let train = Dataset::new(&train, tiny.tokenizer().ok(), &data_options)?;
    let held_out = Dataset::new(&held_out, tiny.tokenizer().ok(), &data_options)?;
    train.statistics.evcxr_display();

    for (ids, is_counted) in train.samples[0].runs() {
        let label = if is_counted { "counted:    " } else { "not counted:" };
        println!("{label} {:?}", tiny.tokenizer()?.decode_part(ids));
    }

    let base = tiny.base()?;
    let lora = Lora::new(LoraConfig { rank: 16, alpha: 32.0, ..LoraConfig::default() }, &base, 0)?;
    let tuned = lora.train(&base, 0)?;
    let run = TrainOptions {
        batch: 16,
        evaluation: Some(Evaluation { every: 40, patience: None }),
        ..TrainOptions::new(280, 6e-3)
    };
    let mut trainer = Trainer::new(TrainTarget::Adapter(Box::new(lora)), tuned, train.samples.clone(), run)?
        .with_evaluation(held_out.samples.clone())?;
    trainer.memory()?.evcxr_display();

    let mut curve = LossCurve::new(trainer.options().steps);
    if let Some(loss) = trainer.evaluate()? {
        curve.add_evaluation(0, loss);
    }
    while !trainer.is_done() {
        curve.push(&trainer.advance()?);
    }
    curve.evcxr_display();

    let tuned = tiny.with_model(trainer.tuned().model.clone(), Vec::new());
    for question in questions {
        let prompt = format.prompt(None, &[pricket::text::Turn::user(question)])?;
        println!("{question} {:?}", tuned.generate(&prompt, &options)?.text);
    }
    Ok(())
}
