//! Heat map of the residual stream of one sequence: its largest dimensions and some others, by
//! token.

use outliers_protocol::{MAPPED_DIMS, MAPPED_POSITIONS, MappedDim, Results};

use super::heatmap::ColourSteps;
use crate::compare::plot::{Plot, heatmap};

/// Dimension x token after the layer with the largest sinks. `None` without the measurement.
pub(super) fn map(name: &str, title: &str, results: &Results) -> Option<Plot> {
    let map = results.residual_sinks.as_ref()?.map.as_ref()?;
    let shown = || map.dims.iter().take(2 * MAPPED_DIMS);
    let largest = shown().flat_map(|dim| &dim.values).fold(2f64, |largest, value| largest.max(f64::from(value.abs())));
    let scale = ColourSteps { threshold: 1.0, largest };
    let row = |dim: &MappedDim| {
        let star = if dim.is_sink { "" } else { "*" };
        let values = dim.values.iter().take(MAPPED_POSITIONS);
        (format!("{}{star}", dim.dim), values.map(|value| scale.step(f64::from(value.abs()))).collect())
    };
    let rows: Vec<(String, Vec<u8>)> = shown().map(row).collect();
    let description = format!(
        "Magnitudes in the residual stream of the first sequence after layer {}, over the root mean square of their token: the dimensions with \
         the largest shares of x^2, then some that are evenly spread. A residual sink is large at most tokens, a massive activation at few. Those \
         with a star are no sinks.",
        map.layer
    );
    heatmap(name, title, &description, ["position", "dimension"], &scale.words(), &rows)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::compare::folder::Run;

    #[test]
    fn residual_plot_shows_sinks_and_others_per_token() {
        let mut results = Run::fixture("dense").results;
        assert_eq!(map("n", "t", &results), None, "nothing was measured");
        let mapped = |dim: usize, is_sink: bool, value: f32| {
            let values = vec![value; 40];
            json!({"dim": dim, "is_sink": is_sink, "values": values})
        };
        results.residual_sinks = serde_json::from_value(json!({"rule": "r", "layers": [], "map": {
            "layer": 3, "dims": [mapped(17, true, -40.0), mapped(4, false, 0.5)],
        }}))
        .unwrap();
        let plot = map("n", "t", &results).unwrap();
        assert!(plot.description.contains("after layer 3"), "{}", plot.description);
        assert!(plot.svg.contains(">\n17\n<") && plot.svg.contains(">\n4*\n<"), "{}", plot.svg);
        // One is in the legend.
        let cells = |colour: &str| plot.svg.matches(&format!("fill=\"{colour}\"")).count();
        assert_eq!((cells("#450D54"), cells("#EFF2F5")), (40 + 1, 40 + 1), "{}", plot.svg);
    }
}
