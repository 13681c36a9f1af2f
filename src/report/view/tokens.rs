//! The position of each virtual token among the vocabulary's, before and after.

use crate::prompt::vocabulary::{NearestPlace, Neighbour, Norms, PromptTokens};
use crate::report::text;
use serde::Serialize;

/// Most characters of a token that are shown.
const LONGEST: usize = 20;

/// Most tokens that are shown at first.
const SHOWN: usize = 32;

/// All virtual tokens.
#[derive(Serialize)]
pub(super) struct TokensView {
    vocabulary: Norms,
    mean_before: f64,
    mean_after: f64,
    mean_moved: f64,
    /// Tokens whose nearest neighbour in the vocabulary has changed.
    renamed: u64,
    total: u64,
    /// Smallest and largest norm of the vocabulary, as shares of the largest norm of all.
    range: [f64; 2],
    largest: f64,
    shown: Vec<TokenView>,
    folded: Vec<TokenView>,
}

/// One virtual token.
#[derive(Serialize)]
struct TokenView {
    index: u64,
    before: PlaceView,
    after: PlaceView,
    moved: f64,
    /// As a share of the longest distance.
    way: f64,
    renamed: bool,
}

#[derive(Serialize)]
struct PlaceView {
    norm: f64,
    /// As a share of the largest norm of all.
    at: f64,
    nearest: Vec<(String, f64)>,
}

impl TokensView {
    pub fn new(prompt: &PromptTokens) -> Self {
        let PromptTokens { vocabulary, tokens } = prompt;
        // A value that is not finite is drawn to the end, and others are not scaled by it.
        let finite = |value: &f64| value.is_finite();
        let norms = tokens.iter().flat_map(|t| [t.before.norm, t.after.norm]);
        let largest = norms.chain([vocabulary.max]).filter(finite).fold(0.0, f64::max);
        let longest = tokens.iter().map(|t| t.moved).filter(finite).fold(0.0, f64::max);
        let share = |part: f64, of: f64| match part.is_finite() {
            true if of > 0.0 => part / of,
            true => 0.0,
            false => 1.0,
        };
        let name = |place: &NearestPlace| place.nearest.first().map(|n| n.token.id);
        let place = |place: &NearestPlace| PlaceView {
            norm: place.norm,
            at: share(place.norm, largest),
            nearest: place.nearest.iter().map(neighbour).collect(),
        };
        let mut shown: Vec<TokenView> = tokens
            .iter()
            .enumerate()
            .map(|(i, t)| TokenView {
                index: i as u64 + 1,
                before: place(&t.before),
                after: place(&t.after),
                moved: t.moved,
                way: share(t.moved, longest),
                renamed: name(&t.before) != name(&t.after),
            })
            .collect();
        let mean = |of: fn(&TokenView) -> f64| shown.iter().map(of).sum::<f64>() / shown.len().max(1) as f64;
        let (mean_before, mean_after) = (mean(|t| t.before.norm), mean(|t| t.after.norm));
        let (mean_moved, total) = (mean(|t| t.moved), shown.len() as u64);
        let renamed = shown.iter().filter(|t| t.renamed).count() as u64;
        let folded = shown.split_off(SHOWN.min(shown.len()));
        Self {
            vocabulary: *vocabulary,
            mean_before,
            mean_after,
            mean_moved,
            renamed,
            total,
            range: [vocabulary.min, vocabulary.max].map(|norm| share(norm, largest)),
            largest,
            shown,
            folded,
        }
    }
}

/// A neighbour's text, or its id if there is no text, and its cosine.
fn neighbour(neighbour: &Neighbour) -> (String, f64) {
    let token = &neighbour.token;
    let text = token.visible();
    (text::cut(&text, LONGEST).unwrap_or(text), neighbour.cosine)
}
