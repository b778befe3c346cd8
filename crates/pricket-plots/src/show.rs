//! Display in notebooks: the Jupyter kernel evcxr calls a value's `evcxr_display`.

use crate::{Picture, Table};

impl Picture {
    /// Shows the picture as the result of a notebook cell.
    pub fn evcxr_display(&self) {
        match self.svg() {
            Ok(svg) => send(&[("image/svg+xml", svg), ("text/plain", self.text())]),
            Err(e) => println!("{e}"),
        }
    }
}

impl Table {
    /// Shows the table as the result of a notebook cell.
    pub fn evcxr_display(&self) {
        send(&[("text/html", self.html()), ("text/plain", self.text())]);
    }
}

/// Sends a value in several MIME types. The notebook shows the richest type that it supports.
fn send(forms: &[(&str, String)]) {
    for (kind, content) in forms {
        println!("EVCXR_BEGIN_CONTENT {kind}\n{content}\nEVCXR_END_CONTENT");
    }
}
