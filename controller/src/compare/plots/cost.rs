//! Quantisation errors, plain and rotated: of one model by format, of all models in MXFP4.

use outliers_protocol::{NumberFormat, QuantizationErrors, Results};

use crate::compare::Comparison;
use crate::compare::comparison::Compared;
use crate::compare::measured::relative_error;
use crate::compare::plot::{Colour, Plot, Row, bars};
use crate::ui::report::diagnostics::{pooled, rotation_name, rotations};

const INTERVALS: &str = "Lines: 95 % intervals over sequences.";

/// One colour per rotation.
const COLOURS: [Colour; 4] = [Colour::First, Colour::Second, Colour::Third, Colour::Fourth];

/// Four formats with every rotation. `None` without the measurement.
pub(super) fn of_model(name: &str, title: &str, results: &Results) -> Option<Plot> {
    let errors = results.quantization_error.as_ref()?;
    let rotations = rotations([errors], COLOURS.len());
    let rows = NumberFormat::ALL.map(|format| row(short(format).to_owned(), format, &rotations, errors));
    let description = format!(
        "Relative squared error of norm outputs in each format, mean over sampled rows, plain and after block Hadamard rotations. {INTERVALS}"
    );
    bars(name, title, &description, ["error, % of x^2", "format"], &series(&rotations), &rows)
}

/// MXFP4 with every rotation, a row per model. `None` without the measurement.
pub(super) fn across(comparison: &Comparison) -> Option<Plot> {
    let models: Vec<(&Compared, &QuantizationErrors)> = comparison.models.iter().filter_map(measured).collect();
    let rotations = rotations(models.iter().map(|(_, errors)| *errors), COLOURS.len());
    let of_model = |(model, errors): &(&Compared, &QuantizationErrors)| {
        row(model.number.to_string(), NumberFormat::Mxfp4, &rotations, errors)
    };
    let rows: Vec<Row> = models.iter().map(of_model).collect();
    let name = |(model, _): &(&Compared, &QuantizationErrors)| {
        (model.number.to_string(), model.label.rsplit('/').next().unwrap_or_default().to_owned())
    };
    let names: Vec<(String, String)> = models.iter().map(name).collect();
    let description = format!(
        "Relative squared error of norm outputs in MXFP4, by model, mean over sampled rows, plain and after block Hadamard rotations: what \
         outliers cost in 4 bits. Models that did not measure it are not shown. {INTERVALS}"
    );
    let axes = ["error, % of x^2", "model"];
    let plot = bars("cost", "What outliers cost in 4 bits", &description, axes, &series(&rotations), &rows)?;
    Some(plot.keyed(&names))
}

fn measured(model: &Compared) -> Option<(&Compared, &QuantizationErrors)> {
    Some((model, model.results()?.quantization_error.as_ref()?))
}

fn series(rotations: &[usize]) -> Vec<(String, Colour)> {
    rotations.iter().map(rotation_name).zip(COLOURS).collect()
}

fn row(label: String, format: NumberFormat, rotations: &[usize], errors: &QuantizationErrors) -> Row {
    let bar = |rotation: &usize| pooled(errors, format, *rotation).map(relative_error);
    Row { label, bars: rotations.iter().map(bar).collect() }
}

/// Short name for an axis.
fn short(format: NumberFormat) -> &'static str {
    match format {
        NumberFormat::Int8PerToken => "INT8",
        NumberFormat::Fp8Per128 => "FP8",
        NumberFormat::Mxfp4 => "MXFP4",
        NumberFormat::Nvfp4 => "NVFP4",
    }
}

#[cfg(test)]
mod tests {
    use outliers_protocol::files;
    use serde_json::{Value, json};

    use super::*;
    use crate::compare::fixture::{change, copy};
    use crate::compare::folder::read_all;

    fn errors() -> Value {
        let error = |format: &str, rotation: u64, error: f64| {
            json!({"format": format, "rotation": rotation, "rows": 8, "error": error, "share_in_outlier_blocks": 0.5,
                   "outlier_blocks": 0.5, "per_sequence": [error / 2.0, 1.5 * error]})
        };
        let all = [error("int8_per_token", 0, 1e-4), error("mxfp4", 0, 0.02), error("mxfp4", 32, 0.01)];
        json!({"rule": "r", "norm_outputs": all, "sites": []})
    }

    #[test]
    fn each_format_and_model_has_a_bar_per_rotation() {
        let home = tempfile::tempdir().unwrap();
        let folders = ["a", "b"].map(|name| copy("dense", &home.path().join(name)));
        let compared = || Comparison::of(read_all(&[home.path().to_owned()], false).unwrap());
        assert_eq!(across(&compared()), None, "nothing was measured");
        change(&folders[0], files::RESULTS, |results| results["quantization_error"] = errors());
        let compared = compared();
        let count = |plot: &Plot, colour: &str| plot.svg.matches(&format!("fill=\"{colour}\"")).count();
        // One is in the legend.
        let all = across(&compared).unwrap();
        assert_eq!([count(&all, "#0B5CAD"), count(&all, "#B04A00")], [1 + 1, 1 + 1], "{}", all.svg);
        let one = compared.models.iter().find_map(|model| of_model("n", "t", model.results()?)).unwrap();
        assert_eq!([count(&one, "#0B5CAD"), count(&one, "#B04A00")], [2 + 1, 1 + 1], "{}", one.svg);
        assert!(one.svg.contains(">\nHadamard 32\n<") && one.svg.contains(">\nMXFP4\n<"), "{}", one.svg);
    }
}
