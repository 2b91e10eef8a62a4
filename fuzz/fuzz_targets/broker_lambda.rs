//! Answers of Lambda.

#![no_main]

use std::sync::LazyLock;

use outliers_fuzz::cloud::Cloud;

static CLOUD: LazyLock<Cloud> = LazyLock::new(|| Cloud::new("lambda", include_bytes!("../seeds/broker_lambda/offers")));

libfuzzer_sys::fuzz_target!(|script: &[u8]| CLOUD.run_script(script));
