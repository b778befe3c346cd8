//! Published scores of models (models/published.tsv).

use std::sync::LazyLock;

/// A published score.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct Published {
    /// Name of the model on the Hub.
    pub model: &'static str,
    /// Training step; `None` for the final weights of a model without published steps.
    pub step: Option<u64>,
    /// Name of the metric in a sweep: `TASK/METRIC`, without few-shot examples.
    pub metric: &'static str,
    /// Value of the metric.
    pub value: f64,
    /// Source of the score: `evals` and `evals-v0` for files of EleutherAI's pythia repository, `card` for the model
    /// card.
    pub source: &'static str,
}

/// Returns the published zero-shot scores of `model`, by training step. They cover Pythia over training and
/// RedPajama-INCITE. Empty for other models.
///
/// lm-evaluation-harness has changed since these scores were published. The prompts of these tasks are the same; some
/// of the data differ.
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
        panic!("published.tsv: {line:?} does not have five columns")
    };
    let value = value.parse().unwrap_or_else(|_| panic!("published.tsv: {value:?} is not a number"));
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
        // Small models get worse late in training. The published values show this too.
        let perplexity = |step| published("EleutherAI/pythia-70m").into_iter().find(|f| f.step == step).unwrap().value;
        assert!(perplexity(Some(143_000)) > perplexity(Some(63_000)));
    }
}
