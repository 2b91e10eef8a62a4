//! Differences of figures by definition, precision, text, windows or training instead of by model.

use outliers_protocol::{CONFIG_RULES, Metadata, ModelSource, Packing, Weights};
use serde::Serialize;

use super::comparison::{Compared, ResultKind};
use crate::text::counted;
use crate::units::in_percent;

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Difference {
    /// Short name of its subject.
    pub(crate) about: &'static str,
    pub(crate) says: String,
    /// Numbers of the models it applies to; empty: all figures.
    pub(crate) models: Vec<usize>,
}

/// A property of a model's figures, as text.
type Property = (&'static str, fn(&Compared) -> Option<String>);

const PROPERTIES: [Property; 13] = [
    ("definition", definition),
    ("weights", |model| made_up(model.provenance.as_deref()?)),
    ("thresholds", |model| model.provenance.as_deref().map(thresholds)),
    ("computed in", |model| model.provenance.as_deref().map(precision)),
    ("weights stored as", |model| model.provenance.as_deref().map(stored)),
    ("config.json", |model| config_rules(model.provenance.as_deref()?)),
    ("checkpoint", |model| checkpoint_notes(model.provenance.as_deref()?)),
    ("weight files", |model| unverified(model.provenance.as_deref()?)),
    ("text", |model| model.provenance.as_deref().map(text)),
    ("windows", windows),
    ("first token", |model| model.provenance.as_deref().map(first_token)),
    ("training", training),
    ("layers run", layers_run),
];

/// Notes on all figures.
const ALWAYS: [(&str, &str); 4] = [
    (
        "counted as",
        "by layers, a layer counts if either of its two norm outputs has a value over the threshold (the paper); by norm outputs, each of \
         the two counts by itself (the predecessor), so that the same share is harder to reach",
    ),
    (
        "pooled as",
        "unique: judged once over all sequences; mean per sequence and sum over sequences: judged within each sequence, so that in the sum \
         one feature counts as often as there are sequences in which it is systematic",
    ),
    (
        "intervals",
        "the middle 95 % of 4,000 resamples of the sequences with replacement. They say what other windows of the same text would give, not \
         other texts. Unique features are judged again over each resample, which lacks a third of the sequences and so the layers that are \
         reached in those alone: intervals of their L% lean low. Results of older workers, which do not say where features are within each \
         sequence, have none of unique features",
    ),
    ("perplexity", "per token of each model's own tokenizer: comparable between models of one tokenizer on one text"),
];

/// All differences. Models with the same value are grouped.
pub(super) fn differences(models: &[Compared]) -> Vec<Difference> {
    let always = ALWAYS.map(|(about, says)| Difference { about, says: says.to_owned(), models: Vec::new() });
    let mut all = Vec::from(always);
    for (about, of) in PROPERTIES {
        let mut groups: Vec<Difference> = Vec::new();
        for model in models.iter().filter(|model| !model.is_unusable()) {
            let Some(says) = of(model) else { continue };
            match groups.iter_mut().find(|group| group.says == says) {
                Some(group) => group.models.push(model.number),
                None => groups.push(Difference { about, says, models: vec![model.number] }),
            }
        }
        all.extend(groups);
    }
    all
}

fn definition(model: &Compared) -> Option<String> {
    match &model.standing {
        ResultKind::Imported { definition } => Some(format!("the predecessor's: {definition}")),
        ResultKind::Complete | ResultKind::Unusable(_) => None,
    }
}

fn made_up(metadata: &Metadata) -> Option<String> {
    let Weights::Synthetic { seed } = metadata.job.weights.as_ref()? else { return None };
    Some(format!("MADE UP (seed {seed}): random values in the model's shapes; nothing here is about the model"))
}

fn thresholds(metadata: &Metadata) -> String {
    let of = metadata.job.thresholds;
    format!(
        "|x| >= {}, in >= {} % of layers (or norm outputs) and at >= {} % of positions",
        of.magnitude,
        in_percent(of.layer_fraction),
        in_percent(of.position_fraction)
    )
}

fn precision(metadata: &Metadata) -> String {
    match metadata.compute_dtype.as_str() {
        "bf16" => "bf16: at a threshold of 6, values from 5.984375 up round to 6 and count".to_owned(),
        "f16" => "f16: at a threshold of 6, values from 5.998046875 up round to 6 and count".to_owned(),
        other => format!("{other}: values count from the threshold up, unrounded"),
    }
}

fn stored(metadata: &Metadata) -> String {
    metadata.model.stored_dtypes.keys().cloned().collect::<Vec<_>>().join(", ")
}

fn config_rules(metadata: &Metadata) -> Option<String> {
    let rules = metadata.model.config.as_ref().map_or(1, |config| config.rules);
    // What each version of the rules reads differently than the one before, from 2 on.
    const SINCE: [&str; CONFIG_RULES as usize - 1] = [
        "absent keys, windows, layer types and stored heads",
        "rotations of Gemma 3 and 4 for one kind of layers, and keys that are refused now",
    ];
    let changed = SINCE.get((rules as usize).saturating_sub(1)..).filter(|changed| !changed.is_empty())?;
    Some(format!(
        "read by rules {rules} of an older worker; rules {CONFIG_RULES} read as transformers does: {}: a run of today \
         may differ",
        changed.join("; ")
    ))
}

fn checkpoint_notes(metadata: &Metadata) -> Option<String> {
    let notes = &metadata.model.checkpoint_notes;
    (!notes.is_empty()).then(|| notes.join("; "))
}

fn unverified(metadata: &Metadata) -> Option<String> {
    let Some(verification) = &metadata.model.weight_verification else {
        let streamed = matches!(
            (&metadata.job.model, &metadata.job.weights),
            (ModelSource::Hub { .. }, None | Some(Weights::Hub))
        );
        return streamed.then(|| "weights unverified: an older worker compared no hashes".to_owned());
    };
    let warnings: Vec<String> = verification.warnings().collect();
    (!warnings.is_empty()).then(|| warnings.join("; "))
}

fn text(metadata: &Metadata) -> String {
    let corpus = &metadata.corpus;
    let hash: String = corpus.sha256.chars().take(12).collect();
    format!("{}, SHA-256 {hash}...", corpus.source)
}

fn windows(model: &Compared) -> Option<String> {
    let cut = match model.provenance.as_ref().map(|metadata| metadata.job.corpus.packing) {
        Some(Packing::Separate) => ", none over the end of a document",
        Some(Packing::Overlapping) => {
            ", each beginning in the middle of the one before it: nearly every token counts twice, and the intervals are too narrow"
        }
        Some(Packing::Packed) | None => "",
    };
    let (sequences, tokens) = (counted(model.sequences?, "sequence"), counted(model.tokens_per_sequence?, "token"));
    Some(format!("{sequences} of {tokens}{cut}"))
}

fn first_token(metadata: &Metadata) -> String {
    match &metadata.tokenizer {
        None => "whatever the given token ids begin with".to_owned(),
        Some(tokenizer) if tokenizer.bos_token_id.is_some() => {
            "the beginning-of-sequence token, on which massive activations like to sit".to_owned()
        }
        Some(_) => "a token of the text: no beginning-of-sequence token".to_owned(),
    }
}

fn training(model: &Compared) -> Option<String> {
    let says = match model.post_trained {
        Some(true) => "post-trained (instructions, reasoning, chat)",
        Some(false) => "a base model",
        None => "not known: the model is not in the catalogue",
    };
    Some(says.to_owned())
}

fn layers_run(model: &Compared) -> Option<String> {
    let layers = model.provenance.as_ref()?.job.layers?;
    Some(format!("only the first {layers}: shares are of those, and there is no perplexity"))
}

#[cfg(test)]
mod tests {
    use outliers_protocol::{CONFIG_RULES, Packing, Weights, files};
    use serde_json::json;

    use super::super::comparison::Comparison;
    use super::super::fixture::{change, copy, rename};
    use super::super::folder::read_all;

    #[test]
    fn rounding_before_the_threshold_is_said_of_each_precision() {
        let home = tempfile::tempdir().unwrap();
        for (folder, dtype) in ["f32", "bf16", "f16"].into_iter().enumerate() {
            let folder = copy("dense", &home.path().join(folder.to_string()));
            change(&folder, files::METADATA, |metadata| metadata["compute_dtype"] = json!(dtype));
        }
        let compared = Comparison::of(read_all(&[home.path().to_owned()], false).unwrap());
        let about = compared.differences.iter().filter(|difference| difference.about == "computed in");
        let says: Vec<&str> = about.map(|difference| difference.says.as_str()).collect();
        let [f32, bf16, f16] = says[..] else { panic!("{says:?}") };
        assert!(f32.ends_with("unrounded"), "{f32}");
        assert!(bf16.contains("5.984375 up round") && f16.contains("5.998046875 up round"), "{bf16}; {f16}");
    }

    #[test]
    fn incomparable_settings_are_noted_for_the_right_models() {
        let home = tempfile::tempdir().unwrap();
        let at = |name: &str| home.path().join(name);
        rename(&copy("mixture", &at("1")), "Qwen/Qwen3-30B-A3B");
        change(&at("1"), files::METADATA, |metadata| {
            metadata["compute_dtype"] = json!("bf16");
            metadata["job"]["layers"] = json!(3);
            metadata["job"]["corpus"]["packing"] = json!(Packing::Overlapping);
            metadata["job"]["weights"] = json!(Weights::Synthetic { seed: 7 });
            metadata["tokenizer"] = json!({"file": "t", "sha256": "s", "vocab": 9, "bos_token_id": 1});
        });
        rename(&copy("dense", &at("2")), "openai-community/gpt2");
        copy("dense", &at("3"));
        change(&at("3"), files::METADATA, |metadata| {
            let now = json!({"rules": CONFIG_RULES, "class": "GPT2Config", "defaults": {}, "nulls": [], "unknown": []});
            metadata["model"]["config"] = now;
            metadata["model"]["checkpoint_notes"] = json!(["a head of its own is stored"]);
            let left = json!([{"reason": "a folder lists no hashes", "files": ["model.safetensors"]}]);
            metadata["model"]["weight_verification"] = json!({"verified_files": 1, "unverified": left});
        });
        let compared = Comparison::of(read_all(&[home.path().to_owned()], false).unwrap());
        let of = |about: &str| {
            let these = compared.differences.iter().filter(|d| d.about == about);
            these.map(|d| (d.says.as_str(), d.models.as_slice())).collect::<Vec<_>>()
        };
        let numbers = |about: &str| of(about).iter().map(|(_, models)| models.to_vec()).collect::<Vec<_>>();
        assert!(of("computed in")[0].0.contains("5.984375"));
        assert_eq!(numbers("computed in"), [vec![1], vec![2, 3]]);
        assert_eq!(numbers("training"), [vec![1], vec![2], vec![3]]);
        assert_eq!(numbers("first token"), [vec![1], vec![2, 3]]);
        assert_eq!(numbers("layers run"), [vec![1]]);
        assert!(of("windows")[0].0.contains("counts twice"));
        assert_eq!(numbers("windows"), [vec![1], vec![2, 3]]);
        assert_eq!(numbers("weights"), [vec![1]]);
        assert!(of("weights")[0].0.contains("MADE UP (seed 7)"));
        assert!(of("weight files").iter().any(|(says, models)| {
            *says == "weights unverified: 1 of 2 files (a folder lists no hashes)" && models == &[3]
        }));
        assert_eq!(numbers("text"), [vec![1, 2, 3]]);
        assert_eq!(numbers("intervals"), [Vec::<usize>::new()]);
        assert_eq!(numbers("config.json"), [vec![1, 2]]);
        assert!(of("config.json")[0].0.contains("may differ"));
        assert_eq!(of("checkpoint"), [("a head of its own is stored", &[3][..])]);
    }
}
