//! Tables of what a run measured because it was asked to (`--measure`).

use outliers_protocol::{
    AttentionSinks, NumberFormat, PooledQuantization, QuantizationError, QuantizationErrors, Record, ResidualSinks,
    Results, SpikeLife,
};

use super::comparison::{Compared, Comparison};
use super::sheet::{Column, NONE, Sheet, estimate, numbers, optional, words};
use super::tally::{Estimate, interval, mean};
use crate::report::beyond::name;

/// The tables of one model, the cost first; empty unless something was asked for.
pub fn sheets(results: &Results) -> Vec<Sheet> {
    let all = [
        results.quantization_error.as_ref().map(quantization),
        results.residual_sinks.as_ref().map(residual_sinks),
        results.spike_life.as_ref().map(spike_life),
        results.attention_sinks.as_ref().map(attention_sinks),
    ];
    all.into_iter().flatten().collect()
}

/// A line per model that measured something; `None` if none did.
pub fn across(comparison: &Comparison) -> Option<Sheet> {
    let row = |model: &Compared| {
        let results = model.results()?;
        let errors = results.quantization_error.as_ref();
        let plain = |format| errors.and_then(|errors| errors.norm_outputs.iter().find(|pooled| is(pooled, format, 0)));
        let best = errors.and_then(|errors| {
            let rotated = errors.norm_outputs.iter().filter(|pooled| pooled.all.format == NumberFormat::Mxfp4);
            rotated.min_by(|a, b| a.all.error.total_cmp(&b.all.error))
        });
        let sinks = results.residual_sinks.as_ref().map(|sinks| {
            let shares = sinks.layers.iter().map(|layer| layer.share_of_squares);
            (sinks.layers.iter().map(|layer| layer.n_dims).max().unwrap_or(0), shares.fold(0.0, f64::max))
        });
        let (life, attention) = (results.spike_life.as_ref(), results.attention_sinks.as_ref());
        if errors.is_none() && sinks.is_none() && life.is_none() && attention.is_none() {
            return None;
        }
        let percent = |pooled: Option<&PooledQuantization>| optional(pooled, |pooled| estimate(of(pooled), 3));
        Some(vec![
            model.number.to_string(),
            model.label.clone(),
            percent(plain(NumberFormat::Int8PerToken)),
            percent(plain(NumberFormat::Mxfp4)),
            optional(best, |best| format!("{} at {}", estimate(of(best), 3), best.all.rotation)),
            percent(plain(NumberFormat::Nvfp4)),
            optional(sinks, |(dims, share)| format!("{dims}, {:.1} %", 100.0 * share)),
            optional(life, |life| layers(life.onset_layer, life.fall_layer)),
            optional(attention.and_then(|sinks| sinks.first_key), |share| format!("{:.1} %", 100.0 * share)),
            optional(attention, |sinks| format!("{:.1}", sinks.largest_hidden)),
        ])
    };
    let rows: Vec<Vec<String>> = comparison.models.iter().filter_map(row).collect();
    (!rows.is_empty()).then(|| Sheet {
        name: "measured".to_owned(),
        title: "What outliers cost, and sinks".to_owned(),
        columns: vec![
            numbers("#"),
            words("model"),
            numbers("INT8 % (95 %)"),
            numbers("MXFP4 % (95 %)"),
            numbers("MXFP4 rotated at best"),
            numbers("NVFP4 % (95 %)"),
            numbers("most sinks, most of x^2"),
            words("spike in layers"),
            numbers("attention on the first key"),
            numbers("mean largest |hidden|"),
        ],
        rows,
        notes: vec![
            "INT8, MXFP4, NVFP4: relative squared error of a norm output, mean over sampled rows, in percent; rotated: by block Hadamard matrices of so \
             many dimensions. Intervals: bootstrap over sequences; the other figures have none. Attention and hidden states are measured \
             apart: neither says how large the other is"
                .to_owned(),
        ],
    })
}

fn is(pooled: &PooledQuantization, format: NumberFormat, rotation: usize) -> bool {
    (pooled.all.format, pooled.all.rotation) == (format, rotation)
}

/// A mean error in percent. Its interval is that of the mean over sequences.
fn of(pooled: &PooledQuantization) -> Estimate {
    let sequences: Vec<f64> = pooled.per_sequence.iter().flatten().map(|error| 100.0 * error).collect();
    let interval = interval(&sequences, |sample| mean(sample.iter().map(|error| **error)));
    Estimate { value: 100.0 * pooled.all.error, interval }
}

fn layers(onset: Option<usize>, fall: Option<usize>) -> String {
    match (onset, fall) {
        (None, _) => "none".to_owned(),
        (Some(onset), Some(fall)) => format!("{onset} to {}", fall.saturating_sub(1)),
        (Some(onset), None) => format!("{onset} to the last"),
    }
}

fn sheet(word: &str, title: &str, columns: Vec<Column>, rows: Vec<Vec<String>>, note: String) -> Sheet {
    Sheet { name: word.to_owned(), title: title.to_owned(), columns, rows, notes: vec![note] }
}

fn quantization(errors: &QuantizationErrors) -> Sheet {
    let columns = vec![
        words("format"),
        words("rotated by"),
        numbers("error, % (95 %)"),
        numbers("in outlier blocks"),
        numbers("outlier blocks"),
        words("worst norm output"),
        numbers("error there, %"),
    ];
    let row = |pooled: &PooledQuantization| {
        let all = &pooled.all;
        let at_sites = errors.sites.iter().filter(|site| site.point.is_norm_output()).filter_map(|site| {
            let same = |error: &&QuantizationError| (error.format, error.rotation) == (all.format, all.rotation);
            site.errors.iter().find(same).map(|error| (site, error.error))
        });
        let worst = at_sites.max_by(|a, b| a.1.total_cmp(&b.1));
        vec![
            all.format.label().to_owned(),
            if all.rotation == 0 { NONE.to_owned() } else { format!("Hadamard {}", all.rotation) },
            estimate(of(pooled), 4),
            format!("{:.1} %", 100.0 * all.share_in_outlier_blocks),
            format!("{:.1} %", 100.0 * all.outlier_blocks),
            optional(worst, |(site, _)| format!("layer {}, {}", site.layer, name(site.point))),
            optional(worst, |(_, error)| format!("{:.4}", 100.0 * error)),
        ]
    };
    let rows = errors.norm_outputs.iter().map(row).collect();
    let note = format!("Norm outputs together. Rule: {}. results.json has every studied site.", errors.rule);
    sheet("quantization-error", "What outliers cost in 8 and 4 bits", columns, rows, note)
}

fn residual_sinks(sinks: &ResidualSinks) -> Sheet {
    let columns = vec![
        numbers("layer"),
        numbers("sinks"),
        numbers("share of x^2"),
        words("dimensions: share of tokens, of x^2, gain of the next norm"),
    ];
    let rows = sinks.layers.iter().map(|layer| {
        let dims = layer.dims.iter().take(5).map(|sink| {
            let gain = optional(sink.gain, |gain| format!("{gain:.2}"));
            let [tokens, squares] = [sink.share_of_tokens, sink.share_of_squares].map(|share| 100.0 * share);
            format!("{}: {tokens:.0} %, {squares:.1} %, {gain}", sink.dim)
        });
        let dims = dims.collect::<Vec<_>>().join("; ");
        let share = format!("{:.1} %", 100.0 * layer.share_of_squares);
        vec![layer.layer.to_string(), layer.n_dims.to_string(), share, dims]
    });
    let note = format!(
        "Dimensions of the residual stream that are large at most tokens. Rule: {}. The norm that follows makes all others sqrt(1 - share) as \
         large as they would be without them. At most five are shown.",
        sinks.rule
    );
    sheet("residual-sinks", "Residual sinks", columns, rows.collect(), note)
}

fn spike_life(life: &SpikeLife) -> Sheet {
    let columns = vec![
        numbers("layer"),
        numbers("first token"),
        numbers("others"),
        numbers("attention adds"),
        numbers("MLP adds"),
        numbers("dimension"),
        numbers("agreement"),
        numbers("cosine with the layer before"),
    ];
    let value = |record: Option<Record>| optional(record, |record| format!("{:.1}", record.value));
    let rows = life.layers.iter().map(|layer| {
        vec![
            layer.layer.to_string(),
            format!("{:.1}", layer.first),
            optional(layer.others, |others| format!("{others:.1}")),
            value(layer.attention_out),
            value(layer.mlp_out),
            optional(layer.residual, |record| record.dim.to_string()),
            format!("{:.3}", layer.agreement),
            optional(layer.cosine_with_previous, |cosine| format!("{cosine:.3}")),
        ]
    });
    let note = format!(
        "First tokens of the sequences: the largest |x| of a token's residual stream, mean over tokens; the largest value that is added to \
         a first token, signed; the dimension of the largest value. Spike in layers: {}. Rule: {}.",
        layers(life.onset_layer, life.fall_layer),
        life.rule
    );
    sheet("spike-life", "The first token's spike", columns, rows.collect(), note)
}

fn attention_sinks(sinks: &AttentionSinks) -> Sheet {
    let columns = vec![
        numbers("layer"),
        numbers("on the first key"),
        numbers("least of a head"),
        numbers("most of a head"),
        numbers("mean largest |hidden|"),
    ];
    let percent = |share: f64| format!("{:.1} %", 100.0 * share);
    let rows = sinks.layers.iter().map(|layer| {
        let extreme = |better: fn(f64, f64) -> f64| layer.heads.iter().copied().reduce(better);
        vec![
            layer.layer.to_string(),
            optional(layer.first_key, percent),
            optional(extreme(f64::min), percent),
            optional(extreme(f64::max), percent),
            format!("{:.1}", layer.largest_hidden),
        ]
    });
    let note = format!("Rule: {}. One may be there without the other.", sinks.rule);
    sheet("attention-sinks", "Attention sinks", columns, rows.collect(), note)
}

#[cfg(test)]
mod tests {
    use outliers_protocol::files;
    use serde_json::json;

    use super::super::fixture::{change, copy};
    use super::super::folder::{Run, read_all};
    use super::super::sheet;
    use super::*;

    /// A real run's results with figures that were made up for it.
    fn measured() -> Run {
        let mut run = Run::fixture("dense");
        let error = |format: &str, rotation: u64, error: f64| {
            json!({"format": format, "rotation": rotation, "rows": 8, "error": error,
                   "share_in_outlier_blocks": 0.75, "outlier_blocks": 0.125, "per_sequence": [error, error, null, error]})
        };
        let errors = [error("mxfp4", 0, 0.02), error("mxfp4", 32, 0.01), error("nvfp4", 0, 0.005)];
        let spike = |layer: u64| {
            json!({"layer": layer, "first": 50.0, "others": 2.0, "residual": null, "attention_out": null,
                   "attention_out_others": 1.0, "mlp_out": null, "mlp_out_others": 1.0, "agreement": 1.0,
                   "cosine_with_previous": null})
        };
        let results = &mut run.results;
        results.quantization_error = serde_json::from_value(json!({
            "rule": "r", "norm_outputs": errors, "sites": [{"layer": 1, "point": "before_mlp", "errors": errors}],
        }))
        .unwrap();
        results.residual_sinks = serde_json::from_value(json!({"rule": "r", "layers": [{
            "layer": 0, "n_dims": 1, "share_of_squares": 0.4,
            "dims": [{"dim": 17, "share_of_tokens": 0.9, "share_of_squares": 0.4, "gain": null}],
        }]}))
        .unwrap();
        results.spike_life = serde_json::from_value(json!({
            "rule": "r", "onset_layer": 1, "fall_layer": 3, "layers": [spike(0), spike(1)],
        }))
        .unwrap();
        results.attention_sinks = serde_json::from_value(json!({
            "rule": "r", "first_key": 0.25, "largest_hidden": 9.5,
            "layers": [{"layer": 0, "first_key": 0.25, "heads": [0.125, 0.375], "largest_hidden": 9.5}],
        }))
        .unwrap();
        run
    }

    #[test]
    fn what_was_measured_has_tables_and_the_cost_is_the_first() {
        assert!(sheets(&Run::fixture("dense").results).is_empty());
        let sheets = sheets(&measured().results);
        let names: Vec<&str> = sheets.iter().map(|sheet| sheet.name.as_str()).collect();
        assert_eq!(names, ["quantization-error", "residual-sinks", "spike-life", "attention-sinks"]);
        for sheet in &sheets {
            assert!(!sheet.rows.is_empty() && sheet.rows.iter().all(|row| row.len() == sheet.columns.len()));
        }
        assert_eq!(sheets[0].rows[1][..4], ["MXFP4", "Hadamard 32", "1.0000 (1.0000 to 1.0000)", "75.0 %"]);
        assert_eq!(sheets[0].rows[0][5..], ["layer 1, norm before MLP", "2.0000"]);
        assert_eq!(sheets[1].rows[0][3], "17: 90 %, 40.0 %, -");
        assert!(sheets[2].notes[0].contains("Spike in layers: 1 to 2"), "{:?}", sheets[2].notes);
        assert_eq!(sheets[3].rows[0], ["0", "25.0 %", "12.5 %", "37.5 %", "9.5"]);
    }

    #[test]
    fn a_model_that_measured_has_a_line_beside_the_others() {
        let home = tempfile::tempdir().unwrap();
        let folder = copy("dense", &home.path().join("r"));
        let compared = || Comparison::of(read_all(std::slice::from_ref(&folder), false).unwrap());
        let plain = compared();
        assert!(sheet::sheets(&plain).iter().all(|sheet| sheet.name != "measured"));
        let with_figures = serde_json::to_value(&measured().results).unwrap();
        change(&folder, files::RESULTS, |document| *document = with_figures);
        let sheets = sheet::sheets(&compared());
        let sheet = sheets.iter().find(|sheet| sheet.name == "measured").expect("it was measured");
        let row: Vec<&str> = sheet.rows[0].iter().skip(2).map(String::as_str).collect();
        let errors = ["-", "2.000 (2.000 to 2.000)", "1.000 (1.000 to 1.000) at 32", "0.500 (0.500 to 0.500)"];
        assert_eq!(row, [&errors[..], &["1, 40.0 %", "1 to 2", "25.0 %", "9.5"]].concat());
    }
}
