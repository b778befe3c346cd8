//! One type for every kind of layer, for code that visits all layers of a model.

use crate::{Embedding, Linear, Norm};

/// A mutable reference to a layer in a copy of a model. [`CausalLm::map_layers`](crate::CausalLm::map_layers) passes it
/// to a function that may replace the layer.
#[derive(Debug)]
#[non_exhaustive]
pub enum Layer<'a> {
    /// A linear layer, or the head of the model.
    Linear(&'a mut Linear),
    /// A norm.
    Norm(&'a mut Norm),
    /// The table of token vectors or of learned positions.
    Embedding(&'a mut Embedding),
}

impl Layer<'_> {
    /// Returns the canonical name without `.weight`, which is the name of the Python module.
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
