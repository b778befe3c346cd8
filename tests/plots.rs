//! Pictures: their content, not their appearance.

use std::fmt::Write;
use std::path::Path;

use pricket::plots::{Curve, Curves, Heatmap, Layout, Legend, Picture, Point, Table, XAxis};
use pricket::sweep;

/// Rows of a sweep over `models`, at steps 0, 512 and 143000.
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

/// Width, height and pixels of a PNG, three bytes a pixel.
fn pixels(png: &[u8]) -> (u32, u32, Vec<u8>) {
    let mut reader = png::Decoder::new(std::io::Cursor::new(png)).read_info().unwrap();
    let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
    let info = reader.next_frame(&mut pixels).unwrap();
    (info.width, info.height, pixels)
}

#[test]
fn curves_show_points_bands_and_published_values() {
    let rows = rows(&results(&["EleutherAI/pythia-70m", "EleutherAI/pythia-160m"])).unwrap();
    let count = |svg: &str, what: &str| svg.matches(what).count();
    let picture = sweep::curves(&rows, &[], &sweep::CurveOptions::default()).unwrap();
    let svg = picture.svg().unwrap();
    for text in ["pythia-70m", "pythia-160m", "published", "training step", "piqa", "\n0\n", "100k"] {
        assert!(svg.contains(text), "{text}");
    }
    // Each measured curve has a translucent band.
    assert_eq!(count(&svg, "opacity=\"0.16\""), 2);
    let alone = sweep::curves(&rows, &[], &sweep::CurveOptions { published: false, ..sweep::CurveOptions::default() })
        .unwrap()
        .svg()
        .unwrap();
    assert!(!alone.contains("published") && count(&alone, "<polyline") < count(&svg, "<polyline"));
    // The PNG contains the color of every curve and has twice the size of the SVG.
    let (width, height, pixels) = pixels(&picture.png().unwrap());
    assert!(svg.contains(&format!("width=\"{}\" height=\"{}\"", width / 2, height / 2)));
    for color in [[0, 114, 178], [213, 94, 0]] {
        assert!(pixels.as_chunks::<3>().0.iter().filter(|&&pixel| pixel == color).count() > 500, "{color:?}");
    }
    let picture = sweep::table(&rows, &["piqa/acc".into()]).unwrap().svg().unwrap();
    assert!(picture.contains("0.6500 ± 0.0100") && picture.contains("step143000"), "{picture}");
}

#[test]
fn seeds_become_their_mean() {
    let names = ["EleutherAI/pythia-14m-seed1", "EleutherAI/pythia-14m-seed2", "EleutherAI/pythia-14m-seed3"];
    let rows = rows(&results(&names)).unwrap();
    let apart = sweep::curves(&rows, &[], &sweep::CurveOptions { published: false, ..sweep::CurveOptions::default() })
        .unwrap()
        .svg()
        .unwrap();
    let together = sweep::curves(
        &rows,
        &[],
        &sweep::CurveOptions { published: false, mean_of_seeds: true, ..sweep::CurveOptions::default() },
    )
    .unwrap()
    .svg()
    .unwrap();
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
fn an_empty_plot_is_an_error() {
    let error = |result: pricket::Result<Picture>| result.unwrap_err().to_string();
    let rows = rows(&results(&["a/b"])).unwrap();
    let missing = error(sweep::curves(&rows, &["sciq/acc".into()], &sweep::CurveOptions::default()));
    assert!(missing.contains("sciq/acc") && missing.contains("piqa/acc"), "{missing}");
    assert!(error(sweep::curves(&[], &[], &sweep::CurveOptions::default())).contains("no values"));
    // A model without steps has a table and no curve.
    let text = "{\"model\":\"mosaicml/mpt-7b\",\"revision\":\"main\",\"step\":null,\"metric\":\"piqa/acc\",\"value\":0.8,\"part\":[1,1]}\n";
    let main = self::rows(text).unwrap();
    assert!(error(sweep::curves(&main, &[], &sweep::CurveOptions::default())).contains("training step"));
    assert!(sweep::table(&main, &[]).unwrap().svg().unwrap().contains("0.8000"));
    // A row over a few documents is not a point of the curve over all documents.
    let mut mixed = rows.clone();
    mixed[1].settings = serde_json::json!({"limit": 10});
    assert!(error(sweep::curves(&mixed, &[], &sweep::CurveOptions::default())).contains("different settings"));
    // A value that is not a number is left out if other values exist.
    let mut some = rows.clone();
    some.push(sweep::Row { metric: "b/acc".into(), value: f64::NAN, ..rows[0].clone() });
    assert!(sweep::curves(&some, &[], &sweep::CurveOptions::default()).is_ok());
    assert!(error(sweep::curves(&some, &["b/acc".into()], &sweep::CurveOptions::default())).contains("acc"));
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
    // One point, equal values, values over many powers of ten, and infinite beside finite values.
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
fn tokens_bars_and_stacked_pictures_are_drawn() {
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
    // The area beside a narrow picture is white.
    let (width, height, pixels) = pixels(&both.png().unwrap());
    let last = 3 * (width * height - 1) as usize;
    assert_eq!(pixels[last..], [255, 255, 255]);
    assert!(Picture::of_tokens(Vec::new()).is_err() && Picture::of_bars(Vec::new()).is_err());
    assert!(Picture::of_pictures(&[]).is_err());
}

fn map() -> Heatmap {
    Heatmap {
        title: "attribution".into(),
        x: ("head".into(), (0..6).map(|i| i.to_string()).collect()),
        y: ("layer".into(), (0..4).map(|i| i.to_string()).collect()),
        values: (0..4).map(|i| (0..6).map(|j| f64::from(i * j) / 15.0 - 0.2).collect()).collect(),
        unit: "logit difference".into(),
    }
}

#[test]
fn a_map_has_a_color_for_each_value_and_a_scale() {
    let svg = Picture::of_heatmap(map()).unwrap().svg().unwrap();
    assert!(svg.contains("attribution") && svg.contains("layer") && svg.contains("logit difference"), "{svg}");
    // Negative values are orange, zero is white, the largest value is blue.
    let largest = "#0072B2";
    assert!(svg.to_uppercase().contains(largest));
    let text = Picture::of_heatmap(map()).unwrap().text();
    assert!(text.contains("0.8000") && text.contains("-0.2000"), "{text}");
    let short = Heatmap { values: vec![vec![1.0; 6]; 3], ..map() };
    assert!(Picture::of_heatmap(short).is_err());
    let nothing = Heatmap { values: vec![vec![f64::NAN; 6]; 4], ..map() };
    assert!(Picture::of_heatmap(nothing).unwrap_err().to_string().contains("logit difference"));
}

#[test]
fn axes_can_show_texts_and_other_quantities() {
    let curve = |x: Vec<f64>| Curve::new("a", x.into_iter().map(|x| Point::new(x, 1.0 + x)).collect());
    let panel = |x: XAxis, at: Vec<f64>| Curves { x, y: "loss".into(), curves: vec![curve(at)], ..Curves::default() };
    let names = XAxis::Names(["f32", "q8_0", "q4_0"].map(str::to_owned).to_vec());
    let svg = Picture::of_curves(vec![panel(names.clone(), vec![0.0, 1.0, 2.0])]).unwrap().svg().unwrap();
    assert!(svg.contains("q8_0") && !svg.contains("training step"), "{svg}");
    assert!(Picture::of_curves(vec![panel(names, vec![7.0])]).is_err());
    let svg = Picture::of_curves(vec![panel(XAxis::Linear("layer".into()), vec![-1.0, 5.0])]).unwrap().svg().unwrap();
    assert!(svg.contains("layer"), "{svg}");
    assert!(Picture::of_curves(vec![panel(XAxis::Log("tokens".into()), vec![0.0])]).is_err());
}

#[test]
fn a_layout_has_a_title_a_size_and_a_place_for_the_legend() {
    let panel = || {
        vec![Curves {
            y: "loss".into(),
            curves: ["left", "right"]
                .map(|name| Curve::new(name, vec![Point::new(1.0, 2.0), Point::new(9.0, 1.0)]))
                .to_vec(),
            ..Curves::default()
        }]
    };
    let size = |layout: &Layout| {
        let (width, height, _) = pixels(&Picture::of_curves_in(panel(), layout).unwrap().png().unwrap());
        (width, height)
    };
    let layout = |legend| Layout { title: "Two runs".into(), panel: (300, 200), legend };
    let right = Picture::of_curves_in(panel(), &layout(Legend::Right)).unwrap().svg().unwrap();
    assert!(right.contains("Two runs") && right.contains("left"));
    let none = Picture::of_curves_in(panel(), &layout(Legend::None)).unwrap().svg().unwrap();
    assert!(!none.contains("left"));
    let (wide, below, none) = (size(&layout(Legend::Right)), size(&layout(Legend::Below)), size(&layout(Legend::None)));
    assert!(wide.0 > none.0 && below.0 == none.0 && below.1 > none.1 && none.0 == 600, "{wide:?} {below:?} {none:?}");
    assert!(Picture::of_curves_in(panel(), &Layout { panel: (20, 20), ..Layout::default() }).is_err());
}

/// Slices of one metric share a panel on request.
#[test]
fn slices_can_share_a_panel() {
    let mut text = results(&["a/b"]).replace("piqa/acc", "books/loss");
    text += &results(&["a/b"]).replace("piqa/acc", "code/loss");
    let rows = rows(&text).unwrap();
    let apart = sweep::curves(&rows, &[], &sweep::CurveOptions::default()).unwrap().svg().unwrap();
    let options = sweep::CurveOptions { together: true, ..sweep::CurveOptions::default() };
    let together = sweep::curves(&rows, &[], &options).unwrap().svg().unwrap();
    let panels = |svg: &str| svg.matches("loss (nats per token)").count();
    assert_eq!((panels(&apart), panels(&together)), (2, 1));
    assert!(together.contains("books") && together.contains("code"));
}

/// A PNG stores its resolution.
#[test]
fn a_png_has_192_pixels_to_the_inch() {
    let png = Picture::of_heatmap(map()).unwrap().png().unwrap();
    let reader = png::Decoder::new(std::io::Cursor::new(&png)).read_info().unwrap();
    assert_eq!(reader.info().pixel_dims.map(|dims| dims.xppu), Some(7560));
}

#[cfg(feature = "pdf")]
#[test]
fn a_pdf_has_a_page_and_its_text() {
    let pdf = Picture::of_heatmap(map()).unwrap().pdf().unwrap();
    assert!(pdf.starts_with(b"%PDF-") && pdf.windows(8).any(|part| part == b"FontFile"));
}
