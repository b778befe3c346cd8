//! Pictures and tables as plain text, and tables as HTML.

use super::{Content, Curves, Picture, Table, XAxis};

impl Picture {
    /// Returns the picture as plain text: aligned tables, and the first and last value of each curve.
    pub fn text(&self) -> String {
        match &self.content {
            Content::Table(table) => table.text(),
            Content::Curves(panels, _) => panels.iter().map(curves).collect::<Vec<_>>().join("\n"),
            Content::Heatmap(map) => {
                let row = |(name, values): (&String, &Vec<f64>)| {
                    std::iter::once(name.clone()).chain(values.iter().map(|value| format!("{value:.4}"))).collect()
                };
                let columns = std::iter::once(map.y.0.clone()).chain(map.x.1.iter().cloned()).collect();
                Table { title: map.title.clone(), columns, rows: map.y.1.iter().zip(&map.values).map(row).collect() }
                    .text()
            }
            Content::Tokens(texts) | Content::Bars(texts) => {
                let row = |(text, p): &(String, f64)| vec![text.clone(), format!("{p:.4}")];
                let rows = texts.iter().map(row).collect();
                Table { title: String::new(), columns: vec!["token".into(), "probability".into()], rows }.text()
            }
            Content::Stack(pictures) => pictures.iter().map(Picture::text).collect::<Vec<_>>().join("\n\n"),
        }
    }
}

/// Returns a panel as text: its title, and a line for each curve.
fn curves(panel: &Curves) -> String {
    let title = if panel.title.is_empty() { &panel.y } else { &panel.title };
    let mut lines = vec![title.clone()];
    for curve in &panel.curves {
        let mut points: Vec<_> = curve.points.iter().filter(|point| point.value.is_finite()).collect();
        points.sort_by(|a, b| a.step.total_cmp(&b.step));
        if let (Some(first), Some(last)) = (points.first(), points.last()) {
            let (label, count) = (&curve.label, points.len());
            let at = |x: f64| match &panel.x {
                XAxis::Steps => format!("step {x}"),
                XAxis::Linear(label) | XAxis::Log(label) => format!("{label} {x}"),
                XAxis::Names(names) => names.get(x as usize).cloned().unwrap_or_default(),
            };
            let range = format!("{:.4} at {} to {:.4} at {}", first.value, at(first.step), last.value, at(last.step));
            lines.push(format!(
                "  {label}: {}, {range}",
                if count == 1 { "1 point".to_owned() } else { format!("{count} points") }
            ));
        }
    }
    lines.join("\n")
}

impl Table {
    /// Returns the table as plain text in aligned columns.
    pub fn text(&self) -> String {
        let rows = || std::iter::once(&self.columns).chain(&self.rows);
        let width = |column: usize| rows().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max();
        let widths: Vec<usize> = (0..self.columns.len()).map(|column| width(column).unwrap_or(0)).collect();
        let line = |row: &Vec<String>| {
            let cells = row.iter().zip(&widths).map(|(cell, &width)| format!("{cell:width$}"));
            cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
        };
        let title = (!self.title.is_empty()).then(|| self.title.clone());
        title.into_iter().chain(rows().map(line)).collect::<Vec<_>>().join("\n")
    }

    /// Returns the table as HTML.
    pub fn html(&self) -> String {
        let escaped = |text: &str| text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
        let row = |cells: &[String], tag: &str| {
            let cell = |cell: &String| format!("<{tag}>{}</{tag}>", escaped(cell));
            let cells = cells.iter().map(cell).collect::<Vec<_>>().concat();
            format!("<tr>{cells}</tr>\n")
        };
        let caption = if self.title.is_empty() {
            String::new()
        } else {
            format!("<caption>{}</caption>\n", escaped(&self.title))
        };
        let body: String = self.rows.iter().map(|cells| row(cells, "td")).collect();
        format!("<table>\n{caption}{}{body}</table>", row(&self.columns, "th"))
    }
}
