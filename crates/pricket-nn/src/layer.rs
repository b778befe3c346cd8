//! A layer of a model, whichever it is.

use crate::{Embedding, Linear, Norm};

/// A layer in a copy of a model, which may be replaced there: see [`CausalLm::map_layers`](crate::CausalLm::map_layers).
#[derive(Debug)]
#[non_exhaustive]
pub enum Layer<'a> {
    /// A matrix product; the head of the model too.
    Linear(&'a mut Linear),
    /// A norm.
    Norm(&'a mut Norm),
    /// The table of token vectors, or of learned positions.
    Embedding(&'a mut Embedding),
}

impl Layer<'_> {
    /// Its canonical name, without `.weight`: that of the Python module.
    pub fn name(&self) -> &str {
        match self {
            Layer::Linear(linear) => linear.name(),
            Layer::Norm(norm) => norm.name(),
            Layer::Embedding(embedding) => embedding.name(),
        }
    }
}

impl<'a> From<&'a mut Linear> for Layer<'a> {
    fn from(linear: &'a mut Linear) -> Self {
        Layer::Linear(linear)
    }
}

impl<'a> From<&'a mut Norm> for Layer<'a> {
    fn from(norm: &'a mut Norm) -> Self {
        Layer::Norm(norm)
    }
}

impl<'a> From<&'a mut Embedding> for Layer<'a> {
    fn from(embedding: &'a mut Embedding) -> Self {
        Layer::Embedding(embedding)
    }
}
