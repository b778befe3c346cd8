use std::sync::LazyLock;

/// A figure that others have published.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct Published {
    /// The model, as the Hub calls it.
    pub model: &'static str,
    /// Its training step; `None` for the final weights of a model without steps.
    pub step: Option<u64>,
    /// As a sweep calls it: `TASK/METRIC`, without examples.
    pub metric: &'static str,
    /// The figure.
    pub value: f64,
    /// `evals` and `evals-v0` for the files of EleutherAI's pythia repository, `card` for the model's card.
    pub source: &'static str,
}

/// What others have published of `model`: zero-shot figures of Pythia over training and of RedPajama-INCITE, in the order of
/// steps. Nothing for a model that nobody has.
///
/// The harness has changed since: its prompts for these tasks have not, its data in part.
///
/// ```
/// let figures = pricket::suites::published("EleutherAI/pythia-1b");
/// let last = figures.iter().rfind(|figure| figure.metric == "lambada_openai/acc").unwrap();
/// assert_eq!((last.step, last.value), (Some(143_000), 0.5620));
/// ```
pub fn published(model: &str) -> Vec<Published> {
    static ALL: LazyLock<Vec<Published>> = LazyLock::new(|| {
        include_str!("../../../../models/published.tsv")
            .lines()
            .filter(|line| !line.starts_with('#'))
            .map(row)
            .collect()
    });
    ALL.iter().filter(|figure| figure.model == model).copied().collect()
}

fn row(line: &'static str) -> Published {
    let parts: Vec<&str> = line.split('\t').collect();
    let [model, step, metric, value, source] = parts[..] else {
        panic!("published.tsv: {line:?} has not five columns")
    };
    let value = value.parse().unwrap_or_else(|_| panic!("published.tsv: {value:?} is no number"));
    Published { model, step: step.parse().ok(), metric, value, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_is_read_and_is_a_model_of_ours() {
        let rows =
            include_str!("../../../../models/published.tsv").lines().filter(|line| !line.starts_with('#')).map(row);
        let rows: Vec<Published> = rows.collect();
        assert!(rows.len() > 200);
        for figure in &rows {
            let card =
                crate::suites::cards::card(figure.model).unwrap_or_else(|| panic!("{} has no card", figure.model));
            assert_eq!(card.id, figure.model);
            let accuracy = figure.metric.contains("acc");
            assert!(figure.value >= 0.0 && (figure.value <= 1.0) == accuracy, "{figure:?}");
        }
        // Small models get worse late in training; that is what was published, and no slip.
        let perplexity = |step| published("EleutherAI/pythia-70m").into_iter().find(|f| f.step == step).unwrap().value;
        assert!(perplexity(Some(143_000)) > perplexity(Some(63_000)));
    }
}
