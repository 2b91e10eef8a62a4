//! Tables of optional measurements (`--measure`).

use outliers_protocol::{
    AttentionSinkLayer, AttentionSinks, NumberFormat, PooledQuantization, QuantizationError, QuantizationErrors,
    Record, ResidualSinkLayer, ResidualSinks, Results, SpikeLayer, SpikeLife,
};

use super::bootstrap::{Estimate, interval, mean, middle, samples};
use super::comparison::{Compared, Comparison};
use super::table::{NONE, Table, estimate, numbers, optional, words};
use crate::ui::report::diagnostics::{name, pooled};

/// Tables of one model, quantisation errors first; empty without measurements.
pub(crate) fn tables(results: &Results) -> Vec<Table> {
    let all = [
        results.quantization_error.as_ref().map(quantization),
        results.residual_sinks.as_ref().map(residual_sinks),
        results.spike_life.as_ref().map(spike_life),
        results.attention_sinks.as_ref().map(attention_sinks),
    ];
    all.into_iter().flatten().collect()
}

/// A line per model with measurements; `None` if there are none.
pub(crate) fn across(comparison: &Comparison) -> Option<Table> {
    let measured = |results: &&Results| {
        results.quantization_error.is_some()
            || results.residual_sinks.is_some()
            || results.spike_life.is_some()
            || results.attention_sinks.is_some()
    };
    let models = comparison.models.iter();
    let rows: Vec<(&Compared, &Results)> =
        models.filter_map(|model| Some((model, model.results().filter(measured)?))).collect();
    let plain = |results: &Results, format: NumberFormat| {
        let errors = results.quantization_error.as_ref();
        let plain = errors.and_then(|errors| pooled(errors, format, 0));
        optional(plain, |of| estimate(relative_error(of), 3))
    };
    let rotated = |results: &Results| {
        let best = results.quantization_error.as_ref().and_then(best);
        optional(best, |(best, rotations)| format!("{} at {rotations}", estimate(relative_error(best), 3)))
    };
    let sinks = |results: &Results| {
        optional(results.residual_sinks.as_ref(), |sinks| {
            let dims = sinks.layers.iter().map(|layer| layer.n_dims).max().unwrap_or(0);
            format!("{dims}, {}", estimate(most_of_squares(sinks), 1))
        })
    };
    let attention = |results: &Results, of: fn(&AttentionSinks) -> Option<Estimate>| {
        optional(results.attention_sinks.as_ref().and_then(of), |found| estimate(found, 1))
    };
    let table = Table::of(
        ("measured", "What outliers cost, and sinks"),
        &rows,
        &[
            (numbers("#"), &|(model, _)| model.number.to_string()),
            (words("model"), &|(model, _)| model.label.clone()),
            (numbers("INT8 % (95 %)"), &|(_, results)| plain(results, NumberFormat::Int8PerToken)),
            (numbers("MXFP4 % (95 %)"), &|(_, results)| plain(results, NumberFormat::Mxfp4)),
            (numbers("MXFP4 rotated at best"), &|(_, results)| rotated(results)),
            (numbers("NVFP4 % (95 %)"), &|(_, results)| plain(results, NumberFormat::Nvfp4)),
            (numbers("most sinks, most of x^2 in % (95 %)"), &|(_, results)| sinks(results)),
            (words("spike in layers (95 %)"), &|(_, results)| optional(results.spike_life.as_ref(), spike_layers)),
            (numbers("attention on the first key, % (95 %)"), &|(_, results)| attention(results, first_key)),
            (numbers("mean largest |hidden| (95 %)"), &|(_, results)| {
                attention(results, |sinks| Some(largest_hidden(sinks)))
            }),
        ],
    )
    .noted(
        "INT8, MXFP4, NVFP4: relative squared error of a norm output, mean over sampled rows, in percent; rotated: by block Hadamard \
         matrices of so many dimensions, with those that sampling alone may set apart from the best; dimensions at the end that fill no \
         block are not rotated",
    )
    .noted(
        "Intervals: bootstrap over sequences; that of x^2 is of the sinks as they were found, and a spike has one of where it begins and \
         one of where it ends. Attention and hidden states are measured apart: neither says how large the other is",
    );
    (!rows.is_empty()).then_some(table)
}

/// A sentence on the 4-bit rounding errors of the models that measured them.
pub(crate) fn cost(comparison: &Comparison) -> Option<String> {
    let said = |model: &Compared| {
        let errors = model.results()?.quantization_error.as_ref()?;
        let plain = pooled(errors, NumberFormat::Mxfp4, 0)?;
        let (best, rotations) = best(errors)?;
        let [plain_error, best_error] = [plain, best].map(|pooled| estimate(relative_error(pooled), 3));
        let share = 100.0 * plain.all.share_in_outlier_blocks;
        let rotated = if best.all.rotation == 0 || !differ(plain, best) {
            "no rotation is better by more than sampling".to_owned()
        } else {
            format!("{best_error} rotated by {rotations}")
        };
        Some(format!("{plain_error}, {share:.0} % of it in blocks with an outlier, {rotated} ({})", model.label))
    };
    let costs: Vec<String> = comparison.models.iter().filter_map(said).collect();
    let about = "What outliers cost in 4 bits (MXFP4), in percent of norm outputs' x^2";
    (!costs.is_empty()).then(|| format!("{about}: {}.", costs.join("; ")))
}

/// A figure with the interval of its mean over sequences.
fn over(value: f64, per_sequence: &[f64]) -> Estimate {
    Estimate { value, interval: interval(per_sequence, |sample| mean(sample.iter().map(|value| **value))) }
}

/// A mean error in percent of x^2.
pub(super) fn relative_error(pooled: &PooledQuantization) -> Estimate {
    let sequences: Vec<f64> = pooled.per_sequence.iter().flatten().copied().collect();
    over(pooled.all.error, &sequences).scaled(100.0)
}

/// The lowest MXFP4 error, and its rotation with those that differ from it only by sampling.
fn best(errors: &QuantizationErrors) -> Option<(&PooledQuantization, String)> {
    let rotated = || errors.norm_outputs.iter().filter(|pooled| pooled.all.format == NumberFormat::Mxfp4);
    let best = rotated().min_by(|a, b| a.all.error.total_cmp(&b.all.error))?;
    let equal = rotated().filter(|pooled| pooled.all.rotation == best.all.rotation || !differ(pooled, best));
    let rotations: Vec<String> = equal.map(|pooled| pooled.all.rotation.to_string()).collect();
    Some((best, rotations.join(", ")))
}

/// Whether two mean errors differ by more than sampling: 0 is outside the interval of their
/// difference within sequences.
fn differ(a: &PooledQuantization, b: &PooledQuantization) -> bool {
    let pairs = a.per_sequence.iter().zip(&b.per_sequence);
    let differences: Vec<f64> = pairs.filter_map(|(a, b)| Some((*a)? - (*b)?)).collect();
    over(0.0, &differences).interval.is_some_and(|[low, high]| low > 0.0 || high < 0.0)
}

/// The largest share of x^2 in sinks after a layer, in percent.
fn most_of_squares(sinks: &ResidualSinks) -> Estimate {
    let shares = sinks.layers.iter().map(|layer| layer.share_of_squares);
    over(shares.fold(0.0, f64::max), &sinks.per_sequence).scaled(100.0)
}

/// Attention to the first key in percent, if a layer has a softmax.
fn first_key(sinks: &AttentionSinks) -> Option<Estimate> {
    Some(over(sinks.first_key?, &sinks.first_key_per_sequence).scaled(100.0))
}

fn largest_hidden(sinks: &AttentionSinks) -> Estimate {
    over(sinks.largest_hidden, &sinks.largest_hidden_per_sequence)
}

/// Layers of the spike, with the intervals of its first and last layer.
fn spike_layers(life: &SpikeLife) -> String {
    let (shown, sampled) = (layers(life.onset_layer, life.fall_layer), resampled(life));
    let end = |at: usize| middle(sampled.iter().map(|layers| layers.map(|layers| layers[at] as f64)));
    if let (Some([a, b]), Some([c, d])) = (end(0), end(1)) {
        return format!("{shown} (from {a} to {b}, until {c} to {d})");
    }
    match sampled.iter().flatten().count() {
        0 => shown,
        some => format!("{shown} (in {:.0} % of the samples)", 100.0 * some as f64 / sampled.len() as f64),
    }
}

/// First and last layer with a spike over samples of the sequences; `None` for a sample without
/// one. Empty for runs without data per sequence.
fn resampled(life: &SpikeLife) -> Vec<Option<[usize; 2]>> {
    let sequences = life.layers.first().map_or(0, |layer| layer.margins.len());
    if life.layers.iter().any(|layer| layer.margins.len() != sequences) {
        return Vec::new();
    }
    let sequences: Vec<usize> = (0..sequences).collect();
    samples(&sequences, |sample| {
        let is_spike = |layer: &&SpikeLayer| {
            let margins = sample.iter().map(|sequence| f64::from(layer.margins[**sequence]));
            layer.first > 0.0 && margins.sum::<f64>() >= 0.0
        };
        let (first, last) = (life.layers.iter().find(is_spike)?, life.layers.iter().rfind(is_spike)?);
        Some([first.layer, last.layer])
    })
}

fn layers(onset: Option<usize>, fall: Option<usize>) -> String {
    match (onset, fall) {
        (None, _) => "none".to_owned(),
        (Some(onset), Some(fall)) => format!("{onset} to {}", fall.saturating_sub(1)),
        (Some(onset), None) => format!("{onset} to the last"),
    }
}

fn quantization(errors: &QuantizationErrors) -> Table {
    let worst = |pooled: &PooledQuantization| {
        let all = &pooled.all;
        let at_sites = errors.sites.iter().filter(|site| site.point.is_norm_output()).filter_map(|site| {
            let same = |error: &&QuantizationError| (error.format, error.rotation) == (all.format, all.rotation);
            site.errors.iter().find(same).map(|error| (site, error.error))
        });
        at_sites.max_by(|a, b| a.1.total_cmp(&b.1))
    };
    let place = |pooled: &PooledQuantization| {
        optional(worst(pooled), |(site, _)| format!("layer {}, {}", site.layer, name(site.point)))
    };
    let rotation = |pooled: &PooledQuantization| match pooled.all.rotation {
        0 => NONE.to_owned(),
        dims => format!("Hadamard {dims}"),
    };
    Table::of(
        ("quantization-error", "What outliers cost in 8 and 4 bits"),
        &errors.norm_outputs,
        &[
            (words("format"), &|pooled| pooled.all.format.label().to_owned()),
            (words("rotated by"), &rotation),
            (numbers("error, % (95 %)"), &|pooled| estimate(relative_error(pooled), 4)),
            (numbers("in outlier blocks"), &|pooled| percent(pooled.all.share_in_outlier_blocks)),
            (numbers("outlier blocks"), &|pooled| percent(pooled.all.outlier_blocks)),
            (words("worst norm output"), &place),
            (numbers("error there, %"), &|pooled| {
                optional(worst(pooled), |(_, error)| format!("{:.4}", 100.0 * error))
            }),
        ],
    )
    .noted(format!("Norm outputs together. Rule: {}. results.json has every studied site.", errors.rule))
}

fn percent(share: f64) -> String {
    format!("{:.1} %", 100.0 * share)
}

fn residual_sinks(sinks: &ResidualSinks) -> Table {
    let dims = |layer: &ResidualSinkLayer| {
        let dims = layer.dims.iter().take(5).map(|sink| {
            let gain = optional(sink.gain, |gain| format!("{gain:.2}"));
            let [tokens, squares] = [sink.share_of_tokens, sink.share_of_squares].map(|share| 100.0 * share);
            format!("{}: {tokens:.0} %, {squares:.1} %, {gain}", sink.dim)
        });
        dims.collect::<Vec<_>>().join("; ")
    };
    Table::of(
        ("residual-sinks", "Residual sinks"),
        &sinks.layers,
        &[
            (numbers("layer"), &|layer| layer.layer.to_string()),
            (numbers("sinks"), &|layer| layer.n_dims.to_string()),
            (numbers("share of x^2"), &|layer| percent(layer.share_of_squares)),
            (numbers("others are rescaled by"), &|layer| {
                format!("{:.3}", (1.0 - layer.share_of_squares).max(0.0).sqrt())
            }),
            (words("dimensions: share of tokens, of x^2, gain of the next norm"), &dims),
        ],
    )
    .noted(format!(
        "Dimensions of the residual stream that are large at most tokens. Rule: {}. The norm that follows rescales all others by \
         sqrt(1 - share). Largest share, in percent (95 %): {}. At most five dimensions are shown.",
        sinks.rule,
        estimate(most_of_squares(sinks), 1)
    ))
}

fn spike_life(life: &SpikeLife) -> Table {
    let value = |record: Option<Record>| optional(record, |record| format!("{:.1}", record.value));
    Table::of(
        ("spike-life", "The first token's spike"),
        &life.layers,
        &[
            (numbers("layer"), &|layer| layer.layer.to_string()),
            (numbers("first token"), &|layer| format!("{:.1}", layer.first)),
            (numbers("others"), &|layer| optional(layer.others, |others| format!("{others:.1}"))),
            (numbers("attention adds"), &|layer| value(layer.attention_out)),
            (numbers("MLP adds"), &|layer| value(layer.mlp_out)),
            (numbers("dimension"), &|layer| optional(layer.residual, |record| record.dim.to_string())),
            (numbers("agreement"), &|layer| format!("{:.3}", layer.agreement)),
            (numbers("cosine with the layer before"), &|layer| {
                optional(layer.cosine_with_previous, |cosine| format!("{cosine:.3}"))
            }),
        ],
    )
    .noted(format!(
        "First tokens of the sequences: the largest |x| of a token's residual stream, mean over tokens; the largest value that is added to \
         a first token, signed; the dimension of the largest value. Spike in layers: {}. Rule: {}.",
        spike_layers(life),
        life.rule
    ))
}

fn attention_sinks(sinks: &AttentionSinks) -> Table {
    let extreme = |layer: &AttentionSinkLayer, better: fn(f64, f64) -> f64| {
        optional(layer.heads.iter().copied().reduce(better), percent)
    };
    Table::of(
        ("attention-sinks", "Attention sinks"),
        &sinks.layers,
        &[
            (numbers("layer"), &|layer| layer.layer.to_string()),
            (numbers("on the first key"), &|layer| optional(layer.first_key, percent)),
            (numbers("least of a head"), &|layer| extreme(layer, f64::min)),
            (numbers("most of a head"), &|layer| extreme(layer, f64::max)),
            (numbers("mean largest |hidden|"), &|layer| format!("{:.1}", layer.largest_hidden)),
        ],
    )
    .noted(format!(
        "Rule: {}. Means over layers (95 %): {} % on the first key, largest |hidden| {}. One may be there without the other.",
        sinks.rule,
        optional(first_key(sinks), |share| estimate(share, 1)),
        estimate(largest_hidden(sinks), 1)
    ))
}

#[cfg(test)]
mod tests {
    use outliers_protocol::files;
    use serde_json::json;

    use super::super::fixture::{change, copy};
    use super::super::folder::{Run, read_all};
    use super::super::table;
    use super::*;

    /// Results of a real run with synthetic measurements.
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
                   "cosine_with_previous": null, "margins": [if layer == 0 { -3.0 } else { 30.0 }, 30.0]})
        };
        let results = &mut run.results;
        results.quantization_error = serde_json::from_value(json!({
            "rule": "r", "norm_outputs": errors, "sites": [{"layer": 1, "point": "before_mlp", "errors": errors}],
        }))
        .unwrap();
        results.residual_sinks = serde_json::from_value(json!({"rule": "r", "per_sequence": [0.25, 0.55], "layers": [{
            "layer": 0, "n_dims": 1, "share_of_squares": 0.4,
            "dims": [{"dim": 17, "share_of_tokens": 0.9, "share_of_squares": 0.4, "gain": null}],
        }]}))
        .unwrap();
        results.spike_life = serde_json::from_value(json!({
            "rule": "r", "onset_layer": 1, "fall_layer": 3, "layers": [spike(0), spike(1)],
        }))
        .unwrap();
        results.attention_sinks = serde_json::from_value(json!({
            "rule": "r", "first_key": 0.25, "largest_hidden": 9.5, "first_key_per_sequence": [0.125, 0.375],
            "largest_hidden_per_sequence": [9.0, 10.0],
            "layers": [{"layer": 0, "first_key": 0.25, "heads": [0.125, 0.375], "largest_hidden": 9.5}],
        }))
        .unwrap();
        run
    }

    #[test]
    fn measurements_have_tables_with_cost_first() {
        assert!(tables(&Run::fixture("dense").results).is_empty());
        let tables = tables(&measured().results);
        let names: Vec<&str> = tables.iter().map(|table| table.name.as_str()).collect();
        assert_eq!(names, ["quantization-error", "residual-sinks", "spike-life", "attention-sinks"]);
        for table in &tables {
            assert!(!table.rows.is_empty() && table.rows.iter().all(|row| row.len() == table.columns.len()));
        }
        assert_eq!(tables[0].rows[1][..4], ["MXFP4", "Hadamard 32", "1.0000 (1.0000 to 1.0000)", "75.0 %"]);
        assert_eq!(tables[0].rows[0][5..], ["layer 1, norm before MLP", "2.0000"]);
        assert_eq!(tables[1].rows[0][2..], ["40.0 %", "0.775", "17: 90 %, 40.0 %, -"]);
        assert!(tables[1].notes[0].contains("(95 %): 40.0 (25.0 to 55.0)"), "{:?}", tables[1].notes);
        let spike = "Spike in layers: 1 to 2 (from 0 to 1, until 1 to 1)";
        assert!(tables[2].notes[0].contains(spike), "{:?}", tables[2].notes);
        assert_eq!(tables[3].rows[0], ["0", "25.0 %", "12.5 %", "37.5 %", "9.5"]);
    }

    #[test]
    fn measured_model_has_a_row_beside_the_others() {
        let home = tempfile::tempdir().unwrap();
        let folder = copy("dense", &home.path().join("r"));
        let compared = || Comparison::of(read_all(std::slice::from_ref(&folder), false).unwrap());
        let plain = compared();
        assert_eq!(cost(&plain), None);
        assert!(table::tables(&plain).iter().all(|table| table.name != "measured"));
        let with_figures = serde_json::to_value(&measured().results).unwrap();
        change(&folder, files::RESULTS, |document| *document = with_figures);
        let tables = table::tables(&compared());
        let table = tables.iter().find(|table| table.name == "measured").expect("it was measured");
        let cost = cost(&compared()).unwrap();
        let said = "2.000 (2.000 to 2.000), 75 % of it in blocks with an outlier, 1.000 (1.000 to 1.000) rotated by 32";
        assert!(cost.contains(said), "{cost}");
        let row: Vec<&str> = table.rows[0].iter().skip(2).map(String::as_str).collect();
        let errors = ["-", "2.000 (2.000 to 2.000)", "1.000 (1.000 to 1.000) at 32", "0.500 (0.500 to 0.500)"];
        let sinks = ["1, 40.0 (25.0 to 55.0)", "1 to 2 (from 0 to 1, until 1 to 1)"];
        let attention = ["25.0 (12.5 to 37.5)", "9.5 (9.0 to 10.0)"];
        assert_eq!(row, [&errors[..], &sinks, &attention].concat());
    }

    #[test]
    fn sampling_differences_are_not_ranked() {
        let of = |means: [[f64; 4]; 3]| {
            let pooled = |(rotation, per_sequence): (u64, [f64; 4])| {
                let error = per_sequence.iter().sum::<f64>() / 4.0;
                json!({"format": "mxfp4", "rotation": rotation, "rows": 8, "error": error, "share_in_outlier_blocks": 0.5,
                       "outlier_blocks": 0.5, "per_sequence": per_sequence})
            };
            let pooled: Vec<_> = [0, 16, 32].into_iter().zip(means).map(pooled).collect();
            let errors = json!({"rule": "r", "norm_outputs": pooled, "sites": []});
            let errors: QuantizationErrors = serde_json::from_value(errors).unwrap();
            best(&errors).unwrap().1
        };
        assert_eq!(of([[5.0, 6.0, 7.0, 8.0], [1.0, 2.0, 3.0, 4.0], [1.5, 2.5, 3.5, 4.5]]), "16", "in every sequence");
        assert_eq!(of([[5.0, 6.0, 7.0, 8.0], [1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.5, 1.0]]), "16, 32");
    }

    #[test]
    fn spike_missing_in_some_samples_is_marked() {
        let mut life = measured().results.spike_life.unwrap();
        life.layers.iter_mut().for_each(|layer| layer.margins = vec![-30.0, 10.0]);
        let said = spike_layers(&life);
        assert!(said.starts_with("1 to 2 (in 2") && said.ends_with(" % of the samples)"), "{said}");
        life.layers[0].margins.clear();
        assert_eq!(spike_layers(&life), "1 to 2");
    }
}
