//! Pictures: what is drawn, not how it looks.

use std::fmt::Write;
use std::path::Path;

use pricket::plots::{Curve, Curves, Picture, Point, Table};
use pricket::sweep;

/// Rows of a sweep of `models`, at steps 0, 512 and 143000.
fn results(models: &[&str]) -> String {
    let mut text = String::new();
    for (i, model) in models.iter().enumerate() {
        for (step, value) in [(0, 0.52), (512, 0.54), (143_000, 0.6 + 0.05 * i as f64)] {
            let row = serde_json::json!({
                "model": model, "revision": format!("step{step}"), "step": step, "metric": "piqa/acc", "value": value,
                "stderr": 0.01, "part": [1, 1],
            });
            writeln!(text, "{row}").unwrap();
        }
    }
    text
}

fn rows(text: &str) -> pricket::Result<Vec<sweep::Row>> {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("results.jsonl");
    std::fs::write(&path, text).unwrap();
    sweep::read_rows(&[path])
}

/// Pixels of a PNG, three bytes each.
fn pixels(png: &[u8]) -> (u32, u32, Vec<u8>) {
    let mut reader = png::Decoder::new(std::io::Cursor::new(png)).read_info().unwrap();
    let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
    let info = reader.next_frame(&mut pixels).unwrap();
    (info.width, info.height, pixels)
}

#[test]
fn curves_have_their_points_bands_and_what_others_published() {
    let rows = rows(&results(&["EleutherAI/pythia-70m", "EleutherAI/pythia-160m"])).unwrap();
    let count = |svg: &str, what: &str| svg.matches(what).count();
    let picture = sweep::curves(&rows, &[], false, true).unwrap();
    let svg = picture.svg().unwrap();
    for text in ["pythia-70m", "pythia-160m", "published", "training step", "piqa", "\n0\n", "100k"] {
        assert!(svg.contains(text), "{text}");
    }
    // A band, translucent, for each of our curves.
    assert_eq!(count(&svg, "opacity=\"0.16\""), 2);
    let alone = sweep::curves(&rows, &[], false, false).unwrap().svg().unwrap();
    assert!(!alone.contains("published") && count(&alone, "<polyline") < count(&svg, "<polyline"));
    // Every colour of a curve is in the PNG, which is twice the size of the SVG.
    let (width, height, pixels) = pixels(&picture.png().unwrap());
    assert!(svg.contains(&format!("width=\"{}\" height=\"{}\"", width / 2, height / 2)));
    for colour in [[0, 114, 178], [213, 94, 0]] {
        assert!(pixels.as_chunks::<3>().0.iter().filter(|&&pixel| pixel == colour).count() > 500, "{colour:?}");
    }
    let picture = sweep::table(&rows, &["piqa/acc".into()]).unwrap().svg().unwrap();
    assert!(picture.contains("0.6500 ± 0.0100") && picture.contains("step143000"), "{picture}");
}

#[test]
fn seeds_become_their_mean() {
    let names = ["EleutherAI/pythia-14m-seed1", "EleutherAI/pythia-14m-seed2", "EleutherAI/pythia-14m-seed3"];
    let rows = rows(&results(&names)).unwrap();
    let apart = sweep::curves(&rows, &[], false, false).unwrap().svg().unwrap();
    let together = sweep::curves(&rows, &[], true, false).unwrap().svg().unwrap();
    assert!(apart.contains("pythia-14m-seed2") && !together.contains("seed"));
    assert_eq!((apart.matches("opacity=\"0.16\"").count(), together.matches("opacity=\"0.16\"").count()), (3, 1));
}

#[test]
fn the_last_row_of_a_checkpoint_counts_and_failures_do_not() {
    let mut text = results(&["a/b"]);
    text += "{\"model\":\"a/b\",\"revision\":\"step512\",\"step\":512,\"metric\":\"piqa/acc\",\"value\":0.9,\"part\":[1,1]}\n";
    text += "{\"model\":\"a/b\",\"revision\":\"step1000\",\"step\":1000,\"error\":\"no such file\",\"part\":[1,1]}\n";
    text += "{\"model\":\"a/b\",\"revision\":\"step2000\",\"st";
    let found = rows(&text).unwrap();
    assert_eq!(found.iter().map(|row| row.value).collect::<Vec<_>>(), [0.52, 0.9, 0.6]);
    for (bad, what) in [("[]\n", "\"model\""), ("{}\n", "\"model\""), ("nonsense\n", "line 1: not a row of a sweep")] {
        let error = rows(bad).unwrap_err().to_string();
        assert!(error.contains(what) && error.contains("results.jsonl"), "{error}");
    }
}

#[test]
fn nothing_to_draw_is_an_error_that_says_so() {
    let error = |result: pricket::Result<Picture>| result.unwrap_err().to_string();
    let rows = rows(&results(&["a/b"])).unwrap();
    let missing = error(sweep::curves(&rows, &["sciq/acc".into()], false, true));
    assert!(missing.contains("sciq/acc") && missing.contains("piqa/acc"), "{missing}");
    assert!(error(sweep::curves(&[], &[], false, true)).contains("no figures"));
    // Of a model without steps there is a table and no curve.
    let text = "{\"model\":\"mosaicml/mpt-7b\",\"revision\":\"main\",\"step\":null,\"metric\":\"piqa/acc\",\"value\":0.8,\"part\":[1,1]}\n";
    let main = self::rows(text).unwrap();
    assert!(error(sweep::curves(&main, &[], false, true)).contains("training step"));
    assert!(sweep::table(&main, &[]).unwrap().svg().unwrap().contains("0.8000"));
    // A trial over a few documents is no point of the curve of all.
    let mut mixed = rows.clone();
    mixed[1].settings = serde_json::json!({"limit": 10});
    assert!(error(sweep::curves(&mixed, &[], false, true)).contains("different ways"));
    // What has no number is left out where others have one.
    let mut some = rows.clone();
    some.push(sweep::Row { metric: "b/acc".into(), value: f64::NAN, ..rows[0].clone() });
    assert!(sweep::curves(&some, &[], false, true).is_ok());
    assert!(error(sweep::curves(&some, &["b/acc".into()], false, true)).contains("acc"));
    let nan = Curves {
        y: "loss".into(),
        curves: vec![Curve::new("a", vec![Point::new(1.0, f64::NAN)])],
        ..Curves::default()
    };
    assert!(error(Picture::of_curves(vec![nan]).map_err(Into::into)).contains("loss"));
    let short = Table { columns: vec!["a".into(), "b".into()], rows: vec![vec!["1".into()]], ..Table::default() };
    assert!(error(Picture::of_table(short).map_err(Into::into)).contains("2 columns"));
    let whole = Table { columns: vec!["a".into()], rows: vec![vec!["1".into()]], ..Table::default() };
    let picture = Picture::of_table(whole).unwrap();
    assert!(picture.save("picture.jpeg").unwrap_err().to_string().contains(".svg or .png"));
    assert!(!Path::new("picture.jpeg").exists());
}

#[test]
fn awkward_values_are_drawn() {
    // One point; equal values; values over many powers of ten; infinite ones beside finite ones.
    for values in [vec![0.5], vec![0.0, 0.0], vec![1e-9, 1.0, 1e12], vec![f64::INFINITY, 2.0, f64::NAN, -3.0]] {
        for log in [false, true] {
            let points = values.iter().enumerate().map(|(i, &value)| Point { step: i as f64, value, error: Some(9.0) });
            let curve = Curve::new("<a & \"b\">", points.collect());
            let drawn =
                Picture::of_curves(vec![Curves { log, y: "y".into(), curves: vec![curve], ..Curves::default() }]);
            if log && !values.iter().any(|v| v.is_finite() && *v > 0.0) {
                assert!(drawn.is_err(), "{values:?}");
                continue;
            }
            let drawn = drawn.unwrap();
            assert!(drawn.svg().unwrap().contains("&lt;a &amp; "), "names are escaped");
            assert!(!drawn.png().unwrap().is_empty());
        }
    }
}

#[test]
fn tokens_bars_and_pictures_below_each_other() {
    let tiny = pricket::tiny().unwrap();
    let scored = tiny.logprobs("The people of the United States\nand the Congress").unwrap();
    let strip = pricket::notebook::tokens(&scored).unwrap();
    let svg = strip.svg().unwrap();
    assert!(svg.contains(" United") && svg.contains("\\n") && svg.contains('%'), "{svg}");
    let bars = pricket::notebook::next_tokens(&tiny, "The United", 5).unwrap();
    let text = bars.svg().unwrap();
    assert_eq!(text.matches("%\n</text>").count(), 5);
    assert!(text.contains("&quot; States&quot;") || text.contains("\" States\""), "{text}");
    let both = Picture::of_pictures(&[strip.clone(), bars.clone()]).unwrap();
    let height = |picture: &Picture| pixels(&picture.png().unwrap()).1;
    assert_eq!(height(&both), height(&strip) + height(&bars));
    let svg = both.svg().unwrap();
    assert!(
        svg.matches("<svg").count() == 1 && svg.matches("</svg>").count() == 1 && svg.trim_end().ends_with("</svg>")
    );
    // Beside a narrow picture it is white, not black.
    let (width, height, pixels) = pixels(&both.png().unwrap());
    let last = 3 * (width * height - 1) as usize;
    assert_eq!(pixels[last..], [255, 255, 255]);
    assert!(Picture::of_tokens(Vec::new()).is_err() && Picture::of_bars(Vec::new()).is_err());
    assert!(Picture::of_pictures(&[]).is_err());
}
