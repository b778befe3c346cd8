//! Compiles and runs the code cells of the notebooks, and checks that the compiled code is that of the cells.
//! `tools/notebooks` runs them with the Rust kernel.

use crate::common::root;

#[cfg(feature = "train")]
#[path = "notebooks/finetune.rs"]
mod finetune;
#[path = "notebooks/hello_pythia.rs"]
mod hello_pythia;

#[test]
fn the_first_notebook_runs() {
    hello_pythia::run().unwrap();
}

#[cfg(feature = "train")]
#[test]
fn the_notebook_of_fine_tuning_runs() {
    finetune::run().unwrap();
}

#[test]
fn compiled_cells_match_the_notebooks() {
    let path = regex::Regex::new(r#""\.\./\.\.(/[^"]*)""#).unwrap();
    for (notebook, compiled, pictures, expected) in [
        ("01-hello-pythia", include_str!("notebooks/hello_pythia.rs"), 3, "nats a token"),
        ("02-finetune", include_str!("notebooks/finetune.rs"), 1, "April precedes May."),
    ] {
        let cells = std::fs::read_to_string(root().join(format!("examples/notebooks/{notebook}.ipynb"))).unwrap();
        let cells: serde_json::Value = serde_json::from_str(&cells).unwrap();
        let squeezed = |text: &str| {
            text.split_whitespace().collect::<String>().replace(",]", "]").replace(",)", ")").replace(",}", "}")
        };
        let compiled = squeezed(compiled);
        let mut seen = 0;
        for cell in cells["cells"].as_array().unwrap().iter().filter(|cell| cell["cell_type"] == "code") {
            let source: String =
                cell["source"].as_array().unwrap().iter().map(|line| line.as_str().unwrap()).collect::<String>();
            let code: Vec<&str> = source.lines().filter(|line| !line.starts_with(':')).collect();
            let code = squeezed(&code.join("\n"));
            let code = path.replace_all(&code, "concat!(env!(\"CARGO_MANIFEST_DIR\"),\"$1\")");
            assert!(
                compiled.contains(code.trim_end_matches(',')),
                "tools/notebooks --extract writes tests/notebooks anew; not there:\n{source}"
            );
            // Every cell was executed, in order and without an error.
            seen += 1;
            assert_eq!(cell["execution_count"], seen, "{source}");
            assert!(cell["outputs"].as_array().unwrap().iter().all(|output| output["output_type"] != "error"));
        }
        assert!(seen >= 7, "{seen}");
        let text = cells.to_string();
        assert_eq!(text.matches("image/svg+xml").count(), pictures, "{notebook}");
        assert!(text.contains(expected), "{notebook}");
    }
}
