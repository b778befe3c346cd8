//! Compiles and runs the code cells of the notebooks, and checks that the compiled code is that of the cells.
//! `tools/notebooks` runs them with the Rust kernel.

use crate::common::root;

#[path = "notebooks/hello_pythia.rs"]
mod hello_pythia;

#[test]
fn the_first_notebook_runs() {
    hello_pythia::run().unwrap();
}

#[test]
fn compiled_cells_match_the_notebooks() {
    let cells = std::fs::read_to_string(root().join("examples/notebooks/01-hello-pythia.ipynb")).unwrap();
    let cells: serde_json::Value = serde_json::from_str(&cells).unwrap();
    let squeezed = |text: &str| text.split_whitespace().collect::<String>().replace(",]", "]").replace(",)", ")");
    let compiled = squeezed(include_str!("notebooks/hello_pythia.rs"));
    let mut seen = 0;
    for cell in cells["cells"].as_array().unwrap().iter().filter(|cell| cell["cell_type"] == "code") {
        let source: String =
            cell["source"].as_array().unwrap().iter().map(|line| line.as_str().unwrap()).collect::<String>();
        let code: Vec<&str> = source.lines().filter(|line| !line.starts_with(':')).collect();
        let code = squeezed(&code.join("\n"))
            .replace("\"../../models/tiny\"", "concat!(env!(\"CARGO_MANIFEST_DIR\"),\"/models/tiny\")");
        assert!(
            compiled.contains(&code),
            "tools/notebooks --extract writes tests/notebooks anew; not there:\n{source}"
        );
        // Every cell was executed, in order and without an error.
        seen += 1;
        assert_eq!(cell["execution_count"], seen, "{source}");
        assert!(cell["outputs"].as_array().unwrap().iter().all(|output| output["output_type"] != "error"));
    }
    assert!(seen >= 7, "{seen}");
    let text = cells.to_string();
    assert!(text.matches("image/svg+xml").count() == 3 && text.contains("nats a token"));
}
