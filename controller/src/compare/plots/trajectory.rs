//! Features of a model over its training, by the tokens seen.

use std::collections::BTreeMap;

use outliers_protocol::{Axis as Spread, ModelSource, Reading};

use super::{NUMBERS, is_shown, mark};
use crate::compare::Comparison;
use crate::compare::comparison::Compared;
use crate::compare::plot::{Axis, AxisKind, Colour, Group, Mark, Plot, Point, points};

/// Styles of the curves. Their number is the maximum number of curves.
const MARKS: [Mark; 8] = [
    mark(Colour::First, true, true),
    mark(Colour::Second, false, true),
    mark(Colour::Third, true, false),
    mark(Colour::Fourth, false, false),
    mark(Colour::First, false, true),
    mark(Colour::Second, true, true),
    mark(Colour::Third, false, false),
    mark(Colour::Fourth, true, false),
];

/// One curve per model with results at two or more numbers of tokens. `None` without such a model.
pub(super) fn trajectories(comparison: &Comparison) -> Option<Plot> {
    let mut curves: BTreeMap<String, Vec<Point>> = BTreeMap::new();
    for model in &comparison.models {
        let Some((name, tokens)) = seen(model) else { continue };
        let Some(figure) = comparison.own(model, Reading::Unique, Spread::Layers) else { continue };
        let (y, interval) = (figure.count.value, figure.count.interval);
        curves.entry(name).or_default().push(Point { x: tokens, y, interval, key: model.number.to_string() });
    }
    for points in curves.values_mut() {
        points.sort_by(|a, b| a.x.total_cmp(&b.x));
    }
    curves.retain(|_, points| points.windows(2).any(|pair| pair[0].x < pair[1].x));
    let groups: Vec<Group> = curves
        .into_iter()
        .zip(MARKS)
        .map(|((name, points), mark)| Group { name, mark, joined: true, points })
        .collect();
    let names: Vec<(String, String)> = comparison
        .models
        .iter()
        .filter(|model| is_shown(&model.number.to_string(), &groups))
        .map(|model| (model.number.to_string(), model.label.rsplit('/').next().unwrap_or_default().to_owned()))
        .collect();
    let plot = points(
        "trajectories",
        "Outlier features over training",
        &format!(
            "Number of systematic outlier features, unique and by layers, over the tokens that a model had seen, where \
             its revision or its name says how many (tokens5033B, -10T). {NUMBERS}"
        ),
        [Axis { label: "tokens seen", kind: AxisKind::Log }, Axis { label: "features", kind: AxisKind::Linear }],
        &groups,
    )?;
    Some(plot.keyed(&names))
}

/// The model of a checkpoint, and its number of training tokens.
fn seen(model: &Compared) -> Option<(String, f64)> {
    let last = |id: &str| id.rsplit('/').next().unwrap_or_default().to_owned();
    if let Some(ModelSource::Hub { id, revision }) = model.provenance.as_ref().map(|metadata| &metadata.job.model)
        && let Some((_, tokens)) = revision.rsplit_once("tokens")
    {
        return Some((last(id), amount(tokens)?));
    }
    let name = last(&model.model);
    let (stem, tokens) = name.rsplit_once('-')?;
    // `-7B` at the end of a name is a number of parameters.
    let tokens = tokens.ends_with('T').then_some(tokens)?;
    Some((stem.to_owned(), amount(tokens)?))
}

/// Parses `5033B` or `10T`.
fn amount(text: &str) -> Option<f64> {
    let (number, unit) = match (text.strip_suffix('B'), text.strip_suffix('T')) {
        (Some(number), _) => (number, 1e9),
        (_, Some(number)) => (number, 1e12),
        _ => return None,
    };
    let plain = !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.');
    number.parse::<f64>().ok().filter(|number| plain && *number > 0.0).map(|number| number * unit)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use outliers_protocol::files;
    use serde_json::json;

    use super::*;
    use crate::compare::fixture::{change, copy, rename};
    use crate::compare::folder::read_all;

    fn compared(home: &Path) -> Comparison {
        Comparison::of(read_all(&[home.to_owned()], false).unwrap())
    }

    #[test]
    fn checkpoints_of_one_model_make_a_curve() {
        let home = tempfile::tempdir().unwrap();
        for (folder, revision) in [("a", "step1-tokens100B"), ("b", "step9-tokens2T"), ("c", "main")] {
            let folder = copy("mixture", &home.path().join(folder));
            rename(&folder, "allenai/OLMoE-1B-7B-0924");
            let model = json!({"hub": {"id": "allenai/OLMoE-1B-7B-0924", "revision": revision}});
            change(&folder, files::METADATA, |metadata| metadata["job"]["model"] = model);
        }
        for (folder, name) in [("d", "inclusionAI/Ling-mini-base-2.0-5T"), ("e", "inclusionAI/Ling-mini-base-2.0-10T")]
        {
            rename(&copy("dense", &home.path().join(folder)), name);
        }
        rename(&copy("dense", &home.path().join("f")), "Qwen/Qwen3-8B");
        let compared = compared(home.path());
        let of = |number: usize| seen(&compared.models[number - 1]);
        assert_eq!(of(1), Some(("OLMoE-1B-7B-0924".to_owned(), 1e11)));
        assert_eq!(of(2), Some(("OLMoE-1B-7B-0924".to_owned(), 2e12)));
        assert_eq!(of(3), None, "the end of training says no number");
        assert_eq!(of(5), Some(("Ling-mini-base-2.0".to_owned(), 1e13)));
        assert_eq!(of(6), None, "parameters are no tokens");
        let plot = trajectories(&compared).unwrap();
        assert!(plot.svg.contains("tokens seen") && plot.svg.contains("OLMoE-1B-7B-0924"), "{}", plot.svg);
    }

    #[test]
    fn single_checkpoint_makes_no_curve() {
        let home = tempfile::tempdir().unwrap();
        rename(&copy("dense", &home.path().join("d")), "inclusionAI/Ling-mini-base-2.0-5T");
        assert_eq!(trajectories(&compared(home.path())), None);
        assert_eq!(["7B", "0.5T", "B", "xB", "7"].map(amount), [Some(7e9), Some(5e11), None, None, None]);
    }
}
