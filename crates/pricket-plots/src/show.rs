//! What the notebook kernel evcxr shows: it calls a value's `evcxr_display`.

use crate::{Picture, Table};

impl Picture {
    /// Shows it as the value of a notebook's cell.
    pub fn evcxr_display(&self) {
        match self.svg() {
            Ok(svg) => send(&[("image/svg+xml", svg), ("text/plain", self.text())]),
            Err(e) => println!("{e}"),
        }
    }
}

impl Table {
    /// Shows it as the value of a notebook's cell.
    pub fn evcxr_display(&self) {
        send(&[("text/html", self.html()), ("text/plain", self.text())]);
    }
}

/// Sends a value in several forms, of which the notebook shows the best that it can.
fn send(forms: &[(&str, String)]) {
    for (kind, content) in forms {
        println!("EVCXR_BEGIN_CONTENT {kind}\n{content}\nEVCXR_END_CONTENT");
    }
}
