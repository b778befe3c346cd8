//! Recipes of fine-tuning (models/recipes.toml).

use std::sync::OnceLock;

use pricket_train::Recipe;
use serde::Deserialize;

use crate::loading::small_files::read_small;
use crate::{Error, Result};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    recipe: Vec<Recipe>,
}

/// Returns all named recipes.
///
/// ```
/// assert!(pricket::suites::recipes().iter().any(|recipe| recipe.name == "dolly"));
/// ```
pub fn recipes() -> &'static [Recipe] {
    static RECIPES: OnceLock<Vec<Recipe>> = OnceLock::new();
    RECIPES.get_or_init(|| {
        // The file is compiled in, and a test checks it.
        let text = include_str!("../../../../models/recipes.toml");
        toml::from_str::<File>(text).unwrap_or_else(|e| panic!("models/recipes.toml: {e}")).recipe
    })
}

/// Returns the recipe of a name, or the recipe in a TOML file.
///
/// # Errors
/// Returns [`Error::Unknown`], which lists the names, if `name` is neither a recipe nor a file, and
/// [`Error::Malformed`] if the file is invalid.
pub fn recipe(name: &str) -> Result<Recipe> {
    if let Some(recipe) = recipes().iter().find(|recipe| recipe.name == name) {
        return Ok(recipe.clone());
    }
    let path = std::path::Path::new(name);
    if !path.is_file() {
        let known: Vec<&str> = recipes().iter().map(|recipe| recipe.name.as_str()).collect();
        return Err(Error::Unknown {
            what: "recipe or file",
            name: name.into(),
            known: format!("expected one of {} or a TOML file", known.join(", ")),
        });
    }
    let wrong = |what: String| Error::Malformed { origin: name.into(), what };
    let text = String::from_utf8(read_small(path)?).map_err(|e| wrong(format!("not UTF-8 text: {e}")))?;
    Recipe::from_toml(&text).map_err(|e| wrong(e.to_string()))
}
