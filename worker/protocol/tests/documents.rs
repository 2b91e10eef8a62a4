//! Documents as they lie on disk: what may be left out, what may not be misspelt, and names that
//! readers rely on.

use std::collections::BTreeSet;

use outliers_protocol::{
    Ablate, Ablation, Axis, BosPolicy, CorpusCompression, CorpusContent, CorpusFormat, CorpusSource, Dataset, JobSpec,
    ModelSource, Point, Precision, Reading, Results, SCHEMA, SiteKind, Weights,
};
use serde_json::json;

#[test]
fn job_needs_only_a_model() {
    let job: JobSpec = serde_json::from_value(json!({"model": {"hub": {"id": "owner/name"}}})).unwrap();
    assert_eq!(job, JobSpec::new(ModelSource::Hub { id: "owner/name".into(), revision: "main".into() }));
    assert_eq!((job.schema, job.thresholds.magnitude), (SCHEMA, 6.0));
    assert_eq!((job.thresholds.layer_fraction, job.thresholds.position_fraction), (0.25, 0.06));
    assert_eq!((job.precision, job.corpus.bos), (Precision::Auto, BosPolicy::Auto));
}

#[test]
fn job_keys_accept_option_spelling() {
    let document = |spelt: fn(&str) -> String| {
        let text = r#"{"model": {"hub": {"id": "owner_name/m"}}, "micro_batch_tokens": 64, "stream_budget_bytes": 5,
            "save_activations": "a", "sites": ["norms", "attention_out", "mlp_out", "expert_out"],
            "thresholds": {"layer_fraction": 0.5, "position_fraction": 0.1},
            "corpus": {"source": {"token_ids": "t"}, "num_sequences": 2, "sequence_length": 8, "text_field": "f",
                       "skip_documents": 1, "shuffle_seed": 3}}"#;
        serde_json::from_str::<JobSpec>(&spelt(text)).unwrap()
    };
    let job = document(|text| text.replace('_', "-").replace("owner-name", "owner_name"));
    assert_eq!(job, document(str::to_owned));
    assert_eq!(
        (job.micro_batch_tokens, job.corpus.shuffle_seed, job.thresholds.layer_fraction),
        (Some(64), Some(3), 0.5)
    );
    assert_eq!(serde_json::to_value(&job).unwrap()["micro_batch_tokens"], 64, "programs read one spelling");
}

#[test]
fn datasets_and_weights_round_trip() {
    for (text, id, revision, path) in [
        ("owner/name", "owner/name", "main", ""),
        ("owner/name@v2", "owner/name", "v2", ""),
        ("owner/name:sample/10BT/", "owner/name", "main", "sample/10BT"),
        ("owner/name@abc:a.jsonl", "owner/name", "abc", "a.jsonl"),
        ("fineweb-edu", "HuggingFaceFW/fineweb-edu", "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9", "sample/10BT"),
    ] {
        let dataset: Dataset = text.parse().unwrap();
        assert_eq!((dataset.id.as_str(), dataset.revision.as_str(), dataset.path.as_str()), (id, revision, path));
        assert_eq!(dataset.to_string().parse(), Ok(dataset));
    }
    for text in ["", "name", "owner/", "owner/name/more", "owner/name@", "/name", "fineweb"] {
        assert!(text.parse::<Dataset>().unwrap_err().contains("owner/name"), "{text}");
    }
    for text in ["hub", "cache", "local:/a b", "synthetic:7"] {
        assert_eq!(text.parse::<Weights>().unwrap().to_string(), text);
    }
}

#[test]
fn ablated_features_are_given_or_from_an_earlier_run() {
    let results = |path: &str| Ok(Ablate::Results(path.into()));
    assert_eq!("12,7".parse(), Ok(Ablate::Features(vec![12, 7])));
    assert_eq!(("runs/a".parse(), "a/r.json".parse()), (results("runs/a/results.json"), results("a/r.json")));
    for wrong in ["", ",", "1,,2", "99999999999999999999999"] {
        assert!(wrong.parse::<Ablate>().is_err(), "{wrong}");
    }
    assert_eq!(Ablation::of(vec![7, 3, 7]), Ok(Ablation { features: vec![3, 7], seed: 0 }));
    assert!(Ablation::of(Vec::new()).is_err());
}

#[test]
fn hub_access_is_given_to_jobs_that_need_it() {
    let hub = JobSpec::new(ModelSource::Hub { id: "owner/name".into(), revision: "main".into() });
    let mut folder = JobSpec::new(ModelSource::Folder { path: "/m".into() });
    assert!(hub.asks_the_hub() && !folder.asks_the_hub());
    folder.corpus.source = CorpusSource::Dataset("fineweb-edu".parse().unwrap());
    assert!(folder.asks_the_hub());
}

#[test]
fn misspelt_option_is_an_error() {
    for bad in [
        json!({"model": {"folder": {"path": "m"}}, "precison": "bf16"}),
        json!({"model": {"folder": {"path": "m", "revision": "x"}}}),
        json!({"model": {"folder": {"path": "m"}}, "corpus": {"num_sequence": 4}}),
        json!({"model": {"folder": {"path": "m"}}, "thresholds": {"magnitudes": 4.0}}),
        json!({"model": {"folder": {"path": "m"}}, "sites": ["residuals"]}),
        json!({}),
    ] {
        assert!(serde_json::from_value::<JobSpec>(bad.clone()).is_err(), "{bad}");
    }
}

#[test]
fn documents_round_trip() {
    let mut job = JobSpec::new(ModelSource::Folder { path: "/models/a b".into() });
    job.corpus.source = CorpusSource::Files(vec!["one.txt".into(), "two.txt".into()]);
    job.corpus.num_sequences = Some(3);
    job.devices = vec!["cpu:2".into()];
    job.layers = Some(1);
    job.sites = SiteKind::ALL.into();
    let text = serde_json::to_string(&job).unwrap();
    assert_eq!(serde_json::from_str::<JobSpec>(&text).unwrap(), job);
}

#[test]
fn readings_have_the_names_used_in_reports() {
    let names = [Reading::Unique, Reading::MeanPerSequence, Reading::SumOverSequences].map(|r| json!(r));
    assert_eq!(names, ["unique", "mean_per_sequence", "sum_over_sequences"]);
    assert_eq!([Axis::Layers, Axis::Sites].map(|a| json!(a)), ["layers", "sites"]);
}

#[test]
fn every_job_studies_norm_outputs() {
    let job = |sites: serde_json::Value| {
        serde_json::from_value::<JobSpec>(json!({"model": {"folder": {"path": "m"}}, "sites": sites})).unwrap()
    };
    let residual = job(json!(["residual"]));
    assert!(residual.studies(Point::AfterMlp) && residual.studies(Point::Residual));
    assert!(!residual.studies(Point::ExpertOut) && !residual.studies(Point::MlpOut));
    assert_eq!(job(json!(["expert_out", "norms"])).sites, BTreeSet::from([SiteKind::Norms, SiteKind::ExpertOut]));
    for plain in [job(json!([])), job(json!(["norms"]))] {
        assert!(serde_json::to_value(&plain).unwrap().get("sites").is_none(), "older workers take a plain job");
    }
}

#[test]
fn results_of_earlier_versions_are_read() {
    let old = json!({
        "schema": 1, "model": "m", "thresholds": {}, "n_layers": 1, "n_sites": 1, "hidden": 8, "sequences": 1,
        "tokens_per_sequence": 2, "verdicts": [], "features": [], "per_sequence": [],
        "sites": [{"layer": 0, "point": "before_mlp", "occurrences": 0, "features": 0, "max_abs": 1.0, "rms": 1.0, "kurtosis": 3.0}],
        "total_occurrences": 0, "max_abs": 1.0, "perplexity": null,
    });
    let results: Results = serde_json::from_value(old).unwrap();
    assert!(results.massive_activations.is_none() && results.routers.is_empty() && results.sites[0].rows.is_none());
}

#[test]
fn corpus_format_follows_the_file_extension() {
    use CorpusContent::{Csv, Json, JsonLines, Parquet, Text, Tsv};
    let (gzip, zstd) = (Some(CorpusCompression::Gzip), Some(CorpusCompression::Zstd));
    for (name, content, compression, ending) in [
        ("book.txt", Text, None, "txt"),
        ("book", Text, None, "txt"),
        ("/a.jsonl/book.md", Text, None, "txt"),
        ("book.gz", Text, gzip, "txt.gz"),
        ("a.jsonl", JsonLines, None, "jsonl"),
        ("A.NDJSON", JsonLines, None, "jsonl"),
        ("a.JSON.GZ", Json, gzip, "json.gz"),
        ("a.b.csv.zst", Csv, zstd, "csv.zst"),
        ("a.tsv", Tsv, None, "tsv"),
        ("0.Parquet", Parquet, None, "parquet"),
    ] {
        let format = CorpusFormat::of(name);
        assert_eq!(format, CorpusFormat { content, compression }, "{name}");
        assert_eq!(format.to_string(), ending, "{name}");
        assert_eq!(CorpusFormat::of(&format!("corpus-0.{ending}")), format, "{name}");
    }
}
