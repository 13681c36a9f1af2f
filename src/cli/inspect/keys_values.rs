//! Keys and values of an adapter: their norms, layer by layer.

use crate::cli::text;
use candle_core::Tensor;
use gneiss::prompt::peft::AdapterConfig;
use gneiss::prompt::vocabulary::Norms;
use serde::Serialize;

/// Keys and values of one layer.
#[derive(Serialize)]
pub struct LayerReport {
    /// The layer's index in the model, from 0.
    layer: usize,
    /// L2 norms of the keys, one for each virtual token and head.
    keys: Norms,
    /// The same of the values.
    values: Norms,
}

/// The layers of keys and values [P, L 2 K D]; none if the adapter does not say how many there are.
pub fn layers(values: &Tensor, config: &AdapterConfig) -> gneiss::Result<Vec<LayerReport>> {
    let (rows, width) = values.dims2()?;
    let (Some(layers), heads) = (config.num_layers, config.num_attention_heads.unwrap_or(1)) else {
        return Ok(Vec::new());
    };
    let head_dim = width / (2 * layers * heads);
    let by_layer = values.reshape((rows, layers, 2, heads, head_dim))?;
    let norms = |layer: usize, kind: usize| -> gneiss::Result<Norms> {
        let heads_of_layer = by_layer.narrow(1, layer, 1)?.narrow(2, kind, 1)?;
        Norms::of(&heads_of_layer.contiguous()?.reshape((rows * heads, head_dim))?)
    };
    let report = |i: usize| {
        let layer = config.attention_layers.as_ref().and_then(|layers| layers.get(i)).copied().unwrap_or(i);
        Ok(LayerReport { layer, keys: norms(i, 0)?, values: norms(i, 1)? })
    };
    (0..layers).map(report).collect()
}

/// Prints a row for each layer.
pub fn print(layers: &[LayerReport]) {
    let header = ["layer", "keys", "min", "max", "values", "min", "max"];
    let mut rows = vec![header.map(str::to_owned).to_vec()];
    for LayerReport { layer, keys, values } in layers {
        let norms = [keys.mean, keys.min, keys.max, values.mean, values.min, values.max];
        let mut row = vec![layer.to_string()];
        row.extend(norms.map(|norm| format!("{norm:.3}")));
        rows.push(row);
    }
    println!("{}", text::table(&rows));
}
